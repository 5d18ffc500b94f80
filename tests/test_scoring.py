"""The scoring pass: states of the backbone before the mixture, two streams in one cache, nothing left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import moelora
from moelora.errors import ConfigError, UserError
from moelora.mixture import MoELoRAModel, trace
from moelora.routing import RoutingContext


def xlora(**router: Any) -> dict[str, Any]:
    site = {
        "target": ["q_proj", "v_proj", "down_proj"],
        "experts": {"kind": "frozen", "num_experts": 3, "r": 2, "alpha": 4},
        "router": {"kind": "xlora", "layerwise": True, **router},
    }
    return {"sites": [site]}


def attached(backbone: PreTrainedModel, config: dict[str, Any]) -> MoELoRAModel:
    model = moelora.attach(backbone, config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.normal_(std=0.3, generator=generator)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Left-padded input_ids and attention_mask."""
    ids = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    mask[2, :4] = 0
    return ids * mask, mask


def count_scoring_passes(model: MoELoRAModel, calls: list[bool]) -> None:
    """Append to ``calls``, for each pass through the body, whether it was a scoring pass."""
    model.backbone.model.register_forward_pre_hook(lambda *_: calls.append(model.slot.context.scoring_pass))


def test_the_states_are_those_of_the_backbone_after_its_final_norm(tiny_llama: LlamaForCausalLM) -> None:
    ids, mask = batch()
    with torch.no_grad():
        expected = tiny_llama(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        model = attached(tiny_llama, xlora())
        seen = []
        router = next(iter(model.containers().values())).router
        score = router.score
        router.score = lambda states, context: seen.append(states) or score(states, context)
        model(ids, attention_mask=mask)
    assert len(seen) == 1, "the classifier runs once per forward"
    assert torch.equal(seen[0], expected)
    assert not seen[0].requires_grad


@pytest.mark.parametrize("value", [0.0, 0.7, None])
def test_the_scoring_pass_weighs_every_expert_alike(tiny_llama: LlamaForCausalLM, value: float | None) -> None:
    """Against a backbone with the sum of all updates, times v, in its weights; experts of other routers are off."""
    ids, mask = batch()
    plain = copy.deepcopy(tiny_llama)
    config = xlora(scaling_pass_value=value)
    config["sites"] += [
        {"target": "o_proj", "experts": {"num_experts": 1, "r": 2}},
        {"target": "k_proj", "experts": {"num_experts": 4, "r": 2}, "router": {"kind": "topk", "top_k": 2}},
    ]
    model = attached(tiny_llama, config)
    seen: list[Tensor] = []
    router = next(iter(model.containers().values())).router
    score = router.score
    router.score = lambda states, context: seen.append(states) or score(states, context)
    with torch.no_grad():
        model(ids, attention_mask=mask)
        constant = 1 / 3 if value is None else value
        for container in model.groups()[0]:
            linear = plain.get_submodule(container.site.name)
            linear.weight += constant * 2.0 * container.lora_B @ container.lora_A
        expected = plain.model(ids, attention_mask=mask).last_hidden_state
    assert (seen[0] - expected)[mask.bool()].abs().max() <= 1e-5


def test_listeners_do_not_hear_the_scoring_pass(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, xlora(scaling_pass_value=0.5))
    ids, mask = batch()
    with torch.no_grad(), trace(model) as tape:
        model(ids, attention_mask=mask)
    assert len(tape) == 6 and all(len(records) == 1 for records in tape.records.values())


def test_disabled_experts_skip_the_pass_and_are_the_backbone_bit_for_bit(tiny_llama: LlamaForCausalLM) -> None:
    ids, mask = batch()
    with torch.no_grad():
        expected = tiny_llama(ids, attention_mask=mask).logits
        model = attached(tiny_llama, xlora())
        calls: list[bool] = []
        count_scoring_passes(model, calls)
        with model.disable_experts():
            assert torch.equal(model(ids, attention_mask=mask).logits, expected)
        assert calls == [False]
        assert not torch.equal(model(ids, attention_mask=mask).logits, expected)
        assert calls == [False, True, False]


@pytest.mark.parametrize("failing", ["scoring", "mixed"])
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_an_error_leaves_nothing_behind(tiny_llama: LlamaForCausalLM, failing: str, value: float) -> None:
    model = attached(tiny_llama, xlora(scaling_pass_value=value))
    ids, mask = batch()

    def fail(module: nn.Module, args: Any) -> None:
        if model.slot.context.scoring_pass == (failing == "scoring"):
            raise RuntimeError("planted")

    with torch.no_grad():
        mixed = model(ids, attention_mask=mask).logits
        with model.disable_experts():
            base = model(ids, attention_mask=mask).logits
        state = model.slot.state()
        hook = model.backbone.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="planted"):
            model(ids, attention_mask=mask)
        hook.remove()
        assert model.slot.state() == state and model.slot.listeners == [] and model._passes.contexts == []
        with model.disable_experts():
            assert torch.equal(model(ids, attention_mask=mask).logits, base)
        assert torch.equal(model(ids, attention_mask=mask).logits, mixed)


def test_states_of_the_callers_own_take_the_place_of_the_pass(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, xlora())
    ids, mask = batch()
    calls: list[bool] = []
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        with model.disable_experts():
            states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        count_scoring_passes(model, calls)
        with model.routing_context(scoring_states=states):
            assert torch.equal(model(ids, attention_mask=mask).logits, expected)
        assert calls == [False]
        with model.routing_context(scoring_states=states[:, :-1]), pytest.raises(ConfigError, match="scoring_states"):
            model(ids, attention_mask=mask)


# -- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [xlora(), xlora(depth=2, size=8, top_k=2), xlora(scaling_pass_value=0.5, depth=2)])
def test_checkpointing_runs_the_pass_once_and_gives_the_same_gradients(
    tiny_llama: LlamaForCausalLM, config: dict[str, Any]
) -> None:
    model = attached(tiny_llama, config).train()
    ids, mask = batch()
    labels = ids.masked_fill(mask == 0, -100)
    calls: list[bool] = []
    count_scoring_passes(model, calls)
    scored: list[int] = []
    router = next(iter(model.containers().values())).router
    score = router.score
    router.score = lambda states, context: scored.append(1) or score(states, context)
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in router.parameters())])
    assert calls == [True, False] * 2 and len(scored) == 2
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))
    assert all(gradient.any() for gradient in results[0][1:])


def test_trainable_experts_get_gradients_under_autocast(tiny_llama: LlamaForCausalLM) -> None:
    """Autocast would keep the copies of weights that the scoring pass made without a graph."""
    config = xlora(scaling_pass_value=0.5)
    config["sites"][0]["experts"]["kind"] = "lora"
    model = attached(tiny_llama, config).train()
    ids, _ = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.adapter_tensors().values())


def test_a_training_forward_keeps_no_second_stream(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, xlora()).train()
    ids, _ = batch()
    assert len(model(ids).past_key_values) == 2
    assert len(model.eval()(ids).past_key_values) == 4


# -- generation --------------------------------------------------------------------------------------------------

CONFIGS = [xlora(), xlora(scaling_pass_value=0.7, top_k=2), xlora(layerwise=False, depth=2, size=8)]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("own_cache", [None, DynamicCache], ids=["made by the backbone", "given"])
def test_cached_logits_are_those_of_whole_forwards(
    tiny_llama: LlamaForCausalLM, config: dict[str, Any], own_cache: Any
) -> None:
    model = attached(tiny_llama, config)
    ids, mask = batch()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        cache = None if own_cache is None else own_cache()
        for start, stop in ((0, 4), (4, 5), (5, 7)):
            output = model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            real = mask[:, start:stop].bool()
            assert (output.logits - whole[:, start:stop])[real].abs().max() <= 1e-5
            assert cache.get_seq_length() == stop


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 3},
    ],
    ids=["greedy", "beams", "sampling", "chunked prefill"],
)
def test_generation_with_a_cache_gives_the_tokens_and_scores_of_generation_without(
    tiny_llama: LlamaForCausalLM, config: dict[str, Any], options: dict[str, Any]
) -> None:
    model = attached(tiny_llama, config)
    ids, mask = batch()
    results = []
    for use_cache in (False, True):
        torch.manual_seed(5)
        results.append(
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=10,
                use_cache=use_cache,
                output_scores=True,
                return_dict_in_generate=True,
                **{"do_sample": False, **(options if use_cache or "prefill_chunk_size" not in options else {})},
            )
        )
    plain, cached = results
    assert torch.equal(plain.sequences, cached.sequences)
    for one, two in zip(plain.scores, cached.scores, strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def other_backbones() -> dict[str, tuple[PreTrainedModel, list[str]]]:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    heads = {"num_key_value_heads": 2, "intermediate_size": 48}
    gpt2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, **special)
    opt = OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, **special)
    mistral = MistralConfig(**sizes, **heads, sliding_window=4, **special)
    return {
        "its own argument names and Conv1D": (GPT2LMHeadModel(gpt2), ["c_attn", "c_fc"]),
        "one row of tokens in its FFN": (OPTForCausalLM(opt), ["q_proj", "fc1"]),
        "a sliding window": (MistralForCausalLM(mistral), ["q_proj", "down_proj"]),
    }


@pytest.mark.parametrize("which", range(3))
def test_other_backbones_generate_alike_with_a_cache_and_without(which: int) -> None:
    backbone, targets = list(other_backbones().values())[which]
    config = xlora(scaling_pass_value=0.5)
    config["sites"][0]["target"] = targets
    model = attached(backbone.eval(), config)
    ids, mask = batch()
    results = [
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            use_cache=use_cache,
            output_scores=True,
            return_dict_in_generate=True,
        )
        for use_cache in (False, True)
    ]
    assert torch.equal(results[0].sequences, results[1].sequences)
    for one, two in zip(results[0].scores, results[1].scores, strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def test_a_token_costs_two_token_forwards(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, xlora())
    seen: list[tuple[int, bool]] = []
    model.backbone.model.layers[0].mlp.gate_proj.register_forward_hook(
        lambda module, args, output: seen.append((output.shape[1], model.slot.context.scoring_pass))
    )
    model.generate(batch()[0][:1], max_new_tokens=4, do_sample=False)
    assert seen == [(7, True), (7, False)] + [(1, True), (1, False)] * 3


def test_a_copied_or_cropped_cache_keeps_both_streams(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, xlora())
    ids = batch()[0][:1]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        prefix = model(ids[:, :5]).past_key_values
        for _ in range(2):
            again = model(ids[:, 5:], past_key_values=copy.deepcopy(prefix)).logits
            assert (again - whole[:, 5:]).abs().max() <= 1e-5
        prefix.crop(-2)
        assert (model(ids[:, 3:], past_key_values=prefix).logits - whole[:, 3:]).abs().max() <= 1e-5
        prefix.reset()
        assert (model(ids, past_key_values=prefix).logits - whole).abs().max() <= 1e-5


def test_prompt_lookup_which_crops_gives_the_greedy_tokens(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, xlora())
    ids = batch()[0][:1].repeat(1, 2)
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3), greedy)


def test_caches_that_hold_one_stream_are_refused(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, xlora())
    ids, mask = batch()
    with pytest.raises(ConfigError, match=r"this StaticCache cannot hold.*use_cache=False"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2, cache_implementation="static")
    with torch.no_grad():
        with model.disable_experts():
            cache = model(ids, attention_mask=mask).past_key_values
        with pytest.raises(ConfigError, match="filled without it"):
            model(ids[:, :1], past_key_values=cache)


def test_a_cache_whose_streams_got_out_of_step_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, xlora())
    ids, _ = batch()

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("planted")

    with torch.no_grad():
        cache = model(ids).past_key_values
        hook = model.backbone.lm_head.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="planted"):
            model(ids[:, :1], past_key_values=cache)
        hook.remove()
        assert cache.get_seq_length() == 8, "both streams took the token, so both are whole"
        model(ids[:, :1], past_key_values=cache)
        hook = model.backbone.model.layers[0].register_forward_pre_hook(
            lambda *_: None if model.slot.context.scoring_pass else fail(*_)
        )
        with pytest.raises(RuntimeError, match="planted"):
            model(ids[:, :1], past_key_values=cache)
        hook.remove()
        with pytest.raises(ConfigError, match="a forward that failed"):
            model(ids[:, :1], past_key_values=cache)


# -- where it can be ---------------------------------------------------------------------------------------------


def test_a_backbone_of_two_stacks_is_refused_and_left_as_it_was() -> None:
    backbone = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=9)
    )
    config = xlora()
    config["sites"][0]["target"] = "q"
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration"):
        moelora.attach(backbone, config)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_block_sites_and_other_routers_stand_beside_it(tiny_llama: LlamaForCausalLM) -> None:
    """The scoring pass is the backbone's own, whatever other experts there are; the block weighs updates."""
    config = xlora()
    config["sites"][0]["target"] = "mlp"
    config["sites"] += [
        {"target": "q_proj", "experts": {"num_experts": 1, "r": 2}},
        {"target": "v_proj", "experts": {"num_experts": 4, "r": 2}, "router": {"kind": "topk", "top_k": 2}},
    ]
    ids, mask = batch()
    with torch.no_grad():
        expected = tiny_llama.model(ids, attention_mask=mask).last_hidden_state
        model = attached(tiny_llama, config)
        seen: list[Tensor] = []
        blocks = [container for container in model.containers().values() if container.group == 0]
        router = blocks[0].router
        assert len(blocks) == 2 and blocks[1].router is router
        score = router.score
        router.score = lambda states, context: seen.append(states) or score(states, context)
        with trace(model) as tape:
            whole = model(ids, attention_mask=mask, use_cache=False).logits
        assert torch.equal(seen[0], expected)
        assert len(tape) == 4 and all(len(records) == 1 for records in tape.records.values())
        x, record = torch.randn(3, 7, 32), tape[blocks[0].site.name][0]
        with model.slot.using(model.slot.context):
            model.slot.context = RoutingContext(scoring_states=seen[0])
            mixed = blocks[0](x)
        base = blocks[0].base(x)
        updates = [_expert(blocks[0], x, expert) - base for expert in range(3)]
        by_hand = base + sum(record.weights[..., e, None] * update for e, update in enumerate(updates))
        assert (mixed - by_hand).abs().max() <= 1e-5
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        plain = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=False)
        assert torch.equal(generated, plain)
        assert whole.isfinite().all()


def _expert(block: Any, x: Tensor, expert: int) -> Tensor:
    """One expert of a block alone, as a copy of the frozen block with merged weights."""
    merged = copy.deepcopy(block.base)
    rows = slice(2 * expert, 2 * expert + 2)
    for name, bank in block.experts.items():
        merged.get_submodule(name).weight += 2.0 * bank.lora_B[:, rows] @ bank.lora_A[rows]
    return merged(x)


def test_a_container_alone_takes_states_from_the_context() -> None:
    config = xlora(layerwise=False)["sites"][0]
    with pytest.raises(ConfigError, match="hidden_size"):
        moelora.experts.build(nn.Linear(6, 5), config)
    container = moelora.experts.build(nn.Linear(6, 5), config, hidden_size=4)
    with pytest.raises(UserError, match="scoring_states"):
        container(torch.randn(2, 3, 6))
    with container.slot.using(RoutingContext(scoring_states=torch.randn(2, 3, 4))):
        assert container(torch.randn(2, 3, 6)).shape == (2, 3, 5)
    with (
        container.slot.using(RoutingContext(scoring_states=torch.randn(2, 3, 5))),
        pytest.raises(ConfigError, match="width 4"),
    ):
        container(torch.randn(2, 3, 6))


def test_a_copy_of_the_model_scores_by_itself(tiny_llama: LlamaForCausalLM) -> None:
    model = attached(tiny_llama, xlora())
    ids, _ = batch()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(ids).logits
        for parameter in next(iter(model.containers().values())).router.parameters():
            parameter.zero_()
        assert torch.equal(twin(ids).logits, expected)
        assert not torch.equal(model(ids).logits, expected)


def test_a_backbone_without_a_head_is_scored_too(tiny_llama: LlamaForCausalLM) -> None:
    ids, mask = batch()
    whole = attached(copy.deepcopy(tiny_llama), xlora())
    body = attached(tiny_llama.model, xlora())
    with torch.no_grad():
        expected = whole(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(body(ids, attention_mask=mask).last_hidden_state, expected)
        assert torch.equal(body.backbone(ids, mask).last_hidden_state, expected), "positional arguments"


@pytest.mark.parametrize("target", ["q_proj", "mlp"])
def test_no_tokens_at_all_are_no_error(tiny_llama: LlamaForCausalLM, target: str) -> None:
    config = xlora()
    config["sites"][0]["target"] = target
    container = next(iter(attached(tiny_llama, config).containers().values()))
    with container.slot.using(RoutingContext(scoring_states=torch.zeros(1, 0, 32))):
        assert container(torch.zeros(1, 0, 32)).shape == (1, 0, 32)
