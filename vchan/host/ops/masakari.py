"""vchan-masakari: tells masakari's notification API of guests of this host that are dead.

A process of its own beside vchan-host, which it asks for its list of VMs every few seconds;
`deaths` judges. Credentials and the API's address are the operator's: clouds.yaml, by openstacksdk.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from vchan import __version__, builds
from vchan.client import Client
from vchan.errors import VchanError
from vchan.host.help_text import Parser
from vchan.host.ops.deaths import Death, Deaths
from vchan.programs.connection import HOST_SOCKET, HOST_TOPIC

LOG = logging.getLogger("vchan-masakari")

LOOK_S: Final = 5.0
"""How often the daemon is asked: as often as it asks a quiet guest."""
ANSWER_S: Final = 10.0
"""For its answer."""
DEAD_S: Final = 60.0
"""What a guest may be silent for: a reboot takes less, and a host's short trouble."""
DEAD_S_MIN: Final = 20.0
"""Less would be no more than a guest that is short of CPU."""
RETRY_S: Final = 15.0
"""A notification that masakari did not take is sent again after this, while the guest is dead."""
WAITING_MAX: Final = 1000
"""Notifications that masakari has not taken yet. At it: the oldest is given up, and logged."""
EVENT: Final = "QEMU_GUEST_AGENT_ERROR"
"""Its engine heeds few events, and passes over all others: this one stands for a guest agent that
says nothing, whoever saw that."""
VIR_DOMAIN_EVENT: Final = "STOPPED_FAILED"
"""With it masakari recovers the instance: stops it and starts it again."""

EXIT_OK: Final = 0
"""It was ended by a signal."""
EXIT_CONFIG: Final = 2
"""A wrong argument, no openstacksdk, or no such cloud: starting again does not help."""

SendNotification = Callable[[dict[str, Any]], None]
"""Sends a notification's attributes; raises what the library raises."""


def notification(death: Death, hostname: str, at: datetime) -> dict[str, Any]:
    """What masakari is told, as its API has it.

    Args:
        hostname: This host's name, as masakari's segments have it.
        at: In UTC.
    """
    return {
        "type": "VM",
        "hostname": hostname,
        "generated_time": at.replace(microsecond=0, tzinfo=None).isoformat(),
        "payload": {
            "event": EVENT,
            "instance_uuid": death.uuid,
            "vir_domain_event": VIR_DOMAIN_EVENT,
        },
    }


class Watch:
    """Asks, judges, tells.

    Args:
        ask: Calls one of vchan-host's methods; raises VchanError.
        send: See `SendNotification`.
    """

    def __init__(
        self, ask: Callable[[str], Any], send: SendNotification, hostname: str, deaths: Deaths
    ) -> None:
        self._ask = ask
        self._send = send
        self._hostname = hostname
        self._deaths = deaths
        self._waiting: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._not_before_s = 0.0
        self._trouble = ""

    def look(self, now_s: float, at: datetime) -> None:
        """One look, and what follows of it."""
        try:
            sees_libvirt = self._ask("status")["libvirt"] == "connected"
            rows = self._ask("list")
        except VchanError as error:
            # Who cannot see says nothing; `deaths` begins anew if it takes long.
            self._say(f"vchan-host cannot be asked: {error}")
            return
        self._say("")
        alive = {row["uuid"] for row in rows if row["channel"] == "ready"}
        here = {row["uuid"] for row in rows if row["domain"] == "running"}
        for uuid in [each for each in self._waiting if each in alive or each not in here]:
            LOG.info("%s: it lives again, or has gone: masakari is not told", uuid)
            del self._waiting[uuid]
        for death in self._deaths.look(rows, now_s, sees_libvirt=sees_libvirt):
            LOG.warning("%s (%s): silent for %.0f s", death.name, death.uuid, death.silent_s)
            self._waiting[death.uuid] = notification(death, self._hostname, at)
        while len(self._waiting) > WAITING_MAX:
            uuid, _ = self._waiting.popitem(last=False)
            LOG.error("%s: given up: over %d notifications wait", uuid, WAITING_MAX)
        if now_s >= self._not_before_s:
            self._tell(now_s)

    def _tell(self, now_s: float) -> None:
        for uuid, attributes in list(self._waiting.items()):
            try:
                self._send(attributes)
            except Exception as error:  # noqa: BLE001 - the library's, and its transports'
                if getattr(error, "status_code", getattr(error, "http_status", None)) == 409:
                    LOG.info("%s: masakari knows already: %s", uuid, error)
                    del self._waiting[uuid]
                    continue
                LOG.warning("%s: masakari was not told: %s", uuid, error)
                self._not_before_s = now_s + RETRY_S
                return
            LOG.warning("%s: masakari was told", uuid)
            del self._waiting[uuid]

    def _say(self, trouble: str) -> None:
        if trouble and trouble != self._trouble:
            LOG.warning("%s", trouble)
        self._trouble = trouble


def connect(cloud: str | None) -> SendNotification:
    """The operator's cloud, as clouds.yaml or OS_... variables have it.

    Raises:
        ModuleNotFoundError: openstacksdk is not there.
        Exception: The library's: there is no such cloud.
    """
    import openstack

    connection = openstack.connect(cloud=cloud, app_name="vchan-masakari", app_version=__version__)

    def send(attributes: dict[str, Any]) -> None:
        connection.instance_ha.create_notification(**attributes)

    return send


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="vchan-masakari", description=__doc__.split("\n\n")[0])
    parser.add_argument("--version", action="version", version=builds.version_line(parser.prog))
    parser.add_argument("--socket", default=HOST_SOCKET, help="vchan-host's [%(default)s]")
    parser.add_argument("--os-cloud", metavar="NAME", help="in clouds.yaml [OS_CLOUD]")
    parser.add_argument(
        "--hostname", metavar="NAME", help="of this host in masakari [vchan-host's option host]"
    )
    parser.add_argument(
        "--dead-after", type=float, default=DEAD_S, metavar="SECONDS", help="[%(default)s]"
    )
    options = parser.parse_args(arguments)
    if not options.dead_after >= DEAD_S_MIN:
        parser.error(f"--dead-after: expected {DEAD_S_MIN:.0f} or more")
    return options


def main() -> None:
    """The command."""
    options = _parse(sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        send = connect(options.os_cloud)
    except ModuleNotFoundError as error:
        sys.stderr.write(f"vchan-masakari: needs {error.name}: python3-openstacksdk\n")
        sys.exit(EXIT_CONFIG)
    except Exception as error:  # noqa: BLE001 - whatever the library says of the configuration
        sys.stderr.write(f"vchan-masakari: {error}\n")
        sys.exit(EXIT_CONFIG)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with Client(options.socket) as client:

        def ask(method: str) -> Any:
            return client.call(HOST_TOPIC, method, timeout_s=ANSWER_S)

        hostname = options.hostname
        while hostname is None and not ended.is_set():
            try:
                hostname = ask("status")["host"]
            except VchanError as error:
                LOG.warning("vchan-host cannot be asked: %s", error)
                ended.wait(LOOK_S)
        watch = Watch(ask, send, hostname or "", Deaths(options.dead_after))
        while not ended.is_set():
            watch.look(time.monotonic(), datetime.now(UTC))
            ended.wait(LOOK_S)


if __name__ == "__main__":
    main()
