"""Unit files, and what the control side may do."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from vchan.agents.allowed import DEFAULT_ALLOW, VERBS, Allowed
from vchan.agents.standard.agent import read_rules
from vchan.agents.standard.permissions import Rules
from vchan.agents.super_agent import UNIT_BYTES_MAX, read_units
from vchan.agents.supervisor import RestartPolicy
from vchan.agents.units import UNITS_MAX, Unit, UnitLimits, parse_unit
from vchan.errors import ConfigError, Rejected

EXAMPLES = Path(__file__).parents[2] / "examples"

WHOLE = """
command = ["/usr/bin/python3", "/opt/web/agent.py"]
user = "web"
group = "vchan"
directory = "/opt/web"
environment = { LANG = "C", EMPTY = "" }
restart = "on-failure"
restart_delay_s = 1
restart_delay_max_s = 30.5
stop_timeout_s = 0
autostart = false
survive = true
topics = ["web", "files"]
systemd = "web@1.service"
[limits]
memory = "256M"
cpu_s = 60
files = 64
processes = 8
"""


@pytest.fixture(autouse=True)
def plain_umask() -> Iterator[None]:
    """Files that others can change are refused."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def parse(text: str, name: str = "web") -> Unit:
    return parse_unit(name, f"/etc/vchan/agents.d/{name}.toml", tomllib.loads(text))


def test_everything_a_unit_can_say() -> None:
    assert parse(WHOLE) == Unit(
        "web",
        ("/usr/bin/python3", "/opt/web/agent.py"),
        "web",
        "vchan",
        "/opt/web",
        {"LANG": "C", "EMPTY": ""},
        RestartPolicy("on-failure", 1.0, 30.5, 0.0),
        False,
        True,
        ("web", "files"),
        UnitLimits(256 << 20, 60, 64, 8),
        "web@1.service",
    )


def test_the_least_a_unit_must_say() -> None:
    unit = parse('command = ["/bin/true"]')
    assert unit == Unit("web", ("/bin/true",))
    assert unit.autostart
    assert not unit.survive
    assert unit.policy == RestartPolicy("always", 0.5, 60.0, 10.0)


def test_a_unit_of_systemd() -> None:
    unit = parse('systemd = "web.service"\ntopics = ["web"]')
    assert unit == Unit("web", systemd="web.service", topics=("web",), autostart=False)


@pytest.mark.parametrize(
    ("text", "size"), [("1000", 1000), ('"7"', 7), ('"3K"', 3072), ('"1G"', 1 << 30)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse(f'command = ["/x"]\nlimits = {{ memory = {text} }}').limits.memory_bytes == size


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("", "command", 'is missing: expected ["/path/to/program", ...]'),
        ("command = []", "command", "expected the program's absolute path"),
        ('command = "ls"', "command", "'ls': expected the program's absolute path"),
        ('command = ["ls"]', "command", "['ls']: expected the program's absolute path"),
        ('command = ["/x", 1]', "command", "expected the program's absolute path"),
        ('command = ["/x", "\\u0000"]', "command", "expected the program's absolute path"),
        ("user = 5", "user", "5: expected a text"),
        ('user = ""', "user", "'': expected a text"),
        ('directory = "tmp"', "directory", "'tmp': expected an absolute path"),
        ("environment = { A = 1 }", "environment", "expected a table of texts"),
        ('environment = { "A=B" = "" }', "environment", "expected a table of texts"),
        ("environment = []", "environment", "[]: expected a table of texts"),
        ('restart = "never"', "restart", '\'never\': expected "always", "on-failure" or "no"'),
        ("restart_delay_s = 0", "restart_delay_s", "0: expected seconds, 0.01 to 86400"),
        ("restart_delay_s = true", "restart_delay_s", "True: expected seconds"),
        ("restart_delay_s = 99", "restart_delay_max_s", "expected at least restart_delay_s (99)"),
        ("stop_timeout_s = -1", "stop_timeout_s", "-1: expected seconds, 0 to 86400"),
        ("stop_timeout_s = nan", "stop_timeout_s", "nan: expected seconds"),
        ('autostart = "yes"', "autostart", "'yes': expected true or false"),
        ("survive = 1", "survive", "1: expected true or false"),
        ('topics = "web"', "topics", "'web': expected a list of texts"),
        ('topics = [""]', "topics", "expected a list of texts"),
        ('systemd = "web"', "systemd", "'web': expected the name of a service"),
        ('systemd = "--now.service"', "systemd", "expected the name of a service"),
        ('systemd = "a b.service"', "systemd", "expected the name of a service"),
        ("limits = 5", "limits", "5: expected a table"),
        ('limits = { memory = "much" }', "limits: memory", "'much': expected bytes"),
        ("limits = { memory = 0 }", "limits: memory", "0: expected bytes"),
        ('limits = { memory = "0K" }', "limits: memory", "expected more than 0 bytes"),
        ("limits = { cpu_s = 0 }", "limits: cpu_s", "0: expected a whole number over 0"),
        ("limits = { files = 1.5 }", "limits: files", "1.5: expected a whole number"),
        ("limits = { memroy = 1 }", "limits: memroy", "no such limit; expected one of memory,"),
        ("comand = 1", "comand", "no such key; expected one of systemd, command,"),
    ],
)
def test_a_wrong_unit_says_which_key_and_what_was_expected(
    text: str, key: str, expected: str
) -> None:
    is_about_command = key == "command" or not text
    with pytest.raises(ConfigError) as caught:
        parse(text if is_about_command else f'command = ["/x"]\n{text}')
    assert str(caught.value).startswith(f"/etc/vchan/agents.d/web.toml: {key}: ")
    assert expected in str(caught.value)


def test_a_unit_of_systemd_takes_nothing_that_is_systemds() -> None:
    with pytest.raises(ConfigError, match=r"web\.toml: user: systemd's unit says that"):
        parse('systemd = "web.service"\nuser = "web"')


@pytest.mark.parametrize("name", ["", "-x", "a b", "x" * 64, "../x", "\u00fc"])
def test_a_unit_has_a_plain_name(name: str) -> None:
    with pytest.raises(ConfigError, match="a unit's name is letters, digits"):
        parse_unit(name, "file", {})


# --- a directory


def test_a_directory_of_units(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text('command = ["/bin/true"]')
    (tmp_path / "bad.toml").write_text("command = [")
    (tmp_path / "worse.toml").write_bytes(b"\xff")
    (tmp_path / "unknown.toml").write_text('command = ["/x"]\nuser = "nobody-at-all"')
    (tmp_path / "group.toml").write_text('command = ["/x"]\ngroup = "nobody-at-all"')
    (tmp_path / "large.toml").write_text("#" * (UNIT_BYTES_MAX + 1))
    (tmp_path / "directory.toml").mkdir()
    (tmp_path / "README").write_text("not a unit")
    units, broken = read_units(str(tmp_path))
    assert list(units) == ["good"]
    assert {name: text.partition(": ")[2][:40] for name, text in broken.items()} == {
        "bad": "is no TOML: Invalid value (at end of doc",
        "worse": "is no TOML: 'utf-8' codec can't decode b",
        "unknown": "user: this system has no user 'nobody-at",
        "group": "group: this system has no group 'nobody-",
        "large": "is over 65536 bytes (UNIT_BYTES_MAX)",
        "directory": "cannot be read: Is a directory",
    }
    assert all(text.startswith(f"{tmp_path}/{name}.toml") for name, text in broken.items())


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_unit_that_others_can_change_is_not_run(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "one.toml"
    file.write_text('command = ["/bin/true"]')
    file.chmod(mode)
    _, broken = read_units(str(tmp_path))
    expected = f"others can change it (uid {os.getuid()}, mode {mode:04o}): chown root and chmod"
    assert expected in broken["one"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_unit_of_somebody_else_is_not_run(tmp_path: Path) -> None:
    file = tmp_path / "one.toml"
    file.write_text('command = ["/bin/true"]')
    os.chown(file, 65534, 0)
    assert "others can change it (uid 65534" in read_units(str(tmp_path))[1]["one"]


def test_no_directory(tmp_path: Path) -> None:
    assert read_units(str(tmp_path / "none")) == ({}, {})
    (tmp_path / "file").write_text("")
    units, broken = read_units(str(tmp_path / "file"))
    assert units == {}
    assert "cannot be read: Not a directory" in broken["?"]


def test_units_are_bounded(tmp_path: Path) -> None:
    for number in range(UNITS_MAX + 1):
        (tmp_path / f"u{number:03}.toml").write_text('command = ["/bin/true"]')
    units, broken = read_units(str(tmp_path))
    assert len(units) == UNITS_MAX
    assert list(broken) == [f"u{UNITS_MAX:03}"]
    assert "UNITS_MAX" in broken[f"u{UNITS_MAX:03}"]


def test_the_examples_and_the_manual_are_right() -> None:
    files = [*(EXAMPLES / "agents.d").glob("*.toml")]
    assert len(files) >= 2
    for file in files:
        assert parse(file.read_text(), file.stem).topics
    rules = read_rules(str(EXAMPLES / "standard.toml"), required=True)
    assert rules == Rules(rules.where)  # what it says by itself is what holds without it
    manual = (EXAMPLES.parent / "docs" / "guest.md").read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", manual, re.DOTALL)
    unit = parse(block)
    assert unit.policy == RestartPolicy()  # the values it shows are the defaults that it names
    assert (unit.autostart, unit.survive) == (True, False)


# --- what is allowed


def test_by_default_nothing_that_changes_the_guest_or_shows_its_logs() -> None:
    allowed = Allowed()
    may = {verb for verb in VERBS if allowed.allows(verb, "web")}
    assert may == {"ping", "info", "list", "state"}
    assert DEFAULT_ALLOW == "ping, info, list, state"


def test_patterns() -> None:
    allowed = Allowed("restart:web*, restart:db, log, stop:[ab]?")
    assert allowed.allows("restart", "web-1")
    assert allowed.allows("restart", "db")
    assert not allowed.allows("restart", "db2")
    assert not allowed.allows("restart", "Web")
    assert allowed.allows("log", "anything")
    assert allowed.allows("stop", "b2")
    assert not allowed.allows("stop", "c2")
    assert not allowed.allows("ping")
    assert not allowed.allows("start", "web")


def test_the_owner_may_forbid_everything() -> None:
    allowed = Allowed("")
    assert not any(allowed.allows(verb, "web") for verb in VERBS)
    with pytest.raises(Rejected, match=r"restart web: the owner of this guest does not allow it"):
        allowed.require("restart", "web")
    with pytest.raises(Rejected, match=r"^ping: the owner"):
        allowed.require("ping")


@pytest.mark.parametrize(
    "text", ["everything", "ping:x", "list:web", "start:", "start web", ":x", "freeze:x"]
)
def test_what_cannot_be_allowed(text: str) -> None:
    expected = "expected ping, info, list, freeze, set-time, and VERB or VERB:UNIT of state"
    with pytest.raises(ValueError, match=expected):
        Allowed(text)
