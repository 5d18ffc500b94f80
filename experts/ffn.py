"""How an FFN block is put together, found out by running it once with one token and watching its parts.

No table of model types: a block is understood if it is ``down(act(p))`` or ``down(act(p) * u)`` with p and u the
outputs of one or two linears, whatever their names and whether or not they are fused. The finding is checked against
the block's own output.

Shapes: D width of the block's input and output, F width between the projections.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError


@dataclass(frozen=True)
class FFNSpec:
    """Names of the parts of an FFN block, relative to it.

    Attributes:
        activated: linear whose output goes through the nonlinearity. multiplied: linear of the second half, or
            ``None``; equal to ``activated`` where one linear computes both halves.
        activated_half: 0 or 1, the half of a fused output that is activated.
        down: the last linear. activation: the nonlinearity.
        inner_dropout, outer_dropout: dropout before and after ``down``, or ``None``.
    """

    activated: str
    multiplied: str | None
    activated_half: int
    down: str
    activation: str
    inner_dropout: str | None
    outer_dropout: str | None
    hidden_size: int
    inner_size: int

    @property
    def fused(self) -> bool:
        return self.multiplied == self.activated

    @property
    def projections(self) -> list[str]:
        """The linears that may carry experts, each once."""
        return list(dict.fromkeys(name for name in (self.activated, self.multiplied, self.down) if name is not None))


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear: ``nn.Linear`` and its 4-bit and 8-bit subclasses, or GPT-2's ``Conv1D``."""
    return isinstance(module, nn.Linear | Conv1D)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear; a 4-bit weight's own shape would not tell."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.nf)
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def trace_ffn(block: nn.Module, name: str) -> FFNSpec:
    """Find out how ``block`` is put together.

    Args:
        name: its path in the backbone, for messages.

    Raises:
        ConfigError: it is not an FFN block of a known form, or the finding does not reproduce the block's output.
    """
    _refuse_fused_experts(block, name)
    linears = {path: module for path, module in block.named_modules() if path and is_linear(module)}
    if len(linears) not in (2, 3):
        raise ConfigError(
            f"site {name!r} ({type(block).__name__}) is neither a linear nor an FFN block with 2 or 3 linears (it has "
            f"{len(linears)}): target an FFN block such as 'mlp', or linears by name"
        )
    weight = next(iter(linears.values())).weight
    assert isinstance(weight, Tensor)
    if weight.is_meta or weight.numel() == 0:  # the latter where ZeRO-3 has taken it apart
        block = _sketch(block)
        linears = {path: block.get_submodule(path) for path in linears}
        weight = torch.empty(0, device="cpu")
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    was_training = block.training
    block.eval()
    try:
        for width in dict.fromkeys(linear_shape(module)[0] for module in linears.values()):
            probe = torch.linspace(-1.5, 1.5, width, device=weight.device).roll(1).to(dtype).view(1, 1, width)
            seen = _watch(block, probe, linears)
            if seen is not None:
                return _interpret(block, name, probe, seen, linears)
    finally:
        block.train(was_training)
    raise ConfigError(
        f"site {name!r} ({type(block).__name__}) does not take hidden states of any of its linears' widths"
    )


def _refuse_fused_experts(block: nn.Module, name: str) -> None:
    for path, parameter in block.named_parameters():
        owner = block.get_submodule(path.rpartition(".")[0])
        if parameter.dim() == 3 and not isinstance(owner, _ConvNd):
            raise ConfigError(
                f"site {name!r} ({type(block).__name__}) holds the weights of experts of its own in one tensor, {path} "
                f"of the shape {tuple(parameter.shape)}: there is no linear to put experts beside. Target the linears "
                "of the attention, such as q_proj, or of a shared expert"
            )


class _Sketch(nn.Linear):
    """Stands for a linear of any size whose weight holds no numbers, and takes no memory itself.

    Args:
        index: the outputs of two with different ones are different.
    """

    def __init__(self, in_features: int, out_features: int, index: int) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.rows_O = torch.linspace(index, index + 1, out_features, device="cpu").cos()

    def forward(self, x: Tensor) -> Tensor:
        return x.square().mean(-1, keepdim=True) * self.rows_O.to(x.dtype)


def _sketch(block: nn.Module) -> nn.Module:
    """A twin of a block on the meta device that can be run: how its parts are joined does not depend on its weights."""
    tensors = chain(block.parameters(), block.buffers())
    twin = copy.deepcopy(block, {id(tensor): tensor for tensor in tensors})
    for index, (path, module) in enumerate(list(twin.named_modules())):
        if is_linear(module):
            twin.set_submodule(path, _Sketch(*linear_shape(module), index))
            continue
        for name, parameter in module.named_parameters(recurse=False):
            shape = getattr(parameter, "ds_shape", parameter.shape)  # the former of ZeRO-3
            setattr(module, name, nn.Parameter(torch.ones(shape, device="cpu")))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.ones(buffer.shape, device="cpu"))
    return twin


@dataclass
class _Seen:
    calls: list[tuple[str, nn.Module, Tensor, Tensor]]
    output: Tensor


def _watch(block: nn.Module, probe: Tensor, linears: dict[str, nn.Module]) -> _Seen | None:
    """Run ``block`` on ``probe`` and list the calls of its leaf modules; ``None`` if the width does not fit."""
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def watch(path: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            calls.append((path, module, args[0].detach().clone(), output.detach().clone()))

        return module.register_forward_hook(hook)

    leaves = [(p, m) for p, m in block.named_modules() if p and (p in linears or not any(True for _ in m.children()))]
    handles = [watch(path, module) for path, module in leaves]
    try:
        with torch.no_grad():
            output = block(probe)
    except (RuntimeError, TypeError):  # another width, or a module that needs more than hidden states
        return None
    finally:
        for handle in handles:
            handle.remove()
    return _Seen(calls, output) if isinstance(output, Tensor) else None


def _interpret(block: nn.Module, name: str, probe: Tensor, seen: _Seen, linears: dict[str, nn.Module]) -> FFNSpec:
    order = [call for call in seen.calls if call[0] in linears]
    down = order[-1]
    first = order[:-1]
    inner = linear_shape(down[1])[0]
    acts = [
        c for c in seen.calls if c[0] not in linears and not isinstance(c[1], nn.Dropout) and c[2].shape[-1] == inner
    ]
    dropouts = {
        "inner" if c[2].shape[-1] == inner and torch.equal(c[2], down[2]) else "outer": c[0]
        for c in seen.calls
        if isinstance(c[1], nn.Dropout)
    }
    for act in acts:
        for path, _, _, output in first:
            halves = [output] if output.shape[-1] == inner else list(output.chunk(2, dim=-1))
            for index, half in enumerate(halves):
                if half.shape == act[2].shape and torch.equal(half, act[2]):
                    others = [other for other, *_ in first if other != path]
                    spec = FFNSpec(
                        activated=path,
                        multiplied=path if len(halves) == 2 else (others[0] if others else None),
                        activated_half=index,
                        down=down[0],
                        activation=act[0],
                        inner_dropout=dropouts.get("inner"),
                        outer_dropout=dropouts.get("outer"),
                        hidden_size=probe.shape[-1],
                        inner_size=inner,
                    )
                    _verify(block, name, probe, seen.output, spec)
                    return spec
    raise ConfigError(
        f"site {name!r} ({type(block).__name__}): found no nonlinearity module between its linears; only blocks of the "
        "form down(act(x)) or down(act(x) * y) can carry block experts. Target its linears by name instead"
    )


def split_halves(output: Tensor, spec: FFNSpec) -> tuple[Tensor, Tensor]:
    """The activated and the multiplied half of a fused projection's output (..., 2F)."""
    halves = output.chunk(2, dim=-1)
    return halves[spec.activated_half], halves[1 - spec.activated_half]


def _verify(block: nn.Module, name: str, probe: Tensor, expected: Tensor, spec: FFNSpec) -> None:
    with torch.no_grad():
        activated = block.get_submodule(spec.activated)(probe)
        multiplied = None
        if spec.fused:
            activated, multiplied = split_halves(activated, spec)
        elif spec.multiplied is not None:
            multiplied = block.get_submodule(spec.multiplied)(probe)
        a = block.get_submodule(spec.activation)(activated)
        out = block.get_submodule(spec.down)(a if multiplied is None else a * multiplied)
    if out.shape != expected.shape or not torch.allclose(out.float(), expected.float(), rtol=1e-2, atol=1e-4):
        raise ConfigError(
            f"site {name!r} ({type(block).__name__}) computes something else than down(act(x) * y): its experts would "
            "be wrong. Target its linears by name instead"
        )
