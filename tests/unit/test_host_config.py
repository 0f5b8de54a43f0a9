"""vchan-host's configuration, and how the daemon starts, refuses to start, and ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("oslo_config", reason='oslo.config is not installed: pip install "vchan[host]"')
pytest.importorskip("oslo_messaging", reason="oslo.messaging is not installed")
pytest.importorskip("amqp", reason="py-amqp is not installed")

from vchan import cli
from vchan.client import Client
from vchan.errors import ConfigError, LinkError
from vchan.host import config
from vchan.host.policy import Ask, Effect, Facts, Kind

ROOT = Path(__file__).parents[2]
WAIT_S = 30.0
NO_LIBVIRT = "qemu+unix:///session?socket=/nonexistent/libvirt-sock"


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        yield Path(name)


def load(directory: Path, *lines: str) -> Any:
    file = directory / "vchan.conf"
    file.write_text("\n".join(lines) + "\n")
    return config.load(["--config-file", str(file)])


# --- the file


def test_the_defaults(directory: Path) -> None:
    conf = load(directory)
    assert conf.vchan.libvirt_uri == "qemu:///system"
    assert config.socket_mode(conf) == 0o660
    assert conf.vchan.listen_topics == conf.vchan.select == []
    assert conf.vchan.policy_dir == "/etc/vchan/policy.d"
    assert conf.vchan.audit_log == "/var/log/vchan/audit.log"
    assert config.guest_context_allow(conf) == {"request_id", "global_request_id", "resource_uuid"}
    assert not config.names_a_broker(conf)


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["[vchan]", "queues_expire_after = x"], "vchan.conf is not valid: invalid literal"),
        (["[vchan]", "socket_mode = 999"], "[vchan] socket_mode: '999' is no octal mode"),
        (["[vchan]", "socket = relative"], "[vchan] socket: 'relative' is no absolute path"),
        (["[vchan]", "select = color:red"], "[vchan] select"),
        (["[vchan]", "select = uuid:x"], "[vchan] select"),
        (["[vchan]", "listen_topics = a, b/c/d"], "[vchan] listen_topics:2: 'b/c/d'"),
        (["[vchan]", "listen_topics = a # b"], "a comment needs a line of its own"),
        (["[vchan]", "policy_dir = policy.d"], "[vchan] policy_dir: 'policy.d' is no absolute"),
        (["[vchan]", "audit_log = audit"], "[vchan] audit_log: 'audit' is no absolute path"),
        (["[vchan]", "guest_context_allow = Roles"], "[vchan] guest_context_allow: 'Roles'"),
        (["[vchan]", "guest_context_allow = is_admin"], "'is_admin' says who somebody is"),
        (["[vchan]", "failure_modules = a b"], "[vchan] failure_modules: 'a b'"),
        (["[vchan"], "vchan.conf"),
        (["nonsense"], "vchan.conf"),
    ],
)
def test_a_wrong_value_says_which_and_what_was_expected(
    directory: Path, lines: list[str], text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(directory, *lines)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_who_names_a_file_means_no_other(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """oslo.config looks for a directory all the same: here, in place of /etc, in the home."""
    monkeypatch.setenv("HOME", str(directory))
    snippets = directory / ".vchan" / "vchan.conf.d"
    snippets.mkdir(parents=True)
    (snippets / "x.conf").write_text("[vchan]\nhost = of-the-directory\n")
    assert config.load([]).vchan.host == "of-the-directory"
    named = load(directory, "[vchan]", "host = of-the-file")
    assert named.vchan.host == "of-the-file"
    assert not named.config_dir
    both = ["--config-file", str(directory / "vchan.conf"), "--config-dir", str(snippets)]
    assert config.load(both).vchan.host == "of-the-directory"


def test_no_such_file(directory: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        config.load(["--config-file", str(directory / "nothing")])


def test_the_policy_is_of_the_files_and_then_of_listen_topics(directory: Path) -> None:
    files = directory / "policy.d"
    files.mkdir()
    (files / "50-x.policy").write_text("listen any secret deny\n")
    conf = load(directory, "[vchan]", f"policy_dir = {files}", "listen_topics = *")
    policy = config.policy(conf)
    vm = Facts("11111111-2222-3333-4444-555555555555")
    assert policy.decide(vm, Ask(Kind.LISTEN, "openstack", "agent")).effect is Effect.ALLOW
    assert policy.decide(vm, Ask(Kind.LISTEN, "openstack", "secret")).effect is Effect.DENY
    (files / "50-x.policy").write_text("listen any\n")
    with pytest.raises(ConfigError, match=r"50-x.policy:1: the line ends"):
        config.policy(conf)


def test_whose_exceptions_pass(directory: Path) -> None:
    rule = config.failure_rule(load(directory))
    assert rule("builtins") and rule("vchan.errors") and rule("oslo_messaging.exceptions")
    assert not rule("os") and not rule("nova.exception") and not rule("oslo_messaging")
    rule = config.failure_rule(load(directory, "[vchan]", "failure_modules = trove.*"))
    assert rule("trove.common.exception") and rule("vchan.errors")
    assert not rule("builtins")


def test_options_for_the_sample() -> None:
    assert config.list_opts()[0][0] == "vchan"
    assert all(option.help for option in config.OPTIONS)


# --- the process


class HostProcess:
    """A vchan-host with a configuration of these lines."""

    def __init__(self, directory: Path, *lines: str) -> None:
        self.socket = directory / "host.sock"
        self.out = directory / "out"
        self._file = directory / "vchan.conf"
        self._file.write_text("\n".join(lines) + "\n")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.out.open("ab") as output:
            self.process = subprocess.Popen(self._command(), cwd=ROOT, stdout=output, stderr=output)

    def run(self) -> tuple[int, str]:
        """To its end: exit status, standard error."""
        done = subprocess.run(
            self._command(), cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S, check=False
        )
        # Libraries warn of their own age before ours begins.
        lines = [line for line in done.stderr.splitlines() if line.startswith("vchan-host")]
        return done.returncode, "\n".join(lines)

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "vchan.host.daemon", "--config-file", str(self._file)]

    def status(self) -> Any:
        """Its own, once it answers."""
        deadline_s = time.monotonic() + WAIT_S
        while True:
            try:
                with Client(str(self.socket)) as client:
                    return client.call("vchan.host", "status", timeout_s=5)
            except LinkError:
                assert time.monotonic() < deadline_s, self.out.read_text()
                time.sleep(0.05)

    def end(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(WAIT_S)


def options(directory: Path, *more: str, uri: str = NO_LIBVIRT, broker: str = "") -> list[str]:
    url = [f"transport_url = {broker}"] if broker else []
    socket = f"socket = {directory}/host.sock"
    return ["[DEFAULT]", *url, "[vchan]", socket, f"libvirt_uri = {uri}", *more]


@pytest.fixture
def needs_libvirt() -> None:
    libvirt = pytest.importorskip("libvirt", reason="libvirt-python is not installed")
    if not hasattr(libvirt, "open"):  # our own folder of XML
        pytest.skip("libvirt-python is not installed")


@pytest.mark.parametrize(
    ("more", "status", "text"),
    [
        (["socket_mode = rw"], 2, "[vchan] socket_mode: 'rw' is no octal mode: try 0660"),
        (["select = name"], 2, "[vchan] select"),
        (["socket = /proc/nowhere/s"], 3, "/proc/nowhere/s: "),
        (["socket = /etc/hostname"], 3, "/etc/hostname: is there and is no socket"),
    ],
)
def test_it_refuses_to_start_with_one_line(
    directory: Path, needs_libvirt: None, more: list[str], status: int, text: str
) -> None:
    ended, said = HostProcess(directory, *options(directory, *more)).run()
    assert ended == status, said
    assert said.startswith("vchan-host: ")
    assert text in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("kafka://x", "kafka:// is not rabbit://"),
        ("nonsense", "transport_url"),
        ("rabbit://u:secret@h:port/", "transport_url"),
        ("://u:secret@h/", "transport_url"),
        ("rabbit://h/?heartbeat_timeout_threshold=x", "transport_url's heartbeat_timeout"),
    ],
)
def test_a_broker_url_that_is_none(
    directory: Path, needs_libvirt: None, url: str, text: str
) -> None:
    ended, said = HostProcess(directory, *options(directory, broker=url)).run()
    assert ended == 2, said
    assert text in said
    assert "\n" not in said
    assert "secret" not in said


def test_a_wrong_option_of_oslos(directory: Path, needs_libvirt: None) -> None:
    more = ["[oslo_messaging_rabbit]", "heartbeat_timeout_threshold = x"]
    ended, said = HostProcess(directory, *options(directory, *more, broker="rabbit://h/")).run()
    assert ended == 2, said
    assert "[oslo_messaging_rabbit] heartbeat_timeout_threshold" in said
    assert "\n" not in said


def test_without_libvirt_and_broker_it_says_so_and_goes_on(
    directory: Path, needs_libvirt: None, capsys: pytest.CaptureFixture[str]
) -> None:
    broker = "rabbit://guest:guest@127.0.0.1:1/"  # nobody listens on port 1
    host = HostProcess(directory, *options(directory, broker=broker))
    host.start()
    try:
        wait(lambda: "cannot be reached" in host.status()["libvirt"], host.status)
        wait(lambda: "refused" in host.status()["broker"], host.status)
        assert NO_LIBVIRT in host.status()["libvirt"]
        assert "127.0.0.1:1" in host.status()["broker"]

        status = cli.run(["--socket", str(host.socket), "call", "vm", "agent", "echo"])
        said = capsys.readouterr().err
        assert status == cli.EXIT_FAILED
        assert "libvirtd cannot be reached" in said  # rather than: no such domain
        assert said.count("\n") == 1

        ended, said = HostProcess(directory, *options(directory)).run()
        assert ended == 3
        assert "another daemon listens there" in said
    finally:
        assert host.end() == 0
    assert not host.socket.exists()


def test_sighup_reads_the_policy_again(directory: Path, needs_libvirt: None) -> None:
    files, audit = directory / "policy.d", directory / "audit.log"
    files.mkdir()
    file = files / "50-a.policy"
    file.write_text("call any any allow\n")
    more = [f"policy_dir = {files}", f"audit_log = {audit}"]
    host = HostProcess(directory, *options(directory, *more))
    host.start()
    try:
        assert host.status()["policy"] == "1 rules"
        assert host.status()["audit"]["problem"] is None
        assert host.process is not None
        for text, told in (
            ("call any any allow\ncall any\n", f"{file}:2: the line ends"),
            ("call any any allow\n" * 3, "3 rules"),
        ):
            file.write_text(text)
            audit.unlink()
            host.process.send_signal(signal.SIGHUP)
            wait(lambda told=told: told in host.status()["policy"], host.status)  # type: ignore[misc]
            wait(audit.exists, host.status)
    finally:
        assert host.end() == 0


def wait(reached: Callable[[], bool], seen: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline_s, seen()
        time.sleep(0.05)


def test_it_ends_while_it_starts(directory: Path, needs_libvirt: None) -> None:
    host = HostProcess(directory, *options(directory))
    host.start()
    wait(host.socket.exists, lambda: host.out.read_text())
    assert host.end() in (0, -15)  # it may not have come to its signal handlers


def test_a_misspelt_option_is_found(tmp_path: Path) -> None:
    (tmp_path / "vchan.conf").write_text("[DEFAULT]\nx = 1\n[vchan]\nselct = *\nhost = h\n")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.conf").write_text("[vchan]\npolicydir = /x\n")
    arguments = ["--config-file", str(tmp_path / "vchan.conf"), "--config-dir", str(tmp_path / "d")]
    found = config.unknown_options(config.load(arguments))
    assert [text.partition(": ")[2] for text in found] == [
        "[vchan] selct is no option: perhaps select is meant",
        "[vchan] policydir is no option: perhaps policy_dir is meant",
    ]


@pytest.mark.parametrize("name", ["host", "target_name"])
def test_an_empty_name_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "vchan.conf").write_text(f"[vchan]\n{name} =\n")
    with pytest.raises(ConfigError, match="is empty"):
        config.load(["--config-file", str(tmp_path / "vchan.conf")])


def test_every_option_stands_in_the_manual() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "host.md").read_text()
    assert [option.name for option in config.OPTIONS if f"`{option.name}`" not in manual] == []
