"""`edge-agent`: from the command line to settings to the parts, and nothing else.

Exit codes: 0 done, 1 a check failed, 2 the command or the configuration is wrong, 3 something outside is not available.
"""

from __future__ import annotations

import importlib.metadata
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from edge_agent import settings as configuration
from protocol import command_line
from protocol.command_line import EXIT_CODES, JsonFlag
from protocol.errors import EdgeswapError, Unavailable
from protocol.messages import ModelRef, Status, TransferStatus

ConfigFile = Annotated[
    Path | None, Parameter(name="--config", help="TOML file; fragments beside it in conf.d/*.toml are merged in.")
]

PROGRAM = "edge-agent"

# The daemon writes it once a minute at least.
MAX_STATUS_AGE_S = 180.0

app = App(
    name=PROGRAM,
    help=f"Answers a game's battle states on this device, and keeps its models up to date.\n\n{EXIT_CODES}",
    version=importlib.metadata.version("edgeswap"),
)
app.register_install_completion_command()


@app.command
def run(*, config: ConfigFile = None) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    from edge_agent.supervisor import Supervisor  # noqa: PLC0415
    from protocol import service  # noqa: PLC0415
    from protocol.lock import only_daemon  # noqa: PLC0415

    settings = configuration.load(config)
    service.set_up_logging()
    stop: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda number, _frame: stop.append(number))
    try:
        with only_daemon(Path(settings.state_dir), PROGRAM):
            Supervisor(settings).run(lambda: bool(stop))
    except EdgeswapError:
        raise  # one line on stderr, by the caller
    except Exception:
        logging.getLogger("edge_agent").exception("the supervisor failed")
        raise
    return 0


@app.command
def status(*, config: ConfigFile = None, json: JsonFlag = False) -> int:
    """Show what each slot serves and what is going on. Exit code 1 if a slot is not ready."""
    settings = configuration.load(config)
    path = Path(settings.runtime_dir) / "status.json"
    try:
        data = path.read_bytes()
        age_s = time.time() - path.stat().st_mtime
    except OSError as error:
        raise Unavailable(f"no status in {path}: is the daemon running? ({error.strerror})") from error
    if age_s > MAX_STATUS_AGE_S:
        raise Unavailable(f"the last status in {path} is {age_s:.0f} s old: is the daemon running?")
    said = msgspec.json.decode(data, type=Status)
    if json:
        sys.stdout.write(data.decode() + "\n")
    else:
        rows = [
            {
                "slot": name,
                "phase": slot.phase,
                "ready": "yes" if slot.ready else "no",
                "active": _named(slot.active),
                "previous": _named(slot.previous),
                "candidate": _named(slot.candidate),
                "transfer": _described(slot.transfer) if slot.transfer else "",
                "last verdict": slot.verdict.outcome if slot.verdict else "",
                "last refusal": slot.refusal or "",
            }
            for name, slot in said.slots.items()
        ]
        command_line.show(rows, title=f"{settings.device}: {said.runtime}, status changed {age_s:.0f} s ago")
    return 0 if all(slot.ready for slot in said.slots.values()) else 1


@app.command
def history(*, slot: str | None = None, limit: int = 20, config: ConfigFile = None, json: JsonFlag = False) -> int:
    """Show what happened to the models on this device, the newest last."""
    from edge_agent.trail import read_history  # noqa: PLC0415

    settings = configuration.load(config)
    events = read_history(Path(settings.state_dir) / "trail.db", limit, slot)
    rows = [
        {
            "when": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.at)),
            "event": event.kind,
            "slot": event.slot,
            "model": f"{event.version} ({event.model[:8]})" if event.version is not None else event.model[:8],
            "what": event.text or event.reason,
        }
        for event in events
    ]
    command_line.show(msgspec.to_builtins(events) if json else rows, title=settings.device, as_json=json)
    return 0


@app.command
def install(
    file: Annotated[Path, Parameter(help="A bundle, as `trainer-host bundle` makes it.")],
    *,
    check: Annotated[bool, Parameter(negative="", help="Only try it, and change nothing on this device.")] = False,
    config: ConfigFile = None,
    json: JsonFlag = False,
) -> int:
    """Install signed models from a file, without any network, and say what became of them.

    Exit code 1 if something was refused, 3 if it could not be done now: then the daemon tries again.
    """
    from edge_agent import installing  # noqa: PLC0415

    settings = configuration.load(config)
    outcome = installing.check(settings, file) if check else installing.install(settings, file)
    if json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(outcome)).decode() + "\n")
    elif outcome.accepted:
        command_line.show(installing.rows(outcome, checked=check), title=f"{file.name} on {settings.device}")
    else:
        sys.stdout.write(f"{file.name} is not accepted: {outcome.text} ({outcome.reason})\n")
    return installing.exit_code(outcome, checked=check)


@app.command
def doctor(*, config: ConfigFile = None, json: JsonFlag = False) -> int:
    """Check this device's set-up, and say what to do about each finding. Exit code 1 if a check failed."""
    from edge_agent.doctor import examine  # noqa: PLC0415

    return command_line.show_findings(examine(configuration.load(config)), as_json=json)


@app.command
def version() -> int:
    """Print the version of this software."""
    sys.stdout.write(importlib.metadata.version("edgeswap") + "\n")
    return 0


def _named(model: ModelRef | None) -> str:
    return f"{model.version} ({model.digest[:8]})" if model else ""


def _described(transfer: TransferStatus) -> str:
    """How far it has come: `12.3 of 100.0 MB (12%), 4.5 MB/s, 19 s left`."""
    parts = [
        f"{transfer.bytes / 1e6:.1f} of {transfer.total / 1e6:.1f} MB ({transfer.bytes / max(transfer.total, 1):.0%})"
    ]
    if transfer.waiting:
        parts.append(f"waits: {transfer.waiting}")
    elif transfer.seconds_left is not None:
        parts += [f"{transfer.rate_bytes_s / 1e6:.1f} MB/s", f"{transfer.seconds_left:.0f} s left"]
    return ", ".join(parts)


def main() -> None:
    """The console script."""
    sys.exit(command_line.run(app))


if __name__ == "__main__":
    main()
