"""py-amqp without its waiting: one connection, its channels, and no thread that blocks.

py-amqp gives the handshake, the codec and the heartbeats. Here `Link` does the bytes, on our loop,
and `Channel` puts aside what the broker says until its owner is told. So what one channel waits for
delays no other. This module alone imports py-amqp: the others take its names from here.

    Link.connect()            waits for the handshake; nothing after it waits
    Link.channel(owner)       a channel, opened without waiting for the answer
    Channel.ask(method, ...)  sends; what the broker answers comes as ...
    Owner.on_method(inbound)
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

import amqp
from amqp import Message, spec
from amqp.exceptions import AMQPError, ResourceError, UnexpectedFrame
from amqp.method_framing import frame_writer
from amqp.serialization import loads

from vchan.host.broker_config import BrokerConfig, BrokerHost
from vchan.loop import Loop, Timer

__all__ = [
    "BROKEN",
    "Channel",
    "Inbound",
    "Link",
    "Message",
    "Owner",
    "ResourceError",
    "explain",
    "spec",
]

CONNECT_TIMEOUT_S: Final = 4.0
"""For one address to answer, and then for each step of the handshake."""
CLOSE_TIMEOUT_S: Final = 2.0
"""For the broker to say good-bye."""
READ_BYTES: Final = 64 * 1024
READS_PER_TURN: Final = 16
WRITE_BYTES: Final = 128 * 1024

_FRAME_HEADER: Final = struct.Struct(">BHI")
_FRAME_END: Final = 0xCE

# What py-amqp raises when the broker goes away or sends what it cannot parse. Our own code does
# not run inside the calls that are guarded by this.
BROKEN: Final = (AMQPError, OSError, struct.error, LookupError, ValueError, TypeError)


def _is_broken_off(error: BaseException) -> bool:
    """The other end broke off the handshake: it says so in an alert, or, if that could not be read
    any more, by closing."""
    is_alert = isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or "")
    return is_alert or isinstance(error, ssl.SSLEOFError | ConnectionResetError)


def explain(error: BaseException, config: BrokerConfig) -> str:
    """Why there is no connection, and which option to look at."""
    tls, said = config.tls, str(error) or type(error).__name__
    match error:
        case ssl.SSLCertVerificationError():
            authorities = (tls and tls.ca_file) or "the system's"
            said = (
                f"its certificate is refused: {error.verify_message}; "
                f"authorities (ssl_ca_file): {authorities}"
            )
        case ssl.SSLError(reason="WRONG_VERSION_NUMBER"):
            said += ": it does not speak TLS on this port, and ssl is on"
        case ssl.SSLError() | ConnectionResetError() if tls and _is_broken_off(error):
            said += ": it may want a certificate that it trusts (ssl_cert_file, ssl_key_file)"
        case ConnectionResetError():
            said += ": it may speak TLS on this port, and ssl is off"
        case _:
            pass
    return said


# What a channel may be told, and how its arguments are laid out.
_INBOUND: Final[Mapping[tuple[int, int], str]] = {
    spec.Channel.OpenOk: "",
    spec.Channel.Close: "BsBB",
    spec.Channel.CloseOk: "",
    spec.Exchange.DeclareOk: "",
    spec.Queue.DeclareOk: "sll",
    spec.Queue.BindOk: "",
    spec.Queue.DeleteOk: "l",
    spec.Basic.QosOk: "",
    spec.Basic.ConsumeOk: "s",
    spec.Basic.Cancel: "s",
    spec.Basic.Deliver: "sLbss",
    spec.Basic.Return: "Bsss",
    spec.Basic.Ack: "Lb",
    spec.Basic.Nack: "Lb",
    spec.Confirm.SelectOk: "",
}


class Channel(amqp.Channel):  # type: ignore[misc]  # amqp publishes no types
    """py-amqp's channel less the waiting: what the broker says is put aside for the owner."""

    def __init__(self, connection: Any, owner: Owner, inbox: deque[Inbound]) -> None:
        super().__init__(connection, auto_decode=False)
        self.owner = owner
        self._inbox = inbox
        self.ask(spec.Channel.Open, "s", "")

    def ask(self, method: tuple[int, int], layout: str, *args: Any, content: Any = None) -> None:
        """Send a method, without waiting for what comes back."""
        self.send_method(method, layout, args, content)

    def dispatch_method(self, method_sig: tuple[int, int], payload: bytes, content: Any) -> None:
        """Called by py-amqp for every method that arrives on this channel."""
        layout = _INBOUND.get(method_sig)
        if layout is None:
            return
        args = loads(layout, payload, 4)[0] if layout else []
        self._inbox.append(Inbound(self, method_sig, args, content))

    def close_softly(self) -> None:
        """Ask the broker to close it. It stays ours until CloseOk."""
        self.ask(spec.Channel.Close, "BsBB", 0, "", 0, 0)

    def closed_by_broker(self) -> None:
        """Agree to the broker's closing it, and free its number."""
        self.send_method(spec.Channel.CloseOk)
        self.collect()


class _Connection(amqp.Connection):  # type: ignore[misc]  # amqp publishes no types
    """py-amqp's connection, which tells before it closes its socket."""

    def __init__(self, on_collect: Callable[[], None], **options: Any) -> None:
        super().__init__(**options)
        self._on_collect = on_collect

    def collect(self) -> None:
        """Called by py-amqp, and by us, when the connection is over."""
        self._on_collect()
        super().collect()


class Inbound(NamedTuple):
    """A method that the broker sent on a channel, and the message with it, if it has one."""

    channel: Channel
    method: tuple[int, int]
    args: list[Any]
    content: Any


class Owner:
    """Who a channel works for."""

    def on_method(self, inbound: Inbound) -> None:
        raise NotImplementedError


class Link:
    """One connection: py-amqp's, with the socket's reading and writing done by our loop.

    `connect` waits; nothing else does. Bytes to send collect in a buffer: its size is bounded
    by what may be unconfirmed (REPLIES_BYTES_MAX) and unacknowledged.
    """

    def __init__(
        self,
        config: BrokerConfig,
        host: BrokerHost,
        loop: Loop,
        on_lost: Callable[[str], None],
        on_blocked: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._on_lost = on_lost
        self._heartbeat_rate = config.heartbeat_rate
        self._inbox: deque[Inbound] = deque()
        self._in = bytearray()
        self._out = bytearray()
        self._handshake_write: Callable[[Any], None] | None = None
        self._sock: Any = None
        self._fd = -1
        self._timer: Timer | None = None
        self._closing = False
        self._is_over = False
        self.amqp = _Connection(
            self._detach,
            host=host.address,
            userid=host.user,
            password=host.password,
            login_method=config.login_method,
            virtual_host=config.virtual_host,
            ssl=config.tls.options(host) if config.tls else False,
            connect_timeout=CONNECT_TIMEOUT_S,
            heartbeat=config.heartbeat_s,
            client_properties={"connection_name": f"vchan-host:{os.getpid()}"},
            # py-amqp's own default gives up on a broker that takes a second to read.
            socket_settings={socket.TCP_USER_TIMEOUT: config.heartbeat_s * 1000},
            on_blocked=on_blocked,
            on_unblocked=partial(on_blocked, ""),
            frame_writer=self._make_frame_writer,
        )

    def connect(self) -> None:
        """Connect and log in; waits some CONNECT_TIMEOUT_S at most.

        Raises:
            One of BROKEN: It did not work, and nothing is left behind.
        """
        try:
            self.amqp.connect()
        except BROKEN:
            self.amqp.collect()
            raise
        self._handshake_write = None
        self._sock = self.amqp.sock
        self._sock.settimeout(0)
        self._fd = self._sock.fileno()
        self._loop.add_reader(self._fd, self._on_readable)
        self._tick()

    def channel(self, owner: Owner) -> Channel:
        """A new channel; what the broker answers goes to `owner`.

        Raises:
            ResourceError: All the numbers the broker allows are taken (2047 by default).
        """
        return Channel(self.amqp, owner, self._inbox)

    def close_softly(self) -> None:
        """Say good-bye; `on_lost` is called when the broker has answered, or does not."""
        self._closing = True
        self.amqp.is_closing = True
        if self._timer is not None:
            self._timer.cancel()
        self.amqp.send_method(spec.Connection.Close, "BsBB", (0, "", 0, 0))
        self._timer = self._loop.call_later(CLOSE_TIMEOUT_S, partial(self.fail, "closed"))

    def fail(self, reason: str) -> None:
        """Drop the connection. Harmless when it is gone already."""
        if self._is_over:
            return
        self._is_over = True
        self.amqp.collect()
        self._on_lost(reason)

    def _detach(self) -> None:
        """The socket is about to be closed."""
        if self._timer is not None:
            self._timer.cancel()
        if self._fd < 0:
            return
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._fd = -1
        try:
            # Agree to the broker's closing, if that is why: else it waits, and complains.
            self._sock.send(self._out)
        except OSError:
            pass  # it is over one way or another
        self._out.clear()

    # ---------------------------------------------------------------- writing

    def _make_frame_writer(self, connection: Any, transport: Any) -> Any:
        self._handshake_write = transport.write
        return frame_writer(connection, self)

    def write(self, data: Any) -> None:
        """Called by py-amqp's frame writer, whose buffer `data` is only lent."""
        if self._handshake_write is not None:
            self._handshake_write(data)
            return
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out += data

    def _flush(self) -> None:
        if self._fd < 0:
            return
        try:
            while self._out:
                with memoryview(self._out) as view:
                    sent = self._sock.send(view[:WRITE_BYTES])
                del self._out[:sent]
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            self._loop.add_writer(self._fd, self._flush)
        except OSError as error:
            self.fail(f"writing to the broker: {error}")
        else:
            self._loop.remove_writer(self._fd)

    # ---------------------------------------------------------------- reading

    def _on_readable(self) -> None:
        for _ in range(READS_PER_TURN):
            if self._fd < 0:
                return
            try:
                data = self._sock.recv(READ_BYTES)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except OSError as error:
                self.fail(f"reading from the broker: {error}")
                return
            if not data:
                self.fail("the broker closed the connection")
                return
            self._feed(data)
        # Under TLS, what is decrypted already makes no descriptor readable.
        self._loop.call_soon(self._on_readable)

    def _feed(self, data: bytes) -> None:
        self._in += data
        problem = ""
        try:
            self._parse()
        except BROKEN as error:
            problem = str(error) or type(error).__name__
        while self._inbox and not self._closing:
            inbound = self._inbox.popleft()
            inbound.channel.owner.on_method(inbound)
        if problem or not self.amqp.connected:
            self.fail(problem or "closed")

    def _parse(self) -> None:
        """Hand every whole frame to py-amqp, which calls the channels' `dispatch_method`."""
        buffer, at = self._in, 0
        try:
            while len(buffer) - at > _FRAME_HEADER.size:
                kind, channel, size = _FRAME_HEADER.unpack_from(buffer, at)
                start = at + _FRAME_HEADER.size
                if size > self.amqp.frame_max:
                    raise UnexpectedFrame(f"a frame of {size} bytes")
                if len(buffer) <= start + size:
                    return
                if buffer[start + size] != _FRAME_END:
                    raise UnexpectedFrame("a frame without its end")
                at = start + size + 1
                self.amqp.on_inbound_frame((kind, channel, bytes(buffer[start : start + size])))
        finally:
            del buffer[:at]

    # ---------------------------------------------------------------- heartbeats

    def _tick(self) -> None:
        if not self.amqp.heartbeat:
            return
        try:
            self.amqp.heartbeat_tick(rate=self._heartbeat_rate)
        except AMQPError as error:
            self.fail(f"the broker is silent: {error}")
            return
        pause_s = self.amqp.heartbeat / self._heartbeat_rate / 2
        self._timer = self._loop.call_later(pause_s, self._tick)
