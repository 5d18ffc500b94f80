"""The block dispatch against a loop over single tokens, on outputs and on every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from block_cases import GELU, OPTIONS, RANKS, ROUTES, SILU, TANH, Case, make, oracle, results
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from moelora.dispatch import block_sorted, extension, slots
from moelora.dispatch.block import IMPLEMENTATIONS, Activation, choose

pytestmark = pytest.mark.smoke
FAST = ("sorted", "masked", "compiled")


def assert_agrees(name: str, case: Case, act: Activation = SILU) -> None:
    """With ``reference`` in float64: to its rounding, or to that of float32 for the compiled kernels."""
    if name == "compiled" and extension.library() is None:
        pytest.skip("no C++ compiler and ninja here")
    expected = results("reference", case, act)
    found = results(name, case.to(torch.float32) if name == "compiled" else case, act)
    for key, value in expected.items():
        limit = 1e-11 if name != "compiled" else 1e-6 if key in ("mix", "update") else 1e-5
        error = float((found[key].double() - value).abs().max()) if value.numel() else 0.0
        assert found[key].shape == value.shape
        assert error <= limit * float(value.abs().max() if value.numel() else 0) + 1e-12, (key, error)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_the_reference_is_the_definition(route: str, options: dict[str, bool]) -> None:
    case = make(route, **options)
    found = IMPLEMENTATIONS["reference"](case.inputs(), case.indices_TK, RANKS, GELU, False)
    torch.testing.assert_close(found, oracle(case, F.gelu), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("route", ["top2", "top1", "dense"])
def test_the_normalised_reference_is_the_definition(route: str) -> None:
    case = make(route, unit=True)
    found = IMPLEMENTATIONS["reference"](case.inputs(), case.indices_TK, RANKS, SILU, True)
    torch.testing.assert_close(found, oracle(case, F.silu), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", FAST)
def test_outputs_and_gradients_are_those_of_the_reference(name: str, route: str, options: dict[str, bool]) -> None:
    assert_agrees(name, make(route, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("route", ["top2", "top1", "dense", "frozen block"])
@pytest.mark.parametrize("name", FAST)
def test_normalised_ones_are_too(name: str, route: str, options: dict[str, bool]) -> None:
    case = make(route, unit=True, **options)
    assert_agrees(name, case)


@pytest.mark.parametrize("act", [SILU, GELU, TANH], ids=lambda act: act.formula)
@pytest.mark.parametrize("tokens", [0, 1, 7, 513])
@pytest.mark.parametrize("name", FAST)
def test_any_number_of_tokens(name: str, tokens: int, act: Activation) -> None:
    ranks = (3, 0, 9, 5, 4, 0)
    indices_TK = torch.rand(tokens, 5).topk(2, dim=-1).indices
    indices_TK[torch.rand(tokens, 2) < 0.1] = -1
    assert_agrees(name, make(indices_TK, ranks=ranks, inner=300, width=40, keep=True), act)


@pytest.mark.parametrize(
    "act",
    [F.relu, torch.square, torch.nn.Identity(), torch.nn.SiLU()],
    ids=["relu", "square", "identity", "silu"],
)
@pytest.mark.parametrize("name", ["sorted", "masked"])
def test_any_activation(name: str, act: Callable[[Tensor], Tensor]) -> None:
    for case in (make(), make(gated=False), make(unit=True), make(gated=False, activated=False)):
        assert_agrees(name, case, Activation(act))


@pytest.mark.parametrize("route", ["dense", "twice"])
def test_chunks_add_up(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sorted, "CPU_CHUNK", 3)
    assert_agrees("sorted", make(route, keep=True))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_threads_share_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "WORK", 1)
    case = make(torch.rand(70, 3).topk(2, dim=-1).indices, inner=307, width=70, keep=True)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert_agrees("compiled", case)
        first, again = (results("compiled", case.to(torch.float32)) for _ in range(2))
        assert all(torch.equal(first[n], again[n]) for n in first)


@pytest.mark.parametrize("name", ["sorted", "masked"])
@pytest.mark.parametrize("route", ["top2", "ragged"])
def test_gradcheck(route: str, name: str) -> None:
    case = make(route, inner=3, width=2)
    names = [n for n in case.leaves if n not in ("scale", "keep")]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        now = replace(case, leaves=case.leaves | dict(zip(names, tensors, strict=True)))
        return IMPLEMENTATIONS[name](now.inputs(), case.indices_TK, RANKS, Activation(torch.tanh), False)

    assert torch.autograd.gradcheck(run, tuple(case.leaves[n].requires_grad_() for n in names))


@pytest.mark.parametrize("name", ["sorted", "masked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unit", [False, True])
def test_half_precision_is_no_worse_than_plain_autograd(dtype: torch.dtype, unit: bool, name: str) -> None:
    half = make("top2", inner=64, unit=unit).to(dtype)
    exact = results("reference", half.to(torch.float64))
    errors = {}
    for each in (name, "reference"):
        found = results(each, half)
        errors[each] = {n: float((t.double() - exact[n]).norm() / exact[n].norm()) for n, t in found.items()}
        assert all(t.dtype == dtype for t in found.values())
    for n, error in errors[name].items():
        assert error < max(4 * torch.finfo(dtype).eps, 2 * errors["reference"][n]), (n, errors)


@pytest.mark.parametrize("name", ["sorted", "masked"])
def test_the_router_learns_from_small_differences_in_half_precision(name: str) -> None:
    """Experts that hardly differ: the gradient of normalised weights is a small difference of large numbers."""
    errors: dict[str, float] = {name: 0.0, "reference": 0.0}
    for seed in range(8):
        torch.manual_seed(seed)
        case = make("top2", inner=256, down=False, unit=True)
        case.leaves |= {n: case.leaves[n] * 0.02 for n in ("B1", "B2")}
        half = case.to(torch.bfloat16)
        exact = results("reference", half.to(torch.float64))["weights"]
        for each in errors:
            found = results(each, half)["weights"]
            errors[each] += float((found.double() - exact).norm() / exact.norm())
    assert errors[name] < 1.2 * errors["reference"], errors


@pytest.mark.parametrize("zero", [("A1", "A2"), ("B1", "B2"), ("B1", "A2")], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAST)
def test_without_updates_the_frozen_activation_comes_out_bit_for_bit(
    name: str, dtype: torch.dtype, gated: bool, zero: tuple[str, str]
) -> None:
    if name == "compiled" and (dtype != torch.float32 or extension.library() is None):
        pytest.skip("float32 only, where there is a compiler")
    case = make("dense", gated=gated, unit=True).to(dtype)
    for leaf in case.leaves.keys() & set(zero):
        case.leaves[leaf].zero_()
    x = case.inputs()
    mix, _ = IMPLEMENTATIONS[name](x, case.indices_TK, RANKS, SILU, True)
    base = F.silu(x.activated_TF)
    assert torch.equal(mix, base if x.multiplied_TF is None else base * x.multiplied_TF)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("unit", [False, True])
def test_inputs_are_left_alone(unit: bool, name: str) -> None:
    if name == "compiled" and extension.library() is None:
        pytest.skip("no C++ compiler and ninja here")
    case = make("top2", keep=True, unit=unit).to(torch.float32)
    before = {n: t.clone() for n, t in case.leaves.items()}
    leaves = {n: t.requires_grad_(n not in ("scale", "keep")) for n, t in case.leaves.items()}
    mix, update = IMPLEMENTATIONS[name](case.inputs(), case.indices_TK, RANKS, SILU, unit)
    assert update is not None
    (mix.sum() + update.sum()).backward()
    assert all(torch.equal(leaves[n], before[n]) for n in before)


@pytest.mark.parametrize("name", [*FAST, "reference"])
def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_slots(name: str) -> None:
    if name == "compiled" and extension.library() is None:
        pytest.skip("no C++ compiler and ninja here")
    sizes = []
    for top_k in (1, 4):
        case = make(torch.arange(top_k).expand(64, top_k), ranks=(2,) * 4, inner=96, width=32).to(torch.float32)
        leaves = {n: t.requires_grad_(n != "scale") for n, t in case.leaves.items()}
        given = {t.untyped_storage().data_ptr() for t in leaves.values()}
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor, kept: dict[int, Tensor] = kept, given: set[int] = given) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in given:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = IMPLEMENTATIONS[name](case.inputs(), case.indices_TK, case.ranks, SILU, False)
        assert all(t is not None for t in outputs)
        sizes.append(sum(t.untyped_storage().nbytes() // 4 for t in kept.values()))
    if name == "reference":
        assert sizes[0] > 10 * 64 * 96  # the measure itself sees what a plain loop keeps
    else:
        assert sizes[1] - sizes[0] <= 3 * 64 * (3 * 2 + 4)  # ranks and weights of three more slots
        assert sizes[1] <= 64 * (4 * 8 + 4 * 4)


@pytest.mark.parametrize("name", FAST)
def test_rows_that_no_expert_takes_have_no_gradient(name: str) -> None:
    if name == "compiled" and extension.library() is None:
        pytest.skip("no C++ compiler and ninja here")
    found = results(name, make("ragged", keep=True).to(torch.float32))
    for row in (1, 6):
        for key in ("mix", "update", "p", "u", "x", "weights"):
            assert float(found[key][row].abs().sum()) == 0, key


def test_the_choice_needs_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(torch.zeros(33, 1, dtype=torch.long))
    single, few = case.to(torch.float32).inputs(), make().inputs()
    monkeypatch.setattr(extension, "library", lambda: object())
    assert choose(single, SILU) == "compiled"
    assert choose(single, Activation(F.relu)) == "sorted"
    assert choose(case.inputs(), SILU) == "sorted"
    assert choose(few, SILU) == "masked"
    assert choose(replace(single, activated_TF=single.activated_TF.to("meta")), SILU) == "masked"
    monkeypatch.setattr(extension, "library", lambda: None)
    assert choose(single, SILU) == "sorted"


@pytest.mark.parametrize("ranks", [RANKS, (2, 2, 2, 0)], ids=str)
@pytest.mark.parametrize("unit", [False, True])
def test_masked_reads_no_value(unit: bool, ranks: Sequence[int]) -> None:
    """Fake tensors have no values: reading one, which would make a GPU wait, is an error."""
    case = make("top2", keep=True, unit=unit, ranks=ranks).to(torch.float32)
    with FakeTensorMode() as mode:
        fake = replace(
            case,
            leaves={n: mode.from_tensor(t).requires_grad_(n not in ("scale", "keep")) for n, t in case.leaves.items()},
            indices_TK=mode.from_tensor(case.indices_TK),
        )
        mix, update = IMPLEMENTATIONS["masked"](fake.inputs(), fake.indices_TK, ranks, SILU, unit)
        assert update is not None
        (mix.sum() + update.sum()).backward()
        assert all(t.grad is not None for n, t in fake.leaves.items() if n not in ("scale", "keep"))
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            IMPLEMENTATIONS["sorted"](fake.inputs(), fake.indices_TK, ranks, SILU, unit)
