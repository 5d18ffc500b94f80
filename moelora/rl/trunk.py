"""The transformer that all tasks share: causal attention, and a MoE of SwiGLU experts as the feed-forward.

Source: the backbone of ScaleZero (arXiv 2509.07945; opendilab/LightZero, ``MoELayer``), of which are the layer before
norm, the gate without bias, experts ``w2(silu(w1 x) w3 x)``, one shared expert ``down(gelu(up x))``, and no balance
loss. It does not know the task: tokens are all that it sees.

Differences from LightZero. Positions are rotary, where its default is a learnt table: the depth of a search has no
bound that a table could have. Linears of the attention have no bias, and there is no dropout. The gate ``selected`` is
LightZero's, which its published configurations use with one expert for each token: the softmax over one logit is the
constant 1, so the gate stays as it was drawn, a fixed partition of the tokens. ``full`` is what Switch does: the
softmax over all experts, of which the selected are taken, and the gate trains.

Shapes: B batch, S tokens, M tokens remembered, D dim, H heads, d dim of a head, E experts, K of them for each token,
T = B S.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model_config import TrunkConfig


class Memory(NamedTuple):
    """What later tokens attend to.

    Attributes:
        keys, values: (layers, B, H, M, d); keys are rotated to their positions.
        mask: (B, M) bool, whether a token can be seen. Its position is the number of tokens seen before it.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor

    def extended(self, later: Memory) -> Memory:
        """This and what came later."""
        return Memory(
            torch.cat([self.keys, later.keys], dim=3),
            torch.cat([self.values, later.values], dim=3),
            torch.cat([self.mask, later.mask], dim=1),
        )


class Turns(NamedTuple):
    """Cosine and sine, (B, 1, S, d / 2) each, of the angles of rotary positions."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def to(cls, positions: Tensor, rates: Tensor, dtype: torch.dtype) -> Turns:
        """Those for ``positions`` (B, S), at ``rates`` (d / 2,) in radians for each position."""
        angles = positions[:, None, :, None] * rates
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))

    def turn(self, x: Tensor) -> Tensor:
        """(B, H, S, d) ``x``, its first half paired with its second."""
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * self.cos - second * self.sin, first * self.sin + second * self.cos], dim=-1)


class Attention(nn.Module):
    """Attention with rotary positions. Its linears are ``q``, ``k``, ``v`` and ``proj``, (D, D) each."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.proj = (nn.Linear(config.dim, config.dim, bias=False) for _ in range(4))

    def forward(
        self, x: Tensor, turns: Turns, seen: Tensor, before: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend.

        Args:
            x: (B, S, D). seen: (B, 1, S, M + S) bool. before: keys and values of M tokens.

        Returns:
            (B, S, D), and keys and values of these tokens, (B, H, S, d).
        """
        query, new_keys, new_values = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        query, new_keys = turns.turn(query), turns.turn(new_keys)
        keys, values = new_keys, new_values
        if before is not None:
            keys, values = torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen)
        return self.proj(out.transpose(1, 2).flatten(2)), new_keys, new_values


class SwiGLU(nn.Module):
    """One expert, ``w2(silu(w1 x) * w3 x)``."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, inner_dim, bias=False)
        self.w2 = nn.Linear(inner_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, inner_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.w2(F.silu(self.w1(x)) * self.w3(x)))


class SharedExpert(nn.Module):
    """The expert of every token, ``down(gelu(up x))``."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, inner_dim)
        self.down = nn.Linear(inner_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down(F.gelu(self.up(x))))


class MoELayer(nn.Module):
    """Each token through ``top_k`` experts, and through the shared one.

    An expert without tokens computes on none of them in training, so that its gradients are zero and not missing.
    """

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.top_k, self.full = config.top_k, config.gate == "full"
        self.gate = nn.Linear(config.dim, config.experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(config.dim, config.inner_dim) for _ in range(config.experts))
        self.shared = SharedExpert(config.dim, config.inner_dim) if config.shared else None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, K) weights, float32, and (T, K) indices of the experts of tokens ``x`` (T, D)."""
        logits = F.linear(x.float(), self.gate.weight.float())
        if self.full:
            weights, indices = logits.softmax(-1).topk(self.top_k, dim=-1)
            return weights, indices
        chosen, indices = logits.topk(self.top_k, dim=-1)
        return chosen.softmax(-1), indices

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, indices = self.route(tokens)
        chosen = indices.flatten()
        order = chosen.argsort(stable=True)
        rows = order // self.top_k
        parts = tokens[rows].split(chosen.bincount(minlength=len(self.experts)).tolist())
        made = [
            expert(part)
            for expert, part in zip(self.experts, parts, strict=True)
            if len(part) or torch.is_grad_enabled()
        ]
        out = torch.zeros_like(tokens) if self.shared is None else self.shared(tokens)
        mixed = torch.cat(made) * weights.flatten()[order, None].to(x.dtype)
        return out.index_add(0, rows, mixed.to(out.dtype)).view_as(x)


class Block(nn.Module):
    """Attention and MoE, each after a norm and beside a residual."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = Attention(config)
        self.moe_norm = nn.LayerNorm(config.dim)
        self.moe = MoELayer(config)

    def forward(
        self, x: Tensor, turns: Turns, seen: Tensor, before: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`Attention.forward`."""
        attended, keys, values = self.attention(self.attention_norm(x), turns, seen, before)
        x = x + attended
        return x + self.moe(self.moe_norm(x)), keys, values


class Trunk(nn.Module):
    """The transformer. Put stages on it with ``stage_linears(trunk, config, Trunk.LINEARS)``.

    Attributes:
        LINEARS: names of the linears that ScaleZero's stages sit on: those of the attention and of all experts but the
            shared one.
    """

    LINEARS = ("q", "k", "v", "proj", "w1", "w2", "w3")

    rates: Tensor

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        if config.gate == "selected" and config.top_k == 1 < config.experts:
            warnings.warn(
                "gate 'selected' with top_k 1: the softmax over one expert is always 1, so the gate gets no gradient "
                "and tokens are divided as at the start. Take gate: full, or top_k: 2",
                stacklevel=2,
            )
        self.config = config
        d = config.dim // config.heads
        self.register_buffer("rates", config.rope_base ** (-torch.arange(0, d, 2) / d), persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, memory: Memory | None = None
    ) -> tuple[Tensor, Memory]:
        """Hidden states of tokens that come after those remembered.

        Args:
            tokens: (B, S, D). mask: (B, S) bool, whether a token is seen by those after it; all are, if ``None``. What
                is computed for a masked token means nothing.
            memory: of the tokens before, of which each sequence sees what its mask says.

        Returns:
            (B, S, D), and the memory of these tokens alone: :meth:`Memory.extended` puts it behind the other.
        """
        B, S, _ = tokens.shape
        seen = torch.ones(S, S, dtype=torch.bool, device=tokens.device).tril().expand(B, S, S)
        if mask is None:
            mask, positions = seen[:, -1], torch.arange(S, device=tokens.device).expand(B, S)
        else:
            positions = mask.cumsum(1) - mask.long()
            itself = torch.eye(S, dtype=torch.bool, device=tokens.device)  # so that a masked token sees something
            seen = seen & (mask[:, None] | itself)
        if memory is not None:
            positions = positions + memory.mask.sum(1, keepdim=True)
            seen = torch.cat([memory.mask[:, None].expand(B, S, -1), seen], dim=2)
        turns = Turns.to(positions, self.rates, tokens.dtype)
        x, keys, values = tokens, [], []
        for number, block in enumerate(self.blocks):
            before = None if memory is None else (memory.keys[number], memory.values[number])
            x, new_keys, new_values = block(x, turns, seen[:, None], before)
            keys.append(new_keys)
            values.append(new_values)
        return self.norm(x), Memory(torch.stack(keys), torch.stack(values), mask)
