"""The transfer of one model's chunks: which to ask for, and when. Pure: time and randomness come as arguments.

Chunks are asked for in a sliding window: as soon as half of it has arrived, it is topped up, so the host always has
something to send. When nothing has arrived for a while, what is missing is asked for again, after a jittered wait that
doubles each time; whatever arrives starts the count anew. A model may contain the same chunk twice; it is fetched once.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Sequence

from protocol.errors import Rejected

LONGEST_WAIT_S = 30.0
CHUNK_MISMATCH = "chunk_mismatch"
MAX_WRONG = 2


class Transfer:
    """The state of one transfer.

    Args:
        digests: Of the model's chunks, in order, from its manifest.
        sizes: Bytes of each.
        here: Digests of chunks that need not be fetched.
        rng: For the jitter.
        window: How many chunks may be on their way.
        timeout_s: How long nothing may arrive before the missing chunks are asked for again.
        attempts: How often in a row they are asked for in vain before `gave_up`.
    """

    def __init__(
        self,
        digests: Sequence[str],
        sizes: Sequence[int],
        here: Collection[str],
        rng: random.Random,
        *,
        window: int = 16,
        timeout_s: float = 5.0,
        attempts: int = 5,
    ) -> None:
        self.bytes_total = sum(sizes)
        self.unasked = 0
        self.wrong: Counter[str] = Counter()
        self.gave_up = False
        self._missing: dict[str, int] = {}
        self._bytes: Counter[str] = Counter()
        for index, (digest, size) in enumerate(zip(digests, sizes, strict=True)):
            if digest not in here:
                self._missing.setdefault(digest, index)
                self._bytes[digest] += size
        self._asked: set[str] = set()
        self._rng = rng
        self._window = window
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._attempt = 1
        self._deadline: float | None = None

    @property
    def done(self) -> bool:
        """Every chunk is here."""
        return not self._missing

    @property
    def bytes_here(self) -> int:
        """How many of the model's `bytes_total` are here."""
        return self.bytes_total - sum(self._bytes[digest] for digest in self._missing)

    @property
    def deadline(self) -> float | None:
        """When `ask` has to be called again at the latest; `None` while nothing is on its way."""
        return self._deadline

    def ask(self, now: float) -> dict[int, str]:
        """Index and digest of each chunk that is due to be asked for; often none.

        Sets `gave_up` when asking has been in vain.
        """
        if self._deadline is not None and now >= self._deadline:
            if self._attempt >= self._attempts:
                self.gave_up = True
                return {}
            self._attempt += 1
            self._wait(now)
            return {self._missing[digest]: digest for digest in self._missing if digest in self._asked}
        if self.gave_up or len(self._asked) > self._window // 2:
            return {}
        more = {index: digest for digest, index in self._missing.items() if digest not in self._asked}
        chosen = dict(list(more.items())[: self._window - len(self._asked)])
        self._asked.update(chosen.values())
        if chosen and self._deadline is None:
            self._wait(now)
        return chosen

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
        if digest not in self._asked:
            self.unasked += 1
            return False
        self._asked.discard(digest)
        if not intact:
            self.wrong[digest] += 1
            if self.wrong[digest] >= MAX_WRONG:
                raise Rejected(CHUNK_MISMATCH, f"{MAX_WRONG} times the data sent as chunk {digest} was not that chunk")
            return False
        del self._missing[digest]
        self._attempt = 1
        self._deadline = None
        if self._asked:
            self._wait(now)
        return True

    def _wait(self, now: float) -> None:
        wait_s = min(self._timeout_s * 2 ** (self._attempt - 1), LONGEST_WAIT_S)
        self._deadline = now + wait_s * self._rng.uniform(1.0, 1.5)


def bitmap(indices: Collection[int], count: int) -> bytes:
    """The `wanted` field of a request for some of `count` chunks: chunk 0 is the lowest bit of byte 0."""
    bits = bytearray(-(-count // 8))
    for index in indices:
        bits[index // 8] |= 1 << index % 8
    return bytes(bits)
