"""`make demo`: the whole loop, once, with real parts. Exit status 0 only if every step held.

python -m demo [--seed N] [--keep] [--folder run/demo]
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from demo.scenes import Demo
from demo.screen import Screen
from demo.stage import Stage, StepFailed
from protocol.errors import EdgeswapError

MARK = ".made-by-demo"
INTERRUPTED = 130

app = App(name="demo", help="Show the whole loop once, live.")


@app.default
def main(
    *,
    seed: int = 1,
    keep: Annotated[bool, Parameter(negative="", help="Leave everything running until Ctrl-C.")] = False,
    folder: Annotated[Path, Parameter(help="Where everything goes; an earlier demo's is replaced.")] = Path("run/demo"),
) -> int:
    """Play, stream, train, sign, swap, judge, roll back; and say what was seen."""
    screen = Screen()
    if folder.exists() and not (folder / MARK).exists():
        screen.fact(f"{folder} exists and was not made by a demo; name another with --folder", good=False)
        return 2
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    try:
        stage = Stage(folder.resolve())
    except (EdgeswapError, StepFailed) as error:
        screen.fact(str(error), good=False)
        return 1
    demo = Demo(stage, screen, seed)
    held: bool | None = None
    try:
        held = demo.play()
        if held:
            demo.say_what_next(keep=keep)
        while keep:
            stage.observe(0.5)
    except KeyboardInterrupt:
        screen.console.print("\nstopped; ending broker, agent and host")
    finally:
        stage.close()
    return INTERRUPTED if held is None else 0 if held else 1


if __name__ == "__main__":
    sys.exit(app(result_action="return_value"))
