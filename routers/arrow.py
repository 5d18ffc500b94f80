"""Arrow: each finished adapter is called where the input points along the direction that it acts on most.

Published: Ostapenko et al. 2024 (arXiv 2405.11157); mttl 3724abf and PEFT 0.21.2. The prototype of an adapter is the
top right singular vector of B A, a token's score is the size of its product with it, and nothing is trained. mttl
computes it exactly and by default mixes factors; PEFT takes 15 steps of power iteration from a random vector, which
leaves a wrong direction where the two largest singular values are near each other, and mixes outputs. GenKnowSub
(arXiv 2505.10939): what general adapters have in common is taken off the others.

Our reading: exact prototypes, outputs mixed. Prototypes are saved with the mixture, so that it does not change with the
program that loads it; PEFT makes them anew. GenKnowSub takes updates off updates, where PEFT takes factors off factors,
which is another matrix, and does so in place.

Shapes: D in, O out, E experts, K picks, R stacked rank, r rank of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..errors import ConfigError, UserError
from ..registry import ROUTERS
from ..routing import RouteInput, RoutingRecord, SiteInfo
from .base import Router, RouterConfig
from .topk import check_top_k, top_indices

Factors = tuple[Tensor, Tensor]


class ArrowConfig(RouterConfig):
    """Options of ``arrow``.

    Attributes:
        top_k: adapters per token. temperature: divides the scores of the chosen ones.
        mix: ``outputs`` weighs what adapters add, as PEFT does; ``factors`` mixes their factors, as mttl does.
        method: how :meth:`ArrowRouter.fit` finds prototypes: ``exact``, or ``power`` for the numbers of PEFT.
        n_iter: steps of the power iteration. seed: of its first vector, which is the same for every adapter.
    """

    kind: str = "arrow"
    top_k: Annotated[int, Field(ge=1)] = 3
    temperature: Annotated[float, Field(gt=0)] = 1.0
    mix: Literal["outputs", "factors"] = "outputs"
    method: Literal["exact", "power"] = "exact"
    n_iter: Annotated[int, Field(ge=1)] = 15
    seed: int = 0

    def check(self, num_experts: int, total_rank: int) -> None:
        check_top_k(self.top_k, num_experts)


@ROUTERS.register("arrow")
class ArrowRouter(Router[ArrowConfig]):
    """Weights (..., K) = softmax of the k largest ``|x @ prototypes.T|``, divided by the temperature.

    Buffers:
        prototypes: (E, D) float32, set by :meth:`fit`, saved and loaded; zero until then.
    """

    Config = ArrowConfig
    needs_fit = True

    prototypes: Tensor

    def __init__(self, config: ArrowConfig, site: SiteInfo) -> None:
        super().__init__(config, site)
        self.register_buffer("prototypes", torch.zeros(site.num_experts, site.in_features))
        self._found = False

    @property
    def mix(self) -> Literal["outputs", "factors"]:
        return self.config.mix

    @torch.no_grad()
    def fit(self, lora_A: Tensor, lora_B: Tensor, ranks: Sequence[int]) -> None:
        """Set the prototypes from the experts; their scales do not matter.

        Raises:
            ConfigError: the experts do not read what the router reads.
        """
        if lora_A.shape[1] != self.site.in_features:
            raise ConfigError(
                f"site {self.site.name!r}: the experts read {lora_A.shape[1]} features but the router "
                f"{self.site.in_features}: a block's down projection cannot say where its input points"
            )
        pairs = zip(lora_A.split(list(ranks)), lora_B.split(list(ranks), dim=1), strict=True)
        if self.config.method == "exact":
            rows = [top_right_singular(A, B) for A, B in pairs]
        else:
            rows = [power_iteration(A, B, self.config.n_iter, self.config.seed) for A, B in pairs]
        self.prototypes.copy_(torch.stack(rows))

    def route(self, inputs: RouteInput) -> RoutingRecord:
        """See the class.

        Raises:
            UserError: there are no prototypes yet.
        """
        self._look_for_prototypes()
        logits = F.linear(inputs.hidden_states.float(), self.prototypes.float()).abs()
        indices = None if inputs.replay is None else inputs.replay.indices
        if indices is None:
            indices = top_indices(logits, self.config.top_k)
        return RoutingRecord(
            indices=indices,
            weights=(logits.gather(-1, indices) / self.config.temperature).softmax(dim=-1),
            num_experts=self.site.num_experts,
            mix=self.config.mix,
            normalized=True,
            logits=logits,
        )

    def _look_for_prototypes(self) -> None:
        # Once only: a look makes a GPU wait.
        if not self._found:
            if not bool(self.prototypes.any()):
                raise UserError(
                    f"the router of {self.site.name or 'this site'!r} has no prototypes: put the adapters in their "
                    "place, then call model.fit_routers()"
                )
            self._found = True


def top_right_singular(A: Tensor, B: Tensor) -> Tensor:
    """(D,) float32 unit vector (zero where r is 0): the top right singular vector of ``B @ A``, up to its sign.

    With ``A^T = Q_A R_A`` and ``B = Q_B R_B`` it is Q_A times that of the r x r matrix ``R_B R_A^T``, in float64; the
    product (O, D) is never formed. An expert that adds nothing gets an arbitrary direction, one of rank 0 none.

    Args:
        A: (r, D). B: (O, r).
    """
    if not len(A):
        return A.new_zeros(A.shape[1], dtype=torch.float32)
    q_A, r_A = torch.linalg.qr(A.double().T)
    r_B = torch.linalg.qr(B.double(), mode="r").R
    prototype: Tensor = q_A @ torch.linalg.svd(r_B @ r_A.T).Vh[0]
    return prototype.float()


def power_iteration(A: Tensor, B: Tensor, n_iter: int = 15, seed: int = 0) -> Tensor:
    """(D,) float32: the same by ``n_iter`` steps of ``v <- A^T B^T B A v`` from a random vector, as PEFT 0.21.2 does.

    Every expert starts from the same vector, drawn with ``seed`` on the device of ``A``.

    Args:
        A: (r, D). B: (O, r).
    """
    tiny = 1e-8
    A, gram = A.float(), B.float().T @ B.float()
    generator = torch.Generator(A.device).manual_seed(seed)
    v = torch.randn(A.shape[1], device=A.device, generator=generator)
    v /= v.norm() + tiny
    for _ in range(n_iter):
        v = A.T @ (gram @ (A @ v))
        v /= v.norm() + tiny
    return v


def gen_know_sub(
    experts: Sequence[Factors], general: Sequence[Factors], method: Literal["exact", "peft_factors"] = "exact"
) -> list[Factors]:
    """The experts without what general adapters have in common; the arguments stay as they are.

    Args:
        experts, general: pairs of A (r, D) and B (O, r), all of one scale (multiply B where theirs differ).
        method: ``exact`` gives ``B A - mean_g B_g A_g``, as factors whose rank is r plus those of the general ones, so
            that a scale of alpha / r has to be given as a number. ``peft_factors`` gives ``(B - mean B_g)`` and
            ``(A - mean A_g)``, as PEFT does, which is another matrix; all ranks must be one.

    Raises:
        ConfigError: no general adapter, or ranks that differ with ``peft_factors``.
    """
    if not general:
        raise ConfigError("gen_know_sub needs at least one general adapter")
    if method == "exact":
        A_general = torch.cat([A for A, _ in general])
        B_general = torch.cat([B for _, B in general], dim=1) / -len(general)
        return [(torch.cat([A, A_general]), torch.cat([B, B_general], dim=1)) for A, B in experts]
    ranks = sorted({A.shape[0] for A, _ in (*experts, *general)})
    if len(ranks) > 1:
        raise ConfigError(f"gen_know_sub: factors of the ranks {ranks} cannot be subtracted: use method 'exact'")
    A_mean = torch.stack([A for A, _ in general]).mean(0)
    B_mean = torch.stack([B for _, B in general]).mean(0)
    return [(A - A_mean, B - B_mean) for A, B in experts]
