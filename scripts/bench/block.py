"""Time a training step of an FFN block with routed LoRA experts against the frozen block and other implementations.

Every variant computes forward and backward with the block's own weights frozen and a gradient for its input, which is
what a layer in the middle of a model does. MOELORA_CPP=0 shows what ours does where no compiler is.

Shapes: T tokens, D width of the block, E experts, K picks, r rank of an expert.

Example: python scripts/bench/block.py --threads 2 --shape smollm2
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from common import Ratio, interleave, kept_for_backward, make_parser, parse, report, step, worst_difference
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from moelora.dispatch import extension
from moelora.dispatch.block import Implementation
from moelora.experts import BlockContainer, build

RANK, ALPHA = 8, 16.0
PEFT_RANK = 16
FROZEN, LOOP = "frozen block", "loop over experts"
SHAPES = {"smollm2": (576, 1536, 2048), "7b": (4096, 11008, 256)}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Variant of ours: (experts, picks, implementation).
OURS: dict[str, tuple[int, int, Implementation]] = {
    "moelora": (8, 2, "auto"),
    "moelora, k=4": (8, 4, "auto"),
    "moelora, E=64": (64, 2, "auto"),
    "moelora in torch": (8, 2, "sorted"),
    "moelora in torch, k=4": (8, 4, "sorted"),
    "moelora in torch, E=64": (64, 2, "sorted"),
    "moelora for GPUs": (8, 2, "masked"),
}


@dataclass(frozen=True)
class Result:
    """Figures of one variant at one shape.

    Attributes:
        to_frozen, to_loop: ratio of a step to one of the frozen block, and of the loop over experts.
        seconds: median time of a step. kept_mib: what the forward pass keeps for the backward pass, weights not
            counted.
    """

    shape: str
    variant: str
    to_frozen: Ratio
    to_loop: Ratio
    seconds: float
    kept_mib: float


class LoopBlock(nn.Module):
    """The block as MixLoRA's package computes it, in plain autograd: a loop over experts with small tensors of its own.

    The frozen gate and up projections run once; every expert gathers its tokens, adapts both halves, and runs the
    frozen down projection and its own on them.
    """

    def __init__(self, source: BlockContainer) -> None:
        super().__init__()
        self.base = source.base
        self.top_k = source.config.router.top_k
        self.router = nn.Parameter(source.router.weight.detach().clone())
        self.lora = nn.ModuleDict()
        for name in PROJECTIONS:
            bank = source.experts[name]
            downs = bank.lora_A.detach().split(RANK, dim=0)
            ups = bank.lora_B.detach().split(RANK, dim=1)
            self.lora[name] = nn.ParameterList([p.clone() for pair in zip(downs, ups, strict=True) for p in pair])
        self.scale = ALPHA / RANK

    def update(self, name: str, expert: int, x: Tensor) -> Tensor:
        down, up = self.lora[name][2 * expert], self.lora[name][2 * expert + 1]
        return F.linear(F.linear(x, down), up) * self.scale

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        gate, up = self.base.gate_proj(x_TD), self.base.up_proj(x_TD)
        weights_TK, indices_TK = F.linear(x_TD, self.router).softmax(-1).topk(self.top_k, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        out_TD = torch.zeros_like(x_TD)
        for expert in range(self.router.shape[0]):
            token, slot = torch.where(indices_TK == expert)
            x = x_TD[token]
            a = F.silu(gate[token] + self.update("gate_proj", expert, x))
            a = a * (up[token] + self.update("up_proj", expert, x))
            y = self.base.down_proj(a) + self.update("down_proj", expert, a)
            out_TD = out_TD.index_add(0, token, y * weights_TK[token, slot].unsqueeze(1))
        return out_TD.reshape(hidden_states.shape)


def make_base(width: int, inner: int) -> LlamaMLP:
    """A frozen random FFN block of a Llama."""
    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=width, intermediate_size=inner))
    return mlp.requires_grad_(False)


def make_container(base: nn.Module, experts: int, top_k: int, implementation: Implementation) -> BlockContainer:
    """Our block container on ``base``, its experts moved off zero so that every term counts."""
    site = {
        "target": "mlp",
        "experts": {"kind": "lora", "num_experts": experts, "r": RANK, "alpha": ALPHA},
        "router": {"kind": "topk", "top_k": top_k},
    }
    container = build(base, site)
    assert isinstance(container, BlockContainer)
    container.implementation = implementation
    torch.manual_seed(1)
    for bank in container.banks():
        nn.init.normal_(bank.lora_B, std=0.02)
    nn.init.normal_(container.router.weight, std=container.site.in_features**-0.5)
    return container.train()


def make_peft(width: int, inner: int) -> nn.Module | None:
    """Plain LoRA by PEFT on the three projections of an equal block, or ``None`` where PEFT is not installed."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        return None
    config = LoraConfig(r=PEFT_RANK, lora_alpha=2 * PEFT_RANK, target_modules=list(PROJECTIONS))
    wrapped = inject_adapter_in_model(config, nn.ModuleDict({"mlp": make_base(width, inner)}))
    return wrapped["mlp"].train()


def check(ours: BlockContainer, loop: LoopBlock, x_TD: Tensor, d_out_TD: Tensor) -> float:
    """Largest relative difference of outputs and gradients among our implementations and the loop.

    Raises:
        AssertionError: they disagree by more than float32 rounding.
    """
    before, found = ours.implementation, []
    for implementation in ("auto", "sorted", "masked", "reference"):
        ours.implementation = implementation
        out = step(ours, x_TD, d_out_TD).detach()
        grads = [p.grad.clone() for name in PROJECTIONS for p in ours.experts[name].parameters()]
        found.append([out, x_TD.grad.clone(), ours.router.weight.grad.clone(), *grads])
    ours.implementation = before
    out = step(loop, x_TD, d_out_TD).detach()
    grads = []
    for name in PROJECTIONS:
        pieces = [p.grad for p in loop.lora[name]]
        grads += [torch.cat(pieces[0::2], dim=0), torch.cat(pieces[1::2], dim=1)]
    expected = [out, x_TD.grad.clone(), loop.router.grad.clone(), *grads]
    return max(worst_difference(each, expected) for each in found)


def measure(shape: str, args: argparse.Namespace, console: Console) -> list[Result]:
    """Time every variant at one shape."""
    width, inner, tokens = SHAPES[shape]
    base = make_base(width, inner)
    ours = {name: make_container(base, *OURS[name]) for name in args.variants}
    first = make_container(base, 8, 2, "auto")
    loop = LoopBlock(first)
    variants: dict[str, nn.Module] = {FROZEN: base, **ours, LOOP: loop}
    plain = make_peft(width, inner)
    if plain is not None:
        variants[f"PEFT LoRA r={PEFT_RANK}"] = plain
    x_TD = torch.randn(tokens, width, requires_grad=True)
    d_out_TD = torch.randn(tokens, width)
    worst = check(first, loop, x_TD, d_out_TD)
    kernels = "compiled" if extension.library() is not None else "no compiled"
    console.print(f"{shape}: {width}/{inner}, T={tokens}, {kernels} kernels: implementations agree to {worst:.0e}")
    kept = {name: kept_for_backward(block, x_TD) for name, block in variants.items()}
    runs = {name: partial(step, block, x_TD, d_out_TD) for name, block in variants.items()}
    times = interleave(runs, args, shape, console)
    return [
        Result(
            shape, name, Ratio.of(own, times[FROZEN]), Ratio.of(own, times[LOOP]), statistics.median(own), kept[name]
        )
        for name, own in times.items()
    ]


def main() -> None:
    """Parse the command line, measure, print."""
    parser = make_parser(__doc__, rounds=30)
    parser.add_argument("--shape", choices=list(SHAPES), help="one shape instead of all")
    parser.add_argument("--variants", nargs="+", choices=list(OURS), default=list(OURS), help="ours; all by default")
    args = parse(parser)
    console = Console(stderr=True)
    results = [r for shape in SHAPES if args.shape in (None, shape) for r in measure(shape, args, console)]
    rows = [
        [r.shape, r.variant, str(r.to_frozen), str(r.to_loop), f"{1e3 * r.seconds:.1f}", f"{r.kept_mib:.1f}"]
        for r in results
    ]
    title = f"A training step, E=8 k=2 r={RANK} where nothing else is said"
    report(title, ("shape", "variant", "step / frozen", "step / loop", "ms", "kept MiB"), rows, args, results)


if __name__ == "__main__":
    main()
