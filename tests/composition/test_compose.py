"""Mixtures of PEFT's adapters against numbers of PEFT 0.21.2, against stock PEFT, and against each adapter alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from compose_cases import ARROW, BASE, LORA, by_hand, digest, files_digest, logits, random_lora, tiny_backbone
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import moelora
from moelora.composition.adapter import Adapter, Factors
from moelora.composition.general import subtract_general
from moelora.errors import CheckpointError, ConfigError, UserError
from moelora.registry import ROUTERS

# PEFT 0.21.2 reads what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

NAMES = ["plain_r4_a8", "plain_r4_a8_second", "rslora_r4_a8", "alllinear_r2_a4", "rankpattern"]
ARROW_IO = load_file(ARROW / "io.safetensors")


def zoo() -> list[Adapter]:
    """Adapters that differ in rank, scale, modules, and in rank and scale between modules."""
    return [by_hand(LORA / name) for name in NAMES]


def peft_logits(name: str) -> Tensor:
    return logits(PeftModel.from_pretrained(tiny_backbone(), LORA / name))


# -- what the experts are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_one_expert_alone_is_its_adapter_in_stock_peft(name: str) -> None:
    weights = [float(other == name) for other in NAMES]
    model = moelora.compose(zoo(), "static", tiny_backbone(), weights=weights)
    expected = peft_logits(name)
    assert (logits(model) - expected).abs().max() <= 1e-6
    assert (logits(tiny_backbone()) - expected).abs().max() > 1e-2


def test_an_even_mix_is_the_concatenation_of_stock_peft() -> None:
    peft: Any = PeftModel.from_pretrained(tiny_backbone(), LORA / NAMES[0], adapter_name=NAMES[0])
    for name in NAMES[1:3]:
        peft.load_adapter(LORA / name, adapter_name=name)
    peft.add_weighted_adapter(NAMES[:3], [1 / 3] * 3, "mix", combination_type="cat")
    peft.set_adapter("mix")
    model = moelora.compose(zoo()[:3], "static", tiny_backbone(), weights="uniform")
    assert (logits(model) - logits(peft)).abs().max() <= 1e-6


def test_the_order_of_the_adapters_is_of_no_matter() -> None:
    some = zoo()
    forward = logits(moelora.compose(some, "static", tiny_backbone(), weights=[0.1, 0.2, 0.3, 0.4, 0.5]))
    backward = logits(moelora.compose(some[::-1], "static", tiny_backbone(), weights=[0.5, 0.4, 0.3, 0.2, 0.1]))
    assert (forward - backward).abs().max() <= 1e-6
    arrow = logits(moelora.compose(some[:3], "arrow", tiny_backbone(), top_k=2))
    worra = logits(moelora.compose(some[2::-1], "arrow", tiny_backbone(), top_k=2))
    assert (arrow - worra).abs().max() <= 1e-6
    assert (arrow - forward).abs().max() > 1e-3


def test_ranks_scales_and_names_are_in_one_site_configuration() -> None:
    model = moelora.compose(zoo(), "static", tiny_backbone(), weights="uniform")
    [site] = model.mixture.sites
    assert sorted(site.target) == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    experts = site.experts
    assert (experts.kind, experts.names) == ("frozen", NAMES)
    for module, container in model.containers().items():
        there = [adapter.factors.get(module) for adapter in zoo()]
        assert container.site.ranks == tuple(0 if factors is None else factors.rank for factors in there)
        scales = [1.0 if factors is None else factors.scale for factors in there]
        assert list(container.site.scales) == pytest.approx(scales, rel=1e-15), module
    special = experts.at("model.layers.1.self_attn.q_proj")
    assert special.ranks == (4, 4, 4, 2, 2) and special.scales == (2, 2, 4, 2, 8)


def test_the_model_is_in_evaluation_mode_whatever_the_backbone_was_in() -> None:
    model = moelora.compose(zoo(), "arrow", tiny_backbone().train(), experts={"dropout": 0.5})
    assert not any(module.training for module in model.modules())
    assert model.mixture.sites[0].experts.dropout == 0.5


def test_a_module_that_only_some_layers_have_is_a_site_there_only() -> None:
    adapters = [random_lora("a", 1, {"q_proj": 2}), random_lora("b", 2, {"q_proj": 3, "v_proj": 1})]
    first = {m: f for m, f in adapters[1].factors.items() if "layers.0" in m or "q_proj" in m}
    adapters[1] = Adapter("b", first, adapters[1].backbone, adapters[1].architecture)
    model = moelora.compose(adapters, "arrow", tiny_backbone())
    assert sorted(model.containers()) == sorted(
        ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    )


def test_factors_of_rank_0_are_none() -> None:
    empty = Factors(torch.zeros(0, 32), torch.zeros(16, 0), 1.0)
    v = "model.layers.0.self_attn.v_proj"
    pair = [random_lora("a", 1, {"q_proj": 2}), random_lora("b", 2, {"q_proj": 3})]
    with_empty = [Adapter(a.name, {**a.factors, v: empty}, *_said(a)) for a in pair]
    assert list(moelora.compose(with_empty, "arrow", tiny_backbone()).containers()) == list(pair[0].factors)


def test_what_an_adapter_lacks_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "moelora"):
        moelora.compose(zoo()[2:4], "arrow", tiny_backbone())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "'rslora_r4_a8' has nothing at 10 of 14 sites (2 x k_proj, 2 x o_proj" in said[0]


# -- from files --------------------------------------------------------------------------------------------------------


def test_folders_of_peft_are_read_and_named_as_they_are() -> None:
    model = moelora.compose([LORA / name for name in NAMES], "arrow", tiny_backbone())
    by_reader = moelora.compose(zoo(), "arrow", tiny_backbone())
    assert model.mixture == by_reader.mixture and model.mixture.sites[0].experts.names == NAMES
    assert all(torch.equal(v, by_reader.adapter_tensors()[name]) for name, v in model.adapter_tensors().items())


@pytest.mark.parametrize("target", ["mlp", ["q_proj", "up_proj"]])
def test_an_always_on_expert_is_an_adapter_in_a_block_as_at_linears(target: Any, tmp_path: Path) -> None:
    site = {"target": target, "experts": {"kind": "rslora", "num_experts": 1, "r": 3, "alpha": 4}}
    alone = moelora.attach(tiny_backbone(), {"sites": [site]})
    for value in alone.adapter_tensors().values():
        value.data.normal_(std=0.3)
    alone.save_pretrained(tmp_path / "my first.lora")
    adapters = [tmp_path / "my first.lora", by_hand(LORA / NAMES[0])]
    model = moelora.compose(adapters, "static", tiny_backbone(), weights=[1.0, 0.0])
    assert (logits(model) - logits(alone)).abs().max() < 1e-5
    assert (logits(tiny_backbone()) - logits(alone)).abs().max() > 1e-2
    assert model.mixture.sites[0].experts.names == ["my first.lora", NAMES[0]]


def test_a_mixture_is_no_adapter(tmp_path: Path) -> None:
    moelora.compose(zoo()[:2], "arrow", tiny_backbone()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected plain LoRA.*found 4 sites with 2 experts of kind frozen"):
        moelora.compose([LORA / NAMES[0], tmp_path], "arrow", tiny_backbone())


# -- routers -----------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "top1_T1": {"top_k": 1},
    "top2_T1": {"top_k": 2},
    "top3_T05": {"top_k": 3, "temperature": 0.5},
    "top2_gks": {"top_k": 2},
}


def arrow(name: str, **options: Any) -> moelora.MoELoRAModel:
    tasks = [by_hand(ARROW / f"task_{index}") for index in range(4)]
    general = [by_hand(ARROW / f"gen_{index}") for index in range(2)] if name == "top2_gks" else []
    return moelora.compose(
        tasks, "arrow", tiny_backbone(), general=general, subtract="peft_factors", **OPTIONS[name], **options
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_arrow_with_the_prototypes_of_peft_has_its_logits(name: str) -> None:
    model = arrow(name)
    for module, container in model.containers().items():
        container.router.prototypes.copy_(ARROW_IO[f"{name}.proto.base_model.model.{module}"])
    assert (logits(model) - ARROW_IO[f"{name}.logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", OPTIONS)
def test_arrow_finds_the_prototypes_of_peft_by_itself(name: str) -> None:
    model = arrow(name, method="power", seed=42)
    assert (logits(model) - ARROW_IO[f"{name}.logits"]).abs().max() < 1e-5


def test_prototypes_are_exact_by_default_and_saved(tmp_path: Path) -> None:
    model = arrow("top2_T1")
    for module, container in model.containers().items():
        for index in range(4):
            factors = by_hand(ARROW / f"task_{index}").factors[module]
            exact = torch.linalg.svd(factors.B.double() @ factors.A.double()).Vh[0]
            assert (container.router.prototypes[index].double() @ exact).abs() == pytest.approx(1, abs=1e-6)
    model.save_pretrained(tmp_path)
    again = moelora.from_pretrained(tmp_path, backbone=tiny_backbone())
    assert torch.equal(logits(again), logits(model))
    assert again.mixture == model.mixture and again.mixture.sites[0].experts.names == [f"task_{i}" for i in range(4)]


def test_the_task_of_a_sequence_chooses_its_adapter() -> None:
    names = NAMES[:3]
    model = moelora.compose(zoo()[:3], "mask", tiny_backbone(), by="task")
    each = torch.stack([peft_logits(name) for name in names])
    ids = torch.arange(len(each[0])) % 3
    found = logits(model, task_ids=ids)
    for row, task in enumerate(ids.tolist()):
        assert (found[row] - each[task, row]).abs().max() <= 1e-6
        assert (found[row] - each[(task + 1) % 3, row]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [name for name in ROUTERS if ROUTERS.get(name).level == "expert"])
def test_every_router_that_weighs_experts_composes_generates_and_is_saved(kind: str, tmp_path: Path) -> None:
    adapters = [random_lora("a", 1, {"q_proj": 2, "v_proj": 2}), random_lora("b", 2, {"q_proj": 2, "v_proj": 2})]
    context = {"task_ids": torch.tensor([0, 1]), "modality_mask": torch.zeros(2, 4, dtype=torch.long)}
    model = moelora.compose(adapters, kind, tiny_backbone())
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    fields = context if kind == "mask" else {"task_ids": context["task_ids"]}
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, **fields
    )
    assert made.shape == (2, 7)
    model.save_pretrained(tmp_path)
    again = moelora.from_pretrained(tmp_path, backbone=tiny_backbone())
    assert all(torch.equal(value, again.adapter_tensors()[name]) for name, value in model.adapter_tensors().items())


@pytest.mark.parametrize("kind", [name for name in ROUTERS if ROUTERS.get(name).level == "rank"])
def test_a_router_of_single_ranks_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"weighs single ranks.*choose one of.*arrow"):
        moelora.compose(zoo(), kind, tiny_backbone())


def test_defaults_fit_the_number_of_adapters() -> None:
    router = moelora.compose(zoo()[:2], "arrow", tiny_backbone()).mixture.sites[0].router
    assert router.top_k == 2
    assert moelora.compose(zoo(), "arrow", tiny_backbone()).mixture.sites[0].router.top_k == 3
    assert moelora.compose(zoo(), "task", tiny_backbone()).mixture.sites[0].router.num_tasks == 5
    with pytest.raises(ConfigError, match="top_k is 3 but there are 2 experts"):
        moelora.compose(zoo()[:2], "arrow", tiny_backbone(), top_k=3)


def test_an_untrained_router_is_said_to_be_one(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "moelora"):
        moelora.compose(zoo()[:2], "topk", tiny_backbone())
    assert "has 256 parameters that nothing has trained yet" in caplog.text
    caplog.clear()
    moelora.compose(zoo()[:2], "arrow", tiny_backbone())
    assert not caplog.records


# -- general knowledge -------------------------------------------------------------------------------------------------


def test_subtraction_is_that_of_updates_with_scales_and_changes_no_input() -> None:
    own = random_lora("own", 1, {"q_proj": 2, "v_proj": 3}, scale=0.5)
    general = [random_lora("g", 2, {"q_proj": 4}, scale=3.0), random_lora("h", 3, {"q_proj": 1, "down_proj": 2})]
    before = [digest(adapter) for adapter in (own, *general)]
    [found] = subtract_general([own], general)
    assert [digest(adapter) for adapter in (own, *general)] == before
    assert list(found.factors) == list(own.factors), "where an adapter has nothing, nothing is taken off"
    for module, factors in found.factors.items():
        common = [g.factors[module] for g in general if module in g.factors]
        mean = sum((f.scale * f.B @ f.A for f in common), torch.zeros(())) / 2
        expected = 0.5 * own.factors[module].B @ own.factors[module].A - mean
        assert torch.allclose(factors.scale * factors.B @ factors.A, expected, atol=1e-5)
        assert factors.rank == own.factors[module].rank + sum(f.rank for f in common)


def test_composing_changes_neither_files_nor_adapters() -> None:
    tasks = [by_hand(ARROW / f"task_{index}") for index in range(4)]
    general = [by_hand(ARROW / "gen_0")]
    before = [digest(adapter) for adapter in (*tasks, *general)], files_digest(ARROW)
    for subtract in ("exact", "peft_factors"):
        model = moelora.compose(tasks, "arrow", tiny_backbone(), general=general, subtract=subtract)
        for value in model.adapter_tensors().values():
            value.data.add_(1.0)
    assert ([digest(adapter) for adapter in (*tasks, *general)], files_digest(ARROW)) == before


def test_the_two_ways_to_subtract_differ_and_peft_needs_equal_ranks() -> None:
    tasks = [by_hand(ARROW / f"task_{index}") for index in range(2)]
    general = [by_hand(ARROW / "gen_0")]
    exact, peft = (
        logits(moelora.compose(tasks, "arrow", tiny_backbone(), general=general, subtract=subtract))
        for subtract in ("exact", "peft_factors")
    )
    assert (exact - peft).abs().max() > 1e-3
    with pytest.raises(ConfigError, match=r"adapter 'a', model\.layers\.0\.self_attn\.q_proj: .*ranks \[2, 3\]"):
        subtract_general([random_lora("a", 1, {"q_proj": 2})], [random_lora("g", 2, {"q_proj": 3})], "peft_factors")
    wide = Adapter("w", {m: Factors(f.A[:, 1:], f.B, 1.0) for m, f in general[0].factors.items()}, *_said(general[0]))
    with pytest.raises(ConfigError, match="general adapter 'w' reads 63 features and writes 32, adapter 'task_0' 64"):
        subtract_general(tasks, [wide])
    with pytest.raises(ConfigError, match="subtract is 'Exact': expected one of exact, peft_factors"):
        subtract_general(tasks, general, "Exact")  # type: ignore[arg-type]


def _said(adapter: Adapter) -> tuple[Any, Any]:
    return adapter.backbone, adapter.architecture


# -- backbones ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["nf4", "fp32"])
def test_on_a_quantised_and_on_a_dense_backbone(backbone_folder: Path, quantization: str, tmp_path: Path) -> None:
    adapters = [random_lora("a", 1, {"q_proj": 2, "down_proj": 1}), random_lora("b", 2, {"q_proj": 3})]
    narrow = [
        Adapter(a.name, {m: Factors(f.A[:, :48], f.B, f.scale) for m, f in a.factors.items()}, *_said(a))
        for a in adapters
    ]
    model = moelora.compose(narrow, "arrow", str(backbone_folder), quantization=quantization)
    kinds = {type(module).__name__ for module in model.modules()}
    assert ("Linear4bit" in kinds) == (quantization == "nf4")
    text = model.tokenizer("hello", return_tensors="pt")
    made = model.generate(**text, max_new_tokens=4, do_sample=False)
    assert made.shape[1] == text["input_ids"].shape[1] + 4
    model.save_pretrained(tmp_path)
    again = moelora.from_pretrained(tmp_path, backbone=str(backbone_folder))
    assert torch.equal(again.generate(**text, max_new_tokens=4, do_sample=False), made)
    with model.disable_experts():
        assert not torch.equal(model(**text).logits, again(**text).logits)


def named(adapter: Adapter, backbone: str) -> Adapter:
    return Adapter(
        adapter.name, adapter.factors, moelora.BackboneConfig(name=backbone, quantization=None), adapter.architecture
    )


def test_backbones_that_disagree_are_both_named(caplog: pytest.LogCaptureFixture) -> None:
    adapters = [named(a, b) for a, b in zip(zoo()[:3], ("some/llama", "other/llama", "unknown"), strict=True)]
    with caplog.at_level(logging.WARNING, "moelora"):
        moelora.compose(adapters, "arrow", tiny_backbone())
    assert "('plain_r4_a8' some/llama, 'plain_r4_a8_second' other/llama)" in caplog.text
    with pytest.raises(ConfigError, match="name 'some/llama' and 'other/llama', so 'auto' cannot tell"):
        moelora.compose(adapters, "arrow", "auto")


def test_a_backbone_is_loaded_only_when_asked_for() -> None:
    adapters = [named(adapter, str(BASE)) for adapter in zoo()[:2]]
    with pytest.raises(ConfigError, match=r"the adapters name '.*tiny_llama_base': pass backbone='auto'"):
        moelora.compose(adapters, "arrow")
    with pytest.raises(ConfigError, match="name no backbone, so 'auto' cannot tell which"):
        moelora.compose([named(adapter, "unknown") for adapter in adapters], "arrow", "auto")
    with pytest.raises(UserError, match="no_such_folder"):
        moelora.compose(adapters, "arrow", "./no_such_folder")


# -- mistakes ----------------------------------------------------------------------------------------------------------


def _changed(adapter: Adapter, module: str, **parts: Any) -> Adapter:
    old = adapter.factors[module]
    factors = Factors(parts.get("A", old.A), parts.get("B", old.B), parts.get("scale", old.scale))
    return Adapter(adapter.name, {**adapter.factors, parts.get("path", module): factors}, *_said(adapter))


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("count", "message"),
    [(0, "two adapters or more, found none"), (1, "two adapters or more, found 'plain_r4_a8'.*from_pretrained")],
)
def test_fewer_than_two_adapters_are_refused(count: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        moelora.compose(zoo()[:count], "arrow", tiny_backbone())


def test_the_same_adapter_twice_is_refused_even_under_two_names() -> None:
    twins = [by_hand(LORA / NAMES[0], "first"), by_hand(LORA / NAMES[0], "second")]
    with pytest.raises(ConfigError, match="'first' and 'second' are the same"):
        moelora.compose(twins, "arrow", tiny_backbone())
    moelora.compose([twins[0], _changed(twins[1], Q, scale=3.0)], "arrow", tiny_backbone())


def test_a_name_is_given_once() -> None:
    pair = [by_hand(LORA / NAMES[0], "lora"), by_hand(LORA / NAMES[1], "lora")]
    with pytest.raises(ConfigError, match="2 adapters are named 'lora': give each a name of its own"):
        moelora.compose(pair, "arrow", tiny_backbone())
    with pytest.raises(ConfigError, match="names lists 1 for 2 adapters"):
        moelora.compose(pair, "arrow", tiny_backbone(), names=["x"])
    model = moelora.compose(pair, "arrow", tiny_backbone(), names=["x", "y"])
    assert model.mixture.sites[0].experts.names == ["x", "y"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.ones(4, 31)}, "q_proj: expected 32 features in and 32 out, found A and B for 31 and 32"),
        ({"B": torch.ones(30, 4)}, "q_proj: expected 32 features in and 32 out, found A and B for 32 and 30"),
        ({"path": "model.layers.7.mlp.up_proj"}, r"layers\.7\.mlp\.up_proj: there is no such module"),
        ({"path": "model.layers.0.mlp"}, r"layers\.0\.mlp: expected a linear, found a module of another kind"),
        ({"scale": -1.0}, r"the scale of .*q_proj is -1\.0, expected a number above 0"),
    ],
)
def test_an_adapter_that_does_not_fit_leaves_the_backbone_alone(change: dict[str, Any], message: str) -> None:
    backbone = tiny_backbone()
    before = logits(backbone)
    bad = _changed(by_hand(LORA / NAMES[1], "odd"), Q, **change)
    with pytest.raises(ConfigError, match=f"(?s)adapter 'odd'.*{message}"):
        moelora.compose([*zoo()[:1], bad], "arrow", backbone)
    assert torch.equal(logits(backbone), before)
    moelora.compose(zoo(), "arrow", backbone)


def test_a_router_that_cannot_be_fitted_leaves_the_backbone_alone() -> None:
    backbone = tiny_backbone()
    with pytest.raises(ConfigError, match="set share to 'module'"):
        moelora.compose(zoo()[:2], "arrow", backbone, share="all")
    moelora.compose(zoo()[:2], "arrow", backbone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "arow"}, "unknown router 'arow'.*did you mean 'arrow'"),
        ({"router": "arrow", "topk": 2}, "unknown key 'topk'.*did you mean 'top_k'"),
        ({"router": "static", "weights": [1.0]}, "lists 1 weights for 2 experts"),
        (
            {"router": "static", "weights": "uniform", "mix": "factors"},
            "needs experts of one rank.*set mix to 'outputs'",
        ),
        ({"router": "arrow", "experts": {"r": 3}}, "experts.r cannot be set here"),
        ({"router": "arrow", "names": ["../up", "b"]}, "names"),
    ],
)
def test_options_that_do_not_fit_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        moelora.compose([zoo()[0], zoo()[3]], backbone=tiny_backbone(), **options)
