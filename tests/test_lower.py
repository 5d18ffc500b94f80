"""A mixture that keeps what its lower layers make of a text computes what it would without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moelora
from moelora.data.collate import Collator
from moelora.lower import LowerStates

SITE = {
    "target": ["q_proj", "down_proj"],
    "layers": "1:",
    "experts": {"kind": "lora", "num_experts": 3, "r": 2, "dropout": 0.0, "init": "gaussian"},
    "router": {"kind": "topk", "top_k": 2, "aux_loss_coef": 0.1},
}
ROWS = [
    {"input_ids": list(range(4, 4 + length)), "labels": [-100] * (length - 3) + list(range(1 + length, 4 + length))}
    for length in (7, 5, 9)
]
BATCHES = {"right": Collator(0)(ROWS), "answers_only": Collator(0, answers_only=True)(ROWS)}


def build_backbone() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**size, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def build(**options: Any) -> moelora.MoELoRAModel:
    model = moelora.attach(build_backbone(), {"sites": [SITE], **options})
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if "lora_B" in name:
                torch.nn.init.normal_(tensor, std=0.1)
    return model


def remembering(**options: Any) -> tuple[moelora.MoELoRAModel, LowerStates]:
    model = build(**options)
    lower = model.remember(2**20)
    assert lower is not None
    return model, lower


def ran(model: moelora.MoELoRAModel) -> list[int]:
    """How often the lowest layer was run from here on: a list that grows."""
    calls: list[int] = []
    model.backbone.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("training", [True, False])
def test_losses_and_gradients_are_the_same(kind: str, training: bool) -> None:
    plain, (model, lower) = build().train(training), remembering()
    model.train(training)
    for turn in range(2):
        calls = ran(model)
        outputs = [each(**BATCHES[kind]) for each in (plain, model)]
        assert len(calls) == 1 - turn and lower.computed == 3 and lower.found == 3 * turn
        for output in outputs:
            output.loss.backward()
        real = BATCHES[kind]["attention_mask"][:, -outputs[0].logits.shape[1] :].bool()
        torch.testing.assert_close(outputs[1].logits[real], outputs[0].logits[real], atol=1e-5, rtol=0)
        torch.testing.assert_close(outputs[1].loss, outputs[0].loss, atol=1e-6, rtol=0)
    expected = {name: p.grad for name, p in plain.adapter_tensors().items() if p.grad is not None}
    assert any("lora_A" in name for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(model.adapter_tensors()[name].grad, gradient, atol=1e-6, rtol=1e-4)


def test_a_cache_is_of_all_layers() -> None:
    plain, (model, lower) = build().eval(), remembering()
    model.eval()
    batch = {name: BATCHES["answers_only"][name] for name in ("input_ids", "attention_mask")}
    generated = [each.generate(**batch, max_new_tokens=4, do_sample=False) for each in (plain, model)]
    assert torch.equal(*generated) and lower.computed == 0
    with torch.no_grad():
        assert len(model(**batch).past_key_values.layers) == len(plain.backbone.model.layers)
        assert model(**batch).past_key_values.layers[0].keys.shape[2] == 9


def other_positions(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "position_ids": torch.arange(9).expand(3, -1) + 1}


def left_without_positions(batch: dict[str, Any]) -> dict[str, Any]:
    left = Collator(0, padding_side="left")(ROWS)
    return {name: left[name] for name in ("input_ids", "attention_mask", "labels")}


def all_states(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "output_hidden_states": True}


def embedded(batch: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(1)
    return {**{n: v for n, v in batch.items() if n != "input_ids"}, "inputs_embeds": torch.randn(3, 9, 32)}


@pytest.mark.parametrize("change", [other_positions, left_without_positions, all_states, embedded])
def test_what_could_reach_the_lower_layers_goes_through_them(change: Any) -> None:
    plain, (model, lower) = build().eval(), remembering()
    model.eval()
    batch = change(BATCHES["right"])
    with torch.no_grad():
        outputs = [each(**batch) for each in (plain, model)]
    assert torch.equal(outputs[0].logits, outputs[1].logits) and lower.computed == 0
    if "output_hidden_states" in batch:
        assert torch.equal(outputs[0].hidden_states[0], outputs[1].hidden_states[0])


def test_checkpointing_does_without() -> None:
    model, lower = remembering()
    model.gradient_checkpointing_enable()
    model.train()(**BATCHES["right"]).loss.backward()
    assert lower.computed == 0


def test_what_is_trained_below_is_not_kept() -> None:
    assert build(modules_to_save=["embed_tokens"]).remember(2**20) is None
    kept = build(modules_to_save=["lm_head"])
    assert kept.remember(2**20) is not None
    site = {**SITE, "layers": "0:"}
    assert moelora.attach(build_backbone(), {"sites": [site]}).remember(2**20) is None


def test_an_adapter_with_lower_experts_goes_through_them() -> None:
    model, lower = remembering()
    model.eval()
    model.add_adapter("deep", {"sites": [{**SITE, "layers": "0:"}]})
    model.set_adapter("deep")
    calls = ran(model)
    with torch.no_grad():
        model(**BATCHES["right"])
    assert calls and lower.computed == 0
