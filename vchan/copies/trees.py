"""A tree of files: read from a disk and sent, received and written to a disk.

Rules of this file
1. One thread, which waits. What is held is one message, and a descriptor for each directory in each
   other (DEPTH_MAX).
2. No symbolic link is followed and no device is opened below the path that was named; each is said
   to have been left out.
3. What goes wrong with one file is said, and the others go on. What goes wrong with the stream, or
   with the other end's word, ends the copy.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from vchan.copies.pipe import CopyBroken, CopyPipe
from vchan.copies.places import (
    RESUME_BYTES_MIN,
    NewFile,
    digest_of,
    give,
    replaceable,
    sync_directory,
)
from vchan.errors import Rejected
from vchan.services.copies import (
    ASK,
    DATA_BYTES_MAX,
    SIZE_MAX,
    CopyFault,
    CopyMessage,
    DirectoryEnd,
    DirectoryEntry,
    EntryFacts,
    EntryFailed,
    FileBegin,
    FileBroken,
    FileData,
    FileEntry,
    FileWhole,
    Have,
    LeftOut,
    TreeDone,
    TreeEnd,
    name_problem,
)
from vchan.services.copy_order import DEPTH_MAX, ReceivingEnd, SendingEnd

if TYPE_CHECKING:
    from hashlib import _Hash

_LOOK: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_ENTER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_KINDS: Final = (
    (stat.S_ISLNK, "is a symbolic link"),
    (stat.S_ISFIFO, "is a pipe"),
    (stat.S_ISSOCK, "is a socket"),
    (stat.S_ISCHR, "is a device"),
    (stat.S_ISBLK, "is a device"),
)


class CopyWatcher(Protocol):
    """Who is told how a copy goes. Paths are as the disk has them."""

    def left_out(self, path: bytes, text: str) -> None:
        """Something is not copied, and why."""

    def failed(self, text: str) -> None:
        """The other end could not write something: which, and why."""

    def begins(self, path: bytes, at: int, size: int) -> None:
        """A file's bytes come, from `at` on: what is before that is there already."""

    def moved(self, count: int) -> None:
        """So many more of its bytes are through."""


class Permits(Protocol):
    """What may be read, or written, of the disk."""

    bytes_max: int
    """Of one file."""

    def problem(self, path: bytes, *, is_directory: bool) -> str:
        """Why a path may not be; "" if it may."""


class Everything:
    """Whatever the user may who runs this."""

    bytes_max = SIZE_MAX

    def problem(self, path: bytes, *, is_directory: bool) -> str:  # noqa: ARG002 - Permits'
        """Nothing."""
        return ""


def facts_of(found: os.stat_result) -> EntryFacts:
    """What is said of a file or directory."""
    modified_ns = min(max(found.st_mtime_ns, -(2**63)), 2**63 - 1)
    return EntryFacts(found.st_mode & 0o777, found.st_uid, found.st_gid, modified_ns)


def open_entry(directory: int | None, name: bytes) -> int:
    """A descriptor of a plain file or a directory, to be read.

    Args:
        directory: None: the name is a path whose last part is no link.

    Raises:
        Rejected: It is something else.
        OSError: It cannot be opened.
    """
    # Looked at first: opening a device has effects of its own.
    _require_kind(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    fd = os.open(name, _LOOK, dir_fd=directory)
    try:
        _require_kind(os.fstat(fd).st_mode)  # it may have been changed under our eyes
    except Rejected:
        os.close(fd)
        raise
    return fd


def _require_kind(mode: int) -> None:
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = next((text for is_kind, text in _KINDS if is_kind(mode)), "is of no known kind")
        raise Rejected(kind)


def below(path: bytes, name: bytes) -> bytes:
    """The path of what has this name in the directory of that path."""
    return path.rstrip(b"/") + b"/" + name


def text_of(error: OSError | Rejected) -> str:
    """What to say of it, without a path."""
    if isinstance(error, Rejected):
        return str(error)
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return "is a symbolic link, or no directory"
    return error.strerror or str(error)


# ---------------------------------------------------------------- from a disk


class TreeSender:
    """Sends one tree.

    Args:
        resumes: The other end is asked what it has of each file.
    """

    def __init__(
        self, pipe: CopyPipe, permits: Permits, watcher: CopyWatcher, *, resumes: bool = False
    ) -> None:
        self._pipe = pipe
        self._permits = permits
        self._watcher = watcher
        self._resumes = resumes
        self._end = SendingEnd()
        self._had: Have | None = None

    def send(self, fd: int, path: bytes) -> TreeDone:
        """Send what a descriptor is open to, which stays the caller's; wait until it is written.

        Raises:
            CopyBroken: The other end is gone; CopyFault: it is no end of a copy.
        """
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            self._directory(fd, b"", path)
        else:
            self._file(fd, b"", path)
        self._say(TreeEnd())
        while self._end.done is None:
            self._hear()
        return self._end.done

    def _say(self, message: CopyMessage) -> None:
        self._pipe.write(self._end.say(message), self._heed)

    def _hear(self) -> None:
        try:
            self._heed(self._pipe.read())
        except EOFError:
            raise CopyBroken("the other end is gone") from None

    def _heed(self, message: CopyMessage) -> None:
        self._end.heed(message)
        if isinstance(message, Have):
            self._had = message
        elif isinstance(message, EntryFailed):
            self._watcher.failed(message.text)

    # directories

    def _directory(self, fd: int, name: bytes, path: bytes) -> None:
        self._say(DirectoryEntry(facts_of(os.fstat(fd)), name))
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    if self._end.has_failed:
                        break
                    self._entry(fd, os.fsencode(entry.name), path)
        except OSError as error:
            self._leave_out(b".", path, f"cannot be listed: {text_of(error)}")
        self._say(DirectoryEnd())

    def _entry(self, directory: int, name: bytes, above: bytes) -> None:
        path = below(above, name)
        try:
            problem = name_problem(name)
            fd = -1 if problem else open_entry(directory, name)
        except (OSError, Rejected) as error:
            problem, fd = text_of(error), -1
        try:
            problem = problem or self._problem(fd, path)
            if problem:
                self._leave_out(name, above, problem)
            elif stat.S_ISDIR(os.fstat(fd).st_mode):
                self._directory(fd, name, path)
            else:
                self._file(fd, name, path)
        finally:
            if fd >= 0:
                os.close(fd)

    def _problem(self, fd: int, path: bytes) -> str:
        """Why what is open is not sent; "" if it is."""
        found = os.fstat(fd)
        is_directory = stat.S_ISDIR(found.st_mode)
        if is_directory and self._end.depth >= DEPTH_MAX:
            return f"is deeper than {DEPTH_MAX} directories (DEPTH_MAX)"
        if not is_directory and found.st_size > self._permits.bytes_max:
            return f"has {found.st_size} bytes, {self._permits.bytes_max} are allowed (bytes_max)"
        return self._permits.problem(path, is_directory=is_directory)

    def _leave_out(self, name: bytes, above: bytes, text: str) -> None:
        self._watcher.left_out(below(above, name), text)
        self._say(LeftOut(name, text))

    # files

    def _file(self, fd: int, name: bytes, path: bytes) -> None:
        before = os.fstat(fd)
        size = before.st_size
        asks = self._resumes and size >= RESUME_BYTES_MIN
        self._say(FileEntry(ASK if asks else 0, facts_of(before), size, name))
        try:
            offset, digest = self._agree(fd) if asks else (0, hashlib.sha256())
            self._content(fd, path, offset, size, digest)
            _require_unchanged(fd, before)
        except (OSError, Rejected) as error:
            self._break(path, text_of(error))
            return
        if self._end.has_failed:
            self._say(FileBroken(""))
        else:
            self._say(FileWhole(digest.digest()))

    def _break(self, path: bytes, text: str) -> None:
        self._watcher.left_out(path, text)
        self._say(FileBroken(text))

    def _agree(self, fd: int) -> tuple[int, _Hash]:
        """Where the file's bytes are to begin, and the checksum of those before."""
        while self._end.waits:
            self._hear()
        if self._end.has_failed or self._had is None:
            return 0, hashlib.sha256()
        had, self._had = self._had, None
        digest = digest_of(fd, had.offset)
        if digest.digest() != had.sha256:
            had, digest = had._replace(offset=0), hashlib.sha256()
        self._say(FileBegin(had.offset))
        return had.offset, digest

    def _content(self, fd: int, path: bytes, offset: int, size: int, digest: _Hash) -> None:
        self._watcher.begins(path, offset, size)
        while offset < size and not self._end.has_failed:
            data = os.pread(fd, min(DATA_BYTES_MAX, size - offset), offset)
            if not data:
                raise Rejected("became shorter while it was read")
            digest.update(data)
            offset += len(data)
            self._say(FileData(data))
            self._watcher.moved(len(data))


def _require_unchanged(fd: int, before: os.stat_result) -> None:
    after = os.fstat(fd)
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise Rejected("was changed while it was read")
    if os.pread(fd, 1, before.st_size):  # as files of /proc have
        raise Rejected("has more bytes than its size says")


# ---------------------------------------------------------------- to a disk


class TreePlace(NamedTuple):
    """Where a tree is to appear: under a name, in a directory that is open."""

    directory: int
    name: bytes
    path: bytes


class _Level:
    """A directory that we are in; `fd` -1: it could not be made, and nothing in it is."""

    __slots__ = ("entry", "facts", "fd", "is_new", "path")

    def __init__(self, entry: int, facts: EntryFacts, path: bytes) -> None:
        self.entry = entry
        self.facts = facts
        self.path = path
        self.fd = -1
        self.is_new = False


class _IncomingFile:
    """The file that comes; `new` None: it could not be begun, or it is there already."""

    __slots__ = ("directory", "entry", "facts", "is_there", "name", "new", "path", "size", "there")

    def __init__(self, entry: int, message: FileEntry, place: TreePlace) -> None:
        self.entry = entry
        self.facts = message.facts
        self.size = message.size
        self.directory, self.name, self.path = place
        self.new: NewFile | None = None
        self.there: bytes | None = None  # the checksum of a file of this name and size
        self.is_there = False  # and that is what was sent


class TreeReceiver:
    """Receives one tree, and writes it to `place`.

    Args:
        takes_directories, resumes: See `ReceivingEnd`.
        keeps: Mode, owner (where permitted) and date are the sent ones'.
        umask: Of who runs this, for what is not kept.
    """

    def __init__(
        self,
        pipe: CopyPipe,
        place: TreePlace,
        permits: Permits,
        watcher: CopyWatcher,
        *,
        takes_directories: bool,
        resumes: bool,
        keeps: bool,
        umask: int,
    ) -> None:
        self._pipe = pipe
        self._place = place
        self._permits = permits
        self._watcher = watcher
        self._keeps = keeps
        self._umask = umask
        self._end = ReceivingEnd(takes_directories=takes_directories, resumes=resumes)
        self._levels: list[_Level] = []
        self._file: _IncomingFile | None = None
        self._has_failed = False  # the root has
        self._files = 0
        self._bytes = 0

    def receive(self) -> TreeDone:
        """Until the tree is on the disk, or what could be written of it.

        Raises:
            CopyBroken: The other end is gone; CopyFault: it is no end of a copy. What is whole is
                there; a part of a file may be kept.
        """
        try:
            while not self._end.is_ended:
                message = self._pipe.read()
                self._end.heed(message)
                self._act(message)
        except EOFError:
            raise CopyBroken("the other end is gone") from None
        finally:
            self._close()
        if not self._has_failed:
            try:
                sync_directory(self._place.directory)
            except OSError as error:
                self._fail(0, self._place.path, error)
        self._pipe.write(self._end.done(self._files, self._bytes))
        return TreeDone(self._files, self._bytes)

    def _close(self) -> None:
        if self._file is not None and self._file.new is not None:
            self._file.new.keep()
        for level in self._levels:
            if level.fd >= 0:
                os.close(level.fd)

    def _act(self, message: CopyMessage) -> None:
        match message:
            case FileData(data):
                self._write(data)
            case FileEntry():
                self._begin_file(message)
            case FileBegin(offset):
                self._begin_at(offset)
            case FileWhole(sha256):
                self._finish(sha256)
            case FileBroken(text):
                self._drop(text)
            case DirectoryEntry(facts, name):
                self._enter(facts, name)
            case DirectoryEnd():
                self._leave()
            case LeftOut(name, text):
                self._watcher.left_out(below(self._path, name), text)
            case _:
                pass

    @property
    def _path(self) -> bytes:
        return self._levels[-1].path if self._levels else self._place.path

    def _where(self, name: bytes) -> TreePlace:
        """An entry's directory, its name in that, and its path; a root's name is ours."""
        if not self._levels:
            return self._place
        return TreePlace(self._levels[-1].fd, name, below(self._path, name))

    @property
    def _skips(self) -> bool:
        """A directory that we are in could not be made."""
        return bool(self._levels) and self._levels[-1].fd < 0

    def _fail(self, entry: int, path: bytes, error: OSError | Rejected) -> None:
        text = text_of(error)
        self._has_failed |= entry == 0
        self._watcher.left_out(path, text)
        self._pipe.write(self._end.failed(entry, f"{os.fsdecode(path)}: {text}"))

    # directories

    def _enter(self, facts: EntryFacts, name: bytes) -> None:
        skips = self._skips
        directory, name, path = self._where(name)
        level = _Level(self._end.entry, facts, path)
        if not skips:
            try:
                self._make(level, directory, name)
            except (OSError, Rejected) as error:
                self._fail(level.entry, path, error)
        self._levels.append(level)

    def _make(self, level: _Level, directory: int, name: bytes) -> None:
        problem = self._permits.problem(level.path, is_directory=True)
        if problem:
            raise Rejected(problem)
        # We may write in it, whoever may not when it is whole.
        with suppress(FileExistsError):
            os.mkdir(name, (level.facts.mode & ~self._umask) | 0o700, dir_fd=directory)
            level.is_new = True
        level.fd = os.open(name, _ENTER, dir_fd=directory)

    def _leave(self) -> None:
        level = self._levels.pop()
        if level.fd < 0:
            return
        try:
            if self._keeps:
                give(level.fd, level.facts)
            elif level.is_new:
                os.fchmod(level.fd, level.facts.mode & ~self._umask)
            sync_directory(level.fd)
        except OSError as error:
            self._fail(level.entry, level.path, error)
        finally:
            os.close(level.fd)

    # files

    def _begin_file(self, message: FileEntry) -> None:
        file = self._file = _IncomingFile(self._end.entry, message, self._where(message.name))
        if self._skips:
            return
        try:
            self._require(file)
            file.new = NewFile(file.directory, file.name)
            if message.flags & ASK:
                self._say_what_is_there(file)
            else:
                file.new.begin(0)
                self._watcher.begins(file.path, 0, file.size)
        except (OSError, Rejected) as error:
            self._give_up(error)

    def _require(self, file: _IncomingFile) -> None:
        problem = self._permits.problem(file.path, is_directory=False)
        if not problem and file.size > self._permits.bytes_max:
            allowed = f"{self._permits.bytes_max} are allowed (bytes_max)"
            problem = f"has {file.size} bytes, {allowed}"
        if problem:
            raise Rejected(problem)

    def _say_what_is_there(self, file: _IncomingFile) -> None:
        """A part from before; if there is none, a file that may be the same."""
        assert file.new is not None
        sha256 = file.new.held(file.size)
        offset = file.new.size
        if not offset:
            file.there = _checksum_of(file.directory, file.name, file.size, keeps=self._keeps)
            offset, sha256 = (0, sha256) if file.there is None else (file.size, file.there)
        self._pipe.write(self._end.have(offset, sha256))

    def _begin_at(self, offset: int) -> None:
        file = self._file
        assert file is not None, "an entry is told before its bytes"
        if file.new is None:
            return
        self._watcher.begins(file.path, offset, file.size)
        try:
            file.new.begin(offset)
        except OSError as error:
            self._give_up(error)
            return
        file.is_there = file.there is not None and offset == file.size

    def _write(self, data: bytes) -> None:
        file = self._file
        assert file is not None, "an entry is told before its bytes"
        if file.new is None:
            return
        try:
            file.new.write(data)
        except OSError as error:
            self._give_up(error)
            return
        self._bytes += len(data)
        self._watcher.moved(len(data))

    def _finish(self, sha256: bytes) -> None:
        file = self._file
        assert file is not None, "an entry is told before its end"
        if file.new is not None:
            try:
                self._appear(file, sha256)
            except (OSError, Rejected) as error:
                self._give_up(error)
            else:
                self._files += 1
        self._file = None

    def _appear(self, file: _IncomingFile, sha256: bytes) -> None:
        assert file.new is not None
        if not file.is_there:
            file.new.appear(sha256, file.facts, self._umask, keeps=self._keeps)
            return
        if file.there != sha256:
            raise Rejected("what is there is not what its checksum says")
        if self._keeps:
            fd = open_entry(file.directory, file.name)
            try:
                give(fd, file.facts)
            finally:
                os.close(fd)
        file.new.discard()

    def _give_up(self, error: OSError | Rejected) -> None:
        """The file cannot be written: its bytes still come for a while, and go nowhere."""
        file = self._file
        assert file is not None
        if file.new is not None:
            file.new.discard()
            file.new = None
        self._fail(file.entry, file.path, error)

    def _drop(self, text: str) -> None:
        file, self._file = self._file, None
        assert file is not None, "an entry is told before it breaks"
        if file.new is not None:
            file.new.discard()
            if not text:  # that is for what we have given up, and said so
                raise CopyFault("FileBroken: without a reason")
        if text:
            self._watcher.left_out(file.path, text)


def _may_be_given(file: os.stat_result) -> bool:
    """Whether its mode and times can be set: by its owner, and by root."""
    return os.geteuid() in (0, file.st_uid)


def _checksum_of(directory: int, name: bytes, size: int, *, keeps: bool) -> bytes | None:
    """Of a file that is as large; None: there is none that can stay, and a new one is to appear.

    Args:
        keeps: It is to have another's mode and times.
    """
    found = replaceable(directory, name)
    if found is None or found.st_size != size:
        return None
    if keeps and not _may_be_given(found):
        return None
    try:
        fd = open_entry(directory, name)
    except (FileNotFoundError, PermissionError):
        return None
    try:
        return digest_of(fd, size).digest()
    finally:
        os.close(fd)
