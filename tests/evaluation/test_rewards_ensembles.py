"""Several reward models as one scorer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from moelora.data.ranking import Ranking
from moelora.errors import ConfigError, DataError
from moelora.evaluation.reward_ensembles import RewardEnsemble, Scale, combine
from moelora.evaluation.rewards import score_rankings
from moelora.reward.scoring import Reward

pytestmark = pytest.mark.smoke


class ByLength:
    """Rewards a response by its length: a scorer that needs no model."""

    def __init__(self, weight: float, offset: float, category: str = "general", confidence: float = 1.0) -> None:
        self.weight, self.offset, self.category, self.confidence = weight, offset, category, confidence
        self.asked: list[tuple[int, bool]] = []

    def score(
        self,
        prompts: Sequence[Sequence[Mapping[str, str]] | str],
        responses: Sequence[str],
        *,
        categories: Sequence[str] | None = None,
        batch_size: int = 16,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Reward]:
        assert len(prompts) == len(responses)
        self.asked.append((batch_size, categories is not None))
        if progress is not None:
            progress(len(responses), len(responses))
        chosen = categories or [self.category] * len(responses)
        return [
            Reward(self.weight * len(text) + self.offset, name, name, self.confidence, {"brevity": -len(text)})
            for text, name in zip(responses, chosen, strict=True)
        ]


TEXTS = ["a", "bb", "cccc", "dddddddd"]
PROMPT = ({"role": "user", "content": "?"},)


def scores(ensemble: RewardEnsemble, **options: object) -> list[float]:
    return [each.reward for each in ensemble.score([PROMPT] * 4, TEXTS, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("mean", lambda r: r.mean(0)),
        ("worst", lambda r: r.min(0)),
        ("uncertainty", lambda r: r.mean(0) - 0.25 * ((r - r.mean(0)) ** 2).mean(0)),
    ],
)
def test_ways_of_combining(way: str, expected: object) -> None:
    members = [ByLength(1, 0), ByLength(-1, 5), ByLength(2, 1)]
    raw = np.array([[member.weight * len(text) + member.offset for text in TEXTS] for member in members])
    assert scores(RewardEnsemble(members, way, penalty=0.25)) == pytest.approx(expected(raw))  # type: ignore[operator]


@pytest.mark.parametrize("way", ["mean", "worst", "uncertainty"])
def test_one_model_is_an_ensemble_of_one(way: str) -> None:
    alone = ByLength(0.1, 0.3, "maths", 0.7)
    assert RewardEnsemble([alone], way).score([PROMPT] * 4, TEXTS) == alone.score([PROMPT] * 4, TEXTS)


def test_standardised_members_count_the_same() -> None:
    members = [ByLength(1, 0), ByLength(-100, 5000)]
    rankings = [Ranking(PROMPT, tuple(TEXTS[:3])), Ranking(PROMPT, ("ggg",))]
    raw = RewardEnsemble(members, "worst")
    # Without it, the member with the lowest offset has the last word on all of them.
    assert scores(raw) == [1, 2, 4, 8]
    raw.standardise(rankings)
    lengths = np.array([1, 2, 4, 3])
    z = (np.array([1, 2, 4, 8]) - lengths.mean()) / lengths.std()
    assert scores(raw) == pytest.approx(np.minimum(z, -z))
    assert raw.scales[0] == Scale(2.5, float(lengths.std()))
    # The offset and the scale of a member no longer matter.
    moved = RewardEnsemble([ByLength(7, -3), members[1]], "worst")
    moved.standardise(rankings)
    assert scores(moved) == pytest.approx(scores(raw))
    with pytest.raises(DataError, match="without any difference"):
        RewardEnsemble([ByLength(0, 1)]).standardise(rankings)


def test_what_most_members_chose_is_the_category() -> None:
    members = [ByLength(1, 0, "chat", 0.9), ByLength(1, 0, "maths", 0.5), ByLength(1, 0, "maths", 0.7)]
    found = RewardEnsemble(members).score([PROMPT], ["abc"])[0]
    assert (found.category, found.routed) == ("maths", "maths") and found.confidence == pytest.approx(0.6)
    assert found.capabilities == {"brevity": -3}


def test_options_reach_every_member() -> None:
    members = [ByLength(1, 0), ByLength(2, 0)]
    ranking = Ranking(PROMPT, ("a", "bb"), category="code")
    seen: list[tuple[int, int]] = []
    found = score_rankings(
        RewardEnsemble(members),
        [ranking],
        given_categories=True,
        batch_size=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 4), (4, 4)]
    assert [[each.routed for each in row] for row in found] == [["code", "code"]]
    assert members[0].asked == members[1].asked == [(3, True)]
    with pytest.raises(DataError, match="no category to give"):
        score_rankings(members[0], [Ranking(PROMPT, ("a",), where="here")], given_categories=True)
    with pytest.raises(DataError, match="no rankings to score"):
        score_rankings(members[0], [])


def test_what_makes_no_ensemble_is_said() -> None:
    with pytest.raises(ConfigError, match="one reward model at least"):
        RewardEnsemble([])
    with pytest.raises(ConfigError, match=r"no ensemble 'wurst'.*worst"):
        RewardEnsemble([ByLength(1, 0)], "wurst")
    with pytest.raises(ConfigError, match="penalty is -1"):
        combine([ByLength(1, 0).score([PROMPT], ["a"])], "uncertainty", penalty=-1)
