"""vchan log: the audit log as the daemon writes it, filtered and followed."""

from __future__ import annotations

import io
import itertools
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.unit.local_host import LocalHost
from vchan import cli
from vchan.cli import audit
from vchan.host.policy.audit_record import Record, format_left_out, format_record
from vchan.host.policy.rules import Ask, Facts, Kind

Run = Callable[..., tuple[int, str, str]]

A = Facts("aaaa1111-0000-4000-8000-000000000001", "web", "p")
B = Facts("bbbb2222-0000-4000-8000-000000000002", "db", "p")
NOW = datetime.now(tz=UTC)


def ago(**passed: float) -> str:
    return (NOW - timedelta(**passed)).isoformat(timespec="milliseconds")


LINES = [
    format_record(
        Record(A, Ask(Kind.LISTEN, "openstack", "agent"), "allow", "/etc/p/50-a.policy:1"),
        time=ago(days=2),
        host="h",
    ),
    format_record(
        Record(
            A, Ask(Kind.CALL, "nova", "conductor", method="boot"), "deny", "default", b"\1" * 16
        ),
        time=ago(hours=2),
        host="h",
        left_out=3,
    ),
    format_record(
        Record(B, Ask(Kind.CAST, "openstack", "x"), "refused", "limit", reason="too \x1b[2J many"),
        time=ago(minutes=5),
        host="h",
    ),
    format_left_out(B, 9, time=ago(seconds=5), host="h"),
]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    file = tmp_path / "audit.log"
    file.write_bytes(b"".join(LINES))
    return file


@pytest.fixture
def run(log: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str) -> tuple[int, str, str]:
        try:
            status = cli.run(["log", "--file", str(log), *words])
        except SystemExit as end:  # argparse
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return run


def test_lines_for_people(run: Run) -> None:
    status, out, err = run()
    assert (status, err) == (cli.EXIT_OK, "")
    assert [line.split("  ")[1:] for line in out.splitlines()] == [
        ["allow", "web", "listen openstack/agent", "(/etc/p/50-a.policy:1)"],
        ["deny", "web", "call nova/conductor boot", "(default)", "and 3 lines left out before"],
        ["refused", "db", "cast openstack/x", "(limit)", "too ?[2J many"],
        ["left out", "db", "(audit_lines_per_s)", "and 9 lines left out before"],
    ]


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        ((), "0 1 2 3"),
        (("--vm", "web"), "0 1"),
        (("--vm", "BBBB"), "2 3"),
        (("--verdict", "allow"), "0"),
        (("--denied",), "1 2"),
        (("--kind", "call"), "1"),
        (("--topic", "nova/*"), "1"),
        (("--topic", "agent"), "0"),
        (("--method", "bo*"), "1"),
        (("--rule", "50-a.policy:1"), "0"),
        (("--rule", "policy:1"), ""),
        (("--since", "1h"), "2 3"),
        (("--since", "3h", "--until", "1h"), "1"),
        (("--until", (NOW - timedelta(days=1)).date().isoformat()), "0"),
        (("-n", "2"), "2 3"),
        (("-n", "1", "--vm", "web"), "1"),
        (("--vm", "nobody"), ""),
    ],
)
def test_filters(run: Run, words: tuple[str, ...], numbers: str) -> None:
    status, out, _ = run("--json", *words)
    assert status == cli.EXIT_OK
    expected = [json.loads(LINES[int(number)])["time"] for number in numbers.split()]
    assert [json.loads(line)["time"] for line in out.splitlines()] == expected


def test_shapes(run: Run) -> None:
    assert run("-f", "value", "-c", "verdict", "-c", "request", "-n", "3")[1] == (
        f"deny {'01' * 16}\nrefused \nleft out \n"
    )
    head, first, *_ = run("-f", "csv")[1].splitlines()
    assert head.startswith('"time","verdict","vm"')
    assert '"openstack/agent"' in first
    assert run("-c", "colour")[0] == run("--sort-column", "time")[0] == cli.EXIT_USAGE


@pytest.mark.parametrize("text", ["soon", "10", "-1h", "10y", "2026-13-01", "9" * 30 + "d", ""])
def test_a_time_that_is_none(run: Run, text: str) -> None:
    status, _, err = run(f"--since={text}")
    assert status == cli.EXIT_USAGE
    assert "is no time as 10m" in err


def test_lines_that_are_none_are_counted(run: Run, log: Path) -> None:
    with log.open("ab") as file:
        file.write(b'nonsense\n[1]\n{"x": 1}\n\n' + b"[" * 100_000 + b"\n" + LINES[0][:20])
    status, out, err = run("--json")
    assert (status, out.count("\n")) == (cli.EXIT_OK, 4)
    assert err == f"vchan: {log}: 5 lines are no lines of an audit log: left out\n"


def test_a_file_that_cannot_be_read(log: Path, run: Run) -> None:
    log.unlink()
    status, out, err = run()
    assert (status, out) == (cli.EXIT_USAGE, "")
    assert err == f"vchan: {log}: No such file or directory: see --file and audit_log\n"
    log.mkdir()
    assert "Is a directory" in run()[2]


def test_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"".join(LINES))))
    assert cli.run(["log", "--file", "-", "--denied"]) == cli.EXIT_OK
    assert capsys.readouterr().out.count("\n") == 2
    monkeypatch.setattr("sys.stdin", None)
    assert cli.run(["log", "--file", "-"]) == cli.EXIT_USAGE


# ---------------------------------------------------------------- whose log


@pytest.fixture
def host() -> Iterator[LocalHost]:
    with (
        tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name,
        LocalHost(Path(name) / "host.sock") as host,
    ):
        yield host


def test_it_is_the_daemons_own(
    host: LocalHost, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host.status["files"] = {"audit_log": str(log)}
    assert cli.run(["--socket", host.server.path, "log"]) == cli.EXIT_OK
    assert capsys.readouterr().out.count("\n") == 4
    host.status["files"] = {"audit_log": "-"}
    assert cli.run(["--socket", host.server.path, "log"]) == cli.EXIT_USAGE
    assert "journalctl -o cat -u vchan-host | vchan log --file -" in capsys.readouterr().err


def test_without_a_daemon_it_is_the_configurations(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "vchan.conf"
    file.write_text(f"[vchan]\naudit_log = {log}\n")
    assert cli.run(["log", "--config-file", str(file)]) == cli.EXIT_OK
    assert capsys.readouterr().out.count("\n") == 4


# ---------------------------------------------------------------- following


def test_it_is_followed_into_the_next_file(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "LOOK_S", 0.01)
    file = log.open("rb")
    file.read()
    found: list[str] = []

    def read() -> None:
        with closing(audit.follow(str(log), file)) as rows:
            found.extend(row["verdict"] for row in itertools.islice(rows, 4))

    thread = threading.Thread(target=read)
    thread.start()
    with log.open("ab") as writer:
        writer.write(LINES[0][:10])
        writer.flush()
        time.sleep(0.05)
        writer.write(LINES[0][10:])
        writer.flush()
        log.rename(log.with_suffix(".1"))  # as logrotate does it
        writer.write(LINES[1])  # the daemon has not heard of it yet
    time.sleep(0.05)
    log.write_bytes(LINES[2])
    wait(lambda: len(found) == 3)
    log.write_bytes(b"")  # copied and truncated
    time.sleep(0.05)
    log.write_bytes(LINES[3])
    thread.join(30)
    assert found == ["allow", "deny", "refused", "left out"]


def wait(reached: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
