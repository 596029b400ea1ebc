"""How many transitions per second the host takes in, beside bare SQLite."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import numpy as np

from benchmarks.figures import Figure, compared, median
from benchmarks.fleet import ACTIONS, FEATURES
from benchmarks.yardstick import progress
from protocol.codec import compress
from protocol.messages import Transition, TransitionBatch
from trainer_host.database import Database
from trainer_host.ingest import Ingest
from trainer_host.store import Store

BATCH = 200
BATCHES_PER_COMMIT = 8


def payloads(count: int) -> list[bytes]:
    """What a device sends, compressed."""
    random = np.random.default_rng(1)
    found = []
    for first in range(1, count, BATCH):
        transitions = [_transition(seq, random) for seq in range(first, first + BATCH)]
        found.append(
            compress(
                TransitionBatch(epoch="bench", acked=0, first=first, last=first + BATCH - 1, transitions=transitions)
            )
        )
    return found


def _transition(seq: int, random: np.random.Generator) -> Transition:
    return Transition(
        seq=seq, slot="combat", battle=f"battle-{seq // 20}", actor="a", step=seq % 20,
        features=random.random(FEATURES, np.float32).tobytes(), action=seq % ACTIONS, taken=False, propensity=1.0,
        legal=bytes([1] * ACTIONS), reward=0.0, next_features=random.random(FEATURES, np.float32).tobytes(),
        done=seq % 20 == 19, truncated=False, model="0" * 64, version=1, at=1.7e9 + seq,
    )  # fmt: skip


def ingest(folder: Path, *, runs: int, count: int) -> Figure:
    """From the bytes of a message to committed rows, against `executemany` of tuples that are ready."""
    folder.mkdir(parents=True)
    arriving = payloads(count)
    ours, bare = [], []
    for run in range(runs):
        progress(f"ingest, run {run + 1} of {runs}")
        ours.append(_ingest(folder / f"ours-{run}.db", arriving))
        bare.append(_bare(folder / f"bare-{run}.db", folder / f"ours-{run}.db"))
    return compared(
        "ingest into SQLite", "/s", median(ours), ("executemany of ready tuples", median(bare)), more_is_better=True
    )


def _ingest(path: Path, arriving: list[bytes]) -> float:
    database = Database(f"sqlite:///{path}")
    taking = Ingest(Store(database))
    began = time.perf_counter()
    for index, payload in enumerate(arriving, 1):
        taking.receive("pi", payload)
        if index % BATCHES_PER_COMMIT == 0:
            taking.commit(1.7e9)
    taking.commit(1.7e9)
    rate = taking.stored / (time.perf_counter() - began)
    database.close()
    return rate


def _bare(path: Path, filled: Path) -> float:
    """The same rows into the same table, of the same grouping and durability, and nothing else."""
    Database(f"sqlite:///{path}").close()
    with sqlite3.connect(filled) as source:
        rows = source.execute("SELECT * FROM transitions").fetchall()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    statement = f"INSERT INTO transitions VALUES ({', '.join('?' * len(rows[0]))})"  # noqa: S608
    step = BATCH * BATCHES_PER_COMMIT
    began = time.perf_counter()
    for start in range(0, len(rows), step):
        with connection:
            connection.executemany(statement, rows[start : start + step])
    rate = len(rows) / (time.perf_counter() - began)
    connection.close()
    return rate
