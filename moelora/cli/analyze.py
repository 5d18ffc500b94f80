"""``moelora analyze``: show where a mixture routes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import (
    Backbone,
    CacheDir,
    Checkpoint,
    LocalFilesOnly,
    Overrides,
    Quantization,
    RecipeOption,
    Revision,
    Subfolder,
    Token,
    hub_options,
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
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
) -> None:
    """Write the routing report of a checkpoint: expert load by layer and task, entropy, dead experts.

    Example: `moelora analyze runs/quickstart --out report`
    """
    questions = read_questions(path, recipe, overrides, subfolder)
    examples = load_questions(questions).test
    hub = hub_options(revision, subfolder, token, cache_dir, local_files_only)
    model = load_model(path, backbone, quantization, hub)
    from torch.utils.data import DataLoader

    from ..analysis import analyze as measure
    from ..analysis.findings import findings
    from ..data import Collator, tokenize

    tokens = tokenize(examples, model.tokenizer, questions.max_length)
    collate = Collator(model.tokenizer.pad_token_id, with_task_ids=True)
    beside = Path(path) / (subfolder or "")
    folder = out or (beside if beside.is_dir() else Path("routing"))
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
