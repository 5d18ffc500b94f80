"""Monte Carlo tree search with a learnt, or a given, model: PUCT as in MuZero (arXiv 1911.08265, appendix B).

An action is chosen down the tree by

    Q(s, a) + P(s, a) sqrt(N(s)) / (1 + N(s, a)) (c_init + log((N(s) + c_base + 1) / c_base)),

with Q = reward + discount × value of the node behind the action, scaled to 0...1 by the least and the largest Q of the
tree, and N(s) the visits of the node, of which the first made it. The leaf that is reached becomes a node, and its
value goes up the path. As in MuZero a node's value is the mean of what came up through it, the root's first value does
not count, and an action not yet taken has a scaled Q of 0. Two things differ from MuZero's pseudocode: where all Q seen
are the same their scaled value is 0, not Q itself; and N(s) counts the first visit of the root too, so that already the
first action follows the policy.

All N roots go down at once, one new node each, so that the model is called once for each simulation. Ties go to the
lowest action. Statistics are float64 on the CPU, so without noise a search depends on nothing but the model.

Shapes: N roots, A actions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import TrainingError
from .model_config import SearchConfig

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]


class Found(NamedTuple):
    """What a model says of nodes: (N,) rewards on the way to them, (N, A) logits of the policy, (N,) values."""

    rewards: Floats
    logits: Floats
    values: Floats


class SearchModel(Protocol):
    """What search asks."""

    def start(self, nodes: int) -> Found:
        """The roots, which are node 0. At most ``nodes`` nodes come, with them."""
        ...

    def expand(self, parents: Ints, actions: Ints) -> Found:
        """The next node of each root: behind an action (N,) of one of its nodes (N,). They count from 1."""
        ...


@dataclass(frozen=True)
class SearchResult:
    """What a search found at its roots.

    Attributes:
        visits: (N, A), how often each action was taken. values: (N,) of the roots, discounted returns. policy: (N, A)
            of the model, before the search, with the noise.
    """

    visits: Ints
    values: Floats
    policy: Floats

    @property
    def shares(self) -> Floats:
        """(N, A) of the visits, which is what the policy learns."""
        return np.asarray(self.visits / self.visits.sum(1, keepdims=True))

    def best(self) -> Ints:
        """(N,) the actions taken most often, the lowest among equals: how to act in evaluation."""
        return np.asarray(self.visits.argmax(1))

    def sample(self, generator: np.random.Generator, temperature: float = 1.0) -> Ints:
        """(N,) actions drawn by their visits to the power of ``1 / temperature``: how to act in training."""
        logs = np.log(np.maximum(self.visits, 1e-300)) / temperature
        shares = np.exp(logs - logs.max(1, keepdims=True))
        bounds = (shares / shares.sum(1, keepdims=True)).cumsum(1)
        drawn = generator.random(len(bounds))[:, None]
        return np.asarray((drawn * bounds[:, -1:] >= bounds).sum(1))


class _Tree:
    """N trees whose nodes are numbered alike; node 0 is the root.

    ``children`` is -1 where there is none. ``edge`` is the sum of Q over the visits of an action.
    """

    def __init__(self, config: SearchConfig, nodes: int, policy: Floats) -> None:
        N, A = policy.shape
        self.config = config
        self.rows = np.arange(N)
        self.children = np.full((N, nodes, A), -1)
        self.visits = np.zeros((N, nodes, A), dtype=np.int64)
        self.totals = np.zeros((N, nodes, A))
        self.policy = np.zeros((N, nodes, A))
        self.rewards = np.zeros((N, nodes))
        self.low, self.high = np.full(N, np.inf), np.full(N, -np.inf)
        self.policy[:, 0] = policy

    def scores(self, nodes: Ints) -> Floats:
        """(N, A) what each action of one node of each tree is worth trying."""
        visits = self.visits[self.rows, nodes]
        total = 1 + visits.sum(1, keepdims=True)
        spread = self.high - self.low
        known = (visits > 0) & (spread > 0)[:, None]
        scale = np.where(spread > 0, spread, 1)[:, None]
        q = self.totals[self.rows, nodes] / np.maximum(visits, 1)
        scaled = np.where(known, (q - np.where(known, self.low[:, None], 0)) / scale, 0)
        pull = self.config.c_init + np.log((total + self.config.c_base + 1) / self.config.c_base)
        return np.asarray(scaled + self.policy[self.rows, nodes] * np.sqrt(total) / (1 + visits) * pull)

    def descend(self) -> tuple[list[tuple[Ints, Ints, NDArray[np.bool_]]], Ints, Ints]:
        """The way from the roots to actions not taken yet: (nodes, actions, whether still on the way) of each depth,
        and the last nodes and actions.
        """
        path = []
        nodes, on = np.zeros_like(self.rows), np.ones(len(self.rows), dtype=bool)
        last_nodes, last_actions = nodes.copy(), nodes.copy()
        while on.any():
            actions = self.scores(nodes).argmax(1)
            path.append((nodes, actions, on))
            last_nodes, last_actions = np.where(on, nodes, last_nodes), np.where(on, actions, last_actions)
            behind = self.children[self.rows, nodes, actions]
            on = on & (behind >= 0)
            nodes = np.where(on, behind, 0)
        return path, last_nodes, last_actions

    def add(self, number: int, parents: Ints, actions: Ints, found: Found) -> None:
        """Node ``number`` of each tree, behind an action."""
        self.children[self.rows, parents, actions] = number
        self.rewards[:, number] = found.rewards
        self.policy[:, number] = softmax(found.logits)

    def back_up(self, path: list[tuple[Ints, Ints, NDArray[np.bool_]]], values: Floats) -> Floats:
        """Let the values of new nodes (N,) go up; what arrives at the roots."""
        values = values.astype(np.float64)
        for nodes, actions, on in reversed(path):
            rows, nodes, actions = self.rows[on], nodes[on], actions[on]
            values[on] = self.rewards[rows, self.children[rows, nodes, actions]] + self.config.discount * values[on]
            self.totals[rows, nodes, actions] += values[on]
            self.visits[rows, nodes, actions] += 1
            q = self.totals[rows, nodes, actions] / self.visits[rows, nodes, actions]
            self.low[rows] = np.minimum(self.low[rows], q)
            self.high[rows] = np.maximum(self.high[rows], q)
        return values


def softmax(logits: Floats) -> Floats:
    """Over the last axis, in float64."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(-1, keepdims=True))


def search(model: SearchModel, config: SearchConfig, noise: np.random.Generator | None = None) -> SearchResult:
    """Search from the roots of a model.

    Args:
        noise: draws the Dirichlet noise of the roots, as in training; without it there is none, as in evaluation.

    Raises:
        TrainingError: the model gave a number that is not finite.
    """
    found = _finite(model.start(config.simulations + 1))
    policy = softmax(found.logits)
    if noise is not None:
        drawn = noise.dirichlet([config.noise_alpha] * policy.shape[1], size=len(policy))
        policy = (1 - config.noise_share) * policy + config.noise_share * drawn
    tree = _Tree(config, config.simulations + 1, policy)
    total = np.zeros(len(policy))
    for number in range(1, config.simulations + 1):
        path, parents, actions = tree.descend()
        found = _finite(model.expand(parents, actions))
        tree.add(number, parents, actions, found)
        total += tree.back_up(path, found.values)
    return SearchResult(tree.visits[:, 0].copy(), total / config.simulations, policy)


def _finite(found: Found) -> Found:
    for name, numbers in found._asdict().items():
        if not np.isfinite(numbers).all():
            raise TrainingError(f"search: {name} of the model are not finite: lower the learning rate")
    return found
