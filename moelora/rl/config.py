"""What a task of reinforcement learning is: an environment of Gymnasium, how it is seen, and when it is solved."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..schema import Closed

Scalar = bool | int | float | str
OURS = {"render_mode": "record(...) sets it", "max_episode_steps": "it is a key of the task"}


class TaskConfig(Closed):
    """One task.

    Attributes:
        name: names the task in reports, checkpoints and modules: letters, digits, ``_`` and ``-``.
        id: a registered Gymnasium id, such as ``CartPole-v1``, ``ALE/Pong-v5``, ``MiniGrid-Empty-8x8-v0`` or
            ``dm_control/pendulum-swingup-v0``. The packages of the last three are imported when they are needed.
        options: arguments of ``gymnasium.make``.
        attributes: numbers set on the bare environment before its first episode, which vary its physics. What an
            environment derives from one of them when it is made has to be set too: ``CartPole-v1`` has the product of
            ``length`` and the pole's mass in ``polemass_length``.
        bins: a continuous action becomes so many evenly spaced values of each of its dimensions, both ends among them;
            all combinations are the actions. ``None`` for tasks whose actions are discrete.
        observation: ``vector`` is the observation flattened, numbers as they are, choices as one of K; of MiniGrid the
            view alone, every cell as one of K. ``ram`` is the 128 bytes of an Atari game, over 255. ``frames`` is its
            last four pictures, grey, 64 by 64, over 255, as ``AtariPreprocessing`` makes them.
        target: the return, undiscounted and unscaled, at which the task counts as solved.
        max_episode_steps: ends an episode as truncated; ``None`` leaves the environment's own limit.
        reward_scale: rewards that training sees are multiplied by it; returns are not.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    id: Annotated[str, Field(min_length=1)]
    options: dict[str, Scalar] = Field(default_factory=dict)
    attributes: dict[str, float] = Field(default_factory=dict)
    bins: Annotated[int, Field(ge=2)] | None = None
    observation: Literal["vector", "ram", "frames"] = "vector"
    target: float
    max_episode_steps: Annotated[int, Field(ge=1)] | None = None
    reward_scale: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if ":" in self.id:
            module, _, name = self.id.partition(":")
            raise ValueError(
                f"id: {self.id!r} would import the module {module!r}, which a configuration may not do: import it in "
                f"your own program, where it registers its environments, and write {name!r}"
            )
        for key, why in OURS.items():
            if key in self.options:
                raise ValueError(f"options.{key}: this is not an option ({why})")
        if self.observation != "vector" and not self.id.startswith("ALE/"):
            raise ValueError(
                f"observation: {self.observation!r} is for the games of Atari (ids that start with 'ALE/'): set "
                f"'vector' for {self.id!r}"
            )
        if self.id.startswith("ALE/"):
            if self.observation == "vector":
                raise ValueError(
                    f"observation: an Atari game is seen as 'ram' or as 'frames': set one of them for {self.id!r}"
                )
            for key in ("obs_type", "frameskip"):
                if key in self.options and (key == "obs_type" or self.observation == "frames"):
                    raise ValueError(f"options.{key}: the key 'observation' decides it, leave it out")
        return self


# The pole's mass is 0.1, and its product with the length is an attribute of its own.
SIX_TASKS = (
    TaskConfig(name="cartpole", id="CartPole-v1", target=450),
    TaskConfig(name="cartpole_long", id="CartPole-v1", attributes={"length": 1.5, "polemass_length": 0.15}, target=450),
    TaskConfig(name="cartpole_weak", id="CartPole-v1", attributes={"force_mag": 5.0}, target=450),
    TaskConfig(name="cartpole_heavy", id="CartPole-v1", attributes={"gravity": 20.0}, target=450),
    TaskConfig(name="acrobot", id="Acrobot-v1", target=-100),
    TaskConfig(name="pendulum", id="Pendulum-v1", bins=5, target=-300),
)
