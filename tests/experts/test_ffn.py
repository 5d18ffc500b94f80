"""FFN blocks of many families: found out, left exactly as they were, and adapted exactly as merged weights would."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

import moelora
from moelora.errors import ConfigError
from moelora.experts import BlockContainer, build
from moelora.experts.ffn import FFNSpec, trace_ffn
from moelora.routing import RoutingRecord

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
WORDS: dict[str, Any] = {**SIZES, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED: dict[str, Any] = {**WORDS, "num_key_value_heads": 2}
HEADS: dict[str, Any] = {**GROUPED, "head_dim": 8}


def text(kind: str, options: dict[str, Any], cls: str = "ForCausalLM", config: str = "Config") -> PreTrainedModel:
    model: type[PreTrainedModel] = getattr(hf, kind + cls)
    return model(getattr(hf, kind + config)(**options)).eval()


IMAGES: dict[str, Any] = {**SIZES, "image_size": 8, "patch_size": 4}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}

# Family: how to make it, the target, and what is to be found: activated, multiplied, down, and the activated half.
FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], str, tuple[str, str | None, str, int]]] = {
    "llama": (lambda: text("Llama", GROUPED), "mlp", ("gate_proj", "up_proj", "down_proj", 0)),
    "llama with biases": (
        lambda: text("Llama", {**GROUPED, "mlp_bias": True}),
        "mlp",
        ("gate_proj", "up_proj", "down_proj", 0),
    ),
    "mistral": (lambda: text("Mistral", GROUPED), "mlp", ("gate_proj", "up_proj", "down_proj", 0)),
    "qwen2": (lambda: text("Qwen2", GROUPED), "mlp", ("gate_proj", "up_proj", "down_proj", 0)),
    "qwen3": (lambda: text("Qwen3", HEADS), "mlp", ("gate_proj", "up_proj", "down_proj", 0)),
    "gemma": (lambda: text("Gemma", HEADS), "mlp", ("gate_proj", "up_proj", "down_proj", 0)),
    "gemma2": (lambda: text("Gemma2", HEADS), "mlp", ("gate_proj", "up_proj", "down_proj", 0)),
    "gemma3": (
        lambda: text("Gemma3", {**HEADS, "sliding_window": 8}, config="TextConfig"),
        "mlp",
        ("gate_proj", "up_proj", "down_proj", 0),
    ),
    "phi": (lambda: text("Phi", GROUPED), "mlp", ("fc1", None, "fc2", 0)),
    "phi3": (lambda: text("Phi3", GROUPED), "mlp", ("gate_up_proj", "gate_up_proj", "down_proj", 0)),
    "gpt2": (lambda: text("GPT2", GPT2, cls="LMHeadModel"), "mlp", ("c_fc", None, "c_proj", 0)),
    "gpt-neox": (lambda: text("GPTNeoX", WORDS), "mlp", ("dense_h_to_4h", None, "dense_4h_to_h", 0)),
    "vit": (lambda: text("ViT", IMAGES, cls="Model"), "mlp", ("fc1", None, "fc2", 0)),
    "clip vision": (
        lambda: text("CLIP", IMAGES, cls="VisionModel", config="VisionConfig"),
        "mlp",
        ("fc1", None, "fc2", 0),
    ),
    "clip text": (lambda: text("CLIP", WORDS, cls="TextModel", config="TextConfig"), "mlp", ("fc1", None, "fc2", 0)),
}


def batch(model: PreTrainedModel) -> dict[str, Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    return {"input_ids": torch.randint(3, 64, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = model(**inputs)
    value: Tensor = found["logits"] if "logits" in found else found["last_hidden_state"]
    return value


def site(experts: int = 4, top_k: int = 2, **router: Any) -> dict[str, Any]:
    return {
        "target": "mlp",
        "experts": {"num_experts": experts, "r": 3, "alpha": 6},
        "router": {"kind": "topk", "top_k": top_k, "init_std": 1.0, **router},
    }


def first_block(model: PreTrainedModel) -> nn.Module:
    return next(module for path, module in model.named_modules() if path.endswith(".mlp"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_are_found(family: str) -> None:
    make, _, (activated, multiplied, down, half) = FAMILIES[family]
    spec = trace_ffn(first_block(make()), "mlp")
    assert (spec.activated, spec.multiplied, spec.down, spec.activated_half) == (activated, multiplied, down, half)
    assert spec.fused == (family == "phi3")
    assert spec.hidden_size == 32
    assert (spec.outer_dropout, spec.inner_dropout) == ("dropout" if family == "gpt2" else None, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_are_found_without_weights(family: str) -> None:
    block = first_block(FAMILIES[family][0]())
    found = trace_ffn(block, "mlp")
    assert trace_ffn(block.to("meta"), "mlp") == found
    assert all(tensor.is_meta for tensor in block.state_dict().values())


@pytest.mark.parametrize("family", FAMILIES)
def test_without_updates_the_model_is_its_backbone_bit_for_bit(family: str) -> None:
    make, target, _ = FAMILIES[family]
    backbone = make()
    inputs = batch(backbone)
    before = output(backbone, inputs)
    model = moelora.attach(backbone, {"sites": [{**site(), "target": target}]}).eval()
    assert sum(isinstance(module, BlockContainer) for module in model.modules()) == 2
    assert torch.equal(output(model, inputs), before)


def randomised(base: nn.Module, config: dict[str, Any]) -> BlockContainer:
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):  # zero in a fresh model
            nn.init.normal_(parameter)
    container = build(base, config)
    assert isinstance(container, BlockContainer)
    for bank in container.banks():
        nn.init.normal_(bank.lora_B, std=0.3)
    return container.double().eval()


def merged(container: BlockContainer, expert: int) -> nn.Module:
    """A copy of the frozen block whose weights hold the update of one expert."""
    block = copy.deepcopy(container.base)
    for name in container.spec.projections:
        bank = container.experts[name]
        part = slice(expert * 3, expert * 3 + 3)
        update = 2.0 * (bank.lora_B[:, part] @ bank.lora_A[part])
        weight = block.get_submodule(name).weight
        weight.data += (
            update if weight.shape == update.shape and isinstance(block.get_submodule(name), nn.Linear) else update.T
        )
    return block


@pytest.mark.parametrize("implementation", ["sorted", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_is_the_block_with_merged_weights(family: str, implementation: str) -> None:
    container = randomised(first_block(FAMILIES[family][0]()).double(), {**site(experts=1), "router": None})
    container.implementation = implementation
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    torch.testing.assert_close(container(x), merged(container, 0)(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_the_weighted_sum_of_blocks_with_merged_weights(family: str, normalize: bool) -> None:
    container = randomised(first_block(FAMILIES[family][0]()).double(), site(normalize=normalize))
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    heard: list[RoutingRecord] = []
    with container.slot.using(listener=lambda _, record: heard.append(record)):
        found = container(x)
    weights = heard[0].dense_weights().double()
    assert (weights.sum(-1) < 0.999).any() != normalize
    expected = sum(weights[..., e : e + 1] * merged(container, e)(x) for e in range(4))
    # The router's weights are float32 by definition.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "phi"])
def test_gradients_are_those_of_merged_weights(family: str) -> None:
    container = randomised(first_block(FAMILIES[family][0]()).double(), {**site(experts=1), "router": None})
    x = torch.randn(7, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 32, dtype=torch.float64)
    (container(x) * weight).sum().backward()
    slow = copy.deepcopy(container)
    slow.implementation = "reference"
    slow.zero_grad()
    y = x.detach().clone().requires_grad_()
    (slow(y) * weight).sum().backward()
    z = x.detach().clone().requires_grad_()
    (merged(container, 0)(z) * weight).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-10)
    for fast, other in zip(container.experts.parameters(), slow.experts.parameters(), strict=True):
        torch.testing.assert_close(fast.grad, other.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("projections", [["down_proj"], ["gate_proj"], ["up_proj", "down_proj"]], ids=str)
def test_only_the_named_projections_get_experts(projections: list[str]) -> None:
    base = first_block(FAMILIES["llama"][0]()).double()
    container = randomised(base, {**site(experts=1), "router": None, "projections": projections})
    assert sorted(container.experts) == sorted(projections)
    block = copy.deepcopy(base)
    for name in projections:
        bank = container.experts[name]
        block.get_submodule(name).weight.data += 2.0 * (bank.lora_B @ bank.lora_A)
    x = torch.randn(5, 32, dtype=torch.float64)
    torch.testing.assert_close(container(x), block(x), rtol=1e-11, atol=1e-11)


class Dropping(nn.Module):
    """``down(dropout(act(up x)))``, as some vision models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.drop, self.down = nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.5), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.act(self.up(x))))


def test_dropout_inside_a_block_is_found() -> None:
    spec = trace_ffn(Dropping(), "block")
    assert isinstance(spec, FFNSpec)
    assert (spec.inner_dropout, spec.outer_dropout) == ("drop", None)


class Residual(Dropping):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def test_a_block_without_weights_that_computes_something_else_is_refused_too() -> None:
    assert trace_ffn(Dropping().to("meta"), "block").inner_dropout == "drop"
    with pytest.raises(ConfigError, match="computes something else"):
        trace_ffn(Residual().to("meta"), "block")


def test_under_the_meta_device_new_tensors_hold_no_numbers_either() -> None:
    assert {str(p.device) for p in build(Dropping().to("meta"), site()).experts.parameters()} == {"cpu"}
    with torch.device("meta"):
        container = build(Dropping(), site())
    assert {str(p.device) for p in container.parameters()} == {"meta"}


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Residual(), "computes something else"),
        (Functional(), "no nonlinearity module"),
        (nn.Sequential(nn.Linear(4, 4)), "2 or 3 linears"),
        (nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), "it has 4"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_blocks_that_cannot_carry_experts(block: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(block, site(), name="the.block")


def test_a_whole_decoder_layer_is_no_ffn_block() -> None:
    """OPT has its two projections in the layer itself: they are targeted as linears."""
    model = text("OPT", {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "vocab_size": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 32})  # fmt: skip
    inputs = batch(model)
    before = output(model, inputs)
    with pytest.raises(ConfigError, match="2 or 3 linears"):
        moelora.attach(model, {"sites": [{**site(), "target": "re:.*layers\\.0"}]})
    mixture = moelora.attach(model, {"sites": [{**site(), "target": ["fc1", "fc2"]}]}).eval()
    assert torch.equal(output(mixture, inputs), before)
