"""Streams: an order that depends on data and seed alone, resumed from the very next row."""

from __future__ import annotations

import gc
import json
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import AutoTokenizer

from moelora.config import DatasetData, Recipe, load_recipe
from moelora.data import StreamedSet, read_data
from moelora.data.streaming import SourceReader, StreamOptions
from moelora.errors import CheckpointError, ConfigError, DataError
from moelora.trainers.sft import SFT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def write(path: Path, count: int, **more: Any) -> str:
    rows = [{"prompt": f"{path.stem} {n}?", "answer": str(n), **more} for n in range(count)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pandas as pd

        frame = pd.DataFrame(rows)
        frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_csv(path, index=False)
    return str(path)


@cache
def tokenizer_of(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def stream(files: dict[str, str], sources: dict[str, DatasetData], *, length: int = 400, **options: Any) -> StreamedSet:
    defaults = {"buffer": 8, "seed": 0, "max_length": 120}
    readers = {name: SourceReader(source, name) for name, source in sources.items()}
    return StreamedSet(readers, tokenizer_of(files["backbone"]), StreamOptions(**{**defaults, **options}), length)


def one(path: str, **options: Any) -> dict[str, DatasetData]:
    return {"": DatasetData(path=path, streaming=True, **options)}


def texts(files: dict[str, str], rows: StreamedSet, start: int, stop: int) -> list[str]:
    tokenizer = tokenizer_of(files["backbone"])
    return [tokenizer.decode(rows[index]["input_ids"]) for index in range(start, stop)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, backbone_folder: Path) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("streams")
    ends = ("jsonl", "csv", "parquet")
    made = {end: write(folder / f"a.{end}", 50) for end in ends}
    made["backbone"] = str(backbone_folder)
    return {**made, "b": write(folder / "b.jsonl", 21), "even": write(folder / "even.jsonl", 48)}


class TestOrder:
    # The reader of datasets leaves closing a CSV file to the garbage collector.
    @pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
    @pytest.mark.parametrize("end", ["jsonl", "csv", "parquet"])
    def test_every_pass_has_each_example_once(self, files: dict[str, str], end: str) -> None:
        rows = texts(files, stream(files, one(files[end])), 0, 150)
        for start in (0, 50, 100):
            assert len(set(rows[start : start + 50])) == 50
        assert len({tuple(rows[start : start + 50]) for start in (0, 50, 100)}) == 3  # in another order
        assert rows == texts(files, stream(files, one(files[end])), 0, 150)
        assert rows != texts(files, stream(files, one(files[end]), seed=1), 0, 150)
        gc.collect()

    def test_a_block_is_shuffled_and_nothing_leaves_it(self, files: dict[str, str]) -> None:
        whole = stream(files, one(files["jsonl"]), buffer=50)
        assert texts(files, whole, 0, 50) != sorted(texts(files, whole, 0, 50))
        first = texts(files, stream(files, one(files["jsonl"])), 0, 8)
        assert {text.split("user\na ")[1].split("?")[0] for text in first} == {str(n) for n in range(8)}

    def test_a_pass_of_whole_blocks(self, files: dict[str, str]) -> None:
        rows = texts(files, stream(files, one(files["even"])), 0, 96)
        assert len(set(rows[:48])) == len(set(rows[48:])) == 48

    def test_limit_and_length(self, files: dict[str, str]) -> None:
        rows = stream(files, one(files["jsonl"], limit=10), length=30)
        assert len(rows) == 30 and set(Counter(texts(files, rows, 0, 30)).values()) == {3}
        with pytest.raises(IndexError):
            rows[30]

    def test_too_long_is_left_out(
        self, files: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "x.jsonl"
        path.write_text("".join(json.dumps({"prompt": "a" * (n * 20), "answer": "b"}) + "\n" for n in range(1, 9)))
        rows = stream(files, {"": DatasetData(path=str(path), streaming=True)})
        assert max(len(rows[index]["input_ids"]) for index in range(40)) <= 120
        assert "streamed examples longer than 120 tokens are left out" in caplog.text
        with pytest.raises(
            DataError, match=r"max_length is 20 tokens, but the shortest of \d+ examples has \d+: raise"
        ):
            stream(files, {"": DatasetData(path=str(path), streaming=True)}, max_length=20)[0]

    def test_packed_rows_hold_whole_examples(self, files: dict[str, str]) -> None:
        rows = stream(files, one(files["jsonl"]), buffer=50, packing=True)
        alone = stream(files, one(files["jsonl"]), buffer=50)
        expected = sorted(tuple(alone[index]["input_ids"]) for index in range(50))
        found, index = [], 0
        while len(found) < 50:
            row = rows[index]
            assert len(row["input_ids"]) <= 120
            for number in range(row["segment_ids"][-1] + 1):
                found.append(
                    tuple(t for t, own in zip(row["input_ids"], row["segment_ids"], strict=True) if own == number)
                )
            index += 1
        assert sorted(found) == expected and index < 50


class TestMixture:
    def sources(self, files: dict[str, str]) -> dict[str, DatasetData]:
        return {name: DatasetData(path=files[key], streaming=True) for name, key in (("big", "jsonl"), ("small", "b"))}

    def test_by_weight(self, files: dict[str, str]) -> None:
        rows = stream(files, self.sources(files), weights={"big": 1, "small": 3}, buffer=100, length=2000)
        assert rows.tasks == ["big", "small"]
        counts = Counter(rows[index]["task_ids"] for index in range(2000))
        assert abs(counts[1] / 2000 - 0.75) < 0.04
        # A source that starts over has given all of it before.
        small = [text for text in texts(files, rows, 0, 100) if "\nb " in text]
        assert len(set(small)) == min(21, len(small))

    @settings(max_examples=15, deadline=None)
    @given(at=st.integers(0, 299), packing=st.booleans())
    def test_goes_on_from_any_row(self, files: dict[str, str], at: int, packing: bool) -> None:
        options = {"weights": {"big": 1.0, "small": 2.0}, "packing": packing}
        whole = stream(files, self.sources(files), **options)
        for index in range(min(at + 9, 320)):  # loaders read ahead of what is trained on
            whole[index]
        state = json.loads(json.dumps(whole.state_at(at)))
        assert state["first"] <= at
        resumed = stream(files, self.sources(files), **options)
        resumed.load_state(state)
        assert [resumed[index] for index in range(at, at + 30)] == [whole[index] for index in range(at, at + 30)]


@settings(max_examples=25, deadline=None)
@given(at=st.integers(0, 199), end=st.sampled_from(["jsonl", "parquet", "even"]))
def test_one_source_goes_on_from_any_row(files: dict[str, str], at: int, end: str) -> None:
    whole = stream(files, one(files[end]))
    expected = [whole[index] for index in range(at + 20)][at:]
    resumed = stream(files, one(files[end]))
    resumed.load_state(whole.state_at(at))
    assert [resumed[index] for index in range(at, at + 20)] == expected
    assert [whole[index] for index in range(at, at + 20)] == expected  # and backwards


def test_a_state_that_does_not_fit(files: dict[str, str]) -> None:
    rows = stream(files, one(files["jsonl"]))
    state = rows.state_at(0)
    for damaged, message in (
        ({**state, "block": -1}, "block"),
        ({**state, "more": 1}, "unknown key 'more'"),
        ({**state, "sources": {"other": state["sources"][""]}}, "it is of the sources 'other', but the recipe has ''"),
        (stream(files, one(files["jsonl"], limit=9)).state_at(0), "of another kind: resume with the recipe of the run"),
    ):
        with pytest.raises(CheckpointError, match=message):
            rows.load_state(damaged)


def test_each_process_sees_its_share(files: dict[str, str]) -> None:
    alone = stream(files, one(files["jsonl"]), length=64)
    shares = []
    for rank in range(2):
        rows = stream(files, one(files["jsonl"]), length=64)
        batches = BatchSamplerShard(BatchSampler(SequentialSampler(rows), 4, False), 2, rank)  # as the Trainer's loader
        shares.append([[tuple(rows[index]["input_ids"]) for index in batch] for batch in batches])
    both = [row for pair in zip(*shares, strict=True) for batch in pair for row in batch]
    assert both == [tuple(alone[index]["input_ids"]) for index in range(64)]
    assert len(set(both[:50])) == 50


def recipe(folder: Path, backbone: Path, data: dict[str, Any], **options: Any) -> Recipe:
    experts = {"kind": "lora", "num_experts": 4, "r": 2, "dropout": 0.1}
    router = {"kind": "topk", "top_k": 2, "aux_loss_coef": 0.01}
    return load_recipe(
        {
            "backbone": {"name": str(backbone), "quantization": None},
            "mixture": {"sites": [{"target": "mlp", "experts": experts, "router": router}]},
            "data": data,
            "trainer": {
                "kind": "sft",
                "args": {
                    "max_steps": 10,
                    "per_device_train_batch_size": 2,
                    "gradient_accumulation_steps": 2,
                    "save_strategy": "steps",
                    "save_steps": 1,
                    "save_total_limit": 20,
                    "logging_steps": 3,
                    "disable_tqdm": True,
                    "learning_rate": 1e-2,
                },
            },
            "max_length": 100,
            "output_dir": str(folder),
            **options,
        }
    )


def outcome(trainer: Any) -> dict[str, Any]:
    skipped = ("runtime", "per_second", "train_loss")
    return {
        "weights": {name: value.detach().clone() for name, value in trainer.model.adapter_tensors().items()},
        "optimizer": trainer.optimizer.state_dict()["state"],
        "log": [
            {key: value for key, value in line.items() if not key.endswith(skipped)}
            for line in trainer.state.log_history
            if "train_loss" not in line
        ],
    }


def same(got: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(got, expected)
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same(got[key], value) for key, value in expected.items())
    if isinstance(expected, list):
        return len(got) == len(expected) and all(map(same, got, expected))
    return bool(got == expected)


@pytest.fixture(scope="module", params=[False, True], ids=["rows", "packed"])
def run(
    request: pytest.FixtureRequest,
    files: dict[str, str],
    backbone_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    data = {"kind": "dataset", "path": files["jsonl"], "streaming": True, "shuffle_buffer": 8}
    folder = tmp_path_factory.mktemp("whole")
    trainer = SFT.prepare(recipe(folder, backbone_folder, data, packing=request.param))
    trainer.train()
    return folder, data, request.param, outcome(trainer)


class TestTraining:
    @pytest.mark.parametrize("cut", [1, 4, 7])
    def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
        self, run: Any, backbone_folder: Path, tmp_path: Path, cut: int
    ) -> None:
        folder, data, packing, expected = run
        shutil.copytree(folder / f"checkpoint-{cut}", tmp_path / f"checkpoint-{cut}")
        trainer = SFT.prepare(recipe(tmp_path, backbone_folder, data, packing=packing))
        seen = count_reads(trainer.train_dataset)
        trainer.train(resume_from_checkpoint=True)
        assert same(outcome(trainer), expected)
        if not packing:  # what is left, and at most one block before it and one beyond
            assert len(seen) <= (10 - cut) * 4 + 16

    def test_without_its_file_the_stream_is_read_again(self, run: Any, backbone_folder: Path, tmp_path: Path) -> None:
        folder, data, packing, expected = run
        shutil.copytree(folder / "checkpoint-7", tmp_path / "checkpoint-7")
        (tmp_path / "checkpoint-7" / "stream.json").unlink()
        manifest = json.loads((tmp_path / "checkpoint-7" / "manifest.json").read_text())
        manifest["files"] = [entry for entry in manifest["files"] if entry["name"] != "stream.json"]
        (tmp_path / "checkpoint-7" / "manifest.json").write_text(json.dumps(manifest))
        trainer = SFT.prepare(recipe(tmp_path, backbone_folder, data, packing=packing))
        trainer.train(resume_from_checkpoint=True)
        assert same(outcome(trainer), expected)

    def test_another_recipe_is_refused(
        self, run: Any, files: dict[str, str], backbone_folder: Path, tmp_path: Path
    ) -> None:
        folder, data, packing, _ = run
        shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
        both = {"a": data, "b": {**data, "path": files["b"]}}
        other = {"kind": "mixture", "sources": both, "weights": {"a": 1, "b": 1}}
        trainer = SFT.prepare(recipe(tmp_path, backbone_folder, other, packing=packing))
        with pytest.raises(
            CheckpointError, match=r"stream\.json: it is of the sources '', but the recipe has 'a', 'b'"
        ):
            trainer.train(resume_from_checkpoint=True)


def count_reads(rows: Any) -> list[Any]:
    """What the only source reads from now on."""
    seen: list[Any] = []
    [source] = rows._sources.values()
    read = source._read
    source._read = lambda row, number: seen.append(row) or read(row, number)
    return seen


class TestRecipe:
    def test_needs_max_steps_before_anything_is_read(self, backbone_folder: Path, tmp_path: Path) -> None:
        data = {"kind": "dataset", "path": "nowhere.jsonl", "streaming": True}
        made = recipe(tmp_path, tmp_path / "no backbone", data, trainer={"kind": "sft"})
        with pytest.raises(ConfigError, match=r"data\.streaming: a stream has no end.*set trainer\.args\.max_steps"):
            SFT.prepare(made)

    def test_test_questions_are_not_trained_on(
        self, files: dict[str, str], tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        test = write(tmp_path / "a.jsonl", 10)
        data = {"kind": "dataset", "path": files["jsonl"], "test_path": test, "streaming": True}
        content = read_data(recipe(tmp_path, tmp_path, data), max_steps=10)
        train, held_out = content.tokenize(byte_tokenizer, 80)
        assert held_out is not None and len(held_out) == 10
        assert len({tuple(train[index]["input_ids"]) for index in range(80)}) == 40
        assert not {tuple(row["input_ids"]) for row in held_out.rows} & {
            tuple(train[at]["input_ids"]) for at in range(80)
        }

    def test_tasks_of_a_column(self, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
        path = write(tmp_path / "x.jsonl", 5, kind="sums")
        data = {"kind": "dataset", "path": path, "streaming": True, "columns": {"task": "kind"}}
        with pytest.raises(ConfigError, match=r"a stream is not read before training: list the names in columns\.task"):
            recipe(tmp_path, tmp_path, data)
        named = read_data(recipe(tmp_path, tmp_path, {**data, "tasks": ["dates", "sums"]}), max_steps=10)
        assert named.tokenize(byte_tokenizer, 10).train[3]["task_ids"] == 1
        wrong = read_data(recipe(tmp_path, tmp_path, {**data, "tasks": ["sum"]}), max_steps=10)
        with pytest.raises(DataError, match="task 'sums' is not among sum; did you mean 'sum'"):
            wrong.tokenize(byte_tokenizer, 10).train[0]

    def test_a_missing_column_and_a_bad_row(self, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
        path = tmp_path / "x.jsonl"
        path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": ""}\n')
        data = {"kind": "dataset", "path": str(path), "streaming": True}
        with pytest.raises(DataError, match=r"data\.columns\.prompt is 'q', but the columns are prompt, answer"):
            read_data(recipe(tmp_path, tmp_path, {**data, "columns": {"prompt": "q"}}), max_steps=10)
        rows = read_data(recipe(tmp_path, tmp_path, data), max_steps=10).tokenize(byte_tokenizer, 10).train
        with pytest.raises(DataError, match="row 2: column 'answer' is empty"):
            rows[0]
