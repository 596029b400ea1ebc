"""Typed messages between the supervisor and one child, over a socket pair.

Each message is MessagePack behind its length (4 bytes, little-endian). Neither side ever waits for the other: what the
socket does not take stays in a bounded buffer, and a message that does not fit there is refused by `send`.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")

MAX_BUFFERED_BYTES = 8 * 1024 * 1024
MAX_MESSAGE_BYTES = 4 * 1024 * 1024
READ_BYTES = 256 * 1024

_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()


class Channel(Generic[T]):
    """One end of a conversation.

    Args:
        sock: A connected stream socket; the channel owns it from now on.
        message_type: The tagged union of structs that the other side sends.
    """

    def __init__(self, sock: socket.socket, message_type: Any) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(message_type)
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self.closed = False

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._sock.fileno()

    def send(self, message: Any) -> bool:
        """Send without waiting.

        Returns:
            False if the message was dropped: the other side has gone, or has not read for so long that the buffer is
            full.
        """
        data = _encoder.encode(message)
        if self.closed or len(self._outgoing) + len(data) > MAX_BUFFERED_BYTES:
            return False
        self._outgoing += _LENGTH.pack(len(data))
        self._outgoing += data
        self.flush()
        return not self.closed

    def flush(self) -> None:
        """Write what is buffered, as far as the socket takes it."""
        if not self._outgoing or self.closed:
            return
        try:
            sent = self._sock.send(self._outgoing)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        del self._outgoing[:sent]

    def drain(self, timeout_s: float) -> bool:
        """Before a process ends: wait until the other side has taken what is buffered. Returns whether it has."""
        deadline = time.monotonic() + timeout_s
        while self._outgoing and not self.closed and (left_s := deadline - time.monotonic()) > 0:
            select.select([], [self], [], left_s)
            self.flush()
        return not self._outgoing

    def receive(self) -> list[T]:
        """All messages that have arrived whole. Sets `closed` when the other side has gone.

        Raises:
            msgspec.ValidationError: The other side does not speak our protocol: a bug of ours.
        """
        self._fill()
        messages: list[T] = []
        while len(self._incoming) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._incoming)
            assert length <= MAX_MESSAGE_BYTES, "both sides are ours"
            end = _LENGTH.size + length
            if len(self._incoming) < end:
                break
            messages.append(self._decoder.decode(self._incoming[_LENGTH.size : end]))
            del self._incoming[:end]
        return messages

    def close(self) -> None:
        """Close this end."""
        if not self.closed:
            self.closed = True
            self._sock.close()

    def _fill(self) -> None:
        while not self.closed:
            try:
                data = self._sock.recv(READ_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.close()
                return
            self._incoming += data
            if len(data) < READ_BYTES:
                return
