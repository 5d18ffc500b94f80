"""Several reward models as one: their mean, their worst case, or their mean less what they disagree about.

A response that one model overrates by chance is seldom overrated by all, so an optimiser finds less to exploit. Mean,
worst case (WCO) and uncertainty-weighted (UWO) are those of Coste et al. 2024, "Reward Model Ensembles Help Mitigate
Overoptimization" (ICLR, arXiv 2310.02743). One model is an ensemble of one, in each of these ways.

Pairwise losses fix neither the offset of a reward nor its scale. As they come out of training, the minimum would be
mostly that of the model with the lowest offset, and the mean that of the one with the largest scale. Members can
therefore be standardised: mean 0 and standard deviation 1 over the responses of given rankings, best not those that are
evaluated. A standardised reward is no log-odds any more, so its calibration says little.

Shapes: M members, N responses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError, DataError
from ..registry import closest
from .rewards import Array, Messages, Rewards, Scorer, score_rankings
from .scoring import Progress

if TYPE_CHECKING:
    from ..data.ranking import Ranking
    from ..reward.scoring import Reward

PENALTY = 0.5

# Each takes rewards (M, N) and the weight of the variance, and gives (N,). The variance is that over members, divided
# by M, as in the paper.
WAYS: dict[str, Callable[[Array, float], Array]] = {
    "mean": lambda rewards_MN, _: rewards_MN.mean(0),
    "worst": lambda rewards_MN, _: rewards_MN.min(0),
    "uncertainty": lambda rewards_MN, penalty: rewards_MN.mean(0) - penalty * rewards_MN.var(0),
}


@dataclass(frozen=True)
class Scale:
    """Where a member's rewards lie; standardised, a reward is (reward - mean) / deviation."""

    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def of(cls, rewards: Rewards) -> Scale:
        """Over all responses of all rankings.

        Raises:
            DataError: the rewards are all the same.
        """
        values = np.array([value for ranking in rewards for value in ranking], dtype=np.float64)
        if not len(values) or np.ptp(values) == 0:
            raise DataError(
                f"{len(values)} rewards without any difference have no scale: standardise on rankings whose responses "
                "differ, at least two"
            )
        return cls(float(values.mean()), float(values.std()))


class RewardEnsemble:
    """Reward models that score as one.

    Args:
        members: at least one.
        way: ``mean``, ``worst`` (the minimum), or ``uncertainty`` (mean - ``penalty`` · variance over members).
        penalty: 0 or more, for ``uncertainty``.

    Raises:
        ConfigError: no member, an unknown way, or a negative penalty.
    """

    def __init__(self, members: Sequence[Scorer], way: str = "mean", *, penalty: float = PENALTY) -> None:
        if not members:
            raise ConfigError("an ensemble has one reward model at least, and none is given")
        _check_way(way, penalty)
        self.members, self.way, self.penalty = list(members), way, penalty
        self.scales = [Scale() for _ in members]

    def standardise(self, rankings: Sequence[Ranking], *, batch_size: int = 16) -> None:
        """From now on, give each member mean 0 and standard deviation 1 over the responses of ``rankings``.

        Raises:
            DataError: no rankings, or a member rewards all responses alike.
        """
        self.scales = [
            Scale.of(
                [
                    [each.reward for each in ranking]
                    for ranking in score_rankings(member, rankings, batch_size=batch_size)
                ]
            )
            for member in self.members
        ]

    def score(
        self,
        prompts: Sequence[Messages | str],
        responses: Sequence[str],
        *,
        categories: Sequence[str] | None = None,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> list[Reward]:
        """Score each response to its prompt with every member; see :func:`combine`."""
        found = [
            member.score(
                prompts,
                responses,
                categories=categories,
                batch_size=batch_size,
                progress=progress and _after(progress, place, len(self.members)),
            )
            for place, member in enumerate(self.members)
        ]
        return combine(found, self.way, self.scales, penalty=self.penalty)


def combine(
    rewards: Sequence[Sequence[Reward]], way: str, scales: Sequence[Scale] | None = None, *, penalty: float = PENALTY
) -> list[Reward]:
    """The rewards (N) that an ensemble of members (M) gives, from those of its members (M, N).

    The category is the one that most members chose, the first of several; the confidence is these members' mean. Scores
    of capabilities are plain means over the members that give them: nothing is chosen by them.

    Raises:
        ConfigError: an unknown way, or a negative penalty.
    """
    _check_way(way, penalty)
    scales = scales or [Scale() for _ in rewards]
    raw_MN = np.array([[each.reward for each in member] for member in rewards], dtype=np.float64)
    means, deviations = (np.array(values) for values in zip(*[(s.mean, s.deviation) for s in scales], strict=True))
    combined = WAYS[way]((raw_MN - means[:, None]) / deviations[:, None], penalty)
    return [_together(each, float(value)) for each, value in zip(zip(*rewards, strict=True), combined, strict=True)]


def _together(members: Sequence[Reward], reward: float) -> Reward:
    """One response's rewards by each member, as one."""
    chosen = Counter((each.routed, each.category) for each in members).most_common(1)[0][0]
    agreeing = [each for each in members if (each.routed, each.category) == chosen]
    capabilities: dict[str, list[float]] = {}
    for each in agreeing:
        for name, score in each.capabilities.items():
            capabilities.setdefault(name, []).append(score)
    return replace(
        agreeing[0],
        reward=reward,
        confidence=sum(each.confidence for each in agreeing) / len(agreeing),
        capabilities={name: sum(scores) / len(scores) for name, scores in capabilities.items()},
    )


def _after(progress: Progress, done: int, members: int) -> Progress:
    """The progress of one member, after those that are done, as that of all."""
    return lambda scored, total: progress(done * total + scored, members * total)


def _check_way(way: str, penalty: float) -> None:
    if way not in WAYS:
        raise ConfigError(f"there is no ensemble {way!r}: known ones are {', '.join(WAYS)}{closest(way, list(WAYS))}")
    if not penalty >= 0:
        raise ConfigError(f"penalty is {penalty}: it weights the variance, which is subtracted, and is 0 or more")
