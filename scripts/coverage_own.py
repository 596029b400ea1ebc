"""Checks that each pure module is covered to 100%, lines and branches, by its own test file alone.

Coverage by accident, from tests of something else, says nothing. Which modules are pure stands once, in the import
contract of that name in pyproject.toml.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = "pure"
# Its decisions are pure, its one function that reads files is not.
FURTHER = ("protocol.configuration",)


def pure_modules() -> list[str]:
    """The contract's modules."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    modules: list[str] = next(contract["source_modules"] for contract in contracts if contract["id"] == CONTRACT)
    return sorted([*modules, *FURTHER])


def test_file(module: str) -> Path:
    """`trainer_host.arena.rules` is tested by `tests/unit/trainer_host/test_arena_rules.py`."""
    package, _, rest = module.partition(".")
    return Path("tests/unit") / package / f"test_{rest.replace('.', '_')}.py"


def covered(module: str) -> bool:
    """Run the module's own tests; show their output where they fail or leave something out."""
    tests = test_file(module)
    if not (ROOT / tests).is_file():
        sys.stdout.write(f"{module}: no {tests}\n")
        return False
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(tests)]
    measure = [f"--cov={module}", "--cov-branch", "--cov-report=term-missing:skip-covered", "--cov-fail-under=100"]
    ended = subprocess.run([*command, *measure], cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.stdout.write(f"{module}: not covered by {tests}\n{ended.stdout}{ended.stderr}\n")
    else:
        sys.stdout.write(f"{module}: 100% by {tests}\n")
    sys.stdout.flush()
    return ended.returncode == 0


def main() -> int:
    """Check all of them, and fail if any falls short."""
    modules = pure_modules()
    short = [module for module in modules if not covered(module)]
    sys.stdout.write(f"{len(modules) - len(short)} of {len(modules)} pure modules covered by their own tests\n")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
