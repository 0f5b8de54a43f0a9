"""Hosts: libvirt's news, and the host daemon around its real parts.

`HostDaemon` does what `vchan.host.daemon.Daemon` does with its events, without the threads, the
configuration and the local socket, which need oslo and libvirt. Everything below is the real code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, cast

from tests.rig.gates import OpenGate
from tests.rig.stand_in import StandIn
from tests.simulate import broker as sim_broker
from tests.simulate import network
from tests.simulate.broker import Broker, HostBroker
from tests.simulate.virtio import Qemu
from tests.simulate.world import Fifo, Machine, Process, World
from vchan.errors import LimitExceeded
from vchan.host.broker.events import Completed, GivenUp, RepliesRefused, Token
from vchan.host.hypervisor import domains
from vchan.host.hypervisor.domains import (
    Changed,
    Decision,
    DomainEvent,
    DomainFacts,
    Domains,
    DomainState,
    Gone,
    Happened,
    HypervisorEvent,
    HypervisorLost,
    Resync,
    Selection,
)
from vchan.host.oslo_wire.downward_envelope import CONTEXT_ALLOW, ReplyPublication
from vchan.host.oslo_wire.upward_envelope import Form, Publication
from vchan.host.policy.rules import Ask, Verdict
from vchan.host.vm.channel import Channel, End, Home
from vchan.host.vm.handover import Handover
from vchan.host.vm.reports import Reports
from vchan.host.vm.throttle import Throttle
from vchan.host.vm.upward import ARRIVAL_ID, NOTE_ID
from vchan.io.loop import Loop
from vchan.rpc.in_flight import Cancelled
from vchan.rpc.messages import Topic


class _VmBroker:
    """What one VM asks of the broker, noted where the run's checks need it."""

    def __init__(self, broker: HostBroker, server: Broker, vm: str) -> None:
        self._broker = broker
        self._server = server
        self._vm = vm
        self._flight: list[bytes] = []
        self._unconfirmed = 0
        self.consume = broker.consume
        self.release = broker.release
        self.ack = broker.ack
        self.publish_heartbeat = broker.publish_heartbeat
        self.listen_for_answers = broker.listen_for_answers

    def complete(
        self,
        vm: str,
        request_id: bytes,
        tokens: tuple[Token, ...],
        reply: ReplyPublication | None = None,
    ) -> None:
        """See BrokerPort."""
        if reply is not None and reply.has_not_run:
            self._server.refused_calls.add(request_id)
            self._server.refusals[reply.body] = (request_id, vm)
        self._broker.complete(vm, request_id, tokens, reply)

    def publish_request(self, vm: str, request_id: bytes, publication: Publication) -> None:
        """See UpwardBrokerPort. Notes what is published without having heard of the rest."""
        if publication.form is not Form.MAIL:
            places = self._server.flights.setdefault(request_id, [])
            places.append((self._flight, len(self._flight)))
            self._flight.append(request_id)
            self._unconfirmed += 1
            self._server.reporting.published(id(self), request_id, publication)
        self._broker.publish_request(vm, request_id, publication)

    def sent(self, request_id: bytes, *, ok: bool) -> None:
        """The daemon hears of a confirm, and knows better from here on."""
        if request_id not in (ARRIVAL_ID, NOTE_ID):
            self._unconfirmed -= 1
            if not ok or not self._unconfirmed:
                self._flight = []


def _may_listen(_: Topic) -> bool:
    return True


class _Gate(OpenGate):
    """Open; it knows whose request was looked at last."""

    judged = b""

    def judge(self, ask: Ask, request_id: bytes) -> Verdict:
        self.judged = request_id
        return super().judge(ask, request_id)


class _Reports(Reports):
    """What a guest has told of itself.

    Args:
        noted: Told (what, arguments) of each report before it is kept.
    """

    def __init__(self, noted: Callable[[str, Mapping[str, Any]], None]) -> None:
        super().__init__()
        self._noted = noted

    def note(self, what: str, args: Mapping[str, Any], now_s: float) -> dict[str, Any] | None:
        self._noted(what, args)
        return super().note(what, args, now_s)


class _Handover(Handover):
    """Tells when the guest comes and goes."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell
        self._begins = False

    def begin(self, stay: str, before: str, now_s: float) -> None:
        self._tell("comes")
        self._begins = True
        super().begin(stay, before, now_s)

    def go_on(self, now_s: float) -> None:
        if not self._begins:
            self._tell("heard")
        self._begins = False
        super().go_on(now_s)

    def stand_still(self) -> None:
        self._tell("silent")
        super().stand_still()

    def end(self, now_s: float) -> None:
        self._tell("goes")
        super().end(now_s)


class HostDaemon:
    """One run of the host daemon."""

    def __init__(self, host: Host) -> None:
        self.process = Process(host.machine, host.name)
        self._world = host.world
        self._host = host
        self._server = host.broker
        self._home = Home(host.name, host.world.rng.randbytes(16), CONTEXT_ALLOW)
        self.channels: dict[str, Channel] = {}
        self._ports: dict[str, _VmBroker] = {}
        self.domains = Domains(Selection())
        self._proved: set[tuple[bytes, str]] = set()
        reporting = host.broker.reporting
        self._gate = _Gate(
            _may_listen, may_send=host.broker.guests_may_ask, may_report=reporting.is_on
        )
        self._gate.reports_to = reporting.topic
        self._gate.owned.update(host.broker.owned)
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
        qemu = self._host.qemus.get(facts.uuid)
        if qemu is not None:
            qemu.known_paused = facts.state is DomainState.PAUSED

    def _carry_out(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            self._world.note("%s: %s", self.process.name, decision)
            match decision:
                case domains.Connect(uuid):
                    loop = cast(Loop, self.process.loop)
                    port = self._ports[uuid] = _VmBroker(self.broker, self._server, uuid)
                    channel = self.channels[uuid] = Channel(
                        loop,
                        self.domains.domain(uuid),
                        self._home,
                        port,
                        self._gate,
                        partial(self._server.raw.offer, self.process),
                        Throttle(self._server.limits),
                        lambda reason, _: self._world.fail(f"a guest in quarantine: {reason}"),
                        End(self._connect),
                        reports=_Reports(partial(self._note_report, id(port))),
                    )
                    self._check_settling(channel)
                    self._watch_moves(channel)
                    self._watch_given_up(channel)
                    channel.connect()
                case domains.Speak(uuid):
                    self.channels[uuid].speak()
                case domains.Hush(uuid):
                    self.channels[uuid].hush()
                case domains.Release(uuid, why):
                    if uuid in self._host.qemus:
                        self._host.qemus[uuid].known_paused = False
                    self.account(self.channels[uuid])
                    channel = self.channels.pop(uuid)
                    # What the broker still says is not heard.
                    self._server.doubted.update(channel.downward.upward._sending)
                    channel.release(why.value)
                case domains.Attach() | domains.Warn():
                    self._world.fail(f"{decision}: every simulated domain has a channel")

    def _check_settling(self, channel: Channel) -> None:
        """A guest may be told to forget only what the broker has proved to have forgotten."""
        downward: Any = channel.downward
        requester = downward._requester

        def checked(ids: Iterable[bytes]) -> None:
            ids = tuple(ids)
            for request_id in ids:
                is_known = request_id not in self._server.raw.ids  # to the broker
                if is_known and (request_id, channel.vm) not in self._proved:
                    self._world.fail(f"{request_id.hex()[:8]} settled without the broker's proof")
            requester.settle(ids)

        downward._requester = StandIn(requester, settle=checked)

    def _connect(self, path: str) -> Any:
        return network.connect(self._world, path)

    def _note_report(self, stay: int, what: str, args: Mapping[str, Any]) -> None:
        self._server.reporting.noted(stay, self._gate.judged, what, args)

    def _watch_moves(self, channel: Channel) -> None:
        """Note when the guest comes and goes."""

        def note(what: str) -> None:
            self._server.moves.append((self._world.now_s, channel.vm, what))

        channel.downward.upward._history = _Handover(note)

    def _watch_given_up(self, channel: Channel) -> None:
        """Note which of the guest's requests nobody waits for any more."""
        host_upward: Any = channel.downward.upward
        responder = host_upward._responder

        def noted(deliveries: list[Any]) -> list[Any]:
            gone = (each for each in deliveries if isinstance(each, Cancelled))
            self._server.given_up.update(each.id for each in gone)
            return deliveries

        host_upward._responder = StandIn(
            responder,
            receive=lambda message, now_s: noted(responder.receive(message, now_s)),
            handle_timeout=lambda now_s: noted(responder.handle_timeout(now_s)),
        )

    def _on_broker(self, event: sim_broker.Event) -> None:
        """As Daemon._on_broker."""
        now_s = self.process.loop.time()
        channel = self.channels.get(event.vm)
        if channel is None:
            return
        match event:
            case sim_broker.Delivered():
                try:
                    channel.downward.delivered(
                        event.token,
                        event.request,
                        event.topic,
                        fanout=event.fanout,
                        redelivered=event.redelivered,
                        now_s=now_s,
                    )
                except LimitExceeded as error:
                    self._world.fail(f"refused: {error}")
            case sim_broker.Undecodable(_, token):  # the token is the broker's to forget
                channel.downward.count_undecodable()
                self.broker.ack(token)
            case sim_broker.Released():
                channel.downward.released()
            case sim_broker.PublishResult(_, request_id, ok, unroutable):
                self._ports[event.vm].sent(request_id, ok=ok or unroutable)
                channel.downward.upward.sent(
                    request_id, ok=ok, unroutable=unroutable, doubtful=event.in_doubt, now_s=now_s
                )
            case sim_broker.Mail(_, token, body):
                channel.mail(token, body)
            case Completed(_, ids, proven):
                for request_id in ids if proven else ():
                    self._proved.add((request_id, event.vm))
                    self._server.settle(request_id, event.vm)
                channel.downward.completed(ids, proven=proven)
            case GivenUp():
                channel.downward.count_given_up()
            case RepliesRefused():
                pass
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
        stats["copies at the host"] += channel.downward.counters["redelivered"]
        stats["handed back"] += channel.downward.counters["handed_back"]

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
            has_controller=True,
            configured=True,
            persistent=True,
        )
