"""Methods side by side: the same backbone, the same batches in the same order, about the same number of parameters."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..config import MixtureConfig, SiteConfig
from ..data import Collator, TokenizedSet
from ..data.examples import Example
from ..errors import ConfigError
from ..evaluation.scoring import Progress, Report, score
from ..experts import is_linear
from ..experts.ffn import linear_shape, trace_ffn
from ..mixture import MoELoRAModel, attach
from ..sites import layer_of, match_sites
from .sft import SFTConfig, SFTTrainer


@dataclass(frozen=True)
class Targets:
    """Module names of one layer of a backbone.

    Attributes:
        ffn: the FFN block. projections: the linears inside it. attention: the linears outside it.
        layers: number of layers.
    """

    ffn: str
    projections: list[str]
    attention: list[str]
    layers: int


@dataclass(frozen=True)
class Outcome:
    """What one method did.

    Attributes:
        report: its scores. tokens: real tokens trained on. seconds: spent in training.
        peak_mib: largest resident memory of the process (or memory of the GPU) while training, in MiB.
        trainable: number of trained parameters. loss: mean task loss over the last tenth of the steps.
    """

    report: Report
    tokens: int
    seconds: float
    peak_mib: float
    trainable: int
    loss: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        own = {key: value for key, value in vars(self).items() if key != "report"}
        return {**own, "tokens_per_second": self.tokens_per_second, "score": self.report.to_dict()}


def find_targets(backbone: nn.Module) -> Targets:
    """Which modules of a backbone's layers are FFN blocks and which are other linears, found by walking the modules.

    Raises:
        ConfigError: no layer holds an FFN block that can carry experts.
    """
    layers = {layer for path, _ in backbone.named_modules() if (layer := layer_of(path)) is not None}
    if not layers:
        raise ConfigError(f"{type(backbone).__name__} has no numbered layers; name the sites in a recipe instead")
    last = max(layers)
    inside = [(path, module) for path, module in backbone.named_modules() if layer_of(path) == last]
    linears = [path for path, module in inside if is_linear(module)]
    for path, module in inside:
        own = [name for name in linears if name.startswith(path + ".")]
        if is_linear(module) or not 2 <= len(own) <= 3:
            continue
        try:
            spec = trace_ffn(module, path)
        except ConfigError:
            continue  # not an FFN block; the next module may be
        attention = sorted({name.rpartition(".")[2] for name in linears if name not in own})
        return Targets(path.rpartition(".")[2], spec.projections, attention, len(layers))
    raise ConfigError(f"{type(backbone).__name__} has no FFN block that can carry experts; name sites in a recipe")


def trainable_parameters(model: MoELoRAModel) -> int:
    """Number of trained parameters."""
    return sum(tensor.numel() for tensor in model.adapter_tensors().values() if tensor.requires_grad)


def equal_rank(backbone: nn.Module, site: SiteConfig, parameters: int) -> int:
    """The rank at which plain LoRA on the linears that ``site`` names has nearest to ``parameters`` parameters."""
    shapes = [linear_shape(backbone.get_submodule(path)) for path in match_sites(backbone, site)]
    return max(1, round(parameters / sum(map(sum, shapes))))


def seconds_per_step(model: MoELoRAModel, data: TokenizedSet, collate: Collator, batch_size: int) -> float:
    """Time of one forward and backward pass over a typical batch, after one to warm up; leaves no gradient."""
    taken = 0.0
    for start in (0, batch_size):
        batch = collate([data[(start + i) % len(data)] for i in range(batch_size)])
        batch = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        began = time.perf_counter()
        model(**batch).loss.backward()
        taken = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return taken


def train_and_score(
    backbone: PreTrainedModel,
    mixture: MixtureConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: TokenizedSet,
    test: Sequence[Example],
    config: SFTConfig,
    *,
    collate: Collator,
    output: Path,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
    then: Callable[[MoELoRAModel, Outcome], None] | None = None,
) -> Outcome:
    """Attach ``mixture``, train it, score it, hand it to ``then``, and give the backbone back as it was.

    Args:
        config: the trainer's configuration; ``max_steps`` and the seed make two methods see the same batches.
        output: the trainer's folder. then: called with the trained model before it is taken off the backbone.
    """
    torch.manual_seed(seed)
    model = attach(backbone, mixture)
    trainer = SFTTrainer(
        model,
        config.training_arguments(str(output), seed),
        train_dataset=train,
        data_collator=collate,
        callbacks=list(callbacks),
        **config.trainer_options(),
    )
    with peak_memory() as peak:
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    losses = [entry["task_loss"] for entry in trainer.state.log_history if "task_loss" in entry]
    tail = losses[-max(1, len(losses) // 10) :]
    report = score(model, tokenizer, test, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)
    outcome = Outcome(
        report=report,
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=seconds,
        peak_mib=peak(),
        trainable=trainable_parameters(model),
        loss=sum(tail) / len(tail),
    )
    if then is not None:
        then(model, outcome)
    model.unload()
    return outcome


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Within the block watch memory; yields a function that gives the largest use so far, in MiB.

    On a GPU its allocator's own peak; on a CPU the process's resident memory, read twenty times a second.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield lambda: torch.cuda.max_memory_allocated() / 2**20
        return
    process = psutil.Process()
    most = [process.memory_info().rss]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            most[0] = max(most[0], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: most[0] / 2**20
    finally:
        stop.set()
        thread.join()
