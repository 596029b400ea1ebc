"""The supervisor's side of an update: from signed metadata to a qualified model in the store.

A metadata set that arrives waits in memory until no stager runs, and is then put beside the accepted one, in
`metadata.new`. A stager child is started on it: it alone verifies, fetches and qualifies. Only what it has verified
becomes `metadata.set`, so whatever is sent to a device, it can still verify after a restart what it had accepted.
Verified releases are offered to the slots; those that want theirs staged say so, and the stager goes on. The set of a
sideload file goes through a file of its own, `metadata.bundle`, so one that waits is not lost for it.

One stager runs at a time. Newer metadata ends one that is fetching, since it may say that something else is wanted; the
next one goes on from the chunks on disk. What was refused makes the next set wait a little, so a flood of sets costs a
stager now and then and neither starves an update nor fills the audit trail. One that was refused for what may pass, as
expired while the clock was ahead, makes way for the accepted one, and is looked at again later.

What cannot be had now is tried again after a pause that grows to an hour, and soon after metadata comes, even if it
says nothing new: then the broker and the host are back. That the host is away is told once; after that the model stays
wanted, and `progress` says what it waits for.
"""

from __future__ import annotations

import logging
import random
import signal
from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from edge_agent.children import Child
from edge_agent.inbox import Installation
from edge_agent.staging import (
    HOST_AWAY,
    NO_SPACE,
    UNAVAILABLE,
    FromStager,
    MetadataRefused,
    MetadataVerified,
    Postponed,
    Progress,
    Qualifying,
    Quit,
    Refused,
    Staged,
    StageModel,
    StagerSettings,
)
from protocol.codec import MAX_PAYLOAD_BYTES
from protocol.durable import OS_DISK, Disk, disk_errors, is_full, write_durably
from protocol.errors import Unavailable

log = logging.getLogger(__name__)

STALL_LIMIT_S = 180.0
FIRST_RESUME_S = 1.0
FIRST_RETRY_S = 30.0
LAST_RETRY_S = 3600.0
# How long a stager may go on with what it does though newer metadata has come.
UNDISTURBED_S = 30.0
FIRST_REFUSAL_PAUSE_S = 1.0
LAST_REFUSAL_PAUSE_S = 60.0
# The same set may be accepted once the clock is right, or once a person has mended what is misconfigured.
_PASSING = frozenset({"expired", "misconfigured"})


class Updates:
    """Runs stagers.

    Args:
        settings: For each stager; which metadata it is to verify is filled in.
        metadata_file: Where the accepted metadata set is kept.
        on_verified: Called with what a set says, once it is accepted.
        on_metadata_refused: Called with the reason and a text.
        on_staged: Called with the digest of a model that is complete and qualified.
        on_refused: Called with digest, reason and text of one that never will be.
        on_postponed: Called with digest, reason and text of one that could not be had now.
        on_stager_died: Called with the digest that was being qualified, and how the stager ended.
        start: Starts a stager. Raises `Unavailable`.
        rng: For the jitter of pauses.
        disk: Where the metadata file is.

    Attributes:
        progress: Of each model that is wanted and on its way, by digest.
        metadata_version: Of the set that was accepted last.
    """

    def __init__(
        self,
        settings: StagerSettings,
        metadata_file: Path,
        *,
        on_verified: Callable[[MetadataVerified], None],
        on_metadata_refused: Callable[[str, str], None],
        on_staged: Callable[[str], None],
        on_refused: Callable[[str, str, str], None],
        on_postponed: Callable[[str, str, str], None],
        on_stager_died: Callable[[str, str], None],
        start: Callable[[StagerSettings], Child[FromStager]],
        rng: random.Random,
        disk: Disk = OS_DISK,
    ) -> None:
        self._settings = settings
        self._accepted_file = metadata_file
        self._new_file = metadata_file.with_suffix(".new")
        self._bundle_file = metadata_file.with_suffix(".bundle")
        self._on_verified = on_verified
        self._on_metadata_refused = on_metadata_refused
        self._on_staged = on_staged
        self._on_refused = on_refused
        self._on_postponed = on_postponed
        self._on_stager_died = on_stager_died
        self._start = start
        self._rng = rng
        self._disk = disk
        self._stopped = False
        # What is to be looked at.
        self._arrived: bytes | None = None
        self._seen: bytes | None = None
        self._misfit: int | None = None
        self._told_misfit: int | None = None
        self._bundle: Installation | None = None
        self._fresh = False
        self._owed = False
        self._is_deadly = False
        self._host_is_back = False
        # The stager, and what it has been told.
        self._stager: Child[FromStager] | None = None
        self._subject = metadata_file
        self._installing: Installation | None = None
        self._installed: Installation | None = None
        self._verified = False
        self._settled = False
        self._dismissed = False
        self._current: str | None = None
        self._qualifying = False
        self._began_at = 0.0
        self._heard_at = 0.0
        # What comes after it.
        self._wanted: list[str] = []
        self._told: dict[str, str] = {}
        self._told_refusal = ""
        self._is_full = False
        self._retry_s = FIRST_RETRY_S
        self._resume_s = FIRST_RESUME_S
        self._retry_at: float | None = None
        self._pause_s = FIRST_REFUSAL_PAUSE_S
        self._pause_until = 0.0
        # The last set that was refused for what may pass, why, and when that may have passed.
        self._doubted: bytes | None = None
        self._doubt = ""
        self._doubt_s = FIRST_RETRY_S
        self._doubt_at: float | None = None
        self.progress: dict[str, Progress] = {}
        self.metadata_version = 0

    @property
    def child(self) -> Child[FromStager] | None:
        """The stager, while there is one."""
        return self._stager

    @property
    def busy(self) -> bool:
        """Whether a stager writes, or soon will; while the disk is too full for that, only room can help."""
        return self._stager is not None or (not self._is_full and (self._has_work or self._retry_at is not None))

    def metadata_arrived(self, payload: bytes) -> None:
        """Have a metadata set verified, unless it is the one that was looked at last."""
        if not 0 < len(payload) <= MAX_PAYLOAD_BYTES:
            self._misfit = len(payload)
        elif payload == self._seen:
            self._host_is_back = True
        else:
            self._seen = self._arrived = payload

    def install(self, bundle: Installation) -> None:
        """Have the metadata and the models of a sideload file looked at, before anything else."""
        self._bundle = bundle

    def installed(self) -> Installation | None:
        """The sideload file that is done with, once; `None` while it is under way, or there is none."""
        done, self._installed = self._installed, None
        return done

    def look_again(self) -> None:
        """Verify what is kept, e.g. after a restart: a set that was not looked at to the end, or the accepted one."""
        self._fresh = True
        if self._seen is None:
            self._seen = self._read(self._new_file) or self._read(self._accepted_file)

    def stage(self, digest: str) -> None:
        """Have a model staged that a verified release names."""
        if digest not in self._wanted:
            self._wanted.append(digest)
        if self._stager is None:
            self._fresh = True
        self._next()

    def cancel(self, digest: str) -> None:
        """Stop staging a model."""
        self._forget(digest)
        self._told.pop(digest, None)
        if digest == self._current and self._stager is not None:
            self._stager.kill()
            self._gone()
            self._current = None
            self._fresh |= bool(self._wanted)

    def tick(self, now: float) -> None:
        """Start a stager when there is something to look at, end one that hangs or is out of date."""
        if self._host_is_back:
            self._host_is_back = False
            self._retry_soon(now)
        if self._stager is not None:
            self._oversee(self._stager, now)
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at, self._fresh = None, True
        if self._doubt_at is not None and now >= self._doubt_at:
            self._doubt_at = None
            self._arrived = self._arrived or self._doubted
            self._fresh |= self._doubted is None
        if self._stopped or now < self._pause_until:
            return
        if self._misfit != self._told_misfit:  # it waits for no stager, and keeps none from starting now
            self._tell_misfit(now)
        if self._stager is None and self._has_work:
            try:
                self._begin(now)
            except Unavailable as error:
                self._pause_until = self._retry_later(now)
                self._cannot_look(NO_SPACE if is_full(error) else UNAVAILABLE, str(error))

    def _cannot_look(self, reason: str, text: str) -> None:
        """Say that metadata waits for the disk or for a process; once, until some was looked at."""
        log.error("cannot look at the metadata set: %s", text)
        self._is_full = reason == NO_SPACE
        if self._told_refusal != reason:
            self._told_refusal = reason
            self._on_metadata_refused(reason, text)

    def receive(self, child: Child[FromStager], now: float) -> None:
        """Deal with what the stager said, or with its end."""
        self._heard_at = now
        for message in child.channel.receive():
            self._heard(message, now)
        if child.channel.closed and child is self._stager:
            self._ended(child, now)

    def stop(self) -> None:
        """End the stager and start no other; what it has fetched stays on disk."""
        self._stopped = True
        if self._stager is not None:
            self._stager.kill()
            self._gone()

    def _read(self, path: Path) -> bytes | None:
        try:
            return self._disk.read(path)
        except OSError:
            return None

    # Starting and ending stagers.

    @property
    def _has_work(self) -> bool:
        return self._fresh or self._arrived is not None or self._bundle is not None

    def _begin(self, now: float) -> None:
        """Start a stager on a bundle, else on a set that has not been verified, else on the accepted one.

        A bundle's set that lies there was verified before a daemon that died could put it in its place.

        Raises:
            Unavailable: The set cannot be written, or no process can be started. All stays to be done.
        """
        bundle, arrived = self._bundle, self._arrived
        with disk_errors(self._new_file.parent, 0, self._disk):
            # It may have been accepted, and not yet be in its place; one that stagers die of must not hold up others.
            comes_first = self._disk.is_file(self._new_file) and not self._is_deadly
        if bundle is None and arrived is not None and not comes_first:
            write_durably(self._new_file, arrived, disk=self._disk)
            self._arrived, self._is_deadly = None, False
        with disk_errors(self._accepted_file.parent, 0, self._disk):
            kept = (self._new_file, self._bundle_file, self._accepted_file)
            found = self._bundle_file if bundle else next((file for file in kept if self._disk.is_file(file)), None)
        self._owed |= self._fresh
        self._fresh = False
        if found is None:
            return
        self._subject = found
        settings = replace(self._settings, metadata_file=str(found), bundle=str(bundle.path) if bundle else None)
        self._verified = self._settled = self._dismissed = False
        self._began_at = self._heard_at = now
        try:
            self._stager = self._start(settings)
        except Unavailable:
            self._fresh = True
            raise
        self._installing, self._bundle = bundle, None
        self._is_full = False

    def _oversee(self, stager: Child[FromStager], now: float) -> None:
        if now - self._heard_at > STALL_LIMIT_S:
            log.error("the stager gives no sign; killing it")
            stager.process.kill()
            self._ended(stager, now)
        elif self._is_out_of_date and not self._dismissed and now - self._began_at >= UNDISTURBED_S:
            self._dismissed = True
            stager.channel.send(Quit())

    @property
    def _is_out_of_date(self) -> bool:
        return self._arrived is not None or self._bundle is not None

    def _gone(self) -> None:
        """There is no stager any more; if it was on a bundle, that is done with."""
        self._stager = None
        if self._installing is not None:
            self._installed, self._installing = self._installing, None
            self._fresh |= self._read(self._new_file) is not None  # it waited for the bundle

    def _ended(self, child: Child[FromStager], now: float) -> None:
        child.kill()
        digest, self._current = self._current, None
        how = self._how_it_ended(child)
        if self._installing is not None and digest is not None:
            self._installing.stager_died(digest, how)
        self._gone()
        if self._dismissed:
            self._fresh |= bool(self._wanted) or not self._settled
        elif digest is not None and self._qualifying:
            self._forget(digest)
            self._on_stager_died(digest, how)
        elif digest is not None:  # no model was loaded, and none is to blame
            log.warning("the stager ended while it fetched a model (%s); it will go on from the chunks on disk", how)
            self._retry_at = now + self._resume_s * self._rng.uniform(0.75, 1.25)
            self._resume_s = min(2 * self._resume_s, LAST_RETRY_S)
        elif not self._settled:
            self._is_deadly = self._subject == self._new_file
            log.warning("the metadata set was not looked at to the end (stager: %s)", how)
            self._retry_later(now)
        elif self._wanted and self._retry_at is None and self._doubt_at is None:
            self._retry_later(now)

    def _how_it_ended(self, child: Child[FromStager]) -> str:
        if child.process.returncode == -signal.SIGALRM:  # its own deadline
            return f"it took longer than {self._settings.qualify_seconds:.0f} s"
        return child.how_it_ended()

    # Listening to one.

    def _heard(self, message: FromStager, now: float) -> None:
        match message:
            case MetadataVerified():
                self._accept(message)
            case MetadataRefused():
                self._refuse(message, now)
            case Progress():
                self.progress[message.digest] = message
                self._resume_s = FIRST_RESUME_S
            case Qualifying():
                self._qualifying = True
            case Staged():
                self._done(message.digest)
                self._on_staged(message.digest)
            case Refused():
                self._done(message.digest)
                self._on_refused(message.digest, message.reason, message.text)
            case Postponed():
                self._postpone(message, now)
        if self._installing is not None:
            self._installing.heard(message, self._wanted)
        self._next()

    def _accept(self, message: MetadataVerified) -> None:
        self._verified = self._settled = True
        self._owed = False
        if message.version > self.metadata_version:  # who can only repeat it shortens no pause
            self._pause_s = FIRST_REFUSAL_PAUSE_S
            self._misfit = self._told_misfit = None
        self._told_refusal = ""
        if self._subject == self._new_file:
            self._doubted = None
        if self._doubted is None:
            self._doubt_s, self._doubt_at = FIRST_RETRY_S, None
        if self._subject != self._accepted_file:
            self._told.clear()
            self._retry_s, self._retry_at = FIRST_RETRY_S, None
            try:
                with disk_errors(self._accepted_file.parent, 0, self._disk):
                    if self._subject == self._new_file:
                        self._disk.remove(self._bundle_file)  # of a set before
                    self._disk.rename(self._subject, self._accepted_file)
                    self._disk.sync_folder(self._accepted_file.parent)
            except Unavailable as error:  # it is verified once more after the next restart
                log.error("cannot keep the accepted metadata set in its place: %s", error)
        self.metadata_version = message.version
        self._on_verified(message)

    def _refuse(self, message: MetadataRefused, now: float) -> None:
        if message.reason in (NO_SPACE, UNAVAILABLE):  # not looked at to the end
            self._cannot_look(message.reason, message.text)
            return
        self._settled = True
        self._pause(now)
        is_passing = message.reason in _PASSING
        is_known, is_over = False, True
        if self._subject == self._new_file:
            is_known = self._doubts_again(message.reason, now)
            self._remove_subject()
        elif self._installing is None:  # it was accepted before, and is looked at again and again while it is needed
            is_known, self._told_refusal = message.reason == self._told_refusal, message.reason
            if is_passing and (self._owed or not self.metadata_version):
                self._doubt_later(now)
            if not is_passing:
                self._seen = None  # the broker's copy is looked at when it comes again
            is_over = self._subject == self._bundle_file and not is_passing
            if is_over:
                self._remove_subject()
        # What was to be looked at anyway, for a retry that was due, say, is not done by refusing another set.
        self._owed &= self._subject != self._accepted_file
        self._fresh = self._owed or (is_over and (bool(self._wanted) or not self.metadata_version))
        if not is_known:
            self._on_metadata_refused(message.reason, message.text)

    def _doubts_again(self, reason: str, now: float) -> bool:
        """Keep a new set that was refused for what may pass, the last one. Whether that had been told of it."""
        payload = self._read(self._subject)
        is_same = payload is not None and payload == self._doubted
        is_known = is_same and reason == self._doubt
        if reason in _PASSING:
            self._doubted, self._doubt = payload, reason
            self._doubt_later(now)
        elif is_same:
            self._doubted = None
        return is_known

    def _doubt_later(self, now: float) -> None:
        """Look again after a pause that grows."""
        if self._doubt_at is None:
            self._doubt_at = now + self._doubt_s * self._rng.uniform(0.75, 1.25)
            self._doubt_s = min(2 * self._doubt_s, LAST_RETRY_S)

    def _remove_subject(self) -> None:
        try:
            with disk_errors(self._subject.parent, 0, self._disk):
                self._disk.remove(self._subject)
        except Unavailable as error:
            log.error("cannot remove the refused metadata set: %s", error)

    def _tell_misfit(self, now: float) -> None:
        """Refuse what can be no metadata set, by its length; once for many alike."""
        self._pause(now)
        text = f"a metadata set of {self._misfit} bytes; at most {MAX_PAYLOAD_BYTES} are possible"
        self._on_metadata_refused("too_long" if self._misfit else "malformed", text)
        self._told_misfit = self._misfit

    def _pause(self, now: float) -> None:
        """What was refused makes the next set wait a little."""
        self._pause_until = now + self._pause_s * self._rng.uniform(0.75, 1.25)
        self._pause_s = min(2 * self._pause_s, LAST_REFUSAL_PAUSE_S)

    def _postpone(self, message: Postponed, now: float) -> None:
        """Say that a model cannot be had now, and try it again later.

        While the host is away for a week, nothing is written for each attempt in vain.
        """
        digest, known = message.digest, self._told.get(message.digest)
        self._current = None
        self._retry_later(now)
        if message.reason in HOST_AWAY and known == message.reason:
            so_far = self.progress.get(digest, Progress(digest, 0, 0))
            self.progress[digest] = replace(so_far, rate=0.0, waiting=f"{message.reason}: {message.text}")
            return
        self._told[digest] = message.reason
        self._forget(digest)
        self._on_postponed(digest, message.reason, message.text)

    def _next(self) -> None:
        """Give the stager its next task, or let it go."""
        if self._stager is None or not self._verified or self._current is not None or self._dismissed:
            return
        due = [digest for digest in self._wanted if not self._is_waiting(digest)]
        if due:
            self._current, self._qualifying = due[0], False
            self._stager.channel.send(StageModel(self._current))
        else:
            self._verified = False  # what is wanted from now on is for the next one
            self._stager.channel.send(Quit())

    def _is_waiting(self, digest: str) -> bool:
        return self._retry_at is not None and digest in self.progress and bool(self.progress[digest].waiting)

    def _done(self, digest: str) -> None:
        self._current = None
        self._told.pop(digest, None)
        self._forget(digest)

    def _forget(self, digest: str) -> None:
        self.progress.pop(digest, None)
        if digest in self._wanted:
            self._wanted.remove(digest)

    def _retry_later(self, now: float) -> float:
        self._retry_at = now + self._retry_s * self._rng.uniform(0.75, 1.25)
        self._retry_s = min(self._retry_s * 2, LAST_RETRY_S)
        return self._retry_at

    def _retry_soon(self, now: float) -> None:
        if self._retry_at is not None:
            self._retry_s = FIRST_RETRY_S
            self._retry_at = min(self._retry_at, now + self._retry_s * self._rng.uniform(0.25, 1.0))
        if self._doubt_at is not None:
            self._doubt_s = FIRST_RETRY_S
            self._doubt_at = min(self._doubt_at, now + self._doubt_s * self._rng.uniform(0.25, 1.0))
