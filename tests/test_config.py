"""Configuration: what goes in comes out, and what is wrong is said well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moelora import BackboneConfig, MixtureConfig, Recipe, SiteConfig, load_recipe
from moelora.config import MAX_CONFIG_BYTES, apply_overrides, card_names, parse_slice, read_mapping
from moelora.errors import ConfigError

pytestmark = pytest.mark.smoke


def site(**changes: Any) -> dict[str, Any]:
    experts = {"kind": "lora", "num_experts": 4, "r": 4, "alpha": 8}
    return {"target": "mlp", "experts": experts, "router": {"kind": "topk", "top_k": 2}, **changes}


def recipe(**changes: Any) -> dict[str, Any]:
    return {"mixture": {"sites": [site()]}, **changes}


def mixture(**changes: Any) -> dict[str, Any]:
    return {"mixture": {"sites": [site(**changes)]}}


# -- round trips ------------------------------------------------------------------------------------------------------

FULL = {
    "backbone": {"name": "some/model", "quantization": None, "dtype": "bfloat16", "revision": "main"},
    "mixture": {
        "sites": [
            site(layers="-10:", projections=["gate_proj", "up_proj"]),
            site(target=["q_proj", "re:.*v_proj"], layers=[0, 2], experts={"num_experts": 1, "r": 2}, router=None),
        ]
    },
    "data": {"kind": "dataset", "path": "train.jsonl", "columns": {"prompt": "question", "answer": "reply"}},
    "max_length": 64,
    "seed": 7,
}


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
def test_recipe_survives_a_file(tmp_path: Path, suffix: str) -> None:
    before = Recipe.parse(FULL)
    path = tmp_path / f"recipe.{suffix}"
    path.write_text(before.to_json() if suffix == "json" else before.to_yaml())
    after = load_recipe(path)
    assert after == before
    assert after.mixture.sites[1].experts == before.mixture.sites[1].experts
    assert type(after.mixture.sites[0].router) is type(before.mixture.sites[0].router)


def test_written_file_does_not_depend_on_defaults() -> None:
    written = json.loads(Recipe.parse(recipe()).to_json())
    assert set(written) == set(Recipe.model_fields)
    assert set(written["backbone"]) == set(BackboneConfig.model_fields)
    assert written["mixture"]["sites"][0]["router"]["normalize"] is True


@pytest.mark.parametrize("name", card_names())
def test_every_card_with_a_recipe_is_a_valid_recipe(name: str) -> None:
    card = load_recipe(name)
    assert Recipe.parse(yaml.safe_load(card.to_yaml())) == card


def test_load_recipe_takes_a_mapping_and_a_recipe() -> None:
    made = load_recipe(recipe(seed=3))
    assert made.seed == 3
    assert load_recipe(made) == made
    assert load_recipe(made, ["seed=4"]).seed == 4


def test_mixture_and_site_parse_alone() -> None:
    assert MixtureConfig.parse({"sites": [site()]}).sites[0] == SiteConfig.parse(site())


def test_configuration_is_frozen_and_the_input_is_left_alone() -> None:
    given = recipe()
    kept = json.loads(json.dumps(given))
    made = Recipe.parse(given)
    assert given == kept
    with pytest.raises(ValueError, match="frozen"):
        made.seed = 1


def test_short_forms() -> None:
    made = SiteConfig.parse(site(target="mlp", router="topk"))
    assert made.target == ["mlp"]
    assert made.router.kind == "topk"
    assert SiteConfig.parse(site(router="mixlora")).router.kind == "topk", "an alias is written under its own name"


def test_json_schema_describes_every_kind() -> None:
    schema = json.dumps(Recipe.model_json_schema())
    for text in ("topk", "switch", "lora", "reasoning_gym", "quantization"):
        assert f'"{text}"' in schema


# -- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("max_length=64", ("max_length",), 64),
        ("backbone.quantization=null", ("backbone", "quantization"), None),
        ("backbone.name=org/model", ("backbone", "name"), "org/model"),
        ("mixture.sites.0.router.top_k=1", ("mixture", "sites", 0, "router", "top_k"), 1),
        ("mixture.sites.0.target=[q_proj, v_proj]", ("mixture", "sites", 0, "target"), ["q_proj", "v_proj"]),
        ("mixture.sites.0.router.aux_loss_coef=1e-3", ("mixture", "sites", 0, "router", "aux_loss_coef"), 0.001),
        ("backbone.name=a=b", ("backbone", "name"), "a=b"),
    ],
)
def test_override_reaches_its_key(override: str, path: tuple[Any, ...], value: Any) -> None:
    found: Any = load_recipe(recipe(), [override]).to_dict()
    for key in path:
        found = found[key]
    assert found == value


def test_later_override_wins_and_the_source_is_left_alone() -> None:
    values = {"a": {"b": 1}}
    assert apply_overrides(values, ["a.b=2", "a.b=3", "a.c.d=x"]) == {"a": {"b": 3, "c": {"d": "x"}}}
    assert values == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_length", "'max_length' is not an override: write key=value"),
        ("=3", "'=3' is not an override"),
        ("seed.deep=3", "'seed' holds 0, which has no keys"),
        ("mixture.sites.7.target=mlp", "'7' is not an index of a list of 1"),
        ("mixture.sites.first.target=mlp", "'first' is not an index of a list of 1"),
        ("backbone.name=[", "is not a YAML value"),
        ("backbone.nmae=x", "unknown key 'nmae'.*did you mean 'name'"),
        ("max_lenght=3", "unknown key 'max_lenght'.*did you mean 'max_length'"),
    ],
)
def test_wrong_override(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe(seed=0), [override])


# -- wrong configurations ---------------------------------------------------------------------------------------------

# Each message must name the key (first) and hold the other parts: the value, what is allowed, what to do.
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown top key": (recipe(optimizer="adam"), ["unknown key 'optimizer'", "known keys are", "trainer"]),
    "unknown backbone key": (recipe(backbone={"nam": "x"}), ["backbone", "unknown key 'nam'", "did you mean 'name'"]),
    "quantization": (recipe(backbone={"quantization": "nf8"}), ["backbone.quantization", "'nf4', 'int8'", "'nf8'"]),
    "no mixture": ({}, ["mixture", "missing"]),
    "no sites": ({"mixture": {"sites": []}}, ["mixture.sites", "at least 1 item"]),
    "no target": (mixture(target=[]), ["mixture.sites.0.target", "at least 1 item"]),
    "bad slice": (mixture(layers="a:b"), ["mixture.sites.0.layers", "'a:b' is not a slice", "such as '-10:'"]),
    "top_k over experts": (
        mixture(router={"kind": "topk", "top_k": 9}),
        ["mixture.sites.0", "router.top_k is 9", "there are 4 experts", "choose 1..4"],
    ),
    "unknown router": (mixture(router={"kind": "topkk"}), ["sites.0.router", "'topkk'", "did you mean 'topk'"]),
    "router without kind": (mixture(router={"top_k": 1}), ["sites.0.router", "'kind' is missing", "names a router"]),
    "router is a number": (mixture(router=3), ["sites.0.router", "expected a mapping", "got int"]),
    "experts without router": (mixture(router=None), ["sites.0", "num_experts is 4", "router: {kind: topk"]),
    "unknown expert kind": (mixture(experts={"kind": "lorra"}), ["sites.0.experts", "'lorra'", "did you mean 'lora'"]),
    "unknown expert option": (
        mixture(experts={"kind": "lora", "rank": 8}),
        ["sites.0.experts", "unknown key 'rank'", "known keys are"],
    ),
    "rank of nought": (mixture(experts={"num_experts": 4, "r": 0}), ["sites.0.experts.r", "greater than 0", "given 0"]),
    "ranks that do not fit": (
        mixture(experts={"num_experts": 4, "r": [4, 4]}),
        ["sites.0.experts", "2 values for 4 experts", "one each"],
    ),
    "jitter out of range": (mixture(router={"kind": "topk", "jitter": 1.5}), ["router.jitter", "less than 1", "1.5"]),
    "not a number": (
        mixture(router={"kind": "topk", "aux_loss_coef": float("nan")}),
        ["router.aux_loss_coef", "finite", "nan"],
    ),
    "misspelt router option": (
        mixture(router={"kind": "topk", "aux_los_coef": 1}),
        ["sites.0.router", "'aux_los_coef'", "did you mean 'aux_loss_coef'"],
    ),
    "length is text": (recipe(max_length="many"), ["max_length", "integer", "'many'"]),
    "length is negative": (recipe(max_length=-1), ["max_length", "greater than 0", "-1"]),
    "no tasks": (recipe(data={"kind": "reasoning_gym", "tasks": []}), ["data", "tasks", "at least 1 item"]),
    "same seeds": (
        recipe(data={"kind": "reasoning_gym", "tasks": ["a"], "seed": 3, "test_seed": 3}),
        ["data", "seed and test_seed are both 3", "coincide"],
    ),
    "unknown data kind": (recipe(data={"kind": "datset", "path": "x"}), ["data", "'datset'", "'dataset'"]),
    "data without kind": (recipe(data={"path": "x"}), ["data", "kind"]),
    "misspelt column": (
        recipe(data={"kind": "dataset", "path": "x", "columns": {"promt": "q"}}),
        ["data", "columns", "'promt'", "did you mean 'prompt'"],
    ),
    "all data held out": (
        recipe(data={"kind": "dataset", "path": "x", "test_fraction": 1.0}),
        ["test_fraction", "less than 1", "1.0"],
    ),
    "unknown trainer": (recipe(trainer={"kind": "sftt"}), ["trainer", "'sftt'", "did you mean 'sft'"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_configuration_names_key_value_and_remedy(name: str) -> None:
    values, parts = WRONG[name]
    with pytest.raises(ConfigError) as error:
        Recipe.parse(values, where="my.yaml")
    message = str(error.value)
    assert message.startswith("my.yaml: ")
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_every_problem_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        Recipe.parse(recipe(max_length=0, seed="x", backbone={"dtype": "fp8"}))
    for key in ("max_length", "seed", "backbone.dtype"):
        assert key in str(error.value)


# -- files ------------------------------------------------------------------------------------------------------------

BAD_FILES: dict[str, tuple[str, str, str]] = {
    "duplicate key, YAML": ("r.yaml", "seed: 1\nmixture: {}\nseed: 2\n", "line 3: the key 'seed' is given twice"),
    "duplicate key, deep": ("r.yaml", "a:\n  b: 1\n  b: 2\n", "line 3: the key 'b' is given twice"),
    "duplicate key, JSON": ("r.json", '{"seed": 1, "seed": 2}', "the key 'seed' is given twice"),
    "NaN": ("r.json", '{"seed": NaN}', "NaN is not a number"),
    "Infinity": ("r.json", '{"seed": -Infinity}', "-Infinity is not a number"),
    "broken JSON": ("r.json", '{"seed": ', "not a readable json file"),
    "broken YAML": ("r.yaml", "seed: [1", "not a readable yaml file"),
    "a list": ("r.yaml", "- 1\n- 2\n", "expected a mapping of keys at the top, got list"),
    "empty": ("r.yaml", "", "expected a mapping of keys at the top, got NoneType"),
    "code": ("r.yaml", "seed: !!python/object/apply:os.system ['true']", "not a readable yaml file"),
    "too deep": ("r.json", '{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    "too large": ("r.yaml", "a: " + "x" * MAX_CONFIG_BYTES, f"at most {MAX_CONFIG_BYTES}"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    file_name, text, message = BAD_FILES[name]
    path = tmp_path / file_name
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_mapping(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_bad_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"seed: \xff\xfe")
    with pytest.raises(ConfigError, match="not a readable yaml file"):
        read_mapping(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a readable"):
        read_mapping(tmp_path)


def test_missing_file_and_unknown_card_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"'nowhere' is neither a recipe file \(.yaml, .json\) nor a model card"):
        load_recipe("nowhere")


def test_wrong_recipe_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe(max_length=0)))
    with pytest.raises(ConfigError, match=r"mine\.yaml: .*max_length"):
        load_recipe(path)


@pytest.mark.parametrize(("text", "expected"), [("1e-3", 0.001), ("1E+2", 100.0), ("-.5e1", -5.0), ("2.5e3", 2500.0)])
def test_exponents_are_numbers_in_yaml(tmp_path: Path, text: str, expected: float) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"value: {text}\n")
    assert read_mapping(path) == {"value": expected}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("-10:", slice(-10, None)), (":4", slice(None, 4)), ("1:9:2", slice(1, 9, 2)), (":", slice(None, None))],
)
def test_parse_slice(text: str, expected: slice) -> None:
    assert parse_slice(text) == expected


@pytest.mark.parametrize("text", ["", "3", "1:2:3:4", "x:", "1.5:"])
def test_parse_slice_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is not a slice"):
        parse_slice(text)
