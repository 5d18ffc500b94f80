"""Staged linears against numbers of LightZero's own code, both branches (tests/fixtures/lightzero_curriculum_lora)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moelora.errors import CheckpointError
from moelora.experts import StagedLinear
from moelora.experts.staged import StagedConfig

ROOT = Path(__file__).parents[1] / "fixtures" / "lightzero_curriculum_lora"
META = json.loads((ROOT / "meta.json").read_text())
FLAGS = json.loads((ROOT / "grad_policy.json").read_text())
IO = load_file(ROOT / "io.safetensors")
BRANCHES = ["paper", "head"]
STAGES = range(META["stage_num"])
cases = pytest.mark.parametrize(("branch", "stage"), [(branch, stage) for branch in BRANCHES for stage in STAGES])


def fresh(branch: str, policy: str = "") -> StagedLinear:
    options = {"r": META["r"], "alpha": META["lora_alpha"], "policy": policy or branch}
    options |= {"num_stages": META["stage_num"], "scale_init": META["scale_init"], "scale_range": META["s_range"]}
    return StagedLinear(META["in_features"], META["out_features"], config=StagedConfig.parse(options))


def theirs(branch: str, stage: int) -> dict[str, Tensor]:
    """LightZero's state as of a stage: later adapters, which do not act there, as zero as they are then."""
    state = load_file(ROOT / f"state_{branch}.safetensors")
    later = re.compile(rf"adapters\.[{stage}-9]\.lora_B")
    return {key: torch.zeros_like(value) if later.fullmatch(key) else value for key, value in state.items()}


def layer(branch: str, stage: int) -> StagedLinear:
    made = fresh(branch)
    made.load_state_dict(theirs(branch, stage))
    assert made.stage == stage
    return made


def here(linear: StagedLinear, name: str) -> nn.Parameter | None:
    """Our parameter of LightZero's name; ``None`` where its stage has not begun."""
    if name in ("weight", "bias"):
        return linear.get_parameter(name)
    bank, stage = linear.stages, linear.stage
    if bank is None:
        return None
    if name.startswith("base_weight_scale"):
        return bank.base_logit
    kind, index, tensor = name.split(".")
    if int(index) >= stage:
        return None
    if kind == "adapter_scales":
        return bank.scale_logits[int(index)]
    return bank.get_parameter(tensor if int(index) == stage - 1 else f"old_{tensor}.{index}")


@cases
def test_forward_and_gradients(branch: str, stage: int) -> None:
    linear = layer(branch, stage)
    y = linear(IO["x"])
    torch.testing.assert_close(y, IO[f"{branch}.stage{stage}.y"], atol=2e-6, rtol=1e-6)
    y.square().sum().backward()
    prefix = f"{branch}.stage{stage}.grad."
    names = [key.removeprefix(prefix) for key in IO if key.startswith(prefix)]
    assert len(names) >= 2
    for name in names:
        parameter = here(linear, name)
        assert parameter is not None and parameter.grad is not None, name
        wanted = IO[prefix + name]
        torch.testing.assert_close(parameter.grad.view(wanted.shape), wanted, atol=2e-4, rtol=1e-5)


@cases
def test_what_trains(branch: str, stage: int) -> None:
    """The flags of both branches. The paper's class leaves scales to the controller, which turns all of them on."""
    linear = layer(branch, stage)
    linear(IO["x"]).square().sum().backward()
    for name, wanted in FLAGS[f"{branch}.stage{stage}"].items():
        parameter = here(linear, name)
        trains = parameter is not None and parameter.requires_grad
        by_controller = branch == "paper" and stage >= 1 and name.startswith("adapter_scales")
        if by_controller:
            assert not wanted["requires_grad"]
            assert trains == (int(name.split(".")[1]) < stage), name
        else:
            assert trains == wanted["requires_grad"], name
        if parameter is not None:
            assert (parameter.grad is not None) == trains, name


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_gradient_of_the_input_goes_around_what_is_detached(branch: str) -> None:
    """Through W0 and the newest stage in both; through older stages at head alone. Against a plain computation."""
    linear, state = layer(branch, 3), theirs(branch, 3)
    x = IO["x"].clone().requires_grad_()
    linear(x).sum().backward()

    def scale(name: str) -> Tensor:
        return 1 + META["s_range"] * state[f"{name}.logit"].tanh()

    weight = state["weight"] * (scale("base_weight_scale") if branch == "head" else 1)
    for index in range(3) if branch == "head" else [2]:
        A, B = (state[f"adapters.{index}.lora_{factor}"] for factor in "AB")
        weight = weight + scale(f"adapter_scales.{index}") * META["scaling"] * B @ A
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), atol=1e-5, rtol=1e-5)


def test_both_branches_are_equal_without_a_scale_of_the_base() -> None:
    state = theirs("head", 3)
    state["base_weight_scale.logit"].zero_()
    head, paper = fresh("head"), fresh("paper")
    head.load_state_dict(state)
    paper.load_state_dict({key: value for key, value in state.items() if not key.startswith("base_weight")})
    assert torch.equal(head(IO["x"]), paper(IO["x"]))


def test_a_state_inside_a_model_is_read_and_the_other_branch_is_refused() -> None:
    model = nn.Sequential(fresh("head"), nn.ReLU())
    model.load_state_dict({f"0.{key}": value for key, value in theirs("head", 2).items()})
    assert isinstance(model[0], StagedLinear)
    torch.testing.assert_close(model[0](IO["x"]), IO["head.stage2.y"], atol=2e-6, rtol=1e-6)
    with pytest.raises(CheckpointError, match=r"has a base_weight_scale, but policy is 'paper': set policy to 'head'"):
        fresh("paper").load_state_dict(theirs("head", 3))
    with pytest.raises(CheckpointError, match=r"has no base_weight_scale, but policy is 'head': set policy to 'paper'"):
        fresh("head").load_state_dict(theirs("paper", 3))


def test_strict_reads_the_state_of_the_paper_and_trains_the_newest_alone() -> None:
    linear = fresh("paper", "strict")
    linear.load_state_dict(theirs("paper", 3))
    torch.testing.assert_close(linear(IO["x"]), IO["paper.stage3.y"], atol=2e-6, rtol=1e-6)
    trained = {name for name, parameter in linear.named_parameters() if parameter.requires_grad}
    assert trained == {"stages.lora_A", "stages.lora_B", "stages.scale_logits.2"}


def test_a_wrong_shape_is_refused() -> None:
    state = theirs("paper", 3)
    state["adapters.1.lora_A"] = state["adapters.1.lora_A"][:2]
    with pytest.raises(RuntimeError, match=r"size mismatch for stages.old_lora_A.1"):
        fresh("paper").load_state_dict(state)


def test_more_stages_than_there_may_be_are_refused() -> None:
    linear = StagedLinear(12, 10, config=StagedConfig(r=4, alpha=8, num_stages=3))
    with pytest.raises(CheckpointError, match="is of stage 3, but num_stages is 3"):
        linear.load_state_dict(theirs("paper", 3))
