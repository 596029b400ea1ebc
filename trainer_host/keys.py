"""The keys of the four TUF roles: made, taken in, put aside, and loaded through `securesystemslib` key URIs.

`keys.json` maps each role to its keys: a URI that says where the private key is, and the public key.

    file2:root.pem      an unencrypted PKCS#8 file in the folder (or elsewhere, by an absolute path)
    encrypted:root.pem  the same under a passphrase
    env:NAME            the same as a file's text, in an environment variable, for CI
    hsm:2?label=safe    an ECDSA key on a PKCS#11 token (key id 2); the passphrase is its PIN, and the environment
                        variable PYKCS11LIB names the token's library
    awskms:…            any other URI that `securesystemslib` knows, written into `keys.json` by hand

Paths are relative to the folder, so the folder can move to a stick and back. A private key may be absent: then it is
*offline*, and what it is needed for is signed elsewhere (`trainer_host.signing`).

The index says where keys are; what they are good for is said by the repository's root alone (its key ids and
thresholds). So whoever changes both lists a new key here *before* a root names it, and puts an old one aside *after* a
root has dropped it (`settle`): whatever interrupts that, the index knows every key that the root names. A private key
is never overwritten or deleted; an old one is moved to `retired/`.

Who holds which key (TUF specification section 6.1): root signs rarely and replaces every other key, so it belongs
offline. Targets signs each release; keep it offline too where a person releases models, and online only where the
trainer publishes by itself. Snapshot and timestamp are re-signed by the running host.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

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
    HSMSigner,
    Key,
    SecretsHandler,
    Signer,
    SSlibKey,
)
from tuf.api.metadata import Root  # type: ignore[attr-defined]

from protocol.durable import OS_DISK, write_durably
from protocol.errors import EdgeswapError, Misconfigured, Unavailable

ROLES = ("root", "targets", "snapshot", "timestamp")
OFFLINE_ROLES = ("root", "targets")
ONLINE_ROLES = ("snapshot", "timestamp")
INDEX = "keys.json"
RETIRED = "retired"

Secret = str | SecretsHandler | None
"""What opens keys: a passphrase or PIN, or who is asked for it by its name (`passphrase`, `pin`)."""

FILE_SCHEMES = ("file2", "encrypted")
_PERSONAL = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)
_UNUSABLE = (ValueError, TypeError, KeyError, UnsupportedAlgorithm, SecureSystemsError)


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
        return cls(_private_key(path.read_bytes(), f"the key file {path}", secrets_handler), public_key)


class EnvironmentSigner(CryptoSigner):
    """A private key as PEM text in an environment variable: `env:<NAME>`, for CI jobs. It may be encrypted.

    `securesystemslib` had such a scheme until its version 1.0.
    """

    SCHEME = "env"

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> CryptoSigner:
        """Read the key; see `Signer.from_priv_key_uri`.

        Raises:
            FileNotFoundError: There is no such variable: the key is not here.
            Misconfigured: It is encrypted and there is no passphrase, or it is the wrong one.
        """
        name = priv_key_uri.partition(":")[2]
        if not isinstance(public_key, SSlibKey):
            raise Misconfigured(f"{name} needs a public key of a kind that files can hold")
        return cls(_private_key(_variable(name), f"the environment variable {name}", secrets_handler), public_key)


LOCAL_SCHEMES = (*FILE_SCHEMES, EnvironmentSigner.SCHEME)
SIGNER_FOR_URI_SCHEME[EncryptedFileSigner.SCHEME] = EncryptedFileSigner
SIGNER_FOR_URI_SCHEME[EnvironmentSigner.SCHEME] = EnvironmentSigner


class Keyring(Mapping[str, Sequence[Signer]]):
    """Each role's keys that are here, ready to sign.

    They are read anew at each use, so a running host signs with the keys of the day.

    Args:
        folder: Where `keys.json` is.
        secret: Opens them.

    Looking up a role raises `Misconfigured` when a key is here and cannot be used, and `Unavailable` when the disk
    fails. Keys that are not here are left out.
    """

    def __init__(self, folder: Path, secret: Secret = None) -> None:
        self._folder = folder
        self._secret = secret

    def __getitem__(self, role: str) -> Sequence[Signer]:
        entries = roles(self._folder)[role]
        return [load(self._folder, role, entry, self._secret) for entry in entries if is_here(self._folder, entry)]

    def __iter__(self) -> Iterator[str]:
        return iter(roles(self._folder))

    def __len__(self) -> int:
        return len(roles(self._folder))


def init(folder: Path, passphrase: str | None) -> Index:
    """Make one Ed25519 key for each role, in files of mode 0600 in a folder of mode 0700.

    Args:
        folder: Is created where it is missing.
        passphrase: Encrypts the files, unless it is `None` or empty.

    Returns:
        What `roles` will list.

    Raises:
        Misconfigured: There are keys already; nothing is ever overwritten. Or the folder cannot be made.
        Unavailable: The disk failed.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        taken = [name for name in (INDEX, *map(_file_name, ROLES)) if (folder / name).exists()]
    except OSError as error:
        raise _trouble(error, f"cannot write keys to {folder}") from error
    if taken:
        raise Misconfigured(f"{folder} already holds {', '.join(taken)}: keys are never overwritten")
    index = {role: [_make(folder, role, passphrase, _file_name(role))] for role in ROLES}
    _write_index(folder, index)
    return index


def roles(folder: Path) -> Index:
    """Each role's keys.

    Raises:
        Misconfigured: There is no index of keys, or it is none.
        Unavailable: The disk failed.
    """
    path = folder / INDEX
    try:
        index = msgspec.json.decode(path.read_bytes(), type=Index)
    except OSError as error:
        advice = "Make keys first: trainer-host keys init"
        raise _trouble(error, f"cannot read {path}", advice) from error
    except (ValueError, RecursionError) as error:
        raise Misconfigured(f"{path} is no index of keys: {error}") from error
    absent = [role for role in ROLES if not index.get(role)]
    if absent:
        raise Misconfigured(f"{path} has no key for {', '.join(absent)}")
    return index


def read_secret(path: Path) -> str:
    """The passphrase or PIN in the first line of a file.

    Raises:
        Misconfigured: There is no such file for this user, or it is empty.
        Unavailable: The disk failed.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise _trouble(error, f"cannot read passphrase_file {path}") from error
    except UnicodeDecodeError as error:
        raise Misconfigured(f"cannot read passphrase_file {path}: {error}") from error
    if not lines or not lines[0]:
        raise Misconfigured(f"the first line of passphrase_file {path} is empty")
    return lines[0]


def load_signer(folder: Path, role: str, passphrase: str | None = None) -> Signer:
    """A role's first key, ready to sign; see `load_signers`."""
    return load_signers(folder, (role,), passphrase)[role][0]


def load_signers(folder: Path, wanted: Iterable[str] = ROLES, passphrase: str | None = None) -> dict[str, list[Signer]]:
    """Every key of the wanted roles, ready to sign. `Keyring` does without those that are not here.

    Args:
        folder: Where `keys.json` is.
        wanted: Roles; leave out those whose keys are offline.
        passphrase: Opens encrypted files, or is the PIN of a token.

    Raises:
        Misconfigured: A key is missing, unreadable, does not fit its public key, or the passphrase is wrong or missing.
        Unavailable: The disk failed.
    """
    index = roles(folder)
    return {role: [load(folder, role, entry, passphrase) for entry in index[role]] for role in wanted}


def load(folder: Path, role: str, entry: KeyEntry, secret: Secret = None) -> Signer:
    """One key, ready to sign; raises as `load_signers` does."""
    try:
        return Signer.from_priv_key_uri(_absolute(folder, entry.uri), entry.public_key, _handler(secret))
    except OSError as error:
        raise _trouble(error, f"cannot use the {role} key {entry.uri} of {folder}") from error
    except _UNUSABLE as error:
        raise Misconfigured(f"cannot use the {role} key {entry.uri} of {folder}: {error}") from error


def is_here(folder: Path, entry: KeyEntry) -> bool:
    """Whether a private key is on this machine. Of a token or a key service, only signing can tell: yes."""
    path = file_of(folder, entry)
    if path is not None:
        return path.exists()
    scheme, _, name = entry.uri.partition(":")
    return name in os.environ if scheme == EnvironmentSigner.SCHEME else True


def file_of(folder: Path, entry: KeyEntry) -> Path | None:
    """The file that holds a private key, be it there or not; `None` for a key that is in no file."""
    scheme, _, name = entry.uri.partition(":")
    return folder / name if scheme in FILE_SCHEMES else None


def generate(folder: Path, role: str, passphrase: str | None) -> KeyEntry:
    """Make another key for a role, in a file of its own, and list it.

    Raises:
        Misconfigured: The folder cannot be written by this user.
        Unavailable: The disk failed.
    """
    index = roles(folder)
    entry = _make(folder, role, passphrase)
    _write_index(folder, {**index, role: [*index[role], entry]})
    return entry


def adopt(
    folder: Path, role: str, uri: str, secret: Secret = None, *, refused: Container[str] = frozenset()
) -> KeyEntry:
    """List a key that is there already, for a role.

    Args:
        folder: Where `keys.json` is.
        role: Which.
        uri: `file2:`, `encrypted:`, `env:` or `hsm:`, as on top of this module.
        secret: Opens it.
        refused: Ids of keys that the role has had before: who dropped one had a reason.

    Raises:
        Misconfigured: There is no such key, it cannot be opened or used, is refused, or the role has it already.
        Unavailable: The disk failed.
    """
    entry = _found(folder, uri, secret)
    index = roles(folder)
    if any(known.keyid == entry.keyid for known in index[role]):
        raise Misconfigured(f"{folder / INDEX} lists this {role} key already: {entry.keyid}")
    if entry.keyid in refused:
        raise Misconfigured(f"{entry.keyid} was a {role} key before and was dropped: it is not taken again")
    load(folder, role, entry, secret)
    _write_index(folder, {**index, role: [*index[role], entry]})
    return entry


def retire(folder: Path, role: str, keyid: str) -> Path | None:
    """Take a key off the list, and move its file to `retired/`. What was interrupted is done by doing it again.

    Returns:
        Where the private key is now; `None` where it was not here, is in no file, or another entry uses the same file.

    Raises:
        Misconfigured: The role has no such key, or it is the role's last.
        Unavailable: The disk failed.
    """
    index = roles(folder)
    leaving = [entry for entry in index[role] if entry.keyid == keyid]
    staying = [entry for entry in index[role] if entry.keyid != keyid]
    if not leaving or not staying:
        raise Misconfigured(f"{keyid} is not, or is the only one, among the {role} keys of {folder / INDEX}")
    new = {**index, role: staying}
    path = file_of(folder, leaving[0])
    shared = any(file_of(folder, entry) == path for entries in new.values() for entry in entries)
    moved = None if path is None or shared else _put_aside(folder, path, role, keyid)
    _write_index(folder, new)
    return moved


def settle(folder: Path, roots: Sequence[Root]) -> list[tuple[str, str, Path | None]]:
    """Retire the keys that an earlier root names and the newest does not. A key that no root names yet is left alone.

    Args:
        folder: Where `keys.json` is.
        roots: All of the repository's, in order.

    Returns:
        Role, key id, and what `retire` returned, of each.

    Raises:
        Misconfigured: The folder cannot be written by this user.
        Unavailable: The disk failed.
    """
    index = roles(folder)
    old = [
        (role, entry.keyid)
        for role in ROLES
        for entry in index[role]
        if entry.keyid not in roots[-1].roles[role].keyids
        and any(entry.keyid in root.roles[role].keyids for root in roots[:-1])
    ]
    return [(role, keyid, retire(folder, role, keyid)) for role, keyid in old]


def offline_advice(folder: Path) -> str:
    """What to tell a person who has just made keys."""
    root, targets = (folder / _file_name(role) for role in OFFLINE_ROLES)
    return (
        f"Move {root} to a place that is not on any network: it replaces all other keys and signs about once a year.\n"
        f"Keep {targets} offline too, unless this host is to publish models by itself.\n"
        f"Leave the snapshot and timestamp keys here. Keep a copy of all four, and of {folder / INDEX}."
    )


def _file_name(role: str) -> str:
    return f"{role}.pem"


def _make(folder: Path, role: str, passphrase: str | None, name: str | None = None) -> KeyEntry:
    private_key = Ed25519PrivateKey.generate()
    encryption = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
    public = SSlibKey.from_crypto(private_key.public_key())
    name = name or f"{role}-{public.keyid[:8]}.pem"
    _write_new(folder / name, private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    scheme = EncryptedFileSigner.SCHEME if passphrase else CryptoSigner.SCHEME
    return KeyEntry(uri=f"{scheme}:{name}", keyid=public.keyid, public=public.to_dict())


def _write_new(path: Path, data: bytes) -> None:
    """Write a file that must not exist, readable by its owner only, and on the disk when this returns."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        OS_DISK.sync_folder(path.parent)
    except OSError as error:
        raise _trouble(error, f"cannot write the key {path}") from error


def _write_index(folder: Path, index: Index) -> None:
    path = folder / INDEX
    write_durably(path, msgspec.json.format(msgspec.json.encode(index)) + b"\n")
    path.chmod(0o600)


def _put_aside(folder: Path, path: Path, role: str, keyid: str) -> Path | None:
    """Move a private key to `retired/`, where its whole key id is its name, so none takes another's place."""
    aside = folder / RETIRED / f"{role}-{keyid}{path.suffix}"
    try:
        aside.parent.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():
            return aside if aside.exists() else None
        if aside.exists():
            raise Misconfigured(f"{aside} is there already: compare it with {path}, and move one of them away")
        path.rename(aside)
        OS_DISK.sync_folder(aside.parent)
        OS_DISK.sync_folder(path.parent)
    except OSError as error:
        raise _trouble(error, f"cannot move {path} to {aside}") from error
    return aside


def _found(folder: Path, uri: str, secret: Secret) -> KeyEntry:
    """The entry for a key that is there: its public half is read from it."""
    scheme, _, name = uri.partition(":")
    handler = _handler(secret)
    try:
        if scheme == HSMSigner.SCHEME:
            parts = urlsplit(uri)
            label = parse_qs(parts.query).get("label", [None])[0]
            uri, public = HSMSigner.import_(int(parts.path) if parts.path else None, label, handler)
        elif scheme == EnvironmentSigner.SCHEME:
            public = _public(_private_key(_variable(name), f"the environment variable {name}", handler))
        elif scheme in FILE_SCHEMES:
            handler = handler if scheme == EncryptedFileSigner.SCHEME else None
            public = _public(_private_key((folder / name).read_bytes(), f"the key file {folder / name}", handler))
        else:
            known = ", ".join(f"{known}:" for known in (*FILE_SCHEMES, EnvironmentSigner.SCHEME, HSMSigner.SCHEME))
            raise Misconfigured(
                f"{uri} is of no kind that can be taken in ({known}); other kinds are written into {folder / INDEX}"
            )
    except OSError as error:
        raise _trouble(error, f"cannot take in the key {uri}") from error
    except token_errors() as error:
        raise Misconfigured(f"cannot take in the key {uri}: {error or type(error).__name__}") from error
    return KeyEntry(uri=uri, keyid=public.keyid, public=public.to_dict())


def token_errors() -> tuple[type[Exception], ...]:
    """What an unusable key raises; the PKCS#11 library, where there is one, has errors of its own."""
    try:
        from pkcs11.exceptions import PKCS11Error  # noqa: PLC0415
    except ImportError:
        return _UNUSABLE
    return (*_UNUSABLE, PKCS11Error)


def _public(private_key: Any) -> SSlibKey:
    return SSlibKey.from_crypto(private_key.public_key())


def _private_key(pem: bytes, what: str, secrets: SecretsHandler | None) -> Any:
    """Read a private key, asking for its passphrase only where it has one."""
    try:
        return load_pem_private_key(pem, None)
    except TypeError:  # it is encrypted
        if secrets is None:
            raise Misconfigured(f"{what} is encrypted: a passphrase is needed") from None
    except ValueError as error:
        raise Misconfigured(f"{what} holds no private key: {error}") from error
    try:
        return load_pem_private_key(pem, secrets("passphrase").encode())
    except (ValueError, TypeError) as error:
        raise Misconfigured(f"the passphrase does not open {what}: {error}") from error


def _variable(name: str) -> bytes:
    if name not in os.environ:
        raise FileNotFoundError(None, f"there is no environment variable {name}")
    return os.environ[name].encode()


def _absolute(folder: Path, uri: str) -> str:
    scheme, _, name = uri.partition(":")
    return f"{scheme}:{(folder / name).absolute()}" if scheme in FILE_SCHEMES else uri


def _handler(secret: Secret) -> SecretsHandler | None:
    if secret is None or not isinstance(secret, str):
        return secret
    handler: Callable[[str], str] = lambda _: secret  # noqa: E731
    return handler


def _trouble(error: OSError, what: str, advice: str = "") -> EdgeswapError:
    """What a person can mend is theirs; else the disk is to blame, and the same may work later."""
    text = f"{what}: {error.strerror or error}"
    if isinstance(error, _PERSONAL):
        return Misconfigured(f"{text}. {advice}" if advice else text)
    return Unavailable(text)
