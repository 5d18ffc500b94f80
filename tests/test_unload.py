"""What attach and unload leave of a backbone: its checkpointing, its config, its modules, and other mixtures."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import moelora
from moelora.errors import ConfigError

IDS = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(1))
MIXTURE: dict[str, Any] = {
    "sites": [{"target": ["q_proj", "mlp"], "experts": {"num_experts": 2, "r": 2}, "router": {"kind": "topk"}}]
}
EXTRAS = ["past_key_values", "task_loss", "aux_losses", "aux_share", "aux_loss"]


def test_attach_keeps_which_layers_are_checkpointed_and_how(tiny_config: LlamaConfig) -> None:
    tiny_config.num_hidden_layers = 4
    backbone = LlamaForCausalLM(tiny_config).train()
    backbone.activation_checkpointing_enable({"preserve_rng_state": False, "use_reentrant": True}, every_n_layers=2)
    for _ in range(2):
        model = moelora.attach(backbone, MIXTURE)
        assert [layer.gradient_checkpointing for layer in backbone.model.layers] == [True, False, True, False]
        function = backbone.model.layers[0]._gradient_checkpointing_func
        assert isinstance(function, partial) and function.func is checkpoint
        assert function.keywords == {
            "preserve_rng_state": False,
            "use_reentrant": False,
            "context_fn": model.slot.checkpoint_contexts,
        }
        model(IDS, labels=IDS).loss.backward()
        model.unload()


@pytest.mark.parametrize("own", [None, ["past_key_values", "mine"]])
def test_unloading_one_of_two_backbones_of_one_config_leaves_the_other(
    tiny_config: LlamaConfig, own: list[str] | None
) -> None:
    if own is not None:
        tiny_config.keys_to_ignore_at_inference = own
    backbones = [LlamaForCausalLM(tiny_config) for _ in range(2)]
    before = copy.copy(vars(tiny_config))
    models = [moelora.attach(backbone, MIXTURE) for backbone in backbones]
    wanted = [*(own or ["past_key_values"]), *EXTRAS[1:]]
    for model in models:
        assert model.config.keys_to_ignore_at_inference == wanted
        model.unload()
    assert vars(tiny_config) == before


def test_a_mixture_is_unloaded_once(tiny_llama: LlamaForCausalLM) -> None:
    old = moelora.attach(tiny_llama, MIXTURE)
    backbone = old.unload()
    with pytest.raises(ConfigError, match="was unloaded"):
        old.unload()
    new = moelora.attach(backbone, MIXTURE)
    bases = {name: container.base for name, container in new.containers().items()}
    for stale in (
        old.unload,
        lambda: old.merge_and_unload(approximate=True, batches=[{"input_ids": IDS}]),
        lambda: old.save_pretrained("nowhere"),
    ):
        with pytest.raises(ConfigError, match="was unloaded"):
            stale()
    assert {name: container.base for name, container in new.containers().items()} == bases and len(bases) == 4
    assert len(backbone._forward_pre_hooks) == 1


@pytest.mark.parametrize("target", ["mlp", "up_proj", "model.layers.0.mlp"])
def test_a_module_at_two_places_is_refused(tiny_llama: LlamaForCausalLM, target: str) -> None:
    layers = tiny_llama.model.layers
    inner = target == "up_proj"
    if inner:
        layers[1].mlp.up_proj = layers[0].mlp.up_proj
    else:
        layers[1].mlp = layers[0].mlp
    path = "model.layers.{}.mlp" + (".up_proj" if inner else "")
    with pytest.raises(ConfigError, match=f"'{path.format(0)}' and '{path.format(1)}' are one module"):
        moelora.attach(tiny_llama, {"sites": [{"target": target, "experts": {"num_experts": 1}}]})
    assert all(type(module).__module__.startswith(("torch", "transformers")) for module in tiny_llama.modules())


def test_a_layer_that_is_shared_as_a_whole_carries_experts_at_both_places(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.model.layers = nn.ModuleList([tiny_llama.model.layers[0]] * 2)
    model = moelora.attach(tiny_llama, MIXTURE).eval()
    with torch.no_grad(), moelora.trace(model) as tape:
        model(IDS, use_cache=False)
    assert {name: len(records) for name, records in tape.records.items()} == {
        "model.layers.0.self_attn.q_proj": 2,
        "model.layers.0.mlp": 2,
    }
