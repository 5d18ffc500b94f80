"""Runs of two processes over gloo: plain data parallelism and every stage of ZeRO; importable by child processes."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, DistributedType, GradientState
from accelerate.utils import FullyShardedDataParallelPlugin
from tiny_runs import build_model, build_rows, build_trainer, log_lines
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

import moelora
from moelora import checkpoints
from moelora.data import Collator
from moelora.trainers import SFTTrainer

# Gradient accumulation, and whether tokens are averaged across processes.
ALL = tuple((steps, average) for steps in (1, 4) for average in (True, False))
COMBINATIONS = {"ddp": ALL, "zero1": ALL[2:], "zero2": ALL, "zero3": ALL, "fsdp2": ALL[2:]}
STAGES = ("ddp", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "fsdp2")
STEPS = {
    "max_steps": 20,
    "train_sampling_strategy": "sequential",
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-3,
    "logging_steps": 1,
}


def join(rank: int, world: int, port: int) -> None:
    """Become one of several processes; DeepSpeed takes gloo itself instead of compiling its own collectives."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    warnings.simplefilter("ignore")
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    sys.argv = sys.argv[:1]
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def arguments(kind: str, **more: Any) -> dict[str, Any]:
    """Options of a trainer for one of ``STAGES``; in stage 3 no parameter is small enough to stay whole."""
    if not kind.startswith("zero"):
        return more
    stage, offload = int(kind[4]), kind.endswith("offload")
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    if offload:
        zero |= {"offload_optimizer": {"device": "cpu"}}
        zero |= {"offload_param": {"device": "cpu"}} if stage == 3 else {}
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    # torch's AdamW, whose counterpart in DeepSpeed would be compiled first.
    config = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    return {"deepspeed": config | dict.fromkeys(auto, "auto"), **more}


def fresh() -> None:
    """Let the next trainer of this process have another configuration than the last one."""
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # set by arguments that name a configuration
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class WholeGradients(TrainerCallback):
    """The gradients of each whole step, unclipped, also where DeepSpeed takes the step inside of backward()."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.is_deepspeed_enabled:
            return
        engine = self.trainer.model_wrapped
        step = engine.step

        def noted() -> None:
            self._note()
            step()

        engine.step = noted

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.is_deepspeed_enabled:
            self._note()

    def _note(self) -> None:
        from deepspeed.utils import safe_get_full_grad

        found = {}
        for name, parameter in self.trainer.model.adapter_tensors().items():
            sharded = hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")
            grad = safe_get_full_grad(parameter) if sharded else parameter.grad
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            found[name] = torch.zeros_like(parameter) if grad is None else grad.clone()
        self.steps.append(found)


@contextmanager
def split_by_layer() -> Iterator[None]:
    """Trainers made within the block use FSDP2, which accelerate offers on GPUs alone; torch knows it on CPUs too."""
    create = Trainer.create_accelerator_and_postprocess

    def with_plugin(self: Any) -> None:
        create(self)  # type: ignore[no-untyped-call]
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            state_dict_type="SHARDED_STATE_DICT",
            cpu_ram_efficient_loading=False,
            reshard_after_forward=True,
        )
        AcceleratorState._shared_state.update(fsdp_plugin=plugin, distributed_type=DistributedType.FSDP)
        self.is_fsdp_enabled = True

    with patch.object(Trainer, "create_accelerator_and_postprocess", with_plugin):
        yield


def train(kind: str, folder: Path, resume: str | None = None, **options: Any) -> SFTTrainer:
    """One run; ``world * per_device_train_batch_size * accumulation`` is what makes runs alike."""
    fresh()
    options = {**STEPS, **options}
    model, rows = options.pop("model", None) or build_model(), options.pop("rows", None) or build_rows()
    with split_by_layer() if kind == "fsdp2" else nullcontext():
        trainer = build_trainer(folder, model, rows, **arguments(kind, **options))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, WholeGradients):
            callback.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def final(trainer: SFTTrainer, folder: Path) -> dict[str, Tensor]:
    """The consolidated checkpoint of a run, as a file."""
    from safetensors.torch import load_file

    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()
    return load_file(folder / "moelora.safetensors")


def first_gradients(kind: str, folder: Path, accumulation: int, average: bool) -> dict[str, Tensor]:
    noted = WholeGradients()
    options = {"gradient_accumulation_steps": accumulation, "average_tokens_across_devices": average}
    train(kind, folder, max_steps=1, max_grad_norm=0.0, callbacks=[noted], **options)
    return noted.steps[0]


def labelled(rank: int, count: int = 16) -> list[dict[str, Any]]:
    """Rows of which each process sees one task alone, so that the other experts are idle there."""
    rows = build_rows(count)
    return [{**row, "task_ids": index // 2 % 2} for index, row in enumerate(rows)]


def by_label() -> moelora.MoELoRAModel:
    """Each sequence goes to the expert of its label: of four experts two are idle on each process, two everywhere."""
    torch.manual_seed(0)
    base = build_model().unload()
    router = {"kind": "lora_mixer", "stage": "hard", "top_k": 2}
    model = moelora.attach(
        base, {"sites": [{"target": "mlp", "experts": {"num_experts": 4, "r": 2}, "router": router}]}
    )
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if name.endswith("lora_B"):
                tensor.normal_(std=0.2)
    return model


def study(rank: int, world: int, port: int, folder: Path, kinds: tuple[str, ...]) -> None:
    """Everything that the tests compare, of each kind of run, into ``results-<rank>.pt``."""
    join(rank, world, port)
    results: dict[str, Any] = {}
    for kind in kinds:
        own = folder / kind
        got: dict[str, Any] = {}
        got["gradients"] = {c: first_gradients(kind, own / "gradients", *c) for c in COMBINATIONS.get(kind, ())}
        got["idle"] = idle_gradients(kind, own / "idle", rank)
        twenty = train(kind, own / "twenty", gradient_accumulation_steps=2, step_balance=True)
        got["twenty"] = final(twenty, own / "twenty" / "final")
        uneven = train(kind, own / "uneven", rows=build_rows(15), gradient_accumulation_steps=2, max_steps=5)
        got["uneven"] = final(uneven, own / "uneven" / "final")
        saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
        whole = train(kind, own / "whole", **saving)
        got["whole"] = final(whole, own / "whole" / "final"), log_lines(whole)
        resumed = train(kind, own / "whole", str(own / "whole" / "checkpoint-2"), **saving)
        got["resumed"] = final(resumed, own / "whole" / "resumed"), log_lines(resumed)
        got["bytes"] = checkpoint_bytes(kind, own / "bytes")
        results[kind] = got
    torch.save(results, folder / f"results-{rank}.pt")
    torch.distributed.destroy_process_group()


def idle_gradients(kind: str, folder: Path, rank: int) -> dict[str, Tensor]:
    noted = WholeGradients()
    options = {"data_collator": Collator(0, with_task_ids=True), "max_grad_norm": 0.0, "max_steps": 1}
    train(kind, folder, model=by_label(), rows=labelled(rank), callbacks=[noted], **options)
    return noted.steps[0]


def checkpoint_bytes(kind: str, folder: Path) -> tuple[int, int]:
    """Bytes of a checkpoint of a mixture that is not tiny, and of its adapter alone."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    experts = {"num_experts": 8, "r": 16}
    site = {"target": "mlp", "experts": experts, "router": {"kind": "topk", "top_k": 2}}
    model = moelora.attach(LlamaForCausalLM(config), {"sites": [site]})
    trainer = train(kind, folder, model=model, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.accelerator.wait_for_everyone()
    checkpoint = folder / "checkpoint-1"
    total = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    return total, (checkpoint / "moelora.safetensors").stat().st_size


def killed(rank: int, world: int, port: int, folder: Path, kind: str, fault: str, step: Any, resume: bool) -> None:
    """A run of ten steps that saves after every second one, in which a fault may strike after the fifth.

    ``idle`` holds the first process in its sixth step, for the parent to kill the second; ``save`` kills the first in
    the middle of its third checkpoint. What ended a process that survives goes into ``ended-<rank>.txt``.
    """
    join(rank, world, port)

    class Step(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if rank == 0:
                step.value = state.global_step
            if fault == "idle" and state.global_step == 5:
                time.sleep(3.0)

    if fault == "save" and rank == 0:
        commit = checkpoints.commit

        def struck(staged: Path, final: Path) -> None:
            if final.name == "checkpoint-6":
                os.kill(os.getpid(), signal.SIGKILL)
            commit(staged, final)

        checkpoints.commit = struck  # type: ignore[assignment]
    saving = {"max_steps": 10, "save_strategy": "steps", "save_steps": 2, "callbacks": [Step()]}
    try:
        trainer = train(kind, folder, str(checkpoints.latest(folder)) if resume else None, **saving)
    except moelora.errors.TrainingError as error:
        (folder / f"ended-{rank}.txt").write_text(str(error))
        os._exit(3)
    final(trainer, folder / "final")
    torch.distributed.destroy_process_group()
