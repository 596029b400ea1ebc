"""Signed models that are bad on purpose, each through the stager as the supervisor starts it.

However a model misbehaves, the end is a refusal with a reason that programs can rely on: the stager's own, or, where it
did not survive the model, the deployment machine's after its second death. The models lie in the store already; how
they get there is the matter of other tests.
"""

from __future__ import annotations

import random
import select
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from edge_agent import deployment, runtime
from edge_agent.children import CandidateFailed, Child, FromTrial, ModelFile, TrialAssignment, start
from edge_agent.deployment import ModelRefused, ModelStaged, StagerDied
from edge_agent.model_store import ModelStore
from edge_agent.staging import FromStager, MetadataVerified, Qualifying, Refused, Staged, StageModel, StagerSettings
from protocol.features import Feature, FeatureSpec, Group
from protocol.link import Broker
from protocol.messages import ModelRef
from protocol.release import Golden, Release, Tensor
from trainer_host import keys
from trainer_host.repository import Repository, identity_of

MODELS = Path(__file__).parents[1] / "models"
ECHO = (MODELS / "echo.tflite").read_bytes()
IS_LITERT = runtime.name() == "ai-edge-litert"
LIMIT_S = 60.0
MEMORY_BYTES = 256 * 1024 * 1024
# As many as fit one metadata set, with room to spare; tflite-runtime dies of most, and each time costs a process.
IN_ONE_SET = 40 if IS_LITERT else 12

GOOD = Release(
    slot="combat",
    version=1,
    **identity_of(ECHO),
    inputs=runtime.load(ECHO).inputs,
    outputs=runtime.load(ECHO).outputs,
    actions=("a", "b", "c", "d"),
    features=FeatureSpec(features=tuple(Feature(path=f"f{index}") for index in range(6))),
    golden=Golden(inputs=((1.0, 2.0, 3.0, 4.0, 5.0, 6.0),), outputs=((1.0, 2.0, 3.0, 4.0),), tolerance=1e-4),
)


class Device:
    """A device's stager, and a host that signs anything."""

    def __init__(self, folder: Path) -> None:
        keys.init(folder / "keys", None)
        self._repository = Repository(folder / "repository", keys.load_signers(folder / "keys"))
        self._repository.create(datetime.now(UTC))
        self._store = ModelStore(folder / "store")
        (folder / "root.json").write_bytes(self._repository.root())
        self._settings = StagerSettings(
            device="pi-1",
            folder=str(folder / "store"),
            trust_folder=str(folder / "trust"),
            root_file=str(folder / "root.json"),
            metadata_file=str(folder / "metadata"),
            built_at=0.0,
            broker=Broker(port=1),  # nothing is fetched
            reserve_bytes=0,
            memory_bytes=MEMORY_BYTES,
            qualify_seconds=20.0,
        )
        self._stager: Child[FromStager] | None = None

    def outcome(self, model: bytes, **changes: Any) -> deployment.Report:
        """What becomes of one model."""
        (report,) = self.outcomes([model], **changes)
        return report

    def outcomes(self, models: list[bytes], qualify_seconds: float = 20.0, **changes: Any) -> list[deployment.Report]:
        """What becomes of each model, whose release is `GOOD` but for these changes."""
        settings = replace(self._settings, qualify_seconds=qualify_seconds)
        releases = []
        for index, model in enumerate(models):
            released = replace(GOOD, slot=f"s{index}", **{**identity_of(model), **changes})
            self._repository.release(released, model, datetime.now(UTC))
            self._store.put(model)
            releases.append(released)
        Path(settings.metadata_file).write_bytes(self._repository.metadata_set())
        return [self._reported(settings, ModelRef(digest=release.digest, version=1)) for release in releases]

    def close(self) -> None:
        if self._stager is not None:
            self._stager.kill()

    def _reported(self, settings: StagerSettings, model: ModelRef) -> deployment.Report:
        """Have the deployment machine and the stager settle the fate of one model."""
        state: deployment.State = deployment.Staging(candidate=model)
        while True:
            step = deployment.step(state, self._event(settings, model.digest))
            state = step.state
            for action in step.actions:
                if isinstance(action, deployment.Report):
                    return action

    def _event(self, settings: StagerSettings, digest: str) -> ModelStaged | ModelRefused | StagerDied:
        if self._stager is None:
            self._stager = start("stager", settings, FromStager, "stager")
            said = self._heard(self._stager)
            assert isinstance(said, MetadataVerified), said
            assert said.refused == ()
        self._stager.channel.send(StageModel(digest))
        match self._heard(self._stager):
            case Staged():
                return ModelStaged(digest)
            case Refused(reason=reason, text=text):
                return ModelRefused(digest, reason, text)
            case None:
                ended, self._stager = self._stager, None
                ended.process.wait(LIMIT_S)
                ended.kill()
                return StagerDied(digest, ended.how_it_ended())
            case other:
                raise AssertionError(other)

    def _heard(self, child: Child[FromStager]) -> FromStager | None:
        """What the stager says next that settles something; `None` if it ends without a word."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline and not child.channel.closed:
            select.select([child.channel], [], [], 0.1)
            for message in child.channel.receive():
                if not isinstance(message, Qualifying):
                    return message
        assert child.channel.closed, "the stager neither answers nor ends"
        return None


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    made = Device(tmp_path)
    yield made
    made.close()


def model(name: str) -> bytes:
    return (MODELS / f"{name}.tflite").read_bytes()


def test_the_good_model_is_staged(device: Device) -> None:
    assert device.outcome(ECHO).kind == "staged"


# Mangled files.


def cut(random_: random.Random) -> bytes:
    return ECHO[: random_.randrange(len(ECHO))]


def with_flipped_bits(random_: random.Random) -> bytes:
    mangled = bytearray(ECHO)
    for _ in range(random_.choice((1, 2, 16))):
        mangled[random_.randrange(len(mangled))] ^= 1 << random_.randrange(8)
    return bytes(mangled)


def with_another_offset(random_: random.Random) -> bytes:
    """Offsets, vector lengths, vtables and sizes of a flatbuffer all are aligned words."""
    mangled = bytearray(ECHO)
    place = random_.randrange(0, len(mangled) - 3) & ~3
    word = random_.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, len(mangled), random_.getrandbits(32)))
    struct.pack_into("<I", mangled, place, word)
    return bytes(mangled)


def with_another_vtable_entry(random_: random.Random) -> bytes:
    mangled = bytearray(ECHO)
    place = random_.randrange(0, len(mangled) - 1) & ~1
    struct.pack_into("<H", mangled, place, random_.choice((0, 2, 4, 0x7FFF, 0xFFFF, random_.getrandbits(16))))
    return bytes(mangled)


# What a mangled model may be refused for. An accepted one answers its golden vectors: the damage did not matter.
FATES = {
    "staged", "bad_model", "wrong_signature", "golden_mismatch", "not_finite", "inference_failed",
    "unsupported_operators", "out_of_memory", "died_twice",
}  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mangle", [cut, with_flipped_bits, with_another_offset, with_another_vtable_entry])
def test_each_mangled_model_has_a_named_fate_and_the_next_one_is_looked_at(
    device: Device, mangle: Callable[[random.Random], bytes]
) -> None:
    variants = list({mangle(random.Random(seed)): None for seed in range(IN_ONE_SET)})
    reports = device.outcomes(variants)
    fates = Counter(report.reason or report.kind for report in reports)
    assert fates.keys() <= FATES, fates
    # It is the runtime that crashes: an exception of Python's would be a bug of ours.
    assert all("killed by SIG" in report.text for report in reports if report.reason == "died_twice"), reports
    assert all(report.text for report in reports if report.kind == "refused")
    assert fates.total() == len(variants)
    assert any(report.kind == "refused" for report in reports), "some of the damage matters"


# Models that are well-formed, and do harm.


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not enforce a limit of memory")
def test_a_model_that_plans_for_more_memory_than_there_may_be(device: Device) -> None:
    report = device.outcome(model("hungry"))
    assert (report.kind, report.reason) == ("refused", "out_of_memory")
    assert "4294967296 bytes" in report.text


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not enforce a limit of memory")
def test_a_model_that_takes_more_memory_while_it_runs(device: Device) -> None:
    report = device.outcome(model("greedy"))
    # tflite-runtime does not look at what the allocation returned, and crashes.
    assert (report.kind, report.reason) == ("refused", "out_of_memory" if IS_LITERT else "died_twice")
    assert ("4294967296 bytes" if IS_LITERT else "SIGSEGV") in report.text


def test_a_model_that_never_answers(device: Device) -> None:
    report = device.outcome(model("endless"), qualify_seconds=1.0)
    assert (report.kind, report.reason) == ("refused", "died_twice")
    assert "SIGALRM" in report.text


def test_a_model_that_gives_its_output_another_shape_while_it_runs(device: Device) -> None:
    report = device.outcome(
        model("shifty"),
        outputs=(Tensor(name="Identity", shape=(1, 1), dtype="float32"),),
        actions=("a",),
        golden=Golden(inputs=((1.0,) * 6,), outputs=((1.0,),), tolerance=9.0),
    )
    assert (report.kind, report.reason) == ("refused", "inference_failed")


TENSOR = GOOD.inputs[0]
INPUT, OUTPUT = GOOD.golden.inputs[0], GOOD.golden.outputs[0]


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("nan", {}, "not_finite"),
        ("nan", {"golden": Golden(inputs=(), outputs=(), tolerance=1.0)}, "not_finite"),
        ("narrow", {}, "wrong_signature"),
        ("echo", {"inputs": (replace(TENSOR, shape=(1, 7)),)}, "wrong_signature"),
        ("echo", {"inputs": (replace(TENSOR, dtype="int8"),)}, "wrong_signature"),
        ("echo", {"inputs": (TENSOR, TENSOR)}, "wrong_signature"),
        ("echo", {"outputs": ()}, "wrong_signature"),
        ("echo", {"actions": ("a", "b", "c")}, "wrong_signature"),
        ("echo", {"features": FeatureSpec()}, "wrong_signature"),
        (
            "echo",
            {"features": FeatureSpec(groups=(Group(path="u", maximum=4096, features=(Feature(path="h"),)),))},
            "wrong_signature",
        ),
        ("echo", {"golden": Golden(inputs=(INPUT,), outputs=((9.0,) * 4,), tolerance=1e-4)}, "golden_mismatch"),
        ("echo", {"golden": Golden(inputs=(INPUT,), outputs=(OUTPUT,), tolerance=-1.0)}, "golden_mismatch"),
        ("echo", {"golden": Golden(inputs=(INPUT, INPUT), outputs=(OUTPUT,), tolerance=1.0)}, "bad_release"),
        ("echo", {"golden": Golden(inputs=(INPUT,), outputs=(OUTPUT, OUTPUT), tolerance=1.0)}, "bad_release"),
        ("echo", {"golden": Golden(inputs=((1.0,),), outputs=(OUTPUT,), tolerance=1.0)}, "bad_release"),
        ("echo", {"golden": Golden(inputs=((1e308,) * 6,), outputs=(OUTPUT,), tolerance=1.0)}, "not_finite"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_what_its_release_says(
    device: Device, name: str, changes: dict[str, Any], reason: str
) -> None:
    report = device.outcome(model(name), **changes)
    assert (report.kind, report.reason) == ("refused", reason)
    assert report.text


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not enforce a limit of memory")
def test_a_trial_refuses_a_candidate_that_takes_too_much_memory(tmp_path: Path) -> None:
    def file(name: str) -> ModelFile:
        return ModelFile(
            digest=ModelStore(tmp_path).put(model(name)), version=1, folder=str(tmp_path), features=GOOD.features
        )

    assignment = TrialAssignment(
        old=file("echo"), new=file("hungry"), threads=1, seed=1, duty=0.5, interval_s=0.0, old_inputs=[bytes(24)],
        new_inputs=[bytes(24)], memory_bytes=MEMORY_BYTES,
    )  # fmt: skip
    child: Child[FromTrial] = start("trial", assignment, FromTrial, "trial")
    try:
        said: list[FromTrial] = []
        deadline = time.monotonic() + LIMIT_S
        while not said and time.monotonic() < deadline:
            select.select([child.channel], [], [], 0.1)
            said += child.channel.receive()
        (failed,) = said
        assert isinstance(failed, CandidateFailed)
        assert failed.reason == "out_of_memory"
    finally:
        child.kill()
