"""The transfer of one model's chunks: which to ask for and listen to, and when. Pure: time and chance are arguments.

Chunks are asked for in a sliding window: as soon as half of it has arrived, it is topped up, so the host always has
something to send. Each request names all that is still asked for, and what arrived last: so the host knows what is lost
and what is on its way. When nothing has arrived for a while, the same is asked for again, after a jittered wait that
doubles each time; whatever arrives starts the count anew. A model may contain the same chunk twice; it is fetched once.

Devices share. Each listens a bounded way ahead of what it asks for, and takes what others asked for. Before its first
request a device listens to *posts*, chunks spread over the whole model: who hears one joins that stream there instead
of having the beginning sent again, and fetches the beginning last, as everybody who came late does. What may be on its
way to a device is bounded by what it listens to.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType

from protocol.errors import Rejected

LONGEST_WAIT_S = 30.0
LISTEN_S = 1.0
POST_EVERY = 16
CHUNK_MISMATCH = "chunk_mismatch"
MAX_WRONG = 2
RATE_WINDOW_S = 5.0
BURST_S = 1.0


class Transfer:
    """The state of one transfer.

    Args:
        digests: Of the model's chunks, in order, from its manifest.
        sizes: Bytes of each.
        here: Digests of chunks that need not be fetched.
        rng: For the jitter.
        window: How many chunks may be asked for at a time.
        ahead: How many more to listen to.
        timeout_s: How long nothing may arrive before the missing chunks are asked for again.
        attempts: How often in a row they are asked for in vain before `gave_up`.
        bucket: Limits what is asked for; with it, listen to nothing else.

    Attributes:
        bytes_total: Of the model.
        unasked: How many arrivals were no use: strangers, and chunks that are here.
        wrong: How often what came under a chunk's name was something else.
        gave_up: Asking has been in vain.
        last: Index of the chunk that arrived last, while all that was sent after it is on its way here.
    """

    def __init__(
        self,
        digests: Sequence[str],
        sizes: Sequence[int],
        here: Collection[str],
        rng: random.Random,
        *,
        window: int = 16,
        ahead: int = 0,
        timeout_s: float = 5.0,
        attempts: int = 5,
        bucket: Bucket | None = None,
    ) -> None:
        self.bytes_total = sum(sizes)
        self.unasked = 0
        self.wrong: Counter[str] = Counter()
        self.gave_up = False
        self.last: int | None = None
        self._missing: dict[str, int] = {}  # digest to index, in the order in which to ask
        self._bytes: Counter[str] = Counter()
        for index, (digest, size) in enumerate(zip(digests, sizes, strict=True)):
            if digest not in here:
                self._missing.setdefault(digest, index)
                self._bytes[digest] += size
        self._bytes_missing = self._bytes.total()
        self._asked: dict[str, None] = {}  # in the order in which they were asked for
        self._arrivals = 0  # since the last request
        self._rng = rng
        self._window = window
        self._ahead = 0 if bucket else ahead
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._bucket = bucket
        self._attempt = 1
        self._deadline: float | None = None
        posts = list(self._missing)[::POST_EVERY] if len(self._missing) > self._window + self._ahead else []
        self._posts = frozenset(posts if self._ahead else [])
        self._listening = bool(self._posts)

    @property
    def missing(self) -> Mapping[str, int]:
        """Digest and index of each chunk that is not here."""
        return MappingProxyType(self._missing)

    @property
    def done(self) -> bool:
        """Every chunk is here."""
        return not self._missing

    @property
    def bytes_here(self) -> int:
        """How many of the model's `bytes_total` are here."""
        return self.bytes_total - self._bytes_missing

    @property
    def deadline(self) -> float | None:
        """When `ask` has to be called again at the latest; `None` while nothing is on its way."""
        return self._deadline

    def ask(self, now: float) -> dict[int, str]:
        """Index and digest of each chunk to ask for now, those that are on their way among them; often none.

        Sets `gave_up` when asking has been in vain.
        """
        if self._listening:
            return self._listen(now)
        if self._deadline is not None and now >= self._deadline:
            if self._attempt >= self._attempts:
                self.gave_up = True
                return {}
            self._attempt += 1
            self.last = None
            self._wait(now)
            return self._request(())
        half = self._window // 2
        more: list[str] = []
        if len(self._asked) <= half:
            rest = (digest for digest in self._missing if digest not in self._asked)
            more = list(self._affordable(islice(rest, self._window - len(self._asked)), now))
        if self.gave_up or (not more and self._arrivals <= half):
            return {}
        chosen = self._request(more)
        if chosen and self._deadline is None:
            self._wait(now)
        return chosen

    def audible(self) -> set[str]:
        """Digests of the chunks to listen to now: posts, or what is asked for and what comes after it."""
        if self._listening:
            return set(self._posts)
        return {*self._asked, *islice(self._missing, self._window + self._ahead)}

    def received(self, digest: str, now: float, *, intact: bool) -> bool:
        """Count an arrival under the name of a chunk.

        Args:
            digest: The chunk's name.
            now: Monotonic, in seconds.
            intact: Whether the data has that digest. Data that has not is asked for again.

        Returns:
            Whether it is a chunk to keep.

        Raises:
            Rejected: With code `chunk_mismatch` when wrong data came under one name for the second time.
        """
        if digest not in self._missing or not (intact or digest in self._asked):
            self.unasked += 1
            return False
        self._arrivals += 1
        self._asked.pop(digest, None)
        if not intact:
            self.wrong[digest] += 1
            if self.wrong[digest] >= MAX_WRONG:
                raise Rejected(CHUNK_MISMATCH, f"{MAX_WRONG} times the data sent as chunk {digest} was not that chunk")
            return False
        index = self._missing.pop(digest)
        self._bytes_missing -= self._bytes[digest]
        if self._listening:
            self._join(index)
        else:
            self.last = index
        self._attempt = 1
        self._deadline = None
        if self._asked:
            self._wait(now)
        return True

    def _listen(self, now: float) -> dict[int, str]:
        """Ask for nothing until others have had their time to be heard."""
        if self._deadline is None:
            self._deadline = now + LISTEN_S * self._rng.uniform(0.5, 1.0)
        elif now >= self._deadline:
            self._deadline, self._listening = None, False
            return self.ask(now)
        return {}

    def _join(self, index: int) -> None:
        """Go on behind what others have just been sent and have asked for already; what lies before comes last."""
        self._listening = False
        behind = index + self._window // 2
        later = {digest: each for digest, each in self._missing.items() if each > behind}
        self._missing = later | self._missing

    def _affordable(self, digests: Iterable[str], now: float) -> Iterator[str]:
        """As many as the rate limit lets pass."""
        for digest in digests:
            if self._bucket is not None and not self._bucket.take(self._bytes[digest], now):
                return
            yield digest

    def _request(self, more: Iterable[str]) -> dict[int, str]:
        """Ask for more, and anew for what is on its way: the host knows by `last` which of it was lost."""
        self._asked.update(dict.fromkeys(more))
        self._arrivals = 0
        return {self._missing[digest]: digest for digest in self._asked}

    def _wait(self, now: float) -> None:
        wait_s = min(self._timeout_s * 2 ** (self._attempt - 1), LONGEST_WAIT_S)
        self._deadline = now + wait_s * self._rng.uniform(1.0, 1.5)


class Bucket:
    """A rate limit: so many bytes in a second, on average, and those of one second at once.

    Args:
        rate: Bytes per second.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._level = rate * BURST_S
        self._at: float | None = None

    def take(self, size: int, now: float) -> bool:
        """Whether `size` bytes may pass now. What is larger than a second's worth passes when the bucket is full."""
        if self._at is not None:
            self._level = min(self._level + (now - self._at) * self._rate, self._rate * BURST_S)
        self._at = now
        if self._level < min(size, self._rate * BURST_S):
            return False
        self._level -= size
        return True


class Meter:
    """How fast something has grown lately."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def rate(self, size: int, now: float) -> float:
        """Bytes per second over the last seconds; 0 at first.

        Args:
            size: Bytes, now.
            now: Monotonic, in seconds.
        """
        self._seen.append((now, size))
        while len(self._seen) > 2 and now - self._seen[1][0] >= RATE_WINDOW_S:
            self._seen.popleft()
        began, before = self._seen[0]
        return (size - before) / (now - began) if now > began else 0.0


def bitmap(indices: Collection[int], count: int) -> bytes:
    """The `wanted` field of a request for some of `count` chunks: chunk 0 is the lowest bit of byte 0."""
    bits = bytearray(-(-count // 8))
    for index in indices:
        bits[index // 8] |= 1 << index % 8
    return bytes(bits)
