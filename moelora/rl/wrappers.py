"""Builds one copy of a task: Gymnasium's environment, seen as an array of float32, steered by whole numbers."""

from __future__ import annotations

import importlib
import itertools
import numbers
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError
from ..registry import closest
from .config import TaskConfig

if TYPE_CHECKING:
    import gymnasium
    from gymnasium.envs.registration import EnvSpec

MOST_ACTIONS = 1024
FRAME = 64
FRAMES = 4
INSTALL = "pip install 'moelora[rl]'"
# What registers the environments whose ids start so.
GRIDS = ("MiniGrid-", "BabyAI-")
PROVIDERS = {"ALE/": "ale_py", "dm_control/": "shimmy", **dict.fromkeys(GRIDS, "minigrid")}


def find_spec(task: TaskConfig) -> EnvSpec:
    """The registered environment of a task; imports the package that registers it.

    Raises:
        ConfigError: the package is missing, or has no environment of this id.
    """
    try:
        import gymnasium
        from gymnasium.error import Error
    except ImportError as error:
        raise ConfigError(f"task {task.name}: reinforcement learning needs gymnasium ({error}): {INSTALL}") from None
    _provide(task)
    try:
        return gymnasium.spec(task.id)
    except Error as error:
        near = closest(task.id, sorted(gymnasium.registry))
        raise ConfigError(
            f"task {task.name}: id {task.id!r} is not registered with Gymnasium{near} ({error}). Environments of your "
            "own are registered by importing their package before"
        ) from None


def _provide(task: TaskConfig) -> None:
    """Import what registers the environments of a task; in a process of a copy too, for what it sets."""
    package = next((package for start, package in PROVIDERS.items() if task.id.startswith(start)), None)
    if package is None:
        return
    try:
        module = importlib.import_module(package)
        if package == "shimmy":  # which passes over what it cannot import
            importlib.import_module("dm_control")
    except ImportError as error:
        raise ConfigError(f"task {task.name}: {task.id} needs the package {package} ({error}): {INSTALL}") from None
    if package == "ale_py":
        module.ALEInterface.setLoggerMode(module.LoggerMode.Error)  # no banner for every copy


def build(task: TaskConfig, spec: EnvSpec, render_mode: str | None = None) -> gymnasium.Env[Any, Any]:
    """One copy of a task: observations are float32 arrays, actions whole numbers from 0 on.

    Args:
        spec: of :func:`find_spec`.

    Raises:
        ConfigError: an option or attribute that the environment does not have, a package that it needs and that is
            missing, or an observation or action that is not an array or a choice.
    """
    import gymnasium
    from gymnasium.error import Error

    _provide(task)
    options: dict[str, Any] = dict(task.options)
    if task.observation == "ram":
        options["obs_type"] = "ram"
    elif task.observation == "frames":
        options["frameskip"] = 1  # AtariPreprocessing skips
    try:
        environment = gymnasium.make(
            spec,
            max_episode_steps=task.max_episode_steps,
            disable_env_checker=True,
            render_mode=render_mode,
            **options,
        )
    except (TypeError, ValueError, AssertionError, ImportError, Error) as error:
        raise ConfigError(
            f"task {task.name}: {task.id} could not be made with options {task.options} ({error}): correct its "
            f"options; a package that is missing comes with {INSTALL}"
        ) from error
    _vary(task, environment)
    return _choices(task, _arrays(task, environment))


def _vary(task: TaskConfig, environment: gymnasium.Env[Any, Any]) -> None:
    """Set the attributes of a task on the bare environment."""
    bare = environment.unwrapped
    for key, value in task.attributes.items():
        known = sorted(name for name, held in vars(bare).items() if _is_number(held) and not name.startswith("_"))
        if key not in known:
            raise ConfigError(
                f"task {task.name}: attributes.{key}: {task.id} has no number of this name, but "
                f"{', '.join(known) or 'none at all'}{closest(key, known)}"
            )
        setattr(bare, key, int(value) if isinstance(getattr(bare, key), int) and value.is_integer() else value)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _arrays(task: TaskConfig, environment: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    """The environment with observations as float32 arrays."""
    from gymnasium import spaces, wrappers

    if task.observation == "frames":
        small = wrappers.AtariPreprocessing(environment, screen_size=FRAME, scale_obs=True)
        return wrappers.FrameStackObservation(small, FRAMES)
    if task.observation == "ram":
        return _seen(environment, lambda observation: np.float32(observation) / np.float32(255), (128,))
    if task.id.startswith(GRIDS):
        environment = _view(task, environment)
    try:
        flat = wrappers.FlattenObservation(environment)
    except (NotImplementedError, ValueError) as error:
        raise ConfigError(
            f"task {task.name}: observations of {task.id}, {environment.observation_space}, cannot be written as a "
            f"vector ({error}): wrap the environment in your own program and register it"
        ) from None
    if not isinstance(flat.observation_space, spaces.Box):
        raise ConfigError(
            f"task {task.name}: observations of {task.id}, {environment.observation_space}, have no fixed size: wrap "
            "the environment in your own program and register it"
        )
    return _seen(flat, partial(np.asarray, dtype=np.float32), flat.observation_space.shape)


def _seen(
    environment: gymnasium.Env[Any, Any], look: Callable[[Any], Any], shape: tuple[int, ...]
) -> gymnasium.Env[Any, Any]:
    """The environment with its observations as ``look`` makes them."""
    from gymnasium import spaces, wrappers

    return wrappers.TransformObservation(environment, look, spaces.Box(-np.inf, np.inf, shape, np.float32))


def _view(task: TaskConfig, environment: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    """The view of a MiniGrid task, (7, 7, 20): object, colour and state of every cell, one of K each."""
    from minigrid.wrappers import ImgObsWrapper, OneHotPartialObsWrapper

    if environment.observation_space["mission"].ordered_placeholders is not None:  # type: ignore[index]
        raise ConfigError(
            f"task {task.name}: the mission of {task.id} is text that changes from episode to episode, which the view "
            "does not show: take a task with one mission, such as MiniGrid-Empty-8x8-v0 or MiniGrid-DoorKey-5x5-v0"
        )
    seen: gymnasium.Env[Any, Any] = ImgObsWrapper(OneHotPartialObsWrapper(environment))
    return seen


def _choices(task: TaskConfig, environment: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    """The environment with actions as whole numbers from 0 on."""
    from gymnasium import spaces, wrappers

    space = environment.action_space
    if isinstance(space, spaces.Discrete):
        if task.bins is not None:
            raise ConfigError(f"task {task.name}: bins: {task.id} has {space.n} discrete actions already, leave it out")
        if space.start == 0:
            return environment
        start = space.start
        return wrappers.TransformAction(environment, lambda action: action + start, spaces.Discrete(space.n))
    if not isinstance(space, spaces.Box) or not space.is_bounded():
        raise ConfigError(
            f"task {task.name}: actions of {task.id} are {space}: only choices and bounded arrays can be played"
        )
    if task.bins is None:
        raise ConfigError(
            f"task {task.name}: actions of {task.id} are continuous, {space}: set bins, such as bins: 5, for so many "
            "values of each dimension"
        )
    size = int(np.prod(space.shape))
    if task.bins**size > MOST_ACTIONS:
        raise ConfigError(
            f"task {task.name}: bins: {task.bins} values of each of {size} dimensions are {task.bins**size} actions, "
            f"more than {MOST_ACTIONS}: set fewer bins (at least 2), or take a task with fewer dimensions"
        )
    low, high = space.low.ravel(), space.high.ravel()
    levels = [np.linspace(low[i], high[i], task.bins) for i in range(size)]
    table = np.array(list(itertools.product(*levels)), dtype=space.dtype).reshape(-1, *space.shape)
    return wrappers.TransformAction(environment, table.__getitem__, spaces.Discrete(len(table)))
