"""Time the rewards of texts under several capabilities: one stacked pass here, a pass for each capability in PEFT.

The released DMoERM wraps the body in PEFT once for each capability and runs all of it once for each. Here a text is a
row for each capability in one batch, and layers below the first with experts see it once. The variants are one reward
model with random weights, on a Llama of SmolLM2-135M's shape, LoRAs of rank 16 on q_proj and v_proj; before anything is
timed their rewards are compared.

Examples:
    python scripts/bench/reward.py --threads 1 --clock cpu
    python scripts/bench/reward.py --capabilities 3 6 --first-layers 0 20 --rounds 5
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from common import Ratio, interleave, make_parser, parse, report, worst_difference
from model import SHAPES, make_backbone
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from moelora.reward.model import RewardModel
from moelora.reward.stacked import last_states, last_token

PEFT, PASSES, STACKED, SINGLE = "PEFT, n passes", "moelora, n passes", "moelora, stacked", "one capability"
TARGETS = ["q_proj", "v_proj"]
RANK, ALPHA = 16, 32
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Result:
    """One variant: PEFT's time over its own, and its own over that of a single capability."""

    first_layer: int
    capabilities: int
    what: str
    variant: str
    from_peft: Ratio
    to_single: Ratio


def make(backbone: LlamaForCausalLM, count: int, first: int) -> tuple[RewardModel, Any]:
    """Ours with ``count`` capabilities of one category, and the same in PEFT, on copies that share their weights."""
    from peft import LoraConfig, PeftModel, get_peft_model

    shared = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    names = [f"c{number}" for number in range(count)]
    layers = list(range(first, backbone.config.num_hidden_layers))
    site = {"target": TARGETS, "layers": layers, "experts": {"num_experts": 1, "r": RANK, "alpha": ALPHA}}
    reward = {"categories": {"all": names}, "base": "none"}
    ours = RewardModel.attach(copy.deepcopy(backbone, dict(shared)), reward, {"sites": [site]}).eval()
    with torch.no_grad():
        for name, tensor in ours.adapter_tensors().items():
            if name.endswith("lora_B"):
                tensor.normal_(std=0.02)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, layers_to_transform=layers)
    theirs: PeftModel = get_peft_model(copy.deepcopy(backbone, dict(shared)), config, adapter_name=names[0])
    for name in names[1:]:
        theirs.add_adapter(name, config)
    targets = dict(theirs.named_parameters())
    with torch.no_grad():
        for path, container in ours.containers().items():
            inside = f"base_model.model.{path}"
            for number, name in enumerate(names):
                rows = slice(RANK * number, RANK * (number + 1))
                targets[f"{inside}.lora_A.{name}.weight"].copy_(container.lora_A[rows])
                targets[f"{inside}.lora_B.{name}.weight"].copy_(container.lora_B[:, rows])
    return ours, theirs.eval()


def rewards(ours: RewardModel, theirs: Any, ids_BS: Tensor, mask_BS: Tensor, count: int) -> dict[str, Run]:
    """The rewards (B,) of texts, by each variant; ``SINGLE`` is the first capability alone."""
    texts = len(ids_BS)
    numbers = [ours.reward.numbers[view] for view in ours.reward.capability_views("all")]

    def states(number: int) -> Tensor:
        return last_states(ours, ids_BS, mask_BS, None, torch.full((texts,), number))

    def joined(states_BCH: Tensor) -> Tensor:
        return ours(states=states_BCH, category_ids=torch.zeros(texts, dtype=torch.int64)).logits[:, 0]

    def in_peft() -> Tensor:
        each, body = [], theirs.base_model.model.model
        for number in range(count):
            theirs.set_adapter(f"c{number}")
            hidden = body(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False).last_hidden_state
            each.append(hidden[torch.arange(texts), last_token(mask_BS)])
        return joined(torch.stack(each, dim=1))

    return {
        PEFT: in_peft,
        PASSES: lambda: joined(torch.stack([states(number) for number in numbers], dim=1)),
        STACKED: lambda: ours(ids_BS, mask_BS, category_ids=torch.zeros(texts, dtype=torch.int64)).logits[:, 0],
        SINGLE: lambda: states(numbers[0]),
    }


def learning(runs: Mapping[str, Run], models: Mapping[str, nn.Module]) -> dict[str, Run]:
    """The same with a backward pass."""

    def step(name: str) -> Tensor:
        for model in models.values():
            model.zero_grad(set_to_none=True)
        found = runs[name]()
        found.sum().backward()
        return found.detach()

    return {name: lambda name=name: step(name) for name in runs}  # type: ignore[misc]


def without_gradients(runs: Mapping[str, Run]) -> dict[str, Run]:
    """The same without a graph."""
    return {name: torch.inference_mode()(run) for name, run in runs.items()}


def measure(args: argparse.Namespace, console: Console) -> list[Result]:
    """Every variant with every number of capabilities and every first layer."""
    backbone = make_backbone(args.shape, args.layers)
    torch.manual_seed(1)
    ids_BS = torch.randint(1, SHAPES[args.shape]["vocab_size"], (args.texts, args.tokens))
    lengths = torch.linspace(args.tokens // 2, args.tokens, args.texts).long()
    mask_BS = (torch.arange(args.tokens) < lengths[:, None]).long()
    results = []
    for first in args.first_layers:
        for count in args.capabilities:
            ours, theirs = make(backbone, count, first)
            runs = rewards(ours, theirs, ids_BS, mask_BS, count)
            with torch.no_grad():
                worst_difference([runs[PASSES](), runs[STACKED]()], [runs[PEFT]()] * 2)
            ways = {"score": without_gradients(runs)}
            if args.train:
                for name, parameter in theirs.named_parameters():
                    parameter.requires_grad_("lora_" in name)  # set_adapter would otherwise move it along
                ways["train"] = learning(runs, {"ours": ours, "theirs": theirs})
            for what, each in ways.items():
                times = interleave(each, args, f"{what}, {count} capabilities, layers from {first}", console)
                results += [
                    Result(first, count, what, name, Ratio.of(times[PEFT], own), Ratio.of(own, times[SINGLE]))
                    for name, own in times.items()
                ]
    return results


def main() -> None:
    """Parse the command line, measure, print."""
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2", help="the backbone (%(default)s)")
    parser.add_argument("--layers", type=int, help="layers instead of the shape's own number")
    parser.add_argument("--texts", type=int, default=8, help="texts of a batch (%(default)s)")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of the longest text (%(default)s)")
    parser.add_argument(
        "--capabilities", type=int, nargs="+", default=[5], help="how many capabilities there are (%(default)s)"
    )
    parser.add_argument(
        "--first-layers", type=int, nargs="+", default=[0, 20], help="the first layer with experts (%(default)s)"
    )
    parser.add_argument("--train", action="store_true", help="time a backward pass too")
    args = parse(parser)
    results = measure(args, Console(stderr=True))
    rows = [
        [str(r.first_layer), str(r.capabilities), r.what, r.variant, str(r.from_peft), str(r.to_single)]
        for r in results
    ]
    headings = ("first layer", "capabilities", "what", "variant", "PEFT / this", "/ one capability")
    report(f"Rewards of {args.texts} texts, {args.shape}", headings, rows, args, results)


if __name__ == "__main__":
    main()
