from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import Rejected
from protocol.wishes import (
    FIELD,
    LAST_SECOND,
    MAX_NAMES,
    MAX_WISHES,
    Desired,
    Pin,
    Withdrawal,
    desired,
    from_field,
    to_field,
)

Wishes = list[Pin | Withdrawal]

DEVICES = ("pi1", "pi2")
GROUPS = ("kitchen", "attic")
# Few values, so that wishes meet: the same version, the same device, the same second.
FIELDS: dict[str, Any] = {
    "slot": st.sampled_from(["combat", "movement"]),
    "version": st.integers(0, 3),
    "devices": st.lists(st.sampled_from(DEVICES), unique=True).map(tuple),
    "groups": st.lists(st.sampled_from(GROUPS), unique=True).map(tuple),
    "at": st.sampled_from([0.0, 0.5, 1.0]),
    "by": st.sampled_from(["", "ada@desk"]),
}
pins = st.builds(Pin, **FIELDS)
wish_lists = st.lists(pins | st.builds(Withdrawal, **FIELDS), max_size=8)
memberships = st.sets(st.sampled_from(GROUPS)).map(frozenset)


def specificity(wish: Pin | Withdrawal, device: str, groups: frozenset[str]) -> int:
    """-1 where it does not concern the device, then for all, for a group, for the device."""
    if device in wish.devices:
        return 2
    if groups & set(wish.groups):
        return 1
    return -1 if wish.devices or wish.groups else 0


@given(wish_lists, memberships, st.data())
def test_the_order_of_wishes_says_nothing(wishes: Wishes, groups: frozenset[str], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(wishes))
    assert desired(shuffled, "combat", "pi1", groups) == desired(wishes, "combat", "pi1", groups)


@given(wish_lists, memberships)
def test_wishing_twice_changes_nothing(wishes: Wishes, groups: frozenset[str]) -> None:
    assert desired([*wishes, *wishes], "combat", "pi1", groups) == desired(wishes, "combat", "pi1", groups)


@given(wish_lists, memberships)
def test_the_most_specific_pin_counts_and_of_those_the_newest(wishes: Wishes, groups: frozenset[str]) -> None:
    found = desired(wishes, "combat", "pi1", groups).pin
    rivals = [
        (specificity(wish, "pi1", groups), wish.at)
        for wish in wishes
        if isinstance(wish, Pin) and wish.slot == "combat" and specificity(wish, "pi1", groups) >= 0
    ]
    if found is None:
        assert rivals == []
    else:
        assert found in wishes
        assert (specificity(found, "pi1", groups), found.at) == max(rivals)


@given(wish_lists, memberships)
def test_every_withdrawal_that_concerns_the_device_holds_but_of_what_is_pinned(
    wishes: Wishes, groups: frozenset[str]
) -> None:
    found = desired(wishes, "combat", "pi1", groups)
    meant = {
        wish.version
        for wish in wishes
        if isinstance(wish, Withdrawal) and wish.slot == "combat" and specificity(wish, "pi1", groups) >= 0
    }
    assert set(found.withdrawn) == meant - ({found.pin.version} if found.pin else set())
    assert all(wish.version == version for version, wish in found.withdrawn.items())


@given(wish_lists, memberships, pins)
def test_another_devices_wishes_and_another_slots_are_none_of_its_business(
    wishes: Wishes, groups: frozenset[str], pin: Pin
) -> None:
    before = desired(wishes, "combat", "pi1", groups)
    elsewhere = Pin(slot="combat", version=pin.version, devices=("pi2",), at=2.0)
    other_slot = Pin(slot="movement", version=pin.version, at=2.0)
    assert desired([*wishes, elsewhere, other_slot], "combat", "pi1", groups) == before


@given(wish_lists)
def test_wishes_travel_as_one_text(wishes: Wishes) -> None:
    assert from_field(to_field(wishes)) == tuple(wishes)


def test_device_before_group_before_all_whatever_their_age() -> None:
    for_all = Pin(slot="combat", version=1, at=3.0)
    for_group = Pin(slot="combat", version=2, groups=("kitchen",), at=2.0)
    for_device = Pin(slot="combat", version=3, devices=("pi1",), at=1.0)
    wishes = [for_all, for_group, for_device]
    assert desired(wishes, "combat", "pi1", ["kitchen"]).pin == for_device
    assert desired(wishes, "combat", "pi2", ["kitchen"]).pin == for_group
    assert desired(wishes, "combat", "pi2", ["attic"]).pin == for_all
    assert desired([], "combat", "pi1", []) == Desired(pin=None, withdrawn={})


def test_a_group_that_is_named_beside_the_device_adds_no_weight() -> None:
    older = Pin(slot="combat", version=1, devices=("pi1",), groups=("kitchen",), at=1.0)
    newer = Pin(slot="combat", version=2, devices=("pi1",), at=2.0)
    assert desired([newer, older], "combat", "pi1", ["kitchen"]).pin == newer


def test_the_field_says_only_what_was_said() -> None:
    field = to_field([Pin(slot="combat", version=1), Withdrawal(slot="combat", version=2, at=0.5, note="draws badly")])
    assert json.loads(field) == [
        {"wish": "pin", "slot": "combat", "version": 1},
        {"wish": "withdrawal", "slot": "combat", "version": 2, "at": 0.5, "note": "draws badly"},
    ]
    assert from_field(None) == from_field("[]") == ()


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (7, "bad_wishes"),
        ([], "bad_wishes"),
        ("nonsense", "bad_wishes"),
        ("[" * 100_000, "bad_wishes"),
        ('[{"wish": "dance", "slot": "combat", "version": 1}]', "bad_wishes"),
        ('[{"wish": "pin", "slot": "combat", "version": -1}]', "bad_wishes"),
        ('[{"wish": "pin", "slot": "combat", "version": 1, "devices": "pi1"}]', "bad_wishes"),
        ('[{"wish": "pin", "slot": "../combat", "version": 1}]', "bad_name"),
        (to_field([Pin(slot="combat", version=1)] * (MAX_WISHES + 1)), "bad_wishes"),
    ],
)
def test_what_is_no_list_of_wishes_is_rejected(value: Any, code: str) -> None:
    with pytest.raises(Rejected) as caught:
        from_field(value)
    assert (caught.value.code, caught.value.field) == (code, "slot" if code == "bad_name" else FIELD)


MANY = tuple(f"pi{number}" for number in range(MAX_NAMES + 1))


@pytest.mark.parametrize("kind", [Pin, Withdrawal])
@pytest.mark.parametrize(
    ("within", "beyond", "field"),
    [
        ({"note": "é" * 256}, {"note": "n" * 257}, FIELD),
        ({"by": "é" * 128}, {"by": "b" * 129}, FIELD),
        ({"devices": MANY[1:]}, {"devices": MANY}, FIELD),
        ({"groups": MANY[1:]}, {"groups": MANY}, FIELD),
        ({"devices": ("a" * 64,)}, {"devices": ("pi1", "a" * 65)}, "device"),
        ({"groups": ("A.b-c_1",)}, {"groups": ("kitchen", "")}, "group"),
        ({"at": 0.0}, {"at": -0.001}, FIELD),
        ({"at": float(LAST_SECOND)}, {"at": 253_402_300_800.0}, FIELD),
        ({"at": 1e9}, {"at": 1e300}, FIELD),
    ],
)
def test_every_part_of_a_wish_has_its_bounds(
    kind: type[Pin | Withdrawal], within: dict[str, Any], beyond: dict[str, Any], field: str
) -> None:
    wish = kind(slot="combat", version=1, **within)
    assert from_field(to_field([wish])) == (wish,)
    with pytest.raises(Rejected) as caught:
        from_field(to_field([kind(slot="combat", version=1, **beyond)]))
    assert (caught.value.code, caught.value.field) == ("bad_wishes" if field == FIELD else "bad_name", field)
