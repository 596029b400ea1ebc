"""Settings: a TOML file and its fragments, merged and checked once, into one frozen struct.

Fragments (`conf.d/*.toml` beside the file) are read in the order of their names. Tables are merged, anything else is
replaced, so the last one wins. Whatever is wrong is reported as

    edge-agent.toml:7: broker.port is 70000; allowed: a whole number from 1 to 65535

The standard library's parser keeps no positions. We find them by its own grammar: a statement begins after a beginning
of the file that parses, and ends with the next one that does.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import inspect

from protocol.errors import Misconfigured

T = TypeVar("T")
Keys = tuple[str | int, ...]

FRAGMENTS = "conf.d"

_WHERE = re.compile(r"(?P<problem>.*?)(?: - at `\$(?P<path>.*)`)?", re.DOTALL)
_STEP = re.compile(r"\.(?P<name>[^.\[]+)|\[(?P<index>\d+)\]|\[(?P<any>\.\.\.)\]")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`")
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`")
_SYNTAX = re.compile(r"(?P<problem>.*) \(at line (?P<line>\d+), column \d+\)", re.DOTALL)

_KINDS: dict[type[inspect.Type], str] = {
    inspect.BoolType: "true or false",
    inspect.IntType: "a whole number",
    inspect.FloatType: "a number",
    inspect.StrType: "text in quotes",
    inspect.StructType: "a table",
    inspect.DictType: "a table",
    inspect.ListType: "a list",
    inspect.VarTupleType: "a list",
}


class Source(NamedTuple):
    """One file: its name, for people, and its text."""

    name: str
    text: str


def load(path: Path, settings: type[T]) -> T:
    """Read `path` and its fragments into `settings`.

    Raises:
        Misconfigured: A file cannot be read, or something in it is wrong.
    """
    try:
        sources = [
            Source(str(part), part.read_text("utf-8"))
            for part in (path, *sorted((path.parent / FRAGMENTS).glob("*.toml")))
        ]
    except OSError as error:
        raise Misconfigured(f"cannot read {error.filename}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Misconfigured(f"{path} or one of its fragments is not UTF-8 text: {error}") from error
    return parse(sources, settings)


def parse(sources: Sequence[Source], settings: type[T]) -> T:
    """Merge the texts, the later winning, and check them. Pure.

    Args:
        sources: The file, then its fragments; at least one.
        settings: A `msgspec.Struct`, with `forbid_unknown_fields` so that a misspelt key is noticed.

    Raises:
        Misconfigured: Names file and line, what was found and what is allowed.
    """
    merged: dict[str, Any] = {}
    for source in sources:
        merged = _merged(merged, _table(source))
    try:
        return msgspec.convert(merged, settings)
    except msgspec.ValidationError as error:
        raise Misconfigured(_explained(str(error), merged, sources, settings)) from error


def _table(source: Source) -> dict[str, Any]:
    try:
        return tomllib.loads(source.text)
    except tomllib.TOMLDecodeError as error:
        found = _SYNTAX.fullmatch(str(error))
        where, problem = (f":{found['line']}", found["problem"]) if found else ("", str(error))
        raise Misconfigured(f"{source.name}{where}: not TOML: {problem}") from error


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        merged[key] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def _explained(text: str, merged: dict[str, Any], sources: Sequence[Source], settings: type[Any]) -> str:
    """Turn msgspec's sentence into one for whoever edits the file."""
    where = _WHERE.fullmatch(text)
    assert where is not None, "the pattern matches any text"
    problem = where["problem"]
    keys = _keys(where["path"] or "", text, merged, settings)
    unknown, missing = _UNKNOWN.fullmatch(problem), _MISSING.fullmatch(problem)
    kind = _type_at(inspect.type_info(settings), keys)
    if unknown:
        wrong = (*keys, unknown["name"])
        return f"{_position(sources, wrong)}: unknown key {_dotted(wrong)}; {_alternatives(unknown['name'], kind)}"
    if missing:
        wrong = (*keys, missing["name"])
        allowed = _described(_type_at(kind, (missing["name"],)))
        return f"{_position(sources, keys)}: {_dotted(wrong)} is missing; allowed: {allowed}"
    if problem.startswith(("Expected ", "Invalid ")):
        found = _shown(_value_at(merged, keys))
        return f"{_position(sources, keys)}: {_dotted(keys)} is {found}; allowed: {_described(kind)}"
    return f"{_position(sources, keys)}: {f'{_dotted(keys)}: ' if keys else ''}{problem}"


def _keys(path: str, text: str, merged: dict[str, Any], settings: type[Any]) -> Keys:
    """The path as keys. msgspec writes `[...]` for any key of a dict: try which entry alone gives the same error."""
    keys: Keys = ()
    for step in _STEP.finditer(path):
        if step["any"]:
            names = _value_at(merged, keys)
            keys = next((*keys, name) for name in names if _fails(_only(merged, (*keys, name)), text, settings))
        else:
            keys = (*keys, step["name"] or int(step["index"]))
    return keys


def _fails(merged: dict[str, Any], text: str, settings: type[Any]) -> bool:
    try:
        msgspec.convert(merged, settings)
    except msgspec.ValidationError as error:
        return str(error) == text
    return False


def _only(value: Any, keys: Keys) -> Any:
    """`value` where the table that the last of `keys` is in has no other entry."""
    if len(keys) == 1:
        return {keys[0]: value[keys[0]]}
    inner = _only(value[keys[0]], keys[1:])
    if isinstance(value, list):
        return [inner if index == keys[0] else item for index, item in enumerate(value)]
    return {**value, keys[0]: inner}


def _value_at(value: Any, keys: Keys) -> Any:
    for key in keys:
        value = value[key]
    return value


def _holds(value: Any, keys: Keys) -> bool:
    try:
        _value_at(value, keys)
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _position(sources: Sequence[Source], keys: Keys) -> str:
    """`file:line` of the statement that set the key last, or the file alone where no statement did."""
    for source in reversed(sources):
        if keys and _holds(tomllib.loads(source.text), keys):
            return f"{source.name}:{_line(source.text, keys)}"
    return sources[0].name


def _line(text: str, keys: Keys) -> int:
    """The line, from 1, on which the statement that sets `keys` begins."""
    lines = text.splitlines(keepends=True)
    begin = 0
    for end in range(1, len(lines)):
        try:
            table = tomllib.loads("".join(lines[:end]))
        except tomllib.TOMLDecodeError:
            continue
        if _holds(table, keys):
            return begin + 1
        begin = end
    return begin + 1


def _type_at(kind: inspect.Type, keys: Keys) -> inspect.Type:
    for key in keys:
        kind = _inner(kind, key)
    return kind


def _inner(kind: inspect.Type, key: str | int) -> inspect.Type:
    if isinstance(kind, inspect.UnionType):  # an optional table
        kind = next(one for one in kind.types if not isinstance(one, inspect.NoneType))
    if isinstance(kind, inspect.StructType):
        return next(field.type for field in kind.fields if field.encode_name == key)
    if isinstance(kind, inspect.DictType):
        return kind.value_type
    assert isinstance(kind, inspect.ListType | inspect.VarTupleType), f"settings hold no {kind}"
    return kind.item_type


def _alternatives(name: str, kind: inspect.Type) -> str:
    if isinstance(kind, inspect.UnionType):
        kind = next(one for one in kind.types if isinstance(one, inspect.StructType))
    assert isinstance(kind, inspect.StructType), "only a struct knows its keys"
    known = [field.encode_name for field in kind.fields]
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"allowed: {', '.join(sorted(known))}"


def _described(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.UnionType):
        return " or ".join(_described(one) for one in kind.types if not isinstance(one, inspect.NoneType))
    if isinstance(kind, inspect.LiteralType):
        return " or ".join(_shown(value) for value in kind.values)
    text = _KINDS[type(kind)]
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        return text + _range(kind)
    if isinstance(kind, inspect.DictType) and kind.min_length:
        return f"{text} of at least {kind.min_length}"
    if isinstance(kind, inspect.StrType) and kind.pattern:
        return f"{text}, matching {kind.pattern}"
    return text


def _range(kind: inspect.IntType | inspect.FloatType) -> str:
    """Bounds are told together, although only one of them was overstepped."""
    if kind.ge is not None and kind.le is not None:
        return f" from {kind.ge} to {kind.le}"
    bounds = (("at least", kind.ge), ("more than", kind.gt), ("at most", kind.le), ("less than", kind.lt))
    told = " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)
    return f", {told}" if told else ""


def _shown(value: Any) -> str:
    """A value as TOML would have it, at most 60 characters of it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _dotted(keys: Keys) -> str:
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return text.removeprefix(".")
