"""What every test shares: one thread, no network, and a tiny random Llama."""

from __future__ import annotations

import os

# Before torch, transformers or datasets are imported: they read these once.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))  # for helpers that tests in several folders share

# These need an extra: where the package is tested with what it requires alone, they cannot be imported.
NEEDING = {
    "gymnasium": [
        "rl/test_environments.py",
        "rl/test_environments_errors.py",
        "rl/test_environments_workers.py",
        "rl/test_world_learner.py",
        "trainers/test_scalezero.py",
        "trainers/test_scalezero_report.py",
    ],
    "hypothesis": [
        "data/test_mixing.py",
        "data/test_packing.py",
        "data/test_streaming.py",
        "trainers/test_progress.py",
    ],
    "lm_eval": ["evaluation/test_eval_cli.py", "evaluation/test_harness.py"],
    "peft": [
        "checkpoints/test_peft.py",
        "checkpoints/test_peft_arrow.py",
        "checkpoints/test_peft_refusals.py",
        "checkpoints/test_peft_xlora.py",
        "checkpoints/test_phi4.py",
        "checkpoints/test_xlora.py",
        "composition/test_compose.py",
    ],
    "sklearn": ["data/test_image_sequences.py", "trainers/test_clip.py", "trainers/test_clip_sharded.py"],
    "tensorboard": ["trainers/test_reporting.py"],
}
collect_ignore = [file for name, files in NEEDING.items() if importlib.util.find_spec(name) is None for file in files]


def pytest_report_header() -> str:
    """Say which moelora is under test: a checkout's, or an installed wheel's."""
    import moelora

    return f"moelora: {Path(moelora.__file__).parent}"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whichever tests ran before it in the process."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_config() -> LlamaConfig:
    """Two layers of grouped-query attention with a hidden size of 32 and 64 words."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


@pytest.fixture
def tiny_llama(tiny_config: LlamaConfig) -> LlamaForCausalLM:
    """A fresh random Llama in float32, the same for every test; not frozen, in evaluation mode."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(tiny_config).eval()


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte (ids 4 to 259), three special tokens, no padding token, and a chat template."""
    from byte_tokenizer import make_byte_tokenizer

    return make_byte_tokenizer()


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with the byte tokenizer, as a folder that ``load_backbone`` reads."""
    from byte_tokenizer import make_byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("backbone")
    tokenizer = make_byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
