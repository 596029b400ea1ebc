"""Chunks from a bundle: a model comes from a file, where no network reaches, through the same checks as over one."""

from __future__ import annotations

from collections.abc import Callable

from edge_agent.fetching import keep
from edge_agent.model_store import ModelStore
from edge_agent.staging import Postponed
from edge_agent.transfer import Transfer
from protocol.bundle import Bundle
from protocol.errors import Rejected

INCOMPLETE_BUNDLE = "incomplete_bundle"


class BundleSource:
    """Has the chunks of one model in a file; an `edge_agent.fetching.ChunkSource`.

    Args:
        bundle: Open; `close` closes it.
        store: Where chunks go.
        model: Digest of the model.
    """

    def __init__(self, bundle: Bundle, store: ModelStore, model: str) -> None:
        self._bundle = bundle
        self._store = store
        self._model = model

    def fetch(self, transfer: Transfer, count: int, on_turn: Callable[[], None]) -> Postponed | None:
        """See `ChunkSource`. What is missing or damaged postpones the model: the signed release is not to blame."""
        del count  # a file need not be told of the others
        for digest in list(transfer.missing):
            if digest not in self._bundle:
                return Postponed(self._model, INCOMPLETE_BUNDLE, f"the bundle does not hold its chunk {digest}")
            try:
                data = self._bundle.chunk(digest)
            except Rejected as refusal:
                return Postponed(self._model, refusal.code, refusal.text)
            keep(self._store, transfer, digest, data)
            on_turn()
        return None

    def close(self) -> None:
        """See `ChunkSource`."""
        self._bundle.close()
