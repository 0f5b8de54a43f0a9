"""py-amqp without its waiting: one connection, its channels, and no thread that blocks.

py-amqp (`py_amqp`) gives the handshake, the codec and the heartbeats. Here `AmqpLink` moves the
bytes, on our loop, and keeps what the broker says until the owner of its channel is told. So what
one channel waits for delays no other. Messages' contents are read here, too (`amqp_content`):
py-amqp raises at headers that it cannot decode, and what one publisher wrote must not cost the
connection.

    AmqpLink.connect()            waits for the handshake; nothing after it waits
    AmqpLink.channel(owner)       a channel, opened without waiting for the answer
    AmqpChannel.ask(method, ...)  sends; what the broker answers comes as ...
    Owner.on_method(inbound)
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

from vchan.host.broker.amqp_content import (
    MalformedFrame,
    Properties,
    body_size,
    read_arguments,
    read_properties,
)
from vchan.host.broker.config import BrokerConfig, BrokerHost
from vchan.host.broker.py_amqp import (
    AmqpChannel,
    AMQPError,
    Message,
    PyAmqpConnection,
    ResourceError,
    UnexpectedFrame,
    frame_writer,
    spec,
)
from vchan.host.faults import attempt, log_fault
from vchan.host.oslo_wire.envelope import REQUEST_BYTES_MAX
from vchan.io.loop import Loop, Timer

LOG = logging.getLogger(__name__)

_new_tuple = tuple.__new__  # what a NamedTuple's own does, without a frame of Python's

__all__ = [
    "BROKEN",
    "AmqpChannel",
    "AmqpLink",
    "BrokerLink",
    "Content",
    "Inbound",
    "Message",
    "Owner",
    "ResourceError",
    "explain",
    "spec",
]

CONNECT_TIMEOUT_S: Final = 4.0
"""For one address to answer, and then for each step of the handshake."""
CLOSE_TIMEOUT_S = 2.0
"""For the broker to say good-bye."""
READ_BYTES: Final = 64 * 1024
"""Read of the broker's socket at a time."""
READS_PER_TURN: Final = 16
WRITE_BYTES: Final = 128 * 1024
"""Written to the broker's socket at a time."""

BODY_BYTES_MAX = REQUEST_BYTES_MAX
"""A message's body: RabbitMQ 3 takes messages of up to 512 MiB, and hands out 64 at a time to each
VM. At it: only the beginning is kept; the message is dropped, and logged."""

_FRAME_HEADER: Final = struct.Struct(">BHI")
_FRAME_END: Final = 0xCE
_METHOD, _HEADER, _BODY = 1, 2, 3
_METHOD_ID: Final = struct.Struct(">HH")

# What py-amqp raises when the broker goes away or sends what it cannot parse. What our own code
# raises inside the calls that are guarded by this is caught before (`attempt`).
BROKEN: Final = (
    AMQPError,
    MalformedFrame,
    OSError,
    struct.error,
    LookupError,
    ValueError,
    TypeError,
)


def _reason(error: ssl.SSLError) -> str:
    """OpenSSL's name of it, which not all have, whatever their type says."""
    reason: Any = error.reason
    return reason or ""


def _is_broken_off(error: BaseException) -> bool:
    """The other end broke off the handshake: it says so in an alert, or, if that could not be read
    any more, by closing."""
    is_alert = isinstance(error, ssl.SSLError) and "ALERT" in _reason(error)
    return is_alert or isinstance(error, ssl.SSLEOFError | ConnectionResetError)


def _is_hung_up(error: OSError) -> bool:
    """The other end closed instead of an answer: with what we sent unread, or, as RabbitMQ 4 does,
    when it had read it, which py-amqp says by its text alone."""
    return isinstance(error, ConnectionResetError) or "unexpectedly closed" in str(error)


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
        case ssl.SSLError() if _reason(error) == "WRONG_VERSION_NUMBER":
            said += ": it does not speak TLS on this port, and ssl is on"
        case ssl.SSLError() | ConnectionResetError() if tls and _is_broken_off(error):
            said += ": it may want a certificate that it trusts (ssl_cert_file, ssl_key_file)"
        case OSError() if not tls and _is_hung_up(error):
            said += ": it may speak TLS on this port, and ssl is off"
        case _:
            pass
    return said


# What a channel may be told, and how its arguments are laid out.
_INBOUND: Final[Mapping[tuple[int, int], str]] = {
    spec.Channel.OpenOk: "",
    spec.Channel.Close: "BtBB",
    spec.Channel.CloseOk: "",
    spec.Exchange.DeclareOk: "",
    spec.Queue.DeclareOk: "sll",
    spec.Queue.BindOk: "",
    spec.Queue.DeleteOk: "l",
    spec.Basic.QosOk: "",
    spec.Basic.ConsumeOk: "s",
    spec.Basic.Cancel: "s",
    spec.Basic.Deliver: "sLbss",
    spec.Basic.Return: "Btss",
    spec.Basic.Ack: "Lb",
    spec.Basic.Nack: "Lb",
    spec.Confirm.SelectOk: "",
}
_WITH_CONTENT: Final = frozenset({spec.Basic.Deliver, spec.Basic.Return, spec.Basic.GetOk})


class Content(NamedTuple):
    """A message.

    Attributes:
        size: Of its body. Over BODY_BYTES_MAX, `body` is only the beginning.
    """

    properties: Properties
    body: bytes
    size: int


class _Arriving:
    """A message whose frames are not all here."""

    def __init__(self, method: tuple[int, int], payload: bytes) -> None:
        self.method = method
        self.payload = payload
        self._header: bytes | None = None
        self._size = self._received = 0
        self._chunks: list[bytes] = []

    def take(self, kind: int, payload: bytes) -> bool:
        """A frame of it. Returns whether it was the last.

        Raises:
            UnexpectedFrame: It cannot come now.
            MalformedFrame: It is too short.
        """
        if kind == _HEADER and self._header is None:
            self._header, self._size = payload, body_size(payload)
        elif kind == _BODY and self._header is not None:
            self._received += len(payload)
            if self._size <= BODY_BYTES_MAX or not self._chunks:
                self._chunks.append(payload)
        else:
            raise UnexpectedFrame(f"a frame of type {kind} within a message")
        return self._received >= self._size

    def content(self) -> Content:
        """All of it."""
        assert self._header is not None and self._received >= self._size
        chunks = self._chunks
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        made: Content = _new_tuple(Content, (read_properties(self._header), body, self._size))
        return made


class Inbound(NamedTuple):
    """A method that the broker sent on a channel, and the message with it, if it has one."""

    channel: AmqpChannel
    method: tuple[int, int]
    args: list[Any]
    content: Content | None


class Owner(Protocol):
    """Who a channel works for."""

    def on_method(self, inbound: Inbound) -> None:
        """The broker has said this on its channel."""

    def on_failure(self, fault: str) -> None:
        """`on_method` raised what it should not: give up the channel, and what depends on it.

        Raises:
            Exception: The owner works for all VMs. Then the connection is given up.
        """


class BrokerLink(Protocol):
    """A connection, to who has channels on it."""

    def channel(self, owner: Owner) -> AmqpChannel:
        """See `AmqpLink.channel`."""

    def fail(self, reason: str) -> None:
        """See `AmqpLink.fail`."""


class AmqpLink:
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
        self._on_blocked = on_blocked
        self._heartbeat_rate = config.heartbeat_rate
        self._inbox: deque[Inbound] = deque()
        self._arriving: dict[int, _Arriving] = {}  # by channel
        self._in = bytearray()
        self._out = bytearray()
        self._handshake_write: Callable[[Any], None] | None = None
        self._sock: Any = None
        self._fd = -1
        self._timer: Timer | None = None
        self._closing = False
        self._is_over = False
        self._fault = ""  # of ours, for which the connection must be given up
        self.amqp: Any = PyAmqpConnection(
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

    def channel(self, owner: Owner) -> AmqpChannel:
        """A new channel; what the broker answers goes to `owner`.

        Raises:
            ResourceError: All the numbers the broker allows are taken (2047 by default).
        """
        return AmqpChannel(self, owner)

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

    def write_frames(self, frames: bytes) -> None:
        """Write what py-amqp does not have to encode."""
        self.amqp.bytes_sent += 1  # what its heartbeat looks at
        self.write(frames)

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
        self._hand_over_all()
        if problem or self._fault or not self.amqp.connected:
            self.fail(self._fault or problem or "closed")

    def _hand_over_all(self) -> None:
        """Tell the owners what has been read."""
        while self._inbox and not self._closing:
            self._fault = self._hand_over(self._inbox.popleft()) or self._fault

    def _hand_over(self, inbound: Inbound) -> str:
        """Tell the owner. Returns why the connection must be given up, or ""."""
        owner = inbound.channel.owner
        _, error = attempt(partial(owner.on_method, inbound), None)
        if error is None:
            return ""
        fault = log_fault(LOG, f"{owner}: unexpected, at what the broker said", error)
        _, error = attempt(lambda: owner.on_failure(fault), None)
        return "" if error is None else fault  # it serves all VMs, or cannot be tidied up

    def _parse(self) -> None:
        """Take every whole frame."""
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
                self._on_frame(kind, channel, bytes(buffer[start : start + size]))
        finally:
            del buffer[:at]

    def _on_frame(self, kind: int, channel: int, payload: bytes) -> None:
        """Messages are put together here; all else is py-amqp's, which calls `dispatch_method`."""
        arriving = self._arriving.get(channel)
        if arriving is None and kind == _METHOD and len(payload) >= _METHOD_ID.size:
            method = _METHOD_ID.unpack_from(payload)
            if method == spec.Connection.Blocked:  # py-amqp keeps the broker's words to itself
                self._on_blocked(read_arguments("t", payload)[0])
            elif method == spec.Connection.Unblocked:
                self._on_blocked("")
            if method in _WITH_CONTENT:
                self._arriving[channel] = _Arriving(method, payload)
                self.amqp.bytes_recv += 1  # what py-amqp's heartbeat looks at
                return
            if channel:
                self.amqp.bytes_recv += 1
                self._dispatch(channel, method, payload, None)
                return
        if arriving is None or kind not in (_METHOD, _HEADER, _BODY):
            # It may end the connection, and all channels with it: an owner that is told afterwards
            # what came before would speak on a channel that is gone.
            self._hand_over_all()
            self.amqp.on_inbound_frame((kind, channel, payload))
            return
        self.amqp.bytes_recv += 1
        if arriving.take(kind, payload):
            del self._arriving[channel]
            self._dispatch(channel, arriving.method, arriving.payload, arriving.content())

    def _dispatch(
        self, channel: int, method: tuple[int, int], payload: bytes, content: Content | None
    ) -> None:
        """A method of a channel's. What is said of the whole connection goes to py-amqp."""
        found = self.amqp.channels.get(channel) if self.amqp.channels else None
        if found is None:
            raise UnexpectedFrame(f"a method on channel {channel}, which is closed")
        if isinstance(found, AmqpChannel):
            self.take(found, method, payload, content)
        else:
            found.dispatch_method(method, payload, content)

    def take(
        self, channel: AmqpChannel, method: tuple[int, int], payload: bytes, content: Content | None
    ) -> None:
        """A method for a channel's owner."""
        layout = _INBOUND.get(method)
        if layout is not None:
            arguments = read_arguments(layout, payload)
            self._inbox.append(_new_tuple(Inbound, (channel, method, arguments, content)))

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
