"""Options of the trunk, the world model, its search and of PPO.

Defaults are those of UniZero in LightZero (lzero/policy/unizero.py, 00d47975) where it has such an option and a small
setting can bear it; sizes are ours, for one core.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..schema import Closed

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class TrunkConfig(Closed):
    """The transformer that all tasks share.

    Attributes:
        dim, layers, heads: of the transformer; each head has ``dim / heads`` numbers, an even count.
        experts: of each MoE feed-forward. top_k: how many of them each token goes to.
        expert_dim: inner width of an expert, and of the shared one; ``None`` is four times ``dim``.
        shared: whether there is an expert besides, which sees every token.
        gate: ``full`` weighs the selected experts by the softmax over all; ``selected``, as LightZero, by the softmax
            over the selected alone. With ``top_k`` 1 the latter is the constant 1, and the gate is not trained.
        rope_base: of the rotary positions.
    """

    dim: PositiveInt = 64
    layers: PositiveInt = 2
    heads: PositiveInt = 4
    experts: PositiveInt = 4
    top_k: PositiveInt = 1
    expert_dim: PositiveInt | None = None
    shared: bool = True
    gate: Literal["full", "selected"] = "full"
    rope_base: PositiveFloat = 10_000.0

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim {self.dim} is no multiple of twice the {self.heads} heads, as rotary positions need")
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than the {self.experts} experts")
        return self

    @property
    def inner_dim(self) -> int:
        """Inner width of an expert."""
        return self.expert_dim or 4 * self.dim


class AgentConfig(Closed):
    """The trunk, and what each task has of its own.

    Attributes:
        latent_norm: of what the encoder and the dynamics give: ``simnorm``, a softmax within each group of
            ``group_size``, or ``layernorm``.
        head_dim: inner width of encoders and heads.
        support: values and rewards are told as a distribution over ``2 support + 1`` whole numbers, on a scale on which
            ``support`` is a return of about its square.
    """

    trunk: TrunkConfig = TrunkConfig()
    latent_norm: Literal["simnorm", "layernorm"] = "simnorm"
    group_size: Annotated[int, Field(ge=2)] = 8
    head_dim: PositiveInt = 64
    support: PositiveInt = 50

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        if self.latent_norm == "simnorm" and self.trunk.dim % self.group_size:
            raise ValueError(
                f"trunk.dim {self.trunk.dim} is no multiple of group_size {self.group_size}: change one, or take "
                "latent_norm: layernorm"
            )
        return self


class WorldModelConfig(Closed):
    """The objective of the world model.

    Attributes:
        discount: of rewards, for each step. n_steps: rewards in a value target, before the target network's value.
        policy_coef, value_coef, reward_coef, latent_coef: what each loss counts.
        target_momentum: how far the target network goes towards the trained one with each update, 1 copies it.
    """

    discount: Share = 0.997
    n_steps: PositiveInt = 5
    policy_coef: NotNegative = 1.0
    value_coef: NotNegative = 0.25
    reward_coef: NotNegative = 1.0
    latent_coef: NotNegative = 1.0
    target_momentum: Annotated[float, Field(gt=0, le=1)] = 0.05


class SearchConfig(Closed):
    """Monte Carlo tree search.

    Attributes:
        simulations: of each search, each of which adds one node.
        discount: of rewards; the same as in training.
        c_base, c_init: of PUCT, as in MuZero.
        noise_alpha: of the Dirichlet noise at the root. noise_share: what share of the root's policy it has.
    """

    simulations: PositiveInt = 25
    discount: Share = 0.997
    c_base: PositiveFloat = 19_652.0
    c_init: NotNegative = 1.25
    noise_alpha: PositiveFloat = 0.3
    noise_share: Share = 0.25


class PPOConfig(Closed):
    """Proximal policy optimisation.

    Attributes:
        discount, gae_lambda: of generalised advantage estimation.
        clip: how far the ratio of probabilities may go from 1. epochs, minibatch: passes over a batch, steps in each
            minibatch of one task.
        value_coef, entropy_coef: what the loss of the value and the entropy of the policy count.
        max_grad_norm: gradients are scaled down to this norm.
    """

    discount: Share = 0.99
    gae_lambda: Share = 0.95
    clip: PositiveFloat = 0.2
    epochs: PositiveInt = 4
    minibatch: PositiveInt = 256
    value_coef: NotNegative = 0.5
    entropy_coef: NotNegative = 0.01
    max_grad_norm: PositiveFloat = 0.5
