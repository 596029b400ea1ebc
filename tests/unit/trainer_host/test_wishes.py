from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner, Signer  # type: ignore[attr-defined]

from protocol.errors import Misconfigured, Rejected
from protocol.features import Feature, FeatureSpec
from protocol.release import Golden, Release, Tensor
from protocol.wishes import MAX_NAMES, MAX_WISHES, Pin, Withdrawal, desired, from_field, to_field
from trainer_host.repository import Repository, identity_of
from trainer_host.signing import SignaturesMissing
from trainer_host.wishes import (
    Edit,
    Said,
    Whom,
    Wishes,
    author,
    carry_out,
    named,
    pin,
    restore,
    rows,
    said_here,
    sentence,
    unpin,
    whom,
    withdraw,
)

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
SAID = Said(1.5, "ada@desk")
LATER = Said(2.5, "bob@desk")
RELEASED = (4, 5, 6)
ALL = Whom()
PI1, PI2, BOTH = whom(["pi1"]), whom(["pi2"]), whom(["pi1", "pi2"])
KITCHEN = whom(groups=["kitchen"])
MEMBERSHIP = {"pi1": ("kitchen",), "pi2": ()}


def done(wishes: Wishes, *edits: Edit) -> Wishes:
    for edit in edits:
        wishes = edit(wishes, RELEASED).wishes
    return wishes


def rejection(edit: Edit, wishes: Wishes = (), released: tuple[int, ...] = RELEASED) -> Rejected:
    with pytest.raises(Rejected) as caught:
        edit(wishes, released)
    return caught.value


def pinned(wishes: Wishes, device: str) -> int | None:
    found = desired(wishes, "combat", device, MEMBERSHIP[device]).pin
    return None if found is None else found.version


def test_whom_is_checked_and_said_in_words() -> None:
    assert whom(["pi2", "pi1", "pi2"], ["kitchen"]) == Whom(("pi1", "pi2"), ("kitchen",))
    for devices, groups in ((["a/b"], ()), ((), ["a/b"])):
        with pytest.raises(Rejected) as caught:
            whom(devices, groups)
        assert caught.value.code == "bad_name"
    assert [named(to) for to in (ALL, PI1, BOTH, KITCHEN, whom(["pi1"], ["attic", "kitchen"]))] == [
        "all devices",
        "device pi1",
        "devices pi1, pi2",
        "group kitchen",
        "device pi1 and groups attic, kitchen",
    ]


def test_a_pin_is_signed_as_it_was_said() -> None:
    edited = pin("combat", 5, whom(["pi1"], ["kitchen"]), SAID._replace(note="draws badly"))((), RELEASED)
    assert edited.wishes == (
        Pin(slot="combat", version=5, devices=("pi1",), groups=("kitchen",), at=1.5, by="ada@desk", note="draws badly"),
    )
    assert edited.text == "combat is pinned to version 5 for device pi1 and group kitchen."


def test_a_new_pin_takes_over_whom_it_names() -> None:
    wishes = done((), pin("combat", 5, BOTH, SAID), pin("combat", 6, PI1, LATER))
    assert [(wish.version, wish.devices, wish.by) for wish in wishes] == [
        (5, ("pi2",), "ada@desk"),
        (6, ("pi1",), "bob@desk"),
    ]
    wishes = done(wishes, pin("movement", 4, ALL, LATER), pin("combat", 4, ALL, LATER), pin("combat", 6, ALL, LATER))
    assert [pinned(wishes, device) for device in ("pi1", "pi2")] == [6, 5]
    assert len(wishes) == 4


def test_saying_it_twice_changes_nothing_but_a_new_note_does() -> None:
    for edit in (pin("combat", 5, BOTH, SAID), withdraw("combat", 5, BOTH, SAID)):
        wishes = done((), edit)
        again = edit(wishes, RELEASED)
        assert again.wishes == wishes
        assert "already" in again.text
    wishes = done((), pin("combat", 5, BOTH, SAID))
    assert done(wishes, pin("combat", 5, PI1, LATER)) == wishes
    assert done(wishes, pin("combat", 5, ALL, LATER)) != wishes
    noted = done(wishes, pin("combat", 5, BOTH, LATER._replace(note="why")))
    assert [wish.note for wish in noted] == ["why"]
    assert done(noted, pin("combat", 5, BOTH, LATER)) == noted


def test_unpinning_lifts_what_is_named_and_tells_what_is_left() -> None:
    wishes = done((), pin("combat", 5, BOTH, SAID), pin("combat", 4, ALL, SAID), withdraw("combat", 6, PI1, SAID))
    edited = unpin("combat", PI1)(wishes, ())
    assert edited.text == (
        "combat is no longer pinned for device pi1. "
        "It still is to version 5 for device pi2, to version 4 for all devices."
    )
    assert [(type(wish), named(wish)) for wish in edited.wishes] == [
        (Pin, "device pi2"),
        (Pin, "all devices"),
        (Withdrawal, "device pi1"),
    ]
    assert unpin("combat", PI1)(edited.wishes, ()).text.startswith("combat is not pinned for device pi1. It still is")
    assert unpin("combat", ALL)((), ()).text == "combat is not pinned for all devices."


def test_rolling_back_withdraws_the_newest_unless_told() -> None:
    edited = withdraw("combat", None, ALL, SAID)((), RELEASED)
    assert edited.wishes == (Withdrawal(slot="combat", version=6, at=1.5, by="ada@desk"),)
    assert edited.text == (
        "combat version 6 is withdrawn for all devices: where it is served, the model before it comes back."
    )
    assert withdraw("combat", None, ALL, LATER)(edited.wishes, RELEASED).wishes == edited.wishes
    further = done(edited.wishes, withdraw("combat", 5, ALL, LATER))
    assert [wish.version for wish in further] == [6, 5]
    assert "No other version" in withdraw("combat", 4, PI1, LATER)(further, RELEASED).text
    elsewhere = done((), withdraw("combat", 6, PI2, SAID), withdraw("combat", 5, PI2, SAID))
    assert "No other version" not in withdraw("combat", 4, PI1, LATER)(elsewhere, RELEASED).text


def test_a_withdrawal_takes_over_and_is_lifted_for_whom_it_names() -> None:
    wishes = done((), withdraw("combat", 6, BOTH, SAID), withdraw("combat", 5, PI1, SAID))
    wishes = done(wishes, withdraw("combat", 6, PI1, LATER._replace(note="again")))
    assert [(wish.version, wish.devices) for wish in wishes] == [(6, ("pi2",)), (5, ("pi1",)), (6, ("pi1",))]
    edited = restore("combat", 6, PI1)(wishes, RELEASED)
    assert [(wish.version, wish.devices) for wish in edited.wishes] == [(6, ("pi2",)), (5, ("pi1",))]
    assert "pin it, or release the model again" in edited.text
    again = restore("combat", 6, PI1)(edited.wishes, RELEASED)
    assert again == (edited.wishes, "combat version 6 is not withdrawn for device pi1.")


def test_what_is_not_released_cannot_be_wished() -> None:
    for edit in (pin("combat", 7, ALL, SAID), withdraw("combat", 7, ALL, SAID)):
        error = rejection(edit)
        assert (error.code, error.text) == (
            "unknown_version",
            "version 7 of combat is not released; released are 4, 5, 6",
        )
    assert rejection(withdraw("combat", None, ALL, SAID), released=()).text.endswith("nothing is")


@pytest.mark.parametrize(("held", "to"), [(ALL, ALL), (ALL, PI1), (PI1, BOTH), (KITCHEN, KITCHEN)])
def test_what_is_pinned_must_be_unpinned_before_it_is_withdrawn(held: Whom, to: Whom) -> None:
    wishes = done((), pin("combat", 6, held, SAID))
    error = rejection(withdraw("combat", 6, to, SAID), wishes)
    assert (error.code, error.text) == ("pinned", f"combat is pinned to version 6 for {named(held)}: unpin it first")
    assert done(wishes, withdraw("combat", 5, to, SAID)) != wishes


def test_a_pin_for_one_does_not_hinder_a_withdrawal_for_all() -> None:
    wishes = done((), pin("combat", 6, PI1, SAID), withdraw("combat", 6, ALL, SAID))
    assert set(desired(wishes, "combat", "pi2", ()).withdrawn) == {6}
    assert desired(wishes, "combat", "pi1", ()).withdrawn == {}
    withdrawn = done((), withdraw("combat", 6, ALL, SAID))
    assert "Its withdrawal does not count" in pin("combat", 6, PI1, SAID)(withdrawn, RELEASED).text
    assert "Its withdrawal" not in pin("combat", 5, PI1, SAID)(withdrawn, RELEASED).text


def test_there_is_room_for_so_many() -> None:
    full = tuple(Pin(slot="combat", version=4, devices=(f"d{number}",)) for number in range(MAX_WISHES))
    for edit in (pin("combat", 5, PI1, SAID), withdraw("combat", 5, PI1, SAID)):
        assert rejection(edit, full).code == "too_many_wishes"
    assert len(done(full, pin("combat", 5, whom(["d0"]), SAID))) == MAX_WISHES


names = st.sets(st.sampled_from(["pi1", "pi2"])), st.sets(st.sampled_from(["kitchen", "attic"]))
someone = st.builds(whom, *names)
said = st.builds(Said, st.floats(0, 9), st.just("ada@desk"))
edits = st.one_of(
    st.builds(pin, st.just("combat"), st.sampled_from(RELEASED), someone, said),
    st.builds(unpin, st.just("combat"), someone),
    st.builds(withdraw, st.just("combat"), st.sampled_from([None, *RELEASED]), someone, said),
    st.builds(restore, st.just("combat"), st.sampled_from(RELEASED), someone),
)


def tried(wishes: Wishes, edit: Edit) -> Wishes:
    try:
        return edit(wishes, RELEASED).wishes
    except Rejected as error:
        if error.code != "pinned":
            raise
        return wishes


@given(st.lists(edits, max_size=12))
def test_nobody_has_two_pins_for_a_slot_or_two_withdrawals_of_a_version(made: list[Edit]) -> None:
    wishes: Wishes = ()
    for edit in made:
        wishes = tried(wishes, edit)
        assert tried(wishes, edit) == wishes
    held = [
        (isinstance(wish, Pin) or wish.version, one)
        for wish in wishes
        for one in (*(f"device {name}" for name in wish.devices), *(f"group {name}" for name in wish.groups))
        or ("all",)
    ]
    assert len(held) == len(set(held))


@given(st.lists(edits, max_size=6), st.sampled_from(RELEASED), st.sampled_from(["pi1", "pi2"]))
def test_the_last_pin_for_a_device_is_what_it_gets(made: list[Edit], version: int, device: str) -> None:
    wishes: Wishes = ()
    for edit in [*made, pin("combat", version, whom([device]), LATER)]:
        wishes = tried(wishes, edit)
    assert pinned(wishes, device) == version
    wishes = tried(wishes, unpin("combat", whom([device])))
    assert all(device not in wish.devices for wish in wishes if isinstance(wish, Pin))


# In a repository.


def release_of(version: int, slot: str = "combat") -> tuple[Release, bytes]:
    model = f"{slot} {version}".encode()
    release = Release(
        slot=slot,
        version=version,
        **identity_of(model),
        inputs=(Tensor(name="in", shape=(1, 1), dtype="float32"),),
        outputs=(Tensor(name="out", shape=(1, 2), dtype="float32"),),
        actions=("hit", "run"),
        features=FeatureSpec(features=(Feature(path="round"),)),
        golden=Golden(inputs=((0.25,),), outputs=((0.1, -1.5),), tolerance=1e-5),
    )
    return release, model


@pytest.fixture
def signers() -> dict[str, list[Signer]]:
    return {role: [CryptoSigner.generate_ed25519()] for role in ("root", "targets", "snapshot", "timestamp")}


@pytest.fixture
def repository(tmp_path: Path, signers: dict[str, list[Signer]]) -> Repository:
    made = Repository(tmp_path / "repository", signers)
    made.create(NOW)
    for version in (1, 2, 3):
        made.release(*release_of(version), NOW)
    return made


def test_a_wish_is_signed_once(repository: Repository) -> None:
    said = carry_out(repository, "combat", pin("combat", 2, ALL, SAID), NOW)
    assert said == "combat is pinned to version 2 for all devices."
    assert repository.wishes() == (Pin(slot="combat", version=2, at=1.5, by="ada@desk"),)
    signed = repository.metadata_set()
    assert "already" in carry_out(repository, "combat", pin("combat", 2, ALL, LATER), NOW + timedelta(hours=1))
    assert repository.metadata_set() == signed
    carry_out(repository, "combat", withdraw("combat", None, ALL, LATER), NOW)
    assert repository.wishes()[1] == Withdrawal(slot="combat", version=3, at=2.5, by="bob@desk")
    carry_out(repository, "combat", unpin("combat", ALL), NOW)
    carry_out(repository, "combat", restore("combat", 3, ALL), NOW)
    assert repository.wishes() == ()


@pytest.mark.parametrize(
    ("slot", "edit", "code"),
    [
        ("combat", pin("combat", 9, ALL, SAID), "unknown_version"),
        ("movement", withdraw("movement", None, ALL, SAID), "unknown_version"),
        ("../combat", unpin("../combat", ALL), "bad_name"),
    ],
)
def test_a_refused_wish_signs_nothing(repository: Repository, slot: str, edit: Edit, code: str) -> None:
    before = repository.metadata_set()
    with pytest.raises(Rejected) as caught:
        carry_out(repository, slot, edit, NOW)
    assert caught.value.code == code
    assert repository.metadata_set() == before


def test_where_keys_are_elsewhere_wishes_wait_together(
    repository: Repository, signers: dict[str, list[Signer]], tmp_path: Path
) -> None:
    online = {role: signers[role] for role in ("snapshot", "timestamp")}
    host = Repository(tmp_path / "repository", online)
    for device, version in (("pi1", 1), ("pi2", 2)):
        with pytest.raises(SignaturesMissing, match="trainer-host sign"):
            carry_out(host, "combat", pin("combat", version, whom([device]), SAID), NOW)
    assert host.wishes() == ()
    ((_, request),) = host.waiting()
    said = carry_out(host, "combat", pin("combat", 2, PI2, LATER), NOW + timedelta(hours=1))
    assert "already. That waits for signatures" in said
    assert host.waiting()[0][1].asks_the_same(request)
    request.sign(signers)
    host.accept(request, NOW)
    assert [(wish.version, wish.devices) for wish in host.wishes()] == [(1, ("pi1",)), (2, ("pi2",))]
    assert "waits" not in carry_out(host, "combat", pin("combat", 2, PI2, LATER), NOW)


def test_what_another_process_wishes_meanwhile_is_not_lost(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between reading and taking the lock another command signs."""
    amend: Callable[..., Any] = repository.amend

    def late(*arguments: Any) -> Any:
        monkeypatch.undo()
        carry_out(repository, "combat", pin("combat", 1, PI2, SAID), NOW)
        return amend(*arguments)

    monkeypatch.setattr(repository, "amend", late)
    carry_out(repository, "combat", pin("combat", 2, PI1, SAID), NOW)
    assert [(wish.version, wish.devices) for wish in repository.wishes()] == [(1, ("pi2",)), (2, ("pi1",))]


def test_without_a_repository_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="keys init"):
        carry_out(Repository(tmp_path / "repository"), "combat", pin("combat", 2, ALL, SAID), NOW)


def test_what_is_pinned_stays_released(repository: Repository) -> None:
    carry_out(repository, "combat", pin("combat", 1, PI1, SAID), NOW)
    for version in (4, 5, 6):
        repository.release(*release_of(version), NOW)
    assert [release.version for release in repository.releases()] == [1, 4, 5, 6]
    carry_out(repository, "combat", unpin("combat", PI1), NOW)
    repository.release(*release_of(7), NOW)
    assert [release.version for release in repository.releases()] == [5, 6, 7]


def test_what_is_withdrawn_takes_no_good_versions_place(repository: Repository) -> None:
    for version in (2, 3):
        carry_out(repository, "combat", withdraw("combat", version, ALL, SAID), NOW)
    for version in (4, 5):
        repository.release(*release_of(version), NOW)
    assert [release.version for release in repository.releases()] == [1, 2, 3, 4, 5]
    repository.release(*release_of(6), NOW)
    assert [release.version for release in repository.releases()] == [4, 5, 6]


def test_wishes_outlive_releases_and_refreshing(repository: Repository) -> None:
    carry_out(repository, "combat", pin("combat", 3, ALL, SAID), NOW)
    repository.release(*release_of(0, "movement"), NOW)
    repository.refresh(NOW + timedelta(days=80))
    assert [wish.version for wish in repository.wishes()] == [3]


def test_who_wishes_is_named_even_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ada")
    user, _, computer = author().partition("@")
    assert (user, bool(computer)) == ("ada", True)
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 3_999_999)  # a container's user without an entry
    assert author().startswith("3999999@")


def test_what_is_said_here_fits_what_devices_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "a" * 300)
    said = said_here(1.5, "n" * 256)
    wish = Pin(slot="combat", version=1, at=said.at, by=said.by, note=said.note)
    assert from_field(to_field([wish])) == (wish,)
    assert said.by == "a" * 128
    with pytest.raises(Rejected, match="a note of 257 characters, more than 256") as caught:
        said_here(1.5, "n" * 257)
    assert (caught.value.code, caught.value.field) == ("too_long", "note")


def test_a_wish_names_so_many_and_no_more() -> None:
    names = [f"pi{number}" for number in range(MAX_NAMES + 1)]
    assert whom(names[1:] * 2, names[1:]) == Whom(tuple(sorted(names[1:])), tuple(sorted(names[1:])))
    with pytest.raises(Rejected, match="65 devices, more than 64"):
        whom(names)
    with pytest.raises(Rejected, match="65 groups, more than 64") as caught:
        whom((), names)
    assert (caught.value.code, caught.value.field) == ("too_many_names", "groups")


def test_tables_and_sentences() -> None:
    wishes = done((), pin("combat", 5, PI1, SAID._replace(note="slow")), withdraw("combat", 6, ALL, Said(0.0, "")))
    assert [tuple(row.values())[:4] for row in rows(wishes)] == [
        ("combat", 5, "pinned", "device pi1"),
        ("combat", 6, "withdrawn", "all devices"),
    ]
    assert [(bool(row["since"]), row["by"], row["note"]) for row in rows(wishes)] == [
        (True, "ada@desk", "slow"),
        (False, "", ""),
    ]
    assert [sentence(wish) for wish in wishes] == [
        "combat pinned to version 5 for device pi1 (slow)",
        "combat version 6 withdrawn for all devices",
    ]
