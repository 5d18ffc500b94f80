"""How processes that train together share what they hold: plain data parallelism and DeepSpeed's stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config_files import read_mapping
from .errors import ConfigError


@dataclass(frozen=True)
class Sharing:
    """By how many processes things are divided, and where they lie.

    Attributes:
        world: number of processes. stage: of ZeRO; ``None`` without DeepSpeed.
        width: bytes of a trained weight and its gradient: DeepSpeed keeps those of a half-precision run in 2.
        bucket: elements of DeepSpeed's buffer for gradients; ``None`` where transformers sets it by the model's width.
    """

    world: int
    stage: int | None
    width: int
    optimizer_on_cpu: bool
    parameters_on_cpu: bool
    bucket: int | None
    overlap: bool

    @property
    def states(self) -> int:
        """Divisor of the optimizer's states."""
        return self.world if (self.stage or 0) >= 1 else 1

    @property
    def gradients(self) -> int:
        """Divisor of the gradients."""
        return self.world if (self.stage or 0) >= 2 else 1

    @property
    def weights(self) -> int:
        """Divisor of all weights."""
        return self.world if (self.stage or 0) >= 3 else 1

    def said(self, divisor: int) -> str:
        """The divisor as a part of a sentence."""
        return f", divided by {divisor} (ZeRO-{self.stage})" if divisor > 1 else ""

    def bucket_bytes(self, count: int, hidden_size: int) -> int:
        """Bytes of the buffers in which ``count`` gradients travel."""
        if self.world == 1:
            return 0
        if not self.stage:
            return count * self.width
        elements = hidden_size**2 if self.bucket is None else self.bucket
        return elements * self.width * (2 if self.overlap else 1)


def read_sharing(args: Mapping[str, Any], world: int) -> Sharing:
    """The sharing that the arguments of a trainer ask for.

    Raises:
        ConfigError: its DeepSpeed configuration cannot be read, or its stage is not 0, 1, 2 or 3.
    """
    given = args.get("deepspeed")
    if given is None:
        return Sharing(world, None, 4, False, False, None, False)
    values = read_mapping(given) if isinstance(given, str) else given
    zero = values.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"trainer.args.deepspeed: zero_optimization.stage is {stage!r}: the stages are 0, 1, 2 and 3")

    def on(name: str) -> bool:
        enabled = values.get(name, {}).get("enabled", False)
        return bool(args.get(name)) if enabled == "auto" else bool(enabled)

    def offloaded(name: str) -> bool:
        return str((zero.get(name) or {}).get("device", "none")) in ("cpu", "nvme")

    bucket = zero.get("reduce_bucket_size", 500_000_000)
    return Sharing(
        world=world,
        stage=stage,
        width=2 if on("bf16") or on("fp16") else 4,
        optimizer_on_cpu=stage >= 1 and offloaded("offload_optimizer"),
        parameters_on_cpu=stage == 3 and offloaded("offload_param"),
        bucket=None if bucket == "auto" else int(bucket),
        overlap=bool(zero.get("overlap_comm", stage == 3)),
    )
