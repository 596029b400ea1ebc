"""Topic names: the only place where they are spelled out.

A device or slot name becomes one level of a topic, so it holds letters, digits, dot, underscore and hyphen only.
"""

from __future__ import annotations

import re

from protocol.errors import Rejected

METADATA = "fleet/v1/metadata"
CHUNK_REQUESTS = "fleet/v1/chunks/request"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def checked_name(name: str, what: str = "name") -> str:
    """Return `name` if it can be one level of a topic and a file name.

    Raises:
        Rejected: With code `bad_name`, naming `what`.
    """
    if not _NAME.fullmatch(name):
        raise Rejected(
            "bad_name", f"{what} {name!r} must be 1 to 64 of A-Z a-z 0-9 . _ - and start with one of A-Z a-z 0-9", what
        )
    return name


def checked_digest(digest: str, what: str = "digest") -> str:
    """Return `digest` if it is a SHA-256 in lower-case hexadecimal.

    Raises:
        Rejected: With code `bad_digest`, naming `what`.
    """
    if not _DIGEST.fullmatch(digest):
        raise Rejected("bad_digest", f"{what} must be 64 lower-case hexadecimal digits", what)
    return digest


def state(device: str, slot: str) -> str:
    """Where a game publishes observations. `slot` may be the wildcard `+`."""
    return f"battle/v1/{device}/{slot}/state"


def action(device: str, slot: str) -> str:
    """Where the agent publishes decisions."""
    return f"battle/v1/{device}/{slot}/action"


def slot_of(topic: str) -> str:
    """The slot level of a `battle/v1/<device>/<slot>/…` topic."""
    return topic.split("/")[3]


def shared(group: str, topic: str) -> str:
    """An MQTT 5 shared subscription (specification section 4.8.2): each message goes to one member of the group."""
    return f"$share/{group}/{topic}"


def fleet(device: str, what: str) -> str:
    """A device's own fleet topic: availability, telemetry, transitions, ack, status or events. `device` may be `+`."""
    return f"fleet/v1/{device}/{what}"


def fleet_device(topic: str) -> tuple[str, str]:
    """Split `fleet/v1/<device>/<what>` into device and what."""
    _, _, device, what = topic.split("/", 3)
    return device, what


def chunk(digest: str) -> str:
    """Where the host publishes the chunk with this SHA-256. `digest` may be `+`."""
    return f"fleet/v1/chunks/{digest}"
