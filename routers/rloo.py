"""Sampling experts as a policy: Plackett-Luce draws, their log-probabilities, and the RLOO surrogate. Tensors only.

Source: ReMix (arXiv 2603.10160), equations 4-6 and its leave-one-out estimator. With M selections J_m of the experts of
the whole model, the gradient of the routers is ``1/(M-1) sum_m (L_m - mean L) grad log Q(J_m)``, which is unbiased for
the gradient of ``E[L(J)]``; dividing by M is not. The paper has one loss for each selection. Our reading gives each
example of the batch a loss, a baseline and a log-probability of its own, which is unbiased as long as the examples do
not influence each other, and has a smaller variance; ``per_example=False`` is the literal form.

Shapes: B batch, S sequence, V vocabulary, E experts, K picks, M selections.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..routing import RoutingRecord
from .topk import top_indices


def plackett_luce(logits: Tensor, indices: Tensor) -> Tensor:
    """(...,) log-probability of drawing ``indices`` (..., K) in that order, without replacement, from logits (..., E).

    Each draw is normalised by the logsumexp over what is left, never by ``1 - sum``, which has no digits left where one
    expert has nearly all of the probability.
    """
    left, total = logits, logits.new_zeros(logits.shape[:-1])
    for pick in indices.unbind(-1):
        pick = pick.unsqueeze(-1)
        total = total + logits.gather(-1, pick).squeeze(-1) - left.logsumexp(dim=-1)
        left = left.scatter(-1, pick, -torch.inf)
    return total


def gumbel_top_k(logits: Tensor, exponential: Tensor, k: int) -> Tensor:
    """(..., K) int64: a Plackett-Luce draw in its order, from logits and Exponential(1) numbers, both (..., E)."""
    gumbel = -exponential.clamp_min(torch.finfo(exponential.dtype).tiny).log()
    return top_indices(logits + gumbel, k)


def seeded_exponential(shape: Sequence[int], seeds: Sequence[int], name: str, device: torch.device) -> Tensor:
    """``shape`` float32 Exponential(1) numbers that follow from ``name`` and, for each block of rows, from its seed.

    Args:
        shape: the first axis is cut into ``len(seeds)`` equal blocks.

    Raises:
        UserError: it cannot be cut so.
    """
    rows, *others = shape
    if not seeds or rows % len(seeds):
        raise UserError(
            f"{len(seeds)} selection_seeds do not divide {rows} rows into equal blocks: repeat the whole batch once "
            "for each seed"
        )
    blocks = []
    for seed in seeds:
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)
        block = torch.empty(rows // len(seeds), *others, dtype=torch.float32, device=device)
        blocks.append(block.exponential_(generator=generator))
    return torch.cat(blocks)


def effective_support(weights: Tensor) -> Tensor:
    """(...,) how many experts the weights (..., E) amount to: ``(sum |w|)^2 / sum w^2``, between 1 and E."""
    return weights.abs().sum(-1).square() / weights.square().sum(-1)


def example_log_prob(records: Iterable[RoutingRecord], num_examples: int) -> Tensor:
    """(B,) log-probability of everything that was sampled for each example in one forward; padding is left out.

    Sites that share a router made one decision together, which counts once.

    Args:
        records: of all sites; those that hold no sample are passed over.

    Raises:
        UserError: nothing was sampled; sites that share a router decided differently; tokens cannot be told apart by
            example.
    """
    decided: dict[str, RoutingRecord] = {}
    parts: list[Tensor] = []
    for record in records:
        if record.log_prob is None:
            continue
        first = record if record.owner is None else decided.setdefault(record.owner, record)
        if first is record:
            parts.append(_by_example(record, record.log_prob, num_examples))
        else:
            _check_alike(first, record)
    if not parts:
        raise UserError(
            "no site sampled its experts: this takes a router of a kind that samples, such as remix, and a model in "
            "training mode"
        )
    return torch.stack([part.to(parts[0].device) for part in parts]).sum(0)


def _by_example(record: RoutingRecord, log_prob: Tensor, num_examples: int) -> Tensor:
    if record.mask is not None and record.mask.shape == log_prob.shape:
        log_prob = torch.where(record.mask, log_prob, 0)
    if log_prob.numel() % num_examples:
        raise UserError(
            f"log-probabilities of the shape {tuple(log_prob.shape)} cannot be told apart by {num_examples} examples"
        )
    return log_prob.reshape(num_examples, -1).sum(-1)


def _check_alike(first: RoutingRecord, other: RoutingRecord) -> None:
    """Both have the same numbers drawn; with the same logits they are one decision, else two that are not independent.

    Compares values, for which a GPU waits; only routers that are shared come here.
    """
    assert first.logits is not None and other.logits is not None
    if first.logits.shape != other.logits.shape or not torch.equal(first.logits, other.logits):
        raise UserError(
            f"sites that share the router of {first.owner!r} see different inputs, so that they decided differently: "
            "name only sites with one input, such as gate_proj and up_proj, or set router.share to 'module'"
        )


def advantages(losses_MB: Tensor, per_example: bool = True, weights_B: Tensor | None = None) -> Tensor:
    """(M, B) without graph: what multiplies each log-probability in :func:`surrogate`.

    Args:
        losses_MB: the loss of each example under each selection.
        per_example: a baseline for each example, ``w_b (L_mb - mean_m L_mb) / (M-1)``; else one for the batch,
            ``(L_m - mean_m L_m) / (M-1)`` with ``L_m = sum_b w_b L_mb``.
        weights_B: w, the part of each example in the loss of a selection; ``None`` means 1 / B.

    Raises:
        ValueError: fewer than two selections, which leave nothing to compare with.
    """
    selections, examples = losses_MB.shape
    if selections < 2:
        raise ValueError(f"{selections} selection: the leave-one-out baseline takes at least 2, choose more")
    weights_B = _shares(losses_MB) if weights_B is None else weights_B
    parts_MB = losses_MB.detach() * weights_B
    if not per_example:
        parts_MB = parts_MB.sum(dim=1, keepdim=True).expand(-1, examples)
    # As a mean of differences, so that equal losses give exactly 0.
    return (parts_MB.unsqueeze(1) - parts_MB.unsqueeze(0)).mean(dim=1) / (selections - 1)


def surrogate(
    losses_MB: Tensor, log_prob_MB: Tensor, per_example: bool = True, weights_B: Tensor | None = None
) -> Tensor:
    """Scalar to minimise: ``mean_m sum_b w_b L_mb + sum advantage * log Q``.

    Its gradient is the mean gradient of the losses where those depend on a parameter, plus the RLOO estimate where the
    log-probabilities do; its value is of no meaning.

    Args:
        losses_MB, log_prob_MB: loss and log-probability of each example under each selection.
        per_example, weights_B: see :func:`advantages`.
    """
    shares_B = _shares(losses_MB) if weights_B is None else weights_B
    score = (advantages(losses_MB, per_example, weights_B) * log_prob_MB).sum()
    return (losses_MB * shares_B).sum(dim=1).mean() + score


def _shares(losses_MB: Tensor) -> Tensor:
    """(B,) of a mean over examples."""
    examples = losses_MB.shape[1]
    return losses_MB.new_full((examples,), 1 / examples)


def example_targets(labels: Tensor, causal: bool = True) -> Tensor:
    """(B,) how many tokens of each example :func:`example_losses` is the mean of."""
    return ((labels[:, 1:] if causal else labels) != -100).sum(dim=1)


def example_losses(logits: Tensor, labels: Tensor, causal: bool = True) -> Tensor:
    """(B,) mean loss of the labelled tokens of each example, float32; 0 for an example without labels.

    Args:
        logits: (B, S, V). labels: (B, S), -100 where there is no loss.
        causal: position s predicts the label of position s + 1.
    """
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    labels = labels.to(logits.device)
    losses_BS = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return losses_BS.sum(dim=1) / (labels != -100).sum(dim=1).clamp(min=1)


def before_the_answer(labels: Tensor) -> Tensor:
    """(B, S) bool: the tokens that lie before the first predicted one of labels (B, S), never none."""
    predicted = labels != -100
    predicted[:, 0] = False
    return predicted.cumsum(dim=1) == 0
