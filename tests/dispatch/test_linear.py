"""The stacked linear dispatch against one expert and one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moelora.dispatch import linear

pytestmark = pytest.mark.smoke
RANKS = [(2, 2, 2), (1, 4, 2), (3,)]


def make(ranks: Sequence[int], tokens: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    total = sum(ranks)
    shapes = ((tokens, 6), (total, 6), (4, total), (tokens, total))
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def oracle(x_TD: Tensor, A: Tensor, B: Tensor, gate_TR: Tensor) -> Tensor:
    rows = []
    for x, gate in zip(x_TD, gate_TR, strict=True):
        rows.append(sum((B[:, r] * (gate[r] * (A[r] @ x)) for r in range(len(A))), torch.zeros(len(B)).double()))
    return torch.stack(rows)


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_outputs_are_the_definition(ranks: Sequence[int]) -> None:
    given = make(ranks)
    expected = oracle(*given)
    torch.testing.assert_close(linear.stacked(*given), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(linear.reference(*given, ranks), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_gradients_agree(ranks: Sequence[int]) -> None:
    given = make(ranks)
    weight = torch.randn(5, 4, dtype=torch.float64)
    fast = torch.autograd.grad((linear.stacked(*given) * weight).sum(), given)
    slow = torch.autograd.grad((linear.reference(*given, ranks) * weight).sum(), given)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(linear.stacked, make((2, 1), tokens=3))


def test_one_gate_for_all() -> None:
    x, A, B, gate = make((2, 2))
    torch.testing.assert_close(linear.stacked(x, A, B, 0.5), linear.stacked(x, A, B, torch.full_like(gate, 0.5)))


def test_a_closed_gate_is_zero_and_lets_no_gradient_into_the_expert() -> None:
    x, A, B, _ = make((2, 2))
    gate = torch.zeros(5, 4, dtype=torch.float64)
    gate[:, 2:] = 1
    out = linear.stacked(x, A, B, gate)
    torch.testing.assert_close(out, x @ A[2:].T @ B[:, 2:].T)
    grad_A, grad_B = torch.autograd.grad(out.sum(), [A, B])
    assert not grad_A[:2].any()
    assert not grad_B[:, :2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_single_and_half_precision(dtype: torch.dtype) -> None:
    given = make((2, 4), dtype=dtype)
    out = linear.stacked(*given).detach()
    exact = oracle(*(t.detach().double() for t in given))
    assert out.dtype == dtype
    assert float((out.double() - exact).norm() / exact.norm()) < 8 * torch.finfo(dtype).eps


def test_experts_are_cast_to_the_dtype_of_the_input() -> None:
    x, A, B, gate = make((2, 2), dtype=torch.float32)
    assert linear.stacked(x.bfloat16(), A, B, gate).dtype == torch.bfloat16


def test_no_tokens() -> None:
    given = make((2, 2), tokens=0)
    assert linear.stacked(*given).shape == (0, 4)
    assert linear.reference(*given, (2, 2)).shape == (0, 4)


def test_ranks_that_do_not_add_up() -> None:
    with pytest.raises(AssertionError, match="do not add up"):
        linear.reference(*make((2, 2)), (2, 1))
