"""MixLoRA's layout against what the reference code saved and computed."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

import moelora
from moelora import checkpoints
from moelora.errors import CheckpointError

VARIANTS = ["mixlora", "mixlora_dynamic", "mixlora_switch", "mixlora_partial_ffn"]


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "adapter_model.bin"
    torch.save(change(torch.load(path, weights_only=True)), path)


def as_generation(tensors: dict[str, Tensor], generation: int) -> dict[str, Tensor]:
    """Generation 2 under the names of an older one."""
    old = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}
    result = {}
    for key, value in tensors.items():
        parts = key.split(".")
        if parts[3] == "mlp" and parts[4] == "moe_gate":
            parts[3:5] = ["gate"]
        elif parts[3] == "mlp":
            name = old[parts[4]] if generation == 0 else parts[4]
            parts[3:7] = ["experts", parts[6], name]
        result[".".join(parts)] = value
    return result


@torch.no_grad()
def block_by_hand(
    mlp: nn.Module, x_TD: Tensor, tensors: dict[str, Tensor], layer: int, config: dict[str, Any]
) -> Tensor:
    """The block's definition, token by token and expert by expert, straight from the file's tensors."""
    options = {**config, **config.get("expert_lora", {})}
    r = options["r"]
    scale = options["lora_alpha"] / (math.sqrt(r) if options.get("use_rslora") else r)
    prefix = f"mixlora.layers.{layer}.mlp"

    def adapted(name: str, expert: int, x: Tensor) -> Tensor:
        y = mlp.get_submodule(name)(x)
        key = f"{prefix}.{name}.experts.{expert}"
        if f"{key}.lora_A.weight" in tensors:
            y = y + scale * tensors[f"{key}.lora_B.weight"] @ (tensors[f"{key}.lora_A.weight"] @ x)
        return y

    rows = []
    for x in x_TD:
        probs = (tensors[f"{prefix}.moe_gate.weight"] @ x).softmax(-1)
        weights, chosen = probs.topk(config["top_k"])
        y = torch.zeros_like(x)
        for weight, expert in zip(weights / weights.sum(), chosen.tolist(), strict=True):
            a = F.silu(adapted("gate_proj", expert, x)) * adapted("up_proj", expert, x)
            y += weight * adapted("down_proj", expert, a)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_reference(variant: str, fixtures: Path, reference_backbone: PreTrainedModel) -> None:
    inputs = load_file(fixtures / "inputs.safetensors")
    expected = load_file(fixtures / variant / "reference.safetensors")["logits"]
    model = moelora.from_pretrained(fixtures / variant, backbone=reference_backbone)
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    # Padding takes room in the reference's queues of the switch router, and none in ours.
    rows = inputs["attention_mask"].bool() if variant == "mixlora_switch" else slice(None)
    assert (logits[rows] - expected[rows]).abs().max() <= 1e-5


def test_greedy_tokens_are_those_of_the_published_package(fixtures: Path, reference_backbone: PreTrainedModel) -> None:
    expected = load_file(fixtures / "mixlora" / "reference_hf_package.safetensors")
    model = moelora.from_pretrained(fixtures / "mixlora", backbone=reference_backbone)
    prompts = expected["greedy_prompts"]
    tokens = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=10,
        min_new_tokens=10,  # their run kept the end token out as well
        do_sample=False,
        suppress_tokens=[0],
    )
    assert torch.equal(tokens, expected["greedy_outputs"])


def test_generation_0_is_generation_2(fixtures: Path) -> None:
    new, old = checkpoints.read(fixtures / "mixlora"), checkpoints.read(fixtures / "mixlora_legacy_gen0_w123")
    assert (new.detail, old.detail) == ("generation 2", "generation 0")
    assert new.mixture == old.mixture
    ours, theirs = new.tensors(new.declared()), old.tensors(old.declared())
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("generation", [0, 1])
def test_legacy_names(generation: int, mixlora: Path, fixtures: Path) -> None:
    retensor(mixlora, lambda tensors: as_generation(tensors, generation))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    targets += ["w1_proj", "w2_proj", "w3_proj"] if generation == 0 else ["gate_proj", "down_proj", "up_proj"]
    edit(mixlora, routing_strategy="mixtral", target_modules=targets)
    if generation == 0:  # the renaming itself, against the file of the reference repository
        saved = torch.load(fixtures / "mixlora_legacy_gen0_w123" / "adapter_model.bin", weights_only=True)
        assert set(saved) == set(torch.load(mixlora / "adapter_model.bin", weights_only=True))
    old, new = checkpoints.read(mixlora), checkpoints.read(fixtures / "mixlora")
    assert old.detail == f"generation {generation}" and old.mixture == new.mixture
    ours, theirs = old.tensors(old.declared()), new.tensors(new.declared())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_legacy_switch(mixlora: Path) -> None:
    retensor(mixlora, lambda tensors: as_generation(tensors, 1))
    edit(mixlora, routing_strategy="switch", top_k="absent", expert_capacity=5, sparse_step=None)
    router = checkpoints.read(mixlora).mixture.sites[0].router
    assert (router.kind, router.expert_capacity) == ("switch", 5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"task_type": None},
        {"task_type": "QUESTION_ANS"},
        {"act_fn": "absent"},
        {"lora_dropout": 0.0},
        {"use_rslora": True},
        {"expert_lora": {"r": 2, "lora_alpha": 8, "bias": "none", "lora_dropout": 0.05}},
        {"expert_lora": {"lora_alpha": 6, "use_rslora": True}},
        {"use_rslora": True, "expert_lora": {"use_rslora": False}},
        {"top_k": 3},
        {
            "target_modules": dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], True)
            | {"up_proj": False}
        },
    ],
    ids=str,
)
def test_block_output(
    changes: dict[str, Any], mixlora: Path, fixtures: Path, reference_backbone: PreTrainedModel
) -> None:
    """What the published loader refuses or ignores: task_type null, no act_fn, no dropout, expert_lora."""
    edit(mixlora, **changes)
    r = changes.get("expert_lora", {}).get("r", 4)
    kept = changes.get("target_modules")

    def shrink(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        result = {}
        for key, value in tensors.items():
            if ".experts." in key:
                value = value[:r] if "lora_A" in key else value[:, :r].contiguous()
            if kept is None or "moe_gate" in key or kept.get(key.split(".")[4]):
                result[key] = value
        return result

    retensor(mixlora, shrink)
    tensors = torch.load(mixlora / "adapter_model.bin", weights_only=True)
    config = json.loads((mixlora / "adapter_config.json").read_text())
    x_TD = load_file(fixtures / "mixlora" / "reference.safetensors")["layers.1.mlp_in"].reshape(-1, 32)
    plain = reference_backbone.get_submodule("model.layers.1.mlp")
    expected = block_by_hand(plain, x_TD, tensors, 1, config)
    if not changes:
        reference = load_file(fixtures / "mixlora" / "reference.safetensors")["layers.1.mlp_out"].reshape(-1, 32)
        assert (expected - reference).abs().max() <= 1e-5
    model = moelora.from_pretrained(mixlora, backbone=reference_backbone)
    with torch.no_grad():
        assert (model.containers()["model.layers.1.mlp"](x_TD) - expected).abs().max() <= 1e-5


def test_attention_keeps_the_main_options_beside_expert_lora(mixlora: Path) -> None:
    edit(mixlora, use_rslora=True, expert_lora={"lora_alpha": 6, "use_rslora": False, "lora_dropout": 0.2})
    block, attention = checkpoints.read(mixlora).mixture.sites
    assert (block.experts.kind, block.experts.alpha, block.experts.dropout) == ("lora", 6, 0.2)
    assert (attention.experts.kind, attention.experts.alpha, attention.experts.dropout) == ("rslora", 8, 0.05)


def test_defaults_are_those_of_the_reference_loader(fixtures: Path, mixlora: Path) -> None:
    topk, switch = (checkpoints.read(fixtures / name).mixture.sites[0].router for name in ("mixlora", "mixlora_switch"))
    assert (topk.aux_loss_coef, topk.init_std, topk.jitter, topk.z_loss_coef) == (0.001, 0.02, 0.0, 0.0)
    assert (switch.aux_loss_coef, switch.init_std, switch.jitter, switch.z_loss_coef) == (0.001, 1.0, 0.01, 0.001)
    edit(mixlora, router_loss=False, router_aux_loss_coef=0.5)
    assert checkpoints.read(mixlora).mixture.sites[0].router.aux_loss_coef == 0.0


def test_safetensors_instead_of_bin(mixlora: Path, fixtures: Path) -> None:
    tensors = torch.load(mixlora / "adapter_model.bin", weights_only=True)
    (mixlora / "adapter_model.bin").unlink()
    save_file({key: value.detach() for key, value in tensors.items()}, mixlora / "adapter_model.safetensors")
    stored, expected = checkpoints.read(mixlora), checkpoints.read(fixtures / "mixlora")
    values, wanted = stored.tensors(stored.declared()), expected.tensors(expected.declared())
    assert all(torch.equal(values[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_read_is_written_bit_for_bit(variant: str, fixtures: Path, tmp_path: Path) -> None:
    checkpoints.convert(fixtures / variant, tmp_path / "native", to="native")
    checkpoints.convert(tmp_path / "native", tmp_path / "again", to="native")
    with pytest.raises(CheckpointError, match="act_fn"):  # a MixLoRA file knows it, and so does what was made of it
        _forget_act(tmp_path / "again")
        checkpoints.convert(tmp_path / "again", tmp_path / "lost", to="mixlora")
    checkpoints.convert(tmp_path / "native", tmp_path / "back", to="mixlora")
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["adapter_config.json", "adapter_model.bin"]
    for name in ("adapter_config.json", "adapter_model.bin"):
        assert (tmp_path / "back" / name).read_bytes() == (fixtures / variant / name).read_bytes()


def _forget_act(folder: Path) -> None:
    path = folder / "moelora_config.json"
    values = json.loads(path.read_text())
    assert values["architecture"].pop("hidden_act") == "silu"
    path.write_text(json.dumps(values))
    checkpoints.manifest.write(folder)


def test_options_that_the_reference_does_not_write(make_model: Any, tmp_path: Path) -> None:
    """Kept where they differ from what its loader assumes; what its loader does with them is said in a warning."""
    model = make_model()  # attention: rslora, dropout 0.1; experts: lora, alpha 4; aux_loss_coef 0.01
    model.save_pretrained(tmp_path / "native")
    checkpoints.convert(tmp_path / "native", tmp_path / "mixlora", to="mixlora")
    config = json.loads((tmp_path / "mixlora" / "adapter_config.json").read_text())
    assert config["router_aux_loss_coef"] == 0.01 and "router_init_range" not in config and config["use_rslora"]
    assert config["expert_lora"] == {"use_rslora": False, "bias": "none", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0}
    stored = checkpoints.read(tmp_path / "mixlora")
    ours = stored.tensors(stored.declared())
    assert all(torch.equal(ours[name], value) for name, value in model.adapter_state().items())
    assert [site.experts for site in stored.mixture.sites] == [site.experts for site in model.mixture.sites]
    assert stored.mixture.sites[0].router == model.mixture.sites[0].router


def test_warnings_of_a_conversion(make_model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_model().save_pretrained(tmp_path / "native")
    with caplog.at_level(logging.WARNING):
        checkpoints.convert(tmp_path / "native", tmp_path / "mixlora", to="mixlora")
    assert "ignores expert_lora" in caplog.text and "refuses lora_dropout 0.0" in caplog.text


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("family", "attention", "ffn"),
    [
        (lambda: PhiForCausalLM(PhiConfig(**SMALL)), ["q_proj", "k_proj", "v_proj", "dense"], ["fc1", "fc2"]),
        (lambda: Phi3ForCausalLM(Phi3Config(**SMALL)), ["qkv_proj", "o_proj"], ["gate_up_proj", "down_proj"]),
    ],
    ids=["phi", "phi3"],
)
def test_families_with_names_of_their_own(
    family: Callable[[], PreTrainedModel], attention: list[str], ffn: list[str], tmp_path: Path
) -> None:
    backbone = family().eval()
    sites = [
        {
            "target": "mlp",
            "experts": {"kind": "lora", "num_experts": 3, "r": 2, "dropout": 0.1},
            "router": {"kind": "topk", "top_k": 2},
        },
        {"target": attention, "experts": {"kind": "lora", "num_experts": 1, "r": 2, "dropout": 0.1}},
    ]
    model = moelora.attach(backbone, {"sites": sites}).eval()
    with torch.no_grad():
        for parameter in model.adapter_tensors().values():
            parameter.normal_(std=0.2)
        tokens = torch.arange(1, 9).view(1, 8)
        expected = model(input_ids=tokens).logits
    model.save_pretrained(tmp_path / "native")
    checkpoints.convert(tmp_path / "native", tmp_path / "mixlora", to="mixlora")
    config = json.loads((tmp_path / "mixlora" / "adapter_config.json").read_text())
    assert config["target_modules"] == attention + ffn and config["act_fn"] == backbone.config.hidden_act
    torch.manual_seed(0)  # as the autouse fixture had it when `backbone` was made
    loaded = moelora.from_pretrained(tmp_path / "mixlora", backbone=family().eval())
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, expected)


def _site(**changes: Any) -> dict[str, Any]:
    site: dict[str, Any] = {
        "target": "mlp",
        "experts": {"kind": "lora", "num_experts": 4, "r": 2},
        "router": {"kind": "topk", "top_k": 2},
    }
    for key, value in changes.items():
        site[key] = {**site[key], **value} if isinstance(value, dict) else value
    return site


@pytest.mark.parametrize(
    ("sites", "reason"),
    [
        ([_site(target=["gate_proj"])], "no place for ['mlp.gate_proj']"),
        ([_site(layers=[0])], "adapts every one of the 2 layers, this mixture has mlp in 1"),
        (
            [_site(layers=[0]), _site(layers=[1])],
            "needs one site configuration on the FFN blocks (mlp), this mixture has 2",
        ),
        ([_site(target=["q_proj"])], "plain LoRA on attention, this mixture has routed experts there"),
        ([_site(experts={"r": [1, 2, 3, 4]})], "same r and alpha, found several"),
        ([_site(experts={"alpha": [1, 2, 3, 4]})], "same r and alpha, found several"),
        ([_site(router={"normalize": False})], "top-k weights are normalised"),
        ([_site(router={"kind": "topp", "normalize": True, "top_k": None})], "top-p weights are not normalised"),
        (
            [_site(router={"kind": "switch", "expert_capacity": None, "top_k": None})],
            "has an expert_capacity, found none",
        ),
        ([{"target": "mlp", "experts": {"num_experts": 1, "r": 2}}], "FFN blocks have a router, found none"),
        ([_site(experts={"r": 2, "rank_pattern": {"0.mlp": 3}})], "no r and no alpha for single layers"),
        (
            [_site(), {"target": "q_proj", "experts": {"num_experts": 1, "r": 2, "alpha_pattern": {"q_proj": 7}}}],
            "no r and no alpha for single layers",
        ),
        (
            [
                _site(),
                {"target": "q_proj", "experts": {"num_experts": 1, "r": 2}},
                {"target": "k_proj", "experts": {"num_experts": 1, "r": 3}},
            ],
            "one kind, r, alpha and dropout for all of attention",
        ),
    ],
)
def test_mixtures_that_mixlora_cannot_express(
    sites: list[dict[str, Any]], reason: str, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    for site in sites:
        site["router"] = {k: v for k, v in site["router"].items() if k != "top_k" or v} if "router" in site else None
    moelora.attach(tiny_llama, {"sites": sites}).save_pretrained(tmp_path / "native")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.convert(tmp_path / "native", tmp_path / "mixlora", to="mixlora")
    assert reason in str(caught.value) and "Keep the native layout" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native"]


@pytest.mark.parametrize(("act", "refused"), [("relu", True), ("gelu", False)])
def test_act_fn_must_be_the_backbones(
    act: str, refused: bool, mixlora: Path, tiny_config: LlamaConfig, caplog: pytest.LogCaptureFixture
) -> None:
    edit(mixlora, act_fn=act)
    tiny_config.hidden_act = "gelu_pytorch_tanh"
    stored = checkpoints.read(mixlora)
    if refused:
        with pytest.raises(CheckpointError, match="hidden_act: expected relu, found gelu_pytorch_tanh"):
            stored.check_backbone(tiny_config)
    else:  # Gemma's configurations named the exact GELU for years while its code used the approximation
        with caplog.at_level(logging.WARNING):
            stored.check_backbone(tiny_config)
        assert "gelu" in caplog.text
