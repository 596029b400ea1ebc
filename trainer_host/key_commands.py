"""`trainer-host keys …`, `sign` and `accept`: from the command line to `trainer_host.custody` and `signing`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from protocol import command_line
from protocol.command_line import DONE, REFUSED, JsonFlag
from trainer_host.options import ConfigFile, settings_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainer_host.custody import Custody
    from trainer_host.settings import Settings

Role = Annotated[str, Parameter(help="root, targets, snapshot or timestamp.")]
KeyId = Annotated[str, Parameter(help="The key's id, or how it begins; see `keys list`.")]
RequestFile = Annotated[Path, Parameter(help="The signing request.")]

keys_app = App(name="keys", help="The keys that sign releases.")


@keys_app.command
def init(*, config: ConfigFile = None) -> int:
    """Make the four roles' keys and an empty repository; done once. What was interrupted is finished."""
    from datetime import UTC, datetime  # noqa: PLC0415

    from protocol.errors import Misconfigured  # noqa: PLC0415
    from trainer_host import keys  # noqa: PLC0415
    from trainer_host.custody import open_repository  # noqa: PLC0415

    settings = settings_of(config)
    folder, passphrase = Path(settings.keys_dir), settings.passphrase()
    repository = open_repository(settings)
    root = settings.root_file
    if repository.exists:
        if root.exists() and root.read_bytes() == repository.root():
            raise Misconfigured(f"{settings.repository_dir} already holds a repository")
        repository.copy_root(root)  # the last command ended before this
        sys.stdout.write(f"Wrote the newest root of trust, which devices are provisioned with: {root}\n")
        return DONE
    if not (folder / keys.INDEX).exists():  # else the last attempt ended between the two
        keys.init(folder, passphrase)
    repository.create(datetime.now(UTC))
    repository.copy_root(root)
    encrypted = "encrypted" if passphrase else "not encrypted (set passphrase_file before, if they should be)"
    sys.stdout.write(
        f"Made the keys of four roles in {folder}, {encrypted}, and an empty repository in {settings.repository_dir}.\n"
        f"{keys.offline_advice(folder)}\n"
        f"Devices are provisioned with the root of trust: {root}\n"
    )
    return DONE


@keys_app.command(name="list")
def list_keys(*, config: ConfigFile = None, json: JsonFlag = False) -> int:
    """Show each role's keys, where their private halves are, and how many must sign."""
    rows = _custody(settings_of(config)).rows()
    command_line.show(rows, title="keys", as_json=json)
    return DONE


@keys_app.command
def verify(*, config: ConfigFile = None, json: JsonFlag = False) -> int:
    """Check keys, thresholds, roots, expiry, and the set as a device does. Exit code 1 if a check failed."""
    from datetime import UTC, datetime  # noqa: PLC0415

    from msgspec import to_builtins  # noqa: PLC0415

    settings = settings_of(config)
    findings = list(_custody(settings).examine(datetime.now(UTC), settings.lifetimes))
    command_line.show([to_builtins(finding) for finding in findings], title="keys", as_json=json)
    return REFUSED if any(finding.health is command_line.Health.FAILED for finding in findings) else DONE


@keys_app.command
def rotate(
    role: Role,
    *,
    key: Annotated[str | None, Parameter(help="Replace this key only; its id, or how that begins.")] = None,
    config: ConfigFile = None,
) -> int:
    """Replace a role's keys by new ones, made here. The old private keys are put aside."""
    from datetime import UTC, datetime  # noqa: PLC0415

    _custody(settings_of(config)).rotate(role, key, datetime.now(UTC))
    return DONE


@keys_app.command
def add(
    role: Role,
    *,
    uri: Annotated[
        str | None,
        Parameter(help="A key that is there already: file2:PATH, encrypted:PATH, env:NAME or hsm:ID?label=TOKEN."),
    ] = None,
    config: ConfigFile = None,
) -> int:
    """Let one more key sign for a role: a new one, or the one at a URI. The threshold stays."""
    from datetime import UTC, datetime  # noqa: PLC0415

    _custody(settings_of(config)).add(role, uri, datetime.now(UTC))
    return DONE


@keys_app.command
def remove(role: Role, key: KeyId, *, config: ConfigFile = None) -> int:
    """Let a key sign no more. Its private half is put aside."""
    from datetime import UTC, datetime  # noqa: PLC0415

    _custody(settings_of(config)).remove(role, key, datetime.now(UTC))
    return DONE


@keys_app.command
def threshold(
    role: Role,
    number: Annotated[int, Parameter(help="How many of the role's keys must sign.")],
    *,
    config: ConfigFile = None,
) -> int:
    """Say how many of a role's keys must sign."""
    from datetime import UTC, datetime  # noqa: PLC0415

    _custody(settings_of(config)).set_threshold(role, number, datetime.now(UTC))
    return DONE


@keys_app.command
def renew(role: Role, *, config: ConfigFile = None) -> int:
    """Sign root or targets metadata again as they are, before they expire."""
    from datetime import UTC, datetime  # noqa: PLC0415

    _custody(settings_of(config)).renew(role, datetime.now(UTC))
    return DONE


def sign(
    file: RequestFile,
    *,
    keys: Annotated[Path, Parameter(help="The folder with keys.json and the private keys that are to sign.")],
    yes: Annotated[bool, Parameter(negative="", help="Sign without asking.")] = False,
    passphrase_file: Annotated[
        Path | None, Parameter(help="Its first line opens the keys, or is the token's PIN; without it you are asked.")
    ] = None,
) -> int:
    """Add signatures to a signing request, on any machine. It shows what is signed, and asks before."""
    from protocol.durable import write_durably  # noqa: PLC0415
    from protocol.errors import Rejected  # noqa: PLC0415
    from trainer_host import signing  # noqa: PLC0415
    from trainer_host.keys import Keyring, read_secret, roles  # noqa: PLC0415

    request = signing.read(file)
    known = {entry.keyid for entries in roles(keys).values() for entry in entries}
    sys.stdout.write(request.describe(known))
    if not request.shortfalls():
        return DONE
    if not yes and not _confirmed():
        sys.stdout.write("Nothing was signed.\n")
        return REFUSED
    secret = read_secret(passphrase_file) if passphrase_file else _asked()
    signed, failed = request.sign(Keyring(keys, secret))
    if not signed:
        reasons = "; ".join(failed) or "it waits for others than those that are there"
        raise Rejected("no_key", f"no key in {keys} has signed {file}: {reasons}")
    write_durably(file, request.to_bytes())
    left = "; ".join(map(str, request.shortfalls()))
    sys.stdout.write("".join(f"Signed {what}.\n" for what in signed))
    sys.stdout.write("".join(f"{failure}\n" for failure in failed))
    sys.stdout.write(f"It still waits: {left}.\n" if left else f"Now, on the host: trainer-host accept {file.name}\n")
    return DONE


def accept(file: RequestFile, *, config: ConfigFile = None) -> int:
    """Check a signing request that came back, and publish what it holds."""
    from datetime import UTC, datetime  # noqa: PLC0415

    from protocol.errors import Unavailable  # noqa: PLC0415
    from trainer_host import signing  # noqa: PLC0415
    from trainer_host.custody import open_repository  # noqa: PLC0415
    from trainer_host.database import Database  # noqa: PLC0415
    from trainer_host.metadata_topic import publish_once  # noqa: PLC0415
    from trainer_host.registry import Registry  # noqa: PLC0415

    settings = settings_of(config)
    _custody(settings).accept(signing.read(file), datetime.now(UTC))
    repository, database = open_repository(settings), Database(settings.database)
    try:
        Registry(database).signed(repository.releases())
    finally:
        database.close()
    try:
        publish_once(settings.broker, settings.client_id, repository.metadata_set())
    except Unavailable as error:
        raise Unavailable(
            f"{error}. It is accepted all the same: a host that runs publishes it as soon as it reaches the broker, "
            "another at its start"
        ) from error
    return DONE


def _custody(settings: Settings) -> Custody:
    from trainer_host.custody import open_custody  # noqa: PLC0415

    return open_custody(settings, lambda text: print(text, flush=True))


def _confirmed() -> bool:
    from protocol.errors import Misconfigured  # noqa: PLC0415

    try:
        return input("Sign this? [y/N] ").strip().lower() in {"y", "yes"}
    except EOFError as error:
        raise Misconfigured("nobody is here to say yes: read what is above, and say --yes") from error


def _asked() -> Callable[[str], str]:
    """Asks for each kind of secret when it is needed, and once."""
    import functools  # noqa: PLC0415
    import getpass  # noqa: PLC0415

    @functools.cache
    def ask(what: str) -> str:
        return getpass.getpass(f"{what}: ")

    return ask
