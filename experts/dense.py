"""The weight of a frozen linear as a plain matrix, whatever stores it.

Shapes: D in, O out.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError
from .ffn import linear_shape

QUANTIZED = ("Params4bit", "Int8Params")


def is_quantized(linear: nn.Module) -> bool:
    """Whether bitsandbytes holds the weight in 4 or 8 bits."""
    return type(linear.weight).__name__ in QUANTIZED


def dense_weight(linear: nn.Module, name: str = "") -> Tensor:
    """(O, D) the weight of a linear: unpacked from 4 or 8 bits, or in the dtype that it has; may be a view of it.

    8-bit linears of bitsandbytes round their input as well, so their output is not this matrix times the input.

    Args:
        name: path of the linear, for messages.

    Raises:
        ConfigError: the weight is not on a device, or only a part of it is here.
    """
    weight = cast(Tensor, linear.weight)
    where = f"site {name!r}: " if name else ""
    if weight.is_meta:
        raise ConfigError(f"{where}its weights are on the meta device; load them before attaching experts")
    if is_quantized(linear):
        # transformers imports bitsandbytes together with this module.
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        state: Any = vars(linear).get("state")
        weight = dequantize_bnb_weight(cast(nn.Parameter, weight), state)
    if isinstance(linear, Conv1D):
        weight = weight.T
    features, outputs = linear_shape(linear)
    if tuple(weight.shape) != (outputs, features):
        raise ConfigError(
            f"{where}the weight has the shape {tuple(weight.shape)}, expected {(outputs, features)}: it is sharded "
            "(ZeRO-3, FSDP), and what needs the whole matrix cannot run on a part of it"
        )
    return weight.detach()
