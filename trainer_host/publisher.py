"""From a model file to a signed release, by one path, whoever made the file: registry, gate, version, signature.

The gate runs in a child process (`trainer_host.jobs`). Nothing here speaks to the broker: whoever calls publishes the
repository's metadata set afterwards.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any

import msgspec
from msgspec import Struct

from protocol.errors import EdgeswapError, Misconfigured, Rejected, Unavailable
from protocol.features import FeatureSpec
from protocol.release import MAX_MODEL_BYTES, Lineage, Release
from trainer_host.gate import GateReport, GateSettings
from trainer_host.inbox import Description
from trainer_host.jobs import GateRequest, InspectionRequest, ModelFile, run_job
from trainer_host.progress import Report
from trainer_host.recipes.recipe import Recipe
from trainer_host.registry import Model, Registry
from trainer_host.repository import Repository, identity_of
from trainer_host.signing import SignaturesMissing

log = logging.getLogger(__name__)

VERSION_ATTEMPTS = 3
TRAINED, DELIVERED = "trained", "delivered"


class Candidate(Struct, frozen=True, kw_only=True):
    """A model that may become a release.

    Attributes:
        slot: Which it is for.
        file: The TFLite file, described.
        actions: Names, in the order of the output.
        features: How a state becomes the input vector.
        origin: `trained` or `delivered`.
        notes: For people.
        latency_budget_ms: Absolute bound of one inference.
        lineage: Where it comes from.
    """

    slot: str
    file: ModelFile
    actions: tuple[str, ...]
    features: FeatureSpec
    origin: str
    notes: str = ""
    latency_budget_ms: float | None = None
    lineage: Lineage = Lineage()


class Outcome(Struct, frozen=True, kw_only=True):
    """What became of a candidate.

    Attributes:
        slot: Which it was for.
        digest: Of the file.
        version: That it was released as, or `None` if it was refused.
        reasons: Sentences for people: why it was refused, or what the release rests on.
        report: The gate's, where it got that far.
    """

    slot: str
    digest: str
    version: int | None
    reasons: tuple[str, ...]
    report: GateReport | None = None

    @property
    def released(self) -> bool:
        """Whether there is a release."""
        return self.version is not None

    @property
    def text(self) -> str:
        """One line for people."""
        what = f"{self.slot} version {self.version} is released" if self.released else f"refused for {self.slot}"
        return f"{what}: {'; '.join(self.reasons)}"


class Jobs:
    """Makes a folder for each job, and removes the oldest of those that are not in use here.

    Args:
        folder: Where they lie.
        kept: How many stay.
        clock: Nanoseconds since the epoch.
    """

    def __init__(self, folder: Path, kept: int, *, clock: Callable[[], int] = time.time_ns) -> None:
        self._folder = folder
        self._kept = kept
        self._clock = clock
        self._in_use: set[Path] = set()

    @contextmanager
    def begin(self, what: str) -> Iterator[Path]:
        """Make a folder for a job; while the block lasts, it is not removed.

        Raises:
            Misconfigured: It cannot be made.
        """
        now = self._clock()
        seconds, fraction = divmod(now, 10**9)
        path = self._folder / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(seconds))}-{fraction:09d}-{what}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for old in self._removable(now):
                shutil.rmtree(old)
            path.mkdir()
        except OSError as error:
            raise Misconfigured(f"cannot make {path}: {error.strerror}") from error
        self._in_use.add(path)
        try:
            yield path
        finally:
            self._in_use.discard(path)

    def _removable(self, now: int) -> list[Path]:
        """All but the newest. A folder from the future dates from before the clock was set right: it goes first."""

        def age(path: Path) -> tuple[bool, int, str]:
            modified = path.stat().st_mtime_ns
            return modified <= now, modified, path.name

        idle = [path for path in self._folder.iterdir() if path.is_dir() and path not in self._in_use]
        return sorted(idle, key=age)[: -self._kept]


class Publisher:
    """Gates, signs and registers.

    Args:
        repository: With the signers of targets, snapshot and timestamp.
        registry: Where every candidate is entered.
        gate: What a model must show.
        jobs: Where jobs have their folders.
        recipes: By slot, what to take actions and features from before the slot's first release.
        report: Told what happens.
        clock: Seconds since the epoch.
        stop: Set by another thread to end a running job early.
    """

    def __init__(
        self,
        repository: Repository,
        registry: Registry,
        gate: GateSettings,
        jobs: Jobs,
        recipes: dict[str, Recipe],
        *,
        report: Report,
        clock: Callable[[], float] = time.time,
        stop: Event | None = None,
    ) -> None:
        self._repository = repository
        self._registry = registry
        self._gate = gate
        self._jobs = jobs
        self._recipes = recipes
        self._report = report
        self._clock = clock
        self._stop = stop

    def deliver(self, path: Path, description: Description) -> Outcome:
        """Take a file that was made elsewhere, from a person or the inbox.

        Args:
            path: The TFLite file; it is copied before it is looked at, so it may change or go meanwhile.
            description: What is said about it.

        Raises:
            Rejected: It is no usable model for the slot.
            Unavailable: Something outside failed; the same file may be delivered again.
            Misconfigured: A key or a folder is missing.
        """
        with self._jobs.begin(f"delivery-{description.slot}") as folder:
            return self.publish(self._delivered(path, description, folder))

    def _delivered(self, path: Path, description: Description, folder: Path) -> Candidate:
        copy = folder / "delivered.tflite"
        try:
            if path.stat().st_size > MAX_MODEL_BYTES:
                raise Rejected("too_large", f"{path.name} has more than {MAX_MODEL_BYTES} bytes")
            shutil.copyfile(path, copy)
        except OSError as error:
            raise Unavailable(f"cannot copy {path}: {error.strerror}") from error
        inspected = run_job(InspectionRequest(model=str(copy), output=str(folder)), stop=self._stop)
        actions, features = self._meaning(description)
        return Candidate(
            slot=description.slot,
            file=inspected.released,
            actions=actions,
            features=features,
            origin=DELIVERED,
            notes=description.notes,
            latency_budget_ms=description.latency_budget_ms,
            lineage=Lineage(settings={"file": description.name or path.stem}),
        )

    def publish(self, candidate: Candidate) -> Outcome:
        """Gate a candidate and release it, or say why not.

        Raises:
            Rejected: It does not fit its slot, or the gate could not run it.
            Unavailable: Something outside failed; the candidate may be tried again.
            SignaturesMissing: It passed, and its release waits for keys that are elsewhere.
            Misconfigured: A key or a folder is missing.
        """
        file = candidate.file
        number = self._registry.add(_entry(candidate, self._clock()))
        try:
            _check_shape(candidate)
            current = self.current(candidate.slot)
            if current is not None and current.digest == file.digest:
                self._registry.refused(number, "it is the current model")
                return Outcome(
                    slot=candidate.slot,
                    digest=file.digest,
                    version=current.version,
                    reasons=("it is the current model already",),
                )
            report = self._gated(candidate, current)
            entry = msgspec.to_builtins(report)
            if not report.passed:
                return self._refused(candidate, number, report)
            release = self._released(candidate)
        except Rejected as error:
            self._registry.refused(number, error.text)
            self._report("refused", slot=candidate.slot, model=file.digest, reasons=[error.text])
            raise
        except SignaturesMissing as error:
            self._registry.waiting(number, entry, f"waits for signatures: {error.file.name}")
            self._report("waiting", slot=candidate.slot, model=file.digest, request=str(error.file))
            raise
        except EdgeswapError as error:
            self._registry.failed(number, str(error))
            raise
        self._registry.released(number, release.version, entry)
        self._report(
            "released",
            slot=release.slot,
            version=release.version,
            model=release.digest,
            bytes=release.length,
            notes=release.notes,
        )
        log.info(
            "released %s version %d: %s",
            release.slot,
            release.version,
            "; ".join(report.reasons),
            extra={"SLOT": release.slot, "MODEL": release.digest},
        )
        return Outcome(
            slot=release.slot, digest=release.digest, version=release.version, reasons=report.reasons, report=report
        )

    def current(self, slot: str) -> Release | None:
        """The slot's newest release."""
        return max(
            (release for release in self._repository.releases() if release.slot == slot),
            key=lambda release: release.version,
            default=None,
        )

    def _meaning(self, description: Description) -> tuple[tuple[str, ...], FeatureSpec]:
        """What the model's outputs and inputs mean: as described, as in the current release, or as in the recipe."""
        known: Release | Recipe | None = self.current(description.slot) or self._recipes.get(description.slot)
        actions = description.actions or (known.actions if known else None)
        features = description.features or (known.features if known else None)
        if actions is None or features is None:
            raise Rejected(
                "unknown_slot",
                f"slot {description.slot} has no release and no recipe: the description must say actions and features",
                "slot",
            )
        return actions, features

    def _gated(self, candidate: Candidate, current: Release | None) -> GateReport:
        with self._jobs.begin(f"gate-{candidate.slot}") as folder:
            current_path = None
            if current is not None:
                current_path = folder / "current.tflite"
                try:
                    current_path.write_bytes(self._repository.model(current.digest))
                except OSError as error:
                    raise Unavailable(f"cannot write {current_path}: {error.strerror}") from error
            request = GateRequest(
                slot=candidate.slot,
                candidate=candidate.file.path,
                current=str(current_path) if current_path else None,
                settings=self._gate,
                parity=candidate.file.parity,
                output=str(folder),
            )
            report = run_job(request, stop=self._stop).report
        self._report("gate", slot=candidate.slot, model=candidate.file.digest, **_gate_figures(report))
        return report

    def _refused(self, candidate: Candidate, number: int, report: GateReport) -> Outcome:
        self._registry.refused(number, "; ".join(report.reasons), msgspec.to_builtins(report))
        self._report("refused", slot=candidate.slot, model=candidate.file.digest, reasons=list(report.reasons))
        log.warning("the gate refuses a model for %s: %s", candidate.slot, "; ".join(report.reasons))
        return Outcome(
            slot=candidate.slot, digest=candidate.file.digest, version=None, reasons=report.reasons, report=report
        )

    def _released(self, candidate: Candidate) -> Release:
        """Sign a release. Another process may take the version first; then the next one is tried."""
        path = Path(candidate.file.path)
        try:
            model = path.read_bytes()
        except OSError as error:
            raise Unavailable(f"cannot read {path}: {error.strerror}") from error
        if identity_of(model)["digest"] != candidate.file.digest:
            raise Rejected("wrong_model", f"{path.name} has changed since it was described", "digest")
        for attempt in range(1, VERSION_ATTEMPTS + 1):
            release = _release(candidate, model, self._repository.next_version(candidate.slot))
            try:
                self._repository.release(release, model, datetime.fromtimestamp(self._clock(), UTC))
            except Rejected as error:
                if error.code != "stale_version" or attempt == VERSION_ATTEMPTS:
                    raise
            else:
                return release
        raise AssertionError("the last attempt returns or raises")


def _release(candidate: Candidate, model: bytes, version: int) -> Release:
    return Release(
        slot=candidate.slot,
        version=version,
        **identity_of(model),
        inputs=candidate.file.inputs,
        outputs=candidate.file.outputs,
        actions=candidate.actions,
        features=candidate.features,
        golden=candidate.file.golden,
        operators=candidate.file.operators,
        latency_budget_ms=candidate.latency_budget_ms,
        notes=candidate.notes,
        lineage=candidate.lineage,
    )


def _entry(candidate: Candidate, now: float) -> Model:
    return Model(
        slot=candidate.slot,
        digest=candidate.file.digest,
        path=candidate.file.path,
        bytes=candidate.file.length,
        origin=candidate.origin,
        created_at=now,
        notes=candidate.notes,
        lineage=candidate.lineage,
    )


def _check_shape(candidate: Candidate) -> None:
    """The model must take the features and score the actions.

    Raises:
        Rejected: With code `wrong_shape`.
    """
    sides = (
        ("input", candidate.file.inputs, candidate.features.length, "features"),
        ("output", candidate.file.outputs, len(candidate.actions), "actions"),
    )
    for what, tensors, length, of in sides:
        shapes = [tensor.shape for tensor in tensors]
        if shapes != [(1, length)]:
            raise Rejected(
                "wrong_shape", f"slot {candidate.slot} has {length} {of}: {what} {shapes} does not fit", what
            )


def _gate_figures(report: GateReport) -> dict[str, Any]:
    return {
        "passed": report.passed,
        "reasons": list(report.reasons),
        "candidate": report.candidate._asdict() if report.candidate else None,
        "current": report.current._asdict() if report.current else None,
        "difference_low": report.difference_low,
    }
