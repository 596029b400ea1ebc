from __future__ import annotations

import errno
import json
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner, Signature, Signer  # type: ignore[attr-defined]
from tuf.api.metadata import Delegations, Metadata, Root, TargetFile, Targets  # type: ignore[attr-defined]

from protocol import wishes
from protocol.errors import Misconfigured, Rejected, Unavailable
from protocol.features import FeatureSpec
from protocol.release import Golden, Release, to_custom
from protocol.wishes import Pin, Withdrawal
from trainer_host import signing
from trainer_host.signing import SignaturesMissing, SigningRequest

EXPIRES = datetime(2030, 1, 1, 12, tzinfo=UTC)
ROLES = ("root", "targets", "snapshot", "timestamp")
ALICE, BOB, CAROL, ONLINE = (CryptoSigner.generate_ed25519() for _ in range(4))
KEYS: dict[str, list[Signer]] = {"root": [ALICE], "targets": [BOB], "snapshot": [ONLINE], "timestamp": [ONLINE]}
KNOWN = {signer.public_key.keyid for signer in (ALICE, BOB, ONLINE)}


def root_of(version: int, **changes: list[Signer]) -> Metadata[Root]:
    root = Root(version=version, expires=EXPIRES)
    for role, signers in {**KEYS, **changes}.items():
        for signer in signers:
            root.add_key(signer.public_key, role)
    return Metadata(root)


def request_for_targets() -> SigningRequest:
    return SigningRequest(root_of(1), targets=Metadata(Targets(version=8, expires=EXPIRES)))


def request_for_both() -> SigningRequest:
    root = root_of(2, root=[CAROL], targets=[CAROL])
    return SigningRequest(root_of(1), root, Metadata(Targets(version=8, expires=EXPIRES)))


@pytest.mark.parametrize("make", [request_for_targets, request_for_both])
def test_a_request_comes_back_as_it_was_written(make: Callable[[], SigningRequest]) -> None:
    request = make()
    request.sign(KEYS)
    again = SigningRequest.from_bytes(request.to_bytes())
    assert again == request
    assert again.shortfalls() == request.shortfalls()


def test_a_root_needs_the_old_keys_and_the_new_and_targets_the_new() -> None:
    request = request_for_both()
    assert [(it.role, it.missing) for it in request.shortfalls()] == [
        ("root", (ALICE.public_key.keyid,)),
        ("root", (CAROL.public_key.keyid,)),
        ("targets", (CAROL.public_key.keyid,)),
    ]
    assert request.sign({"root": [ALICE], "targets": [BOB]})[0] == [
        f"root version 2 with the key {ALICE.public_key.keyid[:8]}"
    ]
    assert [it.role for it in request.shortfalls()] == ["root", "targets"]
    request.sign({"root": [CAROL], "targets": [CAROL]})
    assert request.shortfalls() == []
    assert request.sign({"root": [CAROL], "targets": [CAROL]}) == ([], [])


def test_a_signature_that_does_not_fit_is_made_again() -> None:
    request = request_for_targets()
    assert request.targets is not None
    keyid = BOB.public_key.keyid
    request.targets.signatures[keyid] = Signature(keyid, "00" * 64)
    assert [it.signed for it in request.shortfalls()] == [0]
    assert request.sign(KEYS)[0]
    assert request.shortfalls() == []


def test_signatures_that_do_not_count_are_dropped() -> None:
    request = request_for_targets()
    assert request.targets is not None
    request.sign(KEYS)
    request.targets.sign(CAROL, append=True)
    request.purge()
    assert list(request.targets.signatures) == [BOB.public_key.keyid]


def test_copies_are_told_from_other_requests() -> None:
    request, copy = request_for_both(), request_for_both()
    copy.sign({"root": [ALICE]})
    assert request.asks_the_same(copy)
    request.merge(copy)
    assert request.shortfalls()[0].missing == (CAROL.public_key.keyid,)
    assert copy.targets is not None
    copy.targets.signed.version = 9
    assert not request.asks_the_same(copy)


class _PulledOut(CryptoSigner):
    def sign(self, payload: bytes) -> Signature:
        raise ValueError(f"no token for {len(payload)} bytes")


def test_a_key_that_fails_is_told_and_the_others_sign() -> None:
    pulled_out = _PulledOut(CAROL._private_key, CAROL.public_key)
    request = SigningRequest(root_of(1), root_of(2, root=[ALICE, CAROL]))
    signed, failed = request.sign({"root": [pulled_out, ALICE]})
    assert len(signed) == 1
    assert f"the root key {CAROL.public_key.keyid[:8]} did not sign: no token" in failed[0]


def release(version: int, notes: str = "") -> Release:
    return Release(
        slot="combat",
        version=version,
        digest="ab" * 32,
        length=7,
        manifest="cd" * 32,
        inputs=(),
        outputs=(),
        actions=(),
        features=FeatureSpec(),
        golden=Golden(inputs=(), outputs=(), tolerance=0.1),
        notes=notes,
    )


def target_of(described: Release) -> TargetFile:
    return TargetFile(
        described.length, {"sha256": described.digest}, described.target, {"custom": to_custom(described)}
    )


def test_targets_are_told_in_plain_words() -> None:
    request = request_for_targets()
    assert request.targets is not None
    assert "no release and no wish" in request.describe(KNOWN)
    targets = request.targets.signed
    for described in (release(3, "new \x1b[2Jnetwork"), release(4)):
        targets.targets[described.target] = target_of(described)
    targets.unrecognized_fields[wishes.FIELD] = wishes.to_field(
        [
            Pin(slot="combat", version=3, devices=("pi7",), by="eve", note="it limps"),
            Withdrawal(slot="combat", version=2, groups=("lab",)),
            Withdrawal(slot="combat", version=1),
        ]
    )
    said = request.describe(KNOWN)
    assert said.splitlines() == [
        "Targets version 8, valid until 2030-01-01 12:00 UTC",
        f"  release combat 3: 7 bytes, SHA-256 {'ab' * 32} new ?[2Jnetwork",
        f"  release combat 4: 7 bytes, SHA-256 {'ab' * 32}",
        "  wish: serve only combat 3: device pi7, by eve it limps",
        "  wish: do not serve combat 2: group lab",
        "  wish: do not serve combat 1: all devices",
        f"Waits: targets version 8 has 0 of 1 signatures (1 more of the keys {BOB.public_key.keyid[:8]})",
    ]
    request.sign(KEYS)
    assert request.describe(KNOWN).splitlines()[-1] == "Every signature is there."


def test_nothing_is_signed_without_being_told() -> None:
    request = request_for_targets()
    assert request.targets is not None
    targets = request.targets.signed
    targets.unrecognized_fields.update({"x-more": 1, wishes.FIELD: 7})
    targets.delegations = Delegations({}, {})
    targets.targets["combat/3.tflite"] = target_of(release(4))
    said = request.describe(KNOWN)
    for line in ("UNKNOWN field x-more", "DELEGATES", "UNREADABLE release combat/3.tflite", "UNREADABLE wishes"):
        assert f"  {line}" in said


def test_a_root_is_told_with_what_is_new_dropped_and_unknown() -> None:
    root = root_of(2, root=[ALICE, CAROL])
    root.signed.roles["root"].threshold = 2
    root.signed.revoke_key(BOB.public_key.keyid, "targets")
    root.signed.add_key(ALICE.public_key, "targets")
    root.signed.unrecognized_fields["x-more"] = 1
    lines = SigningRequest(root_of(1), root).describe(KNOWN).splitlines()
    stranger = "not in your keys.json: ask the host's operator whose it is"
    assert lines[:4] == [
        "Root version 2, after version 1, valid until 2030-01-01 12:00 UTC",
        "  root: 2 of 2 keys must sign (now 1)",
        f"    {ALICE.public_key.keyid[:16]}",
        f"    {CAROL.public_key.keyid[:16]}  NEW  {stranger}",
    ]
    assert f"    {ALICE.public_key.keyid[:16]}  NEW" in lines
    assert f"    {BOB.public_key.keyid[:16]}  is dropped" in lines
    assert "  UNKNOWN field x-more" in lines


def test_a_key_that_is_smuggled_in_as_old_is_told_all_the_same() -> None:
    """The root in force is only what the request says it is."""
    forged = SigningRequest(root_of(1, targets=[CAROL]), root_of(2, targets=[CAROL]))
    assert f"{CAROL.public_key.keyid[:16]}  not in your keys.json" in forged.describe(KNOWN)


def _altered(change: Callable[[dict[str, Any]], object]) -> bytes:
    document = json.loads(request_for_both().to_bytes())
    change(document)
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[" * 100_000,
        b"{}",
        b" " * (signing.MAX_BYTES + 1),
        _altered(lambda it: it.update(format="edgeswap signing request 2")),
        _altered(lambda it: it.update(more=1)),
        _altered(lambda it: it.update(documents=[])),
        _altered(lambda it: it["documents"].append(it["documents"][0])),
        _altered(lambda it: it["documents"].append(it["trusted_root"])),
        _altered(lambda it: it.update(trusted_root=it["documents"][1])),
        _altered(
            lambda it: it["documents"][0]["signed"].update(_type="snapshot", meta={"targets.json": {"version": 1}})
        ),
        _altered(lambda it: it["documents"][0]["signed"].pop("expires")),
        _altered(lambda it: it["documents"][0]["signed"].update(roles={})),
        _altered(lambda it: it["documents"][0]["signed"].update(keys=[])),
        _altered(lambda it: it["documents"][0].update(signatures=[{}])),
        _altered(lambda it: it["documents"][1]["signed"].update(targets={"a": 1})),
    ],
)
def test_what_is_no_request_is_refused(data: bytes) -> None:
    with pytest.raises(Rejected) as caught:
        SigningRequest.from_bytes(data)
    assert caught.value.code == "bad_request"


_WHOLE = request_for_both().to_bytes()


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(_WHOLE) - 1), st.binary(max_size=6), st.integers(0, 40))
def test_a_mangled_request_is_refused_or_readable(start: int, put: bytes, dropped: int) -> None:
    data = _WHOLE[:start] + put + _WHOLE[start + dropped :]
    with suppress(Rejected):
        request = SigningRequest.from_bytes(data)
        request.describe(KNOWN)
        request.purge()


def test_reading_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "root-2.json"
    with pytest.raises(Misconfigured, match="No such file"):
        signing.read(path)
    path.write_bytes(request_for_both().to_bytes())
    assert signing.read(path) == request_for_both()

    def fail(*_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(Unavailable, match="Input/output error"):
        signing.read(path)


def test_a_missing_signature_says_what_to_do() -> None:
    error = SignaturesMissing(Path("requests/root-2.json"), request_for_both().shortfalls(), ["the token is away"])
    assert error.file == Path("requests/root-2.json")
    for text in (
        "root version 2 has 0 of 1",
        "targets version 8",
        "the token is away",
        "`trainer-host sign`",
        "accept",
    ):
        assert text in str(error)
