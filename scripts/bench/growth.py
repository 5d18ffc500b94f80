"""Time and memory of one linear as tasks are added to its bank of rank-1 atoms (MoRAM), and of the bank once pruned.

Each task adds atoms of rank 8, and every token asks the keys of all tasks so far, so a step and a bank grow with their
number; the atoms of older tasks are frozen, and gradients and optimizer states do not grow. A step is forward and
backward in training, with a gradient for the input. All banks take their steps in turn, and every ratio is that of two
steps of one round.

The atoms are random numbers, as if every task had moved its own away from zero. The inputs are mixtures of the keys of
the newest tasks (--used), with as much noise as signal; pruning is told by the same inputs, and removes the atoms whose
mean weight is below --eps times an equal share. How many go depends on the data, what those that stay cost does not.

Examples:
    python scripts/bench/growth.py --threads 1 --clock cpu
    python scripts/bench/growth.py --tasks 8 --tokens 256 --rounds 4
"""

from __future__ import annotations

import argparse
import copy
import statistics
from dataclasses import dataclass
from functools import partial

import torch
from common import Ratio, interleave, kept_for_backward, make_parser, parse, report, step
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import moelora
from moelora.experts import Container
from moelora.mixture import MoELoRAModel
from moelora.pruning import Pruning, prune

RANK, WIDTH, WORDS = 8, 576, 1024
SITE = {
    "target": "q_proj",
    "experts": {"kind": "rank1", "r": RANK, "alpha": 2 * RANK},
    "router": {"kind": "moram", "top_k": RANK},
}
FROZEN, FIRST = "frozen", "1"


@dataclass(frozen=True)
class Result:
    """Figures of one bank; kept_mib is what the forward keeps for the backward, weights not counted."""

    tasks: str
    atoms: int
    to_first: Ratio
    to_frozen: Ratio
    seconds: float
    kept_mib: float
    bank_mib: float
    trained: int


def make_model() -> MoELoRAModel:
    """A model of one layer of SmolLM2-135M's width whose q_proj has atoms: those of the first task."""
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 9}
    backbone = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, tie_word_embeddings=False, **shape))
    return moelora.attach(backbone, {"sites": [SITE]})


def the_site(model: MoELoRAModel) -> Container:
    """Its only container."""
    (container,) = model.containers().values()
    return container


def grow(model: MoELoRAModel, tasks: int) -> dict[str, Container]:
    """Add tasks, and keep a copy of the site at 1, 2, 4 ... of them and at the last; every atom does something."""
    banks = {}
    for number in range(1, tasks + 1):
        if number > 1:
            model.begin_task()
        bank = the_site(model).experts
        nn.init.normal_(bank.lora_B, std=0.02)
        if number & (number - 1) == 0 or number == tasks:
            banks[str(number)] = copy.deepcopy(the_site(model)).train()
    return banks


def set_inputs(model: MoELoRAModel, used: int) -> Tensor:
    """(words, width) what reaches the site for every word: mixtures of the keys of the last ``used`` tasks, noisy."""
    generator = torch.Generator().manual_seed(1)
    keys_RD = the_site(model).experts.down().detach()[-used * RANK :]
    of_task = torch.randint(used, (WORDS, 1), generator=generator) * RANK
    places = of_task + torch.randint(RANK, (WORDS, 2), generator=generator)
    signal_VD = nn.functional.normalize(keys_RD[places].sum(dim=1), dim=-1)
    noise_VD = nn.functional.normalize(torch.randn(WORDS, WIDTH, generator=generator), dim=-1)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(signal_VD + noise_VD)
        norm: nn.Module = model.backbone.get_submodule("model.layers.0.input_layernorm")
        inputs: Tensor = norm(model.get_input_embeddings().weight)
    return inputs.detach().clone()


def measure(args: argparse.Namespace, console: Console) -> tuple[list[Result], Pruning]:
    """Grow, prune, and time all banks in turn."""
    model = make_model()
    banks = grow(model, args.tasks)
    inputs_VD = set_inputs(model, min(args.used, args.tasks))
    words = torch.arange(WORDS).reshape(8, -1)
    done = prune(model, [{"input_ids": words}], args.eps / (args.tasks * RANK))
    banks[f"{args.tasks}, pruned"] = copy.deepcopy(the_site(model)).train()
    chosen = torch.randint(WORDS, (args.tokens,), generator=torch.Generator().manual_seed(2))
    x_TD, d_TO = inputs_VD[chosen].clone().requires_grad_(), torch.randn(args.tokens, WIDTH)
    variants: dict[str, nn.Module] = {FROZEN: banks[FIRST].base, **banks}
    kept = {name: kept_for_backward(variant, x_TD) for name, variant in banks.items()}
    times = interleave({name: partial(step, v, x_TD, d_TO) for name, v in variants.items()}, args, "steps", console)
    results = []
    for name, container in banks.items():
        tensors = container.adapter_tensors().values()
        results.append(
            Result(
                name,
                container.site.total_rank,
                Ratio.of(times[name], times[FIRST]),
                Ratio.of(times[name], times[FROZEN]),
                statistics.median(times[name]),
                kept[name],
                sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20,
                sum(tensor.numel() for tensor in tensors if tensor.requires_grad),
            )
        )
    return results, done


def main() -> None:
    """Parse the command line, measure, print."""
    parser = make_parser(__doc__, rounds=12)
    parser.add_argument("--tasks", type=int, default=64, help="tasks of rank 8, at least 2 (%(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a step (%(default)s)")
    parser.add_argument("--used", type=int, default=16, help="tasks whose keys the inputs are made of (%(default)s)")
    parser.add_argument("--eps", type=float, default=0.1, help="prune below this part of a fair share (%(default)s)")
    args = parse(parser)
    if args.tasks < 2 or args.tokens < 1 or args.used < 1:
        parser.error("--tasks takes 2 or more, --tokens and --used 1 or more")
    results, done = measure(args, Console(stderr=True))
    most = max(result.to_first.middle for result in results)
    rows = [
        [
            r.tasks,
            str(r.atoms),
            str(r.to_first),
            "█" * max(round(12 * r.to_first.middle / most), 1),
            str(r.to_frozen),
            f"{1e3 * r.seconds:.2f}",
            f"{r.kept_mib:.2f}",
            f"{r.bank_mib:.2f}",
        ]
        for r in results
    ]
    headings = ("tasks", "atoms", "step / first task", "", "step / frozen", "ms", "kept MiB", "bank MiB")
    report(f"A linear of {WIDTH} x {WIDTH}, {args.tokens} tokens, r={RANK} a task", headings, rows, args, results)
    told = f"pruned below {done.eps:.2g}: {done.removed} of {args.tasks * RANK} atoms went"
    print(f"{told}; outputs moved by {done.shift.relative:.1e} of their norm, by {done.shift.max_abs:.1e} at most")


if __name__ == "__main__":
    main()
