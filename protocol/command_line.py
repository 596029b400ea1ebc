"""What the two command lines share: exit codes, tables, findings.

Exit codes: 0 done, 1 a check failed or something was refused, 2 the command or the configuration is wrong, 3 something
outside is not available.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from msgspec import Struct, to_builtins

from protocol.errors import Misconfigured, Rejected, Unavailable

EXIT_CODES = (
    "Exit codes: 0 done, 1 a check failed or something was refused, 2 the command or the configuration is wrong, "
    "3 something outside is not available."
)
DONE = 0
REFUSED = 1
USAGE = 2
UNAVAILABLE = 3

SHORT = 24
PIPED_WIDTH = 160

JsonFlag = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON instead of a table.")]


class Health(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


class Finding(Struct, frozen=True):
    """One check of a doctor.

    Attributes:
        name: What was checked.
        health: How it is.
        detail: What was found.
        remedy: What to do about it; empty where nothing is to be done.
    """

    name: str
    health: Health
    detail: str
    remedy: str = ""


def run(app: App, argv: Sequence[str] | None = None) -> int:
    """Run a command, and turn what it raises into one line on stderr and an exit code."""
    try:
        result = app(argv, exit_on_error=False, print_error=True, result_action="return_value")
    except CycloptsError:
        return USAGE  # it has been explained already
    except Rejected as error:
        return _failed(error, REFUSED)
    except Misconfigured as error:
        return _failed(error, USAGE)
    except Unavailable as error:
        return _failed(error, UNAVAILABLE)
    return result if isinstance(result, int) else DONE


def show(rows: Sequence[Mapping[str, Any]], *, title: str, as_json: bool = False) -> None:
    """Print rows as a table with the first row's keys as its head, or as JSON."""
    if as_json:
        sys.stdout.write(json.dumps(to_builtins(rows), indent=2) + "\n")
        return
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    if not rows:
        console.print(f"{title}: nothing to show")
        return
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD)
    for column in rows[0]:
        longest = max(len(str(row[column])) for row in rows)
        table.add_column(column, no_wrap=longest <= SHORT, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    console.print(table)


def show_findings(findings: Sequence[Finding], *, as_json: bool = False) -> int:
    """Print what a doctor found. Returns the exit code: 1 if any check failed."""
    show([to_builtins(finding) for finding in findings], title="doctor", as_json=as_json)
    return REFUSED if any(finding.health is Health.FAILED for finding in findings) else DONE


def _failed(error: Exception, code: int) -> int:
    sys.stderr.write(f"error: {error}\n")
    return code
