"""Trees of files from one disk to another, over a socket: what appears, and what does not."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from vchan.copies import trees
from vchan.copies.pipe import CopyBroken, CopyPipe
from vchan.copies.places import RESUME_BYTES_MIN, NewFile, part_name
from vchan.copies.trees import (
    Everything,
    TreePlace,
    TreeReceiver,
    TreeSender,
    open_entry,
)
from vchan.errors import Rejected
from vchan.services.copies import (
    ASK,
    DATA_BYTES_MAX,
    NAME_BYTES_MAX,
    CopyFault,
    CopyMessage,
    DirectoryEnd,
    DirectoryEntry,
    EntryFacts,
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
from vchan.services.copy_order import DEPTH_MAX

WAIT_S = 30.0
FACTS = EntryFacts(0o644, 0, 0, 1_700_000_000_000_000_000)
PART = part_name(b"x").decode()


class Seen:
    """A watcher."""

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}
        self.heard: list[str] = []
        self.steps: list[tuple[str, int, int]] = []
        self.at_each_move: Callable[[], object] = lambda: None

    def left_out(self, path: bytes, text: str) -> None:
        assert os.fsdecode(path) not in self.problems, "said once"
        self.problems[os.fsdecode(path)] = text

    def failed(self, text: str) -> None:
        self.heard.append(text)

    def begins(self, path: bytes, at: int, size: int) -> None:
        self.steps.append((os.fsdecode(path), at, size))

    def moved(self, count: int) -> None:
        path, at, size = self.steps[-1]
        self.steps.append((path, at + count, size))
        self.at_each_move()


class Copy:
    """A copy from one directory to another."""

    def __init__(self, source: Path, parent: Path, name: str = "x") -> None:
        self.source = source
        self.parent = parent
        self.name = name
        self.sent = Seen()
        self.got = Seen()
        self.permits_reading = Everything()
        self.permits_writing = Everything()
        self.problems: list[Exception] = []
        self.through = 0  # bytes that the receiver has read

    def run(
        self,
        *,
        resumes: bool = False,
        keeps: bool = False,
        takes_directories: bool = True,
        cut_at: int | None = None,
        umask: int = 0o022,
    ) -> TreeDone | None:
        """Both ends, to their end; None if they did not come to it."""
        ours, theirs = socket.socketpair()
        outcome: list[TreeDone] = []

        def send() -> None:
            pipe = CopyPipe(ours)
            fd = open_entry(None, os.fsencode(self.source))
            try:
                sender = TreeSender(pipe, self.permits_reading, self.sent, resumes=resumes)
                outcome.append(sender.send(fd, os.fsencode(self.source)))
            except (CopyBroken, CopyFault) as error:
                self.problems.append(error)
            finally:
                os.close(fd)
                pipe.close()

        thread = threading.Thread(target=send)
        thread.start()
        pipe = CopyPipe(theirs)
        if cut_at is not None:
            self._cut(pipe, cut_at)
        directory = os.open(self.parent, os.O_RDONLY)
        try:
            TreeReceiver(
                pipe,
                TreePlace(directory, self.name.encode(), os.fsencode(self.parent / self.name)),
                self.permits_writing,
                self.got,
                takes_directories=takes_directories,
                resumes=resumes,
                keeps=keeps,
                umask=umask,
            ).receive()
        except (CopyBroken, CopyFault) as error:
            self.problems.append(error)
        finally:
            pipe.close()
            os.close(directory)
        thread.join(WAIT_S)
        assert not thread.is_alive()
        return outcome[0] if outcome else None

    def _cut(self, pipe: CopyPipe, cut_at: int) -> None:
        received = pipe._received

        def cut() -> bytes | None:
            data = received()
            self.through += len(data or b"")
            if self.through >= cut_at:
                raise CopyBroken("cut")
            return data

        pipe._received = cut  # type: ignore[method-assign]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = tmp_path / "source"
    made.mkdir()
    return made


@pytest.fixture
def target(tmp_path: Path) -> Path:
    made = tmp_path / "target"
    made.mkdir()
    return made


def fill(path: Path, size: int, seed: int = 1) -> bytes:
    content = random.Random(seed).randbytes(size)
    path.write_bytes(content)
    return content


def tree(root: Path) -> dict[str, bytes | None]:
    """Everything in it, with what the files have."""
    return {
        str(each.relative_to(root)): None if each.is_dir() else each.read_bytes()
        for each in sorted(root.rglob("*"))
    }


# ---------------------------------------------------------------- it is there, whole


@pytest.mark.parametrize("size", [0, 1, DATA_BYTES_MAX, DATA_BYTES_MAX + 1, 3_000_000])
def test_a_file_comes_over(source: Path, target: Path, size: int) -> None:
    content = fill(source / "f", size)
    copy = Copy(source / "f", target)
    assert copy.run() == TreeDone(1, size)
    assert tree(target) == {"x": content}
    assert copy.sent.problems == copy.got.problems == {}
    for seen in (copy.sent, copy.got):
        assert [done for _, done, _ in seen.steps] == sorted(done for _, done, _ in seen.steps)
        assert seen.steps[-1][1:] == (size, size)


def test_a_tree_comes_over(source: Path, target: Path) -> None:
    (source / "a" / "b").mkdir(parents=True)
    (source / "empty").mkdir()
    for number in range(40):
        fill(source / "a" / f"{number}", number * 3000, number)
    fill(source / "a" / "b" / "deep", 100)
    os.close(os.open(os.fsencode(source) + b"/\xff\xfe odd\n", os.O_CREAT))
    copy = Copy(source, target)
    done = copy.run()
    assert done is not None and done.files == 42
    assert tree(target / "x") == tree(source)


def test_what_there_is_besides_stays(source: Path, target: Path) -> None:
    (target / "x" / "a").mkdir(parents=True)
    (target / "x" / "a" / "old").write_text("old")
    (target / "x" / "a" / "new").write_text("is replaced")
    (source / "a").mkdir()
    (source / "a" / "new").write_text("new")
    Copy(source, target).run()
    assert tree(target / "x") == {"a": None, "a/old": b"old", "a/new": b"new"}


def test_until_it_is_whole_the_old_one_is_there(source: Path, target: Path) -> None:
    content = fill(source / "f", 3_000_000)
    (target / "x").write_bytes(b"old")
    seen: list[bytes] = []
    copy = Copy(source / "f", target)
    copy.got.at_each_move = lambda: seen.append((target / "x").read_bytes())
    copy.run()
    assert len(seen) > 10 and set(seen) == {b"old"}
    assert (target / "x").read_bytes() == content


# ---------------------------------------------------------------- what it is like


@pytest.mark.parametrize(("mode", "umask", "expected"), [(0o777, 0o027, 0o750), (0o604, 0, 0o604)])
def test_a_new_files_mode_is_the_sent_ones_under_the_umask(
    source: Path, target: Path, mode: int, umask: int, expected: int
) -> None:
    fill(source / "f", 10)
    (source / "f").chmod(mode)
    Copy(source / "f", target).run(umask=umask)
    assert stat.S_IMODE((target / "x").stat().st_mode) == expected


def test_what_is_replaced_gives_its_mode(source: Path, target: Path) -> None:
    fill(source / "f", 10)
    (source / "f").chmod(0o644)
    (target / "x").write_text("a secret")
    (target / "x").chmod(0o600)
    Copy(source / "f", target).run()
    assert stat.S_IMODE((target / "x").stat().st_mode) == 0o600


def test_mode_and_date_are_kept_if_they_are_to_be(source: Path, target: Path) -> None:
    (source / "d").mkdir()
    fill(source / "d" / "f", 10)
    (source / "d" / "f").chmod(0o461)
    os.utime(source / "d" / "f", ns=(1, 1_234_567_891_234_567_891))
    (source / "d").chmod(0o510)
    os.utime(source / "d", ns=(1, 987_654_321_000_000_000))
    Copy(source, target).run(keeps=True, umask=0o077)
    for name in ("d", "d/f"):
        sent, got = (source / name).stat(), (target / "x" / name).stat()
        assert (got.st_mode, got.st_mtime_ns) == (sent.st_mode, sent.st_mtime_ns)
    (source / "d").chmod(0o700)
    (target / "x" / "d").chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_root_keeps_the_owner(source: Path, target: Path) -> None:
    fill(source / "f", 10)
    os.chown(source / "f", 1234, 4321)
    Copy(source / "f", target).run(keeps=True)
    found = (target / "x").stat()
    assert (found.st_uid, found.st_gid) == (1234, 4321)
    Copy(source / "f", target, "y").run()
    assert (target / "y").stat().st_uid == 0
    os.chown(target / "y", 77, 78)
    Copy(source / "f", target, "y").run()
    assert (target / "y").stat().st_uid == 77, "as if it had been written into"


def test_who_may_not_give_it_away_has_it(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refuse)
    content = fill(source / "f", 10)
    copy = Copy(source / "f", target)
    copy.run(keeps=True)
    assert tree(target) == {"x": content} and copy.got.problems == {}


def test_set_user_id_is_never_copied(source: Path, target: Path) -> None:
    fill(source / "f", 10)
    (source / "f").chmod(0o6755)
    Copy(source / "f", target).run(keeps=True)
    assert stat.S_IMODE((target / "x").stat().st_mode) == 0o755


# ---------------------------------------------------------------- what is left out


def test_what_is_no_file_is_left_out_and_said(source: Path, target: Path) -> None:
    (source / "link").symlink_to("/etc/passwd")
    (source / "directory link").symlink_to("/etc")
    os.mkfifo(source / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(source / "socket"))
        if os.geteuid() == 0:
            os.mknod(source / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        fill(source / "f", 10)
        fill(source / PART, 10)
        copy = Copy(source, target)
        assert copy.run() == TreeDone(1, 10)
    assert list(tree(target / "x")) == ["f"]
    expected = {
        "link": "is a symbolic link",
        "directory link": "is a symbolic link",
        "pipe": "is a pipe",
        "socket": "is a socket",
        PART: "ends with .vchan-part: a part of a copy that was broken off",
    }
    if os.geteuid() == 0:
        expected["device"] = "is a device"
    for seen, root in ((copy.sent, source), (copy.got, target / "x")):
        assert seen.problems == {str(root / name): text for name, text in expected.items()}


def test_what_is_too_deep_is_left_out(source: Path, target: Path) -> None:
    deep = source / "/".join(["d"] * (DEPTH_MAX + 1))
    deep.mkdir(parents=True)
    fill(deep.parent.parent / "f", 10)
    copy = Copy(source, target)
    assert copy.run() == TreeDone(1, 10)
    (problem,) = copy.got.problems.values()
    assert "DEPTH_MAX" in problem


class Denying(Everything):
    """Denies one name."""

    def __init__(self, name: str, bytes_max: int = 1 << 40) -> None:
        self.bytes_max = bytes_max
        self._name = os.fsencode(name)

    def problem(self, path: bytes, *, is_directory: bool) -> str:
        return "is not allowed" if path.endswith(b"/" + self._name) else ""


def test_what_may_not_be_read_is_left_out(source: Path, target: Path) -> None:
    (source / "secret").mkdir()
    fill(source / "secret" / "f", 10)
    fill(source / "large", 101)
    fill(source / "small", 100)
    copy = Copy(source, target)
    copy.permits_reading = Denying("secret", 100)
    copy.run()
    assert list(tree(target / "x")) == ["small"]
    assert copy.got.problems == {
        str(target / "x" / "secret"): "is not allowed",
        str(target / "x" / "large"): "has 101 bytes, 100 are allowed (bytes_max)",
    }


def test_what_may_not_be_written_fails_and_the_rest_goes_on(source: Path, target: Path) -> None:
    for name in ("a", "denied", "z"):
        (source / name).mkdir()
        fill(source / name / "small", 100)
        fill(source / name / "large", 400_000)
    copy = Copy(source, target)
    copy.permits_writing = Denying("denied", 300_000)
    copy.run()
    assert list(tree(target / "x")) == ["a", "a/small", "z", "z/small"]
    limit = "has 400000 bytes, 300000 are allowed (bytes_max)"
    where = target / "x"
    expected = {
        f"{where}/denied": "is not allowed",
        f"{where}/a/large": limit,
        f"{where}/z/large": limit,
    }
    assert copy.got.problems == expected
    assert sorted(copy.sent.heard) == sorted(f"{p}: {text}" for p, text in expected.items())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: path.mkdir(), "is there already, and is a directory"),
        (lambda path: path.symlink_to("nowhere"), "is there already, and is no plain file"),
        (os.mkfifo, "is there already, and is no plain file"),
    ],
)
def test_what_is_in_the_way_stays(
    source: Path, target: Path, make: Callable[[Path], object], text: str
) -> None:
    fill(source / "f", 10)
    make(target / "x")
    copy = Copy(source / "f", target)
    copy.run()
    assert copy.got.problems == {str(target / "x"): text}
    assert [each.name for each in target.iterdir()] == ["x"]
    assert not (target / "x").is_file()


def test_a_directory_where_there_is_a_file_or_a_link(source: Path, target: Path) -> None:
    (source / "d").mkdir()
    fill(source / "d" / "f", 10)
    (target / "x").mkdir()
    for is_link in (False, True):
        if is_link:
            (target / "x" / "d").symlink_to("/tmp")
        else:
            (target / "x" / "d").write_text("x")
        copy = Copy(source, target)
        copy.run()
        assert copy.got.problems == {str(target / "x" / "d"): "is a symbolic link, or no directory"}
        (target / "x" / "d").unlink()


def test_a_file_that_changes_meanwhile_does_not_appear(source: Path, target: Path) -> None:
    path = source / "f"
    fill(path, 3_000_000)

    def change(action: Callable[[], object]) -> dict[str, str]:
        copy = Copy(path, target)
        copy.sent.at_each_move = action
        copy.run()
        assert copy.sent.problems == {str(path): copy.got.problems[str(target / "x")]}
        assert list(target.iterdir()) == []
        return copy.got.problems

    assert "changed" in str(change(lambda: os.utime(path)))
    assert "shorter" in str(change(lambda: os.truncate(path, DATA_BYTES_MAX + 5)))


def test_a_file_with_more_than_its_size_says(target: Path) -> None:
    copy = Copy(Path("/proc/self/status"), target)
    copy.run()
    assert "more bytes than its size says" in copy.got.problems[str(target / "x")]
    assert list(target.iterdir()) == []


# ---------------------------------------------------------------- the disk does not take it


def test_a_full_disk_leaves_nothing_and_the_rest_goes_on(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def full(fd: int, data: bytes) -> int:
        if os.fstat(fd).st_size >= 500_000:
            raise OSError(28, "No space left on device")
        return write(fd, data)

    fill(source / "large", 3_000_000)
    content = fill(source / "small", 1000)
    monkeypatch.setattr(os, "write", full)
    copy = Copy(source, target)
    done = copy.run()
    assert done is not None and done.files == 1
    assert tree(target / "x") == {"small": content}
    assert copy.sent.heard == [f"{target}/x/large: No space left on device"]


def test_a_disk_that_is_full_at_the_end(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    fill(source / "f", 1000)
    monkeypatch.setattr(os, "fsync", full)
    copy = Copy(source / "f", target)
    done = copy.run()
    assert done == TreeDone(0, 1000)
    assert list(target.iterdir()) == []
    assert copy.sent.heard[0] == f"{target}/x: No space left on device"


# ---------------------------------------------------------------- broken off, and gone on with


@pytest.mark.parametrize("cut_at", [1, 200_000, 700_000, 1_000_000, 2_999_990])
def test_it_goes_on_where_it_was_broken_off(source: Path, target: Path, cut_at: int) -> None:
    content = fill(source / "f", 3_000_000)
    copy = Copy(source / "f", target)
    assert copy.run(cut_at=cut_at) is None
    assert not (target / "x").exists(), "never a half file under the final name"
    kept = (target / PART).stat().st_size if (target / PART).exists() else 0
    assert (kept >= RESUME_BYTES_MIN) is (cut_at >= 700_000)
    copy = Copy(source / "f", target)
    assert copy.run(resumes=True) == TreeDone(1, len(content) - kept)
    assert tree(target) == {"x": content}


def test_without_resume_it_begins_anew(source: Path, target: Path) -> None:
    content = fill(source / "f", 3_000_000)
    Copy(source / "f", target).run(cut_at=1_000_000)
    assert Copy(source / "f", target).run() == TreeDone(1, len(content))
    assert tree(target) == {"x": content}


def test_another_content_begins_anew(source: Path, target: Path) -> None:
    fill(source / "f", 3_000_000)
    Copy(source / "f", target).run(cut_at=1_000_000)
    content = fill(source / "f", 3_000_000, seed=2)
    assert Copy(source / "f", target).run(resumes=True) == TreeDone(1, len(content))
    assert tree(target) == {"x": content}


@pytest.mark.parametrize("keeps", [False, True])
def test_what_cannot_be_read_is_replaced(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    content = fill(source / "f", 3_000_000)
    (target / "x").write_bytes(bytes(3_000_000))

    def refuse(directory: int, name: bytes) -> int:
        if name == b"x":
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_entry(directory, name)

    monkeypatch.setattr(trees, "open_entry", refuse)
    assert Copy(source / "f", target).run(resumes=True, keeps=keeps) == TreeDone(1, len(content))
    assert tree(target) == {"x": content}


def test_anothers_file_that_is_to_have_our_times_is_replaced(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = fill(source / "f", 3_000_000)
    (target / "x").write_bytes(content)
    monkeypatch.setattr(trees, "_may_be_given", lambda _: False)
    assert Copy(source / "f", target).run(resumes=True) == TreeDone(1, 0)
    assert Copy(source / "f", target).run(resumes=True, keeps=True) == TreeDone(1, len(content))
    assert tree(target) == {"x": content}


def test_a_shorter_content_begins_anew(source: Path, target: Path) -> None:
    fill(source / "f", 3_000_000)
    Copy(source / "f", target).run(cut_at=2_000_000)
    content = fill(source / "f", 300_000, seed=2)
    assert Copy(source / "f", target).run(resumes=True) == TreeDone(1, len(content))
    assert tree(target) == {"x": content}


def test_what_is_there_already_does_not_come_again(source: Path, target: Path) -> None:
    content = fill(source / "f", 3_000_000)
    os.utime(source / "f", ns=(1, 1_234_567_890_000_000_000))
    (target / "x").write_bytes(content)
    assert Copy(source / "f", target).run(resumes=True, keeps=True) == TreeDone(1, 0)
    assert tree(target) == {"x": content}
    assert (target / "x").stat().st_mtime_ns == 1_234_567_890_000_000_000
    (target / "x").write_bytes(content[:-1] + b"?")
    assert Copy(source / "f", target).run(resumes=True) == TreeDone(1, len(content))
    assert tree(target) == {"x": content}


def test_in_a_tree_only_what_is_missing_comes(source: Path, target: Path) -> None:
    for number in range(6):
        fill(source / f"{number}", 600_000, number)
    Copy(source, target).run(cut_at=2_000_000)
    copy = Copy(source, target)
    done = copy.run(resumes=True)
    assert done is not None and done.files == 6 and done.bytes < 2_400_000
    assert tree(target / "x") == tree(source)


def test_two_copies_of_one_file_do_not_mix(source: Path, target: Path) -> None:
    fill(source / "f", 1000)
    part = os.open(target / PART, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(part, fcntl.LOCK_EX)
    copy = Copy(source / "f", target)
    copy.run()
    os.close(part)
    assert copy.got.problems == {str(target / "x"): "another copy is writing it"}
    assert copy.sent.heard == [f"{target}/x: another copy is writing it"]
    assert (target / PART).exists()


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "directory"])
def test_what_is_in_the_place_of_a_part_is_not_written_to(
    source: Path, target: Path, tmp_path: Path, kind: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    match kind:
        case "link":
            (target / PART).symlink_to(victim)
        case "hard link":
            os.link(victim, target / PART)
        case "pipe":
            os.mkfifo(target / PART, 0o600)
        case _:
            (target / PART).mkdir()
    fill(source / "f", 1000)
    copy = Copy(source / "f", target)
    copy.run()
    assert "is in its way" in copy.got.problems[str(target / "x")]
    assert victim.read_text() == "untouched"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_another_users_part_is_not_written_to(source: Path, target: Path) -> None:
    (target / PART).touch(0o600)
    os.chown(target / PART, 1234, 1234)
    fill(source / "f", 1000)
    copy = Copy(source / "f", target)
    copy.run()
    assert "no part of a copy by this user" in copy.got.problems[str(target / "x")]


def test_a_part_that_others_may_have_open_is_made_anew(source: Path, target: Path) -> None:
    (target / PART).write_bytes(bytes(500_000))
    (target / PART).chmod(0o666)
    content = fill(source / "f", 1_000_000)
    with (target / PART).open("r+b") as others:
        assert Copy(source / "f", target).run(resumes=True) == TreeDone(1, 1_000_000)
        others.write(b"others")
    assert tree(target) == {"x": content}


def test_a_long_name_has_a_part(source: Path, target: Path) -> None:
    name = "n" * NAME_BYTES_MAX
    assert len(part_name(name.encode())) <= NAME_BYTES_MAX
    assert part_name(name.encode()) != part_name(name.encode()[:-1] + b"m")
    content = fill(source / name, 1000)
    copy = Copy(source, target)
    copy.run()
    assert tree(target / "x") == {name: content}


def test_a_new_file_is_whole_or_not_there(target: Path) -> None:
    directory = os.open(target, os.O_RDONLY)
    new = NewFile(directory, b"x")
    new.begin(0)
    new.write(b"abc")
    with pytest.raises(Rejected, match="checksum"):
        new.appear(bytes(32), FACTS, 0, keeps=False)
    new.discard()
    assert list(target.iterdir()) == []
    os.close(directory)


# ---------------------------------------------------------------- who lies


@contextmanager
def liar(
    target: Path, *, takes_directories: bool = True, resumes: bool = False
) -> Iterator[Callable[..., Exception]]:
    """A receiver, and who sends it what it likes."""
    seen = Seen()

    def run(*said: CopyMessage | bytes) -> Exception:
        ours, theirs = socket.socketpair()
        for each in said:
            ours.sendall(each if isinstance(each, bytes) else encode_copy(each))
        ours.shutdown(socket.SHUT_WR)
        directory = os.open(target, os.O_RDONLY)
        place = TreePlace(directory, b"x", os.fsencode(target / "x"))
        receiver = TreeReceiver(
            CopyPipe(theirs),
            place,
            Everything(),
            seen,
            takes_directories=takes_directories,
            resumes=resumes,
            keeps=True,
            umask=0o022,
        )
        try:
            receiver.receive()
        except (CopyFault, CopyBroken) as error:
            return error
        else:
            return AssertionError("it was believed")
        finally:
            os.close(directory)
            ours.close()
            theirs.close()

    yield run


def sha256(data: bytes) -> FileWhole:
    return FileWhole(hashlib.sha256(data).digest())


def file(name: bytes, size: int = 4) -> FileEntry:
    return FileEntry(0, FACTS, size, name)


def raw_file(name: bytes, size: int = 4) -> bytes:
    """As `encode_copy` would have it of any name."""
    return encode_copy(file(name, size))


def directory(name: bytes) -> bytes:
    return encode_copy(DirectoryEntry(FACTS, name))


DATA = FileData(b"evil")
ROOT = DirectoryEntry(FACTS, b"")


SUM = sha256(b"evil")


@pytest.mark.parametrize(
    "said",
    [
        (raw_file(b"../evil"), DATA, SUM),
        (raw_file(b"/tmp/evil"), DATA, SUM),
        (ROOT, raw_file(b"../evil"), DATA, SUM, DirectoryEnd()),
        (ROOT, raw_file(b"a/../../evil"), DATA, SUM, DirectoryEnd()),
        (ROOT, raw_file(b".."), DATA, SUM, DirectoryEnd()),
        (ROOT, directory(b"../evil"), DirectoryEnd(), DirectoryEnd()),
        (ROOT, directory(b".."), raw_file(b"evil"), DATA, SUM, DirectoryEnd(), DirectoryEnd()),
        (ROOT, directory(b"/etc"), raw_file(b"evil"), DATA, SUM, DirectoryEnd(), DirectoryEnd()),
        (ROOT, DirectoryEnd(), DirectoryEnd(), raw_file(b"evil"), DATA, SUM),
        (ROOT, DirectoryEnd(), file(b"evil"), DATA, SUM),
        (file(b"evil"), DATA, SUM),
        (ROOT, raw_file(b"evil\0/x"), DATA, SUM, DirectoryEnd()),
        (ROOT, raw_file(b"e" * 300), DATA, SUM, DirectoryEnd()),
        (ROOT, raw_file(PART.encode()), DATA, SUM, DirectoryEnd()),
        (file(b"", 3), DATA, SUM),
        (file(b""), DATA, DATA, SUM),
        (file(b"", 5), DATA, SUM),
        (file(b"", 2**63), DATA, SUM),
        (ROOT, LeftOut(b"x", "")),
        (TreeDone(1, 1),),
        (Have(0, 1, bytes(32)),),
        (FileBegin(0),),
        (b"\xff" * 100,),
    ],
)
def test_nothing_is_written_elsewhere(target: Path, said: tuple[CopyMessage | bytes, ...]) -> None:
    with liar(target) as run:
        assert isinstance(run(*said, TreeEnd()), CopyFault)
    nothing_but(target)


@pytest.mark.parametrize(
    "said", [(), (ROOT,), (ROOT, file(b"f", 2**40)), (ROOT, file(b"f"), DATA), (b"\x05\0",)]
)
def test_who_stops_in_the_midst_leaves_nothing(
    target: Path, said: tuple[CopyMessage | bytes, ...]
) -> None:
    with liar(target) as run:
        assert isinstance(run(*said), CopyBroken)
    nothing_but(target)


def nothing_but(target: Path) -> None:
    """No file has appeared anywhere."""
    assert [each.name for each in target.parent.iterdir()] == ["target"]
    inside = tree(target)
    assert set(inside) <= {"x"} and not inside.get("x"), inside


def test_who_is_ended_here_heeds_no_more_of_what_has_come() -> None:
    ours, theirs = socket.socketpair()
    pipe = CopyPipe(theirs)
    ours.sendall(3 * encode_copy(DirectoryEnd()))
    assert pipe.read() == DirectoryEnd()
    pipe.end()
    pipe.end()
    with pytest.raises(CopyBroken, match="ended here"):
        pipe.read()
    with pytest.raises(CopyBroken, match="ended here"):
        pipe.write(b"x")
    pipe.close()
    pipe.end()
    ours.close()


def test_a_directory_instead_of_a_file(target: Path) -> None:
    with liar(target, takes_directories=False) as run:
        assert isinstance(run(ROOT, file(b".bashrc"), DATA, sha256(b"evil")), CopyFault)
    assert list(target.iterdir()) == []


def test_who_was_not_asked_to_go_on_does_not_learn_what_is_there(target: Path) -> None:
    (target / "x").write_bytes(b"evil")
    asks = FileEntry(ASK, FACTS, 4, b"")
    with liar(target) as run:
        assert isinstance(run(asks, FileBegin(4), SUM, TreeEnd()), CopyFault)
    with liar(target, resumes=True) as run:
        assert isinstance(run(asks, FileBegin(4), SUM, TreeEnd()), AssertionError)


def test_a_file_that_is_given_up_without_a_reason_is_no_copy(target: Path) -> None:
    with liar(target) as run:
        assert isinstance(run(file(b""), DATA, FileBroken(""), TreeEnd()), CopyFault)
    assert list(target.iterdir()) == []


def test_another_checksum_is_no_file(target: Path) -> None:
    with liar(target) as run:
        run(file(b""), DATA, sha256(b"good"), TreeEnd())
    assert list(target.iterdir()) == []


def test_a_link_that_is_there_is_not_followed(target: Path, tmp_path: Path) -> None:
    """As when a guest sends a link first, and then what is behind it: links cannot be sent, and one
    that is there already is not followed."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (target / "x").mkdir()
    (target / "x" / "d").symlink_to(outside)
    (target / "x" / "f").symlink_to(outside / "f")
    with liar(target) as run:
        run(
            ROOT,
            DirectoryEntry(FACTS, b"d"),
            file(b"evil"),
            DATA,
            sha256(b"evil"),
            DirectoryEnd(),
            file(b"f"),
            DATA,
            sha256(b"evil"),
            DirectoryEnd(),
            TreeEnd(),
        )
    assert list(outside.iterdir()) == []


def test_links_that_are_exchanged_meanwhile_are_not_followed(
    source: Path, target: Path, tmp_path: Path
) -> None:
    """Somebody on this side puts a link where the directory was, again and again."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for number in range(50):
        (source / f"d{number % 5}").mkdir(exist_ok=True)
        fill(source / f"d{number % 5}" / f"{number}", 200)
    root = target / "x"
    is_over = threading.Event()

    def exchange() -> None:
        while not is_over.is_set():
            for number in range(5):
                with suppress(OSError):
                    (root / f"d{number}").rename(root / f"was{number}")
                    (root / f"d{number}").symlink_to(outside)
                with suppress(OSError):
                    (root / f"d{number}").unlink()
                    (root / f"was{number}").rename(root / f"d{number}")

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        for _ in range(5):
            Copy(source, target).run()
    finally:
        is_over.set()
        thread.join(WAIT_S)
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize(
    "reply",
    [
        b"\xff" * 40,
        encode_copy(TreeDone(0, 0)),
        encode_copy(DirectoryEnd()),
        encode_copy(Have(0, 1, bytes(32))),
    ],
)
def test_a_receiver_that_lies_ends_the_copy(source: Path, reply: bytes) -> None:
    fill(source / "f", 3_000_000)
    ours, theirs = socket.socketpair()
    theirs.sendall(reply)
    fd = open_entry(None, os.fsencode(source / "f"))
    with pytest.raises(CopyFault):
        TreeSender(CopyPipe(ours), Everything(), Seen()).send(fd, b"f")
    os.close(fd)
    ours.close()
    theirs.close()
