"""Both ends of a broker under test: a host's `Broker` that is listened to, and oslo.messaging's own
clients; and a cable between them that can be pulled."""

import contextlib
import json
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import amqp
from oslo_config import cfg

from tests.rig import wait_until
from tests.rig.rabbit import RabbitServer
from vchan.host.broker.broker import Broker
from vchan.host.broker.config import BrokerConfig, BrokerHost
from vchan.host.broker.events import BrokerEvent, Completed, Consuming, Delivered
from vchan.host.oslo_wire.downward_envelope import ReplyPublication, encode_reply
from vchan.rpc.messages import Topic

TIMEOUT_S = 60.0
QUIET_S = 0.4
"""Long enough for the broker to have delivered what it was going to."""
E = TypeVar("E", bound=BrokerEvent)


class Recorder:
    """Keeps what a Broker posts until a test takes it."""

    def __init__(self) -> None:
        self._events: list[BrokerEvent] = []
        self._changed = threading.Condition()

    def post(self, event: BrokerEvent) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def take(self, kind: type[E], **fields: object) -> E:
        """The first event of this kind with these fields; waits for it."""

        def find() -> E | None:
            for event in self._events:
                if isinstance(event, kind) and all(
                    getattr(event, name) == value for name, value in fields.items()
                ):
                    return event
            return None

        with self._changed:
            found = self._changed.wait_for(find, TIMEOUT_S)
            assert found is not None, f"no {kind.__name__} {fields} among {self._events}"
            self._events.remove(found)
            return found

    def take_all(self, kind: type[E], count: int) -> list[E]:
        return [self.take(kind) for _ in range(count)]

    def has(self, kind: type[BrokerEvent]) -> bool:
        with self._changed:
            return any(isinstance(event, kind) for event in self._events)

    def assert_quiet(self, kind: type[BrokerEvent], for_s: float = QUIET_S) -> None:
        """Nothing of this kind comes, for a moment."""
        with self._changed:
            came = self._changed.wait_for(lambda: self._any(kind), for_s)
        assert not came, f"unexpected: {self._events}"

    def _any(self, kind: type[BrokerEvent]) -> bool:
        return any(isinstance(event, kind) for event in self._events)


class Host:
    """A Broker with its recorder."""

    def __init__(self, config: BrokerConfig) -> None:
        self.config = config
        self.events = Recorder()
        self.broker = Broker(config, self.events.post)

    def consume(self, vm: str, *topics: Topic, own: bool = False) -> None:
        self.broker.consume(vm, frozenset(topics), frozenset(topics if own else ()))
        self.events.take(Consuming, vm=vm)

    def answer(self, delivered: Delivered, result: object) -> None:
        """Publish the reply; wait until it is confirmed, and all is acknowledged and proved."""
        request = delivered.request
        assert request.msg_id is not None and request.reply_q is not None
        body = encode_reply(request.msg_id, result_json=json.dumps(result).encode())
        reply = ReplyPublication(request.reply_q, body)
        self.broker.complete(delivered.vm, request.id, (delivered.token,), reply)
        self.events.take(Completed, ids=(request.id,), proven=True)

    def numbers(self, count: int) -> list[Any]:
        """The argument x of so many deliveries."""
        return [event.request.args["x"] for event in self.events.take_all(Delivered, count)]

    def __enter__(self) -> "Host":
        self.broker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.broker.stop()


class Clients:
    """Unmodified oslo.messaging clients of one broker."""

    def __init__(self, url: str) -> None:
        with warnings.catch_warnings():
            # Their modules warn about their own future when they are imported.
            warnings.simplefilter("ignore")
            import oslo_messaging
        self._oslo = oslo_messaging
        self._url = url
        self._transports: dict[str, Any] = {}
        self._threads = ThreadPoolExecutor(8)
        cfg.CONF([], project="vchan-test", default_config_files=[], default_config_dirs=[])

    def client(self, topic: Topic, query: str = "", **prepared: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            if query not in self._transports:
                self._transports[query] = self._oslo.get_rpc_transport(cfg.CONF, self._url + query)
            target = self._oslo.Target(exchange=topic.exchange, topic=topic.name)
            client = self._oslo.get_rpc_client(self._transports[query], target)
        return client.prepare(**prepared)

    def call(self, topic: Topic, vm: str, query: str = "", **args: object) -> Future[Any]:
        client = self.client(topic, query, server=vm, timeout=TIMEOUT_S)
        return self._threads.submit(client.call, {"request_id": "req-1"}, "echo", **args)

    def cast(self, topic: Topic, vm: str, query: str = "", **args: object) -> None:
        self.client(topic, query, server=vm).cast({}, "note", **args)

    def close(self) -> None:
        self._threads.shutdown()
        for transport in self._transports.values():
            transport.cleanup()


class Proxy:
    """Between Broker and RabbitMQ: a cable to pull."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._flowing = threading.Event()
        self._flowing.set()
        self._sockets: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def pull_the_cable(self) -> None:
        self._flowing.clear()

    def plug_it_in(self) -> None:
        self._flowing.set()

    def _start(self, function: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=function, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target_port))
                self._sockets += [near, far]
                self._start(self._pump, near, far)
                self._start(self._pump, far, near)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._flowing.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._flowing.set()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(TIMEOUT_S)


@contextlib.contextmanager
def raw_channel(rabbit: RabbitServer) -> Iterator[Any]:
    """py-amqp itself, for what oslo.messaging's clients do not do. What it publishes is confirmed:
    a broker may drop the rest when the connection ends (RabbitMQ does, from quorum queues)."""
    with amqp.Connection(f"127.0.0.1:{rabbit.port}", confirm_publish=True) as connection:
        yield connection.channel()


def through(proxy: Proxy, config: BrokerConfig, **changes: Any) -> BrokerConfig:
    return replace(config, hosts=(BrokerHost("127.0.0.1", proxy.port),), **changes)


def wait_for_queue(rabbit: RabbitServer, name: str, *, ready: int, unacknowledged: int) -> None:
    def is_so() -> bool:
        facts = rabbit.queues()[name]
        return (facts.ready, facts.unacknowledged) == (ready, unacknowledged)

    wait_until(
        is_so, timeout_s=TIMEOUT_S, interval_s=0.1, failure=lambda: str(rabbit.queues()[name])
    )
