"""Files that the standard agent reads and writes in parts, and how a path is kept to its word.

A path is opened part by part, and no part may be a symbolic link: what the rules allow is what is
opened, whoever may change directories meanwhile. Nothing but plain files is touched, and a new file
appears whole under its name or not at all.
"""

import base64
import errno
import hashlib
import os
import stat
import threading
import time
from struct import Struct
from typing import Any, Final

from vchan.agents.standard.permissions import FilePermissions, Rules, matches, path_problem
from vchan.errors import Rejected

CHUNK_BYTES_MAX: Final = 1 << 20
"""Read or written by one call; less than a message holds, though it travels as base64. At it:
ValueError."""
UPLOADS_MAX: Final = 8
"""Files that are being written at a time. At it: Rejected."""
UPLOAD_IDLE_S: Final = 600.0
"""A file that nobody goes on writing for so long. At it: it is given up."""

RAW_PART: Final = Struct(">QQ")
"""What stands before the bytes of a part that is read raw: the file's size, and its date in
nanoseconds."""
_WALK: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def require_path(path: str, rules: Rules, part: FilePermissions, section: str) -> None:
    """That the rules allow it.

    Raises:
        Rejected: They do not.
    """
    if not isinstance(path, str):
        raise TypeError("argument path: expected a text")
    problem = path_problem(path)
    if problem:
        raise Rejected(f"{path}: {problem}")
    if not matches(path, part.allow):
        raise rules.refuse(path, "is not allowed", f"[{section}] allow")


def open_directory(path: str) -> int:
    """A descriptor of a directory, reached without any symbolic link.

    Raises:
        Rejected: A part of it is none, or a link.
    """
    fd = os.open("/", _WALK)
    for part in filter(None, path.split("/")):
        try:
            deeper = os.open(part, _WALK, dir_fd=fd)
        except OSError as error:
            raise _explain(path, part, error) from error
        finally:
            os.close(fd)
        fd = deeper
    return fd


def open_file(path: str) -> int:
    """A descriptor of a plain file, reached without any symbolic link.

    Raises:
        Rejected: It is none, or cannot be reached.
    """
    parent, name = os.path.split(path)
    directory = open_directory(parent)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        # Looked at first: opening a device has effects of its own.
        if not stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            raise Rejected(f"{path}: is no plain file (or a symbolic link)")
        fd = os.open(name, flags, dir_fd=directory)
    except OSError as error:
        raise _explain(path, name, error) from error
    finally:
        os.close(directory)
    if not stat.S_ISREG(os.fstat(fd).st_mode):  # it has been changed under our eyes
        os.close(fd)
        raise Rejected(f"{path}: is no plain file")
    return fd


def _explain(path: str, part: str, error: OSError) -> Rejected:
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return Rejected(f"{path}: {part} is a symbolic link, or no directory: give the real path")
    return Rejected(f"{path}: {part}: {error.strerror}")


def read_part(rules: Rules, path: str, offset: int, count: int) -> dict[str, Any]:
    """A part of a file, and what the file is like now."""
    data, found = _read(rules, path, offset, count)
    return {
        "data": base64.b64encode(data).decode(),
        "sha256": hashlib.sha256(data).hexdigest(),
        "end": offset + len(data) >= found.st_size,
        "size": found.st_size,
        "modified_ns": found.st_mtime_ns,
    }


def read_raw_part(rules: Rules, path: str, offset: int, count: int) -> bytes:
    """The same as bytes, behind a RAW_PART."""
    data, found = _read(rules, path, offset, count)
    return RAW_PART.pack(found.st_size, max(0, found.st_mtime_ns)) + data


def _read(rules: Rules, path: str, offset: int, count: int) -> tuple[bytes, os.stat_result]:
    require_path(path, rules, rules.read, "read")
    _require_number("offset", offset, 1 << 62)
    _require_number("count", count, CHUNK_BYTES_MAX)
    fd = open_file(path)
    try:
        found = os.fstat(fd)
        if found.st_size > rules.read.bytes_max:
            text = f"has {found.st_size} bytes"
            raise rules.refuse(path, text, f"[read] bytes_max {rules.read.bytes_max}")
        return os.pread(fd, count, offset), found
    finally:
        os.close(fd)


def checksum(rules: Rules, path: str) -> dict[str, Any]:
    """The whole file's checksum."""
    require_path(path, rules, rules.read, "read")
    fd = open_file(path)
    digest = hashlib.sha256()
    try:
        found = os.fstat(fd)
        if found.st_size > rules.read.bytes_max:
            text = f"has {found.st_size} bytes"
            raise rules.refuse(path, text, f"[read] bytes_max {rules.read.bytes_max}")
        left = rules.read.bytes_max
        while left > 0 and (data := os.read(fd, min(left, CHUNK_BYTES_MAX))):
            digest.update(data)
            left -= len(data)
    finally:
        os.close(fd)
    return {"sha256": digest.hexdigest(), "size": found.st_size, "modified_ns": found.st_mtime_ns}


def _require_number(name: str, value: Any, limit: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
        raise ValueError(f"{name}: {value!r} is no whole number from 0 to {limit}")


class _Upload:
    def __init__(self, path: str, directory: int, name: str, size: int, sha256: str) -> None:
        self.path = path
        self.directory = directory
        self.name = name
        self.size = size
        self.sha256 = sha256
        self.temporary = f".{name[:150]}.vchan-{os.urandom(6).hex()}"
        self.used_s = time.monotonic()
        self.lock = threading.Lock()
        self.fd = -1

    def give_up(self) -> None:
        """Leave nothing behind."""
        with self.lock:
            if self.fd < 0:
                return
            os.close(self.fd)
            self.fd = -1
            try:
                os.unlink(self.temporary, dir_fd=self.directory)
            except OSError:
                pass  # its directory is gone, or it has become the file
            os.close(self.directory)


class Uploads:
    """Files that are being written. Safe from several threads.

    A part may be written twice, as a caller that heard no answer will; `end` checks the whole.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._open: dict[str, _Upload] = {}
        self._lock = threading.Lock()

    def begin(self, path: str, size: int, sha256: str, mode: int) -> dict[str, Any]:
        """Begin a file; it is there when `end` has been answered."""
        require_path(path, self._rules, self._rules.write, "write")
        _require_number("size", size, 1 << 62)
        _require_number("mode", mode, 0o777)
        if size > self._rules.write.bytes_max:
            limit = f"[write] bytes_max {self._rules.write.bytes_max}"
            raise self._rules.refuse(path, f"{size} bytes", limit)
        if not isinstance(sha256, str) or len(sha256) != 64:
            raise ValueError("sha256: expected the whole content's, 64 hexadecimal digits")
        self._drop_idle()
        parent, name = os.path.split(path)
        directory = open_directory(parent)
        upload = _Upload(path, directory, name, size, sha256.lower())
        try:
            self._require_replaceable(upload)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            upload.fd = os.open(upload.temporary, flags, 0o600, dir_fd=directory)
            os.fchmod(upload.fd, mode)
        except OSError as error:
            os.close(directory)
            raise Rejected(f"{path}: cannot be written: {error.strerror}") from error
        except Rejected:
            os.close(directory)
            raise
        key = os.urandom(8).hex()
        with self._lock:
            full = len(self._open) >= UPLOADS_MAX
            if not full:
                self._open[key] = upload
        if full:
            upload.give_up()
            raise Rejected(f"{UPLOADS_MAX} files are being written already (UPLOADS_MAX)")
        return {"id": key, "chunk_bytes_max": CHUNK_BYTES_MAX}

    @staticmethod
    def _require_replaceable(upload: _Upload) -> None:
        try:
            found = os.stat(upload.name, dir_fd=upload.directory, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISREG(found.st_mode):
            raise Rejected(f"{upload.path}: is there and is no plain file")

    def _drop_idle(self) -> None:
        now_s = time.monotonic()
        with self._lock:
            idle = [k for k, u in self._open.items() if now_s - u.used_s > UPLOAD_IDLE_S]
            dropped = [self._open.pop(key) for key in idle]
        for upload in dropped:
            upload.give_up()

    def _find(self, key: str) -> _Upload:
        upload = self._open.get(key) if isinstance(key, str) else None
        if upload is None:
            raise Rejected(f"no file is being written as {key!r}: begin again")
        upload.used_s = time.monotonic()
        return upload

    def write(self, key: str, offset: int, data: str, sha256: str) -> dict[str, Any]:
        """Write a part, in any order."""
        self._find(key)
        return {"written": self.write_raw(key, offset, decode(data), sha256)}

    def write_raw(self, key: str, offset: int, content: bytes, sha256: str) -> int:
        """The same, as bytes. Returns how many were written."""
        upload = self._find(key)
        _require_number("offset", offset, upload.size)
        if len(content) > CHUNK_BYTES_MAX:
            raise ValueError(f"data: over {CHUNK_BYTES_MAX} bytes (CHUNK_BYTES_MAX)")
        if offset + len(content) > upload.size:
            raise ValueError(f"data: ends after the {upload.size} bytes that were announced")
        if sha256 and hashlib.sha256(content).hexdigest() != sha256.lower():
            raise Rejected("data: is not what its sha256 says")
        with upload.lock:
            if upload.fd < 0:
                raise Rejected("the file was given up meanwhile")
            try:
                written = 0
                while written < len(content):
                    written += os.pwrite(upload.fd, content[written:], offset + written)
            except OSError as error:  # a full disk, say
                raise Rejected(f"{upload.path}: cannot be written: {error.strerror}") from error
        return len(content)

    def end(self, key: str) -> dict[str, Any]:
        """Have the file appear under its name, if it is what was announced."""
        upload = self._find(key)
        with upload.lock:
            problem = self._finish(upload)
        if problem:
            self.give_up(key)
            raise Rejected(f"{upload.path}: {problem}")
        with self._lock:
            self._open.pop(key, None)
        return {"path": upload.path, "size": upload.size, "sha256": upload.sha256}

    def _finish(self, upload: _Upload) -> str:
        try:
            size = os.fstat(upload.fd).st_size
            if size != upload.size:
                return f"{size} bytes were written, {upload.size} announced"
            if _digest(upload, upload.size) != upload.sha256:
                return "what was written is not what its sha256 says"
            self._require_replaceable(upload)
            os.fsync(upload.fd)
            directory = upload.directory
            os.rename(upload.temporary, upload.name, src_dir_fd=directory, dst_dir_fd=directory)
            os.fsync(directory)
        except Rejected as error:
            return str(error)
        except OSError as error:
            return f"cannot be written: {error.strerror}"
        os.close(upload.fd)
        os.close(upload.directory)
        upload.fd = -1
        return ""

    def give_up(self, key: str) -> dict[str, Any]:
        """Leave the file as it was."""
        with self._lock:
            upload = self._open.pop(key, None)
        if upload is not None:
            upload.give_up()
        return {}

    def close(self) -> None:
        """Give up everything."""
        for key in list(self._open):
            self.give_up(key)


def _digest(upload: _Upload, size: int) -> str:
    digest = hashlib.sha256()
    fd = os.open(upload.temporary, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=upload.directory)
    try:
        # The file that we wrote, and none that took its name.
        if not os.path.sameopenfile(fd, upload.fd):
            raise Rejected("its temporary file was replaced by another")
        for offset in range(0, size, CHUNK_BYTES_MAX):
            digest.update(os.pread(fd, CHUNK_BYTES_MAX, offset))
    finally:
        os.close(fd)
    return digest.hexdigest()


def decode(data: Any) -> bytes:
    """Bytes that came as base64.

    Raises:
        ValueError: They are none.
    """
    if not isinstance(data, str):
        raise ValueError("data: expected base64, as a text")  # noqa: TRY004 - as of wrong base64
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise ValueError(f"data: is no base64: {error}") from error
