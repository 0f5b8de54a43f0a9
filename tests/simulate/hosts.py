"""Hosts: libvirt's news, and the host daemon around its real parts.

`HostDaemon` does what `vchan.host.daemon.Daemon` does with its events, without the threads, the
configuration and the local socket, which need oslo and libvirt. Everything below is the real code.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from tests.rig.gates import OpenGate, offer_nothing
from tests.simulate import broker as sim_broker
from tests.simulate import network
from tests.simulate.broker import Broker, HostBroker
from tests.simulate.virtio import Qemu
from tests.simulate.world import Fifo, Machine, Process, World
from vchan.errors import LimitExceeded
from vchan.host import domains
from vchan.host.channels import Channel, End
from vchan.host.domains import (
    Changed,
    DomainEvent,
    DomainFacts,
    Domains,
    DomainState,
    Effect,
    Gone,
    Happened,
    HypervisorEvent,
    HypervisorLost,
    Resync,
    Selection,
)
from vchan.host.envelope import CONTEXT_ALLOW
from vchan.loop import Loop
from vchan.messages import Topic


class _VmBroker:
    """As in vchan.host.daemon: replies are known by VM and request."""

    def __init__(self, broker: HostBroker, vm: str) -> None:
        self._broker = broker
        self._vm = vm.encode()
        self.consume = broker.consume
        self.release = broker.release
        self.ack = broker.ack
        self.barrier = broker.barrier
        self.publish_request = broker.publish_request
        self.listen_for_answers = broker.listen_for_answers

    def publish_reply(self, reply_q: str, body: bytes, key: bytes) -> None:
        """See BrokerPort."""
        self._broker.publish_reply(reply_q, body, self._vm + b" " + key)


def _may_listen(_: Topic) -> bool:
    return True


def _no_log(_: str) -> None:
    pass


class HostDaemon:
    """One run of the host daemon."""

    def __init__(self, host: Host) -> None:
        self.process = Process(host.machine, host.name)
        self._world = host.world
        self._server = host.broker
        self._identity = (host.name, host.world.rng.randbytes(16))
        self.channels: dict[str, Channel] = {}
        self.domains = Domains(Selection())
        self._proved: set[tuple[bytes, str]] = set()
        self._gate = OpenGate(_may_listen, may_send=host.broker.guests_may_ask)
        self._posts = Fifo(host.world, lambda event: self.process.enter(self._on_broker, event))
        self.broker = HostBroker(host.world, host.broker, self._posts.push)

    def on_hypervisor(self, event: HypervisorEvent) -> None:
        """As Daemon._on_hypervisor."""
        match event:
            case Changed(facts):
                self._note_pause(facts)
            case Resync(every):
                for facts in every:
                    self._note_pause(facts)
            case _:
                pass
        loop = self.process.loop
        self._carry_out(self.domains.receive(event, loop.time()))

    def _note_pause(self, facts: DomainFacts) -> None:
        channel = self.channels.get(facts.uuid)
        if channel is not None:
            channel.paused = facts.state is DomainState.PAUSED

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            self._world.note("%s: %s", self.process.name, effect)
            match effect:
                case domains.Connect(uuid, path):
                    loop = cast(Loop, self.process.loop)
                    channel = self.channels[uuid] = Channel(
                        loop,
                        uuid,
                        uuid,
                        self._identity,
                        _VmBroker(self.broker, uuid),
                        self._gate,
                        CONTEXT_ALLOW,
                        offer_nothing,
                        _no_log,
                        end=End(self._connect),
                    )
                    self._check_settling(channel)
                    self._watch_moves(channel)
                    channel.connect(path)
                case domains.Speak(uuid):
                    self.channels[uuid].speak()
                case domains.Hush(uuid):
                    self.channels[uuid].hush()
                case domains.Release(uuid, why):
                    self.account(self.channels[uuid])
                    self.channels.pop(uuid).release(why.value)
                case domains.Attach() | domains.Warn():
                    self._world.fail(f"{effect}: every simulated domain has a channel")

    def _check_settling(self, channel: Channel) -> None:
        """A guest may be told to forget only what the broker has proved to have forgotten."""
        requester: Any = channel.relay._requester
        settle = requester.settle

        def checked(ids: Iterable[bytes]) -> None:
            ids = tuple(ids)
            for request_id in ids:
                if (request_id, channel.vm) not in self._proved:
                    self._world.fail(f"{request_id.hex()[:8]} settled without the broker's proof")
            settle(ids)

        requester.settle = checked

    def _connect(self, path: str) -> Any:
        return network.connect(self._world, path)

    def _watch_moves(self, channel: Channel) -> None:
        """Note when the guest comes and goes."""
        outbound: Any = channel.relay.outbound
        opened, suspend, release = outbound.opened, outbound.suspend, outbound.release

        def noted_opened(**how: Any) -> None:
            if not outbound._history.stay or outbound._suspended:
                self._server.moves.append((self._world.now_s, channel.vm, True))
            opened(**how)

        def noted_suspend() -> None:
            self._server.moves.append((self._world.now_s, channel.vm, False))
            suspend()

        def noted_release() -> None:
            if channel._released:  # by libvirt's word: what the broker still says is not heard
                self._server.doubted.update(outbound._sending)
            release()

        drop = outbound._drop

        def noted_drop(request_id: bytes) -> None:
            self._server.given_up.add(request_id)
            drop(request_id)

        outbound._drop = noted_drop
        outbound.opened, outbound.suspend = noted_opened, noted_suspend
        outbound.release = noted_release

    def _on_broker(self, event: sim_broker.Event) -> None:
        """As Daemon._on_broker."""
        now_s = self.process.loop.time()
        if isinstance(event, sim_broker.Published):
            vm, _, request_id = event.key.partition(b" ")
            channel = self.channels.get(vm.decode())
            if channel is not None:
                channel.relay.published(request_id, ok=event.ok, now_s=now_s)
                channel.set_timer()
            return
        channel = self.channels.get(event.vm)
        if channel is None:
            return
        match event:
            case sim_broker.Delivered():
                try:
                    channel.relay.delivered(
                        event.token,
                        event.request,
                        event.topic,
                        fanout=event.fanout,
                        redelivered=event.redelivered,
                        now_s=now_s,
                    )
                except LimitExceeded as error:
                    self._world.fail(f"refused: {error}")
            case sim_broker.Released():
                channel.relay.released()
            case sim_broker.Sent(_, request_id, ok, unroutable):
                channel.relay.outbound.sent(
                    request_id, ok=ok, unroutable=unroutable, doubtful=event.in_doubt, now_s=now_s
                )
            case sim_broker.Mail(_, token, body):
                problem = channel.relay.outbound.mail(token, body, now_s)
                if problem:
                    self._world.fail(f"dropped mail: {problem}")
            case sim_broker.Settled(_, ids):
                for request_id in ids:
                    self._proved.add((request_id, event.vm))
                    self._server.settle(request_id, event.vm)
                channel.relay.settled(ids)
        channel.set_timer()

    def account(self, channel: Channel) -> None:
        """Add a channel's counters to the run's."""
        stats = self._world.stats
        session = channel._session.counters
        stats["sessions"] += session.sessions
        stats["resumptions"] += session.resumptions
        stats["frames resent"] += session.frames_resent
        stats["frames"] += session.frames_sent
        stats["frames twice"] += session.duplicates
        stats["losses"] += session.losses
        stats["violations"] += session.violations
        stats["reconnects"] += channel.counters["reconnects"]
        stats["cures"] += channel.counters["cures"]
        stats["copies at the host"] += channel.relay.counters["redelivered"]
        stats["handed back"] += channel.relay.counters["handed_back"]

    def kill(self, *, host_too: bool = False) -> None:
        """kill -9, or the host's end."""
        for channel in self.channels.values():
            self.account(channel)
        self.process.kill()
        self.broker.die(host_too=host_too)


class Host:
    """A compute node: QEMUs, libvirtd, and our daemon when it runs."""

    def __init__(self, world: World, name: str, broker: Broker) -> None:
        self.world = world
        self.name = name
        self.broker = broker
        self.machine = Machine(world, clock_stops=False)
        self.qemus: dict[str, Qemu] = {}
        self.daemon: HostDaemon | None = None
        self.up = True
        self.libvirt_up = True
        self._edges = 0
        self._last_edge: dict[str, int] = {}
        self._news = Fifo(world, self._tell)

    # ------------------------------------------------------------ the daemon

    def start_daemon(self) -> None:
        """The daemon starts and asks libvirt for everything."""
        if self.daemon is None and self.up:
            self.daemon = HostDaemon(self)
            self.world.note("%s: daemon starts", self.name)
            self._resync(self.daemon)

    def kill_daemon(self, *, host_too: bool = False) -> None:
        """The daemon dies."""
        if self.daemon is not None:
            self.world.note("%s: daemon dies", self.name)
            self.daemon.kill(host_too=host_too)
            self.daemon = None

    # ------------------------------------------------------------ libvirt

    def emit(self, uuid: str, event: DomainEvent) -> None:
        """A lifecycle event."""
        if self.libvirt_up and self.daemon is not None:
            self._edges += 1
            self._last_edge[uuid] = self._edges
            self._news.push((self.daemon, Happened(uuid, uuid, event)))
            self.world.after(self.world.latency_s(), self._read, self.daemon, uuid, self._edges)

    def _read(self, daemon: HostDaemon, uuid: str, edge: int) -> None:
        """Facts are read after each edge; those that another edge overtook are not told."""
        if self.libvirt_up and self._last_edge[uuid] == edge:
            here = uuid in self.qemus
            self._news.push((daemon, Changed(self._facts(uuid)) if here else Gone(uuid, uuid)))

    def libvirt_stop(self) -> None:
        """libvirtd goes away; what happens now is not told."""
        self.libvirt_up = False
        daemon = self.daemon
        if daemon is not None:
            daemon.process.enter(daemon.on_hypervisor, HypervisorLost("gone"))

    def libvirt_start(self) -> None:
        """It is back: everything is told."""
        self.libvirt_up = True
        if self.daemon is not None:
            self._resync(self.daemon)

    def _tell(self, news: tuple[HostDaemon, HypervisorEvent]) -> None:
        daemon, event = news
        if daemon is self.daemon and self.libvirt_up:
            daemon.process.enter(daemon.on_hypervisor, event)

    def _resync(self, daemon: HostDaemon) -> None:
        if self.libvirt_up:
            facts = tuple(self._facts(uuid) for uuid in sorted(self.qemus))
            self._news.push((daemon, Resync(facts)))

    def _facts(self, uuid: str) -> DomainFacts:
        qemu = self.qemus[uuid]
        return DomainFacts(
            uuid,
            uuid,
            DomainState.RUNNING if qemu.running else DomainState.PAUSED,
            incoming=qemu.incoming,
            outgoing=qemu.outgoing,
            channel_path=qemu.path,
            channel_alias="ua-vchan0",
            has_controller=True,
            configured=True,
            persistent=True,
        )
