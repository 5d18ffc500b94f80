"""A policy optimised against a reward model: how long the gold score follows the reward.

    python scripts/studies/reward_policy.py --reward runs/reward/models/DMoERM-0

The reward model is one that ``moelora train`` made of preferences of kind ``sampled_preferences``, whose recipe lies in
its folder. The policy is a mixture of LoRA experts on the same 4-bit backbone, and TRL's GRPO maximises the reward that
the model gives its answers, without a penalty on the distance. Every few steps the policy answers held-out questions,
each several times; the answers are scored by the reward model (proxy) and by the tasks' own scorers (gold), and their
divergence from the start policy, which is the backbone, is computed token by token. That the proxy rises and gold
does not is over-optimisation (Gao et al. 2023, arXiv 2210.10760).

Shapes: B answers, S tokens of the longest, N tokens of answers, V words.
"""

from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import moelora
from moelora.analysis.figures import BLUE, GRID, ORANGE, band, blank, graph_objects, label_axes
from moelora.analysis.report import page, section
from moelora.config import Recipe, SampledPreferenceData, load_recipe
from moelora.data.preferences import Ranking
from moelora.data.ranking_set import ResponseFormat
from moelora.data.sampled import Sampler
from moelora.evaluation.rewards import quantiles, resampled
from moelora.reward.scoring import by_length

# Experts in the upper third: the gradient ends there.
POLICY: dict[str, Any] = {
    "sites": [
        {
            "target": ["q_proj", "v_proj", "up_proj", "down_proj"],
            "layers": "-10:",
            "experts": {"kind": "lora", "num_experts": 4, "r": 8, "alpha": 16},
            "router": {"kind": "topk", "top_k": 2},
        }
    ]
}
SAMPLES = 4  # answers to a question, both in a step and in an evaluation
BATCH = 16


@dataclass(frozen=True)
class Point:
    """The policy after some steps, on held-out questions; scores are means over questions.

    Attributes:
        step: optimizer steps. kl: nats of an answer, from the start policy. words: of an answer.
        proxy, gold: what the reward model and the tasks' scorers say.
        proxy_gain, gold_gain: how far they rose, in standard deviations among the first answers to a question; ``low``
            and ``high`` are 95 % intervals over questions.
    """

    step: int
    kl: float
    words: float
    proxy: float
    gold: float
    proxy_gain: float
    proxy_low: float
    proxy_high: float
    gold_gain: float
    gold_low: float
    gold_high: float


@dataclass
class Study:
    """What is optimised, against what, and what is asked.

    Attributes:
        data: of the reward model's recipe, with the policy's own temperature and the bare questions.
    """

    folder: Path
    recipe: Recipe
    data: SampledPreferenceData
    reward: moelora.RewardModel

    @classmethod
    def of(cls, reward: Path, folder: Path, questions: int, test_size: int) -> Study:
        """Read the reward model and its recipe.

        Args:
            questions: to train on, of all tasks together. test_size: held-out questions of each task.
        """
        if not (reward / "recipe.yaml").is_file():
            raise typer.BadParameter(f"{reward} has no recipe.yaml: give the folder that `moelora train` wrote")
        recipe = load_recipe(reward / "recipe.yaml")
        if not isinstance(recipe.data, SampledPreferenceData):
            raise typer.BadParameter(
                f"{reward} did not learn from sampled_preferences, and other data have no scorer for new answers: give "
                "a model of such a recipe"
            )
        tasks = sum(len(group.tasks) for group in recipe.data.categories.values())
        data = recipe.data.model_copy(
            update={
                "temperatures": (1.0,) * SAMPLES,
                "top_p": 1.0,
                "worked_examples": 0,  # as the reward model sees a question, and as the policy is trained
                "train_size": math.ceil(questions / tasks),
                "test_size": test_size,
            }
        )
        model = moelora.RewardModel.from_pretrained(reward, recipe.backbone.name)
        return cls(folder, recipe, data, model)

    @cached_property
    def policy(self) -> moelora.MoELoRAModel:
        """The mixture that learns; its experts add nothing yet, so it is the backbone."""
        backbone, tokenizer = moelora.load_backbone(self.recipe.backbone)
        policy = moelora.attach(backbone, POLICY)
        policy.tokenizer = tokenizer
        return policy

    def sampler(self, step: int) -> Sampler:
        """The policy's answers after some steps."""
        return Sampler(
            self.data,
            self.recipe.backbone,
            lambda: (self.policy, self.policy.tokenizer),
            self.folder / "answers" / f"step-{step}",
        )

    def prompts(self) -> Dataset:
        """The questions to train on."""
        questions = self.sampler(0).questions("train")
        return Dataset.from_list([{"prompt": _messages(each.system, each.prompt)} for each in questions])


def _messages(system: str | None, question: str) -> list[dict[str, str]]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": question}]


class Watch(TrainerCallback):
    """Looks at the policy every few steps, and writes down what it sees.

    Attributes:
        points: what it saw so far.
    """

    def __init__(self, study: Study, every: int) -> None:
        self.study, self.every = study, every
        self.points: list[Point] = []
        self._first: tuple[np.ndarray, np.ndarray] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._look(state.global_step)

    @torch.no_grad()
    def _look(self, step: int) -> None:
        policy, training = self.study.policy, self.study.policy.training
        policy.eval()
        answers = self.study.sampler(step).judged("test")
        proxy, gold = self._scores(answers)
        if self._first is None:
            self._first = proxy, gold
        gains = [_gain(now, first) for now, first in zip((proxy, gold), self._first, strict=True)]
        words = np.mean([len(text.split()) for ranking in answers for text in ranking.responses])
        kl = divergence(self.study, answers)
        point = Point(step, kl, float(words), float(proxy.mean()), float(gold.mean()), *gains[0], *gains[1])
        self.points.append(point)
        write(self.points, self.study.folder / "policy.csv")
        policy.train(training)
        typer.echo(f"step {step}: KL {kl:.2f}, proxy {point.proxy:.3f}, gold {point.gold:.3f}")

    def _scores(self, answers: Sequence[Ranking]) -> tuple[np.ndarray, np.ndarray]:
        """Both scores of each question's answers, one row for each question."""
        rewards = self.study.reward.score(
            [list(ranking.prompt) for ranking in answers for _ in ranking.responses],
            [text for ranking in answers for text in ranking.responses],
            batch_size=BATCH,
        )
        proxy = np.array([each.reward for each in rewards]).reshape(len(answers), SAMPLES)
        return proxy, np.array([ranking.scores for ranking in answers])


def _gain(now: np.ndarray, first: np.ndarray) -> tuple[float, float, float]:
    """The rise of the mean since the start in standard deviations within a question, and its interval."""
    spread = float(np.sqrt(first.var(axis=1).mean())) or 1.0
    rise = (now.mean(axis=1) - first.mean(axis=1))[:, None] / spread
    low, high = quantiles(resampled(rise) / len(rise))
    return float(rise.mean()), float(low[0]), float(high[0])


def divergence(study: Study, answers: Sequence[Ranking]) -> float:
    """Nats by which the policy differs from the backbone, summed over the tokens of an answer and its end.

    At each place the whole distributions are compared, which the mean over sampled tokens would only estimate.
    """
    policy = study.policy
    write, texts = ResponseFormat(policy.tokenizer), []
    for ranking in answers:
        before, responses = write(ranking.prompt, ranking.responses)
        texts += [(before, _ended(after, policy.tokenizer.eos_token_id)) for after in responses]
    total = 0.0
    for rows in by_length([len(before) + len(after) for before, after in texts], BATCH):
        ids_BS, mask_BS = study.reward.padded([texts[row][0] + texts[row][1] for row in rows])
        own_BS = torch.zeros_like(mask_BS, dtype=torch.bool)
        for place, row in enumerate(rows):  # each token is told by the place before it
            first = len(texts[row][0]) - 1
            own_BS[place, first : first + len(texts[row][1])] = True
        now_NV = policy(input_ids=ids_BS, attention_mask=mask_BS).logits[own_BS].float().log_softmax(dim=-1)
        with policy.disable_experts():
            start_NV = policy(input_ids=ids_BS, attention_mask=mask_BS).logits[own_BS].float().log_softmax(dim=-1)
        total += float((now_NV.exp() * (now_NV - start_NV)).sum())
    return total / len(texts)


def _ended(after: list[int], end: int) -> list[int]:
    """Without what the chat template writes behind the end of a turn, which no policy does."""
    return after[: len(after) - after[::-1].index(end)] if end in after else after


def optimise(study: Study, steps: int, every: int, learning_rate: float, questions: int) -> list[Point]:
    """Train the policy by GRPO, and look at it."""
    watch = Watch(study, every)
    args = GRPOConfig(
        output_dir=str(study.folder / "logs"),
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=questions * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=study.data.max_new_tokens,
        temperature=1.0,
        beta=0.0,
        logging_strategy="no",  # the bar is enough; what matters is looked at
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        seed=study.recipe.seed,
    )
    trainer = GRPOTrainer(
        study.policy,
        reward_funcs=study.reward.reward_function(BATCH),
        args=args,
        train_dataset=study.prompts(),
        processing_class=study.policy.tokenizer,
        callbacks=[watch],
    )
    trainer.train()
    study.policy.save_pretrained(study.folder / "policy")
    return watch.points


def write(points: Sequence[Point], path: Path) -> None:
    """The points as a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, [each.name for each in fields(Point)])
        rows.writeheader()
        rows.writerows(asdict(point) for point in points)


def figure(points: Sequence[Point]) -> Any:
    """How far proxy (dashed) and gold (solid) rose, against the distance from the start."""
    traces = []
    kl = [round(point.kl, 4) for point in points]
    for name, colour, dash in (("proxy", ORANGE, "dash"), ("gold", BLUE, "solid")):
        mean, low, high = (
            [round(getattr(point, f"{name}_{part}"), 4) for point in points] for part in ("gain", "low", "high")
        )
        trace = graph_objects().Scatter
        traces += [
            band(kl, low, high, colour),
            trace(
                x=kl,
                y=mean,
                name={"proxy": "reward model (proxy)", "gold": "tasks' scorers (gold)"}[name],
                mode="lines+markers",
                line={"color": colour, "width": 2, "dash": dash},
                customdata=[point.step for point in points],
                hovertemplate="step %{customdata}: %{y:.2f}",
            ),
        ]
    drawn = blank(traces, height=440)
    label_axes(drawn, "KL from the start policy, nats of an answer", "gain, in standard deviations")
    drawn.update_yaxes(showgrid=True, gridcolor=GRID)
    drawn.update_xaxes(showgrid=True, gridcolor=GRID)
    drawn.update_layout(legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"})
    return drawn


def main(
    reward: Annotated[
        Path,
        typer.Option(
            help="Folder of a reward model that `moelora train RECIPE` wrote, whose data are of kind "
            "sampled_preferences, as those of scripts/studies/reward.py are: runs/reward/models/DMoERM-0."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Where the table, the figure and the policy go.")] = Path(
        "runs/reward_policy"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 30,
    every: Annotated[int, typer.Option(min=1, help="Steps between two looks at the policy.")] = 5,
    questions: Annotated[int, typer.Option(min=1, help=f"Of a step; each is answered {SAMPLES} times.")] = 4,
    test_size: Annotated[int, typer.Option(min=1, help="Held-out questions of each task.")] = 3,
    learning_rate: Annotated[float, typer.Option(help="Of the policy's experts and routers.")] = 1e-3,
) -> None:
    """Optimise SmolLM2 against a reward model, and plot gold against proxy reward."""
    study = Study.of(reward, output, steps * questions, test_size)
    shutil.rmtree(output / "answers", ignore_errors=True)  # another policy's
    points = optimise(study, steps, every, learning_rate, questions)
    text = (
        f"Mean over {len(study.sampler(0).questions('test'))} held-out questions, {SAMPLES} answers each, "
        f"{steps} steps of GRPO, bands of 95 % over questions. A standard deviation is that among the first answers to "
        "a question."
    )
    path = output / "policy.html"
    path.write_text(page("Gold and proxy", [section("policy", "Gold against proxy reward", text, figure(points))]))
    typer.echo(f"\n{text}\n\n{path}")


if __name__ == "__main__":
    typer.run(main)
