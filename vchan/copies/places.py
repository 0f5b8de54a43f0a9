"""Where a file appears: whole under its name, or not at all.

It is written beside its name, as `.NAME.vchan-part`, which is renamed when all is on the disk. If
the copy is broken off, this part stays for `--resume`; nothing else is ever left behind.

Rules of this file
1. A name is used with the descriptor of its directory, and never followed if it is a link: whoever
   may change directories meanwhile, nothing is written elsewhere.
2. What is under the name already is replaced only if it is a plain file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
from typing import TYPE_CHECKING, Final

from vchan.errors import Rejected
from vchan.services.copies import DATA_BYTES_MAX, NAME_BYTES_MAX, PART_SUFFIX, EntryFacts

if TYPE_CHECKING:
    from hashlib import _Hash

RESUME_BYTES_MIN: Final = 256 * 1024
"""Of a file that is worth asking what is there of it, and keeping when a copy is broken off. Below
it: it is sent anew, which takes no longer."""
_NAME_CHARS_KEPT: Final = 150
"""Of a name that is too long to have something put before and behind it."""


def part_name(name: bytes) -> bytes:
    """What a file is called until it is whole."""
    whole = b"." + name + PART_SUFFIX
    if len(whole) <= NAME_BYTES_MAX:
        return whole
    mark = hashlib.sha256(name).hexdigest()[:16].encode()
    return b"." + name[:_NAME_CHARS_KEPT] + b"." + mark + PART_SUFFIX


def replaceable(directory: int, name: bytes) -> os.stat_result | None:
    """What is under a name that is to be written; None: nothing.

    Raises:
        Rejected: It is no plain file.
        OSError: It cannot be seen.
    """
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "no plain file"
        raise Rejected(f"is there already, and is {kind}")
    return found


def digest_of(fd: int, size: int) -> _Hash:
    """The checksum of a file's first bytes, to be gone on with.

    Raises:
        Rejected: There are fewer.
        OSError: They cannot be read.
    """
    digest = hashlib.sha256()
    at = 0
    while at < size:
        data = os.pread(fd, min(DATA_BYTES_MAX, size - at), at)
        if not data:
            raise Rejected("became shorter while it was read")
        digest.update(data)
        at += len(data)
    return digest


class NewFile:
    """A file on its way to its name.

    Raises:
        Rejected: Something else is in its place, or it is being written by another copy.
        OSError: The disk does not take it.
    """

    def __init__(self, directory: int, name: bytes) -> None:
        self._directory = directory
        self._name = name
        self._part = part_name(name)
        self._digest = hashlib.sha256()
        self.size = 0
        """Bytes that are there."""
        self._replaced = replaceable(directory, name)
        self._fd = self._claim()

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            return os.open(self._part, flags, 0o600, dir_fd=self._directory)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise Rejected(_IN_THE_WAY.format(os.fsdecode(self._part))) from error
            raise

    def _claim(self) -> int:
        """A descriptor of the part, which is ours alone."""
        fd = self._open()
        try:
            found = self._require_ours(fd)
            if found.st_mode & 0o077:  # killed at its very end: others may have it open already
                os.unlink(self._part, dir_fd=self._directory)
        except BaseException:
            os.close(fd)
            raise
        if found.st_mode & 0o077:
            os.close(fd)
            return self._claim()
        self.size = found.st_size
        return fd

    def _require_ours(self, fd: int) -> os.stat_result:
        found = os.fstat(fd)
        is_ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
        if not is_ours or found.st_nlink > 1:
            raise Rejected(_IN_THE_WAY.format(os.fsdecode(self._part)))
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Rejected("another copy is writing it") from None
        try:  # the other copy may have given it its name, between our opening and our lock
            named = os.stat(self._part, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            raise Rejected("another copy has just written it") from None
        if not os.path.samestat(named, found):
            raise Rejected("another copy is writing it")
        return found

    def held(self, size_max: int) -> bytes:
        """What is there of it from before, at most `size_max` bytes, as a checksum; `size` says how
        many they are."""
        if self.size > size_max:
            self.size = 0
        self._digest = digest_of(self._fd, self.size)
        return self._digest.digest()

    def begin(self, offset: int) -> None:
        """It is written from there on: behind what is held, or anew."""
        if offset != self.size or not offset:
            self._digest = hashlib.sha256()
            self.size = 0
        os.ftruncate(self._fd, self.size)
        os.lseek(self._fd, self.size, os.SEEK_SET)

    def write(self, data: bytes) -> None:
        """The next bytes."""
        self._digest.update(data)
        left = memoryview(data)
        while left:
            left = left[os.write(self._fd, left) :]
        self.size += len(data)

    def appear(self, sha256: bytes, facts: EntryFacts, umask: int, *, keeps: bool) -> None:
        """Have it under its name; the directory is not yet on the disk.

        Raises:
            Rejected: It is not what was sent. Nothing has changed.
            OSError: The disk does not take it. Nothing has changed.
        """
        if self._digest.digest() != sha256:
            raise Rejected("what was written is not what its checksum says")
        if keeps:
            give(self._fd, facts)
        elif self._replaced is not None:  # as if it had been written into that one
            _own(self._fd, self._replaced.st_uid, self._replaced.st_gid)
            os.fchmod(self._fd, self._replaced.st_mode & 0o777)
        else:
            os.fchmod(self._fd, facts.mode & ~umask)
        os.fsync(self._fd)
        replaceable(self._directory, self._name)
        os.rename(self._part, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        os.close(self._fd)

    def keep(self) -> None:
        """The copy was broken off: what is worth it stays, for --resume."""
        if self.size < RESUME_BYTES_MIN:
            self.discard()
        else:
            os.close(self._fd)

    def discard(self) -> None:
        """DirectoryEnd nothing behind."""
        try:
            os.unlink(self._part, dir_fd=self._directory)
        except OSError:
            pass  # its directory is gone, or its disk takes nothing any more
        os.close(self._fd)


_IN_THE_WAY: Final = "{} is in its way, and is no part of a copy by this user: remove it"


def give(fd: int, facts: EntryFacts) -> None:
    """Have a file or directory be as the one that was copied; the owner, where permitted."""
    _own(fd, facts.uid, facts.gid)
    os.fchmod(fd, facts.mode)
    os.utime(fd, ns=(facts.modified_ns, facts.modified_ns))


def _own(fd: int, uid: int, gid: int) -> None:
    try:
        os.fchown(fd, uid, gid)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EINVAL):
            raise
        # Only root may, and not of users that its namespace does not have: then it is our own.


def sync_directory(fd: int) -> None:
    """Have the names in it on the disk, as far as its file system can."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
