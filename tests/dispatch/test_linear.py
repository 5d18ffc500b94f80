"""The linear dispatch against one expert and one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moelora.dispatch import linear
from moelora.dispatch.linear import Gate

pytestmark = pytest.mark.smoke
RANKS = [(2, 2, 2), (1, 4, 2), (3,)]


def make(ranks: Sequence[int], tokens: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Output of the frozen linear, input, lora_A, lora_B, weights."""
    total = sum(ranks)
    shapes = ((tokens, 4), (tokens, 6), (total, 6), (4, total), (tokens, len(ranks)))
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
    gate = Gate(weights if indices is None else weights.gather(-1, indices), indices, ranks, 0.5)
    result: Tensor = function(out.clone(), x, A, B, gate)  # type: ignore[operator]
    return result


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_outputs_are_the_definition(ranks: Sequence[int]) -> None:
    given = make(ranks)
    expected = oracle(*given, ranks)
    for function in (linear.routed, linear.reference):
        torch.testing.assert_close(run(function, given, ranks), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_gradients_agree(ranks: Sequence[int]) -> None:
    given = make(ranks)
    weight = torch.randn(5, 4, dtype=torch.float64)
    fast = torch.autograd.grad((run(linear.routed, given, ranks) * weight).sum(), given)
    slow = torch.autograd.grad((run(linear.reference, given, ranks) * weight).sum(), given)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(lambda *given: run(linear.routed, given, (2, 1)), make((2, 1), tokens=3))


def test_chosen_experts_are_dense_weights_with_zeros() -> None:
    given = make((2, 2, 2))
    indices = torch.tensor([[0, 2]] * 5)
    masked = [*given[:4], given[4] * torch.tensor([1.0, 0.0, 1.0])]
    torch.testing.assert_close(run(linear.routed, given, (2, 2, 2), indices), run(linear.routed, masked, (2, 2, 2)))


def test_an_empty_slot_adds_nothing() -> None:
    out, x, A, B, weights = make((2, 2))
    indices = torch.tensor([[0, -1]] * 5)
    gate = Gate(weights, indices, (2, 2), 1.0)
    expected = out + (x @ A[:2].T * weights[:, :1]) @ B[:, :2].T
    torch.testing.assert_close(linear.routed(out.clone(), x, A, B, gate), expected)


def test_always_on() -> None:
    out, x, A, B, _ = make((2, 2))
    torch.testing.assert_close(
        linear.routed(out.clone(), x, A, B, Gate(None, None, (2, 2), 0.5)), out + 0.5 * x @ A.T @ B.T
    )


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
def test_single_and_half_precision(dtype: torch.dtype) -> None:
    given = make((2, 4), dtype=dtype)
    result = run(linear.routed, given, (2, 4)).detach()
    exact = oracle(*(t.detach().double() for t in given), (2, 4))
    assert result.dtype == dtype
    assert float((result.double() - exact).norm() / exact.norm()) < 8 * torch.finfo(dtype).eps


def test_experts_are_cast_to_the_dtype_of_the_input() -> None:
    out, x, A, B, weights = make((2, 2), dtype=torch.float32)
    gate = Gate(weights, None, (2, 2), 1.0)
    assert linear.routed(out.bfloat16(), x.bfloat16(), A, B, gate).dtype == torch.bfloat16


def test_no_tokens() -> None:
    given = make((2, 2), tokens=0)
    assert run(linear.routed, given, (2, 2)).shape == (0, 4)
    assert run(linear.reference, given, (2, 2)).shape == (0, 4)
