"""Time training steps and decoding of a whole language model with experts on every linear, against plain LoRA.

The backbone is a Llama of SmolLM2-135M's shape with random weights (nothing is downloaded: a time does not depend on
the values), or one that is 2048 wide. All variants share its frozen weights and run interleaved in one process. A step
is forward, backward and AdamW (fused, the Trainer's default) on one sequence; ours includes the auxiliary losses of the
router, as `model(..., labels=...)` adds them. Decoding is one token with a cache of the prompt.

Examples:
    python scripts/bench/model.py --threads 1 --rounds 10
    python scripts/bench/model.py --shape wide --what decode --rounds 40
    python scripts/bench/model.py --what memory        # one process for each variant, its peak
    python scripts/bench/model.py --what import        # seconds until the library can be used
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import Ratio, interleave, make_parser, parse, peaks, print_peak, report
from rich.console import Console
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import moelora

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA, FROZEN = "PEFT LoRA r=16", "frozen backbone"
# Variant: (experts, rank, picks) of ours, all at the linears.
OURS = {"E=8 k=2": (8, 8, 2), "E=8 k=4": (8, 8, 4), "E=64 k=2": (64, 8, 2)}
PROMPT = 64
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "wide": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 8192,
    },
}
# What a user of each library imports before the first model.
IMPORTS = {
    "transformers.AutoModel": "from transformers import AutoModel",
    "transformers.PreTrainedModel": "from transformers import PreTrainedModel",
    "peft": "from peft import LoraConfig, get_peft_model",
    "moelora": "import moelora",
    "moelora.attach": "from moelora import attach",
}


@dataclass(frozen=True)
class Result:
    """One measured thing of one variant; ``to_lora`` is its ratio to PEFT's plain LoRA, round by round."""

    what: str
    shape: str
    variant: str
    to_lora: Ratio
    to_frozen: Ratio
    median: float


def make_backbone(shape: str, layers: int | None) -> LlamaForCausalLM:
    """A frozen Llama with random weights."""
    torch.manual_seed(0)
    options = dict(SHAPES[shape])
    if layers is not None:
        options["num_hidden_layers"] = layers
    return LlamaForCausalLM(LlamaConfig(**options, tie_word_embeddings=True)).requires_grad_(False)


def make(variant: str, backbone: LlamaForCausalLM) -> nn.Module:
    """``variant`` on a copy of ``backbone`` that shares its weights; no update is zero, so that every term counts."""
    shared = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    model = copy.deepcopy(backbone, shared)
    if variant == FROZEN:
        return model
    if variant == LORA:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS)
        wrapped: nn.Module = inject_adapter_in_model(config, model)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        return wrapped
    experts, rank, picks = OURS[variant]
    site = {
        "target": LINEARS,
        "experts": {"kind": "lora", "num_experts": experts, "r": rank, "alpha": 2 * rank},
        "router": {"kind": "topk", "top_k": picks},
    }
    ours = moelora.attach(model, {"sites": [site]})
    for container in ours.containers().values():
        nn.init.normal_(container.lora_B, std=0.02)  # type: ignore[arg-type]
    return ours


def training(model: nn.Module, ids_BS: Tensor, backbone: LlamaForCausalLM) -> Callable[[], None]:
    """One step; the frozen backbone, which has nothing to train, gets a gradient for its embeddings instead."""
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        embedded = backbone.get_input_embeddings()(ids_BS).requires_grad_()
        return lambda: model(inputs_embeds=embedded, labels=ids_BS).loss.backward()  # type: ignore[no-any-return]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True)

    def step() -> None:
        model(input_ids=ids_BS, labels=ids_BS).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def decoding(model: nn.Module, ids_BS: Tensor) -> Callable[[], None]:
    """One token after a prompt whose keys and values are cached."""
    model.eval()
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids_BS[:, :PROMPT], past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def one_token() -> None:
        model(input_ids=ids_BS[:, PROMPT : PROMPT + 1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return one_token


def speed(what: str, args: argparse.Namespace, console: Console) -> list[Result]:
    """Ratios of training steps or of decoded tokens."""
    backbone = make_backbone(args.shape, args.layers)
    ids_BS = torch.randint(0, backbone.config.vocab_size, (1, args.tokens))
    prepare = partial(training, backbone=backbone) if what == "step" else decoding
    names = [FROZEN, LORA, *args.variants]
    runs = {name: prepare(make(name, backbone), ids_BS) for name in names}
    times = interleave(runs, args, what, console)
    return [
        Result(what, args.shape, name, Ratio.of(own, times[LORA]), Ratio.of(own, times[FROZEN]), statistics.median(own))
        for name, own in times.items()
    ]


def peak_of(args: argparse.Namespace) -> None:
    """Run two steps of one variant in this process, and print the most memory that it held, MiB."""
    backbone = make_backbone(args.shape, args.layers)
    ids_BS = torch.randint(0, backbone.config.vocab_size, (1, args.tokens))
    print_peak(training(make(args.child, backbone), ids_BS, backbone))


def imports(args: argparse.Namespace, console: Console) -> dict[str, list[float]]:
    """Seconds of a fresh process that imports each library and ends."""

    def start(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True)

    return interleave({name: partial(start, code) for name, code in IMPORTS.items()}, args, "import", console)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = make_parser(__doc__, rounds=10)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2", help="the backbone (%(default)s)")
    parser.add_argument("--layers", type=int, help="layers instead of the shape's own number")
    parser.add_argument("--tokens", type=int, default=512, help="length of the sequence, more than 64 (%(default)s)")
    parser.add_argument("--what", choices=["step", "decode", "memory", "import"], default="step")
    parser.add_argument("--variants", nargs="+", choices=list(OURS), default=list(OURS), help="ours; all by default")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parse(parser)
    console = Console(stderr=True)
    if args.child is not None:
        peak_of(args)
    elif args.what == "memory":
        found = peaks(__file__, (FROZEN, LORA, *args.variants), args)
        rows = [[name, f"{peak:.0f}", f"{peak / found[LORA]:.2f}"] for name, peak in found.items()]
        report(f"Peak of a training process, {args.shape}", ("variant", "MiB", "/ LoRA"), rows, args, [found])
    elif args.what == "import":
        times = imports(args, console)
        first = times["transformers.AutoModel"]
        rows = [[name, str(Ratio.of(own, first)), f"{statistics.median(own):.2f}"] for name, own in times.items()]
        report("Importing", ("what", "/ AutoModel", "s"), rows, args, [times])
    else:
        results = speed(args.what, args, console)
        rows = [[r.variant, str(r.to_lora), str(r.to_frozen), f"{1e3 * r.median:.0f}"] for r in results]
        title = f"{args.what} of {args.shape}, T={args.tokens}"
        report(title, ("variant", f"/ {LORA}", "/ frozen", "ms"), rows, args, results)


if __name__ == "__main__":
    main()
