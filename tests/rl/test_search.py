"""Search on models that are given exactly: against exhaustive search, and against a plain recursive twin."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from moelora.errors import TrainingError
from moelora.rl.model_config import SearchConfig
from moelora.rl.search import Found, Ints, SearchResult, search, softmax

LAYERS, WIDTH, ACTIONS, DISCOUNT = 4, 3, 3, 0.9
STATES = (LAYERS + 1) * WIDTH


@dataclass
class Process:
    """A deterministic decision process of some layers, and the model of it that is exact. The last layer is the end."""

    following: np.ndarray  # (states, actions)
    rewards: np.ndarray  # (states, actions)
    logits: np.ndarray  # (states, actions)
    values: np.ndarray  # (states,)
    roots: list[int]
    at: np.ndarray = field(init=False)

    @classmethod
    def drawn(cls, seed: int, roots: list[int], *, informed: bool = False) -> Process:
        generator = np.random.default_rng(seed)
        layers = np.minimum(np.arange(STATES) // WIDTH + 1, LAYERS)
        following = layers[:, None] * WIDTH + generator.integers(WIDTH, size=(STATES, ACTIONS))
        rewards = generator.normal(size=(STATES, ACTIONS))
        rewards[-WIDTH:] = 0
        logits = generator.normal(size=(STATES, ACTIONS)) if informed else np.zeros((STATES, ACTIONS))
        values = generator.normal(size=STATES) if informed else np.zeros(STATES)
        return cls(following, rewards, logits, values, roots)

    def start(self, nodes: int) -> Found:
        self.at = np.array(self.roots)[:, None]
        return Found(np.zeros(len(self.roots)), self.logits[self.at[:, 0]], self.values[self.at[:, 0]])

    def expand(self, parents: Ints, actions: Ints) -> Found:
        before = self.at[np.arange(len(parents)), parents]
        after = self.following[before, actions]
        self.at = np.concatenate([self.at, after[:, None]], axis=1)
        return Found(self.rewards[before, actions], self.logits[after], self.values[after])

    def exhaustive(self, state: int) -> list[float]:
        """The best return behind each action, by trying all ways to the end."""
        if state >= LAYERS * WIDTH:
            return [0.0] * ACTIONS
        return [
            self.rewards[state, action] + DISCOUNT * max(self.exhaustive(self.following[state, action]))
            for action in range(ACTIONS)
        ]


class Node:
    def __init__(self, state: int, reward: float, policy: np.ndarray) -> None:
        self.state, self.reward, self.policy = state, reward, policy
        self.children: dict[int, Node] = {}
        self.sum, self.count = 0.0, 0

    @property
    def q(self) -> float:
        return self.reward + DISCOUNT * self.sum / self.count


def twin(process: Process, root_state: int, config: SearchConfig, policy: np.ndarray) -> tuple[list[int], float]:
    """MuZero's pseudocode with one root and objects for nodes."""
    root = Node(root_state, 0.0, policy)
    low, high = math.inf, -math.inf
    for _ in range(config.simulations):
        node, path = root, [root]
        while True:
            total = 1 + sum(child.count for child in node.children.values())
            scores = []
            for action in range(ACTIONS):
                child = node.children.get(action)
                count = child.count if child else 0
                scaled = (child.q - low) / (high - low) if child and high > low else 0.0
                pull = config.c_init + math.log((total + config.c_base + 1) / config.c_base)
                scores.append(scaled + node.policy[action] * math.sqrt(total) / (1 + count) * pull)
            action = int(np.argmax(scores))
            if action not in node.children:
                break
            node = node.children[action]
            path.append(node)
        state = process.following[node.state, action]
        child = Node(state, process.rewards[node.state, action], softmax(process.logits[state]))
        node.children[action] = child
        value = float(process.values[state])
        for each in reversed([*path, child]):
            each.sum += value
            each.count += 1
            if each is not root:
                low, high = min(low, each.q), max(high, each.q)
            value = each.reward + DISCOUNT * value
    visits = [root.children[action].count if action in root.children else 0 for action in range(ACTIONS)]
    return visits, root.sum / root.count


def config(simulations: int, **others: float) -> SearchConfig:
    return SearchConfig.parse({"simulations": simulations, "discount": DISCOUNT, **others})


@pytest.mark.parametrize("seed", range(4))
def test_best_action_is_that_of_exhaustive_search(seed: int) -> None:
    roots = list(range(LAYERS * WIDTH))
    process = Process.drawn(seed, roots)
    result = search(process, config(400))
    for row, state in enumerate(roots):
        q = process.exhaustive(state)
        low, high = sorted(q)[-2:]
        if high - low > 0.1:  # of nearly equal ones either is right
            assert result.best()[row] == np.argmax(q), (state, q)


def test_value_goes_to_that_of_exhaustive_search() -> None:
    process = Process.drawn(1, list(range(WIDTH)))
    best = [max(process.exhaustive(state)) for state in range(WIDTH)]
    errors = [np.abs(search(process, config(count)).values - best).mean() for count in (10, 100, 1000)]
    assert errors[0] > 1.3 * errors[1] > 2.6 * errors[2]  # the mean over all ways that were tried, so it is slow


@pytest.mark.parametrize("noisy", [False, True])
def test_search_is_its_plain_twin(noisy: bool) -> None:
    roots = [0, 3, 3, 5]
    process = Process.drawn(7, roots, informed=True)
    result = search(process, config(60), np.random.default_rng(0) if noisy else None)
    for row, state in enumerate(roots):
        if not noisy:
            assert result.policy[row] == pytest.approx(softmax(process.logits[state]), abs=1e-12)
        visits, value = twin(process, state, config(60), result.policy[row])
        assert result.visits[row].tolist() == visits
        assert result.values[row] == pytest.approx(value, abs=1e-9)


def test_many_roots_are_single_roots() -> None:
    roots = [4, 0, 2, 2, 5]
    together = search(Process.drawn(3, roots, informed=True), config(40))
    for row, root in enumerate(roots):
        alone = search(Process.drawn(3, [root], informed=True), config(40))
        assert np.array_equal(alone.visits[0], together.visits[row])
        assert alone.values[0] == together.values[row]


def test_noise_is_the_generators_and_without_it_there_is_none() -> None:
    process = Process.drawn(5, [0, 0], informed=True)
    first, again, other, plain = (
        search(process, config(30), noise)
        for noise in (np.random.default_rng(1), np.random.default_rng(1), np.random.default_rng(2), None)
    )
    assert np.array_equal(first.visits, again.visits) and np.array_equal(first.policy, again.policy)
    assert not np.array_equal(first.policy, other.policy)
    assert not np.array_equal(first.policy[0], first.policy[1])
    assert first.policy.sum(1) == pytest.approx([1, 1])
    assert np.array_equal(plain.visits[0], plain.visits[1])
    assert (first.policy >= 0.75 * plain.policy - 1e-12).all()


def test_shares_and_actions() -> None:
    result = SearchResult(np.array([[1, 3, 0], [5, 5, 0]]), np.zeros(2), np.full((2, 3), 1 / 3))
    assert result.shares.tolist() == [[0.25, 0.75, 0], [0.5, 0.5, 0]]
    assert result.best().tolist() == [1, 0]
    generator = np.random.default_rng(0)
    drawn = np.stack([result.sample(generator) for _ in range(4000)])
    assert np.bincount(drawn[:, 0], minlength=3)[:3] / 4000 == pytest.approx([0.25, 0.75, 0], abs=0.03)
    colder = np.stack([result.sample(generator, temperature=0.5) for _ in range(4000)])
    assert (colder[:, 0] == 1).mean() == pytest.approx(0.9, abs=0.03)
    assert np.array_equal(result.sample(np.random.default_rng(3)), result.sample(np.random.default_rng(3)))
    assert (np.stack([result.sample(generator, temperature=0.01) for _ in range(20)])[:, 0] == 1).all()


def test_every_simulation_is_one_visit() -> None:
    result = search(Process.drawn(2, [0, 1, 2]), config(17))
    assert result.visits.sum(1).tolist() == [17, 17, 17]


def test_policy_of_the_model_says_what_is_tried_first() -> None:
    process = Process.drawn(0, [0])
    process.logits[:, 2] = 3.0
    assert search(process, config(1)).visits.tolist() == [[0, 0, 1]]


def test_scale_of_rewards_changes_nothing() -> None:
    process = Process.drawn(9, [0, 1], informed=True)
    before = search(process, config(50)).visits
    process.rewards, process.values = 64 * process.rewards, 64 * process.values
    assert np.array_equal(search(process, config(50)).visits, before)


def test_numbers_that_are_not_finite_are_refused() -> None:
    process = Process.drawn(0, [0])
    process.rewards[:] = np.nan
    with pytest.raises(TrainingError, match="rewards of the model"):
        search(process, config(2))
