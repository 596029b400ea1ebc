"""Everything of ours that takes bytes which somebody else chose, each as a function of those bytes.

A target says which errors it may raise; anything else that leaves it is a bug, and so is a failed assertion in it. The
same table is used by the tests, with some hundred examples each, and by `python -m tests.fuzz`, for as long as one
likes.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct
from securesystemslib.formats import encode_canonical
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp  # type: ignore[attr-defined]

from edge_agent import deployment
from edge_agent.battles import BattleBook, Served
from edge_agent.fetching import keep
from edge_agent.model_store import ModelStore
from edge_agent.outbox import Outbox
from edge_agent.releases import Releases
from edge_agent.runtime import load
from edge_agent.serving import Policy, Responder
from edge_agent.settings import Settings as AgentSettings
from edge_agent.state import SLOT_BYTES, Record
from edge_agent.streaming import Streaming
from edge_agent.transfer import Transfer, bitmap
from edge_agent.trust import Trust, decoded_set
from edge_agent.trusted_time import TrustedTime
from protocol import codec, wishes
from protocol.bundle import Bundle, bundled
from protocol.codec import Decoder
from protocol.configuration import load as load_settings
from protocol.durable import OS_DISK
from protocol.errors import EdgeswapError, Misconfigured, Rejected
from protocol.features import Feature, FeatureSpec, Group, compile_spec
from protocol.messages import (
    Ack,
    ChunkRequest,
    Decision,
    Event,
    MetadataSet,
    ModelRef,
    Observation,
    Problem,
    SlotCounters,
    SlotStatus,
    Status,
    Telemetry,
    Transition,
    TransitionBatch,
    Verdict,
)
from protocol.release import Golden, Lineage, Release, chunked, from_target, manifest_digests, manifest_of, to_custom
from trainer_host import flatbuffer, keys
from trainer_host.chunks import ChunkServer
from trainer_host.database import Database
from trainer_host.fleet import Fleet, details, table
from trainer_host.ingest import Ingest
from trainer_host.repository import identity_of
from trainer_host.settings import Settings as HostSettings
from trainer_host.signing import SigningRequest
from trainer_host.store import Store

Attempt = Callable[[bytes], object]

ROOT = Path(__file__).parents[2]
MODEL = (ROOT / "tests" / "models" / "echo.tflite").read_bytes()
NOW = datetime.now(UTC).replace(microsecond=0)
AT = 1.7e9
# What a list of this many observations is answered with still fits; the rest is refused as a whole.
MAX_ANSWER_BYTES = 1024 * 1024


class Target(NamedTuple):
    """One function to try.

    Attributes:
        prepare: Given an empty folder of its own, makes the function.
        seeds: Good inputs, to be spoilt.
        raises: What it may raise.
    """

    prepare: Callable[[Path], Attempt]
    seeds: Callable[[], Sequence[bytes]]
    raises: tuple[type[Exception], ...] = ()


# Good messages.

DIGEST = hashlib.sha256(MODEL).hexdigest()
SPEC = FeatureSpec(
    groups=(Group(path="units", maximum=2, features=(Feature(path="health", divide_by="most", clip=(0.0, 1.0)),)),),
    features=(Feature(path="self.mana", scale=0.1, offset=1.0), Feature(path="round", default=0.5), Feature(path="a"),
              Feature(path="b")),
)  # fmt: skip
STATE = {"units": [{"health": 3, "most": 9}], "self": {"mana": 1.5}, "round": 7, "a": [1, 2], "b": True}
VERDICT = Verdict(
    outcome="commit", pairs=9, slower=1, passed=8, evidence=0.1, acceptance=200.0, ratio_median=1.0, old_us_p50=1.0,
    old_us_p99=2.0, new_us_p50=1.0, new_us_p99=2.0, tail_up={2: 1}, tail_down={2: 0},
)  # fmt: skip
TRANSITION = Transition(
    1, "combat", "b1", "hero", 3, bytes(24), 1, False, 1.0, b"\1\0\1\1", 0.5, bytes(24), False, False, DIGEST, 1, AT
)  # fmt: skip
RELEASE = Release(
    slot="combat",
    version=1,
    **identity_of(MODEL),
    inputs=load(MODEL).inputs,
    outputs=load(MODEL).outputs,
    actions=("a", "b", "c", "d"),
    features=SPEC,
    golden=Golden(inputs=((1.0, 2.0, 3.0, 4.0, 5.0, 6.0),), outputs=((1.0, 2.0, 3.0, 4.0),), tolerance=1e-4),
    operators={"FULLY_CONNECTED": 1},
    latency_budget_ms=5.0,
    lineage=Lineage(recipe="combat", settings={"hidden": [64]}, metrics={"loss": 0.5}),
)
WISHES = (
    wishes.Pin(slot="combat", version=3, devices=("pi-1",), at=AT),
    wishes.Withdrawal(slot="combat", version=2, groups=("lab",), note="slow"),
)
REF = ModelRef(digest=DIGEST, version=1)
STATUS = Status(
    at=AT,
    agent_version="0.1.0",
    runtime="any",
    slots={"combat": SlotStatus(phase="watch", ready=True, active=REF, candidate=REF, verdict=VERDICT)},
)
TELEMETRY = Telemetry(
    at=AT,
    uptime_s=9.0,
    temperatures_c={"cpu": 50.0},
    throttled=["now"],
    slots={"combat": SlotCounters(answered=3, errors={"malformed": 1}, latency_us_histogram={64: 3})},
)
BATCH = TransitionBatch(epoch="e1", acked=0, first=1, last=2, transitions=[TRANSITION])
EXAMPLES: dict[str, Struct] = {
    "Observation": Observation(battle="b1", step=3, actor="hero", state=STATE, legal=[True] * 4, reward=0.5, id=7),
    "Problem": Problem(code="malformed", text="no"),
    "Decision": Decision(battle="b1", step=3, action=1, scores=[0.1, 0.9], model=DIGEST, version=1),
    "Transition": TRANSITION,
    "TransitionBatch": BATCH,
    "Ack": Ack(epoch="e1", seq=7),
    "Telemetry": TELEMETRY,
    "Verdict": VERDICT,
    "Status": STATUS,
    "Event": Event(at=AT, kind="committed", slot="combat", model=DIGEST, version=1, verdict=VERDICT),
    "ChunkRequest": ChunkRequest(device="pi-1", model=DIGEST, wanted=b"\1"),
    "MetadataSet": MetadataSet(roots=[b"{}"], timestamp=b"{}", snapshot=b"{}", targets=b"{}"),
}


def both(message: Any) -> list[bytes]:
    """A message in both encodings."""
    return [codec.encode(message, as_json=True), codec.encode(message, as_json=False)]


def seeds_of(*names: str) -> Callable[[], Sequence[bytes]]:
    return lambda: [data for name in names for data in both(EXAMPLES[name])]


# What the game sends.


def asked() -> list[bytes]:
    ready = Observation(battle="b1", step=1, features=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], taken=2)
    alone = [*both(EXAMPLES["Observation"]), *both(ready), b'{"battle": "b", "step": 1, "features": [NaN, 1, 2]}']
    return [*alone, *both([EXAMPLES["Observation"], ready, Observation(battle="b1", step=2, done=True)])]


def answering(_folder: Path) -> Attempt:
    responder = Responder("combat", Policy(load(MODEL), SPEC, DIGEST, 1))
    nobody = Responder("combat", None)
    answers: Decoder[Decision | list[Decision]] = Decoder(Decision | list[Decision])
    problem = Problem(code="overloaded", text="too much")
    book = BattleBook()

    def attempt(data: bytes) -> None:
        served: list[Served] = []
        for encoded, decisions, records in (
            responder.answer(data, AT),
            (*responder.refuse(data, problem), []),
            nobody.answer(data, AT),
        ):
            said = answers.decode(encoded)
            assert (said if isinstance(said, list) else [said]) == decisions
            assert len(encoded) <= MAX_ANSWER_BYTES, f"{len(data)} bytes are answered with {len(encoded)}"
            served += records
        for record in served:
            book.add(msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=Served), 0.0)
        codec.compress(book.collect(1e6))

    return attempt


class _Encoding(Struct):
    spec: FeatureSpec
    state: dict[str, Any]


def encoding(_folder: Path) -> Attempt:
    decoder: Decoder[_Encoding] = Decoder(_Encoding)

    def attempt(data: bytes) -> None:
        question = decoder.decode(data)
        vector = compile_spec(question.spec)(question.state)
        assert len(vector) == question.spec.length
        assert all(type(number) is float for number in vector)

    return attempt


# What the host sends.


def canonical(said: dict[str, Any]) -> bytes:
    text = encode_canonical(said)
    assert text is not None, "no function to write to is given"
    return text.encode()


class Signer:
    """A host with all the keys, that signs whatever it is given."""

    def __init__(self, folder: Path) -> None:
        keys.init(folder, None)
        self._signers = {role: keys.load_signer(folder, role) for role in keys.ROLES}
        root = Root(expires=NOW + timedelta(days=99), consistent_snapshot=True)
        for role, signer in self._signers.items():
            root.add_key(signer.public_key, role)
        self.root = self.signed(root.to_dict(), "root")

    def signed(self, said: dict[str, Any], role: str) -> bytes:
        signature = self._signers[role].sign(canonical(said))
        return json.dumps({"signed": said, "signatures": [signature.to_dict()]}).encode()

    def set_of(self, said: dict[str, Any], role: str) -> MetadataSet:
        """A set in which one role says this, and the others fit."""
        expires = NOW + timedelta(days=99)
        version = said.get("version") if role in ("targets", "snapshot") else None
        named = MetaFile(version if type(version) is int and version > 0 else 1)
        contents: dict[str, dict[str, Any]] = {
            "targets": good_targets().to_dict(),
            "snapshot": Snapshot(expires=expires, meta={"targets.json": named}).to_dict(),
            "timestamp": Timestamp(expires=expires, snapshot_meta=MetaFile(1)).to_dict(),
        }
        if role == "snapshot":
            contents["timestamp"] = Timestamp(expires=expires, snapshot_meta=named).to_dict()
        roots = [self.root]
        if role == "root":
            roots.append(self.signed(said, role))
        else:
            contents[role] = said
        return MetadataSet(roots=roots, **{name: self.signed(content, name) for name, content in contents.items()})


def good_targets() -> Targets:
    targets = Targets(expires=NOW + timedelta(days=99))
    described = {"length": RELEASE.length, "hashes": {"sha256": DIGEST}, "custom": to_custom(RELEASE)}
    document = targets.to_dict()
    document["targets"][RELEASE.target] = described
    document[wishes.FIELD] = wishes.to_field(WISHES)
    return Targets.from_dict(document)


def good_set() -> list[bytes]:
    root = Root(expires=NOW + timedelta(days=99)).to_dict()
    signature = [{"keyid": "k", "sig": "00"}]
    documents = {
        "timestamp": Timestamp(expires=NOW + timedelta(days=99)).to_dict(),
        "snapshot": Snapshot(expires=NOW + timedelta(days=99)).to_dict(),
        "targets": good_targets().to_dict(),
    }
    encoded = {role: json.dumps({"signed": said, "signatures": signature}).encode() for role, said in documents.items()}
    return both(MetadataSet(roots=[json.dumps({"signed": root, "signatures": signature}).encode()], **encoded))


def verifying(folder: Path) -> Attempt:
    """A whole set as it comes from the broker: nobody but the host can sign, so the documents' own are not kept."""
    signer = Signer(folder / "keys")

    def attempt(data: bytes) -> None:
        offered = decoded_set(data)
        Trust(folder / "trust", signer.root).verify(offered, NOW)

    return attempt


def altered(role: str) -> Callable[[Path], Attempt]:
    """A set in which one document was altered after it was signed."""

    def prepare(folder: Path) -> Attempt:
        signer = Signer(folder / "keys")
        good = signer.set_of(good_targets().to_dict(), "targets")
        folders = iter(range(2**62))

        def attempt(data: bytes) -> None:
            offered = (
                msgspec.structs.replace(good, roots=[*good.roots, data])
                if role == "root"
                else msgspec.structs.replace(good, **{role: data})
            )
            Trust(folder / f"trust-{next(folders) % 3}", signer.root).verify(offered, NOW)

        return attempt

    return prepare


def signed(role: str) -> Callable[[Path], Attempt]:
    """A set that is signed with the right keys, by somebody who says in one document what he likes."""

    def prepare(folder: Path) -> Attempt:
        signer = Signer(folder / "keys")
        count = iter(range(2**62))

        def attempt(data: bytes) -> None:
            try:
                said = json.loads(data)
                offered = signer.set_of(said, role)
            except Exception:  # noqa: BLE001  # what cannot be signed at all is no attack
                return
            trust = folder / f"trust-{next(count)}"
            try:
                verified = Trust(trust, signer.root).verify(offered, NOW)
                for release in verified.releases:
                    compile_spec(release.features)
                wishes.desired(verified.wishes, "combat", "pi-1", ("lab",))
            finally:
                _remove(trust)

        return attempt

    return prepare


def signed_seeds(role: str) -> Callable[[], Sequence[bytes]]:
    expires = NOW + timedelta(days=99)
    said = {
        "root": Root(version=2, expires=expires),
        "targets": good_targets(),
        "snapshot": Snapshot(expires=expires, meta={"targets.json": MetaFile(1)}),
        "timestamp": Timestamp(expires=expires, snapshot_meta=MetaFile(1)),
    }[role]
    return lambda: [json.dumps(said.to_dict()).encode()]


def documents(role: str) -> Callable[[], Sequence[bytes]]:
    signature = {"keyid": "0" * 64, "sig": "00" * 64}
    return lambda: [
        json.dumps({"signed": json.loads(seed), "signatures": [signature]}).encode() for seed in signed_seeds(role)()
    ]


def releasing(_folder: Path) -> Attempt:
    def attempt(data: bytes) -> None:
        release = from_target(
            RELEASE.target, RELEASE.length, DIGEST, {"release": data.decode("utf-8", "surrogateescape")}
        )
        assert release.target == RELEASE.target
        msgspec.msgpack.encode(release)

    return attempt


def wishing(_folder: Path) -> Attempt:
    def attempt(data: bytes) -> None:
        found = wishes.from_field(data.decode("utf-8", "surrogateescape"))
        wishes.desired(found, "combat", "pi-1", ("lab",))
        assert wishes.from_field(wishes.to_field(found)) == found

    return attempt


def fetching(folder: Path) -> Attempt:
    """Chunks: each line of the input is one, under its own name or under that of another."""
    store = ModelStore(folder)
    wanted = chunked(MODEL)
    names = [hashlib.sha256(chunk).hexdigest() for chunk in wanted]

    def attempt(data: bytes) -> None:
        transfer = Transfer(names, [len(chunk) for chunk in wanted], (), random.Random(1))
        for index, piece in enumerate(data.split(b"\n")):
            transfer.ask(float(index))
            transfer.audible()
            name = names[0] if index % 2 else hashlib.sha256(piece).hexdigest()
            keep(store, transfer, name, piece)
            assert 0 <= transfer.bytes_here <= transfer.bytes_total

    return attempt


def bundles() -> list[bytes]:
    pieces = [manifest_of(chunked(MODEL)), *chunked(MODEL)]
    return [b"".join(bundled(b"set", pieces)), b"".join(bundled(b"", []))]


def opening(folder: Path) -> Attempt:
    digests = [hashlib.sha256(piece).hexdigest() for piece in (manifest_of(chunked(MODEL)), *chunked(MODEL))]

    def attempt(data: bytes) -> None:
        (folder / "bundle").write_bytes(data)
        with Bundle(folder / "bundle") as bundle:
            for digest in digests:
                if digest in bundle:
                    bundle.chunk(digest)
            bundle.metadata_set()

    return attempt


def acknowledging(folder: Path) -> Attempt:
    streaming = Streaming("pi-1", BattleBook(), Outbox(folder / "outbox.db"))
    epoch = streaming.outbox.epoch.encode()
    return lambda data: streaming.acknowledged(data.replace(b"EPOCH", epoch))


# What devices send.


class Models:
    """The chunk server's source, in memory."""

    def manifest(self, digest: str) -> bytes:
        return manifest_of(chunked(self._model(digest)))

    def chunk(self, digest: str, index: int) -> bytes:
        return chunked(self._model(digest))[index]

    def _model(self, digest: str) -> bytes:
        if digest != DIGEST:
            raise Rejected("unknown_model", "no such model")
        return MODEL


def chunk_requests() -> list[bytes]:
    wanted = ChunkRequest(device="pi-1", model=DIGEST, wanted=bitmap([0], 1))
    return [*both(wanted), *both(ChunkRequest(device="pi-1", model=DIGEST))]


def requesting(_folder: Path) -> Attempt:
    decoder: Decoder[ChunkRequest] = Decoder(ChunkRequest)

    def attempt(data: bytes) -> None:
        server = ChunkServer(Models())
        server.requested(decoder.decode(data), 0.0)
        while server.next(1.0) is not None:
            server.published()

    return attempt


def ingesting(*, packed: bool) -> Callable[[Path], Attempt]:
    def prepare(folder: Path) -> Attempt:
        ingest = Ingest(Store(Database(f"sqlite:///{folder / 'host.db'}")))

        def attempt(data: bytes) -> None:
            ingest.receive("pi-1", data if packed else codec.compress(msgspec.Raw(data)))
            ingest.commit(AT)

        return attempt

    return prepare


def reporting(what: str) -> Callable[[Path], Attempt]:
    def prepare(folder: Path) -> Attempt:
        store = Store(Database(f"sqlite:///{folder / 'host.db'}"))
        fleet = Fleet(store)

        def attempt(data: bytes) -> None:
            fleet.receive(f"fleet/v1/pi-1/{what}", data, AT)
            fleet.commit()
            known = store.devices()
            json.dumps([table(known, AT), details(known)], default=repr)

        return attempt

    return prepare


# What people, and our own disks, hand us.


def configured(settings: type[Any], name: str) -> Target:
    def prepare(folder: Path) -> Attempt:
        def attempt(data: bytes) -> None:
            (folder / name).write_bytes(data)
            load_settings(folder / name, settings)

        return attempt

    return Target(prepare, lambda: [(ROOT / "examples" / name).read_bytes()], (Misconfigured,))


def unlocking(folder: Path) -> Attempt:
    keys.init(folder, None)

    def attempt(data: bytes) -> None:
        (folder / keys.INDEX).write_bytes(data.replace(b"hsm:", b"file2:"))  # no token is asked for
        keys.load_signers(folder)

    return attempt


def key_indices() -> list[bytes]:
    public = {"keytype": "ed25519", "scheme": "ed25519", "keyval": {"public": "00" * 32}}
    return [
        json.dumps(
            {role: [{"uri": f"file2:{role}.pem", "keyid": "k", "public": public}] for role in keys.ROLES}
        ).encode()
    ]


def signing_requests() -> list[bytes]:
    root: Metadata[Root] = Metadata(Root(version=2, expires=NOW))
    return [SigningRequest(root, root, Metadata(good_targets())).to_bytes()]


def remembering(folder: Path) -> Attempt:
    """A slot's state, from a file that somebody damaged, by the file's own checksum or with a good one."""

    def attempt(data: bytes) -> None:
        (folder / "slot.0").write_bytes(data)
        (folder / "slot.1").unlink(missing_ok=True)
        Record(folder / "slot", SLOT_BYTES, OS_DISK)
        deployment.decode(data)

    return attempt


def states() -> list[bytes]:
    refused = (deployment.Refusal(digest=DIGEST, version=2, reason="slower"),)
    staging = deployment.Staging(active=REF, refused=refused, newest=1, candidate=REF)
    return [deployment.encode(state) for state in (deployment.Serving(), staging)]


def recalling(folder: Path) -> Attempt:
    releases = Releases(folder)
    path = folder / f"combat-{REF.version}-{REF.digest[:16]}.json"

    def attempt(data: bytes) -> None:
        for content in (data, hashlib.sha256(data).hexdigest().encode() + b"\n" + data):
            path.write_bytes(content)
            releases.collect([("combat", REF)])
            Releases(folder).get("combat", REF)

    return attempt


def times() -> list[bytes]:
    return [b"1700000000\n" + hashlib.sha256(b"1700000000\n").hexdigest().encode()]


def telling_time(folder: Path) -> Attempt:
    def attempt(data: bytes) -> None:
        (folder / "trusted-time").write_bytes(data)
        trusted = TrustedTime(folder / "trusted-time")
        assert trusted.now(time.time()) >= NOW

    return attempt


def codec_target(message: type[Struct]) -> Target:
    decoder: Decoder[Any] = Decoder(message)

    def attempt(data: bytes) -> None:
        found = decoder.decode(data)
        if message is not Observation:  # a game's state may hold any number, and is encoded by its features only
            for encoded in both(found):
                decoder.decode(encoded)

    return Target(lambda _folder: attempt, seeds_of(message.__name__), (Rejected,))


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    if folder.exists():
        folder.rmdir()


TARGETS: dict[str, Target] = {
    **{f"codec.{name}": codec_target(type(example)) for name, example in EXAMPLES.items()},
    "codec.decompress": Target(lambda _: codec.decompress, lambda: [codec.compress(BATCH)], (Rejected,)),
    "features": Target(encoding, lambda: both(_Encoding(SPEC, STATE)), (Rejected,)),
    "release.from_target": Target(releasing, lambda: [to_custom(RELEASE)["release"].encode()], (Rejected,)),
    "release.manifest_digests": Target(lambda _: manifest_digests, lambda: [manifest_of([MODEL])], (Rejected,)),
    "wishes.from_field": Target(wishing, lambda: [wishes.to_field(WISHES).encode()], (Rejected,)),
    "trust.set": Target(verifying, good_set, (Rejected,)),
    **{f"trust.altered_{role}": Target(altered(role), documents(role), (Rejected,)) for role in keys.ROLES},
    **{f"trust.signed_{role}": Target(signed(role), signed_seeds(role), (Rejected,)) for role in keys.ROLES},
    "transfer": Target(fetching, lambda: [b"\n".join([b"a", MODEL, b"b"])], (Rejected,)),
    "bundle": Target(opening, bundles, (Rejected,)),
    "serving": Target(answering, asked),
    "streaming.acknowledged": Target(acknowledging, lambda: both(Ack(epoch="EPOCH", seq=0))),
    "chunks.requested": Target(requesting, chunk_requests, (Rejected,)),
    "ingest": Target(ingesting(packed=True), lambda: [codec.compress(BATCH)]),
    "ingest.unpacked": Target(ingesting(packed=False), lambda: [msgspec.msgpack.encode(BATCH)]),
    "fleet.availability": Target(reporting("availability"), lambda: [b"online", b"offline"]),
    "fleet.status": Target(reporting("status"), seeds_of("Status")),
    "fleet.telemetry": Target(reporting("telemetry"), seeds_of("Telemetry")),
    "fleet.events": Target(reporting("events"), seeds_of("Event")),
    "signing.request": Target(lambda _: SigningRequest.from_bytes, signing_requests, (Rejected,)),
    "configuration.agent": configured(AgentSettings, "edge-agent.toml"),
    "configuration.host": configured(HostSettings, "trainer-host.toml"),
    "keys": Target(unlocking, key_indices, (EdgeswapError,)),
    "state": Target(remembering, states, (Misconfigured,)),
    "releases": Target(recalling, lambda: [msgspec.json.encode(RELEASE)]),
    "trusted_time": Target(telling_time, times),
    "flatbuffer": Target(lambda _: flatbuffer.read, lambda: [MODEL], (Rejected,)),
}  # fmt: skip
