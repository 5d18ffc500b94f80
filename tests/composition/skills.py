"""Two skills on a tiny backbone: adapters that each know what one task answers, and examples of both tasks."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

import moelora
from moelora.data import Collator, Example, Splits, tokenize
from moelora.trainers import SFTTrainer

ANSWERS = {"apples": "aaa", "pears": "ppp"}
QUIET = {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "dataloader_pin_memory": False}


def examples(*tasks: str, count: int = 24) -> list[Example]:
    """The tasks by turns; the question says which one is meant."""
    return [Example(f"{task} {n % 7}", ANSWERS.get(task, "?"), task) for n in range(count) for task in tasks]


def splits(*tasks: str, count: int = 24) -> Splits:
    return Splits(examples(*tasks, count=count), examples(*tasks, count=2), 0)


def make_backbone(folder: Path) -> Path:
    """With one token per byte, as a folder that ``load_backbone`` reads."""
    words = ["<|endoftext|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|endoftext|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def teach(task: str, backbone: Path, folder: Path) -> Path:
    """A plain LoRA of rank 4 that has learnt the answers of one task, saved natively."""
    model, tokenizer = moelora.load_backbone(str(backbone), quantization="fp32")
    site = {"target": ["q_proj", "v_proj", "down_proj"], "experts": {"kind": "lora", "num_experts": 1, "r": 4}}
    torch.manual_seed(len(task))
    mixture = moelora.attach(model, {"sites": [site]})
    rows = tokenize(examples(task), tokenizer, 64)
    args = TrainingArguments(
        str(folder / "run"),
        max_steps=80,
        per_device_train_batch_size=8,
        learning_rate=3e-2,
        save_strategy="no",
        remove_unused_columns=False,
        **QUIET,
    )
    SFTTrainer(mixture, args, train_dataset=rows, data_collator=Collator(tokenizer.eos_token_id)).train()
    mixture.save_pretrained(folder)
    return folder
