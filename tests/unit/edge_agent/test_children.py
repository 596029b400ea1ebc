"""Child processes: how they begin and how they end."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import msgspec
import pytest

from edge_agent.channel import Channel
from edge_agent.children import (
    BaselineFailed,
    CandidateFailed,
    Child,
    FromTrial,
    FromWorker,
    Join,
    Joined,
    Leave,
    TimedPairs,
    ToWorker,
    TrialReady,
    first_message,
    inherited_channel,
    start,
)
from edge_agent.staging import FromStager, StagerSettings
from protocol.link import Broker

LIMIT_S = 20.0


def child_of(code: str) -> Child[Any]:
    """A child that runs a line of Python."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen([sys.executable, "-c", code])
    return Child(process, Channel(ours, FromWorker), "child")


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("raise SystemExit(3)", "exit status 3"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("pass", "exit status 0"),
    ],
)
def test_how_a_child_ended_is_said_for_people(code: str, how: str) -> None:
    child = child_of(code)
    child.process.wait(LIMIT_S)
    assert child.has_ended()
    assert child.how_it_ended() == how


def test_a_killed_child_is_reaped_and_its_channel_closed() -> None:
    child = child_of("import time; time.sleep(60)")
    assert not child.has_ended()
    assert child.how_it_ended() == "still running"
    assert child.pid == child.process.pid
    child.kill()
    assert child.how_it_ended() == "killed by SIGKILL"
    assert child.channel.closed
    child.kill()


def test_a_started_module_gets_its_assignment_first_and_answers(tmp_path: Any) -> None:
    settings = StagerSettings(
        device="pi7",
        folder=str(tmp_path),
        trust_folder=str(tmp_path / "trust"),
        root_file=str(tmp_path / "root.json"),
        metadata_file=str(tmp_path / "absent"),
        built_at=0.0,
        broker=Broker(),
    )
    child = start("stager", settings, FromStager, "stager")
    heard: list[Any] = []
    deadline = time.monotonic() + LIMIT_S
    while not heard and time.monotonic() < deadline:
        select.select([child], [], [], 0.1)
        heard += child.channel.receive()
    assert type(heard[0]).__name__ == "MetadataRefused"
    child.kill()


def test_an_inherited_channel_is_the_descriptor_on_the_command_line() -> None:
    ours, theirs = socket.socketpair()
    end: Channel[Any] = Channel(ours, FromWorker)
    channel = inherited_channel(["--fd", str(theirs.detach())], ToWorker)
    end.send(Join())
    assert first_message(channel) == Join()
    channel.send(Joined())
    assert end.receive() == [Joined()]
    channel.close()


def test_a_supervisor_that_goes_before_it_has_said_anything_leaves_no_assignment() -> None:
    ours, theirs = socket.socketpair()
    channel: Channel[Any] = Channel(ours, ToWorker)
    theirs.close()
    assert first_message(channel) is None


def test_an_assignment_that_arrives_in_pieces_is_waited_for() -> None:
    ours, theirs = socket.socketpair()
    channel: Channel[Any] = Channel(ours, ToWorker)
    data = msgspec.msgpack.encode(Leave())
    whole = len(data).to_bytes(4, "little") + data
    if os.fork() == 0:  # writes the second half once the first has been read
        theirs.send(whole[:5])
        while select.select([ours], [], [], 0)[0]:
            pass
        theirs.send(whole[5:])
        os._exit(0)
    theirs.close()
    assert first_message(channel) == Leave()
    os.wait()


@pytest.mark.parametrize(
    "message",
    [
        TrialReady(memory_bytes=1),
        TimedPairs([(1, 2)]),
        CandidateFailed(reason="a", text="b"),
        BaselineFailed(reason="a", text="b"),
    ],
)
def test_messages_are_told_apart(message: Any) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=FromTrial) == message


def test_last_words_are_waited_for_as_long_as_somebody_listens() -> None:
    ours, theirs = socket.socketpair()
    speaker: Channel[Any] = Channel(ours, ToWorker)
    listener: Channel[Any] = Channel(theirs, FromTrial)
    pairs = TimedPairs([(1, 2)] * 300_000)  # more than a socket takes at once
    assert speaker.send(pairs)
    assert not speaker.drain(0.05)
    heard: list[Any] = []

    def listen() -> None:
        while not heard:
            select.select([listener], [], [], 1.0)
            heard.extend(listener.receive())

    thread = threading.Thread(target=listen)
    thread.start()
    assert speaker.drain(LIMIT_S)
    thread.join(LIMIT_S)
    assert heard == [pairs]
    speaker.send(pairs)
    listener.close()
    assert not speaker.drain(LIMIT_S)
