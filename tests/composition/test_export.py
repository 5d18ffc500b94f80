"""Exports: stock PEFT, on the same backbone, says what the mixture says; what is no LoRA is refused or measured."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import (
    LINEARS,
    STATIC,
    TOPK,
    attached,
    batches,
    ids,
    logits,
    peft_logits,
    restricted,
    site,
    stock,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import moelora
from moelora.backbone import load_backbone
from moelora.composition import export_experts, export_lora, merge_adapters, read_adapter, write_peft
from moelora.composition.divergence import split_text
from moelora.errors import CheckpointError, ConfigError, DataError
from moelora.merging import merge

FIXTURES = Path(__file__).parents[1] / "fixtures"
FROZEN = {
    "kind": "frozen",
    "r": [3, 0, 2],
    "rank_pattern": {"q_proj": [1, 4, 0], "layers.0.self_attn.o_proj": [0, 2, 2]},
    "scaling": ["lora", "rslora", -0.5],
    "names": ["math", "code", "law"],
}
KINDS: dict[str, list[dict[str, Any]]] = {
    "lora": [site(LINEARS, {"kind": "lora", "alpha": [4.0, 8.0, 1.0]}, TOPK)],
    "rslora": [site(LINEARS, "rslora", TOPK)],
    "dora": [site(LINEARS, "dora", TOPK)],
    "shared_a": [site(LINEARS, "shared_a", TOPK)],
    "rank1": [site(LINEARS, "rank1", TOPK)],
    "frozen": [site(LINEARS, FROZEN, TOPK)],
    "low_rank": [site(LINEARS, {"kind": "low_rank", "r": [1, 2, 3]}, TOPK)],
    "sparse_projection": [site(LINEARS, "sparse_projection", TOPK)],
    "blocks and linears": [site("mlp", "lora", TOPK), site(["q_proj", "v_proj"], "rslora")],
    "a part of a block": [{**site("mlp", "lora", TOPK), "projections": ["down_proj"]}],
    "ranks by site": [site(LINEARS, {"kind": "lora", "r": 3, "rank_pattern": {"layers.1.mlp.gate_proj": 5}}, TOPK)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_is_the_mixture_with_that_expert_alone(
    tiny_llama: LlamaForCausalLM, kind: str, tmp_path: Path
) -> None:
    frozen = copy.deepcopy(tiny_llama)
    model = attached(tiny_llama, *KINDS[kind])
    model.save_pretrained(tmp_path / "mixture")
    done = export_experts(tmp_path / "mixture", tmp_path / "out")
    names = FROZEN["names"] if kind == "frozen" else ["expert_00", "expert_01", "expert_02"]
    assert [each.name for each in done.adapters] == names and all(each.exact for each in done.adapters)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*names, "README.md"])
    found = [peft_logits(frozen, tmp_path / "out" / name) for name in names]
    for expert, each in enumerate(found):
        assert (each - logits(restricted(copy.deepcopy(frozen), model, expert))).abs().max() <= 1e-5
    assert min((found[a] - found[b]).abs().max() for a, b in ((0, 1), (0, 2), (1, 2))) > 0.05
    assert (found[0] - logits(model)).abs().max() > 0.05, "an expert is not the mixture"


def test_an_expert_of_rank_0_is_the_backbone_and_has_no_folder(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = attached(tiny_llama, site("q_proj", {"kind": "low_rank", "r": [0, 3, 2]}, TOPK))
    done = export_experts(model, tmp_path / "out")
    assert done.left_out == ["expert_00"] and [each.name for each in done.adapters] == ["expert_01", "expert_02"]
    assert "expert_00: not written, it is the frozen backbone" in str(done)
    assert not (tmp_path / "out" / "expert_00").exists()


def test_nothing_at_all_is_an_error(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    off = {"kind": "static", "weights": [0.0, 0.0, 0.0]}
    model = attached(tiny_llama, site("q_proj", {"kind": "low_rank", "r": 0}, off))
    for export in (export_experts, export_lora):
        with pytest.raises(ConfigError, match="which leaves nothing to write"):
            export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_sites_with_fewer_experts_and_those_that_are_always_on(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    frozen = copy.deepcopy(tiny_llama)
    two = {"target": "o_proj", "experts": {"num_experts": 2, "r": 2}, "router": {**TOPK, "top_k": 1}}
    model = attached(tiny_llama, site("q_proj", "lora", TOPK), two, site("v_proj"))
    export_experts(model, tmp_path / "out")
    for expert in range(3):
        found = peft_logits(frozen, tmp_path / "out" / f"expert_{expert:02}")
        assert (found - logits(restricted(copy.deepcopy(frozen), model, expert))).abs().max() <= 1e-5
    card = (tmp_path / "out" / "expert_02" / "README.md").read_text()
    assert "nothing at 2 sites that have fewer experts, `model.layers.0.self_attn.o_proj` first" in card
    assert "At 2 of 6 sites the mixture has one expert that is always on" in card
    assert "fewer experts" not in (tmp_path / "out" / "expert_01" / "README.md").read_text()


def test_the_authors_own_mixlora_is_taken_apart_without_its_backbone(tmp_path: Path) -> None:
    root = FIXTURES / "mixlora_tiny"
    frozen = LlamaForCausalLM.from_pretrained(root / "backbone", dtype=torch.float32).eval()
    model = moelora.from_pretrained(root / "mixlora", copy.deepcopy(frozen))
    done = export_experts(root / "mixlora", tmp_path / "out", names=["a", "b", "c", "d"])
    assert [each.modules for each in done.adapters] == [14] * 4
    for expert, name in enumerate("abcd"):
        found = peft_logits(frozen, tmp_path / "out" / name)
        assert (found - logits(restricted(copy.deepcopy(frozen), model, expert))).abs().max() <= 1e-5
    original = torch.load(root / "mixlora" / "adapter_model.bin", weights_only=True)
    written = load_file(tmp_path / "out" / "c" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    theirs = next(
        value for name, value in original.items() if "layers.1" in name and "up_proj.experts.2.lora_A" in name
    )
    assert torch.equal(written[key], theirs), "the numbers are the authors' own"


def test_a_backbone_among_the_experts_can_be_written_for_peft(tmp_path: Path) -> None:
    source = FIXTURES / "flexmore_tiny" / "full_2expert"
    done = export_experts(source, tmp_path / "out")
    assert done.left_out == ["expert_00"], "the frozen FFN itself"
    assert "write it as a model of its own" in (tmp_path / "out" / "expert_01" / "README.md").read_text()
    model = moelora.from_pretrained(source)
    weights = {"kind": "static", "weights": [0.0, 1.0]}
    config = model.mixture.to_dict()
    tensors = {key: value.clone() for key, value in model.adapter_state().items() if ".router." not in key}
    backbone = model.unload()
    backbone.save_pretrained(tmp_path / "backbone")
    frozen = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone", dtype=torch.float32).eval()
    alone = moelora.attach(backbone, {"sites": [{**each, "router": weights} for each in config["sites"]]}).eval()
    alone.load_adapter_state(tensors)
    assert (peft_logits(frozen, tmp_path / "out" / "expert_01") - logits(alone)).abs().max() <= 1e-5
    assert (logits(frozen) - logits(alone)).abs().max() > 1e-3


@pytest.mark.parametrize("what", ["experts", "lora"])
def test_on_a_four_bit_backbone(tiny_config: Any, tmp_path: Path, what: str) -> None:
    tiny_config.hidden_size, tiny_config.intermediate_size, tiny_config.head_dim = 64, 128, 16
    LlamaForCausalLM(tiny_config).save_pretrained(tmp_path / "base")

    def quantized() -> Any:
        return load_backbone(tmp_path / "base", quantization="nf4", tokenizer=False)[0]

    router = STATIC if what == "lora" else TOPK
    model = attached(quantized(), site(LINEARS, "lora", router), site("v_proj"))
    if what == "lora":
        export_lora(model, tmp_path / "out")
        found, expected = logits(stock(quantized(), tmp_path / "out")), logits(model)
    else:
        export_experts(model, tmp_path / "out")
        found = logits(stock(quantized(), tmp_path / "out" / "expert_01"))
        expected = logits(restricted(quantized(), model, 1))
    assert (found - expected).abs().max() <= 1e-5
    assert (found - logits(quantized())).abs().max() > 0.05


def test_conv1d_of_gpt2(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, eos_token_id=2, bos_token_id=1)
    backbone = GPT2LMHeadModel(config).eval()
    model = attached(copy.deepcopy(backbone), site(["c_attn", "attn.c_proj"], "lora", TOPK), site("mlp"))
    export_experts(model, tmp_path / "out")
    found = peft_logits(backbone, tmp_path / "out" / "expert_01")
    assert (found - logits(restricted(copy.deepcopy(backbone), model, 1))).abs().max() <= 1e-5


def test_modules_that_are_saved_whole_are_in_every_folder(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    frozen = copy.deepcopy(tiny_llama)
    model = attached(tiny_llama, site("q_proj", "lora", TOPK), modules_to_save=["lm_head"])
    export_experts(model, tmp_path / "out")
    found = peft_logits(frozen, tmp_path / "out" / "expert_00")
    assert (found - logits(restricted(copy.deepcopy(frozen), model, 0))).abs().max() <= 1e-5
    head = load_file(tmp_path / "out" / "expert_00" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(head, model.adapter_state()["lm_head.weight"])


# -- the whole mixture as one LoRA ------------------------------------------------------------------------------------

FACTORS = {"kind": "static", "weights": [0.3, 0.4, -0.9], "mix": "factors"}
TASK = {"kind": "task", "num_tasks": 4}
ONE_LORA: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[int]]] = {
    "always on": ([site(LINEARS), site("v_proj", "rslora")], {}, [4]),
    "one dora": ([site(LINEARS, "dora")], {}, [4]),
    "given weights": ([site(LINEARS, {"kind": "lora", "alpha": [4.0, 8.0, 1.0]}, STATIC)], {}, [3]),
    "learned weights": ([site(LINEARS, "lora", {"kind": "static"})], {}, [7]),
    "equal weights of equal scales": (
        [
            site(
                LINEARS,
                {"kind": "frozen", "r": [2, 4, 1], "scaling": [0.5] * 3},
                {"kind": "static", "weights": "uniform"},
            )
        ],
        {},
        [7],
    ),
    "factors": ([site(LINEARS, {"kind": "lora", "r": 3, "alpha": [3.0, 6.0, 9.0]}, FACTORS)], {}, [3]),
    "shared_a": ([site(LINEARS, "shared_a", STATIC)], {}, [8]),
    "rank 0": ([site(LINEARS, {"kind": "low_rank", "r": [0, 2, 3]}, STATIC)], {}, [3]),
    "a task": ([site(LINEARS, "lora", TASK)], {"task_ids": 2}, [7]),
    "one expert of a block": ([site("mlp", "lora", {"kind": "static", "weights": [0.0, 0.0, 1.0]})], {}, [1]),
    "a block always on": ([site("mlp"), site("q_proj", "lora", STATIC)], {}, [3, 4]),
    "one router for all": ([site(["q_proj", "o_proj"], "lora", {"kind": "static", "share": "all"})], {}, [7]),
}


@pytest.mark.parametrize("case", ONE_LORA)
def test_weights_that_hold_for_every_token_make_one_exact_lora(
    tiny_llama: LlamaForCausalLM, case: str, tmp_path: Path
) -> None:
    sites, context, ranks = ONE_LORA[case]
    frozen = copy.deepcopy(tiny_llama)
    model = attached(tiny_llama, *sites)
    expected = logits(model, **{name: torch.full((3,), value) for name, value in context.items()})
    model.save_pretrained(tmp_path / "mixture")
    done = export_lora(tmp_path / "mixture", tmp_path / "out", context=context)
    found = peft_logits(frozen, tmp_path / "out")
    assert (found - expected).abs().max() <= 1e-5
    assert (logits(frozen) - expected).abs().max() > 0.1
    [written] = done.adapters
    assert written.exact and written.ranks == ranks and written.distance is None and written.divergence is None
    assert "up to rounding" in (tmp_path / "out" / "README.md").read_text()
    export_lora(model, tmp_path / "again", context=context)
    assert (peft_logits(frozen, tmp_path / "again") - found).abs().max() <= 1e-6


def test_an_adapter_that_is_always_on_comes_out_as_it_went_in(tmp_path: Path) -> None:
    for name in ("plain_r4_a8", "rslora_r4_a8", "rankpattern", "alllinear_r2_a4"):
        source = FIXTURES / "peft_lora_tiny_llama" / name
        export_lora(source, tmp_path / name)
        before, after = read_adapter(source), read_adapter(tmp_path / name)
        for path, factors in before.factors.items():
            assert torch.equal(after.factors[path].A, factors.A) and torch.equal(after.factors[path].B, factors.B)
            assert after.factors[path].scale == pytest.approx(factors.scale, rel=1e-15)


def test_several_dora_experts_become_one_where_the_frozen_weights_are_at_hand(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    frozen = copy.deepcopy(tiny_llama)
    router = {"kind": "static", "weights": [0.6, -0.5, 0.9]}
    model = attached(tiny_llama, site(LINEARS, "dora", router))
    model.save_pretrained(tmp_path / "mixture")
    with pytest.raises(ConfigError, match=r"several DoRA experts become one by the norms.*give the loaded model"):
        export_lora(tmp_path / "mixture", tmp_path / "out")
    done = export_lora(model, tmp_path / "out")
    assert done.adapters[0].exact and done.adapters[0].ranks == [7]
    assert (peft_logits(frozen, tmp_path / "out") - logits(model)).abs().max() <= 1e-5
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_dora"] is True
    with pytest.raises(ConfigError, match="rank cannot be cut in a DoRA adapter"):
        export_lora(model, tmp_path / "cut", rank=2)


def test_dora_beside_others_is_no_adapter_of_peft(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = attached(tiny_llama, site("q_proj", "dora"), site("v_proj"))
    for export in (export_experts, export_lora):
        with pytest.raises(ConfigError, match=r"q_proj has a DoRA expert and .*v_proj has none"):
            export(model, tmp_path / "out")


def test_a_cut_of_the_ranks_says_what_it_loses(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    frozen = copy.deepcopy(tiny_llama)
    uniform = {"kind": "static", "weights": [0.5, 0.5, 0.5]}
    model = attached(tiny_llama, site(["q_proj", "o_proj"], "lora", uniform), site("v_proj", {"kind": "lora", "r": 2}))
    done = export_lora(model, tmp_path / "out", rank=3)
    [written] = done.adapters
    assert not written.exact and written.ranks == [2, 3] and written.distance is not None
    cut = read_adapter(tmp_path / "out")
    for path, lost in written.distance.modules.items():
        bank = model.containers()[path].experts
        delta = bank.delta(torch.full((len(bank.ranks),), 1.0 if len(bank.ranks) == 1 else 0.5), bank)
        error = delta - cut.factors[path].scale * cut.factors[path].B @ cut.factors[path].A
        assert lost.relative == pytest.approx((error.norm() / delta.norm()).item(), abs=1e-5)
        assert (lost.relative > 0.05) == ("v_proj" not in path)
    card = (tmp_path / "out" / "README.md").read_text()
    worst = written.distance.modules["model.layers.1.self_attn.q_proj"]
    assert f"| `model.layers.1.self_attn.q_proj` | 3 | {worst.relative:.2%} |" in card
    assert f"off by {written.distance.relative:.2%}" in str(done) and "an approximation" in str(done)
    assert (peft_logits(frozen, tmp_path / "out") - logits(model)).abs().max() > 1e-3
    assert export_lora(model, tmp_path / "whole", rank=7).adapters[0].exact
    with pytest.raises(ConfigError, match="rank is 0"):
        export_lora(model, tmp_path / "none", rank=0)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (
            [site("q_proj", "lora", TOPK), site("v_proj")],
            r"2 of 4 sites.*q_proj' first.*'topk' weighs experts by the token",
        ),
        (
            [site("q_proj", "lora", TASK)],
            r"'task' has weights that hold for every token only under a context.*--context task_ids=3",
        ),
        ([site("mlp", "lora", STATIC)], r"2 of 2 sites[^;]*: a block has a nonlinearity between its linears"),
    ],
)
def test_what_is_no_lora_is_refused_with_the_reason(
    tiny_llama: LlamaForCausalLM, sites: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    model = attached(tiny_llama, *sites)
    model.save_pretrained(tmp_path / "mixture")
    for source in (model, tmp_path / "mixture"):
        with pytest.raises(ConfigError, match=rf"(?s){message}.*--approximate --text"):
            export_lora(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_approximation_of_a_checkpoint_needs_the_model(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = attached(tiny_llama, site("q_proj", "lora", TOPK))
    model.save_pretrained(tmp_path / "mixture")
    with pytest.raises(ConfigError, match="its mean weights need the model itself and text"):
        export_lora(tmp_path / "mixture", tmp_path / "out", approximate=True)
    with pytest.raises(ConfigError, match="pass batches to take the mean over"):
        export_lora(model, tmp_path / "out", approximate=True)
    with pytest.raises(ConfigError, match="context names tasks: a router may go by task_ids"):
        export_lora(model, tmp_path / "out", context={"tasks": 2})


@pytest.mark.parametrize("target", ["q_proj", "mlp"])
def test_an_approximation_is_the_merge_with_mean_weights_and_its_divergence_is_measured(
    tiny_llama: LlamaForCausalLM, target: str, tmp_path: Path
) -> None:
    frozen = copy.deepcopy(tiny_llama)
    model = attached(tiny_llama, site(target, "lora", TOPK), site("v_proj"))
    expected = logits(model)
    done = export_lora(model, tmp_path / "out", approximate=True, batches=batches(), held_out=batches(7))
    assert model.adapters == [model.active_adapter] and torch.equal(logits(model), expected), "it stays as it was"
    [written] = done.adapters
    assert not written.exact and written.divergence is not None and written.divergence.held_out
    exported = stock(copy.deepcopy(frozen), tmp_path / "out")
    kls, agree, plain = [], [], []
    with torch.no_grad():
        for batch in batches(7):
            mask = batch.get("attention_mask", torch.ones(3, 9)).bool()
            ours, theirs, bare = (m(**batch).logits[mask].log_softmax(-1) for m in (model, exported, frozen))
            kls.append((ours.exp() * (ours - theirs)).sum(-1))
            plain.append((ours.exp() * (ours - bare)).sum(-1))
            agree.append((ours.argmax(-1) == theirs.argmax(-1)).float())
    assert written.divergence.tokens == 3 * 9 * 2 - 4 == len(torch.cat(kls))
    assert written.divergence.kl == pytest.approx(torch.cat(kls).mean().item(), rel=1e-3)
    assert written.divergence.backbone_kl == pytest.approx(torch.cat(plain).mean().item(), rel=1e-3)
    assert written.divergence.agreement == pytest.approx(torch.cat(agree).mean().item())
    assert 0 < written.divergence.kl < written.divergence.backbone_kl
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(written.divergence) in card and "held-out tokens" in card and "An approximation" in card
    merged = merge(model, approximate=True, batches=batches()).backbone
    assert (logits(exported) - logits(merged)).abs().max() <= 1e-5
    assert (logits(exported) - expected).abs().max() > 1e-3


def test_without_other_text_it_is_measured_on_the_same_and_says_so(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    model = attached(tiny_llama, site("q_proj", "lora", TOPK))
    [written] = export_lora(model, tmp_path / "out", approximate=True, batches=batches()).adapters
    assert written.divergence is not None and not written.divergence.held_out
    assert "of the same text that the weights were taken from" in (tmp_path / "out" / "README.md").read_text()


def test_an_exact_export_has_no_divergence_when_it_is_measured(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = attached(tiny_llama, site(LINEARS, "dora", STATIC), modules_to_save=["lm_head"])
    [written] = export_lora(model, tmp_path / "out", held_out=batches()).adapters
    assert written.exact and written.divergence is not None
    assert abs(written.divergence.kl) < 1e-8 and written.divergence.agreement == 1.0
    assert written.divergence.backbone_kl > 0.01


def test_factors_set_for_single_experts_are_exported(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    frozen = copy.deepcopy(tiny_llama)
    model = attached(tiny_llama, site(LINEARS, "lora", STATIC))
    with model.expert_scale({2: 0.25}):
        expected = logits(model)
        export_lora(model, tmp_path / "out")
    assert (peft_logits(frozen, tmp_path / "out") - expected).abs().max() <= 1e-5


def test_factors_of_single_experts_are_refused_where_a_router_mixes_factors(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    model = attached(tiny_llama, site(LINEARS, {"kind": "lora", "r": 4}, {**STATIC, "mix": "factors"}))
    with model.expert_scale({2: 0.25}):
        for make in (lambda: export_lora(model, tmp_path / "out"), model.merge_and_unload):
            with pytest.raises(ConfigError, match="its router mixes factors, where expert_scale multiplies B alone"):
                make()
    with model.expert_scale({2: 1.0}):
        export_lora(model, tmp_path / "out")


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_with_files_is_left_alone(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = attached(tiny_llama, site("q_proj"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for export in (export_experts, export_lora):
        with pytest.raises(CheckpointError, match=r"out: expected a new or empty folder, found files in it"):
            export(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="expected a new or empty folder"):
        write_peft(read_adapter(FIXTURES / "peft_lora_tiny_llama" / "plain_r4_a8"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_an_export_that_fails_in_between_leaves_nothing(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moelora.checkpoints.peft import PeftLayout

    write, calls = PeftLayout.write, []

    def fails(self: Any, folder: Path, content: Any) -> None:
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(folder))
        write(self, folder, content)

    monkeypatch.setattr(PeftLayout, "write", fails)
    model = attached(tiny_llama, site("q_proj", "lora", TOPK))
    with pytest.raises(CheckpointError, match="No space left"):
        export_experts(model, tmp_path / "out")
    assert len(calls) == 2 and list(tmp_path.iterdir()) == []


def test_names_are_those_of_folders(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = attached(tiny_llama, site("q_proj", "lora", TOPK))
    for names, message in (
        (["a", "b"], "for 3 experts"),
        (["a", "b", "b"], "each one of its own"),
        (["a", "../b", "c"], r"'../b' is no name of a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            export_experts(model, tmp_path / "out", names=names)


def test_a_card_does_not_say_where_on_this_machine_things_lie(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = attached(tiny_llama, site("q_proj", "lora", TOPK))
    model.save_pretrained(tmp_path / "mixture")
    export_experts(tmp_path / "mixture", tmp_path / "out")
    for card in (tmp_path / "out").rglob("README.md"):
        assert str(tmp_path) not in card.read_text() and "`mixture`" in card.read_text()
        assert card.read_text().startswith('---\nlibrary_name: "peft"\n')


def test_progress_is_told(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = attached(tiny_llama, site("q_proj", "lora", TOPK))
    told: list[tuple[str, int, int]] = []
    export_lora(model, tmp_path / "out", approximate=True, batches=batches(), progress=lambda *each: told.append(each))
    assert {what for what, _, _ in told} == {"Weighing experts", "Comparing with the mixture", "Writing adapters"}
    assert told[-1][1] == told[-1][2]


def test_a_merged_adapter_is_a_folder_that_peft_loads(tmp_path: Path) -> None:
    root = FIXTURES / "peft_lora_tiny_llama"
    backbone = LlamaForCausalLM.from_pretrained(FIXTURES / "tiny_llama_base", dtype=torch.float32).eval()
    adapters = [read_adapter(root / name) for name in ("plain_r4_a8", "alllinear_r2_a4", "rslora_r4_a8")]
    merged = merge_adapters(adapters, "cat", [0.5, 1.0, -0.25], name="three")
    write_peft(merged, tmp_path / "out")
    with torch.no_grad():
        dense = copy.deepcopy(backbone)
        for weight, adapter in zip([0.5, 1.0, -0.25], adapters, strict=True):
            for path, each in adapter.factors.items():
                dense.get_submodule(path).weight += weight * each.scale * each.B @ each.A
    assert (peft_logits(backbone, tmp_path / "out") - logits(dense)).abs().max() <= 1e-5
    again = read_adapter(tmp_path / "out")
    for path, each in merged.factors.items():
        assert torch.equal(again.factors[path].A, each.A) and torch.equal(again.factors[path].B, each.B)
    assert "# three" in (tmp_path / "out" / "README.md").read_text()


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("characters", "length", "most", "fit", "held"),
    [
        (100, 10, 1000, [10] * 5, [10] * 5),
        (95, 30, 1000, [30, 30], [30, 5]),
        (30, 512, 1000, [15], [15]),
        (999, 10, 20, [10], [10]),
    ],
)
def test_text_is_divided_into_pieces_for_either_use(
    byte_tokenizer: Any, characters: int, length: int, most: int, fit: list[int], held: list[int]
) -> None:
    text = "".join(chr(97 + index % 26) for index in range(characters))
    parts = split_text(byte_tokenizer, text, length, most)
    assert [[batch["input_ids"].shape[1] for batch in part] for part in parts] == [fit, held]
    tokens: Tensor = torch.cat([batch["input_ids"][0] for part in parts for batch in part])
    assert len(tokens) == min(characters, most)
    with pytest.raises(DataError, match="the text has 1 tokens"):
        split_text(byte_tokenizer, "a")


def test_ids_are_not_all_the_same() -> None:
    assert len(ids().unique()) > 10
