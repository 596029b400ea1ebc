"""The daemon's main process: one thread, one loop, one connection, and the children.

It imports neither NumPy nor an interpreter. Answers do not pass through it: workers speak to the broker themselves, so
nothing that is done here can delay one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from edge_agent import children
from edge_agent.battles import BattleBook
from edge_agent.children import Child, FromWorker, ModelFile, WorkerAssignment
from edge_agent.deployment import ModelRefused, ModelStaged, StagerDied, StagingPostponed
from edge_agent.model_store import ModelStore
from edge_agent.outbox import Outbox
from edge_agent.releases import Releases
from edge_agent.reporting import OFFLINE, Reporting
from edge_agent.settings import Settings
from edge_agent.slots import Slot, Surroundings
from edge_agent.staging import StagerSettings
from edge_agent.state import StateStore
from edge_agent.streaming import Streaming
from edge_agent.telemetry import Sensors
from edge_agent.updates import Updates
from protocol import service, topics
from protocol.errors import Misconfigured, Unavailable
from protocol.link import HasFileno, Link, Message, Will
from protocol.messages import Event, ModelRef, Status
from protocol.release import Release

log = logging.getLogger(__name__)

AGENT_VERSION = version("edgeswap")
TURN_S = 0.1
STOP_LIMIT_S = 8.0
COLLECT_S = 600.0


class Supervisor:
    """Wires the daemon's parts together and turns them over.

    Args:
        settings: Checked settings.

    Raises:
        Misconfigured: A folder or file cannot be used.
        Unavailable: The disk is full.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = Path(settings.state_dir)
        for folder in (self._folder, Path(settings.runtime_dir)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise Misconfigured(f"cannot use the folder {folder}: {error.strerror}") from error
        self._started_at = time.monotonic()
        self._telemetry_at = 0.0
        self._collect_at = 0.0
        self._ready = False
        self._service = service.ServiceManager()
        self._stopping_since: float | None = None
        self._sensors = Sensors(self._folder, Path(settings.sys_root))
        self._models = ModelStore(self._folder)
        self._releases = Releases(self._folder / "releases")
        self._state = StateStore(self._folder / "state.db")
        self._reporting = Reporting(settings.device, self._state, Path(settings.runtime_dir) / "status.json")
        self._streaming = Streaming(
            settings.device,
            BattleBook(),
            Outbox(self._folder / "outbox.db", max_bytes=settings.outbox.max_bytes, window=settings.outbox.window),
        )
        self._updates = self._make_updates()
        self._link = Link(
            settings.broker,
            f"{settings.device}-agent",
            on_message=self._message,
            on_connected=self._connected,
            will=Will(topics.fleet(settings.device, "availability"), OFFLINE, 1, retain=True),
        )
        clean = self._state.mark_running()  # last: what is misconfigured has not run, and has not crashed
        self._slots = {
            name: Slot(name, slot, self._surroundings(name), clean=clean) for name, slot in settings.slots.items()
        }

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Serve until told to stop; then let the workers finish, and put everything on disk."""
        now = time.monotonic()
        self._link.subscribe((topics.METADATA, 1), (topics.fleet(self._settings.device, "ack"), 1))
        self._updates.look_again()
        for slot in self._slots.values():
            slot.begin(now)
        while not self._stopped(now):
            now = time.monotonic()
            if should_stop() and self._stopping_since is None:
                self._begin_stop(now)
            self._turn()
        self._finish(now)

    def _turn(self) -> None:
        living = [child for child in self._children() if not child.channel.closed]
        readables = self._link.turn(TURN_S, also=living)
        now = time.monotonic()  # only now: looking up the broker's name may have taken long, and is no worker's fault
        for readable in readables:
            self._receive(readable, now)
        for slot in self._slots.values():
            slot.tick(now)
        self._updates.tick(now)
        self._streaming.tick(self._link, now)
        self._reporting.tick(self._link, self._status(), now)
        if now >= self._telemetry_at:
            self._telemetry_at = now + self._settings.telemetry_seconds
            self._send_telemetry(now)
        if now >= self._collect_at:
            self._collect_at = now + COLLECT_S
            self._collect()
        self._tell_service(now)

    def _children(self) -> list[Child[Any]]:
        found: list[Child[Any]] = [child for slot in self._slots.values() for child in slot.children()]
        if self._updates.child is not None:
            found.append(self._updates.child)
        return found

    def _receive(self, readable: HasFileno, now: float) -> None:
        if readable is self._updates.child:
            self._updates.receive(self._updates.child, now)
            return
        for slot in self._slots.values():
            if slot.receive(readable, now):
                return

    # The broker.

    def _connected(self) -> None:
        self._reporting.connected(self._link)
        self._streaming.reconnected()

    def _message(self, message: Message) -> None:
        if message.topic == topics.METADATA:
            self._updates.metadata_arrived(message.payload)
        else:
            self._streaming.acknowledged(message.payload)

    # Updates.

    def _make_updates(self) -> Updates:
        settings = self._settings
        metadata_file = self._folder / "metadata.set"
        return Updates(
            StagerSettings(
                device=settings.device,
                folder=str(self._folder),
                trust_folder=str(self._folder / "trust"),
                root_file=str(settings.root_of_trust),
                metadata_file=str(metadata_file),
                built_at=Path(__file__).stat().st_mtime,
                broker=settings.broker,
            ),
            metadata_file,
            on_verified=self._verified,
            on_metadata_refused=self._metadata_refused,
            on_staged=lambda digest: self._tell(digest, ModelStaged(digest)),
            on_refused=lambda digest, reason, text: self._tell(digest, ModelRefused(digest, reason, text)),
            on_postponed=lambda digest, reason, text: self._tell(digest, StagingPostponed(digest, reason, text)),
            on_stager_died=self._stager_died,
        )

    def _verified(self, _version: int, releases: tuple[Release, ...]) -> None:
        """Offer each slot the newest release there is for it."""
        now = time.monotonic()
        for name, slot in self._slots.items():
            newest = max((r for r in releases if r.slot == name), key=lambda release: release.version, default=None)
            if newest is None:
                continue
            try:
                self._releases.keep(newest)
            except Unavailable as error:
                log.error("cannot keep release %s: %s", newest.target, error)
                continue
            slot.offer(ModelRef(digest=newest.digest, version=newest.version), now)

    def _metadata_refused(self, reason: str, text: str) -> None:
        self._reporting.event(Event(at=time.time(), kind="metadata_refused", reason=reason, text=text))

    def _stager_died(self, digest: str, how: str) -> None:
        text = f"the stager ended: {how}"
        self._reporting.event(Event(at=time.time(), kind="stager_died", model=digest, reason="stager_died", text=text))
        self._tell(digest, StagerDied(digest))

    def _tell(self, digest: str, event: ModelStaged | ModelRefused | StagingPostponed | StagerDied) -> None:
        """Tell the slot that is staging a model what became of it."""
        now = time.monotonic()
        for slot in self._slots.values():
            if slot.is_candidate(digest):
                slot.feed(event, now)

    # Slots.

    def _surroundings(self, slot: str) -> Surroundings:
        return Surroundings(
            state=self._state,
            model_file=self._model_file,
            release=self._releases.get,
            start_worker=lambda model: self._start_worker(slot, model),
            stage=self._updates.stage,
            cancel=self._updates.cancel,
            report=self._reporting.event,
            record=lambda records: self._streaming.record(records, time.monotonic()),
            throttled=self._sensors.throttled_now,
            wall_clock=time.time,
        )

    def _model_file(self, digest: str) -> ModelFile | None:
        release = self._releases.get(digest)
        if release is None:
            return None
        return ModelFile(digest=digest, version=release.version, folder=str(self._folder), features=release.features)

    def _start_worker(self, slot: str, model: ModelFile | None) -> Child[FromWorker]:
        settings = self._settings.slots[slot]
        names = list(self._settings.slots)
        assignment = WorkerAssignment(
            device=self._settings.device,
            slot=slot,
            slots=names,
            front_desk=slot == names[0],
            broker=self._settings.broker,
            model=model,
            threads=settings.threads,
            deadline_ms=settings.deadline_ms,
        )
        return children.start("worker", assignment, FromWorker, f"worker of {slot}")

    # Reports.

    def _status(self) -> Status:
        runtimes = {slot.workers.runtime for slot in self._slots.values() if slot.workers.runtime}
        return Status(
            at=time.time(),
            agent_version=AGENT_VERSION,
            runtime=", ".join(sorted(runtimes)),
            slots={name: slot.status(self._updates.progress) for name, slot in self._slots.items()},
            metadata_version=self._updates.metadata_version,
        )

    def _send_telemetry(self, now: float) -> None:
        pids = [child.pid for child in self._children()]
        reading = self._sensors.read(time.time(), now - self._started_at, pids)
        book, outbox = self._streaming.book, self._streaming.outbox
        self._reporting.telemetry(
            self._link,
            msgspec.structs.replace(
                reading,
                slots={name: slot.counters() for name, slot in self._slots.items()},
                outbox_rows=outbox.rows,
                outbox_bytes=outbox.bytes,
                dropped_transitions=outbox.dropped,
                late_records=book.late,
                lost_records=self._streaming.lost_records + book.refused,
            ),
        )

    def _collect(self) -> None:
        """Remove models that no slot needs; not while one is on its way, or will be tried again."""
        if self._updates.busy:
            return
        pinned = {digest for slot in self._slots.values() for digest in slot.pinned()}
        try:
            self._models.collect(pinned)
            self._releases.collect(pinned)
        except Unavailable as error:
            log.warning("cannot remove old models: %s", error)

    def _tell_service(self, now: float) -> None:
        """Tell systemd that the daemon is ready, and, while every slot's serving turns over, that it is alive.

        Ready means that workers are loaded: a broker that is away must not make systemd restart the daemon for ever.
        """
        if not self._ready and all(slot.workers.loaded for slot in self._slots.values()):
            self._ready = True
            service.notify(READY="1")
            log.info("ready in %.2f s", now - self._started_at)
        idle = [name for name, slot in self._slots.items() if not slot.ready]
        self._service.tell(
            now,
            status=f"not serving: {', '.join(idle)}" if idle else "serving",
            alive=all(slot.workers.turns_over(now) for slot in self._slots.values()),
        )

    # The end.

    def _begin_stop(self, now: float) -> None:
        self._stopping_since = now
        service.notify(STOPPING="1")
        self._updates.stop()
        for slot in self._slots.values():
            slot.stop(now)

    def _stopped(self, now: float) -> bool:
        if self._stopping_since is None:
            return False
        return not self._children() or now - self._stopping_since > STOP_LIMIT_S

    def _finish(self, now: float) -> None:
        for child in self._children():
            log.warning("%s did not leave in time; killing it", child.name)
            child.kill()
        self._streaming.close(now)
        self._reporting.leaving(self._link)
        self._link.close()
        self._state.mark_stopped()
        self._state.close()
