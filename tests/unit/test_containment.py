"""Whatever fails in the code of one VM costs that VM its channel, and nobody else notices.

A whole daemon, without libvirt, with two channels and a broker that is made up. Every method of a
channel and of what it consists of is made to fail, for one of the two; then all that a daemon does
with a VM is done with both.

A method of a compiled class cannot be replaced. There the faults come out of the parts that are not
compiled, which every entry into a VM's code reaches; and out of what is handed in.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("oslo_config", reason='oslo.config is not installed: pip install "vchan[host]"')
pytest.importorskip("amqp", reason="py-amqp is not installed")

from tests.rig.attributes import attributes
from tests.rig.stand_in import StandIn
from vchan.errors import VchanError
from vchan.host import config
from vchan.host.broker import events
from vchan.host.broker.broker import Broker
from vchan.host.broker.config import BrokerConfig, BrokerHost
from vchan.host.broker.events import BrokerEvent, Token
from vchan.host.broker.request_publisher import Outbox, Requests
from vchan.host.broker.vm_queues import VmQueues
from vchan.host.daemon import EXIT_OK, Daemon
from vchan.host.faults import FAULT_CHARS_MAX, log_fault
from vchan.host.hypervisor import domains
from vchan.host.hypervisor.domains import DomainEvent, DomainState
from vchan.host.ops.doctor import Level, examine_vm
from vchan.host.oslo_wire.downward_envelope import BrokerRequest
from vchan.host.oslo_wire.mail import Arrival, Note, encode_arrival, encode_note, own_queue
from vchan.host.oslo_wire.upward_envelope import Form, Publication
from vchan.host.threads import EXIT_SOFTWARE, run_and_exit, watched_thread
from vchan.host.vm.channel import Channel
from vchan.host.vm.consumption import Consumption
from vchan.host.vm.downward import Downward
from vchan.host.vm.dropped_casts import DroppedCasts
from vchan.host.vm.finished_requests import FinishedRequests
from vchan.host.vm.gate import VmGate
from vchan.host.vm.handover import Handover
from vchan.host.vm.log_lines import LogLines
from vchan.host.vm.mail_turns import MailTurns
from vchan.host.vm.mailbox import Mailbox
from vchan.host.vm.open_requests import OpenRequests
from vchan.host.vm.presence import Presence
from vchan.host.vm.served_topics import ServedTopics
from vchan.host.vm.upward import Upward
from vchan.host.vm.vm import BREAKS_MAX, HostedVm
from vchan.io.link import Link
from vchan.io.loop import Loop
from vchan.io.steps import Steps
from vchan.io.streams import SocketStream, listen_unix
from vchan.rpc.bodies import encode_invocation
from vchan.rpc.in_flight import Answered, Heartbeat, Outcome
from vchan.rpc.messages import (
    CALL,
    FINAL,
    REFUSED,
    Reply,
    Request,
    Returned,
    Subscribe,
    Topic,
    decode,
    encode,
)
from vchan.rpc.reports import TOPIC as REPORTS
from vchan.session import CONTROL, Config, Event, Received, Role, Session, Silent, State
from vchan.session.contract import ACK_DELAY_S
from vchan.session.handshake import Handshake
from vchan.session.liveness import Liveness
from vchan.session.receiver import Receiver
from vchan.session.sender import Sender

WAIT_S = 20.0
VICTIM, NEIGHBOUR = "victim", "neighbour"
AGENT = Topic("openstack", "agent")
BEFORE = Note(("elsewhere",), taken=(b"y" * 16,))
"""What another host has left in a VM's own queue."""


class Fault(AssertionError):
    """What is planted."""


class Breaking(dict[str, Any]):
    """The context of a request that breaks who looks into it."""

    def broken(self) -> Any:
        raise Fault("in a context")

    keys = items = broken


class FakeBroker:
    """Takes every command, and says nothing by itself."""

    def __init__(self) -> None:
        self.commands: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **_: self.commands.append((name, *args))

    def released(self, vm: str) -> int:
        return self.commands.count(("release", vm))


class Guest:
    """A guest's daemon on the other end of a channel: it answers every call with its body."""

    def __init__(self, loop: Loop, path: Path) -> None:
        self.loop = loop
        self.sessions = 0
        self.answers: list[Reply] = []
        self._server = listen_unix(str(path), 0o600)
        self._server.setblocking(False)
        self._session = Session(Config(Role.GUEST, os.urandom(16), "guest"), os.urandom)
        self._link: Link | None = None
        loop.add_reader(self._server.fileno(), self._accept)

    def _accept(self) -> None:
        accepted = self._server.accept()[0]
        accepted.setblocking(False)
        if self._link is not None:
            self._link.close()
        stream = SocketStream(accepted, "port")
        self._link = Link(self.loop, self._session, stream, self._handle, self._lost)

    def _lost(self, _: str) -> None:
        self._link = None

    def _handle(self, event: Event) -> None:
        if not isinstance(event, Received):
            self.send(Subscribe((AGENT,)), CONTROL)
            return
        message = decode(event.message)
        if isinstance(message, Request) and message.is_call:
            self.send(Reply(message.id, FINAL, b'{"x": 1}'))
        elif isinstance(message, Reply):
            self.answers.append(message)

    def send(self, message: Any, stream: int = 1) -> None:
        if self._link is not None and self._session.state is State.OPEN:
            self._link.send(encode(message), stream)

    def cut(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def close(self) -> None:
        self.cut()
        self.loop.remove_reader(self._server.fileno())
        self._server.close()


class Site:
    """The daemon, its two VMs, and what their guests are."""

    def __init__(self, directory: Path) -> None:
        policy = directory / "policy.d"
        policy.mkdir()
        (policy / "50-a.policy").write_text("call,cast,notify,report any any allow\n")
        channels = [f"{vm}=connect:{directory / vm}" for vm in (VICTIM, NEIGHBOUR)]
        lines = ["[vchan]", "libvirt_uri =", "listen_topics = *", f"policy_dir = {policy}"]
        lines += [f"channels = {','.join(channels)}", f"audit_log = {directory / 'audit'}"]
        file = directory / "vchan.conf"
        file.write_text("\n".join([*lines, f"socket = {directory / 'host.sock'}"]) + "\n")
        self.daemon = Daemon(config.load(["--config-file", str(file)]))
        self.broker = FakeBroker()
        self.daemon._broker = self.broker  # type: ignore[assignment]
        self.loop = self.daemon.loop
        self.guests = {vm: Guest(self.loop, directory / vm) for vm in (VICTIM, NEIGHBOUR)}
        self.daemon._on_hypervisor(domains.Resync(()))
        self._number = 0

    def vm(self, name: str) -> HostedVm:
        return self.daemon._vms[name]

    def until(self, reached: Callable[[], bool]) -> None:
        deadline_s = self.loop.time() + WAIT_S
        while not reached():
            assert self.loop.time() < deadline_s, self.daemon._list()
            self.loop.run_once(0.02)

    def turns(self, count: int = 4) -> None:
        for _ in range(count):
            self.loop.run_once(0.002)

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.daemon._list() if row["name"] == name)

    def is_served(self, name: str) -> bool:
        return bool(self.row(name)["channel"] == "ready" and self.row(name)["topics"])

    def begin_to_deliver(self, name: str) -> None:
        """Until it takes what the broker hands out: first that has back what was handed out."""
        self.until(lambda: self.is_served(name))
        self.daemon._on_broker(events.Released(name, "what an earlier channel held"))

    def answers(self, name: str) -> bool:
        """Whether a local program's call into the VM is answered."""
        told: list[Outcome] = []
        try:
            self.daemon.submit(name, self.request(), told.append)
        except VchanError:
            return False
        self.until(lambda: any(not isinstance(outcome, Heartbeat) for outcome in told))
        assert isinstance(told[-1], Answered), told
        return True

    def request(self, flags: int = CALL, timeout_ms: int = 60_000) -> Request:
        body = encode_invocation("echo", {"x": 1})
        return Request(os.urandom(16), flags, timeout_ms, 0, "openstack", "agent", "", body)

    def broker_request(
        self, name: str, *, is_call: bool = True, context: dict[str, Any] | None = None
    ) -> events.Delivered:
        self._number += 1
        given = {} if context is None else context
        made = BrokerRequest(
            os.urandom(16), "echo", {"x": 1}, None, None, given, "m", "reply_q", 60.0, 60.0
        )
        if not is_call:
            made = made._replace(msg_id=None, reply_q=None)
        token = Token(name, 1, self._number)
        return events.Delivered(name, token, made, AGENT, False, False)

    def do_everything(self, name: str) -> None:
        """All that a daemon does with a VM."""
        daemon, guest = self.daemon, self.guests[name]
        up, cast_up = self.request(), self.request(flags=0)
        report = encode_invocation("phase", {"report": {"phase": "ready"}, "known": False})
        for event in (
            events.Released(name, "what an earlier channel held"),
            events.Consuming(name),
            self.broker_request(name),
            events.Mail(name, Token(name, 1, 999), b"nonsense"),
            events.Mail(name, Token(name, 1, 998), encode_arrival(Arrival("elsewhere"))),
            events.Mail(name, Token(name, 1, 997), encode_note(BEFORE)),
            events.Completed(name, (b"x" * 16,), proven=True),
            events.RepliesRefused(name, "no memory"),
            events.GivenUp(name, b"x" * 16, "returned"),
        ):
            daemon._on_broker(event)
            self.turns(2)
        refused = self.broker_request(name, is_call=False)
        daemon._on_broker(refused)
        guest.send(Returned(refused.request.id, REFUSED, "no"))
        guest.send(up)
        guest.send(cast_up)
        guest.send(Request(os.urandom(16), 0, 0, 0, *REPORTS, "", report))
        self.turns()
        for each in (up, cast_up):
            daemon._on_broker(events.PublishResult(name, each.id, True, False, ""))
        guest.send(Reply(os.urandom(16), 0, b"{}"))
        try:
            daemon.submit(name, self.request(timeout_ms=1), lambda _: None)()
            daemon.submit(name, self.request(flags=0), lambda _: None)
        except VchanError:
            pass  # it is in quarantine
        self.turns()
        vm = self.vm(name)
        vm._enter(lambda channel: channel._handle(Silent(5.0)), None)
        self.turns()
        self.happen(name, DomainEvent.SUSPENDED_MIGRATED)
        self.turns()
        self.happen(name, DomainEvent.RESUMED)
        guest.cut()
        self.turns(10)
        vm._enter(lambda channel: channel._meter(1, 0.0), None)
        vm._enter(lambda channel: channel._note_violation("made up", self.loop.time()), None)
        vm._enter(lambda channel: channel._timed_out(), None)
        vm._enter(lambda channel: channel.downward.handle_timeout(self.loop.time() + 100.0), None)
        vm._enter(lambda channel: channel._presence._is_absent(), None)
        daemon._apply_policy(vm, vm.facts)
        daemon._on_broker(events.Released(name, "made up"))
        self.see(name, DomainState.PAUSED)
        self.see(name, DomainState.RUNNING)
        self.turns()
        daemon._list()
        daemon._status(name)
        daemon._status()
        daemon.serving(AGENT)

    def leave_and_come_back(self, name: str) -> None:
        self.happen(name, DomainEvent.STOPPED)
        self.turns()
        self.see(name, DomainState.RUNNING)
        self.turns(10)

    def happen(self, name: str, event: DomainEvent) -> None:
        self.daemon._on_hypervisor(domains.Happened(name, name, event))

    def see(self, name: str, state: DomainState) -> None:
        facts = next(each for each in self.daemon._static.facts() if each.uuid == name)
        self.daemon._on_hypervisor(domains.Changed(replace(facts, state=state)))

    def close(self) -> None:
        for guest in self.guests.values():
            guest.close()
        self.daemon._broker = None
        self.daemon._close()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    # So that timers come in what is done here: nothing else is done on time.
    monkeypatch.setattr("vchan.host.vm.channel.CHANNEL_ACK_DELAY_S", ACK_DELAY_S)
    site = Site(tmp_path)
    yield site
    site.close()


SESSIONS_PARTS = (Handshake, Liveness, Receiver, Sender)
HOT_PARTS = (Channel, Downward, Consumption, ServedTopics, Upward, Session, *SESSIONS_PARTS, Link)
INNER_PARTS = (OpenRequests, FinishedRequests, DroppedCasts, MailTurns, Presence, LogLines)
OTHER_PARTS = (Mailbox, Handover, Steps, SocketStream)
"""That are never compiled."""
PARTS = (*HOT_PARTS, *INNER_PARTS, *OTHER_PARTS)


def methods() -> list[tuple[type[object], str]]:
    """Every method and property of a VM's parts."""
    found: list[tuple[type[object], str]] = []
    for part in PARTS:
        for name, member in vars(part).items():
            is_code = inspect.isfunction(member) or isinstance(member, property)
            is_ours = (name == "__init__" and part in HOT_PARTS) or not name.startswith("__")
            if is_code and is_ours and (part, name) != (SocketStream, "close"):
                found.append((part, name))  # what does not close would stay open
    return found


def other_parts(channel: Channel | None) -> list[object]:
    """What of a channel is never compiled."""
    if channel is None:
        return []
    upward = channel.downward.upward
    own = [channel.arrival, channel.departure, channel._stream]
    return [*own, upward.mailbox, upward._history]


def inner_parts(channel: Channel | None) -> list[object]:
    """What a channel, and its requests, are made of."""
    if channel is None:
        return []
    own: list[object] = [*attributes(channel).values(), *attributes(channel.downward).values()]
    return [*own, getattr(channel._tell, "__self__", None)]


class Planted:
    """A method that fails for the victim's channel.

    Args:
        is_read: It fails when it is looked up, not when it is called.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        site: Site,
        part: type,
        name: str,
        *,
        is_read: bool = False,
    ) -> None:
        self.reached = 0
        self._site = site
        self._hosted = site.vm(VICTIM)
        self._channel = self._hosted._channel  # the last one: also while it is taken apart
        member = vars(part)[name]
        is_read = is_read or isinstance(member, property)
        inner: Any = member.fget if isinstance(member, property) else member

        def broken(this: Any, *args: Any, **kwargs: Any) -> Any:
            if self._is_victims(this, args, kwargs):
                self.reached += 1
                raise Fault(f"in {name}")
            if is_read and inner is member:
                return partial(inner, this)
            return inner(this, *args, **kwargs)

        patch.setattr(part, name, property(broken) if is_read else broken)

    def _is_victims(self, this: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        self._hosted = self._site.daemon._vms.get(VICTIM, self._hosted)
        part = self._hosted._part
        if isinstance(this, Downward | Consumption | Upward | Channel):
            vm = getattr(this, "vm", getattr(this, "_vm", None))
            made_for = [getattr(each, "uuid", each) for each in (vm, *args[:2])]
            return VICTIM in made_for if vm is None else bool(vm == VICTIM)
        if isinstance(this, Link):
            return getattr(this, "_loop", args[0] if args else None) is part
        channel = self._hosted._channel
        self._channel = channel or self._channel
        if isinstance(this, OTHER_PARTS):
            return any(this is each for each in other_parts(self._channel))
        if isinstance(this, INNER_PARTS):
            return any(this is each for each in inner_parts(self._channel))
        if isinstance(this, ServedTopics):
            gate = args[0] if args and isinstance(args[0], VmGate) else None
            served = getattr(getattr(channel, "downward", None), "_served", None)
            return this is served if gate is None else gate.facts.uuid == VICTIM
        session = getattr(channel, "_session", None)
        if session is not None and this in (session, *attributes(session).values()):
            return True
        config = kwargs.get("config", args[0] if args else None)
        return isinstance(config, Config) and config.role is Role.HOST


NEVER_REACHED = 0.3
"""Of all methods: what takes a broken guest, a full socket or a quarantine."""
_REACHED: dict[str, bool] = {}


@pytest.mark.parametrize(
    ("part", "name"),
    [pytest.param(*each, id=f"{each[0].__name__}.{each[1]}") for each in methods()],
)
def test_a_fault_in_any_method_costs_one_vm_its_channel(
    site: Site, monkeypatch: pytest.MonkeyPatch, part: type, name: str
) -> None:
    site.until(lambda: site.is_served(VICTIM) and site.is_served(NEIGHBOUR))
    neighbours = site.vm(NEIGHBOUR)._channel
    with monkeypatch.context() as patch:
        planted = Planted(patch, site, part, name)
        site.do_everything(VICTIM)
        site.do_everything(NEIGHBOUR)
        if name == "__init__":
            site.vm(VICTIM)._fail("made up")
            site.vm(VICTIM).end_quarantine()
        if planted.reached:
            hosted = site.vm(VICTIM)
            assert hosted._throttle.counters["faults"] >= 1
            assert site.row(VICTIM)["channel"] == "quarantined"
            assert "vchan-host failed on it" in site.row(VICTIM)["problem"]
            assert site.broker.released(VICTIM)
        else:
            site.leave_and_come_back(VICTIM)
            assert bool(planted.reached) == bool(site.daemon._totals()["faults"])
    _REACHED[f"{part.__name__}.{name}"] = bool(planted.reached)
    site.until(lambda: site.is_served(NEIGHBOUR))
    assert site.answers(NEIGHBOUR)
    assert site.vm(NEIGHBOUR)._channel is neighbours  # it never noticed
    assert site.vm(NEIGHBOUR)._throttle.counters["faults"] == 0
    if planted.reached:  # and the victim works again when it may
        site.vm(VICTIM).end_quarantine()
        site.until(lambda: site.is_served(VICTIM))
        assert site.answers(VICTIM)
    assert site.daemon._failure == ""


def test_a_channel_that_cannot_be_taken_apart_gives_up_its_socket(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU lets in one client: the next channel would wait for ever."""
    site.until(lambda: site.is_served(VICTIM))
    channel = site.vm(VICTIM)._channel
    assert channel is not None and channel._stream is not None
    with monkeypatch.context() as patch:
        Planted(patch, site, Steps, "end", is_read=True)  # a step of it, which is not even found
        site.vm(VICTIM)._fail("made up")
    assert channel._stream.fileno() == -1


def test_what_a_vm_counted_here_stays_counted_when_it_leaves(site: Site) -> None:
    """Counters go up only, whatever VMs come and go."""
    site.until(lambda: site.is_served(VICTIM) and site.is_served(NEIGHBOUR))
    site.do_everything(VICTIM)
    before = dict(site.daemon._totals())
    assert before["frames_received"] > 0 and before["losses"] == 0
    site.leave_and_come_back(VICTIM)
    site.leave_and_come_back(NEIGHBOUR)
    after = dict(site.daemon._totals())
    assert {name: value for name, value in before.items() if after.get(name, -1) < value} == {}


def test_most_methods_were_reached() -> None:
    """Without this the test above would pass if it did nothing."""
    if len(_REACHED) < len(methods()):
        pytest.skip("needs all of the tests before it, in this process")
    missed = sorted(name for name, reached in _REACHED.items() if not reached)
    assert len(missed) <= NEVER_REACHED * len(methods()), missed


def test_a_fault_is_logged_once_with_its_traceback_and_counted(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.begin_to_deliver(VICTIM)
    site.daemon._on_broker(site.broker_request(VICTIM, context=Breaking()))
    site.daemon._on_broker(site.broker_request(VICTIM, context=Breaking()))
    tracebacks = [text for text in caplog.messages if "in broken" in text]
    assert len(tracebacks) == 1
    assert "Fault: 'in a context'" in tracebacks[0]
    assert "in delivered" in tracebacks[0]
    assert VICTIM in tracebacks[0]
    status = site.daemon._status(VICTIM)
    assert status["state"] == "quarantined"
    assert status["fault"].startswith("Fault in test_containment.py:")
    assert site.daemon._status()["totals"]["faults"] == 1
    findings = examine_vm(site.row(VICTIM), status)
    assert [each.level for each in findings] == [Level.PROBLEM]
    assert "traceback" in findings[0].remedy and f"vchan release {VICTIM}" in findings[0].remedy


def test_a_message_that_breaks_us_again_and_again_is_put_aside_and_its_vm_goes_on(
    site: Site,
) -> None:
    """Each time before that it costs the VM its channel, whose messages the broker hands out
    again."""
    again = site.broker_request(VICTIM, context=Breaking())
    for count in range(1, BREAKS_MAX):
        site.begin_to_deliver(VICTIM)
        site.daemon._on_broker(again)
        assert site.vm(VICTIM)._throttle.counters["faults"] == count
        assert site.row(VICTIM)["channel"] == "quarantined"
        site.vm(VICTIM).end_quarantine()
    site.begin_to_deliver(VICTIM)
    site.daemon._on_broker(again)
    assert site.vm(VICTIM)._throttle.counters["faults"] == BREAKS_MAX - 1
    (parked,) = [command for command in site.broker.commands if command[0] == "park_message"]
    assert parked[1:4] == (again.token, again.queue, again.body)
    assert parked[4].startswith("Fault in test_containment.py:")
    assert site.is_served(VICTIM) and site.answers(VICTIM)


@pytest.mark.parametrize("part", [(Mailbox, "put"), (Mailbox, "work")])
def test_so_is_one_of_the_vms_own_queue(
    site: Site, monkeypatch: pytest.MonkeyPatch, part: tuple[type, str]
) -> None:
    again = events.Mail(VICTIM, Token(VICTIM, 1, 1), b"nonsense")
    behind = events.Mail(VICTIM, Token(VICTIM, 1, 2), b"\xff nonsense")
    with monkeypatch.context() as patch:
        Planted(patch, site, *part)
        for _ in range(1, BREAKS_MAX):
            site.until(lambda: site.is_served(VICTIM))
            site.daemon._on_broker(again)
            assert site.row(VICTIM)["channel"] == "quarantined"
            site.vm(VICTIM).end_quarantine()
        site.until(lambda: site.is_served(VICTIM))
        site.daemon._on_broker(again)
    (parked,) = [command for command in site.broker.commands if command[0] == "park_message"]
    assert parked[1:4] == (again.token, own_queue(VICTIM), again.body)
    site.daemon._on_broker(behind)
    assert [command for command in site.broker.commands if command[0] == "ack"] == [
        ("ack", behind.token)
    ]
    assert site.vm(VICTIM)._throttle.counters["faults"] == BREAKS_MAX - 1
    assert site.is_served(VICTIM) and site.answers(VICTIM)


def test_mail_that_cannot_be_read_is_counted_and_told(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    site.daemon._on_broker(events.Mail(VICTIM, Token(VICTIM, 1, 1), b"\xff nonsense"))
    assert site.daemon._status(VICTIM)["requests"]["undecodable"] == 1
    assert f"dropped a message of queue {own_queue(VICTIM)}: " in caplog.text
    assert r"it begins with b'\xff nonsense'" in caplog.text


def test_a_fault_is_told_whole_whatever_its_vm_has_used_up_of_the_log(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    line = f"{VICTIM}: " + "x" * 1000
    while site.daemon._log_budget.left_out < 3:
        logging.getLogger("test").warning("%s", line)

    def deep(levels: int) -> None:
        if not levels:
            raise Fault("at the bottom")
        deep(levels - 1)

    site.vm(VICTIM)._enter(lambda _: deep(100), None)
    assert "Fault: 'at the bottom'" in caplog.text
    assert "in quarantine for 30 s" in caplog.text


def test_a_vm_that_fails_again_and_again_is_left_alone_for_longer_each_time(site: Site) -> None:
    hosted = site.vm(VICTIM)
    lengths_s = []
    for _ in range(7):
        hosted._fail("made up")
        until_s = hosted._throttle.breaker.quarantined_until(site.loop.time())
        assert until_s is not None
        lengths_s.append(round(until_s - site.loop.time()))
        hosted._throttle.breaker._until_s = site.loop.time()  # it is over
        hosted._renew()
    assert lengths_s == [30, 60, 120, 240, 480, 600, 600]


def test_the_quarantine_of_a_fault_ends_by_itself(tmp_path: Path) -> None:
    site = Site(tmp_path)
    try:
        (tmp_path / "policy.d" / "50-a.policy").write_text("limit any quarantine_s=1\n")
        site.daemon._reload()
        site.until(lambda: site.is_served(VICTIM))
        site.vm(VICTIM)._fail("made up")
        assert site.row(VICTIM)["channel"] == "quarantined"
        site.until(lambda: site.is_served(VICTIM))
        assert site.daemon._status(VICTIM)["fault"] == "made up"  # it is told, for somebody to read
        assert examine_vm(site.row(VICTIM), site.daemon._status(VICTIM))[0].level is Level.PROBLEM
    finally:
        site.close()


def test_what_a_vm_watched_once_is_not_taken_from_who_has_it_now(site: Site) -> None:
    """Descriptors are numbers that are used again."""
    hosted = site.vm(VICTIM)
    for _ in range(3):
        site.until(lambda: site.is_served(VICTIM))
        site.guests[VICTIM].cut()
        site.until(lambda: site.row(VICTIM)["channel"] != "ready")
    site.until(lambda: site.is_served(VICTIM))
    channel = hosted._channel
    assert channel is not None and channel._link is not None
    assert hosted._part._readers == {channel._link.stream.fileno()}
    assert hosted._part._writers == set()
    hosted._fail("made up")
    assert hosted._part._readers == set()


def test_programs_that_wait_for_a_vm_that_fails_are_told(site: Site) -> None:
    site.until(lambda: site.is_served(VICTIM))
    told: list[Outcome] = []
    site.guests[VICTIM].cut()
    site.daemon.submit(VICTIM, site.request(), told.append)
    site.vm(VICTIM)._fail("made up")
    assert len(told) == 1
    with pytest.raises(VchanError, match="in quarantine for 30 s more"):
        site.daemon.submit(VICTIM, site.request(), told.append)


def test_a_vm_that_goes_in_quarantine_does_not_come_back(site: Site) -> None:
    hosted = site.vm(VICTIM)
    hosted._fail("made up")
    site.happen(VICTIM, DomainEvent.STOPPED)
    assert VICTIM not in site.daemon._vms
    assert hosted._renew_timer is None
    assert site.daemon._totals()["faults"] == 1


def test_a_vm_that_leaves_in_quarantine_is_said_nothing_until_it_stays(site: Site) -> None:
    site.until(lambda: site.is_served(VICTIM))
    site.vm(VICTIM)._fail("made up")
    site.happen(VICTIM, DomainEvent.SUSPENDED_MIGRATED)
    site.vm(VICTIM).end_quarantine()
    site.turns()
    assert site.row(VICTIM)["channel"] == "leaving"
    site.happen(VICTIM, DomainEvent.RESUMED)
    site.until(lambda: site.is_served(VICTIM))


def test_what_an_answer_sets_off_is_the_vms_trouble(site: Site) -> None:
    """An HTTP service or a local program answers: that comes by no loop callback of the VM's."""
    site.until(lambda: site.is_served(VICTIM))
    hosted = site.vm(VICTIM)
    tells: list[Callable[..., None]] = []

    def offer(_: Request, told: Callable[..., None]) -> Callable[[], None]:
        tells.append(told)
        return lambda: None

    def told(outcome: Outcome, now_s: float) -> None:
        raise Fault

    hosted._contain(offer)(site.request(), told)
    outcome = Heartbeat(b"x" * 16)
    tells[0](outcome, 0.0)
    assert site.row(VICTIM)["channel"] == "quarantined"
    tells[0](outcome, 0.0)  # a late one, for a channel that is over
    assert hosted._throttle.counters["faults"] == 1


def test_the_log_is_not_the_guests(caplog: pytest.LogCaptureFixture) -> None:
    try:
        dict[str, int]()["\n2026 ERROR forged" + "x" * 100_000]
    except KeyError as error:
        described = log_fault(logging.getLogger("test"), "here", error)
    assert described.startswith("KeyError in test_containment.py:")
    assert "\n2026" not in caplog.text
    assert len(caplog.messages[0]) < 1000 + FAULT_CHARS_MAX


def test_oslos_log_does_not_put_a_guests_words_behind_the_line(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """It appends the exception that is being handled, with all that it says."""
    from oslo_config import cfg
    from oslo_log import formatters, log

    conf = cfg.ConfigOpts()
    log.register_options(conf)
    conf([], default_config_files=[], default_config_dirs=[])
    caplog.handler.setFormatter(formatters.ContextFormatter(config=conf))
    site.vm(VICTIM)._enter(lambda _: dict[str, int]()["secret" * 100_000], 0)
    assert site.row(VICTIM)["channel"] == "quarantined"
    assert "KeyError" in caplog.text
    assert len(caplog.text) < 4000


# --- outside of a VM


def test_a_thread_that_dies_is_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    runs: list[tuple[Callable[[], Any], str]] = [
        (partial(int, "x"), "ValueError"),
        (lambda: None, "it ended by itself"),
    ]
    for run, text in runs:
        told: list[str] = []
        thread = watched_thread("busy", run, lambda: False, told.append)
        thread.start()
        thread.join(WAIT_S)
        assert told == [f"thread busy: {text}"]
    assert "invalid literal" in caplog.text
    quiet: list[str] = []
    thread = watched_thread("done", lambda: None, lambda: True, quiet.append)
    thread.start()
    thread.join(WAIT_S)
    assert quiet == []


def test_a_daemon_whose_thread_has_died_ends_with_its_own_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    site.daemon._broker = None
    for guest in site.guests.values():
        guest.close()
    site.daemon._vms.clear()
    site.daemon._domains = domains.Domains(domains.Selection())
    threading.Thread(target=partial(site.daemon.thread_died, "thread x: KeyError")).start()
    assert site.daemon.run() == EXIT_SOFTWARE
    assert "vchan-host ends: thread x: KeyError" in caplog.text


def test_the_exit_status_of_what_is_unexpected(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> int:
        raise KeyError("x")

    for run, status in ((fail, EXIT_SOFTWARE), (lambda: EXIT_OK, EXIT_OK)):
        with pytest.raises(SystemExit) as ended:
            run_and_exit("vchan-x", run)
        assert ended.value.code == status
    assert "vchan-x ends: unexpected" in caplog.text
    assert "Traceback" in caplog.text


# --- the broker's thread


@pytest.fixture
def broker() -> Iterator[tuple[Broker, list[BrokerEvent]]]:
    """One that never connects, and is driven by hand."""
    posted: list[BrokerEvent] = []
    broker = Broker(BrokerConfig((BrokerHost("127.0.0.1", 1),)), posted.append)
    yield broker, posted
    broker.loop.close()


class FakeLink:
    """A connection without a broker: it takes what is asked."""

    class FakeChannel:
        def __init__(self, owner: Any) -> None:
            self.owner = owner
            self.closed = 0

        def ask(self, *_: Any, **__: Any) -> None:
            pass

        acknowledge = publish = ask

        def close_softly(self) -> None:
            self.closed += 1

    def __init__(self) -> None:
        self.channels: list[Any] = []

    def channel(self, owner: Any) -> Any:
        self.channels.append(self.FakeChannel(owner))
        return self.channels[-1]

    def fail(self, reason: str) -> None:
        raise AssertionError(reason)


VM_ENTRIES: dict[str, Callable[[Broker], None]] = {
    "want": lambda broker: broker.consume(VICTIM, frozenset({AGENT, Topic("openstack", "b")})),
    "listen": lambda broker: broker.listen_for_answers(VICTIM),
    "release": lambda broker: broker.release(VICTIM),
    "dispose": lambda broker: broker.ack(Token(VICTIM, 1, 1)),
    "holds": lambda broker: broker.complete(VICTIM, b"x" * 16, (Token(VICTIM, 1, 1),)),
    "completed": lambda broker: broker.complete(VICTIM, b"x" * 16, ()),
    "watch": lambda broker: broker._watch(),
    "open": lambda broker: broker._open_next(),
    "on_disconnected": lambda broker: broker._on_lost("made up"),
}


@pytest.mark.parametrize("name", VM_ENTRIES)
def test_a_fault_in_a_vms_broker_channel_is_its_own(
    broker: tuple[Broker, list[BrokerEvent]], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    hub, posted = broker
    link = FakeLink()
    hub.link = link  # type: ignore[assignment]
    for vm in (VICTIM, NEIGHBOUR):
        hub.consume(vm, frozenset({AGENT}))
    hub._carry_out()
    if name != "open":
        hub._open_next()

    def broken(*_: Any, **__: Any) -> Any:
        raise Fault

    real = hub._vms[VICTIM]
    stand_in: Any = StandIn(real, **{name: broken})
    hub._vms[VICTIM] = real.completions._channel = stand_in
    hub._opening = {stand_in if vm is real else vm for vm in hub._opening}
    hub._openings = deque(stand_in if vm is real else vm for vm in hub._openings)
    VM_ENTRIES[name](hub)
    hub._carry_out()
    assert [event.vm for event in posted if isinstance(event, events.Failed)] == [VICTIM]
    released = [event.vm for event in posted if isinstance(event, events.Released)]
    assert released.count(VICTIM) == 1
    assert len([text for text in caplog.messages if "in broken" in text]) == 1
    assert VICTIM not in hub._vms and NEIGHBOUR in hub._vms
    assert all(vm.vm != VICTIM for vm in hub._opening)
    owners = {type(channel.owner).__name__: channel.closed for channel in link.channels}
    assert owners.get("_Discarded", 1) == 1 and owners.get("VmQueues", 0) == 0
    hub.link = link  # type: ignore[assignment]
    hub.consume(VICTIM, frozenset({AGENT}))
    hub._carry_out()
    assert VICTIM in hub._vms


def test_a_fault_in_publishing_for_a_vm_is_its_own(
    broker: tuple[Broker, list[BrokerEvent]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, posted = broker
    hub.link = FakeLink()  # type: ignore[assignment]
    inner = Requests._publish_waiting

    def broken(this: Requests, outbox: Outbox) -> None:
        if outbox.vm == VICTIM:
            raise Fault
        inner(this, outbox)

    monkeypatch.setattr(Requests, "_publish_waiting", broken)
    mail = Publication(Form.MAIL, "", "queue", b"{}", None, mandatory=True)
    for vm in (VICTIM, NEIGHBOUR):
        hub.publish_request(vm, b"x" * 16, mail)
    hub._carry_out()
    sent, released, failed = posted
    assert isinstance(sent, events.PublishResult) and not sent.ok
    assert isinstance(released, events.Released)
    assert isinstance(failed, events.Failed)
    assert {sent.vm, released.vm, failed.vm} == {VICTIM}
    assert list(hub._requests._outboxes) == [NEIGHBOUR]


@pytest.mark.parametrize("name", ["_retry", "_set_up"])
def test_a_fault_in_a_vms_timer_at_the_broker_is_its_own(
    broker: tuple[Broker, list[BrokerEvent]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    hub, posted = broker

    def broken(_: VmQueues) -> None:
        raise Fault

    monkeypatch.setattr(VmQueues, name, broken)
    vm = hub._vms[VICTIM] = VmQueues(hub, VICTIM)
    hub.later(VICTIM, 0.0, getattr(vm, name))
    for _ in range(3):
        hub.loop.run_once(0.01)
    assert [type(event).__name__ for event in posted] == ["Released", "Failed"]


def test_a_broker_thread_that_dies_says_so(caplog: pytest.LogCaptureFixture) -> None:
    posted: list[BrokerEvent] = []
    told = threading.Event()

    def post(event: BrokerEvent) -> None:
        posted.append(event)
        if isinstance(event, events.Died):
            told.set()

    broker = Broker(BrokerConfig((BrokerHost("127.0.0.1", 1),)), post)
    broker.loop.call_soon(partial(int, "x"))
    broker.start()
    assert told.wait(WAIT_S)
    assert isinstance(posted[-1], events.Died)
    assert "ValueError" in posted[-1].reason
    assert "Traceback" in caplog.text
    broker._is_over = True


def test_the_daemon_ends_with_the_brokers_thread_and_contains_its_vms(site: Site) -> None:
    site.daemon._on_broker(events.Failed(VICTIM, "KeyError in broker_vm.py:1"))
    assert site.row(VICTIM)["channel"] == "quarantined"
    assert site.daemon._failure == ""
    site.daemon._on_broker(events.Died("KeyError"))
    assert "the broker's thread: KeyError" in site.daemon._failure


def test_a_vm_that_was_paused_before_the_daemon_started_is_known_to_be(site: Site) -> None:
    """Else its connection would be cured of a silence that is none, every few seconds."""
    running = domains.DomainFacts(
        uuid="paused",
        name="paused",
        state=domains.DomainState.RUNNING,
        channel_path="/nowhere/paused",
        has_controller=True,
        configured=True,
        persistent=True,
    )
    for state, is_paused in ((domains.DomainState.PAUSED, True), (running.state, False)):
        site.daemon._on_hypervisor(domains.Resync((replace(running, state=state),)))
        assert (
            site.vm("paused")._enter(lambda channel: channel._domain.is_paused, None) is is_paused
        )
