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
from vchan.host import config, config_files
from vchan.host.broker.config import BrokerConfig
from vchan.host.policy.rules import Ask, Effect, Facts, Kind

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
    assert conf.vchan.delete_queues_after == 0  # a shelved server's domain is undefined, too
    assert conf.vchan.listen_topics == conf.vchan.select == []
    assert conf.vchan.policy_dir == "/etc/vchan/policy.d"
    assert conf.vchan.audit_log == "/var/log/vchan/audit.log"
    assert config.guest_context_allow(conf) == {"request_id", "global_request_id", "resource_uuid"}
    assert not config.names_a_broker(conf)


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (
            ["[vchan]", "queues_expire_after = x"],
            "vchan.conf: [vchan] queues_expire_after: 'x' is not a whole number from 0 to",
        ),
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


def test_listen_topics_hold_for_notifications_of_their_name(directory: Path) -> None:
    conf = load(
        directory, "[vchan]", f"policy_dir = {directory}", "listen_topics = agent, nova/alerts, bb*"
    )
    policy = config.policy(conf)
    vm = Facts("11111111-2222-3333-4444-555555555555")

    def may(exchange: str, topic: str) -> bool:
        return policy.decide(vm, Ask(Kind.LISTEN, exchange, topic)).effect is Effect.ALLOW

    assert may("x", "agent.info") and may("nova", "alerts.error") and may("x", "bb.sample")
    assert not may("x", "alerts.error") and not may("nova", "alerts.other")
    assert not may("nova", "alerts.error.info") and not may("x", "notifications.info")


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
                    return client.call("vchan.host", "status", timeout_s=30)
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
        "[DEFAULT] x is no option",
        "[vchan] selct is no option: perhaps select is meant",
        "[vchan] policydir is no option: perhaps policy_dir is meant",
    ]


def unknown(directory: Path, *lines: str) -> list[str]:
    return [text.partition(": ")[2] for text in config.unknown_options(load(directory, *lines))]


def test_misspelt_names_are_found_in_every_section(directory: Path) -> None:
    assert unknown(
        directory,
        "[DEFAULT]",
        "debug = true",
        "logfile = /x",  # an old name of log_file
        "control_exchange = nova",
        "transport_ulr = rabbit://h/",
        "select = *",
        "[vchann]",
        "host = h",
        "[oslo_messaging_rabit]",
        "[oslo_messaging_rabbit]",
        "heartbeat_timeout_treshold = 3",
        "heartbeat-rate = 3",
        "[vchan_conductor]",
        "threads = 3",
        "[Vchan]",
        "host = h",
    ) == [
        "[vchann] is no section: perhaps [vchan] is meant",
        "[oslo_messaging_rabit] is no section: perhaps [oslo_messaging_rabbit] is meant",
        "[DEFAULT] transport_ulr is no option: perhaps transport_url is meant",
        "[DEFAULT] select is no option: it belongs in [vchan]",
        "[oslo_messaging_rabbit] heartbeat_timeout_treshold is no option: "
        "perhaps heartbeat_timeout_threshold is meant",
    ]


def test_a_file_of_another_program_does_not_flood_the_log(directory: Path) -> None:
    found = unknown(directory, *(f"[section{number}]" for number in range(100)))
    assert len(found) == 21
    assert config.unknown_options(load(directory, *(f"[s{n}]" for n in range(100))))[-1] == (
        "and 80 more such names"
    )


@pytest.mark.parametrize(
    ("lines", "texts"),
    [
        (["[vchan]", "host = a$b"], ["vchan.conf: [vchan] host: ", "write $$"]),
        (["[vchan]", "select = name:$x"], ["vchan.conf: [vchan] select: ", "write $$"]),
        (["[vchan]", "metadata_proxy_shared_secret = s3cret$x"], ["shared_secret: ", "write $$"]),
        (["[DEFAULT]", "log_dir = /s3cret/$x"], ["vchan.conf: [DEFAULT] log_dir: ", "write $$"]),
        (["[DEFAULT]", "debug = s3cret"], []),
        (["[vchan]", "s3cret"], ["vchan.conf:2: neither = nor : stands in it"]),
        (["s3cret = 1"], ["vchan.conf:1: an option before the first [SECTION]"]),
        (["[s3cret"], ["vchan.conf:1: a section's name must end with ]"]),
        (["[vchan]", "delete_queues_after = -1"], ["'-1' is not a whole number from 0 on"]),
        (["[vchan]", "queues_expire_after = 1.5"], ["from 0 to 4233600"]),
        (["[DEFAULT]", "use_json = perhaps"], ["[DEFAULT] use_json: 'perhaps' is not true or"]),
        (["[vchan]", "socket = /x\0y"], ["NUL"]),
        (["[vchan]", "client_groups = a\0b"], ["[vchan] client_groups: ", "NUL"]),
        (["[vchan]", "host = $host"], ["[vchan] host: ", "write $$"]),
        (["[vchan]", "host = ${socket}", "socket = /$host"], ["vchan.conf: [vchan] ", "write $$"]),
        (["[DEFAULT]", "use_json = a$"], ["[DEFAULT] use_json: 'a$' is not true or"]),
        (["[DEFAULT]", "use_journal = $$"], ["[DEFAULT] use_journal: '$$' is not true or"]),
        (["[vchan]", "http_services = x=http://u:s3cret/1@h/"], ["[vchan] http_services: "]),
        (["[vchan]", "http_services = X=http://u:s3cret@h/"], ["[vchan] http_services: "]),
        (
            ["[vchan]", "metadata_proxy_shared_secret = s3cret", "target_name = $SECRET/"],
            ["[vchan] target_name: ", "stands for another option's"],
        ),
        (["[vchan]", "policy_dir = " + "x" * 5000], ["[vchan] policy_dir: 'xxx"]),
        (["[vchan]", "policy_dir = \x1b[31mred"], ["[vchan] policy_dir: "]),
    ],
)
def test_a_refusal_names_file_and_option_and_no_secret(
    directory: Path, lines: list[str], texts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(directory, *(line.replace("SECRET", "metadata_proxy_shared_secret") for line in lines))
    said = str(caught.value)
    assert str(directory / "vchan.conf") in said
    assert all(text in said for text in texts), said
    assert len(said) < 500
    assert said.isprintable()
    assert "s3cret" not in said or "debug" in said
    assert not any(word in said for word in ("LocationInfo", "invalid literal", "Traceback"))


def test_a_dollar_that_is_meant_is_let_be(directory: Path) -> None:
    conf = load(directory, "[vchan]", "metadata_proxy_shared_secret = a$$b", "host = x", "")
    assert conf.vchan.metadata_proxy_shared_secret == "a$b"
    named = load(directory, "[vchan]", "host = h", "socket = /run/${host}x")
    assert named.vchan.socket == "/run/hx"


def test_a_file_that_is_not_text(directory: Path) -> None:
    (directory / "vchan.conf").write_bytes(b"[vchan]\n# caf\xe9\nhost = h\n")
    with pytest.raises(ConfigError, match=r"vchan\.conf:2: is not UTF-8"):
        config.load(["--config-file", str(directory / "vchan.conf")])
    with pytest.raises(ConfigError, match="Is a directory: expected a file"):
        config.load([f"--config-file={directory}"])
    with pytest.raises(ConfigError, match="no such directory"):
        config.load(["--config-dir", str(directory / "nothing")])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("org.qemu.guest_agent.0", "QEMU's guest agent"),
        ("org.qemu.guest_agent.1", "QEMU's guest agent"),
        ("Org.QEMU.guest_agent.0", "QEMU's guest agent"),
        ("com.redhat.spice.0", "SPICE"),
        ("org.spice-space.webdav.0", "SPICE"),
        ("org.libvirt.vchan", "libvirt"),
        ("org.libvirt", "libvirt"),
        ("org.libguestfs.channel.0", "libguestfs"),
        ("com.redhat.rhevm.vdsm", "oVirt"),
        ("agent.channel.0", "Kata"),
        ("a/b", "no name of a port"),
        ("../x", "no name of a port"),
        ("a b", "no name of a port"),
        ("x" * 65, "no name of a port"),
        (" ", "is empty"),
    ],
)
def test_names_that_are_others_or_none_are_refused(directory: Path, name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(directory, "[vchan]", f"target_name = {name}")
    assert "vchan.conf: [vchan] target_name: " in str(caught.value)
    assert text in str(caught.value)
    assert load(directory, "[vchan]", "target_name = org.qemux.0").vchan.target_name


RABBIT = ["[oslo_messaging_rabbit]"]


@pytest.mark.parametrize(
    ("url", "lines", "text"),
    [
        ("", [], "[DEFAULT] transport_url: is empty; expected rabbit://"),
        ("rabbit://nova:s3c$ret@h/", [], "[DEFAULT] transport_url: a $ in a value"),
        ("rabbit://nova:1s3cret/3@h:1/", [], "percent-encoded"),
        ("rabbit://nova:12/s3cret@h:1/", [], "percent-encoded"),
        ("rabbit://nova:12#s3cret@h:1/", [], "percent-encoded"),
        ("rabbit://nova:12?s3cret@h:1/", [], "percent-encoded"),
        ("rabbit://nova:12@s3cret@h:1/", [], "percent-encoded"),
        ("rabbit://nova:12,s3cret@h:1/", [], "percent-encoded"),
        ("rabbit://nova:[s3cret@h:1/", [], "percent-encoded"),
        ("rabbit://nova:x@h:s3cret/", [], "a port is a number"),
        ("rabbit://nova:x@h:0/", [], "a port is a number"),
        ("rabbit://nova:x@h:99999/", [], "a port is a number"),
        ("rabbit://nova:x@" + "h" * 70 + "/", [], "cannot be read"),
        ("rabbit://nova:x@h/" + "v" * 256, [], "cannot be read"),
        ("s3cret://nova:x@h/", [], "its scheme is not rabbit://"),
        ("nova:s3cret@h", [], "does not begin with a scheme"),
        ("rabbit://nova:s3c\tret@h:1/", [], "cannot be read"),
        ("rabbit://nova:x@::1:5672/", [], "an IPv6 address stands in [ ]"),
        ("rabbit://nova:x@h1:1,nova:x@::1/", [], "an IPv6 address stands in [ ]"),
        ("rabbit://nova:x@[::1]5672/", [], "cannot be read"),
        ("$transport_url", [], "write $$"),
        ("rabbit://n:s3cret@h/", [*RABBIT, "ssl = 1", "ssl_ca_file = ${transport_url}"], "stands"),
        ("rabbit://h/", [*RABBIT, "ssl = 1", "ssl_ca_file = a\0b"], "NUL"),
        ("rabbit://h/", [*RABBIT, "ssl = 1", "ssl_key_file = \x1b[31mx"], "ssl_key_file: "),
        ("rabbit://h/?rabbit_qos_prefetch_count=x", [], "transport_url's rabbit_qos"),
        ("rabbit://h/?rabbit_qos_prefetch_count=65536", [], "from 0 to 65535"),
        ("rabbit://h/", [*RABBIT, "rabbit_qos_prefetch_count = 65536"], "from 0 to 65535"),
        ("rabbit://h/", [*RABBIT, "heartbeat_timeout_threshold = 65536"], "from 0 to 65535"),
        ("rabbit://h/", [*RABBIT, "heartbeat_timeout_threshold = -1"], "from 0 to 65535"),
        ("rabbit://h/", [*RABBIT, "rabbit_interval_max = 99999999999"], "from 1 to 86400"),
        ("rabbit://h/", [*RABBIT, "rabbit_retry_interval = 0"], "from 1"),
        ("rabbit://h/", [*RABBIT, "rabbit_transient_queues_ttl = soon"], "'soon' is not a whole"),
        ("rabbit://h/", [*RABBIT, "rabbit_quorum_max_memory_length = -5"], "from 0 to"),
        ("rabbit://h/", [*RABBIT, "rabbit_quorum_max_memory_bytes = 9" + "0" * 20], "from 0 to"),
        ("rabbit://h/", [*RABBIT, "rabbit_login_method = $PLAIN"], "write $$"),
        ("rabbit://h/", [*RABBIT, "rabbit_login_method = KERBEROS"], "AMQPLAIN"),
        ("rabbit://h/", [*RABBIT, "ssl = perhaps"], "'perhaps' is not true or false"),
        ("rabbit://h/", [*RABBIT, "ssl = 1", "ssl_ca_file = /etc/hostname"], "no certificate"),
        (
            "rabbit://h/",
            [*RABBIT, "ssl = 1", "ssl_cert_file = /etc/hostname"],
            "expected a certificate and its key",
        ),
    ],
)
def test_what_a_broker_would_not_take_is_refused_at_the_start(
    directory: Path, url: str, lines: list[str], text: str
) -> None:
    if "quorum_max_memory" in "".join(lines) and not has_memory_limits():
        pytest.skip("this oslo.messaging has no such option")
    conf = None
    with pytest.raises(ConfigError) as caught:
        conf = load(directory, "[DEFAULT]", f"transport_url = {url}", *lines)
        assert config.names_a_broker(conf)
        BrokerConfig.from_oslo(conf)
    said = str(config_files.located(caught.value, conf))
    assert text in said, said
    assert str(directory / "vchan.conf") in said
    assert "s3c" not in said and "ret@" not in said
    assert not any(word in said for word in ("LocationInfo", "invalid literal"))
    assert said.isprintable()


def has_memory_limits() -> bool:
    from oslo_messaging._drivers import impl_rabbit

    return any(
        option.dest == "rabbit_quorum_max_memory_length" for option in impl_rabbit.rabbit_opts
    )


@pytest.mark.parametrize(
    "url",
    [
        "rabbit://",
        "rabbit:///",
        "rabbit://h",
        "rabbit://nova:%2F%40%23%2C@h:5672/v%2Fx",
        "rabbit://a:b@h1:1,c:d@h2:2/v",
        "rabbit://nova:a:b@[::1]:5672/",
        "rabbit://nova:a@[::1],nova:a@[fe80::1]:5672/v",
        "kombu+rabbit://u:p@h_1.example/",
    ],
)
def test_urls_that_are_good(directory: Path, url: str) -> None:
    conf = load(directory, "[DEFAULT]", f"transport_url = {url}")
    assert BrokerConfig.from_oslo(conf).hosts


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["log_file = /nonexistent/x/y.log"], "[DEFAULT] log_file: /nonexistent/x/y.log"),
        (["log_config_append = /nonexistent"], "[DEFAULT] log_config_append: /nonexistent"),
        (["transport_url ="], "[DEFAULT] transport_url: is empty"),
    ],
)
def test_it_does_not_start_over_and_over_with_what_cannot_be(
    directory: Path, needs_libvirt: None, lines: list[str], text: str
) -> None:
    everything = options(directory)
    ended, said = HostProcess(directory, *everything[:1], *lines, *everything[1:]).run()
    assert ended == 2, said
    assert text in said
    assert "\n" not in said


@pytest.mark.parametrize("name", ["host", "target_name"])
def test_an_empty_name_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "vchan.conf").write_text(f"[vchan]\n{name} =\n")
    with pytest.raises(ConfigError, match="is empty"):
        config.load(["--config-file", str(tmp_path / "vchan.conf")])


def test_every_option_stands_in_the_manual() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "host.md").read_text()
    assert [option.name for option in config.OPTIONS if f"`{option.name}`" not in manual] == []
