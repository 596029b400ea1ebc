"""Who holds which key, changed and checked: the folder of keys and the repository's root together.

A change takes three steps, in an order that may be cut anywhere: the new key is listed in `keys.json`; a root that
names it is signed and published; `root.json` for new devices is replaced, and what that root dropped is put aside. Cut
after the first, a key is listed that no root names, and nothing signs with it. Cut after the second, an old key is
still listed, and nothing signs with it either; the next change puts it aside, and that or the host's next start
replaces `root.json`. The index knows every key that the root names at any time. `examine` says where things stand and
what to do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from securesystemslib.exceptions import Error as SecureSystemsError
from tuf.api.exceptions import DownloadHTTPError, RepositoryError
from tuf.api.metadata import Metadata, Root, Targets  # type: ignore[attr-defined]
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig  # type: ignore[attr-defined]

from protocol.codec import MAX_PAYLOAD_BYTES
from protocol.command_line import Finding, Health
from protocol.errors import EdgeswapError, Misconfigured
from protocol.messages import MetadataSet
from trainer_host import keys
from trainer_host.keys import KeyEntry
from trainer_host.repository import WARNING_SHARE, Lifetimes, Repository
from trainer_host.signing import SigningRequest

if TYPE_CHECKING:
    from trainer_host.settings import Settings

SHOWN = 16
MAX_ROOTS = 1024


class Custody:
    """The keys of one repository.

    Args:
        folder: Where `keys.json` is.
        repository: With a `keys.Keyring` on the same folder as its signers.
        root_file: A copy of the newest root, which devices are provisioned with.
        secret: Opens keys, and encrypts new ones where it is a passphrase.
        tell: Is given sentences for people, while things happen.

    Every change raises `SignaturesMissing` when it waits for keys that are elsewhere, and what
    `Repository.change_root` raises.
    """

    def __init__(
        self, folder: Path, repository: Repository, root_file: Path, secret: str | None, tell: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._repository = repository
        self._root_file = root_file
        self._secret = secret
        self._tell = tell

    def rotate(self, role: str, keyid: str | None, now: datetime) -> None:
        """Replace a role's keys, or the one whose id begins with `keyid`, by as many that are made here.

        Raises:
            Misconfigured: No such key; and as said above.
        """
        _known(role)
        self.settle()
        old = [self._named(role, keyid)] if keyid else list(self._repository.next_root().roles[role].keyids)
        self._open_keys()
        new = [keys.generate(self._folder, role, self._secret) for _ in old]
        for entry in new:
            self._tell(f"Made the {role} key {entry.keyid[:SHOWN]}: {self._folder / entry.uri.partition(':')[2]}")

        def change(root: Root) -> None:
            for entry in new:
                root.add_key(entry.public_key, role)
            for gone in old:
                root.revoke_key(gone, role)

        self._change(change, now)

    def add(self, role: str, uri: str | None, now: datetime) -> None:
        """Let one more key sign for a role: one that is at `uri`, or one that is made here.

        Raises:
            Misconfigured: The key cannot be used, or was dropped from the role before; and as said above.
        """
        _known(role)
        self.settle()
        self._open_keys()
        if uri is None:
            entry = keys.generate(self._folder, role, self._secret)
            self._tell(f"Made the {role} key {entry.keyid[:SHOWN]}: {self._folder / entry.uri.partition(':')[2]}")
        else:
            dropped = {keyid for root in self._repository.roots()[:-1] for keyid in root.roles[role].keyids}
            entry = keys.adopt(self._folder, role, uri, self._secret, refused=dropped)
            self._tell(f"Took in the {role} key {entry.keyid[:SHOWN]} at {entry.uri}")
        self._change(lambda root: root.add_key(entry.public_key, role), now)

    def remove(self, role: str, keyid: str, now: datetime) -> None:
        """Let the key whose id begins with `keyid` sign no more; one that no root names is only put aside.

        Raises:
            Misconfigured: No such key, or fewer would stay than the threshold; and as said above.
        """
        _known(role)
        self.settle()
        if _matches(self._repository.next_root(), role, keyid):
            gone = self._named(role, keyid)
            self._change(lambda root: root.revoke_key(gone, role), now)
            return
        listed = [entry.keyid for entry in keys.roles(self._folder)[role] if entry.keyid.startswith(keyid)]
        gone = _single(listed, role, keyid)
        self._tell_retired(role, gone, keys.retire(self._folder, role, gone))

    def set_threshold(self, role: str, threshold: int, now: datetime) -> None:
        """Say how many of a role's keys must sign.

        Raises:
            Misconfigured: The role has fewer keys; and as said above.
        """
        _known(role)
        self.settle()

        def change(root: Root) -> None:
            root.roles[role].threshold = threshold

        self._change(change, now)

    def renew(self, role: str, now: datetime) -> None:
        """Sign root or targets metadata for another while, as they are.

        Raises:
            Misconfigured: The host signs the role by itself; and as said above.
        """
        if role not in keys.OFFLINE_ROLES:
            raise Misconfigured(f"the running host renews {role} by itself; `renew` is for {keys.OFFLINE_ROLES}")
        self.settle()
        if role == "root":
            self._change(lambda _: None, now)
        else:
            self._repository.amend(_as_it_is, now)
            self._tell("The targets are signed for another while.")

    def accept(self, request: SigningRequest, now: datetime) -> None:
        """Publish a signing request that came back; raises as `Repository.accept`."""
        self._repository.accept(request, now)
        for document in request.documents:
            self._tell(f"Accepted {document.signed.type} version {document.signed.version}.")
        self.settle()

    def settle(self) -> None:
        """Do what follows a new root: new devices are to be given it, and the keys that it drops are put aside.

        Raises:
            Misconfigured: The folder cannot be written by this user, or there is no repository.
            Unavailable: The disk or the lock failed.
        """
        self._repository.copy_root(self._root_file)
        for role, keyid, path in keys.settle(self._folder, self._repository.roots()):
            self._tell_retired(role, keyid, path)

    def rows(self) -> list[dict[str, Any]]:
        """A table of keys for people: those that are listed, and those that only the root names."""
        roots, expiries = self._repository.roots(), self._repository.expiries()
        rows = []
        for role, entries in keys.roles(self._folder).items():
            named = roots[-1].roles[role]
            listed = {entry.keyid: entry for entry in entries}
            for keyid in dict.fromkeys([*named.keyids, *listed]):
                entry = listed.get(keyid)
                rows.append(
                    {
                        "role": role,
                        "key": keyid[:SHOWN],
                        "private key": entry.uri if entry else "not in keys.json",
                        "here": _here(self._folder, entry),
                        "signs": "yes" if keyid in named.keyids else "no",
                        "threshold": f"{named.threshold} of {len(named.keyids)}",
                        "signed until": f"{expiries[role]:%Y-%m-%d %H:%M}",
                    }
                )
        return rows

    def examine(self, now: datetime, lifetimes: Lifetimes) -> Iterator[Finding]:
        """Check everything: keys, index, thresholds, roots, expiry, `root.json`, and the set as a client sees it."""
        roots = self._repository.roots()
        index = keys.roles(self._folder)
        usable: dict[str, set[str]] = {}
        for role in keys.ROLES:
            usable[role] = set()
            for entry in index[role]:
                finding, works = self._examine_key(role, entry)
                yield finding
                if works:
                    usable[role].add(entry.keyid)
        yield from self._examine_index(index, roots)
        yield from self._examine_requests()
        for role in keys.ROLES:
            yield _examine_threshold(role, roots[-1], {entry.keyid for entry in index[role]}, usable[role])
        yield from _examine_expiry(self._repository.expiries(), now, lifetimes)
        yield self._examine_root_file(roots)
        yield _examine_as_client(self._repository)

    def _examine_key(self, role: str, entry: KeyEntry) -> tuple[Finding, bool]:
        """Sign something with it, and verify that with the public key."""
        name = f"key {role} {entry.keyid[:SHOWN]}"
        if not keys.is_here(self._folder, entry):
            return Finding(name, Health.OK, f"{entry.uri} is not here"), False
        unusable: tuple[type[Exception], ...] = (OSError, *keys.token_errors())
        try:
            signer = keys.load(self._folder, role, entry, self._secret)
            entry.public_key.verify_signature(signer.sign(b"a trial"), b"a trial")
        except EdgeswapError as error:
            remedy = "Check passphrase_file, and the file against your copy."
            return Finding(name, Health.FAILED, str(error), remedy), False
        except unusable as error:
            if keys.file_of(self._folder, entry) is None:
                detail = f"{entry.uri} does not sign here: {error or type(error).__name__}"
                return Finding(name, Health.WARNING, detail, "Plug the token in, if it is to be used here."), False
            remedy = "Put the file back from your copy."
            return Finding(name, Health.FAILED, f"{entry.uri}: {error}", remedy), False
        return Finding(name, Health.OK, f"{entry.uri} is here and fits its public key"), True

    def _examine_index(self, index: keys.Index, roots: list[Root]) -> Iterator[Finding]:
        """The root names the listed keys and no others, but for a change that is under way or was interrupted."""
        agrees = True
        waiting = [request.root.signed for _, request in self._repository.waiting() if request.root is not None]
        for role in keys.ROLES:
            listed, named = [entry.keyid for entry in index[role]], roots[-1].roles[role].keyids
            for keyid in named:
                if keyid not in listed:
                    agrees = False
                    yield Finding(
                        f"key {role} {keyid[:SHOWN]}",
                        Health.FAILED,
                        "the root names it, and keys.json does not list it",
                        f"Put keys.json back from your copy, or replace the key: "
                        f"trainer-host keys rotate {role} --key {keyid[:SHOWN]}",
                    )
            for keyid in listed:
                if keyid in named:
                    continue
                agrees = False
                name, drop = f"key {role} {keyid[:SHOWN]}", f"trainer-host keys remove {role} {keyid[:SHOWN]}"
                if any(keyid in root.roles[role].keyids for root in waiting):
                    yield Finding(name, Health.OK, "it signs once the request that waits is accepted")
                elif any(keyid in root.roles[role].keyids for root in roots):
                    detail = "the root has dropped it: a change of keys was interrupted at its end"
                    yield Finding(name, Health.WARNING, detail, f"Put it aside: {drop}")
                else:
                    detail = "no root names it: a change of keys was interrupted, or its request is lost"
                    yield Finding(name, Health.WARNING, detail, f"Make that change again, and put this aside: {drop}")
        if agrees:
            yield Finding("index", Health.OK, "the root names the keys of keys.json and no others")

    def _examine_requests(self) -> Iterator[Finding]:
        for path, request in self._repository.waiting():
            said = "; ".join(map(str, request.shortfalls()))
            remedy = f"Sign it where the keys are, and accept it: trainer-host accept {path}"
            yield Finding(f"request {path.name}", Health.WARNING, said or "every signature is there", remedy)

    def _examine_root_file(self, roots: list[Root]) -> Finding:
        """What new devices are given is the newest root."""
        path, newest = self._root_file, f"root version {roots[-1].version}"
        remedy = (
            f"Write it there, and do not give devices an older one: trainer-host keys init writes {path.name} again."
        )
        try:
            if path.read_bytes() == self._repository.root():
                return Finding(path.name, Health.OK, f"new devices are given {newest}, the newest")
        except OSError as error:
            return Finding(path.name, Health.FAILED, f"cannot read {path}: {error.strerror}", remedy)
        return Finding(path.name, Health.FAILED, f"{path} is not {newest}, the newest", remedy)

    def _change(self, change: Callable[[Root], None], now: datetime) -> None:
        self._repository.change_root(change, now)
        self._tell(f"The root is now version {self._repository.roots()[-1].version}.")
        self.settle()

    def _open_keys(self) -> None:
        """See that the keys here open, before one is made: else a wrong passphrase would be noticed too late.

        Raises:
            Misconfigured: One does not.
        """
        ring = keys.Keyring(self._folder, self._secret)
        for role in keys.ROLES:
            ring[role]

    def _named(self, role: str, keyid: str) -> str:
        return _single(_matches(self._repository.next_root(), role, keyid), role, keyid)

    def _tell_retired(self, role: str, keyid: str, path: Path | None) -> None:
        where = f"its private key is now {path}" if path else "its private key is not in a file here"
        self._tell(f"The {role} key {keyid[:SHOWN]} signs no more; {where}.")


def open_repository(settings: Settings) -> Repository:
    """The repository, be there one or not, with the keys that are here.

    Raises:
        Misconfigured: The passphrase cannot be read.
        Unavailable: The disk failed.
    """
    return Repository(
        settings.repository_dir,
        keys.Keyring(Path(settings.keys_dir), settings.passphrase()),
        lifetimes=settings.lifetimes,
        kept_versions=settings.kept_versions,
    )


def open_custody(settings: Settings, tell: Callable[[str], None]) -> Custody:
    """The keys of a host; raises as `open_repository`."""
    return Custody(Path(settings.keys_dir), open_repository(settings), settings.root_file, settings.passphrase(), tell)


def _known(role: str) -> None:
    if role not in keys.ROLES:
        raise Misconfigured(f"{role} is no role; there are {', '.join(keys.ROLES)}")


def _matches(root: Root, role: str, keyid: str) -> list[str]:
    return [named for named in root.roles[role].keyids if named.startswith(keyid)]


def _single(found: list[str], role: str, keyid: str) -> str:
    if len(found) != 1:
        raise Misconfigured(f"{len(found)} keys of {role} begin with {keyid}: see `trainer-host keys list`")
    return found[0]


def _as_it_is(_: Targets) -> None:
    """No change."""


def _here(folder: Path, entry: KeyEntry | None) -> str:
    if entry is None:
        return "no"
    if entry.uri.partition(":")[0] in keys.LOCAL_SCHEMES:
        return "yes" if keys.is_here(folder, entry) else "no"
    return "where it is plugged in"


def _examine_threshold(role: str, root: Root, listed: set[str], usable: set[str]) -> Finding:
    """A role can be signed: here, or with keys that are known."""
    name, named = f"threshold {role}", root.roles[role]
    here = len(usable.intersection(named.keyids))
    detail = f"{named.threshold} of {len(named.keyids)} keys must sign, and {here} can here"
    if here >= named.threshold:
        return Finding(name, Health.OK, detail)
    if role in keys.ONLINE_ROLES:
        return Finding(name, Health.FAILED, detail, "Put the key back from your copy, or replace it: docs/keys.md")
    if len(listed.intersection(named.keyids)) < named.threshold:
        return Finding(name, Health.FAILED, f"{detail}; of the others too few are known", "See docs/keys.md.")
    return Finding(name, Health.OK, f"{detail}; what they sign waits for `trainer-host sign`")


def _examine_expiry(expiries: dict[str, datetime], now: datetime, lifetimes: Lifetimes) -> Iterator[Finding]:
    for role, expires in expiries.items():
        offline = role in keys.OFFLINE_ROLES
        remedy = f"trainer-host keys renew {role}" if offline else "Run the host: it signs this again by itself."
        detail = f"signed until {expires:%Y-%m-%d %H:%M} UTC"
        if expires - now <= timedelta(0):
            yield Finding(f"expiry {role}", Health.FAILED, f"{detail}, which is over", remedy)
        elif expires - now < lifetimes.of(role) * WARNING_SHARE:
            yield Finding(f"expiry {role}", Health.WARNING, detail, remedy)
        else:
            yield Finding(f"expiry {role}", Health.OK, detail)


class _SetFetcher(FetcherInterface):
    """Serves a metadata set to python-tuf's client."""

    def __init__(self, metadata_set: MetadataSet) -> None:
        versions = {role: Metadata.from_bytes(getattr(metadata_set, role)).signed.version for role in _AFTER_ROOT}
        self._files = {f"{number}.root.json": root for number, root in enumerate(metadata_set.roots, 1)}
        self._files["timestamp.json"] = metadata_set.timestamp
        self._files[f"{versions['snapshot']}.snapshot.json"] = metadata_set.snapshot
        self._files[f"{versions['targets']}.targets.json"] = metadata_set.targets

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.rpartition("/")[2]
        if name not in self._files:
            raise DownloadHTTPError(f"{name} is not in the set", 404)
        return iter((self._files[name],))


_AFTER_ROOT = ("snapshot", "targets")


def _examine_as_client(repository: Repository) -> Finding:
    """Go the way of a device that knows the first root only (TUF specification section 5), by the system's clock."""
    metadata_set = msgspec.msgpack.decode(repository.metadata_set(), type=MetadataSet)
    config = UpdaterConfig(
        max_root_rotations=MAX_ROOTS,
        root_max_length=MAX_PAYLOAD_BYTES,
        timestamp_max_length=MAX_PAYLOAD_BYTES,
        snapshot_max_length=MAX_PAYLOAD_BYTES,
        targets_max_length=MAX_PAYLOAD_BYTES,
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            fetcher = _SetFetcher(metadata_set)
            Updater(folder, "set", fetcher=fetcher, config=config, bootstrap=metadata_set.roots[0]).refresh()
        except (RepositoryError, SecureSystemsError, DownloadHTTPError) as error:
            remedy = "Devices refuse this set. Put the repository back from your copy, and see docs/keys.md."
            return Finding("client", Health.FAILED, f"a device refuses the set: {error}", remedy)
    detail = f"a device that knows root 1 follows to root {len(metadata_set.roots)} and accepts the set"
    return Finding("client", Health.OK, detail)
