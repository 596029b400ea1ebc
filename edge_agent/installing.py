"""`edge-agent install`: hand a bundle to the daemon, show how far it has come, and wait for what became of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

from edge_agent.inbox import FOLDER, Outcome, read_result, submit
from edge_agent.rehearsal import rehearse
from edge_agent.settings import Settings
from edge_agent.staging import Progress
from protocol.command_line import DONE, REFUSED, UNAVAILABLE
from protocol.errors import Unavailable
from protocol.lock import is_running
from protocol.messages import Status

DAEMON = "edge-agent"
POLL_S = 0.2
# How long a daemon that was there may be away, e.g. because it is being restarted.
RESTART_S = 30.0

_CHECKED = {"staged": "would be taken", "refused": "would be refused", "postponed": "cannot be had"}

Tell = Callable[[str, int, int], None]


def install(settings: Settings, bundle: Path) -> Outcome:
    """Put a bundle into the inbox, and wait for what the daemon says of it.

    Raises:
        Rejected: With code `bad_bundle`.
        Unavailable: It cannot be copied; or no daemon is running, and it waits there for one.
    """
    state_dir = Path(settings.state_dir)
    name = submit(state_dir, bundle)
    patience_s, missed_at = 0.0, time.monotonic()
    with _bars() as tell:
        while (outcome := read_result(state_dir, name)) is None:
            now = time.monotonic()
            if is_running(state_dir, DAEMON):
                patience_s, missed_at = RESTART_S, now
            elif now - missed_at >= patience_s:
                text = f"{name} waits in {state_dir / FOLDER} until the daemon runs; it is not running now"
                raise Unavailable(text)
            tell_status(Path(settings.runtime_dir) / "status.json", tell)
            time.sleep(POLL_S)
    return outcome


def check(settings: Settings, bundle: Path) -> Outcome:
    """Find out what would become of a bundle, and change nothing.

    Raises:
        Unavailable: The bundle or the device's folders cannot be read.
    """
    with _bars() as tell:

        def told(progress: Progress) -> None:
            tell(progress.digest[:8], progress.bytes, progress.total)

        return rehearse(settings, bundle, told)


def rows(outcome: Outcome, *, checked: bool) -> list[dict[str, str]]:
    """An outcome for people, a row for each release."""
    return [
        {
            "slot": release.slot,
            "model": f"{release.version} ({release.model[:8]})",
            "outcome": _CHECKED.get(release.ending, release.ending) if checked else release.ending,
            "why": f"{release.reason}: {release.text}" if release.reason else release.text,
        }
        for release in outcome.releases
    ]


def exit_code(outcome: Outcome, *, checked: bool) -> int:
    """0 if all went well, 1 if something was refused, 3 if something could not be had now; a check has 0 and 1 only."""
    if outcome.has("refused") or not (outcome.accepted or outcome.passing):
        return REFUSED
    if outcome.has("postponed") or not outcome.accepted:
        return REFUSED if checked else UNAVAILABLE
    return DONE


def tell_status(path: Path, tell: Tell) -> None:
    """Tell what the daemon's status says of transfers; one that cannot be read says nothing."""
    try:
        status = msgspec.json.decode(path.read_bytes(), type=Status)
    except (OSError, msgspec.DecodeError):
        return
    for name, slot in status.slots.items():
        if slot.transfer is not None and slot.transfer.total:
            tell(name, slot.transfer.bytes, slot.transfer.total)


@contextmanager
def _bars() -> Iterator[Tell]:
    """Bars on a terminal's stderr: told a name, the bytes that are here, and those there will be."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:

        def tell(name: str, here: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name)
            bars.update(tasks[name], completed=here, total=total)

        yield tell
