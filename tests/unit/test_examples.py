"""The sample files and the reference of the settings say what the code says."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import NODEFAULT, Struct, inspect

import edge_agent.settings
import trainer_host.settings
from protocol.features import Feature, FeatureSpec, Group
from protocol.link import Broker
from trainer_host.gate import GateSettings
from trainer_host.inbox import Description
from trainer_host.recipes import table
from trainer_host.recipes.recipe import CloningSettings, DataSettings, MlpSettings, Recipe
from trainer_host.repository import Lifetimes

ROOT = Path(__file__).parents[2]
AGENT = ROOT / "examples/edge-agent.toml"
HOST = ROOT / "examples/trainer-host.toml"
REFERENCE = (ROOT / "docs/configuration.md").read_text("utf-8")

# The heading in the reference under which the keys of a table are.
TABLES: dict[str, type[Struct]] = {
    "Agent: top of the file": edge_agent.settings.Settings,
    "Agent: `[slots.NAME]`": edge_agent.settings.SlotSettings,
    "Agent: `[outbox]`": edge_agent.settings.OutboxSettings,
    "Both: `[broker]`": Broker,
    "Host: top of the file": trainer_host.settings.Settings,
    "Host: `[lifetimes]`": Lifetimes,
    "Host: `[training]`": trainer_host.settings.TrainingSettings,
    "Host: `[gate]`": GateSettings,
    "Host: `[auto_publish]`": trainer_host.settings.AutoPublishSettings,
    "Host: `[inbox]`": trainer_host.settings.InboxSettings,
    "Host: `[history]`": trainer_host.settings.HistorySettings,
    "Host: `[recipes.NAME]`": Recipe,
    "Host: `[recipes.NAME.data]`": DataSettings,
    "Host: `[recipes.NAME.learner]`": CloningSettings,
    "Host: `[recipes.NAME.network]`": MlpSettings,
    "Description of a model": Description,
    "`[features]`": FeatureSpec,
    "`[[features.groups]]`": Group,
    "`[[features.features]]`": Feature,
}
# They fix what a model means, so no file should replace them.
FIXED_IN_RECIPES = {"name", "slot", "actions", "features"}


def bare(path: Path) -> str:
    """The sample with the marker of every commented-out key removed; prose has a blank behind its marker."""
    return re.sub(r"^#(?=\S)", "", path.read_text("utf-8"), flags=re.MULTILINE)


def fields(kind: type[Struct]) -> tuple[inspect.Field, ...]:
    told = inspect.type_info(kind)
    assert isinstance(told, inspect.StructType)
    return told.fields


def leaves(value: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from leaves(inner, (*path, key))
        else:
            yield (*path, key), inner


def row(heading: str, key: str) -> list[str]:
    """The cells of a key's row under a heading of the reference."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(?P<text>.*?)(?=^#|\Z)", REFERENCE, re.MULTILINE | re.DOTALL)
    assert found, f"the reference has no heading {heading!r}"
    line = re.search(rf"^\| `{re.escape(key)}` \|.*$", found["text"], re.MULTILINE)
    assert line, f"{heading}: the reference does not mention {key}"
    return [cell.strip() for cell in line[0].strip("|").split("|")]


def bounds(kind: inspect.Type) -> list[float]:
    if isinstance(kind, inspect.UnionType):
        return [bound for one in kind.types for bound in bounds(one)]
    limits = (getattr(kind, name, None) for name in ("ge", "gt", "le", "lt", "min_length", "max_length"))
    return [limit for limit in limits if limit is not None]


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", cell)]


@pytest.mark.parametrize(
    ("path", "load"), [(AGENT, edge_agent.settings.load), (HOST, trainer_host.settings.load)], ids=["agent", "host"]
)
@pytest.mark.parametrize("commented", [True, False])
def test_a_sample_is_read_by_the_real_loader(path: Path, load: Any, commented: bool, tmp_path: Path) -> None:
    copy = tmp_path / path.name
    copy.write_text(path.read_text("utf-8") if commented else bare(path), "utf-8")
    assert load(copy).broker.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("path", "settings"),
    [
        (AGENT, edge_agent.settings.Settings(slots={"combat": edge_agent.settings.SlotSettings()}, device="pi7")),
        (HOST, trainer_host.settings.Settings(recipes={"combat": {}})),
    ],
    ids=["agent", "host"],
)
def test_a_sample_has_every_key_with_its_default(path: Path, settings: Struct) -> None:
    expected = msgspec.to_builtins(settings)
    if path == HOST:
        recipe = msgspec.to_builtins(table.named("combat"))
        expected["recipes"]["combat"] = {key: value for key, value in recipe.items() if key not in FIXED_IN_RECIPES}
    shown = dict(leaves(tomllib.loads(bare(path))))
    defaults = dict(leaves(expected))
    assert set(shown) == set(defaults)
    # Where the default depends on the machine, or there is none, the sample shows what one might write.
    assert {key: shown[key] for key, value in defaults.items() if value not in ("", None)} == {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in defaults.items()
        if value not in ("", None)
    }


def test_what_a_sample_leaves_commented_out_changes_nothing() -> None:
    assert list(leaves(tomllib.loads(AGENT.read_text("utf-8")))) == []
    assert list(leaves(tomllib.loads(HOST.read_text("utf-8")))) == []


KEYS = [
    pytest.param(heading, field, id=f"{kind.__module__}.{kind.__name__}.{field.encode_name}")
    for heading, kind in TABLES.items()
    for field in fields(kind)
]


@pytest.mark.parametrize(("heading", "field"), KEYS)
def test_the_reference_has_every_key_with_its_default_and_bounds(heading: str, field: inspect.Field) -> None:
    _, default, allowed, meaning = row(heading, field.encode_name)
    assert meaning
    if isinstance(field.type, inspect.StructType | inspect.DictType):
        assert default == "a table"
    elif field.default is NODEFAULT and field.default_factory is NODEFAULT:
        assert default == "required"
    elif field.default in (None, ""):
        assert default, "what holds instead must be said"
        assert not default.startswith('`"'), "an empty default is not a value"
    elif field.default is not NODEFAULT:
        value = list(field.default) if isinstance(field.default, tuple) else field.default
        assert default == f"`{json.dumps(value)}`"
    else:
        assert default == "the computer's name"
    assert set(bounds(field.type)) <= set(numbers(allowed)), f"{allowed!r} leaves out a bound"


def test_the_reference_names_no_key_that_does_not_exist() -> None:
    section = ""
    for line in REFERENCE.splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        elif section in TABLES and (found := re.match(r"\| `(?P<key>[a-z_]+)` \|", line)):
            assert found["key"] in {field.encode_name for field in fields(TABLES[section])}, f"{section}: {line}"
