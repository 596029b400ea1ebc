"""What the viewer sees: scenes, facts, a line that moves, a closing table."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

PLAIN_INTERVAL_S = 5.0


class Screen:
    """A terminal, or a log file where there is none: then moving lines are printed now and then."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self._live = sys.stdout.isatty()
        self._began = time.monotonic()
        self._printed_at = 0.0
        self._scene = 0

    def scene(self, title: str) -> None:
        """Begin a scene."""
        self._scene += 1
        elapsed_s = time.monotonic() - self._began
        self.console.print(f"\n[bold cyan]{self._scene}  {title}[/] [dim]({elapsed_s:.0f}\u00a0s)[/]")

    def fact(self, text: str, *, good: bool | None = None) -> None:
        """Print something that was observed."""
        mark = {True: "[green]✔[/]", False: "[red]✘[/]", None: " "}[good]
        self.console.print(f"  {mark} {text}")

    @contextmanager
    def moving(self) -> Iterator[Moving]:
        """A line that changes until the block ends."""
        if self._live:
            with self.console.status("") as status:
                yield Moving(status.update)
        else:
            yield Moving(self._now_and_then)

    def progress(self) -> Progress:
        """A progress bar for epochs."""
        return Progress(
            TextColumn("    epoch"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self.console,
        )

    def table(self, title: str, rows: list[tuple[str, str, str]]) -> None:
        """The closing table: step, whether it held, what was seen."""
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        for column in ("step", "held", "what was seen"):
            table.add_column(column)
        for step, held, seen in rows:
            table.add_row(step, held, seen)
        self.console.print()
        self.console.print(table)

    def _now_and_then(self, text: str) -> None:
        if time.monotonic() - self._printed_at >= PLAIN_INTERVAL_S:
            self._printed_at = time.monotonic()
            self.console.print(f"    {text}")


class Moving:
    """A line that can be changed."""

    def __init__(self, change: Callable[[str], None]) -> None:
        self._change = change

    def show(self, text: str) -> None:
        """Show another text."""
        self._change(text)
