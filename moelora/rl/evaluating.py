"""Whole episodes of a task under a policy: their returns, or a film of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, UserError
from .checks import Array, Outcome, chosen, finite, named
from .config import TaskConfig
from .copies import LocalCopy
from .wrappers import INSTALL, build, find_spec

if TYPE_CHECKING:
    import gymnasium

Act = Callable[[Array], Any]  # observations (N, ...) float32 -> N whole numbers
Watch = Callable[["gymnasium.Env[Any, Any]"], None]

WIDEST = 320  # pixels
FASTEST = 25  # pictures a second
COLOURS = 32  # enough for drawings, and a third of the size of 256


def play(
    task: TaskConfig,
    act: Act,
    seeds: Sequence[int],
    watch: Watch | None = None,
    render_mode: str | None = None,
) -> list[float]:
    """Play one episode for each seed, all side by side in fresh environments of this process.

    The rows of the observations stay with their seeds from the first step to the last: a row whose episode has ended
    keeps its last observation, and its action is not looked at. So neither the shape that ``act`` sees nor the place of
    an episode in it depends on how the others go, and ``act`` may remember by row.

    Args:
        watch: is shown the environment of the first seed after its reset and every step.

    Returns:
        Undiscounted, unscaled returns in the order of the seeds.

    Raises:
        TaskError: an environment failed or gave a number that is not finite. UserError: actions that there are not.
    """
    spec = find_spec(task)
    environments = [build(task, spec, render_mode) for _ in seeds]
    num_actions = int(environments[0].action_space.n)  # type: ignore[attr-defined]
    copies = [LocalCopy(environment) for environment in environments]
    outcomes: list[Outcome] = []
    returns, playing, step = [0.0] * len(seeds), list(range(len(seeds))), 0
    try:
        for copy, seed in zip(copies, seeds, strict=True):
            outcomes.append(_outcome(task, copy, partial(copy.start_reset, seed), f"seed {seed}, reset"))
        _show(watch, environments)
        while playing:
            step += 1
            actions = chosen(task, act(np.stack([outcome[0] for outcome in outcomes])), len(seeds), num_actions)
            for row in playing:
                start = partial(copies[row].start_step, actions[row])
                outcomes[row] = _outcome(task, copies[row], start, f"seed {seeds[row]}, step {step}")
                returns[row] += outcomes[row][1]
            playing = [row for row in playing if not any(outcomes[row][2:])]
            _show(watch, environments)
    finally:
        for copy in copies:
            copy.close()
    return returns


def _outcome(task: TaskConfig, copy: LocalCopy, start: Callable[[], None], where: str) -> Outcome:
    with named(task, where):
        start()
    return finite(task, copy.finish(), where)


def _show(watch: Watch | None, environments: list[gymnasium.Env[Any, Any]]) -> None:
    if watch is not None:
        watch(environments[0])


def record(task: TaskConfig, act: Act, seed: int, path: str | Path) -> float:
    """Play one episode and keep it as a GIF, at most 320 pixels wide and about 25 pictures a second.

    Args:
        seed: as in :func:`play`, whose return for it this is. path: ends in ``.gif``; its folder is made.

    Returns:
        The return of the episode.

    Raises:
        UserError: another ending. ConfigError: the environment cannot be drawn here, or Pillow is missing.
    """
    path = Path(path)
    if path.suffix.lower() != ".gif":
        raise UserError(f"{path}: a recording is a GIF, give it a name that ends in .gif")
    try:
        image = import_module("PIL.Image")
    except ImportError as error:
        raise ConfigError(f"a recording needs the package Pillow ({error}): {INSTALL}") from None
    pictures: list[Any] = []
    rate = 0.0

    def keep(environment: gymnasium.Env[Any, Any]) -> None:
        nonlocal rate
        rate = float(environment.metadata.get("render_fps", FASTEST))
        try:
            picture = image.fromarray(environment.render())
        except Exception as error:  # each kind of environment has its own
            raise ConfigError(
                f"task {task.name}: {task.id} cannot be drawn here ({error!r}). What draws comes with {INSTALL}; "
                "without a screen, tasks of dm_control need the environment variable MUJOCO_GL=egl, or osmesa"
            ) from error
        picture.thumbnail((WIDEST, WIDEST))
        pictures.append(picture.quantize(COLOURS))

    total = play(task, act, [seed], keep, render_mode="rgb_array")[0]
    every = max(1, round(rate / FASTEST))
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = pictures[::every]
    shown[0].save(path, save_all=True, append_images=shown[1:], duration=round(1000 * every / rate), loop=0)
    return total
