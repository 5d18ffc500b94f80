"""``moelora analyze``: show where a mixture routes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import (
    Backbone,
    Checkpoint,
    Overrides,
    Quantization,
    RecipeOption,
    load_model,
    load_questions,
    read_questions,
    stdout,
)


def analyze(
    path: Checkpoint,
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; by default the checkpoint's, if local.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions read together.")] = 16,
    backbone: Backbone = None,
    quantization: Quantization = None,
) -> None:
    """Write the routing report of a checkpoint: expert load by layer and task, entropy, dead experts.

    Example: `moelora analyze runs/quickstart --out report`
    """
    questions = read_questions(path, recipe, overrides)
    examples = load_questions(questions).test
    model = load_model(path, backbone, quantization)
    from torch.utils.data import DataLoader

    from ..analysis import analyze as measure
    from ..analysis.findings import findings
    from ..data import Collator, tokenize

    tokens = tokenize(examples, model.tokenizer, questions.max_length)
    collate = Collator(model.tokenizer.pad_token_id, with_task_ids=True)
    folder = out or (Path(path) if Path(path).is_dir() else Path("routing"))
    stats = measure(
        model,
        DataLoader(tokens, batch_size=batch_size, collate_fn=collate),
        task_names=tokens.tasks,
        out=folder,
        model_name=path,
        data_name=f"{len(tokens)} test questions and their answers",
    )
    for finding in findings(stats):
        stdout().print(f"{finding.level}: {finding.text}", highlight=False, markup=False)
    stdout().print(f"wrote {folder / 'routing.html'}", highlight=False, markup=False)
