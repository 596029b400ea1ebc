"""Does the simulation notice? Each mutant takes one thing out of the code, and some seed must fail under it.

The seed that killed a mutant last is remembered in `killers.json`, so a run is short; where it no longer does, others
are tried. What only saves time or work has no mutant: without it nothing is lost. Where two things each are enough by
themselves, one mutant takes both.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager as Patch
from pathlib import Path
from typing import Any
from unittest import mock

from msgspec.structs import replace
from securesystemslib.signer import SSlibKey  # type: ignore[attr-defined]

from edge_agent import deployer, deployment, model_store, releases, slots, stager, trust, trust_store
from edge_agent.deployment import Row
from edge_agent.model_store import ModelStore
from edge_agent.slots import Slot
from edge_agent.state import Record, StateStore
from edge_agent.transfer import Transfer
from edge_agent.trust_store import TrustStore
from edge_agent.trusted_time import TrustedTime
from edge_agent.updates import Updates
from protocol import durable
from protocol.durable import Disk
from protocol.errors import Unavailable
from protocol.messages import ModelRef
from protocol.release import Release
from tests.simulation.device import wiring
from tests.simulation.device.disk import SimulatedDisk
from tests.simulation.device.seeds import simulate

KILLERS = Path(__file__).with_name("killers.json")
MOST_SEEDS = 4000


def mutants() -> Mapping[str, Callable[[], Patch[Any]]]:
    """Each mutant's name, and what makes it."""
    return {
        # What is synced, by whose file it is.
        "a slot's state is not synced": lambda: unsynced("overwrite", "/state/state/slot-"),
        "the mark of a running daemon is not synced": lambda: unsynced("overwrite", "/state/state/run"),
        "a new state file is not synced": lambda: unsynced("write", "/state/state/.slot-"),
        "the folder of states is not synced": lambda: unsynced_folder("/state/state"),
        "a state that was read is not synced": lambda: put(Record, "_settle", _nothing),
        "a release is not synced": lambda: unsynced("write", "/state/releases/"),
        "the folder of releases is not synced": lambda: unsynced_folder("/state/releases"),
        "a model is not synced": lambda: unsynced("overwrite", "/state/models/"),
        "the folder of models is not synced": lambda: unsynced_folder("/state/models"),
        "accepted metadata is not synced": lambda: unsynced("write", "/state/trust/"),
        "the folder of accepted metadata is not synced": lambda: unsynced_folder("/state/trust"),
        "the accepted set is not synced": lambda: unsynced("write", "/state/.metadata.new.new"),
        "the accepted set's name is not synced": lambda: unsynced_folder("/state"),
        "a folder that is made is not synced": lambda: put(SimulatedDisk, "make_folder", _make_folder_unsynced),
        "what a killed writer left is not synced": _take_over_unsynced,
        # What is remembered.
        "a slot's state is not saved": lambda: put(StateStore, "save", _save_in_memory),
        "a state is saved after it is acted on": lambda: put(Slot, "_decide", _decide_late),
        "accepted metadata is not kept": lambda: put(TrustStore, "write", _nothing),
        "the time of the last acceptance is not kept": lambda: put(TrustedTime, "accepted", _nothing),
        "an unclean end is forgotten": lambda: put(StateStore, "mark_running", _yes),
        "releases are not mended": lambda: put(releases.Releases, "keep", _keep_in_memory),
        # What is checked.
        "the refusal list is not looked at": lambda: offer_when(_newer_but_refused),
        "a model's bytes are not verified": lambda: put(ModelStore, "open", _open_unverified),
        "an assembled model is not verified": _assemble_unverified,
        "signatures are not verified": lambda: put(SSlibKey, "verify_signature", _nothing),
        "expiry is not looked at": lambda: put(trust, "_expired", _nothing),
        "older metadata is accepted": lambda: put(TrustStore, "read", _no_documents),
        "a second stager may run": lambda: put(stager, "only_daemon", _any_stager),
        "wrong chunks get a model refused": lambda: put(stager, "CHUNK_MISMATCH", "never"),
        # What is counted.
        "deaths of the stager are not counted": lambda: put_row("count_stager_death", _stage_for_ever),
        "deaths of a trial are not counted": lambda: put_row("count_trial_death", _try_for_ever),
        "deaths in a watch are not counted": lambda: put(deployment, "_count_watch_death", _watch_for_ever),
        "unclean ends in a trial are not counted": lambda: put_row("restart_trial", _try_for_ever),
        # What is cleaned up, and what is tried again.
        "nothing is collected": lambda: put(deployer.Deployer, "_collect", _nothing),
        "leftovers are not removed": _leave_leftovers,
        "what is lost is not replaced": lambda: put(slots, "LOST_MODEL", frozenset()),
        "what was postponed is not tried again": lambda: put(Updates, "_retry_later", _never),
        "missing chunks are not asked for again": lambda: put(Transfer, "_wait", _nothing),
    }


put = mock.patch.object


def _nothing(*_args: object, **_more: object) -> None:
    """Does nothing."""


def _yes(*_args: object) -> bool:
    return True


def _no_documents(_store: TrustStore) -> dict[str, bytes]:
    return {}


def _never(_updates: Updates, now: float) -> float:
    return now + 1.0


# Syncs.


def unsynced(call: str, start: str) -> Patch[Any]:
    """A disk that leaves out the sync of content at paths that begin so."""
    real = getattr(SimulatedDisk, call)

    def mutated(disk: SimulatedDisk, path: Path, data: Any, *, sync: bool, **more: int) -> None:
        real(disk, path, data, sync=sync and not str(path).startswith(start), **more)

    return put(SimulatedDisk, call, mutated)


def unsynced_folder(start: str) -> Patch[Any]:
    """A disk that leaves out the sync of one folder's names, or of those below."""
    real = SimulatedDisk.sync_folder

    def mutated(disk: SimulatedDisk, folder: Path) -> None:
        path = str(folder)
        if path != start and not (start == "/state/trust" and path.startswith(start)):
            real(disk, folder)

    return put(SimulatedDisk, "sync_folder", mutated)


def _make_folder_unsynced(disk: SimulatedDisk, folder: Path) -> None:
    if not disk.is_folder(folder):
        disk.make_folder(folder.parent)
        real_sync = disk.sync_folder
        with put(disk, "sync_folder", _nothing):
            _real_make_folder(disk, folder)
        assert disk.sync_folder == real_sync, "it was left out for this one"


_real_make_folder = SimulatedDisk.make_folder


def _take_over_unsynced() -> Patch[Any]:
    def remove_leftovers(folder: Path, disk: Disk) -> int:
        left = [name for name in disk.names(folder) if name.startswith(".") and name.endswith(".new")]
        for name in left:
            disk.remove(folder / name)
        return len(left)

    stack = contextlib.ExitStack()
    stack.enter_context(_in_all((durable, model_store, trust_store), "remove_leftovers", remove_leftovers))
    stack.enter_context(put(ModelStore, "remove_leftovers", _tidy_unsynced))
    return stack


def _tidy_unsynced(store: ModelStore) -> None:
    for folder in (store._models, store._chunks):
        with durable.disk_errors(folder, 0, store._disk):
            durable.remove_leftovers(folder, store._disk)


def _leave_leftovers() -> Patch[Any]:
    return _in_all((durable, model_store, trust_store), "remove_leftovers", _nothing)


def _in_all(modules: Iterable[object], name: str, replacement: object) -> Patch[Any]:
    stack = contextlib.ExitStack()
    for module in modules:
        stack.enter_context(put(module, name, replacement))
    return stack


# What is remembered.


def _save_in_memory(store: StateStore, slot: str, data: bytes) -> None:
    wiring.current().checks.saved(slot, data)
    store._slots[slot].content = data


def _decide_late(slot: Slot, now: float) -> None:
    while slot._undecided:
        step = deployment.step(slot.state, slot._undecided.popleft())
        before, slot.state = slot.state, step.state
        slot._serve_active()
        for action in step.actions:
            slot._carry_out(action, now)
        if step.state != before:
            with contextlib.suppress(Unavailable):
                slot._around.state.save(slot.name, deployment.encode(step.state))


def _keep_in_memory(kept: releases.Releases, release: Release) -> None:
    kept._known[release.slot, ModelRef(digest=release.digest, version=release.version)] = release


# What is checked.


def put_row(name: str, replacement: Callable[..., Any]) -> Patch[Any]:
    """A table in which a function of the machine is replaced."""
    original = getattr(deployment, name)

    def replaced(row: Row[Any, Any]) -> Row[Any, Any]:
        do = replacement if row.do is original else row.do
        when = replacement if row.when is original else row.when
        return Row(row.state, row.event, row.goes_to, do, when)

    return put(deployment, "_TABLE", deployment.indexed(tuple(map(replaced, deployment.ROWS))))


def offer_when(condition: Callable[..., bool]) -> Patch[Any]:
    """A table in which an offer counts under another condition."""
    return put_row("newer", condition)


def _newer_but_refused(known: deployment.State, event: deployment.ReleaseOffered) -> bool:
    forgetful = replace(known, refused=())
    return deployment.newer(forgetful, event)


def _open_unverified(store: ModelStore, digest: str) -> bytes:
    try:
        return store._disk.read(store.path(digest))
    except OSError as error:
        raise Unavailable(str(error)) from error


def _assemble_unverified() -> Patch[Any]:
    """A model is verified when it is assembled and again when it is opened: either alone is enough, so both go."""

    def assemble(store: ModelStore, digest: str) -> Path:
        part, store._part = store._part, None
        assert part is not None, "as the real one"
        with durable.disk_errors(store._models, 0, store._disk):
            store._disk.overwrite(part.path, b"", sync=True)
            store._disk.rename(part.path, store.path(digest))
            store._disk.sync_folder(store._models)
        return store.path(digest)

    stack = contextlib.ExitStack()
    stack.enter_context(put(ModelStore, "assemble", assemble))
    stack.enter_context(put(ModelStore, "open", _open_unverified))
    return stack


@contextlib.contextmanager
def _any_stager(_folder: Path, _program: str, *, wait_s: float) -> Iterator[None]:
    assert wait_s > 0, "as the real one"
    yield


# What is counted.


def _stage_for_ever(known: deployment.Staging, _event: object) -> deployment.Step:
    return deployment.Step(known, (deployment.Stage(known.candidate),))


def _try_for_ever(known: deployment.Trial, _event: object) -> deployment.Step:
    return deployment.Step(known, (deployment.BeginTrial(known.active, known.candidate),))


def _watch_for_ever(known: deployment.Watch, retry: tuple[deployment.Action, ...]) -> deployment.Step:
    return deployment.Step(known, retry)


# Killing them.


def kills(name: str, seeds: Iterable[int]) -> int | None:
    """The first of the seeds that violates an invariant under the mutant, and is well without it.

    A mutant that only breaks the code proves nothing.
    """
    left = iter(seeds)
    while True:
        with wiring.wired(), mutants()[name]():
            found = next((seed for seed in left if simulate(seed).is_violation), None)
        if found is None:
            return None
        with wiring.wired():
            if not simulate(found).failure:
                return found


def killer(name: str, remembered: int | None) -> int | None:
    """A seed that kills a mutant: the remembered one, or the first that does."""
    if remembered is not None and kills(name, [remembered]) is not None:
        return remembered
    return kills(name, range(MOST_SEEDS))


def killers(workers: int, names: Iterable[str], remembered: Mapping[str, int]) -> Iterator[tuple[str, int | None]]:
    """Each mutant's killer, as they are found."""
    with multiprocessing.get_context("fork").Pool(workers, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(functools.partial(_found, remembered), list(names))


def _found(remembered: Mapping[str, int], name: str) -> tuple[str, int | None]:
    return name, killer(name, remembered.get(name))


def kill_all(workers: int, only: str, *, remember: bool) -> int:
    """Kill the mutants with `only` in their name; perhaps remember how. Returns how many survived."""
    remembered: dict[str, int] = json.loads(KILLERS.read_text("utf-8")) if KILLERS.exists() else {}
    chosen = [name for name in mutants() if only in name]
    found = dict(killers(workers, chosen, remembered))
    for name in chosen:
        seed = found[name]
        sys.stdout.write(f"{name}: {'ALIVE' if seed is None else f'killed by seed {seed}'}\n")
    alive = [name for name in chosen if found[name] is None]
    sys.stdout.write(f"{len(chosen) - len(alive)} of {len(chosen)} mutants killed\n")
    if remember:
        known = {name: seed for name in mutants() if (seed := found.get(name, remembered.get(name))) is not None}
        KILLERS.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    return len(alive)
