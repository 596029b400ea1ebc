"""What docs/keys.md says, done: each block of commands is run, with real files and real devices' trust.

Devices are `edge_agent.trust.Trust` on the host's metadata set, as it would arrive in one message: one that is there
all the time, one that was away since the beginning, and one that is new.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.metadata import Metadata, Root, Snapshot, Timestamp  # type: ignore[attr-defined]

from edge_agent.trust import Trust, Verified, decoded_set
from protocol.errors import Rejected
from protocol.features import FeatureSpec
from protocol.messages import MetadataSet
from protocol.release import Golden, Release, Tensor
from trainer_host import keys
from trainer_host.keys import Keyring
from trainer_host.private_broker import PrivateBroker
from trainer_host.repository import Repository, identity_of
from trainer_host.signing import SignaturesMissing

DOCUMENT = Path(__file__).parents[2] / "docs" / "keys.md"
PROGRAM = f'exec {shlex.quote(sys.executable)} -m trainer_host "$@"\n'
LIBRARIES = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/opt/homebrew/lib/softhsm/libsofthsm2.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
)


def documented() -> dict[str, str]:
    """Each section's commands."""
    sections = re.split(r"^## ", DOCUMENT.read_text("utf-8"), flags=re.MULTILINE)[1:]
    blocks = {
        text.partition("\n")[0]: re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL) for text in sections
    }
    return {title: "\n".join(found) for title, found in blocks.items() if found}


class Host:
    """A host with four keys and one release, as `trainer-host keys init` makes it.

    Args:
        folder: Where it is.
        broker: Where `accept` publishes.
        state: Its state folder, to copy; without one, it is made.
    """

    def __init__(self, folder: Path, broker: PrivateBroker, state: Path | None = None) -> None:
        self.folder = folder
        self.state, self.stick = folder / "state", folder / "stick"
        self.keys = self.state / "keys"
        self.pi = folder / "pi"
        for path in (folder / "bin", self.stick, self.pi):
            path.mkdir(exist_ok=True)
        self.configuration = folder / "trainer-host.toml"
        self.configuration.write_text(f'state_dir = "state"\nbroker.port = {broker.port}\n')
        program = folder / "bin" / "trainer-host"
        program.write_text(f"#!/bin/sh\n{PROGRAM}")
        program.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        if state is None:
            self.run("trainer-host keys init")
            self.release(1)
        else:
            shutil.copytree(state, self.state)
        self.first_root = (self.state / "root.json").read_bytes()
        self.first_index = keys.roles(self.keys)
        self.devices = {
            "there": Trust(folder / "there", self.first_root),
            "away": Trust(folder / "away", self.first_root),
        }
        for device in self.devices.values():
            assert self.versions(device) == [1]

    @property
    def repository(self) -> Repository:
        return Repository(self.state / "repository", Keyring(self.keys))

    def run(self, script: str, **words: str) -> str:
        """Run commands of the documentation, here instead of there. What they print."""
        places = {"/var/lib/trainer-host": self.state, "/media/stick": self.stick, "/etc/edge-agent": self.pi}
        for there, here in places.items():
            script = script.replace(there, shlex.quote(str(here)))
        for word, meaning in words.items():
            script = script.replace(word, meaning)
        ended = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", script],
            input="y\n" * 9,
            capture_output=True,
            text=True,
            timeout=100,
            cwd=self.folder,
            env=self.environment,
            check=False,
        )
        assert ended.returncode == 0, f"{script}\n{ended.stdout}\n{ended.stderr}"
        return ended.stdout

    def section(self, title: str, **words: str) -> str:
        return self.run(documented()[title], **words)

    def release(self, version: int) -> None:
        model = b"model %d" % version
        self.repository.release(
            Release(
                slot="combat",
                version=version,
                **identity_of(model),
                inputs=(Tensor(name="in", shape=(1, 1), dtype="float32"),),
                outputs=(Tensor(name="out", shape=(1, 1), dtype="float32"),),
                actions=("wait",),
                features=FeatureSpec(),
                golden=Golden(inputs=((0.0,),), outputs=((0.0,),), tolerance=1e-5),
            ),
            model,
            datetime.now(UTC),
        )

    def published(self) -> MetadataSet:
        return decoded_set(self.repository.metadata_set())

    def verified(self, device: Trust, metadata_set: MetadataSet | None = None) -> Verified:
        return device.verify(metadata_set or self.published(), datetime.now(UTC))

    def versions(self, device: Trust) -> list[int]:
        return [release.version for release in self.verified(device).releases]

    def named(self, role: str) -> list[str]:
        return Metadata[Root].from_bytes(self.repository.root()).signed.roles[role].keyids

    def key_file(self, role: str) -> Path:
        path = keys.file_of(self.keys, keys.roles(self.keys)[role][-1])
        assert path is not None
        return path

    def everybody_accepts(self, *versions: int) -> None:
        """The device that was there, the one that was away, and a new one that has but the first root."""
        new = Trust(self.folder / f"new{len(list(self.folder.iterdir()))}", self.first_root)
        for device in (*self.devices.values(), new):
            assert self.versions(device) == list(versions)
            assert self.verified(device).versions.root == len(self.published().roots)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateBroker]:
    with PrivateBroker(tmp_path_factory.mktemp("broker")) as started:
        yield started


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, broker: PrivateBroker) -> Host:
    return Host(tmp_path_factory.mktemp("made"), broker)


@pytest.fixture
def host(tmp_path: Path, broker: PrivateBroker, made: Host) -> Host:
    return Host(tmp_path, broker, made.state)


def test_everyday(host: Host) -> None:
    said = host.section("What there is")
    for entries in host.first_index.values():
        assert entries[0].keyid[:16] in said


def test_a_release_without_the_offline_keys(host: Host) -> None:
    host.section("Take root and targets offline")
    with pytest.raises(SignaturesMissing):
        host.release(2)
    said = host.section("Sign elsewhere")
    assert "release combat 2" in said
    host.everybody_accepts(1, 2)
    assert host.repository.waiting() == []


def test_renewal(host: Host) -> None:
    before = host.repository.expiries()
    host.section("Renew before it expires")
    assert host.published().roots[1:]
    after = host.repository.expiries()
    assert after["root"] >= before["root"]
    assert Metadata.from_bytes(host.published().targets).signed.version == 3
    host.everybody_accepts(1)


def test_two_people_for_one_signature(host: Host) -> None:
    host.section("Two people for one signature")
    alice, bob = keys.roles(host.keys)["root"]
    for name, entry in {"alice": alice, "bob": bob}.items():
        (host.stick / name).mkdir()
        path = keys.file_of(host.keys, entry)
        assert path is not None
        shutil.copy(host.keys / "keys.json", host.stick / name)
        path.rename(host.stick / name / path.name)
    host.everybody_accepts(1)
    request = "/var/lib/trainer-host/repository/requests/root-4.json"
    host.run("trainer-host keys rotate snapshot || true")
    host.run(f"cp {request} /media/stick/a.json; trainer-host sign /media/stick/a.json --keys /media/stick/alice")
    host.run("trainer-host accept /media/stick/a.json || true")
    assert len(host.published().roots) == 3
    host.run(f"trainer-host sign {request} --keys /media/stick/bob; trainer-host accept {request}")
    assert len(host.published().roots) == 4
    host.run("trainer-host keys verify")
    host.everybody_accepts(1)


def test_a_key_for_ci(host: Host) -> None:
    host.environment["EDGESWAP_TARGETS_KEY"] = CryptoSigner.generate_ed25519().private_bytes.decode()
    host.section("A key for CI")
    (host.keys / "targets.pem").unlink()  # the one in the variable is enough
    host.run("trainer-host keys renew targets; trainer-host keys verify")
    host.everybody_accepts(1)
    del host.environment["EDGESWAP_TARGETS_KEY"]
    host.run("trainer-host keys renew targets || test $? = 2")
    assert len(host.repository.waiting()) == 1


@pytest.mark.parametrize("role", ["timestamp", "snapshot"])
def test_a_lost_online_key(host: Host, role: str) -> None:
    host.key_file(role).unlink()
    section = documented()["A timestamp or snapshot key is lost"]
    host.run(section.replace("timestamp", role))
    host.release(2)
    host.everybody_accepts(1, 2)


def test_a_lost_targets_key(host: Host) -> None:
    host.key_file("targets").unlink()
    with pytest.raises(SignaturesMissing):
        host.release(2)
    host.section("A targets key is lost")
    host.release(3)
    host.everybody_accepts(1, 2, 3)  # what waited for the lost key is signed by the new one


def test_a_lost_root_key_of_several(host: Host) -> None:
    host.section("Two people for one signature")
    host.run("trainer-host keys add root")
    lost = keys.roles(host.keys)["root"][1]
    path = keys.file_of(host.keys, lost)
    assert path is not None
    path.unlink()
    host.section("A root key is lost", KEYID=lost.keyid[:12])
    assert lost.keyid not in host.named("root")
    assert len(host.named("root")) == 3
    host.everybody_accepts(1)


def test_the_last_root_key_is_lost(host: Host) -> None:
    host.key_file("root").unlink()
    host.section("The last root key is lost")
    host.release(7)
    with pytest.raises(Rejected):
        host.verified(host.devices["there"])
    shutil.rmtree(host.folder / "there")
    again = Trust(host.folder / "there", (host.state / "root.json").read_bytes())
    assert host.versions(again) == [7]
    assert (host.state / "keys-before" / "targets.pem").exists()


def thief_s_set(host: Host, *, timestamp: int, snapshot: int, signers: Keyring) -> MetadataSet:
    """What a thief makes of the published set with copies of the snapshot and timestamp keys."""
    published = host.published()
    stolen_snapshot = Metadata[Snapshot].from_bytes(published.snapshot)
    stolen_snapshot.signed.version = snapshot
    stolen_snapshot.sign(signers["snapshot"][0])
    data = stolen_snapshot.to_bytes()
    stolen_timestamp = Metadata[Timestamp].from_bytes(published.timestamp)
    stolen_timestamp.signed.version = timestamp
    stolen_timestamp.signed.snapshot_meta.version = snapshot
    stolen_timestamp.signed.snapshot_meta.length = stolen_timestamp.signed.snapshot_meta.hashes = None
    stolen_timestamp.sign(signers["timestamp"][0])
    return msgspec.structs.replace(published, snapshot=data, timestamp=stolen_timestamp.to_bytes())


def test_stolen_online_keys(host: Host) -> None:
    loot = host.folder / "loot"
    shutil.copytree(host.keys, loot)
    victim = host.devices["there"]
    host.verified(victim, thief_s_set(host, timestamp=10**6, snapshot=10**6, signers=Keyring(loot)))
    host.release(2)
    with pytest.raises(Rejected) as caught:
        host.verified(victim)
    assert caught.value.code == "rolled_back"
    host.section("A timestamp or snapshot key is stolen")
    host.everybody_accepts(1, 2)
    with pytest.raises(Rejected) as caught:
        host.verified(victim, thief_s_set(host, timestamp=10**7, snapshot=10**7, signers=Keyring(loot)))
    assert caught.value.code == "bad_signature"


def test_a_stolen_targets_key(host: Host) -> None:
    """All three were on the host: the thief's release is believed, until the keys are replaced."""
    for name in ("keys", "repository"):
        shutil.copytree(host.state / name, host.folder / "loot" / name)
    theirs = Host.__new__(Host)
    theirs.state = host.folder / "loot"
    theirs.keys = theirs.state / "keys"
    for version in (2, 3):
        theirs.release(version)
    victim = host.devices["there"]
    assert host.versions(victim) == [1]
    assert [it.version for it in host.verified(victim, theirs.published()).releases] == [1, 2, 3]
    host.section("A targets key is stolen")
    host.release(4)
    host.everybody_accepts(1, 4)
    with pytest.raises(Rejected):
        host.verified(victim, theirs.published())
    forged = msgspec.structs.replace(theirs.published(), roots=host.published().roots)
    with pytest.raises(Rejected) as caught:
        host.verified(victim, forged)
    assert caught.value.code == "bad_signature"


def test_a_stolen_root_key(host: Host) -> None:
    """All four keys were in one place, so the thief has a host of his own."""
    loot = Host.__new__(Host)
    loot.state = host.folder / "loot"
    loot.keys = loot.state / "keys"
    for name in ("keys", "repository"):
        shutil.copytree(host.state / name, loot.state / name)
    loot.repository.change_root(lambda _: None, datetime.now(UTC))
    loot.release(666)
    host.section("A root key is stolen")
    host.everybody_accepts(1)
    mine = CryptoSigner.generate_ed25519()
    theirs: Metadata[Root] = Metadata.from_bytes(host.repository.root())
    theirs.signed.version += 1
    theirs.signed.add_key(mine.public_key, "targets")
    for signer in Keyring(loot.keys)["root"]:
        theirs.sign(signer)
    forged = msgspec.structs.replace(host.published(), roots=[*host.published().roots, theirs.to_bytes()])
    with pytest.raises(Rejected) as caught:
        host.verified(host.devices["there"], forged)
    assert caught.value.code == "bad_root"
    host.everybody_accepts(1)
    # Who knows but the first root believes whom he meets first, and then only him.
    for name in ("deceived", "deceived for long"):
        deceived = Trust(host.folder / name, host.first_root)
        assert [it.version for it in host.verified(deceived, loot.published()).releases] == [1, 666]
        with pytest.raises(Rejected):
            host.verified(deceived)
    # With the new root he follows his owner again, and nobody follows the thief.
    given = (host.pi / "root.json").read_bytes()
    assert given == host.repository.root() != host.first_root
    host.run("trainer-host keys rotate targets; trainer-host keys rotate snapshot; trainer-host keys rotate timestamp")
    newest = (host.state / "root.json").read_bytes()
    assert newest == host.repository.root() != given
    for name, root in {"deceived": given, "there": given, "away": newest, "deceived for long": newest}.items():
        device = Trust(host.folder / name, root)
        assert host.versions(device) == [1]
        with pytest.raises(Rejected):
            host.verified(device, loot.published())
    for name, root in {"unpacked today": given, "unpacked tomorrow": newest}.items():
        device = Trust(host.folder / name, root)
        with pytest.raises(Rejected):
            host.verified(device, msgspec.structs.replace(loot.published(), roots=host.published().roots))
        assert host.versions(device) == [1]


def test_the_host_is_stolen(host: Host) -> None:
    """The copy is older than what devices have seen."""
    shutil.copytree(host.state, host.folder / "copy")
    host.release(2)
    host.release(3)
    assert host.versions(host.devices["there"]) == [1, 2, 3]
    host.state.rename(host.folder / "stolen")
    (host.folder / "copy").rename(host.state)
    with pytest.raises(Rejected) as caught:
        host.verified(host.devices["there"])
    assert caught.value.code == "rolled_back"
    host.section("The host is stolen or broken into")
    host.release(4)
    host.everybody_accepts(1, 4)


def test_a_device_many_roots_behind(host: Host) -> None:
    for _ in range(12):
        for role in keys.ROLES:
            host.repository.change_root(lambda _: None, datetime.now(UTC))
            assert role in keys.ROLES
    assert len(host.published().roots) == 49
    host.everybody_accepts(1)


def test_every_section_is_tried() -> None:
    """A block of commands that no test runs is found here."""
    source = Path(__file__).read_text("utf-8")
    assert [
        title
        for title in documented()
        if f'section("{title}"' not in source and f'documented()["{title}"]' not in source
    ] == []


# A token: SoftHSM stands for a YubiKey.


@pytest.fixture(scope="session")
def softhsm() -> str:
    """The path of SoftHSM's library. Debian's package is installed where that can be done."""
    pytest.importorskip("pkcs11", reason="needs securesystemslib[hsm]")
    if shutil.which("softhsm2-util") is None:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            pytest.skip("needs softhsm2-util, and only root on a Debian can install it")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "--yes", "--no-install-recommends", "softhsm2"]):
            done = subprocess.run(["apt-get", "-qq", *command], env=environment, check=False, capture_output=True)
            if done.returncode:
                pytest.skip(f"softhsm2 cannot be installed: {done.stderr.decode()[-200:]}")
    for library in (*LIBRARIES, *map(str, Path("/usr/lib").glob("*/softhsm/libsofthsm2.so"))):
        if Path(library).exists():
            return library
    pytest.skip("softhsm2 is installed, and its library is not where it is looked for")


MAKE_KEY = """
import os, pkcs11
from pkcs11 import Attribute, KeyType
from pkcs11.util.ec import encode_named_curve_parameters
token = pkcs11.lib(os.environ["PYKCS11LIB"]).get_token(token_label="safe")
with token.open(user_pin="1234", rw=True) as session:
    parameters = session.create_domain_parameters(
        KeyType.EC, {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}, local=True
    )
    parameters.generate_keypair(id=b"\\x02", label="targets", store=True)
"""


@pytest.fixture
def token(host: Host, softhsm: str) -> Callable[[], None]:
    """A token of the label `safe` with a P-256 key of id 2; call it to pull it out."""
    tokens = host.folder / "tokens"
    tokens.mkdir()
    configuration = host.folder / "softhsm2.conf"
    configuration.write_text(f"directories.tokendir = {tokens}\nobjectstore.backend = file\n")
    host.environment.update(SOFTHSM2_CONF=str(configuration), PYKCS11LIB=softhsm)
    host.run("softhsm2-util --init-token --free --label safe --so-pin 5678 --pin 1234")
    host.run(f"{shlex.quote(sys.executable)} -c {shlex.quote(MAKE_KEY)}")
    (host.folder / "pin").write_text("1234\n")
    host.configuration.write_text(f'passphrase_file = "pin"\n{host.configuration.read_text()}')
    return lambda: shutil.rmtree(tokens)


def test_a_key_on_a_token(host: Host, token: Callable[[], None]) -> None:
    first = host.first_index["targets"][0].keyid
    host.section("A key on a token", KEYID=first[:12])
    (entry,) = keys.roles(host.keys)["targets"]
    assert host.named("targets") == [entry.keyid]
    assert (entry.uri, entry.public["keytype"]) == ("hsm:2?label=safe", "ecdsa")
    assert f"{entry.uri} is here and fits its public key" in host.run("COLUMNS=250 trainer-host keys verify")
    host.everybody_accepts(1)
    host.run("trainer-host keys renew targets")
    assert Metadata.from_bytes(host.published().targets).signatures.keys() == {entry.keyid}
    host.everybody_accepts(1)
    token()
    host.run("trainer-host keys renew targets || test $? = 2")
    assert len(host.repository.waiting()) == 1
    assert f"{entry.uri} does not sign here" in host.run("COLUMNS=250 trainer-host keys verify")


def test_a_token_signs_elsewhere(host: Host, token: Callable[[], None]) -> None:
    """The library and the PIN are where the token is; the host has neither."""
    host.section("A key on a token", KEYID=host.first_index["targets"][0].keyid[:12])
    host.run("cp /var/lib/trainer-host/keys/keys.json /media/stick/")
    with_token = dict(host.environment)
    for name in ("PYKCS11LIB", "SOFTHSM2_CONF"):
        del host.environment[name]
    host.run("trainer-host keys renew targets || test $? = 2")
    ((file, _),) = host.repository.waiting()
    host.environment = with_token
    sign = f"trainer-host sign {shlex.quote(str(file))} --keys /media/stick --passphrase-file pin"
    assert "Signed targets version" in host.run(sign)
    for name in ("PYKCS11LIB", "SOFTHSM2_CONF"):
        del host.environment[name]
    host.run(f"trainer-host accept {shlex.quote(str(file))}")
    host.everybody_accepts(1)


# The running host.


def test_a_running_host_signs_with_the_keys_of_the_day(host: Host) -> None:
    """Its repository was opened before the keys were changed."""
    running = host.repository
    host.run("trainer-host keys rotate timestamp; trainer-host keys rotate targets")
    running.refresh(datetime.now(UTC) + timedelta(minutes=1))
    assert Metadata.from_bytes(host.published().timestamp).signatures.keys() == set(host.named("timestamp"))
    host.everybody_accepts(1)
