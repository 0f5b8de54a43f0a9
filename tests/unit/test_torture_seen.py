"""What the torture sees while it happens, on parts made up here: each breach is told, and what is
well is not."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("libvirt_qemu", reason="libvirt-python is not installed")

from tests.rig import RigError
from tests.torture import oracle, report, run, watch
from tests.torture.faults import Faults
from tests.torture.oracle import Evidence, Verdict
from tests.torture.records import Book, Health, Sent, encode
from tests.torture.report import Taken
from tests.torture.run import Plan, Torture
from tests.torture.schedule import Step
from tests.torture.stage import Stage
from tests.torture.watch import Watch
from vchan.errors import LinkDown

CRASHED = "init: vchan-guest ended with status 1\n"
BROKEN_HEAP = "init: runner ended with status 134\ninit: asker ended with status 139\n"
PANIC = (
    "[   31.0] Kernel panic - not syncing: Fatal exception\n---[ end Kernel panic - not syncing\n"
)
KILLED = "init: vchan-guest ended with status 137\ninit: runner ended with status 137\n"
SENT = Sent(1.0, "cast", "vm", "caster", 1)


class Told:
    """What was said to be broken."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def __call__(self, kind: str, text: str) -> None:
        assert text
        self.kinds.append(kind)


@pytest.fixture(scope="module")
def daemon() -> Iterator[int]:
    """The pid of what stands for a daemon: not this process, which other tests left descriptors."""
    waits = [sys.executable, "-S", "-c", "print(flush=True); input()"]
    with subprocess.Popen(waits, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


def host(pid: int, name: str = "a", *, is_running: bool = True) -> Any:
    return SimpleNamespace(
        name=name,
        daemon=SimpleNamespace(is_running=is_running, pid=pid),
        heal=lambda: None,
    )


def watching(told: Told, *hosts: Any, killing: tuple[str, ...] = (), books: Any = ()) -> Watch:
    stage: Any = SimpleNamespace(hosts=hosts, guests={"vm": dict(enumerate(books))})
    faults: Any = SimpleNamespace(killing=set(killing))
    return Watch(stage, faults, told)


# --- the hosts' daemons


def test_a_daemon_that_runs_is_well(daemon: int) -> None:
    told = Told()
    looking = watching(told, host(daemon), host(daemon, "b"))
    looking.look()
    assert told.kinds == []
    assert looking.host_rss_mib > 1
    assert looking.host_descriptors > 2


def test_a_daemon_that_ended_by_itself_died_and_is_told_once(daemon: int) -> None:
    told = Told()
    looking = watching(told, host(daemon), host(daemon, "b", is_running=False))
    looking.look()
    looking.look()
    assert told.kinds == [oracle.DIED]


def test_a_daemon_that_we_ended_did_not_die(daemon: int) -> None:
    told = Told()
    watching(told, host(daemon, "b", is_running=False), killing=("b",)).look()
    assert told.kinds == []


def test_a_daemons_memory_has_a_limit(daemon: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "HOST_RSS_MAX_MIB", 1)
    told = Told()
    watching(told, host(daemon)).look()
    assert told.kinds == [oracle.MEMORY]


def test_a_daemons_descriptors_have_a_limit(daemon: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    looking = watching(told, host(daemon))
    looking.look()
    assert told.kinds == []
    monkeypatch.setattr(watch, "HOST_DESCRIPTORS_MAX", looking.host_descriptors)
    looking.look()
    assert told.kinds == []
    monkeypatch.setattr(watch, "HOST_DESCRIPTORS_MAX", looking.host_descriptors - 1)
    looking.look()
    assert told.kinds == [oracle.DESCRIPTORS]


# --- the records


def test_records_are_read_by_several_threads_while_they_are_written(tmp_path: Path) -> None:
    book = Book(tmp_path / "records")
    line = encode(SENT)
    is_over = threading.Event()
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def read() -> None:
        while not is_over.is_set():
            book.read()

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    with book.path.open("ab", buffering=0) as file:
        for _ in range(500):
            file.write(line[:20])
            file.write(line[20:])
    is_over.set()
    for reader in readers:
        reader.join()
    sys.setswitchinterval(before_s)
    assert len(book.read()) == 500
    assert book.torn == []


# --- the guests' daemons


@pytest.mark.parametrize(
    ("health", "stuck"),
    [
        ([(1.0, 12), (2.0, 3), (40.0, 3)], [("vm", 2.0)]),
        ([(1.0, 12), (2.0, 3), (30.0, 3)], []),
        ([(1.0, 3), (40.0, 12)], []),
        ([(1.0, 0), (40.0, 0)], []),
        ([], []),
    ],
)
def test_a_daemon_that_opens_nothing_is_stuck(
    health: list[tuple[float, int]], stuck: list[tuple[str, float]]
) -> None:
    records = [Health(at_s, 1, descriptors) for at_s, descriptors in health]
    vm: Any = SimpleNamespace(uuid="vm", name="vm")
    book: Any = SimpleNamespace(read=lambda: records)
    stage: Any = SimpleNamespace(vms=[vm], guests={"vm": {"asker": book}})
    assert [(each.uuid, since_s) for each, since_s in Stage.stuck(stage, 30.0)] == stuck


@pytest.mark.parametrize(
    ("health", "kinds"),
    [
        (Health(1.0, watch.GUEST_RSS_MAX_MIB * 1024, watch.GUEST_DESCRIPTORS_MAX), []),
        (Health(1.0, watch.GUEST_RSS_MAX_MIB * 1024 + 1, 1), [oracle.MEMORY]),
        (Health(1.0, 1, watch.GUEST_DESCRIPTORS_MAX + 1), [oracle.DESCRIPTORS]),
    ],
)
def test_what_a_guests_daemon_may_take(health: Health, kinds: list[str]) -> None:
    told = Told()
    small = Health(2.0, 10, 1)
    books = [SimpleNamespace(records=[small]), SimpleNamespace(records=[health, small])]
    rss_mib, descriptors = watching(told, books=books).guests()
    assert rss_mib == max(health.rss_kib, small.rss_kib) / 1024
    assert descriptors == health.descriptors
    assert told.kinds == kinds


# --- a pause


class Paused:
    """A VM; its daemon says of it what it is told to say."""

    def __init__(self, *said: int | None, pids: tuple[int, ...] = (7, 7)) -> None:
        self._said = iter(said)
        self._pids = iter(pids)
        self.name = "vm0"
        self.here = SimpleNamespace(daemon=self)
        self.calls: list[str] = []

    @property
    def pid(self) -> int:
        return next(self._pids)

    def status(self) -> Any:
        cures = next(self._said)
        if cures is None:
            raise LinkDown("socket", "no daemon")
        return {"channel": {"cures": cures}}

    def domain(self) -> Any:
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None: ...

    def suspend(self) -> None:
        self.calls.append("suspend")

    def resume(self) -> None:
        self.calls.append("resume")


@pytest.mark.parametrize(
    ("vm", "kinds"),
    [
        (Paused(3, 3), []),
        (Paused(3, 4), [oracle.CUT_WHILE_PAUSED]),
        (Paused(3, 0, pids=(7, 8)), []),  # the daemon is another: it counts anew
        (Paused(0, 1, pids=(7, 8)), []),
        (Paused(None, 4), []),
        (Paused(3, None), []),
    ],
)
def test_a_paused_vms_connection_is_left_alone(
    vm: Paused, kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.torture.faults.time.sleep", lambda _: None)
    told = Told()
    stage: Any = SimpleNamespace(vms=[vm])
    Faults(stage, told).carry_out(Step("vm0", "suspend", 0.0, 5.0))
    assert told.kinds == kinds
    assert vm.calls == ["suspend", "resume"]


# --- healed


def stands() -> list[str]:
    return []


def waits() -> list[str]:
    return ["vm0-caller"]


def never_ready() -> list[str]:
    raise RigError("vm0 is not ready on a in 120 s")


def settled(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    stand: Callable[[], list[str]] = stands,
    console: str = KILLED,
    records: bytes = b"",
    evidence: Evidence | None = None,
) -> dict[str, Any]:
    """The figures of a run whose only round ended so."""
    monkeypatch.setattr(run, "LOOK_S", 0.01)
    monkeypatch.setattr(run, "DRAIN_S", 0.05)
    (directory / "vm0.log").write_text(console)
    (directory / "control").write_bytes(records)
    book = Book(directory / "control")

    def read() -> Evidence:
        book.read()
        return evidence or Evidence([], [], {}, tuple(stage.faults), "runner")

    stage: Any = SimpleNamespace(
        rabbit=SimpleNamespace(is_running=True),
        hosts=[],
        stand=stand,
        read=read,
        control=book,
        service=Book(directory / "service"),
        guests={},
        consoles=lambda: [directory / "vm0.log"],
        torn=lambda: Stage.torn(stage),
        stuck=lambda _: [],
        faults=[],
        uuid_of=lambda name: name,
    )
    torture = Torture(Plan(1, 1), directory, lambda _: None)
    torture.settle(stage)
    return torture.figures(stage, Taken(0.0, 0, 0.0, 0))


@pytest.mark.parametrize(
    ("how", "kinds"),
    [
        ({}, []),
        ({"records": encode(SENT)}, []),
        ({"stand": waits}, [oracle.STUCK]),
        ({"stand": never_ready}, [oracle.STUCK]),
        ({"console": CRASHED}, [oracle.DIED]),
        ({"console": CRASHED.replace("vchan-guest", "runner")}, [oracle.DIED]),
        ({"console": KILLED + CRASHED}, [oracle.DIED]),
        ({"console": BROKEN_HEAP}, []),
        ({"console": PANIC}, []),
        ({"records": encode(SENT)[:10] + encode(SENT)}, [oracle.TORN]),
        ({"records": b"\0" * 10 + b"\n"}, [oracle.TORN]),
    ],
)
def test_what_is_seen_when_everything_was_healed(
    how: dict[str, Any], kinds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = settled(tmp_path, monkeypatch, **how)
    assert [text.partition(":")[0] for text in figures["violations"]] == kinds
    assert figures["other_violations"] == len(kinds)
    assert figures["crashed"] == (2 if how.get("console") == BROKEN_HEAP else 0)
    assert figures["panicked"] == (1 if how.get("console") == PANIC else 0)


def test_what_the_oracle_says_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = Verdict([oracle.Violation(oracle.LOST, "a cast")], Counter(), Counter())
    monkeypatch.setattr(run, "judge", lambda _: verdict)
    figures = settled(tmp_path, monkeypatch, console=CRASHED)
    assert figures["violations"] == [
        f"{oracle.DIED}: vm0: vchan-guest ended with status 1",
        f"{oracle.LOST}: a cast",
    ]
    assert (figures["lost"], figures["other_violations"]) == (1, 1)


def worked(monkeypatch: pytest.MonkeyPatch, *, broken: bool = False) -> list[Sent]:
    """The casts of a run without faults, of which each look at the records finds one more."""
    monkeypatch.setattr(run, "LOOK_S", 0.01)
    sent: list[Sent] = []

    def read() -> Evidence:
        sent.append(SENT)
        return Evidence(sent, [], {}, (), "runner")

    stage: Any = SimpleNamespace(read=read, consoles=list)
    torture = Torture(Plan(1, 1, once=True), Path(), lambda _: None)
    if broken:
        torture._broken(oracle.STUCK, "text")
    torture._work([], stage)
    return sent


def test_with_every_fault_once_the_load_goes_on_until_it_carried_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "LEAST", {"casts": 3})
    assert len(worked(monkeypatch)) == 3
    assert worked(monkeypatch, broken=True) == []


def test_a_load_that_carries_nothing_is_said_to_be_too_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "LEAST", {"calls_answered": 1})
    monkeypatch.setattr(run, "LOAD_S", 0.05)
    with pytest.raises(RigError, match="too little load: 0 faults"):
        worked(monkeypatch)
