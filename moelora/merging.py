"""Merging: experts become a part of the frozen weights, and the backbone needs no mixture any more.

A matrix can only hold weights that are the same for every token. That is so for an expert that is always on, and for
routers that look at nothing but the context (a task, a request, a static mix): for those, merging is exact up to the
rounding of the weight's dtype. An FFN block has a nonlinearity inside, so there it is exact for one single expert.
Everything else is an approximation by mean weights, made on request only, and its error is measured.

A 4-bit or 8-bit weight cannot take an update without being rounded again, which would lose most of it: it is unpacked
and the merged weight is kept dense, in the backbone's dtype. An 8-bit linear rounds its input as well; the dense one
does not.

Shapes: D in, O out, E experts, R stacked rank, U weights of a router (E, or R for a router of single ranks).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .backbone import forget_source
from .dispatch.linear import over_ranks
from .errors import ConfigError
from .experts import BlockContainer, Container, ExpertBank, is_linear
from .experts.dense import dense_weight, is_quantized
from .model import MoELoRAModel
from .site_weights import Batches, context_fields, run_batches, site_weights


@dataclass(frozen=True)
class MergedSite:
    """What merging did to one site.

    Attributes:
        weights: (U,) the weights that were merged with. exact: whether every token has just these.
        rounding: how much of the update the dtype of the weight lost, ``|stored - wanted| / |update|``.
        output_error: ``|merged - routed| / |routed|`` of the site's output over the batches; ``None`` without batches.
        update_error: ``|merged - routed| / |routed - frozen|``, the same against what the experts add.
    """

    weights: Tensor
    exact: bool
    rounding: float
    output_error: float | None = None
    update_error: float | None = None

    def __str__(self) -> str:
        text = f"{'exact' if self.exact else 'approximate'}, rounding {self.rounding:.1e} of the update"
        if self.output_error is None:
            return text
        return f"{text}, error {self.output_error:.1e} of the output and {self.update_error:.1e} of the update"


@dataclass(frozen=True)
class Merged:
    """A merged backbone and what merging did to each site, by name; ``str()`` of it is one line for each site."""

    backbone: PreTrainedModel
    sites: dict[str, MergedSite]

    def __str__(self) -> str:
        return "\n".join(f"{name}: {site}" for name, site in self.sites.items())


@torch.no_grad()
def merge(
    model: MoELoRAModel,
    approximate: bool = False,
    batches: Iterable[Mapping[str, Any]] | None = None,
    **fields: Any,
) -> Merged:
    """Add the experts of every site to its frozen weights; ``model`` is of no use afterwards.

    Adapters that are not active are left out. Where several are, each adds to what those inside it have made of a
    weight, and the errors of a site are those of all that.

    Needs memory for a second copy of the sites' weights; an error leaves the model as it was.

    Args:
        approximate: where the routing depends on the tokens, merge with the weights that the router names for that
            (:meth:`~moelora.routers.Router.approximate_weights`), or with its mean weights over ``batches``.
        batches: keywords of forwards, such as ``{"input_ids": ..., "attention_mask": ...}``; the errors are measured
            over their real tokens, with exact sites too.
        **fields: fields of the routing context, ``task_ids=3`` for example; the merged model is that task's.

    Raises:
        ConfigError: a site cannot be merged exactly and ``approximate`` is not set, it has experts that are no matrix,
            its weight is tied to another module's, experts are disabled, or the model was unloaded.
    """
    _refuse(model)
    given = [] if batches is None else list(batches)
    values = context_fields(fields)
    containers = model.containers()
    weights, exact = site_weights(model, approximate, given, values)
    dtype = model.backbone.dtype
    order = model.innermost_first()
    merged: dict[int, nn.Module] = {}
    lost: dict[str, float] = {}
    for container in order:
        name = container.site.name
        merged[id(container)], lost[name] = _merge_site(container, weights[name], dtype, merged)
    errors = _errors(model, merged, given, values)
    sites = {
        name: MergedSite(weights[name], name in exact, lost[name], *errors.get(name, (None, None)))
        for name in containers
    }
    _keep_saved(model)
    backbone = model.unload()
    for container in order:  # what is around a merged layer comes after it, and has it inside
        parent, _, child = container.site.path.rpartition(".")
        setattr(backbone.get_submodule(parent), child, merged[id(container)])
    _settle(backbone, dtype)
    return Merged(backbone, sites)


def _keep_saved(model: MoELoRAModel) -> None:
    """Let the modules that were trained whole take the place of the frozen ones for good."""
    saved = model.saved_modules()
    ends = (model.backbone.get_input_embeddings(), model.backbone.get_output_embeddings())
    if any(module is end for module in saved.values() for end in ends):
        # The copy has a weight of its own, which loading the merged model must not tie again.
        model.backbone.config.tie_word_embeddings = False
    for module in saved.values():
        module.base = module.trained.requires_grad_(False)


def _refuse(model: MoELoRAModel) -> None:
    """What no weights would make right."""
    model.refuse_unloaded()
    if not model.slot.enabled:
        raise ConfigError("merging inside disable_experts() would measure no experts: leave that block first")
    for name, container in model.containers().items():
        for bank in container.banks():
            if not bank.mergeable:
                raise ConfigError(f"site {name!r}: what experts of kind {bank.kind!r} add is no matrix: cannot merge")
    _refuse_tied(model.backbone)


def _refuse_tied(backbone: PreTrainedModel) -> None:
    """A weight that two modules share would change both."""
    uses = Counter(id(parameter) for _, parameter in backbone.named_parameters(remove_duplicate=False))
    for module in backbone.modules():
        if isinstance(module, Container) and not isinstance(module.base, Container):
            for path, parameter in module.base.named_parameters():
                if uses[id(parameter)] > 1:
                    raise ConfigError(
                        f"site {module.site.name!r}: {path} is shared with another module, such as embeddings tied to "
                        "the output, which merging would change as well: untie them, or leave out this site"
                    )


def _merge_site(
    container: Container, weights: Tensor, dtype: torch.dtype, inside: Mapping[int, nn.Module]
) -> tuple[nn.Module, float]:
    """A copy of the site's frozen module with the experts in its weights, and how much of them rounding took.

    Args:
        inside: the merged modules of containers that may lie inside this one, by their ids.
    """
    factors = container.router is not None and container.router.mix == "factors"
    if not isinstance(container, BlockContainer):
        only, base = cast(ExpertBank, container.experts), inside.get(id(container.base), container.base)
        return _merge_linear(base, _update(only, weights, base, factors), dtype)
    memo: dict[int, nn.Module] = {id(m): m for m in container.base.modules() if is_linear(m)}
    memo |= {id(m): inside[id(m)] for m in container.base.modules() if isinstance(m, Container)}
    lost = []
    for key, bank in container.experts.items():
        place = container.base.get_submodule(key.replace("__", "."))
        linear = inside.get(id(place), place)
        update = _update(cast(ExpertBank, bank), weights, linear, factors)
        memo[id(place)], rounding = _merge_linear(linear, update, dtype)
        lost.append(rounding)
    # What the memo has is not copied, so that the copy holds the merged linears and shares those without experts.
    return copy.deepcopy(container.base, memo), max(lost)


def _update(bank: ExpertBank, weights: Tensor, linear: nn.Module, factors: bool) -> Tensor:
    """(O, D) float32: what the weighted experts add to the weight of a linear."""
    weights = weights.to(bank.up().device)
    if not factors:
        return bank.delta(weights, linear)
    gate_R = over_ranks(weights, bank.ranks)
    scale_R = over_ranks(weights.new_tensor(bank.config.scales), bank.ranks)
    count = len(bank.ranks)
    mixed_B = (bank.up().float() * gate_R * scale_R).unflatten(1, (count, -1)).sum(1)
    mixed_A = (bank.down().float() * gate_R.unsqueeze(1)).unflatten(0, (count, -1)).sum(0)
    update: Tensor = mixed_B @ mixed_A
    return update


def _merge_linear(linear: nn.Module, update: Tensor, dtype: torch.dtype) -> tuple[nn.Module, float]:
    """A dense copy of a linear with the update (O, D) in its weight, and the share of the update that rounding took."""
    wanted = dense_weight(linear).float() + update
    stored = wanted.to(dtype if is_quantized(linear) else cast(Tensor, linear.weight).dtype)
    size = update.norm()
    lost = 0.0 if size == 0 else ((stored.float() - wanted).norm() / size).item()
    return _with_weight(linear, stored), lost


def _with_weight(linear: nn.Module, weight: Tensor) -> nn.Module:
    """A dense linear with the weight (O, D) and the bias of ``linear``."""
    bias = cast("nn.Parameter | None", linear.bias)
    if isinstance(linear, Conv1D):
        new: nn.Module = Conv1D(1, 1)
        new.nf, new.nx = linear.nf, linear.nx
        weight = weight.T
    else:
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    new.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    new.bias = bias  # type: ignore[assignment]
    return new.train(linear.training)


def _errors(
    model: MoELoRAModel, merged: Mapping[int, nn.Module], batches: Batches, fields: Mapping[str, Any]
) -> dict[str, tuple[float, float]]:
    """Relative error of each site's output, of the whole and of what the experts add; empty without batches."""
    sums: dict[str, Tensor] = {}

    def measure(container: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(container, Container)
        if model.slot.context.scoring_pass:
            return
        name, x = container.site.name, args[0]
        mask = model.slot.context.of(x).mask_of(x.shape[:-1])
        parts = [merged[id(container)](x) - output, output, output - container.base(x)]
        if mask is not None:
            parts = [part[mask] for part in parts]
        squares = torch.stack([part.double().square().sum() for part in parts])
        sums[name] = sums.get(name, 0) + squares

    handles = [container.register_forward_hook(measure) for container in model.containers().values()]
    try:
        run_batches(model, batches, fields)
    finally:
        for handle in handles:
            handle.remove()
    result = {}
    for name, squares in sums.items():
        wrong, whole, added = squares.sqrt().tolist()
        result[name] = (wrong / whole if whole else 0.0, wrong / added if added else 0.0)
    return result


def _settle(backbone: PreTrainedModel, dtype: torch.dtype) -> None:
    """Unpack what is still quantised, and forget where the backbone came from: it is another model now."""
    for path, module in list(backbone.named_modules()):
        if is_linear(module) and is_quantized(module):
            backbone.set_submodule(path, _with_weight(module, dense_weight(module).to(dtype)))
    if (quantizer := vars(backbone).get("hf_quantizer")) is not None:
        quantizer.remove_quantization_config(backbone)
        for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            vars(backbone).pop(flag, None)
    forget_source(backbone)
