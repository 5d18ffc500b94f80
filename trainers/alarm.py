"""A callback that warns when tokens no longer spread over the experts.

Shapes: E experts (or single ranks), K picks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from ..analysis import RoutingStats, SiteStats, metrics, write_report
from ..errors import UserError
from ..mixture import MoELoRAModel
from ..routers.base import Router
from ..routing import RoutingContext
from ..schema import Closed
from .meter import LoadMeter, SiteLoad

logger = logging.getLogger(__name__)

# With fewer selections per expert in the window the numbers of a site are chance.
LEAST_SELECTIONS = 50
LISTED = 8


class AlarmConfig(Closed):
    """When the load of the experts counts as collapsed, over the last ``window`` optimizer steps.

    Attributes:
        window: optimizer steps; looked at every half of it.
        min_entropy: the least entropy of a site's load, 1 being even.
        max_concentration: of a router that picks K of E, how much of the load the K busiest experts may take: 0 is
            their fair share, 1 all of it.
        max_dead: the largest part of a site's experts that may get less than 5 % of a fair share.
        max_margin: the largest mean over tokens of the first probability minus the second, which more than half of the
            sites of one configuration must pass.
        stop: end the training, after a checkpoint and a line of the log.
    """

    window: Annotated[int, Field(ge=2, multiple_of=2)] = 50
    min_entropy: Annotated[float, Field(ge=0, le=1)] = 0.5
    max_concentration: Annotated[float, Field(ge=0, le=1)] = 0.75
    max_dead: Annotated[float, Field(ge=0, le=1)] = 0.25
    max_margin: Annotated[float, Field(ge=0, le=1)] = 0.99
    stop: bool = False


@dataclass(frozen=True)
class Finding:
    """One number of one site that is past its limit.

    Attributes:
        kind: ``entropy``, ``concentration``, ``dead`` or ``margin``. site: name. text: the number and its limit.
    """

    kind: str
    site: str
    text: str


class CollapseAlarm(TrainerCallback, ExportableState):
    """Warns once for each kind of collapse, until it has cleared, and draws the load into the run's folder.

    A :class:`~moelora.trainers.MixtureTrainer` tells it the load of every optimizer step: that of all real tokens,
    prompts too, since those are what balance losses and controllers even out, summed over ranks, so that all ranks
    decide alike. Left out are routers that do not choose by the token: see :func:`chooses`. The window is part of the
    trainer's state, so that a resumed run goes on with it.

    Args:
        config: limits; a mapping is checked.

    Attributes:
        active: kinds that were warned of and have not cleared. found: what the last look found.
    """

    def __init__(self, config: AlarmConfig | Mapping[str, Any] | None = None) -> None:
        self.config = AlarmConfig.parse({} if config is None else config, "collapse_alarm")
        self.active: list[str] = []
        self.found: list[Finding] = []
        self._model: MoELoRAModel | None = None
        self._halves: list[LoadMeter] = []
        self._steps = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._model = model
        self._halves = [LoadMeter(model, gates=True) for _ in range(2)]
        self._steps, self.active, self.found = 0, [], []
        stored: Any = state.stateful_callbacks
        saved = stored.get(type(self).__name__, {}).get("attributes", {}).get("saved", {})
        if saved.get("window") == self.config.window:
            self._steps, self.active = saved["steps"], list(saved["active"])
            for half, sums in zip(self._halves, saved["halves"], strict=True):
                half.restore(sums, args.device)

    def count(self, step: LoadMeter) -> None:
        """Take in the load of one optimizer step, summed over ranks. Reads nothing from the device."""
        if self._halves:
            self._halves[1].add(step)
            self._steps += 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        half = self.config.window // 2
        if self._steps == 0 or self._steps % half:
            return
        if self._steps >= self.config.window:
            self._look(args, state, control)
        old, new = self._halves
        old.clear()
        self._halves = [new, old]

    def _look(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        whole = LoadMeter(_given(self._model), gates=True)
        for half in self._halves:
            whole.add(half)
        sites = whole.sites()
        self.found = collapses(sites, self.config)
        kinds = list(dict.fromkeys(finding.kind for finding in self.found))
        new = [kind for kind in kinds if kind not in self.active]
        for kind in self.active:
            if kind not in kinds:
                logger.info("step %d: the collapse of the experts by %s has cleared", state.global_step, kind)
        self.active = kinds
        if not new:
            return
        if state.is_world_process_zero:
            folder = Path(args.output_dir or ".") / "collapse" / f"step-{state.global_step}"
            picture = self._draw(sites, folder, state.global_step)
            for kind in new:
                findings = [finding for finding in self.found if finding.kind == kind]
                text = _text(findings, sites, self.config)
                logger.warning("step %d: %s. The load is drawn in %s", state.global_step, text, picture)
        if self.config.stop:
            control.should_training_stop = control.should_log = True
            control.should_save = control.should_save or SaveStrategy(args.save_strategy) != SaveStrategy.NO

    def _draw(self, sites: Mapping[str, SiteLoad], folder: Path, step: int) -> Path:
        """Write the load as a page, JSON and CSV; without plotly no page."""
        model = _given(self._model)
        stats = RoutingStats(
            model=model.name_or_path or type(model.backbone).__name__,
            data=f"the optimizer steps {step - self.config.window + 1} to {step}",
            tasks=("all tokens",),
            sites=tuple(_stats(name, site) for name, site in sites.items()),
        )
        try:
            return write_report(stats, folder)
        except UserError:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "routing.json").write_text(stats.to_json(), encoding="utf-8")
            stats.write_csv(folder / "routing.csv")
            return folder / "routing.json"

    def state(self) -> dict[str, Any]:
        saved = {
            "window": self.config.window,
            "steps": self._steps,
            "active": self.active,
            "halves": [half.state() for half in self._halves],
        }
        return {"args": {"config": self.config.to_dict()}, "attributes": {"saved": saved} if self._halves else {}}


def chooses(site: SiteLoad) -> bool:
    """Whether a router chooses among experts by the token, so that an uneven load is a collapse.

    Not so one that has a single expert, always takes (nearly) all of them, weighs them alike for every token, or was
    told by a table, a task or a label which to take.
    """
    router = _router(site)
    every = not site.manner.dense and site.load_E.sum() >= 0.95 * site.tokens * len(site.load_E)
    told = router.any_width or router.task_ids is not None or not site.manner.free
    return not (router.num_units == 1 or every or told or router.constant_weights(RoutingContext()) is not None)


def collapses(sites: Mapping[str, SiteLoad], config: AlarmConfig) -> list[Finding]:
    """Everything that is past its limit, kind by kind."""
    judged = {
        name: site
        for name, site in sites.items()
        if site.load_E.sum() >= LEAST_SELECTIONS * len(site.load_E) and chooses(site)
    }
    found = [finding for name, site in judged.items() for finding in _uneven(name, site, config)]
    groups: dict[int, dict[str, SiteLoad]] = {}
    for name, site in judged.items():
        if site.manner.scored:
            groups.setdefault(site.container.group, {})[name] = site
    for group in groups.values():
        certain = {name: site.margin for name, site in group.items() if site.margin > config.max_margin}
        if len(certain) > len(group) / 2:
            found += [Finding("margin", name, f"{value:.4f}") for name, value in certain.items()]
    return sorted(found, key=lambda finding: tuple(HEADINGS).index(finding.kind))


def _uneven(name: str, site: SiteLoad, config: AlarmConfig) -> list[Finding]:
    ratio = metrics.utilisation(site.load_E)
    busiest = int(ratio.argmax())
    evenness, gathered = float(metrics.balance(site.load_E)), concentration(site)
    dead = int(metrics.dead_experts(site.load_E).sum())
    found = []
    if evenness < config.min_entropy:
        found.append(Finding("entropy", name, f"{evenness:.2f}"))
    if gathered > config.max_concentration:
        text = f"{gathered:.2f}, expert {busiest} gets {ratio[busiest]:.1f} times its fair share"
        found.append(Finding("concentration", name, text))
    if dead > config.max_dead * len(ratio):
        found.append(Finding("dead", name, f"{dead} of {len(ratio)}"))
    return found


def concentration(site: SiteLoad) -> float:
    """How much of the load the K busiest experts take beyond their fair share: 0 none, 1 all that there is.

    K is the mean number of picks per token, at least 1, and 1 for dense routing. The largest load alone does not tell:
    where one token in ten is a comma, one of 32 experts has three times its share, and where a token picks 7 of 8,
    there is always one that nearly all of them pick.
    """
    parts = np.sort(metrics.shares(site.load_E))[::-1]
    picks = 1.0 if site.manner.dense else max(float(site.load_E.sum()) / site.tokens, 1.0)
    fair = picks / len(parts)
    taken = float(np.interp(picks, np.arange(len(parts) + 1), np.concatenate([[0.0], np.cumsum(parts)])))
    return (taken - fair) / (1 - fair)


HEADINGS = {
    "entropy": "the entropy of the load is below {min_entropy:g} (1 is even)",
    "concentration": "the busiest experts take more than {max_concentration:g} of what others could get (0 is fair)",
    "dead": "more than {max_dead:.0%} of the experts get less than 5 % of a fair share",
    "margin": "the first probability is more than {max_margin:g} above the second in more than half of the sites",
}


def _text(findings: Sequence[Finding], sites: Mapping[str, SiteLoad], config: AlarmConfig) -> str:
    kind = findings[0].kind
    named = [f"{finding.site or 'site'}: {finding.text}" for finding in findings[:LISTED]]
    more = f"; and {len(findings) - LISTED} more" if len(findings) > LISTED else ""
    remedies = dict.fromkeys(remedy(_router(sites[finding.site]), kind) for finding in findings)
    return (
        f"experts collapse: over the last {config.window} steps {HEADINGS[kind].format(**config.to_dict())} at "
        f"{len(findings)} of {len(sites)} routed sites ({'; '.join(named)}{more}). {'; '.join(remedies)}"
    )


def remedy(router: Router[Any], kind: str) -> str:
    """What option of the router to change, with its value."""
    config = router.config
    words = ("router_z",) if kind == "margin" else ("balance", "usage")
    options = [option for loss, option in _options(config).items() if any(word in loss for word in words)]
    if kind != "margin" and type(router).on_step_end is not Router.on_step_end and hasattr(config, "bias_rate"):
        options.append("bias_rate")
    if options:
        named = " or ".join(f"{option} (now {getattr(config, option):g})" for option in options)
        return f"Raise {named} of router {config.kind!r}"
    what = "keeps its logits small" if kind == "margin" else "balances its load"
    return f"Router {config.kind!r} has no option that {what}: lower the learning rate (router_learning_rate)"


def _options(config: Any) -> dict[str, str]:
    """By the name of each auxiliary loss the option that its coefficient follows."""
    before: dict[str, float] = config.coefficients()
    found: dict[str, str] = {}
    for option in type(config).model_fields:
        value = getattr(config, option)
        if isinstance(value, float):
            after = config.model_copy(update={option: value + 1.0}).coefficients()
            found |= {loss: option for loss in before if after[loss] != before[loss]}
    return found


def _stats(name: str, site: SiteLoad) -> SiteStats:
    return SiteStats(
        name=name,
        layer=site.container.site.layer,
        selections=(tuple(site.load_E.tolist()),),
        tokens=(round(site.tokens),),
        entropy=site.entropy / (math.log(len(site.load_E)) or 1.0),
        margin=site.margin,
    )


def _router(site: SiteLoad) -> Router[Any]:
    assert site.container.router is not None
    return site.container.router


def _given(model: MoELoRAModel | None) -> MoELoRAModel:
    assert model is not None
    return model
