"""X-LoRA against numbers of PEFT's and of the authors' own code (tests/fixtures/*xlora*, see each README.txt).

The adapters and the classifier are put in place here by hand.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

import moelora
from moelora.mixture import MoELoRAModel, trace
from moelora.routing import RoutingRecord

FIXTURES = Path(__file__).parents[1] / "fixtures"
PEFT = FIXTURES / "peft_xlora_tiny_llama"
CLASSIFIERS = FIXTURES / "peft_xlora_tiny_llama_v0171"
STANDALONE = FIXTURES / "xlora_standalone_tiny_llama"
ORDER: list[str] = json.loads((PEFT / "layer_order.json").read_text())
PEFT_CASES = sorted(path.name for path in CLASSIFIERS.iterdir() if path.is_dir())
STANDALONE_CASES = sorted(path.name for path in STANDALONE.iterdir() if path.is_dir())


def router_of(config: dict[str, Any]) -> dict[str, Any]:
    """Our options from an adapter_config.json or xlora_config.json."""
    return {
        "kind": "xlora",
        "depth": config["xlora_depth"],
        "size": config["xlora_size"],
        "dropout": config["xlora_dropout_p"],
        "relu": config.get("enable_relu_and_dropout", True),
        "bias": config.get("use_bias", True),
        "layerwise": config["layerwise_scalings"],
        "softmax": config["enable_softmax"],
        "temperature": config["softmax_temperature"],
        "top_k": config["top_k_lora"],
        "softmax_topk": config["enable_softmax_topk"],
        "scaling_pass_value": config["scaling_pass_value"],
        "global_scaling_weight": config["global_scaling_weight"],
    }


def attached(router: dict[str, Any], adapters: list[Path], classifier: dict[str, Tensor]) -> MoELoRAModel:
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in adapters]
    site = {
        "target": ["q_proj", "v_proj", "down_proj"],
        "experts": {
            "kind": "frozen",
            "num_experts": len(adapters),
            "r": [config["r"] for config in configs],
            "alpha": [config["lora_alpha"] for config in configs],
        },
        "router": router,
    }
    backbone = LlamaForCausalLM.from_pretrained(
        FIXTURES / "tiny_llama_base", dtype=torch.float32, attn_implementation="eager"
    )
    model = moelora.attach(backbone, {"sites": [site]}).eval()
    for index, folder in enumerate(adapters):
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, container in model.containers().items():
            A, B = (tensors[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
            container.experts.load_expert(index, A, B)
    layers = next(iter(model.containers().values())).router.layers
    numbers = sorted({int(key.split(".")[-2]) for key in classifier})
    assert len(numbers) == len(layers) and len(classifier) == sum(1 for _ in layers.parameters())
    with torch.no_grad():
        for number, layer in zip(numbers, layers, strict=True):
            for name, parameter in layer.named_parameters():
                parameter.copy_(classifier[f"layers.{number}.{name}"])
    return model


def peft_model(case: str, **changes: Any) -> MoELoRAModel:
    folder = CLASSIFIERS / case
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.internal_xlora_classifier."
    classifier = {key.removeprefix(prefix): value for key, value in tensors.items()}
    adapters = [PEFT / "adapters" / Path(config["adapters"][str(index)]).name for index in range(3)]
    return attached({**router_of(config), **changes}, adapters, classifier)


def standalone_model(case: str) -> MoELoRAModel:
    folder = STANDALONE / case
    config = json.loads((folder / "xlora_config.json").read_text())
    tensors = load_file(folder / "xlora_classifier.safetensors")
    last = 1 + max([int(key.split(".")[1]) for key in tensors if key.startswith("inner.")], default=-1)
    classifier = {re.sub("^last", f"layers.{last}", key).replace("inner", "layers"): v for key, v in tensors.items()}
    return attached(router_of(config), [folder / name for name in config["adapters"]], classifier)


def forward(model: MoELoRAModel, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, RoutingRecord]]:
    with torch.no_grad(), trace(model) as tape:
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return logits, {name: records[0] for name, records in tape.records.items()}


def scalings(records: dict[str, RoutingRecord]) -> Tensor:
    """(B, S, M, E) what the classifier says, before any top-k, in the published order of the sites."""
    each = [records[name].logits if records[name].probs is None else records[name].probs for name in ORDER]
    return torch.stack(each, dim=2)


def assert_equals(model: MoELoRAModel, stored: dict[str, Tensor], case: str) -> None:
    logits, records = forward(model, stored)
    assert list(records) == ORDER
    assert (scalings(records) - stored[f"{case}.scalings"]).abs().max() <= 1e-5
    assert (logits - stored[f"{case}.logits"]).abs().max() <= 1e-5
    with torch.no_grad(), model.disable_experts():
        base = model(stored["input_ids"], attention_mask=stored["attention_mask"]).logits
    assert (logits - base).abs().max() > 1e-2


@pytest.mark.parametrize("case", PEFT_CASES)
def test_scalings_and_logits_are_those_of_peft(case: str) -> None:
    assert_equals(peft_model(case), load_file(PEFT / "io.safetensors"), case)


@pytest.mark.parametrize("case", STANDALONE_CASES)
def test_scalings_and_logits_are_those_of_the_authors_package(case: str) -> None:
    assert_equals(standalone_model(case), load_file(STANDALONE / "io.safetensors"), case)


def test_the_order_of_the_members_is_that_of_the_published_scalings() -> None:
    model = peft_model("depth1_layerwise")
    assert [list(container.site.members) for container in model.containers().values()] == [ORDER] * 6


@pytest.mark.parametrize("case", PEFT_CASES)
def test_only_the_softmax_over_kept_scalings_differs_from_old_peft(case: str) -> None:
    """PEFT 0.17.1 took that softmax over the flattened batch; everything else is the same."""
    stored = load_file(CLASSIFIERS / "io.safetensors")
    model = peft_model(case)
    logits, records = forward(model, stored)
    difference = (logits - stored[f"{case}.logits"]).abs().max()
    assert (scalings(records) - stored[f"{case}.scalings"]).abs().max() <= 1e-5
    with torch.no_grad(), model.disable_experts():
        base = model(stored["input_ids"], attention_mask=stored["attention_mask"]).logits
    assert (base - stored["base_logits"]).abs().max() <= 1e-5
    assert difference > 0.1 if case == "depth2_topk2_softmaxtopk" else difference <= 1e-5


def test_only_the_classifier_is_trainable() -> None:
    model = peft_model("depth1_layerwise")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 594
    stored = load_file(PEFT / "io.safetensors")
    model.train()(stored["input_ids"], labels=stored["input_ids"]).loss.backward()
    assert {n.split(".router.")[-1] for n, p in model.named_parameters() if p.grad is not None} == {
        "layers.0.weight",
        "layers.0.bias",
    }
    model.eval().generate(stored["input_ids"], max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 594


def test_a_saved_mixture_gives_the_same_logits_bit_for_bit(tmp_path: Path) -> None:
    model = peft_model("depth3_layerwise_T05")
    stored = load_file(PEFT / "io.safetensors")
    expected, _ = forward(model, stored)
    model.save_pretrained(tmp_path)
    backbone = LlamaForCausalLM.from_pretrained(
        FIXTURES / "tiny_llama_base", dtype=torch.float32, attn_implementation="eager"
    )
    again, _ = forward(moelora.from_pretrained(tmp_path, backbone), stored)
    assert torch.equal(again, expected)


def test_experts_in_another_order_with_their_rows_give_the_same_logits() -> None:
    model = peft_model("depth1_shared")
    stored = load_file(PEFT / "io.safetensors")
    expected, _ = forward(model, stored)
    order, rank = torch.tensor([2, 0, 1]), 4
    ranks = (order.unsqueeze(1) * rank + torch.arange(rank)).flatten()
    with torch.no_grad():
        for container in model.containers().values():
            bank = container.experts
            bank.lora_A.copy_(bank.lora_A[ranks].clone())
            bank.lora_B.copy_(bank.lora_B[:, ranks].clone())
        for parameter in next(iter(model.containers().values())).router.parameters():
            parameter.copy_(parameter[order].clone())
    assert (forward(model, stored)[0] - expected).abs().max() <= 1e-5
