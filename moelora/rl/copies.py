"""One running copy of a task, in this process or in a process of its own, behind one small interface.

Copies are stepped in two halves, so that processes work at the same time: ``start_*`` for all, then ``finish`` for all.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .checks import Crashed, Outcome
from .config import TaskConfig
from .wrappers import build

if TYPE_CHECKING:
    import gymnasium
    from gymnasium.envs.registration import EnvSpec
    from gymnasium.vector import AsyncVectorEnv


class Copy(Protocol):
    """What :class:`TaskEnvironments` needs of a copy."""

    def start_reset(self, seed: int) -> None:
        """Begin the episode of ``seed``."""

    def start_step(self, action: int) -> None:
        """Begin a step."""

    def finish(self) -> Outcome:
        """What the call that was started came to.

        Raises:
            Crashed: the process has died; the copy can only be closed.
            Exception: whatever the environment raised.
        """

    def close(self) -> None:
        """Give up everything it holds."""


class LocalCopy:
    """A copy in this process: ``start_*`` does all the work."""

    def __init__(self, environment: gymnasium.Env[Any, Any]) -> None:
        self._environment = environment
        self._outcome: Outcome | None = None

    def start_reset(self, seed: int) -> None:
        observation, _ = self._environment.reset(seed=seed)
        self._outcome = np.array(observation), 0.0, False, False

    def start_step(self, action: int) -> None:
        observation, reward, terminated, truncated, _ = self._environment.step(action)
        self._outcome = np.array(observation), float(reward), bool(terminated), bool(truncated)

    def finish(self) -> Outcome:
        assert self._outcome is not None
        return self._outcome

    def close(self) -> None:
        self._environment.close()


class WorkerCopy:
    """A copy in a process of its own: Gymnasium's ``AsyncVectorEnv`` of one environment.

    One for each copy, as a vector of several cannot go on without the process that died. Processes are spawned, not
    forked: this one has threads, and perhaps a GPU.
    """

    def __init__(self, task: TaskConfig, spec: EnvSpec) -> None:
        from gymnasium.vector import AsyncVectorEnv, AutoresetMode

        try:
            self._vector: AsyncVectorEnv[Any, Any] = AsyncVectorEnv(
                [partial(build, task, spec)],
                shared_memory=False,
                context="spawn",
                autoreset_mode=AutoresetMode.DISABLED,
            )
        except (EOFError, ConnectionError) as error:
            raise Crashed(str(error)) from error
        self._stepping = False
        self._dead = False

    @property
    def pid(self) -> int:
        """The id of its process."""
        pid = self._vector.processes[0].pid
        assert pid is not None
        return pid

    def start_reset(self, seed: int) -> None:
        self._stepping = False
        self._start(partial(self._vector.reset_async, seed=[seed]))

    def start_step(self, action: int) -> None:
        self._stepping = True
        self._start(partial(self._vector.step_async, np.array([action])))

    def _start(self, call: Any) -> None:
        try:
            call()
        except ConnectionError:
            self._dead = True  # finish() says so

    def finish(self) -> Outcome:
        if self._dead:
            raise Crashed
        try:
            if not self._stepping:
                return self._vector.reset_wait()[0][0], 0.0, False, False
            observations, rewards, terminated, truncated, _ = self._vector.step_wait()
        except (EOFError, ConnectionError) as error:
            self._dead = True
            raise Crashed from error
        return observations[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0])

    def close(self) -> None:
        """End the process at once.

        ``AsyncVectorEnv.close`` talks with its process first, which may be dead or busy.
        """
        if self._vector.closed:
            return
        self._vector.closed = True
        process, pipe = self._vector.processes[0], self._vector.parent_pipes[0]
        process.kill()
        process.join()
        process.close()
        if pipe is not None:
            pipe.close()
        self._vector.error_queue.close()
