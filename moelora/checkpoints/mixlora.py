"""The layout of MixLoRA (arXiv 2404.15159), read and written; see :class:`MixLoRALayout`.

Source: TUDB-Labs/MixLoRA d59d09b, TUDB-Labs/MoE-PEFT 40f8cb7.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..config import BackboneConfig
from ..errors import CheckpointError
from .folder import ADAPTER_CONFIG, ADAPTER_TENSORS, Folder
from .layout import LAYOUTS, Architecture, Content, Layout, Part, Shape, Stored, cut, inspect, refuse
from .mixlora_config import adapter_config, mixture_of, read_config
from .moe_peft_config import ATTENTION, FFN, HEAD_KEY, HEAD_TENSOR, write_pair
from .tensor_file import TensorFile

_OURS = re.compile(r"(?:.*?\.)?([0-9]+)\.(.+)\.(lora_A|lora_B|router\.weight)")
_LAYER = re.compile(r"mixlora\.layers\.([0-9]{1,6})\.")
_OLD_GATE = re.compile(r"mixlora\.layers\.[0-9]+\.gate\.weight")
_OLD_NAMES = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}


@dataclass(frozen=True)
class _Keys:
    """The names of a file's tensors in one generation of the layout."""

    generation: int

    def router(self, layer: int) -> str:
        return f"mixlora.layers.{layer}.{'mlp.moe_gate' if self.generation == 2 else 'gate'}.weight"

    def expert(self, layer: int, projection: str, expert: int, which: str) -> str:
        if self.generation == 2:
            return f"mixlora.layers.{layer}.mlp.{projection}.experts.{expert}.{which}.weight"
        name = _OLD_NAMES.get(projection, projection) if self.generation == 0 else projection
        return f"mixlora.layers.{layer}.experts.{expert}.{name}.{which}.weight"

    def attention(self, layer: int, projection: str, which: str) -> str:
        return f"mixlora.layers.{layer}.self_attn.{projection}.{which}.weight"

    def parts(self, declared: Mapping[str, Shape], num_experts: int, r: int) -> dict[str, list[Part]]:
        """How each tensor of the mixture is cut: by expert in the FFN, whole elsewhere.

        Raises:
            CheckpointError: a tensor that the layout has no place for, or two that claim the same.
        """
        result: dict[str, list[Part]] = {}
        claimed: dict[str, str] = {}
        for name, shape in declared.items():
            result[name] = list(self._cut(name, shape, num_experts, r))
            for part in result[name]:
                other = claimed.setdefault(part.key, name)
                if other != name:
                    raise CheckpointError(
                        f"{part.key}: stands for {other} and for {name}: this backbone has two stacks of layers, which "
                        "MixLoRA's layout cannot tell apart; keep the native layout"
                    )
        return result

    def _cut(self, name: str, shape: Shape, num_experts: int, r: int) -> Iterator[Part]:
        if name == HEAD_TENSOR:
            yield Part(HEAD_KEY, shape)
            return
        match = _OURS.fullmatch(name)
        if match is None:
            raise _no_place(name)
        layer, inner, which = int(match[1]), match[2], match[3]
        block, _, projection = inner.partition(".")
        if inner == "mlp" and which == "router.weight":
            yield Part(self.router(layer), shape)
        elif block == "self_attn" and projection in ATTENTION and which != "router.weight":
            yield Part(self.attention(layer, projection, which), shape)
        elif block == "mlp" and projection in FFN and which != "router.weight":
            for expert in range(num_experts):
                rows = slice(expert * r, (expert + 1) * r)
                key = self.expert(layer, projection, expert, which)
                if which == "lora_A":
                    yield Part(key, (r, shape[1]), (rows,))
                else:
                    yield Part(key, (shape[0], r), (slice(None), rows))
        else:
            raise _no_place(name)


@dataclass
class MixLoRAStored(Stored):
    """A MixLoRA checkpoint of any generation; names of modules are those of ``model.layers.N``."""

    layout: ClassVar[str] = "mixlora"
    keys: _Keys
    num_layers: int

    def sites(self) -> list[list[str]]:
        names = [
            ["mlp"] if site.projections is not None else [f"self_attn.{target}" for target in site.target]
            for site in self.mixture.sites
        ]
        return [[f"model.layers.{i}.{name}" for i in range(self.num_layers) for name in each] for each in names]

    def declared(self) -> dict[str, Shape]:
        result: dict[str, Shape] = {}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            for site in self.mixture.sites:
                experts = site.experts
                if site.projections is None:
                    names = {f"self_attn.{target}": target for target in site.target}
                else:
                    names = {f"mlp.{projection}": projection for projection in site.projections}
                    width = self._width(self.keys.router(i) for i in range(self.num_layers))
                    result[f"{prefix}.mlp.router.weight"] = (experts.num_experts, width[1])
                for inner, projection in names.items():
                    result[f"{prefix}.{inner}.lora_A"] = (
                        experts.r * experts.num_experts,
                        self._width(self._all_keys(inner, projection, "lora_A"))[1],
                    )
                    result[f"{prefix}.{inner}.lora_B"] = (
                        self._width(self._all_keys(inner, projection, "lora_B"))[0],
                        experts.r * experts.num_experts,
                    )
        if self.mixture.modules_to_save:
            result[HEAD_TENSOR] = self._width([HEAD_KEY])
        return result

    def parts(self, declared: Mapping[str, Shape]) -> dict[str, list[Part]]:
        experts = self.mixture.sites[0].experts
        return self.keys.parts(declared, experts.num_experts, experts.r)

    def _all_keys(self, inner: str, projection: str, which: str) -> Iterator[str]:
        for layer in range(self.num_layers):
            if inner.startswith("self_attn."):
                yield self.keys.attention(layer, projection, which)
            else:
                for expert in range(self.mixture.sites[0].experts.num_experts):
                    yield self.keys.expert(layer, projection, expert, which)

    def _width(self, keys: Iterable[str]) -> Shape:
        """Shape of the first matrix that is there: what the others are measured by."""
        headers = (self.file.headers[key].shape for key in keys if key in self.file.headers)
        return next((shape for shape in headers if len(shape) == 2), (0, 0))


@LAYOUTS.register("mixlora")
class MixLoRALayout(Layout):
    """MixLoRA's layout, as MoE-PEFT writes it: ``adapter_config.json`` and ``adapter_model.bin``, nothing else.

    ``adapter_config.json`` (indent 4)
        optional use_dora, use_rslora; bias "none"; peft_type "MIXLORA"; r, lora_alpha, lora_dropout; target_modules, a
        list or a mapping of name to bool; optional expert_lora, a mapping that replaces the LoRA options above for the
        experts; routing_strategy; num_experts; optional act_fn; the router's options; base_model_name_or_path;
        task_type, or null. Scale is lora_alpha / r, with use_rslora lora_alpha / sqrt(r).

        =================== ============================ ======== =================================================
        routing_strategy    options (default)            router   optional, with the default of the reference loader
        =================== ============================ ======== =================================================
        mixlora, "mixtral"  top_k (2)                    topk     router_init_range 0.02, jitter_noise 0
        mixlora-dynamic     top_p (0.8), temperature (0) topp     router_init_range 0.02, jitter_noise 0
        mixlora-switch,     expert_capacity (32),        switch   router_init_range 1.0, jitter_noise 0.01,
        "switch"            sparse_step (null, unused)            router_z_loss_coef 0.001, ffn_dropout 0
        =================== ============================ ======== =================================================

        All take router_aux_loss_coef (0.001) and router_loss (true). The reference writes neither these nor the last
        column; we write those that differ from their default.

    ``adapter_model.bin``
        ``torch.save`` of a flat dict of float32 ``nn.Parameter``. For each layer l, in this order:
        ``mixlora.layers.{l}.mlp.moe_gate.weight`` (E, hidden);
        ``mixlora.layers.{l}.self_attn.{q_proj,k_proj,v_proj,o_proj}.lora_{A,B}.weight`` (r, in), (out, r), plain LoRA;
        ``mixlora.layers.{l}.mlp.{gate_proj,down_proj,up_proj}.experts.{e}.lora_{A,B}.weight``.
        Phi has dense, fc1, fc2; Phi-3 the fused qkv_proj and gate_up_proj. Every layer is adapted.
        A classifier (task_type SEQ_CLS) has ``classifier`` (labels, hidden) first, the weight of a head without a bias
        that looks at the last real token: the ``score`` of transformers' sequence classification models, so load it on
        one with as many labels. ``adapter_model.safetensors`` with the same keys is read where it is there; two tensor
        files are refused.

    Generations: 2 is the above. 1 has ``mixlora.layers.{l}.gate.weight`` and
    ``mixlora.layers.{l}.experts.{e}.{gate,down,up}_proj.lora_{A,B}.weight``; 0 has w1_proj, w2_proj and w3_proj in
    place of gate_proj, down_proj and up_proj, in target_modules too. Both say "mixtral" or "switch". We write 2.

    Quirks: expert_lora is honoured here and ignored by the published loader, which also refuses task_type null,
    lora_dropout 0 and a missing act_fn; here the nonlinearity is the backbone's, and act_fn must agree with it.
    use_dora is refused: the trained magnitudes were never saved. The published loader refuses classifiers, and MoE-PEFT
    loads the head only where ``adapter_config.json`` has the name of its task (task_name), which it does not write.
    """

    files = (ADAPTER_CONFIG, *ADAPTER_TENSORS)

    def detect(self, folder: Folder) -> str | None:
        if not folder.has(ADAPTER_CONFIG) or folder.mapping(ADAPTER_CONFIG).get("peft_type") != "MIXLORA":
            return None
        return f"{ADAPTER_CONFIG} has peft_type 'MIXLORA'"

    def read(self, folder: Folder) -> MixLoRAStored:
        path = folder.path / ADAPTER_CONFIG
        config = read_config(path)
        file = folder.tensors(*reversed(ADAPTER_TENSORS))
        keys = _Keys(_generation(file, config.targets()))
        if config.num_experts > len(file.headers):
            raise CheckpointError(
                f"{path}: num_experts: expected as many as {file.path.name} holds, found {config.num_experts} with "
                f"{len(file.headers)} tensors; the configuration was edited: restore it"
            )
        stored = MixLoRAStored(
            folder=folder.path,
            backbone=BackboneConfig(name=config.base_model_name_or_path, quantization=None),
            architecture=Architecture(hidden_act=config.act_fn),
            mixture=mixture_of(config, path),
            file=file,
            keys=keys,
            num_layers=_num_layers(file),
            detail=f"generation {keys.generation}",
        )
        expected = [part for each in stored.parts(stored.declared()).values() for part in each]
        refuse(file.path, inspect(file, expected)[0], stored.backbone.name)
        return stored

    def write(self, folder: Path, content: Content) -> None:
        values = adapter_config(content)
        experts = next(site.experts for site in content.mixture.sites if site.router is not None)
        declared = {name: tuple(value.shape) for name, value in content.tensors.items()}
        parts = _Keys(2).parts(declared, experts.num_experts, experts.ranks[0])
        tensors = dict(cut(content.tensors, parts))
        write_pair(folder, values, {key: tensors[key] for key in sorted(tensors, key=_place)})


def _generation(file: TensorFile, targets: list[str]) -> int:
    if not any(_OLD_GATE.fullmatch(key) for key in file.headers):
        return 2
    return 0 if set(targets) & set(_OLD_NAMES.values()) else 1


def _num_layers(file: TensorFile) -> int:
    found = sorted({int(match[1]) for key in file.headers if (match := _LAYER.match(key))})
    if found != list(range(len(found))) or not found:
        gap = next((i for i, layer in enumerate(found) if i != layer), 0)
        raise CheckpointError(
            f"{file.path}: mixlora.layers.{gap}: expected tensors of every layer from 0 on, found none of layer {gap}; "
            "every layer must be there: copy the checkpoint again"
        )
    return len(found)


def _place(key: str) -> tuple[Any, ...]:
    """Sort key that gives the published order."""
    if key == HEAD_KEY:
        return (-1,)
    _, _, layer, block, projection, *rest = key.split(".")
    if projection == "moe_gate":
        return (int(layer), 0)
    which = rest[-2]
    if block == "self_attn":
        return (int(layer), 1, ATTENTION.index(projection), which)
    return (int(layer), 2, FFN.index(projection), int(rest[1]), which)


def _no_place(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: MixLoRA's layout has no place for this tensor: it takes a router and the projections "
        f"{', '.join(FFN)} of mlp, and plain LoRA on {', '.join(ATTENTION)} of self_attn; keep the native layout"
    )
