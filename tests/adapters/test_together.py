"""Several adapters active at once: what each adds, what is heard of each, and how they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_made import FIRST, IDS, MIXLORA, PEFT, SECOND, TOPK, base, hooks, logits, randomize, same, values
from safetensors.torch import load_file
from torch import Tensor

import moelora
from moelora.analysis import RoutingRecorder
from moelora.errors import ConfigError
from moelora.experts import Container
from moelora.mixture import MoELoRAModel

PLAIN: dict[str, Any] = {"target": ["q_proj", "v_proj", "down_proj"], "experts": {"num_experts": 1, "r": 2}}


def sites(kind: str, router: dict[str, Any] | None, target: Any = PLAIN["target"], **experts: Any) -> dict[str, Any]:
    count = 1 if router is None else 4
    site = {"target": target, "experts": {"kind": kind, "num_experts": count, "r": 2, **experts}}
    return {"sites": [site if router is None else {**site, "router": router}]}


def pair(one: dict[str, Any], other: dict[str, Any], backbone: Any = None) -> MoELoRAModel:
    """Adapters "one" and "other", the first of them active."""
    model = moelora.attach(base() if backbone is None else backbone, one, adapter_name="one").eval()
    model.add_adapter("other", other)
    return randomize(randomize(model, "one"), "other", seed=6)


def stock(names: list[str], train: bool = False) -> Any:
    from peft import PeftModel

    model = PeftModel.from_pretrained(base(), PEFT / names[0], adapter_name=names[0], is_trainable=train)
    for name in names[1:]:
        model.load_adapter(PEFT / name, adapter_name=name, is_trainable=train)
    model.base_model.set_adapter(names)
    return model.eval()


def ours(names: list[str]) -> MoELoRAModel:
    model = moelora.from_pretrained(PEFT / names[0], base(), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(PEFT / name, name)
    model.set_adapter(names)
    return model


@pytest.mark.parametrize(
    "names",
    [
        ["plain_r4_a8", "plain_r4_a8_second"],
        ["plain_r4_a8_second", "plain_r4_a8"],
        ["alllinear_r2_a4", "plain_r4_a8", "rslora_r4_a8", "rankpattern"],
    ],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT itself
def test_active_loras_are_those_of_peft_with_gradients(names: list[str]) -> None:
    theirs, model = stock(names, train=True), ours(names)
    assert model.active_adapters == names
    assert (logits(model) - logits(theirs)).abs().max() <= 1e-6
    theirs(IDS, labels=IDS).loss.backward()
    model(IDS, labels=IDS).loss.backward()
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    count = 0
    for name in names:
        for key, value in model.adapter_tensors(name).items():
            path, _, part = key.rpartition(".")
            wanted = grads[f"base_model.model.{path}.{part}.{name}.weight"]
            assert value.grad is not None and (value.grad - wanted).abs().max() <= 1e-6 and wanted.abs().max() > 1e-6
            count += 1
    assert count == len(grads)


def test_two_loras_are_the_sum_of_their_matrices() -> None:
    backbone = base()
    for folder in (FIRST, SECOND):
        tensors = load_file(folder / "adapter_model.safetensors")
        for key in [key for key in tensors if "lora_A" in key]:
            linear = backbone.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            update = tensors[key.replace("lora_A", "lora_B")] @ tensors[key] * (8 / 4)
            linear.weight.data += update  # type: ignore[operator]
    model = ours([FIRST.name, SECOND.name])
    assert (logits(model) - logits(backbone)).abs().max() <= 1e-5
    assert (logits(model) - logits(base())).abs().max() > 1e-2


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "routed and plain": (TOPK, sites("lora", None)),
    "routed twice": (
        sites("lora", {"kind": "topk"}),
        sites("rslora", {"kind": "softmax", "aux_loss_coef": 0}, r=[2, 4, 1, 3]),
    ),
    "dora on a mixture": (sites("lora", {"kind": "topk"}), sites("dora", {"kind": "topk"})),
    "dora under a lora": (sites("dora", None), sites("lora", None)),
    "factors and shared": (sites("lora", {"kind": "task", "num_tasks": 1}), sites("shared_a", {"kind": "softmax"})),
    "ranks and thresholds": (sites("rank1", {"kind": "moram"}), sites("lora", {"kind": "topp"})),
    "projections": (sites("sparse_projection", {"kind": "flylora"}, r=4), sites("low_rank", {"kind": "adamole"})),
}


@pytest.mark.parametrize("case", KINDS)
def test_each_site_adds_what_each_adapter_adds_alone(case: str) -> None:
    model = pair(*KINDS[case])
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    model.set_adapter(["one", "other"])

    def see(path: str) -> Any:
        return lambda _, args, output: seen.update({path: (args[0], output.clone())})

    paths = {container.site.path for container in model.containers().values()}
    handles = [model.backbone.get_submodule(path).register_forward_hook(see(path)) for path in paths]
    with model.routing_context(task_ids=torch.zeros(len(IDS), dtype=torch.long)):
        logits(model)
        for handle in handles:
            handle.remove()
        for path, (x, output) in seen.items():
            parts = []
            for name in ("one", "other"):
                model.set_adapter(name)
                site = model.backbone.get_submodule(path)
                if isinstance(site, Container):
                    with torch.no_grad():
                        frozen = site.base(x)
                        parts.append(site(x) - frozen)
            assert len(parts) == sum(path in model._adapters.get(name).parts for name in ("one", "other"))
            assert torch.allclose(output, frozen + sum(parts), atol=2e-6), path
            assert all(part.abs().max() > 1e-3 for part in parts)
    assert len(seen) == 6
    several = {}
    for names in (["one", "other"], ["other", "one"]):
        model.set_adapter(names)
        with model.routing_context(task_ids=torch.zeros(len(IDS), dtype=torch.long)):
            several[tuple(names)] = logits(model)
    assert torch.allclose(*several.values(), atol=1e-5)


def test_a_lora_inside_a_block_is_as_good_as_merged_into_it() -> None:
    lora = PEFT / "alllinear_r2_a4"
    model = moelora.from_pretrained(lora, base(), adapter_name="lora")
    model.add_adapter("block", MIXLORA)
    randomize(model, "block")
    kept = values(model, "block")
    together = {}
    for names in (("lora", "block"), ("block", "lora")):
        model.set_adapter(names)
        together[names] = logits(model)
    model.set_adapter("block")
    block = logits(model)
    merged = moelora.attach(moelora.from_pretrained(lora, base()).merge_and_unload(), MIXLORA).eval()
    merged.load_adapter_state(kept)
    assert torch.allclose(*together.values(), atol=1e-6)  # both have an o_proj, where the order rounds
    assert (together["lora", "block"] - logits(merged)).abs().max() <= 1e-5
    assert (together["lora", "block"] - block).abs().max() > 1e-2
    model.set_adapter(("lora", "block"))
    with torch.no_grad():
        for path in ("model.layers.0.mlp.gate_proj", "model.layers.1.mlp.down_proj"):
            tensor = model.adapter_tensors("lora")[f"{path}.lora_B"]
            before = tensor.clone()
            tensor.zero_()
            assert not torch.equal(logits(model), together["lora", "block"])
            tensor.copy_(before)
    backbone = model.unload()
    assert torch.equal(logits(backbone), logits(base())) and not any(
        isinstance(m, Container) for m in backbone.modules()
    )


def test_going_back_to_one_of_several_leaves_no_trace(tmp_path: Path) -> None:
    model = pair(MIXLORA, sites("lora", {"kind": "topk", "share": "parent"}))
    model.set_adapter("one")
    before, names, count = logits(model), list(model.named_modules()), hooks(model)
    report, kept = model.trainable_report(), values(model, "other")
    model.set_adapter("other")
    other = logits(model)
    with pytest.raises(ConfigError, match="inside a block of experts a linear may carry no more than one expert"):
        model.set_adapter(["one", "other"])
    model.add_adapter("third", {"sites": [PLAIN]})
    model.set_adapter(["third", "other"])
    assert [site.target for site in model.mixture.sites] == [PLAIN["target"]] * 2
    model.save_pretrained(tmp_path)
    model.delete_adapter("third")
    assert model.active_adapters == ["other"] and torch.equal(logits(model), other)
    again = moelora.from_pretrained(tmp_path, base(), subfolder="other")
    assert torch.equal(logits(again), other) and same(values(again, "default"), kept)
    model.set_adapter("one")
    assert torch.equal(logits(model), before) and hooks(model) == count
    assert list(model.named_modules()) == names and model.trainable_report() == report
    assert [c.site.name for c in model.containers().values()] == [c.site.path for c in model.containers().values()]


def test_records_say_whose_they_are() -> None:
    model = pair(TOPK, sites("lora", {"kind": "topk", "share": "all"}, target=["q_proj", "v_proj"]))
    alone = {}
    for name in ("one", "other"):
        model.set_adapter(name)
        with torch.no_grad(), moelora.trace(model) as tape:
            model(IDS, use_cache=False)
        alone[name] = tape
    model.set_adapter(["other", "one"])
    recorder = RoutingRecorder(model)
    with torch.no_grad(), moelora.trace(model) as tape, recorder:
        model(IDS, use_cache=False)
    assert set(tape) == set(model.containers()) == {f"{name}:{path}" for name in alone for path in alone[name]}
    assert len(tape) == 6 and all(len(records) == 1 for records in tape.records.values())
    for name, other in alone.items():  # the first sites have the same hidden states as alone
        path = "model.layers.0.self_attn.q_proj"
        assert torch.equal(tape[f"{name}:{path}"][0].weights, other[path][0].weights)
    owners = {tape[name][0].owner for name in tape if name.startswith("other:")}
    assert owners == {"other:model.layers.0.self_attn.q_proj"}
    members = next(iter(model.containers().values())).site.members
    assert members and all(member.startswith("other:model.") for member in members)
    found = recorder.result()
    assert sorted(site.name for site in found.sites) == sorted(tape) and {site.layer for site in found.sites} == {0, 1}


def test_losses_are_those_of_each_adapter() -> None:
    model = pair(TOPK, sites("lora", {"kind": "topk", "aux_loss_coef": 0.5}))
    model.train()
    wanted, output = {}, None
    model.set_adapter(["one", "other"])
    with moelora.trace(model) as tape:
        output = model(IDS, labels=IDS)
    for index, name in enumerate(model.active_adapters):
        records = [tape[site][0] for site in tape if site.startswith(f"{name}:")]
        router = next(c.router for c in model.containers().values() if c.site.prefix == f"{name}:")
        assert router is not None
        wanted |= {f"sites.{index}.{k}": v for k, v in router.losses(records, model.slot.context).items()}
    assert set(output.aux_losses) == set(wanted) and len(wanted) == 4
    assert all(torch.allclose(output.aux_losses[key], value) for key, value in wanted.items())
    total = output.task_loss + 0.01 * wanted["sites.0.load_balance"] + 0.5 * wanted["sites.1.load_balance"]
    assert torch.allclose(output.loss, total)
    assert "one:q_proj: 2 sites, 3 x lora" in model.trainable_report() and "other:q_proj" in model.trainable_report()


@pytest.mark.parametrize("case", ["routed twice", "dora on a mixture"])
def test_checkpointing_and_frozen_parts_keep_the_gradients(case: str) -> None:
    model = pair(*KINDS[case]).train()
    for value in model.adapter_tensors("one").values():
        value.requires_grad_(False)
    model.set_adapter("other")
    model.set_adapter(["one", "other"])
    grads: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        assert all(value.grad is None for value in model.adapter_tensors("one").values())
        found = {name: value.grad for name, value in model.adapter_tensors("other").items()}
        grads.append({name: grad.clone() for name, grad in found.items() if grad is not None})
    assert same(*grads) and len(grads[0]) == len(model.adapter_tensors("other"))


def test_switches_reach_all_of_them() -> None:
    model = pair(TOPK, sites("lora", {"kind": "topk"}))
    model.set_adapter(["one", "other"])
    both = logits(model)
    with model.disable_experts():
        assert torch.equal(logits(model), logits(base()))
    with model.expert_scale({expert: 0.0 for expert in range(4)}):
        assert torch.allclose(logits(model), logits(base()), atol=1e-6)
    with model.expert_scale({0: 0.5}):
        assert (logits(model) - both).abs().max() > 1e-3
    assert torch.equal(logits(model), both)


def test_generation_with_a_cache_is_that_without() -> None:
    remix = {"kind": "remix", "top_k": 1}
    model = pair(sites("lora", remix), sites("lora", {**remix, "top_k": 2}))
    model.set_adapter(["one", "other"])
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with moelora.trace(model) as tape:
        cached = model.generate(IDS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))
    assert {record.weights.shape[-1] for name in tape for record in tape[name] if name.startswith("one")} == {1}
    model.set_adapter("one")
    assert not torch.equal(cached, model.generate(IDS, use_cache=True, **options))


def test_what_takes_one_adapter_says_so() -> None:
    model = pair(sites("rank1", {"kind": "moram"}), sites("lora", None))
    model.set_adapter(["one", "other"])
    for call in (
        lambda: model.active_adapter,
        model.begin_task,
        lambda: model.load_adapter_state({}),
        lambda: setattr(model, "mixture", model.mixture),
    ):
        with pytest.raises(ConfigError, match="takes one active adapter, but 'one', 'other' are: call set_adapter"):
            call()
    model.set_adapter("one")
    before = model.mixture
    model.begin_task()
    model.set_adapter("other")
    model.set_adapter("one")
    assert model.mixture != before and model.mixture.sites[0].experts.num_experts > before.sites[0].experts.num_experts
    assert logits(model).isfinite().all()
