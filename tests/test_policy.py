"""A model under several selections: one gradient whichever way it is computed, and what it is exactly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, TrainingArguments

import moelora
from moelora.errors import UserError
from moelora.mixture import MoELoRAModel
from moelora.policy import Objective, policy_backward, policy_loss
from moelora.routers import rloo
from moelora.trainers import SFTTrainer

E = 4
SEEDS = (3, 14, 15)


def mixture(**router: Any) -> dict[str, Any]:
    target = router.pop("target", ["gate_proj", "up_proj", "down_proj"])
    experts = {"num_experts": E, "r": 2, "alpha": 3, "dropout": router.pop("dropout", 0.0)}
    return {"sites": [{"target": target, "experts": experts, "router": {"kind": "remix", **router}}]}


def make(backbone: LlamaForCausalLM, config: dict[str, Any] | None = None, std: float = 0.5) -> MoELoRAModel:
    model = moelora.attach(copy.deepcopy(backbone), config or mixture()).train()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.normal_(std=std, generator=generator)
    return model


def batch() -> dict[str, Tensor]:
    """Three right-padded sequences; the first three tokens are the prompt."""
    ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 7:], mask[2, 5:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: MoELoRAModel) -> dict[str, Tensor]:
    return {name: tensor.grad.clone() for name, tensor in model.adapter_tensors().items() if tensor.grad is not None}


def assert_near(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys() and one
    for name, value in one.items():
        assert value.any(), name
        assert torch.allclose(value, two[name], rtol=1e-4, atol=1e-6 * float(two[name].abs().max()) + 1e-8), name


ROUTERS = [{}, {"route_level": "sequence"}, {"target": ["gate_proj", "up_proj"], "share": "parent"}]


@pytest.mark.parametrize("router", ROUTERS, ids=["token", "sequence", "shared"])
@pytest.mark.parametrize("per_example", [True, False])
def test_loop_batch_and_lean_form_have_one_gradient(
    tiny_llama: LlamaForCausalLM, router: dict[str, Any], per_example: bool
) -> None:
    results = []
    for form in ("loop", "batched", "lean"):
        model = make(tiny_llama, mixture(**router))
        if form == "lean":
            found = policy_backward(model, batch(), SEEDS, Objective(per_example))
        else:
            found = policy_loss(model, batch(), SEEDS, Objective(per_example), batched=form == "batched")
            found.surrogate.backward()
        results.append((found, gradients(model)))
    loop, grads = results[0]
    assert loop.spread > 1e-3
    for other, others in results[1:]:
        assert torch.allclose(other.losses, loop.losses, atol=1e-5)
        assert torch.allclose(other.log_prob, loop.log_prob, atol=1e-4)
        assert other.surrogate.item() == pytest.approx(loop.surrogate.item(), rel=1e-4)
        assert_near(others, grads)


@pytest.mark.parametrize("router", [*ROUTERS, {"score_through_input": True}, {"dropout": 0.3}])
@pytest.mark.parametrize("batched", [True, False])
def test_a_checkpointed_step_is_the_plain_one(
    tiny_llama: LlamaForCausalLM, router: dict[str, Any], batched: bool
) -> None:
    steps = []
    for checkpointed in (False, True):
        model = make(tiny_llama, mixture(**router))
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        found = policy_loss(model, batch(), SEEDS, batched=batched)
        found.surrogate.backward()
        steps.append((found.surrogate.detach(), gradients(model)))
    assert torch.equal(steps[0][0], steps[1][0])
    assert steps[0][1].keys() == steps[1][1].keys()
    for name, grad in steps[0][1].items():
        assert grad.any() and torch.equal(grad, steps[1][1][name]), name


def test_the_lean_form_has_the_dropout_of_one_pass(tiny_llama: LlamaForCausalLM) -> None:
    model = make(tiny_llama, mixture(dropout=0.3))
    torch.manual_seed(5)
    loop = policy_loss(model, batch(), SEEDS)
    loop.surrogate.backward()
    grads = gradients(model)
    model.zero_grad()
    torch.manual_seed(5)
    lean = policy_backward(model, batch(), SEEDS)
    assert torch.equal(lean.losses, loop.losses)
    assert_near(gradients(model), grads)


def test_the_gradient_is_that_of_the_formula(tiny_llama: LlamaForCausalLM) -> None:
    model = make(tiny_llama)
    policy_loss(model, batch(), SEEDS).surrogate.backward()
    found = gradients(model)
    losses, scores = [], []
    weights = [tensor for name, tensor in model.adapter_tensors().items() if "router" in name]
    for seed in SEEDS:
        with moelora.trace(model) as tape, model.routing_context(selection_seeds=(seed,)):
            logits = model(**{k: v for k, v in batch().items() if k != "labels"}).logits
        losses.append(rloo.example_losses(logits, batch()["labels"]).detach())
        mask = batch()["attention_mask"].bool()
        each_B = sum(torch.where(mask, record.log_prob, 0).sum(1) for site in tape for record in tape[site])
        scores.append([torch.autograd.grad(value, weights, retain_graph=True) for value in each_B])
    mean = torch.stack(losses).mean(0)
    for place, name in enumerate(n for n in model.adapter_tensors() if "router" in n):
        expected = sum(
            (losses[m][b] - mean[b]) / 2 * scores[m][b][place] / 3 for m in range(len(SEEDS)) for b in range(3)
        )
        assert torch.allclose(found[name], expected, rtol=1e-3, atol=1e-6), name


def test_a_fresh_mixture_gives_its_routers_exactly_no_gradient(tiny_llama: LlamaForCausalLM) -> None:
    model = moelora.attach(tiny_llama, mixture()).train()
    found = policy_loss(model, batch(), SEEDS)
    assert found.spread == 0 and torch.equal(*found.losses[:2])
    found.surrogate.backward()
    for name, tensor in model.adapter_tensors().items():
        if "router" in name:
            assert tensor.grad is not None and not tensor.grad.any(), name
        elif name.endswith("lora_B"):
            assert tensor.grad.any(), name


def test_with_all_experts_chosen_the_router_has_exactly_no_gradient(tiny_llama: LlamaForCausalLM) -> None:
    model = make(tiny_llama, mixture(top_k=E))
    policy_loss(model, batch(), SEEDS).surrogate.backward()
    for name, tensor in model.adapter_tensors().items():
        assert bool(tensor.grad.any()) == ("router" not in name), name


def test_a_gradient_through_the_input_reaches_the_experts_below(tiny_llama: LlamaForCausalLM) -> None:
    grads = []
    for through in (False, True):
        model = make(tiny_llama, mixture(score_through_input=through))
        policy_loss(model, batch(), SEEDS).surrogate.backward()
        grads.append(gradients(model))
    last = "model.layers.1.mlp.down_proj"  # nothing decides after it
    for name, grad in grads[0].items():
        same = torch.allclose(grad, grads[1][name], rtol=1e-4, atol=1e-7)
        assert same == (name.startswith(last) or "router" in name), name


def test_auxiliary_losses_of_other_sites_are_trained_too(tiny_llama: LlamaForCausalLM) -> None:
    config = mixture(target=["down_proj"])
    experts = {"num_experts": E, "r": 2, "alpha": 3}
    router = {"kind": "topk", "top_k": 2, "aux_loss_coef": 0.5}
    config["sites"].append({"target": ["q_proj"], "experts": experts, "router": router})
    model = make(tiny_llama, config)
    found = policy_loss(model, batch(), SEEDS)
    own = rloo.surrogate(found.losses, found.log_prob)
    assert found.surrogate.item() - own.item() == pytest.approx(0.5 * 2, abs=0.2)  # a balanced top-2 router has 2
    found.surrogate.backward()
    loop = gradients(model)
    model.zero_grad()
    policy_backward(model, batch(), SEEDS)
    assert_near(gradients(model), loop)


def test_what_a_caller_knows_is_copied_with_the_batch(tiny_llama: LlamaForCausalLM) -> None:
    """In a mixture with a site that goes by task: copies of the batch see the tasks of their sequences."""
    config = mixture(target=["down_proj"])
    experts = {"num_experts": E, "r": 2, "alpha": 3}
    config["sites"].append({"target": ["q_proj"], "experts": experts, "router": {"kind": "lora_mixer", "top_k": 2}})
    tasks = torch.tensor([2, 0, 3])
    losses = []
    for batched in (False, True):
        model = make(tiny_llama, config)
        given = policy_loss(model, {**batch(), "task_ids": tasks, "phase": "hard"}, SEEDS, batched=batched)
        with model.routing_context(task_ids=tasks, phase="hard"):
            around = policy_loss(model, batch(), SEEDS, batched=batched)
        assert torch.equal(given.losses, around.losses)
        losses.append(given.losses)
    assert torch.allclose(*losses, atol=1e-5)
    assert not torch.allclose(losses[0], policy_loss(model, batch(), SEEDS).losses, atol=1e-3)


@pytest.mark.parametrize("batched", [True, False])
def test_the_choice_of_a_sequence_does_not_see_its_answer(tiny_llama: LlamaForCausalLM, batched: bool) -> None:
    """Else training would route by what is not there yet when the model answers."""
    model = make(tiny_llama, mixture(route_level="sequence", target=["gate_proj"]))
    choices = []
    for shift in (0, 7):
        given = batch()
        answer = given["labels"] != -100
        given["input_ids"] = torch.where(answer, (given["input_ids"] + shift) % 61 + 3, given["input_ids"])
        with moelora.trace(model) as tape:
            losses = policy_loss(model, given, SEEDS, batched=batched).losses
        choices.append((losses, [record.logits[:, 0] for site in tape for record in tape[site]]))
    assert not torch.allclose(choices[0][0], choices[1][0], atol=1e-3)
    for one, other in zip(choices[0][1], choices[1][1], strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_one_selection_and_a_model_that_does_not_sample_are_refused(tiny_llama: LlamaForCausalLM) -> None:
    model = make(tiny_llama)
    for step in (policy_loss, policy_backward):
        with pytest.raises(ValueError, match="at least 2"):
            step(model, batch(), SEEDS[:1])
        with pytest.raises(UserError, match="no site sampled its experts"):
            step(model.eval(), batch(), SEEDS)
        model.train()


def test_steps_of_the_policy_lower_the_loss_of_evaluation(tiny_llama: LlamaForCausalLM) -> None:
    model = moelora.attach(tiny_llama, mixture()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)

    def evaluated() -> float:
        with torch.no_grad():
            loss = model.eval()(**batch()).loss.item()
        model.train()
        return loss

    before = evaluated()
    routers = {name: t.clone() for name, t in model.adapter_tensors().items() if "router" in name}
    for step in range(15):
        optimizer.zero_grad()
        policy_loss(model, batch(), range(4 * step, 4 * step + 4), batched=True).surrogate.backward()
        optimizer.step()
    assert evaluated() < before - 0.3
    assert all(not torch.equal(model.adapter_tensors()[name], value) for name, value in routers.items())


def test_a_trainer_that_leaves_sampling_routers_as_they_are_says_so(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    SFTTrainer(make(tiny_llama), arguments)
    assert "the routers of remix sample, and this trainer leaves them as they are" in caplog.text
