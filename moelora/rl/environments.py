"""Several copies of one task, stepped together: ends and new episodes, evaluation, a state that can be saved.

N copies.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..errors import CheckpointError, ConfigError, UserError
from .checks import Array, Crashed, Outcome, TaskError, chosen, finite, named
from .config import SIX_TASKS, TaskConfig
from .copies import Copy, LocalCopy, WorkerCopy
from .evaluating import Act, play, record
from .saved import CopyState, State, digest
from .wrappers import build, find_spec

__all__ = ["SIX_TASKS", "Step", "TaskConfig", "TaskEnvironments", "TaskError"]

logger = logging.getLogger(__name__)

MOST_CRASHES = 5  # of one copy, without an episode that ended between them


@dataclass(frozen=True)
class Step:
    """What one step of all copies came to.

    Attributes:
        observations: (N, ...) float32, to act on next: where an episode ended, the first of the next one.
        rewards: (N,) float32, times the task's ``reward_scale``.
        terminated: (N,) bool, the episode came to its end: nothing follows. truncated: (N,) bool, it was cut off: the
            value of its last observation still counts.
        final_observations: (N, ...) float32, what the actions led to: the true last observation where an episode ended,
            and as ``observations`` elsewhere.
        restarted: (N,) bool, the process of the copy died: nothing is known of this step, which has the reward 0, is
            truncated, and has the observation before it as its last. Its episode is not among those that ended.
        returns: of the episodes that ended, unscaled, in the order of the copies. lengths: their steps.
    """

    observations: Array
    rewards: Array
    terminated: Array
    truncated: Array
    final_observations: Array
    restarted: Array
    returns: list[float]
    lengths: list[int]


@dataclass
class _Episode:
    """The episode that a copy is in."""

    number: int
    seed: int
    actions: list[int] = field(default_factory=list)
    total: float = 0.0
    observation: Array = field(default_factory=lambda: np.zeros(0, np.float32))


class TaskEnvironments:
    """``num_copies`` copies of a task, stepped together. The first episodes begin at once.

    An episode that ends is followed by the next one of its copy. Its seed comes from ``seed``, the copy and the number
    of the episode, so that a run does not depend on how long others take, nor on where the copies run.

    Args:
        workers: every copy in a process of its own, which pays for slow environments; otherwise all in this one. With
            it, a script that builds these needs ``if __name__ == "__main__":``, as processes are spawned.

    Attributes:
        observation_shape: of one copy. num_actions: whole numbers from 0 to this, exclusive.
        observations: (N, ...) float32, those to act on next.
        steps: taken, of all copies together. restarts: processes that died and were replaced.

    Raises:
        ConfigError: the task cannot be built; says what to set, or to install.
    """

    def __init__(self, task: TaskConfig, num_copies: int, seed: int = 0, workers: bool = False) -> None:
        if num_copies < 1:
            raise ConfigError(f"task {task.name}: num_copies is {num_copies}: at least one copy is needed")
        if seed < 0:
            raise ConfigError(f"task {task.name}: seed is {seed}: it must be 0 or more")
        self.task, self.num_copies, self.seed = task, num_copies, seed
        self.steps = self.restarts = 0
        self._spec = find_spec(task)
        self._workers = workers
        first = build(task, self._spec)
        self.observation_shape: tuple[int, ...] = first.observation_space.shape or ()
        self.num_actions = int(first.action_space.n)  # type: ignore[attr-defined]
        first.close()
        self._copies: list[Copy] = []
        self._crashes = [0] * num_copies
        self._episodes = [_Episode(-1, 0) for _ in range(num_copies)]
        try:
            for _ in range(num_copies):
                self._copies.append(self._open())
            self.reset()
        except Crashed as error:
            self.close()
            raise TaskError(
                f"task {task.name}: the process of copy {len(self._copies)} died at its start; it says why above. A "
                'script needs if __name__ == "__main__": around what it does, and an environment of your own must be '
                "importable"
            ) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the copies, and their processes."""
        for copy in self._copies:
            copy.close()

    @property
    def observations(self) -> Array:
        return np.stack([episode.observation for episode in self._episodes])

    @property
    def pids(self) -> list[int]:
        """The processes of the copies; none where they are in this one."""
        return [copy.pid for copy in self._copies if isinstance(copy, WorkerCopy)]

    def reset(self) -> Array:
        """Leave all episodes and begin new ones; returns their first observations, (N, ...) float32."""
        self._next_episodes(list(range(self.num_copies)))
        return self.observations

    def step(self, actions: Any) -> Step:
        """Step every copy once.

        Args:
            actions: (N,) whole numbers.

        Raises:
            UserError: there are no such actions. TaskError: an environment failed or gave a number that is not finite,
                or its process died again and again; names the task, the copy and the step.
        """
        chosen_N = chosen(self.task, actions, self.num_copies, self.num_actions)
        before = self.observations
        for row, action in enumerate(chosen_N):
            self._episodes[row].actions.append(action)
        starts = [partial(copy.start_step, action) for copy, action in zip(self._copies, chosen_N, strict=True)]
        outcomes = self._outcomes(dict(enumerate(starts)))
        self.steps += self.num_copies
        final, rewards = before, np.zeros(self.num_copies, np.float32)
        terminated, truncated, restarted = (np.zeros(self.num_copies, bool) for _ in range(3))
        for row, outcome in outcomes.items():
            if outcome is None:
                truncated[row] = restarted[row] = True
                continue
            final[row], reward, terminated[row], truncated[row] = outcome
            rewards[row] = reward * self.task.reward_scale
            self._episodes[row].total += reward
            self._episodes[row].observation = final[row].copy()
        whole = [self._episodes[row] for row in np.flatnonzero((terminated | truncated) & ~restarted)]
        returns, lengths = [episode.total for episode in whole], [len(episode.actions) for episode in whole]
        self._renew(terminated | truncated, restarted)
        return Step(self.observations, rewards, terminated, truncated, final, restarted, returns, lengths)

    def evaluate(self, act: Act, episodes: int, seed: int) -> list[float]:
        """Returns of whole episodes in fresh environments with the seeds ``seed``, ``seed + 1``, ...

        The copies here, and how many they are, make no difference; see :func:`play`.

        Args:
            act: observations (episodes, ...) float32 -> as many whole numbers.

        Raises:
            UserError: less than one episode, a seed below 0, or actions that there are not. TaskError: an environment
                failed or gave a number that is not finite.
        """
        if episodes < 1 or seed < 0:
            raise UserError(
                f"task {self.task.name}: {episodes} episodes from seed {seed}: at least 1, and 0, are needed"
            )
        return play(self.task, act, range(seed, seed + episodes))

    def record(self, act: Act, seed: int, path: str | Path) -> float:
        """Keep the episode of a seed as a GIF, and return its return; see :func:`moelora.rl.evaluating.record`."""
        return record(self.task, act, seed, path)

    def state_dict(self) -> dict[str, Any]:
        """Where every copy is, in JSON types: the seed of its episode and the actions since."""
        copies = [
            CopyState(
                episode=episode.number,
                seed=episode.seed,
                actions=episode.actions,
                total=episode.total,
                digest=digest(episode.observation),
            )
            for episode in self._episodes
        ]
        state = State(task=self.task, seed=self.seed, steps=self.steps, restarts=self.restarts, copies=copies)
        return state.to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was called, by playing the episodes again up to there.

        Raises:
            CheckpointError: the state is damaged, is of another task or number of copies, or playing it again led
                elsewhere: the environment depends on more than its seed and actions, or is another version.
        """
        saved = State.read(state, self.task, self.num_copies, self.num_actions)
        self.seed, self.steps, self.restarts = saved.seed, saved.steps, saved.restarts
        self._episodes = [_Episode(copy.episode, copy.seed, list(copy.actions)) for copy in saved.copies]
        self._replay()
        for row, (episode, copy) in enumerate(zip(self._episodes, saved.copies, strict=True)):
            if digest(episode.observation) != copy.digest or episode.total != copy.total:
                raise CheckpointError(
                    f"task {self.task.name}: copy {row}: {len(copy.actions)} steps from seed {copy.seed} led elsewhere "
                    f"than when they were saved (return so far {episode.total}, then {copy.total}): {self.task.id} "
                    "depends on more than its seed and its actions, or on the version of its package or the machine. "
                    "Begin new episodes with reset() instead of loading this state"
                )

    def _replay(self) -> None:
        """Play the episodes again from their seeds; of several lengths, together while they last."""
        actions = [episode.actions for episode in self._episodes]
        for at in range(-1, max(map(len, actions))):
            starts: dict[int, Callable[[], None]] = {}
            for row, copy in enumerate(self._copies):
                if at == -1:
                    starts[row] = partial(copy.start_reset, self._episodes[row].seed)
                elif at < len(actions[row]):
                    starts[row] = partial(copy.start_step, actions[row][at])
            for row, outcome in self._outcomes(starts).items():
                if outcome is None:
                    raise TaskError(
                        f"task {self.task.name}: the process of copy {row} died while its episode was replayed"
                    )
                if outcome[2] or outcome[3]:
                    raise CheckpointError(
                        f"task {self.task.name}: copy {row}: an episode that went on after step {at + 1} when it was "
                        f"saved ends there now: {self.task.id} depends on more than its seed and its actions, or on "
                        "its version"
                    )
                self._episodes[row].total += outcome[1]
                self._episodes[row].observation = outcome[0]

    def _open(self) -> Copy:
        if self._workers:
            return WorkerCopy(self.task, self._spec)
        return LocalCopy(build(self.task, self._spec))

    def _outcomes(self, starts: dict[int, Callable[[], None]]) -> dict[int, Outcome | None]:
        """Start the calls, by copy, then wait for all; ``None`` where the process died."""
        outcomes: dict[int, Outcome | None] = {}
        where = {row: f"copy {row}, step {len(self._episodes[row].actions)} of its episode" for row in starts}
        for row, start in starts.items():
            with named(self.task, where[row]):
                start()
        for row in starts:
            try:
                with named(self.task, where[row]):
                    outcome = self._copies[row].finish()
            except Crashed:
                outcomes[row] = None
            else:
                outcomes[row] = finite(self.task, outcome, where[row])
        return outcomes

    def _renew(self, ended: Array, restarted: Array) -> None:
        """New episodes where one ended, in new processes where one died."""
        rows: list[int] = np.flatnonzero(ended).tolist()
        for row in rows:
            if restarted[row]:
                self._reopen(row)
            else:
                self._crashes[row] = 0
        self._next_episodes(rows)

    def _next_episodes(self, rows: list[int]) -> None:
        """Begin the next episode of some copies, as often as it takes with those whose process dies."""
        while rows:
            starts: dict[int, Callable[[], None]] = {}
            for row in rows:
                number = self._episodes[row].number + 1
                seed = int(np.random.SeedSequence(self.seed, spawn_key=(row, number)).generate_state(1)[0] >> 1)
                self._episodes[row] = _Episode(number, seed)
                starts[row] = partial(self._copies[row].start_reset, seed)
            outcomes = self._outcomes(starts)
            rows = [row for row, outcome in outcomes.items() if outcome is None]
            for row, outcome in outcomes.items():
                if outcome is None:
                    self._reopen(row)
                else:
                    self._episodes[row].observation = outcome[0]

    def _reopen(self, row: int) -> None:
        """A new process for a copy whose own has died."""
        while True:
            self.restarts += 1
            self._crashes[row] += 1
            if self._crashes[row] > MOST_CRASHES:
                raise TaskError(
                    f"task {self.task.name}: the process of copy {row} died {self._crashes[row]} times without ending "
                    f"an episode between: {self.task.id} may need more memory, or fewer copies"
                )
            logger.warning("task %s: the process of copy %d died; a new one begins a new episode", self.task.name, row)
            self._copies[row].close()
            try:
                self._copies[row] = self._open()
            except Crashed:
                continue
            return
