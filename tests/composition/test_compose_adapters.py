"""Adapters read from files whose sites are blocks."""

from __future__ import annotations

from pathlib import Path

import torch

from moelora.checkpoints import Architecture, native
from moelora.composition import read_adapter
from moelora.config import BackboneConfig, MixtureConfig


def test_the_linears_of_a_block_have_their_paths_back_with_the_scale_of_the_block(tmp_path: Path) -> None:
    """In the names of tensors a dot within a block is written as two underscores."""
    paths = ["h.1.ffn", "h.10.ffn"]
    experts = {"num_experts": 1, "r": 2, "alpha": 6, "alpha_pattern": {"h.10.ffn": 8}}
    tensors = {
        f"{path}.{name}": torch.randn(shape)
        for path in paths
        for name, shape in {
            "inner__up.lora_A": (2, 5),
            "inner__up.lora_B": (7, 2),
            "down.lora_A": (2, 7),
            "down.lora_B": (5, 2),
        }.items()
    }
    native.save(
        tmp_path,
        MixtureConfig.parse({"sites": [{"target": "ffn", "experts": experts}]}),
        BackboneConfig(name="tiny"),
        tensors,
        sites=[paths],
        architecture=Architecture(),
    )
    factors = read_adapter(tmp_path).factors
    assert set(factors) == {f"{path}.{linear}" for path in paths for linear in ("inner.up", "down")}
    assert {path: each.scale for path, each in factors.items() if "up" in path} == {
        "h.1.ffn.inner.up": 3.0,
        "h.10.ffn.inner.up": 4.0,
    }
    assert torch.equal(factors["h.1.ffn.inner.up"].A, tensors["h.1.ffn.inner__up.lora_A"])
    assert torch.equal(factors["h.10.ffn.down"].B, tensors["h.10.ffn.down.lora_B"])
