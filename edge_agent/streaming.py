"""Transitions on their way to the trainer: battle book, outbox, window, acknowledgement.

A transition is on this disk before it is sent and stays there until the host says that its database has committed it.
"""

from __future__ import annotations

import logging

from edge_agent.battles import BattleBook
from edge_agent.children import Records
from edge_agent.outbox import Outbox
from protocol import codec, topics
from protocol.codec import Decoder
from protocol.errors import Rejected, Unavailable
from protocol.link import Link
from protocol.messages import Ack, Transition

log = logging.getLogger(__name__)

COLLECT_S = 0.25
STORE_AGAIN_S = 5.0
ACK_LIMIT_S = 20.0
MAX_HELD = 50_000

_acks: Decoder[Ack] = Decoder(Ack)


class Streaming:
    """Feeds the outbox from the workers' records, and the host from the outbox.

    Args:
        device: This device's name.
        book: Where records become transitions.
        outbox: Where transitions wait.
    """

    def __init__(self, device: str, book: BattleBook, outbox: Outbox) -> None:
        self._topic = topics.fleet(device, "transitions")
        self.book = book
        self.outbox = outbox
        self.lost_records = 0
        self._held: list[Transition] = []
        self._collect_at = 0.0
        self._store_at = self._send_at = 0.0
        self._unanswered_since: float | None = None

    def record(self, records: Records, now: float) -> None:
        """Take what a worker served."""
        self.lost_records += records.lost
        for served in records.served:
            self.book.add(served, now)

    def acknowledged(self, payload: bytes) -> None:
        """Forget what the host has committed."""
        known = self.outbox.acked
        try:
            self.outbox.acknowledge(_acks.decode(payload))
        except Rejected as error:
            log.warning("refused an acknowledgement: %s", error)
        except Unavailable as error:
            log.error("cannot take an acknowledgement; what it is for will be sent again: %s", error)
        if self.outbox.acked > known:
            self._unanswered_since = None

    def reconnected(self) -> None:
        """Send again what was under way when the connection was lost."""
        self.outbox.rewind()
        self._unanswered_since = None

    def tick(self, link: Link, now: float) -> None:
        """Move what is due: book to outbox, outbox to broker."""
        if now >= self._collect_at:
            self._collect_at = now + COLLECT_S
            self._store(self.book.collect(now), now)
            if now >= self._send_at:
                try:
                    self._send(link, now)
                except Unavailable as error:
                    log.error("cannot send transitions: %s", error)
                    self._send_at = now + STORE_AGAIN_S

    def close(self, now: float) -> None:
        """Put on disk what is still in memory, and close it."""
        self._store_at = now
        self._store(self.book.close(now), now)
        self.outbox.close()

    def _store(self, transitions: list[Transition], now: float) -> None:
        """Put transitions on disk; while that fails, hold a bounded number in memory."""
        self._held += transitions
        if not self._held or now < self._store_at:
            return
        try:
            self.outbox.append(self._held)
        except Unavailable as error:
            log.error("cannot store transitions, holding %d: %s", len(self._held), error)
            self._store_at = now + STORE_AGAIN_S
            excess = max(len(self._held) - MAX_HELD, 0)
            self.lost_records += excess
            del self._held[:excess]
            return
        self._held = []

    def _send(self, link: Link, now: float) -> None:
        if self._unanswered_since is not None and now - self._unanswered_since > ACK_LIMIT_S:
            log.warning("the host has not acknowledged for %.0f s; sending again", ACK_LIMIT_S)
            self.reconnected()
        while link.connected and (batch := self.outbox.next_batch()) is not None:
            link.publish(self._topic, codec.compress(batch), qos=1)
        if self._unanswered_since is None and self.outbox.unacknowledged:
            self._unanswered_since = now
