from __future__ import annotations

import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from edge_agent.database import QUICK_CHECK_BYTES
from edge_agent.outbox import BLOCK, MAX_ROW_BYTES, Outbox
from protocol.codec import MAX_PAYLOAD_BYTES, Decoder, compress, decompress
from protocol.errors import Rejected, Unavailable
from protocol.messages import Ack, Transition, TransitionBatch


def transition(step: int, battle: str = "b", size: int = 8) -> Transition:
    return Transition(
        0, "combat", battle, "a", step, b"x" * size, 1, False, 1.0, b"", 0.5, b"", False, False, "m", 1, 9.0
    )


def append(outbox: Outbox, count: int, battle: str = "b", size: int = 8) -> None:
    outbox.append([transition(step, battle, size) for step in range(count)])


def drain(outbox: Outbox) -> list[TransitionBatch]:
    """Everything up to the end of the window."""
    return list(iter(outbox.next_batch, None))


def ranges(batches: list[TransitionBatch]) -> list[tuple[int, int, int]]:
    return [(batch.first, batch.last, len(batch.transitions)) for batch in batches]


def acknowledge(outbox: Outbox, seq: int) -> int:
    return outbox.acknowledge(Ack(epoch=outbox.epoch, seq=seq))


def test_transitions_are_numbered_from_one_and_come_back_in_order(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db")
    assert outbox.next_batch() is None
    outbox.append([])
    append(outbox, 2)
    append(outbox, 1, "c")
    assert (outbox.rows, outbox.dropped) == (3, 0)
    batch = outbox.next_batch()
    assert batch is not None
    assert (batch.epoch, batch.acked, batch.first, batch.last) == (outbox.epoch, 0, 1, 3)
    assert [(sent.seq, sent.battle, sent.step) for sent in batch.transitions] == [(1, "b", 0), (2, "b", 1), (3, "c", 0)]
    assert Decoder(TransitionBatch).decode(decompress(compress(batch))) == batch
    assert outbox.next_batch() is None


def test_the_window_bounds_what_is_unacknowledged(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db", window=2, batch_rows=3)
    append(outbox, 10)
    assert ranges(drain(outbox)) == [(1, 3, 3), (4, 6, 3)]
    assert outbox.unacknowledged == 2
    assert acknowledge(outbox, 2) == 2
    assert outbox.next_batch() is None
    assert acknowledge(outbox, 6) == 4
    assert ranges(drain(outbox)) == [(7, 9, 3), (10, 10, 1)]
    assert (acknowledge(outbox, 10), outbox.rows, outbox.bytes, outbox.unacknowledged) == (4, 0, 0, 0)


def test_a_batch_is_bounded_in_bytes(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db", batch_bytes=1000)
    outbox.append([transition(0, size=400), transition(1, size=400), transition(2, size=400), transition(3, size=5000)])
    assert ranges(drain(outbox)) == [(1, 2, 2), (3, 3, 1), (4, 4, 1)]


def test_the_largest_row_fits_a_message_and_a_larger_one_is_dropped_and_counted(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db")
    noise = random.Random(1).randbytes(MAX_ROW_BYTES)
    frame = MAX_ROW_BYTES - 60
    for size in (MAX_ROW_BYTES, frame):
        outbox.append(
            [Transition(0, "s", "b", "a", 0, noise[:size], 0, False, None, b"", 0, b"", True, False, "m", 1, 0)]
        )
    assert (outbox.dropped, outbox.rows) == (1, 1)
    batch = outbox.next_batch()
    assert batch is not None
    assert (batch.first, batch.last) == (1, 2)
    assert MAX_PAYLOAD_BYTES - 1200 < len(compress(batch)) <= MAX_PAYLOAD_BYTES


def test_after_a_rewind_everything_unacknowledged_is_sent_again(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db", batch_rows=2)
    append(outbox, 5)
    drain(outbox)
    acknowledge(outbox, 3)
    outbox.rewind()
    assert outbox.unacknowledged == 0
    assert ranges(drain(outbox)) == [(4, 5, 2)]
    outbox.rewind()
    assert acknowledge(outbox, 5) == 2  # of what was sent before the rewind
    assert drain(outbox) == []
    append(outbox, 1)
    assert ranges(drain(outbox)) == [(6, 6, 1)]


def test_an_old_or_foreign_acknowledgement_deletes_nothing(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db")
    append(outbox, 3)
    drain(outbox)
    assert outbox.acknowledge(Ack(epoch="another", seq=3)) == 0
    assert acknowledge(outbox, 2) == 2
    assert acknowledge(outbox, 2) == acknowledge(outbox, 1) == 0
    assert (outbox.rows, outbox.acked) == (1, 2)


def test_an_acknowledgement_of_what_was_not_sent_is_refused(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db", batch_rows=2)
    append(outbox, 3)
    outbox.next_batch()
    with pytest.raises(Rejected) as caught:
        acknowledge(outbox, 3)
    assert (caught.value.code, caught.value.field, outbox.rows) == ("bad_ack", "seq", 3)


def test_a_full_outbox_drops_the_oldest_whole_battles(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db", max_bytes=2000)
    for battle in ("x", "y", "x", "z"):
        append(outbox, 3, battle)  # each row takes about 110 bytes
    assert (outbox.rows, outbox.dropped) == (12, 0)
    append(outbox, 9, "w")
    assert (outbox.rows, outbox.dropped) == (15, 6)
    assert outbox.bytes <= 2000
    (batch,) = drain(outbox)
    assert [sent.battle for sent in batch.transitions] == ["y"] * 3 + ["z"] * 3 + ["w"] * 9
    assert (batch.first, batch.last) == (1, 21)


def test_ranges_join_up_across_what_was_dropped(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db", max_bytes=1200, batch_rows=2)
    append(outbox, 4, "x")
    assert ranges(drain(outbox)) == [(1, 2, 2), (3, 4, 2)]
    append(outbox, 9, "y")
    assert outbox.dropped == 4
    assert ranges(drain(outbox)) == [(5, 6, 2), (7, 8, 2), (9, 10, 2), (11, 12, 2), (13, 13, 1)]
    outbox.rewind()
    assert ranges([next(iter(drain(outbox)))]) == [(1, 6, 2)]


def test_what_alone_is_larger_than_the_outbox_is_dropped_and_counted(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db", max_bytes=500)
    append(outbox, 1, "x")
    append(outbox, 20, "y")
    assert (outbox.rows, outbox.bytes, outbox.dropped) == (0, 0, 21)
    assert outbox.next_batch() is None


def test_a_reopened_outbox_goes_on(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db", max_bytes=1000)
    append(outbox, 3, "x")
    append(outbox, 7, "y")
    drain(outbox)
    acknowledge(outbox, 5)
    outbox.close()
    again = Outbox(tmp_path / "outbox.db", max_bytes=1000)
    assert (again.epoch, again.rows, again.bytes, again.acked, again.dropped) == (
        outbox.epoch,
        outbox.rows,
        outbox.bytes,
        5,
        3,
    )
    append(again, 1, "z")
    (batch,) = drain(again)
    assert [sent.seq for sent in batch.transitions] == [6, 7, 8, 9, 10, BLOCK + 1]
    assert (batch.first, batch.acked) == (6, 5)


def test_a_number_is_used_once_even_if_a_power_loss_undoes_the_append(tmp_path: Path) -> None:
    """What the disk had before an append, and no more, is what a power loss may leave."""
    path, left = tmp_path / "outbox.db", tmp_path / "left.db"
    outbox = Outbox(path)
    append(outbox, 1)
    for suffix in ("", "-wal"):
        shutil.copy(f"{path}{suffix}", f"{left}{suffix}")
    append(outbox, 5)
    (sent,) = drain(outbox)
    again = Outbox(left)
    append(again, 5, "after")
    (batch,) = drain(again)
    assert again.epoch == outbox.epoch
    assert min(each.seq for each in batch.transitions if each.battle == "after") > sent.last


def test_many_transitions_need_more_than_one_block(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db", batch_rows=100_000, batch_bytes=10**9)
    for _ in range(3):
        append(outbox, BLOCK // 2 + 1)
    append(outbox, BLOCK * 2)
    (batch,) = drain(outbox)
    assert [sent.seq for sent in batch.transitions] == list(range(1, len(batch.transitions) + 1))
    assert outbox.rows == batch.last == 3 * (BLOCK // 2 + 1) + BLOCK * 2


def test_a_file_that_is_no_database_is_set_aside_and_a_new_epoch_begins(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    epochs = set()
    for count in range(1, 4):
        outbox = Outbox(path)
        assert outbox.set_aside == (tmp_path / f"outbox.db.corrupt-{count - 1}" if count > 1 else None)
        append(outbox, 1)
        assert ranges(drain(outbox)) == [(1, 1, 1)]
        epochs.add(outbox.epoch)
        outbox.close()
        path.write_bytes(b"garbage" * 1000)
    assert len(epochs) == 3


def test_rows_lost_with_a_file_that_is_damaged_while_the_agent_runs_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    outbox = Outbox(path, max_bytes=QUICK_CHECK_BYTES * 4)
    while path.stat().st_size <= QUICK_CHECK_BYTES:
        append(outbox, 20, size=100_000)
    rows, epoch = outbox.rows, outbox.epoch
    outbox.close()
    with path.open("r+b") as file:
        for page in range(path.stat().st_size // 8192, path.stat().st_size // 4096, 2):
            file.seek(page * 4096)
            file.write(b"\xa5" * 4096)
    outbox = Outbox(path, max_bytes=QUICK_CHECK_BYTES * 4, window=1000)
    assert (outbox.set_aside, outbox.rows) == (None, rows)
    sent = outbox.next_batch()
    assert sent is not None
    assert sent.last > 0
    with pytest.raises(Unavailable, match="damaged"):
        drain(outbox)
    assert outbox.set_aside == tmp_path / "outbox.db.corrupt-1"
    assert (outbox.rows, outbox.bytes, outbox.dropped, outbox.unacknowledged) == (0, 0, rows, 0)
    append(outbox, 2)
    with pytest.raises(Rejected):
        acknowledge(outbox, 1)
    assert ranges(drain(outbox)) == [(1, 2, 2)]
    assert outbox.epoch != epoch
    outbox.close()
    assert Outbox(path).dropped == rows


def test_a_row_that_comes_back_in_another_form_is_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    outbox = Outbox(path)
    append(outbox, 4)
    with sqlite3.connect(path) as other:
        other.execute("UPDATE transitions SET blob = x'00' WHERE seq = 2")
        other.execute("UPDATE transitions SET blob = substr(blob, 1, 9) WHERE seq = 4")
    (batch,) = drain(outbox)
    assert (batch.first, batch.last, [sent.seq for sent in batch.transitions]) == (1, 4, [1, 3])
    assert (outbox.rows, outbox.dropped) == (2, 2)
    assert acknowledge(outbox, 4) == 2
    assert (outbox.rows, outbox.bytes) == (0, 0)


def test_on_a_full_disk_nothing_is_half_written(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db")
    append(outbox, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "outbox.db-wal").stat().st_size + 50_000, before[1]))
    try:
        with pytest.raises(Unavailable):
            append(outbox, 100, "y", size=2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (outbox.rows, outbox.dropped) == (1, 0)
    append(outbox, 2, "y")
    assert ranges(drain(outbox)) == [(1, 3, 3)]


def test_what_was_appended_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom edge_agent.outbox import Outbox\n"
        "from protocol.messages import Transition\noutbox = Outbox(Path(sys.argv[1]))\n"
        "outbox.append([Transition(0, 's', 'b', 'a', n, b'', 0, False, 1., b'', 0., b'', False, False, 'm', 1, 0.)"
        " for n in range(7)])\nprint(outbox.epoch, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    died = subprocess.run([sys.executable, "-c", program, str(path)], check=False, capture_output=True, text=True)
    assert died.returncode == -9
    outbox = Outbox(path)
    assert (outbox.epoch, outbox.rows) == (died.stdout.strip(), 7)


class Streaming(RuleBasedStateMachine):
    """An outbox, a network that loses and repeats, and a trainer that commits, against plain sets.

    What was appended is at each moment committed, dropped and counted, or still here; and the trainer never gets one
    number for two transitions.
    """

    root: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = self.root / os.urandom(8).hex()
        self.outbox = self.opened()
        self.appended = 0
        self.committed: dict[int, int] = {}
        self.highest = 0
        self.network: list[TransitionBatch] = []
        self.acks: list[int] = []

    def opened(self) -> Outbox:
        return Outbox(self.folder / "outbox.db", max_bytes=3000, window=3, batch_rows=4, batch_bytes=600)

    @rule(count=st.integers(1, 8), battle=st.sampled_from("uvwxyz"), size=st.sampled_from([1, 50, 400]))
    def append(self, count: int, battle: str, size: int) -> None:
        numbered = range(self.appended, self.appended + count)
        self.outbox.append([transition(step, battle, size) for step in numbered])
        self.appended += count

    @rule()
    def send(self) -> None:
        batch = self.outbox.next_batch()
        if batch is not None:
            assert len(batch.transitions) <= 4
            self.network.append(batch)

    @precondition(lambda self: self.network)
    @rule(which=st.integers(0, 10), keep=st.booleans())
    def deliver(self, which: int, keep: bool) -> None:
        batch = self.network[which % len(self.network)]
        if not keep:
            self.network.remove(batch)
        if batch.first > self.highest + 1:
            return
        for sent in batch.transitions:
            assert batch.first <= sent.seq <= batch.last
            assert self.committed.setdefault(sent.seq, sent.step) == sent.step
        self.highest = max(self.highest, batch.last)
        self.acks.append(self.highest)

    @precondition(lambda self: self.network)
    @rule()
    def lose(self) -> None:
        self.network.pop()

    @precondition(lambda self: self.acks)
    @rule(which=st.integers(0, 10))
    def acknowledge(self, which: int) -> None:
        seq = self.acks[which % len(self.acks)]
        try:
            acknowledge(self.outbox, seq)
        except Rejected:
            assert seq > self.outbox.acked  # sent before a restart; it will be sent again
        assert self.outbox.acked <= self.highest

    @rule()
    def reconnect(self) -> None:
        self.outbox.rewind()

    @rule()
    def restart(self) -> None:
        before = (self.outbox.epoch, self.outbox.rows, self.outbox.bytes, self.outbox.dropped)
        self.outbox.close()
        self.outbox = self.opened()
        assert (self.outbox.epoch, self.outbox.rows, self.outbox.bytes, self.outbox.dropped) == before

    @invariant()
    def nothing_is_missing(self) -> None:
        with sqlite3.connect(self.folder / "outbox.db") as reader:
            held: dict[int, int] = dict(reader.execute("SELECT seq, bytes FROM transitions"))
        reader.close()
        assert self.outbox.rows == len(held)
        assert self.outbox.bytes == sum(held.values()) <= 3000
        assert len(held.keys() | self.committed.keys()) + self.outbox.dropped >= self.appended
        assert self.outbox.unacknowledged <= 3

    def teardown(self) -> None:
        self.outbox.rewind()
        while (batch := self.outbox.next_batch()) is not None:
            self.network = [batch]
            self.deliver(0, keep=False)
            assert acknowledge(self.outbox, batch.last) == len(batch.transitions)
        assert self.outbox.rows == 0
        assert len(self.committed) + self.outbox.dropped >= self.appended
        assert len(set(self.committed.values())) == len(self.committed)
        self.outbox.close()


def test_nothing_is_lost_or_doubled_whatever_happens(tmp_path: Path) -> None:
    class Here(Streaming):
        root = tmp_path

    run_state_machine_as_test(Here, settings=settings(max_examples=40, stateful_step_count=40, deadline=None))
