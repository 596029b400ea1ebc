"""A disk in memory that does to its users what POSIX lets a disk do, and no more.

What a program wrote lies in the page cache: other processes see it, and a process that is killed leaves it there. What
is on the platter is another matter, and a power cut leaves only that:

- Content is on the platter when its file was synced. Until then, each 512-byte sector may be as it was, as it was
  written, as it was in between, or, in a file that was written anew, zeros; or the file ends early.
- A name is on the platter when its folder was synced. Until then, of the changes in a folder (files and folders made,
  renamed, removed) those up to some point have happened, and the later ones have not. Folders are independent.
- So a file whose new name survived may have lost its content, and a folder that was never synced into its parent is
  lost with all that is in it.
- After a sync that failed, the kernel believes the content to be clean: a second sync does nothing.

Every call, and every piece of a write, is a step: the owner of a `SimulatedDisk` is told of it first, and may raise
`Killed`, `PowerCut` or an `OSError` there. A write that is cut short has written part of its piece.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

SECTOR_BYTES = 512
MAX_BETWEEN = 4
ROOT = "/"


class Killed(BaseException):
    """This process has ended here. What it wrote to the page cache stays."""


class PowerCut(BaseException):
    """Every process has ended here. What was not synced may be lost."""


@dataclass(slots=True, eq=False)
class File:
    """One file.

    Attributes:
        cached: Its content as processes see it.
        durable: Its content on the platter.
        between: Contents that it had since it was last synced, the newest last.
        dirty: Whether the kernel has something to write back.
        fresh: Whether it was made or emptied since it was last synced: then it may end early, or have holes.
    """

    cached: bytes = b""
    durable: bytes = b""
    between: list[bytes] = field(default_factory=list)
    dirty: bool = False
    fresh: bool = True


@dataclass(slots=True, eq=False)
class Change:
    """What happened to names in one folder, at once: a name and what it stands for from now on; `None` is removed.

    Attributes:
        names: The names.
        needs: Folder and change without which this one cannot be on the platter: the other half of a move.
    """

    names: dict[str, Node | None]
    needs: tuple[Folder, Change] | None = None


@dataclass(slots=True, eq=False)
class Folder:
    """One folder.

    Attributes:
        cached: Its names as processes see them.
        durable: Its names on the platter.
        pending: What turns the second into the first.
    """

    cached: dict[str, Node] = field(default_factory=dict)
    durable: dict[str, Node] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)


Node: TypeAlias = File | Folder


class Medium:
    """What is on the disk, whoever uses it.

    Args:
        capacity_bytes: How much fits on it.
        rng: Decides what a power cut leaves.

    Attributes:
        refusal: An error number with which every change is refused, `EROFS` or `EIO`; `None` on a healthy disk.
        dark: Whether the power is off, and no process goes on.
        cuts: How many power cuts there were.
        used_bytes: What the files take.
    """

    def __init__(self, capacity_bytes: int, rng: random.Random) -> None:
        self.capacity_bytes = capacity_bytes
        self.refusal: int | None = None
        self.dark = False
        self.cuts = 0
        self.used_bytes = 0
        self._rng = rng
        self._root = Folder()

    def folder(self, path: str) -> Folder:
        """The folder at a path. Raises `OSError` where there is none."""
        node = self.find(path)
        if node is None:
            raise self._nothing_at(path)
        if isinstance(node, File):
            raise _error(errno.ENOTDIR, path)
        return node

    def file(self, path: str) -> File:
        """The file at a path. Raises `OSError` where there is none."""
        node = self.find(path)
        if node is None:
            raise self._nothing_at(path)
        if isinstance(node, Folder):
            raise _error(errno.EISDIR, path)
        return node

    def find(self, path: str) -> Node | None:
        """What is at a path, if anything."""
        node: Node | None = self._root
        for name in path.split("/"):
            if name:
                if not isinstance(node, Folder):
                    return None
                node = node.cached.get(name)
        return node

    def change(
        self, folder: Folder, names: dict[str, Node | None], needs: tuple[Folder, Change] | None = None
    ) -> Change:
        """Change names in a folder, for now in the cache only."""
        for name, node in names.items():
            gone = folder.cached.pop(name, None)
            if isinstance(gone, File) and gone not in names.values():
                self.used_bytes -= len(gone.cached)
            if node is not None:
                folder.cached[name] = node
        change = Change(names, needs)
        folder.pending.append(change)
        return change

    def put(self, file: File, content: bytes) -> None:
        """Change a file's content, for now in the cache only.

        Raises:
            OSError: `ENOSPC`.
        """
        grown = len(content) - len(file.cached)
        if grown > self.capacity_bytes - self.used_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.used_bytes += grown
        if file.cached:
            file.between.append(file.cached)
            del file.between[:-MAX_BETWEEN]
        file.cached = content
        file.dirty = True

    def sync(self, file: File) -> None:
        """Put a file's content on the platter."""
        if file.dirty:
            file.durable = file.cached
            file.between.clear()
            file.dirty = file.fresh = False

    def fail_sync(self, file: File) -> None:
        """Write back only some of a file's content, and forget that there is more to write."""
        file.durable = _torn(file, self._rng)
        file.between.clear()
        file.dirty = False

    def sync_folder(self, folder: Folder) -> None:
        """Put a folder's names on the platter, but not its own name."""
        for change in folder.pending:
            if change.needs is not None:
                other, needed = change.needs
                _apply(other, _position(other, needed))
        _apply(folder, len(folder.pending))

    def cut(self) -> None:
        """Cut the power: from now on there is only what had reached the platter, or happened to."""
        self.cuts += 1
        self.dark = False
        self._root = self.survivor(self._rng)
        self.used_bytes = sum(len(file.cached) for _, file in self.files())

    def survivor(self, rng: random.Random | None, path: str = ROOT) -> Folder:
        """A folder as a power cut at this moment would leave it; with no chance to decide, it leaves the least."""
        chosen = _chosen(self._root, rng)
        folder = self._root
        for name in [name for name in path.split("/") if name]:
            found = _surviving_names(folder, chosen).get(name)
            if not isinstance(found, Folder):
                return Folder()
            folder = found
        return _copied(folder, rng, chosen)

    def mount(self, path: str, folder: Folder) -> None:
        """Hang a folder of another medium into this one, which is empty."""
        inner = self._root
        *above, last = [name for name in path.split("/") if name]
        for name in above:
            fresh = Folder()
            inner.cached[name] = inner.durable[name] = fresh
            inner = fresh
        inner.cached[last] = inner.durable[last] = folder
        self.used_bytes = sum(len(file.cached) for _, file in self.files())

    def files(self) -> Iterator[tuple[str, File]]:
        """Every file's path, and the file."""
        waiting: list[tuple[str, Folder]] = [("", self._root)]
        while waiting:
            path, folder = waiting.pop()
            for name, node in folder.cached.items():
                if isinstance(node, File):
                    yield f"{path}/{name}", node
                else:
                    waiting.append((f"{path}/{name}", node))

    def damage(self, path: str, rng: random.Random) -> None:
        """Let a bit of a file rot, on the platter and in the cache."""
        file = self.file(path)
        place = rng.randrange(len(file.cached))
        rotten = bytearray(file.cached)
        rotten[place] ^= 1 << rng.randrange(8)
        file.cached = file.durable = bytes(rotten)

    def _nothing_at(self, path: str) -> OSError:
        above = path.rpartition("/")[0]
        while above and self.find(above) is None:
            above = above.rpartition("/")[0]
        return _error(errno.ENOTDIR if isinstance(self.find(above), File) else errno.ENOENT, path)

    def part(self, length: int) -> int:
        """How many bytes of a write were written before it was cut short: whole sectors."""
        return self._rng.randint(0, length // SECTOR_BYTES) * SECTOR_BYTES


def _chosen(root: Folder, rng: random.Random | None) -> dict[int, int]:
    """Up to which change each folder got; with one half of a move, the other."""
    chosen: dict[int, int] = {}
    folders: list[Folder] = []
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        if id(folder) in chosen:
            continue
        chosen[id(folder)] = rng.randint(0, len(folder.pending)) if rng is not None and folder.pending else 0
        folders.append(folder)
        waiting += [node for node in folder.durable.values() if isinstance(node, Folder)]
        for change in folder.pending:
            waiting += [node for node in change.names.values() if isinstance(node, Folder)]
    moved = True
    while moved:
        moved = False
        for folder in folders:
            for change in folder.pending[: chosen[id(folder)]]:
                if change.needs is not None:
                    other, needed = change.needs
                    least = _position(other, needed)
                    if chosen.get(id(other), 0) < least:
                        chosen[id(other)], moved = least, True
    return chosen


def _copied(folder: Folder, rng: random.Random | None, chosen: dict[int, int]) -> Folder:
    copy = Folder()
    for name, node in _surviving_names(folder, chosen).items():
        if isinstance(node, Folder):
            copy.durable[name] = _copied(node, rng, chosen)
        else:
            content = node.durable if node.cached == node.durable else _torn(node, rng)
            copy.durable[name] = File(content, content, fresh=False)
    copy.cached = dict(copy.durable)
    return copy


def _torn(file: File, rng: random.Random | None) -> bytes:
    """What of a file's content may be on the platter; without chance, as little as may be."""
    if rng is None:
        return file.durable
    kind = rng.randrange(4)
    if kind == 0:
        return file.durable
    if kind == 1:
        return file.cached
    if not file.fresh:
        return _mixed([file.durable, *file.between, file.cached], len(file.cached), rng)
    if kind == 2:
        return file.cached[: rng.randint(0, len(file.cached))]
    return _mixed([file.cached, b""], len(file.cached), rng)


class SimulatedDisk:
    """The disk as one process uses it: a `protocol.durable.Disk`.

    Args:
        medium: What is on it.
        step: Told of each step before it happens, with the name of the call and the path. What it raises ends the step.

    A process that was killed, or had its power cut, can do nothing any more: each further call raises the same again.
    So what stands in its `finally` has no effect, as it has none in a process that is no more.
    """

    def __init__(self, medium: Medium, step: Callable[[str, str], None] | None = None) -> None:
        self.ended: Killed | PowerCut | None = None
        self._medium = medium
        self._notify = step
        self._cuts = medium.cuts

    def read(self, path: Path) -> bytes:
        """See `Disk`."""
        name = str(path)
        self._step("read", name)
        return self._medium.file(name).cached

    def is_file(self, path: Path) -> bool:
        """See `Disk`."""
        name = str(path)
        self._step("is_file", name)
        return isinstance(self._medium.find(name), File)

    def is_folder(self, path: Path) -> bool:
        """See `Disk`."""
        name = str(path)
        self._step("is_folder", name)
        return isinstance(self._medium.find(name), Folder)

    def names(self, folder: Path) -> list[str]:
        """See `Disk`."""
        name = str(folder)
        self._step("names", name)
        return list(self._medium.folder(name).cached)

    def free_bytes(self, folder: Path) -> int:
        """See `Disk`."""
        name = str(folder)
        self._step("free_bytes", name)
        self._medium.folder(name)
        return self._medium.capacity_bytes - self._medium.used_bytes

    def make_folder(self, folder: Path) -> None:
        """See `Disk`."""
        if self.is_folder(folder):
            return
        self.make_folder(folder.parent)
        path = str(folder)
        self._change("make_folder", path)
        above = self._medium.folder(str(folder.parent))
        if folder.name in above.cached:
            raise _error(errno.EEXIST, path)
        self._medium.change(above, {folder.name: Folder()})
        self.sync_folder(folder.parent.parent)
        self.sync_folder(folder.parent)

    def write(self, path: Path, pieces: Iterable[bytes], *, sync: bool) -> None:
        """See `Disk`."""
        name = str(path)
        self._change("create", name)
        folder, _, last = name.rpartition("/")
        above = self._medium.folder(folder)
        file = above.cached.get(last)
        if isinstance(file, Folder):
            raise _error(errno.EISDIR, name)
        if file is None:
            if self._medium.used_bytes >= self._medium.capacity_bytes:
                raise _error(errno.ENOSPC, name)
            file = File()
            self._medium.change(above, {last: file})
        self._medium.put(file, b"")
        file.fresh = True
        for piece in pieces:
            self._append(file, piece, name)
        if sync:
            self._sync("sync", file, name)

    def reserve(self, path: Path, size: int) -> None:
        """See `Disk`."""
        self.write(path, (bytes(size),), sync=False)

    def overwrite(self, path: Path, data: bytes, *, sync: bool, at: int = 0) -> None:
        """See `Disk`."""
        name = str(path)
        file = self._medium.file(name)
        try:
            self._change("overwrite", name)
        except (Killed, PowerCut):
            self._put_at(file, data[: self._medium.part(len(data))], at)
            raise
        self._put_at(file, data, at)
        if sync:
            self._sync("sync", file, name)

    def rename(self, path: Path, target: Path) -> None:
        """See `Disk`."""
        source, goal = str(path), str(target)
        self._change("rename", source)
        (source_above, _, old), (goal_above, _, new) = source.rpartition("/"), goal.rpartition("/")
        below, above = self._medium.folder(source_above), self._medium.folder(goal_above)
        file = self._medium.file(source)
        if isinstance(above.cached.get(new), Folder):
            raise _error(errno.EISDIR, goal)
        if above.cached.get(new) is file:
            return
        if below is above:
            self._medium.change(above, {old: None, new: file})
            return
        put = self._medium.change(above, {new: file})
        self._medium.used_bytes += len(file.cached)  # the removal below takes it off again
        self._medium.change(below, {old: None}, (above, put))

    def remove(self, path: Path) -> None:
        """See `Disk`."""
        name = str(path)
        self._step("remove", name)
        try:
            self._medium.file(name)
        except FileNotFoundError:
            return
        self._check(name)
        folder, _, last = name.rpartition("/")
        self._medium.change(self._medium.folder(folder), {last: None})

    def sync_folder(self, folder: Path) -> None:
        """See `Disk`."""
        name = str(folder)
        self._step("sync_folder", name)
        found = self._medium.folder(name)
        if self._medium.refusal == errno.EIO:
            raise _error(errno.EIO, name)
        self._medium.sync_folder(found)

    def _append(self, file: File, piece: bytes, name: str) -> None:
        try:
            self._change("write", name)
        except (Killed, PowerCut):
            self._put_part(file, piece, self._medium.part(len(piece)))
            raise
        room = self._medium.capacity_bytes - self._medium.used_bytes
        if len(piece) > room:
            self._put_part(file, piece, room)
            raise _error(errno.ENOSPC, name)
        self._medium.put(file, file.cached + piece)

    def _put_at(self, file: File, data: bytes, at: int) -> None:
        if not data:  # what is clean stays clean
            return
        if data:  # nothing that is written makes nothing dirty
            self._medium.put(file, file.cached[:at].ljust(at, b"\0") + data + file.cached[at + len(data) :])

    def _put_part(self, file: File, piece: bytes, length: int) -> None:
        room = self._medium.capacity_bytes - self._medium.used_bytes
        self._medium.put(file, file.cached + piece[: max(min(length, room), 0)])

    def _sync(self, call: str, file: File, name: str) -> None:
        try:
            self._change(call, name)
        except OSError:
            self._medium.fail_sync(file)
            raise
        self._medium.sync(file)

    def _change(self, call: str, path: str) -> None:
        """A step that needs a disk which takes changes."""
        self._step(call, path)
        self._check(path)

    def _check(self, path: str) -> None:
        if self._medium.refusal is not None:
            raise _error(self._medium.refusal, path)

    def _step(self, call: str, path: str) -> None:
        if self.ended is None and (self._medium.dark or self._cuts != self._medium.cuts):
            self.ended = PowerCut()
        if self.ended is not None:
            raise self.ended
        if self._notify is None:
            return
        try:
            self._notify(call, path)
        except (Killed, PowerCut) as end:
            self.ended = end
            self._medium.dark |= isinstance(end, PowerCut)
            raise
        if self.ended is not None:  # it died of what others did meanwhile
            raise self.ended


def _error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)


def _position(folder: Folder, change: Change) -> int:
    """How many changes of a folder there are up to one; 0 if it is on the platter already."""
    return next((number for number, other in enumerate(folder.pending, 1) if other is change), 0)


def _apply(folder: Folder, count: int) -> None:
    folder.durable = _names_after(folder, count)
    del folder.pending[:count]


def _surviving_names(folder: Folder, chosen: dict[int, int]) -> dict[str, Node]:
    return _names_after(folder, chosen.get(id(folder), 0))


def _names_after(folder: Folder, count: int) -> dict[str, Node]:
    names = dict(folder.durable)
    for change in folder.pending[:count]:
        for name, node in change.names.items():
            if node is None:
                names.pop(name, None)
            else:
                names[name] = node
    return names


def _mixed(contents: list[bytes], length: int, rng: random.Random) -> bytes:
    """Each sector from one of the contents; one that is too short gives zeros."""
    sectors = []
    for start in range(0, length, SECTOR_BYTES):
        end = min(start + SECTOR_BYTES, length)
        sectors.append(rng.choice(contents)[start:end].ljust(end - start, b"\0"))
    return b"".join(sectors)
