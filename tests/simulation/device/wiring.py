"""Puts the world under the real code: clock, lock, link, disk and runtime of the stager, and smaller figures.

A chunk has a kilobyte, so that models of a few have several, and a judge commits after a dozen pairs: what the judge's
figures are worth is simulated elsewhere. What python-tuf makes of the same documents is the same each time, so it is
remembered: each set is verified once in a process, with real signatures.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import sys
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timezone, tzinfo
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar
from unittest import mock

from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Signature, SSlibKey  # type: ignore[attr-defined]
from tuf.api.metadata import Metadata
from tuf.ngclient._internal import trusted_metadata_set

from edge_agent import deployment, fetching, slots, stager, trust, trust_store
from edge_agent import state as state_store
from edge_agent.judge import JudgeSettings
from edge_agent.model_store import ModelStore
from edge_agent.trust import Trust
from edge_agent.trusted_time import TrustedTime
from protocol.errors import Rejected, Unavailable
from protocol.link import Message
from protocol.release import Release
from tests.simulation.device import history

if TYPE_CHECKING:
    from tests.simulation.device.processes import StagerProcess
    from tests.simulation.device.world import World

CHUNK_BYTES = 1024
COMMIT_PAIRS = 12
MEMORY = 10_000
SETS = 4000
ERAS = (history.EXPIRED, history.VALID)

# In memory, where there is such a folder: what lies there is written often and needs no disk.
MEMORY_FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108

_worlds: list[World] = []


def current() -> World:
    """The world that is being simulated."""
    return _worlds[-1]


def running() -> StagerProcess:
    """The stager that has the turn."""
    process = current().running
    assert process is not None, "only a stager asks for this"
    return process


@contextlib.contextmanager
def inhabited(world: World) -> Iterator[None]:
    """Make it the current one while the block lasts."""
    _worlds.append(world)
    try:
        yield
    finally:
        _worlds.pop()


@contextlib.contextmanager
def wired() -> Iterator[None]:
    """Put the simulated world under the real code while the block lasts."""
    clock = SimpleNamespace(monotonic=lambda: current().now, time=lambda: current().wall_clock())
    _RememberedClient.known.clear()  # of a wiring before, perhaps of other code
    with contextlib.ExitStack() as stack:

        def put(owner: Any, name: str, replacement: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, replacement))

        for module in [*sys.modules.values()]:
            ours = getattr(module, "__name__", "").partition(".")[0] in {"edge_agent", "protocol", "trainer_host"}
            if ours and hasattr(module, "CHUNK_BYTES"):
                put(module, "CHUNK_BYTES", CHUNK_BYTES)
        put(slots, "JudgeSettings", functools.partial(JudgeSettings, commit_pairs=COMMIT_PAIRS))
        put(stager, "time", clock)
        put(stager, "select", SimpleNamespace(select=lambda *_: running().pause()))
        put(stager, "limits", SimpleNamespace(deadline=lambda _: contextlib.nullcontext()))
        put(stager, "qualify", _qualify)
        put(stager, "only_daemon", _only_stager)
        put(stager, "ModelStore", lambda folder, **more: ModelStore(folder, running().disk, **more))
        put(stager, "Trust", lambda folder, root: Trust(folder, root, running().disk))
        put(stager, "TrustedTime", lambda file: TrustedTime(file, running().disk))
        put(fetching, "time", clock)
        put(fetching, "Link", StagerLink)
        put(trust, "_Client", _RememberedClient)
        put(trust, "TemporaryDirectory", lambda **_: contextlib.nullcontext("/"))
        for module, name in (
            (trust_store, "parsed"),
            (trust, "parsed"),
            (trust_store, "is_intact"),
            (trust, "is_intact"),
        ):
            put(module, name, functools.lru_cache(MEMORY)(getattr(module, name)))
        put(trusted_metadata_set, "datetime", SimpleNamespace(datetime=SimpleNamespace(now=_now), timezone=timezone))
        put(Metadata, "from_bytes", functools.lru_cache(MEMORY)(Metadata.from_bytes))
        put(SSlibKey, "verify_signature", _verify_once(SSlibKey.verify_signature))
        put(deployment, "step", _step)
        put(state_store.StateStore, "save", _save)
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, logging.NOTSET)
        yield


def _verify_once(verify: Callable[..., None]) -> Callable[..., None]:
    """As a key's `verify_signature`, which says the same of the same each time."""

    @functools.lru_cache(MEMORY)
    def verdict(_type: str, _public: str, signature: str, data: bytes, key: _Key) -> Exception | None:
        try:
            verify(key.key, Signature(key.key.keyid, signature), data)
        except UnverifiedSignatureError as error:
            return error
        return None

    def remembered(key: SSlibKey, signature: Signature, data: bytes) -> None:
        error = verdict(key.keytype, key.keyval["public"], signature.signature, data, _Key(key))
        if error is not None:
            raise error

    return remembered


class _Key:
    """A key that stands beside what tells it from others."""

    def __init__(self, key: SSlibKey) -> None:
        self.key = key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key)

    def __hash__(self) -> int:
        return 0


# What the world sees of the supervisor.

_real_step = deployment.step
_real_save = state_store.StateStore.save


def _step(state: deployment.State, event: deployment.Event) -> deployment.Step:
    step = _real_step(state, event)
    current().checks.stepped(state, event, step.state)
    return step


def _save(store: state_store.StateStore, slot: str, state: bytes) -> None:
    checks = current().checks
    checks.saving(slot, state)
    _real_save(store, slot, state)
    checks.saved(slot, state)


# What the stager sees of the world.


def _now(zone: tzinfo) -> datetime:
    return datetime.fromtimestamp(current().wall_clock(), zone)


def _qualify(data: bytes, release: Release) -> None:
    """As `edge_agent.qualification`: the model's first line says what comes of it."""
    behaviour = history.behaviour_of(data)
    process = running()
    process.pause()
    if behaviour == history.NAN:
        raise Rejected("not_finite", "the model's output is not finite", "outputs")
    if behaviour == history.CRASHES_STAGER:
        process.die_of_model(release.digest, by_hanging=False)
    if behaviour == history.HANGS_STAGER:
        process.die_of_model(release.digest, by_hanging=True)


@contextlib.contextmanager
def _only_stager(_folder: Path, _program: str, *, wait_s: float) -> Iterator[None]:
    """As `protocol.lock.only_daemon`."""
    process, world = running(), current()
    deadline = world.now + wait_s
    while world.stager_with_lock() is not None:
        if world.now > deadline:
            raise Unavailable("another stager is running")
        process.pause()
    process.has_lock = True
    try:
        yield
    finally:
        process.has_lock = False


class StagerLink:
    """As `protocol.link.Link`, on the world's broker."""

    def __init__(
        self,
        _broker: object,
        _client_id: str,
        *,
        on_message: Callable[[Message], None],
        on_connected: Callable[[], None],
        on_subscribed: Callable[[int], None],
    ) -> None:
        self.connected = False
        self.topics: set[str] = set()
        self.inbox: list[tuple[str, bytes]] = []
        self._on_message = on_message
        self._on_connected = on_connected
        self._on_subscribed = on_subscribed
        self._packets = 0
        self._granted: list[int] = []
        self._process = running()
        current().links.append(self)

    def subscribe(self, *filters: tuple[str, int]) -> int:
        """See `Link`."""
        self.topics.update(topic for topic, _ in filters)
        self._packets += 1
        self._granted.append(self._packets)
        return self._packets

    def unsubscribe(self, *filters: str) -> int:
        """See `Link`."""
        self.topics.difference_update(filters)
        self._packets += 1
        return self._packets

    def publish(self, _topic: str, payload: bytes, *, qos: int) -> int:
        """See `Link`; a stager publishes requests for chunks only."""
        assert qos == 1, "a request that is lost costs a time-out"
        if self.connected and self._process.returncode is None:
            current().requested(payload)
        return 0

    def turn(self, _timeout_s: float, _also: Sequence[object] = ()) -> list[object]:
        """See `Link`."""
        self._process.pause()
        if self.connected != current().broker_is_up:
            self.connected = not self.connected
            self.inbox.clear()
            if self.connected:
                self._on_connected()
        if self.connected:
            granted, self._granted = self._granted, []
            for packet in granted:
                self._on_subscribed(packet)
            arrived, self.inbox = self.inbox, []
            for topic, payload in arrived:
                self._on_message(Message(topic, payload, 1, False, None, None, 0))
        return []

    def close(self) -> None:
        """See `Link`."""
        self.connected = False
        links = current().links
        if self in links:
            links.remove(self)


class _RememberedClient:
    """python-tuf's client, which is asked once about the same documents."""

    _Client = trust._Client
    known: ClassVar[dict[bytes, tuple[dict[str, bytes], Exception | None, str, dict[str, bytes]]]] = {}

    def __init__(self, _folder: Path, root: bytes, held: trust.Documents, fetcher: trust._Observed) -> None:
        self._fetcher = fetcher
        self._root, self._held = root, dict(held)
        self._documents: dict[str, bytes] | None = None

    def refresh(self) -> None:
        """See `_Client`."""
        source = self._fetcher._source
        assert isinstance(source, trust.SetFetcher), "sets come as messages"
        era = bisect(ERAS, _now(UTC))  # what is expired does not change within one
        key = _hash_of([str(era), self._root, *self._held.items(), *source._roots, *source._documents.items()])
        if key not in self.known:
            if len(self.known) > SETS:
                self.known.clear()
            self.known[key] = self._refreshed()
        self._documents, error, self._fetcher.role, self._fetcher.documents = self.known[key]
        if error is not None:
            raise error

    def _refreshed(self) -> tuple[dict[str, bytes], Exception | None, str, dict[str, bytes]]:
        with TemporaryDirectory(dir=MEMORY_FOLDER) as folder:
            client = self._Client(Path(folder), self._root, self._held, self._fetcher)
            error: Exception | None = None
            try:
                client.refresh()
            except Exception as found:  # noqa: BLE001 - raised again, each time it is asked
                error = found
            return client.documents(), error, self._fetcher.role, self._fetcher.documents

    def documents(self) -> dict[str, bytes]:
        """See `_Client`."""
        assert self._documents is not None, "asked after the refresh"
        return dict(self._documents)

    def held(self, role: str) -> Any:
        """See `_Client`."""
        return trust._signed(self.documents().get(trust_store.file_of(role)))


def _hash_of(parts: Sequence[object]) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        for piece in part if isinstance(part, tuple) else (part,):
            data = piece.encode() if isinstance(piece, str) else piece
            assert isinstance(data, bytes), "documents and their names"
            found.update(b"%d " % len(data) + data)
    return found.digest()
