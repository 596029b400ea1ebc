"""The running host: one loop, one connection, and an agenda of what takes long.

Whatever is received in a turn is committed at its end, and only then acknowledged. The loop itself never trains, gates
or signs. Progress of the long work is in the log and in `progress.jsonl`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from threading import Event

from protocol import codec, service, topics
from protocol.codec import Decoder
from protocol.errors import Rejected, Unavailable
from protocol.link import Link, Message
from protocol.messages import ChunkRequest
from trainer_host import fleet
from trainer_host.agenda import Agenda
from trainer_host.chunks import ChunkServer
from trainer_host.fleet import Fleet
from trainer_host.ingest import Ingest
from trainer_host.metadata_topic import MetadataTopic
from trainer_host.wiring import Parts

log = logging.getLogger(__name__)

TURN_S = 0.25
REPORTS_S = 0.5
PRUNE_S = 3600.0
DAY_S = 86_400.0

_requests: Decoder[ChunkRequest] = Decoder(ChunkRequest)


class Host:
    """The daemon.

    Args:
        parts: What it works with.
        stop: The event that the parts' running job heeds.
    """

    def __init__(self, parts: Parts, stop: Event) -> None:
        self._parts = parts
        self._settings = parts.settings
        self._ingest = Ingest(parts.store)
        self._fleet = Fleet(parts.store)
        self._chunks = ChunkServer(parts.repository)
        self._metadata = MetadataTopic(parts.repository)
        self._agenda = Agenda(parts, stop)
        self._service = service.ServiceManager()
        self._chunk_packets: set[int] = set()
        self._reports_at = self._prune_at = 0.0
        self._link = Link(
            self._settings.broker,
            self._settings.client_id,
            on_message=self._message,
            on_connected=self._connected,
            on_published=self._published,
        )

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Work until told to stop; then end the running job, and commit what was received."""
        self._link.subscribe(
            (topics.fleet("+", "transitions"), 1), (topics.CHUNK_REQUESTS, 1), (topics.METADATA, 1), *fleet.TOPICS
        )
        service.notify(READY="1")
        try:
            while not should_stop():
                self._turn(time.monotonic())
        finally:
            service.notify(STOPPING="1")
            self._close()

    def _turn(self, now: float) -> None:
        for waker in self._link.turn(TURN_S, also=self._agenda.wakers()):
            if self._agenda.woken(waker, now):
                self._metadata.changed()
        self._commit()
        self._serve_chunks()
        self._reported(now)
        self._metadata.tick(self._link, now)
        self._agenda.tick(now)
        self._service.tell(now, status=self._status(), alive=True)

    def _close(self) -> None:
        self._commit()
        self._commit_reports()
        self._agenda.close()
        self._link.close()
        self._parts.database.close()

    # The broker.

    def _connected(self) -> None:
        self._chunks.disconnected()
        self._chunk_packets.clear()
        self._metadata.changed()

    def _message(self, message: Message) -> None:
        if message.topic == topics.METADATA:
            self._metadata.heard(message.payload)
        elif message.topic == topics.CHUNK_REQUESTS:
            self._chunks_requested(message.payload)
        elif message.topic.endswith("/transitions"):
            self._ingest.receive(topics.fleet_device(message.topic)[0], message.payload)
        else:
            self._fleet.receive(message.topic, message.payload, time.time())

    def _chunks_requested(self, payload: bytes) -> None:
        try:
            self._chunks.requested(_requests.decode(payload), time.monotonic())
        except Rejected as error:
            self._chunks.ignored[error.code] += 1
            log.warning("cannot read a request for chunks: %s", error)

    def _published(self, packet: int) -> None:
        if packet in self._chunk_packets:
            self._chunk_packets.discard(packet)
            self._chunks.published()

    def _serve_chunks(self) -> None:
        while self._link.connected and (publication := self._chunks.next(time.monotonic())) is not None:
            self._chunk_packets.add(self._link.publish(publication.topic, publication.payload, qos=1))

    def _commit(self) -> None:
        """Commit the turn's batches and acknowledge them; while the broker is away the device asks by sending again."""
        try:
            answers = self._ingest.commit(time.time())
        except Unavailable as error:
            log.warning("cannot store transitions; devices will send them again: %s", error)
            return
        for device, ack in answers:
            if self._link.connected:
                self._link.publish(topics.fleet(device, "ack"), codec.encode(ack, as_json=True), qos=1)

    def _reported(self, now: float) -> None:
        if now >= self._reports_at:
            self._reports_at = now + REPORTS_S
            self._commit_reports()
        if now >= self._prune_at:
            self._prune_at = now + PRUNE_S
            self._prune()

    def _commit_reports(self) -> None:
        try:
            self._fleet.commit()
        except Unavailable as error:
            log.warning("cannot store what devices report, trying again: %s", error)

    def _prune(self) -> None:
        history, now = self._settings.history, time.time()
        try:
            self._parts.store.prune(
                telemetry_before=now - history.telemetry_days * DAY_S, events_before=now - history.events_days * DAY_S
            )
        except Unavailable as error:
            log.warning("cannot delete old reports: %s", error)

    def _status(self) -> str:
        broker = "" if self._link.connected else f"waiting for the broker at {self._settings.broker.url}; "
        doing = f"; {self._agenda.doing}" if self._agenda.doing else ""
        return f"{broker}{len(self._fleet.online)} devices online; {self._ingest.stored} transitions taken{doing}"
