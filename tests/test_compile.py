"""torch.compile on a whole mixture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import moelora

MIXTURE: dict[str, Any] = {
    "sites": [
        {"target": "mlp", "experts": {"num_experts": 4, "r": 4}, "router": {"kind": "topk"}},
        {"target": ["q_proj"], "experts": {"num_experts": 4, "r": 4}, "router": {"kind": "mola", "aux_loss_coef": 0.1}},
    ]
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning:torch")
def test_a_training_step_with_its_losses_is_one_graph_and_the_same(tiny_llama: LlamaForCausalLM) -> None:
    model = moelora.attach(tiny_llama, MIXTURE).train()
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if "lora_B" in name:
                tensor.normal_(std=0.1)
    ids = torch.randint(3, 64, (2, 8))
    plain = model(ids, labels=ids)  # also: the first forward of all looks at more than the later ones
    plain.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=ids, labels=ids)
    compiled.loss.backward()
    assert torch.allclose(compiled.loss, plain.loss, atol=1e-6)
    for name, value in plain.aux_losses.items():
        assert torch.allclose(compiled.aux_losses[name], value, atol=1e-6)
    for name, parameter in model.named_parameters():
        assert (name in grads) == (parameter.grad is not None)
        if name in grads:
            assert (parameter.grad - grads[name]).norm() <= 1e-5 * grads[name].norm() + 1e-8, name
    torch._dynamo.reset()
