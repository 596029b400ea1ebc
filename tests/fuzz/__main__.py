"""Coverage-guided fuzzing of everything in `tests.fuzz.targets`, with atheris (https://github.com/google/atheris).

    make fuzz SECONDS=600                             every target, for its share of the time
    python -m tests.fuzz serving --seconds 60         one, in the environment that `make fuzz` makes
    python -m tests.fuzz serving --replay FILE        one input again, in any environment, with its traceback

Each target begins with good messages, spoilt as `tests.fuzz.mutation` does and as libFuzzer does; what reaches new code
is kept in its corpus for the next run. An input that raises what its target must not raise, takes too much memory or
too long, is saved, and the command to replay it is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import logging
import os
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.fuzz.targets import Target

FOLDER = Path(__file__).parents[2] / "run" / "fuzz"
PACKAGES = ["protocol", "edge_agent", "trainer_host"]
MAX_BYTES = 128 * 1024
MAX_MEMORY_MB = 1024
MAX_S = 20


def main() -> int:
    """Fuzz one target or all of them; the exit status is 1 if something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Coverage-guided fuzzing with atheris.")
    parser.add_argument("target", nargs="?", help="one target; all, if it is left out")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="try one saved input")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)  # refusals are logged, and there will be millions
    atheris: Any = None
    if options.replay is None:
        atheris = importlib.import_module("atheris")
        # It tells of each module.
        with contextlib.redirect_stderr(io.StringIO()), atheris.instrument_imports(include=PACKAGES):
            targets = importlib.import_module("tests.fuzz.targets").TARGETS
    else:
        targets = importlib.import_module("tests.fuzz.targets").TARGETS
    if options.target is not None and options.target not in targets:
        parser.error(f"no target {options.target}; there are {', '.join(targets)}")
    if options.replay is not None:
        if options.target is None:
            parser.error("--replay needs a target")
        replay(targets[options.target], options.replay.read_bytes())
        return 0
    chosen = [options.target] if options.target else list(targets)
    share_s = max(int(options.seconds / len(chosen)), 1)
    found = [name for name in chosen if fuzz(atheris, name, targets[name], share_s)]
    say(f"{len(chosen)} targets for {share_s} s each; found something in: {', '.join(found) or 'none'}")
    return 1 if found else 0


def replay(target: Target, data: bytes) -> None:
    """Try one input; what the target may raise is said, anything else is raised."""
    with tempfile.TemporaryDirectory() as folder:
        attempt = target.prepare(Path(folder))
        try:
            attempt(data)
        except target.raises as error:
            say(f"refused, as it may: {error!r}")
            return
    say("taken")


def fuzz(atheris: Any, name: str, target: Target, seconds: int) -> bool:
    """Fuzz one target in a process of its own. Returns whether something was found."""
    place = FOLDER / name
    corpus = place / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    before = saved_in(place)
    say(f"{name}: {seconds} s")
    child = os.fork()  # libFuzzer ends its process, and our packages need be instrumented only once
    if not child:
        run(atheris, target, place, seconds)
    _, status = os.waitpid(child, 0)
    saved = saved_in(place) - before
    for path in sorted(saved):
        say(f"{name}: FOUND; again by: python -m tests.fuzz {name} --replay {path}")
    if status and not saved:
        say(f"{name}: FOUND, but nothing was saved; see {place / 'log'}")
    return status != 0


def saved_in(place: Path) -> set[Path]:
    """What libFuzzer saved of what it found."""
    return {path for kind in ("crash", "oom", "timeout", "leak") for path in place.glob(f"{kind}-*")}


def run(atheris: Any, target: Target, place: Path, seconds: int) -> None:
    """Become the fuzzer of one target; does not return. Its output goes to a log beside the corpus."""
    log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    with tempfile.TemporaryDirectory() as folder:
        attempt = target.prepare(Path(folder))

        def one(data: bytes) -> None:
            with contextlib.suppress(*target.raises):
                attempt(data)

        arguments = [
            sys.argv[0],
            f"-max_total_time={seconds}",
            f"-max_len={MAX_BYTES}",
            f"-rss_limit_mb={MAX_MEMORY_MB}",
            f"-timeout={MAX_S}",
            f"-artifact_prefix={place}/",
            str(place / "corpus"),
        ]
        atheris.Setup(arguments, one, custom_mutator=lambda *given: changed(atheris, *given))
        atheris.Fuzz()
    os._exit(0)


def changed(atheris: Any, data: bytes, max_size: int, seed: int) -> bytes:
    """Half the time as libFuzzer likes, half the time as one who knows what messages look like."""
    random = Random(seed)
    if random.random() < 0.5:
        return bytes(atheris.Mutate(data, max_size))
    from tests.fuzz.mutation import mutated, raw  # noqa: PLC0415  # after the packages it imports were instrumented

    return (raw(random) if random.random() < 0.05 else mutated(data, random))[:max_size]


def say(text: str) -> None:
    """Tell the person at the terminal."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
