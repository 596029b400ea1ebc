from __future__ import annotations

import stat
from pathlib import Path

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]

from protocol.errors import Misconfigured
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
