"""The world model: its targets, its losses by hand, and a search on what it has learnt."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from moelora.errors import TrainingError, UserError
from moelora.experts.staged_linear import stage_linears
from moelora.rl.agent import Agent, Context
from moelora.rl.model_config import AgentConfig, SearchConfig, WorldModelConfig
from moelora.rl.search import search
from moelora.rl.trunk import Trunk
from moelora.rl.world_model import Imagined, Segments, WorldModel, n_step_targets

TINY = AgentConfig.parse(
    {
        "trunk": {"dim": 16, "layers": 2, "heads": 2, "experts": 2, "expert_dim": 24},
        "head_dim": 16,
        "support": 5,
    }
)


def changed(module: torch.nn.Module, size: float = 0.3) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))


def model(**config: float) -> WorldModel:
    made = WorldModel(Agent({"a": ((3,), 2), "b": ((2,), 3)}, TINY), WorldModelConfig.parse(config))
    changed(made)
    return made


def segments(lengths: list[int], T: int, terminated: list[bool] | None = None, size: int = 3, A: int = 2) -> Segments:
    B = len(lengths)
    return Segments(
        torch.randn(B, T + 1, size),
        torch.randint(A, (B, T)),
        torch.randn(B, T),
        torch.rand(B, T, A).softmax(-1),
        torch.arange(T)[None] < torch.tensor(lengths)[:, None],
        torch.tensor(terminated or [False] * B),
    )


def test_n_step_targets_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    following = torch.tensor([[10.0, 20.0, 30.0, 40.0, 50.0]])
    no, third = torch.zeros(1, 5, dtype=torch.bool), torch.tensor([[False, False, True, False, False]])

    def targets(terminated: Tensor, truncated: Tensor, steps: int) -> list[float]:
        return n_step_targets(rewards, following, terminated, truncated, 0.5, steps)[0].tolist()

    assert targets(no, no, 1) == [1 + 5, 2 + 10, 3 + 15, 4 + 20, 5 + 25]
    assert targets(no, no, 3) == [
        1 + 1 + 0.75 + 30 / 8,
        2 + 1.5 + 1 + 40 / 8,
        3 + 2 + 1.25 + 50 / 8,
        4 + 2.5 + 50 / 4,  # no further than the last, whose value counts
        5 + 25,
    ]
    assert targets(third, no, 3) == [1 + 1 + 0.75, 2 + 1.5, 3, 4 + 2.5 + 50 / 4, 5 + 25]
    assert targets(no, third, 3) == [1 + 1 + 0.75 + 30 / 8, 2 + 1.5 + 30 / 4, 3 + 15, 4 + 2.5 + 50 / 4, 5 + 25]
    assert targets(third, no, 9)[:3] == [1 + 1 + 0.75, 2 + 1.5, 3]


def test_what_follows_an_end_is_not_looked_at() -> None:
    ends = torch.tensor([[False, True, False]])
    rewards, following = torch.tensor([[1.0, 2.0, math.nan]]), torch.tensor([[1.0, math.nan, math.nan]])
    terminated = n_step_targets(rewards, following, ends, torch.zeros_like(ends), 0.5, 3)
    assert terminated[0, :2].tolist() == [2.0, 2.0]


def test_losses_by_hand() -> None:
    world = model(discount=0.9, n_steps=2)
    batch = segments([3, 2], 3, [False, True])
    losses = world.losses("a", batch)
    part, target = world.agent.part("a"), world.target.part("a")
    sums, counts = dict.fromkeys(losses, 0.0), dict.fromkeys(losses, 0)

    def hidden(agent: Agent, row: int) -> Tensor:
        own = agent.part("a")
        tokens = []
        for step in range(int(batch.mask[row].sum()) + 1):
            tokens.append(own.encode(batch.observations[row, step]))
            if step < batch.mask[row].sum():
                tokens.append(own.actions(batch.actions[row, step]))
        return agent.trunk(torch.stack(tokens)[None])[0][0]

    def count(name: str, value: Tensor) -> None:
        sums[name] += value.item()
        counts[name] += 1

    for row in range(2):
        length, ours, theirs = int(batch.mask[row].sum()), hidden(world.agent, row), hidden(world.target, row)
        values = target.support.scalar(target.value_head(theirs[::2])).tolist()
        if row == 1:
            values[-1] = 0.0  # it terminated there
        rewards = batch.rewards[row].tolist()
        for step in range(length):
            at_z, at_a = ours[2 * step], ours[2 * step + 1]
            count("policy", -(batch.policies[row, step] * part.policy_head(at_z).log_softmax(-1)).sum())
            if step + 2 <= length:
                wanted = rewards[step] + 0.9 * rewards[step + 1] + 0.81 * values[step + 2]
            else:
                wanted = rewards[step] + 0.9 * values[step + 1]
            count("value", part.support.loss(part.value_head(at_z), torch.tensor(wanted)))
            count("reward", part.support.loss(part.reward_head(at_a), batch.rewards[row, step]))
            told = target.encode(batch.observations[row, step + 1])
            count("latent", part.norm.loss(part.next_latent(at_a), told))
        if row == 1:
            count("value", part.support.loss(part.value_head(ours[-1]), torch.tensor(0.0)))
    assert counts == {"policy": 5, "value": 6, "reward": 5, "latent": 5}
    for name, value in losses.items():
        assert value.item() == pytest.approx(sums[name] / counts[name], abs=1e-5), name


def test_whole_is_the_mean_over_tasks_with_coefficients() -> None:
    world = model(policy_coef=2, value_coef=3, reward_coef=5, latent_coef=7)
    batch = {"a": segments([3, 2], 3), "b": segments([2], 4, size=2, A=3)}
    whole, told = world.loss(batch)
    by_hand = 0.0
    for task, each in batch.items():
        losses = world.losses(task, each)
        assert {name: value.item() for name, value in losses.items()} == {k: v.item() for k, v in told[task].items()}
        by_hand += 2 * losses["policy"] + 3 * losses["value"] + 5 * losses["reward"] + 7 * losses["latent"]
    assert whole.item() == pytest.approx(by_hand.item() / 2, rel=1e-5)
    whole.backward()
    assert all(parameter.grad is None for parameter in world.target.parameters())
    for name, parameter in world.agent.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) or "reward" in name or "experts" in name, name


@pytest.mark.parametrize("terminated", [False, True])
@pytest.mark.parametrize("rubbish", [7.0, math.nan])
def test_padding_changes_nothing(terminated: bool, rubbish: float) -> None:
    world = model()
    batch = segments([4, 2, 1], 4, [terminated] * 3)
    other = copy.deepcopy(batch)
    behind = ~batch.mask
    other.observations[:, 1:][behind] = rubbish
    other.rewards[behind] = rubbish
    other.policies[behind] = rubbish
    other.actions[behind] = 1 - batch.actions[behind]
    gradients = []
    for each in (batch, other):
        whole, _ = world.loss({"a": each})
        world.zero_grad()
        whole.backward()
        gradients.append([whole.detach()] + [p.grad for p in world.agent.part("a").parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))
    targets = [world.value_targets("a", each)[batch.mask] for each in (batch, other)]
    assert torch.equal(*targets)
    # What is real does count: the last observation, too, unless it is the end, whose value is zero whatever it shows.
    for field in ("observations", "rewards", "policies"):
        moved = copy.deepcopy(batch)
        getattr(moved, field)[1, 1] += torch.randn_like(getattr(moved, field)[1, 1])
        assert world.loss({"a": moved})[0] != gradients[0][0], field
    last = copy.deepcopy(batch)
    last.observations[2, 1] += 1
    assert torch.equal(world.value_targets("a", last)[2, 0], world.value_targets("a", batch)[2, 0]) == terminated


def test_more_padding_is_the_same_loss() -> None:
    world = model()
    short = segments([3, 2], 3, [True, False])
    long = segments([3, 2], 6, [True, False])
    for name in ("actions", "rewards", "policies"):
        getattr(long, name)[:, :3] = getattr(short, name)
    long.observations[:, :4] = short.observations
    assert world.loss({"a": long})[0].item() == pytest.approx(world.loss({"a": short})[0].item(), rel=1e-5)


def test_target_follows_and_does_not_train() -> None:
    world = model(target_momentum=0.25)
    before = copy.deepcopy(world.target.state_dict())
    changed(world.agent)
    world.update_target()
    new = world.agent.state_dict()
    for key, value in world.target.state_dict().items():
        assert torch.allclose(value, 0.75 * before[key] + 0.25 * new[key], atol=1e-6), key
    assert not any(parameter.requires_grad for parameter in world.target.parameters())


def test_target_enters_the_stages_of_the_agent() -> None:
    world = model(target_momentum=0.5)
    staged = stage_linears(world.agent.trunk, {"r": 2, "num_stages": 3}, Trunk.LINEARS)
    world.update_target()
    for _ in range(2):
        staged.advance()
        changed(world.agent)
        world.update_target()
        assert world.target.state_dict().keys() == world.agent.state_dict().keys()
        assert not any(parameter.requires_grad for parameter in world.target.parameters())
        changed(world.agent)
        world.update_target()
        world.loss({"a": segments([3], 3)})[0].backward()
    assert staged.stage == 2
    assert world.agent.trunk.blocks[1].attention.v.stages.lora_B.grad.any()
    ours = {id(parameter) for parameter in world.agent.parameters()}
    assert not any(id(parameter) in ours for parameter in world.target.parameters())


@torch.no_grad()
def test_nodes_of_a_search_are_full_passes_over_their_ways() -> None:
    agent = model().agent
    part = agent.part("a")
    mask = torch.tensor([[True, True], [False, True]])
    context = Context(torch.randn(2, 2, 3), torch.randint(2, (2, 1)), mask)
    imagined = Imagined(agent, "a", context)
    found = [imagined.start(6)]
    ways: list[list[list[int]]] = [[[], []]]
    generator = np.random.default_rng(0)
    for number in range(1, 6):
        parents, actions = generator.integers(number, size=2), generator.integers(2, size=2)
        found.append(imagined.expand(parents, actions))
        ways.append([[*ways[parents[row]][row], int(actions[row])] for row in range(2)])
    assert max(len(way) for each in ways for way in each) > 1
    for each, rows in zip(found, ways, strict=True):
        for row, way in enumerate(rows):
            tokens = []
            for step in range(2):
                if mask[row, step]:
                    tokens.append(part.encode(context.observations[row, step]))
                    if step == 0:
                        tokens.append(part.actions(context.actions[row, 0]))
            reward = 0.0
            for action in way:
                tokens.append(part.actions(torch.tensor(action)))
                hidden = agent.trunk(torch.stack(tokens)[None])[0][0, -1]
                reward = part.support.scalar(part.reward_head(hidden)).item()
                tokens.append(part.next_latent(hidden))
            hidden = agent.trunk(torch.stack(tokens)[None])[0][0, -1]
            assert each.values[row] == pytest.approx(part.support.scalar(part.value_head(hidden)).item(), abs=1e-4)
            assert each.logits[row] == pytest.approx(part.policy_head(hidden).numpy(), abs=1e-4)
            assert each.rewards[row] == pytest.approx(reward, abs=1e-4)


def test_many_roots_are_single_roots() -> None:
    world = model()
    observations = torch.randn(5, 3)
    together = world.plan("a", Context.of(observations), SearchConfig(simulations=12))
    for row in range(5):
        alone = world.plan("a", Context.of(observations[row : row + 1]), SearchConfig(simulations=12))
        assert np.array_equal(alone.visits[0], together.visits[row])
        assert alone.values[0] == pytest.approx(together.values[row], abs=1e-5)


def test_plan_at_an_old_stage_is_the_old_plan() -> None:
    world = model()
    staged = stage_linears(world.agent.trunk, {"r": 2, "num_stages": 3}, Trunk.LINEARS)
    context, config = Context.of(torch.randn(3, 3)), SearchConfig(simulations=8)
    before = world.plan("a", context, config)
    staged.advance()
    changed(staged.linears["blocks.0.attention.v"].stages)
    assert not np.array_equal(world.plan("a", context, config).values, before.values)
    with staged.at(0):
        again = world.plan("a", context, config)
    assert np.array_equal(again.visits, before.visits) and np.array_equal(again.values, before.values)


def chain(generator: torch.Generator, count: int, T: int) -> Segments:
    """Three states in a row; action 0 goes left, 1 right. Staying left pays 0.1, staying right pays 1."""
    state = torch.randint(3, (count,), generator=generator)
    states, actions, rewards = [state], [], []
    for _ in range(T):
        action = torch.randint(2, (count,), generator=generator)
        rewards.append(torch.where(state == 0, 0.1 * (action == 0), 1.0 * ((state == 2) & (action == 1))))
        state = (state + 2 * action - 1).clamp(0, 2)
        states.append(state)
        actions.append(action)
    return Segments(
        torch.eye(3)[torch.stack(states, 1)],
        torch.stack(actions, 1),
        torch.stack(rewards, 1),
        torch.full((count, T, 2), 0.5),  # learn nothing from the policy: the search has to find it
        torch.ones(count, T, dtype=torch.bool),
        torch.zeros(count, dtype=torch.bool),
    )


def test_search_on_what_was_learnt_finds_the_optimal_action() -> None:
    generator = torch.Generator().manual_seed(0)
    config = replace_trunk(layers=1)
    world = WorldModel(
        Agent({"chain": ((3,), 2)}, config), WorldModelConfig(discount=0.8, n_steps=3, target_momentum=0.1)
    )
    context, searching = Context.of(torch.eye(3)), SearchConfig(simulations=50, discount=0.8)
    optimizer = torch.optim.Adam(world.agent.parameters(), lr=5e-3)
    first = None
    for _ in range(120):
        loss, told = world.loss({"chain": chain(generator, 32, 6)})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        world.update_target()
        first = told["chain"] if first is None else first
    assert told["chain"]["reward"] < 0.1 * first["reward"]
    assert told["chain"]["latent"] < 0.2 * first["latent"]
    result = world.plan("chain", context, searching)
    assert result.policy == pytest.approx(np.full((3, 2), 0.5), abs=0.05)  # so it is not the policy that knows
    # In state 0 staying pays at once, 0.1 / (1 - 0.8) = 0.5 in all, and going right 0.8^2 / (1 - 0.8) = 3.2.
    assert result.best().tolist() == [1, 1, 1]
    assert (result.shares[:, 1] > 0.7).all()
    noisy = [world.plan("chain", context, searching, np.random.default_rng(1)).visits for _ in range(2)]
    assert np.array_equal(*noisy)


def replace_trunk(**trunk: int) -> AgentConfig:
    given = TINY.to_dict()
    return AgentConfig.parse({**given, "trunk": {**given["trunk"], **trunk}})


def test_segments_that_do_not_fit() -> None:
    good = segments([2, 3], 3)
    with pytest.raises(UserError, match=r"observations \(2, 3, 3\)"):
        replace(good, observations=good.observations[:, :3])
    with pytest.raises(UserError, match="true for its first steps"):
        replace(good, mask=torch.tensor([[True, False, True], [True, True, True]]))
    with pytest.raises(UserError, match="true for its first steps"):
        replace(good, mask=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(UserError, match="'b' has 3 actions, but policies are of 2"):
        model().losses("b", segments([2], 2, size=2))


def test_losses_that_are_not_finite_name_the_task() -> None:
    world = model()
    bad = segments([2], 2)
    bad.rewards[0, 1] = math.nan
    with pytest.raises(TrainingError, match=r"'a': the (value|reward) loss is nan"):
        world.loss({"a": bad})
    with pytest.raises(UserError, match="no tasks"):
        world.loss({})


def test_models_that_break_down_stop_the_search() -> None:
    world = model()
    with torch.no_grad():
        world.agent.part("a").value_head[-1].bias.fill_(math.nan)
    with pytest.raises(TrainingError, match="values of the model"):
        search(Imagined(world.agent, "a", Context.of(torch.randn(1, 3))), SearchConfig(simulations=2))
