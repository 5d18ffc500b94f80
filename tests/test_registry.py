"""The registry: names, aliases, and helpful errors."""

from __future__ import annotations

from typing import Any

import pytest

from moelora.errors import ConfigError, UserError
from moelora.registry import EXPERTS, ROUTERS, TRAINERS, Registry, closest

pytestmark = pytest.mark.smoke


class Base:
    kind: str


@pytest.fixture
def registry() -> Registry[Base]:
    # Any importable package will do as the home of entries that this test makes itself.
    made: Registry[Base] = Registry("thing", "moelora")

    @made.register("topk", "mixlora")
    class TopK(Base):
        def __init__(self, size: int, scale: float = 1.0) -> None:
            self.size, self.scale = size, scale

    @made.register("dense")
    class Dense(Base):
        pass

    return made


def test_names_are_sorted_and_without_aliases(registry: Registry[Base]) -> None:
    assert registry.names() == list(registry) == ["dense", "topk"]
    assert "mixlora" in registry
    assert "mixlora" not in registry.names()
    assert "sparse" not in registry


def test_alias_leads_to_the_same_class_which_knows_its_name(registry: Registry[Base]) -> None:
    assert registry.get("mixlora") is registry.get("topk")
    assert registry.get("mixlora").kind == "topk"


def test_create_passes_arguments_on(registry: Registry[Base]) -> None:
    made: Any = registry.create("topk", 3, scale=0.5)
    assert (made.size, made.scale) == (3, 0.5)


def test_unknown_name_says_what_exists_and_what_is_near(registry: Registry[Base]) -> None:
    with pytest.raises(ConfigError) as error:
        registry.get("topkk")
    assert str(error.value) == "unknown thing 'topkk': known are dense, topk; did you mean 'topk'?"
    with pytest.raises(UserError, match=r"unknown thing 'zebra': known are dense, topk$"):
        registry.get("zebra")


@pytest.mark.parametrize("wrong", [None, 3, ["topk"], {"kind": "topk"}])
def test_a_name_of_the_wrong_type_is_a_config_error(registry: Registry[Base], wrong: Any) -> None:
    with pytest.raises(ConfigError, match="unknown thing"):
        registry.get(wrong)


@pytest.mark.parametrize("name", ["topk", "mixlora"])
def test_a_taken_name_is_refused(registry: Registry[Base], name: str) -> None:
    with pytest.raises(ValueError, match=f"thing '{name}' is registered twice"):
        registry.register(name)(type("Other", (Base,), {}))
    with pytest.raises(ValueError, match=f"thing '{name}' is registered twice"):
        registry.register("new", name)(type("Other", (Base,), {}))


def test_a_refused_registration_leaves_nothing_behind(registry: Registry[Base]) -> None:
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("new", "topk")(type("Other", (Base,), {}))
    assert "new" not in registry


def test_closest_is_empty_without_a_near_name() -> None:
    assert closest("x", ["dense", "topk"]) == ""


@pytest.mark.parametrize("registry", [ROUTERS, EXPERTS, TRAINERS], ids=lambda registry: registry.what)
def test_every_built_in_brings_a_configuration_of_its_own_kind(registry: Registry[Any]) -> None:
    assert registry.names()
    for name in registry.names():
        entry = registry.get(name)
        assert entry.kind == name
        assert entry.Config.model_fields["kind"].default == name
        assert entry.__doc__, f"{registry.what} {name!r} is not documented"
        assert entry.Config.__doc__
