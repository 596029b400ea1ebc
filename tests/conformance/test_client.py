"""The command line that a public conformance suite drives, against a repository behind a real web server."""

from __future__ import annotations

import functools
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata

from protocol.messages import MetadataSet
from tests.signing import Host, release

CLIENT = Path(__file__).with_name("client.py")


class Repository:
    """Metadata in files, as a TUF repository serves them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = ""

    def put(self, metadata: MetadataSet) -> None:
        for version, root in enumerate(metadata.roots, 1):
            (self.folder / f"{version}.root.json").write_bytes(root)
        for role in ("snapshot", "targets"):
            data: bytes = getattr(metadata, role)
            (self.folder / f"{Metadata.from_bytes(data).signed.version}.{role}.json").write_bytes(data)
        (self.folder / "timestamp.json").write_bytes(metadata.timestamp)


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    made = Repository(tmp_path / "repository")
    made.folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(made.folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        made.address = f"http://127.0.0.1:{server.server_address[1]}/"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield made
        server.shutdown()
        thread.join()


def test_it_follows_a_repository_and_refuses_what_is_forged_or_old(tmp_path: Path, repository: Repository) -> None:
    folder = tmp_path / "metadata"
    folder.mkdir()

    def run(*command: str) -> int:
        options = ["--metadata-dir", str(folder), "--metadata-url", repository.address]
        return subprocess.run([sys.executable, str(CLIENT), *options, *command], check=False).returncode

    def version(role: str) -> int:
        found: int = Metadata.from_bytes((folder / f"{role}.json").read_bytes()).signed.version
        return found

    host = Host()
    (tmp_path / "root.json").write_bytes(host.roots[0])
    assert run("init", str(tmp_path / "root.json")) == 0
    assert version("root") == 1
    old = host.publish(release(1))
    host.rotate("timestamp")
    repository.put(host.publish(release(2)))
    assert run("refresh") == 0
    assert [version(role) for role in ("root", "timestamp", "snapshot", "targets")] == [2, 3, 3, 3]
    repository.put(old)
    assert run("refresh") == 1
    repository.put(host.set(timestamp=[]))
    assert run("refresh") == 1
    assert version("timestamp") == 3
    (repository.folder / "timestamp.json").unlink()
    assert run("refresh") == 1
    assert run("download") == 1
