"""Write and load an adapter of Llama-2-7B's size in a process of its own, and say what memory that took.

Run by test_scale.py: ``python scale.py write FOLDER LAYERS`` writes FOLDER/bin and FOLDER/safetensors, and
``python scale.py load FOLDER LAYERS`` loads one of them onto a backbone of that shape and prints a line of JSON.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import moelora

HIDDEN, INNER, EXPERTS, RANK = 4096, 11008, 8, 16
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = {"gate_proj": (HIDDEN, INNER), "down_proj": (INNER, HIDDEN), "up_proj": (HIDDEN, INNER)}


class Sketch(nn.Linear):
    """A linear of any size that takes no memory: its weight is one number that stands for all."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.weight = nn.Parameter(torch.ones(1).expand(out_features, in_features))
        self.rows = torch.randn(out_features)

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True) * self.rows


def backbone(layers: int) -> LlamaForCausalLM:
    """Llama-2-7B without its numbers: on the meta device, but for FFN blocks that can be traced."""
    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers, vocab_size=32000)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        for name, (inside, outside) in FFN.items():
            setattr(layer.mlp, name, Sketch(inside, outside))
    return model.eval()


def tensors(layers: int) -> dict[str, Tensor]:
    """What MixLoRA's trainer saves: 8 experts of rank 16 in the FFN, LoRA of rank 16 on attention."""
    result = {}
    for layer in range(layers):
        prefix = f"mixlora.layers.{layer}"
        result[f"{prefix}.mlp.moe_gate.weight"] = torch.rand(EXPERTS, HIDDEN)
        shapes = {f"self_attn.{name}": (HIDDEN, HIDDEN) for name in ATTENTION}
        shapes |= {f"mlp.{name}.experts.{e}": shape for name, shape in FFN.items() for e in range(EXPERTS)}
        for name, (inside, outside) in shapes.items():
            result[f"{prefix}.{name}.lora_A.weight"] = torch.rand(RANK, inside)
            result[f"{prefix}.{name}.lora_B.weight"] = torch.rand(outside, RANK)
    return result


CONFIG = {
    "bias": "none",
    "peft_type": "MIXLORA",
    "r": RANK,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": [*ATTENTION, *FFN],
    "routing_strategy": "mixlora",
    "num_experts": EXPERTS,
    "act_fn": "silu",
    "top_k": 2,
    "base_model_name_or_path": "meta-llama/Llama-2-7b-hf",
    "task_type": "CAUSAL_LM",
}


def write(folder: Path, layers: int) -> None:
    values = tensors(layers)
    for name in ("bin", "safetensors"):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps(CONFIG))
    torch.save({key: nn.Parameter(value) for key, value in values.items()}, folder / "bin" / "adapter_model.bin")
    save_file(values, folder / "safetensors" / "adapter_model.safetensors")


def status(field: str) -> int:
    """Bytes that Linux gives for a field of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class Anonymous(threading.Thread):
    """The highest value of RssAnon, looked up every few milliseconds: there is no field for it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = 0, False

    def run(self) -> None:
        while not self.done:
            self.peak = max(self.peak, status("RssAnon"))
            time.sleep(0.005)


def load(folder: Path, layers: int) -> None:
    model = backbone(layers)
    before, anonymous = status("VmRSS"), Anonymous()
    anonymous.start()
    started = time.monotonic()
    loaded = moelora.from_pretrained(folder, model)
    seconds = time.monotonic() - started
    anonymous.done = True
    anonymous.join()
    peak, anonymous_peak = status("VmHWM"), max(anonymous.peak, status("RssAnon"))
    values = loaded.adapter_tensors()
    last = f"model.layers.{layers - 1}.mlp.down_proj"
    print(
        json.dumps(
            {
                "before": before,
                "peak": peak,
                "anonymous": anonymous_peak,
                "seconds": seconds,
                "adapter": sum(value.nbytes for value in values.values()),
                "parameters": sum(value.numel() for value in values.values()),
                "devices": sorted({str(value.device) for value in values.values()}),
                "sums": [values[f"{last}.{name}"].double().sum().item() for name in ("lora_A", "lora_B")],
            }
        )
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"write": write, "load": load}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
