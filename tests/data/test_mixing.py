"""Several data sets in one: shares, the plan of an epoch, and types of tasks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelora.config import DatasetData, MixtureData, ReasoningGymData, Recipe, load_recipe
from moelora.data import Collator, Example, load_examples, mixing_plan, read_data, tokenize
from moelora.data.mixing import quotas, shares
from moelora.errors import ConfigError, DataError
from moelora.trainers.sft import SFT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SIZES = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 60), min_size=1)


@settings(max_examples=200, deadline=None)
@given(SIZES, st.floats(0.2, 50), st.integers(0, 3))
def test_an_epoch_has_its_shares_and_no_example_too_often(sizes: dict[str, int], temperature: float, seed: int) -> None:
    size = 8 * sum(sizes.values()) + 997
    try:
        plan = mixing_plan(sizes, temperature=temperature, size=size, seed=seed)
    except DataError as error:
        assert "its share of an epoch is less than one example" in str(error)
        assert min(shares(sizes, temperature).values()) * size < 1
        return
    assert len(plan) == size
    counts = Counter(name for name, _ in plan)
    for name, count in sizes.items():
        part = count ** (1 / temperature) / sum(n ** (1 / temperature) for n in sizes.values())
        assert abs(counts[name] - part * size) < 1 + 1e-6
        drawn = Counter(index for source, index in plan if source == name)
        assert set(drawn) <= set(range(count))
        whole, rest = divmod(counts[name], count)
        assert sorted(drawn[index] for index in range(count)) == [whole] * (count - rest) + [whole + 1] * rest
    assert plan == mixing_plan(sizes, temperature=temperature, size=size, seed=seed)


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(0, 5))
def test_temperature_one_is_every_example_once(sizes: dict[str, int], seed: int) -> None:
    plan = mixing_plan(sizes, seed=seed)
    assert sorted(plan) == sorted((name, index) for name, count in sizes.items() for index in range(count))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(1e-6, 1e6), min_size=1), st.integers(0, 10_000))
def test_quotas_sum_to_the_size(weights: dict[str, float], size: int) -> None:
    parts = shares(dict.fromkeys(weights, 1), weights=weights)
    counts = quotas(parts, size)
    assert sum(counts.values()) == size
    assert all(abs(counts[name] - parts[name] * size) < 1 + 1e-6 for name in weights)


def test_temperature_goes_from_proportional_to_uniform() -> None:
    sizes = {"big": 10_000, "small": 100}
    assert shares(sizes)["small"] == pytest.approx(100 / 10_100)
    assert shares(sizes, 2)["small"] == pytest.approx(10 / 110)
    assert shares(sizes, 1e9)["small"] == pytest.approx(0.5)
    assert shares(sizes, 0.01)["small"] == pytest.approx(0, abs=1e-12)
    assert shares(sizes, weights={"big": 1, "small": 3})["small"] == 0.75


def write(path: Path, count: int, **more: Any) -> str:
    rows = [{"prompt": f"{path.stem} {n}?", "answer": str(n), **more} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Any]:
    return {
        "big": {"kind": "dataset", "path": write(tmp_path / "big.jsonl", 90), "test_fraction": 0.1},
        "small": {"kind": "dataset", "path": write(tmp_path / "small.jsonl", 10), "test_fraction": 0.1},
        "gym": {"kind": "reasoning_gym", "tasks": ["letter_counting"], "train_size": 20, "test_size": 3},
    }


class TestMixtureData:
    def test_all_of_all_sources(self, sources: dict[str, Any]) -> None:
        train, test, dropped = load_examples(MixtureData.parse({"sources": sources}))
        assert dropped == 0
        assert Counter(example.task for example in train) == {"big": 81, "small": 9, "letter_counting": 20}
        assert Counter(example.task for example in test) == {"big": 9, "small": 1, "letter_counting": 3}
        assert [example.task for example in train] != sorted(example.task for example in train)
        assert train == load_examples(MixtureData.parse({"sources": sources})).train
        assert train != load_examples(MixtureData.parse({"sources": sources, "seed": 1})).train

    def test_weights_and_size(self, sources: dict[str, Any]) -> None:
        weights = {"big": 1, "small": 2, "gym": 1}
        train = load_examples(MixtureData.parse({"sources": sources, "weights": weights, "size": 80})).train
        assert Counter(example.task for example in train) == {"big": 20, "small": 40, "letter_counting": 20}
        assert len({example.prompt for example in train if example.task == "big"}) == 20

    def test_what_one_source_tests_another_does_not_train(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.jsonl", 20)
        held = {"kind": "dataset", "path": path, "test_fraction": 0.5}
        train, test, dropped = load_examples(
            MixtureData.parse({"sources": {"a": held, "b": {**held, "test_fraction": 0}}})
        )
        assert len(test) == 10 and len(train) == 20 and dropped == 10
        assert not {example.prompt for example in train} & {example.prompt for example in test}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weights": {"big": 1}}, "weights is about big, but the sources are big, gym, small: give each source"),
            ({"weights": {"big": 1, "small": 1, "gym": 1}, "temperature": 2}, "so temperature 2 has no part: drop one"),
            ({"temperature": 0}, "temperature"),
            ({"weights": {"big": 0, "small": 1, "gym": 1}}, r"weights\.big"),
        ],
    )
    def test_refused(self, sources: dict[str, Any], options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            MixtureData.parse({"sources": sources, **options})

    def test_streams_are_not_mixed_with_tables(self, sources: dict[str, Any]) -> None:
        streamed = {**sources, "big": {**sources["big"], "streaming": True}}
        with pytest.raises(ConfigError, match="of the sources only big are streamed: stream all of them or none"):
            MixtureData.parse({"sources": streamed})
        both = {name: {**sources[name], "streaming": True} for name in ("big", "small")}
        with pytest.raises(
            ConfigError, match="how many examples a stream has is not known: give each source its share"
        ):
            MixtureData.parse({"sources": both})
        with pytest.raises(ConfigError, match="size is of an epoch, and streams have none"):
            MixtureData.parse({"sources": both, "weights": {"big": 1, "small": 1}, "size": 9})

    def test_a_source_that_gives_nothing(self, sources: dict[str, Any]) -> None:
        weights = {"big": 1000, "small": 1, "gym": 1000}
        with pytest.raises(DataError, match=r"data\.sources\.small: its share of an epoch is less than one example"):
            load_examples(MixtureData.parse({"sources": sources, "weights": weights, "size": 10}))

    def test_a_recipe_keeps_it(self, sources: dict[str, Any]) -> None:
        made = recipe({"kind": "mixture", "sources": sources, "temperature": 3.0})
        assert isinstance(made.data, MixtureData) and load_recipe(made.to_dict()) == made


def recipe(data: dict[str, Any] | None, router: dict[str, Any] | None = None, **options: Any) -> Recipe:
    site = {"target": "mlp", "experts": {"num_experts": 4, "r": 2}, "router": router or {"kind": "topk", "top_k": 2}}
    return load_recipe({"backbone": {"name": "no/backbone"}, "mixture": {"sites": [site]}, "data": data, **options})


LORAMOE = {"kind": "softmax", "aux_loss_coef": 0.1}


class TestTaskTypes:
    def test_a_column_a_constant_and_the_types_of_tasks(
        self, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        path = tmp_path / "x.jsonl"
        path.write_text("".join(json.dumps({"prompt": str(n), "answer": "a", "type": n % 2}) + "\n" for n in range(8)))
        config = DatasetData.parse({"path": str(path), "columns": {"task_type": "type"}, "test_fraction": 0})
        examples = load_examples(config).train
        rows = tokenize(examples, byte_tokenizer, 99)
        batch = Collator(0)([rows[index] for index in range(8)])
        assert batch["task_types"].tolist() == [int(example.prompt) % 2 for example in examples]
        assert batch["task_types"].dtype == batch["input_ids"].dtype and "task_ids" not in batch
        same = DatasetData.parse({"path": str(path), "task_type": 1, "test_fraction": 0})
        assert {example.task_type for example in load_examples(same).train} == {1}
        gym = ReasoningGymData(tasks=["letter_counting", "spell_backward"], train_size=3, test_size=1)
        types = {"letter_counting": 0, "spell_backward": 1}
        made = load_examples(gym.model_copy(update={"task_types": types})).train
        assert all(example.task_type == types[example.task] for example in made) and len(made) == 6
        assert "task_types" not in tokenize(load_examples(gym).train, byte_tokenizer, 999)[0]

    @pytest.mark.parametrize("cell", [2, -1, "one", None, True, 0.5, ""])
    def test_a_value_that_is_none(self, tmp_path: Path, cell: Any) -> None:
        path = tmp_path / "x.jsonl"
        path.write_text(json.dumps({"prompt": "a", "answer": "a", "type": cell}) + "\n")
        config = DatasetData.parse({"path": str(path), "columns": {"task_type": "type"}})
        with pytest.raises(DataError, match=r"row 1: column 'type' is .*; the type of a task is 0 or 1"):
            load_examples(config)

    def test_a_column_that_is_missing(self, tmp_path: Path) -> None:
        config = DatasetData.parse({"path": write(tmp_path / "x.jsonl", 3), "columns": {"task_type": "task_typ"}})
        with pytest.raises(
            DataError, match=r"data\.columns\.task_type is 'task_typ', but the columns are prompt, answer"
        ):
            load_examples(config)

    def test_some_with_and_some_without(self, byte_tokenizer: PreTrainedTokenizerFast) -> None:
        examples = [Example("a", "b", "t", task_type=1), Example("c", "d", "u")]
        with pytest.raises(
            DataError, match="some examples have a task type and some have none; one of task 'u' differs"
        ):
            tokenize(examples, byte_tokenizer, 99)

    def test_two_sources_of_the_type(self) -> None:
        with pytest.raises(ConfigError, match=r"task_type is the type of all rows and columns\.task_type that of each"):
            DatasetData.parse({"path": "x.jsonl", "task_type": 1, "columns": {"task_type": "t"}})
        with pytest.raises(ConfigError, match="task_types is about gcd, but the tasks are gcd, lcm: give each task"):
            ReasoningGymData.parse({"tasks": ["gcd", "lcm"], "task_types": {"gcd": 1}})

    def test_a_router_that_needs_them_is_told_before_anything_is_read(self, sources: dict[str, Any]) -> None:
        for data in ({"kind": "dataset", "path": "nowhere.jsonl"}, {"kind": "mixture", "sources": sources}):
            with pytest.raises(
                ConfigError, match=r"sites\.0\.router: router 'softmax' needs task_types.*task_type.*coef"
            ):
                SFT.prepare(recipe(data, LORAMOE))
        typed = {name: {**source, "task_type": 1} for name, source in sources.items() if name != "gym"}
        read_data(recipe({"kind": "mixture", "sources": typed}, LORAMOE))
        read_data(recipe(sources["gym"], {**LORAMOE, "types_of_tasks": [1]}))
        read_data(recipe(sources["gym"], {**LORAMOE, "aux_loss_coef": 0.0}))

    def test_other_routers_by_the_same_rule(self, sources: dict[str, Any]) -> None:
        for by, ok in (("task", True), ("task_type", False), ("modality", False)):
            made = recipe(sources["gym"], {"kind": "mask", "by": by})
            if ok:
                read_data(made)
                continue
            with pytest.raises(ConfigError, match=r"router 'mask' needs .*which the data do not give"):
                read_data(made)

    def test_packing_is_refused_where_a_router_counts_by_rows(self, sources: dict[str, Any]) -> None:
        for router, reason in (
            ({"kind": "switch"}, "expert_capacity counts the tokens of a sequence"),
            ({"kind": "meteora"}, "the loss 'gate' goes by the task of a row"),
            ({"kind": "remix"}, "comparing the losses of single examples"),
            ({**LORAMOE, "types_of_tasks": [0], "count_padding": True}, "count_padding counts the padding"),
        ):
            with pytest.raises(ConfigError, match=f"cannot train with packing: .*{reason}"):
                SFT.prepare(recipe(sources["gym"], router, packing=True))
        read_data(recipe(sources["gym"], {"kind": "switch", "expert_capacity": None}, packing=True))


def test_loramoe_trains_by_type_packed_as_it_does_unpacked(tmp_path: Path, backbone_folder: Path) -> None:
    """The first step's losses, over one batch of all examples: the same tokens in other rows."""
    types = {"kind": "dataset", "test_fraction": 0.0}
    sources = {
        name: {**types, "path": write(tmp_path / f"{name}.jsonl", 6), "task_type": kind}
        for name, kind in (("facts", 0), ("sums", 1))
    }
    logs = []
    for packing in (False, True):
        args = {"max_steps": 1, "per_device_train_batch_size": 12, "save_strategy": "no", "logging_steps": 1}
        made = recipe(
            {"kind": "mixture", "sources": sources},
            LORAMOE,
            backbone={"name": str(backbone_folder), "quantization": None},
            packing=packing,
            max_length=200,
            trainer={"kind": "sft", "args": {**args, "disable_tqdm": True}},
            output_dir=str(tmp_path / str(packing)),
        )
        trainer = SFT.prepare(made)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert len(trainer.train_dataset) < 12
    for name in ("loss", "task_loss", "aux/localized_balance"):
        assert logs[1][name] == pytest.approx(logs[0][name], abs=1e-5), name
    assert logs[0]["aux/localized_balance"] > 0
