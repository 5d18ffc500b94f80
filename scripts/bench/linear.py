"""Time a training step of one linear with routed LoRA experts against the frozen linear and other formulations.

Every variant computes forward and backward with the linear's own weight frozen and a gradient for its input, which is
what a linear in the middle of a model does. Besides ours there are plain LoRA by PEFT with as many ranks as a token
has active, and two formulations of published methods in plain autograd, in our own words:

* loop over chosen experts, as MoLA (arXiv 2402.08562) computes it: every expert gathers its tokens, and adds its update
  into a second output;
* loop over all experts, as LoRAMoE (arXiv 2312.09979) computes it: every expert sees every token, weighed by a softmax.

Before anything is timed, outputs and gradients of ours and of the first loop are compared.

Shapes: T tokens, D in, O out, E experts, K picks, r rank of an expert.

Examples:
    python scripts/bench/linear.py --threads 1
    python scripts/bench/linear.py --shape 2048 --experts 8 64 --picks 2 4
    python scripts/bench/linear.py --every                 # each implementation of ours by itself: where they cross
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from common import Ratio, interleave, kept_for_backward, make_parser, parse, report, step, worst_difference
from rich.console import Console
from torch import Tensor, nn

from moelora.dispatch import linear as dispatch
from moelora.experts import LinearContainer, build

RANK, ALPHA, PEFT_RANK = 8, 16.0, 16
SHAPES = {"576": (576, 576, 2048), "ffn": (576, 1536, 2048), "2048": (2048, 2048, 512), "4096": (4096, 4096, 512)}
FROZEN, LORA = "frozen", f"PEFT LoRA r={PEFT_RANK}"


@dataclass(frozen=True)
class Result:
    """Figures of one variant at one shape; kept_mib is what the forward keeps for the backward, weights not counted."""

    shape: str
    experts: int
    picks: int
    variant: str
    to_frozen: Ratio
    to_lora: Ratio
    seconds: float
    kept_mib: float


class ChosenLoop(nn.Module):
    """A loop over experts with small tensors of their own; each gathers the tokens that chose it."""

    def __init__(self, source: LinearContainer, picks: int) -> None:
        super().__init__()
        self.base, self.picks = source.base, picks
        self.router = nn.Parameter(source.router.weight.detach().clone())
        self.down = nn.ParameterList([p.clone() for p in source.lora_A.detach().split(RANK, dim=0)])
        self.up = nn.ParameterList([p.clone() for p in source.lora_B.detach().split(RANK, dim=1)])

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TK, indices_TK = F.linear(x_TD, self.router).softmax(-1).topk(self.picks, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        update_TO = x_TD.new_zeros(x_TD.shape[0], self.base.weight.shape[0])
        for expert, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            token, slot = torch.where(indices_TK == expert)
            rows = F.linear(F.linear(x_TD[token], down), up) * (ALPHA / RANK)
            update_TO = update_TO.index_add(0, token, rows * weights_TK[token, slot].unsqueeze(1))
        return self.base(x_TD) + update_TO


class DenseLoop(ChosenLoop):
    """Every expert on every token."""

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TE = F.linear(x_TD, self.router).softmax(-1)
        out_TO = self.base(x_TD)
        for expert, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            out_TO = out_TO + F.linear(F.linear(x_TD, down), up) * (ALPHA / RANK) * weights_TE[:, expert, None]
        return out_TO


class Forced(nn.Module):
    """Ours, by one implementation instead of the one that suits."""

    def __init__(self, container: LinearContainer, name: str) -> None:
        super().__init__()
        self.container, self.name = container, name

    def forward(self, x_TD: Tensor) -> Tensor:
        before, dispatch.choose = dispatch.choose, lambda *_: self.name
        try:
            return self.container(x_TD)  # type: ignore[no-any-return]
        finally:
            dispatch.choose = before


def make_ours(base: nn.Linear, experts: int, picks: int) -> LinearContainer:
    """Our container on ``base``, its experts moved off zero so that every term counts."""
    site = {
        "target": "any",
        "experts": {"kind": "lora", "num_experts": experts, "r": RANK, "alpha": ALPHA},
        "router": {"kind": "topk", "top_k": picks},
    }
    container = build(base, site)
    assert isinstance(container, LinearContainer)
    nn.init.normal_(container.lora_B, std=0.02)
    nn.init.normal_(container.router.weight, std=container.in_features**-0.5)
    return container.train()


def make_peft(base: nn.Linear) -> nn.Module:
    """Plain LoRA by PEFT on ``base``."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=PEFT_RANK, lora_alpha=2 * PEFT_RANK, target_modules=["linear"])
    wrapped: nn.Module = inject_adapter_in_model(config, nn.ModuleDict({"linear": base}))["linear"].train()
    nn.init.normal_(wrapped.lora_B["default"].weight, std=0.02)
    return wrapped


def check(ours: nn.Module, loop: ChosenLoop, container: LinearContainer, x_TD: Tensor, d_TO: Tensor) -> float:
    """Largest relative difference of ours and the loop, in the output and all gradients."""
    out = step(ours, x_TD, d_TO).detach()
    weights = (container.router.weight, container.lora_A, container.lora_B)
    found = [out, x_TD.grad.clone(), *(w.grad.clone() for w in weights)]
    expected = [step(loop, x_TD, d_TO).detach(), x_TD.grad.clone(), loop.router.grad]
    expected += [torch.cat([p.grad for p in loop.down]), torch.cat([p.grad for p in loop.up], dim=1)]
    return worst_difference(found, expected)


def measure(shape: str, experts: int, picks: int, args: argparse.Namespace, console: Console) -> list[Result]:
    """Time every variant at one shape."""
    width, out_width, tokens = SHAPES[shape]
    torch.manual_seed(0)
    base = nn.Linear(width, out_width, bias=False).requires_grad_(False)
    container = make_ours(base, experts, picks)
    x_TD, d_TO = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, out_width)
    x_TD.data /= width**0.5
    loop = ChosenLoop(container, picks)
    variants: dict[str, nn.Module] = {FROZEN: base, LORA: make_peft(base), "moelora": container}
    if args.every:
        variants |= {f"  {name}": Forced(container, name) for name in dispatch.IMPLEMENTATIONS if name != "reference"}
    else:
        variants |= {"loop over chosen": loop, "loop over all": DenseLoop(container, picks)}
    worst = max(check(ours, loop, container, x_TD, d_TO) for ours in variants.values() if _is_ours(ours))
    console.print(f"{shape}: {width}/{out_width}, T={tokens}, E={experts} K={picks}: ours are the loop to {worst:.0e}")
    runs: dict[str, Callable[[], object]] = {name: partial(step, v, x_TD, d_TO) for name, v in variants.items()}
    kept = {name: kept_for_backward(variant, x_TD) for name, variant in variants.items()}
    times = interleave(runs, args, shape, console)
    return [
        Result(
            shape,
            experts,
            picks,
            name,
            Ratio.of(own, times[FROZEN]),
            Ratio.of(own, times[LORA]),
            statistics.median(own),
            kept[name],
        )
        for name, own in times.items()
    ]


def _is_ours(variant: nn.Module) -> bool:
    return isinstance(variant, LinearContainer | Forced)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = make_parser(__doc__, rounds=15)
    parser.add_argument("--shape", choices=list(SHAPES), help="one shape instead of all")
    parser.add_argument("--experts", type=int, nargs="+", default=[8], help="numbers of experts (8)")
    parser.add_argument("--picks", type=int, nargs="+", default=[2], help="experts per token (2)")
    parser.add_argument("--every", action="store_true", help="each implementation of ours instead of the loops")
    args = parse(parser)
    console = Console(stderr=True)
    cases = [(s, e, k) for s in SHAPES if args.shape in (None, s) for e in args.experts for k in args.picks]
    results = [result for case in cases for result in measure(*case, args, console)]
    rows = [
        [
            r.variant,
            f"{r.shape} E={r.experts} K={r.picks}",
            str(r.to_frozen),
            str(r.to_lora),
            f"{1e3 * r.seconds:.1f}",
            f"{r.kept_mib:.2f}",
        ]
        for r in results
    ]
    headings = ("variant", "shape", "step / frozen", "step / LoRA", "ms", "kept MiB")
    report(f"A training step of a linear, r={RANK}", headings, rows, args, results)


if __name__ == "__main__":
    main()
