"""What a recipe will take, from shapes alone: parameters, memory of each device by component, examples and steps.

Nothing here loads a weight or needs a GPU. Parameters and the bytes of weights, gradients and optimizer are counted;
what depends on the run-time of a step (activations, layers that ZeRO-3 gathers) is estimated, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import Recipe
from .counting import Data, count_data, most_classes
from .experts import BlockContainer, Container
from .mixture import MoELoRAModel
from .shapes import read_shape, sketch_backbone, storage_bytes
from .sharing import Sharing, read_sharing

# Bytes that an optimizer keeps for each trained parameter, by how the names of transformers begin; 8-bit ones keep a
# float32 scale for every 256 values of both moments.
OPTIMIZERS = {
    "adamw_torch": 8.0,
    "adamw_apex": 8.0,
    "adamw_8bit": 2 + 8 / 256,
    "adamw_bnb_8bit": 2 + 8 / 256,
    "paged_adamw_8bit": 2 + 8 / 256,
    "paged_adamw": 8.0,
    "lion_8bit": 1 + 4 / 256,
    "lion": 4.0,
    "sgd": 0.0,
}


@dataclass(frozen=True)
class Piece:
    """Memory of one component on one device.

    Attributes:
        name: the component. place: ``device``, or ``host`` for what is offloaded to the CPU's memory.
        bytes: for each process. how: how it comes about. estimate: whether it is no count.
    """

    name: str
    place: str
    bytes: int
    how: str
    estimate: bool = False


@dataclass(frozen=True)
class Plan:
    """What a recipe will take.

    Attributes:
        backbone: name, class and dtype. world: number of processes.
        trained, frozen: parameters by component (experts, routers, modules, backbone); shared ones once.
        memory: for each process. data: examples, tokens and steps, as far as they are known.
    """

    backbone: str
    world: int
    trained: dict[str, int]
    frozen: dict[str, int]
    memory: list[Piece]
    data: Data

    def total(self, place: str) -> int:
        """Bytes of all components on ``device`` or ``host``, for each process."""
        return sum(piece.bytes for piece in self.memory if piece.place == place)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with the totals."""
        totals = {"trained": sum(self.trained.values()), "frozen": sum(self.frozen.values())}
        places = {place: self.total(place) for place in ("device", "host")}
        return {**asdict(self), "totals": {**totals, "bytes": places}}

    def lines(self) -> Iterator[str]:
        """The plan as text."""
        trained, frozen = sum(self.trained.values()), sum(self.frozen.values())
        yield f"Plan for {self.backbone}, {self.world} {'process' if self.world == 1 else 'processes'}"
        yield ""
        yield f"parameters trained    {trained:>16,}  {trained / (trained + frozen):.2%} of all"
        yield from (f"  {name:<20}{count:>16,}" for name, count in self.trained.items())
        yield f"parameters frozen     {frozen:>16,}"
        yield from (f"  {name:<20}{count:>16,}" for name, count in self.frozen.items())
        for place, title in (("device", "memory of each device"), ("host", "offloaded, per process")):
            pieces = [piece for piece in self.memory if piece.place == place]
            if pieces:
                yield ""
                yield f"{title:<22}{_size(self.total(place))}"
            for piece in pieces:
                mark = "estimate: " if piece.estimate else ""
                yield f"  {piece.name:<20}{_size(piece.bytes)}  {mark}{piece.how}"
        yield ""
        yield from self.data.lines()


def _size(count: int) -> str:
    """Bytes in a column of 16."""
    return f"{count / 2**30:>12.2f} GiB" if count >= 2**30 else f"{count / 2**20:>12.2f} MiB"


def plan(recipe: Recipe, world: int = 1, backbone_config: Path | None = None) -> Plan:
    """Plan a recipe.

    Args:
        world: number of processes. backbone_config: see :func:`~moelora.shapes.read_shape`.

    Raises:
        ConfigError: the mixture does not fit the backbone, or the trainer's arguments do not hold together.
        UserError: the backbone's configuration cannot be had.
    """
    args = recipe.trainer.args
    on_gpu = not args.get("use_cpu", False)
    config = read_shape(recipe.backbone, backbone_config, recipe.trainer.carrier)
    backbone = sketch_backbone(recipe.backbone, config, on_gpu)
    kind, dtype = type(backbone).__name__, str(backbone.dtype).removeprefix("torch.")
    with torch.device("meta"):
        model = recipe.trainer.attach(backbone, recipe.mixture)
    trained, frozen = _counts(model)
    sharing = read_sharing(args, world)
    pieces = [*_weights(model, sharing, recipe), *_training(sum(trained.values()), args, sharing, config)]
    activations = _activations_of_clip if recipe.trainer.carrier == "clip" else _activations
    pieces.append(activations(model, recipe, config))
    stored = recipe.backbone.quantization or "as it is"
    name = (
        f"{recipe.backbone.name} ({kind}, stored {stored}, computing in {dtype} as on a {'GPU' if on_gpu else 'CPU'})"
    )
    return Plan(name, world, trained, frozen, pieces, count_data(recipe, world))


def _counts(model: MoELoRAModel) -> tuple[dict[str, int], dict[str, int]]:
    """Trained and frozen parameters by component."""
    kinds: dict[int, str] = {}
    for container in model.containers().values():
        for bank in container.banks():
            kinds |= dict.fromkeys(map(id, bank.parameters()), "experts")
        if container.router is not None:
            kinds |= dict.fromkeys(map(id, container.router.parameters()), "routers")
    for module in model.saved_modules().values():
        kinds |= dict.fromkeys(map(id, module.trained.parameters()), "modules")
    trained: dict[str, int] = {}
    frozen: dict[str, int] = {}
    for parameter in model.parameters():
        into, kind = trained if parameter.requires_grad else frozen, kinds.get(id(parameter), "backbone")
        into[kind] = into.get(kind, 0) + parameter.numel()
    return trained, frozen


def _weights(model: MoELoRAModel, sharing: Sharing, recipe: Recipe) -> Iterator[Piece]:
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    frozen = storage_bytes(model, trained)
    place = "host" if sharing.parameters_on_cpu else "device"
    stored = recipe.backbone.quantization or "its own dtype"
    yield Piece(
        "frozen weights", place, frozen // sharing.weights, f"stored in {stored}{sharing.said(sharing.weights)}"
    )
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    how = f"{sharing.width} bytes each{sharing.said(sharing.weights)}"
    yield Piece("trained weights", place, count * sharing.width // sharing.weights, how)
    if sharing.weights > 1 or sharing.parameters_on_cpu:
        layers = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
        largest = max((storage_bytes(layer, set()) for layer in max(layers, key=len)), default=0) if layers else frozen
        yield Piece("gathered layers", "device", 2 * largest, "the layer at work and the one after it", estimate=True)


def _training(count: int, args: dict[str, Any], sharing: Sharing, config: Any) -> Iterator[Piece]:
    place = "host" if sharing.optimizer_on_cpu else "device"
    width = 4 if sharing.optimizer_on_cpu else sharing.width
    how = f"{width} bytes each{sharing.said(sharing.gradients)}"
    yield Piece("gradients", place, count * width // sharing.gradients, how)
    if sharing.width == 2:
        how = f"float32 copies of the trained weights{sharing.said(sharing.states)}"
        yield Piece("master weights", place, count * 4 // sharing.states, how)
    name = str(args.get("optim", "adamw_torch_fused"))
    each = next((OPTIMIZERS[key] for key in sorted(OPTIMIZERS, key=len, reverse=True) if name.startswith(key)), None)
    how = f"{name}, {8 if each is None else each:.3g} bytes each{sharing.said(sharing.states)}"
    if each is None:
        how += "; as Adam's, for want of knowing this one"
    yield Piece("optimizer", place, int(count * (8 if each is None else each)) // sharing.states, how, each is None)
    if buckets := sharing.bucket_bytes(count, getattr(config.get_text_config(), "hidden_size", 0)):
        yield Piece("buckets", "device", buckets, "gradients on their way between processes", estimate=True)


def _activations(model: MoELoRAModel, recipe: Recipe, config: Any) -> Piece:
    """What the backward of one micro-batch needs; see the text of the piece.

    Frozen linears keep no input for themselves, adapted ones do; attention is taken to be one that keeps no score
    matrix. Each layer holds about 10 tensors of the model's width and 4 of the FFN's, of which routed FFN blocks keep
    one set more for each expert that a token goes to.
    """
    args, text = recipe.trainer.args, config.get_text_config()
    tokens = int(args.get("per_device_train_batch_size", 8)) * recipe.max_length
    kept, size, formula, known = _kept(model, args, text)
    logits = int(getattr(text, "vocab_size", 0)) * (size + 8)
    how = f"{tokens:,} tokens x ({formula} + vocabulary x (b + 8)), {known}"
    return Piece("activations", "device", tokens * (kept + logits), how, estimate=True)


def _activations_of_clip(model: MoELoRAModel, recipe: Recipe, config: Any) -> Piece:
    """The same of both encoders: the patches of a batch of images, and the prompts of the task with most classes."""
    args, vision, text = recipe.trainer.args, config.vision_config, config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    images = int(args.get("per_device_train_batch_size", 8))
    classes = most_classes(recipe)
    prompts = f"{classes:,} prompts of at most" if classes is not None else "the prompts, whose number is unknown, of"
    of_images, _, formula, seen = _kept(model, args, vision)
    of_texts, _, _, read = _kept(model, args, text)
    length = text.max_position_embeddings
    how = f"{images:,} images of {patches} tokens x {formula}, {seen}; {prompts} {length} tokens x the same, {read}"
    total = images * patches * of_images + (classes or 0) * length * of_texts
    return Piece("activations", "device", total, how, estimate=True)


def _kept(model: MoELoRAModel, args: dict[str, Any], encoder: Any) -> tuple[int, int, str, str]:
    """What the layers keep of a token, and the width of a number, in bytes; how it comes about, and of what."""
    width = int(getattr(encoder, "hidden_size", 0))
    inner = int(getattr(encoder, "intermediate_size", None) or 4 * width)
    layers = int(getattr(encoder, "num_hidden_layers", 1))
    half = bool(args.get("bf16") or args.get("fp16")) or model.backbone.dtype != torch.float32
    size = 2 if half else 4
    sets = 1 + max((_experts_of_a_token(container) for container in model.containers().values()), default=0)
    layer = size * (10 * width + 4 * inner * sets)
    checkpointed = bool(args.get("gradient_checkpointing"))
    kept = layers * size * width + layer if checkpointed else layers * layer
    formula = f"{'layers x b x h + ' if checkpointed else 'layers x '}b x (10 h + 4 f x {sets})"
    return kept, size, formula, f"b = {size} bytes, h = {width:,}, f = {inner:,}, {layers} layers"


def _experts_of_a_token(container: Container) -> int:
    """How many copies of an FFN's inner tensors a block keeps for each token; 0 at a linear site."""
    if container.config.router is None or not isinstance(container, BlockContainer):
        return 0
    count = int(container.config.experts.num_experts)
    return min(int(getattr(container.config.router, "top_k", None) or count), count)
