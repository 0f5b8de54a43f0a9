"""A VM's channel: the guest's port, QEMU and the host's socket, with all they are known to do.

What is known: QEMU reads its socket in chunks of at most 4096 bytes; a guest's write is one element
of at most 32 KiB, 128 of them at a time. Migration takes the rings along and loses the socket.
The dying source may deliver the ring's elements a second time. A client that connects late
can find the guest-to-host direction wedged until it closes and connects again. Closing a client
loses what QEMU had not read, and while the VM is paused the guest hears nothing of it.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from tests.simulate.network import Endpoint, HangupWatch
from tests.simulate.world import Machine, Process, World
from vchan.errors import PortAbsent, PortBusy

CHUNK_BYTES = 4096
ELEMENT_BYTES = 32 * 1024
RING_ELEMENTS = 128
HOST_SOCKET_BYTES = 93_000
GUEST_TO_HOST_BYTES = 200_000
BACKLOG = 2


class Rings:
    """What is in the guest's memory, and so migrates with it."""

    def __init__(self) -> None:
        self.to_guest: deque[bytes] = deque()
        self.to_host: deque[bytes] = deque()
        self.sees_host = False
        self.port: PortEnd | None = None

    def tell_guest(self, there: bool) -> None:
        """The guest's kernel hears that a host client came or went."""
        if self.sees_host is not there:
            self.sees_host = there
            if self.port is not None:
                self.port.changed()

    def reset(self) -> None:
        """The guest rebooted: both rings are gone."""
        self.to_guest.clear()
        self.to_host.clear()


class PortEnd(Endpoint):
    """The guest's port, opened."""

    ends_at_hangup = False

    def __init__(self, world: World, channel: Channel, owner: Process) -> None:
        super().__init__(world, "vport", owner)
        self._channel = channel
        self._rings = channel.rings
        self.watches: list[HangupWatch] = []

    def changed(self) -> None:
        """The host came, went, or moved bytes."""
        if self.world.rng.random() < self._channel.lost_wakeups:
            self.world.stats["wake-ups lost"] += 1
            return
        self.kick()
        for watch in self.watches:
            watch.changed()

    def readable(self) -> bool:
        """Data, or hung up."""
        return bool(self._rings.to_guest) or not self._rings.sees_host

    def writable(self) -> bool:
        """A free element, and a host."""
        return self._rings.sees_host and len(self._rings.to_host) < RING_ELEMENTS

    def read(self) -> bytes:
        """See Stream."""
        if self._rings.to_guest:
            data = self._rings.to_guest.popleft()
            self._channel.kick()
            return data
        if not self._rings.sees_host:
            return b""
        raise BlockingIOError

    def write(self, data: bytes) -> int:
        """See Stream."""
        if not self.writable():
            raise BlockingIOError
        taken = data[:ELEMENT_BYTES]
        self._rings.to_host.append(taken)
        self._channel.kick()
        return len(taken)

    def on_close(self) -> None:
        """The kernel drops what nobody read."""
        self._rings.to_guest.clear()
        self._rings.port = None


class ClientEnd(Endpoint):
    """The host's end: a client of QEMU's socket."""

    def __init__(self, world: World, qemu: Qemu, owner: Process) -> None:
        super().__init__(world, qemu.path, owner)
        self._qemu = qemu
        self.to_qemu: deque[bytes] = deque()
        self.to_qemu_bytes = 0
        self.received: deque[bytes] = deque()
        self.received_bytes = 0
        self.hung_up = False

    def readable(self) -> bool:
        """Data, or the end."""
        return bool(self.received) or self.hung_up

    @property
    def is_alive(self) -> bool:
        """Its process is: it is closed because somebody closes it."""
        return self._owner is not None and self._owner.alive

    def writable(self) -> bool:
        """Room, or an error to be told."""
        return self.hung_up or self.to_qemu_bytes < HOST_SOCKET_BYTES

    def read(self) -> bytes:
        """See Stream."""
        if self.received:
            data = b"".join(self.received)
            self.received.clear()
            self.received_bytes = 0
            self._qemu.kick()
            return data
        if self.hung_up:
            if self.to_qemu:
                raise ConnectionResetError(104, "Connection reset by peer")
            return b""
        raise BlockingIOError

    def write(self, data: bytes) -> int:
        """See Stream."""
        if self.hung_up:
            raise BrokenPipeError(32, "Broken pipe")
        if self._qemu.incoming:
            self.world.fail(f"{self.path}: spoken to before the guest runs there")
        room = HOST_SOCKET_BYTES - self.to_qemu_bytes
        if room <= 0:
            raise BlockingIOError
        taken = data[:room]
        self.to_qemu.append(taken)
        self.to_qemu_bytes += len(taken)
        self._qemu.kick()
        return len(taken)

    def take_chunk(self) -> bytes:
        """What QEMU reads at a time."""
        data = self.to_qemu.popleft()
        while len(data) < CHUNK_BYTES and self.to_qemu:
            data += self.to_qemu.popleft()
        if len(data) > CHUNK_BYTES:
            self.to_qemu.appendleft(data[CHUNK_BYTES:])
            data = data[:CHUNK_BYTES]
        self.to_qemu_bytes -= len(data)
        return data

    def give(self, data: bytes) -> None:
        """QEMU wrote this."""
        self.received.append(data)
        self.received_bytes += len(data)
        self.kick()

    def on_close(self) -> None:
        """QEMU sees that its client is gone."""
        self._qemu.client_closed(self)


class Qemu:
    """One QEMU process: the VM on one host."""

    def __init__(self, channel: Channel, host: Any, number: int, *, incoming: bool) -> None:
        self.channel = channel
        self.world = channel.world
        self.host = host
        self.path = f"/{host.name}/qemu{number}.sock"
        self.incoming = incoming
        self.outgoing = False
        self.running = False
        self.dead = False
        self.wedged = False
        self.client: ClientEnd | None = None
        self.known_paused = False
        """The daemon that serves it has been told that the guest stands still."""
        self._pending: list[ClientEnd] = []
        self._planned = False
        self.world.listeners[self.path] = self
        host.qemus[channel.uuid] = self

    # ------------------------------------------------------------ clients

    def connect(self, owner: Process) -> ClientEnd:
        """A client connects: the first is served, the next hang, the fourth is refused."""
        if len(self._pending) >= BACKLOG:
            raise PortBusy(self.path, "other clients are waiting for it already")
        client = ClientEnd(self.world, self, owner)
        self._pending.append(client)
        self._serve_next()
        return client

    def _serve_next(self) -> None:
        if self.client is None and self._pending:
            self.client = self._pending.pop(0)
            if self.running:
                self.channel.rings.tell_guest(there=True)
            self.kick()

    def client_closed(self, client: ClientEnd) -> None:
        """Its client is gone."""
        if client in self._pending:
            self._pending.remove(client)
        elif client is self.client and not self.dead:
            self._check_why(client)
            self.client = None
            if self.running:
                rings = self.channel.rings
                if client.to_qemu and rings.port is not None:
                    rings.to_guest.append(client.take_chunk())
                if self.wedged:
                    self.world.stats["wedges cured"] += 1
                self.wedged = False
                rings.to_host.clear()
                rings.tell_guest(there=False)
            self._serve_next()

    def _check_why(self, client: ClientEnd) -> None:
        """A guest that stands still says nothing, and takes nothing: that is no reason to close."""
        if self.running or not client.is_alive:
            return
        self.world.stats["connections closed while paused"] += 1
        if self.known_paused:
            self.world.fail(f"{self.path}: its client closed while the guest was paused")

    # ------------------------------------------------------------ running

    def resume(self) -> None:
        """The guest executes here from now on."""
        rings = self.channel.rings
        self.running = True
        self.incoming = False
        if self.client is not None:
            rings.tell_guest(there=True)
        elif rings.to_host:
            self._wedge("the guest went on with nobody connected")
        else:
            self.world.after(0.02, self._notice_absence)
        self.kick()

    def _notice_absence(self) -> None:
        if self.running and self.client is None and not self.dead:
            self.channel.rings.tell_guest(there=False)

    def _wedge(self, why: str) -> None:
        if not self.wedged:
            self.wedged = True
            self.world.stats["wedges"] += 1
            self.world.note("%s: wedged: %s", self.path, why)

    def wedge(self) -> None:
        """Guest to host goes silent, without a sign."""
        self._wedge("by itself")

    def stop(self) -> None:
        """The guest executes no more here."""
        self.running = False

    def flush_copy(self, elements: list[bytes]) -> None:
        """The dying source delivers what the destination delivers, too."""
        if self.client is not None and not self.dead:
            for element in elements:
                self.client.give(element)

    def die(self) -> None:
        """The process ends."""
        if self.dead:
            return
        self.dead = True
        self.running = False
        if self.world.listeners.get(self.path) is self:
            del self.world.listeners[self.path]
        if self.host.qemus.get(self.channel.uuid) is self:
            del self.host.qemus[self.channel.uuid]
        client, self.client = self.client, None
        for end in [client, *self._pending]:
            if end is not None:
                if end.to_qemu:
                    self.world.stats["sockets lost with bytes"] += 1
                end.hung_up = True
                end.kick()
        self._pending.clear()

    # ------------------------------------------------------------ moving bytes

    def kick(self) -> None:
        """There may be bytes to move."""
        if not self._planned and self.running and self._can_move():
            self._planned = True
            self.world.after(self.world.latency_s(), self._pump)

    def _can_move(self) -> bool:
        client, rings = self.client, self.channel.rings
        if rings.to_host and not self.wedged:
            return client is None or client.received_bytes < GUEST_TO_HOST_BYTES
        return (
            client is not None
            and bool(client.to_qemu)
            and rings.port is not None
            and len(rings.to_guest) < RING_ELEMENTS
        )

    def _pump(self) -> None:
        self._planned = False
        if self.dead or not self.running:
            return
        client, rings = self.client, self.channel.rings
        rng = self.world.rng
        if rings.to_host and not self.wedged:
            if client is None:
                if rings.sees_host:
                    self._wedge("the guest wrote and did not know that nobody is there")
                else:
                    rings.to_host.clear()
            else:
                for _ in range(min(len(rings.to_host), rng.choice((1, 4, 128)))):
                    client.give(self.channel.damaged(rings.to_host.popleft()))
                    if client.received_bytes >= GUEST_TO_HOST_BYTES:
                        break
            if rings.port is not None:
                rings.port.changed()
        if client is not None and client.to_qemu and rings.port is not None:
            for _ in range(rng.choice((1, 2, 128))):
                if not client.to_qemu or len(rings.to_guest) >= RING_ELEMENTS:
                    break
                rings.to_guest.append(self.channel.damaged(client.take_chunk()))
            client.kick()
            rings.port.changed()
        self.kick()


class Channel:
    """A VM's channel, wherever the VM is."""

    def __init__(self, world: World, uuid: str, machine: Machine) -> None:
        self.world = world
        self.uuid = uuid
        self.machine = machine
        self.rings = Rings()
        self.qemu: Qemu | None = None
        self.lost_wakeups = 0.0
        self.damage = 0
        """How many of the next chunks get a bit turned over."""

    def kick(self) -> None:
        """The guest moved something."""
        if self.qemu is not None:
            self.qemu.kick()

    def damaged(self, data: bytes) -> bytes:
        """The data, perhaps with a bit turned over."""
        if not self.damage or not data:
            return data
        self.damage -= 1
        self.world.stats["bits turned over"] += 1
        at = self.world.rng.randrange(len(data))
        return data[:at] + bytes((data[at] ^ (1 << self.world.rng.randrange(8)),)) + data[at + 1 :]

    def open_port(self) -> PortEnd:
        """The guest opens its port.

        Raises:
            PortBusy: Somebody has it open.
            PortAbsent: It is not there.
        """
        assert self.world.starting is not None
        if self.qemu is None:
            raise PortAbsent("vport", "no such port")
        if self.rings.port is not None:
            raise PortBusy("vport", "another process has it open")
        port = self.rings.port = PortEnd(self.world, self, self.world.starting.process)
        self.kick()
        return port
