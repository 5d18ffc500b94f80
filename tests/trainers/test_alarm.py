"""The collapse alarm: every planted collapse, nothing healthy, and hardly ever a router that is only random.

Shapes: B batch, S sequence, E experts, K picks, R ranks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import build_rows, build_trainer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerControl, TrainerState, TrainingArguments

import moelora
from moelora.errors import ConfigError
from moelora.trainers.alarm import AlarmConfig, CollapseAlarm, remedy
from moelora.trainers.meter import LoadMeter

VOCAB, WINDOW = 512, 16
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Plant = Callable[[moelora.MoELoRAModel], None]


def lora(num_experts: int) -> dict[str, Any]:
    return {"kind": "lora", "num_experts": num_experts, "r": 2}


def build(
    experts: dict[str, Any], router: dict[str, Any], seed: int = 0, targets: list[str] | None = None
) -> moelora.MoELoRAModel:
    """Two layers; by default the q_proj of each is a site, and what enters it has a component 0 that is never small."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    backbone = LlamaForCausalLM(config)
    if targets is None:
        with torch.no_grad():
            backbone.get_input_embeddings().weight[:, 0] = 0.05
    sites = [{"target": targets or ["q_proj"], "experts": experts, "router": router}]
    return moelora.attach(backbone, {"sites": sites}).train()


def stream(seed: int, steps: int, exponent: float = 0.0) -> Iterator[Tensor]:
    """(B, S) random tokens for each step; with an exponent of 1 as often as words are, by Zipf's law."""
    generator = torch.Generator().manual_seed(seed)
    often = torch.arange(1, VOCAB + 1).float().pow(-exponent)[torch.randperm(VOCAB, generator=generator)]
    for _ in range(steps):
        yield torch.multinomial(often, 4 * 32, True, generator=generator).view(4, 32)


class Run:
    """A training as far as the alarm sees it."""

    def __init__(self, folder: Path, model: moelora.MoELoRAModel, **config: Any) -> None:
        self.model = model
        self.args = TrainingArguments(str(folder), report_to="none", use_cpu=True)
        self.state, self.control = TrainerState(), TrainerControl()
        self.alarm = CollapseAlarm({"window": WINDOW, **config})
        self.alarm.on_train_begin(self.args, self.state, self.control, model=model)

    def steps(self, batches: Iterator[Tensor], **inputs: Any) -> set[str]:
        """The kinds that were found, after the forwards of so many steps."""
        for ids in batches:
            meter = LoadMeter(self.model, gates=True)
            with torch.no_grad(), self.model.slot.using(listener=meter):
                self.model(input_ids=ids, **inputs)
            self.state.global_step += 1
            self.alarm.count(meter)
            self.alarm.on_step_end(self.args, self.state, self.control)
        return {finding.kind for finding in self.alarm.found}

    @property
    def named(self) -> set[str]:
        return {finding.site for finding in self.alarm.found}


def favour(*experts: int, by: float = 50.0) -> Plant:
    """Linear routers that choose these for every token, since component 0 of the token is never small."""

    def plant(model: moelora.MoELoRAModel) -> None:
        with torch.no_grad():
            for container in model.containers().values():
                weight = container.router.weight
                weight[:, 0] = 0
                weight[list(experts), 0] = by

    return plant


def buffers(count: int, by: float) -> Plant:
    """Controllers whose biases have run away."""

    def plant(model: moelora.MoELoRAModel) -> None:
        for container in model.containers().values():
            container.router.bias[:count] += by

    return plant


def keys(model: moelora.MoELoRAModel) -> None:
    """MoRAM's routers are their experts: eight atoms that lie along what all tokens have in common."""
    with torch.no_grad():
        for name, tensor in model.adapter_tensors().items():
            if name.endswith("lora_A"):
                tensor[:, 0] = 0
                tensor[:8, 0] = 5


def certain(model: moelora.MoELoRAModel) -> None:
    favour()(model)
    with torch.no_grad():
        for container in model.containers().values():
            container.router.weight *= 1e5


EVERY = {"entropy", "concentration", "dead"}
ONE = EVERY | {"margin"}  # one expert, and by far
RANKS = {"concentration", "dead"}  # eight equal ranks of 64 have half of the entropy
PLANTED = {
    "one of 8": (lora(8), {"kind": "topk", "top_k": 1}, favour(0), ONE),
    "one of 2": (lora(2), {"kind": "topk", "top_k": 1}, favour(1), ONE),
    "two of 8": (lora(8), {"kind": "topk", "top_k": 2}, favour(2, 5), EVERY),
    "six of 8": (lora(8), {"kind": "topk", "top_k": 6}, favour(*range(6)), {"concentration"}),
    "half dead": (lora(8), {"kind": "topk", "top_k": 1, "init_std": 0.1}, favour(*range(4)), {"dead"}),
    "dense": (lora(8), {"kind": "softmax"}, favour(3), ONE),
    "thresholds": (lora(8), {"kind": "adamole"}, favour(3), ONE),
    "capacity": (lora(8), {"kind": "switch", "expert_capacity": 16}, favour(0), ONE),
    "certain": (lora(4), {"kind": "topk", "top_k": 1}, certain, {"margin"}),
    "smora": ({"kind": "lora", "num_experts": 1, "r": 64}, {"kind": "smora", "top_k": 8}, buffers(8, 10.0), RANKS),
    "flylora": ({"kind": "sparse_projection", "r": 64}, {"kind": "flylora", "top_k": 8}, buffers(8, 1e3), RANKS),
    "moram": ({"kind": "rank1", "r": 64}, {"kind": "moram", "top_k": 8}, keys, RANKS),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_collapse_is_found(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    experts, router, plant, kinds = PLANTED[name]
    model = build(experts, router)
    plant(model)
    run = Run(tmp_path, model)
    with caplog.at_level(logging.WARNING, "moelora"):
        assert run.steps(stream(1, WINDOW - 1)) == set()  # the window is not full
        assert run.steps(stream(2, 1)) == kinds
    assert run.named == set(model.containers())
    assert [finding.kind for finding in run.alarm.found] == sorted(
        [finding.kind for finding in run.alarm.found], key=["entropy", "concentration", "dead", "margin"].index
    )
    assert len(caplog.records) == len(kinds) and not run.control.should_training_stop
    text = caplog.text
    assert "model.layers.1.self_attn.q_proj" in text and "layers.0" in text and "16 steps" in text
    assert f"router {router['kind']!r}".lower() in text.lower()


@pytest.mark.parametrize(
    ("experts", "router", "inputs"),
    [
        (lora(8), {"kind": "topk", "top_k": 2}, {}),
        (lora(8), {"kind": "topk", "top_k": 8}, {}),
        (lora(1), {"kind": "topk", "top_k": 1}, {}),
        (lora(4), {"kind": "softmax"}, {}),
        (lora(4), {"kind": "static", "weights": [0.97, 0.01, 0.01, 0.01]}, {}),
        (lora(4), {"kind": "mask", "by": "task"}, {"task_ids": torch.zeros(4, dtype=torch.long)}),
        (lora(4), {"kind": "task", "num_tasks": 2}, {"task_ids": torch.ones(4, dtype=torch.long)}),
        (lora(4), {"kind": "lora_mixer", "stage": "hard"}, {"task_ids": torch.ones(4, dtype=torch.long)}),
        (lora(4), {"kind": "phatgoose"}, {"task_ids": torch.ones(4, dtype=torch.long), "phase": "gate"}),
        ({"kind": "sparse_projection", "r": 16}, {"kind": "flylora", "top_k": 16}, {}),
        ({"kind": "sparse_projection", "r": 32}, {"kind": "flylora", "top_k": 8}, {}),
    ],
    ids=lambda value: value.get("kind", ""),
)
def test_nothing_healthy_is_called_a_collapse(
    experts: dict[str, Any], router: dict[str, Any], inputs: dict[str, Any], tmp_path: Path
) -> None:
    """Also where all tokens go to one expert since a table, a task or a label says so."""
    run = Run(tmp_path, build(experts, router, targets=["q_proj", "v_proj"]))
    assert run.steps(stream(3, 3 * WINDOW), **inputs) == set()
    assert not (tmp_path / "collapse").exists()


def test_random_routers_are_almost_never_called_collapsed(tmp_path: Path) -> None:
    """R13: 210 of them on uniform tokens and on tokens as frequent as words; nothing was trained."""
    sizes = [(2, 1), (4, 1), (8, 1), (8, 2), (8, 6), (16, 2), (32, 4)]
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        *((lora(e), {"kind": "topk", "top_k": k}) for e, k in sizes),
        (lora(8), {"kind": "softmax"}),
        (lora(4), {"kind": "switch", "expert_capacity": 8}),
        (lora(8), {"kind": "topp"}),
        (lora(8), {"kind": "adamole"}),
        (lora(8), {"kind": "mola"}),
        ({"kind": "lora", "num_experts": 1, "r": 64}, {"kind": "smora", "top_k": 8}),
        ({"kind": "sparse_projection", "r": 32}, {"kind": "flylora", "top_k": 8}),
        ({"kind": "rank1", "r": 64}, {"kind": "moram", "top_k": 8}),
    ]
    routers, alarms = 0, []
    for seed, (experts, router) in enumerate(cases):
        run = Run(tmp_path, build(experts, router, seed, LINEARS))
        run.steps(stream(seed, WINDOW, exponent=seed % 2))
        routers += len(run.model.containers())
        alarms += [(router["kind"], site) for site in run.named]
    assert routers == 210
    assert len(alarms) <= 2, alarms


def test_padding_does_not_count(tmp_path: Path) -> None:
    model = build(lora(8), {"kind": "topk", "top_k": 1})
    favour()(model)
    with torch.no_grad():
        model.backbone.get_input_embeddings().weight[0] = 0
        model.backbone.get_input_embeddings().weight[0, 1] = 1.0
    run = Run(tmp_path, model)
    mask = torch.ones(4, 32, dtype=torch.long)
    mask[:, 6:] = 0
    padded = (torch.where(mask.bool(), ids.clamp(min=1), 0) for ids in stream(5, WINDOW))
    assert run.steps(padded, attention_mask=mask) == set()
    assert Run(tmp_path, model).steps(torch.where(mask.bool(), i.clamp(min=1), 0) for i in stream(5, WINDOW))


def test_only_the_site_that_collapsed_is_named_with_what_to_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(lora(8), {"kind": "topk", "top_k": 2, "aux_loss_coef": 0.01})
    favour()(model)
    with torch.no_grad():
        model.containers()["model.layers.1.self_attn.q_proj"].router.weight[[2, 6], 0] = 50
    run = Run(tmp_path, model)
    with caplog.at_level(logging.WARNING, "moelora"):
        run.steps(stream(1, WINDOW))
    assert run.named == {"model.layers.1.self_attn.q_proj"}
    assert "layers.0" not in caplog.text
    first = caplog.records[0].getMessage()
    assert "entropy of the load is below 0.5" in first and "q_proj: 0.3" in first and "1 of 2 routed sites" in first
    assert "Raise aux_loss_coef (now 0.01) of router 'topk'" in first
    folder = tmp_path / "collapse" / f"step-{WINDOW}"
    assert str(folder) in first
    assert {path.name for path in folder.iterdir()} == {"routing.html", "routing.json", "routing.csv"}
    drawn = json.loads((folder / "routing.json").read_text())
    load = drawn["sites"][1]["selections"][0]
    assert load[2] + load[6] > 0.99 * sum(load) and sum(load) == 2 * WINDOW * 4 * 32
    assert drawn["sites"][1]["tokens"] == [WINDOW * 4 * 32]


def test_without_plotly_the_numbers_are_still_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly", None)
    model = build(lora(8), {"kind": "topk", "top_k": 1})
    favour(0)(model)
    Run(tmp_path, model).steps(stream(1, WINDOW))
    written = {path.name for path in (tmp_path / "collapse" / f"step-{WINDOW}").iterdir()}
    assert written == {"routing.json", "routing.csv"}


def test_one_warning_until_it_has_cleared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build(lora(8), {"kind": "topk", "top_k": 6})
    run = Run(tmp_path, model)
    with caplog.at_level(logging.INFO, "moelora"):
        favour(*range(6))(model)
        assert run.steps(stream(1, 3 * WINDOW)) == {"concentration"}
        assert len(caplog.records) == 1
        favour()(model)
        assert run.steps(stream(2, WINDOW)) == set()
        assert "has cleared" in caplog.records[-1].getMessage()
        favour(*range(6))(model)
        assert run.steps(stream(3, WINDOW)) == {"concentration"}
        assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 2


@pytest.mark.parametrize(
    ("router", "kind", "text"),
    [
        ({"kind": "topk", "aux_loss_coef": 0.0}, "dead", "Raise aux_loss_coef (now 0) of router 'topk'"),
        ({"kind": "topk", "z_loss_coef": 0.5}, "margin", "Raise z_loss_coef (now 0.5) of router 'topk'"),
        ({"kind": "lora_mixer", "balance_coef": 0.5}, "entropy", "Raise balance_coef (now 0.5)"),
        ({"kind": "meteora"}, "entropy", "no option that balances its load"),
        ({"kind": "softmax"}, "margin", "no option that keeps its logits small"),
    ],
)
def test_the_remedy_is_an_option_of_the_router(router: dict[str, Any], kind: str, text: str) -> None:
    model = build(lora(4), router)
    assert text in remedy(model.containers()["model.layers.0.self_attn.q_proj"].router, kind)


def test_the_remedy_of_a_controller_is_its_rate() -> None:
    model = build({"kind": "sparse_projection", "r": 16}, {"kind": "flylora", "top_k": 4, "bias_rate": 1e-3})
    assert "Raise bias_rate (now 0.001)" in remedy(model.containers()["model.layers.0.self_attn.q_proj"].router, "dead")


@pytest.mark.parametrize("config", [{"window": 7}, {"window": 0}, {"min_entropy": 1.5}, {"threshold": 1}])
def test_options_are_checked(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(config))):
        CollapseAlarm(config)
    assert CollapseAlarm(AlarmConfig(window=4)).config.window == 4


# -- in a trainer ----------------------------------------------------------------------------------------------------

TRAINING = {"max_steps": 12, "learning_rate": 1e-4, "per_device_train_batch_size": 8}


def collapsed() -> moelora.MoELoRAModel:
    model = build(lora(4), {"kind": "topk", "top_k": 1, "aux_loss_coef": 0.0})
    favour(1)(model)
    return model


def test_stop_ends_training_with_a_checkpoint_and_a_line_of_the_log(tmp_path: Path) -> None:
    options = {**TRAINING, "save_strategy": "steps", "save_steps": 100, "logging_steps": 100}
    trainer = build_trainer(
        tmp_path, collapsed(), build_rows(64), callbacks=[CollapseAlarm({"window": 6, "stop": True})], **options
    )
    trainer.train()
    assert trainer.state.global_step == 6
    assert (tmp_path / "checkpoint-6").is_dir() and (tmp_path / "collapse" / "step-6" / "routing.html").is_file()
    assert [line["step"] for line in trainer.state.log_history if "load/entropy" in line] == [6]


def test_a_resumed_run_goes_on_with_the_window(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {**TRAINING, "save_strategy": "steps", "save_steps": 1, "max_steps": 8}

    def run(folder: str, start: str | None) -> tuple[CollapseAlarm, str, dict[str, Any]]:
        caplog.clear()
        alarm = CollapseAlarm({"window": 8})
        trainer = build_trainer(tmp_path / folder, collapsed(), build_rows(64), callbacks=[alarm], **options)
        with caplog.at_level(logging.WARNING, "moelora.trainers.alarm"):
            trainer.train(resume_from_checkpoint=start)
        said = "\n".join(record.getMessage().split("The load is drawn")[0] for record in caplog.records)
        return alarm, said, alarm.state()

    whole, said, state = run("whole", None)
    assert len(whole.active) >= 3 and "step 8" in said
    for step in (5, 7):  # in the second half of the window, and in a half that is nearly full
        again, repeated, resumed = run(f"resumed-{step}", str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert again.found == whole.found and repeated == said and resumed == state
    _, silent, _ = run("after", str(tmp_path / "whole" / "checkpoint-8"))
    assert silent == ""  # it was warned of
