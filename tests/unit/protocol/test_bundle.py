"""The bundle: what is written can be read, by us and by any tool; what is mangled is refused, in bounded memory."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol import bundle
from protocol.bundle import MAX_DIRECTORY_BYTES, MAX_MEMBERS, Bundle, bundled
from protocol.codec import MAX_PAYLOAD_BYTES
from protocol.errors import Rejected, Unavailable
from protocol.release import CHUNK_BYTES

METADATA = b"\x84 a metadata set"
CHUNKS = (b"manifest", b"c" * CHUNK_BYTES, b"last")
WHOLE = b"".join(bundled(METADATA, CHUNKS))
END = struct.Struct("<4s4H2IH")
MANY_MIB = 4 * 1024 * 1024


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def written(folder: Path, data: bytes) -> Path:
    path = folder / "x.bundle"
    path.write_bytes(data)
    return path


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return file.getvalue()


def refusal(path: Path) -> str:
    with pytest.raises(Rejected) as refused, Bundle(path) as opened:
        opened.metadata_set()
    assert refused.value.code == "bad_bundle"
    assert "x.bundle" in refused.value.text
    return refused.value.text


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with Bundle(written(tmp_path, WHOLE)) as opened:
        assert opened.metadata_set() == METADATA
        assert [opened.chunk(digest(chunk)) for chunk in CHUNKS] == list(CHUNKS)
        assert digest(b"last") in opened
        assert digest(b"other") not in opened


def test_the_same_content_gives_the_same_bytes_and_a_shared_chunk_is_there_once() -> None:
    assert b"".join(bundled(METADATA, [*CHUNKS, *CHUNKS])) == WHOLE


def test_other_tools_can_read_a_bundle() -> None:
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["metadata.set", *(f"chunks/{digest(chunk)}" for chunk in CHUNKS)]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.read("metadata.set") == METADATA


def test_a_bundle_may_be_made_by_other_tools_and_hold_more(tmp_path: Path) -> None:
    data = zipped(("README", bytes(200_000)), (f"chunks/{digest(b'a')}", b"a"), ("metadata.set", METADATA))
    with Bundle(written(tmp_path, data)) as opened:
        assert opened.metadata_set() == METADATA
        assert opened.chunk(digest(b"a")) == b"a"


def test_an_empty_file_and_no_bundle_at_all_are_refused(tmp_path: Path) -> None:
    assert "cut short" in refusal(written(tmp_path, b""))
    assert "no bundle" in refusal(written(tmp_path, os.urandom(1000)))


def test_a_bundle_without_metadata_is_refused(tmp_path: Path) -> None:
    assert "holds no metadata.set" in refusal(written(tmp_path, zipped((f"chunks/{digest(b'a')}", b"a"))))


def test_what_was_added_at_the_end_or_the_beginning_is_refused(tmp_path: Path) -> None:
    assert "no bundle" in refusal(written(tmp_path, WHOLE + b"!"))
    assert "something was added" in refusal(written(tmp_path, b"!" + WHOLE))


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    data = zipped(("metadata.set", METADATA * 99), method=zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(written(tmp_path, data))


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    entry = WHOLE.index(b"PK\1\2")
    assert "encrypted" in refusal(written(tmp_path, altered(entry + 8, b"\1\0")))


def altered(at: int, new: bytes) -> bytes:
    return WHOLE[:at] + new + WHOLE[at + len(new) :]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["metadata.set", "README"])
def test_a_name_that_is_there_twice_is_refused(name: str, tmp_path: Path) -> None:
    data = zipped(("metadata.set", METADATA), (name, b"one"), (name, b"another"))
    assert "twice" in refusal(written(tmp_path, data))


@pytest.mark.parametrize(
    ("name", "size"), [("metadata.set", MAX_PAYLOAD_BYTES + 1), (f"chunks/{'a' * 64}", CHUNK_BYTES + 1)]
)
def test_a_member_that_is_too_long_is_refused_unread(name: str, size: int, tmp_path: Path) -> None:
    members = {"metadata.set": METADATA} | {name: bytes(size)}
    assert f"{size} bytes, more than {size - 1}" in refusal(written(tmp_path, zipped(*members.items())))


def test_a_member_that_says_it_has_four_gibibytes_is_refused_unread(tmp_path: Path) -> None:
    entry = WHOLE.index(b"PK\1\2")
    path = written(tmp_path, altered(entry + 20, b"\xff" * 8))
    assert "more than" in refusal(path)


@pytest.mark.parametrize(
    ("members", "directory_bytes"), [(MAX_MEMBERS + 1, 100), (1, MAX_DIRECTORY_BYTES + 1), (65535, 2**32 - 1)]
)
def test_a_directory_that_is_too_long_is_refused_unread(members: int, directory_bytes: int, tmp_path: Path) -> None:
    end = END.pack(b"PK\5\6", 0, 0, members, members, directory_bytes, 0, 0)
    path = tmp_path / "x.bundle"
    with path.open("wb") as file:  # as long as it says, and empty: a hole
        file.truncate(directory_bytes)
        file.seek(directory_bytes)
        file.write(end)
    tracemalloc.start()
    assert "more than a bundle may have" in refusal(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MANY_MIB


def test_a_directory_of_other_entries_than_it_says_is_refused(tmp_path: Path) -> None:
    start, size = WHOLE.index(b"PK\1\2"), len(WHOLE) - WHOLE.index(b"PK\1\2") - END.size
    body = WHOLE[: -END.size]

    def ended(count: int) -> Path:
        return written(tmp_path, body + END.pack(b"PK\5\6", 0, 0, count, count, size, start, 0))

    assert "longer than its members" in refusal(ended(3))
    assert "directory is cut short" in refusal(ended(5))


@pytest.mark.parametrize(
    ("at", "new", "said"),
    [
        (0, b"XX", "directory is damaged"),
        (10, b"\x08\0", "compressed"),
        (28, b"\xff\xff", "directory is damaged"),
        (30, b"\xff\xff", "directory is damaged"),
    ],
)
def test_damage_to_an_entry_is_refused(at: int, new: bytes, said: str, tmp_path: Path) -> None:
    assert said in refusal(written(tmp_path, altered(WHOLE.index(b"PK\1\2") + at, new)))


def test_a_bundle_of_several_disks_is_refused(tmp_path: Path) -> None:
    end = len(WHOLE) - END.size
    for at in (4, 6, 8):
        assert "no bundle" in refusal(written(tmp_path, altered(end + at, b"\x01\0")))


def test_an_entry_that_points_to_another_member_is_refused(tmp_path: Path) -> None:
    first = WHOLE.index(b"PK\1\2", WHOLE.index(b"PK\1\2") + 1)
    second = WHOLE.index(b"PK\1\2", first + 1)
    with Bundle(written(tmp_path, altered(first + 42, WHOLE[second + 42 : second + 46]))) as opened:
        with pytest.raises(Rejected, match="not where its directory says"):
            opened.chunk(digest(CHUNKS[0]))
        assert opened.chunk(digest(CHUNKS[1])) == CHUNKS[1]


def test_damage_to_a_member_is_named(tmp_path: Path) -> None:
    assert "metadata.set is damaged" in refusal(written(tmp_path, WHOLE.replace(METADATA, METADATA[:-1] + b"!")))
    with Bundle(written(tmp_path, altered(WHOLE.index(b"cccc") + 5, b"!"))) as opened:
        with pytest.raises(Rejected, match="damaged"):
            opened.chunk(digest(CHUNKS[1]))
        assert opened.chunk(digest(b"last")) == b"last"


def test_a_chunk_that_is_missing_is_named(tmp_path: Path) -> None:
    with Bundle(written(tmp_path, WHOLE)) as opened, pytest.raises(Rejected, match=digest(b"other")) as refused:
        opened.chunk(digest(b"other"))
    assert refused.value.code == "bad_bundle"


def test_a_directory_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    entry = WHOLE.index(b"PK\1\2")
    second = WHOLE.index(b"PK\3\4", 10)
    for place in (second, second + 1, len(WHOLE) - 1):
        refusal(written(tmp_path, altered(entry + 42, struct.pack("<I", place))))


def test_a_name_that_is_no_digest_is_not_looked_up(tmp_path: Path) -> None:
    with Bundle(written(tmp_path, WHOLE)) as opened, pytest.raises(Rejected) as refused:
        opened.chunk("../metadata.set")
    assert refused.value.code == "bad_digest"


def test_a_file_that_cannot_be_read_is_unavailable(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(Unavailable):
            Bundle(path)


@pytest.mark.linux
@pytest.mark.skipif(sys.platform != "linux", reason="procfs has a file that opens and does not read")
def test_a_disk_that_fails_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="cannot read"):
        Bundle(Path("/proc/self/mem"))


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, WHOLE)
    with Bundle(path) as opened:
        os.truncate(path, 20)
        with pytest.raises(Rejected, match="cut short"):
            opened.metadata_set()


def test_more_than_a_bundle_may_hold_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MAX_MEMBERS", 3)
    assert b"".join(bundled(METADATA, CHUNKS[:2]))
    with pytest.raises(Rejected) as refused:
        b"".join(bundled(METADATA, CHUNKS))
    assert refused.value.code == "too_large"


SMALL = b"".join(bundled(METADATA, [b"manifest", b"first", b"last"]))
POSITIONS = st.integers(0, len(SMALL) - 1)


def mangled() -> st.SearchStrategy[bytes]:
    """Flipped bits, numbers replaced where numbers are, pieces cut out, moved, doubled, and cut off."""

    def flip(places: list[tuple[int, int]]) -> bytes:
        data = bytearray(SMALL)
        for at, bit in places:
            data[at] ^= 1 << bit
        return bytes(data)

    def overwrite(at: int, new: bytes) -> bytes:
        return (SMALL[:at] + new + SMALL[at + len(new) :])[: len(SMALL)]

    extremes = st.sampled_from([b"\xff\xff", b"\xff" * 4, b"\0\0\0\x80", b"\xff\xff\xff\x7f", b"\0" * 4])
    return st.one_of(
        st.lists(st.tuples(POSITIONS, st.integers(0, 7)), min_size=1, max_size=4).map(flip),
        st.builds(overwrite, POSITIONS, extremes),
        st.integers(0, len(SMALL)).map(lambda size: SMALL[:size]),
        st.integers(0, len(SMALL)).map(lambda size: SMALL[size:]),
        st.tuples(POSITIONS, POSITIONS).map(lambda cut: SMALL[: cut[0]] + SMALL[cut[1] :]),
        st.binary(max_size=200).map(lambda data: data + SMALL[-END.size :]),
    )


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=mangled())
def test_a_mangled_bundle_is_refused_or_gives_what_was_put_in_within_bounds(data: bytes, tmp_path: Path) -> None:
    path = written(tmp_path, data)
    tracemalloc.start()
    try:
        assert read_whole(path) in ("whole", "bad_bundle")
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MANY_MIB


def read_whole(path: Path) -> str:
    """Read everything; either it is what was put in, or the code of the refusal."""
    try:
        with Bundle(path) as opened:
            assert opened.metadata_set() == METADATA
            for chunk in (b"manifest", b"first", b"last"):
                assert opened.chunk(digest(chunk)) == chunk
    except Rejected as refused:
        return refused.code
    return "whole"
