"""The linear dispatch against one expert and one token at a time, in every implementation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moelora.dispatch import linear, linear_sorted
from moelora.dispatch.extension import library
from moelora.dispatch.linear import IMPLEMENTATIONS, Gate

pytestmark = pytest.mark.smoke
RANKS = [(2, 2, 2), (1, 4, 2), (3,)]
FAST = ["plain", "fused", "sorted", "compiled"]
ONE_NODE = ["fused", "sorted", "compiled"]
Given = list[Tensor]


def make(ranks: Sequence[int], tokens: int = 5, dtype: torch.dtype = torch.float64, width: int = 6) -> Given:
    """Output of the frozen linear, input, lora_A, lora_B, weights."""
    total = sum(ranks)
    shapes = ((tokens, 4), (tokens, width), (total, width), (4, total), (tokens, len(ranks)))
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def oracle(out: Tensor, x_TD: Tensor, A: Tensor, B: Tensor, weights_TE: Tensor, ranks: Sequence[int]) -> Tensor:
    rows = []
    for row, x, weights in zip(out, x_TD, weights_TE, strict=True):
        start, total = 0, row
        for weight, rank in zip(weights, ranks, strict=True):
            part = slice(start, start + rank)
            total = total + weight * 0.5 * (B[:, part] @ (A[part] @ x))
            start += rank
        rows.append(total)
    return torch.stack(rows) if rows else out


def run(function: object, given: Sequence[Tensor], ranks: Sequence[int], indices: Tensor | None = None) -> Tensor:
    out, x, A, B, weights = given
    gate = Gate(weights if indices is None else weights.gather(-1, indices.clamp(min=0)), indices, ranks, 0.5)
    result: Tensor = function(out.clone(), x, A, B, gate)  # type: ignore[operator]
    return result


def usable(name: str, dtype: torch.dtype = torch.float32) -> None:
    if name == "compiled" and (dtype != torch.float32 or library() is None):
        pytest.skip("the kernels are for float32, where there is a compiler")


def same(name: str, given: Given, gate: Gate, rtol: float, atol: float) -> None:
    """Outputs and all gradients of the implementation are those of the loop."""
    out, *rest, _ = given
    upstream = torch.randn(out.shape, dtype=out.dtype)
    found = []
    for function in (IMPLEMENTATIONS[name], linear.reference):
        result = function(out.clone(), *rest, gate)
        grads = torch.autograd.grad((result * upstream).sum(), given, allow_unused=True, materialize_grads=True)
        found.append([result.detach(), *grads])
    torch.testing.assert_close(found[0], found[1], rtol=rtol, atol=atol)


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_outputs_are_the_definition(ranks: Sequence[int]) -> None:
    given = make(ranks)
    expected = oracle(*given, ranks)
    for function in (linear.routed, linear.reference):
        torch.testing.assert_close(run(function, given, ranks), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["dense", "chosen", "empty slots", "one expert", "idle expert"])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 4, 2), (4, 4, 4)], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 7, 513])
@pytest.mark.parametrize("name", FAST)
def test_every_implementation_agrees_with_the_loop(
    name: str, tokens: int, ranks: Sequence[int], form: str, dtype: torch.dtype
) -> None:
    usable(name, dtype)
    given = make(ranks, tokens, dtype, width=8)  # with ranks of 4 in lines of 16 bytes, which grouped products ask for
    weights = given[4]
    indices: Tensor | None = torch.rand(tokens, 3).argsort(-1)[:, :2]
    if form == "dense":
        indices = None
    elif form == "empty slots":
        indices = torch.where(torch.rand(tokens, 2) < 0.4, -1, indices)
    elif form == "one expert":
        indices = torch.full((tokens, 1), 1)
    elif form == "idle expert":
        indices = torch.tensor([[2, 0]]).expand(tokens, 2)
    chosen = weights if indices is None else weights[:, : indices.shape[1]]
    exact = dtype == torch.float64
    # A sum over 513 tokens in float32 has errors of its own, in either order.
    atol = 1e-12 if exact else 1e-6 * max(tokens, 1)
    same(name, given, Gate(chosen, indices, ranks, 0.5), 1e-12 if exact else 1e-5, atol)


@pytest.mark.parametrize("scale", [0.5, "each"])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("name", ONE_NODE)
def test_a_token_without_gradients_is_the_same(name: str, ranks: Sequence[int], scale: float | str) -> None:
    usable(name)
    for tokens in (1, 3, 40):  # few are not worth sorting
        out, x, A, B, weights = (t.detach() for t in make(ranks, tokens, torch.float32, width=37))
        indices = torch.where(torch.rand(tokens, 2) < 0.2, -1, torch.rand(tokens, 3).argsort(-1)[:, :2])
        gate = Gate(weights[:, :2], indices, ranks, torch.rand(sum(ranks)) if scale == "each" else 0.5)
        expected = linear.reference(out, x, A, B, gate)
        with torch.no_grad():
            found = IMPLEMENTATIONS[name](out.clone(), x, A, B, gate)
            strided = IMPLEMENTATIONS[name](out.T.contiguous().T, x.T.contiguous().T, A, B, gate)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(strided, expected)


@pytest.mark.parametrize("name", FAST)
def test_every_rank_may_have_a_factor_of_its_own(name: str) -> None:
    usable(name)
    given = make((1, 4, 2), 7, torch.float32)
    gate = Gate(given[4][:, :2], torch.rand(7, 3).argsort(-1)[:, :2], (1, 4, 2), torch.rand(7))
    same(name, given, gate, 1e-5, 1e-5)


@pytest.mark.parametrize("name", FAST)
def test_single_ranks_may_be_chosen(name: str) -> None:
    usable(name)
    given = make((1,) * 9, 7, torch.float32)
    gate = Gate(given[4][:, :4], torch.rand(7, 9).argsort(-1)[:, :4], (1,) * 9, 0.5)
    same(name, given, gate, 1e-5, 1e-5)


@pytest.mark.parametrize("scale", [0.5, "each"])
@pytest.mark.parametrize("name", ["plain", "fused"])
def test_always_on(name: str, scale: float | str) -> None:
    factor: float | Tensor = torch.rand(4).double() if scale == "each" else 0.5
    same(name, make((2, 2)), Gate(None, None, (2, 2), factor), 1e-12, 1e-12)


@pytest.mark.parametrize("name", FAST)
def test_tokens_may_have_any_leading_shape(name: str) -> None:
    usable(name)
    out, x, A, B, weights = make((2, 2, 2), 12, torch.float32)
    indices = torch.rand(12, 3).argsort(-1)[:, :2]
    gate = Gate(weights[:, :2], indices, (2, 2, 2), 0.5)
    flat = IMPLEMENTATIONS[name](out.clone(), x, A, B, gate)
    assert gate.weights is not None
    deep = replace(gate, weights=gate.weights.view(3, 2, 2, 2), indices=indices.view(3, 2, 2, 2))
    shaped = IMPLEMENTATIONS[name](out.clone().view(3, 2, 2, 4), x.view(3, 2, 2, 6), A, B, deep)
    assert shaped.shape == (3, 2, 2, 4)
    grads = [torch.autograd.grad(r.square().sum(), [x, A, B, weights]) for r in (flat, shaped)]
    torch.testing.assert_close(shaped.view(12, 4), flat)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ONE_NODE)
def test_inputs_need_not_be_contiguous(name: str) -> None:
    usable(name)
    given = make((2, 2), 6, torch.float32)
    gate = Gate(given[4][:, :1], torch.tensor([[1]] * 6), (2, 2), 0.5)
    spread = [t.detach().T.contiguous().T.requires_grad_() for t in given]
    found = []
    for out, x, A, B, _ in (given, spread):
        result = IMPLEMENTATIONS[name](out * 1, x, A, B, gate)
        found.append([result, *torch.autograd.grad(result, [out, x, A, B], torch.ones(4, 6).T)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("form", ["dense", "chosen", "always on"])
def test_gradcheck(form: str) -> None:
    indices = torch.tensor([[1, 0], [0, -1], [-1, 1]]) if form == "chosen" else None

    def function(*given: Tensor) -> Tensor:
        if form == "always on":
            return linear.routed(given[0].clone(), *given[1:4], Gate(None, None, (2, 1), 0.5))
        return run(linear.routed, given, (2, 1), indices)

    given = make((2, 1), tokens=3)
    assert linear.choose(given[0], given[1], Gate(given[4], None, (2, 1), 0.5)) == "fused"
    assert torch.autograd.gradcheck(function, given[:4] if form == "always on" else given)


def test_gradcheck_of_sorted() -> None:
    indices = torch.tensor([[1, 0], [0, -1], [-1, 1]])
    assert torch.autograd.gradcheck(lambda *g: run(linear_sorted.sorted_, g, (2, 1), indices), make((2, 1), tokens=3))


def test_function_transforms_see_plain_autograd() -> None:
    given = make((2, 1), tokens=3)
    indices = torch.tensor([[1, 0], [0, -1], [-1, 1]])
    weight = torch.randn(3, 4, dtype=torch.float64)

    def loss(*tensors: Tensor) -> Tensor:
        return (run(linear.routed, tensors, (2, 1), indices) * weight).sum()

    found = torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))(*(t.detach() for t in given))
    torch.testing.assert_close(found, torch.autograd.grad(loss(*given), given))


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    given = make((2, 1), tokens=3)
    (grad,) = torch.autograd.grad(run(linear.routed, given, (2, 1)).square().sum(), given[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_chosen_experts_are_dense_weights_with_zeros() -> None:
    given = make((2, 2, 2))
    indices = torch.tensor([[0, 2]] * 5)
    masked = [*given[:4], given[4] * torch.tensor([1.0, 0.0, 1.0])]
    torch.testing.assert_close(run(linear.routed, given, (2, 2, 2), indices), run(linear.routed, masked, (2, 2, 2)))


@pytest.mark.parametrize("name", FAST)
def test_an_empty_slot_adds_nothing_and_learns_nothing(name: str) -> None:
    usable(name)
    out, x, A, B, weights = make((2, 2), dtype=torch.float32)
    indices = torch.tensor([[0, -1]] * 5)
    result = IMPLEMENTATIONS[name](out.clone(), x, A, B, Gate(weights, indices, (2, 2), 1.0))
    torch.testing.assert_close(result, out + (x @ A[:2].T * weights[:, :1]) @ B[:, :2].T)
    grad_A, grad_B, grad_weights = torch.autograd.grad(result.sum(), [A, B, weights])
    assert not grad_A[2:].any() and not grad_B[:, 2:].any() and not grad_weights[:, 1].any()


def test_a_closed_gate_is_zero_and_lets_no_gradient_into_the_expert() -> None:
    out, x, A, B, _ = make((2, 2))
    gate = Gate(torch.tensor([[0.0, 1.0]]).double().expand(5, 2), None, (2, 2), 1.0)
    result = linear.routed(out.clone(), x, A, B, gate)
    torch.testing.assert_close(result, out + x @ A[2:].T @ B[:, 2:].T)
    grad_A, grad_B = torch.autograd.grad(result.sum(), [A, B])
    assert not grad_A[:2].any()
    assert not grad_B[:, :2].any()


def test_mixed_factors_have_all_cross_terms() -> None:
    out, x, A, B, weights = make((2, 2, 2))
    mixed = linear.routed(out.clone(), x, A, B, Gate(weights, None, (2, 2, 2), 0.5, factors=True))
    rows = []
    for row, token, w in zip(out, x, weights, strict=True):
        mixed_A = torch.einsum("e,erd->rd", w, A.view(3, 2, 6))
        mixed_B = torch.einsum("e,oer->or", w, B.view(4, 3, 2))
        rows.append(row + 0.5 * mixed_B @ mixed_A @ token)
    torch.testing.assert_close(mixed, torch.stack(rows), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "fused", "sorted"])
def test_single_and_half_precision(name: str, dtype: torch.dtype) -> None:
    given = make((2, 4), dtype=dtype)
    result = run(IMPLEMENTATIONS[name], given, (2, 4)).detach()
    exact = oracle(*(t.detach().double() for t in given), (2, 4))
    assert result.dtype == dtype
    assert float((result.double() - exact).norm() / exact.norm()) < 8 * torch.finfo(dtype).eps


def test_experts_are_cast_to_the_dtype_of_the_input() -> None:
    out, x, A, B, weights = make((2, 2), dtype=torch.float32)
    gate = Gate(weights, None, (2, 2), 1.0)
    result = linear.routed(out.bfloat16(), x.bfloat16(), A, B, gate)
    assert result.dtype == torch.bfloat16
    grads = torch.autograd.grad(result.float().square().sum(), [A, B, weights])
    assert [grad.dtype for grad in grads] == [torch.float32] * 3


def test_autocast_computes_in_its_own_dtype() -> None:
    _, x, A, B, weights = make((2, 2), dtype=torch.float32)
    frozen = torch.randn(4, 6)
    gate = Gate(weights, None, (2, 2), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        result = linear.routed(torch.nn.functional.linear(x, frozen), x, A, B, gate)
    assert result.dtype == torch.bfloat16
    grads = torch.autograd.grad(result.float().square().sum(), [x, A, B, weights])
    exact = linear.reference(torch.nn.functional.linear(x, frozen), x, A, B, gate)
    expected = torch.autograd.grad(exact.square().sum(), [x, A, B, weights])
    for got, wanted in zip(grads, expected, strict=True):
        assert got.dtype == torch.float32
        assert (got - wanted).norm() < 0.05 * wanted.norm()


# -- in place ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_NODE)
def test_the_output_of_the_frozen_linear_is_added_to_in_place_only_where_that_is_harmless(name: str) -> None:
    usable(name)
    leaf, x, A, B, weights = make((2, 2), dtype=torch.float32)
    gate = Gate(weights[:, :1], torch.tensor([[1]] * 5), (2, 2), 1.0)
    function = IMPLEMENTATIONS[name]
    fresh = leaf * 1
    assert function(fresh, x, A, B, gate).data_ptr() == fresh.data_ptr()
    view = (leaf * 1).view(5, 4)
    strided = torch.randn(4, 5).T
    for kept in (leaf, view, strided):
        before = kept.detach().clone()
        result = function(kept, x, A, B, gate)
        assert torch.equal(kept, before)
        torch.testing.assert_close(result, linear.reference(before, x, A, B, gate))


@pytest.mark.parametrize("name", ONE_NODE)
def test_a_frozen_layer_that_needs_its_output_for_its_gradient_says_so(name: str) -> None:
    usable(name)
    leaf, x, A, B, weights = make((2, 2), dtype=torch.float32)
    gate = Gate(weights[:, :1], torch.tensor([[1]] * 5), (2, 2), 1.0)
    result = IMPLEMENTATIONS[name](torch.sigmoid(leaf), x, A, B, gate)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


# -- memory ------------------------------------------------------------------------------------------------------------


def kept(name: str, picks: int, width: int = 64) -> int:
    """Bytes that the node keeps besides its input and the experts."""
    ranks = (4,) * 8
    given = make(ranks, 100, torch.float32, width)
    held: dict[int, int] = {}
    known = {t.untyped_storage().data_ptr() for t in given}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    indices = torch.rand(100, 8).argsort(-1)[:, :picks].contiguous()
    weights = torch.rand(100, picks, requires_grad=True)
    out = given[0] * 1
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        IMPLEMENTATIONS[name](out, *given[1:4], Gate(weights, indices, ranks, 0.5))
    return sum(held.values())


@pytest.mark.parametrize("name", ONE_NODE)
def test_what_is_kept_for_backward_does_not_grow_with_the_width(name: str) -> None:
    usable(name)
    assert kept(name, 2, 64) == kept(name, 2, 256) > 0


def test_what_is_kept_for_backward_does_not_grow_with_the_picks() -> None:
    # All ranks of every token, and of each pick its index, weight, and whether there is one.
    pick = 100 * (8 + 4 + 1)
    assert kept("fused", 4) - kept("fused", 2) <= 2 * pick
    assert kept("fused", 8) < 100 * (8 * 4 + 8) * 4 + 8 * pick + 1


@pytest.mark.parametrize("name", ["sorted", "compiled"])
def test_only_the_ranks_of_the_picks_are_kept(name: str) -> None:
    usable(name)
    assert kept(name, 2) <= 100 * 2 * (4 * 4 + 8 + 4 + 4 + 1)


# -- the choice --------------------------------------------------------------------------------------------------------


def test_the_choice_follows_from_shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(experts: int, rank: int, picks: int | None, D: int = 64, dtype: torch.dtype = torch.float32) -> str:
        out, x = torch.empty(4, 8, dtype=dtype), torch.empty(4, D, dtype=dtype)
        indices = None if picks is None else torch.zeros(4, picks, dtype=torch.long)
        return linear.choose(out, x, Gate(torch.empty(4, picks or experts), indices, (rank,) * experts, 1.0))

    assert chosen(8, 8, None) == "fused"
    assert chosen(8, 8, 8) == "fused"
    monkeypatch.setattr(linear.linear_compiled.extension, "library", lambda: None)
    assert chosen(8, 8, 2) == "fused"
    assert chosen(64, 8, 2) == "sorted"
    assert chosen(9, 8, 2, D=4096) == "sorted"
    monkeypatch.setattr(linear.linear_compiled.extension, "library", object)
    assert chosen(8, 8, 2) == "compiled"
    assert chosen(64, 8, 2, dtype=torch.bfloat16) == "sorted"


@pytest.mark.parametrize("form", ["dense", "chosen"])
def test_torch_compile_sees_one_graph(form: str) -> None:
    given = make((2, 2, 2), dtype=torch.float32)
    indices = torch.tensor([[0, 2], [1, 2], [2, -1], [0, 1], [2, 0]]) if form == "chosen" else None

    def function(*tensors: Tensor) -> Tensor:
        return run(linear.routed, tensors, (2, 2, 2), indices)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), function(*given))
    grads = [torch.autograd.grad(f(*given).square().sum(), given) for f in (compiled, function)]
    torch.testing.assert_close(*grads)
