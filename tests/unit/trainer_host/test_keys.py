from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.metadata import Root  # type: ignore[attr-defined]

from protocol.errors import Misconfigured, Unavailable
from trainer_host import keys


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_makes_one_key_for_each_role_readable_by_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "keys"
    index = keys.init(folder, None)
    assert set(index) == {"root", "targets", "snapshot", "timestamp"}
    assert len({entry.keyid for entries in index.values() for entry in entries}) == 4
    assert _mode(folder) == 0o700
    assert {_mode(path) for path in folder.iterdir()} == {0o600}
    assert keys.roles(folder) == index


@pytest.mark.parametrize("passphrase", [None, "correct horse"])
def test_signs_what_the_public_key_verifies(tmp_path: Path, passphrase: str | None) -> None:
    keys.init(tmp_path, passphrase)
    for role, entries in keys.roles(tmp_path).items():
        signature = keys.load_signer(tmp_path, role, passphrase).sign(b"payload")
        entries[0].public_key.verify_signature(signature, b"payload")


def test_a_passphrase_encrypts_the_files(tmp_path: Path) -> None:
    keys.init(tmp_path, "correct horse")
    for role in keys.ROLES:
        assert b"ENCRYPTED PRIVATE KEY" in (tmp_path / f"{role}.pem").read_bytes()


@pytest.mark.parametrize("passphrase", [None, "", "wrong"])
def test_a_missing_or_wrong_passphrase_is_said(tmp_path: Path, passphrase: str | None) -> None:
    keys.init(tmp_path, "correct horse")
    with pytest.raises(Misconfigured, match="passphrase"):
        keys.load_signer(tmp_path, "targets", passphrase)


def test_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "snapshot.pem").write_text("precious")
    with pytest.raises(Misconfigured, match=r"snapshot\.pem"):
        keys.init(tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot.pem"]
    assert (tmp_path / "snapshot.pem").read_text() == "precious"


def test_the_folder_can_move(tmp_path: Path) -> None:
    keys.init(tmp_path / "here", None)
    (tmp_path / "here").rename(tmp_path / "there")
    assert keys.load_signers(tmp_path / "there").keys() == set(keys.ROLES)


def test_an_offline_key_is_missed_by_name_and_the_others_work(tmp_path: Path) -> None:
    keys.init(tmp_path, None)
    (tmp_path / "root.pem").unlink()
    assert set(keys.load_signers(tmp_path, ("snapshot", "timestamp"))) == {"snapshot", "timestamp"}
    with pytest.raises(Misconfigured, match="root key"):
        keys.load_signer(tmp_path, "root")


def test_a_key_file_that_was_swapped_is_refused(tmp_path: Path) -> None:
    keys.init(tmp_path, None)
    (tmp_path / "root.pem").write_bytes((tmp_path / "targets.pem").read_bytes())
    with pytest.raises(Misconfigured, match="does not match public key"):
        keys.load_signer(tmp_path, "root")


def test_an_encrypted_file_under_the_plain_scheme_is_refused(tmp_path: Path) -> None:
    keys.init(tmp_path, "correct horse")
    index = (tmp_path / "keys.json").read_text()
    (tmp_path / "keys.json").write_text(index.replace("encrypted:", "file2:"))
    with pytest.raises(Misconfigured, match="root key"):
        keys.load_signer(tmp_path, "root", "correct horse")


def test_other_kinds_of_key_need_other_signers(tmp_path: Path) -> None:
    keys.init(tmp_path, None)
    index = (tmp_path / "keys.json").read_text()
    (tmp_path / "keys.json").write_text(index.replace("file2:root.pem", "nothing:7"))
    with pytest.raises(Misconfigured, match="Unsupported private key scheme nothing"):
        keys.load_signer(tmp_path, "root")


@pytest.mark.parametrize("content", [None, "no JSON", "{}"])
def test_an_index_that_is_missing_broken_or_empty_is_said(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "keys.json").write_text(content)
    with pytest.raises(Misconfigured, match=r"keys\.json"):
        keys.load_signer(tmp_path, "root")


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Misconfigured, match="cannot write keys"):
        keys.init(tmp_path / "file" / "keys", None)


def test_says_what_to_keep_offline(tmp_path: Path) -> None:
    advice = keys.offline_advice(tmp_path)
    assert str(tmp_path / "root.pem") in advice
    assert str(tmp_path / "targets.pem") in advice


def test_a_threshold_of_several_keys_is_loaded_whole(tmp_path: Path) -> None:
    index = keys.init(tmp_path, None)
    second = CryptoSigner.generate_ed25519()
    (tmp_path / "second.pem").write_bytes(second.private_bytes)
    entry = keys.KeyEntry(uri="file2:second.pem", keyid=second.public_key.keyid, public=second.public_key.to_dict())
    (tmp_path / "keys.json").write_bytes(msgspec.json.encode({**index, "root": [*index["root"], entry]}))
    assert len(keys.load_signers(tmp_path, ["root"])["root"]) == 2


# More than one key, and other places for them.


def roots_of(*versions: keys.Index) -> list[Root]:
    """Roots that name the keys of these indexes."""
    roots = []
    for number, index in enumerate(versions, 1):
        root = Root(version=number)
        for role, entries in index.items():
            for entry in entries:
                root.add_key(entry.public_key, role)
        roots.append(root)
    return roots


def test_a_keyring_has_the_keys_that_are_here_at_the_time(tmp_path: Path) -> None:
    keys.init(tmp_path, None)
    ring = keys.Keyring(tmp_path)
    assert set(ring) == set(keys.ROLES)
    assert len(ring) == 4
    assert len(ring["targets"]) == 1
    made = keys.generate(tmp_path, "targets", None)
    assert [signer.public_key.keyid for signer in ring["targets"]][-1] == made.keyid
    (tmp_path / "targets.pem").unlink()
    assert [signer.public_key.keyid for signer in ring["targets"]] == [made.keyid]


def test_a_key_that_is_here_and_does_not_open_is_not_passed_over(tmp_path: Path) -> None:
    keys.init(tmp_path, "correct horse")
    with pytest.raises(Misconfigured, match="passphrase"):
        keys.Keyring(tmp_path, "wrong")["targets"]
    assert len(keys.Keyring(tmp_path, lambda what: {"passphrase": "correct horse"}[what])["targets"]) == 1


def test_another_key_gets_a_file_of_its_own(tmp_path: Path) -> None:
    index = keys.init(tmp_path, None)
    before = (tmp_path / "root.pem").read_bytes()
    made = keys.generate(tmp_path, "root", "correct horse")
    assert keys.roles(tmp_path) == {**index, "root": [*index["root"], made]}
    assert (tmp_path / "root.pem").read_bytes() == before
    path = keys.file_of(tmp_path, made)
    assert path is not None
    assert _mode(path) == _mode(tmp_path / "keys.json") == 0o600
    assert b"ENCRYPTED" in path.read_bytes()


def test_a_retired_key_is_moved_and_never_lost(tmp_path: Path) -> None:
    index = keys.init(tmp_path, None)
    old, data = index["root"][0], (tmp_path / "root.pem").read_bytes()
    new = keys.generate(tmp_path, "root", None)
    aside = keys.retire(tmp_path, "root", old.keyid)
    assert aside == tmp_path / "retired" / f"root-{old.keyid}.pem"
    assert aside.read_bytes() == data
    assert _mode(aside.parent) == 0o700
    assert keys.roles(tmp_path)["root"] == [new]
    with pytest.raises(Misconfigured, match="only one"):
        keys.retire(tmp_path, "root", new.keyid)
    with pytest.raises(Misconfigured, match="is not"):
        keys.retire(tmp_path, "root", old.keyid)


def test_nothing_in_retired_is_overwritten(tmp_path: Path) -> None:
    index = keys.init(tmp_path, None)
    keys.generate(tmp_path, "root", None)
    aside = tmp_path / "retired" / f"root-{index['root'][0].keyid}.pem"
    aside.parent.mkdir()
    aside.write_text("precious")
    with pytest.raises(Misconfigured, match="is there already"):
        keys.retire(tmp_path, "root", index["root"][0].keyid)
    assert aside.read_text() == "precious"
    assert (tmp_path / "root.pem").exists()


def test_an_interrupted_retirement_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is moved, the index not yet written: the same again does the rest."""
    old = keys.init(tmp_path, None)["root"][0]
    new = keys.generate(tmp_path, "root", None)

    def fail(*_: object) -> None:
        raise Unavailable("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(keys, "_write_index", fail)
        with pytest.raises(Unavailable):
            keys.retire(tmp_path, "root", old.keyid)
    assert [entry.keyid for entry in keys.roles(tmp_path)["root"]] == [old.keyid, new.keyid]
    assert keys.retire(tmp_path, "root", old.keyid) == tmp_path / "retired" / f"root-{old.keyid}.pem"
    assert keys.roles(tmp_path)["root"] == [new]


def test_a_file_that_two_roles_use_stays_until_the_last_has_gone(tmp_path: Path) -> None:
    index = keys.init(tmp_path, None)
    shared = keys.adopt(tmp_path, "snapshot", "file2:timestamp.pem")
    assert shared.keyid == index["timestamp"][0].keyid
    assert keys.retire(tmp_path, "snapshot", shared.keyid) is None
    assert (tmp_path / "timestamp.pem").exists()


def test_what_a_root_has_dropped_is_put_aside_and_what_is_new_is_not(tmp_path: Path) -> None:
    first = keys.init(tmp_path, None)
    second = {**first, "targets": [keys.generate(tmp_path, "targets", None)]}
    pending = keys.generate(tmp_path, "root", None)
    ((role, keyid, path),) = keys.settle(tmp_path, roots_of(first, second))
    assert (role, keyid) == ("targets", first["targets"][0].keyid)
    assert path is not None
    assert path.exists()
    assert keys.roles(tmp_path) == {**second, "root": [*first["root"], pending]}
    assert keys.settle(tmp_path, roots_of(first, second)) == []


def test_a_key_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.init(tmp_path, None)
    pem = CryptoSigner.generate_ed25519().private_bytes.decode()
    with pytest.raises(Misconfigured, match="no environment variable CI_KEY"):
        keys.adopt(tmp_path, "targets", "env:CI_KEY")
    monkeypatch.setenv("CI_KEY", "nonsense")
    with pytest.raises(Misconfigured, match="CI_KEY holds no private key"):
        keys.adopt(tmp_path, "targets", "env:CI_KEY")
    monkeypatch.setenv("CI_KEY", pem)
    entry = keys.adopt(tmp_path, "targets", "env:CI_KEY")
    signature = keys.Keyring(tmp_path)["targets"][1].sign(b"payload")
    entry.public_key.verify_signature(signature, b"payload")
    monkeypatch.delenv("CI_KEY")
    assert not keys.is_here(tmp_path, entry)
    assert len(keys.Keyring(tmp_path)["targets"]) == 1
    with pytest.raises(Misconfigured, match="no environment variable CI_KEY"):
        keys.load(tmp_path, "targets", entry)


def test_an_encrypted_key_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.init(tmp_path / "elsewhere", "correct horse")
    keys.init(tmp_path / "here", None)
    monkeypatch.setenv("CI_KEY", (tmp_path / "elsewhere" / "targets.pem").read_text())
    with pytest.raises(Misconfigured, match="a passphrase is needed"):
        keys.adopt(tmp_path / "here", "targets", "env:CI_KEY")
    keys.adopt(tmp_path / "here", "targets", "env:CI_KEY", "correct horse")


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_file_that_is_there_already_is_taken_in(tmp_path: Path, encrypted: bool) -> None:
    secret = "correct horse" if encrypted else None
    keys.init(tmp_path / "elsewhere", secret)
    keys.init(tmp_path / "here", None)
    scheme = "encrypted" if encrypted else "file2"
    uri = f"{scheme}:{tmp_path / 'elsewhere' / 'targets.pem'}"
    entry = keys.adopt(tmp_path / "here", "targets", uri, secret)
    assert entry.keyid == keys.roles(tmp_path / "elsewhere")["targets"][0].keyid
    with pytest.raises(Misconfigured, match="lists this targets key already"):
        keys.adopt(tmp_path / "here", "targets", uri, secret)
    with pytest.raises(Misconfigured, match="was dropped"):
        keys.adopt(tmp_path / "here", "root", uri, secret, refused={entry.keyid})
    assert len(keys.roles(tmp_path / "here")["root"]) == 1


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("file2:gone.pem", "No such file"),
        ("file2:keys.json", "holds no private key"),
        ("awskms:arn", "of no kind that can be taken in"),
        ("nothing", "of no kind that can be taken in"),
        ("hsm:two", "invalid literal"),
    ],
)
def test_what_cannot_be_taken_in_changes_nothing(tmp_path: Path, uri: str, text: str) -> None:
    index = keys.init(tmp_path, None)
    with pytest.raises(Misconfigured, match=text):
        keys.adopt(tmp_path, "targets", uri)
    assert keys.roles(tmp_path) == index


def test_a_disk_that_fails_is_not_the_persons_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = keys.init(tmp_path, None)["root"][0]

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(Unavailable, match="Input/output error"):
            keys.roles(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", fail)
        with pytest.raises(Unavailable, match="Input/output error"):
            keys.load(tmp_path, "root", entry)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(Unavailable, match="Input/output error"):
            keys.generate(tmp_path, "root", None)
    keys.generate(tmp_path, "root", None)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(Unavailable, match="Input/output error"):
            keys.retire(tmp_path, "root", entry.keyid)
    assert (tmp_path / "root.pem").exists()
