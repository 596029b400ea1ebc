"""From a device's message to committed rows to an acknowledgement.

Batches are taken as they come and committed together, once per turn of the host's loop: one sync of the disk for many
batches. Nothing is acknowledged before it is committed.

What cannot be stored must not hold up what can. A batch whose envelope can be read and in which single transitions are
unfit is stored without them; they are set aside in the database's quarantine, in the same commit, and the range is
acknowledged. A payload whose envelope cannot be read names no number that could be acknowledged. It is set aside and
counted; its device sends the range again, batched anew, and what it can never deliver leaves its bounded outbox in the
end, where it is counted as dropped.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct

from protocol import codec, topics
from protocol.codec import Decoder
from protocol.errors import Rejected
from protocol.messages import Count, Transition, TransitionBatch
from trainer_host.store import Answer, Delivery, SetAside, Store, unfit

log = logging.getLogger(__name__)

MAX_PENDING = 1024
# Many times what a device puts in one batch; a few kilobytes could unpack to millions.
MAX_BATCH_BYTES = 1024 * 1024
MAX_TRANSITIONS = 4096


class _Envelope(Struct, frozen=True, kw_only=True):
    """A batch whose transitions are still to be read."""

    epoch: str
    acked: Count
    first: Count
    last: Count
    transitions: Annotated[list[Raw], Meta(max_length=MAX_TRANSITIONS)]


_batches: Decoder[TransitionBatch] = Decoder(TransitionBatch)
_envelopes: Decoder[_Envelope] = Decoder(_Envelope)
_transitions: Decoder[Transition] = Decoder(Transition)


class Ingest:
    """Collects batches and commits them.

    Args:
        store: Where they go.

    Attributes:
        stored: How many transitions were taken, repetitions included.
        batches: How many batches.
        set_aside: How many payloads and transitions were set aside, by reason.
        overflow: How many batches were dropped because too many waited for a commit; they will be sent again.
    """

    def __init__(self, store: Store) -> None:
        self.stored = 0
        self.batches = 0
        self.overflow = 0
        self.set_aside: Counter[str] = Counter()
        self._store = store
        self._deliveries: list[Delivery] = []
        self._unreadable: list[SetAside] = []

    @property
    def pending(self) -> int:
        """How many messages wait for a commit."""
        return len(self._deliveries) + len(self._unreadable)

    def receive(self, device: str, payload: bytes) -> None:
        """Take what came on a device's transitions topic."""
        if self.pending >= MAX_PENDING:
            self.overflow += 1
            return
        try:
            delivery = read(device, payload)
        except Rejected as error:
            log.warning("%s sent a batch that cannot be read: %s", device, error)
            self.set_aside[error.code] += 1
            self._unreadable.append(SetAside(device, error.code, error.text, payload))
            return
        if delivery.unfit:
            log.warning("%s sent %d transitions that cannot be stored", device, len(delivery.unfit))
            self.set_aside.update(item.reason for item in delivery.unfit)
        self._deliveries.append(delivery)

    def commit(self, now: float) -> list[Answer]:
        """Commit what was received.

        Args:
            now: Seconds since the epoch.

        Returns:
            What to acknowledge.

        Raises:
            Unavailable: The database failed. Nothing was stored; what was received is forgotten, and sent again.
        """
        deliveries, self._deliveries = self._deliveries, []
        unreadable, self._unreadable = self._unreadable, []
        if unreadable:
            self._store.set_aside(unreadable, now)
        if not deliveries:
            return []
        answers = self._store.add_batches(deliveries, now)
        self.batches += len(deliveries)
        self.stored += sum(len(delivery.batch.transitions) for delivery in deliveries)
        return answers


def read(device: str, payload: bytes) -> Delivery:
    """Decompress and decode a batch, sorting out what is unfit.

    Raises:
        Rejected: With code `malformed` or `bad_name` when not even the envelope can be read.
    """
    topics.checked_name(device, "device")
    data = codec.decompress(payload, MAX_BATCH_BYTES)
    try:
        batch = _batches.decode(data)
        set_aside: list[SetAside] = []
    except Rejected:
        batch, set_aside = _picked(device, _envelopes.decode(data))
    topics.checked_name(batch.epoch, "epoch")
    if batch.first > batch.last:
        raise Rejected("malformed", f"the batch speaks for no number: {batch.first} to {batch.last}", "first")
    fit = []
    for transition in batch.transitions:
        reason = unfit(transition, batch)
        if reason is None:
            fit.append(transition)
        else:
            text = f"transition {transition.seq} of {batch.epoch}: {reason}"
            set_aside.append(SetAside(device, reason, text, msgspec.msgpack.encode(transition)))
    if len(fit) < len(batch.transitions):
        batch = msgspec.structs.replace(batch, transitions=fit)
    return Delivery(device, batch, tuple(set_aside))


def _picked(device: str, envelope: _Envelope) -> tuple[TransitionBatch, list[SetAside]]:
    """The batch with those transitions that can be read, and the others."""
    transitions, set_aside = [], []
    for raw in envelope.transitions:
        try:
            transitions.append(_transitions.decode(bytes(raw)))
        except Rejected as error:
            set_aside.append(SetAside(device, error.code, error.text, bytes(raw)))
    batch = TransitionBatch(
        epoch=envelope.epoch,
        acked=envelope.acked,
        first=envelope.first,
        last=envelope.last,
        transitions=transitions,
    )
    return batch, set_aside
