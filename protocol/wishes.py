"""What an operator wishes of devices, signed: to serve one version of a slot, or not to serve one any more. Pure.

Wishes stand in the targets metadata beside the releases, so who can release a model can also pin or withdraw one, and
nobody else can. They are declarations, not commands: a device that was away obeys those that are still there when it
comes back, and obeying twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from protocol.errors import Rejected
from protocol.topics import checked_name

FIELD = "x-edgeswap-wishes"
MAX_WISHES = 64
MAX_NAMES = 64
MAX_AUTHOR_CHARACTERS = 128
MAX_NOTE_CHARACTERS = 256
LAST_SECOND = 253_402_300_799  # of the year 9999, the last that calendars know

Names = Annotated[tuple[str, ...], Meta(max_length=MAX_NAMES)]


class Wish(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="wish", tag=str.lower):
    """What both kinds say.

    Attributes:
        slot: Which slot it is about.
        version: Which version.
        devices: Names of devices it is for.
        groups: Names of groups of devices it is for. Without devices and groups, it is for all.
        at: When it was signed, seconds since the epoch.
        by: Who signed it, as that person's computer names them; the signature says which key.
        note: For people.
    """

    slot: str
    version: Annotated[int, Meta(ge=0, le=2**53)]
    devices: Names = ()
    groups: Names = ()
    at: Annotated[float, Meta(ge=0, le=LAST_SECOND)] = 0.0
    by: Annotated[str, Meta(max_length=MAX_AUTHOR_CHARACTERS)] = ""
    note: Annotated[str, Meta(max_length=MAX_NOTE_CHARACTERS)] = ""

    def concerns(self, device: str, groups: Collection[str]) -> bool:
        """Whether it is for a device that belongs to these groups."""
        everyone = not self.devices and not self.groups
        return everyone or device in self.devices or not set(self.groups).isdisjoint(groups)


class Pin(Wish, frozen=True):
    """Serve this version and no other, without a trial, until the pin is lifted."""


class Withdrawal(Wish, frozen=True):
    """Do not serve this version; where it is served, go back to the one before."""


class Desired(Struct, frozen=True, kw_only=True):
    """What the wishes come to for one slot of one device.

    Attributes:
        pin: What it is to serve, if that is said. A pin for the device goes before one for a group of it, and that
            before one for all; of two alike the newer counts.
        withdrawn: Withdrawals that concern it, by version, of several the one that a pin would be chosen by too. What
            is pinned is not withdrawn.
    """

    pin: Pin | None
    withdrawn: dict[int, Withdrawal]


def desired(wishes: Iterable[Pin | Withdrawal], slot: str, device: str, groups: Collection[str]) -> Desired:
    """What is wished of a slot of a device that belongs to these groups, in whatever order the wishes come."""

    def rank(wish: Pin | Withdrawal) -> tuple[int, float, Any]:
        specific = 2 if device in wish.devices else int(bool(wish.groups))
        return specific, wish.at, msgspec.structs.astuple(wish)  # the rest decides where times are equal

    concerned = sorted((wish for wish in wishes if wish.slot == slot and wish.concerns(device, groups)), key=rank)
    pins = [wish for wish in concerned if isinstance(wish, Pin)]
    pin = pins[-1] if pins else None
    withdrawn = {
        wish.version: wish
        for wish in concerned
        if isinstance(wish, Withdrawal) and (pin is None or wish.version != pin.version)
    }
    return Desired(pin=pin, withdrawn=withdrawn)


def to_field(wishes: Iterable[Pin | Withdrawal]) -> str:
    """What goes into the targets metadata under `FIELD`: one JSON text, since TUF's canonical JSON has no fractions."""
    return msgspec.json.encode(list(wishes)).decode()


def from_field(value: Any) -> tuple[Pin | Withdrawal, ...]:
    """The wishes of *verified* targets metadata; `None`, where the field is absent, is none.

    Raises:
        Rejected: With code `bad_wishes`, or `bad_name`.
    """
    if value is None:
        return ()
    if not isinstance(value, str):
        raise Rejected("bad_wishes", f"{FIELD} is no text", FIELD)
    try:
        wishes = msgspec.json.decode(value, type=tuple[Pin | Withdrawal, ...])
    except (ValueError, RecursionError) as error:  # also for text that is none
        raise Rejected("bad_wishes", f"{FIELD}: {error}", FIELD) from error
    if len(wishes) > MAX_WISHES:
        raise Rejected("bad_wishes", f"{len(wishes)} wishes, more than {MAX_WISHES}", FIELD)
    for wish in wishes:
        checked_name(wish.slot, "slot")
        for name in wish.devices:
            checked_name(name, "device")
        for name in wish.groups:
            checked_name(name, "group")
    return wishes
