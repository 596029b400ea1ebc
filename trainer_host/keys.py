"""The keys of the four TUF roles: made once, kept in a folder, loaded through `securesystemslib` key URIs.

`keys.json` maps each role to its keys: a URI that says where the private key is, and the public key. A file of ours
has the URI `file2:<name>`, or `encrypted:<name>` under a passphrase, relative to the folder, so the folder can move to
a stick and back. Any other URI that `securesystemslib` knows (`hsm:`, `awskms:`, …) can be written there instead.

Who holds which key (TUF specification section 6.1): root signs rarely and replaces every other key, so it belongs
offline. Targets signs each release; keep it offline too where a person releases models, and online only where the
trainer publishes by itself. Snapshot and timestamp are re-signed by the running host.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from msgspec import Struct
from securesystemslib.exceptions import Error as SecureSystemsError
from securesystemslib.signer import (  # type: ignore[attr-defined]
    SIGNER_FOR_URI_SCHEME,
    CryptoSigner,
    Key,
    SecretsHandler,
    Signer,
    SSlibKey,
)

from protocol.errors import Misconfigured

ROLES = ("root", "targets", "snapshot", "timestamp")
OFFLINE_ROLES = ("root", "targets")
INDEX = "keys.json"

_FILE_SCHEMES = ("file2", "encrypted")


class KeyEntry(Struct, frozen=True, kw_only=True):
    """One key of a role.

    Attributes:
        uri: Where the private key is.
        keyid: Its TUF key identifier.
        public: The public key, as TUF metadata spells it.
    """

    uri: str
    keyid: str
    public: dict[str, Any]

    @property
    def public_key(self) -> Key:
        """The public key, ready to verify with."""
        return Key.from_dict(self.keyid, dict(self.public))


Index = dict[str, list[KeyEntry]]


class EncryptedFileSigner(CryptoSigner):
    """A private key in an encrypted PKCS#8 PEM file: `encrypted:<path>`.

    `CryptoSigner` itself reads unencrypted files only.
    """

    SCHEME = "encrypted"

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> CryptoSigner:
        """Read and decrypt the key; see `Signer.from_priv_key_uri`.

        Raises:
            Misconfigured: There is no passphrase, or it is the wrong one.
        """
        path = Path(priv_key_uri.partition(":")[2])
        if not isinstance(public_key, SSlibKey):
            raise Misconfigured(f"{path.name} needs a public key of a kind that files can hold")
        if secrets_handler is None:
            raise Misconfigured(f"the key file {path} is encrypted: a passphrase is needed")
        try:
            private_key = load_pem_private_key(path.read_bytes(), secrets_handler("passphrase").encode())
        except (ValueError, TypeError) as error:
            raise Misconfigured(f"the passphrase does not open the key file {path}: {error}") from error
        return cls(private_key, public_key)


SIGNER_FOR_URI_SCHEME[EncryptedFileSigner.SCHEME] = EncryptedFileSigner


def init(folder: Path, passphrase: str | None) -> Index:
    """Make one Ed25519 key for each role, in files of mode 0600 in a folder of mode 0700.

    Args:
        folder: Is created where it is missing.
        passphrase: Encrypts the files, unless it is `None` or empty.

    Returns:
        What `roles` will list.

    Raises:
        Misconfigured: There are keys already; nothing is ever overwritten.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        taken = [name for name in (INDEX, *map(_file_name, ROLES)) if (folder / name).exists()]
        if taken:
            raise Misconfigured(f"{folder} already holds {', '.join(taken)}: keys are never overwritten")
        index = {role: [_make(folder, role, passphrase)] for role in ROLES}
        _write_new(folder / INDEX, msgspec.json.format(msgspec.json.encode(index)) + b"\n")
    except OSError as error:
        raise Misconfigured(f"cannot write keys to {folder}: {error}") from error
    return index


def roles(folder: Path) -> Index:
    """Each role's keys.

    Raises:
        Misconfigured: There is no readable index of keys.
    """
    path = folder / INDEX
    try:
        return msgspec.json.decode(path.read_bytes(), type=Index)
    except OSError as error:
        raise Misconfigured(f"cannot read {path}: {error.strerror}. Make keys first: trainer-host keys init") from error
    except msgspec.DecodeError as error:
        raise Misconfigured(f"{path} is no index of keys: {error}") from error


def load_signer(folder: Path, role: str, passphrase: str | None = None) -> Signer:
    """A role's first key, ready to sign; see `load_signers`."""
    return load_signers(folder, (role,), passphrase)[role][0]


def load_signers(folder: Path, wanted: Iterable[str] = ROLES, passphrase: str | None = None) -> dict[str, list[Signer]]:
    """Every key of the wanted roles, ready to sign.

    Args:
        folder: Where `keys.json` is.
        wanted: Roles; leave out those whose keys are offline.
        passphrase: Opens encrypted files, or is the PIN of a token.

    Raises:
        Misconfigured: A key is missing, unreadable, does not fit its public key, or the passphrase is wrong or missing.
    """
    index = roles(folder)
    absent = [role for role in wanted if not index.get(role)]
    if absent:
        raise Misconfigured(f"{folder / INDEX} has no key for {', '.join(absent)}")
    return {role: [_load(folder, role, entry, passphrase) for entry in index[role]] for role in wanted}


def offline_advice(folder: Path) -> str:
    """What to tell a person who has just made keys."""
    root, targets = (folder / _file_name(role) for role in OFFLINE_ROLES)
    return (
        f"Move {root} to a place that is not on any network: it replaces all other keys and signs about once a year.\n"
        f"Keep {targets} offline too, unless this host is to publish models by itself.\n"
        f"Leave the snapshot and timestamp keys here. Keep a copy of all four."
    )


def _file_name(role: str) -> str:
    return f"{role}.pem"


def _make(folder: Path, role: str, passphrase: str | None) -> KeyEntry:
    private_key = Ed25519PrivateKey.generate()
    encryption = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
    name = _file_name(role)
    _write_new(folder / name, private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    public = SSlibKey.from_crypto(private_key.public_key())
    scheme = EncryptedFileSigner.SCHEME if passphrase else CryptoSigner.SCHEME
    return KeyEntry(uri=f"{scheme}:{name}", keyid=public.keyid, public=public.to_dict())


def _write_new(path: Path, data: bytes) -> None:
    """Write a file that must not exist, readable by its owner only, and on the disk when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _load(folder: Path, role: str, entry: KeyEntry, passphrase: str | None) -> Signer:
    scheme, _, name = entry.uri.partition(":")
    uri = f"{scheme}:{(folder / name).absolute()}" if scheme in _FILE_SCHEMES else entry.uri
    secrets: SecretsHandler | None = None if passphrase is None else lambda _: passphrase
    try:
        return Signer.from_priv_key_uri(uri, entry.public_key, secrets)
    except (OSError, ValueError, TypeError, KeyError, UnsupportedAlgorithm, SecureSystemsError) as error:
        raise Misconfigured(f"cannot use the {role} key {entry.uri} of {folder}: {error}") from error
