"""Merging experts into the frozen weights: exact where that is possible, refused or measured where not."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

import moelora
from moelora.backbone import backbone_config, load_backbone
from moelora.errors import ConfigError
from moelora.experts import Container
from moelora.merging import merge
from moelora.routers.base import Router
from moelora.routing import RoutingContext

LINEARS = ["q_proj", "o_proj", "gate_proj", "down_proj"]
TOPK = {"kind": "topk", "top_k": 2, "init_std": 0.5}
STATIC = {"kind": "static", "weights": [0.3, 0.0, 0.9]}
ONE_HOT = {"kind": "static", "weights": [0.0, 0.0, 1.0]}
TASK = {"kind": "task", "num_tasks": 4}


def site(target: Any, experts: str | dict[str, Any] = "lora", router: Any = None) -> dict[str, Any]:
    options = {"kind": experts} if isinstance(experts, str) else experts
    number = 1 if router is None else 3
    ranks = {"r": 4} if options["kind"] == "shared_a" or number == 1 else {"r": [2, 4, 1]}
    alone = {"target": target, "experts": {"num_experts": number, **ranks, **options}}
    return alone if router is None else {**alone, "router": router}


def attached(backbone: PreTrainedModel, *sites: dict[str, Any]) -> moelora.MoELoRAModel:
    model = moelora.attach(backbone, {"sites": list(sites)})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if "magnitude" in name:
                tensor.mul_(torch.empty_like(tensor).uniform_(0.7, 1.4, generator=generator))
            else:
                tensor.normal_(std=0.2, generator=generator)
    return model.eval()


def ids() -> Tensor:
    return torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(6))


def batches() -> list[dict[str, Tensor]]:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, 5:] = 0
    return [{"input_ids": ids(), "attention_mask": mask}, {"input_ids": ids().flip(0)}]


EXACT: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one lora": ([site(LINEARS)], {}),
    "one rslora": ([site(LINEARS, "rslora")], {}),
    "one dora": ([site(LINEARS, "dora")], {}),
    "one block": ([site("mlp"), site("q_proj")], {}),
    "static lora": ([site(LINEARS, "lora", STATIC)], {}),
    "static dora": ([site(LINEARS, "dora", STATIC)], {}),
    "static shared_a": ([site(LINEARS, "shared_a", STATIC)], {}),
    "static low_rank": ([site(LINEARS, {"kind": "low_rank", "r": [0, 2, 3]}, STATIC)], {}),
    "one task": ([site(LINEARS, "lora", TASK)], {"task_ids": 2}),
    "a block with one of its experts": ([site("mlp", "lora", ONE_HOT)], {}),
}


@pytest.mark.parametrize("case", EXACT)
def test_an_exact_merge_equals_the_routed_model(tiny_llama: LlamaForCausalLM, case: str) -> None:
    sites, fields = EXACT[case]
    names = [name for name, _ in tiny_llama.named_modules()]
    model = attached(tiny_llama, *sites)
    with model.routing_context(**{name: torch.tensor([value]) for name, value in fields.items()}):
        expected = model(ids()).logits
    with model.disable_experts():
        frozen = model(ids()).logits
    count = len(model.containers())
    result = merge(model, batches=batches(), **fields)
    merged = result.backbone
    assert merged is tiny_llama
    assert [name for name, _ in merged.named_modules()] == names
    assert not any(isinstance(module, Container) for module in merged.modules())
    assert (merged(ids()).logits - expected).abs().max() <= 1e-5
    assert (frozen - expected).abs().max() > 0.1
    assert len(result.sites) == count
    assert all(s.exact and s.update_error < 1e-5 and s.rounding < 1e-6 for s in result.sites.values())


def test_the_backbone_alone_comes_back_and_the_report_is_logged(
    tiny_llama: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    model = attached(tiny_llama, site("q_proj"))
    expected = model(ids()).logits
    with caplog.at_level(logging.INFO, logger="moelora.model"):
        backbone = model.merge_and_unload()
    assert backbone is tiny_llama and not backbone._forward_hooks
    assert torch.allclose(backbone(ids()).logits, expected, atol=1e-5)
    assert "model.layers.1.self_attn.q_proj: exact, rounding" in caplog.text


def test_mixed_factors_are_merged_as_they_are_mixed(tiny_llama: LlamaForCausalLM) -> None:
    router = {"kind": "static", "weights": [0.3, 0.4, 0.9], "mix": "factors"}
    model = attached(tiny_llama, site(LINEARS, {"kind": "lora", "r": 3, "alpha": [3.0, 6.0, 9.0]}, router))
    expected = model(ids()).logits
    result = merge(model, batches=batches())
    assert (result.backbone(ids()).logits - expected).abs().max() <= 1e-5
    assert all(s.exact and s.update_error < 1e-5 for s in result.sites.values())


def test_gpt2s_conv1d_and_blocks_of_it() -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    backbone = GPT2LMHeadModel(config).eval()
    model = attached(backbone, site(["c_attn", "attn.c_proj"], "dora", STATIC), site("mlp"))
    expected = model(ids()).logits
    merged = model.merge_and_unload()
    assert (merged(ids()).logits - expected).abs().max() <= 1e-5
    assert type(merged.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"


def test_routing_by_token_is_refused_and_leaves_the_model(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, site("q_proj"), site("mlp", "lora", TOPK))
    expected = model(ids()).logits
    with pytest.raises(ConfigError, match=r"2 of 4 sites, 'model.layers.0.mlp'.*\['topk'\].*approximate=True"):
        model.merge_and_unload()
    with pytest.raises(ConfigError, match="pass batches to take the mean"):
        model.merge_and_unload(approximate=True)
    with pytest.raises(ConfigError, match=r"cannot be merged exactly.*task_ids"):
        attached(LlamaForCausalLM(model.config), site("q_proj", "lora", TASK)).merge_and_unload()
    assert torch.equal(model(ids()).logits, expected)


@pytest.mark.parametrize("target", ["mlp", "q_proj"])
def test_an_approximate_merge_says_how_wrong_it_is(tiny_llama: LlamaForCausalLM, target: str) -> None:
    model = attached(tiny_llama, site(target, "lora", TOPK))
    name = next(iter(model.containers()))
    container = model.containers()[name]
    seen: list[tuple[Tensor, Tensor]] = []
    handle = container.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad(), moelora.trace(model) as tape:
        for batch in batches():
            model(**batch)
    handle.remove()
    masks = [batches()[0]["attention_mask"].bool(), torch.ones(3, 9, dtype=torch.bool)]
    dense = torch.cat([record.dense_weights()[mask] for record, mask in zip(tape[name], masks, strict=True)])
    rows_in, rows_out = (torch.cat([t[i][m] for t, m in zip(seen, masks, strict=True)]) for i in (0, 1))
    frozen = container.base(rows_in)
    result = merge(model, approximate=True, batches=batches())
    found = result.sites[name]
    assert not found.exact and torch.allclose(found.weights, dense.mean(0), atol=1e-6)
    wrong = result.backbone.get_submodule(name)(rows_in) - rows_out
    assert found.output_error == pytest.approx((wrong.norm() / rows_out.norm()).item(), rel=1e-3)
    assert found.update_error == pytest.approx((wrong.norm() / (rows_out - frozen).norm()).item(), rel=1e-3)
    assert found.update_error > 0.05
    assert f"{name}: approximate" in str(result)


class Nominal(Router[Any]):
    """Stands in for a router whose source merges with weights of its own, as FlyLoRA does with all ranks on."""

    kind = "nominal"

    def approximate_weights(self, context: RoutingContext) -> Tensor:
        return torch.full((3,), 0.5)


def test_weights_that_the_source_merges_with_come_first(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attached(tiny_llama, site("q_proj", "lora", TOPK))
    router = next(iter(model.containers().values())).router
    monkeypatch.setattr(type(router), "approximate_weights", Nominal.approximate_weights)
    result = merge(model, approximate=True)
    assert all(torch.equal(s.weights, torch.full((3,), 0.5)) for s in result.sites.values())
    assert all(s.output_error is None for s in result.sites.values())


def test_weights_of_single_ranks(tiny_llama: LlamaForCausalLM) -> None:
    container = next(iter(attached(tiny_llama, site("q_proj", "lora", TOPK)).containers().values()))
    bank, weights = container.experts, torch.rand(7)
    scales = torch.tensor(bank.config.scales).repeat_interleave(torch.tensor(bank.ranks))
    expected = (bank.up() * weights * scales) @ bank.down()
    assert torch.allclose(bank.delta(weights, container.base), expected, atol=1e-6)


def test_factors_of_experts_are_merged(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, site(LINEARS, "lora", STATIC))
    with model.expert_scale({2: 0.25}):
        expected = model(ids()).logits
        merged = model.merge_and_unload()
    assert (merged(ids()).logits - expected).abs().max() <= 1e-5


def test_tied_weights_are_refused(tiny_config: Any) -> None:
    tiny_config.tie_word_embeddings = True
    model = attached(LlamaForCausalLM(tiny_config).eval(), site("lm_head"))
    with pytest.raises(ConfigError, match=r"'lm_head'.*shared with another module"):
        model.merge_and_unload()


def test_a_half_precision_weight_loses_a_part_of_the_update(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama.to(torch.bfloat16), site(LINEARS))
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            tensor.mul_(0.1 if name.endswith("lora_B") else 1.0)
    result = merge(model)
    assert all(1e-4 < s.rounding < 0.5 for s in result.sites.values())
    assert result.backbone.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_backbone_becomes_dense_and_can_be_saved(
    tiny_config: Any, tmp_path: Any, quantization: str
) -> None:
    tiny_config.hidden_size, tiny_config.intermediate_size, tiny_config.head_dim = 64, 128, 16
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path / "base")
    backbone, _ = load_backbone(tmp_path / "base", quantization=quantization, tokenizer=False)
    model = attached(backbone, site(["q_proj", "down_proj"]), site("o_proj", "dora", STATIC))
    expected = model(ids()).logits
    result = merge(model, batches=batches())
    merged = result.backbone
    assert not [m for m in merged.modules() if type(m) is not nn.Linear and isinstance(m, nn.Linear)]
    # An 8-bit linear rounds its input as well, which the dense one does not.
    tolerance = 1e-4 if quantization == "nf4" else 0.05 * expected.abs().max()
    assert (merged(ids()).logits - expected).abs().max() <= tolerance
    assert all(s.update_error < (1e-5 if quantization == "nf4" else 0.1) for s in result.sites.values())
    assert backbone_config(merged).name == "llama" and backbone_config(merged).quantization == "fp32"
    merged.save_pretrained(tmp_path / "merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(again(ids()).logits, merged(ids()).logits)


def test_a_scoring_pass_is_no_part_of_the_errors(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, site("q_proj", "lora", {"kind": "xlora"}))
    name = next(iter(model.containers()))
    container = model.containers()[name]
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if not model.slot.context.scoring_pass:
            seen.append((args[0], out))

    handle = container.register_forward_hook(hook)
    with torch.no_grad():
        model(ids())
    handle.remove()
    result = merge(model, approximate=True, batches=[{"input_ids": ids()}])
    [(rows_in, rows_out)] = seen
    wrong = result.backbone.get_submodule(name)(rows_in) - rows_out
    assert result.sites[name].output_error == pytest.approx((wrong.norm() / rows_out.norm()).item(), rel=1e-3)


def test_errors_leave_padding_out_where_the_backbone_makes_one_row_of_all_tokens() -> None:
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        pad_token_id=1,
    )
    batch = batches()[0]
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 9, batch["input_ids"])}
    errors = []
    for given in (batch, other):
        torch.manual_seed(0)
        model = attached(OPTForCausalLM(config), site("fc1", "lora", TOPK))
        errors.append(next(iter(merge(model, approximate=True, batches=[given]).sites.values())).output_error)
    assert errors[0] is not None and errors[0] == pytest.approx(errors[1], rel=1e-5)


def test_merging_is_refused_where_experts_are_switched_off(tiny_llama: LlamaForCausalLM) -> None:
    """The forwards that measure the error would run without them."""
    model = attached(tiny_llama, site("q_proj", "lora", STATIC))
    with model.disable_experts(), pytest.raises(ConfigError, match="inside disable_experts"):
        merge(model, batches=batches())
    assert all(error.output_error < 1e-5 for error in merge(model, batches=batches()).sites.values())
