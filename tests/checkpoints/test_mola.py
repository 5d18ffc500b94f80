"""The layout of MoLA's authors, on what their own code wrote and computed (tests/fixtures/mola_tiny)."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from altering import Change, altered, with_tensor, without
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import moelora
from moelora import checkpoints
from moelora.errors import CheckpointError

FIXTURES = Path(__file__).parents[1] / "fixtures"
ROOT = FIXTURES / "mola_tiny"
# Their runs and LoRAMoE's were made on one backbone and one batch.
INPUTS = load_file(FIXTURES / "loramoe_tiny" / "inputs.safetensors")
BATCH = {name: INPUTS[name] for name in ("input_ids", "attention_mask")}
SCALARS = json.loads((ROOT / "reference.json").read_text())
VARIANTS = list(SCALARS)
Q = "base_model.model.model.layers.1.self_attn.q_proj"


def backbone() -> LlamaForCausalLM:
    path = FIXTURES / "loramoe_tiny" / "backbone"
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def told(variant: str, folder: Path) -> Path:
    """The checkpoint with what their loader has to be told."""
    return altered(ROOT / variant, folder, top_k=SCALARS[variant]["top_k"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_router_logits_and_loss_are_the_authors_own(variant: str, tmp_path: Path) -> None:
    model = moelora.from_pretrained(told(variant, tmp_path / "told"), backbone())
    expected = load_file(ROOT / variant / "reference.safetensors")
    with moelora.trace(model) as tape:
        out = model(**BATCH, labels=INPUTS["labels"])
    assert (out.logits - expected["logits"]).abs().max() <= 1e-5
    assert abs(out.task_loss.item() - SCALARS[variant]["loss"]) <= 1e-5 and out.loss == out.task_loss
    compared = 0
    for name in model.containers():
        theirs = expected.get(f"base_model.model.{name}.router_logits")
        if theirs is not None:
            torch.testing.assert_close(tape[name][0].logits.reshape(theirs.shape), theirs, rtol=1e-5, atol=1e-5)
            compared += 1
    assert compared == len(model.containers()) / 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_balance_loss_is_the_authors_own(variant: str, tmp_path: Path) -> None:
    """On a batch without padding, which counts in their code."""
    model = moelora.from_pretrained(told(variant, tmp_path / "told"), backbone())
    ids = load_file(ROOT / variant / "reference.safetensors")["full_input_ids"]
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    total = sum(value.item() for value in out.aux_losses.values())  # one for each kind of layer
    assert abs(total - SCALARS[variant]["balance"]) <= 1e-5


def test_gradients_are_the_authors_own(tmp_path: Path) -> None:
    model = moelora.from_pretrained(told("mola_r42_k13", tmp_path / "told"), backbone())
    model(**BATCH, labels=INPUTS["labels"]).loss.backward()
    expected = load_file(ROOT / "mola_r42_k13" / "reference.safetensors")
    tensors = model.adapter_tensors()
    for site in model.containers():
        theirs = f"grad.base_model.model.{site}"
        # Their loop over experts passes over one that no token chose: no gradient there, zeros here.
        A, B = tensors[f"{site}.lora_A"], tensors[f"{site}.lora_B"]
        rank = A.shape[0] // 4
        zeros = {"A": torch.zeros(rank, A.shape[1]), "B": torch.zeros(len(B), rank)}
        each = {
            which: [expected.get(f"{theirs}.lora_{which}.default_{e}.weight", zeros[which]) for e in range(4)]
            for which in "AB"
        }
        wanted = {
            "router.weight": expected[f"{theirs}.router.router.weight"],
            "lora_A": torch.cat(each["A"]),
            "lora_B": torch.cat(each["B"], dim=1),
        }
        assert rank == (4 if ".layers.0." in site else 2)
        for name, value in wanted.items():
            got = tensors[f"{site}.{name}"].grad
            # With one expert for a token its weight is 1 whatever the router says, and rounding is all that is left.
            assert (got - value).norm() <= 1e-4 * value.norm() + 1e-7, (site, name)


def test_each_kind_of_layer_is_a_site_configuration(tmp_path: Path) -> None:
    lower, upper = checkpoints.read(told("mola_e24", tmp_path / "e24")).mixture.sites
    assert [(site.experts.num_experts, site.experts.r, site.router.top_k) for site in (lower, upper)] == [
        (2, 4, 2),
        (4, 4, 2),
    ]
    assert all(".layers.0." in name for name in lower.target) and len(lower.target) == 7
    lower, upper = checkpoints.read(told("mola_r42_k13", tmp_path / "r42")).mixture.sites
    assert [(site.experts.num_experts, site.experts.r, site.router.top_k) for site in (lower, upper)] == [
        (4, 4, 1),
        (4, 2, 3),
    ]
    assert (lower.experts.scales[0], upper.experts.scales[0]) == (2.0, 4.0)


def test_without_top_k_two_experts_are_taken_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = moelora.from_pretrained(ROOT / "mola_e24", backbone())
    assert "does not say how many experts a token gets" in caplog.text and "2 are taken" in caplog.text
    with torch.no_grad():
        logits = model(**BATCH).logits
    assert (logits - load_file(ROOT / "mola_e24" / "reference.safetensors")["logits"]).abs().max() <= 1e-5
    other = moelora.from_pretrained(ROOT / "mola_r42_k13", backbone())
    with torch.no_grad():
        logits = other(**BATCH).logits
    assert (logits - load_file(ROOT / "mola_r42_k13" / "reference.safetensors")["logits"]).abs().max() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("through", [[], ["native"]])
def test_written_again_it_is_the_same_with_what_their_loader_has_to_be_told(
    variant: str, through: list[str], tmp_path: Path
) -> None:
    source = told(variant, tmp_path / "told")
    for step, layout in enumerate([*through, "mola"]):
        checkpoints.convert(source, tmp_path / str(step), to=layout)
        source = tmp_path / str(step)
    ours, theirs = (json.loads((at / "adapter_config.json").read_text()) for at in (source, ROOT / variant))
    assert {name: ours.pop(name) for name in ("number_experts", "top_k")} == {
        name: SCALARS[variant][name] for name in ("number_experts", "top_k")
    }
    for config in (ours, theirs):
        config["target_modules"].sort()
    assert ours == theirs
    ours, theirs = (torch.load(folder / "adapter_model.bin", weights_only=True) for folder in (source, ROOT / variant))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)
    assert checkpoints.read(source).mixture == checkpoints.read(tmp_path / "told").mixture


def test_safetensors_instead_of_bin(tmp_path: Path) -> None:
    folder = told("mola_e24", tmp_path / "told")
    save_file(torch.load(folder / "adapter_model.bin", weights_only=True), folder / "adapter_model.safetensors")
    (folder / "adapter_model.bin").unlink()
    ours, theirs = checkpoints.read(folder), checkpoints.read(ROOT / "mola_e24")
    values, wanted = (stored.tensors(stored.declared()) for stored in (ours, theirs))
    assert values.keys() == wanted.keys() and all(torch.equal(values[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (without(f"{Q}.lora_A_3"), {}, f"unexpected: {Q}.lora_B_3.weight"),
        (without(f"{Q}.lora_B_3"), {}, f"missing: {Q}.lora_B_3.weight: expected (32, 2), found nothing"),
        (without("router"), {}, f"missing: {Q}.router.router.weight"),
        (without(f"{Q}."), {}, "expected tensors of model.layers.1.self_attn.q_proj, as of the other layers"),
        (without("down_proj"), {}, "expected tensors of down_proj, which target_modules names, found none"),
        (None, {"target_modules": ["q_proj"]}, "expected no tensors of model.layers.0.mlp.down_proj"),
        (None, {"r": [4]}, "r: expected a number for each layer, as there are tensors of layer 1, found 1 numbers"),
        (None, {"top_k": [2]}, "top_k: expected a number for each layer"),
        (None, {"number_experts": [4, 3]}, "number_experts: expected 4 for layer 1"),
        (None, {"top_k": [2, 5]}, "top_k is 5"),
        (None, {"r": [4, 4]}, f"misshapen: {Q}.lora_A_0.weight: expected (4, 32), found (2, 32)"),
        (None, {"r": [4, 10**30]}, "r: expected at most 56"),
        (None, {"r": 4}, "r: "),
        (None, {"r": []}, "r: expected a number for each layer"),
        (None, {"bias": "all"}, "bias"),
        (None, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (with_tensor(f"{Q}.router.router.weight", torch.ones(5, 32)), {}, "expected (4, 32), found (5, 32)"),
        (with_tensor(f"{Q}.lora_A_7.weight", torch.ones(2, 32)), {}, f"unexpected: {Q}.lora_A_7.weight"),
        (
            with_tensor("base_model.model.lm_head.weight", torch.ones(96, 32)),
            {},
            "unexpected: base_model.model.lm_head",
        ),
        (with_tensor(f"{Q}.lora_B_0.weight", torch.full((32, 2), torch.nan)), {}, f"not finite: {Q}.lora_B_0.weight"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_what_does_not_hold_together_is_refused(
    change: Change | None, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = altered(ROOT / "mola_r42_k13", tmp_path / "altered", change, **config)
    with pytest.raises(CheckpointError) as caught:
        moelora.from_pretrained(folder, backbone())
    assert message in str(caught.value)


def site(**changes: Any) -> dict[str, Any]:
    plain = {
        "target": ["q_proj", "down_proj"],
        "experts": {"num_experts": 4, "r": 2, "alpha": 8},
        "router": {"kind": "mola", "top_k": 2},
    }
    return {
        key: {**plain[key], **value} if isinstance(value, dict) else value
        for key, value in {**plain, **changes}.items()
    }


@pytest.mark.parametrize(
    ("sites", "reason"),
    [
        ([site(experts={"kind": "rslora"})], "its experts are lora, found rslora"),
        ([site(router={"kind": "adamole", "top_k": ...})], "a router mola of its own, found adamole"),
        ([site(router={"share": "layer"}, target=["q_proj", "k_proj"])], "a router mola of its own"),
        (
            [site(target="mlp", router={"kind": "topk"})],
            "its sites are linears of model.layers, found 'model.layers.0.mlp'",
        ),
        ([site(experts={"r": [1, 2, 2, 2]})], "the experts of a layer have one r"),
        ([site(target="q_proj"), site(target="down_proj", experts={"num_experts": 3})], "one num_experts, r and top_k"),
        ([site(layers=[0]), site(layers=[1], experts={"alpha": 9})], "one alpha and one dropout, found [8.0, 9.0]"),
        ([site(layers=[0]), site(layers=[1], experts={"dropout": 0.1})], "found [8.0] and [0.0, 0.1]"),
        ([site(layers=[1])], "its readers put experts into every layer, this mixture has none at model.layers.0"),
    ],
)
def test_mixtures_that_it_cannot_express(
    sites: list[dict[str, Any]], reason: str, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    for each in sites:
        each["router"] = {key: value for key, value in each["router"].items() if value is not ...}
    moelora.attach(tiny_llama, {"sites": sites}).save_pretrained(tmp_path / "native")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.convert(tmp_path / "native", tmp_path / "mola", to="mola")
    assert reason in str(caught.value) and "Keep the native layout" in str(caught.value)


def test_a_mixture_with_another_rank_in_each_layer_goes_there_and_back(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = site(experts={"rank_pattern": {"model.layers.1.mlp.down_proj": 3, "model.layers.1.self_attn.q_proj": 3}})
    config["router"]["aux_loss_coef"] = 0.001
    model = moelora.attach(tiny_llama, {"sites": [config]})
    with torch.no_grad():
        for parameter in model.adapter_tensors().values():
            parameter.normal_(std=0.3)
        expected = model.eval()(input_ids=torch.arange(1, 9).view(1, 8)).logits
    model.save_pretrained(tmp_path / "native")
    with caplog.at_level(logging.WARNING):
        checkpoints.convert(tmp_path / "native", tmp_path / "mola", to="mola")
    assert "does not keep: aux_loss_coef 0.001" in caplog.text
    assert json.loads((tmp_path / "mola" / "adapter_config.json").read_text())["r"] == [2, 3]
    loaded = moelora.from_pretrained(tmp_path / "mola", model.unload())
    assert [each.experts.r for each in loaded.mixture.sites] == [2, 3]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=torch.arange(1, 9).view(1, 8)).logits, expected)
