"""The vchan command: what it prints, and how it ends."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.local_host import LocalHost
from vchan import cli
from vchan.cli.requests import show_text
from vchan.cli.values import parse_values
from vchan.errors import ConfigError, NoSuchDomain
from vchan.rpc.messages import Topic

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        yield Path(name) / "host.sock"


@pytest.fixture
def run(path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit status, standard output, standard error) of a command."""

    def run(*words: str) -> tuple[int, str, str]:
        try:
            status = cli.run(["--socket", str(path), *words])
        except SystemExit as end:  # argparse
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def host(path: Path) -> Iterator[LocalHost]:
    with LocalHost(path) as host:
        yield host


def test_a_call_prints_the_result(host: LocalHost, run: Run) -> None:
    assert run("call", "vm", "agent", "echo", "n=1", "text=one two", 'list=["x", null]') == (
        cli.EXIT_OK,
        '{\n  "n": 1,\n  "text": "one two",\n  "list": [\n    "x",\n    null\n  ]\n}\n',
        "",
    )
    status, out, _ = run("--json", "call", "vm", "agent", "echo", "text=ä=b")
    assert (status, json.loads(out)) == (cli.EXIT_OK, {"text": "ä=b"})
    assert out.count("\n") == 1
    assert run("cast", "vm", "agent", "echo") == (cli.EXIT_OK, "", "")


def test_a_result_does_not_steer_a_terminal(
    host: LocalHost, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is what a guest says. As JSON it is the same value; as a text, the same in a pipe."""
    text = "ä\n\x1b[2J\x9b2J\u202e\ud800\U000e0001"
    for words in ((), ("--json",)):
        status, out, _ = run(*words, "call", "vm", "agent", "echo", f"text={json.dumps(text)}")
        assert status == cli.EXIT_OK
        assert "ä" in out
        assert out.replace("\n", "").isprintable()
        assert json.loads(out) == {"text": text}
    show_text(text)
    assert capsys.readouterr().out == text.replace("\ud800", "\\ud800") + "\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show_text(text)
    assert capsys.readouterr().out == "ä\n?[2J?2J???\n"


def test_options_may_follow_the_command(host: LocalHost, run: Run) -> None:
    status, out, _ = run("call", "vm", "agent", "echo", "x=1", "--json", "--timeout", "5")
    assert (status, out) == (cli.EXIT_OK, '{"x": 1}\n')
    assert run("--json", "call", "vm", "agent", "echo", "x=1")[1] == '{"x": 1}\n'
    assert run("--timeout", "1", "call", "vm", "agent", "sleep")[0] == cli.EXIT_TIMEOUT


def test_a_topic_may_be_named_as_list_shows_it(host: LocalHost, run: Run) -> None:
    for words in (("nova/agent",), ("agent", "--exchange", "nova")):
        assert run("cast", "vm", words[0], "echo", *words[1:])[0] == cli.EXIT_OK
        assert host.requests[-1].target == Topic("nova", "agent")
    run("cast", "vm", "agent", "echo")
    assert host.requests[-1].target == Topic("openstack", "agent")


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", "[NaN]"])
def test_what_only_python_takes_for_json_is_text(host: LocalHost, run: Run, text: str) -> None:
    assert json.loads(run("--json", "call", "vm", "agent", "echo", f"x={text}")[1]) == {"x": text}


@pytest.mark.parametrize(
    ("words", "extra"), [(("policy", "check"), "host"), (("dev", "run", "agent.py"), "dev")]
)
def test_a_command_that_lacks_a_package_says_which(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], extra: str
) -> None:
    monkeypatch.setitem(sys.modules, "oslo_config", None)
    for name in ("config", "config_files", "dev"):
        monkeypatch.delitem(sys.modules, f"vchan.host.{name}", raising=False)
        monkeypatch.delattr(f"vchan.host.{name}", raising=False)
    status, out, err = run(*words)
    assert (status, out) == (cli.EXIT_FAILED, "")
    assert err.startswith(f"vchan: {words[0]} needs oslo_config: pip install 'vchan[{extra}]'")


def test_list_status_and_ping(host: LocalHost, run: Run) -> None:
    status, out, _ = run("list")
    assert status == cli.EXIT_OK
    assert out.splitlines()[1].split() == ["vm", "u", "running", "ready", "openstack/agent"]
    assert json.loads(run("--json", "list")[1])[0]["name"] == "vm"
    assert json.loads(run("--json", "status")[1]) == {"version": "1"}
    assert json.loads(run("status", "vm", "--json")[1])["state"] == "ready"
    assert run("ping", "nobody")[0] == cli.EXIT_FAILED


def test_a_vm_that_cannot_be_told_of_is_not_taken_for_gone(host: LocalHost, run: Run) -> None:
    host.bug_of = "vm"
    status, out, err = run("call", "vm", "agent", "echo", "n=1")
    assert (status, json.loads(out)) == (cli.EXIT_OK, {"n": 1})
    assert "how vm is: InternalError" in err
    host.bug = NoSuchDomain("vm")
    assert run("call", "vm", "agent", "echo", "n=1")[2] == ""


def test_a_commands_time_is_for_all_its_questions(host: LocalHost, run: Run) -> None:
    host.status_after_s = 1.0
    status, _, err = run("--timeout", "2", "call", "vm", "agent", "never")
    assert status == cli.EXIT_TIMEOUT
    assert host.requests[-1].timeout_ms <= 1000, err


def test_a_daemon_that_says_nothing_was_asked_nothing_of_the_vm(host: LocalHost, run: Run) -> None:
    host.status_after_s = 3600.0
    status, _, err = run("--timeout", "0.2", "call", "vm", "agent", "echo")
    assert status == cli.EXIT_UNREACHABLE, err
    assert host.requests == []


def test_a_vms_problem_is_listed_after_its_topics(host: LocalHost, run: Run) -> None:
    host.problem = "in quarantine for 9 s more: over 30 handshakes a minute"
    out = run("list")[1]
    assert out.splitlines()[0].split()[-1] == "PROBLEM"
    assert "openstack/agent  in quarantine for 9 s more" in out
    assert run("release", "vm") == (cli.EXIT_OK, "", "")
    assert run("release", "nobody")[0] == cli.EXIT_FAILED


def test_what_a_guest_reports_is_shown(host: LocalHost, run: Run) -> None:
    host.guest = {"addresses": ["192.0.2.7", "fe80::1"], "os": "Debian GNU/Linux 12 (bookworm)"}
    line = run("list")[1].splitlines()[1]
    assert "192.0.2.7  Debian GNU/Linux 12 (bookworm)  openstack/agent" in line
    assert json.loads(run("--json", "facts", "vm")[1]) == {"facts": {"hostname": "a"}}


SMALL = {"path": "/", "bytes": 10, "free_files": "\x1b[2J"}


def test_what_a_guest_reports_is_said_for_people(host: LocalHost, run: Run) -> None:
    host.facts = {
        "phase": {"age_s": 3.0, "phase": "ready", "cloud_init": {"errors": []}},
        "facts": {
            "age_s": 61.2,
            "hostname": "web\x1b[2J",
            "os": {"pretty_name": "Debian GNU/Linux 12"},
            "addresses": [
                {"interface": "eth0", "family": "ipv4", "address": "192.0.2.7", "prefix": 24},
                {"interface": "eth0", "family": "ipv6", "address": "fd00::2", "prefix": 64},
                {"interface": "eth1"},
                7,
            ],
        },
        "metrics": {"age_s": 1.0, "file_systems": [SMALL], "load": [0.5, 1]},
        "agents": {"age_s": 2.0, "units": {}},
    }
    assert run("facts", "vm")[1].splitlines() == [
        "phase, 3 s ago",
        "  phase:               ready",
        "  cloud init errors:   none",
        "facts, 61 s ago",
        "  hostname:            web?[2J",
        "  os pretty name:      Debian GNU/Linux 12",
        "  addresses:           192.0.2.7/24 eth0",
        "                       fd00::2/64 eth0",
        "                       interface eth1",
        "                       7",
        "metrics, 1 s ago",
        "  file systems:        path /, bytes 10, free files ?[2J",
        "  load:                0.5",
        "                       1",
        "agents, 2 s ago",
        "  units:               none",
    ]
    host.facts = {}
    assert run("facts", "vm") == (
        cli.EXIT_OK,
        "",
        "vchan: vm has reported nothing: the policy must allow report, option report in the guest "
        "as well, and its vchan-guest must know how\n",
    )
    assert json.loads(run("--json", "facts", "vm")[1]) == {}


def test_a_list_made_without_libvirt_says_so(host: LocalHost, run: Run) -> None:
    host.status["libvirt"] = "libvirtd cannot be reached"
    _, out, problem = run("list")
    assert "vm" in out
    assert "libvirtd cannot be reached: this may be out of date" in problem


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (("call", "vm", "agent", "fail"), cli.EXIT_FAILED, "ValueError: as asked"),
        (("call", "vm", "agent", "gone"), cli.EXIT_FAILED, "went away"),
        (("call", "vm", "other", "echo"), cli.EXIT_FAILED, "no agent serves topic openstack/other"),
        (("call", "nobody", "agent", "echo"), cli.EXIT_FAILED, "no such domain"),
        (("attach", "vm"), cli.EXIT_FAILED, "no controller"),
        (("detach", "vm"), cli.EXIT_FAILED, "no method 'detach'"),
        (("--timeout", "1", "call", "vm", "agent", "sleep"), cli.EXIT_TIMEOUT, "--timeout"),
        (("call", "vm", "agent", "echo", "novalue"), cli.EXIT_USAGE, "expected KEY=VALUE"),
        (("call", "vm", "agent", "echo", "1x=2"), cli.EXIT_USAGE, "expected KEY=VALUE"),
        (("call", "vm", "agent", "echo", "x=1", "x=2"), cli.EXIT_USAGE, "x is given twice"),
        (("call", "vm", "t" * 300, "echo"), cli.EXIT_USAGE, "NAME_BYTES_MAX"),
    ],
)
def test_a_failure_is_one_line_and_a_status(
    host: LocalHost, run: Run, words: tuple[str, ...], status: int, text: str
) -> None:
    ended, out, err = run(*words)
    assert (ended, out) == (status, "")
    assert err.startswith("vchan: ")
    assert text in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [(), ("dance",), ("call", "vm"), ("--timeout", "x", "list")])
def test_wrong_usage(run: Run, words: tuple[str, ...]) -> None:
    status, out, err = run(*words)
    assert (status, out) == (cli.EXIT_USAGE, "")
    assert "usage: vchan" in err


def test_no_daemon(run: Run, path: Path) -> None:
    for words in (("list",), ("call", "vm", "agent", "echo")):
        status, out, err = run(*words)
        assert (status, out) == (cli.EXIT_UNREACHABLE, "")
        assert err.startswith(f"vchan: {path}: ")
        assert "is vchan-host running?" in err
        assert err.count("\n") == 1


def test_help_and_version(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == cli.EXIT_OK
    assert "exit status: 0 done" in out
    assert run("--version")[1].startswith("vchan ")


def test_values() -> None:
    deep = "[" * 100_000
    words = ["a=1", "b=true", "c=null", "d=x", "e=", 'f={"g": []}', f"h={deep}"]
    assert parse_values(words) == {
        "a": 1,
        "b": True,
        "c": None,
        "d": "x",
        "e": "",
        "f": {"g": []},
        "h": deep,
    }
    with pytest.raises(ConfigError):
        parse_values(["=1"])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("0", ["ping", "vm", "--count", "0"]),
        ("many", ["ping", "vm", "--count", "many"]),
        ("new", ["call", "vm", "topic", "method", "--rpc-version", "new"]),
        ("0", ["--timeout", "0", "list"]),
        ("1e9", ["--timeout", "1e9", "list"]),
        ("soon", ["--timeout", "soon", "list"]),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_done(
    wrong: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(words)
    assert ended.value.code == cli.EXIT_USAGE
    assert repr(wrong) in capsys.readouterr().err
