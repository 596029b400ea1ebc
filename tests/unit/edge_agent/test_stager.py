from __future__ import annotations

import base64
import hashlib
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.metadata import (  # type: ignore[attr-defined]
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from edge_agent import stager
from edge_agent.channel import Channel
from edge_agent.model_store import ModelStore
from edge_agent.stager import Stager
from edge_agent.staging import (
    FromStager,
    MetadataVerified,
    Postponed,
    Qualifying,
    Quit,
    Refused,
    Staged,
    StageModel,
    StagerSettings,
    ToStager,
)
from protocol.bundle import bundled
from protocol.codec import MAX_PAYLOAD_BYTES, encode
from protocol.errors import Misconfigured, Rejected, Unavailable
from protocol.features import Feature, FeatureSpec
from protocol.link import Broker
from protocol.lock import only_daemon
from protocol.messages import MetadataSet
from protocol.release import Golden, Release, Tensor, chunked, manifest_of, to_custom

# One FULLY_CONNECTED operator: scores = [[1, 2, 3], [-1, 0, 1]] features + [0.5, -0.5].
MODEL = zlib.decompress(
    base64.b85decode(
        "c-mc3!AiqG5FL}!rWk64AVoa%;K750w&KN$LO~QNi1cC))<9AX#8ld}c<j*+@F;$T-U_{zet=&f2;#vnFuvK0p=9Y}cHh34*?EmY"
        "MD63&-urJHTiEATh%8{L5$QM=fN$Ufm;%qh6A-Z$xQgSL<26vGWEoTfazMguD>kpVyyWpRsX`VMCKwavw@Rn|dD)qBUrltZZ`h5x"
        "T_ajZFRod)_nAu94&MJI_eMe;0<&!2in^Nc-4TAkWJbaTsBsUh;dItIy{I<(;n*8Qo@)~<Axr5>>8rVJN%$@Czy)rl*PY{soUxp1"
        "srQ?-D!JmBVaomo{aLRI{_{17x<ry5bKn6uS^7U%QkHtmRrwzLI^wxAi2TU!ho0MXg5aRGRGZ^VCSRBM2%h(j>!#X8Mytu3ui*K+"
        "fqlcMTUWf6&a<KXBXKZU1+dAemek-LyXyTpHNz$_^af);yy?1L&lv?#x92(0Xy6Tbh^#+l^?k9=iBs%vG3inK1K%QMGX"
    )
)


def release_of(model: bytes, version: int) -> Release:
    return Release(
        slot="combat",
        version=version,
        digest=hashlib.sha256(model).hexdigest(),
        length=len(model),
        manifest=hashlib.sha256(manifest_of(chunked(model))).hexdigest(),
        inputs=(Tensor(name="serving_default_features:0", shape=(1, 3), dtype="float32"),),
        outputs=(Tensor(name="PartitionedCall:0", shape=(1, 2), dtype="float32"),),
        actions=("hit", "run"),
        features=FeatureSpec(features=tuple(Feature(path=name) for name in "abc")),
        golden=Golden(inputs=((1.0, 1.0, 1.0),), outputs=((6.5, -0.5),), tolerance=1e-5),
    )


GOOD = release_of(MODEL, 1)
BROKEN = release_of(b"no model", 2)
# Its manifest leads to other bytes of the same length.
MISLED = msgspec.structs.replace(release_of(b"promised", 3), manifest=release_of(b"supplied", 3).manifest)
RELEASES = (GOOD, BROKEN, MISLED)


def signed_set() -> MetadataSet:
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    signer = CryptoSigner.generate_ed25519()

    def signed(what: Any) -> bytes:
        envelope = Metadata(what)
        envelope.sign(signer)
        return bytes(envelope.to_bytes())

    root = Root(expires=expires, consistent_snapshot=True)
    for role in ("root", "timestamp", "snapshot", "targets"):
        root.add_key(signer.public_key, role)
    targets = signed(
        Targets(
            expires=expires,
            targets={
                one.target: TargetFile(one.length, {"sha256": one.digest}, one.target, {"custom": to_custom(one)})
                for one in RELEASES
            },
        )
    )
    snapshot = signed(Snapshot(expires=expires, meta={"targets.json": MetaFile.from_data(1, targets, ["sha256"])}))
    timestamp = signed(Timestamp(expires=expires, snapshot_meta=MetaFile.from_data(1, snapshot, ["sha256"])))
    return MetadataSet(roots=[signed(root)], timestamp=timestamp, snapshot=snapshot, targets=targets)


@pytest.fixture
def settings(tmp_path: Path) -> StagerSettings:
    metadata = signed_set()
    (tmp_path / "root.json").write_bytes(metadata.roots[0])
    (tmp_path / "metadata").write_bytes(encode(metadata, as_json=False))
    return StagerSettings(
        device="pi-1",
        folder=str(tmp_path / "store"),
        trust_folder=str(tmp_path / "trust"),
        root_file=str(tmp_path / "root.json"),
        metadata_file=str(tmp_path / "metadata"),
        built_at=0.0,
        broker=Broker(),
        reserve_bytes=0,
        idle_s=0.1,
    )


class Supervisor:
    """Our end of the channel; what the stager is to be told is said before it runs."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.channel: Channel[FromStager] = Channel(ours, FromStager)
        self.stagers: Channel[ToStager] = Channel(theirs, ToStager)

    def run(self, settings: StagerSettings, *told: ToStager) -> list[FromStager]:
        for message in told:
            assert self.channel.send(message)
        Stager(settings, self.stagers).run()
        return self.channel.receive()


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    made = Supervisor()
    yield made
    made.channel.close()
    made.stagers.close()


def test_reports_what_is_released_and_ends_when_there_is_nothing_to_do(
    settings: StagerSettings, supervisor: Supervisor
) -> None:
    (said,) = supervisor.run(settings, Quit())
    assert isinstance(said, MetadataVerified)
    assert (said.version, said.releases, said.wishes, said.refused) == (1, RELEASES, (), ())
    assert len(said.signed_by) == 1


def test_ends_when_no_task_comes(settings: StagerSettings, supervisor: Supervisor) -> None:
    started = time.monotonic()
    assert [type(message) for message in supervisor.run(settings)] == [MetadataVerified]
    assert time.monotonic() - started >= settings.idle_s


def test_ends_when_the_supervisor_has_gone(settings: StagerSettings, supervisor: Supervisor) -> None:
    supervisor.channel.close()
    Stager(msgspec.structs.replace(settings, idle_s=3600.0), supervisor.stagers).run()
    assert supervisor.stagers.closed


def test_a_model_that_is_here_already_needs_no_broker(settings: StagerSettings, supervisor: Supervisor) -> None:
    ModelStore(Path(settings.folder)).put(MODEL)
    assert supervisor.run(settings, StageModel(GOOD.digest))[1:] == [Qualifying(GOOD.digest), Staged(GOOD.digest)]


def test_a_model_that_does_not_qualify_is_refused(settings: StagerSettings, supervisor: Supervisor) -> None:
    ModelStore(Path(settings.folder)).put(b"no model")
    _, answer = supervisor.run(settings, StageModel(BROKEN.digest))[1:]
    assert isinstance(answer, Refused)
    assert (answer.digest, answer.reason) == (BROKEN.digest, "bad_model")


def test_a_file_that_rotted_is_no_bad_model(settings: StagerSettings) -> None:
    store = ModelStore(Path(settings.folder))
    store.put_chunk(MODEL)
    store.put_chunk(manifest_of([MODEL]))
    store.path(GOOD.digest).write_bytes(MODEL[:-1] + b"?")
    for expected in (Postponed, Staged):
        supervisor = Supervisor()
        *_, answer = supervisor.run(settings, StageModel(GOOD.digest))
        assert isinstance(answer, expected)
        assert answer.digest == GOOD.digest
        if isinstance(answer, Postponed):
            assert answer.reason == "disk"
            assert "does not have that digest" in answer.text
        supervisor.channel.close()
        supervisor.stagers.close()
    assert store.open(GOOD.digest) == MODEL


def test_a_manifest_that_leads_elsewhere_is_the_models_fault(settings: StagerSettings, supervisor: Supervisor) -> None:
    store = ModelStore(Path(settings.folder))
    store.put_chunk(b"supplied")
    store.put_chunk(manifest_of([b"supplied"]))
    (answer,) = supervisor.run(settings, StageModel(MISLED.digest))[1:]
    assert isinstance(answer, Refused)
    assert (answer.digest, answer.reason) == (MISLED.digest, "corrupt_model")


def test_a_model_that_no_release_names_is_refused(settings: StagerSettings, supervisor: Supervisor) -> None:
    stranger = ModelStore(Path(settings.folder)).put(b"stranger")
    (answer,) = supervisor.run(settings, StageModel(stranger))[1:]
    assert isinstance(answer, Refused)
    assert (answer.digest, answer.reason) == (stranger, "not_released")


def test_chunks_that_are_all_here_are_joined(settings: StagerSettings, supervisor: Supervisor) -> None:
    store = ModelStore(Path(settings.folder))
    store.put_chunk(MODEL)
    store.put_chunk(manifest_of([MODEL]))
    assert supervisor.run(settings, StageModel(GOOD.digest))[1:] == [Qualifying(GOOD.digest), Staged(GOOD.digest)]
    assert store.open(GOOD.digest) == MODEL


def test_without_room_a_model_is_postponed(settings: StagerSettings, supervisor: Supervisor) -> None:
    full = msgspec.structs.replace(settings, reserve_bytes=1 << 60)
    (answer,) = supervisor.run(full, StageModel(GOOD.digest))[1:]
    assert isinstance(answer, Postponed)
    assert (answer.digest, answer.reason) == (GOOD.digest, "no_space")
    assert f"needs {len(MODEL)} bytes" in answer.text


def test_what_a_killed_stager_left_half_written_is_removed(settings: StagerSettings, supervisor: Supervisor) -> None:
    store = ModelStore(Path(settings.folder))
    left = store.path(GOOD.digest).with_name(f".{GOOD.digest}.tflite.new")
    left.write_bytes(MODEL[:100])
    supervisor.run(settings, Quit())
    assert not left.exists()


def test_while_another_stager_lives_nothing_is_touched(
    settings: StagerSettings, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stager, "PREDECESSOR_S", 0.1)
    left = ModelStore(Path(settings.folder)).path(GOOD.digest).with_name(f".{GOOD.digest}.tflite.new")
    left.write_bytes(MODEL[:100])
    with only_daemon(Path(settings.folder), "stager"), pytest.raises(Unavailable, match="another stager"):
        supervisor.run(settings, Quit())
    assert left.exists()
    assert supervisor.channel.receive() == []
    assert not Path(settings.trust_folder).exists()


def test_a_bundle_needs_neither_broker_nor_metadata_file_and_leaves_the_set_it_had(
    settings: StagerSettings, supervisor: Supervisor, tmp_path: Path
) -> None:
    kept = Path(settings.metadata_file)
    payload = kept.read_bytes()
    kept.unlink()
    bundle = tmp_path / "bundle"
    bundle.write_bytes(b"".join(bundled(payload, [manifest_of([MODEL]), MODEL])))
    from_bundle = msgspec.structs.replace(settings, bundle=str(bundle))
    assert supervisor.run(from_bundle, StageModel(GOOD.digest))[-1] == Staged(GOOD.digest)
    postponed = supervisor.run(from_bundle, StageModel(BROKEN.digest))[-1]
    assert isinstance(postponed, Postponed)
    assert (postponed.digest, postponed.reason) == (BROKEN.digest, "incomplete_bundle")
    assert kept.read_bytes() == payload


def test_without_a_broker_a_model_is_postponed(settings: StagerSettings, supervisor: Supervisor) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = Broker(port=taken.getsockname()[1])
        alone = msgspec.structs.replace(settings, broker=nobody, timeout_s=0.1, attempts=2)
        (answer,) = supervisor.run(alone, StageModel(GOOD.digest))[1:]
    assert isinstance(answer, Postponed)
    assert (answer.digest, answer.reason) == (GOOD.digest, "no_broker")


def test_a_connection_that_may_not_be_made_is_said(settings: StagerSettings, supervisor: Supervisor) -> None:
    plain = msgspec.structs.replace(settings, broker=Broker(host="broker.example"))
    (answer,) = supervisor.run(plain, StageModel(GOOD.digest))[1:]
    assert isinstance(answer, Postponed)
    assert (answer.digest, answer.reason) == (GOOD.digest, "misconfigured")


def test_a_disk_that_fails_postpones(settings: StagerSettings, supervisor: Supervisor) -> None:
    store = ModelStore(Path(settings.folder))
    store.put_chunk(MODEL)
    store.put_chunk(manifest_of([MODEL]))
    store.path(GOOD.digest).mkdir()
    (answer,) = supervisor.run(settings, StageModel(GOOD.digest))[1:]
    assert isinstance(answer, Postponed)
    assert (answer.digest, answer.reason) == (GOOD.digest, "disk")


def test_metadata_that_is_not_verified_is_refused(settings: StagerSettings, supervisor: Supervisor) -> None:
    Path(settings.root_file).write_bytes(signed_set().roots[0])
    with pytest.raises(Rejected) as caught:
        supervisor.run(settings, Quit())
    assert caught.value.code == "bad_signature"


def test_metadata_that_is_too_long_is_refused_unread(settings: StagerSettings, supervisor: Supervisor) -> None:
    with Path(settings.metadata_file).open("ab") as file:
        file.truncate(MAX_PAYLOAD_BYTES + 1)
    with pytest.raises(Rejected) as caught:
        supervisor.run(settings, Quit())
    assert caught.value.code == "too_long"


def test_the_build_time_outranks_a_clock_that_is_behind(settings: StagerSettings, supervisor: Supervisor) -> None:
    later = msgspec.structs.replace(settings, built_at=time.time() + 3 * 86400)
    with pytest.raises(Rejected) as caught:
        supervisor.run(later, Quit())
    assert caught.value.code == "expired"


@pytest.mark.parametrize("field", ["root_file", "metadata_file"])
def test_files_that_cannot_be_read_are_named(settings: StagerSettings, supervisor: Supervisor, field: str) -> None:
    Path(getattr(settings, field)).unlink()
    with pytest.raises(Unavailable, match=Path(getattr(settings, field)).name):
        supervisor.run(settings, Quit())


def test_what_the_supervisor_imports_brings_neither_tuf_nor_numpy() -> None:
    heavy = ("tuf", "securesystemslib", "cryptography", "numpy", "ai_edge_litert", "tflite_runtime")
    program = f"import sys, edge_agent.staging; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_quit_behind_a_task_ends_it(settings: StagerSettings, supervisor: Supervisor) -> None:
    """The supervisor gives a task and dismisses the stager in one turn; it says so once."""
    ModelStore(Path(settings.folder)).put(MODEL)
    said = supervisor.run(settings, StageModel(GOOD.digest), Quit())
    assert [type(message) for message in said] == [MetadataVerified]


def test_a_store_that_cannot_be_made_is_said(settings: StagerSettings, supervisor: Supervisor) -> None:
    Path(settings.folder).write_text("")
    with pytest.raises(Misconfigured):
        supervisor.run(settings, Quit())
