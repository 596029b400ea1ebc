"""Draws the deployment machine from its table, as Mermaid.

python scripts/state_diagram.py                          print it
python scripts/state_diagram.py --check docs/design.md   fail if the drawing in that file is not this one
python scripts/state_diagram.py --write docs/design.md   put it there
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edge_agent.deployment import ROWS, Serving, stay

BEGIN = "<!-- state diagram -->\n"
END = "<!-- /state diagram -->"


def diagram() -> str:
    """The table as a `stateDiagram-v2`, one arrow for each two states; rows that change nothing are left out."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for row in ROWS:
        if row.do is not stay:
            for to in row.goes_to:
                arrows.setdefault((row.state.__name__, to.__name__), []).append(row.event.__name__)
    lines = ["stateDiagram-v2", f"    [*] --> {Serving.__name__}"]
    lines += [f"    {start} --> {end}: {', '.join(events)}" for (start, end), events in arrows.items()]
    return "\n".join(lines) + "\n"


def replaced(page: str) -> str:
    """A page with the drawing between its two marks.

    Raises:
        ValueError: It has not both marks, once and in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"there must be one {BEGIN.strip()} and, after it, one {END}")
    return f"{before}{BEGIN}```mermaid\n{diagram()}```\n{END}{after}"


def main() -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--check", type=Path, metavar="PAGE")
    where.add_argument("--write", type=Path, metavar="PAGE")
    options = parser.parse_args()
    path: Path | None = options.check or options.write
    if path is None:
        print(diagram(), end="")
        return 0
    page = path.read_text(encoding="utf-8")
    try:
        wanted = replaced(page)
    except ValueError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 2
    if options.write:
        path.write_text(wanted, encoding="utf-8")
    elif page != wanted:
        print(f"{path}: the state diagram is not that of the table; run with --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
