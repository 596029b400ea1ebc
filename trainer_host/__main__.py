"""`trainer-host`: from the command line to settings to the parts, and nothing else.

Exit codes: 0 done, 1 a check failed or a model was refused, 2 the command or the configuration is wrong, 3 something
outside is not available.

Everything heavy is imported by the command that needs it, so that help and completion come at once.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from protocol import command_line
from protocol.command_line import DONE, EXIT_CODES, REFUSED, USAGE, JsonFlag
from trainer_host.key_commands import accept, keys_app, sign
from trainer_host.options import ConfigFile
from trainer_host.options import settings_of as _settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trainer_host.publisher import Outcome
    from trainer_host.registry import Model
    from trainer_host.wiring import Parts
    from trainer_host.wishes import Edit, Said

Which = Annotated[str, Parameter(help="Which recipe.")]
SlotName = Annotated[str, Parameter(help="Which slot.")]
Devices = Annotated[
    tuple[str, ...], Parameter(name="--device", negative="", help="A device it is for; may be repeated.")
]
Groups = Annotated[
    tuple[str, ...],
    Parameter(name="--group", negative="", help="A group it is for; may be repeated. Without either, it is for all."),
]
Note = Annotated[str, Parameter(help="For people; it is signed with the wish.")]
Notes = Annotated[str, Parameter(help="For people; they travel with the release.")]

app = App(
    name="trainer-host",
    help=f"Stores what devices play, learns from it, and releases signed models.\n\n{EXIT_CODES}",
    version=importlib.metadata.version("edgeswap"),
)
app.command(keys_app)
app.command(sign)
app.command(accept)
app.register_install_completion_command()


@app.command
def run(*, config: ConfigFile = None) -> int:
    """Store, train, sign and serve until SIGTERM or Ctrl-C."""
    import signal  # noqa: PLC0415
    from threading import Event  # noqa: PLC0415

    from protocol import service  # noqa: PLC0415
    from protocol.errors import EdgeswapError  # noqa: PLC0415
    from protocol.lock import only_daemon  # noqa: PLC0415
    from trainer_host.daemon import Host  # noqa: PLC0415
    from trainer_host.settings import PROGRAM  # noqa: PLC0415
    from trainer_host.wiring import assemble  # noqa: PLC0415

    settings = _settings(config)
    service.set_up_logging()
    logging.getLogger("tuf.api").setLevel(logging.WARNING)  # it tells of every key that has not signed
    told: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda number, _frame: told.append(number))
    stop = Event()
    try:
        with only_daemon(Path(settings.state_dir), PROGRAM):
            Host(assemble(settings, stop), stop).run(lambda: bool(told))
    except EdgeswapError:
        raise
    except Exception:
        logging.getLogger("trainer_host").exception("the host failed")
        return REFUSED
    return DONE


@app.command
def train(recipe: Which = "combat", *, notes: Notes = "", config: ConfigFile = None, json: JsonFlag = False) -> int:
    """Train a recipe on what is stored, and release what passes the gate."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    from trainer_host import jobs  # noqa: PLC0415
    from trainer_host.wiring import assemble  # noqa: PLC0415

    parts = assemble(_settings(config))
    chosen = parts.settings.recipe(recipe)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("validation accuracy {task.fields[accuracy]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"training {recipe}, epoch", total=chosen.learner.epochs, accuracy="?")

        def progressed(epoch: jobs.Progress) -> None:
            bar.update(task, completed=epoch.epoch, total=epoch.epochs, accuracy=f"{epoch.val_accuracy:.1%}")

        outcome = parts.trainer.train(chosen, notes=notes, on_progress=progressed)
    return _announced(parts, outcome, as_json=json)


@app.command
def publish(
    file: Annotated[Path, Parameter(help="The model; a NAME.toml beside it, as in the inbox, says what it is.")],
    *,
    slot: Annotated[str | None, Parameter(help="Which slot it is for; by default as the TOML file says.")] = None,
    notes: Notes = "",
    config: ConfigFile = None,
    json: JsonFlag = False,
) -> int:
    """Release a TFLite file that was made elsewhere, if it passes the gate."""
    from msgspec.structs import replace  # noqa: PLC0415

    from protocol.errors import Misconfigured  # noqa: PLC0415
    from protocol.topics import checked_name  # noqa: PLC0415
    from trainer_host.inbox import DESCRIPTION, Description, read_description  # noqa: PLC0415
    from trainer_host.wiring import assemble  # noqa: PLC0415

    parts = assemble(_settings(config))
    beside = file.with_suffix(DESCRIPTION)
    if beside.is_file():
        description = read_description(beside)
    elif slot is not None:
        description = Description(slot=slot)
    else:
        raise Misconfigured(f"which slot is {file.name} for? Say so with --slot, or in {beside}")
    description = replace(
        description,
        slot=checked_name(slot or description.slot, "slot"),
        notes=notes or description.notes,
    )
    return _announced(parts, parts.publisher.deliver(file, description), as_json=json)


@app.command
def bundle(
    out: Annotated[Path, Parameter(help="The file to write, e.g. models.bundle.")],
    *,
    slot: Annotated[tuple[str, ...], Parameter(negative="", help="Only this slot's models; may be repeated.")] = (),
    config: ConfigFile = None,
    json: JsonFlag = False,
) -> int:
    """Write the signed metadata and the models devices should serve into one file, for `edge-agent install`."""
    from datetime import UTC, datetime  # noqa: PLC0415

    from msgspec import to_builtins  # noqa: PLC0415
    from msgspec.json import encode, format  # noqa: A004, PLC0415

    from trainer_host.bundling import make_bundle  # noqa: PLC0415
    from trainer_host.repository import Repository  # noqa: PLC0415

    contents = make_bundle(Repository(_settings(config).repository_dir), out, slot, datetime.now(UTC))
    if json:
        sys.stdout.write(format(encode(contents)).decode() + "\n")
        return DONE
    command_line.show(to_builtins(contents.models), title=f"{out}, {contents.bytes:,} bytes")
    sys.stdout.write(f"Devices accept it until {contents.expires:%Y-%m-%d %H:%M} UTC. Then make a new one.\n")
    return DONE


@app.command
def models(*, slot: str | None = None, limit: int = 20, config: ConfigFile = None, json: JsonFlag = False) -> int:
    """Show the models there were, the newest last."""
    import time  # noqa: PLC0415

    from msgspec import to_builtins  # noqa: PLC0415

    from trainer_host import fleet  # noqa: PLC0415
    from trainer_host.database import Database  # noqa: PLC0415
    from trainer_host.registry import Registry  # noqa: PLC0415
    from trainer_host.store import Store  # noqa: PLC0415

    database = Database(_settings(config).database)
    found, store = Registry(database).models(limit, slot), Store(database)
    serving, outcomes = fleet.serving(store.devices()), store.outcomes()
    rows = [
        {
            "when": time.strftime("%Y-%m-%d %H:%M", time.localtime(model.created_at)),
            "slot": model.slot,
            "version": "" if model.version is None else model.version,
            "digest": model.digest[:8],
            "origin": model.origin,
            "state": model.state.value,
            "transitions": model.lineage.transitions or "",
            "accuracy": _share(model.lineage.metrics.get("decision_accuracy")),
            "wins": _share(_win_rate(model.gate)),
            "served by": _some(serving, model),
            "refused by": _some({key: told.get("refused", 0) for key, told in outcomes.items()}, model),
            "notes": model.reason or model.notes,
        }
        for model in found
    ]
    command_line.show(to_builtins(found) if json else rows, title="models", as_json=json)
    return DONE


@app.command
def devices(*, config: ConfigFile = None, json: JsonFlag = False) -> int:
    """Show every device that was seen, and what it serves."""
    import time  # noqa: PLC0415

    from trainer_host import fleet  # noqa: PLC0415
    from trainer_host.database import Database  # noqa: PLC0415
    from trainer_host.store import Store  # noqa: PLC0415

    found = Store(Database(_settings(config).database)).devices()
    rows = fleet.details(found) if json else fleet.table(found, time.time())
    command_line.show(rows, title="devices", as_json=json)
    return DONE


@app.command
def pin(
    slot: SlotName,
    version: Annotated[int, Parameter(help="Which released version.")],
    *,
    device: Devices = (),
    group: Groups = (),
    note: Note = "",
    config: ConfigFile = None,
) -> int:
    """Have devices serve one version of a slot, without a trial, until it is unpinned."""
    from trainer_host import wishes  # noqa: PLC0415

    whom = wishes.whom(device, group)
    return _wished(slot, lambda said: wishes.pin(slot, version, whom, said), note, config)


@app.command
def unpin(slot: SlotName, *, device: Devices = (), group: Groups = (), config: ConfigFile = None) -> int:
    """Lift a pin: the devices take newer versions again."""
    from trainer_host import wishes  # noqa: PLC0415

    whom = wishes.whom(device, group)
    return _wished(slot, lambda _said: wishes.unpin(slot, whom), "", config)


@app.command
def rollback(
    slot: SlotName,
    *,
    version: Annotated[int | None, Parameter(help="Which version; by default the newest released one.")] = None,
    device: Devices = (),
    group: Groups = (),
    note: Note = "",
    config: ConfigFile = None,
) -> int:
    """Withdraw a version of a slot: devices that serve it go back to the one before, and none takes it any more."""
    from trainer_host import wishes  # noqa: PLC0415

    whom = wishes.whom(device, group)
    return _wished(slot, lambda said: wishes.withdraw(slot, version, whom, said), note, config)


@app.command
def restore(
    slot: SlotName,
    version: Annotated[int, Parameter(help="Which withdrawn version.")],
    *,
    device: Devices = (),
    group: Groups = (),
    config: ConfigFile = None,
) -> int:
    """Lift the withdrawal of a version."""
    from trainer_host import wishes  # noqa: PLC0415

    whom = wishes.whom(device, group)
    return _wished(slot, lambda _said: wishes.restore(slot, version, whom), "", config)


@app.command(name="wishes")
def list_wishes(*, config: ConfigFile = None, json: JsonFlag = False) -> int:
    """Show what is pinned and what is withdrawn, the newest last."""
    from msgspec import to_builtins  # noqa: PLC0415

    from trainer_host import wishes  # noqa: PLC0415
    from trainer_host.repository import Repository  # noqa: PLC0415

    found = Repository(_settings(config).repository_dir).wishes()
    command_line.show(to_builtins(found) if json else wishes.rows(found), title="wishes", as_json=json)
    return DONE


@app.command(name="history")
def show_history(*, slot: str | None = None, limit: int = 20, config: ConfigFile = None, json: JsonFlag = False) -> int:
    """Show what was released, dropped and wished, when, by which keys, and what devices made of it; the newest last."""
    from msgspec import to_builtins  # noqa: PLC0415

    from trainer_host import history  # noqa: PLC0415

    found = history.of(_settings(config), slot=slot, limit=limit)
    command_line.show(to_builtins(found) if json else history.rows(found), title="history", as_json=json)
    return DONE


@app.command
def status(*, config: ConfigFile = None, json: JsonFlag = False) -> int:
    """Show what is stored and released. Exit code 1 if the daemon is not running."""
    from datetime import UTC, datetime  # noqa: PLC0415

    from msgspec.json import encode, format  # noqa: A004, PLC0415

    from trainer_host import overview  # noqa: PLC0415

    found = overview.read(_settings(config), datetime.now(UTC))
    if json:
        sys.stdout.write(format(encode(found)).decode() + "\n")
    else:
        command_line.show(overview.facts(found), title="trainer-host")
        command_line.show(overview.slot_rows(found), title="slots")
        command_line.show(overview.battle_rows(found), title="battles")
    return DONE if found.running else REFUSED


@app.command
def doctor(*, config: ConfigFile = None, json: JsonFlag = False) -> int:
    """Check this host's set-up, and say what to do about each finding. Exit code 1 if a check failed."""
    from trainer_host.doctor import examine  # noqa: PLC0415

    return command_line.show_findings(examine(_settings(config)), as_json=json)


@app.command
def version() -> int:
    """Print the version of this software."""
    sys.stdout.write(importlib.metadata.version("edgeswap") + "\n")
    return DONE


def _wished(slot: str, edit: Callable[[Said], Edit], note: str, config: Path | None) -> int:
    """Sign a wish, say what it comes to, and put the metadata on the broker; also where it was signed before."""
    from datetime import UTC, datetime  # noqa: PLC0415

    from trainer_host import wishes  # noqa: PLC0415
    from trainer_host.custody import open_repository  # noqa: PLC0415
    from trainer_host.metadata_topic import publish_once  # noqa: PLC0415

    settings = _settings(config)
    repository, now = open_repository(settings), datetime.now(UTC)
    text = wishes.carry_out(repository, slot, edit(wishes.said_here(now.timestamp(), note)), now)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    repository.copy_root(settings.root_file)
    publish_once(settings.broker, settings.client_id, repository.metadata_set())
    return DONE


def _announced(parts: Parts, outcome: Outcome, *, as_json: bool) -> int:
    """Say what became of a model, and put the metadata on the broker if it was released."""
    from msgspec.json import encode  # noqa: PLC0415

    from trainer_host.metadata_topic import publish_once  # noqa: PLC0415

    sys.stdout.write((encode(outcome).decode() if as_json else outcome.text) + "\n")
    sys.stdout.flush()
    if not outcome.released:
        return REFUSED
    settings = parts.settings
    publish_once(settings.broker, settings.client_id, parts.repository.metadata_set())
    return DONE


def _some(counts: Mapping[tuple[str, int], int], model: Model) -> str:
    count = 0 if model.version is None else counts.get((model.slot, model.version), 0)
    return str(count) if count else ""


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _win_rate(gate: dict[str, object] | None) -> float | None:
    battles = gate.get("candidate") if gate else None
    return battles[1] / battles[0] if isinstance(battles, list) and battles[0] else None


def main() -> None:
    """The console script."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")  # a daemon's warnings are no command's output
    try:
        code = command_line.run(app)
    except ModuleNotFoundError as error:  # an agent's environment has this command too
        sys.stderr.write(f"error: {error.name} is not installed here; the trainer is installed as edgeswap[host]\n")
        code = USAGE
    sys.exit(code)


if __name__ == "__main__":
    main()
