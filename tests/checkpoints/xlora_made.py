"""X-LoRA mixtures made by PEFT, saved as it does where its save is sound: config, classifier, adapters in folders."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, XLoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS = torch.tensor([[5, 9, 2, 31, 7, 7, 40, 11], [3, 1, 22, 8, 60, 13, 4, 2]])


def llama(layers: int = 2, width: int = 32, **changes: Any) -> LlamaForCausalLM:
    """Every call gives the same random model."""
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
        attn_implementation="eager",
        **changes,
    )
    # Of a spread at which adapters and classifier have a say.
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def write_adapter(folder: Path, seed: int, layers: int, **options: Any) -> None:
    """A PEFT adapter with random factors."""
    backbone = llama(layers)
    torch.manual_seed(seed)
    config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **options)
    folder.mkdir(parents=True)
    with inside(folder):
        get_peft_model(backbone, config).save_pretrained(".")
    (folder / "README.md").unlink()


def make(folder: Path, adapters: Mapping[str, dict[str, Any]], layers: int = 2, **options: Any) -> Tensor:
    """A checkpoint with these adapters, each in a folder of its name, under a random classifier; PEFT's logits.

    Args:
        adapters: options of ``LoraConfig``. options: of ``XLoraConfig``.
    """
    for number, (name, values) in enumerate(adapters.items()):
        write_adapter(folder / name, 100 + number, layers, **values)
    paths = {str(number): name for number, name in enumerate(adapters)}
    config = XLoraConfig(hidden_size=32, adapters=paths, task_type="CAUSAL_LM", **options)
    backbone = llama(layers)
    torch.manual_seed(7)
    with inside(folder):
        model = get_peft_model(backbone, config).eval()
    logits = logits_of(model)
    prefix = "base_model.internal_xlora_classifier."
    state = model.base_model.internal_xlora_classifier.state_dict()
    save_file({prefix + key: value for key, value in state.items()}, folder / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(str(folder))
    return logits


def stock(folder: Path, backbone: LlamaForCausalLM) -> PeftModel:
    """What stock PEFT makes of a checkpoint, in its folder as it needs."""
    with inside(folder):
        return PeftModel.from_pretrained(backbone, ".").eval()


def stock_from_elsewhere(folder: Path, backbone: LlamaForCausalLM) -> PeftModel:
    """The same from any folder: with full paths."""
    config: Any = PeftConfig.from_pretrained(str(folder))
    config.adapters = {key: os.path.join(folder, path) for key, path in config.adapters.items()}
    with inside(Path(os.sep)):
        return PeftModel.from_pretrained(backbone, str(folder), config=config).eval()


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=TOKENS).logits
    return logits


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The folder as the working directory, and PEFT's own warnings left out."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.chdir(before)
