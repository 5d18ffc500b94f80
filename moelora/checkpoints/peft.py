"""PEFT's LoRA adapters; see :class:`PeftLayout`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..config import MixtureConfig
from ..errors import CheckpointError
from .by_module import PEFT_PREFIX, ByModule, Places, Where, modules_of
from .folder import ADAPTER_CONFIG, ADAPTER_TENSORS, Folder
from .layout import LAYOUTS, Architecture, Content, Layout, Part, Shape, refuse
from .peft_config import check_targets, experts_of, misshapen, read_config, saved_modules
from .peft_files import refuse_unwritable, write_adapter
from .peft_writing import EMBEDDINGS, MAGNITUDE, WrittenAdapter
from .reading import parse
from .tensor_file import TensorFile

_KEY = re.compile(
    r"base_model\.model\.(?P<path>[\w.-]+)\.(?P<tail>lora_[AB]\.weight|lora_magnitude_vector(?:\.weight)?)"
)
_TAIL = re.compile(r".*\.(?:lora_[AB]\.(?:weight|bias)|lora_embedding_[AB]|lora_magnitude_vector(?:\.weight)?)")


@dataclass
class PeftStored(ByModule):
    """A LoRA adapter of PEFT.

    Attributes:
        saved: names of the tensors of the modules that are saved whole, without the prefix.
    """

    layout: ClassVar[str] = "peft"
    saved: list[str]

    def places(self, site: str) -> Places:
        factors: dict[str, list[tuple[str, Where]]] = {
            "lora_A": [("lora_A.weight", ())],
            "lora_B": [("lora_B.weight", ())],
        }
        if self.mixture.sites[0].experts.kind == "dora":
            other = f"{MAGNITUDE}.weight"
            named = other if self.key(site, other) in self.file.headers else MAGNITUDE
            factors["magnitude"] = [(named, (0,))]
        return factors

    def declared(self) -> dict[str, Shape]:
        whole = {name: self.file.headers[self.prefix + name].shape for name in self.saved}
        return super().declared() | whole

    def parts(self, declared: Mapping[str, Shape]) -> dict[str, list[Part]]:
        """As everywhere.

        Raises:
            CheckpointError: the backbone has a tensor that the file does not know.
        """
        mine = self.declared()
        if other := next((name for name in declared if name not in mine), None):
            raise CheckpointError(
                f"{self.file.path}: has tensors such as {next(iter(mine))!r}, but on this backbone it would need "
                f"{other!r}: it was trained on another class of this model, such as AutoModel, or the name of a module "
                "is the end of another's: load it on that class"
            )
        whole = {name: [Part(self.prefix + name, declared[name])] for name in self.saved if name in declared}
        return super().parts(declared) | whole


@LAYOUTS.register("peft")
class PeftLayout(Layout):
    """LoRA, rsLoRA and DoRA adapters as PEFT saves them (huggingface/peft, 0.3 to 0.21.2), read and written.

    ``adapter_config.json`` (indent 2, keys sorted)
        the fields of ``LoraConfig``. peft_type "LORA"; r, lora_alpha, lora_dropout; use_rslora (scale is lora_alpha /
        sqrt(r), else lora_alpha / r); use_dora; rank_pattern and alpha_pattern, r and lora_alpha of single modules by a
        regular expression that must match the end of their path; target_modules, a list of ends of paths, a regular
        expression, "all-linear" or null; modules_to_save, ends of the paths of modules that were trained whole;
        base_model_name_or_path; task_type.
    ``adapter_model.safetensors`` or ``adapter_model.bin``
        for each adapted linear, after ``base_model.model.<path>.``: ``lora_A.weight`` (r, in), ``lora_B.weight``
        (out, r), and with DoRA ``lora_magnitude_vector`` (out,), or ``lora_magnitude_vector.weight``, PEFT's name in
        memory. For GPT-2's Conv1D the factors have the same form, and fan_in_fan_out says nothing about them.
        For modules_to_save the module's own tensors, ``base_model.model.<path>.weight`` and so on.

    Read as one expert that is always on at each module, of kind lora, rslora or dora. Rank comes from the tensors,
    which rank_pattern must not contradict. No regular expression is run: keys of alpha_pattern are compared letter by
    letter (``^``, ``$``, ``.`` and escapes as PEFT means them), and one that is more than that is refused, unless all
    that it might match has the same alpha, or the same key in rank_pattern tells by its rank what it means.
    target_modules must agree with the tensors as far as it is a list. DoRA with use_rslora becomes kind dora with
    alpha * sqrt(r).

    Refused, because experts cannot express it: biases (``bias`` other than "none", lora_bias), LoRA of embeddings and
    convolutions, layer_replication, target_parameters, trainable_token_indices, aLoRA, QALoRA, BD-LoRA, KaSA,
    MonteCLoRA, Megatron's linears, modules_to_save with tied weights, and initialisations that changed the backbone
    (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) unless PEFT converted the adapter back. Tensors of embeddings that PEFT adds
    where the vocabulary was resized are refused until ``modules_to_save`` names them. Other keys are of no matter here.

    Written: linears, and projections of blocks, with one expert that is always on, of the kinds above or frozen; where
    they differ in kind, lora_alpha is the scale times r. A frozen expert of rank 0 is left out. target_modules has the
    mixture's own targets, or full paths; the keys of the two patterns are full paths, escaped.
    """

    files = (ADAPTER_CONFIG, *ADAPTER_TENSORS)

    def detect(self, folder: Folder) -> str | None:
        pair = folder.adapter()
        if pair is None:
            return None
        config, file = pair
        lora = [key for key in file.headers if ".lora_" in key]
        if config.get("peft_type") != "LORA" or config.get("arrow_config") is not None:
            return None
        if not any(_KEY.fullmatch(key) or ".lora_embedding_" in key for key in lora):
            return None
        if not all(_TAIL.fullmatch(key) for key in lora) or _foreign(file):
            return None
        return "peft_type is 'LORA', and its tensors are named lora_A.weight, lora_B.weight"

    def read(self, folder: Folder) -> PeftStored:
        path = folder.path / ADAPTER_CONFIG
        config = read_config(folder.mapping(ADAPTER_CONFIG), path)
        file = folder.tensors(*ADAPTER_TENSORS)
        modules = modules_of(file, _KEY)
        _refuse_others(file, modules, config.backbone().name)
        ranks = {module: shapes["lora_A.weight"][0] for module, shapes in modules.items()}
        check_targets(config, modules, path)
        others = [key.removeprefix(PEFT_PREFIX) for key in file.headers if ".lora_" not in key]
        whole = saved_modules(config, others, path)
        _refuse_embeddings(file, [key for key in others if not any(key in keys for keys in whole.values())])
        mixture = {
            "sites": [{"target": list(modules), "experts": experts_of(config, ranks, path)}],
            "modules_to_save": list(whole),
        }
        stored = PeftStored(
            folder=folder.path,
            backbone=config.backbone(),
            architecture=Architecture(),
            mixture=parse(MixtureConfig, mixture, path),
            file=file,
            detail=f"PEFT {config.peft_version}" if config.peft_version else "",
            prefix=PEFT_PREFIX,
            groups=[list(modules)],
            saved=[key for keys in whole.values() for key in keys],
        )
        stored.check()
        return stored

    def write(self, folder: Path, content: Content) -> None:
        adapter = WrittenAdapter(content)
        refuse_unwritable("peft", adapter.reasons())
        write_adapter(folder, adapter.config(), adapter.tensors(), pickled=False)


def _foreign(file: TensorFile) -> bool:
    """Whether an adapted module has tensors that PEFT does not put there, such as a router."""
    inside = tuple(f"{PEFT_PREFIX}{module}." for module in modules_of(file, _KEY))
    others = (key for key in file.headers if ".lora_" not in key and ".base_layer." not in key)
    return any(key.startswith(inside) for key in others)


def _refuse_others(file: TensorFile, modules: Mapping[str, Mapping[str, Shape]], backbone: str) -> None:
    """Refuse what is no pair of factors of a linear.

    Raises:
        CheckpointError: factors of embeddings or of convolutions, half a pair, or shapes that do not fit each other.
    """
    if embedded := [key for key in file.headers if ".lora_embedding_" in key]:
        raise CheckpointError(
            f"{file.path}: {embedded[0]}: LoRA of embeddings, which experts cannot express: they adapt linears. Merge "
            "it into the backbone with PEFT, or train without embeddings in target_modules"
        )
    missing = [
        f"missing: {PEFT_PREFIX}{module}.{name}: expected a tensor, found nothing"
        for module, tensors in modules.items()
        for name in ("lora_A.weight", "lora_B.weight")
        if name not in tensors
    ]
    refuse(file.path, missing + misshapen(modules, PEFT_PREFIX), backbone)


def _refuse_embeddings(file: TensorFile, keys: Iterable[str]) -> None:
    """Refuse whole embeddings that nobody named.

    Raises:
        CheckpointError: PEFT saved them because the vocabulary was resized, or was told to.
    """
    found = [key for key in keys if key.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS]
    if found:
        names = ", ".join(dict.fromkeys(key.removesuffix(".weight").rpartition(".")[2] for key in found))
        raise CheckpointError(
            f"{file.path}: {', '.join(PEFT_PREFIX + key for key in found)}: whole embeddings, which PEFT adds where "
            f"the vocabulary was resized, but modules_to_save does not name them. If they are meant to replace those "
            f"of the backbone, add {names} to modules_to_save in {ADAPTER_CONFIG}; else save the adapter again with "
            "save_embedding_layers=False"
        )
