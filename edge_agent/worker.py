"""The process that answers: one slot, one immutable model, one connection, one thread.

The path from message to publication does no disk I/O and takes no lock. What happened is told to the supervisor over a
channel that never waits. Imports and the loading of the model run in a short-lived thread of idle priority, so that a
worker which is about to take over does not slow the one that still serves; the thread that answers is never lowered.
In a swap at the battle's end it has the model before as well, until the battles that began with that one have ended.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edge_agent.battles import Served
from edge_agent.channel import Channel
from edge_agent.children import (
    Beat,
    Begin,
    Disconnected,
    Join,
    Joined,
    Leave,
    Loaded,
    LoadFailed,
    ModelFile,
    OldBattles,
    Records,
    ToWorker,
    WorkerAssignment,
    first_message,
    inherited_channel,
)
from edge_agent.histogram import Histogram
from edge_agent.model_store import ModelStore
from edge_agent.overload import is_overdue
from protocol import service, topics
from protocol.errors import EdgeswapError, ErrorCode, Rejected
from protocol.link import Link, Message
from protocol.messages import Decision, Problem

if TYPE_CHECKING:
    from edge_agent.serving import Policy, Responder

log = logging.getLogger("edge_agent.worker")

IDLE_S = 0.1
REPORT_S = 0.1
BEAT_S = 1.0
QUIET_S = 0.5
BURST = 16
MAX_WAITING = 1024
MAX_RECORDS = 64
MAX_KEPT_RECORDS = 4096
MAX_REPORT_BYTES = 1024 * 1024
RECORD_OVERHEAD_BYTES = 1024
LAST_WORDS_S = 2.0


class Worker:
    """Serves one slot until it is told to leave.

    Args:
        assignment: What to serve, and where.
        responder: Loaded and warm.
        channel: To the supervisor.
    """

    def __init__(self, assignment: WorkerAssignment, responder: Responder, channel: Channel[ToWorker]) -> None:
        self._assignment = assignment
        self._responder = responder
        self._channel = channel
        self._deadline_s = assignment.deadline_ms / 1000
        self._waiting: deque[tuple[Message, int]] = deque()
        self._records: list[Served] = []
        self._lost = 0
        self._answered = 0
        self._errors: Counter[str] = Counter()
        self._histogram = Histogram()
        self._answer_s = 0.0
        self._report_at = 0.0
        self._leaving_packet: int | None = None
        self._left_at: float | None = None
        self._heard_at = 0.0
        self._joined = False
        slot = "+" if assignment.front_desk else assignment.slot
        group = f"{assignment.device}-{assignment.slot}"
        self._filter = topics.shared(group, topics.state(assignment.device, slot))
        self._action = topics.action(assignment.device, assignment.slot)
        self._state = topics.state(assignment.device, assignment.slot)
        self._link = Link(
            assignment.broker,
            f"{assignment.device}-{assignment.slot}-{os.getpid()}",
            on_message=self._arrived,
            on_subscribed=self._subscribed,
            manual_ack=True,
        )

    def run(self) -> None:
        """Serve until told to leave, or until the supervisor has gone, and everything here is answered."""
        beat_at = time.monotonic()
        while not self._finished(time.monotonic()):
            if self._channel in self._link.turn(0.0 if self._waiting else IDLE_S, also=self._listening()):
                self._listen()
            if self._channel.closed:  # seen when reading, or when a report could not be written
                self._leave()
            self._answer_burst()
            now = time.monotonic()
            if self._responder.finish(now):
                log.info("%s: the last battle of the old model has ended", self._assignment.slot)
            if len(self._records) >= MAX_RECORDS or now >= self._report_at:
                self._report_at = now + REPORT_S
                self._report()
            if now - beat_at >= BEAT_S:
                beat_at = now
                self._beat()
        self._report()
        self._beat()
        self._link.close()
        if not self._channel.drain(LAST_WORDS_S):
            log.warning("%s: the supervisor did not hear everything", self._assignment.slot)

    def _listening(self) -> list[Channel[ToWorker]]:
        return [] if self._channel.closed else [self._channel]

    def _listen(self) -> None:
        for message in self._channel.receive():
            match message:
                case Join():
                    self._link.subscribe((self._filter, 1))
                case OldBattles(marks=marks):
                    self._responder.learn(marks)
                case Begin():
                    self._responder.begin()
                case Leave():
                    self._leave()

    def _leave(self) -> None:
        if self._leaving_packet is None:
            log.info("%s: leaving%s", self._assignment.slot, ", for the supervisor has gone" * self._channel.closed)
            self._leaving_packet = self._link.unsubscribe(self._filter)

    def _finished(self, now: float) -> bool:
        """Whether the broker has confirmed the leaving, and has been quiet since: it may deliver what it had queued."""
        if self._leaving_packet is not None and self._left_at is None and not self._link.connected:
            self._left_at = now  # without a connection nothing is subscribed
        return self._left_at is not None and not self._waiting and now - max(self._left_at, self._heard_at) > QUIET_S

    def _subscribed(self, packet: int) -> None:
        if packet == self._leaving_packet:
            self._left_at = time.monotonic()
        else:
            self._joined = True
            self._channel.send(Joined())

    def _arrived(self, message: Message) -> None:
        self._heard_at = time.monotonic()
        if message.topic != self._state and topics.slot_of(message.topic) in self._assignment.slots:
            self._link.acknowledge(message)  # heard as the front desk; its own worker answers
        else:
            self._waiting.append((message, time.perf_counter_ns()))

    def _answer_burst(self) -> None:
        """Answer some of what waits, oldest first; read on when few enough wait."""
        for _ in range(max(min(len(self._waiting), BURST), len(self._waiting) - MAX_WAITING)):
            started = time.perf_counter_ns()
            message, read_at = self._waiting[0]
            overdue = is_overdue(len(self._waiting), (started - read_at) / 1e9, self._answer_s, self._deadline_s)
            self._waiting.popleft()
            if overdue:
                text = f"more states wait than {self._assignment.deadline_ms:.0f} ms allow"
                self._refuse(message, ErrorCode.OVERLOADED, text)
                continue
            self._answer(message)
            ended = time.perf_counter_ns()
            self._histogram.add((ended - read_at) // 1000)
            self._answer_s += ((ended - started) / 1e9 - self._answer_s) / 8

    def _answer(self, message: Message) -> None:
        if message.topic != self._state:
            known = ", ".join(self._assignment.slots)
            text = f"no slot {topics.slot_of(message.topic)!r} on this device; it has {known}"
            self._refuse(message, ErrorCode.UNKNOWN_SLOT, text, "slot")
            return
        payload, decisions, records = self._responder.answer(message.payload, time.time())
        if self._publish(message, payload, decisions):
            self._keep(records)
            self._responder.heard(records, time.monotonic())

    def _refuse(self, message: Message, code: str, text: str, field: str | None = None) -> None:
        payload, decisions = self._responder.refuse(message.payload, Problem(code=code, text=text, field=field))
        self._publish(message, payload, decisions)

    def _publish(self, message: Message, payload: bytes, decisions: list[Decision]) -> bool:
        """Answer, if there is a connection. An answer that nobody received is no experience either."""
        topic = self._action if message.topic == self._state else message.topic.removesuffix("state") + "action"
        if message.response_topic is not None and _may_be_answered_on(message.response_topic):
            topic = message.response_topic
        if not self._link.connected:
            return False  # nobody can be told; Mosquitto 2.0 forgets what was not acknowledged with the session
        self._link.publish(topic, payload, qos=min(message.qos, 1), correlation=message.correlation)
        self._link.acknowledge(message)
        for decision in decisions:
            if decision.error is None:
                self._answered += 1
            else:
                self._errors[decision.error.code] += 1
        return True

    def _keep(self, records: list[Served]) -> None:
        room = MAX_KEPT_RECORDS - len(self._records)
        self._records += records[:room]
        self._lost += max(len(records) - room, 0)

    def _report(self) -> None:
        self._channel.flush()
        while self._records:
            count = _fitting(self._records)
            if not self._channel.send(Records(self._records[:count], self._lost)):
                return
            del self._records[:count]
            self._lost = 0

    def _beat(self) -> None:
        beat = Beat(
            answered=self._answered,
            errors=dict(self._errors),
            latency_us_histogram=self._histogram.counts,
            finishing=self._responder.finishing,
        )
        if self._joined and not self._link.connected:
            self._joined = False
            self._channel.send(Disconnected())
        if self._channel.send(beat):
            self._answered = 0
            self._errors.clear()
            self._histogram = Histogram()


def _may_be_answered_on(topic: str) -> bool:
    """A game names the topic, the device's own rights publish on it: no wildcard, and nothing of the fleet's."""
    return bool(topic) and not set("+#") & set(topic) and not topic.startswith(("fleet/", "$"))


def _fitting(records: list[Served]) -> int:
    """How many records, from the oldest, fit one report."""
    size = 0
    for count, record in enumerate(records):
        size += len(record.features) + len(record.legal) + RECORD_OVERHEAD_BYTES
        if size > MAX_REPORT_BYTES:
            return max(count, 1)
    return len(records)


class Outcome(NamedTuple):
    """What loading came to.

    Attributes:
        responder: Loaded and warm.
        load_ms: How long it took.
        runtime: Name and version.
        failure: Why the model that should be finished cannot be; empty if it can, or if there is none.
    """

    responder: Responder
    load_ms: float
    runtime: str
    failure: str


def load(assignment: WorkerAssignment) -> Outcome:
    """Load and warm up the assigned model, and the one to finish if there is one.

    Raises:
        Rejected: The file is missing, rotten, or refused by the runtime.
        Unavailable: It cannot be read.
    """
    from edge_agent import runtime  # noqa: PLC0415
    from edge_agent.serving import Responder  # noqa: PLC0415

    started = time.perf_counter()
    policy = None if assignment.model is None else _policy(assignment.model, assignment.threads)
    old, failure = None, ""
    if assignment.finishing is not None:
        try:
            old = _policy(assignment.finishing, assignment.threads)
        except EdgeswapError as error:
            failure = str(error)
    load_ms = (time.perf_counter() - started) * 1e3
    return Outcome(Responder(assignment.slot, policy, old), load_ms, f"{runtime.name()} {runtime.version()}", failure)


def _policy(file: ModelFile, threads: int) -> Policy:
    from edge_agent import runtime  # noqa: PLC0415
    from edge_agent.serving import Policy  # noqa: PLC0415

    model = runtime.load(ModelStore(Path(file.folder)).open(file.digest), threads)
    model.warm_up()
    return Policy(model, file.features, file.digest, file.version)


def load_gently(assignment: WorkerAssignment) -> Outcome:
    """`load`, in a thread of idle priority where the system has such: on Linux, a thread has its own (sched(7))."""
    results: list[Outcome | EdgeswapError] = []

    def run() -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            results.append(load(assignment))
        except EdgeswapError as error:
            results.append(error)

    thread = threading.Thread(target=run, name="loader")
    thread.start()
    thread.join()
    if not results:
        raise SystemExit(1)  # the thread's own traceback is on stderr
    if isinstance(results[0], EdgeswapError):
        raise results[0]
    return results[0]


def main() -> int:
    """The worker's process."""
    service.set_up_logging()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's business
    channel = inherited_channel(sys.argv[1:], ToWorker)
    assignment = first_message(channel)
    if assignment is None:
        return 0
    assert isinstance(assignment, WorkerAssignment)
    try:
        loaded = load_gently(assignment)
    except EdgeswapError as error:
        reason = error.code if isinstance(error, Rejected) else "unavailable"
        channel.send(LoadFailed(reason=reason, text=str(error)))
        return 1
    worker = Worker(assignment, loaded.responder, channel)
    channel.send(Loaded(load_ms=loaded.load_ms, runtime=loaded.runtime, failure=loaded.failure))
    worker.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
