"""Time training steps of a whole language model with experts in every FFN block, and measure their memory.

As model.py does for linears: a Llama of SmolLM2-135M's shape with random weights, forward, backward and AdamW on one
sequence, all variants interleaved in one process. The algorithm of MixLoRA's package, a loop over experts with small
tensors of its own, takes the place of the whole package, without its auxiliary loss.

Examples:
    python scripts/bench/block_model.py --threads 1 --rounds 10
    python scripts/bench/block_model.py --what memory    # one process for each variant, its peak
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
from block import ALPHA, LOOP, OURS, PROJECTIONS, RANK, LoopBlock
from common import Ratio, interleave, make_parser, parse, peaks, print_peak, report
from model import FROZEN, LINEARS, SHAPES, Result, make_backbone, training
from rich.console import Console
from torch import nn
from transformers import LlamaForCausalLM

import moelora
from moelora.experts import BlockContainer

LORA, LORA_EVERYWHERE = "PEFT LoRA r=16", "PEFT LoRA r=16, attention too"


def make(variant: str, backbone: LlamaForCausalLM) -> nn.Module:
    """``variant`` on a copy of ``backbone`` that shares its weights; no update is zero, so that every term counts."""
    shared = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    model = copy.deepcopy(backbone, shared)
    if variant == FROZEN:
        return model
    if variant in (LORA, LORA_EVERYWHERE):
        from peft import LoraConfig, inject_adapter_in_model

        targets = list(PROJECTIONS) if variant == LORA else LINEARS
        wrapped: nn.Module = inject_adapter_in_model(
            LoraConfig(r=2 * RANK, lora_alpha=4 * RANK, target_modules=targets), model
        )
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        return wrapped
    experts, top_k, implementation = OURS["moelora" if variant == LOOP else variant]
    site = {
        "target": "mlp",
        "experts": {"kind": "lora", "num_experts": experts, "r": RANK, "alpha": ALPHA},
        "router": {"kind": "topk", "top_k": top_k},
    }
    ours = moelora.attach(model, {"sites": [site]})
    for container in ours.containers().values():
        assert isinstance(container, BlockContainer)
        container.implementation = implementation
        for bank in container.banks():
            nn.init.normal_(bank.lora_B, std=0.02)
    if variant != LOOP:
        return ours
    for layer in model.model.layers:
        layer.mlp = LoopBlock(layer.mlp)
    return model


def speed(args: argparse.Namespace, console: Console) -> list[Result]:
    """Ratios of training steps."""
    backbone = make_backbone(args.shape, args.layers)
    ids_BS = torch.randint(0, backbone.config.vocab_size, (1, args.tokens))
    names = [FROZEN, LORA, LORA_EVERYWHERE, *args.variants]
    runs = {name: training(make(name, backbone), ids_BS, backbone) for name in names}
    times = interleave(runs, args, "step", console)
    return [
        Result(
            "step", args.shape, name, Ratio.of(own, times[LORA]), Ratio.of(own, times[FROZEN]), statistics.median(own)
        )
        for name, own in times.items()
    ]


def peak_of(args: argparse.Namespace) -> None:
    """Run two steps of one variant in this process, and print the most memory that it held, MiB."""
    backbone = make_backbone(args.shape, args.layers)
    ids_BS = torch.randint(0, backbone.config.vocab_size, (1, args.tokens))
    print_peak(training(make(args.child, backbone), ids_BS, backbone))


def main() -> None:
    """Parse the command line, measure, print."""
    parser = make_parser(__doc__, rounds=10)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2", help="the backbone (%(default)s)")
    parser.add_argument("--layers", type=int, help="layers instead of the shape's own number")
    parser.add_argument("--tokens", type=int, default=512, help="length of the sequence (%(default)s)")
    parser.add_argument("--what", choices=["step", "memory"], default="step")
    every = [*OURS, LOOP]
    parser.add_argument("--variants", nargs="+", choices=every, default=every, help="all by default")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parse(parser)
    if args.child is not None:
        peak_of(args)
    elif args.what == "memory":
        found = peaks(__file__, (FROZEN, LORA, LORA_EVERYWHERE, *args.variants), args)
        rows = [[name, f"{peak:.0f}", f"{peak / found[LORA]:.2f}"] for name, peak in found.items()]
        report(f"Peak of a training process, {args.shape}", ("variant", "MiB", "/ LoRA"), rows, args, [found])
    else:
        results = speed(args, Console(stderr=True))
        rows = [[r.variant, str(r.to_lora), str(r.to_frozen), f"{1e3 * r.median:.0f}"] for r in results]
        title = f"step of {args.shape}, T={args.tokens}"
        report(title, ("variant", f"/ {LORA}", "/ frozen", "ms"), rows, args, results)


if __name__ == "__main__":
    main()
