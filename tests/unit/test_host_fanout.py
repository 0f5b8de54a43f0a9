"""A fanout of a program on a host: to this host's VMs, and to the programs there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from vchan.errors import LimitExceeded, Rejected
from vchan.host.local.programs import LocalService, SendAnswer, Streams
from vchan.host.vm import streams
from vchan.io.access import Credentials
from vchan.io.loop import Loop
from vchan.rpc.bodies import encode_invocation
from vchan.rpc.in_flight import HandedBack, Outcome, Overdue, Taken
from vchan.rpc.messages import (
    AGENT_GONE,
    BUSY,
    CALL,
    EXPIRED,
    FANOUT,
    NO_AGENT,
    REDELIVERED,
    REFUSED,
    Receipt,
    Request,
    Returned,
    Subscribe,
    Topic,
    decode,
    encode,
)

TOPIC = Topic("e", "t")
WHO = Credentials(1, 0, 0, frozenset())


class Vms:
    """This host's VMs: what each was given, and the say of the test in their place."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self.given: dict[str, list[Request]] = {name: [] for name in names}
        self.told: dict[str, Callable[[Outcome], None]] = {}
        self.cancelled: list[str] = []
        self.refuse: dict[str, Exception] = {}

    def submit(
        self, server: str, request: Request, told: Callable[[Outcome], None]
    ) -> Callable[[], None]:
        if server in self.refuse:
            raise self.refuse[server]
        self.given[server].append(request)
        self.told[server] = told
        return lambda: self.cancelled.append(server)

    def serving(self, topic: Topic) -> list[str]:
        return self.names if topic == TOPIC else []

    def open_streams(self, vm: str, target: str, number: int, program: streams.Program) -> Streams:
        raise Rejected(f"{vm}: its vchan-guest takes no byte streams: upgrade it")

    def method(self, name: str, args: Mapping[str, Any], answer: SendAnswer) -> None:
        raise KeyError(name)

    def take(self, name: str) -> None:
        self.told[name](Taken(self.given[name][-1].id))


class Program:
    """A program at the socket."""

    def __init__(self, host: LocalService, key: int) -> None:
        self.host = host
        self.key = key
        self.heard: list[Any] = []
        self.session = SimpleNamespace(peer=None)
        link: Any = self
        host.peer_opened(key, link, WHO)

    def send(self, data: bytes, stream: int) -> None:
        """What the daemon has to say to it."""
        self.heard.append(decode(data))

    def say(self, message: Any) -> None:
        self.host.peer_message(self.key, encode(message))

    def fan_out(self, number: int = 1, server: str = "", flags: int = FANOUT) -> bytes:
        body = encode_invocation("note", {})
        request = Request(number.to_bytes(16), flags, 0, 0, *TOPIC, server, body)
        self.say(request)
        return request.id

    @property
    def receipts(self) -> list[bytes]:
        return [message.id for message in self.heard if isinstance(message, Receipt)]

    @property
    def refusals(self) -> list[tuple[int, str]]:
        return [(each.reason, each.text) for each in self.heard if isinstance(each, Returned)]

    @property
    def requests(self) -> list[Request]:
        return [message for message in self.heard if isinstance(message, Request)]


class Host:
    def __init__(self, *names: str) -> None:
        self.loop = Loop()
        self.vms = Vms(*names)
        self.warned: list[str] = []
        self.local = LocalService(self.loop, self.vms, lambda _: None, warn=self.warned.append)
        self.local._servers._grace_until_s = None  # nobody is about to come back

    def program(self) -> Program:
        return Program(self.local, int.from_bytes(os.urandom(4)))

    @property
    def open(self) -> int:
        return len(self.local._fanouts)


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host("a", "b")
    yield host
    assert host.open == 0
    host.loop.close()


def test_a_fanout_is_for_every_vm_and_every_program_that_serves_it(host: Host) -> None:
    server, caller = host.program(), host.program()
    server.say(Subscribe((TOPIC,)))
    wanted = caller.fan_out()
    assert [len(given) for given in host.vms.given.values()] == [1, 1]
    assert all(given[0].flags & FANOUT for given in host.vms.given.values())
    assert [request.id for request in server.requests] == [wanted]
    for name in ("a", "b"):
        host.vms.take(name)
    server.say(Receipt(wanted))
    assert caller.receipts == [wanted]
    assert (caller.refusals, host.warned) == ([], [])


def test_one_vm_that_is_stuck_holds_up_nobody(host: Host) -> None:
    """The cast is over for its sender; the VM has it until its time is over, and that is told."""
    caller = host.program()
    wanted = caller.fan_out()
    assert caller.receipts == []
    host.vms.take("a")
    assert caller.receipts == [wanted]
    host.vms.told["b"](Overdue(wanted))
    assert host.warned == ["b missed a fanout to topic t: not taken in time"]
    assert (caller.receipts, caller.refusals) == ([wanted], [])


def test_a_vm_that_cannot_have_it_does_not_keep_it_from_the_others(host: Host) -> None:
    host.vms.refuse["a"] = LimitExceeded("open local requests", 257, 256, "LOCAL_REQUESTS_MAX")
    caller = host.program()
    wanted = caller.fan_out()
    host.vms.take("b")
    assert caller.receipts == [wanted]
    assert len(host.warned) == 1
    assert "LOCAL_REQUESTS_MAX" in host.warned[0]


def test_who_sent_it_hears_it_if_nobody_took_it(host: Host) -> None:
    host.vms.refuse["a"] = Rejected("a: it is shut off")
    caller = host.program()
    wanted = caller.fan_out()
    assert caller.refusals == []
    host.vms.told["b"](HandedBack(wanted, NO_AGENT, "no agent serves topic t"))
    assert caller.refusals == [(NO_AGENT, "no agent serves topic t")]
    assert caller.receipts == []
    host.vms.refuse["b"] = LimitExceeded("x", 2, 1, "X")
    caller.fan_out(2)
    assert [reason for reason, _ in caller.refusals] == [NO_AGENT, BUSY]


@pytest.mark.parametrize("is_first", [True, False])
def test_who_sent_it_hears_that_one_may_have_run_it(host: Host, is_first: bool) -> None:
    """Though another was not even given it."""
    caller = host.program()
    wanted = caller.fan_out()
    not_run = HandedBack(wanted, NO_AGENT, "not delivered: VM b is waiting")
    outcomes: list[tuple[str, Outcome]] = [("a", Overdue(wanted)), ("b", not_run)]
    for name, outcome in outcomes if is_first else reversed(outcomes):
        host.vms.told[name](outcome)
    assert caller.refusals == [(EXPIRED, "no answer in time")]


def test_a_fanout_to_nobody_is_refused_at_once(host: Host) -> None:
    host.vms.names.clear()
    caller = host.program()
    caller.fan_out()
    assert caller.refusals == [
        (NO_AGENT, "no program on this host serves topic e/t, and no VM does")
    ]


def test_it_goes_on_without_who_sent_it_and_is_not_sent_again(host: Host) -> None:
    """A program that lost its connection repeats itself on the next one."""
    caller = host.program()
    wanted = caller.fan_out()
    host.local.peer_closed(caller.key)
    assert host.vms.cancelled == []
    again = host.program()
    again.fan_out()
    assert [len(given) for given in host.vms.given.values()] == [1, 1]
    host.vms.take("a")
    assert (caller.receipts, again.receipts) == ([], [wanted])
    late = host.program()
    late.fan_out()  # one VM has it still
    assert late.receipts == [wanted]
    host.vms.take("b")


def test_a_request_for_one_is_never_given_to_a_vm_by_chance(host: Host) -> None:
    caller = host.program()
    for number, flags in enumerate((0, CALL), 1):
        caller.fan_out(number, flags=flags)
    assert [reason for reason, _ in caller.refusals] == [NO_AGENT, NO_AGENT]
    assert all("name one of them as its server" in text for _, text in caller.refusals)
    assert not any(host.vms.given.values())


@pytest.mark.parametrize("flags", [CALL, FANOUT])
def test_what_is_sent_again_may_have_run_before_whatever_becomes_of_it_here(
    host: Host, flags: int
) -> None:
    """A daemon before this one may have passed it on."""
    caller = host.program()
    host.vms.refuse["b"] = Rejected("b: it is shut off")
    caller.fan_out(1, server="b", flags=flags | REDELIVERED)
    caller.fan_out(2, server="a", flags=flags | REDELIVERED)
    host.vms.told["a"](HandedBack((2).to_bytes(16), NO_AGENT, "not delivered"))
    caller.fan_out(3, server="a", flags=flags | REDELIVERED)
    host.vms.told["a"](Overdue((3).to_bytes(16), was_sent=False))
    caller.fan_out(4, server="b", flags=flags)
    assert caller.refusals == [
        (AGENT_GONE, "b: it is shut off; it may have run before"),
        (AGENT_GONE, "not delivered; it may have run before"),
        (AGENT_GONE, "not delivered in time; it may have run before"),
        (REFUSED, "b: it is shut off"),
    ]


def test_a_fanout_to_one_vm_is_for_its_agents_alone(host: Host) -> None:
    caller = host.program()
    wanted = caller.fan_out(server="b")
    host.vms.take("b")
    assert (caller.receipts, host.vms.given["a"]) == ([wanted], [])
