"""The order in which a tree is sent, and what is said to it: for both ends.

Rules of this file
1. No I/O, no clock: an end encodes what its own side says and judges what the other side said.
2. What the other side may say next is known at every step; anything else is `CopyFault`, and the
   copy is over. So who writes files sees only what may be: one root, names below it, no byte more
   than a file's size, an end for every file and directory.

    sending = SendingEnd()                    receiving = ReceivingEnd(...)
    pipe.write(sending.file(...))             for message in reader.feed(data):
    pipe.write(sending.data(...))                 receiving.heed(message)
    sending.heed(reply)                           ... what it means for the disk
"""

from __future__ import annotations

import enum
from typing import Final

from vchan.services.copies import (
    ASK,
    CopyFault,
    CopyMessage,
    DirectoryEnd,
    DirectoryEntry,
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
    encode_copy,
)

DEPTH_MAX: Final = 64
"""Directories in each other. Both ends hold a descriptor for each. At it: what is deeper is left
out, and said so; from a peer it is a CopyFault."""


class CopyPhase(enum.Enum):
    """Of a tree on its way."""

    ENTRIES = "an entry is next, or the end of a directory"
    ASKED = "a file's sender waits to hear what is there already"
    ANSWERED = "it has heard that, and says where it begins"
    BYTES = "a file's bytes are next, or its end"
    ENDED = "there is nothing more"
    DONE = "and the receiver has all of it"


class _Order:
    """Where in a tree its sender is: both ends count the same."""

    def __init__(self) -> None:
        self.phase = CopyPhase.ENTRIES
        self.entry = -1  # the number of the last file or directory
        self.depth = 0
        self.at = 0  # bytes of the file
        self._size = 0

    def advance(self, message: CopyMessage) -> None:
        """The sender said this.

        Raises:
            CopyFault: It may not be said here.
        """
        match message:
            case DirectoryEntry(_, name):
                self._enter(name)
                self.depth += 1
                self._require(self.depth <= DEPTH_MAX, message, "DEPTH_MAX")
            case DirectoryEnd():
                self._require(self.phase is CopyPhase.ENTRIES and self.depth > 0, message)
                self.depth -= 1
            case FileEntry(flags, _, size, name):
                self._enter(name)
                self.phase = CopyPhase.ASKED if flags & ASK else CopyPhase.BYTES
                self.at, self._size = 0, size
            case FileBegin(offset):
                self._require(self.phase is CopyPhase.ANSWERED, message)
                self._require(offset in (0, self.at), message, "nobody has that")
                self.phase, self.at = CopyPhase.BYTES, offset
            case FileData(data):
                self._require(self.phase is CopyPhase.BYTES, message)
                self.at += len(data)
                self._require(self.at <= self._size, message, "more bytes than the file's size")
            case FileWhole():
                self._require(self.phase is CopyPhase.BYTES, message)
                self._require(self.at == self._size, message, "fewer bytes than the file's size")
                self.phase = CopyPhase.ENTRIES
            case FileBroken():
                self._require(self.phase in _IN_A_FILE, message)
                self.phase = CopyPhase.ENTRIES
            case LeftOut():
                self._require(self.phase is CopyPhase.ENTRIES and self.depth > 0, message)
            case TreeEnd():
                is_whole = self.depth == 0 and self.entry >= 0
                self._require(self.phase is CopyPhase.ENTRIES and is_whole, message)
                self.phase = CopyPhase.ENDED
            case _:
                self._require(False, message)

    def _enter(self, name: bytes) -> None:
        """A file or directory begins: the root, which has no name, or what is in a directory."""
        is_next = self.phase is CopyPhase.ENTRIES and (self.depth > 0 or self.entry < 0)
        if not is_next or bool(name) != (self.depth > 0):
            raise CopyFault("an entry out of place, or a name where none may be")
        self.entry += 1

    def have(self, offset: int) -> None:
        """The receiver has said how much of the file it has.

        Raises:
            CopyFault: Nobody has asked, or the file has less.
        """
        if self.phase is not CopyPhase.ASKED or offset > self._size:
            raise CopyFault("Have: nobody asked that, or the file has less")
        self.phase, self.at = CopyPhase.ANSWERED, offset

    @staticmethod
    def _require(is_so: bool, message: CopyMessage, why: str = "out of place") -> None:
        if not is_so:
            raise CopyFault(f"{type(message).__name__}: {why}")


_IN_A_FILE: Final = (CopyPhase.ASKED, CopyPhase.ANSWERED, CopyPhase.BYTES)


class SendingEnd:
    """Who sends a tree. What it says goes out in the order of the calls."""

    def __init__(self) -> None:
        self._order = _Order()
        self._live: list[int] = []  # the directories that we are in, and the file
        self._failed: set[int] = set()  # of these, what the receiver gave up
        self.failures = 0
        """Entries that the receiver could not write."""
        self.done: TreeDone | None = None

    @property
    def depth(self) -> int:
        """Directories that we are in."""
        return self._order.depth

    @property
    def has_failed(self) -> bool:
        """The receiver has given up what is sent now, or a directory that it is in."""
        return bool(self._failed)

    @property
    def waits(self) -> bool:
        """Nothing of the file may be said before the receiver has."""
        return self._order.phase is CopyPhase.ASKED and not self._failed

    def say(self, message: CopyMessage) -> bytes:
        """The bytes of what is said next.

        Raises:
            CopyFault: Our own code is wrong.
        """
        self._order.advance(message)
        match message:
            case DirectoryEntry() | FileEntry():
                self._live.append(self._order.entry)
            case DirectoryEnd() | FileWhole() | FileBroken():
                self._failed.discard(self._live.pop())
            case _:
                pass
        return encode_copy(message)

    def heed(self, reply: CopyMessage) -> None:
        """Take what the receiver says.

        Raises:
            CopyFault: No receiver says that here.
        """
        match reply:
            case Have(entry, offset):
                if entry != self._order.entry:
                    raise CopyFault("Have: of another file than the one that was asked about")
                self._order.have(offset)
            case EntryFailed(entry):
                self.failures += 1
                if entry > self._order.entry or self.failures > self._order.entry + 1:
                    raise CopyFault("EntryFailed: of what was never sent, or again")
                if entry in self._live:
                    self._failed.add(entry)
            case TreeDone():
                if self._order.phase is not CopyPhase.ENDED:
                    raise CopyFault("TreeDone: before the end")
                self._order.phase = CopyPhase.DONE
                self.done = reply
            case _:
                raise CopyFault(f"{type(reply).__name__}: no receiver says that")


class ReceivingEnd:
    """Who receives a tree: `heed` each message, in order, before it is acted on.

    Args:
        takes_directories: They were asked for.
        resumes: The sender may ask what is there already. Otherwise that is none of its business.
    """

    def __init__(self, *, takes_directories: bool, resumes: bool) -> None:
        self._order = _Order()
        self._takes_directories = takes_directories
        self._resumes = resumes

    @property
    def entry(self) -> int:
        """The number of the file or directory that began last."""
        return self._order.entry

    @property
    def is_ended(self) -> bool:
        """The sender has said all."""
        return self._order.phase is CopyPhase.ENDED

    def heed(self, message: CopyMessage) -> None:
        """Take what the sender says.

        Raises:
            CopyFault: No sender says that here.
        """
        if isinstance(message, DirectoryEntry) and not self._takes_directories:
            raise CopyFault("DirectoryEntry: a file was asked for")
        if isinstance(message, FileEntry) and message.flags & ASK and not self._resumes:
            raise CopyFault("FileEntry: asks what is there already, without RESUME")
        self._order.advance(message)

    def have(self, offset: int, sha256: bytes) -> bytes:
        """What to answer to a file's ASK: that many bytes are here."""
        self._order.have(offset)
        return encode_copy(Have(self.entry, offset, sha256))

    def failed(self, entry: int, text: str) -> bytes:
        """What to say of an entry that cannot be written."""
        assert entry <= self.entry
        return encode_copy(EntryFailed(entry, text))

    def done(self, files: int, size: int) -> bytes:
        """What to say when everything is on the disk."""
        assert self.is_ended
        self._order.phase = CopyPhase.DONE
        return encode_copy(TreeDone(files, size))
