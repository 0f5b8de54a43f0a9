"""What is frozen is thawed, whatever becomes of who asked for it, and of who holds it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vchan.errors import Rejected
from vchan.guest import freezer as freezer_module
from vchan.guest.freezer import HOOKS_MAX, LEASE_S_MAX, Freezer, Hooks, Kernel, NotFrozen, note_path
from vchan.io.loop import Loop
from vchan.rpc.deferred import Later

WAIT_S = 20.0


class FakeKernel(Kernel):
    """File systems that are directories: one that stands still has a file `frozen` beside it."""

    def __init__(self, directory: Path, names: tuple[str, ...] = ("a", "b")) -> None:
        self.paths = [directory / name for name in names]
        self.slow: dict[str, float] = {}
        self.fails = ""
        self.own = False  # the daemon's own files are on one of them
        for path in self.paths:
            path.mkdir()

    def targets(self) -> list[str]:
        return list(map(str, self.paths))

    def device_of(self, path: str) -> int:
        return 1 if self.own else hash(path)

    def freeze(self, path: str) -> int:
        time.sleep(self.slow.get(Path(path).name, 0.0))
        if Path(path).name == self.fails:
            raise OSError(5, "Input/output error", path)
        (Path(path) / "frozen").touch()
        return os.open(path, os.O_RDONLY)

    def thaw(self, handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        os.close(handle)
        (path / "frozen").unlink()

    def thaw_all(self) -> int:
        found = [path / "frozen" for path in self.paths if (path / "frozen").exists()]
        for path in found:
            path.unlink()
        return len(found)

    def frozen(self) -> list[str]:
        return [path.name for path in self.paths if (path / "frozen").exists()]


class Rig:
    """A freezer on a loop."""

    def __init__(self, directory: Path, **hooks: str) -> None:
        self.loop = Loop()
        self.log: list[str] = []
        self.active: list[bool] = []
        self.directory = directory
        self.kernel = FakeKernel(directory)
        self.hooks = directory / "hooks"
        self.hooks.mkdir(mode=0o755)
        for name, script in hooks.items():
            (self.hooks / name).write_text(f"#!/bin/sh\n{script}\n")
            (self.hooks / name).chmod(0o755)
        self.socket = directory / "agent.sock"
        self.freezer = Freezer(
            self.loop,
            str(self.socket),
            str(self.hooks),
            self.log.append,
            self._changed,
            self.kernel,
        )

    def _changed(self) -> None:
        self.active.append(self.freezer.is_active)

    def ask(self, later: Later) -> Any:
        answers: list[Any] = []
        later.then(lambda value, _: answers.append(value))
        self.until(lambda: bool(answers))
        return answers[0]

    def freeze(self, lease_s: float = 60.0) -> Any:
        return self.ask(self.freezer.freeze({"lease_s": lease_s}))

    def until(self, reached: Callable[[], bool]) -> None:
        until_s = time.monotonic() + WAIT_S
        while not reached():
            assert time.monotonic() < until_s, self.log
            self.loop.run_once(0.02)

    def until_thawed(self) -> None:
        self.until(lambda: not self.freezer.is_active)
        assert self.kernel.frozen() == []
        assert not Path(note_path(str(self.socket))).exists()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.freezer.close()
    made.loop.close()


def test_frozen_and_thawed(rig: Rig) -> None:
    told = rig.freeze()
    assert [Path(path).name for path in told["frozen"]] == ["a", "b"]
    assert told["lease_s"] == 60.0
    assert rig.kernel.frozen() == ["a", "b"] and rig.freezer.is_active
    assert Path(note_path(str(rig.socket))).exists()
    told = rig.ask(rig.freezer.thaw("somebody asked"))
    assert len(told["thawed"]) == 2 and told["why"] == "somebody asked"
    rig.until_thawed()
    assert rig.active == [True, False]
    assert rig.freeze()["frozen"]  # and again


def test_a_lease_that_is_over(rig: Rig) -> None:
    rig.freeze(0.2)
    rig.until_thawed()
    assert "thawed 2 file systems: the lease is over" in rig.log


def test_a_lease_is_taken_again(rig: Rig) -> None:
    rig.freeze(1.0)
    began_s = time.monotonic()
    assert rig.freeze(60.0)["lease_s"] == 60.0
    while time.monotonic() < began_s + 1.5:
        rig.loop.run_once(0.05)
    assert rig.kernel.frozen() == ["a", "b"]
    rig.freeze(0.1)
    rig.until_thawed()


def test_the_host_is_gone(rig: Rig) -> None:
    rig.freeze()
    rig.freezer.end("the host is silent")
    rig.freezer.end("the host is silent still")
    rig.until_thawed()
    assert "thawed 2 file systems: the host is silent" in rig.log


def test_the_daemon_is_gone(rig: Rig) -> None:
    """Killed, or ended: the pipe is all that the holder has of it."""
    rig.freeze()
    rig.freezer.close()
    rig.until(lambda: rig.kernel.frozen() == [])


def test_the_holder_is_killed(rig: Rig) -> None:
    rig.freeze()
    later = rig.freezer.thaw("x")
    os.kill(rig.freezer._pid, signal.SIGKILL)
    assert rig.ask(later)["thawed"] in ([], rig.kernel.targets())
    rig.until_thawed()


def test_a_holder_that_is_told_to_end_does_not(rig: Rig) -> None:
    rig.freeze()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(rig.freezer._pid, number)
    time.sleep(0.2)
    assert rig.kernel.frozen() == ["a", "b"]
    rig.freezer.end("over")
    rig.until_thawed()


def test_both_are_killed_and_the_next_daemon_thaws(rig: Rig) -> None:
    rig.freeze()
    os.kill(rig.freezer._pid, signal.SIGSTOP)
    os.kill(rig.freezer._pid, signal.SIGKILL)
    os.waitpid(rig.freezer._pid, 0)
    rig.freezer.close()
    assert rig.kernel.frozen() == ["a", "b"]
    after = Freezer(
        rig.loop, str(rig.socket), str(rig.hooks), rig.log.append, lambda: None, rig.kernel
    )
    assert Path(note_path(str(rig.socket))).exists()
    after.thaw_left_over()
    assert rig.kernel.frozen() == [] and "thawed 2 file systems that" in rig.log[-1]
    assert not Path(note_path(str(rig.socket))).exists()


def test_a_file_system_that_cannot_be_frozen_has_the_others_thawed(rig: Rig) -> None:
    rig.kernel.fails = "b"
    error = rig.freeze()
    assert isinstance(error, Rejected) and "b: Input/output error" in str(error)
    rig.until_thawed()


def test_nothing_to_freeze(rig: Rig) -> None:
    rig.kernel.paths = []
    error = rig.freeze()
    assert isinstance(error, Rejected) and "no file system of this guest" in str(error)


def test_it_takes_longer_than_the_lease(rig: Rig) -> None:
    """What was frozen first has stood still since."""
    rig.kernel.slow = {"a": 0.1, "b": 0.4}
    error = rig.freeze(0.3)
    assert isinstance(error, Rejected) and "the lease is over" in str(error)
    rig.until_thawed()


def test_given_up_before_it_was_done(rig: Rig) -> None:
    rig.kernel.slow = {"a": 0.3}
    later = rig.freezer.freeze({})
    rig.freezer.end("the host is silent")
    with pytest.raises(Rejected, match="ask again"):
        rig.freezer.freeze({})
    error = rig.ask(later)
    assert isinstance(error, Rejected) and "the host is silent" in str(error)
    rig.until_thawed()


def test_the_daemons_own_files_would_be_on_it(rig: Rig) -> None:
    rig.kernel.own = True
    with pytest.raises(Rejected, match="where this daemon writes"):
        rig.freezer.freeze({})
    assert not rig.freezer.is_active


def test_thaw_without_freeze(rig: Rig) -> None:
    assert rig.ask(rig.freezer.thaw("x"))["thawed"] == []


@pytest.mark.parametrize("lease", [0, -1, LEASE_S_MAX + 1, True, "10", None, float("nan")])
def test_a_lease_that_is_none(rig: Rig, lease: Any) -> None:
    with pytest.raises(ValueError, match="lease_s"):
        rig.freezer.freeze({"lease_s": lease})
    with pytest.raises(TypeError, match="lease_s"):
        rig.freezer.freeze({"for_s": 1})


# --- hooks


def calls(rig: Rig) -> list[str]:
    path = rig.directory / "calls"
    return path.read_text().split() if path.exists() else []


def hooked(directory: Path, **hooks: str) -> Rig:
    write = f'echo "$(basename $0).$1" >> {directory}/calls'
    return Rig(directory, **{name: f"{write}; {more}" for name, more in hooks.items()})


def test_hooks_are_called_around_it(tmp_path: Path) -> None:
    seen = f"ls {tmp_path}/a/frozen && echo frozen >> {tmp_path}/calls; true"
    rig = hooked(tmp_path, one="true", two=seen)
    (rig.hooks / "three.dpkg-old").write_text("#!/bin/sh\nexit 1\n")
    (rig.hooks / "three.dpkg-old").chmod(0o755)
    (rig.hooks / "README").write_text("not executable")
    rig.freeze()
    rig.freezer.end("over")
    rig.until_thawed()
    assert calls(rig) == ["one.freeze", "two.freeze", "two.thaw", "one.thaw"]


def test_a_hook_that_fails_has_nothing_frozen(tmp_path: Path) -> None:
    rig = hooked(tmp_path, one="true", two="[ $1 = thaw ]", zero="true")
    error = rig.freeze()
    assert isinstance(error, Rejected) and "two freeze: ended with 1" in str(error)
    rig.until_thawed()
    assert calls(rig) == ["one.freeze", "two.freeze", "two.thaw", "one.thaw"]


def test_a_hook_that_fails_afterwards_is_told(tmp_path: Path) -> None:
    rig = hooked(tmp_path, one="[ $1 = freeze ]")
    rig.freeze()
    rig.freezer.end("over")
    rig.until_thawed()
    assert any("one thaw: ended with 1" in line for line in rig.log)


def test_a_hook_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freezer_module, "HOOK_S", 0.2)
    rig = hooked(tmp_path, one="[ $1 = thaw ] || sleep 60")
    error = rig.freeze()
    assert isinstance(error, Rejected) and "not over after" in str(error)
    rig.until_thawed()


def test_a_hook_that_others_can_change_is_not_run(tmp_path: Path) -> None:
    rig = hooked(tmp_path, one="true")
    (rig.hooks / "one").chmod(0o757)
    error = rig.freeze()
    assert isinstance(error, Rejected) and "chmod go-w" in str(error)
    assert calls(rig) == []


def test_too_many_hooks(tmp_path: Path) -> None:
    for number in range(HOOKS_MAX + 1):
        (tmp_path / f"{number}").touch(mode=0o755)
    with pytest.raises(NotFrozen, match="HOOKS_MAX"):
        Hooks(str(tmp_path)).paths()
    assert Hooks(str(tmp_path / "nowhere")).paths() == []


# --- the kernel's own


def test_what_can_be_frozen_is_on_devices_and_written() -> None:
    for path in Kernel().targets():
        assert path.startswith("/")
    assert all(not path.startswith("/proc") for path in Kernel().targets())
