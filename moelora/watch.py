"""Notice sites that the backbone passes by.

Some modules read the weight of a linear and never call it: Mamba does so with ``dt_proj``, and with ``x_proj`` and
``out_proj`` too where a fused kernel trains. Experts there would be ignored without a word. No table of models says
where, and no forward is run to find out: in the first forward of training, and in the first one of inference, hooks on
the sites and on the modules around them tell of a module that ran to its end without having called its site. Layers
that are skipped on purpose, or a decoder while ``generate`` runs the encoder alone, do not run their modules at all, so
nothing is concluded from those; they are looked at again in the next forward. Sites that lie directly in a whole model
are left out: its inputs, and with them its parts, may be optional. So are forwards that go on from a filled cache:
cross-attention has its keys and values there and does not call their linears.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, EncoderDecoderCache, PreTrainedModel

from .errors import ConfigError
from .experts import Container


class Watch:
    """Follows the first forwards of a model; costs nothing once every site was seen in training and in inference."""

    def __init__(self) -> None:
        self._unseen: dict[bool, set[str]] = {}
        self._handles: list[RemovableHandle] = []
        self._called: set[str] = set()
        self._finished: set[str] = set()

    def begin(self, backbone: PreTrainedModel, cache: Any) -> None:
        """Before a whole forward: put hooks on the sites that were not seen yet and on the modules around them.

        Args:
            cache: the forward's ``past_key_values``.
        """
        unseen = self._unseen.get(backbone.training)
        if unseen is None:
            # Not the paths of the sites: those of one adapter may lie inside a container of another.
            sites = [name for name, module in backbone.named_modules() if isinstance(module, Container)]
            unseen = {name for name in sites if not isinstance(_around(backbone, name), PreTrainedModel)}
            if not backbone.training:
                # Cross-attention with a full cache calls fewer of its linears, so a call in training is enough.
                unseen &= self._unseen.get(True, unseen)
            self._unseen[backbone.training] = unseen
        self._called, self._finished = set(), set()
        if unseen and _is_filled(cache):
            return
        for name in unseen:
            self._follow(backbone.get_submodule(name), name, self._called)
            self._follow(_around(backbone, name), name, self._finished)

    def forget(self) -> None:
        """Take the hooks away and conclude nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _follow(self, module: nn.Module, name: str, into: set[str]) -> None:
        def ran(*_: Any) -> None:
            into.add(name)

        self._handles.append(module.register_forward_hook(ran))

    def end(self, backbone: PreTrainedModel, completed: bool) -> None:
        """After it: take the hooks away.

        Raises:
            ConfigError: a module ran and did not call its site.
        """
        self.forget()
        unseen = self._unseen.get(backbone.training, set())
        unseen -= self._called
        passed = sorted(unseen & self._finished)
        if completed and passed:
            inside = type(_around(backbone, passed[0])).__name__
            raise ConfigError(
                f"{len(passed)} sites, {passed[0]!r} first, would do nothing in "
                f"{'training' if backbone.training else 'inference'}: {inside} reads their weight, or leaves them out, "
                "and never calls them. Drop them from the targets; in a state-space mixer target in_proj, which is "
                "always called"
            )


def _is_filled(cache: Any) -> bool:
    if isinstance(cache, EncoderDecoderCache) and any(cache.is_updated.values()):
        return True
    return isinstance(cache, Cache) and bool(cache.get_seq_length() > 0)


def _around(backbone: nn.Module, name: str) -> nn.Module:
    return backbone.get_submodule(name.rpartition(".")[0])
