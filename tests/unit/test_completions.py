"""What is over of a VM's requests, on the broker's thread: at a broker that answers as it likes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import pytest

from tests.rig.gates import OpenGate, offer_nothing
from tests.rig.mail import take_mail
from vchan.host.broker import completions
from vchan.host.broker.amqp import Content, Inbound, spec
from vchan.host.broker.amqp_content import Properties
from vchan.host.broker.broker import Broker
from vchan.host.broker.completions import LOT_MAX, REPLY_KEPT_S, RETRY_S, SETTLE_S
from vchan.host.broker.config import BrokerConfig, BrokerHost
from vchan.host.broker.events import (
    BrokerEvent,
    Completed,
    Consuming,
    Delivered,
    GivenUp,
    Mail,
    PublishResult,
    Released,
    RepliesRefused,
    Token,
    Troubled,
)
from vchan.host.broker.topology import QueueFacts
from vchan.host.oslo_wire.downward_envelope import ReplyPublication
from vchan.host.oslo_wire.envelope import REQUEST_BYTES_MAX
from vchan.host.oslo_wire.mail import own_queue
from vchan.host.vm.downward import Downward
from vchan.io.loop import Timer
from vchan.rpc.messages import (
    CALL,
    FINAL,
    NO_AGENT,
    Receipt,
    Reply,
    Request,
    Returned,
    Settled,
    Subscribe,
    Topic,
    decode,
    encode,
)

VM = "b1b1f4b2-0000-4000-8000-000000000001"
A, B = Topic("nova", "a"), Topic("nova", "b")
QUEUE = f"a.{VM}"
E = TypeVar("E", bound=BrokerEvent)
REPLY = ReplyPublication("reply_x", b"{}")
REFUSAL = ReplyPublication("reply_x", b"refused", has_not_run=True)
_NAMES = {
    spec.Basic.Ack: "ack",
    spec.Basic.Qos: "prove",
    spec.Basic.Publish: "publish",
    spec.Channel.Close: "close",
}


class FakeLoop:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._timers: list[Timer] = []
        self._soon: list[Callable[[], object]] = []

    def time(self) -> float:
        return self.now_s

    def call_soon(self, callback: Callable[[], object]) -> None:
        self._soon.append(callback)

    call_soon_threadsafe = call_soon

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        timer = Timer(self.now_s + delay_s, callback, self)
        self._timers.append(timer)
        return timer

    def timer_cancelled(self) -> None:
        self._timers = [timer for timer in self._timers if timer._callback is not None]

    def turn(self) -> None:
        while self._soon:
            self._soon.pop(0)()

    def wait(self, for_s: float) -> None:
        until_s = self.now_s + for_s
        while due := [timer for timer in self._timers if timer.at_s <= until_s]:
            timer = min(due, key=lambda timer: timer.at_s)
            self._timers.remove(timer)
            self.now_s = max(self.now_s, timer.at_s)
            timer._run()
            self.turn()
        self.now_s = until_s

    def close(self) -> None:
        pass


class FakeChannel:
    """What the broker was asked on a channel, in a log that all channels share."""

    def __init__(self, site: Site, owner: Any) -> None:
        self.site = site
        self.owner = owner
        self.tag = 0
        self.published = 0

    def ask(self, method: tuple[int, int], _: str, *args: Any) -> None:
        name = _NAMES.get(method)
        if name is not None:
            self.site.asked.append((name,))

    def acknowledge(self, tag: int) -> None:
        self.site.asked.append((_NAMES[spec.Basic.Ack], tag))

    def publish(self, _address: Any, _properties: bytes, body: bytes, *, mandatory: bool) -> None:
        assert mandatory
        self.published += 1
        self.site.asked.append((_NAMES[spec.Basic.Publish], body))

    def close_softly(self) -> None:
        self.ask(spec.Channel.Close, "")

    def say(self, method: tuple[int, int], *args: Any, content: Any = None) -> None:
        """From the broker."""
        self.owner.on_method(Inbound(cast("Any", self), method, list(args), content))
        self.site.turn()

    def collect(self) -> None:
        pass

    closed_by_broker = collect


class Site:
    """A broker's thread without its thread, its connection, and a broker that a test plays."""

    def __init__(self) -> None:
        self.posted: list[BrokerEvent] = []
        self.crossings = 0
        self.asked: list[tuple[Any, ...]] = []
        self.channels: list[FakeChannel] = []
        self.broker = Broker(BrokerConfig(hosts=(BrokerHost("localhost"),)), self._post)
        self.broker.loop.close()
        self.loop = FakeLoop()
        broker: Any = self.broker
        broker.loop, broker.link = self.loop, self
        broker.declared.has_exchange = lambda *_, **__: True
        broker.declared.look_at = lambda *_: QueueFacts(0, consumers=1)
        submit = broker._submit

        def counted(*args: Any, **named: Any) -> bool:
            self.crossings += 1
            return bool(submit(*args, **named))

        broker._submit = counted
        broker._replies.open()
        self.replies = self.channels[0]

    def _post(self, event: BrokerEvent) -> None:
        self.crossings += 1
        self.posted.append(event)

    def channel(self, owner: Any) -> FakeChannel:
        self.channels.append(FakeChannel(self, owner))
        return self.channels[-1]

    def turn(self) -> None:
        self.loop.turn()

    def take(self, kind: type[E]) -> list[E]:
        taken: list[E] = [event for event in self.posted if isinstance(event, kind)]
        self.posted = [event for event in self.posted if not isinstance(event, kind)]
        return taken

    def asks(self) -> list[tuple[Any, ...]]:
        """Since the last time, on any channel."""
        asked, self.asked = self.asked, []
        return asked

    @property
    def vm(self) -> FakeChannel:
        """The VM's channel."""
        return self.channels[-1]

    def consume(self, *topics: Topic) -> None:
        self.broker.consume(VM, frozenset(topics))
        self.turn()
        self.answer_set_up()

    def answer_set_up(self) -> None:
        """All that the VM's channel asks when it is new."""
        owner = self.vm.owner
        while owner._steps:
            self.vm.say(owner._steps[0].answer, *("", 0, 0))
        for queue in sorted(owner._unconfirmed):
            self.vm.say(spec.Basic.ConsumeOk, queue)
        self.asks()

    def deliver(self, body: bytes = b"", queue: str = QUEUE) -> Token | None:
        """A message for the VM; its token, if it was posted."""
        self.vm.tag += 1
        body = body or oslo({"method": "m", "args": {}, "_unique_id": f"{self.vm.tag:032x}"})
        content = Content(Properties(), body, len(body))
        self.vm.say(spec.Basic.Deliver, queue, self.vm.tag, False, "nova", "", content=content)
        tokens = [event.token for event in self.posted if isinstance(event, Delivered | Mail)]
        return tokens[-1] if tokens and tokens[-1].tag == self.vm.tag else None

    def held(self) -> Token:
        token = self.deliver()
        assert token is not None
        return token

    def complete(
        self, request_id: bytes, *tokens: Token, reply: ReplyPublication | None = None
    ) -> None:
        self.broker.complete(VM, request_id, tokens, reply)
        self.turn()

    def confirm(self, *, ok: bool = True, gone: bool = False) -> None:
        """All that was published."""
        if gone:
            properties = Properties(message_id=str(self.replies.published))
            content = Content(properties, b"", 0)
            self.replies.say(spec.Basic.Return, 312, "", "", "", content=content)
        method = spec.Basic.Ack if ok else spec.Basic.Nack
        self.replies.say(method, self.replies.published, True)

    def prove(self) -> None:
        self.vm.say(spec.Basic.QosOk)

    def lose_channel(self) -> None:
        self.vm.say(spec.Channel.Close, 406, "PRECONDITION_FAILED", 0, 0)


def oslo(message: dict[str, Any]) -> bytes:
    return json.dumps({"oslo.version": "2.0", "oslo.message": json.dumps(message)}).encode()


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    site.consume(A)
    yield site
    site.broker.stop()


# -------------------------------------------------------------------- without a reply


def test_what_has_no_reply_is_acknowledged_at_once_and_proved_in_a_lot(site: Site) -> None:
    first, second = site.held(), site.held()
    site.complete(b"1", first)
    site.loop.wait(SETTLE_S / 2)
    site.complete(b"2", second)
    assert site.asks() == [("ack", 1), ("ack", 2)]
    site.loop.wait(SETTLE_S / 2)
    assert site.asks() == [("prove",)]
    assert site.take(Completed) == []
    third = site.held()
    site.complete(b"3", third)
    site.prove()
    assert site.take(Completed) == [Completed(VM, (b"1", b"2"), proven=True)]
    site.loop.wait(SETTLE_S)
    site.prove()
    assert site.take(Completed) == [Completed(VM, (b"3",), proven=True)]


def test_lots_are_proved_in_their_order(site: Site) -> None:
    for request_id in (b"1", b"2"):
        site.complete(request_id, site.held())
        site.loop.wait(SETTLE_S)
    site.prove()
    assert site.take(Completed) == [Completed(VM, (b"1",), proven=True)]


def test_every_copy_is_acknowledged(site: Site) -> None:
    site.complete(b"1", site.held(), site.held())
    assert site.asks() == [("ack", 1), ("ack", 2)]


def test_a_large_lot_is_proved_at_once(site: Site) -> None:
    for number in range(LOT_MAX):
        site.complete(b"%d" % number, site.held())
    assert site.asks()[-1] == ("prove",)
    site.prove()
    (completed,) = site.take(Completed)
    assert len(completed.ids) == LOT_MAX
    large = REPLY._replace(body=bytes(completions.LOT_BYTES_MAX))
    site.complete(b"large", site.held(), reply=large)
    site.confirm()
    assert [name for name, *_ in site.asks()] == ["publish", "ack", "prove"]


def test_the_channel_ends_before_the_proof(site: Site) -> None:
    asked, waiting = site.held(), site.held()
    site.complete(b"asked", asked)
    site.loop.wait(SETTLE_S)
    site.complete(b"waiting", waiting)
    site.lose_channel()
    (completed,) = site.take(Completed)
    assert completed == Completed(VM, (b"asked", b"waiting"), proven=False)
    site.loop.wait(SETTLE_S)
    site.answer_set_up()  # the next channel has nothing to prove
    assert site.take(Completed) == []


def test_the_tokens_of_a_channel_that_is_gone(site: Site) -> None:
    token = site.held()
    site.lose_channel()
    site.asks()
    site.complete(b"1", token)
    assert site.take(Completed) == [Completed(VM, (b"1",), proven=False)]
    site.complete(b"2", token, reply=REFUSAL)
    assert site.take(Completed) == [Completed(VM, (b"2",), proven=False)]
    assert site.asks() == []
    site.complete(b"3", token, reply=REPLY)  # not all queues are durable: its caller waits
    site.confirm()
    assert site.take(Completed) == [Completed(VM, (b"3",), proven=False)]
    assert site.asks() == [("publish", b"{}")]


# -------------------------------------------------------------------- with a reply


def test_a_call_is_acknowledged_when_its_reply_is_confirmed(site: Site) -> None:
    site.complete(b"1", site.held(), reply=REPLY)
    site.loop.wait(SETTLE_S)
    assert site.asks() == [("publish", b"{}")]
    site.confirm()
    assert site.asks() == [("ack", 1)]
    assert site.take(Completed) == []
    site.loop.wait(SETTLE_S)
    assert site.asks() == [("prove",)]
    site.prove()
    assert site.take(Completed) == [Completed(VM, (b"1",), proven=True)]
    assert not site.broker._vms[VM].completions


def test_a_copy_that_comes_meanwhile_is_acknowledged_with_the_first(site: Site) -> None:
    site.complete(b"1", site.held(), reply=REPLY)
    site.complete(b"1", site.held())
    assert site.asks() == [("publish", b"{}")]
    site.confirm()
    assert site.asks() == [("ack", 1), ("ack", 2)]


def test_a_reply_that_the_broker_refuses_is_published_again(site: Site) -> None:
    site.complete(b"1", site.held(), reply=REPLY)
    site.confirm(ok=False)
    assert site.take(RepliesRefused) == [RepliesRefused(VM, "refused by the broker")]
    site.complete(b"2", site.held(), reply=REPLY._replace(body=b"other"))
    site.asks()
    site.loop.wait(RETRY_S)
    assert site.asks() == [("publish", b"{}")]  # the other is under way
    site.confirm()
    assert site.asks() == [("ack", 2), ("ack", 1)]  # as they were confirmed
    assert site.take(RepliesRefused) == [RepliesRefused(VM, "")]
    site.loop.wait(REPLY_KEPT_S)
    assert [name for name, *_ in site.asks()] == ["prove"]


def test_a_reply_is_published_though_the_channel_ends(site: Site) -> None:
    site.complete(b"1", site.held(), reply=REPLY)
    site.lose_channel()
    assert site.take(Completed) == []
    site.confirm(ok=False)
    site.loop.wait(RETRY_S)
    assert [name for name, *_ in site.asks() if name != "prove"] == ["publish", "publish"]
    site.confirm()
    assert site.take(Completed) == [Completed(VM, (b"1",), proven=False)]


@pytest.mark.parametrize("is_asked_for", [True, False])
def test_a_reply_that_nobody_takes_is_given_up_in_the_end(site: Site, is_asked_for: bool) -> None:
    """Its caller's queue is gone; or the broker refuses it, and does not ask for it any more."""
    tokens = [site.held()] if is_asked_for else []
    site.complete(b"1", *tokens, reply=REPLY)
    tries = 0
    while not site.take(GivenUp):
        tries += 1
        assert tries < 2 * REPLY_KEPT_S / RETRY_S
        site.confirm(ok=is_asked_for, gone=is_asked_for)
        site.loop.wait(RETRY_S)
    assert tries == REPLY_KEPT_S / RETRY_S + 1
    assert (("ack", 1) in site.asks()) == is_asked_for
    if not is_asked_for:
        assert site.take(Completed) == [Completed(VM, (b"1",), proven=False)]


def test_a_reply_to_a_request_that_the_broker_keeps_is_never_given_up(site: Site) -> None:
    site.complete(b"1", site.held(), reply=REPLY)
    for _ in range(int(2 * REPLY_KEPT_S / RETRY_S)):
        site.confirm(ok=False)
        site.loop.wait(RETRY_S)
    assert site.take(GivenUp) == []
    site.confirm()
    assert site.asks()[-1] == ("ack", 1)


def test_a_reply_that_would_close_the_channel_is_our_fault() -> None:
    site = Site()
    site.consume(A)
    site.complete(b"1", site.held(), reply=ReplyPublication("q", bytes(REQUEST_BYTES_MAX + 1)))
    assert VM not in site.broker._vms
    site.broker.stop()


# -------------------------------------------------------------------- that it has not run


def test_a_caller_hears_that_its_call_has_not_run_when_the_broker_has_forgotten_it(
    site: Site,
) -> None:
    site.complete(b"1", site.held(), reply=REFUSAL)
    assert site.asks() == [("ack", 1), ("prove",)]
    site.prove()
    assert site.asks() == [("publish", b"refused")]
    assert site.take(Completed) == []
    site.confirm(ok=False)
    site.loop.wait(RETRY_S)
    assert site.asks() == [("publish", b"refused")]
    site.confirm()
    assert site.take(Completed) == [Completed(VM, (b"1",), proven=True)]
    assert site.asks() == []


def test_without_proof_nobody_is_told_that_a_call_has_not_run(site: Site) -> None:
    site.complete(b"1", site.held(), reply=REFUSAL)
    site.lose_channel()
    events = [event for event in site.posted if isinstance(event, Completed | Released)]
    assert events[0] == Completed(VM, (b"1",), proven=False)
    assert isinstance(events[1], Released)
    site.loop.wait(2 * REPLY_KEPT_S)
    assert not [asked for asked in site.asks() if asked[0] == "publish"]


def test_every_copy_of_a_refused_call_is_forgotten_before_its_caller_is_told(site: Site) -> None:
    site.complete(b"1", site.held(), reply=REFUSAL)
    site.complete(b"1", site.held())  # published twice
    assert site.asks() == [("ack", 1), ("prove",)]
    site.prove()
    assert site.asks() == [("ack", 2), ("prove",)]
    site.prove()
    assert site.asks() == [("publish", b"refused")]
    site.complete(b"1", site.held())  # and once more, when it is told
    site.confirm()
    site.loop.wait(SETTLE_S)
    assert site.asks() == [("ack", 3), ("prove",)]


def test_what_was_acknowledged_before_a_refusal_is_proved_with_it(site: Site) -> None:
    site.complete(b"cast", site.held())
    site.complete(b"call", site.held(), reply=REFUSAL)
    site.prove()
    assert site.take(Completed) == [Completed(VM, (b"cast",), proven=True)]
    site.asks()
    site.loop.wait(SETTLE_S)
    assert site.asks() == []


def test_topics_are_not_taken_away_before_what_was_returned_is_forgotten(site: Site) -> None:
    """For the channel's end is the end of the proofs, too."""
    first, second = site.held(), site.held()
    site.complete(b"1", first, reply=REFUSAL)
    site.broker.consume(VM, frozenset({B}))
    site.turn()
    assert ("close",) not in site.asks()
    assert site.deliver() is None  # it goes back when the channel is closed
    site.complete(b"2", second, reply=REFUSAL)
    site.prove()
    assert ("close",) not in site.asks()
    site.prove()
    assert site.asks() == [("publish", b"refused"), ("close",)]
    site.vm.say(spec.Channel.CloseOk)
    assert len(site.take(Released)) == 1
    site.answer_set_up()
    assert site.take(Consuming)[-1] == Consuming(VM, frozenset({B}))


def test_a_release_waits_for_nothing(site: Site) -> None:
    site.complete(b"1", site.held(), reply=REFUSAL)
    site.broker.release(VM)
    site.turn()
    assert site.asks()[-1] == ("close",)
    assert site.take(Completed) == [Completed(VM, (b"1",), proven=False)]


# -------------------------------------------------------------------- the end


def test_a_vm_that_is_gone_for_good_leaves_nothing(site: Site) -> None:
    site.complete(b"1", site.held(), reply=REPLY)
    site.complete(b"2", site.held(), reply=REFUSAL)
    site.complete(b"3", site.held())
    site.broker.release(VM, for_good=True)
    site.turn()
    site.confirm(ok=False)
    site.vm.say(spec.Channel.CloseOk)
    assert site.take(Completed) == []
    assert VM not in site.broker._vms
    site.asks()
    site.loop.wait(2 * REPLY_KEPT_S)
    assert site.asks() == []


def test_a_vm_that_is_released_is_known_until_its_replies_are_published(site: Site) -> None:
    site.complete(b"1", site.held(), reply=REPLY)
    site.broker.release(VM)
    site.turn()
    site.vm.say(spec.Channel.CloseOk)
    assert VM in site.broker._vms
    site.confirm()
    assert site.take(Completed) == [Completed(VM, (b"1",), proven=False)]
    assert VM not in site.broker._vms


def test_what_is_refused_is_told_anew_after_a_lost_connection(site: Site) -> None:
    site.complete(b"1", site.held(), reply=REPLY)
    site.confirm(ok=False)
    site.broker._vms[VM].on_disconnected("lost")
    site.loop.wait(RETRY_S)
    site.confirm(ok=False)
    assert site.take(RepliesRefused) == 2 * [RepliesRefused(VM, "refused by the broker")]


# -------------------------------------------------------------------- crossings


class Host(Site):
    """With the VM's Downward, and a guest that is a list of messages."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[Any] = []
        self.downward = Downward(
            VM,
            lambda data, _: self.said.append(decode(data)),
            self.broker,
            OpenGate(lambda _: True),
            frozenset(),
            offer_nothing,
        )
        self.downward.opened(resumed=False, now_s=0.0)
        self.guest(Subscribe((A,)))
        self.turn()
        self.hand_over()
        self.answer_set_up()
        self.confirm_requests()
        for body in self.published():  # that the VM is here
            self.deliver(body, own_queue(VM))
        self.hand_over()
        self.crossings = 0

    def guest(self, message: Any) -> None:
        self.downward.receive(encode(message), 20.0)
        self.turn()

    def published(self) -> list[bytes]:
        """Since the last time."""
        return [what[1] for what in self.asks() if what[0] == "publish"]

    def confirm_requests(self) -> None:
        """All that the VM has published."""
        for channel in self.channels[1:]:
            if channel.published:
                channel.say(spec.Basic.Ack, channel.published, True)
        self.hand_over()

    def hand_over(self) -> None:
        """As the daemon does."""
        posted, self.posted = self.posted, []
        for event in posted:
            match event:
                case Released():
                    self.downward.released()
                case Consuming(_, topics):
                    self.downward.consuming(topics)
                case Delivered():
                    token, request, topic = event.token, event.request, event.topic
                    self.downward.delivered(
                        token, request, topic, fanout=False, redelivered=False, now_s=20.0
                    )
                case Completed(_, ids, proven):
                    self.downward.completed(ids, proven=proven)
                case Mail(_, token, body):
                    take_mail(self.downward.upward, token, body, 20.0)
                case PublishResult(_, request_id, ok):
                    self.downward.upward.sent(
                        request_id, ok=ok, unroutable=False, doubtful=False, now_s=20.0
                    )
                case Troubled():
                    pass
                case _:
                    raise AssertionError(event)
        self.turn()


ID = bytes(15) + b"\x07"


@pytest.mark.parametrize("what", ["answered", "refused", "cast"])
def test_a_request_crosses_between_the_hosts_threads_three_times(what: str) -> None:
    """The delivery comes in, what came of it goes out, and that all is done comes back."""
    host = Host()
    message = {"method": "m", "args": {}, "_unique_id": ID.hex()}
    if what != "cast":
        message |= {"_msg_id": "msg", "_reply_q": "reply_x"}
    host.deliver(oslo(message))
    host.hand_over()
    said = {
        "answered": Reply(ID, FINAL, b"1"),
        "refused": Returned(ID, NO_AGENT, "nobody"),
        "cast": Receipt(ID),
    }
    host.guest(said[what])
    if what == "refused":
        host.prove()
    if what != "cast":
        host.confirm()
    if what != "refused":
        host.loop.wait(SETTLE_S)
        host.prove()
    host.hand_over()
    assert host.said[-1] == Settled((ID,))
    assert host.crossings == 3
    host.broker.stop()


@pytest.mark.parametrize(("is_call", "crossings"), [(True, 4), (False, 2)])
def test_a_guests_request_crosses_between_the_hosts_threads(is_call: bool, crossings: int) -> None:
    """It goes out, and its confirm comes back; an answer comes in, and its acknowledgement goes
    out when the guest has it."""
    host = Host()
    flags = CALL if is_call else 0
    host.guest(Request(ID, flags, 60_000, 0, "nova", "control", "", b'{"method": "m"}'))
    host.confirm_requests()
    if is_call:
        host.deliver(oslo({"_msg_id": ID.hex(), "result": 1}), own_queue(VM))
        host.hand_over()
        assert isinstance(host.said[-1], Reply)
        host.guest(Settled((ID,)))
        assert host.asks()[-1][0] == "ack"
    else:
        assert host.said[-1] == Receipt(ID)
    assert host.crossings == crossings
    host.broker.stop()
