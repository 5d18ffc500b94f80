"""Damage of every kind to a checkpoint of every layout: refused in a moment, with words that help, and no code runs."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import corpus
import pytest
import torch

import moelora
from moelora.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint of each layout."""
    root = tmp_path_factory.mktemp("whole")
    for layout in corpus.FORMS:
        corpus.write(layout, root / layout)
    return root


def test_there_are_at_least_two_hundred() -> None:
    assert len(set(corpus.cases())) >= 200


@pytest.mark.parametrize("layout", corpus.FORMS)
def test_without_damage_they_load(layout: str, whole: Path) -> None:
    model = moelora.from_pretrained(whole / layout, corpus.tiny(corpus.FORMS[layout].family))
    tokens = torch.arange(1, 9).view(1, 8)
    with torch.no_grad():
        logits = model(tokens, task_types=torch.tensor([1])).logits
        with model.disable_experts():
            assert (model(tokens).logits - logits).abs().max() > 1e-3


@pytest.mark.parametrize(("layout", "name"), list(corpus.cases()))
def test_damage_is_refused(
    layout: str, name: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole / layout, tmp_path / "it")
    done = corpus.damage(tmp_path / "it", layout, name)
    backbone = corpus.tiny(corpus.FORMS[layout].family)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        moelora.from_pretrained(tmp_path / "it", backbone)
    assert time.monotonic() - began < 5
    message = str(caught.value)
    assert done.file in message and done.key in message, message
    assert any(
        word in message for word in ("expected", "should be", "reads", "known keys", "missing", "its ", "there are")
    ), message
    assert not Path("canary").exists()
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
