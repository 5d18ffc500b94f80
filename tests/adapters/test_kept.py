"""Adapters that are moved, copied, pickled, saved, read, counted and trained by a Trainer."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_made import IDS, MIXLORA, base, hooks, logits, randomize, same, values
from transformers import TrainerCallback, TrainingArguments

import moelora
from moelora.analysis import RoutingRecorder
from moelora.errors import ConfigError, DataError
from moelora.mixture import MoELoRAModel


def test_adapters_follow_where_the_model_goes(two: MoELoRAModel) -> None:
    def dtypes(name: str) -> set[torch.dtype]:
        return {value.dtype for value in two.adapter_tensors(name).values()}

    two.set_adapter("math")
    expected = logits(two)
    two.set_adapter("chat")
    twin = copy.deepcopy(two)
    again = pickle.loads(pickle.dumps(two))
    buffer = io.BytesIO()
    torch.save(two, buffer)
    buffer.seek(0)
    two.to(torch.bfloat16)
    assert dtypes("chat") == dtypes("math") == {torch.bfloat16}
    two.set_adapter("math")
    assert dtypes("math") == {torch.bfloat16} and not two.backbone.training
    assert (logits(two).float() - expected).abs().max() < 0.1
    for other in (twin, again, torch.load(buffer, weights_only=False)):
        assert other.adapters == ["chat", "math"] and other.active_adapters == ["chat"]
        other.set_adapter("math")
        assert torch.equal(logits(other), expected) and hooks(other) == hooks(two)
    randomize(twin, "chat", seed=9)
    assert not same(values(twin, "chat"), values(again, "chat"))


def test_an_idle_adapter_takes_the_mode_of_the_model(two: MoELoRAModel) -> None:
    two.train()
    two.set_adapter("math")
    assert all(module.training for module in two.modules())
    two.set_adapter("chat")
    two.eval()
    two.set_adapter("math")
    assert not any(module.training for module in two.modules())


def test_each_adapter_is_saved_and_read_bit_for_bit(two: MoELoRAModel, tmp_path: Path) -> None:
    expected = {}
    for name in ("math", "chat"):
        two.set_adapter(name)
        expected[name] = logits(two)
        two.save_pretrained(tmp_path / name)
    two.save_pretrained(tmp_path / "one", selected_adapters=["math"])
    two.save_pretrained(tmp_path / "both", selected_adapters=["chat", "math"])
    again = moelora.from_pretrained(tmp_path / "chat", base(), adapter_name="chat")
    again.load_adapter(tmp_path / "math", "math")
    again.load_adapter(tmp_path / "both", "math2", subfolder="math")
    again.load_adapter(tmp_path / "both", "chat2", subfolder="chat")
    again.load_adapter(tmp_path / "one", "math3")
    for name in again.adapters:
        again.set_adapter(name)
        assert torch.equal(logits(again), expected[name[:4]])
        assert same(values(again, name), values(two, name[:4]))
        assert again._adapters.get(name).mixture == two._adapters.get(name[:4]).mixture


def test_a_state_dict_of_the_model_holds_the_active_adapter_alone(two: MoELoRAModel) -> None:
    doubled = {name: value * 2 for name, value in two.state_dict().items()}
    given = two.get_adapter_state_dict("chat", doubled)
    assert same(given, {name: value * 2 for name, value in values(two, "chat").items()})
    assert same(two.adapter_state(doubled, "math"), values(two, "math"))


class Switch(TrainerCallback):
    """Changes the adapter after a step."""

    def __init__(self, model: MoELoRAModel, name: str) -> None:
        self.model, self.name = model, name

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.model.set_adapter(self.name)


def test_a_trainer_trains_the_adapter_that_it_was_made_for(two: MoELoRAModel, tmp_path: Path) -> None:
    from moelora.trainers import MixtureTrainer

    def trainer(name: str) -> MixtureTrainer:
        args = TrainingArguments(
            str(tmp_path / name), max_steps=2, save_steps=1, report_to=[], disable_tqdm=True, use_cpu=True
        )
        rows = [{"input_ids": row, "labels": row} for row in IDS]
        return MixtureTrainer(two, args, train_dataset=rows)

    fresh = {name: values(two, name) for name in two.adapters}
    two.set_adapter("math")
    made = trainer("math")
    made.train()
    trained = values(two, "math")
    assert same(values(two, "chat"), fresh["chat"]) and not same(trained, fresh["math"])
    saved = moelora.from_pretrained(tmp_path / "math" / "checkpoint-2", base())
    assert same(values(saved, "default"), trained)
    two.set_adapter("chat")
    with pytest.raises(ConfigError, match="made for adapter 'math', but 'chat' is active"):
        made.train()
    two.set_adapter("math")
    made = trainer("again")
    made.add_callback(Switch(two, "chat"))
    with pytest.raises(ConfigError, match="made for adapter 'math', but 'chat' is active"):
        made.train()
    assert not list((tmp_path / "again").glob("checkpoint-*"))
    two.set_adapter(["chat", "math"])
    with pytest.raises(ConfigError, match="'chat', 'math' are active, and a run trains and saves one"):
        trainer("both").train()


def test_a_recorder_counts_one_adapter(two: MoELoRAModel) -> None:
    two.add_adapter("other", MIXLORA)
    two.set_adapter("math")
    recorder = RoutingRecorder(two)
    with recorder:
        logits(two)
    before = recorder.result()
    two.set_adapter("other")
    with recorder, pytest.raises(DataError, match="has counted adapter math, and now other decides"):
        logits(two)
    two.set_adapter("chat")
    assert recorder.result() == before
    assert [(site.name, sum(site.tokens)) for site in before.sites] == [(f"model.layers.{i}.mlp", 16) for i in (0, 1)]
