"""Five LoRAs trained by PEFT, one for each of five tasks, composed in every way and scored beside baselines.

    python scripts/studies/compose.py                             # everything, resumed where it stopped
    python scripts/studies/compose.py --only arrow --only cat     # some methods, and what they are compared with

Each adapter learns from ``--steps`` batches of its own task, the multi-task LoRA from five times as many of all tasks:
as many tokens as the five together. Routers that are trained get ``--router-steps`` batches of all tasks, with experts
and backbone frozen. Answers are greedy, and all is one seed: a demonstration, not a ranking of methods.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments

import moelora
from moelora.composition import read_adapter
from moelora.composition.merging import merge_adapters
from moelora.composition.training import default_trainer, train_router
from moelora.composition.weights import search_weights
from moelora.composition.writing import write_peft
from moelora.config import ReasoningGymData
from moelora.data import Collator, Example, load_examples, tokenize
from moelora.data.examples import Splits
from moelora.evaluation import Report, compare, majority, score, score_answers

# The quickstart's tasks that a small model learns within some hundred examples; options keep the questions short.
TASKS: dict[str, dict[str, Any]] = {
    "syllogism": {"allow_some": False, "allow_some_not": False, "invalid_ratio": 0.5, "inversion_probability": 0.0},
    "needle_haystack": {"min_num_statements": 2, "max_num_statements": 3},
    "word_sequence_reversal": {"min_words": 2, "max_words": 3},
    "number_filtering": {"min_numbers": 2, "max_numbers": 3, "min_value": 0, "max_decimals": 0},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}
SYSTEM = "Answer briefly."
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = list(range(10, 20))  # the middle third, as in the quickstart
MULTI = "multi_task"
BATCH = 75  # a 4-bit weight is unpacked for each forward, however many questions it serves


@dataclass
class Study:
    """What all methods share."""

    folder: Path
    backbone: PreTrainedModel
    tokenizer: Any
    train: dict[str, list[Example]]
    test: list[Example]
    steps: int
    router_steps: int
    learning_rate: float

    def lora(self, name: str) -> Path:
        """Where the PEFT adapter of a task lies."""
        return self.folder / "adapters" / name

    def mixed(self, per_task: int) -> list[Example]:
        """The first examples of every task."""
        return [example for examples in self.train.values() for example in examples[:per_task]]


def prepare(folder: Path, steps: int, router_steps: int, learning_rate: float) -> Study:
    """Load the 4-bit backbone and make the questions."""
    data = ReasoningGymData(tasks=TASKS, train_size=1000, test_size=60, test_seed=3_000_017, system=SYSTEM)
    splits = load_examples(data)
    by_task: dict[str, list[Example]] = {name: [] for name in TASKS}
    for example in splits.train:
        by_task[example.task].append(example)
    backbone, tokenizer = moelora.load_backbone("smollm2-135m-instruct", quantization="nf4")
    return Study(folder, backbone, tokenizer, by_task, splits.test, steps, router_steps, learning_rate)


def arguments(study: Study, steps: int, learning_rate: float) -> dict[str, Any]:
    """What every training here has in common."""
    return {
        "max_steps": steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "per_device_train_batch_size": 8,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": 0,
    }


def train_loras(study: Study) -> None:
    """One PEFT adapter for each task, and one for all tasks with as many tokens as the five have together."""
    jobs = {name: (examples, study.steps) for name, examples in study.train.items()}
    jobs[MULTI] = (study.mixed(1000), study.steps * len(TASKS))
    for name, (examples, steps) in jobs.items():
        if (study.lora(name) / "adapter_model.safetensors").is_file():
            continue
        torch.manual_seed(0)
        config = LoraConfig(
            r=8, lora_alpha=16, target_modules=TARGETS, layers_to_transform=LAYERS, task_type="CAUSAL_LM"
        )
        model = get_peft_model(study.backbone, config)
        rows = tokenize(examples, study.tokenizer, 192)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(study.folder / "logs"), **arguments(study, steps, study.learning_rate)
            ),
            train_dataset=rows,
            data_collator=Collator(study.tokenizer.pad_token_id, answers_only=True),
        )
        trainer.train()
        model.save_pretrained(study.lora(name))
        model.unload()


Scorer = Callable[[Study], Report]


def answered(study: Study, model: Any) -> Report:
    """The score of a model on the questions of all tasks, mixed."""
    return score(model, study.tokenizer, study.test, batch_size=BATCH)


def of_backbone(study: Study) -> Report:
    """The frozen model."""
    return answered(study, study.backbone)


def of_constant(study: Study) -> Report:
    """The most frequent training answer of each task."""
    return majority([example for examples in study.train.values() for example in examples], study.test)


def with_one(name: str) -> Scorer:
    """A single adapter on the questions of all tasks."""

    def run(study: Study) -> Report:
        model = moelora.from_pretrained(study.lora(name), study.backbone)
        try:
            return answered(study, model)
        finally:
            model.unload()

    return run


def with_right(study: Study) -> Report:
    """Each question with the adapter of its task: what a router that knows the task would give."""
    answers: dict[int, str] = {}
    for name in TASKS:
        model = moelora.from_pretrained(study.lora(name), study.backbone)
        chosen = [index for index, example in enumerate(study.test) if example.task == name]
        report = score(model, study.tokenizer, [study.test[index] for index in chosen], batch_size=BATCH)
        answers |= dict(zip(chosen, report.answers, strict=True))
        model.unload()
    return score_answers(study.test, [answers[index] for index in range(len(study.test))])


def merged(method: str, weight: float, **options: Any) -> Scorer:
    """The five adapters merged into one."""

    def run(study: Study) -> Report:
        adapters = [read_adapter(study.lora(name)) for name in TASKS]
        folder = study.folder / "merged" / method
        shutil.rmtree(folder, ignore_errors=True)
        write_peft(merge_adapters(adapters, method, [weight] * len(adapters), **options), folder)
        model = moelora.from_pretrained(folder, study.backbone)
        try:
            return answered(study, model)
        finally:
            model.unload()

    return run


def composed(router: str, teach: Callable[[Study, Any], object] | None = None, **options: Any) -> Scorer:
    """A mixture of the five adapters, its router trained where it has something to learn."""

    def run(study: Study) -> Report:
        model = moelora.compose([study.lora(name) for name in TASKS], router, study.backbone, **options)
        model.tokenizer = study.tokenizer
        try:
            if teach is not None:
                teach(study, model)
            return answered(study, model)
        finally:
            model.unload()

    return run


def gates(learning_rate: float) -> Callable[[Study, Any], object]:
    """Train a router on all tasks, by its card's trainer but for the schedule."""

    def run(study: Study, model: Any) -> object:
        args = arguments(study, study.router_steps, learning_rate)
        unused = ("report_to", "remove_unused_columns", "use_cpu", "dataloader_pin_memory", "seed")
        trainer = default_trainer(
            model.mixture.sites[0].router.kind, **{k: v for k, v in args.items() if k not in unused}
        )
        return train_router(model, Splits(study.mixed(1000), [], 0), trainer, max_length=192)

    return run


def few_shots(study: Study, model: Any) -> object:
    """LoRAHub's search on two questions of each task."""
    return search_weights(model, study.mixed(2), max_length=192)


METHODS: dict[str, tuple[str, Scorer]] = {
    "constant": ("most frequent answer", of_constant),
    "backbone": ("backbone", of_backbone),
    "right": ("**the single right adapter**", with_right),
    "multi": ("multi-task LoRA, as many tokens", with_one(MULTI)),
    "uniform": ("uniform mix, 1/5 of each", composed("static", weights="uniform")),
    "sum": ("sum of all five", composed("static", weights=[1.0] * len(TASKS))),
    "linear": ("PEFT linear", merged("linear", 1 / len(TASKS))),
    "svd": ("SVD of the mean, rank 8", merged("svd", 1 / len(TASKS), rank=8)),
    "ties": ("TIES", merged("ties", 1.0, density=0.5)),
    "dare": ("DARE + TIES", merged("dare_ties", 1.0, density=0.5)),
    "lego": ("LoRA-LEGO, rank 8", merged("lego", 1.0, k=8)),
    "lorahub": ("LoRAHub, 10 examples", composed("static", few_shots, weights=[0.0] * len(TASKS), mix="factors")),
    "arrow": ("Arrow, top 1", composed("arrow", top_k=1)),
    "arrow3": ("Arrow, top 3", composed("arrow", top_k=3)),
    "cat": ("CAT, trained weights", composed("static", gates(1e-2), weights="learned", init="zeros")),
    "xlora": ("X-LoRA, trained classifier", composed("xlora", gates(1e-3), layerwise=True)),
    "meteora": ("MeteoRA, trained gates", composed("meteora", gates(1e-3), top_k=2)),
    "topk": ("top-2 gates, trained", composed("topk", gates(1e-2), top_k=2)),
}
# What all others are compared with.
ALWAYS = ("right", "multi")


def run(study: Study, only: list[str]) -> dict[str, Report]:
    """Score the methods that have no score yet."""
    folder = study.folder / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    reports = {}
    for name, (title, scorer) in METHODS.items():
        path = folder / f"{name}.json"
        if not path.is_file():
            if only and name not in (*only, *ALWAYS):
                continue
            torch.manual_seed(0)
            began = time.monotonic()
            answers = scorer(study).answers
            path.write_text(json.dumps({"answers": answers, "seconds": time.monotonic() - began}, indent=1))
        answers = json.loads(path.read_text())["answers"]
        reports[name] = score_answers(study.test, answers)
        typer.echo(f"{title}: {100 * reports[name].mean:.1f}")
    return reports


def table(study: Study, reports: dict[str, Report]) -> str:
    """Markdown: score of each task and of all, in percent, and the difference to the right adapter."""
    lines = [
        f"| | {' | '.join(TASKS)} | mean | minus the right adapter |",
        f"| --- |{' ---: |' * (len(TASKS) + 2)}",
    ]
    for name, report in reports.items():
        cells = [f"{100 * report.tasks[task].mean:.0f}" for task in TASKS]
        gap = compare(study.test, report, reports["right"])
        said = f"{100 * gap.difference:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})" if name != "right" else ""
        lines.append(f"| {METHODS[name][0]} | {' | '.join(cells)} | {100 * report.mean:.1f} | {said} |")
    return "\n".join(lines)


def main(
    folder: Annotated[Path, typer.Option(help="Where adapters and scores are kept.")] = Path("runs/compose"),
    steps: Annotated[int, typer.Option(help="Batches of 8 for each adapter.")] = 60,
    router_steps: Annotated[int, typer.Option(help="Batches of 8 for a router.")] = 40,
    learning_rate: Annotated[float, typer.Option(help="Of the adapters.")] = 1e-3,
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(METHODS)}; may be repeated.")] = None,
) -> None:
    """Train five LoRAs with PEFT, compose them in every way, and print the table."""
    study = prepare(folder, steps, router_steps, learning_rate)
    train_loras(study)
    reports = run(study, only or [])
    result = table(study, reports)
    (folder / "table.md").write_text(result + "\n")
    typer.echo(f"\n{len(study.test)} questions, greedy answers, in percent; 95 % intervals over questions\n\n{result}")


if __name__ == "__main__":
    typer.run(main)
