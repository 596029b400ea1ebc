"""A figure, its yardstick, and the table of them."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Sequence

from msgspec import Struct, to_builtins
from rich.console import Console
from rich.table import Table


class Figure(Struct, frozen=True, kw_only=True):
    """One line of the table.

    Attributes:
        name: What was measured.
        value: In `unit`.
        unit: Of value and yardstick.
        yardstick: What it is compared with, measured in the same run; empty where the target is absolute.
        yardstick_value: In `unit`.
        ratio: Value over yardstick, or the other way round where more is better.
        target: What was promised, in words.
        met: Whether it holds; `None` where nothing was promised.
        note: What costs it.
    """

    name: str
    value: float
    unit: str
    yardstick: str = ""
    yardstick_value: float | None = None
    ratio: float | None = None
    target: str = ""
    met: bool | None = None
    note: str = ""


def compared(
    name: str,
    unit: str,
    value: float,
    yardstick: tuple[str, float],
    *,
    most: float | None = None,
    more_is_better: bool = False,
) -> Figure:
    """A figure beside its yardstick, and, with `most`, the largest ratio that was promised."""
    what, other = yardstick
    ratio = (other / value if more_is_better else value / other) if value and other else None
    return Figure(
        name=name,
        value=value,
        unit=unit,
        yardstick=what,
        yardstick_value=other,
        ratio=ratio,
        target="" if most is None else f"≤ {most:g}x",
        met=None if most is None else ratio is not None and ratio <= most,
    )


def bounded(name: str, unit: str, value: float, most: float, note: str = "") -> Figure:
    """A figure with an absolute bound."""
    return Figure(name=name, value=value, unit=unit, target=f"≤ {most:g} {unit}", met=value <= most, note=note)


def median(values: Iterable[float]) -> float:
    """The middle one: one disturbed run does not change it."""
    return statistics.median(values)


def show(figures: Sequence[Figure], *, as_json: bool) -> None:
    """Print the table."""
    if as_json:
        sys.stdout.write(json.dumps(to_builtins(figures), indent=2, ensure_ascii=False) + "\n")
        return
    table = Table(title="medians of several runs; the yardstick is measured in between", title_justify="left")
    for column in ("what", "figure", "yardstick", "", "ratio", "target", "met", "note"):
        table.add_column(column, justify="right" if column in {"figure", "ratio", "yardstick"} else "left")
    for figure in figures:
        other = "" if figure.yardstick_value is None else f"{_number(figure.yardstick_value)} {figure.unit}"
        met = {None: "", True: "yes", False: "[bold red]no[/]"}[figure.met]
        ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}x"
        value = f"{_number(figure.value)} {figure.unit}"
        table.add_row(figure.name, value, other, figure.yardstick, ratio, figure.target, met, figure.note)
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
