"""Messages over a socket pair: whole, in order, bounded, and never waiting."""

from __future__ import annotations

import socket

from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from edge_agent import channel
from edge_agent.channel import Channel


class Note(Struct, frozen=True, tag=True):
    text: bytes


class Mark(Struct, frozen=True, tag=True):
    number: int


def pair() -> tuple[Channel[Note | Mark], Channel[Note | Mark]]:
    one, other = socket.socketpair()
    return Channel(one, Note | Mark), Channel(other, Note | Mark)


@given(st.lists(st.one_of(st.binary(max_size=100_000).map(Note), st.integers(0, 2**60).map(Mark)), max_size=20))
def test_messages_arrive_whole_and_in_order(messages: list[Note | Mark]) -> None:
    one, other = pair()
    received: list[Note | Mark] = []
    for message in messages:
        assert one.send(message)
    for _ in range(1000):
        one.flush()
        received += other.receive()
        if len(received) == len(messages):
            break
    assert received == messages
    one.close()
    other.close()


def test_a_reader_that_does_not_read_costs_messages_and_not_time() -> None:
    one, other = pair()
    big = Note(bytes(1024 * 1024))
    results = [one.send(big) for _ in range(20)]
    assert results[0]
    assert not results[-1]
    assert results.index(False) >= channel.MAX_BUFFERED_BYTES // len(big.text) - 1
    arrived: list[Note | Mark] = []
    for _ in range(1000):
        arrived += other.receive()
        one.flush()
        if len(arrived) == sum(results):
            break
    assert len(arrived) == sum(results)
    one.close()
    other.close()


def test_the_end_of_the_other_side_is_seen_after_its_last_message() -> None:
    one, other = pair()
    one.send(Mark(1))
    one.close()
    assert other.receive() == [Mark(1)]
    assert other.receive() == []
    assert other.closed
    assert not other.send(Mark(2))
    assert other.receive() == []


def test_sending_to_one_that_has_gone_is_refused() -> None:
    one, other = pair()
    other.close()
    one.send(Mark(1))
    assert not one.send(Mark(2))
