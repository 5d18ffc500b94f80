"""Time generated tokens of X-LoRA: two caches here, everything anew for each token in PEFT.

The published code runs the whole sequence twice for every token and refuses a cache. Here each of the two passes has
its own stream of keys and values (moelora/scoring.py), so a token costs two token forwards. All variants are the same
mixture on the same random weights: a Llama of SmolLM2-135M's shape, four adapters of rank 8 on every linear, a
layerwise classifier. Ours is converted to PEFT's layout and PEFT loads it; before anything is timed their logits and
tokens are compared.

Examples:
    python scripts/bench/xlora.py --threads 1 --clock cpu --layers 6
    python scripts/bench/xlora.py --lengths 16 64 --rounds 2
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import Ratio, interleave, make_parser, parse, report, worst_difference
from model import LINEARS, SHAPES, make_backbone
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import moelora
from moelora import checkpoints

PEFT, OURS, UNCACHED, FROZEN = "PEFT X-LoRA", "moelora", "moelora, no cache", "frozen backbone"
SITE = {
    "target": LINEARS,
    "experts": {"kind": "frozen", "num_experts": 4, "r": 8, "alpha": 16},
    "router": {"kind": "xlora", "layerwise": True},
}


@dataclass(frozen=True)
class Result:
    """One variant at one length: its time over PEFT's and over the frozen backbone's; milliseconds for a token."""

    tokens: int
    variant: str
    from_peft: Ratio
    to_frozen: Ratio
    median: float


def make(backbone: LlamaForCausalLM) -> dict[str, nn.Module]:
    """Every variant, on copies of ``backbone`` that share its weights."""
    shared = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    copies = [copy.deepcopy(backbone, dict(shared)).eval() for _ in range(3)]
    ours = moelora.attach(copies[0], {"sites": [SITE]}).eval()
    with torch.no_grad():
        for name, value in ours.adapter_tensors().items():
            value.normal_(std=0.02 if name.endswith("lora_B") else value.shape[-1] ** -0.5)
    with TemporaryDirectory() as folder:
        ours.save_pretrained(f"{folder}/native")
        checkpoints.convert(f"{folder}/native", f"{folder}/peft", to="peft_xlora")
        peft = open_in_peft(Path(folder) / "peft", copies[1])
    return {PEFT: peft, OURS: ours, UNCACHED: ours, FROZEN: copies[2]}


def open_in_peft(folder: Path, backbone: LlamaForCausalLM) -> nn.Module:
    """Load a checkpoint in PEFT's layout with PEFT."""
    from peft import PeftConfig, PeftModel

    config: Any = PeftConfig.from_pretrained(str(folder))
    config.adapters = {key: str(folder / path) for key, path in config.adapters.items()}
    backbone.config.use_cache = False  # else PEFT refuses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model: nn.Module = PeftModel.from_pretrained(backbone, str(folder), config=config)
    return model.eval()


def generation(variant: str, model: Any, prompt_BS: Tensor, tokens: int) -> Callable[[], Tensor]:
    """So many greedy tokens after the prompt."""
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompt_BS)
    cached = variant in (OURS, FROZEN)
    return partial(model.generate, input_ids=prompt_BS, attention_mask=mask, use_cache=cached, **options)


def check(models: Mapping[str, Any], prompt_BS: Tensor) -> None:
    """Stop unless all variants of X-LoRA are one mixture, and none is the frozen backbone.

    Raises:
        AssertionError: they differ.
    """
    with torch.no_grad():
        logits = {name: model(input_ids=prompt_BS).logits for name, model in models.items()}
    worst_difference([logits[OURS]], [logits[PEFT]])
    assert (logits[OURS] - logits[FROZEN]).abs().max() > 0.01 * logits[FROZEN].abs().max()
    runs = [generation(name, models[name], prompt_BS, 8)() for name in (PEFT, OURS, UNCACHED)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[1], runs[2]), "the variants generate different tokens"


def measure(models: Mapping[str, Any], args: argparse.Namespace, console: Console) -> list[Result]:
    """Every variant at every length."""
    torch.manual_seed(1)
    prompt_BS = torch.randint(0, SHAPES[args.shape]["vocab_size"], (1, args.prompt))
    check(models, prompt_BS)
    results = []
    for tokens in args.lengths:
        runs = {name: generation(name, model, prompt_BS, tokens) for name, model in models.items()}
        times = interleave(runs, args, f"{tokens} tokens", console)
        for name, own in times.items():
            ratios = Ratio.of(times[PEFT], own), Ratio.of(own, times[FROZEN])
            results.append(Result(tokens, name, *ratios, 1000 * statistics.median(own) / tokens))
    return results


def main() -> None:
    """Parse the command line, measure, print."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2", help="the backbone (%(default)s)")
    parser.add_argument("--layers", type=int, help="layers instead of the shape's own number")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt (%(default)s)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[16, 64, 128], help="tokens to generate (%(default)s)"
    )
    args = parse(parser)
    console = Console(stderr=True)
    results = measure(make(make_backbone(args.shape, args.layers)), args, console)
    rows = [
        [str(each.tokens), each.variant, str(each.from_peft), str(each.to_frozen), f"{each.median:.1f}"]
        for each in results
    ]
    headings = ("tokens", "variant", "PEFT / this", "/ frozen", "ms / token")
    report(f"Generated tokens of X-LoRA, {args.shape}", headings, rows, args, results)


if __name__ == "__main__":
    main()
