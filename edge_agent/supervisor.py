"""The daemon's main process: one thread, one loop, one connection, and the children.

It imports neither NumPy nor an interpreter. Answers do not pass through it: workers speak to the broker themselves, so
nothing that is done here can delay one.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import msgspec

from edge_agent import children
from edge_agent.battles import BattleBook
from edge_agent.children import FromTrial, FromWorker
from edge_agent.deployer import Deployer, Starters
from edge_agent.inbox import FOLDER, Inbox
from edge_agent.outbox import Outbox
from edge_agent.reporting import OFFLINE, Reporting
from edge_agent.settings import Settings
from edge_agent.staging import FromStager
from edge_agent.streaming import Streaming
from edge_agent.telemetry import Sensors
from edge_agent.trail import MAX_EVENTS, Trail
from protocol import service, topics
from protocol.durable import unusable
from protocol.errors import Unavailable
from protocol.link import Link, Message, Will
from protocol.messages import Event, Status

log = logging.getLogger(__name__)

AGENT_VERSION = version("edgeswap")
TURN_S = 0.1
STOP_LIMIT_S = 8.0
STARTERS = Starters(
    worker=lambda assignment: children.start("worker", assignment, FromWorker, f"worker of {assignment.slot}"),
    trial=lambda slot, assignment: children.start("trial", assignment, FromTrial, f"trial of {slot}"),
    stager=lambda settings: children.start("stager", settings, FromStager, "stager"),
)


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
                raise unusable(folder, error) from error
        self._started_at = time.monotonic()
        self._telemetry_at = 0.0
        self._ready = False
        self._service = service.ServiceManager()
        self._stopping_since: float | None = None
        self._sensors = Sensors(self._folder, Path(settings.sys_root))
        self._trail = Trail(self._folder / "trail.db")
        self._reporting = Reporting(settings.device, self._trail, Path(settings.runtime_dir) / "status.json")
        self._streaming = Streaming(
            settings.device,
            BattleBook(),
            Outbox(self._folder / "outbox.db", max_bytes=settings.outbox.max_bytes, window=settings.outbox.window),
        )
        for aside in (self._trail.set_aside, self._streaming.outbox.set_aside):
            if aside is not None:
                text = f"a database was damaged; it is kept as {aside}, and a new one is in its place"
                self._reporting.event(Event(at=time.time(), kind="set_aside", reason="damaged", text=text))
        self._link = Link(
            settings.broker,
            f"{settings.device}-agent",
            on_message=self._message,
            on_connected=self._connected,
            will=Will(topics.fleet(settings.device, "availability"), OFFLINE, 1, retain=True),
        )
        self._inbox = Inbox(self._folder / FOLDER)
        self._deployer = Deployer(
            settings,
            STARTERS,
            report=self._reporting.event,
            recall=self._recall,
            record=lambda records: self._streaming.record(records, time.monotonic()),
            throttled=self._sensors.throttled_now,
            wall_clock=time.time,
            rng=random.Random(),
        )

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Serve until told to stop; then let the workers finish, and put everything on disk."""
        now = time.monotonic()
        self._link.subscribe((topics.METADATA, 1), (topics.fleet(self._settings.device, "ack"), 1))
        self._deployer.begin(now)
        self._inbox.start()
        while not self._stopped(now):
            now = time.monotonic()
            if should_stop() and self._stopping_since is None:
                self._begin_stop(now)
            self._turn()
        self._finish(now)

    def _turn(self) -> None:
        living = [child for child in self._deployer.children() if not child.channel.closed]
        readables = self._link.turn(TURN_S, also=[*living, self._inbox])
        now = time.monotonic()  # only now: looking up the broker's name may have taken long, and is no worker's fault
        for readable in readables:
            if readable is self._inbox:
                self._inbox.changed()
            else:
                self._deployer.receive(readable, now)
        self._deployer.tick(now)
        if self._stopping_since is None:
            self._sideload(now)
        self._streaming.tick(self._link, now)
        self._reporting.tick(self._link, self._status(), now)
        if now >= self._telemetry_at:
            self._telemetry_at = now + self._settings.telemetry_seconds
            self._send_telemetry(now)
        self._tell_service(now)

    def _sideload(self, now: float) -> None:
        """Tell what became of a bundle, and take the next one out of the inbox."""
        done = self._deployer.installed()
        if done is not None:
            self._inbox.finished(*done, now)
        bundle = self._inbox.next(now)
        if bundle is not None:
            self._deployer.install(bundle)

    # The broker.

    def _connected(self) -> None:
        self._reporting.connected(self._link)
        self._streaming.reconnected()

    def _message(self, message: Message) -> None:
        if message.topic == topics.METADATA:
            self._deployer.metadata_arrived(message.payload)
        else:
            self._streaming.acknowledged(message.payload)

    def _recall(self, slot: str) -> list[Event]:
        """What the audit trail says about a slot."""
        try:
            return self._trail.history(MAX_EVENTS, slot)
        except Unavailable as error:
            log.error("cannot read the audit trail: %s", error)
            return []

    # Reports.

    def _status(self) -> Status:
        runtimes = {slot.workers.runtime for slot in self._deployer.slots.values() if slot.workers.runtime}
        return Status(
            at=time.time(),
            agent_version=AGENT_VERSION,
            runtime=", ".join(sorted(runtimes)),
            slots=self._deployer.statuses(),
            metadata_version=self._deployer.metadata_version,
            groups=self._settings.groups,
        )

    def _send_telemetry(self, now: float) -> None:
        pids = [child.pid for child in self._deployer.children()]
        reading = self._sensors.read(time.time(), now - self._started_at, pids)
        book, outbox = self._streaming.book, self._streaming.outbox
        self._reporting.telemetry(
            self._link,
            msgspec.structs.replace(
                reading,
                slots={name: slot.counters() for name, slot in self._deployer.slots.items()},
                outbox_rows=outbox.rows,
                outbox_bytes=outbox.bytes,
                dropped_transitions=outbox.dropped,
                late_records=book.late,
                lost_records=self._streaming.lost_records + book.refused,
            ),
        )

    def _tell_service(self, now: float) -> None:
        """Tell systemd that the daemon is ready, and, while every slot's serving turns over, that it is alive.

        Ready means that workers are loaded: a broker that is away must not make systemd restart the daemon for ever.
        """
        if not self._ready and all(slot.workers.loaded for slot in self._deployer.slots.values()):
            self._ready = True
            service.notify(READY="1")
            log.info("ready in %.2f s", now - self._started_at)
        idle = [name for name, slot in self._deployer.slots.items() if not slot.ready]
        self._service.tell(
            now,
            status=f"not serving: {', '.join(idle)}" if idle else "serving",
            alive=all(slot.workers.turns_over(now) for slot in self._deployer.slots.values()),
        )

    # The end.

    def _begin_stop(self, now: float) -> None:
        self._stopping_since = now
        service.notify(STOPPING="1")
        self._deployer.stop(now)

    def _stopped(self, now: float) -> bool:
        if self._stopping_since is None:
            return False
        return not self._deployer.children() or now - self._stopping_since > STOP_LIMIT_S

    def _finish(self, now: float) -> None:
        for child in self._deployer.children():
            log.warning("%s did not leave in time; killing it", child.name)
            child.kill()
        self._inbox.close()
        self._streaming.close(now)
        self._reporting.leaving(self._link)
        self._link.close()
        self._deployer.stopped()
        self._trail.close()
