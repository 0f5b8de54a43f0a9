"""A program that reconnects to the host's daemon and repeats itself, before its old connection is
seen to be dead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest

from vchan.errors import Rejected
from vchan.host.local.programs import LocalService, SendAnswer, Streams
from vchan.host.vm.streams import Program
from vchan.io.access import Credentials
from vchan.io.link import Link
from vchan.io.loop import Loop
from vchan.rpc.in_flight import Answered, Outcome
from vchan.rpc.messages import CALL, REDELIVERED, Cancel, Reply, Request, Topic, decode, encode

ID = bytes(15) + b"\1"
QUESTION = Request(ID, CALL, 10_000, 0, "openstack", "agent", "vm", b"{}")


class Guest:
    """The one VM: it tells whoever asked last."""

    def __init__(self) -> None:
        self.told: Callable[[Outcome], None] | None = None
        self.asked = self.cancelled = 0

    def submit(
        self, server: str, request: Request, told: Callable[[Outcome], None]
    ) -> Callable[[], None]:
        self.asked += 1
        self.told = told
        return self._cancel

    def _cancel(self) -> None:
        self.cancelled += 1

    def serving(self, topic: Topic) -> list[str]:
        return []

    def open_streams(self, vm: str, target: str, number: int, program: Program) -> Streams:
        raise Rejected(f"{vm}: its vchan-guest takes no byte streams: upgrade it")

    def method(self, name: str, args: Mapping[str, Any], answer: SendAnswer) -> None:
        raise KeyError(name)


class Peer:
    """A link to a program: a list of what it is told."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def send(self, message: bytes, stream: int) -> None:
        self.heard.append(decode(message))


@pytest.fixture
def guest() -> Guest:
    return Guest()


@pytest.fixture
def service(guest: Guest) -> LocalService:
    return LocalService(Loop(), guest, lambda _: None)


def connect(service: LocalService, key: int, flags: int = 0) -> Peer:
    peer = Peer()
    service.peer_opened(key, cast(Link, peer), Credentials(1, 0, 0))
    service.peer_message(key, encode(QUESTION.changed(flags=QUESTION.flags | flags)))
    return peer


def test_the_new_connection_hears_the_answer(service: LocalService, guest: Guest) -> None:
    connect(service, 1)
    after = connect(service, 2, REDELIVERED)
    service.peer_closed(1)
    assert guest.cancelled == 0
    assert guest.told is not None
    guest.told(Answered(ID, False, b"42"))
    assert [said.body for said in after.heard if isinstance(said, Reply)] == [b"42"]


def test_what_the_old_connection_takes_back_late_is_not_its_own(
    service: LocalService, guest: Guest
) -> None:
    connect(service, 1)
    connect(service, 2, REDELIVERED)
    service.peer_message(1, encode(Cancel(ID)))
    assert guest.cancelled == 0
    service.peer_message(2, encode(Cancel(ID)))
    assert guest.cancelled == 1


def test_who_goes_away_for_good_waits_no_more(service: LocalService, guest: Guest) -> None:
    connect(service, 1)
    connect(service, 2, REDELIVERED)
    service.peer_closed(2)
    assert guest.cancelled == 1
    service.peer_closed(1)
    assert guest.cancelled == 1
