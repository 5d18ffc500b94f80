"""Packed rows: whole examples, each as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

import moelora
from moelora.data import Collator, Example, check_packing, packed, tokenize
from moelora.data.packing import join, pack
from moelora.errors import ConfigError

LENGTHS = [7, 3, 12, 1, 5, 9, 2, 4]


def build_rows(lengths: list[int] = LENGTHS) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        prompt = length // 3
        labels = [-100] * prompt + ids[prompt:]
        rows.append({"input_ids": ids, "labels": labels, "task_ids": number % 3, "task_types": number % 2})
    return rows


def tiny_llama(attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config)


def mixture(router: dict[str, Any], attention: str = "sdpa", target: str = "mlp") -> moelora.MoELoRAModel:
    experts = {"kind": "lora", "num_experts": 4, "r": 2, "alpha": 4, "dropout": 0.0}
    model = moelora.attach(tiny_llama(attention), {"sites": [{"target": target, "experts": experts, "router": router}]})
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if name.endswith("lora_B"):
                tensor.normal_(std=0.2)
    return model.eval()


TOPK = {"kind": "topk", "top_k": 2, "aux_loss_coef": 0.1, "init_std": 0.5}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90))
def test_every_example_once_and_no_row_too_long(lengths: list[int], max_length: int) -> None:
    rows = pack(lengths, max_length)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < count <= max_length for count in filled)
    # What best fit promises: no two rows would fit into one.
    assert all(a + b > max_length for at, a in enumerate(filled) for b in filled[at + 1 :])
    assert rows == pack(lengths, max_length)


def slow_best_fit(lengths: list[int], max_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        left = [max_length - sum(lengths[member] for member in row) for row in rows]
        fitting = [(room, number) for number, room in enumerate(left) if room >= lengths[index]]
        if fitting:
            rows[min(fitting)[1]].append(index)
        else:
            rows.append([index])
    return sorted(sorted(row) for row in rows)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=40))
def test_best_fit_is_the_plain_loop(lengths: list[int]) -> None:
    assert pack(lengths, 25) == slow_best_fit(lengths, 25)


def test_an_example_that_fits_nowhere() -> None:
    with pytest.raises(ValueError, match="an example of 9 tokens does not fit into 8"):
        pack([3, 9], 8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 15), min_size=1, max_size=12), st.integers(15, 30), st.sampled_from(["left", "right"]))
def test_every_token_once_with_its_position_and_task(lengths: list[int], max_length: int, side: Any) -> None:
    rows = build_rows(lengths)
    chosen = pack(lengths, max_length)
    batch = Collator(0, padding_side=side, with_task_ids=True)([join([rows[at] for at in row]) for row in chosen])
    real = batch["segment_ids"] >= 0
    assert torch.equal(real, batch["attention_mask"].bool())
    assert batch["segment_ids"][real].unique().tolist() == list(range(len(lengths)))
    for number, index in enumerate(index for row in chosen for index in row):
        own = batch["segment_ids"] == number
        row = rows[index]
        assert batch["input_ids"][own].tolist() == row["input_ids"]
        assert batch["labels"][own].tolist() == [-100, *row["labels"][1:]]
        assert batch["position_ids"][own].tolist() == list(range(lengths[index]))
        assert batch["task_ids"][own].unique().tolist() == [row["task_ids"]]
        assert batch["task_types"][own].unique().tolist() == [row["task_types"]]
    assert (batch["labels"][~real] == -100).all() and (batch["input_ids"][~real] == 0).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_each_example_alone(attention: str, side: Any) -> None:
    model = mixture(TOPK, attention)
    rows = build_rows()
    chosen = pack(LENGTHS, 16)
    assert len(chosen) < len(rows) and {len(row) for row in chosen} != {1}
    batch = Collator(0, padding_side=side)([join([rows[at] for at in row]) for row in chosen])
    assert (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        logits = model(**batch).logits
        for number, index in enumerate(index for row in chosen for index in row):
            alone = model(torch.tensor([rows[index]["input_ids"]])).logits[0]
            assert torch.allclose(logits[batch["segment_ids"] == number], alone, atol=1e-5, rtol=0)


def losses_and_gradients(model: moelora.MoELoRAModel, batch: dict[str, Any]) -> Any:
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.adapter_tensors().items() if p.grad is not None}
    return out.task_loss.detach(), {name: value.detach() for name, value in out.aux_losses.items()}, grads


ROUTERS = {
    "topk": TOPK,
    "localized": {"kind": "softmax", "aux_loss_coef": 0.3, "delta": 0.2},
    "localized, as printed": {"kind": "softmax", "aux_loss_coef": 0.3, "form": "paper"},
    "types of tasks": {"kind": "softmax", "aux_loss_coef": 0.3, "types_of_tasks": [1, 0, 1]},
    "by task": {"kind": "task", "num_tasks": 3},
    "by label": {"kind": "lora_mixer", "stage": "hard", "top_k": 2},
    "by type": {"kind": "mask", "by": "task_type"},
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_losses_and_gradients_are_those_of_the_padded_batch(name: str, attention: str) -> None:
    target = "q_proj" if name == "by task" else "mlp"
    model = mixture(ROUTERS[name], attention, target)
    rows = build_rows()
    if name == "types of tasks":
        rows = [{key: value for key, value in row.items() if key != "task_types"} for row in rows]
    collate = Collator(0, with_task_ids=True)
    expected = losses_and_gradients(model, collate(rows))
    got = losses_and_gradients(model, collate([join([rows[at] for at in row]) for row in pack(LENGTHS, 16)]))
    assert torch.allclose(got[0], expected[0], atol=1e-5, rtol=0)
    for key, value in expected[1].items():
        assert torch.allclose(got[1][key], value, atol=1e-5, rtol=1e-5), key
    assert expected[1] or name in ("by task", "by type")
    assert any(bool(grad.abs().max() > 1e-4) for grad in expected[2].values())
    for key, grad in expected[2].items():
        assert torch.allclose(got[2][key], grad, atol=1e-5, rtol=1e-4), key


def test_padding_takes_no_part_in_routing() -> None:
    model = mixture(TOPK)
    rows = build_rows([9, 4])
    batch = Collator(0)([join(rows[:1]), join(rows[1:])])
    with moelora.trace(model) as tape, torch.no_grad():
        model(**batch)
    [record] = tape["model.layers.0.mlp"]
    assert record.mask is not None and record.mask.sum() == 13
    assert float(record.counts().sum()) == 26


def test_a_backbone_that_keeps_examples_apart_passes() -> None:
    for attention in ("sdpa", "eager"):
        model = mixture(TOPK, attention).train()
        check_packing(model)
        assert model.training
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    check_packing(moelora.attach(gpt2, {"sites": [{"target": "c_fc", "experts": {"num_experts": 1, "r": 2}}]}))


def test_a_backbone_that_does_not_is_refused() -> None:
    config = MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2, use_cache=False)
    site = {"target": "in_proj", "experts": {"kind": "lora", "num_experts": 1, "r": 2}}
    model = moelora.attach(MambaForCausalLM(config), {"sites": [site]})
    with pytest.raises(
        ConfigError, match=r"packing: MambaForCausalLM with \w+ attention does not keep.*set packing to"
    ):
        check_packing(model)


def test_answers_only_is_refused() -> None:
    with pytest.raises(ConfigError, match="a packed row has answers all over"):
        Collator(0, answers_only=True)([join(build_rows())])


def test_a_packed_set_is_its_examples(byte_tokenizer: Any) -> None:
    examples = [Example("a" * n, "b", "t") for n in range(1, 12)]
    tokens = tokenize(examples, byte_tokenizer, 200)
    rows = packed(tokens, 200)
    assert rows.tasks == tokens.tasks and rows.num_tokens == tokens.num_tokens
    assert len(rows) < len(tokens)
    assert sum(len(rows[at]["input_ids"]) for at in range(len(rows))) == tokens.num_tokens
    assert max(len(rows[at]["input_ids"]) for at in range(len(rows))) <= 200
