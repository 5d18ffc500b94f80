"""CLIP models: loading one, what it makes of images and texts, and a small one that is trained here.

The small one needs ``pip install 'moelora[images]'``. A mixture goes on a CLIP model as on any other; names of its
linears, in both encoders, are ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``, ``fc1`` and ``fc2``.

Shapes: N images, C classes, S tokens of a prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, CLIPConfig, CLIPModel, PreTrainedConfig, PreTrainedModel

from . import backbone as loading
from .config import BackboneConfig
from .data.image_digits import digits_words
from .errors import UserError
from .gguf import made_once

logger = logging.getLogger(__name__)

SMALL = "digits-clip"
# Of the small model: change it with anything that changes its weights.
SMALL_VERSION = "1"
# Its first tokens; the words come after them.
SPECIAL = ("<pad>", "<start>", "<unknown>", "<end>")


@dataclass(frozen=True, eq=False)
class Clip:
    """A frozen CLIP model with what turns texts and images into its inputs.

    Attributes:
        images: an image processor of transformers.
    """

    model: PreTrainedModel
    tokenizer: Any
    images: Any

    def texts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` (C, S).

        Raises:
            UserError: a prompt is longer than the text encoder takes.
        """
        most = int(self.model.config.text_config.max_position_embeddings)
        made = self.tokenizer(list(prompts), padding=True, return_tensors="pt")
        if made["input_ids"].shape[1] > most:
            longest = max(prompts, key=len)
            raise UserError(
                f"a prompt has {made['input_ids'].shape[1]} tokens, at most {most} fit: shorten {longest!r}"
            )
        return {name: made[name] for name in ("input_ids", "attention_mask")}

    def pixels(self, images: Sequence[Any]) -> Tensor:
        """(N, 3, H, W) float32 of PIL images, or of arrays (H, W, 3) uint8."""
        given: dict[str, Any] = {} if hasattr(images[0], "convert") else {"input_data_format": "channels_last"}
        made: Tensor = self.images(images=list(images), return_tensors="pt", **given)["pixel_values"]
        return made


def load_clip(name: str | Path | BackboneConfig = SMALL, **options: Unpack[loading.BackboneOptions]) -> Clip:
    """A frozen CLIP model in ``eval`` mode.

    Args:
        name: ``"digits-clip"``, which is trained at the first call, a hub id, or a local folder.
        options: see :func:`~moelora.load_backbone`.

    Raises:
        ConfigError: unknown or contradictory options.
        UserError: no such model, or it is no CLIP model.
    """
    config = loading._configuration(name, options)
    small = config.name == SMALL
    source = str(small_clip()) if small else config.name
    source, places = loading._source(config.model_copy(update={"name": source}))
    with loading.explained(config.name):
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=False, **places)
    check_clip(config.name, model_config)
    arguments = loading.loading_arguments(config, model_config, None)
    with loading.explained(config.name):
        model = CLIPModel.from_pretrained(source, config=model_config, **arguments, **places)
        tokenizer = loading.load_tokenizer(config.name, source, places)
        images = AutoImageProcessor.from_pretrained(source, **places)
    if small:
        model.config._name_or_path = SMALL
    loading.settle(model, config)
    return Clip(model, tokenizer, images)


def check_clip(name: str, config: PreTrainedConfig) -> None:
    """Refuse any other model, before a weight is read."""
    if not isinstance(config, CLIPConfig):
        raise UserError(f"backbone {name!r} is a model of type {config.model_type!r}, not a CLIP model")


def clip_loss(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor, labels: Tensor, seen: int = 0) -> Tensor:
    """The cross-entropy of images over classes, plus that of classes over images, as MoRAM's released code has them.

    A class without an image among those given adds nothing to the second, in which a class with several counts once for
    each. It is a mean over the classes, of which the released code counts those of all tasks so far; earlier ones,
    which the first does not look at (their logits are minus infinity there), have no images.

    Args:
        image_embeds: (N, D), text_embeds: (C, D) of the classes of one task; of unit length. scale: factor of logits.
        labels: (N,). seen: classes of earlier tasks.
    """
    logits = scale * image_embeds @ text_embeds.T
    shown = F.one_hot(labels, len(text_embeds)).to(logits.dtype)
    of_texts = -(shown * logits.log_softmax(dim=0)).sum() / (seen + len(text_embeds))
    return F.cross_entropy(logits, labels) + of_texts


def small_config() -> CLIPConfig:
    """Of the small model: two layers of width 64 in each encoder, and a token for each word."""
    encoder = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
    text = {**encoder, **ids, "vocab_size": len(SPECIAL) + len(digits_words()), "max_position_embeddings": 16}
    vision = {**encoder, "image_size": 8, "patch_size": 2}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)


def small_clip(seed: int = 0) -> Path:
    """The folder of a small CLIP model that knows digits; trained, and kept in the cache, at the first call.

    Two layers of width 64 in each encoder, patches of 2 x 2 of 8 x 8 pixels, and a token for each word. It learns from
    :func:`~moelora.data.image_digits.digits_base`; the same seed and machine give the same weights. It takes less than
    a minute of one core.
    """

    def make(staging: Path, work: Path) -> None:
        from .clip_small import train_small

        clip = train_small(seed)
        for part in (clip.model, clip.tokenizer, clip.images):
            part.save_pretrained(staging)

    return made_once(f"{SMALL}-{SMALL_VERSION}-{seed}", "the small CLIP model", make)


def unit(embeds: Tensor) -> Tensor:
    """Rows of unit length."""
    return F.normalize(embeds, dim=-1)
