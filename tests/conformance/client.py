#!/usr/bin/env python
"""A command line over `edge_agent.trust`, so that a public suite can drive the device's verification.

It speaks the protocol of tuf-conformance, the suite of the TUF project, which is not kept here:

    pytest tuf_conformance --entrypoint tests/conformance/client.py

What the suite is told to expect of a device stands beside this file, in `client.py.xfails`.

`init` and `refresh` are what a device does. `download` is refused: a device fetches no targets by path but chunks by
their digest, after the verification that is tested here. The device's release targets are top-level, so nothing follows
delegations either.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tuf.ngclient import FetcherInterface  # type: ignore[attr-defined]
from tuf.ngclient.urllib3_fetcher import Urllib3Fetcher

from edge_agent.trust import Trust
from edge_agent.trusted_time import FILE, TrustedTime
from protocol.errors import EdgeswapError

# Not a name of metadata, so `Trust` leaves it alone.
PROVISIONED = "provisioned-root"


class Web(FetcherInterface):
    """Metadata from a web server, under the address that the suite gives."""

    def __init__(self, address: str) -> None:
        self._address = address.rstrip("/")
        self._http = Urllib3Fetcher()

    def _fetch(self, url: str) -> Iterator[bytes]:
        return self._http.fetch(f"{self._address}/{url.rpartition('/')[2]}")


def init(folder: Path, root: Path) -> int:
    """Provision the device."""
    for name in (PROVISIONED, "root.json"):
        shutil.copyfile(root, folder / name)
    return 0


def refresh(folder: Path, address: str) -> int:
    """Verify what the repository has now."""
    clock = TrustedTime(folder / FILE)
    now = clock.now(time.time())
    try:
        verified = Trust(folder, (folder / PROVISIONED).read_bytes()).verify(Web(address), now)
    except EdgeswapError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    clock.accepted(now)
    print(verified.versions)
    return 0


def main() -> int:
    """One command of the suite."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--metadata-dir", type=Path, required=True)
    for name in ("--metadata-url", "--target-name", "--target-dir", "--target-base-url"):
        parser.add_argument(name, action="append")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("trusted_root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    if given.command == "init":
        return init(given.metadata_dir, given.trusted_root)
    if given.command == "refresh":
        return refresh(given.metadata_dir, given.metadata_url[0])
    print("devices download no targets", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
