"""What the vchan command shows: tables, other shapes, filters; and which VM a word means."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.local_host import LocalHost
from vchan import __version__, cli
from vchan.cli import output
from vchan.cli.changes import changes, counters_of, daemon_changes, grown, rates
from vchan.cli.output import columns_of, fit, shortened
from vchan.cli.parser import build_parser, walk
from vchan.errors import ConfigError
from vchan.rpc.messages import Topic

Run = Callable[..., tuple[int, str, str]]

WEB_1 = "aaaa1111-0000-4000-8000-000000000001"
WEB_2 = "aaaa2222-0000-4000-8000-000000000002"


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        yield Path(name) / "host.sock"


@pytest.fixture
def host(path: Path) -> Iterator[LocalHost]:
    with LocalHost(path) as host:
        host.status |= {**HEALTHY, "version": __version__}
        host.add("web-2", WEB_2, "waiting", problem="no answer \x1b[2J", domain="paused")
        host.add("Web-1", WEB_1, topics=["openstack/agent", "nova/other"])
        yield host


HEALTHY = {
    "host": "h1",
    "libvirt": "connected",
    "broker": "connected",
    "policy": "4 rules",
    "policy_problem": None,
    "audit": {"problem": None, "written": 7, "lost": 0},
}


@pytest.fixture
def run(path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str) -> tuple[int, str, str]:
        try:
            status = cli.run(["--socket", str(path), *words])
        except SystemExit as end:  # argparse
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))


# ---------------------------------------------------------------- shapes


def test_list_is_sorted_and_complete_in_a_pipe(host: LocalHost, run: Run) -> None:
    assert run("list") == (
        0,
        "NAME   UUID                                  DOMAIN   CHANNEL  TOPICS"
        "                       PROBLEM\n"
        "vm     u                                     running  ready    openstack/agent\n"
        f"Web-1  {WEB_1}  running  ready    openstack/agent, nova/other\n"
        f"web-2  {WEB_2}  paused   waiting                               no answer ?[2J\n",
        "",
    )


@pytest.mark.parametrize("columns", [40, 60, 80, 132])
def test_a_table_fits_the_terminal(
    host: LocalHost, run: Run, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    terminal(monkeypatch, columns)
    lines = run("list")[1].splitlines()
    assert max(map(len, lines)) <= columns
    assert [line.split()[0] for line in lines] == ["NAME", "vm", "Web-1", "web-2"]
    assert WEB_1 in run("list", "-w")[1]
    assert ("…" in "".join(lines)) == (columns < 132)


def test_a_uuid_is_cut_after_everything_else(
    host: LocalHost, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal(monkeypatch, 90)
    out = run("list")[1]
    assert WEB_1 in out and "nova/other" not in out


def test_wide_letters_take_two_columns() -> None:
    assert columns_of("漢字é") == 5
    assert columns_of("e\u0301") == 1
    assert columns_of(shortened("漢字漢字漢字", 6)) <= 6
    assert fit(("a", "uuid"), (20, 36), 50) == [14, 36]
    assert sum(fit(("a", "uuid"), (20, 36), 20)) == 20
    assert fit(("a", "b"), (20, 36), 1) == [4, 4]


def test_columns_and_formats(host: LocalHost, run: Run) -> None:
    assert run("list", "-f", "value", "-c", "NAME", "-c", "channel")[1] == (
        "vm ready\nWeb-1 ready\nweb-2 waiting\n"
    )
    (head, *rows) = csv.reader(io.StringIO(run("-f", "csv", "list")[1]))
    assert head == ["name", "uuid", "domain", "channel", "topics", "problem"]
    assert rows[1] == ["Web-1", WEB_1, "running", "ready", "openstack/agent, nova/other", ""]
    assert json.loads(run("list", "--json", "-c", "uuid")[1])[0] == {"uuid": "u"}
    found = json.loads(run("list", "--json")[1])
    assert found[2]["problem"] == "no answer \x1b[2J"
    assert run("list", "-f", "value", "-c", "name", "--sort-column", "uuid")[1] == (
        "Web-1\nweb-2\nvm\n"
    )


@pytest.mark.parametrize(
    "words", [("-c", "colour"), ("--sort-column", "colour"), ("-f", "value", "-c", "")]
)
def test_a_column_that_is_none(host: LocalHost, run: Run, words: tuple[str, ...]) -> None:
    status, out, err = run("list", *words)
    assert (status, out) == (cli.EXIT_USAGE, "")
    assert "expected one of name, uuid, domain, channel, topics" in err


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--name", "WEB-*"), "Web-1 web-2"),
        (("--channel", "ready"), "vm Web-1"),
        (("--domain", "paused"), "web-2"),
        (("--topic", "other"), "Web-1"),
        (("--topic", "openstack/*"), "vm Web-1"),
        (("--problems",), "web-2"),
        (("--problems", "--channel", "ready"), ""),
    ],
)
def test_filters(host: LocalHost, run: Run, words: tuple[str, ...], names: str) -> None:
    status, out, _ = run("list", "-f", "value", "-c", "name", *words)
    assert (status, " ".join(out.split())) == (0, names)
    assert run("list", "--name", "")[0] == cli.EXIT_USAGE


NOVAS: dict[str, Any] = {
    "server": "shop front \x1b[2J",
    "project": "7c1d0e2f3a4b5c6d7e8f9a0b1c2d3e4f",
    "project_name": "Shop",
    "user": "0f3b",
    "user_name": None,
    "flavor": "m1.small",
    "loses_channel": "at the next hard reboot",
}


def test_a_server_of_novas_is_known_by_what_nova_calls_it(host: LocalHost, run: Run) -> None:
    host.add("instance-0000002a", "u-nova", **NOVAS)
    lines = run("list")[1].splitlines()
    assert lines[0].split()[:4] == ["NAME", "SERVER", "PROJECT", "NAME"]
    assert lines[1].split()[:5] == ["instance-0000002a", "shop", "front", "?[2J", "Shop"]
    for words in (
        ("--server", "shop front*"),
        ("--project", "7c1d*"),
        ("--project", "shop"),
        ("-c", "name", "--project", "SHOP"),
    ):
        assert run("list", "-f", "value", *words)[1].startswith("instance-0000002a")
        assert len(run("list", "-f", "value", *words)[1].splitlines()) == 1
    assert run("list", "-f", "value", "--server", "other")[1] == ""
    lines = run("status", "instance-0000002a")[1].splitlines()
    assert "  server:              shop front ?[2J" in lines
    assert "  project:             Shop (7c1d0e2f3a4b5c6d7e8f9a0b1c2d3e4f)" in lines
    assert "  user:                0f3b" in lines
    assert "  host:                h1" in lines
    assert "  loses its channel:   at the next hard reboot" in lines
    # A name of nova's is the tenant's choice: nothing is found by it.
    assert run("status", "shop front \x1b[2J")[0] == cli.EXIT_FAILED


def test_doctor_says_once_who_loses_a_channel(host: LocalHost, run: Run) -> None:
    for number in range(12):
        host.add(f"instance-{number:02}", f"u-{number}", **NOVAS)
    out = run("doctor")[1]
    assert "nova: 12 VMs lose their channels at the next hard reboot: instance-00, " in out
    assert "instance-09 and 2 more" in out and "instance-10" not in out
    assert "nova-manage image_property set UUID" in out
    out = run("doctor", "instance-11")[1]
    assert "nova: 1 VM loses its channel at the next hard reboot: instance-11\n" in out
    assert "nova:" not in run("doctor", "vm")[1]


def test_rules_that_ask_what_nova_has_not_written_are_told_of(host: LocalHost, run: Run) -> None:
    host.add("old", "u-old", unlabelled="nova is older")
    host.add("new", "u-new", unlabelled=None)
    host.details["new"] = {"labels": {"extra-spec:a": "1", "property:b": "2"}}
    out = run("doctor")[1]
    assert "nova: 1 VM is in no rule by extra-spec or property: nova is older: old\n" in out
    assert "  labels:              nova is older" in run("status", "old")[1]
    assert "  labels:              extra-spec:a=1, property:b=2" in run("status", "new")[1]
    assert "labels" not in run("status", "vm")[1]


def test_results_of_calls_have_shapes_too(host: LocalHost, run: Run) -> None:
    call = ("call", "vm", "agent", "echo", "n=1", 'more={"x": [1]}')
    assert run(*call, "-f", "table")[1].splitlines() == [
        "FIELD   VALUE",
        "n       1",
        "more.x  [1]",
    ]
    assert run(*call, "-f", "value", "-c", "n")[1] == "1\n"
    assert run(*call, "-c", "dance")[0] == cli.EXIT_USAGE
    assert json.loads(run(*call, "--json", "-c", "more")[1]) == {"more": {"x": [1]}}


def test_every_command_has_json_or_refuses_it(host: LocalHost, run: Run, path: Path) -> None:
    """Those that print a text for another program refuse it, all in the same words."""
    assert json.loads(run("cast", "vm", "agent", "echo", "--json")[1])["done"] == "taken"
    assert json.loads(run("release", "vm", "--json")[1])["done"] == "released"
    assert json.loads(run("status", "vm", "--json")[1])["name"] == "vm"
    assert json.loads(run("doctor", "vm", "--json")[1])[0]["where"] == "vm"
    for words in (("help",), ("completion", "bash")):
        status, out, err = run(*words, "--json")
        assert (status, out) == (cli.EXIT_USAGE, "")
        assert err == f"vchan: vchan {words[0]}: prints text: it has no --format or --json\n"
    status, _, err = run("metrics", "--listen", "127.0.0.1:1", "--json")
    assert (status, "it has no --format" in err) == (cli.EXIT_USAGE, True)


# ---------------------------------------------------------------- which VM


@pytest.mark.parametrize("word", ["Web-1", WEB_1, WEB_1.upper(), "aaaa1", "AAAA1111", WEB_1[:-1]])
def test_what_a_vm_may_be_called(host: LocalHost, run: Run, word: str) -> None:
    assert json.loads(run("status", word, "--json")[1])["name"] == "Web-1"


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("aaaa", "'aaaa' is the beginning of several UUIDs: "),
        ("aaa", "'aaa': this host has no such domain; vchan list has"),
        ("web-1", "'web-1': this host has no such domain: perhaps "),
        ("", "'': this host has no such domain"),
        ("a*", "no such domain"),
        ("x\x1b[2J", "no such domain"),
    ],
)
@pytest.mark.parametrize("command", ["status", "attach", "release", "doctor"])
def test_a_vm_that_is_none(host: LocalHost, run: Run, command: str, word: str, text: str) -> None:
    status, out, err = run(command, word)
    assert (status, out) == (cli.EXIT_FAILED, "")
    assert text in err
    assert err.count("\n") == 1 and err.rstrip("\n").isprintable()


def test_a_call_goes_to_the_vm_that_is_meant_and_to_no_other(host: LocalHost, run: Run) -> None:
    host.rename_first("dddd4444-0000-4000-8000-000000000004")
    assert run("call", "DDDD4444", "agent", "echo")[0] == cli.EXIT_OK
    assert host.requests[-1].server == "dddd4444-0000-4000-8000-000000000004"
    status, _, err = run("call", "aaaa", "agent", "echo")
    assert (status, "several UUIDs" in err) == (cli.EXIT_FAILED, True)
    assert len(host.requests) == 1


# ---------------------------------------------------------------- what is said


def test_status_is_for_people(host: LocalHost, run: Run) -> None:
    host.status |= {
        "totals": {"losses": 3, "cures": 0},
        "files": {"config": ["/etc/v.conf"], "policy_dir": "/etc/p", "audit_log": "/var/a"},
    }
    lines = run("status")[1].splitlines()
    assert lines[0] == f"vchan-host {__version__} on h1"
    assert "  policy:              4 rules, /etc/p" in lines
    assert "  audit log:           7 lines written, /var/a" in lines
    assert "    3 losses" in lines
    assert not any("cures" in line for line in lines)
    lines = run("status", "Web-1")[1].splitlines()
    assert lines[0] == f"Web-1  {WEB_1}"
    assert "  serves:              openstack/agent, nova/other" in lines
    assert run("status", "-f", "value", "-c", "audit.written")[1] == "7\n"


def test_a_topic_that_nobody_serves_is_named_whole(host: LocalHost, run: Run) -> None:
    status, _, err = run("call", "vm", "nova/other", "echo")
    assert status == cli.EXIT_FAILED
    assert "no agent serves topic nova/other; served in vm: openstack/agent" in err


def test_a_denied_topic_names_the_rule(host: LocalHost, run: Run) -> None:
    rule = "/etc/vchan/policy.d/50-a.policy:3"
    host.details["vm"] = {
        "requests": {"topics": [], "denied_topics": ["openstack/secret", "nova/other"]},
        "denied_by": {"openstack/secret": rule, "nova/other": "default"},
        "replies_denied_by": {"openstack/agent": rule},
    }
    out = run("doctor", "vm")[1]
    assert f"vm: its agents serve openstack/secret, and {rule} denies it" in out
    assert "vm: its agents serve nova/other, and no rule allows it" in out
    assert f"vm: its agents would answer callers of openstack/agent, and {rule} denies it" in out
    out = run("status", "vm")[1]
    assert f"openstack/secret ({rule})" in out
    assert f"  answers denied:      openstack/agent ({rule})" in out


def test_a_vm_that_is_not_listened_to_is_said_to_be(host: LocalHost, run: Run) -> None:
    rule = "/etc/vchan/policy.d/50-a.policy:2"
    host.details["vm"] = {"mute_by": rule}
    assert f"openstack/agent; not listened to: {rule}" in run("doctor", "vm")[1]
    assert f"  not listened to:     {rule}" in run("status", "vm")[1]
    host.details["vm"] = {"mute_by": "default"}
    assert "not listened to: no rule lets it say anything" in run("doctor", "vm")[1]
    assert "  not listened to:     no rule lets it say anything" in run("status", "vm")[1]


def test_a_remote_traceback_is_told_on_request(host: LocalHost, run: Run) -> None:
    words = ("call", "vm", "agent", "trace")
    assert run(*words)[2] == "vchan: ValueError: as asked\n"
    said = run("-v", *words)[2].splitlines()
    assert said[0] == "vchan: ValueError: as asked"
    assert said[1:] == ["vchan:     Traceback:", "vchan:       File ?[2J", "vchan:     ValueError"]


def test_a_paused_vm_is_said_to_be(host: LocalHost, run: Run) -> None:
    host.details["vm"] = {"domain": "paused"}
    assert "vm is paused; waiting for it, 10 s at most" in run("call", "vm", "agent", "echo")[2]


def test_ping_sums_up(host: LocalHost, run: Run) -> None:
    host.pings = [0.0, None, 0.0]
    status, out, _ = run("ping", "vm", "--timeout", "1")
    assert status == cli.EXIT_TIMEOUT
    first, second, _, last = out.splitlines()
    assert first.startswith("answer from vm: ")
    assert second == "no answer from vm in 1 s"
    assert last.startswith("asked 3, answered 2; shortest ")
    host.pings = [0.0]
    rows = [
        json.loads(line) for line in run("ping", "vm", "--count", "2", "--json")[1].splitlines()
    ]
    assert [row["number"] for row in rows] == [1, 2]
    host.pings = [None]
    status, out, err = run("ping", "vm", "--count", "1", "--timeout", "0.3")
    assert (status, out.splitlines()[-1]) == (cli.EXIT_TIMEOUT, "asked 1, answered 0")
    assert "may have run" in err


def test_doctor_speaks_of_one_vm(host: LocalHost, run: Run) -> None:
    assert run("doctor", "Web-1")[1] == (
        "ok       Web-1: running, ready, serves openstack/agent, nova/other\n"
        "problems: 0, warnings: 0\n"
    )
    out = run("doctor", "web-2")[1]
    assert "warning  web-2: the VM is paused" in out
    assert "Web-1" not in out


def test_doctor_speaks_of_the_daemon_where_that_is_the_trouble(host: LocalHost, run: Run) -> None:
    host.status["libvirt"] = "libvirtd cannot be reached"
    status, out, _ = run("doctor", "Web-1")
    assert (status, out.splitlines()[0]) == (
        cli.EXIT_FAILED,
        "problem  libvirt: libvirtd cannot be reached",
    )


def test_doctor_and_policy_look_at_what_the_daemon_has_read(
    host: LocalHost, run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "own.conf"
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "50-x.policy").write_text("listen any agent allow\n" * 2)
    file.write_text(f"[vchan]\nselct = *\npolicy_dir = {tmp_path}/p\n")
    host.status["files"] = {"config": [str(file)], "config_dirs": [], "policy_dir": "x"}
    out = run("doctor")[1]
    assert f"{file}: [vchan] selct is no option" in out
    assert f"{tmp_path}/p/50-x.policy:2" in out
    assert (
        run("policy", "check")[1] == "no errors; rules: 2; lines of limits: 0, own: 0, context: 0\n"
    )
    file.unlink()
    status, _, err = run("policy", "check")
    assert (status, f"{file}: no such file" in err) == (cli.EXIT_USAGE, True)


# ---------------------------------------------------------------- words


def test_values_of_every_form(host: LocalHost, run: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("12")
    (tmp_path / "json").write_text('{"x": 1}')
    words = ("a=1", "b:=1", 'c:="1"', f"d=@{tmp_path}/text", f"e:=@{tmp_path}/json", "f=x:=y")
    assert json.loads(run("call", "vm", "agent", "echo", *words, "--json")[1]) == {
        "a": 1,
        "b": 1,
        "c": "1",
        "d": "12",
        "e": {"x": 1},
        "f": "x:=y",
    }


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("a:=x", "what stands after := is no JSON"),
        ("a:=NaN", "what stands after := is no JSON"),
        ("a:=" + "[" * 100_000, "nested too deep"),
        ("a=@/nonexistent", "file '/nonexistent': No such file or directory"),
        ("a:=@/etc", "file '/etc': Is a directory"),
        ("a=@/dev/zero", "is larger than a request may be"),
        ("a=@", "after @ there is no file; the text itself, if it begins with @: "),
        ("a:=@/dev/null", "argument 'a:=@/dev/null': the file is no JSON: "),
        ("a=@/bin/true", "is not UTF-8"),
        (":=1", "expected KEY=VALUE, KEY:=JSON"),
        ("a", "expected KEY=VALUE, KEY:=JSON"),
    ],
)
def test_a_value_that_is_none(host: LocalHost, run: Run, word: str, text: str) -> None:
    status, out, err = run("call", "vm", "agent", "echo", word)
    assert (status, out) == (cli.EXIT_USAGE, "")
    assert text in err
    assert err.count("\n") == 1
    assert host.requests == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("lsit",), "there is no 'lsit': perhaps list is meant"),
        (("policy", "chek"), "there is no 'chek': perhaps check is meant"),
        (("list", "--jsno"), "not understood: --jsno: perhaps --json is meant"),
        (("list", "--channnel=ready"), "perhaps --channel is meant"),
        (("list", "-f", "jsn"), "there is no 'jsn': perhaps json is meant"),
        (("list", "more"), "not understood: more"),
        (("call", "vm"), "the following arguments are required: TOPIC, METHOD"),
        (("completion", "fihs"), "perhaps fish is meant"),
        (("help", "lsit"), "perhaps list is meant"),
    ],
)
def test_what_was_meant(run: Run, words: tuple[str, ...], text: str) -> None:
    status, out, err = run(*words)
    assert (status, out) == (cli.EXIT_USAGE, "")
    assert text in err
    assert "--help" in err.splitlines()[-1]


def test_help_of_a_command(run: Run) -> None:
    for words in (("policy", "check"), ("call",), ()):
        status, out, _ = run("help", *words)
        assert status == 0
        assert out == run(*words, "--help")[1]
        assert out.startswith(" ".join(("usage: vchan", *words)))


def test_every_argument_of_every_command_is_described() -> None:
    bare = [
        f"{' '.join(path)} {action.dest}"
        for path, parser in walk(build_parser())
        for action in parser._actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ]
    assert bare == []
    silent = [path for path, parser in walk(build_parser()) if not parser.description]
    assert silent == []


# ---------------------------------------------------------------- unreachable


def test_advice_fits_the_state(run: Run, path: Path) -> None:
    for words in (("list",), ("call", "vm", "a", "b"), ("doctor",), ("ping", "vm"), ("watch",)):
        assert "systemctl status vchan-host" in "".join(run(*words)[1:])
    path.mkdir()
    status, _, err = run("list")
    assert (status, err.removeprefix(f"vchan: {path}: ")) == (
        cli.EXIT_UNREACHABLE,
        "is there and is no socket: give the path of a daemon's socket; see --socket, and option "
        "socket in vchan.conf\n",
    )
    if os.geteuid() != 0:
        path.chmod(0)
        assert "may not open it" in run("list")[2]


def test_a_daemon_that_stands_still_has_advice_too(run: Run, path: Path) -> None:
    """Its socket takes connections for a while, and then no more."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        for words in (("list",), ("call", "vm", "a", "b"), ("doctor",)):
            said = "".join(run("--timeout", "0.2", *words)[1:])
            assert "does not answer" in said and "systemctl status vchan-host" in said
        server.listen(0)
        told = f"vchan: {path}: other clients are waiting for it already"
        assert run("list")[2] == f"{told}; systemctl status vchan-host\n"


def test_output_that_cannot_be_written_is_told(
    host: LocalHost, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", output._Closed())
    for words in (("list",), ("status",), ("ping", "vm"), ("doctor", "vm"), ("help", "list")):
        status, _, err = run(*words)
        assert (status, err) == (
            cli.EXIT_FAILED,
            "vchan: standard output cannot be written: it is closed\n",
        )


# ---------------------------------------------------------------- what changes


def row(name: str, **fields: object) -> dict[str, object]:
    own = {"uuid": name, "name": name, "domain": "running", "channel": "ready", "topics": []}
    return {**own, "problem": None, **fields}


def test_changes_of_vms() -> None:
    before = {
        "a": row("a", problem="in quarantine for 9 s more"),
        "b": row("b", topics=["x/1", "x/2"]),
        "c": row("c"),
    }
    after = {
        "a": row("a", problem="in quarantine for 8 s more", channel="waiting"),
        "b": row("b", topics=["x/2", "x/3"]),
        "d": row("d", topics=["x/1"]),
    }
    assert [(each.event, each.name, each.text) for each in changes(before, after)] == [
        ("channel", "a", "channel ready -> waiting"),
        ("topics", "b", "serves x/3; serves x/1 no more"),
        ("went", "c", "is no more on this host"),
        ("came", "d", "is here: running, channel ready, serves x/1"),
    ]
    assert list(changes(after, after)) == []
    (over,) = changes({"a": before["a"]}, {"a": row("a")})
    assert over.text == "problem is over"


def test_changes_of_the_daemon() -> None:
    (change,) = daemon_changes({"broker": "connected"}, {"broker": "refused"})
    assert change.text == "broker: refused"


def test_counters_that_grow_and_rates() -> None:
    old = {
        "session": {"losses": 1, "frames_sent": 10},
        "requests": {"answered": 5, "from_guest": {}},
    }
    new = {
        "session": {"losses": 3, "frames_sent": 30},
        "requests": {"answered": 9, "open": 2, "from_guest": {"guest_denied": 1}},
        "backlog_bytes": 7,
    }
    told = [each.text for each in grown("u", "vm", counters_of(old), counters_of(new))]
    assert told == [
        "2 losses detected and repaired",
        "1 requests of the guest's denied by the policy",
    ]
    assert list(grown("u", "vm", counters_of(new), counters_of(new))) == []
    (line,) = rates([row("vm", uuid="u"), row("off", channel="none")], {"u": old}, {"u": new}, 2.0)
    assert (line["calls"], line["sent"], line["losses"]) == (2.0, 10.0, 1.0)
    assert (line["open"], line["backlog"]) == (2, 7)


def test_watch_prints_what_changes(host: LocalHost, run: Run) -> None:
    host.looks = [lambda: host.remove("web-2"), lambda: host.add("new", "n")]
    status, out, err = run("watch", "--interval", "0.05", "--count", "3")
    assert status == 0
    assert err == "vchan: 3 VMs; what changes from now on:\n"
    assert [line.split("  ")[1:] for line in out.splitlines()] == [
        ["web-2", "is no more on this host"],
        ["new", "is here: running, channel ready"],
    ]
    host.looks, host.lists = [lambda: host.remove("new")], 0
    out = run("watch", "--interval", "0.05", "--count", "2", "--json")[1]
    assert json.loads(out)["event"] == "went"


def test_top_prints_each_look_in_a_pipe(host: LocalHost, run: Run) -> None:
    status, out, _ = run("top", "--interval", "0.05", "--count", "2", "--name", "web-*")
    assert status == 0
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [
        ["NAME", "CHANNEL"],
        ["Web-1", "ready"],
        ["web-2", "waiting"],
    ]
    assert len(lines) == 6
    found = json.loads(run("top", "--interval", "0.05", "--count", "1", "--json")[1])
    assert {each["name"] for each in found} == {"vm", "Web-1", "web-2"}
    assert run("top", "--count", "0")[0] == cli.EXIT_USAGE


def test_a_topic_is_split() -> None:
    from vchan.cli.requests import target

    assert target("a/b") == Topic("a", "b")
    assert target("b") == Topic("openstack", "b")
    with pytest.raises(ConfigError):
        output._known_name("x", ["y"])
