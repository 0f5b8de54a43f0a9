"""vchan-host: the daemon on the compute host. It follows libvirt, and passes requests between the
broker and guests.

Threads: this one runs the loop, every link and every VM's requests. One follows libvirt, one talks
to the broker; they hand over events and take commands, and nothing here ever waits for them.
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

from vchan import __version__
from vchan.errors import (
    ConfigError,
    LinkError,
    NoSuchDomain,
    NoSuchMethod,
    Rejected,
)
from vchan.host import config, config_files
from vchan.host.broker import events
from vchan.host.broker.broker import Broker
from vchan.host.broker.config import BrokerConfig
from vchan.host.broker.events import BrokerEvent
from vchan.host.broker.queue_cleanup import Leftovers
from vchan.host.enforcer import Enforcer, facts_of
from vchan.host.hypervisor import domains
from vchan.host.hypervisor.domains import Decision, Domains, HypervisorEvent
from vchan.host.hypervisor.known_sockets import KnownSockets
from vchan.host.hypervisor.libvirt_client import Hypervisor
from vchan.host.local.http_services import HttpProxy
from vchan.host.local.programs import LocalService, SendAnswer, Streams, call_with, failure, result
from vchan.host.policy import log_budget
from vchan.host.policy.rules import Facts
from vchan.host.threads import EXIT_SOFTWARE, run_and_exit, watch_all_threads
from vchan.host.vm.channel import Home
from vchan.host.vm.streams import Program
from vchan.host.vm.vm import HostedVm, VmEvent
from vchan.io.local_socket import LocalServer
from vchan.io.loop import Alarm, Loop
from vchan.io.service_manager import ServiceManager
from vchan.rpc.in_flight import Outcome
from vchan.rpc.messages import Request, Topic

LOG = logging.getLogger("vchan.host")

LEFTOVERS_S: Final = 5.0
"""How often it is looked whether queues are to be deleted."""
EXIT_OK: Final = 0
"""Ended by SIGTERM or SIGINT."""
EXIT_CONFIG: Final = 2
"""A wrong option or file, or a file that is not there: starting again does not help. One line says
which, and what was expected; never a secret."""
EXIT_SOCKET: Final = 3
"""The local socket cannot be made."""


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
        self._home = Home(
            options.host,
            os.urandom(16),
            frozenset(options.context_allow),
            LOG.info,
            options.set_guest_time,
            LOG.debug,
        )
        self._enforcer = Enforcer(self.loop, conf)
        self._log_budget = log_budget.LogBudget()
        log_budget.install(self._log_budget)
        self._vms: dict[str, HostedVm] = {}
        self._failure = ""  # why this daemon ends, if it was not told to
        self._domains = Domains(config.selection(conf))
        self._past: Counter[str] = Counter()  # counters of channels that are over
        self._alarm = Alarm(self.loop, self._timed_out)
        self._broker = self._make_broker(conf)
        self._leftovers = Leftovers(options.delete_queues_after)
        self._broker_problem = "" if self._broker is None else "not connected yet"
        self._broker_blocked = ""
        self._attaching: dict[tuple[str, str], list[SendAnswer]] = {}  # by method, and VM
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
            self._home.instance,
            self._home.name,
            self._local,
            LOG.info,
            config.client_access(conf),
        )
        self._local.drop = self._server.drop

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
            died=self.thread_died,
            sockets=KnownSockets(f"{options.socket}.channels"),
        )

    def _poster(self, handle: Callable[[Any], None]) -> Callable[[Any], None]:
        return lambda event: self.loop.call_soon_threadsafe(partial(handle, event))

    def thread_died(self, problem: str) -> None:
        """A thread has ended that should not have, and is in the log: from any thread."""
        self.loop.call_soon_threadsafe(partial(self._fail, problem))

    def _fail(self, problem: str) -> None:
        if not self._failure:
            LOG.critical("vchan-host ends: %s", problem)
            self._failure = problem
            self.loop.stop()

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; SIGHUP has the policy read and the audit log opened
        anew.

        Returns:
            The exit status: EXIT_OK, or EXIT_SOFTWARE when a thread has died.
        """
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
        return EXIT_SOFTWARE if self._failure else EXIT_OK

    def _close(self) -> None:
        self._manager.stopping()
        self._server.close()
        for hosted in self._vms.values():
            hosted.release("this host's daemon is stopping")
        if self._broker is not None:
            self._broker.stop()
        if self._hypervisor is not None:
            self._hypervisor.stop()
        self._static.close()
        self._http.close()
        self._enforcer.close()
        log_budget.remove(self._log_budget)
        self.loop.close()

    # ---------------------------------------------------------------- the policy

    def _reload(self) -> None:
        self._enforcer.reload()
        for hosted in self._vms.values():
            self._apply_policy(hosted, hosted.facts)

    def _apply_policy(self, hosted: HostedVm, facts: Facts) -> None:
        """The rules, or what is known of the VM, may be others now."""
        hosted.update(facts, self._enforcer.policy.limits(facts))

    # ---------------------------------------------------------------- libvirt

    def _on_hypervisor(self, event: HypervisorEvent) -> None:
        match event:
            case domains.HypervisorLost(reason):
                LOG.warning("libvirt: %s", reason)
            case domains.Happened(uuid, _, domains.DomainEvent.RESUMED) if uuid in self._vms:
                self._vms[uuid].went_on()
            case domains.Rebooted(uuid):
                LOG.info("%s: the guest was reset", uuid)
            case domains.AttachDone(uuid, _, _, problem):
                self._answer_command("attach", uuid, problem)
            case domains.DetachDone(uuid, problem):
                self._answer_command("detach", uuid, problem)
            case domains.Changed(facts):
                self._note_facts(facts)
                self._leftovers.present(facts.uuid)
            case domains.Unreadable():
                self._leftovers.present(event.uuid)
            case domains.Resync(every, unread):
                event = domains.Resync((*every, *self._static.facts()), unread)
                for facts in event.domains:
                    self._note_facts(facts)
                for uuid in event.uuids:
                    self._leftovers.present(uuid)
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
            case domains.Resync():
                known = [domain.uuid for domain in self._domains.all()]
                return [uuid for uuid in known if uuid not in event.uuids]
            case _:
                return []

    def _delete_leftovers(self, broker: Broker) -> None:
        self.loop.call_later(LEFTOVERS_S, partial(self._delete_leftovers, broker))
        for uuid, topics in self._leftovers.due(self.loop.time()):
            LOG.info("%s: the domain is no more: deleting its queues", uuid)
            broker.delete_queues(uuid, topics)

    def _note_facts(self, domain: domains.DomainFacts) -> None:
        hosted, facts = self._vms.get(domain.uuid), facts_of(domain)
        if hosted is not None and facts != hosted.facts:
            self._apply_policy(hosted, facts)

    def _carry_out(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            match decision:
                case domains.Connect(uuid):
                    self._leftovers.here(uuid)
                    self._vms[uuid] = self._host(uuid)
                    self._vms[uuid].carry_out(decision)
                case domains.Speak(uuid) | domains.Hush(uuid):
                    self._vms[uuid].carry_out(decision)
                case domains.Release(uuid, why):
                    hosted = self._vms.pop(uuid)
                    LOG.info("%s (%s): released: %s", hosted.name, uuid, why.value)
                    hosted.carry_out(decision)
                    if why in (domains.Why.MIGRATED, domains.Why.ARRIVAL_FAILED):
                        self._leftovers.moved(uuid)
                    self._enforcer.forget(uuid)
                    self._past.update(hosted.totals())
                case domains.Attach(uuid):
                    assert self._hypervisor is not None  # nobody else has domains without a channel
                    self._hypervisor.attach(uuid)
                case domains.Warn(uuid, name, problem):
                    LOG.warning("%s (%s): %s", name, uuid, problem)
        self._alarm.set(self._domains.next_timeout())

    def _host(self, uuid: str) -> HostedVm:
        """A VM that has come here, or was here when this daemon started."""
        domain = self._domains.domain(uuid)
        facts = facts_of(domain.known)
        gate = self._enforcer.gate(facts)
        self._log_budget.know(uuid)
        offer = partial(self._local.offer, or_broker=self._broker is not None)
        return HostedVm(
            self.loop,
            domain,
            self._home,
            self._broker,
            gate,
            self._enforcer.throttle(facts),
            self._static.end(uuid),
            self._http.offers(lambda: gate.facts, offer),
            self._enforcer.quarantined,
        )

    def _timed_out(self) -> None:
        self._carry_out(self._domains.handle_timeout(self.loop.time()))

    # ---------------------------------------------------------------- the broker

    def _on_broker(self, event: BrokerEvent) -> None:
        match event:
            case events.Connected():
                self._broker_problem = ""
                self._tell_all(event)
            case events.Disconnected(reason):
                self._broker_problem, self._broker_blocked = reason, ""
                self._tell_all(event)
            case events.Blocked(reason):
                self._broker_blocked = reason
            case events.Died(reason):
                self._fail(f"the broker's thread: {reason}")
            case _:
                self._tell(event.vm, event)

    def _tell_all(self, event: events.Connected | events.Disconnected) -> None:
        for hosted in self._vms.values():
            hosted.receive(event)

    def _tell(self, uuid: str, event: VmEvent) -> None:
        hosted = self._vms.get(uuid)
        if hosted is not None:
            hosted.receive(event)
            if isinstance(event, events.Consuming):
                self._leftovers.served(uuid, hosted.topics)

    # ---------------------------------------------------------------- local programs

    def submit(
        self, server: str, request: Request, told: Callable[[Outcome], None]
    ) -> Callable[[], None]:
        """See `local.Guests`."""
        return self._vm_of(server).submit(request, told)

    def serving(self, topic: Topic) -> list[str]:
        """See `local.Guests`."""
        return [uuid for uuid, hosted in self._vms.items() if topic in hosted.topics]

    def open_streams(self, vm: str, target: str, number: int, program: Program) -> Streams:
        """See `local.Guests`."""
        try:
            hosted = self._vm_of(vm)
        except NoSuchDomain as error:
            hosted = self._by_address(vm, target, error)
        return hosted.open_streams(number, program, target)

    def _by_address(self, address: str, target: str, problem: NoSuchDomain) -> HostedVm:
        """The VM that nova has given this address. Tenants' networks may have the same ones: those
        that the policy does not let be connected to are left out, if there are others."""
        known = [each.uuid for each in self._domains.all() if address in each.known.addresses]
        found = [self._vms[uuid] for uuid in known if uuid in self._vms]
        if len(found) > 1:
            found = [each for each in found if self._enforcer.lets_forward(each.facts, target)]
        if len(found) > 1:
            several = ", ".join(f"{each.name} ({each.facts.uuid})" for each in found)
            raise Rejected(f"{address}: several VMs have this address: {several}")
        if not found:
            raise problem
        return found[0]

    def _find(self, server: str) -> domains.Domain:
        for domain in self._domains.all():
            if server in (domain.uuid, domain.known.name):
                return domain
        problem = self._domains.hypervisor_problem
        raise NoSuchDomain(f"{server!r}: {problem or 'this host has no such domain'}")

    def _vm_of(self, server: str) -> HostedVm:
        hosted = self._vms.get(server)  # a fanout asks for each of many
        if hosted is not None:
            return hosted
        domain = self._find(server)
        hosted = self._vms.get(domain.uuid)
        if hosted is None:
            if domain.trouble is not None:  # it says what helps
                raise Rejected(f"{server}: {domain.trouble}")
            state = domain.known.state.name.lower()
            when = "" if state == "running" else ", for its next start"
            text = (
                f"it is {state} and has no live channel; vchan attach {server} gives it one{when}"
            )
            raise Rejected(f"{server}: {text}")
        return hosted

    def method(self, name: str, args: Mapping[str, Any], answer: SendAnswer) -> None:
        """See `local.Guests`."""
        match name:
            case "list":
                answer(*result(call_with(self._list, args)))
            case "status":
                answer(*result(call_with(self._status, args)))
            case "facts":
                answer(*result(call_with(self._facts, args)))
            case "attach" | "detach":
                call_with(partial(self._command, name, answer), args)
            case "release":
                answer(*result(call_with(self._end_quarantine, args)))
            case _:
                raise NoSuchMethod(f"the daemon has no method {name!r}")

    def _end_quarantine(self, vm: str) -> None:
        if not self._vm_of(vm).end_quarantine():
            raise Rejected(f"{vm} is not in quarantine")

    def _list(self) -> list[dict[str, Any]]:
        rows = []
        for domain in self._domains.all():
            hosted = self._vms.get(domain.uuid)
            topics = hosted.topics if hosted else frozenset()
            rows.append(
                {
                    **self._described(domain, hosted),
                    "channel": hosted.state if hosted else "none",
                    "topics": sorted(f"{t.exchange}/{t.name}" for t in topics),
                    "heard_s": _rounded(hosted.heard_s) if hosted else None,
                    "guest": hosted.claims() if hosted else None,
                }
            )
        return rows

    def _facts(self, vm: str) -> dict[str, Any]:
        """What the guest has told of itself: its own claim."""
        return self._vm_of(vm).all_claims()

    def _described(self, domain: domains.Domain, hosted: HostedVm | None) -> dict[str, Any]:
        """What `vchan list` and `vchan status` say of every domain."""
        return {
            "uuid": domain.uuid,
            "name": domain.known.name,
            "domain": domain.known.state.name.lower(),
            **self._known_by(domain.known),
            "problem": self._problem_of(domain, hosted),
        }

    def _known_by(self, facts: domains.DomainFacts) -> dict[str, Any]:
        """What nova's operators know a server by, as nova wrote it when it defined the domain; None
        where nova has written nothing."""
        known = {key: value or None for key, value in facts.metadata.items()}
        return {
            "server": known["name"],
            "project": known["project"],
            "project_name": known["project_name"],
            "user": known["user"],
            "user_name": known["user_name"],
            "flavor": known["flavor"],
            "image": known["image"],
            "host": self._home.name,
            "loses_channel": domains.WILL_LOSE_CHANNEL if facts.will_lose_channel else None,
            "unlabelled": domains.NO_LABELS if self._lacks_labels(facts) else None,
        }

    def _lacks_labels(self, facts: domains.DomainFacts) -> bool:
        """Whether rules ask of it what nova has not written."""
        asks = self._domains.selection.asks_labels or self._enforcer.policy.asks_labels
        return asks and facts.is_novas and facts.labels is None

    def _problem_of(self, domain: domains.Domain, hosted: HostedVm | None) -> str | None:
        """What somebody should look at first."""
        trouble = domain.trouble
        if hosted is not None:
            trouble = trouble or hosted.problem or "; ".join(self._broker_problems(hosted))
        return "; ".join(filter(None, (trouble, domain.known.note))) or None

    def _broker_problems(self, hosted: HostedVm) -> list[str]:
        """What the broker refuses the VM. While there is no connection that is what is wrong, of
        all VMs."""
        blocked = f"the broker takes no messages: {self._broker_blocked}"
        refused = [] if self._broker_problem else hosted.refusals
        return [*([blocked] if self._broker_blocked else []), *refused]

    def _status(self, vm: str | None = None) -> dict[str, Any]:
        if vm is not None:
            domain = self._find(vm)
            hosted = self._vms.get(domain.uuid)
            shown = hosted.summary() if hosted else {"state": "none"}
            refused = self._broker_problems(hosted) if hosted else []
            labels = None if domain.known.labels is None else dict(domain.known.labels)
            described = {**self._described(domain, hosted), "labels": labels}
            return {**shown, "broker_problems": refused, **described}
        broker = self._broker_problem or "connected"
        libvirt = self._domains.hypervisor_problem or "connected"
        return {
            "version": __version__,
            "host": self._home.name,
            "libvirt": "none configured" if self._hypervisor is None else libvirt,
            "broker": "none configured" if self._broker is None else broker,
            "broker_blocked": self._broker_blocked or None,
            "domains": len(self._domains.all()),
            "channels": len(self._vms),
            **self._enforcer.summary(),
            **self._http.counters,
            "log_lines_left_out": self._log_budget.left_out,
            "totals": dict(self._totals()),
        }

    def _totals(self) -> Counter[str]:
        totals = Counter(self._past)
        for hosted in self._vms.values():
            totals.update(hosted.totals())
        return totals

    def _command(self, name: str, answer: SendAnswer, vm: str) -> None:
        """Attach or detach; answered when libvirt has done it."""
        uuid = self._find(vm).uuid
        if self._hypervisor is None:
            raise Rejected(f"{vm}: a channel of the configuration's; there is no libvirt here")
        self._attaching.setdefault((name, uuid), []).append(answer)
        if name == "attach":
            self._hypervisor.attach(uuid)
        else:
            self._hypervisor.detach(uuid)

    def _answer_command(self, name: str, uuid: str, problem: str | None) -> None:
        answered = result(None) if problem is None else failure(Rejected(problem))
        for answer in self._attaching.pop((name, uuid), ()):
            answer(*answered)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def _allow_many_files() -> None:
    """Every VM takes a descriptor; what shells and service managers allow by default is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    """The command."""
    _allow_many_files()
    conf: Any = None
    try:
        conf = config.load(sys.argv[1:])
        config_files.set_up_log(conf, "vchan")
        daemon = Daemon(conf)
    except ConfigError as error:
        sys.stderr.write(f"vchan-host: {config_files.located(error, conf)}\n")
        sys.exit(EXIT_CONFIG)
    except LinkError as error:
        sys.stderr.write(f"vchan-host: {error}\n")
        sys.exit(EXIT_SOCKET)
    watch_all_threads(daemon.thread_died)
    run_and_exit("vchan-host", daemon.run)


if __name__ == "__main__":
    main()
