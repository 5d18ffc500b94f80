"""The block dispatch against a loop over single tokens, on outputs and on every gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moelora.dispatch import block
from moelora.dispatch.block import IMPLEMENTATIONS, BlockInputs

pytestmark = pytest.mark.smoke
NAMES = [field.name for field in fields(BlockInputs)]
ROUTES: dict[str, Sequence[Sequence[int]]] = {
    "top2": [[0, 1], [1, 2], [2, 0], [0, 2], [1, 0], [2, 1], [0, 1]],
    "top1": [[0], [0], [2], [0], [2], [2], [0]],  # expert 1 gets nothing
    "ragged": [[0, -1], [-1, -1], [2, 0], [-1, 2], [1, 0], [2, 1], [-1, -1]],
    "dense": [[0, 1, 2]] * 7,
    "one expert": [[1]] * 7,
    "nobody": [[-1, -1]] * 7,
}
RANKS = (2, 1, 3)
Case = tuple[BlockInputs, Tensor]


def make(
    route: str = "top2",
    *,
    ranks: Sequence[int] = RANKS,
    gated: bool = True,
    down: bool = True,
    activated: bool = True,
    keep: bool = False,
    dtype: torch.dtype = torch.float64,
    inner: int = 5,
    fused: bool = False,
) -> Case:
    indices_TK = torch.tensor(ROUTES[route])
    tokens, total = indices_TK.shape[0], sum(ranks)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    halves = new(tokens, 2 * inner).chunk(2, dim=1) if fused else (new(tokens, inner), new(tokens, inner))
    rows = new(2 * inner, total).chunk(2, dim=0) if fused else (new(inner, total), new(inner, total))
    low = new(tokens, total)
    weights = torch.rand(indices_TK.shape, dtype=torch.float64) * (indices_TK >= 0)
    inputs = BlockInputs(
        activated_TF=halves[0],
        multiplied_TF=halves[1] if gated else None,
        low_activated_TR=low if activated else None,
        B_activated_FR=rows[0] if activated else None,
        low_multiplied_TR=(low if fused else new(tokens, total)) if gated else None,
        B_multiplied_FR=rows[1] if gated else None,
        A_down_RF=new(total, inner) if down else None,
        weights_TK=weights.to(dtype),
        keep_TF=torch.randint(0, 2, (tokens, inner)).to(dtype) * 2 if keep else None,
    )
    return inputs, indices_TK


def oracle(
    x: BlockInputs, indices_TK: Tensor, ranks: Sequence[int], act: Callable[[Tensor], Tensor], normalized: bool
) -> tuple[Tensor, Tensor | None]:
    """The definition, one token and one slot at a time, in double precision."""
    edges = [sum(ranks[:e]) for e in range(len(ranks) + 1)]
    wide = [None if (t := getattr(x, name)) is None else t.detach().double() for name in NAMES]
    x = BlockInputs(*wide)  # type: ignore[arg-type]
    mix = torch.zeros_like(x.activated_TF)
    low = None if x.A_down_RF is None else x.activated_TF.new_zeros(len(mix), edges[-1])

    def activate(t: int, part: slice | None) -> Tensor:
        p = x.activated_TF[t]
        if part is not None and x.low_activated_TR is not None and x.B_activated_FR is not None:
            p = p + x.B_activated_FR[:, part] @ x.low_activated_TR[t, part]
        a = act(p)
        if x.multiplied_TF is None:
            return a
        u = x.multiplied_TF[t]
        if part is not None and x.low_multiplied_TR is not None and x.B_multiplied_FR is not None:
            u = u + x.B_multiplied_FR[:, part] @ x.low_multiplied_TR[t, part]
        return a * u

    for t in range(len(mix)):
        if normalized:  # around the frozen activation, which is the same where the weights of a token sum to 1
            mix[t] = activate(t, None) * (1 - x.weights_TK[t].sum())
        for slot, expert in enumerate(indices_TK[t].tolist()):
            if expert < 0:
                continue
            part = slice(edges[expert], edges[expert + 1])
            a = activate(t, part)
            mix[t] += x.weights_TK[t, slot] * a
            if low is not None and x.A_down_RF is not None:
                kept = a if x.keep_TF is None else a * x.keep_TF[t]
                low[t, part] = x.weights_TK[t, slot] * (x.A_down_RF[part] @ kept)
    return mix, low


def unit(case: Case) -> Case:
    """Weights of each token that sum to 1, as a normalising router gives them."""
    inputs, indices_TK = case
    weights = inputs.weights_TK.double() + (indices_TK >= 0) * 0.1
    return replace(inputs, weights_TK=(weights / weights.sum(-1, keepdim=True)).to(inputs.weights_TK.dtype)), indices_TK


def gradients(
    name: str,
    case: Case,
    ranks: Sequence[int] = RANKS,
    act: Callable[[Tensor], Tensor] = F.silu,
    normalized: bool = False,
) -> dict[str, Tensor]:
    """Outputs and the gradients of a fixed scalar, by name; weights are differentiated before normalisation."""
    inputs, indices_TK = case
    leaves = {
        n: t.detach().clone().requires_grad_(n != "keep_TF") for n in NAMES if (t := getattr(inputs, n)) is not None
    }
    used = dict(leaves)
    if normalized:
        used["weights_TK"] = used["weights_TK"] / used["weights_TK"].sum(-1, keepdim=True)
    mix, low = IMPLEMENTATIONS[name](BlockInputs(**{n: used.get(n) for n in NAMES}), indices_TK, ranks, act, normalized)
    generator = torch.Generator().manual_seed(1)
    total = (mix * torch.randn(mix.shape, generator=generator).to(mix)).sum()
    if low is not None:
        total = total + (low * torch.randn(low.shape, generator=generator).to(low)).sum()
    total.backward()
    found = {n: t.grad for n, t in leaves.items() if t.grad is not None}
    return {"mix": mix.detach(), **({} if low is None else {"low": low.detach()}), **found}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    for name in left.keys() | right.keys():
        a, b = left.get(name), right.get(name)
        a, b = (torch.zeros_like(b) if a is None else a), (torch.zeros_like(a) if b is None else b)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_outputs_are_the_definition(name: str, route: str, gated: bool, keep: bool) -> None:
    case = make(route, gated=gated, keep=keep)
    found = IMPLEMENTATIONS[name](*case, RANKS, F.gelu, False)
    torch.testing.assert_close(found, oracle(*case, RANKS, F.gelu, False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("route", ["top2", "top1", "dense"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_normalised_outputs_are_the_definition(name: str, route: str) -> None:
    case = unit(make(route))
    found = IMPLEMENTATIONS[name](*case, RANKS, F.silu, True)
    torch.testing.assert_close(found, oracle(*case, RANKS, F.silu, True), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, oracle(*case, RANKS, F.silu, False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [
    {}, {"gated": False}, {"down": False}, {"activated": False}, {"activated": False, "down": False}, {"keep": True},
    {"fused": True}, {"gated": False, "activated": False, "keep": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("route", ROUTES)
def test_gradients_are_those_of_autograd(route: str, options: dict[str, bool]) -> None:
    case = make(route, **options)
    assert_same(gradients("sorted", case), gradients("reference", case), 1e-11)


@pytest.mark.parametrize("route", ["top2", "top1", "dense"])
@pytest.mark.parametrize("options", [{}, {"gated": False}, {"keep": True}, {"fused": True}], ids=str)
def test_normalised_gradients_are_those_of_autograd(route: str, options: dict[str, bool]) -> None:
    case = unit(make(route, **options))
    fast, slow = (gradients(name, case, normalized=True) for name in ("sorted", "reference"))
    assert_same(fast, slow, 1e-11)


@pytest.mark.parametrize(
    "act",
    [F.silu, F.gelu, F.relu, torch.nn.SiLU(), torch.square, torch.nn.Identity()],
    ids=["silu", "gelu", "relu", "SiLU", "square", "Identity"],
)
def test_any_activation(act: Callable[[Tensor], Tensor]) -> None:
    for case in (make(), make(gated=False)):
        assert_same(gradients("sorted", case, act=act), gradients("reference", case, act=act), 1e-11)
        slow = gradients("reference", unit(case), act=act, normalized=True)
        assert_same(gradients("sorted", unit(case), act=act, normalized=True), slow, 1e-11)


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("dense", keep=True)
    whole = gradients("sorted", case)
    monkeypatch.setattr(block, "CPU_CHUNK", 3)
    assert_same(gradients("sorted", case), whole, 1e-12)


@pytest.mark.parametrize("route", ["top2", "ragged"])
def test_gradcheck(route: str) -> None:
    inputs, indices_TK = make(route, inner=3)
    given = {n: t.requires_grad_() for n in NAMES if (t := getattr(inputs, n)) is not None}

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        named = dict(zip(given, tensors, strict=True))
        return block.sorted_(BlockInputs(**{n: named.get(n) for n in NAMES}), indices_TK, RANKS, torch.tanh, False)

    assert torch.autograd.gradcheck(run, tuple(given.values()))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("normalized", [False, True])
def test_single_precision(name: str, normalized: bool) -> None:
    case = unit(make("top2", inner=64))
    single = BlockInputs(*(None if (t := getattr(case[0], n)) is None else t.float() for n in NAMES))
    exact = gradients("reference", case, normalized=normalized)
    found = gradients(name, (single, case[1]), normalized=normalized)
    assert_same({n: t.double() for n, t in found.items()}, exact, 2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalized", [False, True])
def test_half_precision_is_no_worse_than_plain_autograd(dtype: torch.dtype, normalized: bool) -> None:
    inputs, indices_TK = unit(make("top2", inner=64, dtype=dtype))
    wide = BlockInputs(*(None if (t := getattr(inputs, n)) is None else t.double() for n in NAMES))
    exact = gradients("reference", (wide, indices_TK), normalized=normalized)
    errors = {}
    for name in IMPLEMENTATIONS:
        found = gradients(name, (inputs, indices_TK), normalized=normalized)
        errors[name] = {n: float((t.double() - exact[n]).norm() / exact[n].norm()) for n, t in found.items()}
        assert all(t.dtype == dtype for t in found.values())
    allowed = 4 * torch.finfo(dtype).eps
    for n, error in errors["sorted"].items():
        assert error < max(allowed, 2 * errors["reference"][n]), (n, errors)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("normalized", [False, True])
def test_no_tokens(name: str, normalized: bool) -> None:
    inputs, indices_TK = make()
    given = {n: t for n in NAMES if (t := getattr(inputs, n)) is not None}
    cut = {n: t[:0] if n.endswith(("TF", "TR", "TK")) else t for n, t in given.items()}
    empty = replace(inputs, **cut)
    found = gradients(name, (empty, indices_TK[:0]), normalized=normalized)
    assert found["mix"].shape == (0, 5)
    assert found["low"].shape == (0, 6)
    assert all(float(t.abs().sum()) == 0 for t in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_zero_updates_leave_the_frozen_activation_bit_for_bit(dtype: torch.dtype, gated: bool) -> None:
    inputs, indices_TK = unit(make("dense", dtype=dtype, gated=gated))
    zeros = {
        n: torch.zeros_like(t) for n in ("B_activated_FR", "B_multiplied_FR") if (t := getattr(inputs, n)) is not None
    }
    mix, _ = block.sorted_(replace(inputs, **zeros), indices_TK, RANKS, F.silu, True)
    base = F.silu(inputs.activated_TF)
    assert torch.equal(mix, base if inputs.multiplied_TF is None else base * inputs.multiplied_TF)


@pytest.mark.parametrize("normalized", [False, True])
def test_inputs_are_left_alone(normalized: bool) -> None:
    case = unit(make("top2", keep=True))
    before = [None if (t := getattr(case[0], n)) is None else t.clone() for n in NAMES]
    gradients("sorted", case, normalized=normalized)
    for name, old in zip(NAMES, before, strict=True):
        assert old is None or torch.equal(getattr(case[0], name), old), name


def test_nothing_as_large_as_tokens_times_slots_is_kept_for_the_backward_pass() -> None:
    tokens, slots, inner, ranks = 64, 4, 96, (2,) * 4
    indices_TK = torch.arange(4).expand(tokens, slots)
    inputs = BlockInputs(
        activated_TF=torch.randn(tokens, inner, requires_grad=True),
        multiplied_TF=torch.randn(tokens, inner, requires_grad=True),
        low_activated_TR=torch.randn(tokens, 8, requires_grad=True),
        B_activated_FR=torch.randn(inner, 8, requires_grad=True),
        low_multiplied_TR=torch.randn(tokens, 8, requires_grad=True),
        B_multiplied_FR=torch.randn(inner, 8, requires_grad=True),
        A_down_RF=torch.randn(8, inner, requires_grad=True),
        weights_TK=torch.rand(tokens, slots, requires_grad=True),
        keep_TF=None,
    )
    given = {t.data_ptr() for n in NAMES if (t := getattr(inputs, n)) is not None}
    kept: dict[str, list[int]] = {}
    for name in IMPLEMENTATIONS:
        sizes = kept.setdefault(name, [])

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            if tensor.data_ptr() not in given:
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            IMPLEMENTATIONS[name](inputs, indices_TK, ranks, F.silu, False)
    assert max(kept["sorted"]) <= tokens * 8
    assert sum(kept["reference"]) > 10 * tokens * inner  # the measure itself sees what a plain loop keeps


def test_padding_rows_that_no_expert_takes_have_no_gradient() -> None:
    inputs, indices_TK = make("ragged", keep=True)
    found = gradients("sorted", (inputs, indices_TK))
    for row in (1, 6):
        for name in ("mix", "low", "activated_TF", "multiplied_TF", "low_activated_TR", "weights_TK"):
            assert float(found[name][row].abs().sum()) == 0, name


def test_the_router_learns_from_small_differences_in_half_precision() -> None:
    """Experts that hardly differ: the gradient of normalised weights is a small difference of large numbers."""
    errors: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for seed in range(8):
        torch.manual_seed(seed)
        inputs, indices_TK = unit(make("top2", inner=256, down=False))
        small = {n: getattr(inputs, n) * 0.02 for n in ("B_activated_FR", "B_multiplied_FR")}
        inputs = replace(inputs, **small)
        half = BlockInputs(*(None if (t := getattr(inputs, n)) is None else t.bfloat16() for n in NAMES))
        rounded = BlockInputs(*(None if (t := getattr(half, n)) is None else t.double() for n in NAMES))
        exact = gradients("reference", (rounded, indices_TK), normalized=True)["weights_TK"]
        for name in IMPLEMENTATIONS:
            found = gradients(name, (half, indices_TK), normalized=True)["weights_TK"]
            errors[name].append(float((found.double() - exact).norm() / exact.norm()))
    assert sum(errors["sorted"]) < 1.2 * sum(errors["reference"]), errors
