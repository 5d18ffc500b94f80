"""A mixture as a model of lm-evaluation-harness; importing this needs the extra ``eval``.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from .scoring import counting

if TYPE_CHECKING:
    from ..analysis import RoutingRecorder
    from ..mixture import MoELoRAModel


class MixtureLM(HFLM):  # type: ignore[misc]
    """lm-evaluation-harness' own adaptor for a live model, with padding masked and the routing of each task counted.

    The original pads batches on the right without a mask. No token of a causal model sees that padding, but routers
    that decide for a whole sequence do, and recorders would count it.

    Args:
        model: a mixture with its tokenizer. recorder: counts the routing of each task; it knows their names.
    """

    def __init__(self, model: MoELoRAModel, batch_size: int, recorder: RoutingRecorder | None = None) -> None:
        logger = logging.getLogger("lm_eval.models.huggingface")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns that options of loading mean nothing to a live model
        try:
            super().__init__(pretrained=model, tokenizer=model.tokenizer, batch_size=batch_size)
        finally:
            logger.setLevel(level)
        self._recorder = recorder
        self._inputs: set[tuple[int, ...]] = set()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._by_task(requests, lambda some: HFLM.loglikelihood(self, some, disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return self._by_task(requests, lambda some: HFLM.loglikelihood_rolling(self, some, disable_tqdm))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._by_task(requests, lambda some: HFLM.generate_until(self, some, disable_tqdm))

    def _by_task(self, requests: Sequence[Instance], answer: Callable[[list[Instance]], list[Any]]) -> list[Any]:
        """The answers in the order of ``requests``, one task after the other, with or without a recorder alike."""
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(str(request.task_name), []).append(place)
        answers: dict[int, Any] = {}
        for task, own in places.items():
            with counting(self._recorder, [task]):
                answers.update(zip(own, answer([requests[place] for place in own]), strict=True))
        return [answers[place] for place in range(len(requests))]

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        # As the original cuts them; its batches do not say how long their rows are.
        longest = self.max_length + 1
        self._inputs = {tuple((context + answer)[-longest:][:-1]) for _, context, answer in requests}
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **kwargs)
        return found

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        logits: Tensor
        if attn_mask is None and labels is None:
            lengths_B = torch.tensor([self._length(row) for row in inps.tolist()], device=inps.device)
            mask_BS = torch.arange(inps.shape[1], device=inps.device) < lengths_B.unsqueeze(1)
            if not bool(mask_BS.all()):
                with torch.no_grad():
                    logits = self.model(input_ids=inps, attention_mask=mask_BS.long()).logits
                return logits
        logits = super()._model_call(inps, attn_mask, labels)
        return logits

    def _length(self, row: list[int]) -> int:
        """How many tokens of a row are no padding, which is 0 there: a real token may be 0 as well."""
        least = len(row)
        while least and row[least - 1] == 0:
            least -= 1
        return next((n for n in range(least, len(row)) if tuple(row[:n]) in self._inputs), len(row))
