"""Private RabbitMQ nodes, alone or in a cluster, with their own ports, data, logs, cookie and port
mapper (epmd)."""

import contextlib
import json
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.rig import NOBODY, Account, RigError, end_process, tail, wait_until
from tests.rig.certificates import Certificate
from tests.rig.newer_debian import inside
from tests.rig.ports import claim_ports

# Debian's wrappers in /usr/sbin insist on root or the rabbitmq user and on /var/lib: these do not.
SCRIPTS = Path("/usr/lib/rabbitmq/bin")

START_TIMEOUT_S = 300.0
STOP_GRACE_S = 20.0
CTL_TIMEOUT_S = 600.0
AMQP_GREETING = b"AMQP\x00\x00\x09\x01"
METHOD_FRAME = b"\x01"

# Without these Erlang's schedulers spin while idle and take a shared core from the guests.
NO_BUSY_WAIT = "+sbwt none +sbwtdcpu none +sbwtdio none"


@dataclass(frozen=True, slots=True)
class QueueFacts:
    """What the broker says about one queue; counts are of messages."""

    name: str
    ready: int
    unacknowledged: int
    consumers: int
    durable: bool


class RabbitServer:
    """One broker node on loopback, in `directory`, which must be reachable for other users.

    Stopping and starting keep its ports and data; leaving the context throws them away.

    Args:
        configuration: Further lines for rabbitmq.conf.
        certificate: Listen with TLS, too: on `tls_port`.
        plugins: To be enabled.
        name: Of the node, among those it forms a cluster with.
        first: The node whose cookie and port mapper it shares.
        tree: Another Debian's files, to run its RabbitMQ (see newer_debian); needs root.
    """

    def __init__(
        self,
        directory: Path,
        *,
        configuration: str = "",
        certificate: Certificate | None = None,
        plugins: Sequence[str] = (),
        name: str = "rig",
        first: "RabbitServer | None" = None,
        tree: Path | None = None,
    ) -> None:
        self.directory = directory
        self.log = directory / "rabbit.log"
        self.node = f"{name}@localhost"
        self._configuration = configuration
        self._certificate = certificate
        self._plugins = plugins
        self.port, self.tls_port, epmd_port, self._distribution_port = claim_ports(4)
        self._home: Path = directory / "home" if first is None else first._home
        self._epmd_port: int = epmd_port if first is None else first._epmd_port
        self._has_epmd = first is None
        self._account = Account.first_of("rabbitmq", NOBODY)
        self._tree = tree
        self._epmd: subprocess.Popen[bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """For oslo.messaging's transport_url."""
        return f"rabbit://guest:guest@127.0.0.1:{self.port}//"

    def __enter__(self) -> Self:
        self._write_configuration()
        try:
            if self._has_epmd:
                self._start_epmd()
            self.start()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def start(self) -> None:
        """Start the node and wait until it takes AMQP connections (2 to 8 s)."""
        if self._server is not None:
            raise RigError("this broker runs already")
        self._server = self._spawn(SCRIPTS / "rabbitmq-server", log=self.log)
        wait_until(
            self._ready,
            timeout_s=START_TIMEOUT_S,
            interval_s=0.05,
            failure=lambda: f"RabbitMQ did not start in {START_TIMEOUT_S} s:\n{tail(self.log)}",
        )

    def stop(self, *, crash: bool = False) -> None:
        """Stop the node in good order, or by SIGKILL; its durable data stays."""
        if self._server is not None:
            end_process(self._server, grace_s=0.0 if crash else STOP_GRACE_S)
            self._server = None

    @property
    def is_running(self) -> bool:
        """Started, and not stopped since."""
        return self._server is not None

    def restart(self, *, crash: bool = False) -> None:
        """Stop and start: every connection is lost, and every message that is not durable."""
        self.stop(crash=crash)
        self.start()

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl on this node (0.5 s) and return its output.

        Raises:
            RigError: It failed; the message carries its output.
        """
        done = subprocess.run(
            self._command(SCRIPTS / "rabbitmqctl", "--quiet", *arguments),
            env=self._environment(),
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CTL_TIMEOUT_S,
            user=self._spawner.user,
            check=False,
        )
        if done.returncode != 0:
            raise RigError(f"rabbitmqctl {' '.join(arguments)}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def kill_connections(self) -> None:
        """Close every client's connection at the broker's side."""
        self.ctl("close_all_connections", "closed by the test rig")

    def queues(self) -> dict[str, QueueFacts]:
        """Every queue of the default virtual host, by name."""
        columns = ["name", "messages_ready", "messages_unacknowledged", "consumers", "durable"]
        rows: list[dict[str, Any]] = json.loads(
            self.ctl("list_queues", "--formatter", "json", *columns)
        )
        return {
            row["name"]: QueueFacts(
                name=row["name"],
                ready=row["messages_ready"],
                unacknowledged=row["messages_unacknowledged"],
                consumers=row["consumers"],
                durable=row["durable"],
            )
            for row in rows
        }

    def _write_configuration(self) -> None:
        for path in (self._home, self.directory / "data"):
            path.mkdir(parents=True, exist_ok=True)
        (self.directory / "plugins").write_text(f"[{','.join(self._plugins)}].\n")
        (self.directory / "rabbitmq.conf").write_text(
            f"listeners.tcp.default = 127.0.0.1:{self.port}\n"
            # The default, 50 MB, blocks every publisher on a nearly full disk, silently.
            "disk_free_limit.absolute = 1MB\n"
            f"{self._tls_configuration()}\n"
            f"{self._configuration}\n"
        )
        self._account.own(self.directory)

    def _tls_configuration(self) -> str:
        if self._certificate is None:
            return ""
        mine = self._certificate.copied(self.directory)
        return (
            f"listeners.ssl.default = 127.0.0.1:{self.tls_port}\n"
            f"ssl_options.cacertfile = {mine.ca}\n"
            f"ssl_options.certfile = {mine.certificate}\n"
            f"ssl_options.keyfile = {mine.key}\n"
        )

    def _environment(self) -> dict[str, str]:
        here = str(self.directory)
        return {
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "LANG": "C.UTF-8",
            "HOME": str(self._home),  # where Erlang makes and looks for its cookie
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            # Without a shell between us and the broker: it gets our signals, and is gone when our
            # child is.
            "RUNNING_UNDER_SYSTEMD": "yes",
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": f"{here}/data",
            "RABBITMQ_LOG_BASE": here,
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_CONFIG_FILE": f"{here}/rabbitmq.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{here}/plugins",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                f"-start_epmd false -kernel inet_dist_use_interface {{127,0,0,1}} {NO_BUSY_WAIT}"
            ),
        }

    def _spawn(self, *command: str | Path, log: Path) -> subprocess.Popen[bytes]:
        return self._spawner.spawn(
            self._command(*command), environment=self._environment(), log=log, cwd=self.directory
        )

    @property
    def _spawner(self) -> Account:
        """Who starts programs: to enter a tree takes root, and there they become the account."""
        return self._account if self._tree is None else Account(None)

    def _command(self, *command: str | Path) -> list[str | Path]:
        if self._tree is None:
            return list(command)
        here = self.directory
        return inside(self._tree, command, self._account, shared=here, cwd=here)

    def _start_epmd(self) -> None:
        # Erlang would start one by itself, but as a daemon that nobody ends. It must listen before
        # any Erlang program starts, or that program would start the daemon after all.
        log = self.directory / "epmd.log"
        self._epmd = self._spawn("epmd", log=log)
        wait_until(
            lambda: _accepts(self._epmd_port),
            timeout_s=START_TIMEOUT_S,
            interval_s=0.01,
            failure=lambda: f"epmd did not start:\n{tail(log)}",
        )

    def _ready(self) -> bool:
        if self._server is None or self._server.poll() is not None:
            raise RigError(f"RabbitMQ ended while starting:\n{tail(self.log)}")
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5.0) as connection:
                connection.sendall(AMQP_GREETING)
                return connection.recv(1) == METHOD_FRAME
        except OSError:
            return False

    def end(self) -> None:
        """End it, for good."""
        self.stop(crash=True)  # nobody will read its data again, and an orderly stop takes seconds
        if self._epmd is not None:
            end_process(self._epmd, grace_s=0.0)
            self._epmd = None


class RabbitCluster:
    """Some nodes that form a cluster; see `RabbitServer`.

    Args:
        configuration: Further lines for each rabbitmq.conf.
    """

    def __init__(self, directory: Path, count: int = 3, *, configuration: str = "") -> None:
        names = [f"rig{number}" for number in range(1, count + 1)]
        # The first is told of no others: RabbitMQ 4 would look for them thirty times before it
        # begins alone, each time with another Erlang.
        peers = ["cluster_formation.peer_discovery_backend = classic_config"]
        peers += [
            f"cluster_formation.classic_config.nodes.{number} = {name}@localhost"
            for number, name in enumerate(names, 1)
        ]
        # One that loses the others shall not stop serving when they are killed one by one.
        lines = ["cluster_partition_handling = ignore", configuration]
        first: RabbitServer | None = None
        self.nodes: list[RabbitServer] = []
        for name in names:
            known = [] if first is None else peers
            node = RabbitServer(
                directory / name, configuration="\n".join([*known, *lines]), name=name, first=first
            )
            first = first or node
            self.nodes.append(node)
        self._stack = contextlib.ExitStack()

    @property
    def url(self) -> str:
        """For oslo.messaging's transport_url: all nodes."""
        hosts = ",".join(f"guest:guest@127.0.0.1:{node.port}" for node in self.nodes)
        return f"rabbit://{hosts}//"

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for node in self.nodes:  # those after the first one find it, and join
                stack.enter_context(node)
            self.wait_whole()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def wait_whole(self) -> None:
        """Wait until the first node sees all the others."""

        def is_whole() -> bool:
            status = json.loads(self.nodes[0].ctl("cluster_status", "--formatter", "json"))
            return len(status["running_nodes"]) == len(self.nodes)

        wait_until(
            is_whole,
            timeout_s=START_TIMEOUT_S,
            interval_s=0.5,
            failure=lambda: f"no whole cluster: {self.nodes[0].ctl('cluster_status')}",
        )


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True
