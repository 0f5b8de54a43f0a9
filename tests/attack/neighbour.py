"""Well-behaved guests: they serve the topic `agent`, and answer every call with its arguments.

python -m tests.attack.neighbour SOCKET...
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable

from vchan.io.link import Link
from vchan.io.loop import Loop
from vchan.io.streams import SocketStream, Stream
from vchan.rpc.in_flight import Deliver, Responder
from vchan.rpc.messages import BadMessage, Subscribe, Topic, Unknown, decode, encode
from vchan.session import CONTROL, Config, Event, Opened, Received, Role, Session

TOPIC = Topic("openstack", "agent")


class Neighbour:
    """One session, on the newest of the streams that it is given."""

    def __init__(self, loop: Loop, random: Callable[[int], bytes]) -> None:
        self._loop = loop
        self._link: Link | None = None
        self._session = Session(Config(Role.GUEST, random(16), "neighbour"), random)
        self._responder = Responder(self._send)

    def serve(self, stream: Stream) -> None:
        """The host has opened this."""
        self._link = Link(self._loop, self._session, stream, self._handle, lambda _: None)

    def _send(self, message: bytes, stream: int) -> None:
        assert self._link is not None
        self._link.send(message, stream)

    def _handle(self, event: Event) -> None:
        now_s = self._loop.time()
        match event:
            case Opened(_, resumed):
                if not resumed:
                    self._send(encode(Subscribe((TOPIC,))), CONTROL)
            case Received(_, data):
                message = decode(data)
                assert not isinstance(message, BadMessage | Unknown)
                for delivery in self._responder.receive(message, now_s):
                    if isinstance(delivery, Deliver):
                        request_id, body = delivery.request.id, delivery.request.body
                        self._responder.answer(request_id, body, failed=False, now_s=now_s)
            case _:
                pass


def main() -> None:
    """Serve until killed."""
    loop = Loop()
    servers = [_serve(loop, path) for path in sys.argv[1:]]
    assert servers
    loop.run()


def _serve(loop: Loop, path: str) -> socket.socket:
    neighbour = Neighbour(loop, os.urandom)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    loop.add_reader(
        server.fileno(), lambda: neighbour.serve(SocketStream(server.accept()[0], path))
    )
    return server


if __name__ == "__main__":
    main()
