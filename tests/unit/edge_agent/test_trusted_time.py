from __future__ import annotations

import errno
import random
from datetime import UTC, datetime
from pathlib import Path

import pytest

from edge_agent.trusted_time import TrustedTime
from tests.simulation.device.disk import Medium, SimulatedDisk

FILE = Path("/state/trusted-time")
IN_2026 = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
IN_2030 = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def medium() -> Medium:
    made = Medium(10**6, random.Random(1))
    SimulatedDisk(made).make_folder(FILE.parent)
    return made


@pytest.fixture
def clock(medium: Medium) -> TrustedTime:
    return TrustedTime(FILE, SimulatedDisk(medium))


def test_it_is_the_latest_of_the_clocks_and_of_the_last_acceptance(clock: TrustedTime) -> None:
    assert clock.now(0.0) == datetime(1970, 1, 1, tzinfo=UTC)
    assert clock.now(0.0, IN_2026.timestamp()) == IN_2026
    clock.accepted(IN_2026)
    assert clock.now(0.0) == clock.now(0.0, 100.0) == IN_2026
    assert clock.now(IN_2030.timestamp(), 0.0) == IN_2030


def test_looking_does_not_move_it_and_acceptance_moves_it_forward_only(clock: TrustedTime) -> None:
    clock.accepted(IN_2026)
    clock.now(IN_2030.timestamp())
    assert clock.now(0.0) == IN_2026
    clock.accepted(IN_2030)
    clock.accepted(IN_2026)
    assert clock.now(0.0) == IN_2030


def test_it_survives_a_restart_and_a_power_cut(medium: Medium, clock: TrustedTime) -> None:
    clock.accepted(IN_2026)
    medium.cut()
    assert TrustedTime(FILE, SimulatedDisk(medium)).now(0.0) == IN_2026


def test_fractions_of_a_second_never_make_it_later_than_it_was(clock: TrustedTime) -> None:
    moment = IN_2026.replace(microsecond=999_999)
    clock.accepted(moment)
    assert clock.now(0.0) == IN_2026


@pytest.mark.parametrize("content", [b"", b"\n", b"9999999999\n", b"rot", b"9999999999\n" + b"0" * 64, b"\xff" * 75])
def test_a_damaged_file_counts_as_none_and_is_written_anew(clock: TrustedTime, medium: Medium, content: bytes) -> None:
    SimulatedDisk(medium).write(FILE, [content], sync=True)
    assert clock.now(0.0) == datetime(1970, 1, 1, tzinfo=UTC)
    clock.accepted(IN_2026)
    assert clock.now(0.0) == IN_2026


def test_any_rotten_bit_is_noticed(clock: TrustedTime, medium: Medium) -> None:
    clock.accepted(IN_2026)
    good = SimulatedDisk(medium).read(FILE)
    for place in range(len(good)):
        rotten = good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]
        SimulatedDisk(medium).write(FILE, [rotten], sync=True)
        assert clock.now(0.0).year == 1970


def test_a_disk_that_refuses_leaves_what_was_remembered(
    clock: TrustedTime, medium: Medium, caplog: pytest.LogCaptureFixture
) -> None:
    clock.accepted(IN_2026)
    medium.refusal = errno.EROFS
    clock.accepted(IN_2030)
    assert "cannot remember the time" in caplog.text
    assert clock.now(0.0) == IN_2026


class Unreadable(SimulatedDisk):
    def read(self, path: Path) -> bytes:
        raise OSError(errno.EIO, "bad sector", str(path))


def test_a_file_that_cannot_be_read_counts_as_none(medium: Medium, caplog: pytest.LogCaptureFixture) -> None:
    assert TrustedTime(FILE, Unreadable(medium)).now(5.0).timestamp() == 5.0
    assert "bad sector" in caplog.text
