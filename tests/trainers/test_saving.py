"""Every way in which a trained mixture reaches a folder or the hub carries its experts, and nothing of the backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors import safe_open
from tiny_runs import build_model, build_rows, build_trainer
from transformers import Trainer, TrainingArguments

import moelora
from moelora import checkpoints
from moelora.data import Collator


@pytest.fixture
def trained(tmp_path: Path) -> Any:
    trainer = build_trainer(tmp_path / "run", build_model(dropout=0.1))
    trainer.train()
    trainer.model.eval()
    return trainer


def logits(model: Any) -> torch.Tensor:
    batch = Collator(0)(build_rows(3, seed=9))
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def assert_whole(folder: Path, model: Any) -> None:
    """The folder gives the same logits on a fresh backbone, bit for bit, and holds adapter tensors only."""
    reloaded = moelora.from_pretrained(folder, backbone=build_model().unload())
    assert torch.equal(logits(reloaded), logits(model.eval()))
    with safe_open(folder / "moelora.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(model.adapter_tensors())
    assert not [path.name for path in folder.iterdir() if path.name.startswith(("model", "pytorch_model"))]
    checkpoints.verify(folder)


def test_save_pretrained(trained, tmp_path):
    trained.model.save_pretrained(tmp_path / "out")
    assert_whole(tmp_path / "out", trained.model)


def test_the_trainers_own_save(trained, tmp_path):
    trained._save(str(tmp_path / "out"))
    assert_whole(tmp_path / "out", trained.model)


@pytest.mark.parametrize("given", ["the whole model", "trained tensors only"])
def test_save_with_a_gathered_state_dict(trained, tmp_path, given):
    """As under ZeRO-3 and FSDP, where the model's own parameters are empty or partial."""
    state = {name: value.detach().clone() for name, value in trained.model.state_dict().items()}
    if given == "trained tensors only":
        wanted = {name for name, p in trained.model.named_parameters() if p.requires_grad}
        state = {name: value for name, value in state.items() if name in wanted}
    before = logits(trained.model)
    with torch.no_grad():
        for parameter in trained.model.adapter_tensors().values():
            parameter.zero_()
    trained._save(str(tmp_path / "out"), state_dict=state)
    reloaded = moelora.from_pretrained(tmp_path / "out", backbone=build_model().unload())
    assert torch.equal(logits(reloaded), before)


def test_the_save_at_the_end_of_a_run(trained):
    trained.save_model()
    assert_whole(Path(trained.args.output_dir), trained.model)


def test_checkpoints_of_the_run(tmp_path):
    trainer = build_trainer(tmp_path / "run", build_model(), save_strategy="steps", save_steps=2)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-4"
    assert_whole(folder, trainer.model)
    adapter = sum(p.numel() * 4 for p in trainer.model.adapter_tensors().values())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3 * adapter + 60_000


def test_the_plain_trainer_of_transformers(tmp_path):
    model = build_model()
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        save_steps=2,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, data_collator=Collator(0), train_dataset=build_rows())
    trainer.train()
    trainer.save_model(str(tmp_path / "end"))
    assert_whole(tmp_path / "end", model)
    reloaded = moelora.from_pretrained(tmp_path / "checkpoint-2", backbone=build_model().unload())
    assert torch.equal(logits(reloaded), logits(model.eval()))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """A hub that keeps copies of what would be uploaded, in the order of the uploads."""
    import shutil
    from types import SimpleNamespace

    uploads: list[Path] = []

    def upload(self: HfApi, *, folder_path: str, ignore_patterns: list[str] | None = None, **kwargs: Any) -> Any:
        copy = tmp_path / f"upload-{len(uploads)}"
        shutil.copytree(folder_path, copy, ignore=shutil.ignore_patterns(*(ignore_patterns or [])))
        uploads.append(copy)
        return SimpleNamespace(done=lambda: True, result=lambda: None)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return uploads


def test_push_to_hub_of_the_model(trained, hub):
    trained.model.push_to_hub("someone/something")
    assert_whole(hub[0], trained.model)


def test_push_to_hub_of_the_trainer(trained, hub):
    trained.push_to_hub()
    assert_whole(hub[0], trained.model)
    assert not [path for path in hub[0].iterdir() if path.name.startswith("_")]


def test_pushing_every_checkpoint(tmp_path, hub):
    trainer = build_trainer(
        tmp_path / "run",
        build_model(),
        save_strategy="steps",
        save_steps=2,
        push_to_hub=True,
        hub_strategy="all_checkpoints",
        hub_always_push=True,
        hub_model_id="someone/something",
    )
    trainer.train()
    assert len(hub) == 4
    assert_whole(hub[2], trainer.model)
    assert_whole(hub[3], trainer.model)
    assert (hub[3] / "optimizer.pt").is_file()


def test_pushing_offline_says_so(trained):
    with pytest.raises(OfflineModeIsEnabled):
        trained.model.push_to_hub("someone/something")
    with pytest.raises(OfflineModeIsEnabled):
        trained.push_to_hub()
