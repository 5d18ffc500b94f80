"""Groups of the optimizer, and the warm-up of the auxiliary losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_runs import Gradients, build_model

from moelora.config import Recipe
from moelora.errors import ConfigError
from moelora.trainers.optimizer import GroupOptions, factor_pairs, parameter_groups


def groups(options: GroupOptions) -> dict[str, dict[str, Any]]:
    model = build_model()
    decaying = [name for name, _ in model.named_parameters()]
    made = {group["name"]: group for group in parameter_groups(model, decaying, 1e-3, 0.1, options)}
    names = {id(p): name for name, p in model.adapter_tensors().items()}
    for group in made.values():
        group["params"] = [names[id(p)] for p in group["params"]]
    held = [name for group in made.values() for name in group["params"]]
    assert sorted(held) == sorted(names.values())  # each once
    return made


def test_without_options_routers_and_experts_learn_alike() -> None:
    made = groups(GroupOptions())
    assert made.keys() == {"experts", "routers"}
    assert {(group["lr"], group["weight_decay"]) for group in made.values()} == {(1e-3, 0.1)}
    assert all(".router." in name for name in made["routers"]["params"])


def test_routers_and_second_factors_have_rates_of_their_own() -> None:
    options = GroupOptions(router_learning_rate=1e-2, router_weight_decay=0.0, lora_plus_ratio=16)
    made = groups(options)
    assert made.keys() == {"experts", "lora_B", "routers"}
    assert all(name.endswith("lora_A") for name in made["experts"]["params"])
    assert all(name.endswith("lora_B") for name in made["lora_B"]["params"])
    assert {name: (group["lr"], group["weight_decay"]) for name, group in made.items()} == {
        "experts": (1e-3, 0.1),
        "lora_B": (1.6e-2, 0.1),
        "routers": (1e-2, 0.0),
    }


def test_pairs_are_the_factors_of_every_projection() -> None:
    model = build_model()
    tensors = model.adapter_tensors()
    pairs = factor_pairs(model)
    assert len(pairs) == sum(name.endswith("lora_B") for name in tensors) == 2 * (3 + 2)
    for pair in pairs:
        assert pair.lora_A is tensors[f"{pair.name}.lora_A"] and pair.lora_B is tensors[f"{pair.name}.lora_B"]
        assert sum(pair.ranks) == len(pair.lora_A) == pair.lora_B.shape[1]


def test_rates_are_in_the_log_and_follow_the_schedule(make_model, make_trainer) -> None:
    options = GroupOptions(router_learning_rate=0.1, lora_plus_ratio=4)
    trainer = make_trainer(make_model(), groups=options, learning_rate=1e-2, lr_scheduler_type="linear")
    trainer.train()
    logged = [{k: v for k, v in line.items() if k.startswith("lr/")} for line in trainer.state.log_history[:4]]
    assert logged[0].keys() == {"lr/experts", "lr/lora_B", "lr/routers"}
    for line, share in zip(logged, (1.0, 0.75, 0.5, 0.25), strict=True):
        assert line == pytest.approx({"lr/experts": 1e-2 * share, "lr/lora_B": 4e-2 * share, "lr/routers": 0.1 * share})


@pytest.mark.parametrize("steps", [4, 0.5])
def test_auxiliary_losses_warm_up_linearly(make_model, make_trainer, steps) -> None:
    """The part of the router's gradient that is the balance loss's grows by a quarter of itself in each step."""

    def first_gradients(aux: float, **options: Any) -> list[torch.Tensor]:
        kept = Gradients()
        model = make_model(router={"aux_loss_coef": aux})
        make_trainer(model, callbacks=[kept], learning_rate=0.0, max_steps=8, max_grad_norm=0.0, **options).train()
        return [step["model.layers.0.mlp.router.weight"] for step in kept.steps]

    none, all_of_it = first_gradients(0.0), first_gradients(0.1)
    for step, got in enumerate(first_gradients(0.1, aux_warmup_steps=steps)):
        share = min(1.0, (step + 1) / 4)
        assert torch.allclose(got, none[step] + share * (all_of_it[step] - none[step]), atol=1e-7)


def test_groups_of_an_optimizer_that_was_given_are_refused(make_model, make_trainer) -> None:
    model = make_model()
    given = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    trainer = make_trainer(model, optimizers=(given, None), groups=GroupOptions(lora_plus_ratio=2))
    with pytest.raises(ConfigError, match="leave `optimizer` out of the DeepSpeed configuration"):
        trainer.train()


@pytest.mark.parametrize(("key", "value"), [("router_learning_rate", 0), ("lora_plus_ratio", -1), ("lora_plus", 2)])
def test_options_are_checked_in_the_recipe(key: str, value: float) -> None:
    sites = [{"target": "mlp", "experts": {"num_experts": 2, "r": 2}, "router": "topk"}]
    with pytest.raises(ConfigError, match=f"trainer.*{key}"):
        Recipe.parse({"mixture": {"sites": sites}, "trainer": {key: value}})
