"""The trunk: its memory, its experts, its gate, its stages; and the agent's parts around it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelora.errors import ConfigError, UserError
from moelora.experts.staged_linear import stage_linears
from moelora.rl.agent import Agent, Context, TaskShape, Window
from moelora.rl.model_config import AgentConfig, TrunkConfig
from moelora.rl.trunk import Memory, MoELayer, Trunk

SMALL = TrunkConfig(dim=16, layers=2, heads=2, experts=3, top_k=2, expert_dim=24)
STAGES = {"r": 2, "alpha": 4, "num_stages": 4}


@pytest.fixture
def trunk() -> Trunk:
    return Trunk(SMALL)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, SMALL.dim)


def changed(module: nn.Module) -> None:
    """Give every trained parameter another value."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@torch.no_grad()
def test_step_by_step_is_the_full_pass(trunk: Trunk) -> None:
    x = tokens(3, 9)
    whole, all_of_it = trunk(x)
    first, memory = trunk(x[:, :4])
    parts = [first]
    for step in range(4, 9):
        hidden, new = trunk(x[:, step : step + 1], memory=memory)
        memory = memory.extended(new)
        parts.append(hidden)
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-5
    assert (memory.keys - all_of_it.keys).abs().max() < 1e-5
    assert memory.mask.shape == (3, 9)


@torch.no_grad()
def test_no_token_sees_a_later_one(trunk: Trunk) -> None:
    x = tokens(2, 6)
    other = x.clone()
    other[:, 4:] = tokens(2, 2)
    assert torch.equal(trunk(x)[0][:, :4], trunk(other)[0][:, :4])
    assert not torch.allclose(trunk(x)[0][:, 4:], trunk(other)[0][:, 4:])


@torch.no_grad()
def test_order_matters(trunk: Trunk) -> None:
    x = tokens(1, 4)
    turned = x[:, [1, 0, 2, 3]]
    assert (trunk(x)[0][:, 3] - trunk(turned)[0][:, 3]).abs().max() > 1e-3


@torch.no_grad()
def test_masked_tokens_are_as_if_they_were_not_there(trunk: Trunk) -> None:
    x = tokens(2, 5)
    mask = torch.tensor([[False, False, True, True, True], [True, False, True, False, True]])
    hidden, memory = trunk(x, mask)
    for row in range(2):
        alone, _ = trunk(x[row : row + 1, mask[row]])
        assert (hidden[row, mask[row]] - alone[0]).abs().max() < 1e-5
    assert hidden.isfinite().all()
    # In the memory, too: what follows sees the same.
    later = tokens(2, 2)
    after, _ = trunk(later, memory=memory)
    for row in range(2):
        whole, _ = trunk(torch.cat([x[row, mask[row]], later[row]])[None])
        assert (after[row] - whole[0, -2:]).abs().max() < 1e-5


@torch.no_grad()
def test_memory_masks_choose_the_way_in_a_tree(trunk: Trunk) -> None:
    root, left, right = tokens(1, 1), tokens(1, 1), tokens(1, 1)
    _, memory = trunk(root)
    for branch in (left, right):
        seen = memory.mask.clone()
        seen[:, 1:] = False
        _, new = trunk(branch, memory=Memory(memory.keys, memory.values, seen))
        memory = memory.extended(new)
    leaf = tokens(1, 1)
    way = Memory(memory.keys, memory.values, torch.tensor([[True, False, True]]))
    expected, _ = trunk(torch.cat([root, right, leaf], dim=1))
    assert (trunk(leaf, memory=way)[0] - expected[:, -1:]).abs().max() < 1e-5


@pytest.mark.parametrize("gate", ["full", "selected"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:gate 'selected'")
def test_experts_are_a_loop_over_tokens(gate: str, top_k: int) -> None:
    layer = MoELayer(TrunkConfig.parse({**SMALL.to_dict(), "gate": gate, "top_k": top_k}))
    twin = copy.deepcopy(layer)
    x = tokens(2, 7)
    out = layer(x)
    rows = []
    for token in x.flatten(0, 1):
        logits = twin.gate.weight @ token
        order = logits.argsort(descending=True)[:top_k].tolist()
        weights = logits.softmax(0)[order] if gate == "full" else logits[order].softmax(0)
        row = twin.shared.down(F.gelu(twin.shared.up(token)))
        for weight, number in zip(weights, order, strict=True):
            expert = twin.experts[number]
            row = row + weight * (expert.w2.weight @ (F.silu(expert.w1.weight @ token) * (expert.w3.weight @ token)))
        rows.append(row)
    expected = torch.stack(rows).view_as(x)
    assert (out - expected).abs().max() < 1e-5
    out.square().sum().backward()
    expected.square().sum().backward()
    for (name, ours), (_, theirs) in zip(layer.named_parameters(), twin.named_parameters(), strict=True):
        wanted = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        assert ours.grad is not None, name
        assert (ours.grad - wanted).abs().max() < 1e-4, name


def test_expert_without_tokens_has_zero_gradients_and_costs_nothing_in_inference() -> None:
    layer = MoELayer(TrunkConfig(dim=16, heads=2, experts=3, top_k=1, shared=False))
    with torch.no_grad():
        layer.gate.weight.zero_()  # the first expert wins every tie
    layer(tokens(1, 4)).sum().backward()
    assert all(not parameter.grad.any() for parameter in layer.experts[2].parameters())
    called = []
    layer.experts[2].register_forward_hook(lambda *_: called.append(True))
    with torch.no_grad():
        layer(tokens(1, 4))
    assert not called


@pytest.mark.parametrize(
    ("gate", "top_k", "trained"), [("selected", 1, False), ("selected", 2, True), ("full", 1, True)]
)
def test_gate_gradient(gate: str, top_k: int, trained: bool) -> None:
    config = TrunkConfig.parse({**SMALL.to_dict(), "gate": gate, "top_k": top_k})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trunk = Trunk(config)
    assert [str(each.message) for each in caught if "gets no gradient" in str(each.message)] == [
        str(each.message) for each in caught
    ]
    assert len(caught) == (0 if trained else 1)
    trunk(tokens(2, 5))[0].square().sum().backward()
    for block in trunk.blocks:
        gradient = block.moe.gate.weight.grad
        assert bool(gradient.abs().max() > 0) == trained


def test_one_expert_needs_no_warning() -> None:
    Trunk(TrunkConfig(dim=16, heads=2, experts=1, gate="selected"))


def test_stages_sit_on_attention_and_experts_and_old_ones_come_back_bitwise(trunk: Trunk) -> None:
    x = tokens(2, 6)
    plain, _ = trunk(x)
    staged = stage_linears(trunk, STAGES, Trunk.LINEARS)
    assert len(staged.linears) == 2 * (4 + 3 * 3)
    assert not any("shared" in path or "gate" in path for path in staged.linears)
    assert torch.equal(trunk(x)[0], plain)
    seen = []
    for stage in range(4):
        if stage:
            assert staged.advance()
        changed(trunk)
        with torch.no_grad():
            hidden, memory = trunk(x[:, :4])
            seen.append((trunk(x)[0], torch.cat([hidden, trunk(x[:, 4:], memory=memory)[0]], dim=1)))
    assert not torch.equal(seen[1][0], seen[3][0])
    for stage, (whole, stepped) in enumerate(seen):
        with staged.at(stage), torch.no_grad():
            assert torch.equal(trunk(x)[0], whole)
            hidden, memory = trunk(x[:, :4])
            assert torch.equal(torch.cat([hidden, trunk(x[:, 4:], memory=memory)[0]], dim=1), stepped)
            assert (whole - stepped).abs().max() < 1e-5


def test_every_stage_trains_its_own_and_nothing_else_of_the_trunk() -> None:
    agent = Agent({"a": ((3,), 2)}, AgentConfig(trunk=SMALL))
    staged = stage_linears(agent.trunk, STAGES, Trunk.LINEARS)
    staged.advance()
    assert all("stages" in name for name, each in agent.trunk.named_parameters() if each.requires_grad)
    logits, values = agent.policy_value("a", Context.of(torch.randn(4, 3)))
    changed(agent.part("a"))  # heads start at zero and pass no gradient on
    changed(agent.trunk)
    logits, values = agent.policy_value("a", Context.of(torch.randn(4, 3)))
    (logits.sum() + values[:, 0].sum()).backward()
    assert agent.trunk.blocks[0].attention.v.stages.lora_A.grad.any()
    assert agent.part("a").encoder[0].weight.grad.any()


def test_trunk_does_not_see_the_task() -> None:
    agent = Agent({"a": ((3,), 2), "b": ((3,), 2)}, AgentConfig(trunk=SMALL))
    agent.part("b").load_state_dict(agent.part("a").state_dict())
    changed(agent.part("a").policy_head)
    agent.part("b").policy_head.load_state_dict(agent.part("a").policy_head.state_dict())
    context = Context(torch.randn(2, 3, 3), torch.randint(2, (2, 2)), torch.ones(2, 3, dtype=torch.bool))
    for ours, theirs in zip(agent.policy_value("a", context), agent.policy_value("b", context), strict=True):
        assert torch.equal(ours, theirs)
    assert not any(part == "a" or part == "b" for name, _ in agent.trunk.named_parameters() for part in name.split("."))


def test_fresh_agent_acts_at_random_and_expects_nothing() -> None:
    agent = Agent({"a": TaskShape((3,), 4)}, AgentConfig(trunk=SMALL))
    logits, values = agent.policy_value("a", Context.of(torch.randn(2, 3)))
    assert not logits.any()
    assert agent.part("a").support.scalar(values).abs().max() < 1e-4


def test_support_tells_scalars_back() -> None:
    support = Agent({"a": ((1,), 1)}, AgentConfig(trunk=SMALL, support=30)).part("a").support
    for value in (-500.0, -1.3, 0.0, 0.4, 21.0, 612.5):
        logits = torch.zeros(61, requires_grad=True)
        # At zero logits the gradient is softmax - target.
        (gradient,) = torch.autograd.grad(support.loss(logits, torch.tensor(value)), logits)
        target = 1 / 61 - gradient
        assert target.min() > -1e-6 and (target > 1e-6).sum() <= 2
        assert support.scalar(target.clamp(min=1e-30).log()).item() == pytest.approx(value, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("norm", ["simnorm", "layernorm"])
def test_latents_are_normed_and_their_loss_is_zero_at_the_target(norm: str) -> None:
    part = Agent({"a": ((5,), 2)}, AgentConfig.parse({"trunk": SMALL.to_dict(), "latent_norm": norm})).part("a")
    latents = part.encode(torch.randn(4, 2, 5))
    assert latents.shape == (4, 2, 16)
    if norm == "simnorm":
        assert torch.allclose(latents.unflatten(-1, (2, 8)).sum(-1), torch.ones(4, 2, 2))
        by_hand = F.kl_div(latents[1:].log(), latents[:-1], reduction="none").unflatten(-1, (2, 8)).sum(-1).mean(-1)
    else:
        assert latents.mean(-1).abs().max() < 1e-5
        by_hand = F.mse_loss(latents[1:], latents[:-1], reduction="none").mean(-1)
    assert torch.allclose(part.norm.loss(latents[1:], latents[:-1]), by_hand, atol=1e-6)
    assert part.norm.loss(latents, latents).abs().max() == 0


def test_frames_have_an_encoder() -> None:
    agent = Agent({"a": ((3, 40, 36), 2)}, AgentConfig(trunk=SMALL))
    assert agent.part("a").encode(torch.rand(2, 4, 3, 40, 36)).shape == (2, 4, 16)


def test_frozen_task_stays_while_others_train() -> None:
    agent = Agent({"a": ((3,), 2), "b": ((2,), 3)}, AgentConfig(trunk=SMALL))
    optimizer = torch.optim.AdamW(agent.parameters(), lr=0.1)
    before = copy.deepcopy(agent.part("a").state_dict())
    kept = agent.copy_task("a")
    agent.policy_value("a", Context.of(torch.randn(2, 3)))[0].sum().backward()
    agent.freeze_task("a")
    agent.policy_value("b", Context.of(torch.randn(2, 2)))[0].sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in agent.part("a").state_dict().items())
    agent.thaw_task("a")
    changed(agent.part("a"))
    assert all(torch.equal(value, before[key]) for key, value in kept.state_dict().items())
    assert not any(each.requires_grad for each in kept.parameters())
    assert all(each.requires_grad for each in agent.part("a").parameters())


def test_window_forgets_what_was_before_a_reset() -> None:
    window = Window(2, 3, (1,))
    window.push(torch.tensor([[1.0], [10.0]]))
    window.push(torch.tensor([[2.0], [20.0]]), torch.tensor([0, 1]), torch.tensor([False, False]))
    again = Window(2, 3, (1,))
    again.load_state_dict(window.state_dict())
    for each in (window, again):
        last = each.look(torch.tensor([[3.5], [30.5]]), torch.tensor([1, 1]))
        assert last.observations[1, :, 0].tolist() == [10, 20, 30.5]
        assert last.mask.all()
        context = each.push(torch.tensor([[3.0], [30.0]]), torch.tensor([1, 1]), torch.tensor([False, True]))
        assert context.observations[0, :, 0].tolist() == [1, 2, 3]
        assert context.actions[0].tolist() == [0, 1]
        assert context.mask.tolist() == [[True, True, True], [False, False, True]]
    agent = Agent({"a": ((1,), 2)}, AgentConfig(trunk=SMALL))
    changed(agent.part("a"))
    alone = agent.policy_value("a", Context.of(torch.tensor([[30.0]])))[0]
    assert (agent.policy_value("a", context)[0][1] - alone[0]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("tasks", "word"),
    [
        ({}, "empty"),
        ({"a.b": ((3,), 2)}, "dots"),
        ({"a": ((3, 3), 2)}, "neither"),
        ({"a": ((3, 84, 8), 2)}, "36"),
        ({"a": ((3,), 0)}, "discretise"),
    ],
)
def test_tasks_that_cannot_be(tasks: dict[str, tuple[tuple[int, ...], int]], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Agent(tasks, AgentConfig(trunk=SMALL))


def test_errors_of_use() -> None:
    agent = Agent({"pole": ((3,), 2)}, AgentConfig(trunk=SMALL))
    with pytest.raises(UserError, match=r"pale.*pole"):
        agent.part("pale")
    with pytest.raises(UserError, match=r"\(2, 4\).*\(3,\)"):
        agent.part("pole").encode(torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("given", "word"),
    [({"dim": 12, "heads": 4}, "rotary"), ({"top_k": 5}, "top_k"), ({"width": 3}, "unknown key 'width'")],
)
def test_sizes_that_cannot_be(given: dict[str, int], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        TrunkConfig.parse(given)


def test_groups_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="group_size"):
        AgentConfig.parse({"group_size": 7})
    AgentConfig.parse({"group_size": 7, "latent_norm": "layernorm"})
