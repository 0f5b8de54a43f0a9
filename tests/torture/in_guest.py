"""The programs in the guest.

    python3 -m tests.torture.in_guest runner      runs what the control side calls and casts
    python3 -m tests.torture.in_guest asker       calls and casts to the control side, by itself

Both take fanouts. Each writes its records to a virtio port of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.torture.payload import answer_is_right, answer_to, checksum, payload_of
from tests.torture.records import (
    ANSWERED,
    CALL,
    CAST,
    CONFIRMED,
    FANOUT,
    REPORT,
    WRONG,
    Born,
    Health,
    Ran,
    Sent,
    Told,
    Writer,
)
from vchan.client import Agent, Client
from vchan.errors import VchanError
from vchan.programs.connection import AGENT_SOCKET

RUNNER: Final = "runner"
ASKER: Final = "asker"
PROGRAMS: Final = (RUNNER, ASKER)
ALL: Final = "all"
"""The topic of fanouts; both programs serve it, and the topic of their own name."""
CONTROL: Final = "control"
"""The topic of the service that the asker asks."""
GUESTS: Final = "guests"
"""The topic of what guests report, to services."""
PORTS: Final = {program: f"org.vchan.torture.{program}" for program in PROGRAMS}
MARK: Final = "vchan_redelivered"
"""In the context of what may have run before."""
DAEMON: Final = b"vchan.guest.daemon"
CALL_TIMEOUT_S: Final = 60.0
PAUSE_S: Final = 0.25
"""Between an asker's requests of one kind."""
CHANGES_S: Final = (0.5, 9.0)
"""From a change of the guest's name to the next, in turn: one that follows before the first is
told, and one that leaves time for a host to come that is told what another knows."""
ADDRESS_ALIAS: Final = b"lo:0"
SIOCSIFADDR: Final = 0x8916
RETRY_S: Final = 0.2
HEALTH_S: Final = 2.0
PAGE_KIB: Final = 4


def daemon_pid() -> int:
    """Of this guest's vchan daemon; 0: none runs."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if DAEMON in (path / "cmdline").read_bytes():
                return int(path.name)
    return 0


def open_port(program: str) -> Writer:
    """The port for a program's records, once it is there."""
    path = f"/dev/virtio-ports/{PORTS[program]}"
    while True:
        try:
            return Writer(path)
        except OSError:  # not linked yet, or our predecessor is just dying
            time.sleep(RETRY_S)


class Endpoint:
    """Writes down what it runs."""

    def __init__(self, writer: Writer, agent: Agent) -> None:
        self._writer = writer
        self._agent = agent

    def note(self, sender: str, number: int, payload: str, **_: Any) -> None:
        """For casts."""
        self._ran(CAST, sender, number, payload)

    def hear(self, sender: str, number: int, payload: str, **_: Any) -> None:
        """For fanouts."""
        self._ran(FANOUT, sender, number, payload)

    def echo(self, sender: str, number: int, payload: str, **_: Any) -> list[object]:
        """For calls."""
        self._ran(CALL, sender, number, payload)
        return [sender, number, answer_to(sender, number)]

    def _ran(self, kind: str, sender: str, number: int, payload: str) -> None:
        marked = bool(self._agent.context.get(MARK))
        crc = checksum(payload)
        self._writer.write(Ran(time.monotonic(), kind, sender, number, crc, marked, ""))


class AskingEndpoint(Endpoint):
    """Told when to stand still, too."""

    def __init__(self, writer: Writer, agent: Agent, asking: Asking) -> None:
        super().__init__(writer, agent)
        self._asking = asking

    def stand(self, still: bool) -> bool:
        """Begin nothing new, or go on. Returns whether nothing is under way."""
        return self._asking.stand(still)


class Asking:
    """Threads that ask the control side."""

    def __init__(self, writer: Writer, name: str) -> None:
        self._writer = writer
        self._name = name
        self._go = threading.Event()
        self._go.set()
        self._under_way: set[str] = set()

    def start(self) -> None:
        """Begin."""
        for work in (self._caller, self._caster, self._changer, self._health):
            threading.Thread(target=work, daemon=True).start()

    def stand(self, still: bool) -> bool:
        """See `AskingEndpoint`."""
        if still:
            self._go.clear()
        else:
            self._go.set()
        return not self._under_way

    def _caller(self) -> None:
        def ask(client: Client, sender: str, number: int) -> str:
            args = {"sender": sender, "number": number, "payload": payload_of(sender, number)}
            answer = client.call(CONTROL, "echo", args, timeout_s=CALL_TIMEOUT_S)
            return ANSWERED if answer_is_right(answer, sender, number) else WRONG

        self._repeat(CALL, f"{self._name}-caller", ask)

    def _caster(self) -> None:
        def ask(client: Client, sender: str, number: int) -> str:
            args = {"sender": sender, "number": number, "payload": payload_of(sender, number)}
            client.cast(CONTROL, "note", args, timeout_s=CALL_TIMEOUT_S)
            return CONFIRMED

        self._repeat(CAST, f"{self._name}-caster", ask)

    def _repeat(self, kind: str, sender: str, ask: Callable[[Client, str, int], str]) -> None:
        client = connected()
        number = 0
        while True:
            self._go.wait()
            self._under_way.add(sender)
            number += 1
            self._writer.write(Sent(time.monotonic(), kind, CONTROL, sender, number))
            try:
                outcome = ask(client, sender, number)
            except VchanError as error:
                outcome = getattr(error, "class_name", type(error).__name__)
            self._writer.write(Told(time.monotonic(), sender, number, outcome))
            self._under_way.discard(sender)
            time.sleep(PAUSE_S)

    def _changer(self) -> None:
        """Changes what the guest's daemon reports."""
        number = 0
        while True:
            self._go.wait()
            number += 1
            self._writer.write(Sent(time.monotonic(), REPORT, GUESTS, self._name, number))
            socket.sethostname(guest_name(self._name, number))
            tell_of_address(number)
            time.sleep(CHANGES_S[number % len(CHANGES_S)])

    def _health(self) -> None:
        while True:
            time.sleep(HEALTH_S)
            pid = daemon_pid()
            with contextlib.suppress(OSError, IndexError):  # it is being killed
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
                record = Health(time.monotonic(), pages * PAGE_KIB, descriptors)
                self._writer.write(record)


def guest_name(sender: str, number: int) -> str:
    """A guest's name, which it reports."""
    return f"{sender}.{number}"


def who_named(name: str) -> tuple[str, int] | None:
    """Sender and number of a guest's name; None: nobody here gave it."""
    sender, dot, number = name.rpartition(".")
    return (sender, int(number)) if dot and number.isdecimal() else None


def tell_of_address(number: int) -> None:
    """Change an address of the guest's own: the kernel tells of that, and not of a name."""
    address = socket.inet_aton(f"192.0.2.{number % 250 + 1}")
    asked = struct.pack("16sHH4s8x", ADDRESS_ALIAS, socket.AF_INET, 0, address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFADDR, asked)


def connected() -> Client:
    """A client of the guest's daemon, once that is there."""
    while True:
        try:
            return Client(AGENT_SOCKET)
        except VchanError:
            time.sleep(RETRY_S)


def main() -> None:
    """Be the program that the first argument names."""
    program = sys.argv[1]
    writer = open_port(program)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    writer.write(Born(time.monotonic(), program, boot, daemon_pid()))
    agent = Agent(AGENT_SOCKET)
    if program == RUNNER:
        endpoint = Endpoint(writer, agent)
    else:
        # Numbers begin anew with each life of this program: so does the name.
        asking = Asking(writer, f"asker-{os.urandom(8).hex()}")
        endpoint = AskingEndpoint(writer, agent, asking)
        asking.start()
    agent.serve(program, endpoint)
    agent.serve(ALL, endpoint)
    agent.run()


if __name__ == "__main__":
    main()
