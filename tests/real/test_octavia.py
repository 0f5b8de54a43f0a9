"""Octavia from PyPI, unmodified: its amphora agent in a VM that has no network, its driver on the
control side, `vchan proxy` between them; and the VM moves. docs/octavia.md is what is set here."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.rig import RigError, end_process, oslo_image, tail, wait_until
from tests.rig.certificates import Authority
from tests.rig.environment import carried, environment
from tests.rig.guest_image import Service, build
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit

if TYPE_CHECKING:
    from tests.rig.cloud import Cloud, Vm

MISSING = missing_for_rabbit() or missing_for_libvirt() or oslo_image.can_carry()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

ROOT: Final = Path(__file__).parents[2]
RIG: Final = ROOT / "tests" / "rig"
OCTAVIA: Final = "19.0.0"
RELEASES: Final = (f"octavia=={OCTAVIA}", "pyroute2==0.9.7")
WAIT_S: Final = 180.0
IMPORT_S: Final = 900.0
"""An emulated guest on a busy machine imports 1500 modules."""
AMPHORA: Final = "ba3d0000-0000-4000-8000-00000000000a"
"""Octavia's own number of it; its certificate is for this name."""
ADDRESS: Final = "172.24.4.17"
"""What neutron has given it on a network that nobody here is on."""
TOKEN: Final = "only-octavia-knows-this"
MEMORY_MIB: Final = 768
PORT: Final = 9443


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of an environment with octavia."""
    return environment("octavia", RELEASES)


def page_block(name: str) -> str:
    """What the page has operators write: the block after the line that names the file."""
    page = (ROOT / "docs" / "octavia.md").read_text()
    found = re.search(rf"`{re.escape(name)}`(?:.|\n)*?\n\n((?:    [^\n]*\n)+)", page)
    assert found is not None, f"docs/octavia.md has no block for {name}"
    return re.sub(r"^    ", "", found[1], flags=re.MULTILINE).strip() + "\n"


class Site:
    """An operator's files, and what octavia is told.

    Two authorities, as octavia's own documents have it: one signs the amphorae's certificates,
    which the controller trusts, the other the controller's.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._servers, clients = Authority(directory, "servers"), Authority(directory, "clients")
        self._ours = Authority(directory, "proxies")
        controller = clients.issue("controller")
        self.client_ca = clients.certificate
        self.proxy = self._ours.issue("proxy", names="DNS:localhost")
        amphora = self._servers.issue(AMPHORA)
        self.amphora_pem = amphora.certificate.read_bytes() + amphora.key.read_bytes()
        pem = directory / "client.pem"
        pem.write_bytes(controller.certificate.read_bytes() + controller.key.read_bytes())
        trusted = directory / "trusted.pem"
        trusted.write_text(
            self._servers.certificate.read_text() + self._ours.certificate.read_text()
        )
        self.config = directory / "octavia.conf"
        self.config.write_text(
            "[haproxy_amphora]\n"
            f"client_cert = {pem}\nserver_ca = {trusted}\n"
            "rest_request_conn_timeout = 120\nrest_request_read_timeout = 180\n"
            "connection_max_retries = 1\nconnection_retry_interval = 1\n"
            "[certificates]\ncert_manager = noop_cert_manager\n"
        )
        self.users = directory / "users"
        self.users.write_text(f"octavia token:{TOKEN} tcp:{PORT}\n")
        self.users.chmod(0o600)

    def agent_files(self) -> dict[str, bytes]:
        """What octavia puts into an amphora when it boots it."""
        config = (
            "[haproxy_amphora]\nbase_path = /var/lib/octavia\n"
            "base_cert_dir = /var/lib/octavia/certs\n"
            "[amphora_agent]\nagent_server_ca = /etc/octavia/client_ca.pem\n"
            "agent_server_cert = /etc/octavia/server.pem\n"
            f"agent_server_network_dir = /var/lib/octavia\namphora_id = {AMPHORA}\n"
        )
        return {
            "etc/octavia/amphora-agent.conf": config.encode(),
            "etc/octavia/server.pem": self.amphora_pem,
            "etc/octavia/client_ca.pem": self.client_ca.read_bytes(),
        }


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("octavia"))


def amphora_files(python: Path, directory: Path) -> dict[str, bytes]:
    """The agent, and what of other packages it loads."""
    files = carried(python, RIG / "amphora.py", "trace", directory, cwd=directory)
    # It asks which haproxy is installed; there is none.
    files["bin/dpkg-query"] = b"#!/bin/sh\nprintf 2.6.12\n"
    files["etc/os-release"] = b"ID=debian\nVERSION_ID=12\n"
    files["app/amphora.py"] = (RIG / "amphora.py").read_bytes()
    return files


@pytest.fixture(scope="module")
def amphora(cloud: Cloud, site: Site, python: Path, tmp_path_factory: Any) -> Iterator[Vm]:
    """A server of octavia's; both hosts have the page's policy."""
    from tests.rig.compute import agent_service
    from tests.rig.libvirtd import nova_metadata

    files = amphora_files(python, tmp_path_factory.mktemp("trace")) | site.agent_files()
    image = build(files)
    option, _, targets = page_block("/etc/vchan/guest.conf").partition("=")
    assert option.strip() == "forward"
    services = (
        Service("vchan-guest", f"python3 -m vchan.guest.daemon --forward {targets.strip()}"),
        agent_service("amphora", "/app/amphora.py"),
    )
    project = "0c7a" * 8
    rule = page_block("/etc/vchan/policy.d/50-octavia.policy")
    rule = re.sub(r"project:\S+", f"project:{project}", rule)
    for host in (cloud.a, cloud.b):
        host.heal()
        host.daemon.policy.write_text(host.daemon.policy.read_text() + rule)
        host.daemon.signal(signal.SIGHUP)
    who = {"user": "b" * 32, "flavor": "amphora", "image": "c" * 36}
    metadata = nova_metadata(
        name=f"amphora-{AMPHORA}", project=project, addresses=[ADDRESS, "2001:db8::17"], **who
    )
    options = {"metadata": metadata, "memory_mib": MEMORY_MIB}
    staged = image.staged(cloud.directory)
    vm = cloud.boot("amphora", services, wait=False, image=staged, **options)
    vm.here.daemon.wait_ready(vm.name)
    yield vm
    vm.discard()


@contextmanager
def running(log: Path, *command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
        )
    try:
        yield process
    finally:
        end_process(process, grace_s=10.0)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


class Controller:
    """Octavia's driver, in a process of its own environment."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self._answer()

    @property
    def log(self) -> str:
        """The end of it."""
        return tail(self._log)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, tail(self._log)
        return json.loads(line)

    def ask(self, *words: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()


@contextmanager
def proxy(vm: Vm, site: Site, log: Path, *words: str) -> Iterator[str]:
    """One on the host where the VM is, which knows the other's socket; gives its port."""
    also = ("--also", str(vm.there.daemon.socket))
    given = ("--listen", "127.0.0.1:0", "--users", str(site.users), *also, *words)
    with running(log, *vm.here.cli_words("proxy", *given)) as process:
        assert process.stdout is not None
        where = process.stdout.readline().decode().strip()
        assert where, tail(log)
        yield where.rpartition(":")[2]


@pytest.fixture(params=["https", "http"])
def controller(
    request: Any, amphora: Vm, site: Site, python: Path, tmp_path: Path
) -> Iterator[Controller]:
    """It reaches the proxy over TLS, as on a network; or on loopback, without."""
    own = site.proxy
    tls = ("--certificate", str(own.certificate), "--key", str(own.key))
    with ExitStack() as stack:
        words = tls if request.param == "https" else ()
        port = stack.enter_context(proxy(amphora, site, tmp_path / "proxy.log", *words))
        program = (str(python), str(RIG / "octavia_controller.py"), str(site.config))
        log = tmp_path / "controller.log"
        url = f"{request.param}://octavia:{TOKEN}@localhost:{port}"
        arguments = (*program, AMPHORA, ADDRESS)
        process = stack.enter_context(running(log, *arguments, HTTPS_PROXY=url, NO_PROXY=""))
        yield Controller(process, log)


def what_was_said(amphora: Vm, cloud: Cloud) -> str:
    """For failures: by the consoles, which tell of an agent that has ended; what runs in the guest
    and what it is connected to; the hosts' logs."""
    consoles = (host.libvirt.console_path(amphora.name) for host in (cloud.a, cloud.b))
    shown = [f"{path}:\n{tail(path)}" for path in consoles if path.exists()]
    shell = amphora.here.shell(amphora.name)
    try:
        look = "ps; cat /proc/net/tcp; for p in $(pidof python3); do cat /proc/$p/wchan; echo; done"
        shown.append(shell.run(look, timeout_s=WAIT_S).output)
    except RigError as error:
        shown.append(str(error))
    finally:
        shell.close()
    return "\n".join((*shown, cloud.logs()))


def wait_served(controller: Controller, amphora: Vm, cloud: Cloud) -> None:
    """In minutes."""
    said: list[Any] = []

    def is_served() -> bool:
        said.append(controller.ask("check"))
        return bool(said[-1] == "1.0")

    wait_until(
        is_served,
        timeout_s=IMPORT_S,
        interval_s=1.0,
        failure=lambda: f"{said[-8:]}\n{controller.log}\n{what_was_said(amphora, cloud)}",
    )


def test_its_own_driver_drives_its_own_agent(
    controller: Controller, amphora: Vm, cloud: Cloud
) -> None:
    wait_served(controller, amphora, cloud)
    info = controller.ask("info")
    assert (info["api_version"], info["haproxy_version"]) == ("1.0", "2.6.12")
    assert controller.ask("upload", 1, 20_000) is True


def test_through_live_migrations(controller: Controller, amphora: Vm, cloud: Cloud) -> None:
    """Requests go on, one large enough to be under way at each; each gets its own answer."""
    wait_served(controller, amphora, cloud)
    results: list[Any] = []
    is_enough = threading.Event()

    def drive() -> None:
        while not is_enough.is_set():
            results.append(controller.ask("upload", len(results), 1_000_000))
            results.append(controller.ask("info").get("api_version") == "1.0")

    def wait_results(least: int) -> None:
        wait_until(
            lambda: len(results) >= least or not thread.is_alive(),
            timeout_s=2 * WAIT_S,
            interval_s=0.1,
            failure=lambda: str(results),
        )

    thread = threading.Thread(target=drive, name="controller")
    thread.start()
    try:
        for _ in range(2):
            wait_results(len(results) + 2)
            amphora.migrate()
            amphora.here.daemon.wait_ready(amphora.name)
        wait_results(len(results) + 2)
    finally:
        is_enough.set()
        thread.join(2 * WAIT_S)
    assert not thread.is_alive()
    wrong = [(number, each) for number, each in enumerate(results) if each is not True]
    told = f"{wrong} of {len(results)}\n{controller.log}\n"
    assert results and not wrong, told + what_was_said(amphora, cloud)


def test_an_address_that_others_have_as_well(
    amphora: Vm, site: Site, cloud: Cloud, tmp_path: Path
) -> None:
    """Another project's network may have the same: the policy says whose is meant."""
    from tests.rig.compute import GUEST_DAEMON
    from tests.rig.libvirtd import nova_metadata

    who = {"user": "b" * 32, "flavor": "f", "image": "c" * 36, "project": "d" * 32}
    metadata = nova_metadata(name="rival", addresses=[ADDRESS], **who)
    host, policy = amphora.here, amphora.here.daemon.policy.read_text()
    host.start_vm("rival", cloud.image, (GUEST_DAEMON,), metadata=metadata)
    try:
        host.daemon.wait_ready("rival")
        with proxy(amphora, site, tmp_path / "one.log") as port:
            answers: list[str] = []

            def is_connected() -> bool:
                answers.append(asked(port))
                return answers[-1].startswith("HTTP/1.1 200 ")

            wait_until(is_connected, timeout_s=IMPORT_S, interval_s=1.0, failure=answers.pop)
        host.daemon.policy.write_text(policy + f"forward any tcp:{PORT} allow\n")
        host.daemon.signal(signal.SIGHUP)
        with proxy(amphora, site, tmp_path / "two.log") as port:
            answer = asked(port)
            assert answer.startswith("HTTP/1.1 403 "), answer
            assert f"{ADDRESS}: several VMs have this address" in answer
    finally:
        host.daemon.policy.write_text(policy)
        host.daemon.signal(signal.SIGHUP)
        host.domain("rival").destroy()
        host.domain("rival").undefine()


def asked(port: str) -> str:
    """What the proxy says to a CONNECT by the address."""
    shown = base64.b64encode(f"octavia:{TOKEN}".encode()).decode()
    with socket.create_connection(("127.0.0.1", int(port)), WAIT_S) as connected:
        head = f"CONNECT {ADDRESS}:{PORT} HTTP/1.1\r\nProxy-Authorization: Basic {shown}\r\n\r\n"
        connected.sendall(head.encode())
        return connected.recv(4096).decode()


def test_who_it_was_is_on_record(controller: Controller, amphora: Vm, cloud: Cloud) -> None:
    wait_served(controller, amphora, cloud)
    audit = amphora.here.daemon.socket.with_name("audit.log")
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    rows = [
        row
        for row in lines
        if (row["vm"], row.get("kind"), row["verdict"]) == (amphora.uuid, "forward", "allow")
    ]
    assert rows and {row["topic"] for row in rows} == {str(PORT)}
    assert all("for octavia at 127.0.0.1" in row["by"] for row in rows)
