"""What operators wish of devices, edited: the host's side of `protocol.wishes`.

A device, a group, or all devices together, have at most one pin for a slot, and at most one withdrawal of a version of
it: a new wish takes over those it names from the older ones, and lifting works on just those that are named. So an edit
that is made twice changes nothing the second time, and then nothing is signed.

An edit is a function of what is wished and what is released; `carry_out` applies it under the repository's lock.
"""

from __future__ import annotations

import getpass
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple, TypeAlias

from msgspec.structs import replace
from tuf.api.metadata import Targets  # type: ignore[attr-defined]

from protocol.errors import Misconfigured, Rejected
from protocol.topics import checked_name
from protocol.wishes import (
    FIELD,
    MAX_AUTHOR_CHARACTERS,
    MAX_NAMES,
    MAX_NOTE_CHARACTERS,
    MAX_WISHES,
    Pin,
    Withdrawal,
    from_field,
    to_field,
)
from trainer_host.repository import Repository, versions

Wishes: TypeAlias = tuple[Pin | Withdrawal, ...]
Kind: TypeAlias = Callable[[Pin | Withdrawal], bool]

_EVERYONE = ("all devices", "")


class Whom(NamedTuple):
    """Whom a wish is for: names of devices and of groups; all devices where both are empty."""

    devices: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


class Said(NamedTuple):
    """When, by whom and with what note; as in `protocol.wishes.Wish`."""

    at: float
    by: str
    note: str = ""


class Edited(NamedTuple):
    """The wishes as they are to be, and a sentence or two for people about that."""

    wishes: Wishes
    text: str


Edit: TypeAlias = Callable[[Wishes, Sequence[int]], Edited]
"""From what is wished, and the slot's released versions, ascending. Raises `Rejected`."""


class _UnchangedError(Exception):
    """An edit changes nothing. It ends `Repository.amend` before anything is signed."""

    def __init__(self, edited: Edited) -> None:
        super().__init__(edited.text)
        self.edited = edited


def whom(devices: Iterable[str] = (), groups: Iterable[str] = ()) -> Whom:
    """Names as they were typed: checked, in order, each once.

    Raises:
        Rejected: With code `bad_name`, or `too_many_names`.
    """
    to = Whom(
        tuple(sorted({checked_name(name, "device") for name in devices})),
        tuple(sorted({checked_name(name, "group") for name in groups})),
    )
    for what, names in to._asdict().items():
        if len(names) > MAX_NAMES:
            raise Rejected("too_many_names", f"{len(names)} {what}, more than {MAX_NAMES} in one wish", what)
    return to


def said_here(at: float, note: str = "") -> Said:
    """What is said of a wish that is made here: by whom as well.

    Args:
        at: When, seconds since the epoch.
        note: For people.

    Raises:
        Rejected: With code `too_long` for the note.
    """
    if len(note) > MAX_NOTE_CHARACTERS:
        raise Rejected("too_long", f"a note of {len(note)} characters, more than {MAX_NOTE_CHARACTERS}", "note")
    return Said(at, author()[:MAX_AUTHOR_CHARACTERS], note)


def author() -> str:
    """Who makes a wish, as this computer names them: `user@computer`. It is for people; the signature is the proof."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no name for this user's number, as in a container
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def pin(slot: str, version: int, to: Whom, said: Said) -> Edit:
    """Have these devices serve one version of a slot, in place of what they were pinned to before.

    The edit rejects with `unknown_version` what is not released, and with `too_many_wishes`.
    """
    wish = Pin(slot=slot, version=version, **to._asdict(), **said._asdict())

    def edit(wishes: Wishes, released: Sequence[int]) -> Edited:
        _check_released(slot, version, released)
        if _is_said(wishes, wish):
            return Edited(wishes, f"{slot} is pinned to version {version} for {named(to)} already.")
        new = (*_without(wishes, _pins(slot), to), wish)
        void = any(map(_withdrawals(slot, version), new))
        return Edited(
            _checked(new),
            f"{slot} is pinned to version {version} for {named(to)}."
            + (" Its withdrawal does not count where it is pinned." if void else ""),
        )

    return edit


def unpin(slot: str, to: Whom) -> Edit:
    """Let these devices choose for themselves again; pins for others stay."""

    def edit(wishes: Wishes, _released: Sequence[int]) -> Edited:
        new = _without(wishes, _pins(slot), to)
        left = ", ".join(f"to version {wish.version} for {named(wish)}" for wish in new if _pins(slot)(wish))
        no = "not" if new == wishes else "no longer"
        return Edited(new, f"{slot} is {no} pinned for {named(to)}." + (f" It still is {left}." if left else ""))

    return edit


def withdraw(slot: str, version: int | None, to: Whom, said: Said) -> Edit:
    """Have these devices serve a version no more; by default the slot's newest.

    The edit rejects with `unknown_version` what is not released, with `pinned` what they are pinned to, and with
    `too_many_wishes`.
    """

    def edit(wishes: Wishes, released: Sequence[int]) -> Edited:
        gone = max(released, default=0) if version is None else version
        _check_released(slot, gone, released)
        wish = Withdrawal(slot=slot, version=gone, **to._asdict(), **said._asdict())
        if _is_said(wishes, wish):
            return Edited(wishes, f"{slot} version {gone} is withdrawn for {named(to)} already.")
        for held in filter(_pins(slot), wishes):
            if held.version == gone and _reaches(held, to):
                raise Rejected("pinned", f"{slot} is pinned to version {gone} for {named(held)}: unpin it first")
        new = _checked((*_without(wishes, _withdrawals(slot, gone), to), wish))
        withdrawn = {
            other.version
            for other in new
            if isinstance(other, Withdrawal) and other.slot == slot and _reaches(other, to)
        }
        return Edited(
            new,
            f"{slot} version {gone} is withdrawn for {named(to)}: where it is served, the model before it comes back."
            + ("" if set(released) - withdrawn else " No other version is released; release one soon."),
        )

    return edit


def restore(slot: str, version: int, to: Whom) -> Edit:
    """Lift the withdrawal of a version for these devices; for others it stays."""

    def edit(wishes: Wishes, _released: Sequence[int]) -> Edited:
        new = _without(wishes, _withdrawals(slot, version), to)
        if new == wishes:
            return Edited(wishes, f"{slot} version {version} is not withdrawn for {named(to)}.")
        return Edited(
            new,
            f"{slot} version {version} is no longer withdrawn for {named(to)}. "
            "Devices that gave it up do not take it back by themselves: pin it, or release the model again.",
        )

    return edit


def carry_out(repository: Repository, slot: str, edit: Edit, now: datetime) -> str:
    """Apply an edit, and sign what it changes; where it changes nothing, sign nothing.

    Returns:
        What there is to say of it.

    Raises:
        Rejected: By the edit; `bad_name` for the slot; and as `Repository.amend`.
        Unavailable: As `Repository.amend`.
        SignaturesMissing: The wish waits for keys that are elsewhere.
        Misconfigured: As `Repository.amend`.
    """
    checked_name(slot, "slot")
    if not repository.exists:
        raise Misconfigured("there is no repository here. Make one first: trainer-host keys init")
    texts = []

    def change(targets: Targets) -> None:
        before = from_field(targets.unrecognized_fields.get(FIELD))
        edited = edit(before, versions(targets, slot))
        if edited.wishes == before:
            raise _UnchangedError(edited)
        targets.unrecognized_fields[FIELD] = to_field(edited.wishes)
        texts.append(edited.text)

    try:
        repository.amend(change, now)
    except _UnchangedError as unchanged:
        if unchanged.edited.wishes == repository.wishes():
            return unchanged.edited.text
        return f"{unchanged.edited.text} That waits for signatures; trainer-host keys verify says which."
    return texts[-1]


def rows(wishes: Iterable[Pin | Withdrawal]) -> list[dict[str, Any]]:
    """A table for people."""
    return [
        {
            "slot": wish.slot,
            "version": wish.version,
            "is": "pinned" if isinstance(wish, Pin) else "withdrawn",
            "for": named(wish),
            "since": time.strftime("%Y-%m-%d %H:%M", time.localtime(wish.at)) if wish.at else "",
            "by": wish.by,
            "note": wish.note,
        }
        for wish in wishes
    ]


def sentence(wish: Pin | Withdrawal) -> str:
    """A wish in words, without when and by whom."""
    said = f"pinned to version {wish.version}" if isinstance(wish, Pin) else f"version {wish.version} withdrawn"
    return f"{wish.slot} {said} for {named(wish)}" + (f" ({wish.note})" if wish.note else "")


def named(to: Whom | Pin | Withdrawal) -> str:
    """Whom it is for, in words."""
    said = [
        f"{what}{'s' if len(names) > 1 else ''} {', '.join(names)}"
        for what, names in (("device", to.devices), ("group", to.groups))
        if names
    ]
    return " and ".join(said) or "all devices"


def _pins(slot: str) -> Kind:
    return lambda wish: isinstance(wish, Pin) and wish.slot == slot


def _withdrawals(slot: str, version: int) -> Kind:
    return lambda wish: isinstance(wish, Withdrawal) and (wish.slot, wish.version) == (slot, version)


def _addressees(to: Whom | Pin | Withdrawal) -> set[tuple[str, str]]:
    """Each that is named; all devices together are one more name."""
    return {("device", name) for name in to.devices} | {("group", name) for name in to.groups} or {_EVERYONE}


def _reaches(wish: Pin | Withdrawal, to: Whom) -> bool:
    """Whether it is for all, or for some of those that are named."""
    return bool(_addressees(wish) & (_addressees(to) | {_EVERYONE}))


def _without(wishes: Wishes, kind: Kind, to: Whom) -> Wishes:
    """The wishes without those of this kind for those that are named."""
    kept = []
    for wish in wishes:
        left = _addressees(wish) - _addressees(to)
        if not kind(wish) or len(left) == len(_addressees(wish)):
            kept.append(wish)
        elif left:
            devices = tuple(name for name in wish.devices if ("device", name) in left)
            groups = tuple(name for name in wish.groups if ("group", name) in left)
            kept.append(replace(wish, devices=devices, groups=groups))
    return tuple(kept)


def _is_said(wishes: Wishes, wish: Pin | Withdrawal) -> bool:
    """Whether this is wished for all it names already; a new note alone is something new."""
    alike = [
        other
        for other in wishes
        if type(other) is type(wish)
        and (other.slot, other.version) == (wish.slot, wish.version)
        and wish.note in ("", other.note)
    ]
    return _addressees(wish) <= {one for other in alike for one in _addressees(other)}


def _check_released(slot: str, version: int, released: Sequence[int]) -> None:
    if version not in released:
        there = f"released are {', '.join(map(str, released))}" if released else "nothing is"
        raise Rejected("unknown_version", f"version {version} of {slot} is not released; {there}", "version")


def _checked(wishes: Wishes) -> Wishes:
    if len(wishes) > MAX_WISHES:
        raise Rejected(
            "too_many_wishes",
            f"there would be {len(wishes)} wishes, more than {MAX_WISHES}: lift some (trainer-host wishes lists them)",
        )
    return wishes
