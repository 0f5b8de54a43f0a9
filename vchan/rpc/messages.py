"""Messages: what a session carries.

Rules of this file
1. No I/O, no clock. Layouts come from `vchan.wire.layout`.
2. Bytes from a peer never raise: `decode` gives a `BadMessage` that says what is wrong, or that the
   kind is `Unknown`: those must be passed over, so that later versions may have new ones.
3. Bodies stay opaque here, JSON or (RAW) bytes: both daemons route by the head alone.

    requester  -- Request -->  responder      please run this
    requester  <-- Receipt --  responder      I have taken responsibility (casts)
    requester  <-- Reply ----  responder      the result, the failure, or a heartbeat (calls)
    requester  <-- Returned -  responder      it has not run, and why
    requester  -- Cancel --->  responder      nobody waits any more
    requester  -- Settled -->  responder      these ids will never come again: forget them
    agent      -- Subscribe ->  daemon        all the topics I serve, and no others
    agent      -- Holding -->  daemon         ids I have taken and still remember, and its charges
    daemon     -- Holding -->  agent          its charges
"""

from collections.abc import Iterable
from struct import Struct
from typing import Final, NamedTuple
from zlib import crc32

from vchan.session import STREAMS
from vchan.wire import layout
from vchan.wire.value import Value

ID_BYTES: Final = 16
"""An id: oslo.messaging's `_unique_id`, a UUID."""
DEFAULT_EXCHANGE: Final = "openstack"
"""oslo.messaging's default control_exchange."""
NAME_BYTES_MAX: Final = 255
"""An exchange, topic or server name: AMQP's own limit."""
TEXT_BYTES_MAX: Final = 1024
"""The text of a Returned. At it: the rest is cut."""
TOPICS_MAX: Final = 64
"""Topics one peer may serve. At it: the peer is disconnected, with the reason in the log."""
IDS_MAX: Final = 1000
"""Ids in one Settled or Holding: so many fit one frame."""
MILLISECONDS_MAX: Final = 0xFFFF_FFFF
"""The longest time that a Request's field holds. At it: what is longer is cut."""

_KINDS: Final = frozenset(
    {
        *(layout.MESSAGE_REQUEST, layout.MESSAGE_RECEIPT, layout.MESSAGE_REPLY),
        *(layout.MESSAGE_RETURNED, layout.MESSAGE_CANCEL, layout.MESSAGE_SETTLED),
        *(layout.MESSAGE_SUBSCRIBE, layout.MESSAGE_HOLDING),
    }
)
_REQUEST: Final = Struct(layout.REQUEST)
_REQUEST_BYTES: Final = _REQUEST.size
_RECEIPT: Final = Struct(layout.RECEIPT)
_REPLY: Final = Struct(layout.REPLY)
_RETURNED: Final = Struct(layout.RETURNED)
_ID_LIST: Final = Struct(layout.ID_LIST)
_SUBSCRIPTION: Final = Struct(layout.SUBSCRIPTION)
_CHARGE: Final = Struct(">BLQ")
_SUBSCRIBE: Final = bytes([layout.MESSAGE_SUBSCRIBE])
_REQUEST_KIND: Final = bytes([layout.MESSAGE_REQUEST])
_OUTCOMES: Final[tuple[bytes, ...]] = tuple(
    [
        bytes([kind])
        for kind in (layout.MESSAGE_RECEIPT, layout.MESSAGE_REPLY, layout.MESSAGE_RETURNED)
    ]
)
SUBSCRIBE_BYTES_MAX: Final = _ID_LIST.size + TOPICS_MAX * (_SUBSCRIPTION.size + 2 * NAME_BYTES_MAX)
"""The largest Subscribe: TOPICS_MAX topics with the longest names."""

CALL: Final = layout.REQUEST_FLAG_CALL
FANOUT: Final = layout.REQUEST_FLAG_FANOUT
NOTIFICATION: Final = layout.REQUEST_FLAG_NOTIFICATION
REDELIVERED: Final = layout.REQUEST_FLAG_REDELIVERED
"""This request may have been handed out before."""
OUT_OF_TURN: Final = layout.REQUEST_FLAG_OUT_OF_TURN
"""It does not come as its queue handed it out: neither its place among the others nor the time it
has left says when it was made."""
IN_PLACE: Final = layout.REQUEST_FLAG_IN_PLACE
"""Though it is OUT_OF_TURN, it has kept its place among the others: it was never sent before, only
later than it was handed out."""
LOCAL: Final = layout.REQUEST_FLAG_LOCAL
"""It comes from a program on the host: not out of the broker's queue."""
RAW: Final = layout.REQUEST_FLAG_RAW
"""A call whose body has bytes behind its JSON, and whose result is bytes."""
FINAL: Final = layout.REPLY_FLAG_FINAL
FAILURE: Final = layout.REPLY_FLAG_FAILURE
RAW_REPLY: Final = layout.REPLY_FLAG_RAW
"""The result of a RAW call."""
_RAW_FOR_SEVERAL: Final = FANOUT | NOTIFICATION

NO_AGENT: Final = layout.REASON_NO_AGENT
AGENT_GONE: Final = layout.REASON_AGENT_GONE
BUSY: Final = layout.REASON_BUSY
REFUSED: Final = layout.REASON_REFUSED
EXPIRED: Final = layout.REASON_EXPIRED
NO_DOMAIN: Final = layout.REASON_NO_DOMAIN
RELEASED: Final = layout.REASON_RELEASED


_new_tuple: Final = tuple.__new__
"""Makes a NamedTuple in half the time that its own constructor takes."""
_pack_request: Final = _REQUEST.pack
_unpack_request: Final = _REQUEST.unpack_from
_pack_reply: Final = _REPLY.pack
_crc32: Final = crc32

NAMES_KNOWN_MAX: Final = 256
"""Whom requests were for is kept, by the bytes that said it: most are for the same few. At it: all
is forgotten, and learnt anew. It takes 1.1 MB at most, where all names are as long as they may
be; 90 KB where they are usual ones."""
_known_names: dict[bytes, "_Names"] = {}
_NAMES_AT: Final = _REQUEST_BYTES - 3
"""The names' lengths, a byte each, end the fixed fields."""

_RequestHead = tuple[int, int, bytes, int, int, int, int, int]
"""The fields of `layout.REQUEST`."""


class Topic(NamedTuple):
    """What an agent serves."""

    exchange: str
    name: str


GUEST_TOPIC: Final = Topic(DEFAULT_EXCHANGE, "vchan.guest")
"""What a guest's daemon serves itself, as it is announced. It serves the name in any exchange."""


class _Names:
    """Whom requests are for, as their bytes say it, and what that comes to.

    Attributes:
        end: Where these bytes end in a request's, and its body begins.
    """

    __slots__ = ("end", "exchange", "server", "stream", "target", "topic")

    def __init__(self, exchange: str, topic: str, server: str, end: int) -> None:
        self.exchange = exchange
        self.topic = topic
        self.server = server
        self.target = Topic(exchange, topic)
        self.stream = request_stream(topic)
        self.end = end


class Request(Value):
    """A call, cast, fanout or notification. Times are in milliseconds from now; 0: none.

    Attributes:
        encoded: Its bytes as they came, while nobody has asked for its body: what is passed on is
            neither taken apart nor put together. Otherwise b"".
    """

    __slots__ = (
        "_body",
        "_names",
        "encoded",
        "exchange",
        "flags",
        "id",
        "monitor_ms",
        "server",
        "timeout_ms",
        "topic",
    )
    __match_args__: Final = (
        *("id", "flags", "timeout_ms", "monitor_ms"),
        *("exchange", "topic", "server", "body"),
    )

    def __init__(
        self,
        id: bytes,
        flags: int,
        timeout_ms: int,
        monitor_ms: int,
        exchange: str,
        topic: str,
        server: str,
        body: bytes | None,
        encoded: bytes = b"",
        names: _Names | None = None,
    ) -> None:
        """`decode` gives no body, but `encoded` and `names`."""
        self.id = id
        self.flags = flags
        self.timeout_ms = timeout_ms
        self.monitor_ms = monitor_ms
        self.exchange = exchange
        self.topic = topic
        self.server = server
        self._body = body
        self.encoded = encoded
        self._names = names

    def fields(self) -> tuple[bytes, int, int, int, str, str, str, bytes]:
        head = (self.id, self.flags, self.timeout_ms, self.monitor_ms)
        return (*head, self.exchange, self.topic, self.server, self.body)

    def changed(
        self,
        *,
        id: bytes | None = None,
        flags: int | None = None,
        timeout_ms: int | None = None,
        monitor_ms: int | None = None,
        exchange: str | None = None,
        topic: str | None = None,
        server: str | None = None,
        body: bytes | None = None,
    ) -> "Request":
        """Another one, with these in place of its own."""
        is_renamed = exchange is not None or topic is not None or server is not None
        return Request(
            self.id if id is None else id,
            self.flags if flags is None else flags,
            self.timeout_ms if timeout_ms is None else timeout_ms,
            self.monitor_ms if monitor_ms is None else monitor_ms,
            self.exchange if exchange is None else exchange,
            self.topic if topic is None else topic,
            self.server if server is None else server,
            self.body if body is None else body,
            names=None if is_renamed else self._names,
        )

    @property
    def body(self) -> bytes:
        """JSON, or (RAW) JSON and bytes. It takes the place of `encoded`: a large one is kept
        once."""
        encoded = self.encoded  # looked at first: another thread may be about to empty it
        body = self._body
        if body is None:
            body = self._body = encoded[self.names.end :]
            self.encoded = b""
        return body

    @property
    def is_call(self) -> bool:
        """The requester waits for a Reply."""
        return self.flags & CALL != 0

    @property
    def target(self) -> Topic:
        """Whom it is for."""
        return self.names.target

    @property
    def stream(self) -> int:
        """The stream that it goes on."""
        return self.names.stream

    @property
    def names(self) -> _Names:
        """Whom it is for, and what that comes to."""
        names = self._names
        if names is None:
            names = self._names = _Names(self.exchange, self.topic, self.server, 0)
        return names


class Receipt(NamedTuple):
    """A cast's responder has taken responsibility for it."""

    id: bytes


class Reply(Value):
    """A call's result or failure, or (not FINAL) a heartbeat."""

    __slots__ = ("body", "flags", "id")
    __match_args__: Final = ("id", "flags", "body")

    def __init__(self, id: bytes, flags: int, body: bytes) -> None:
        self.id = id
        self.flags = flags
        self.body = body

    def fields(self) -> tuple[bytes, int, bytes]:
        return self.id, self.flags, self.body


class Returned(NamedTuple):
    """The request has ended without an answer; `outcomes` says by the reason if it may have run."""

    id: bytes
    reason: int
    text: str


class Cancel(NamedTuple):
    """Nobody waits for this request any more."""

    id: bytes


class Settled(NamedTuple):
    """These requests will never be sent again."""

    ids: tuple[bytes, ...]


class Subscribe(NamedTuple):
    """The whole set of topics the sender serves."""

    topics: tuple[Topic, ...]


class Holding(NamedTuple):
    """Requests the sender has taken before, on an earlier connection; and `charge`s."""

    ids: tuple[bytes, ...]


class BadMessage(NamedTuple):
    """Bytes that are no message, and why."""

    reason: str


class Unknown(NamedTuple):
    """A message of a kind that is not known here: a newer peer's. No fault of its sender's."""

    kind: int
    size: int


Message = Request | Receipt | Reply | Returned | Cancel | Settled | Subscribe | Holding


Queue = tuple[str, int]
"""A topic's name, and FANOUT, LOCAL, both or neither."""
QUEUE_KINDS: Final = (0, FANOUT, LOCAL, FANOUT | LOCAL)


def milliseconds(seconds: float | None) -> int:
    """A time as a request has it: at least 1, for 0 says that there is none."""
    if seconds is None:
        return 0
    wanted_ms = seconds * 1000
    if wanted_ms < 1:
        return 1
    return int(wanted_ms) if wanted_ms < MILLISECONDS_MAX else MILLISECONDS_MAX


def deadline_of(request: Request, now_s: float) -> float | None:
    """When the time of a request that came now is over; None: it has none."""
    return now_s + request.timeout_ms / 1000 if request.timeout_ms else None


def with_time_left(request: Request, deadline_s: float | None, now_s: float) -> Request:
    """A request, with the time that it has left until its deadline."""
    if deadline_s is None:
        return request
    return request.changed(timeout_ms=milliseconds(deadline_s - now_s))


def encode_request(request: Request) -> bytes:
    """Encode; names are at most NAME_BYTES_MAX bytes of UTF-8, times under 2**32 ms."""
    encoded = request.encoded
    if encoded:
        return encoded
    exchange = request.exchange.encode()
    topic = request.topic.encode()
    server = request.server.encode()
    head = _pack_request(
        layout.MESSAGE_REQUEST,
        request.flags,
        request.id,
        request.timeout_ms,
        request.monitor_ms,
        len(exchange),
        len(topic),
        len(server),
    )
    return b"".join((head, exchange, topic, server, request.body))


def encode_reply(request_id: bytes, flags: int, body: bytes) -> bytes:
    """Encode a Reply."""
    return _pack_reply(layout.MESSAGE_REPLY, flags, request_id) + body


def encode_receipt(request_id: bytes) -> bytes:
    """Encode a Receipt."""
    return _RECEIPT.pack(layout.MESSAGE_RECEIPT, request_id)


def encode(message: Message) -> bytes:
    """The bytes of a message."""
    match message:
        case Request():
            return encode_request(message)
        case Reply():
            return encode_reply(message.id, message.flags, message.body)
        case Receipt():
            return encode_receipt(message.id)
        case Returned():
            text = message.text.encode()[:TEXT_BYTES_MAX].decode("utf-8", "ignore").encode()
            return _RETURNED.pack(layout.MESSAGE_RETURNED, message.reason, message.id) + text
        case Cancel():
            return _RECEIPT.pack(layout.MESSAGE_CANCEL, message.id)
        case Settled():
            return _encode_ids(layout.MESSAGE_SETTLED, message.ids)
        case Holding():
            return _encode_ids(layout.MESSAGE_HOLDING, message.ids)
        case _:
            return _encode_subscribe(message.topics)


def _encode_ids(kind: int, ids: tuple[bytes, ...]) -> bytes:
    assert len(ids) <= IDS_MAX
    listed = b"".join(ids)
    assert len(listed) == len(ids) * ID_BYTES, "the peer counts by that"
    return _ID_LIST.pack(kind, len(ids)) + listed


def _encode_subscribe(topics: tuple[Topic, ...]) -> bytes:
    parts = [_ID_LIST.pack(layout.MESSAGE_SUBSCRIBE, len(topics))]
    for topic in topics:
        exchange, name = topic.exchange.encode(), topic.name.encode()
        parts += (_SUBSCRIPTION.pack(len(exchange), len(name)), exchange, name)
    return b"".join(parts)


def decode(data: bytes) -> Message | BadMessage | Unknown:
    """The message in `data`, which has one byte at least."""
    kind = data[0] if data else 0
    try:
        if kind == layout.MESSAGE_REQUEST:
            return _decode_request(data)
        if kind == layout.MESSAGE_REPLY and len(data) >= _REPLY.size:
            return Reply(data[2:18], data[1], data[18:])
        if kind == layout.MESSAGE_RECEIPT and len(data) == _RECEIPT.size:
            return _new_tuple(Receipt, (data[1:],))
        if kind == layout.MESSAGE_RETURNED and len(data) >= _RETURNED.size:
            text = data[18 : 18 + TEXT_BYTES_MAX].decode("utf-8", "replace")
            return Returned(data[2:18], data[1], text)
        if kind == layout.MESSAGE_CANCEL and len(data) == _RECEIPT.size:
            return Cancel(data[1:])
        if kind == layout.MESSAGE_SETTLED:
            ids = _decode_ids(data)
            return Settled(ids) if ids is not None else BadMessage("Settled: wrong length")
        if kind == layout.MESSAGE_HOLDING:
            ids = _decode_ids(data)
            return Holding(ids) if ids is not None else BadMessage("Holding: wrong length")
        if kind == layout.MESSAGE_SUBSCRIBE:
            return _decode_subscribe(data)
    except UnicodeDecodeError:
        return BadMessage(f"kind {kind}: a name is not UTF-8")
    if kind not in _KINDS:
        return Unknown(kind, len(data))
    return BadMessage(f"kind {kind}, {len(data)} bytes: no such message")


def _decode_request(data: bytes) -> Request | BadMessage:
    if len(data) < _REQUEST.size:
        return BadMessage("Request: too short")
    head: _RequestHead = _unpack_request(data)
    _, flags, request_id, timeout_ms, monitor_ms, a, b, c = head
    if flags & RAW and flags & _RAW_FOR_SEVERAL and not flags & CALL:
        return BadMessage("Request: RAW, and neither a call nor a cast to one")
    end = _REQUEST_BYTES + a + b + c
    if len(data) < end:
        return BadMessage("Request: shorter than its names")
    said = data[_NAMES_AT:end]
    names = _known_names.get(said)
    if names is None:
        names = _learn_names(said, a, b)
    return Request(
        request_id,
        flags,
        timeout_ms,
        monitor_ms,
        names.exchange,
        names.topic,
        names.server,
        None,
        data,
        names,
    )


def _learn_names(said: bytes, exchange_bytes: int, topic_bytes: int) -> _Names:
    """Of what is said between a request's fixed fields and its body, their lengths first.

    Raises:
        UnicodeDecodeError: A name is not UTF-8.
    """
    start = _REQUEST_BYTES - _NAMES_AT
    middle = start + exchange_bytes
    stop = middle + topic_bytes
    exchange, topic = said[start:middle].decode(), said[middle:stop].decode()
    names = _Names(exchange, topic, said[stop:].decode(), _NAMES_AT + len(said))
    if len(_known_names) >= NAMES_KNOWN_MAX:
        _known_names.clear()
    _known_names[said] = names
    return names


def _decode_ids(data: bytes) -> tuple[bytes, ...] | None:
    if len(data) < _ID_LIST.size:
        return None
    _, count = _ID_LIST.unpack_from(data)
    start = _ID_LIST.size
    if count > IDS_MAX or len(data) != start + count * ID_BYTES:
        return None
    return tuple([data[at : at + ID_BYTES] for at in range(start, len(data), ID_BYTES)])


def is_request(data: bytes) -> bool:
    """Whether it may be a Request, without a look into it."""
    return data[:1] == _REQUEST_KIND


def is_outcome(data: bytes) -> bool:
    """Whether it may be a Receipt, Reply or Returned, without a look into it."""
    return data[:1] in _OUTCOMES


def is_subscribe(data: bytes) -> bool:
    """Whether it may be a Subscribe, without a look into it."""
    return data[:1] == _SUBSCRIBE and len(data) <= SUBSCRIBE_BYTES_MAX


def _decode_subscribe(data: bytes) -> Subscribe | BadMessage:
    if len(data) < _ID_LIST.size:
        return BadMessage("Subscribe: too short")
    _, count = _ID_LIST.unpack_from(data)
    if count > TOPICS_MAX:
        return BadMessage(f"Subscribe: {count} topics, TOPICS_MAX is {TOPICS_MAX}")
    topics = []
    at = _ID_LIST.size
    for _ in range(count):
        if len(data) < at + _SUBSCRIPTION.size:
            return BadMessage("Subscribe: shorter than its topics")
        exchange_length, name_length = _SUBSCRIPTION.unpack_from(data, at)
        at += _SUBSCRIPTION.size
        stop = at + exchange_length + name_length
        if len(data) < stop or not name_length:
            return BadMessage("Subscribe: shorter than its topics, or one without a name")
        middle = at + exchange_length
        topics.append(Topic(data[at:middle].decode(), data[middle:stop].decode()))
        at = stop
    if at != len(data):
        return BadMessage("Subscribe: longer than its topics")
    return Subscribe(tuple(topics))


def request_stream(topic: str) -> int:
    """The stream for requests to `topic`: what goes to one target stays in order."""
    return 1 + _crc32(topic.encode()) % (STREAMS - 1)


def reply_stream(request_id: bytes) -> int:
    """The stream for what answers a call: a large answer delays no other."""
    return 1 + request_id[0] % (STREAMS - 1)


def queue_of(request: Request) -> Queue:
    """Where it has its place in an order: exchanges share the queues of a topic."""
    return request.topic, request.flags & (FANOUT | LOCAL)


def charge(queue: Queue) -> bytes:
    """Stands among ids for all requests of a queue: what has been handed out of it and is not
    settled is held by one agent, or by nobody at all. A daemon says so to its agent, and the agent
    to the next daemon."""
    topic, kind = queue
    name = topic.encode()
    return b"all" + _CHARGE.pack(kind, crc32(name), len(name))


def is_charge(request_id: bytes) -> bool:
    """Whether it is a charge: a random id is none."""
    return request_id[:3] == b"all" and request_id[8:15] == bytes(7)


def id_chunks(ids: Iterable[bytes]) -> list[tuple[bytes, ...]]:
    """Ids in lots that fit one message."""
    everything = tuple(ids)
    return [everything[at : at + IDS_MAX] for at in range(0, len(everything), IDS_MAX)]
