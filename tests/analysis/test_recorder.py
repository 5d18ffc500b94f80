"""Counts of the recorder against routing that is decided by hand, and against the tape."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM

import moelora
from moelora.analysis import RoutingRecorder, RoutingStats, analyze
from moelora.analysis.recorder import NO_TASK, _SiteCounts
from moelora.errors import DataError, UserError
from moelora.mixture import MoELoRAModel
from moelora.routing import RoutingRecord, SiteInfo

pytestmark = pytest.mark.smoke
MIXTURE = {
    "sites": [
        {"target": "mlp", "experts": {"num_experts": 4, "r": 2}, "router": {"kind": "topk", "top_k": 2}},
        {"target": "q_proj", "experts": {"num_experts": 1, "r": 2}},
    ]
}


@pytest.fixture
def model(tiny_llama: LlamaForCausalLM) -> MoELoRAModel:
    model = moelora.attach(tiny_llama, MIXTURE)
    for container in model.containers().values():
        if container.router is not None:
            torch.nn.init.normal_(container.router.weight, std=1.0)
    return model.eval()


def batch(model: MoELoRAModel, *, left: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (3, 7))
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 2, 5)):
        if pads:
            mask[row, slice(0, pads) if left else slice(7 - pads, 7)] = 0
    return {"input_ids": ids, "attention_mask": mask, "task_ids": torch.tensor([1, 0, 1])}


@pytest.mark.parametrize("left", [False, True])
def test_counts_agree_with_a_loop_over_the_tape(model: MoELoRAModel, left: bool) -> None:
    data = batch(model, left=left)
    with torch.no_grad(), moelora.trace(model) as tape, RoutingRecorder(model, ["a", "b"]) as recorder:
        model(**data)
    stats = recorder.result()
    assert stats.tasks == ("a", "b")
    assert [site.layer for site in stats.sites] == [0, 1]
    for site in stats.sites:
        (record,) = tape[site.name]
        load = [[0.0] * 4, [0.0] * 4]
        tokens, entropy, margin = [0, 0], 0.0, 0.0
        for row in range(3):
            for column in range(7):
                if not data["attention_mask"][row, column]:
                    continue
                task = int(data["task_ids"][row])
                tokens[task] += 1
                for expert in record.indices[row, column].tolist():
                    load[task][expert] += 1
                probs = sorted(record.probs[row, column].tolist())
                entropy -= sum(p * math.log(p) for p in probs) / math.log(4)
                margin += probs[-1] - probs[-2]
        assert site.load_NE.tolist() == load
        assert list(site.tokens) == tokens == [5, 9]
        assert site.entropy == pytest.approx(entropy / 14, abs=1e-6)
        assert site.margin == pytest.approx(margin / 14, abs=1e-6)


def test_padding_changes_nothing(model: MoELoRAModel) -> None:
    data = batch(model)
    with torch.no_grad(), RoutingRecorder(model, ["a", "b"]) as padded:
        model(**data)
    with torch.no_grad(), RoutingRecorder(model, ["a", "b"]) as single:
        for row, length in enumerate((7, 5, 2)):
            model(input_ids=data["input_ids"][row : row + 1, :length], task_ids=data["task_ids"][row : row + 1])
    for left, right in zip(padded.result().sites, single.result().sites, strict=True):
        assert left.selections == right.selections
        assert left.entropy == pytest.approx(right.entropy, abs=1e-6)


def test_generation_counts_every_new_token_once(model: MoELoRAModel) -> None:
    data = batch(model, left=True)
    with RoutingRecorder(model, ["a", "b"]) as recorder:
        model.generate(**data, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=2, pad_token_id=0)
    # The prompt's forward sees every beam; after it come three forwards with one new token for each beam.
    assert recorder.result().tokens == 2 * (14 + 3 * 3)


def test_counting_continues_and_stops(model: MoELoRAModel) -> None:
    data = batch(model)
    recorder = RoutingRecorder(model, ["a", "b"])
    for _ in range(2):
        with torch.no_grad(), recorder:
            model(**data)
    with torch.no_grad():
        model(**data)
    assert recorder.result().tokens == 28


def test_recomputation_counts_once(model: MoELoRAModel) -> None:
    model.train()
    model.gradient_checkpointing_enable()
    data = batch(model)
    with RoutingRecorder(model) as recorder:
        model(**data, labels=data["input_ids"]).loss.backward()
    assert recorder.result().tokens == 14


def test_sequences_without_a_task_have_a_row_of_their_own(model: MoELoRAModel) -> None:
    data = batch(model)
    with torch.no_grad(), RoutingRecorder(model, ["a", "b", "never"]) as recorder:
        model(**data)
        model(input_ids=data["input_ids"])
    stats = recorder.result()
    assert stats.tasks == ("a", "b", "never", NO_TASK)
    assert stats.sites[0].tokens == (5, 9, 0, 21)


def test_without_names_all_tokens_are_one_task(model: MoELoRAModel) -> None:
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        model(**batch(model))
    assert recorder.result().tasks == ("all tokens",)


def test_a_task_id_without_a_name(model: MoELoRAModel) -> None:
    with torch.no_grad(), RoutingRecorder(model, ["only"]) as recorder, pytest.raises(DataError, match=r"0\.\.1.*only"):
        model(**batch(model))
    assert not model.slot.listeners
    with pytest.raises(DataError, match="no routed token"):
        recorder.result()


def test_a_name_given_twice(model: MoELoRAModel) -> None:
    with pytest.raises(DataError, match="twice"):
        RoutingRecorder(model, ["a", "a"])


def counts(record: RoutingRecord, ranks: tuple[int, ...]) -> _SiteCounts:
    site = SiteInfo("s", 0, 8, 8, ranks, (1.0,) * len(ranks))
    total = _SiteCounts(site, record.num_experts, 1, torch.device("cpu"))
    total.add(record, None)
    return total


def test_dense_routing_counts_by_weight() -> None:
    weights = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    total = counts(RoutingRecord(None, weights, 3), (1, 1, 1))
    assert total.load_NE.tolist() == [[1.5, 0.25, 0.25]]
    assert float(total.margin) == pytest.approx(0.25 + 1.0)
    assert float(total.entropy) == pytest.approx(1.5 * math.log(2), rel=1e-6)


def test_empty_slots() -> None:
    indices = torch.tensor([[0, -1], [1, 0], [1, 0]])
    weights = torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.75, 0.25]])
    mask = torch.tensor([True, True, False])
    total = counts(RoutingRecord(indices, weights, 2, mask=mask), (1, 1))
    assert total.load_NE.tolist() == [[2.0, 1.0]]
    assert float(total.margin) == pytest.approx(1.5)


def test_at_the_level_of_ranks_each_rank_counts_as_an_expert() -> None:
    weights = torch.tensor([[0.5, 0.5], [1.0, 2.0]])
    indices = torch.tensor([[0, 1], [0, 2]])
    total = counts(RoutingRecord(indices, weights, 3, level="rank"), (2, 1))
    assert total.load_NE.tolist() == [[2.0, 1.0, 1.0]]


def test_a_backbone_that_makes_one_row_of_all_tokens() -> None:
    """OPT flattens (B, S) before its projections: the padding and the tasks must follow."""
    config = OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
        word_embed_proj_dim=32,
        max_position_embeddings=32,
    )
    site = {"target": "fc1", "experts": {"num_experts": 4}, "router": {"kind": "topk", "top_k": 2}}
    model = moelora.attach(OPTForCausalLM(config), {"sites": [site]}).eval()
    with torch.no_grad(), moelora.trace(model) as tape, RoutingRecorder(model, ["a", "b"]) as recorder:
        model(**batch(model))
    (records,) = (tape[name] for name in tape)
    assert records[0].weights.shape == (21, 2)
    assert recorder.result().sites[0].tokens == (5, 9)


def test_statistics_survive_json(model: MoELoRAModel, tmp_path: Path) -> None:
    with torch.no_grad(), RoutingRecorder(model, ["a", "b"]) as recorder:
        model(**batch(model))
    stats = recorder.result("tiny", "random words")
    path = tmp_path / "routing.json"
    path.write_text(stats.to_json())
    assert RoutingStats.from_json(path) == stats
    stats.write_csv(tmp_path / "routing.csv")
    lines = (tmp_path / "routing.csv").read_text().splitlines()
    assert lines[0] == "site,layer,task,expert,tokens,load,utilisation"
    assert len(lines) == 1 + 2 * 2 * 4
    first = stats.sites[0]
    assert lines[1].startswith(f"model.layers.0.mlp,0,a,0,5,{first.load_NE[0, 0]},")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "routing.json"),
        ('{"tasks": ["a"], "sites": [], "format": "other"}', "moelora-routing"),
        ('{"tasks": ["a"], "sites": [{"name": "s", "layer": 0, "selections": [[1], [2]], "tokens": [1], "entropy": 0, '
         '"margin": 0}]}', "2 rows of selections"),
        ('{"tasks": ["a"], "sites": [{"name": "s", "layer": 0, "selections": [[-1]], "tokens": [1], "entropy": 0, '
         '"margin": 0}]}', "greater than or equal to 0"),
    ],
)  # fmt: skip
def test_damaged_statistics(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "routing.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        RoutingStats.from_json(path)


def test_missing_statistics(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.json.*cannot be read"):
        RoutingStats.from_json(tmp_path / "nothing.json")


def test_analyze_records_batches_and_writes_the_report(model: MoELoRAModel, tmp_path: Path) -> None:
    data = batch(model)
    model.train()
    stats = analyze(model, [{**data, "labels": data["input_ids"]}], task_names=["a", "b"], out=tmp_path / "new")
    assert model.training
    assert stats.tokens == 14
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["routing.csv", "routing.html", "routing.json"]


def test_analyze_without_plotly_says_so_before_it_runs(
    model: MoELoRAModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly", None)
    with pytest.raises(UserError, match=r"moelora\[viz\]"):
        analyze(model, iter(()), out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_analyze_of_nothing(model: MoELoRAModel) -> None:
    with pytest.raises(DataError, match="no routed token"):
        analyze(model, [])


def test_negative_weights_count_by_their_size(tiny_llama: LlamaForCausalLM) -> None:
    """A static router may take an adapter away, and X-LoRA without its softmax may do so for a token."""
    site = {"target": "q_proj", "experts": {"num_experts": 3, "r": 2}}
    model = moelora.attach(tiny_llama, {"sites": [{**site, "router": {"kind": "static", "weights": [0.5, -0.5, 0.0]}}]})
    with torch.no_grad(), moelora.trace(model) as tape, RoutingRecorder(model) as recorder:
        model(torch.full((1, 4), 5))
    first = recorder.result().sites[0]
    assert first.selections == ((2.0, 2.0, 0.0),)
    assert first.entropy == pytest.approx(math.log(2) / math.log(3))
    assert float(tape[first.name][0].entropy()) == pytest.approx(math.log(2))
    assert tape[first.name][0].counts().tolist() == [2.0, 2.0, 0.0]
