"""``moelora generate``: answer a prompt."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from ..errors import DataError
from .common import (
    AsJson,
    Backbone,
    CacheDir,
    Checkpoint,
    LocalFilesOnly,
    Quantization,
    Revision,
    Subfolder,
    Token,
    hub_options,
    load_model,
    print_json,
)


def generate(
    path: Checkpoint,
    prompt: Annotated[str | None, typer.Argument(help="What to answer; without it, standard input is read.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token; above 0 it samples.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    backbone: Backbone = None,
    quantization: Quantization = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt with a trained mixture.

    Example: `moelora generate runs/quickstart "What is 17 + 25?"`
    """
    if prompt is None:
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise DataError("the prompt is empty: give it as an argument or on standard input")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    hub = hub_options(revision, subfolder, token, cache_dir, local_files_only)
    model = load_model(path, backbone, quantization, hub)
    answer = _answer(model, prompt.strip(), system, seed, {"max_new_tokens": max_new_tokens, **sampling})
    if as_json:
        print_json({"prompt": prompt.strip(), "answer": answer})
    else:
        typer.echo(answer)


def _answer(model: Any, prompt: str, system: str | None, seed: int, options: dict[str, Any]) -> str:
    import torch

    from ..data import ChatFormat, Example

    chat = ChatFormat(model.tokenizer)
    ids = torch.tensor([chat.prompt_ids(Example(prompt, "", "prompt", system))], device=model.device)
    stops = {model.tokenizer.eos_token_id, *(chat.end_ids if len(chat.end_ids) == 1 else [])} - {None}
    torch.manual_seed(seed)
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), eos_token_id=sorted(stops) or None, **options
    )
    return str(model.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip()
