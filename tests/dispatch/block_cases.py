"""Random inputs of a block site, its definition token by token, and outputs with gradients by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moelora.dispatch.block import IMPLEMENTATIONS, Activation, BlockInputs, LowRank

ROUTES: dict[str, Sequence[Sequence[int]]] = {
    "top2": [[0, 1], [1, 2], [2, 0], [0, 2], [1, 0], [2, 1], [0, 1]],
    "top1": [[0], [0], [2], [0], [2], [2], [0]],  # expert 1 gets nothing
    "ragged": [[0, -1], [-1, -1], [2, 0], [-1, 2], [1, 0], [2, 1], [-1, -1]],
    "dense": [[0, 1, 2]] * 7,
    "one expert": [[1]] * 7,
    "nobody": [[-1, -1]] * 7,
    "frozen block": [[0, 3], [1, 3], [3, 2], [3, -1], [0, 3], [3, 3], [2, 1]],  # expert 3 has rank 0
    "twice": [[0, 0], [1, 1], [2, 2], [1, 1], [0, 2], [0, 0], [1, 2]],
}
RANKS = (2, 1, 3, 0)
SILU = Activation(F.silu, "silu")
GELU = Activation(F.gelu, "gelu")
TANH = Activation(lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh")
OPTIONS: list[dict[str, bool]] = [
    {}, {"gated": False}, {"down": False}, {"activated": False}, {"activated": False, "down": False}, {"keep": True},
    {"fused": True}, {"gated": False, "activated": False, "keep": True}, {"gated": False, "down": False},
]  # fmt: skip


@dataclass
class Case:
    """Leaves by name, and how the inputs are made of them."""

    leaves: dict[str, Tensor]
    indices_TK: Tensor
    ranks: Sequence[int] = RANKS
    fused: bool = False
    unit: bool = False

    def inputs(self) -> BlockInputs:
        t = self.leaves.get
        low1 = low2 = None
        p, u, B1, B2 = t("p"), t("u"), t("B1"), t("B2")
        if self.fused:
            (p, u), (B1, B2) = self.leaves["p"].chunk(2, dim=1), self.leaves["B1"].chunk(2, dim=0)
        if B1 is not None:
            low1 = LowRank(self.leaves["x"], self.leaves["A1"], B1, 1.5)
        if B2 is not None:
            low2 = LowRank(self.leaves["x"], self.leaves["A1" if self.fused else "A2"], B2, self.leaves["scale"])
        if self.fused and low2 is not None:
            low2 = replace(low2, scale=1.5)
        down = (
            LowRank(None, self.leaves["A3"], self.leaves["B3"], self.leaves["scale"]) if "A3" in self.leaves else None
        )
        weights = self.leaves["weights"]
        if self.unit:
            weights = weights * (self.indices_TK >= 0)
            weights = weights / weights.sum(-1, keepdim=True)
        assert p is not None
        return BlockInputs(p, u, low1, low2, down, weights, t("keep"))

    def to(self, dtype: torch.dtype) -> Case:
        return replace(self, leaves={n: t.detach().to(dtype).clone() for n, t in self.leaves.items()})


def make(
    route: str | Tensor = "top2",
    *,
    ranks: Sequence[int] = RANKS,
    gated: bool = True,
    down: bool = True,
    activated: bool = True,
    keep: bool = False,
    inner: int = 5,
    width: int = 4,
    fused: bool = False,
    unit: bool = False,
) -> Case:
    """Random leaves in float64. ``unit``: weights that sum to 1 for every token, as a normalising router gives them."""
    indices_TK = route if isinstance(route, Tensor) else torch.tensor(ROUTES[route])
    tokens, total = indices_TK.shape[0], sum(ranks)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    leaves = {"x": new(tokens, width), "p": new(tokens, 2 * inner if fused else inner)}
    leaves["scale"] = torch.rand(total, dtype=torch.float64) + 0.5
    if activated:
        leaves |= {"A1": new(total, width), "B1": new(2 * inner if fused else inner, total)}
    if gated and not fused:
        leaves |= {"u": new(tokens, inner), "A2": new(total, width), "B2": new(inner, total)}
    if down:
        leaves |= {"A3": new(total, inner), "B3": new(width, total)}
    if keep:
        leaves["keep"] = torch.randint(0, 2, (tokens, inner)).double() * 2
    leaves["weights"] = (
        torch.rand(indices_TK.shape, dtype=torch.float64) + 0.1
    )  # in empty slots too: it must not matter
    return Case(leaves, indices_TK, ranks, fused, unit)


def oracle(case: Case, act: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
    """The definition, one token and one slot at a time."""
    x = case.inputs()
    edges = [sum(case.ranks[:e]) for e in range(len(case.ranks) + 1)]
    mix = torch.zeros_like(x.activated_TF)
    update = None if x.down is None else mix.new_zeros(len(mix), x.down.B_OR.shape[0])

    def add(low: LowRank, row: Tensor, part: slice) -> Tensor:
        scale = low.scale[part] if isinstance(low.scale, Tensor) else low.scale
        return low.B_OR[:, part] @ (low.A_RI[part] @ row * scale)

    for t, experts in enumerate(case.indices_TK.tolist()):
        for slot, expert in enumerate(experts):
            if expert < 0:
                continue
            part = slice(edges[expert], edges[expert + 1])
            p = x.activated_TF[t]
            a = act(p if x.activated is None else p + add(x.activated, case.leaves["x"][t], part))
            if x.multiplied_TF is not None:
                u = x.multiplied_TF[t]
                a = a * (u if x.multiplied is None else u + add(x.multiplied, case.leaves["x"][t], part))
            mix[t] += x.weights_TK[t, slot] * a
            if update is not None and x.down is not None:
                kept = a if x.keep_TF is None else a * x.keep_TF[t]
                update[t] += x.weights_TK[t, slot] * add(x.down, kept, part)
    return mix, update


def results(name: str, case: Case, act: Activation = SILU) -> dict[str, Tensor]:
    """Outputs and the gradients of a fixed scalar, by name; unit weights are differentiated before they are divided."""
    case = case.to(case.leaves["p"].dtype)
    for leaf, tensor in case.leaves.items():
        tensor.requires_grad_(leaf not in ("scale", "keep"))
    mix, update = IMPLEMENTATIONS[name](case.inputs(), case.indices_TK, case.ranks, act, case.unit)
    generator = torch.Generator().manual_seed(1)
    total = (mix * torch.randn(mix.shape, generator=generator).to(mix)).sum()
    if update is not None:
        total = total + (update * torch.randn(update.shape, generator=generator).to(update)).sum()
    total.backward()
    found = {"mix": mix.detach()} | ({} if update is None else {"update": update.detach()})
    grads = {n: t.grad if t.grad is not None else torch.zeros_like(t) for n, t in case.leaves.items()}
    return found | {n: grad for n, grad in grads.items() if n not in ("scale", "keep")}
