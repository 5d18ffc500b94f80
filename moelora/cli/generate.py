"""``moelora generate``: answer a prompt."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import DataError
from .output import AsJson, Backbone, Checkpoint, Quantization, load_model, print_json


def generate(
    path: Checkpoint,
    prompt: Annotated[str | None, typer.Argument(help="What to answer; without it, standard input is read.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token; above 0 it samples.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    backbone: Backbone = None,
    quantization: Quantization = None,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt with a trained mixture.

    Example: `moelora generate runs/quickstart "What is 17 + 25?"`
    """
    if prompt is None:
        prompt = sys.stdin.read().strip()
    if not prompt:
        raise DataError("the prompt is empty: give it as an argument or on standard input")
    from transformers import set_seed

    model = load_model(path, backbone, quantization)
    tokenizer = model.tokenizer
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    if as_json:
        print_json({"prompt": prompt, "answer": answer})
    else:
        typer.echo(answer)
