"""The last steps of a task, from which segments of trajectories are cut.

All copies of a task step together, so what is kept is a table: a row for each step, a column for each copy.

Shapes: N copies, R rows, B segments, T steps of each, A actions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError
from .environments import Step
from .world_model import Segments


class Replay:
    """Keeps ``rows`` steps of every copy of a task, the newest.

    Every observation is kept twice, as what was acted upon and as what it followed: 2 N R observations of float32.

    Attributes:
        table: ``observations``, acted upon, and ``following``, what came of it and not of a reset (R, N, ...) float32;
            ``actions`` (R, N) int64; ``rewards`` (R, N) and ``policies`` (R, N, A) float32; ``terminated``, ``ended``,
            in whichever way, and ``known``, false where the process of a copy died in the step, (R, N) bool.
    """

    def __init__(self, rows: int, copies: int, observation_shape: tuple[int, ...], num_actions: int) -> None:
        self.rows = rows
        none = torch.zeros(0, copies)
        self.table = {
            "observations": none.new_zeros(0, copies, *observation_shape),
            "following": none.new_zeros(0, copies, *observation_shape),
            "actions": none.long(),
            "rewards": none,
            "policies": none.new_zeros(0, copies, num_actions),
            "terminated": none.bool(),
            "ended": none.bool(),
            "known": none.bool(),
        }
        self._new: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(self.table["actions"])

    def keep(self, observations: Tensor, actions: Tensor, policies: Tensor, step: Step) -> None:
        """Take in a step of all copies; it is drawn from after :meth:`settle`."""
        terminated, truncated, restarted = map(torch.from_numpy, (step.terminated, step.truncated, step.restarted))
        self._new.append(
            {
                "observations": observations,
                "following": torch.from_numpy(step.final_observations),
                "actions": actions,
                "rewards": torch.from_numpy(step.rewards),
                "policies": policies,
                "terminated": terminated,
                "ended": terminated | truncated,
                "known": ~restarted,
            }
        )

    def settle(self) -> None:
        """Put new steps into the table, and let the oldest go."""
        new, self._new = self._new[-self.rows :], []
        if new:
            for name, old in self.table.items():
                left = old[max(len(old) + len(new) - self.rows, 0) :]
                self.table[name] = torch.cat([left, torch.stack([each[name].to(old.dtype) for each in new])])

    def draw(self, batch: int, length: int, absorbing: int, generator: torch.Generator) -> Segments:
        """Segments that begin at steps drawn alike, and end with the episode, or with what is known.

        Args:
            absorbing: behind a step that terminated, so many steps of no reward go on, as far as there is room. They
                take actions at random, stay at the last observation, and have no policy to learn, as in MuZero
                (appendix A).
            generator: on the CPU.
        """
        table = self.table
        begins = table["known"].nonzero()
        row, copy = begins[torch.randint(len(begins), (batch,), generator=generator)].unbind(1)
        rows = row[:, None] + torch.arange(length)
        inside = rows < len(self)
        at = (rows.clamp(max=len(self) - 1), copy[:, None])
        before = torch.cat([torch.zeros(batch, 1, dtype=torch.bool), table["ended"][at][:, :-1]], dim=1)
        real = (inside & table["known"][at] & ~before).long().cumprod(1).bool()
        lengths = real.sum(1)
        last = (row + lengths - 1, copy)
        terminated = table["terminated"][last]
        padded = torch.arange(length) < (lengths + absorbing * terminated)[:, None]
        observations = torch.cat([table["observations"][at], table["following"][at][:, -1:]], dim=1)
        behind = torch.arange(length + 1) >= lengths[:, None]
        observations[behind] = table["following"][last].repeat_interleave(behind.sum(1), dim=0)
        policies = table["policies"][at]
        anything = torch.randint(policies.shape[-1], (batch, length), generator=generator)
        return Segments(
            observations,
            table["actions"][at].where(real, anything),
            table["rewards"][at].where(real, 0),
            policies.where(real[..., None], 0),
            padded,
            terminated,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The table. Steps that are not settled are not in it."""
        return dict(self.table)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from another's table.

        Raises:
            CheckpointError: it is of another task, or other copies.
        """
        wrong = {
            name for name, own in self.table.items() if name not in state or state[name].shape[1:] != own.shape[1:]
        }
        if wrong or set(state) != set(self.table):
            raise CheckpointError(
                f"the steps that were kept do not fit the task ({', '.join(sorted(wrong or set(state)))}): go on with "
                "the tasks and copies of the checkpoint"
            )
        self.table = {name: state[name][-self.rows :].clone() for name in self.table}
        self._new = []
