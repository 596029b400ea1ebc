"""A bundle: signed metadata and the chunks of models in one file, for devices that no network reaches.

It is an ordinary zip archive (PKWARE's APPNOTE.TXT, sections 4.3.7, 4.3.12 and 4.3.16) whose members are stored, not
compressed, so that any tool can look into it:

    metadata.set       the metadata set, exactly as it is published on `fleet/v1/metadata`
    chunks/<sha256>    a manifest or a chunk of a model, named by its content; one that several models share, once

The same content always gives the same bytes. Reading trusts nothing. What is accepted is less than what zip allows, and
a page here reads it in bounded memory, where `zipfile` would read a directory of any length. A member is found by its
exact name, and its size is known to be within bounds before a byte of it is read. What the metadata says, and whether
a chunk is one of a model that anybody signed, is for the caller to verify, as with what comes over the network.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

from protocol.codec import MAX_PAYLOAD_BYTES
from protocol.errors import Rejected, Unavailable
from protocol.release import CHUNK_BYTES
from protocol.topics import checked_digest

BAD_BUNDLE = "bad_bundle"
METADATA = "metadata.set"
MAX_MEMBERS = 32_768
MAX_DIRECTORY_BYTES = MAX_MEMBERS * 176

_CHUNK = re.compile(rb"chunks/[0-9a-f]{64}")
_ENCRYPTED = 1
_STORED = 0

# Signature, versions, flags, method, time and date, CRC-32, two sizes, lengths of name and extra field, …
_LOCAL = struct.Struct("<4s5H3I2H")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_LOCAL_MARK, _ENTRY_MARK, _END_MARK = b"PK\3\4", b"PK\1\2", b"PK\5\6"

_VERSION = 20
_MADE_ON_UNIX = 3 << 8 | _VERSION
_FIRST_OF_1980 = 1 << 5 | 1
_READABLE_FILE = 0o100644 << 16


class _Member(NamedTuple):
    """What the directory says of a member: where its local header is, its bytes, and their CRC-32."""

    start: int
    size: int
    crc: int


class Bundle:
    """A bundle that is open for reading, until it is closed.

    Args:
        path: The file.

    Raises:
        Rejected: With code `bad_bundle`: cut short, mangled, or no bundle.
        Unavailable: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._name = path.name
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise Unavailable(f"cannot read {path}: {error.strerror}") from error
        try:
            self._members = self._directory()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __contains__(self, digest: str) -> bool:
        return _chunk_name(digest) in self._members

    def metadata_set(self) -> bytes:
        """The metadata set, not verified; only whole.

        Raises:
            Rejected: With code `bad_bundle`.
            Unavailable: The file cannot be read.
        """
        member = self._members[METADATA.encode()]
        data = self._content(METADATA.encode(), member)
        if zlib.crc32(data) != member.crc:
            raise self._bad(f"{METADATA} is damaged")
        return data

    def chunk(self, digest: str) -> bytes:
        """The chunk or manifest with this SHA-256.

        Raises:
            Rejected: With code `bad_bundle`: it is not in the bundle, or is damaged.
            Unavailable: The file cannot be read.
        """
        name = _chunk_name(digest)
        if name not in self._members:
            raise self._bad(f"it does not hold chunk {digest}")
        data = self._content(name, self._members[name])
        if hashlib.sha256(data).hexdigest() != digest:
            raise self._bad(f"chunk {digest} is damaged")
        return data

    def _directory(self) -> dict[bytes, _Member]:
        """Read and check the table of members at the end of the file."""
        size = os.fstat(self._file.fileno()).st_size
        end = self._read(max(size - _END.size, 0), _END.size)
        mark, disk, first_disk, here, count, directory_bytes, start, comment = _END.unpack(end)
        if mark != _END_MARK or disk or first_disk or here != count or comment:
            raise self._bad("it is cut short, or no bundle")
        if count > MAX_MEMBERS or directory_bytes > MAX_DIRECTORY_BYTES:
            raise self._bad(f"it has {count} members in {directory_bytes} bytes, more than a bundle may have")
        if start + directory_bytes + _END.size != size:
            raise self._bad("it is cut short, or something was added to it")
        members = self._entries(self._read(start, directory_bytes), count)
        if METADATA.encode() not in members:
            raise self._bad(f"it holds no {METADATA}")
        return members

    def _entries(self, directory: bytes, count: int) -> dict[bytes, _Member]:
        members: dict[bytes, _Member] = {}
        at = 0
        for _ in range(count):
            name, member, at = self._entry(directory, at)
            if name in members:
                raise self._bad(f"it holds {name!r} twice")
            members[name] = member
        if at != len(directory):
            raise self._bad("its directory is longer than its members")
        return members

    def _entry(self, directory: bytes, at: int) -> tuple[bytes, _Member, int]:
        """One member's name and place, and where the next entry begins."""
        if at + _ENTRY.size > len(directory):
            raise self._bad("its directory is cut short")
        fields = _ENTRY.unpack_from(directory, at)
        mark, _made_by, _version, flags, method, _time, _date, crc, packed, size = fields[:10]
        name_bytes, extra_bytes, comment_bytes, *_, start = fields[10:]
        at += _ENTRY.size
        name = directory[at : at + name_bytes]
        at += name_bytes + extra_bytes + comment_bytes
        if mark != _ENTRY_MARK or at > len(directory):
            raise self._bad("its directory is damaged")
        if method != _STORED or flags & _ENCRYPTED or packed != size:
            raise self._bad(f"{name!r} is compressed or encrypted; the members of a bundle are stored as they are")
        limit = MAX_PAYLOAD_BYTES if name == METADATA.encode() else CHUNK_BYTES if _CHUNK.fullmatch(name) else None
        if limit is not None and size > limit:
            raise self._bad(f"{name!r} has {size} bytes, more than {limit}")
        return name, _Member(start, size, crc), at

    def _content(self, name: bytes, member: _Member) -> bytes:
        header = self._read(member.start, _LOCAL.size)
        mark, *_, name_bytes, extra_bytes = _LOCAL.unpack(header)
        start = member.start + _LOCAL.size
        if mark != _LOCAL_MARK or name_bytes != len(name) or self._read(start, name_bytes) != name:
            raise self._bad(f"{name!r} is not where its directory says")
        return self._read(start + name_bytes + extra_bytes, member.size)

    def _read(self, start: int, size: int) -> bytes:
        """Exactly `size` bytes from `start`."""
        try:
            self._file.seek(start)
            data = self._file.read(size)
        except OSError as error:
            raise Unavailable(f"cannot read {self._name}: {error.strerror}") from error
        if len(data) != size:
            raise self._bad("it is cut short")
        return data

    def _bad(self, text: str) -> Rejected:
        return Rejected(BAD_BUNDLE, f"{self._name} is not a whole bundle: {text}")


def bundled(metadata_set: bytes, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The bytes of a bundle, in pieces.

    Args:
        metadata_set: As it is published.
        chunks: Manifests and chunks; those that come again are left out.

    Raises:
        Rejected: With code `too_large`: more members than a bundle may have.
    """
    directory: list[bytes] = []
    seen: set[bytes] = set()
    place = 0
    for name, data in _members(metadata_set, chunks):
        if name in seen:
            continue
        if len(seen) == MAX_MEMBERS:
            raise Rejected("too_large", f"a bundle holds at most {MAX_MEMBERS} members: choose fewer slots")
        seen.add(name)
        about = (_VERSION, 0, _STORED, 0, _FIRST_OF_1980, zlib.crc32(data), len(data), len(data), len(name), 0)
        directory.append(
            _ENTRY.pack(_ENTRY_MARK, _MADE_ON_UNIX, *about, 0, 0, 0, _READABLE_FILE, place) + name  # no comment
        )
        header = _LOCAL.pack(_LOCAL_MARK, *about) + name
        place += len(header) + len(data)
        yield header
        yield data
    yield from directory
    yield _END.pack(_END_MARK, 0, 0, len(directory), len(directory), sum(map(len, directory)), place, 0)


def _members(metadata_set: bytes, chunks: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
    yield METADATA.encode(), metadata_set
    for data in chunks:
        yield _chunk_name(hashlib.sha256(data).hexdigest()), data


def _chunk_name(digest: str) -> bytes:
    return b"chunks/" + checked_digest(digest).encode()
