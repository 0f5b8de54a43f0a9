"""Exchanges that are asked for: a refusal is told to who waits, and logged as theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import pytest

pytest.importorskip("amqp", reason="py-amqp is not installed")

from vchan.host.broker.amqp import Inbound, Owner, spec
from vchan.host.broker.config import BrokerConfig, BrokerHost
from vchan.host.broker.topology import Declared

T = TypeVar("T")


class Hub:
    """The broker, its loop, its connection and the channel on that."""

    def __init__(self) -> None:
        self.config = BrokerConfig((BrokerHost("127.0.0.1", 1),))
        self.loop = self.link = self
        self.owners: list[Owner] = []
        self.failed: list[str] = []

    def time(self) -> float:
        return 0.0

    def channel(self, owner: Owner) -> Any:
        self.owners.append(owner)
        return self

    def ask(self, *_: Any) -> None:
        pass

    send_method = close_softly = collect = ask

    def within(self, vm: str, work: Callable[[], T], otherwise: T) -> T:
        try:
            return work()
        except KeyError:
            self.failed.append(vm)
            return otherwise

    def refuse(self) -> None:
        """What is asked for last."""
        owner = self.owners[-1]
        words = [403, "ACCESS_REFUSED", 40, 10]
        owner.on_method(Inbound(cast("Any", self), spec.Channel.Close, words, None))
        owner.on_method(Inbound(cast("Any", self), spec.Channel.CloseOk, [], None))


class User:
    def __init__(self, vm: str, *, is_broken: bool = False) -> None:
        self.vm = vm
        self.told: list[str] = []
        self._is_broken = is_broken

    def on_declared(self, problem: str) -> None:
        if self._is_broken:
            raise KeyError
        self.told.append(problem)

    def on_mismatch(self) -> None:
        pass


def test_a_refusal_is_told_and_is_in_the_log_as_that_vms(caplog: pytest.LogCaptureFixture) -> None:
    hub, user = Hub(), User("vm0")
    assert not Declared(cast("Any", hub)).has_exchange("e", user, fanout=False, make=False)
    hub.refuse()
    assert user.told == ["403 ACCESS_REFUSED"]
    assert caplog.messages == ["vm0: exchange e: 403 ACCESS_REFUSED"]


def test_who_fails_at_what_it_waited_for_is_alone_in_that() -> None:
    hub, odd, good = Hub(), User("odd", is_broken=True), User("good")
    declared = Declared(cast("Any", hub))
    for user in (odd, good):
        declared.has_exchange("e", user, fanout=False)
    hub.refuse()
    assert hub.failed == ["odd"]
    assert good.told == ["403 ACCESS_REFUSED"]
