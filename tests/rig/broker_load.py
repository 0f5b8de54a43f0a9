"""Load through a broker, counted at both ends: hosts that take what comes for VMs, stock clients
that cast and call, VMs that publish to the control side."""

from __future__ import annotations

import gc
import json
import threading
import uuid
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.rig import wait_until
from tests.rig.broker_peers import Clients, raw_channel
from tests.rig.rabbit import RabbitServer
from vchan.host.broker.broker import Broker
from vchan.host.broker.config import BrokerConfig
from vchan.host.broker.events import (
    BrokerEvent,
    Consuming,
    Delivered,
    Died,
    Failed,
    PublishResult,
    Token,
)
from vchan.host.oslo_wire.downward_envelope import BrokerRequest, ReplyPublication, encode_reply
from vchan.host.oslo_wire.upward_envelope import Form, Publication
from vchan.rpc.messages import Topic

TIMEOUT_S = 120.0
"""For a broker, and clients that back off, to come round."""
CALL_TIMEOUT_S = 120
TOPIC = Topic("load-exchange", "load")


class Guests:
    """Hosts' side: takes what comes for VMs, as guests do. What was taken before does not run
    again; a call is answered again."""

    def __init__(self, config: BrokerConfig) -> None:
        self.broker = Broker(config, self._post)
        self.ran: defaultdict[str, list[int]] = defaultdict(list)
        self.copies = 0
        self.events: list[BrokerEvent] = []
        self.sent: list[PublishResult] = []
        self._seen: set[tuple[str, bytes]] = set()
        self._outgoing: dict[bytes, tuple[str, Publication]] = {}
        self._retries = ThreadPoolExecutor(8)
        self._over = threading.Event()

    def _post(self, event: BrokerEvent) -> None:
        match event:
            case Delivered():
                self._take(event.vm, event.request, event.token)
            case PublishResult():
                self.sent.append(event)
                if not event.ok:
                    self._later(self._publish, event.request_id)
            case _:
                self.events.append(event)

    def _take(self, vm: str, request: BrokerRequest, token: Token) -> None:
        if (vm, request.id) in self._seen:
            self.copies += 1
        else:
            self._seen.add((vm, request.id))
            self.ran[vm].append(request.args["x"])
        reply = None
        if request.msg_id is not None and request.reply_q is not None:
            result = json.dumps(request.args["x"]).encode()
            body = encode_reply(request.msg_id, result_json=result, unique_id=uuid.uuid4().hex)
            reply = ReplyPublication(request.reply_q, body)
        self.broker.complete(vm, request.id, (token,), reply)

    def publish(self, vm: str, request_id: bytes, publication: Publication) -> None:
        """Until the broker has confirmed it."""
        self._outgoing[request_id] = (vm, publication)
        self._publish(request_id)

    def _publish(self, request_id: bytes) -> None:
        vm, publication = self._outgoing[request_id]
        self.broker.publish_request(vm, request_id, publication)

    def _later(self, call: Any, *args: Any) -> None:
        """Not at once, and not on the broker's thread."""

        def wait_and_call() -> None:
            if not self._over.wait(0.2):
                call(*args)

        self._retries.submit(wait_and_call)

    def count(self, kind: type[BrokerEvent]) -> int:
        """How many of these events came."""
        return sum(isinstance(event, kind) for event in self.events)

    def __enter__(self) -> Guests:
        self.broker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.broker.stop()  # it posts what is to be published again, which is then nothing
        self._retries.shutdown()
        faults = [event for event in self.events if isinstance(event, Failed | Died)]
        assert not faults, f"the broker's side failed: {faults}"


class Load:
    """Stock clients that cast to every VM, and call, until told to stop."""

    def __init__(self, url: str, vms: list[str]) -> None:
        self._clients = Clients(url)
        self._stop = threading.Event()
        self.casts: dict[str, int] = dict.fromkeys(vms, 0)
        self.calls = 0
        self.wrong: list[str] = []
        self._threads = [threading.Thread(target=self._cast, args=(vm,)) for vm in vms]
        self._threads.append(threading.Thread(target=self._call, args=(vms,)))

    def _cast(self, vm: str) -> None:
        client = self._clients.client(TOPIC, server=vm)
        while not self._stop.wait(0.01):
            client.cast({}, "note", x=self.casts[vm] + 1)
            self.casts[vm] += 1

    def _call(self, vms: list[str]) -> None:
        while not self._stop.wait(0.02):
            vm = vms[self.calls % len(vms)]
            client = self._clients.client(TOPIC, server=vm, timeout=CALL_TIMEOUT_S)
            number = -self.calls - 1
            if client.call({}, "echo", x=number) != number:
                self.wrong.append(f"{vm} {number}")
            self.calls += 1

    def wait_for_more(self, count: int) -> None:
        """Until so many more calls are answered, and casts to every VM confirmed."""
        calls, casts = self.calls, dict(self.casts)
        wait_until(
            lambda: self.calls - calls >= count and self._fewest_since(casts) >= count,
            timeout_s=TIMEOUT_S,
            interval_s=0.1,
            failure=lambda: f"{self.calls - calls} calls, {self._fewest_since(casts)} casts",
        )

    def _fewest_since(self, casts: dict[str, int]) -> int:
        return min(self.casts[vm] - count for vm, count in casts.items())

    def stop(self) -> None:
        """Send no more; what is under way ends well."""
        self._stop.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive(), "a client does not come back"

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._clients.close()
        gc.collect()


def assert_nothing_lost(load: Load, guests: Guests) -> None:
    """Every cast ran once, in order, and every call was answered by its own answer."""

    def all_ran() -> bool:
        return all(len(casts_of(guests, vm)) >= count for vm, count in load.casts.items())

    wait_until(
        all_ran,
        timeout_s=TIMEOUT_S,
        interval_s=0.2,
        failure=lambda: str(
            {
                vm: sorted(set(range(1, count + 1)) - set(casts_of(guests, vm)))[:20]
                for vm, count in load.casts.items()
            }
        ),
    )
    for vm, count in load.casts.items():
        assert casts_of(guests, vm) == list(range(1, count + 1))
    assert load.wrong == []


def casts_of(guests: Guests, vm: str) -> list[int]:
    """What it ran; calls have negative numbers."""
    return [number for number in guests.ran[vm] if number > 0]


def consume_all(guests: Guests, vms: list[str]) -> None:
    """Have them all served."""
    for vm in vms:
        guests.broker.consume(vm, frozenset({TOPIC}))
    wait_until(
        lambda: guests.count(Consuming) >= len(vms),
        timeout_s=TIMEOUT_S,
        interval_s=0.1,
        failure=lambda: str(guests.events),
    )


class Publishing:
    """VMs that publish numbers to one topic of the control side, until it is left."""

    def __init__(self, guests: Guests, vms: list[str]) -> None:
        self._guests = guests
        self.published = dict.fromkeys(vms, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    @property
    def total(self) -> int:
        """So many have been published, or are to be."""
        return sum(self.published.values())

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            if self.total - self._confirmed() > 100:
                continue
            for vm, number in self.published.items():
                body = f"{vm} {number}".encode()
                cast = Publication(
                    Form.TOPIC, TOPIC.exchange, "gathered", body, None, mandatory=True
                )
                self._guests.publish(vm, body, cast)
                self.published[vm] += 1

    def _confirmed(self) -> int:
        return sum(event.ok for event in list(self._guests.sent))

    def wait_for_more(self, count: int) -> None:
        """Until the broker has confirmed so many more."""
        before = self._confirmed()
        wait_until(
            lambda: self._confirmed() - before >= count,
            timeout_s=TIMEOUT_S,
            interval_s=0.1,
            failure=lambda: f"confirmed {self._confirmed()}: {self._guests.sent[-5:]}",
        )

    def wait_confirmed(self) -> None:
        """Until the broker has confirmed all."""
        wait_until(
            lambda: self._confirmed() >= self.total,
            timeout_s=TIMEOUT_S,
            interval_s=0.1,
            failure=lambda: f"{self._confirmed()} of {self.total}: {self._guests.sent[-5:]}",
        )

    def __enter__(self) -> Publishing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class Gathered:
    """What VMs have published, in a quorum queue of the control side."""

    def __init__(self, node: RabbitServer) -> None:
        self._node = node
        with raw_channel(node) as channel:
            channel.exchange_declare(TOPIC.exchange, "topic", durable=True, auto_delete=False)
            arguments = {"x-queue-type": "quorum"}
            channel.queue_declare("gathered", durable=True, auto_delete=False, arguments=arguments)
            channel.queue_bind("gathered", TOPIC.exchange, "gathered")

    def take(self) -> dict[str, list[int]]:
        """Each VM's numbers, as they are in the queue, which then goes."""
        taken: defaultdict[str, list[int]] = defaultdict(list)
        with raw_channel(self._node) as channel:
            while (message := channel.basic_get("gathered", no_ack=True)) is not None:
                vm, number = message.body.split()
                taken[vm].append(int(number))
            channel.queue_delete("gathered")
        return taken
