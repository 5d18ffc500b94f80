"""Published methods on one backbone and the same tasks: a sweep of learning rates, then seeds, then time and memory.

    python scripts/bench/methods.py --minutes 90          # goes on where it stopped; results in runs/bench/methods
    python scripts/bench/methods.py --table               # the table of what is there, as Markdown

Each method has about as many trained parameters as LoRA (within 5 %: its rank is searched) and sees the same number of
steps over the same batches for a seed. Every learning rate is tried with the first seed and judged on questions of its
own; the best goes on with the other seeds and is judged on the test questions. An answer counts when greedy decoding
would write exactly the reference. Experts sit in the middle third of the layers. ReMix sees each batch once for each of
its selections, and LoRA-Mixer spends the last third of its steps on its router; both are within the same steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from transformers import Trainer, TrainerCallback

import moelora
from moelora.backbone import load_backbone
from moelora.config import BackboneConfig, MixtureConfig, ReasoningGymData
from moelora.data import Collator, Example, TokenizedSet, load_examples, tokenize
from moelora.evaluation import Report, compare
from moelora.evaluation.labels import teacher_forced_match
from moelora.trainers import SFTTrainer
from moelora.trainers.comparison import peak_memory, trainable_parameters
from moelora.trainers.lora_mixer import LoRAMixerTrainer
from moelora.trainers.meter import LoadMeter
from moelora.trainers.remix import RemixTrainer
from moelora.trainers.sft import SFTConfig

# Tasks that a small model learns within some hundred short examples.
TASKS: dict[str, dict[str, Any]] = {
    "syllogism": {"allow_some": False, "allow_some_not": False, "invalid_ratio": 0.5, "inversion_probability": 0.0},
    "word_sequence_reversal": {"min_words": 2, "max_words": 3},
    "number_filtering": {"min_numbers": 2, "max_numbers": 3, "min_value": 0, "max_decimals": 0},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FFN = ["gate_proj", "up_proj", "down_proj"]
LAYERS = list(range(10, 20))
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
BATCH = 8
FOR_CHOICE, FOR_TEST = 20, 40  # questions of each task
LORA_RANK = 38  # where every other method comes near


@dataclass(frozen=True)
class Method:
    """A method's sites for a rank, and the trainers that it runs one after another with the shares of the steps."""

    sites: Callable[[int], list[dict[str, Any]]]
    stages: tuple[tuple[type[SFTTrainer], dict[str, Any], float], ...] = ((SFTTrainer, {}, 1.0),)


def _site(target: list[str] | str, experts: dict[str, Any], router: dict[str, Any] | None = None) -> dict[str, Any]:
    site: dict[str, Any] = {"target": target, "layers": LAYERS, "experts": {"alpha": 32.0, **experts}}
    return site if router is None else {**site, "router": router}


def _mixlora(r: int) -> list[dict[str, Any]]:
    router = {"kind": "topk", "top_k": 2, "aux_loss_coef": 0.01}
    attention = _site(ATTENTION, {"kind": "lora", "num_experts": 1, "r": r})
    return [_site("mlp", {"kind": "lora", "num_experts": 8, "r": r}, router), attention]


METHODS: dict[str, Method] = {
    "lora": Method(lambda r: [_site(ATTENTION + FFN, {"kind": "lora", "num_experts": 1, "r": r})]),
    "mixlora": Method(_mixlora),
    "loramoe": Method(
        lambda r: [
            _site(
                FFN,
                {"kind": "lora", "num_experts": 6, "r": r},
                # Half of the experts for questions about numbers, half for those about words; the tasks by alphabet.
                {"kind": "softmax", "types_of_tasks": [1, 1, 0, 0]},
            )
        ]
    ),
    "lora_mixer": Method(
        lambda r: [
            _site(ATTENTION, {"kind": "lora", "num_experts": len(TASKS), "r": r}, {"kind": "lora_mixer", "top_k": 3})
        ],
        ((LoRAMixerTrainer, {"phase": "hard"}, 2 / 3), (LoRAMixerTrainer, {"phase": "soft"}, 1 / 3)),
    ),
    "remix": Method(
        lambda r: [
            _site(FFN, {"kind": "lora", "num_experts": 8, "r": r}, {"kind": "remix", "top_k": 2, "scale": "rslora"})
        ],
        ((RemixTrainer, {"selections": 2, "mode": "batched"}, 1.0),),
    ),
    "flylora": Method(
        lambda r: [
            _site(
                ATTENTION + FFN,
                {"kind": "sparse_projection", "num_experts": 1, "r": r, "density": 0.25},
                {"kind": "flylora", "top_k": r // 4},
            )
        ]
    ),
    "smora": Method(
        lambda r: [
            _site(ATTENTION + FFN, {"kind": "lora", "num_experts": 1, "r": r}, {"kind": "smora", "top_k": r // 4})
        ]
    ),
}


class Bench:
    """What all runs of a process share: the frozen backbone and the questions."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        backbone, tokenizer = load_backbone(BackboneConfig(quantization="fp32"))
        assert tokenizer is not None
        self.backbone, self.tokenizer = backbone, tokenizer
        questions = FOR_CHOICE + FOR_TEST
        data = ReasoningGymData(tasks=TASKS, train_size=600, test_size=questions, system="Answer briefly.")
        splits = load_examples(data)
        self.train: TokenizedSet = tokenize(splits.train, tokenizer, 256)
        by_task = {task: [example for example in splits.test if example.task == task] for task in TASKS}
        self.choice = [example for group in by_task.values() for example in group[:FOR_CHOICE]]
        self.test = [example for group in by_task.values() for example in group[FOR_CHOICE:]]
        self.collate = Collator(tokenizer.pad_token_id, with_task_ids=True, answers_only=True)

    def rank(self, method: str) -> int:
        """The rank whose number of trained parameters is nearest to LoRA's.

        Raises:
            SystemExit: none is within 5 %.
        """
        wanted = self.parameters("lora", LORA_RANK)
        if method == "lora":
            return LORA_RANK
        few, more = self.parameters(method, 4), self.parameters(method, 8)
        rank = max(1, round(4 + 4 * (wanted - few) / (more - few)))  # the number is linear in the rank
        off = self.parameters(method, rank) / wanted - 1
        if abs(off) > 0.05:
            raise SystemExit(f"{method}: rank {rank} has {100 * off:+.1f} % of LoRA's parameters")
        return rank

    def parameters(self, method: str, rank: int) -> int:
        model = moelora.attach(self.backbone, {"sites": METHODS[method].sites(rank)})
        count = trainable_parameters(model)
        model.unload()
        return count

    def run(self, method: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
        """Train, and answer all questions."""
        rank = self.rank(method)
        torch.manual_seed(seed)
        model = moelora.attach(self.backbone, MixtureConfig.parse({"sites": METHODS[method].sites(rank)}))
        parameters, tokens, losses = trainable_parameters(model), 0, []
        began = time.perf_counter()
        for number, (kind, options, share) in enumerate(METHODS[method].stages):
            with TemporaryDirectory() as folder:
                trainer = self.trainer(kind, model, folder, rate, seed + 1000 * number, round(share * steps), options)
                trainer.train()
            tokens += int(trainer.state.num_input_tokens_seen)
            losses += [line["task_loss"] for line in trainer.state.log_history if "task_loss" in line]
        seconds = time.perf_counter() - began
        meter = LoadMeter(model, gates=True)
        model.slot.listeners.append(meter)
        reports = {name: self.answer(model, getattr(self, name)) for name in ("choice", "test")}
        load = meter.metrics()
        model.unload()
        return {
            "method": method,
            "rate": rate,
            "seed": seed,
            "steps": steps,
            "rank": rank,
            "parameters": parameters,
            "tokens": tokens,
            "seconds": seconds,
            "loss": mean(losses[-3:]),
            "load": load,
            **{name: {"mean": report.mean, "items": report.items} for name, report in reports.items()},
        }

    def trainer(
        self, kind: type[SFTTrainer], model: Any, folder: str, rate: float, seed: int, steps: int, options: Any
    ) -> SFTTrainer:
        args = {
            "learning_rate": rate,
            "max_steps": steps,
            "per_device_train_batch_size": BATCH,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "logging_steps": max(1, steps // 10),
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        arguments = SFTConfig(args=args).training_arguments(folder, seed)
        return kind(model, arguments, data_collator=self.collate, train_dataset=self.train, **options)

    def answer(self, model: Any, questions: list[Example]) -> Report:
        return teacher_forced_match(model, self.tokenizer, questions, batch_size=20)


_bench: Bench | None = None


def _job(method: str, rate: float, seed: int, steps: int, path: Path) -> dict[str, Any]:
    """One run in a process of the pool, which keeps its backbone for the next."""
    global _bench
    _bench = _bench or Bench()
    result = _bench.run(method, rate, seed, steps)
    path.write_text(json.dumps(result), encoding="utf-8")
    return result


class Clock(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def _peft(bench: Bench, folder: str, steps: int) -> Iterator[Trainer]:
    """PEFT's LoRA of the same rank and sites under the plain Trainer; the backbone is as before afterwards."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=LORA_RANK, lora_alpha=32, target_modules=ATTENTION + FFN, layers_to_transform=LAYERS, layers_pattern="layers"
    )
    model = get_peft_model(bench.backbone, config)
    args = SFTConfig(args={"max_steps": steps, "per_device_train_batch_size": BATCH, "save_strategy": "no"})
    arguments = args.training_arguments(folder, 0)
    collate = Collator(bench.tokenizer.pad_token_id, answers_only=True)
    yield Trainer(model, arguments, data_collator=collate, train_dataset=bench.train)
    bench.backbone = model.unload()


def _ours(bench: Bench, method: str, folder: str, steps: int) -> Iterator[Trainer]:
    model = moelora.attach(bench.backbone, {"sites": METHODS[method].sites(bench.rank(method))})
    kind, options, _ = METHODS[method].stages[-1]
    yield bench.trainer(kind, model, folder, 1e-3, 0, steps, options)
    model.unload()


def _timed(name: str, steps: int) -> tuple[float, float]:
    """Median seconds of a step and peak MiB, in a process of the pool that does nothing else."""
    global _bench
    _bench = _bench or Bench()
    with TemporaryDirectory() as folder:
        made = _peft(_bench, folder, steps) if name == "peft" else _ours(_bench, name, folder, steps)
        for trainer in made:
            clock = Clock()
            trainer.add_callback(clock)
            with peak_memory() as peak:
                trainer.train()
            memory = peak()
    return median(clock.seconds[2:]), memory


def time_all(folder: Path, rounds: int = 2, steps: int = 6) -> None:
    """Every method and PEFT's LoRA in turns, a fresh process for each, and the ratios to PEFT's in the same round."""
    taken: dict[str, list[tuple[float, float]]] = {}
    context = get_context("spawn")
    for _ in range(rounds):
        for name in ("peft", *METHODS):
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                taken.setdefault(name, []).append(pool.submit(_timed, name, steps).result())
            print(name, taken[name][-1], flush=True)
    (folder / "time.json").write_text(json.dumps(taken), encoding="utf-8")


def sweep(folder: Path, steps: int, jobs: int, only: list[str], deadline: float) -> None:
    """All that is missing: every rate with the first seed, then the best rate with the others."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = [(method, rate, SEEDS[0]) for rate in RATES for method in only]
        _do(pool, folder, waiting, steps, deadline)
        later = [(method, best_rate(folder, method), seed) for seed in SEEDS[1:] for method in only]
        _do(pool, folder, [(m, rate, seed) for m, rate, seed in later if rate is not None], steps, deadline)


def _do(pool: ProcessPoolExecutor, folder: Path, runs: list[Any], steps: int, deadline: float) -> None:
    running = {}
    for method, rate, seed in runs:
        path = folder / f"{method}-{rate:g}-{seed}.json"
        if not path.exists():
            running[pool.submit(_job, method, rate, seed, steps, path)] = path.stem
    for future in as_completed(running):
        result = future.result()
        scores = {name: round(100 * result[name]["mean"], 1) for name in ("choice", "test")}
        print(f"{running[future]}  loss {result['loss']:.3f}  {scores}  {result['seconds']:.0f} s", flush=True)
        if time.monotonic() > deadline:
            for other in running:
                other.cancel()
            raise SystemExit("the minutes are over: run the same command to go on")


def results(folder: Path, method: str) -> list[dict[str, Any]]:
    """What was written down of a method."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{method}-[0-9]*.json"))]


def best_rate(folder: Path, method: str) -> float | None:
    """By the questions for the choice, with the first seed; ``None`` until every rate was tried."""
    tried = {run["rate"]: run["choice"]["mean"] for run in results(folder, method) if run["seed"] == SEEDS[0]}
    return max(tried, key=lambda rate: tried[rate]) if set(RATES) <= tried.keys() else None


def table(folder: Path) -> str:
    """Markdown: scores with 95 % intervals of the difference to LoRA, support and load, time and memory."""
    chosen = {method: _chosen(folder, method) for method in METHODS}
    times = json.loads((folder / "time.json").read_text()) if (folder / "time.json").exists() else {}
    head = (
        "| method | rank | parameters | best rate | test, each seed | mean | minus LoRA [95 %] | ESS | load entropy |"
        " step / PEFT | memory / PEFT |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    lines = [_row(method, runs, chosen["lora"], times) for method, runs in chosen.items() if runs]
    return "\n".join([head, *lines])


def _chosen(folder: Path, method: str) -> list[dict[str, Any]]:
    rate = best_rate(folder, method)
    return [run for run in results(folder, method) if run["rate"] == rate]


def _row(method: str, runs: list[dict[str, Any]], lora: list[dict[str, Any]], times: dict[str, Any]) -> str:
    first, scores = runs[0], [100 * run["test"]["mean"] for run in runs]
    difference = "" if method == "lora" or len(runs) != len(lora) else _difference(runs, lora)
    edge = " (edge)" if first["rate"] in (RATES[0], RATES[-1]) else ""
    load = {key: mean(run["load"][key] for run in runs) for key in ("load/ess", "load/entropy") if key in first["load"]}
    cells = [
        method,
        str(first["rank"]),
        f"{first['parameters'] / 1e6:.2f} M",
        f"{first['rate']:g}{edge}",
        ", ".join(f"{score:.1f}" for score in scores),
        f"{mean(scores):.1f}",
        difference,
        f"{load['load/ess']:.2f}" if "load/ess" in load else "",
        f"{load['load/entropy']:.2f}" if "load/entropy" in load else "",
        *(_ratio(times, method, place) for place in (0, 1)),
    ]
    return "| " + " | ".join(cells) + " |"


def _difference(runs: list[dict[str, Any]], lora: list[dict[str, Any]]) -> str:
    """Over questions and seeds; the seeds' questions are the same, so that each pair answers the same one."""
    tasks = [task for task in TASKS for _ in range(FOR_TEST)]
    examples = [Example("", "", task) for task in tasks * len(runs)]
    ours, theirs = ([item for run in side for item in run["test"]["items"]] for side in (runs, lora))
    result = compare(examples, Report({}, 0.0, [], ours), Report({}, 0.0, [], theirs))
    return f"{100 * result.difference:+.1f} [{100 * result.low:+.1f}, {100 * result.high:+.1f}]"


def _ratio(times: dict[str, Any], method: str, place: int) -> str:
    """The median over rounds of the ratio to PEFT's LoRA in the same round."""
    if method not in times:
        return ""
    return f"{median(own[place] / peft[place] for own, peft in zip(times[method], times['peft'], strict=True)):.2f}"


def main(
    minutes: Annotated[float, typer.Option(help="Stop after about so many minutes; another call goes on.")] = 60.0,
    steps: Annotated[int, typer.Option(help="Optimizer steps of every run.")] = 30,
    jobs: Annotated[int, typer.Option(help="Runs at the same time, one thread each.")] = 2,
    only: Annotated[list[str] | None, typer.Option(help=f"Some methods: {', '.join(METHODS)}.")] = None,
    timing: Annotated[bool, typer.Option("--time", help="Measure time and memory instead.")] = False,
    show: Annotated[bool, typer.Option("--table", help="Print the table of what is there, and stop.")] = False,
    folder: Annotated[Path, typer.Option(help="Where results go, a file for each run.")] = Path("runs/bench/methods"),
) -> None:
    """Compare published methods under one budget."""
    folder.mkdir(parents=True, exist_ok=True)
    if timing:
        time_all(folder)
    elif not show:
        sweep(folder, steps, jobs, only or list(METHODS), time.monotonic() + 60 * minutes)
    print(table(folder))


if __name__ == "__main__":
    typer.run(main)
