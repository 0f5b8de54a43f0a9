"""Guests' HTTP requests on the host: the pool's turns, its limits, and its configuration."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from tests.rig.gates import offer_nothing
from vchan.errors import ConfigError
from vchan.host.local.http_services import (
    RUNNING_MAX,
    WAITING_MAX,
    WORKERS,
    HttpProxy,
    Service,
    ServiceFailure,
    parse_services,
)
from vchan.host.policy.rules import Facts
from vchan.io.loop import Loop
from vchan.rpc import httpcall
from vchan.rpc.bodies import encode_invocation
from vchan.rpc.httpcall import HttpAnswer, HttpAsk
from vchan.rpc.in_flight import Answered, HandedBack, Outcome
from vchan.rpc.messages import BUSY, CALL, Request

WAIT_S = 30.0


class Rig:
    """A proxy whose service answers when it is told to."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.started: list[str] = []
        self.gate = threading.Semaphore(0)
        self.stamps: list[Mapping[str, str]] = []
        services = parse_services(["slow=http://127.0.0.1:1"], "the test")
        self.proxy = HttpProxy(self.loop, services, fetch=self._fetch)
        self.outcomes: dict[str, list[Outcome]] = {}

    def _fetch(self, service: Service, ask: HttpAsk, stamps: Mapping[str, str]) -> HttpAnswer:
        self.started.append(stamps["X-Instance-ID"])
        self.stamps.append(stamps)
        assert self.gate.acquire(timeout=WAIT_S)
        if ask.path == "/bug":
            raise ZeroDivisionError
        if ask.path == "/fail":
            raise ServiceFailure("ServiceUnreachable", "as asked")
        return HttpAnswer(200, (), b"")

    def ask(self, vm: str, path: str = "/", **facts: Any) -> Callable[[], None] | None:
        number = sum(map(len, self.outcomes.values())) + len(self.started)
        args = httpcall.ask_args(HttpAsk("slow", "GET", path, (), b""))
        body = encode_invocation(httpcall.METHOD, args)
        request_id = number.to_bytes(16, "big")
        request = Request(request_id, CALL, 1000, 0, *httpcall.TOPIC, "", body)
        outcomes = self.outcomes.setdefault(vm, [])
        offer = self.proxy.offers(lambda: Facts(vm)._replace(**facts), offer_nothing)
        return offer(request, lambda outcome, _: outcomes.append(outcome))

    def run_until(self, reached: Callable[[], bool]) -> None:
        deadline_s = self.loop.time() + WAIT_S
        while not reached():
            assert self.loop.time() < deadline_s
            self.loop.run_once(0.01)

    def answer(self, count: int = 1) -> None:
        self.gate.release(count)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.answer(1000)
    rig.proxy.close()
    for thread in rig.proxy._threads:
        thread.join(WAIT_S)
    rig.loop.close()


def test_a_vm_has_its_share_and_no_more(rig: Rig) -> None:
    for _ in range(RUNNING_MAX + 3):
        rig.ask("greedy")
    rig.ask("modest")
    rig.run_until(lambda: len(rig.started) == RUNNING_MAX + 1)
    assert sorted(rig.started) == ["greedy"] * RUNNING_MAX + ["modest"]
    rig.answer(RUNNING_MAX + 4)
    rig.run_until(lambda: len(rig.outcomes["greedy"]) == RUNNING_MAX + 3)
    rig.run_until(lambda: len(rig.outcomes["modest"]) == 1)


def test_the_pool_is_bounded_and_vms_take_turns(rig: Rig) -> None:
    many = [f"vm{n}" for n in range(WORKERS)]
    for vm in many:
        for _ in range(10):
            rig.ask(vm)
    rig.run_until(lambda: len(rig.started) == WORKERS)
    rig.ask("late")
    rig.answer(10 * WORKERS + 1)
    rig.run_until(lambda: len(rig.started) == 10 * WORKERS + 1)
    # Those who wait go first, each once; it would be the last of all otherwise.
    assert rig.started.index("late") <= 3 * WORKERS
    assert len(rig.proxy._threads) == WORKERS


def test_who_asks_for_too_much_is_told_so(rig: Rig) -> None:
    for _ in range(RUNNING_MAX + WAITING_MAX):
        rig.ask("greedy")
    assert rig.outcomes["greedy"] == []
    rig.ask("greedy")
    rig.run_until(lambda: bool(rig.outcomes["greedy"]))
    (outcome,) = rig.outcomes["greedy"]
    assert isinstance(outcome, HandedBack)
    assert outcome.reason == BUSY
    assert "WAITING_MAX" in outcome.text
    assert rig.proxy.counters["http_busy"] == 1


def test_what_nobody_waits_for_does_not_begin(rig: Rig) -> None:
    cancels = [rig.ask("vm") for _ in range(RUNNING_MAX + 1)]
    rig.run_until(lambda: len(rig.started) == RUNNING_MAX)
    for cancel in cancels:
        assert cancel is not None
        cancel()
    rig.answer(RUNNING_MAX)
    rig.run_until(lambda: not rig.proxy._running)
    assert len(rig.started) == RUNNING_MAX
    assert rig.outcomes["vm"] == []  # nor is anybody told


def test_a_failure_is_told_and_noted_once(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        rig.ask("vm", "/fail")
    rig.answer(2)
    rig.run_until(lambda: len(rig.outcomes["vm"]) == 2)
    for outcome in rig.outcomes["vm"]:
        assert isinstance(outcome, Answered)
        assert outcome.failed
        assert b"ServiceUnreachable" in outcome.body
    assert len([record for record in caplog.records if "slow" in record.message]) == 1
    assert rig.proxy.counters["http_failed"] == 2


def test_a_bug_ends_no_thread_and_keeps_no_turn(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(2 * WORKERS):
        rig.ask("vm", "/bug")
        rig.answer()
        rig.run_until(lambda number=number: len(rig.outcomes["vm"]) == number + 1)  # type: ignore[misc]
    assert all(isinstance(told, Answered) and told.failed for told in rig.outcomes["vm"])
    assert caplog.text.count("Traceback") == 1  # a guest fills no log
    assert rig.proxy._running == {}


def test_a_vm_without_a_project_is_not_given_one(rig: Rig) -> None:
    rig.ask("vm")
    rig.ask("other", project="p")
    rig.answer(2)
    rig.run_until(lambda: len(rig.stamps) == 2)
    with_project = {stamps["X-Instance-ID"]: "X-Project-ID" in stamps for stamps in rig.stamps}
    assert with_project == {"vm": False, "other": True}
    assert all("X-Instance-ID-Signature" not in stamps for stamps in rig.stamps)


def test_other_topics_are_for_others(rig: Rig) -> None:
    request = Request(bytes(16), CALL, 0, 0, "openstack", "http", "", b"{}")
    assert rig.proxy.offers(lambda: Facts("vm"), offer_nothing)(request, lambda *_: None) is None
    taken = rig.proxy.offers(lambda: Facts("vm"), lambda *_: lambda: None)(request, lambda *_: None)
    assert taken is not None
    broken = request.changed(exchange="vchan")
    assert rig.proxy.offers(lambda: Facts("vm"), offer_nothing)(broken, lambda *_: None) is None


def test_services() -> None:
    words = ["a=http://127.0.0.1", "b.c-d=https://[::1]:8443/base/", "e=https://host.example"]
    assert parse_services(words, "x") == {
        "a": Service("a", False, "127.0.0.1", 80, ""),
        "b.c-d": Service("b.c-d", True, "::1", 8443, "/base"),
        "e": Service("e", True, "host.example", 443, ""),
    }


@pytest.mark.parametrize(
    "word",
    [
        "http://host",
        "A=http://host",
        "a=ftp://host",
        "a=http://",
        "a=http://host:port",
        "a=http://host?x=1",
        "a=http://host#x",
        "a=http://user:secret@host",
        "a=http://host/a b",
    ],
)
def test_a_wrong_service_is_named(word: str) -> None:
    with pytest.raises(ConfigError, match="http_services"):
        parse_services([word], "[vchan] http_services")
    with pytest.raises(ConfigError, match="NAME once"):
        parse_services(["a=http://x", "a=http://y"], "[vchan] http_services")
