"""vchan-host: the daemon on the compute host. Follows libvirt, relays between broker and guests.

Threads: this one runs the loop, every link and every relay. One follows libvirt, one talks to the
broker; they hand over events and take commands, and nothing here ever waits for them.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

from oslo_log import log as oslo_log

from vchan import __version__
from vchan.errors import ConfigError, LimitExceeded, LinkError, NoSuchDomain, Rejected
from vchan.exchange import HandedBack, Outcome, Overdue
from vchan.host import broker_events, config, domains
from vchan.host.authority import Authority, facts_of
from vchan.host.broker import Broker
from vchan.host.broker_config import BrokerConfig
from vchan.host.broker_events import BrokerEvent
from vchan.host.channels import Channel
from vchan.host.domains import Domains, Effect, HypervisorEvent
from vchan.host.gate import VmGate
from vchan.host.http_proxy import HttpProxy
from vchan.host.hypervisor import Hypervisor
from vchan.host.leftovers import Leftovers
from vchan.host.local import Answer, LocalService, failure, result
from vchan.host.policy import Facts
from vchan.loop import Loop, Timer
from vchan.messages import NO_AGENT, Request, Topic
from vchan.notify import ServiceManager
from vchan.server import LocalServer

LOG = logging.getLogger("vchan.host")

VmEvent = (
    broker_events.Consuming
    | broker_events.Delivered
    | broker_events.Undecodable
    | broker_events.Released
    | broker_events.Settled
    | broker_events.Sent
    | broker_events.Mail
)

LEFTOVERS_S: Final = 5.0
"""How often it is looked whether queues are to be deleted."""

EXIT_OK: Final = 0
EXIT_CONFIG: Final = 2
"""A wrong option: starting again does not help."""
EXIT_SOCKET: Final = 3
"""The local socket cannot be made."""


class _VmBroker:
    """The broker as one VM's relay sees it: replies are known by VM and request."""

    def __init__(self, broker: Broker, vm: str) -> None:
        self._broker = broker
        self._vm = vm.encode()
        self.consume = broker.consume
        self.release = broker.release
        self.ack = broker.ack
        self.barrier = broker.barrier
        self.publish_request = broker.publish_request
        self.listen_for_answers = broker.listen_for_answers

    def publish_reply(self, reply_q: str, body: bytes, key: bytes) -> None:
        self._broker.publish_reply(reply_q, body, self._vm + b" " + key)


class Daemon:
    """Wires hypervisor, broker, channels and the local socket together.

    Raises:
        ConfigError, LinkError: As `main` reports them.
    """

    def __init__(self, conf: Any) -> None:
        options = conf[config.GROUP]
        self._misspelt = config.unknown_options(conf)
        self.loop = Loop()
        self._manager = ServiceManager(self.loop)
        self._host = (options.host, os.urandom(16))
        self._authority = Authority(self.loop, conf)
        self._gates: dict[str, VmGate] = {}
        self._context_allow = frozenset(options.context_allow)
        self._channels: dict[str, Channel] = {}
        self._domains = Domains(config.selection(conf))
        self._past: Counter[str] = Counter()  # counters of channels that are over
        self._timer: Timer | None = None
        self._broker = self._make_broker(conf)
        self._leftovers = Leftovers(options.delete_queues_after)
        self._broker_problem = "" if self._broker is None else "not connected yet"
        self._attaching: dict[str, list[tuple[str, Answer]]] = {}
        self._static = config.static_channels(conf)
        self._hypervisor = self._make_hypervisor(options)
        self._local = LocalService(
            self.loop, self, LOG.debug, config.admin_access(conf), LOG.warning
        )
        self._http = HttpProxy(
            self.loop, config.http_services(conf), options.metadata_proxy_shared_secret
        )
        self._server = LocalServer(
            self.loop,
            options.socket,
            config.socket_mode(conf),
            self._host[1],
            options.host,
            self._local,
            LOG.info,
            config.client_access(conf),
        )

    def _make_broker(self, conf: Any) -> Broker | None:
        """None where no transport_url is configured: local programs can call into VMs all the
        same."""
        if not config.names_a_broker(conf):
            return None
        where = BrokerConfig.from_oslo(conf)
        where = replace(where, topic_expires_s=conf[config.GROUP].queues_expire_after)
        return Broker(where, self._poster(self._on_broker))

    def _make_hypervisor(self, options: Any) -> Hypervisor | None:
        """None where there is no libvirt: then the configuration's channels are all there are."""
        if not options.libvirt_uri:
            return None
        return Hypervisor(
            options.libvirt_uri,
            self._poster(self._on_hypervisor),
            target_name=options.target_name,
        )

    def _poster(self, handle: Callable[[Any], None]) -> Callable[[Any], None]:
        return lambda event: self.loop.call_soon_threadsafe(lambda: handle(event))

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; SIGHUP has the policy read and the audit log opened
        anew."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.loop.stop())
        signal.signal(signal.SIGHUP, lambda *_: self.loop.call_soon_threadsafe(self._reload))
        for text in self._misspelt:
            LOG.warning("%s", text)
        broker = "no broker: local programs only" if self._broker is None else "with a broker"
        LOG.info("vchan-host %s: %s, %s", __version__, self._server.path, broker)
        if self._broker is not None:
            self._broker.start()
            self._delete_leftovers(self._broker)
        if self._hypervisor is not None:
            self._hypervisor.start()
        else:
            self._on_hypervisor(domains.Resync(()))
        # What start-up made stays: to look for garbage in it holds up everybody for some 20 ms.
        gc.freeze()
        self._manager.ready(f"{self._server.path}, {broker}")
        try:
            self.loop.run()
        finally:
            self._close()

    def _close(self) -> None:
        self._manager.stopping()
        self._server.close()
        for channel in self._channels.values():
            channel.release("this host's daemon is stopping")
        if self._broker is not None:
            self._broker.stop()
        if self._hypervisor is not None:
            self._hypervisor.stop()
        self._static.close()
        self._http.close()
        self._authority.close()
        self.loop.close()

    # ---------------------------------------------------------------- the policy

    def _reload(self) -> None:
        self._authority.reload()
        for uuid in self._channels:
            self._apply_policy(uuid)

    def _apply_policy(self, uuid: str) -> None:
        """The rules, or what is known of the VM, may be others now."""
        channel = self._channels[uuid]
        channel.guard.update(self._authority.policy.limits(self._gates[uuid].facts))
        channel.relay.policy_changed(self.loop.time())
        channel.set_timer()

    # ---------------------------------------------------------------- libvirt

    def _on_hypervisor(self, event: HypervisorEvent) -> None:
        match event:
            case domains.HypervisorLost(reason):
                LOG.warning("libvirt: %s", reason)
            case domains.Rebooted(uuid):
                LOG.info("%s: the guest was reset", uuid)
            case domains.AttachDone(uuid, _, _, problem):
                self._answer_command("attach", uuid, problem)
            case domains.DetachDone(uuid, problem):
                self._answer_command("detach", uuid, problem)
            case domains.Changed(facts):
                self._note_facts(facts)
            case domains.Resync(every):
                every += self._static.facts()
                event = domains.Resync(every)
                for facts in every:
                    self._note_facts(facts)
            case _:
                pass
        ended = self._ended(event)
        self._carry_out(self._domains.receive(event, self.loop.time()))
        for uuid in ended:
            self._leftovers.gone(uuid, self.loop.time())

    def _ended(self, event: HypervisorEvent) -> list[str]:
        """The domains that libvirt has forgotten."""
        match event:
            case domains.Gone(uuid, _):
                return [uuid]
            case domains.Resync(every):
                present = {facts.uuid for facts in every}
                known = [report.facts.uuid for report in self._domains.reports()]
                return [uuid for uuid in known if uuid not in present]
            case _:
                return []

    def _delete_leftovers(self, broker: Broker) -> None:
        self.loop.call_later(LEFTOVERS_S, partial(self._delete_leftovers, broker))
        for uuid, topics in self._leftovers.due(self.loop.time()):
            LOG.info("%s: the domain is no more: deleting its queues", uuid)
            broker.delete_queues(uuid, topics)

    def _note_facts(self, domain: domains.DomainFacts) -> None:
        channel = self._channels.get(domain.uuid)
        if channel is not None:
            channel.paused = domain.state is domains.DomainState.PAUSED
            gate, facts = self._gates[domain.uuid], facts_of(domain)
            if facts != gate.facts:
                gate.facts = facts
                self._apply_policy(domain.uuid)

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case domains.Connect(uuid, path):
                    self._connect(uuid, path)
                case domains.Speak(uuid):
                    self._channels[uuid].speak()
                case domains.Hush(uuid):
                    self._channels[uuid].hush()
                case domains.Release(uuid, why):
                    channel = self._channels.pop(uuid)
                    LOG.info("%s (%s): released: %s", channel.name, uuid, why.value)
                    channel.release(why.value)
                    if why in (domains.Why.MIGRATED, domains.Why.ARRIVAL_FAILED):
                        self._leftovers.moved(uuid)
                    del self._gates[uuid]
                    self._authority.forget(uuid)
                    self._past.update(channel.totals())
                case domains.Attach(uuid):
                    assert self._hypervisor is not None  # nobody else has domains without a channel
                    self._hypervisor.attach(uuid)
                case domains.Warn(uuid, name, problem):
                    LOG.warning("%s (%s): %s", name, uuid, problem)
        self._set_timer()

    def _connect(self, uuid: str, path: str) -> None:
        self._leftovers.here(uuid)
        report = self._domains.report(uuid)
        facts = facts_of(report.facts) if report else Facts(uuid, uuid)
        gate = self._gates[uuid] = self._authority.gate(facts)
        end = self._static.end(uuid)
        gate.is_one_way = end.is_one_way
        channel = self._channels[uuid] = Channel(
            self.loop,
            uuid,
            facts.name,
            self._host,
            _VmBroker(self._broker, uuid) if self._broker is not None else None,
            gate,
            self._context_allow,
            self._http.offers(
                lambda: gate.facts,
                partial(self._local.offer, or_broker=self._broker is not None),
            ),
            LOG.info,
            self._authority.guard(facts),
            lambda reason: self._authority.quarantined(gate.facts, reason),
            end,
        )
        channel.connect(path)

    def _set_timer(self) -> None:
        at_s = self._domains.next_timeout()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if at_s is not None:
            self._timer = self.loop.call_at(at_s, self._timed_out)

    def _timed_out(self) -> None:
        self._timer = None
        self._carry_out(self._domains.handle_timeout(self.loop.time()))

    # ---------------------------------------------------------------- the broker

    def _on_broker(self, event: BrokerEvent) -> None:
        match event:
            case broker_events.Connected():
                self._broker_problem = ""
            case broker_events.Disconnected(reason):
                self._broker_problem = reason
            case broker_events.Published(key, ok, reason, gone):
                vm, _, request_id = key.partition(b" ")
                if not ok and request_id:  # a heartbeat has none, and is not missed
                    LOG.warning("%s: a reply was not published: %s", vm.decode(), reason)
                channel = self._channels.get(vm.decode())
                if channel is not None:
                    now_s = self.loop.time()
                    channel.relay.published(request_id, ok=ok, gone=gone, now_s=now_s)
                    channel.set_timer()
            case _:
                channel = self._channels.get(event.vm)
                if channel is not None:
                    self._on_vm_broker(channel, event)
                    channel.set_timer()

    def _on_vm_broker(self, channel: Channel, event: VmEvent) -> None:
        match event:
            case broker_events.Delivered():
                self._deliver(channel, event)
            case broker_events.Undecodable(_, token, reason):
                LOG.warning("%s (%s): dropped a message: %s", channel.name, channel.vm, reason)
                assert self._broker is not None
                self._broker.reject(token)
            case broker_events.Released(_, reason):
                LOG.info("%s (%s): consumers closed: %s", channel.name, channel.vm, reason)
                channel.relay.released()
            case broker_events.Consuming():
                self._leftovers.served(channel.vm, channel.relay.topics)
                topics = ", ".join(sorted(topic.name for topic in channel.relay.topics))
                LOG.info("%s (%s): consuming %s", channel.name, channel.vm, topics)
            case broker_events.Settled(_, ids):
                channel.relay.settled(ids)
            case broker_events.Sent(_, request_id, ok, unroutable):
                now_s = self.loop.time()
                channel.relay.outbound.sent(
                    request_id, ok=ok, unroutable=unroutable, doubtful=event.in_doubt, now_s=now_s
                )
            case broker_events.Mail(_, token, body):
                problem = channel.relay.outbound.mail(token, body, self.loop.time())
                if problem:
                    LOG.warning("%s (%s): dropped mail: %s", channel.name, channel.vm, problem)

    def _deliver(self, channel: Channel, event: broker_events.Delivered) -> None:
        problem = None
        try:
            channel.relay.delivered(
                event.token,
                event.request,
                event.topic,
                fanout=event.fanout,
                redelivered=event.redelivered,
                now_s=self.loop.time(),
            )
        except LimitExceeded as error:
            problem = str(error)
        if problem is not None:
            LOG.warning("%s (%s): refused: %s", channel.name, channel.vm, problem)

    # ---------------------------------------------------------------- local programs

    def submit(
        self, server: str, request: Request, told: Callable[[Outcome], None]
    ) -> Callable[[], None]:
        """See `local.Guests`."""
        channel = self._channel_of(server)
        channel.relay.submit_local(
            request, lambda outcome: told(_explained(outcome, channel)), self.loop.time()
        )
        channel.set_timer()
        return lambda: channel.relay.cancel_local(request.id)

    def serving(self, topic: Topic) -> list[str]:
        """See `local.Guests`."""
        return [uuid for uuid, each in self._channels.items() if topic in each.relay.topics]

    def _find(self, server: str) -> domains.DomainReport:
        for report in self._domains.reports():
            if server in (report.facts.uuid, report.facts.name):
                return report
        problem = self._domains.hypervisor_problem
        raise NoSuchDomain(f"{server!r}: {problem or 'this host has no such domain'}")

    def _channel_of(self, server: str) -> Channel:
        channel = self._channels.get(server)  # a fanout asks for each of many
        if channel is not None:
            return channel
        report = self._find(server)
        channel = self._channels.get(report.facts.uuid)
        if channel is None:
            state = report.facts.state.name.lower()
            problem = report.problem or f"it is {state} and has no live channel"
            raise Rejected(f"{server}: {problem}; vchan attach {server} gives it one")
        return channel

    def method(self, name: str, args: Mapping[str, Any], answer: Answer) -> None:
        """See `local.Guests`."""
        match name:
            case "list":
                answer(*result(self._list()))
            case "status":
                answer(*result(self._status(**args)))
            case "attach" | "detach":
                self._command(name, answer, **args)
            case "release":
                self._end_quarantine(**args)
                answer(*result(None))
            case _:
                raise KeyError(name)

    def _end_quarantine(self, vm: str) -> None:
        channel = self._channel_of(vm)
        if not channel.end_quarantine():
            raise Rejected(f"{vm} is not in quarantine")

    def _list(self) -> list[dict[str, Any]]:
        rows = []
        for report in self._domains.reports():
            channel = self._channels.get(report.facts.uuid)
            rows.append(
                {
                    "uuid": report.facts.uuid,
                    "name": report.facts.name,
                    "domain": report.facts.state.name.lower(),
                    "channel": channel.state if channel else "none",
                    "topics": sorted(f"{t.exchange}/{t.name}" for t in channel.relay.topics)
                    if channel
                    else [],
                    "problem": report.problem or (channel.problem if channel else "") or None,
                }
            )
        return rows

    def _status(self, vm: str | None = None) -> dict[str, Any]:
        if vm is not None:
            report = self._find(vm)
            channel = self._channels.get(report.facts.uuid)
            return {
                "uuid": report.facts.uuid,
                "name": report.facts.name,
                "domain": report.facts.state.name.lower(),
                **(channel.summary() if channel else {"state": "none"}),
                "problem": report.problem or (channel.problem if channel else "") or None,
            }
        broker = self._broker_problem or "connected"
        libvirt = self._domains.hypervisor_problem or "connected"
        return {
            "version": __version__,
            "host": self._host[0],
            "libvirt": "none configured" if self._hypervisor is None else libvirt,
            "broker": "none configured" if self._broker is None else broker,
            "domains": len(self._domains.reports()),
            "channels": len(self._channels),
            **self._authority.summary(),
            **self._http.counters,
            "totals": dict(self._totals()),
        }

    def _totals(self) -> Counter[str]:
        totals = Counter(self._past)
        for channel in self._channels.values():
            totals.update(channel.totals())
        return totals

    def _command(self, name: str, answer: Answer, vm: str) -> None:
        """Attach or detach; answered when libvirt has done it."""
        uuid = self._find(vm).facts.uuid
        if self._hypervisor is None:
            raise Rejected(f"{vm}: a channel of the configuration's; there is no libvirt here")
        self._attaching.setdefault(uuid, []).append((name, answer))
        if name == "attach":
            self._hypervisor.attach(uuid)
        else:
            self._hypervisor.detach(uuid)

    def _answer_command(self, name: str, uuid: str, problem: str | None) -> None:
        waiting = self._attaching.pop(uuid, [])
        for asked, answer in waiting:
            if asked != name:
                self._attaching.setdefault(uuid, []).append((asked, answer))
            elif problem is None:
                answer(*result(None))
            else:
                answer(*failure(Rejected(problem)))


def _explained(outcome: Outcome, channel: Channel) -> Outcome:
    """What was never sent has not run: with why it was not."""
    if not isinstance(outcome, Overdue) or outcome.was_sent:
        return outcome
    why = ": ".join(filter(None, (channel.state, channel.problem)))
    return HandedBack(outcome.id, NO_AGENT, f"not delivered: VM {channel.name} is {why}")


def _allow_many_files() -> None:
    """Every VM takes a descriptor; what shells and service managers allow by default is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    """The command."""
    _allow_many_files()
    try:
        conf = config.load(sys.argv[1:])
        oslo_log.setup(conf, "vchan")
        daemon = Daemon(conf)
    except ConfigError as error:
        sys.stderr.write(f"vchan-host: {error}\n")
        sys.exit(EXIT_CONFIG)
    except LinkError as error:
        sys.stderr.write(f"vchan-host: {error}\n")
        sys.exit(EXIT_SOCKET)
    daemon.run()


if __name__ == "__main__":
    main()
