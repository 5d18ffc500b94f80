"""The authors' own numbers, from the layout of their code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaModel

from moelora.errors import CheckpointError
from moelora.reward.model import RewardModel
from moelora.reward.released import read_released

FIXTURES = Path(__file__).parent.parent / "fixtures"
FOLDER = FIXTURES / "dmoerm_inner"
POINTS = ["conversational_sense", "empathy_ability", "content_richness"]


def body() -> LlamaModel:
    return LlamaModel(LlamaConfig.from_pretrained(FIXTURES / "tiny_llama_base"))


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return read_released(FOLDER / "phase3_state_dict.safetensors", body(), "roleplay", POINTS, alpha=4)


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "io.safetensors")


@torch.no_grad()
def test_rewards_of_all_three_phases(model: RewardModel, io: dict[str, torch.Tensor]) -> None:
    ids, mask = io["input_ids"], io["attention_mask"]
    base = model(ids, mask, category_ids=torch.tensor([-1, -1])).logits[:, 0]
    torch.testing.assert_close(base, io["phase1.reward"], atol=1e-6, rtol=0)
    states = model.capability_states(ids, mask, "roleplay")
    heads = load_file(FOLDER / "lora_value_heads_NOT_IN_CKPT.safetensors")
    for number, point in enumerate(POINTS):
        torch.testing.assert_close(states[:, number], io[f"phase3.hidden.{point}"], atol=1e-6, rtol=0)
        scores = states[:, number] @ heads[f"{point}.weight"][0] + heads[f"{point}.bias"]
        torch.testing.assert_close(scores, io[f"phase2.reward.{point}"], atol=1e-6, rtol=0)
    final = model(ids, mask, category_ids=torch.tensor([0, 0])).logits[:, 0]
    torch.testing.assert_close(final, io["phase3.reward"], atol=1e-6, rtol=0)


def test_saved_as_ours_it_scores_the_same(model: RewardModel, io: dict[str, torch.Tensor], tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "ours")
    trained = body()
    trained.load_state_dict({k: v for k, v in _unwrapped(model).items()})
    loaded = RewardModel.from_pretrained(tmp_path / "ours", backbone=trained)
    with torch.no_grad():
        reward = loaded(io["input_ids"], io["attention_mask"], category_ids=torch.tensor([0, 0])).logits[:, 0]
    torch.testing.assert_close(reward, io["phase3.reward"], atol=1e-6, rtol=0)


def _unwrapped(model: RewardModel) -> dict[str, torch.Tensor]:
    state = model.backbone.state_dict()
    return {
        key.replace(".base.", "."): value
        for key, value in state.items()
        if not key.startswith("reward.") and ".experts." not in key and ".router." not in key
    }


def test_a_pickled_file_is_read_as_tensors_alone(io: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(load_file(FOLDER / "phase3_state_dict.safetensors"), tmp_path / "phase3.pth")
    model = read_released(tmp_path / "phase3.pth", body(), "roleplay", POINTS, alpha=4)
    with torch.no_grad():
        reward = model(io["input_ids"], io["attention_mask"], category_ids=torch.tensor([0, 0])).logits[:, 0]
    torch.testing.assert_close(reward, io["phase3.reward"], atol=1e-6, rtol=0)
    torch.save({"model": body()}, tmp_path / "whole.pth")  # as the released router is saved
    with pytest.raises(CheckpointError, match=r"whole\.pth"):
        read_released(tmp_path / "whole.pth", body(), "roleplay", POINTS)


def test_another_model_or_other_capabilities_are_refused(tmp_path: Path) -> None:
    path = FOLDER / "phase3_state_dict.safetensors"
    with pytest.raises(CheckpointError, match="content_richness, conversational_sense, empathy_ability"):
        read_released(path, body(), "roleplay", POINTS[:2])
    small = LlamaConfig.from_pretrained(FIXTURES / "tiny_llama_base")
    small.num_hidden_layers = 3
    with pytest.raises(CheckpointError, match="lacks"):
        read_released(path, LlamaModel(small), "roleplay", POINTS)
    tensors = load_file(path)
    tensors["prelu.weight"] = torch.tensor([float("nan")])
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match="finite"):
        read_released(tmp_path / "nan.safetensors", body(), "roleplay", POINTS)
