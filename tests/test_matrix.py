"""Every registered router, as its own card sets it up, in every container and precision, and in a whole model.

Nothing here knows a method: a new router is tested by being registered and having a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import moelora
from moelora import routers
from moelora.config import SiteConfig
from moelora.dispatch import block, extension, linear
from moelora.errors import ConfigError
from moelora.experts import BlockContainer, Container, build
from moelora.mixture import MoELoRAModel
from moelora.routing import RoutingContext, RoutingRecord

KINDS = routers.names()
CONTAINERS = ("linear", "block")
TARGETS = {"linear": ["q_proj", "down_proj"], "block": ["mlp"]}


def site_of(kind: str, container: str, **experts: Any) -> SiteConfig:
    """The site of the card of that name which has the router of that name, at other modules and without dropout."""
    card = moelora.load_recipe(kind)
    site = next(s for s in card.mixture.sites if s.router is not None and s.router.kind == kind)
    changed = site.experts.model_copy(update={"dropout": 0.0, "expert_dropout": "shared", **experts})
    return site.model_copy(
        update={"target": TARGETS[container], "layers": None, "projections": None, "experts": changed}
    )


def allowed(kind: str, container: str) -> bool:
    """Whether the combination has a meaning; that a refusal says why is tested below."""
    entry = routers.get(kind)
    experts = moelora.experts.get(site_of(kind, container).experts.kind)
    if container == "linear":
        return True
    several = entry.needs_activations or entry.needs_fit  # look at one projection, of which a block has several
    return entry.level == "expert" and not several and not experts.needs_dense_weight


PLACES = [(kind, container) for kind in KINDS for container in CONTAINERS if allowed(kind, container)]
REFUSED = [(kind, "block") for kind in KINDS if not allowed(kind, "block")]
place = pytest.mark.parametrize(("kind", "container"), PLACES)


def randomize(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Numbers that make experts and routers differ; what is structurally zero stays so, and state stays as it is."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if name.rpartition(".")[2].startswith("lora_") or isinstance(tensor, nn.Parameter):
            drawn = torch.randn(tensor.shape, generator=generator) * 0.15
            with torch.no_grad():
                tensor.copy_(torch.where(tensor == 0, 0.0, drawn) if "lora_A" in name else drawn)
    for container in module.modules():
        if isinstance(container, Container) and container.router is not None and len(list(container.banks())) == 1:
            container.fit_router()


# -- one container ---------------------------------------------------------------------------------------------------


def base_of(container: str, precision: str) -> nn.Module:
    torch.manual_seed(0)
    if container == "linear":
        base: nn.Module = nn.Linear(32, 48)
    else:
        base = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=64))
    if precision == "bf16":
        base = base.to(torch.bfloat16)
    if precision == "nf4":
        import bitsandbytes as bnb

        def packed(linear: nn.Linear) -> nn.Module:
            made = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=torch.float32,
                quant_type="nf4",
            )
            made.load_state_dict(linear.state_dict())
            return made.to("cpu")

        if isinstance(base, nn.Linear):
            base = packed(base)
        else:
            for name, child in list(base.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(base, name, packed(child))
    return base.requires_grad_(False)


def container_of(kind: str, container: str, precision: str = "fp32") -> Container:
    site = site_of(kind, container)
    name = "model.layers.0.site"
    built = build(base_of(container, precision), site, name=name, layer=0, members=[name], hidden_size=32)
    randomize(built, built.adapter_tensors())
    return built.train()


def context_of(batch: int, length: int, dtype: torch.dtype) -> RoutingContext:
    """Everything that a caller may know."""
    ids = torch.arange(batch) % 2
    states = torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(9)).to(dtype)
    return RoutingContext(
        task_ids=ids,
        task_types=ids,
        request_ids=ids,
        modality_mask=(torch.arange(batch * length) % 2).view(batch, length),
        scoring_states=states,
    )


def run(built: Container, x: Tensor, checkpointed: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradients of the input and of everything that is trained."""
    built.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    torch.manual_seed(7)
    with built.slot.using(context_of(x.shape[0], x.shape[1], x.dtype)):
        if checkpointed:
            out = checkpoint(built, x, use_reentrant=False, context_fn=built.slot.checkpoint_contexts)
        else:
            out = built(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    (out * weight).sum().backward()
    grads = {n: t.grad.clone() for n, t in built.adapter_tensors().items() if t.grad is not None}
    return out.detach(), {"hidden_states": x.grad, **grads}


def hidden(tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(8)).to(dtype)


def assert_near(one: dict[str, Tensor], two: dict[str, Tensor], relative: float) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        gap, size = (value.double() - two[name].double()).norm(), two[name].double().norm()
        assert gap <= relative * size + 1e-7, (name, float(gap), float(size))


@contextmanager
def implementation(built: Container, name: str) -> Iterator[None]:
    """Within the block the dispatch of one site, and of every linear site, is that one."""
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(built, BlockContainer):
            patch.setattr(built, "implementation", name)
        else:
            patch.setattr(linear, "choose", lambda *_: name)
        yield


def implementations(built: Container, precision: str) -> list[str]:
    """All that can do this site here, but the loop that they are compared with."""
    assert built.router is not None
    if isinstance(built, BlockContainer):
        names = set(block.IMPLEMENTATIONS)
    else:
        names = {"plain"} if built.router.mix == "factors" else set(linear.IMPLEMENTATIONS)
    if precision == "bf16" or extension.library() is None:
        names.discard("compiled")
    return sorted(names - {"reference"})


@place
@pytest.mark.parametrize("precision", ["fp32", "nf4"])
@pytest.mark.parametrize("tokens", [0, 1, 7, 513])
def test_implementations_agree(kind: str, container: str, precision: str, tokens: int) -> None:
    built = container_of(kind, container, precision)
    x = hidden(tokens)
    with implementation(built, "reference"):
        out, grads = run(built, x)
    assert out.dtype == x.dtype and out.isfinite().all()
    for name in implementations(built, precision):
        with implementation(built, name):
            other, others = run(built, x)
        assert_near({"out": other}, {"out": out}, 1e-6)
        assert_near(others, grads, 1e-5)


@place
def test_implementations_agree_where_all_tokens_are_alike(kind: str, container: str) -> None:
    """All of them go to the same experts, and the others are idle."""
    built = container_of(kind, container)
    x = hidden(1).expand(1, 40, 32)
    with implementation(built, "reference"):
        out, grads = run(built, x)
    for name in implementations(built, "fp32"):
        with implementation(built, name):
            other, others = run(built, x)
        assert_near({"out": other}, {"out": out}, 1e-6)
        assert_near(others, grads, 1e-5)


@place
def test_nothing_waits_for_a_gpu(kind: str, container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values, which are not on the CPU, every look at a value is an error.

    So forward, losses, counts and backward take none, by the implementation that a GPU gets. A first look that is not
    repeated is allowed. What is copied between devices is not seen here.
    """
    built = container_of(kind, container)
    assert built.router is not None
    run(built, hidden(3))
    built.to("meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no device without values
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    context = context_of(2, 6, torch.float32)
    known = {f.name: getattr(context, f.name) for f in fields(context)}
    known = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in known.items()}
    known["token_mask"] = torch.ones(2, 6, dtype=torch.bool, device="meta")
    heard: list[RoutingRecord] = []
    x = torch.empty(2, 6, 32, device="meta", requires_grad=True)
    with built.slot.using(RoutingContext(**known), lambda _, record: heard.append(record)):
        out = built(x)
        losses = built.router.losses(heard, built.slot.context)
    sum(losses.values(), out.sum()).backward()
    assert x.grad is not None and x.grad.device.type == "meta"
    load = heard[0].counts()
    assert load.shape == (built.router.num_units,) and heard[0].entropy().shape == ()
    built.router.on_step_end(load)


@place
@pytest.mark.parametrize("tokens", [0, 1, 7, 513])
def test_in_bfloat16_no_implementation_is_worse_than_the_loop(kind: str, container: str, tokens: int) -> None:
    """Gradients of routers are differences of nearly equal numbers, so what rounding costs is measured, not fixed."""
    built = container_of(kind, container, "bf16")
    x = hidden(tokens, torch.bfloat16)
    with implementation(built, "reference"):
        out, grads = run(built, x)
    assert out.dtype == torch.bfloat16
    results = {}
    for name in implementations(built, "bf16"):
        with implementation(built, name):
            results[name] = run(built, x)
    built.base.float()
    with implementation(built, "reference"):
        exact, exact_grads = run(built, x.float())
    for other, others in results.values():
        assert other.dtype == torch.bfloat16
        for name, truth in {"out": exact, **exact_grads}.items():
            value, loop = (other, out) if name == "out" else (others[name], grads[name])
            allowed = 3 * (loop.double() - truth.double()).norm() + 0.01 * truth.double().norm()
            assert (value.double() - truth.double()).norm() <= allowed + 1e-7, name


@place
@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
def test_a_checkpointed_container_is_the_plain_one(kind: str, container: str, precision: str) -> None:
    built = container_of(kind, container, precision)
    x = hidden(9, torch.bfloat16 if precision == "bf16" else torch.float32)
    state = {name: tensor.clone() for name, tensor in built.state_dict().items() if isinstance(tensor, Tensor)}
    plain, checkpointed = run(built, x), run(built, x, checkpointed=True)
    assert torch.equal(plain[0], checkpointed[0])
    assert plain[1].keys() == checkpointed[1].keys()
    for name, grad in plain[1].items():
        assert torch.equal(grad, checkpointed[1][name]), name
    for name, tensor in built.state_dict().items():
        assert not isinstance(tensor, Tensor) or torch.equal(tensor, state[name]), f"{name} changed in a forward"


@pytest.mark.parametrize(("kind", "container"), REFUSED)
def test_what_has_no_meaning_is_refused_with_the_reason(kind: str, container: str) -> None:
    with pytest.raises(ConfigError, match=r"is an FFN block: .*(single ranks|activations|rescale|several)"):
        build(base_of(container, "fp32"), site_of(kind, container), hidden_size=32)


# -- a whole model ---------------------------------------------------------------------------------------------------

LENGTH = 8
IDS = torch.randint(3, 64, (2, LENGTH), generator=torch.Generator().manual_seed(1))
KNOWN: dict[str, Tensor] = {
    "task_ids": torch.tensor([0, 1]),
    "task_types": torch.tensor([0, 1]),
    "request_ids": torch.tensor([0, 1]),
    "modality_mask": torch.tensor([[0, 1, 0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 0, 1, 0]]),
}


def model_of(backbone: LlamaForCausalLM, kind: str, container: str, fresh: bool = False) -> MoELoRAModel:
    model = moelora.attach(backbone, {"sites": [site_of(kind, container)]})
    if not fresh:
        randomize(model, model.adapter_tensors())
    elif routers.get(kind).needs_fit:
        model.fit_routers()
    return model


def step(model: MoELoRAModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss with auxiliary losses and log-probabilities, and every gradient."""
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(11)
    with moelora.trace(model) as tape:
        out = model(IDS, labels=IDS, **KNOWN)
    chances = [r.log_prob.sum() for site in tape for r in tape[site] if r.log_prob is not None]
    loss = out.loss + sum(chances, torch.zeros(()))
    if loss.requires_grad:  # a router without parameters over frozen experts learns nothing
        loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@place
def test_every_trained_parameter_learns_and_no_other(tiny_llama: LlamaForCausalLM, kind: str, container: str) -> None:
    model = model_of(tiny_llama, kind, container)
    loss, grads = step(model)
    assert loss.isfinite()
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(grads) == wanted
    for name, grad in grads.items():
        assert grad.isfinite().all() and grad.any(), name


@place
def test_checkpointing_changes_nothing(tiny_llama: LlamaForCausalLM, kind: str, container: str) -> None:
    model = model_of(tiny_llama, kind, container)
    loss, grads = step(model)
    model.gradient_checkpointing_enable()
    again, others = step(model)
    assert torch.equal(loss, again)
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, others[name]), name


@place
def test_evaluation_is_deterministic_and_a_fresh_mixture_is_its_backbone(
    tiny_llama: LlamaForCausalLM, kind: str, container: str
) -> None:
    with torch.no_grad():
        base = tiny_llama(IDS).logits
        model = model_of(tiny_llama, kind, container, fresh=True).eval()
        with moelora.trace(model) as tape:
            fresh = model(IDS, **KNOWN).logits
        with model.disable_experts():
            assert torch.equal(model(IDS, **KNOWN).logits, base)
        routed = next(iter(model.containers().values()))
        whole = routed.router.weighs == "updates" or all(r.normalized for site in tape for r in tape[site])
        if next(routed.banks()).zero_at_init and whole:
            assert torch.equal(fresh, base)
        randomize(model, model.adapter_tensors())
        torch.manual_seed(1)
        one = model(IDS, **KNOWN).logits
        state = torch.get_rng_state()
        assert torch.equal(one, model(IDS, **KNOWN).logits)
        assert torch.equal(state, torch.get_rng_state()), "evaluation drew random numbers"
        assert not torch.equal(one, base)


@place
def test_saved_and_loaded_it_is_the_same(
    tiny_llama: LlamaForCausalLM, tiny_config: LlamaConfig, kind: str, container: str, tmp_path: Path
) -> None:
    model = model_of(tiny_llama, kind, container).eval()
    with torch.no_grad():
        expected = model(IDS, **KNOWN).logits
    model.save_pretrained(tmp_path / "saved")
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(tiny_config).eval()
    loaded = moelora.from_pretrained(tmp_path / "saved", backbone=backbone)
    with torch.no_grad():
        assert torch.equal(loaded(IDS, **KNOWN).logits, expected)
    for name, tensor in model.adapter_tensors().items():
        assert torch.equal(loaded.adapter_tensors()[name], tensor), name
        assert loaded.adapter_tensors()[name].requires_grad == tensor.requires_grad, name


@place
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(tiny_llama: LlamaForCausalLM, kind: str, container: str, side: str) -> None:
    model = model_of(tiny_llama, kind, container).eval()
    pad = (3, 0) if side == "left" else (0, 3)
    known = {name: value[:1] for name, value in KNOWN.items()}
    with torch.no_grad():
        plain = model(IDS[:1], labels=IDS[:1], **known)
        mask = nn.functional.pad(torch.ones(1, LENGTH, dtype=torch.long), pad)
        known["modality_mask"] = nn.functional.pad(known["modality_mask"], pad, value=1)
        labels = nn.functional.pad(IDS[:1], pad, value=-100)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = model(
            nn.functional.pad(IDS[:1], pad, value=5),
            attention_mask=mask,
            position_ids=positions,
            labels=labels,
            **known,
        )
    assert torch.allclose(padded.logits[mask.bool()], plain.logits[0], atol=1e-5)
    for name, value in (plain.aux_losses or {}).items():
        assert value.item() == pytest.approx(padded.aux_losses[name].item(), abs=1e-6), name


@place
def test_generation_with_a_cache_equals_recomputation(tiny_llama: LlamaForCausalLM, kind: str, container: str) -> None:
    model = model_of(tiny_llama, kind, container).eval()
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    settings |= KNOWN
    cached = model.generate(IDS, **settings)
    assert cached.shape == (2, LENGTH + 5)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **settings))
