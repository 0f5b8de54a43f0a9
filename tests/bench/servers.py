"""What the broker's benchmarks call: stock oslo.messaging servers, and guests by the hundred.

    python -m tests.bench.servers oslo URL SERVER...     one stock RPC server for each name
    python -m tests.bench.servers guests DIRECTORY N     N guests, each on a socket of its own
    python -m tests.bench.servers amqp ADDRESS QUEUE REPLY_Q    py-amqp, and nothing else

Prints "ready" when it serves; ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import warnings
from collections import deque
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

from vchan.io.link import Link
from vchan.io.loop import Loop
from vchan.io.streams import SocketStream, listen_unix
from vchan.rpc.messages import (
    FINAL,
    BadMessage,
    Request,
    Subscribe,
    Topic,
    Unknown,
    decode,
    encode,
    encode_receipt,
    encode_reply,
    reply_stream,
)
from vchan.session import (
    CHANNEL_ACK_DELAY_S,
    CONTROL,
    Config,
    Event,
    Opened,
    Received,
    Role,
    Session,
)

TOPIC = "bench"
COUNT_FILE = "count"


class Endpoint:
    """As the agent's, for stock servers."""

    def __init__(self) -> None:
        self.noted = 0
        self._lock = threading.Lock()

    def ping(self, context: Any, **values: str) -> dict[str, str]:
        """Give back what was given."""
        return values

    def note(self, context: Any, **values: str) -> None:
        """For casts."""
        with self._lock:
            self.noted += 1

    def count(self, context: Any) -> int:
        """How many casts came."""
        return self.noted


def serve_oslo(url: str, names: list[str]) -> None:
    """Stock servers, all in this process, as a service with many targets has them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # oslo's own deprecations
        import oslo_messaging
        from oslo_config import cfg
    conf = cfg.CONF
    conf([], project="vchan-bench", default_config_files=[], default_config_dirs=[])
    transport = oslo_messaging.get_rpc_transport(conf, url=url)
    endpoint = Endpoint()
    for name in names:
        target = oslo_messaging.Target(topic=TOPIC, server=name)
        oslo_messaging.get_rpc_server(transport, target, [endpoint], executor="threading").start()
    print("ready", flush=True)
    sys.stdin.read()


class Guest:
    """The least a guest can be: a session that serves the topic and answers at once."""

    def __init__(self, loop: Loop, path: Path, number: int) -> None:
        self._loop = loop
        self._path = str(path)
        instance, delay_s = number.to_bytes(16, "big"), CHANNEL_ACK_DELAY_S
        config = Config(Role.GUEST, instance, "guest", ack_delay_s=delay_s)
        self._session = Session(config, os.urandom)
        self._server = listen_unix(self._path, 0o600)
        self._link: Link | None = None
        self.requests = 0
        loop.add_reader(self._server.fileno(), self._accept)

    def _accept(self) -> None:
        connected, _ = self._server.accept()
        if self._link is not None:
            self._link.close()
        stream = SocketStream(connected, self._path)
        self._link = Link(self._loop, self._session, stream, self._handle, lambda _: None)

    def _handle(self, event: Event) -> None:
        assert self._link is not None
        if isinstance(event, Opened) and not event.resumed:
            self._link.send(encode(Subscribe((Topic("openstack", TOPIC),))), CONTROL)
        elif isinstance(event, Received):
            message = decode(event.message)
            if isinstance(message, Request):
                self.requests += 1
                if message.is_call:
                    answer = encode_reply(message.id, FINAL, b"%d" % self.requests)
                    self._link.send(answer, reply_stream(message.id))
                else:
                    self._link.send(encode_receipt(message.id), CONTROL)
            assert not isinstance(message, BadMessage | Unknown)


def serve_guests(directory: Path, number_of: int) -> None:
    """Guests, until standard input ends. A file says how many have had a request."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    assert soft
    with closing(Loop()) as loop:
        guests = [Guest(loop, directory / f"{number}", number) for number in range(number_of)]

        def write_count() -> None:
            reached = sum(guest.requests for guest in guests), sum(map(has_some, guests))
            part = directory / f"{COUNT_FILE}.part"
            part.write_text(f"{reached[0]} {reached[1]}")
            part.rename(directory / COUNT_FILE)
            loop.call_later(0.05, write_count)

        write_count()
        threading.Thread(target=_stop_at_end, args=(loop,), daemon=True).start()
        print("ready", flush=True)
        loop.run()


PREFETCH = 64
"""As vchan-host has it."""


def serve_amqp(address: str, queue: str, reply_q: str) -> None:
    """The least that py-amqp does for a message: it takes and acknowledges a cast; it answers a
    call, always the same, and acknowledges it when the answer is confirmed."""
    import amqp

    connection = amqp.Connection(address, heartbeat=0)
    connection.connect()
    channel = connection.channel()
    channel.confirm_select()
    channel.queue_declare(queue, durable=True, auto_delete=False)
    channel.basic_qos(0, PREFETCH, a_global=False)
    waiting: deque[tuple[int, int]] = deque()  # answers not confirmed: number, and call's tag
    numbers = count(1)
    answer = json.dumps({"result": 1, "failure": None, "ending": True, "_msg_id": "0" * 32})
    body = json.dumps({"oslo.version": "2.0", "oslo.message": answer})

    def confirmed(number: int, _multiple: bool) -> None:  # classic queues do so in order
        while waiting and waiting[0][0] <= number:
            channel.basic_ack(waiting.popleft()[1])

    def take(message: Any) -> None:
        if b"_reply_q" not in message.body:
            channel.basic_ack(message.delivery_tag)
            return
        waiting.append((next(numbers), message.delivery_tag))
        made = amqp.Message(body, content_type="application/json", delivery_mode=2)
        channel.basic_publish(made, "", reply_q, mandatory=True)

    channel.events["basic_ack"].add(confirmed)
    channel.basic_consume(queue, callback=take)
    threading.Thread(target=lambda: os._exit(sys.stdin.read() != ""), daemon=True).start()
    print("ready", flush=True)
    while True:
        connection.drain_events()


def _stop_at_end(loop: Loop) -> None:
    sys.stdin.read()
    loop.stop()


def has_some(guest: Guest) -> bool:
    """Whether it was asked at all."""
    return guest.requests > 0


def main() -> None:
    """The program."""
    what, *words = sys.argv[1:]
    if what == "oslo":
        serve_oslo(words[0], words[1:])
    elif what == "amqp":
        serve_amqp(*words)
    else:
        serve_guests(Path(words[0]), int(words[1]))


if __name__ == "__main__":
    main()
