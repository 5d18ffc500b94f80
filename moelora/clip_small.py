"""Training the small CLIP model of the image sequence ``digits``; see :func:`~moelora.clip.small_clip`."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from transformers import CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .clip import SPECIAL, Clip, clip_loss, small_config, unit
from .data.image_digits import digits_base, digits_words

logger = logging.getLogger(__name__)

STEPS, BATCH, RATE, DECAY = 500, 128, 2e-3, 0.05


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token for each word, between a start and an end token; needs no file."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    pad, start, unknown, end = SPECIAL
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(word, vocabulary[word]) for word in (start, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=pad, bos_token=start, eos_token=end, unk_token=unknown, model_max_length=16
    )


def untrained(seed: int) -> Clip:
    """The model with random weights."""
    tokenizer = word_tokenizer(digits_words())
    side = {"height": 8, "width": 8}
    images = CLIPImageProcessorPil(
        size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_resize=False, do_center_crop=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(small_config())
    return Clip(model, tokenizer, images)


def train_small(seed: int) -> Clip:
    """The model after its training, frozen and in ``eval`` mode."""
    clip, base = untrained(seed), digits_base()
    logger.info("training the small CLIP model on %d images of %d classes", len(base.train), len(base.classes))
    pixels = clip.pixels(list(base.train.images))
    labels, prompts = torch.from_numpy(base.train.labels), clip.texts(base.prompts)
    model = clip.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    generator = np.random.default_rng(seed)
    for _ in range(STEPS):
        rows = torch.from_numpy(generator.choice(len(labels), BATCH, replace=False))
        made = model(**prompts, pixel_values=pixels[rows])
        scale = model.logit_scale.exp().clamp(max=100)
        loss = clip_loss(unit(made.image_embeds), unit(made.text_embeds), scale, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.requires_grad_(False)
    model.train(False)
    return clip
