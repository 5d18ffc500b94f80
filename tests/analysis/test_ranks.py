"""Reports of mixtures whose experts are single ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import moelora
from moelora.analysis import analyze

SITES: dict[str, dict[str, Any]] = {
    "flylora": {"experts": {"kind": "sparse_projection", "r": 12}, "router": {"kind": "flylora", "top_k": 3}},
    "smora": {"experts": {"num_experts": 1, "r": 12}, "router": {"kind": "smora", "top_k": 3}},
    "moram": {"experts": {"kind": "rank1", "num_experts": 3, "r": 4}, "router": {"kind": "moram", "top_k": 3}},
}


@pytest.mark.parametrize("kind", SITES)
def test_each_rank_is_counted_and_the_report_is_written(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, kind: str
) -> None:
    model = moelora.attach(tiny_llama, {"sites": [{"target": "q_proj", **SITES[kind]}]})
    ids = torch.randint(3, 64, (4, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    batches = [{"input_ids": ids, "attention_mask": mask, "task_ids": torch.tensor([0, 1, 0, 1])}]
    stats = analyze(model, batches, task_names=["sums", "words"], out=tmp_path)
    for site in stats.sites:
        assert site.load_NE.shape == (2, 12)
        assert site.tokens == (16, 20)
        assert site.load_NE.sum(axis=1).tolist() == [3 * 16, 3 * 20]
        assert 0 <= site.entropy <= 1 and 0 <= site.margin <= 1
    written = json.loads((tmp_path / "routing.json").read_text())
    assert len(written["sites"][0]["selections"][0]) == 12
    assert (tmp_path / "routing.html").stat().st_size > 10_000
