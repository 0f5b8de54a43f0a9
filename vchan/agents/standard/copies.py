"""The service `files`: trees of files, read here or written here, as far as the owner allows it.

Rules of this file
1. Each connection has a thread, which waits for disks and for its other end.
2. A path that is asked for is opened part by part, and none may be a symbolic link (`files`); what
   is below it neither (`copies.trees`). Each file and directory is judged by the rules anew.
"""

import errno
import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from typing import Final

from vchan.agents.standard.files import open_directory
from vchan.agents.standard.permissions import FilePermissions, Rules, matches, path_problem
from vchan.copies.pipe import END_S, CopyBroken, CopyPipe
from vchan.copies.trees import (
    TreePlace,
    TreeReceiver,
    TreeSender,
    below,
    open_entry,
    text_of,
)
from vchan.errors import Rejected
from vchan.services.copies import (
    INTO,
    KEEP,
    RECURSIVE,
    RESUME,
    VERSION,
    CopyFault,
    CopyReady,
    CopyRefusal,
    CopyRequest,
    TreeDone,
    encode_copy,
)

COPIES_MAX: Final = 8
"""Connections of the service at a time, each with a thread. At it: one that has been idle for
COPY_IDLE_S ends; if none has, the next is refused."""
COPY_IDLE_S: Final = 60.0
"""Longer than a migration stops a stream."""
TAKE_OVER_S: Final = 10.0
"""For an earlier copy to the same place to let it go. At it: the later one is refused."""


class _Connection:
    """Who is served, by a thread."""

    def __init__(self, connected: socket.socket, run: Callable[["_Connection"], object]) -> None:
        self.socket = connected
        self.pipe = CopyPipe(connected)
        self.place: tuple[int, int, bytes] | None = None  # what it writes
        self.thread = threading.Thread(target=run, args=(self,), name="copy", daemon=True)

    def end(self) -> None:
        """Have its thread end soon: what is whole is there, a part stays if it is worth it."""
        self.pipe.end()


class CopyService:
    """Who gets the connections of the service.

    Args:
        log: Told what is read and written; by any thread.
    """

    def __init__(self, rules: Rules, log: Callable[[str], object]) -> None:
        self._rules = rules
        self._log = log
        self._umask = os.umask(0o077)
        os.umask(self._umask)
        self._open: set[_Connection] = set()
        self._lock = threading.Lock()

    def serve(self, connected: socket.socket) -> None:
        """Take a connection."""
        made = _Connection(connected, self._run)
        with self._lock:
            is_full = len(self._open) >= COPIES_MAX and not self._end_idle()
            if not is_full:
                self._open.add(made)
        if not is_full:
            made.thread.start()
            return
        text = f"{COPIES_MAX} copies are under way in this guest (COPIES_MAX): wait for one"
        try:
            connected.send(encode_copy(CopyRefusal(text)))
        except OSError:
            pass  # it is gone already
        connected.close()

    def _end_idle(self) -> bool:
        """Whether there is room again: a command that was killed says no word, its stream is given
        up after ten minutes."""
        least = min(self._open, key=lambda each: each.pipe.moved_s)
        if time.monotonic() - least.pipe.moved_s < COPY_IDLE_S:
            return False
        self._open.discard(least)
        least.end()
        return True

    def _take_over(self, connection: _Connection, place: TreePlace) -> None:
        """The copy that is asked for last writes: the one before, if there is one, was killed."""
        found = os.fstat(place.directory)
        key = (found.st_dev, found.st_ino, place.name)
        with self._lock:
            before = [each for each in self._open if each.place == key]
            connection.place = key
        for each in before:
            if each is not connection:
                each.end()
                each.thread.join(TAKE_OVER_S)

    def close(self) -> None:
        """End all of them, and wait until they have: what is whole is there, parts stay if they are
        worth it. At the latest after END_S."""
        until_s = time.monotonic() + END_S
        with self._lock:
            ending = list(self._open)
        for connection in ending:
            connection.end()
        for connection in ending:
            connection.thread.join(max(0.0, until_s - time.monotonic()))

    def _run(self, connection: _Connection) -> None:
        try:
            self._serve_all(connection)
        except (CopyBroken, CopyFault, OSError) as error:
            self._log(f"files: {error}")
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.socket.close()

    def _serve_all(self, connection: _Connection) -> None:
        """One request after the other, until there are no more."""
        while True:
            try:
                request = connection.pipe.read()
            except EOFError:
                return
            if not isinstance(request, CopyRequest):
                raise CopyFault(f"{type(request).__name__}: a request was to come")
            self._serve(connection, request)

    def _serve(self, connection: _Connection, request: CopyRequest) -> None:
        try:
            _require_version(request)
            serve = self._put if request.is_put else self._get
            done = serve(connection, request)
        except Rejected as error:
            self._log(f"files: refused: {error}")
            connection.pipe.write(encode_copy(CopyRefusal(str(error))))
            return
        verb = "wrote" if request.is_put else "read"
        path = os.fsdecode(request.path)
        self._log(f"files: {verb} {done.files} files, {done.bytes} bytes, {path}")

    # ---------------------------------------------------------------- the two ways

    def _get(self, connection: _Connection, request: CopyRequest) -> TreeDone:
        pipe = connection.pipe
        permits = _Permits(self._rules, self._rules.read, "read")
        permits.require(request.path)
        fd = _open(request.path)
        try:
            self._require_sendable(fd, request, permits)
            self._log(f"files: read {os.fsdecode(request.path)}")
            pipe.write(encode_copy(CopyReady()))
            resumes = bool(request.flags & RESUME)
            return TreeSender(pipe, permits, _Deaf(), resumes=resumes).send(fd, request.path)
        finally:
            os.close(fd)

    @staticmethod
    def _require_sendable(fd: int, request: CopyRequest, permits: "_Permits") -> None:
        found = os.fstat(fd)
        is_directory = stat.S_ISDIR(found.st_mode)
        problem = permits.problem(request.path, is_directory=is_directory)
        if not problem and is_directory and not request.flags & RECURSIVE:
            problem = "is a directory; -r copies it"
        if not problem and not is_directory and found.st_size > permits.bytes_max:
            problem = f"has {found.st_size} bytes, {permits.bytes_max} are allowed (bytes_max)"
        if problem:
            raise Rejected(f"{os.fsdecode(request.path)}: {problem}")

    def _put(self, connection: _Connection, request: CopyRequest) -> TreeDone:
        pipe = connection.pipe
        permits = _Permits(self._rules, self._rules.write, "write")
        permits.require(request.path)
        place = _place(request)
        try:
            self._log(f"files: write {os.fsdecode(place.path)}")
            self._take_over(connection, place)
            pipe.write(encode_copy(CopyReady()))
            return TreeReceiver(
                pipe,
                place,
                permits,
                _Deaf(),
                takes_directories=bool(request.flags & RECURSIVE),
                resumes=bool(request.flags & RESUME),
                keeps=bool(request.flags & KEEP),
                umask=self._umask,
            ).receive()
        finally:
            os.close(place.directory)


class _Permits:
    """The owner's rules for reading, or for writing."""

    def __init__(self, rules: Rules, part: FilePermissions, section: str) -> None:
        self.bytes_max = part.bytes_max
        self._part = part
        self._denial = f"is not allowed ({rules.where}: [{section}] allow)"

    def require(self, path: bytes) -> None:
        """That a path may be looked at: as a file, or as a directory with something in it that is
        allowed.

        Raises:
            Rejected: It may not.
        """
        problem = self.problem(path, is_directory=False)
        if problem and self.problem(path, is_directory=True):
            raise Rejected(f"{os.fsdecode(path)}: {problem}")

    def problem(self, path: bytes, *, is_directory: bool) -> str:
        """See `Permits`. A directory is allowed as a path, or with what is right in it."""
        text = os.fsdecode(path)
        problem = path_problem(text)
        if problem:
            return problem
        is_allowed = matches(text, self._part.allow) or (
            is_directory and matches(f"{text.rstrip('/')}/", self._part.allow)
        )
        return "" if is_allowed else self._denial


class _Deaf:
    """Who copies is told by the other end."""

    def left_out(self, path: bytes, text: str) -> None:
        """Nothing."""

    def failed(self, text: str) -> None:
        """Nothing."""

    def begins(self, path: bytes, at: int, size: int) -> None:
        """Nothing."""

    def moved(self, count: int) -> None:
        """Nothing."""


def _require_version(request: CopyRequest) -> None:
    if request.version != VERSION:
        here = f"copies: here is version {VERSION}, the other end has {request.version}"
        raise Rejected(f"{here}: upgrade the older")


def _open(path: bytes) -> int:
    """A descriptor of a file or directory, reached without any symbolic link."""
    parent, name = os.path.split(path)
    directory = open_directory(os.fsdecode(parent))
    if not name:
        return directory
    try:
        return open_entry(directory, name)
    except (OSError, Rejected) as error:
        raise Rejected(f"{os.fsdecode(path)}: {text_of(error)}") from error
    finally:
        os.close(directory)


def _place(request: CopyRequest) -> TreePlace:
    """Where what is sent is to appear: in the directory that the path is, or as the path."""
    parent, name = os.path.split(request.path)
    directory = open_directory(os.fsdecode(parent))
    if not name:
        return TreePlace(directory, request.name, below(request.path, request.name))
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        inside = os.open(name, flags, dir_fd=directory)
    except OSError as error:
        is_other = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
        if is_other and not request.flags & INTO:
            return TreePlace(directory, name, request.path)
        os.close(directory)
        raise Rejected(f"{os.fsdecode(request.path)}: {error.strerror}") from error
    os.close(directory)
    return TreePlace(inside, request.name, below(request.path, request.name))
