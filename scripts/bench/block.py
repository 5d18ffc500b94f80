"""Time a training step of an FFN block with routed LoRA experts against the frozen block and other implementations.

All variants run interleaved in one process: a machine that other work slows down slows them all, so the ratios hold
where the times do not. Every variant computes forward and backward with the block's own weights frozen and a gradient
for its input, which is what a layer in the middle of a model does.

Shapes: T tokens, D width of the block, E experts, K picks, r rank of an expert.

Example: python scripts/bench/block.py --threads 2 --shape smollm2
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from moelora.experts import BlockContainer, build

EXPERTS, TOP_K, RANK, ALPHA = 8, 2, 8, 16.0
PEFT_RANK = 16
SHAPES = {"smollm2": (576, 1536, 2048), "7b": (4096, 11008, 256)}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Result:
    """Figures of one variant at one shape; ratios are of a step to the frozen block's step of the same round.

    Attributes:
        ratio: median. low, high: quartiles. to_loop: median ratio to the loop over experts instead.
        seconds: median time of a step. kept_mib: what the forward pass keeps for the backward pass, weights not
            counted.
    """

    shape: str
    variant: str
    ratio: float
    low: float
    high: float
    to_loop: float
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

    def forward(self, x_TD: Tensor) -> Tensor:
        gate, up = self.base.gate_proj(x_TD), self.base.up_proj(x_TD)
        weights_TK, indices_TK = F.linear(x_TD, self.router).softmax(-1).topk(TOP_K, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        out_TD = torch.zeros_like(x_TD)
        for expert in range(EXPERTS):
            token, slot = torch.where(indices_TK == expert)
            x = x_TD[token]
            a = F.silu(gate[token] + self.update("gate_proj", expert, x))
            a = a * (up[token] + self.update("up_proj", expert, x))
            y = self.base.down_proj(a) + self.update("down_proj", expert, a)
            out_TD = out_TD.index_add(0, token, y * weights_TK[token, slot].unsqueeze(1))
        return out_TD


def make_base(width: int, inner: int) -> LlamaMLP:
    """A frozen random FFN block of a Llama."""
    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=width, intermediate_size=inner))
    return mlp.requires_grad_(False)


def make_container(base: nn.Module) -> BlockContainer:
    """Our block container on ``base``, its experts moved off zero so that every term counts."""
    site = {
        "target": "mlp",
        "experts": {"kind": "lora", "num_experts": EXPERTS, "r": RANK, "alpha": ALPHA},
        "router": {"kind": "topk", "top_k": TOP_K},
    }
    container = build(base, site)
    assert isinstance(container, BlockContainer)
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


def step(block: nn.Module, x_TD: Tensor, d_out_TD: Tensor) -> Tensor:
    """Forward and backward; gradients of the last step are dropped first, as an optimizer does."""
    block.zero_grad(set_to_none=True)
    x_TD.grad = None
    out: Tensor = block(x_TD)
    out.backward(d_out_TD)
    return out


def kept_for_backward(block: nn.Module, x_TD: Tensor) -> float:
    """MiB that the forward pass keeps for the backward pass, weights not counted, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, Tensor] = {}  # holding the tensors keeps their addresses from being used again

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x_TD)
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2**20


def check(ours: BlockContainer, loop: LoopBlock, x_TD: Tensor, d_out_TD: Tensor) -> float:
    """Largest relative difference of outputs and gradients among our two implementations and the loop.

    Raises:
        AssertionError: they disagree by more than float32 rounding.
    """
    found: list[list[Tensor]] = []
    for implementation in ("sorted", "reference"):
        ours.implementation = implementation
        out = step(ours, x_TD, d_out_TD).detach()
        grads = [p.grad.clone() for name in PROJECTIONS for p in ours.experts[name].parameters()]
        found.append([out, x_TD.grad.clone(), ours.router.weight.grad.clone(), *grads])
    ours.implementation = "sorted"
    out = step(loop, x_TD, d_out_TD).detach()
    grads = []
    for name in PROJECTIONS:
        pieces = [p.grad for p in loop.lora[name]]
        grads += [torch.cat(pieces[0::2], dim=0), torch.cat(pieces[1::2], dim=1)]
    found.append([out, x_TD.grad.clone(), loop.router.grad.clone(), *grads])
    worst = max(
        float((a - b).abs().max() / b.abs().max()) for other in found[:2] for a, b in zip(other, found[2], strict=True)
    )
    assert worst < 1e-4, f"the implementations disagree by {worst:.1e}: do not trust their times"
    return worst


def measure(shape: str, rounds: int, console: Console) -> list[Result]:
    """Time every variant at one shape."""
    width, inner, tokens = SHAPES[shape]
    base = make_base(width, inner)
    ours = make_container(base)
    loop = LoopBlock(ours)
    variants: dict[str, nn.Module] = {"frozen block": base, "moelora": ours, "loop over experts": loop}
    plain = make_peft(width, inner)
    if plain is not None:
        variants[f"PEFT LoRA r={PEFT_RANK}"] = plain
    x_TD = torch.randn(tokens, width, requires_grad=True)
    d_out_TD = torch.randn(tokens, width)
    worst = check(ours, loop, x_TD, d_out_TD)
    console.print(f"{shape}: {width}/{inner}, T={tokens}: implementations agree to {worst:.0e}")
    for block in variants.values():
        step(block, x_TD, d_out_TD)
    kept = {name: kept_for_backward(block, x_TD) for name, block in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    gc.disable()
    for _ in track(range(rounds), description=shape, console=console, transient=True):
        for name, block in variants.items():
            times[name].append(timed(lambda block=block: step(block, x_TD, d_out_TD)))
    gc.enable()
    return [summary(shape, name, times, kept[name]) for name in variants]


def timed(run: Callable[[], object]) -> float:
    """Seconds that ``run`` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def summary(shape: str, name: str, times: dict[str, list[float]], kept: float) -> Result:
    """Median and quartiles of the ratios, round by round."""
    own = times[name]
    low, middle, high = statistics.quantiles([a / b for a, b in zip(own, times["frozen block"], strict=True)], n=4)
    to_loop = statistics.median(a / b for a, b in zip(own, times["loop over experts"], strict=True))
    return Result(shape, name, middle, low, high, to_loop, statistics.median(own), kept)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds, at least 2 (%(default)s)")
    parser.add_argument("--shape", choices=list(SHAPES), help="one shape instead of all")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output instead of a table")
    args = parser.parse_args()
    if args.rounds < 2 or args.threads < 1:
        parser.error("--rounds takes 2 or more, --threads 1 or more")
    torch.set_num_threads(args.threads)
    console = Console(stderr=True)
    results = [r for shape in SHAPES if args.shape in (None, shape) for r in measure(shape, args.rounds, console)]
    if args.json:
        print(json.dumps({"threads": args.threads, "rounds": args.rounds, "results": [asdict(r) for r in results]}))
        return
    table = Table(
        title=f"A training step, E={EXPERTS} K={TOP_K} r={RANK}, {args.threads} threads, {args.rounds} rounds"
    )
    for heading in ("shape", "variant", "step / frozen", "quartiles", "step / loop", "ms", "kept MiB"):
        table.add_column(heading, justify="left" if heading in ("shape", "variant") else "right")
    for r in results:
        spread = f"{r.low:.2f}–{r.high:.2f}"
        figures = (f"{r.to_loop:.2f}", f"{1e3 * r.seconds:.1f}", f"{r.kept_mib:.1f}")
        table.add_row(r.shape, r.variant, f"{r.ratio:.2f}", spread, *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
