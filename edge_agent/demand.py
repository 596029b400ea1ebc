"""What signed metadata demands of a slot: which release it should have, and by whose wish. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from protocol.messages import ModelRef
from protocol.release import Release
from protocol.wishes import Desired, Pin, Withdrawal


class Demand(NamedTuple):
    """What a slot should have.

    Attributes:
        release: Which release; `None` where there is none, or what is pinned is not released.
        wish: Why it goes before all others, also if it is older; `None` where it is offered as the newest.
    """

    release: Release | None
    wish: Pin | Withdrawal | None


def demanded(wanted: Desired, releases: Iterable[Release], active: ModelRef | None) -> Demand:
    """What is pinned, or the newest release that is not withdrawn.

    Where what is served is withdrawn, and there was nothing to go back to, another release will do, whatever its age.

    Args:
        wanted: What is wished of the slot.
        releases: All that the metadata names for the slot.
        active: What the slot serves after it has heard of what is withdrawn.
    """
    if wanted.pin is not None:
        version = wanted.pin.version
        return Demand(next((release for release in releases if release.version == version), None), wanted.pin)
    allowed = (release for release in releases if release.version not in wanted.withdrawn)
    newest = max(allowed, key=lambda release: release.version, default=None)
    return Demand(newest, wanted.withdrawn.get(active.version) if active else None)
