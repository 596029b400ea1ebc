"""What may be wrong with this host's set-up, and what to do about it. Checks look and report, and change nothing."""

from __future__ import annotations

import importlib.util
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp  # type: ignore[attr-defined]

from protocol.broker_check import check_broker, check_transport
from protocol.command_line import Finding, Health
from protocol.errors import EdgeswapError, Misconfigured
from protocol.messages import MetadataSet
from trainer_host import keys
from trainer_host.database import Database, is_new
from trainer_host.repository import Repository
from trainer_host.repository_files import TIMESTAMP
from trainer_host.settings import Settings
from trainer_host.store import Store

TENSORFLOW_S = 120.0
GIB = 1024**3
DISK_WARNING_BYTES, DISK_FAILED_BYTES = 2 * GIB, GIB // 4
CLOCK_SLACK_S = 300.0
_ROLES = {"root": Root, "targets": Targets, "snapshot": Snapshot, "timestamp": Timestamp}


def examine(settings: Settings) -> list[Finding]:
    """Make every check."""
    now = datetime.now(UTC)
    return [
        check_broker(settings.broker, settings.client_id),
        *check_transport(settings.broker),
        clock(settings, now.timestamp()),
        disk(Path(settings.state_dir)),
        *key_files(Path(settings.keys_dir), settings),
        *metadata(settings, now),
        database(settings.database),
        tensorflow(),
        runtime(),
    ]


def clock(settings: Settings, now: float) -> Finding:
    """A clock that is behind what was written earlier is wrong: signatures and expiry depend on it."""
    known = [Path(__file__), settings.repository_dir / TIMESTAMP]
    newest = max(path.stat().st_mtime for path in known if path.exists())
    if now + CLOCK_SLACK_S < newest:
        detail = f"the clock is {newest - now:.0f} s behind files of this host"
        return Finding(
            "clock", Health.FAILED, detail, "Set it, and turn on time synchronisation: timedatectl set-ntp true"
        )
    return Finding("clock", Health.OK, datetime.fromtimestamp(now, UTC).isoformat(" ", "seconds"))


def disk(folder: Path) -> Finding:
    """Room for the database, jobs and models."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{free / GIB:.1f} GiB free for {folder}"
    remedy = "Make room, or move state_dir to a larger disk."
    if free < DISK_FAILED_BYTES:
        return Finding("disk", Health.FAILED, detail, remedy)
    if free < DISK_WARNING_BYTES:
        return Finding("disk", Health.WARNING, detail, remedy)
    return Finding("disk", Health.OK, detail)


def key_files(folder: Path, settings: Settings) -> Iterator[Finding]:
    """Which roles' keys are here, whether they open, and whether others may read them."""
    try:
        index, passphrase = keys.roles(folder), settings.passphrase()
    except Misconfigured as error:
        yield Finding("keys", Health.FAILED, str(error), "Make keys once with `trainer-host keys init`.")
        return
    for role in keys.ROLES:
        here = [entry for entry in index[role] if keys.is_here(folder, entry)]
        if not here:
            yield _absent_key(role, f"none of the {role} keys is in {folder}")
            continue
        try:
            for entry in here:
                keys.load(folder, role, entry, passphrase)
        except EdgeswapError as error:
            yield _unopenable_key(role, error)
            continue
        if role == "root":
            remedy = "Move root.pem to a place that is not on any network: docs/keys.md."
            yield Finding("key root", Health.WARNING, "it is on this host", remedy)
        else:
            yield Finding(f"key {role}", Health.OK, "it is here and opens")
        for entry in here:
            path = keys.file_of(folder, entry)
            if path is not None and (finding := _private(f"key {role} file", path)).health is not Health.OK:
                yield finding


def metadata(settings: Settings, now: datetime) -> Iterator[Finding]:
    """When each role's signature expires."""
    try:
        found = msgspec.msgpack.decode(Repository(settings.repository_dir).metadata_set(), type=MetadataSet)
        parts = {
            "root": found.roots[-1], "targets": found.targets, "snapshot": found.snapshot, "timestamp": found.timestamp,
        }  # fmt: skip
        expiries = {role: Metadata[kind].from_bytes(parts[role]).signed.expires for role, kind in _ROLES.items()}  # type: ignore[valid-type]
    except (EdgeswapError, RepositoryError) as error:
        yield Finding("metadata", Health.FAILED, str(error), "Make a repository with `trainer-host keys init`.")
        return
    for role, expires in expiries.items():
        left = expires - now
        detail = f"expires {expires:%Y-%m-%d %H:%M} UTC"
        remedy = {
            "root": "Sign it again before then: trainer-host keys renew root",
            "targets": "Sign them again before then: trainer-host keys renew targets",
        }.get(role, "Run the host: it signs this again by itself.")
        if left <= timedelta(0):
            yield Finding(f"metadata {role}", Health.FAILED, detail.replace("expires", "expired"), remedy)
        elif left < settings.lifetimes.of(role) / 4:
            yield Finding(f"metadata {role}", Health.WARNING, detail, remedy)
        else:
            yield Finding(f"metadata {role}", Health.OK, detail)


def database(url: str) -> Finding:
    """Open it and count; one that is not there yet is not made."""
    try:
        if is_new(url):
            return Finding("database", Health.OK, "it will be made at the first start")
        opened = Database(url)
    except EdgeswapError as error:
        return Finding(
            "database", Health.FAILED, str(error), "Mend `database` in the configuration, or the file's owner."
        )
    try:
        total = sum(slot.transitions for slot in Store(opened).totals())
    finally:
        opened.close()
    return Finding("database", Health.OK, f"{opened.name}: {total} transitions")


def tensorflow() -> Finding:
    """Import it, in a process of its own."""
    if importlib.util.find_spec("tensorflow") is None:
        return Finding("TensorFlow", Health.FAILED, "it is not installed", "Install it: pip install 'edgeswap[host]'")
    command = [sys.executable, "-c", "import tensorflow; print(tensorflow.__version__)"]
    try:
        child = subprocess.run(command, capture_output=True, timeout=TENSORFLOW_S, check=False, text=True)
    except subprocess.TimeoutExpired:
        return Finding(
            "TensorFlow", Health.FAILED, f"no import within {TENSORFLOW_S:.0f} s", "Is this machine overloaded?"
        )
    if child.returncode:
        said = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        return Finding("TensorFlow", Health.FAILED, said, "Install it again: pip install --force-reinstall tensorflow")
    return Finding("TensorFlow", Health.OK, child.stdout.strip().splitlines()[-1])


def runtime() -> Finding:
    """The interpreter for parity and the gate."""
    if importlib.util.find_spec("ai_edge_litert") is None:
        return Finding("runtime", Health.FAILED, "ai-edge-litert is not installed", "pip install 'edgeswap[host]'")
    return Finding("runtime", Health.OK, "ai-edge-litert")


def _unopenable_key(role: str, error: EdgeswapError) -> Finding:
    remedy = "Check passphrase_file, and the file against your copy."
    return Finding(f"key {role}", Health.FAILED, f"it is here and does not open: {error}", remedy)


def _absent_key(role: str, detail: str) -> Finding:
    if role == "root":
        return Finding("key root", Health.OK, "it is not on this host, as it should be")
    if role == "targets":
        remedy = "Put it here if this host is to release models by itself."
        return Finding("key targets", Health.WARNING, f"releases wait for signatures: {detail}", remedy)
    remedy = "Put it back from your copy, and check passphrase_file: without it signatures run out."
    return Finding(f"key {role}", Health.FAILED, detail, remedy)


def _private(name: str, path: Path) -> Finding:
    """A file that only its owner may read."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        path.open("rb").close()
    except OSError as error:
        return Finding(
            name, Health.FAILED, f"cannot read {path}: {error.strerror}", "Check the path and the file's owner."
        )
    if mode & 0o077:
        return Finding(name, Health.WARNING, f"others may read {path} (mode {mode:o})", f"chmod 600 {path}")
    return Finding(name, Health.OK, f"{path}")
