"""PPO by hand, and on two small processes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from moelora.errors import TrainingError, UserError
from moelora.rl.agent import Agent, Context
from moelora.rl.model_config import AgentConfig, PPOConfig
from moelora.rl.ppo import PPOBatch, act, advantages, ppo_loss, ppo_update

TINY = AgentConfig.parse(
    {"trunk": {"dim": 16, "layers": 1, "heads": 2, "experts": 2, "expert_dim": 16}, "head_dim": 16, "support": 5}
)


def batch(agent: Agent, task: str, count: int, size: int = 2) -> PPOBatch:
    context = Context.of(torch.randn(count, size))
    actions, log_probs, _ = act(agent, task, context, torch.Generator().manual_seed(0))
    return PPOBatch(context, actions, log_probs, torch.randn(count), torch.randn(count))


def test_advantages_by_hand() -> None:
    config = PPOConfig(discount=0.5, gae_lambda=0.8)
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    values = torch.tensor([[0.5, 1.0, 1.5, 2.0]])
    following = torch.tensor([[1.0, 10.0, 2.0, 20.0]])
    no, second = torch.zeros(1, 4, dtype=torch.bool), torch.tensor([[False, True, False, False]])

    def by_hand(after_second: float) -> list[float]:
        fourth = 4 + 0.5 * 20 - 2
        third = 3 + 0.5 * 2 - 1.5 + 0.4 * fourth
        two = 2 + 0.5 * after_second - 1
        return [1 + 0.5 * 1 - 0.5 + 0.4 * two, two, third, fourth]

    truncated, returns = advantages(rewards, values, following, no, second, config)
    assert truncated[0].tolist() == pytest.approx(by_hand(10.0))
    assert returns[0].tolist() == pytest.approx([a + v for a, v in zip(by_hand(10.0), values[0].tolist(), strict=True)])
    terminated, _ = advantages(rewards, values, following, second, no, config)
    assert terminated[0].tolist() == pytest.approx(by_hand(0.0))
    # Without an end, lambda 1 is the return less the value.
    whole, _ = advantages(
        rewards, values, torch.tensor([[1.0, 1.5, 2.0, 20.0]]), no, no, PPOConfig(discount=0.5, gae_lambda=1)
    )
    assert whole[0, 0].item() == pytest.approx(1 + 2 / 2 + 3 / 4 + 4 / 8 + 20 / 16 - 0.5)


def test_clipped_loss_by_hand() -> None:
    agent = Agent({"a": ((2,), 2)}, TINY)
    head = agent.part("a").policy_head[-1]
    with torch.no_grad():
        head.bias.copy_(torch.tensor([math.log(0.6), math.log(0.4)]))  # its weight is zero
    actions = torch.tensor([0, 0, 1, 1])
    old = torch.tensor([0.3, 0.6, 0.4, 0.8]).log()
    gains = torch.tensor([1.0, -1.0, 1.0, -1.0])
    steps = PPOBatch(Context.of(torch.randn(4, 2)), actions, old, gains, torch.tensor([0.0, 1.0, -2.0, 50.0]))
    config = PPOConfig(clip=0.2, value_coef=0.5, entropy_coef=0.1)
    loss, parts = ppo_loss(agent, "a", steps, config)
    scale = 1 / gains.std().item()
    # Ratios 2, 1, 1, 0.5: the first is cut to 1.2, the last to 0.8, which is worse for a gain below zero.
    policy = -scale * (1.2 - 1 + 1 - 0.8) / 4
    value = math.log(11)  # logits are zero, whatever the targets
    entropy = -(0.6 * math.log(0.6) + 0.4 * math.log(0.4))
    assert parts["policy"].item() == pytest.approx(policy, abs=1e-5)
    assert parts["value"].item() == pytest.approx(value, abs=1e-5)
    assert parts["entropy"].item() == pytest.approx(entropy, abs=1e-5)
    assert parts["clipped"].item() == 0.5
    assert loss.item() == pytest.approx(policy + 0.5 * value - 0.1 * entropy, abs=1e-5)
    # What is cut has no gradient: that of the policy comes from the second and the third alone.
    (gradient,) = torch.autograd.grad(ppo_loss(agent, "a", steps, PPOConfig(entropy_coef=0))[0], head.bias)
    probs = torch.tensor([0.6, 0.4])
    expected = -scale / 4 * (-(torch.tensor([1.0, 0.0]) - probs) + (torch.tensor([0.0, 1.0]) - probs))
    assert torch.allclose(gradient, expected, atol=1e-5)


def test_actions_follow_the_generator_or_are_the_likeliest() -> None:
    agent = Agent({"a": ((2,), 3)}, TINY)
    with torch.no_grad():
        agent.part("a").policy_head[-1].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    context = Context.of(torch.randn(64, 2))
    drawn, log_probs, values = act(agent, "a", context, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, act(agent, "a", context, torch.Generator().manual_seed(1))[0])
    assert set(drawn.tolist()) == {0, 1, 2}
    assert torch.allclose(log_probs, torch.tensor([0.0, 1.0, 0.0]).log_softmax(0)[drawn])
    assert values.shape == (64,)
    assert (act(agent, "a", context)[0] == 1).all()


def test_learns_two_tasks_of_two_states() -> None:
    """A bandit whose better arm depends on the state, and a chain where the reward comes a step later."""
    agent = Agent({"bandit": ((2,), 2), "chain": ((2,), 2)}, TINY)
    optimizer = torch.optim.Adam(agent.parameters(), lr=5e-3)
    config = PPOConfig(discount=0.9, epochs=4, minibatch=128, entropy_coef=0.0)
    generator = torch.Generator().manual_seed(0)
    eye = torch.eye(2)

    def rollout(task: str) -> tuple[PPOBatch, float]:
        N, T = 16, 8
        state = torch.randint(2, (N,), generator=generator)
        columns = []
        for _ in range(T):
            actions, log_probs, value = act(agent, task, Context.of(eye[state]), generator)
            before = state
            if task == "bandit":
                reward, state = (actions == state).float(), torch.randint(2, (N,), generator=generator)
            else:  # action 1 costs, and leads to the state that pays for any action
                reward, state = 2.0 * (state == 1).float() - 0.5 * (actions == 1).float(), actions
            columns.append((eye[before], actions, log_probs, value, reward))
        _, _, last = act(agent, task, Context.of(eye[state]), generator)
        seen, taken, logs, values, rewards = (torch.stack(each, 1) for each in zip(*columns, strict=True))
        never = torch.zeros(N, T, dtype=torch.bool)
        following = torch.cat([values[:, 1:], last[:, None]], 1)
        gains, returns = (each.flatten() for each in advantages(rewards, values, following, never, never, config))
        steps = PPOBatch(Context.of(seen.flatten(0, 1)), taken.flatten(), logs.flatten(), gains, returns)
        return steps, rewards.mean().item()

    for _ in range(10):
        ppo_update(agent, optimizer, {task: rollout(task)[0] for task in ("bandit", "chain")}, config, generator)
    assert act(agent, "bandit", Context.of(eye))[0].tolist() == [0, 1]
    assert act(agent, "chain", Context.of(eye))[0].tolist() == [1, 1]
    assert rollout("bandit")[1] > 0.9


def test_update_is_the_mean_over_tasks_and_leaves_frozen_parts() -> None:
    agent = Agent({"a": ((2,), 2), "b": ((2,), 2)}, TINY)
    steps = {task: batch(agent, task, 6) for task in ("a", "b")}
    twin = copy.deepcopy(agent)
    config = PPOConfig(epochs=1, minibatch=6, max_grad_norm=1e9)
    told = ppo_update(
        agent, torch.optim.SGD(agent.parameters(), lr=0.1), steps, config, torch.Generator().manual_seed(3)
    )
    assert set(told) == {"a", "b"} and told["a"]["clipped"] == 0
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    (sum(ppo_loss(twin, task, each, config)[0] for task, each in steps.items()) / 2).backward()
    optimizer.step()
    for (name, ours), theirs in zip(agent.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), name
    agent.freeze_task("a")
    before = copy.deepcopy(agent.part("a").state_dict())
    ppo_update(agent, torch.optim.AdamW(agent.parameters(), lr=0.1), {"b": steps["b"]}, config)
    assert all(torch.equal(value, before[key]) for key, value in agent.part("a").state_dict().items())


def test_batches_of_different_sizes_take_part_evenly() -> None:
    agent = Agent({"a": ((2,), 2), "b": ((2,), 2)}, TINY)
    steps = {"a": batch(agent, "a", 9), "b": batch(agent, "b", 2)}
    calls: list[Tensor] = []
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.0)
    optimizer.register_step_post_hook(lambda *_: calls.append(torch.zeros(())))
    told = ppo_update(agent, optimizer, steps, PPOConfig(epochs=2, minibatch=3))
    assert len(calls) == 6
    assert all(math.isfinite(value) for parts in told.values() for value in parts.values())


def test_losses_that_are_not_finite_name_the_task() -> None:
    agent = Agent({"a": ((2,), 2), "pole": ((2,), 2)}, TINY)
    steps = {"a": batch(agent, "a", 4), "pole": batch(agent, "pole", 4)}
    steps["pole"].advantages[1] = math.nan
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    before = copy.deepcopy(agent.state_dict())
    with pytest.raises(TrainingError, match="'pole'"):
        ppo_update(agent, optimizer, steps, PPOConfig())
    assert all(torch.equal(value, before[key]) for key, value in agent.state_dict().items())
    with pytest.raises(UserError, match="no tasks"):
        ppo_update(agent, optimizer, {}, PPOConfig())
