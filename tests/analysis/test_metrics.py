"""Planted loads whose numbers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moelora.analysis import metrics

pytestmark = pytest.mark.smoke


def test_an_even_load() -> None:
    load = [10.0, 10.0, 10.0, 10.0]
    assert metrics.utilisation(load).tolist() == [1, 1, 1, 1]
    assert metrics.balance(load) == pytest.approx(1)
    assert metrics.effective_experts(load) == pytest.approx(4)
    assert metrics.variation(load) == 0
    assert not metrics.dead_experts(load).any()


def test_a_single_expert() -> None:
    load = [0.0, 0.0, 7.0, 0.0]
    assert metrics.utilisation(load).tolist() == [0, 0, 4, 0]
    assert metrics.balance(load) == 0
    assert metrics.effective_experts(load) == pytest.approx(1)
    assert metrics.variation(load) == pytest.approx(math.sqrt(3))
    assert metrics.dead_experts(load).tolist() == [True, True, False, True]


def test_dead_is_below_a_twentieth_of_a_fair_share() -> None:
    # A fair share of 4 experts is 250 of 1000: the line lies at 12.5.
    assert metrics.dead_experts([12.0, 13.0, 475.0, 500.0]).tolist() == [True, False, False, False]


def test_half_of_the_experts_evenly() -> None:
    load = [5.0, 5.0, 0.0, 0.0]
    assert metrics.effective_experts(load) == pytest.approx(2)
    assert metrics.balance(load) == pytest.approx(0.5)


def test_rows_are_measured_one_by_one_and_an_empty_one_is_unknown() -> None:
    ratio = metrics.utilisation([[1.0, 3.0], [0.0, 0.0]])
    assert ratio[0].tolist() == [0.5, 1.5]
    assert np.isnan(ratio[1]).all()
    assert not metrics.dead_experts([0.0, 0.0]).any()


def test_one_expert_is_balanced() -> None:
    assert metrics.balance([3.0]) == 1


def test_tasks_with_experts_of_their_own() -> None:
    assert metrics.task_specialisation([[9.0, 0.0], [0.0, 2.0]]) == pytest.approx(0.5)
    assert metrics.task_specialisation(np.eye(4)) == pytest.approx(0.75)


def test_tasks_routed_alike_whatever_their_size() -> None:
    assert metrics.task_specialisation([[1.0, 3.0], [100.0, 300.0]]) == pytest.approx(0)


def test_a_task_with_a_tenth_of_its_tokens_elsewhere() -> None:
    # The average task is (0.5, 0.5), from which each of the two differs by 0.1.
    assert metrics.task_specialisation([[60.0, 40.0], [4.0, 6.0]]) == pytest.approx(0.1)


def test_a_task_without_tokens_does_not_count() -> None:
    assert metrics.task_specialisation([[6.0, 4.0], [0.0, 0.0]]) == 0
