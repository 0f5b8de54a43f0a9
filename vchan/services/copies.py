"""What is said to the service `files`: a tree of files, one way or the other, in a byte stream.

Rules of this file
1. No I/O, no clock.
2. Whatever a peer sends gives messages, or `CopyFault` with what is wrong; what `CopyReader` holds
   is bounded.
3. A name is a name: never a path, never `.` or `..`, never what could be a part of a copy.

    who asks  --- CopyRequest -->      let me have this tree; or: take the tree that I send
    is asked  --- CopyReady, CopyRefusal -->
    sender    --- DirectoryEntry, FileEntry, FileData, FileWhole, DirectoryEnd ... TreeEnd -->
    receiver  --- Have, EntryFailed ... TreeDone -->
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from struct import Struct
from typing import Final, NamedTuple

from vchan.errors import VchanError
from vchan.services.framing import (
    PAYLOAD_BYTES_MAX,
    BadFrame,
    FrameReader,
    ServiceFrame,
    encode_frame,
)

VERSION: Final = 1
"""The newest and (so far) the oldest version of this protocol that this code speaks."""
NAME_BYTES_MAX: Final = 255
"""A name in a directory: Linux's own limit (NAME_MAX). At it: CopyFault."""
PATH_BYTES_MAX: Final = 4096
"""A path: Linux's own limit (PATH_MAX). At it: CopyFault."""
TEXT_BYTES_MAX: Final = PATH_BYTES_MAX + 512
"""What went wrong: a path, and why. At it: the rest is cut."""
DATA_BYTES_MAX: Final = PAYLOAD_BYTES_MAX
"""Bytes of a file in one message: read and written at once. At it: they go as several."""
SIZE_MAX: Final = 2**62
"""Bytes of a file: more than any file system has. At it: CopyFault."""
MODE_MAX: Final = 0o777
"""Who may do what with a file. The bits above (set-user-id and others) are never copied: a guest is
not to make programs of root's on its host. At it: CopyFault."""
_NOBODY: Final = 2**32 - 1  # to the kernel it is no number of a user, but "as it is"
PART_SUFFIX: Final = b".vchan-part"
"""What the name of a file ends with that is not whole yet; nothing else is ever called so."""

RECURSIVE: Final = 1
RESUME: Final = 2
INTO: Final = 4
KEEP: Final = 8
ASK: Final = 1
"""A file's flag."""

_REQUEST: Final = Struct(">BBH")  # version, flags, length of the name; name, path
_DIRECTORY: Final = Struct(">HIIq")  # facts; name
_FILE: Final = Struct(">BHIIqQ")  # flags, facts, size; name
_BEGIN: Final = Struct(">Q")  # offset
_WHOLE: Final = Struct(">32s")  # SHA-256
_LEFT_OUT: Final = Struct(">H")  # length of the name; name, text
_HAVE: Final = Struct(">QQ32s")  # entry, offset, SHA-256
_FAILED: Final = Struct(">Q")  # entry; text
_DONE: Final = Struct(">QQ")  # files, bytes


class CopyFault(VchanError):
    """The other end said what no end of a copy says."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the other end broke the protocol of copies: {what}")


class EntryFacts(NamedTuple):
    """What a file or directory is like, beside its content."""

    mode: int
    uid: int
    gid: int
    modified_ns: int


class CopyRequest(NamedTuple):
    """Have a tree sent (`is_put`: received).

    Attributes:
        flags: RECURSIVE: directories, too. RESUME: what is there already need not come again. INTO:
            the path is a directory, and the tree appears in it. KEEP: mode, owner and date stay.
        name: What the tree is called, if it appears in the directory that `path` is.
    """

    is_put: bool
    version: int
    flags: int
    name: bytes
    path: bytes


class CopyReady(NamedTuple):
    """The request is granted: the tree follows, or may be sent."""


class CopyRefusal(NamedTuple):
    """It is not."""

    text: str


class DirectoryEntry(NamedTuple):
    """What follows is in this directory, until DirectoryEnd."""

    facts: EntryFacts
    name: bytes


class DirectoryEnd(NamedTuple):
    """The directory is over."""


class FileEntry(NamedTuple):
    """A file. `flags` ASK: say what you have of it already."""

    flags: int
    facts: EntryFacts
    size: int
    name: bytes


class FileBegin(NamedTuple):
    """To a Have: the bytes follow from there on."""

    offset: int


class FileData(NamedTuple):
    """The file's next bytes."""

    data: bytes


class FileWhole(NamedTuple):
    """These were all of the file's, with the checksum of the whole."""

    sha256: bytes


class FileBroken(NamedTuple):
    """The file will not be whole; "" if its receiver has said so itself."""

    text: str


class LeftOut(NamedTuple):
    """Something in this directory is not sent, and why."""

    name: bytes
    text: str


class TreeEnd(NamedTuple):
    """Nothing more of this tree."""


class Have(NamedTuple):
    """Of the file `entry` these many bytes are there, with their checksum."""

    entry: int
    offset: int
    sha256: bytes


class EntryFailed(NamedTuple):
    """The entry could not be written; a directory: with all that is in it."""

    entry: int
    text: str


class TreeDone(NamedTuple):
    """Everything that has not failed is on the disk."""

    files: int
    bytes: int


CopyMessage = (
    CopyRequest
    | CopyReady
    | CopyRefusal
    | DirectoryEntry
    | DirectoryEnd
    | FileEntry
    | FileBegin
    | FileData
    | FileWhole
    | FileBroken
    | LeftOut
    | TreeEnd
    | Have
    | EntryFailed
    | TreeDone
)


def name_problem(name: bytes) -> str:
    """Why this is no name of something in a directory; "" if it is one."""
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        return "is no name"
    if len(name) > NAME_BYTES_MAX:
        return f"is longer than {NAME_BYTES_MAX} bytes"
    if name.endswith(PART_SUFFIX):
        return f"ends with {PART_SUFFIX.decode()}: a part of a copy that was broken off"
    return ""


# ---------------------------------------------------------------- bytes out


def encode_copy(message: CopyMessage) -> bytes:
    """The bytes of a message, whose parts are within their limits."""
    if isinstance(message, CopyRequest) and message.is_put:
        return encode_frame(_PUT, _payload(message))
    return encode_frame(_KINDS[type(message)], _payload(message))


def _payload(message: CopyMessage) -> bytes:
    match message:
        case FileData(data):
            return data
        case FileEntry(flags, facts, size, name):
            return _FILE.pack(flags, *facts, size) + name
        case FileWhole(sha256):
            return _WHOLE.pack(sha256)
        case DirectoryEntry(facts, name):
            return _DIRECTORY.pack(*facts) + name
        case CopyRequest(_, version, flags, name, path):
            return _REQUEST.pack(version, flags, len(name)) + name + path
        case FileBegin(offset):
            return _BEGIN.pack(offset)
        case Have():
            return _HAVE.pack(*message)
        case LeftOut(name, text):
            return _LEFT_OUT.pack(len(name)) + name + _cut(text)
        case EntryFailed(entry, text):
            return _FAILED.pack(entry) + _cut(text)
        case TreeDone():
            return _DONE.pack(*message)
        case CopyRefusal(text) | FileBroken(text):
            return _cut(text)
        case CopyReady() | DirectoryEnd() | TreeEnd():
            return b""


def _cut(text: str) -> bytes:
    return text.encode("utf-8", "replace")[:TEXT_BYTES_MAX].decode("utf-8", "ignore").encode()


# ---------------------------------------------------------------- bytes in


class CopyReader:
    """Bytes in, messages out."""

    def __init__(self) -> None:
        self._frames = FrameReader()

    @property
    def has_rest(self) -> bool:
        """A message has begun and is not whole."""
        return self._frames.has_rest

    def feed(self, data: bytes) -> Iterator[CopyMessage]:
        """The messages that these bytes complete.

        Raises:
            CopyFault: They complete none. Nothing that comes behind them means anything.
        """
        try:
            frames = self._frames.feed(data)
        except BadFrame as error:
            raise CopyFault(str(error)) from error
        return map(decode_copy, frames)


def decode_copy(frame: ServiceFrame) -> CopyMessage:
    """The message in a frame.

    Raises:
        CopyFault: It is none.
    """
    kind, body = frame
    reader = _READERS.get(kind)
    message = None if reader is None else reader(body)
    if message is None:
        raise CopyFault(f"kind {kind}, {len(body)} bytes: no message")
    return message


def _request(body: bytes, *, is_put: bool) -> CopyRequest | None:
    if len(body) < _REQUEST.size:
        return None
    version, flags, name_bytes = _REQUEST.unpack_from(body)
    middle = _REQUEST.size + name_bytes
    name, path = body[_REQUEST.size : middle], body[middle:]
    if version == VERSION:  # what later ones have in these places is not for us to judge
        is_named = not name_problem(name) if is_put else not name
        is_path = path.startswith(b"/") and b"\0" not in path and len(path) <= PATH_BYTES_MAX
        if not is_named or not is_path:
            return None
    return CopyRequest(is_put, version, flags, name, path)


def _facts(mode: int, uid: int, gid: int, modified_ns: int) -> EntryFacts | None:
    is_known = mode <= MODE_MAX and uid < _NOBODY > gid
    return EntryFacts(mode, uid, gid, modified_ns) if is_known else None


def _directory(body: bytes) -> DirectoryEntry | None:
    if len(body) < _DIRECTORY.size:
        return None
    facts, name = _facts(*_DIRECTORY.unpack_from(body)), body[_DIRECTORY.size :]
    if facts is None or (name and name_problem(name)):
        return None
    return DirectoryEntry(facts, name)


def _file(body: bytes) -> FileEntry | None:
    if len(body) < _FILE.size:
        return None
    flags, *numbers, size = _FILE.unpack_from(body)
    facts, name = _facts(*numbers), body[_FILE.size :]
    if facts is None or size > SIZE_MAX or (name and name_problem(name)):
        return None
    return FileEntry(flags, facts, size, name)


def _left_out(body: bytes) -> LeftOut | None:
    if len(body) < _LEFT_OUT.size:
        return None
    middle = _LEFT_OUT.size + _LEFT_OUT.unpack_from(body)[0]
    name = body[_LEFT_OUT.size : middle]
    if len(body) < middle or not name or len(name) > NAME_BYTES_MAX:
        return None
    return LeftOut(name, _text(body[middle:]))


def _text(body: bytes) -> str:
    return body[:TEXT_BYTES_MAX].decode("utf-8", "replace")


def _failed(body: bytes) -> EntryFailed | None:
    if len(body) < _FAILED.size:
        return None
    return EntryFailed(_FAILED.unpack_from(body)[0], _text(body[_FAILED.size :]))


def _begin(body: bytes) -> FileBegin | None:
    return FileBegin(*_BEGIN.unpack(body)) if len(body) == _BEGIN.size else None


def _whole(body: bytes) -> FileWhole | None:
    return FileWhole(*_WHOLE.unpack(body)) if len(body) == _WHOLE.size else None


def _have(body: bytes) -> Have | None:
    return Have(*_HAVE.unpack(body)) if len(body) == _HAVE.size else None


def _done(body: bytes) -> TreeDone | None:
    return TreeDone(*_DONE.unpack(body)) if len(body) == _DONE.size else None


_GET, _PUT = 1, 2
_KINDS: Final[dict[type[CopyMessage], int]] = {
    CopyRequest: _GET,
    CopyReady: 3,
    CopyRefusal: 4,
    DirectoryEntry: 5,
    DirectoryEnd: 6,
    FileEntry: 7,
    FileBegin: 8,
    FileData: 9,
    FileWhole: 10,
    FileBroken: 11,
    LeftOut: 12,
    TreeEnd: 13,
    Have: 14,
    EntryFailed: 15,
    TreeDone: 16,
}
_READERS: Final[dict[int, Callable[[bytes], CopyMessage | None]]] = {
    _GET: partial(_request, is_put=False),
    _PUT: partial(_request, is_put=True),
    3: lambda body: None if body else CopyReady(),
    4: lambda body: CopyRefusal(_text(body)),
    5: _directory,
    6: lambda body: None if body else DirectoryEnd(),
    7: _file,
    8: _begin,
    9: lambda body: FileData(body) if body else None,
    10: _whole,
    11: lambda body: FileBroken(_text(body)),
    12: _left_out,
    13: lambda body: None if body else TreeEnd(),
    14: _have,
    15: _failed,
    16: _done,
}
