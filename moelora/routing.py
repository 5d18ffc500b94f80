"""What a router sees, what it decides, and how decisions travel: context, record, tape, slot.

Shapes: B batch, S sequence, T = B·S tokens, D in, E experts, K picks, R stacked rank (sum of the experts' ranks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import UserError

Level = Literal["expert", "rank"]


@dataclass(frozen=True)
class SiteInfo:
    """Where a router sits.

    Attributes:
        name: dotted path of the site in the backbone ("" for a container used by itself).
        layer: index of the backbone layer, or ``None`` outside the layers.
        in_features, out_features: width of the hidden states that enter and leave the site.
        ranks: rank of each expert; scales: factor of each expert's update (alpha / r or alpha / sqrt(r)).
        members: names of the sites that share one router with this one, itself included, in the order of the backbone;
            empty for a container used by itself.
        hidden_size: width of the backbone's hidden states, or ``None`` for a container used by itself.
        prefix: what stands before the path in names: the adapter's name and a colon, where several are active.
    """

    name: str
    layer: int | None
    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    members: tuple[str, ...] = ()
    hidden_size: int | None = None
    prefix: str = ""

    @property
    def path(self) -> str:
        """Where the site is in the backbone, whatever it is called."""
        return self.name[len(self.prefix) :]

    def under(self, prefix: str) -> SiteInfo:
        """The same site with another prefix."""
        members = tuple(prefix + member[len(self.prefix) :] for member in self.members)
        return replace(self, name=prefix + self.path, members=members, prefix=prefix)

    @property
    def num_experts(self) -> int:
        return len(self.ranks)

    @property
    def total_rank(self) -> int:
        """R, the rank of all experts together."""
        return sum(self.ranks)


@dataclass(frozen=True)
class RoutingContext:
    """What the caller knows about a batch; every field is optional.

    Attributes:
        token_mask: (B, S) bool, ``True`` on real tokens; ``None`` means that all tokens are real.
        task_ids: (B,) int64, the task of each sequence. task_types: (B,) int64, the type of each task.
        request_ids: (B,) int64, the request that each sequence belongs to.
        segment_ids: (B, S) int64, the example of each token of a packed batch, numbered over all of it, -1 in padding;
            then ``task_ids`` and ``task_types`` are (B, S), those of each token's example.
        modality_mask: (B, S) int64, the modality of each token; of an encoder-decoder those of the encoder, since what
            the decoder writes is text, 0.
        phase: free text that staged methods switch on.
        generator: source of randomness for stochastic routers; ``None`` means the global one.
        load_share: (E,) selections of each expert per real token, measured over a whole optimizer step; the
            load-balance loss takes it in place of this batch's own (see ``step_balance`` of ``trainers/sft.py``).
        scoring_states: (B, S, H) last hidden states of a forward that came before this one, for routers that look at
            the whole model (``needs_scoring``).
        scores: what each such router made of ``scoring_states``, once for the forward, by the name of its sites.
        scoring_pass: this is the forward that ``scoring_states`` come from: experts have one constant weight, or none.
        prompt_mask: (B, S) bool, the tokens from which a router that decides once for a sequence may decide; ``None``
            means all real ones.
        selections: (B, K) what such a router chose before, by the name of its site; see ``RoutingSlot.keeping``.
        selection_seeds: one seed for each of as many equal blocks of the batch. A router that samples its experts
            draws from them instead of a generator, so that the numbers depend on nothing but seed and router.
        encoder: in the forward of a decoder, what its cross-attention reads.
    """

    token_mask: Tensor | None = None
    task_ids: Tensor | None = None
    task_types: Tensor | None = None
    request_ids: Tensor | None = None
    segment_ids: Tensor | None = None
    modality_mask: Tensor | None = None
    phase: str | None = None
    generator: torch.Generator | None = None
    load_share: Tensor | None = None
    scoring_states: Tensor | None = None
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    scoring_pass: bool = False
    prompt_mask: Tensor | None = None
    selections: Mapping[str, Tensor] | None = None
    selection_seeds: tuple[int, ...] | None = None
    encoder: EncoderTokens | None = None

    PER_SEQUENCE = ("task_ids", "task_types", "request_ids", "modality_mask")

    def of(self, hidden_states: Tensor) -> RoutingContext:
        """What is known of these tokens: in the cross-attention of a decoder they may be the encoder's."""
        return self.encoder.context if self.encoder is not None and self.encoder.are(hidden_states) else self

    def mask_of(self, tokens: torch.Size) -> Tensor | None:
        """The padding mask in the shape of a site's tokens, which may be one row of them all (OPT makes that).

        ``None`` where it is not known, or not of these tokens.
        """
        mask = self.token_mask
        if mask is None or not (mask.shape == tokens or (len(tokens) == 1 and mask.numel() == tokens.numel())):
            return None
        return mask.reshape(tokens)

    def expand_to(self, batch_size: int) -> RoutingContext:
        """Repeat per-sequence fields for beams and multiple returned sequences, which enlarge the batch in place.

        Raises:
            UserError: a field is no tensor, lacks an axis, or ``batch_size`` is no multiple of its batch.
        """
        changes: dict[str, Tensor] = {}
        for name in self.PER_SEQUENCE:
            value: Any = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise UserError(
                    f"{name} is a {type(value).__name__}: give a tensor of integers, a row for each sequence"
                )
            axes = 2 if name == "modality_mask" else 1
            if value.dim() >= axes and value.shape[0] == batch_size:
                continue
            if value.dim() < axes or value.shape[0] == 0 or batch_size % value.shape[0]:
                raise UserError(
                    f"{name} has the shape {tuple(value.shape)} but the batch has {batch_size} sequences: give one row "
                    f"for each{', with a modality for each token' if axes == 2 else ''}"
                )
            changes[name] = value.repeat_interleave(batch_size // value.shape[0], dim=0)
        return replace(self, **changes) if changes else self  # type: ignore[arg-type]


@dataclass(frozen=True)
class EncoderTokens:
    """What a decoder's cross-attention reads.

    Attributes:
        states: (B, S, H) the encoder's hidden states. context: what is known of its tokens.
        by_shape: they are of another length than the decoder's tokens, and so are known by it. Else only the tensor
            itself is known, which is another one where layers lie on several devices.
    """

    states: Tensor
    context: RoutingContext
    by_shape: bool

    def are(self, hidden_states: Tensor) -> bool:
        """Whether these are the encoder's hidden states."""
        return hidden_states is self.states or (self.by_shape and hidden_states.shape == self.states.shape)


@dataclass(frozen=True)
class RouteInput:
    """Everything that a router may look at, for one site in one forward.

    Attributes:
        hidden_states: (..., D), what enters the site.
        activations: (..., R), ``x @ lora_A.T``; only for routers with ``needs_activations``.
        context: what the caller knows about the batch.
        site: where the router sits.
        replay: the decision of an earlier forward that is being recomputed (gradient checkpointing). A router takes
            its ``indices`` instead of selecting again, draws through :meth:`draw`, and recomputes everything else.
    """

    hidden_states: Tensor
    activations: Tensor | None
    context: RoutingContext
    site: SiteInfo
    replay: Decision | None = None

    def draw(self, sample: Callable[[torch.Generator | None], Tensor]) -> Tensor:
        """Random numbers that a recomputation gets again.

        Checkpointing rewinds the global generator by itself, so there ``sample`` simply runs again, which also keeps
        later draws in step; a generator of the context is not rewound, so its numbers are taken from the record.
        """
        if self.replay is not None and self.replay.noise is not None:
            return self.replay.noise
        return sample(self.context.generator)

    def to_replay(self, noise: Tensor) -> Tensor | None:
        """What a record keeps of drawn numbers: nothing if the global generator drew them."""
        return None if self.context.generator is None else noise

    def given(self, name: str) -> Tensor:
        """The field ``name`` of the context, which this router cannot do without.

        Raises:
            UserError: the caller did not give it; the message says how to.
        """
        value: Tensor | None = getattr(self.context, name)
        if value is None:
            raise UserError(
                f"the router of {self.site.name or 'this site'!r} needs {name}: pass model(..., {name}=...), or run "
                f"inside `with model.routing_context({name}=...)`"
            )
        return value

    def per_token(self, values: Tensor) -> Tensor:
        """(...) one value for each token, from one for each sequence (B,) or for each token (B, S).

        Raises:
            UserError: the values do not fit the batch.
        """
        tokens = self.hidden_states.shape[:-1]
        values = values.to(self.hidden_states.device)
        if values.shape == tokens:
            return values
        if values.dim() == 1 and len(tokens) > 1 and values.shape[0] == tokens[0]:
            return values.view(-1, *[1] * (len(tokens) - 1)).expand(tokens)
        count = tokens.numel()
        if values.numel() and count % values.numel() == 0 and len(tokens) == 1:
            # Backbones such as OPT make one row of all tokens before their FFN.
            return values.reshape(-1).repeat_interleave(count // values.numel())
        raise UserError(
            f"site {self.site.name!r}: values of the shape {tuple(values.shape)} do not fit tokens of the shape "
            f"{tuple(tokens)}: give one for each sequence, or one for each token"
        )


@dataclass(frozen=True)
class Decision:
    """The part of a record that must not be made twice: discrete choices and random draws, without any graph."""

    indices: Tensor | None
    noise: Tensor | None


@dataclass
class RoutingRecord:
    """What one router decided in one forward. Pure result: nothing here is a buffer of a module.

    Attributes:
        indices: (..., K) int64, the chosen experts; -1 marks an empty slot; ``None`` means dense.
        weights: (..., K) for the chosen, (..., E) when dense; float32.
        num_experts: E. At the level of ranks every E here and above means R: each rank is an expert of its own.
        level: whether ``weights`` weigh experts or single ranks.
        logits: (..., E) before, probs: (..., E) after the softmax.
        log_prob: (...,) of a sampled choice; (B,) of one that holds for a sequence.
        scores: (..., E) what experts are weighed by, where a loss needs it and it is not ``probs``.
        mix: ``outputs`` weighs what each expert adds, ``sum_e w_e B_e A_e x``; ``factors`` mixes the factors first,
            ``(sum_e w_e B_e) (sum_e w_e A_e) x``, which needs experts of one rank.
        normalized: the weights of every token sum to 1 by construction; a block site then equals its frozen block bit
            for bit while all updates are zero.
        residual: (...,) weight of the site's own input in the output of a block site (Switch's tokens over capacity).
        noise: what was drawn from the context's own generator, for replay.
        layer: of the backbone, where a loss looks at each layer by itself.
        mask: (...) bool, real tokens, or ``None`` if all are real.
        sequence_indices: (B, K) int64, the choice of a router that decides once for all tokens of a sequence.
        owner: name of the first of the sites that share the router; ``None`` for a router used by itself.
    """

    indices: Tensor | None
    weights: Tensor
    num_experts: int
    level: Level = "expert"
    mix: Literal["outputs", "factors"] = "outputs"
    normalized: bool = False
    logits: Tensor | None = None
    probs: Tensor | None = None
    log_prob: Tensor | None = None
    scores: Tensor | None = None
    residual: Tensor | None = None
    noise: Tensor | None = None
    layer: int | None = None
    mask: Tensor | None = None
    sequence_indices: Tensor | None = None
    owner: str | None = None

    def decision(self) -> Decision:
        """What a recomputation replays; holds no graph."""
        detached = None if self.noise is None else self.noise.detach()
        return Decision(indices=self.indices, noise=detached)

    def dense_weights(self) -> Tensor:
        """(..., E) float32: the weight of every expert, zero where not chosen."""
        if self.indices is None:
            return self.weights
        chosen = self.indices >= 0
        dense = self.weights.new_zeros(*self.weights.shape[:-1], self.num_experts)
        return dense.scatter_add(-1, self.indices.clamp(min=0), self.weights * chosen)

    def counts(self, mask: Tensor | None = None) -> Tensor:
        """(E,) float64: how often each expert was chosen by real tokens (dense routing: the sum of |weight|)."""
        mask = self.mask if mask is None else mask
        with torch.no_grad():
            real = None if mask is None else mask.unsqueeze(-1).double()
            if self.indices is None:
                weights = self.weights.double().abs() if real is None else self.weights.double().abs() * real
                return weights.reshape(-1, self.num_experts).sum(0)
            # Not bincount, and no boolean index: both would make a GPU wait for the host.
            hits = (self.indices >= 0).double() if real is None else (self.indices >= 0) * real
            counts = hits.new_zeros(self.num_experts)
            return counts.index_add_(0, self.indices.clamp(min=0).reshape(-1), hits.reshape(-1))

    def entropy(self, mask: Tensor | None = None) -> Tensor:
        """Scalar: mean over real tokens of the entropy (nats) of ``probs``, or of the normalised dense |weights|.

        0 where there are no real tokens.
        """
        mask = self.mask if mask is None else mask
        with torch.no_grad():
            if self.probs is not None:
                probs = self.probs
            else:
                dense = self.dense_weights().abs()
                probs = dense / dense.sum(-1, keepdim=True).clamp_min(torch.finfo(dense.dtype).tiny)
            each: Tensor = torch.special.entr(probs).sum(-1)
            if mask is None:
                return each.sum() / max(each.numel(), 1)
            return torch.where(mask, each, 0).sum() / mask.sum().clamp(min=1)


@dataclass
class Tape:
    """The records of one or several forwards, by site, in the order in which they were made."""

    records: dict[str, list[RoutingRecord]] = field(default_factory=dict)

    def add(self, site: str, record: RoutingRecord) -> None:
        self.records.setdefault(site, []).append(record)

    def __getitem__(self, site: str) -> list[RoutingRecord]:
        return self.records[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)
