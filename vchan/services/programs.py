"""What is said to the services exec and shell inside one byte stream: one program, from its start
to its end, or a part of that. Sans I/O.

The operator's command says first what it wants (Start, Attach, ListPrograms), and gets Running,
ProgramList or Refusal. Then Input and Output flow, each way within what the other end has room for:

    Room       input up to this offset may be sent: so signals never wait behind input
    Written    output up to this offset has reached who reads it: it never comes again; what is not
               yet written is kept for who attaches next, and beyond OUTPUT_BYTES_MAX of it nothing
               more is read from the program

    `ProgramDialogue` is the command's side: what may come when, and how much.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from vchan.services.framing import (
    PAYLOAD_BYTES_MAX,
    BadFrame,
    FrameReader,
    ServiceFrame,
    encode_frame,
)

OUTPUT_BYTES_MAX: Final = 256 * 1024
"""Of each of a program's outputs, read from it and not written where it is to be. At it: no more is
read, and the program waits, also while nobody is attached: nothing is left out."""
INPUT_BYTES_MAX: Final = 64 * 1024
"""Of a program's input, sent and not yet read by it. At it: the command reads no more of its
own."""
ARGUMENTS_MAX: Final = 1024
"""Words of a command. At it: the command is refused before it is sent; xargs makes several."""
TEXT_CHARS_MAX: Final = 4096
"""Of a text in a message, beside the words of a command. At it: the message is refused."""
TERMINAL_CELLS_MAX: Final = 10_000
"""Rows, or columns, of a terminal."""
OUTPUT: Final = 1
ERROR: Final = 2
SIGNALS: Final = frozenset({1, 2, 3, 9, 10, 12, 15, 18, 19, 20})
"""What may be sent to a program: HUP, INT, QUIT, KILL, USR1, USR2, TERM, CONT, STOP, TSTP."""
SIGNAL_MAX: Final = 64
"""The highest number of a signal that a program may have ended by."""


class Size(NamedTuple):
    """A terminal's."""

    rows: int
    columns: int


class TerminalWanted(NamedTuple):
    """The terminal that a program is to have.

    Attributes:
        type: As TERM has it.
    """

    type: str
    size: Size


# ---------------------------------------------------------------- the command says


class Start(NamedTuple):
    """Start a program.

    Attributes:
        argv: Its words; none: the shell that the guest's owner names.
        directory, user: "": as the guest's owner has it.
    """

    argv: tuple[str, ...] = ()
    terminal: TerminalWanted | None = None
    directory: str = ""
    environment: Mapping[str, str] = {}
    user: str = ""


class AttachTo(NamedTuple):
    """Go on with a program. Whoever had it is told, and has it no more.

    Attributes:
        id: "": the only one to which nobody is attached.
    """

    id: str
    size: Size | None = None


class ListPrograms(NamedTuple):
    """Say which there are."""


class Input(NamedTuple):
    """Bytes for the program to read."""

    data: bytes


class InputEnd(NamedTuple):
    """There are no more."""


class Resized(NamedTuple):
    """The operator's terminal has another size."""

    size: Size


class SendSignal(NamedTuple):
    """Send it a signal."""

    number: int


class Written(NamedTuple):
    """Output below this offset has been written."""

    which: int
    offset: int


class Leave(NamedTuple):
    """The command ends, the program goes on. `Left` is the answer: all that was said is heeded."""


class Forget(NamedTuple):
    """The program's end was heard."""


# ---------------------------------------------------------------- the guest says


class Running(NamedTuple):
    """The program, and how far it is.

    Attributes:
        input: Offset of the next byte of Input.
        outputs: Offsets of the next byte of each output.
        detached_s: It goes on so long when nobody is attached.
    """

    id: str
    has_terminal: bool
    input: int
    outputs: tuple[int, int]
    detached_s: float


class OutputPart(NamedTuple):
    """Bytes that the program has written to OUTPUT or ERROR."""

    which: int
    data: bytes


class Room(NamedTuple):
    """Input below this offset may be sent."""

    offset: int


class ProgramEnd(NamedTuple):
    """It has ended, and this is behind all of its output.

    Attributes:
        status: Its exit status, if it had one.
        signal: What ended it, if that did.
        text: Why, if it was ended here.
    """

    status: int | None
    signal: int | None
    text: str = ""


class Refusal(NamedTuple):
    """The stream is over, and this is why."""

    problem: str


class ProgramList(NamedTuple):
    """The programs of this service."""

    rows: tuple[Mapping[str, Any], ...]


class Left(NamedTuple):
    """See `Leave`."""


CommandWord = (
    Start
    | AttachTo
    | ListPrograms
    | Input
    | InputEnd
    | Resized
    | SendSignal
    | Written
    | Leave
    | Forget
)
GuestWord = Running | OutputPart | Room | ProgramEnd | Refusal | ProgramList | Left

_ASKED: Final[Mapping[int, type[CommandWord]]] = {
    1: Start,
    2: AttachTo,
    3: ListPrograms,
    4: Input,
    5: InputEnd,
    6: Resized,
    7: SendSignal,
    8: Written,
    9: Leave,
    10: Forget,
}
_TOLD: Final[Mapping[int, type[GuestWord]]] = {
    65: Running,
    66: OutputPart,
    67: Room,
    68: ProgramEnd,
    69: Refusal,
    70: ProgramList,
    71: Left,
}
_KINDS: Final = {made: kind for kind, made in {**_ASKED, **_TOLD}.items()}

_SIZE: Final = struct.Struct(">HH")
_KEY: Final = re.compile("[0-9A-Za-z]{1,64}")
_OFFSET: Final = struct.Struct(">Q")
_WRITTEN: Final = struct.Struct(">BQ")
DATA_BYTES_MAX: Final = 16 * 1024
"""Of input or output in one message. At it: more go in more messages."""


# ---------------------------------------------------------------- writing


def encode_program(message: CommandWord | GuestWord) -> bytes:
    """A message's bytes."""
    return encode_frame(_KINDS[type(message)], _payload(message))


def _payload(message: CommandWord | GuestWord) -> bytes:
    match message:
        case Input(data):
            return data
        case OutputPart(which, data):
            return bytes([which]) + data
        case Resized(size):
            return _SIZE.pack(*size)
        case SendSignal(number):
            return bytes([number])
        case Written(which, offset):
            return _WRITTEN.pack(which, offset)
        case Room(offset):
            return _OFFSET.pack(offset)
        case ListPrograms() | InputEnd() | Leave() | Forget() | Left():
            return b""
        case Start():
            fields = message._asdict()
            if message.terminal is not None:
                fields["terminal"] = message.terminal._asdict()
            return _json(fields)
        case _:
            return _json(message._asdict())


def _json(fields: Mapping[str, Any]) -> bytes:
    text = json.dumps(fields, separators=(",", ":"))
    return text.encode("ascii")


def problem_of(message: CommandWord) -> str:
    """Why a guest would take it for none of a command's; "" if it would not."""
    payload = _payload(message)
    if len(payload) > PAYLOAD_BYTES_MAX:
        return f"too long: {len(payload)} bytes, at most {PAYLOAD_BYTES_MAX} (PAYLOAD_BYTES_MAX)"
    try:
        decode_asked(ServiceFrame(_KINDS[type(message)], payload))
    except BadFrame as problem:
        return str(problem)
    return ""


# ---------------------------------------------------------------- reading


def decode_asked(frame: ServiceFrame) -> CommandWord:
    """A message of a command's.

    Raises:
        BadFrame: It is none.
    """
    kind, payload = frame
    match _ASKED.get(kind):
        case made if made is Start:
            return _start(_Fields(payload))
        case made if made is AttachTo:
            fields = _Fields(payload)
            return AttachTo(fields.text("id"), fields.size("size"))
        case made if made is Input:
            return Input(_data(payload))
        case made if made is Resized:
            return Resized(_checked_size(*_unpack(_SIZE, payload)))
        case made if made is SendSignal:
            if len(payload) != 1 or payload[0] not in SIGNALS:
                raise BadFrame("no signal that may be sent")
            return SendSignal(payload[0])
        case made if made is Written:
            which, offset = _unpack(_WRITTEN, payload)
            if which not in (OUTPUT, ERROR):
                raise BadFrame(f"a program has no output {which}")
            return Written(which, offset)
        case None:
            raise BadFrame(f"a message of kind {kind}: of a later release, or none of a command's")
        case made:
            _require_empty(payload)
            assert made in (ListPrograms, InputEnd, Leave, Forget)
            return made()


def decode_told(frame: ServiceFrame) -> GuestWord:
    """A message of a guest's.

    Raises:
        BadFrame: It is none.
    """
    kind, payload = frame
    match _TOLD.get(kind):
        case made if made is Running:
            fields = _Fields(payload)
            outputs = fields.numbers("outputs", 2)
            return Running(
                _key(fields),
                fields.boolean("has_terminal"),
                fields.number("input"),
                (outputs[0], outputs[1]),
                fields.seconds("detached_s"),
            )
        case made if made is OutputPart:
            if len(payload) < 2 or payload[0] not in (OUTPUT, ERROR):
                raise BadFrame("output without bytes, or of no output")
            return OutputPart(payload[0], _data(payload[1:]))
        case made if made is Room:
            return Room(_unpack(_OFFSET, payload)[0])
        case made if made is ProgramEnd:
            return _program_end(_Fields(payload))
        case made if made is Refusal:
            return Refusal(_Fields(payload).text("problem"))
        case made if made is ProgramList:
            return ProgramList(_Fields(payload).rows("rows"))
        case None:
            raise BadFrame(f"a message of kind {kind}: of a later release, or none of a guest's")
        case _:
            _require_empty(payload)
            return Left()


def _key(fields: _Fields) -> str:
    """A program's id. People paste it into a shell, after `--attach`."""
    key = fields.text("id")
    if not _KEY.fullmatch(key):
        raise BadFrame("id: expected letters and digits, 64 at most")
    return key


def _unpack(layout: struct.Struct, payload: bytes) -> tuple[Any, ...]:
    if len(payload) != layout.size:
        raise BadFrame(f"{len(payload)} bytes where {layout.size} are expected")
    return layout.unpack(payload)


def _require_empty(payload: bytes) -> None:
    if payload:
        raise BadFrame("bytes where none are expected")


def _data(payload: bytes) -> bytes:
    if not 0 < len(payload) <= DATA_BYTES_MAX:
        raise BadFrame(f"{len(payload)} bytes at once; expected 1 to {DATA_BYTES_MAX}")
    return payload


def _checked_size(rows: Any, columns: Any) -> Size:
    for cells in (rows, columns):
        if not _is_number(cells) or not 0 < cells <= TERMINAL_CELLS_MAX:
            raise BadFrame(f"a terminal of {rows!r} rows and {columns!r} columns"[:200])
    return Size(rows, columns)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _start(fields: _Fields) -> Start:
    argv = fields.take("argv", list)
    if len(argv) > ARGUMENTS_MAX or not all(isinstance(word, str) for word in argv):
        raise BadFrame(f"argv: expected at most {ARGUMENTS_MAX} texts (ARGUMENTS_MAX)")
    environment = fields.take("environment", dict)
    if not all(isinstance(value, str) for value in environment.values()):
        raise BadFrame("environment: expected texts")
    terminal = None
    if fields.take("terminal", (dict, type(None))) is not None:
        inner = _Fields(b"", fields.take("terminal", dict))
        size = inner.size("size")
        if size is None:
            raise BadFrame("terminal: has no size")
        terminal = TerminalWanted(inner.text("type"), size)
    return Start(tuple(argv), terminal, fields.text("directory"), environment, fields.text("user"))


def _program_end(fields: _Fields) -> ProgramEnd:
    status, number = (
        fields.take("status", (int, type(None))),
        fields.take("signal", (int, type(None))),
    )
    is_status = status is not None and _is_number(status) and 0 <= status <= 255
    is_signal = number is not None and _is_number(number) and 0 < number <= SIGNAL_MAX
    if (status is not None and not is_status) or (number is not None and not is_signal):
        raise BadFrame("an end with a status or signal that there is not")
    return ProgramEnd(status, number, fields.text("text"))


class _Fields:
    """A payload of JSON, field by field."""

    def __init__(self, payload: bytes, fields: Any = None) -> None:
        if fields is None:
            try:
                fields = json.loads(payload)
            except (ValueError, RecursionError):
                raise BadFrame("is no JSON") from None
        if not isinstance(fields, dict):
            raise BadFrame("is no JSON object")
        self._fields: dict[str, Any] = fields

    def take(self, name: str, kind: type[Any] | tuple[type[Any], ...]) -> Any:
        """A field of that type."""
        value = self._fields.get(name)
        if not isinstance(value, kind):
            raise BadFrame(f"{name}: is missing, or of another type")
        return value

    def text(self, name: str) -> str:
        """A text of at most TEXT_CHARS_MAX characters."""
        value: str = self.take(name, str)
        if len(value) > TEXT_CHARS_MAX:
            raise BadFrame(f"{name}: over {TEXT_CHARS_MAX} characters (TEXT_CHARS_MAX)")
        return value

    def boolean(self, name: str) -> bool:
        """true or false."""
        return bool(self.take(name, bool))

    def number(self, name: str) -> int:
        """An offset."""
        return self._offset(name, self.take(name, int))

    def numbers(self, name: str, count: int) -> list[int]:
        """So many offsets."""
        values = self.take(name, list)
        if len(values) != count:
            raise BadFrame(f"{name}: expected {count} numbers")
        return [self._offset(name, value) for value in values]

    @staticmethod
    def _offset(name: str, value: Any) -> int:
        if not _is_number(value) or not 0 <= value < 1 << 63:
            raise BadFrame(f"{name}: is no offset")
        return int(value)

    def seconds(self, name: str) -> float:
        """A time."""
        value = self.take(name, (int, float))
        if isinstance(value, bool) or not 0 <= value < 1e9:
            raise BadFrame(f"{name}: is no time")
        return float(value)

    def size(self, name: str) -> Size | None:
        """A terminal's, or none."""
        value = self.take(name, (list, type(None)))
        if value is None:
            return None
        if len(value) != 2:
            raise BadFrame(f"{name}: expected rows and columns")
        return _checked_size(*value)

    def rows(self, name: str) -> tuple[Mapping[str, Any], ...]:
        """A list of objects."""
        value = self.take(name, list)
        if not all(isinstance(row, dict) for row in value):
            raise BadFrame(f"{name}: expected objects")
        return tuple(value)


# ---------------------------------------------------------------- the command's side


class ProgramDialogue:
    """What a guest may say to a command, and when. What it holds is bounded by what the command has
    not written: OUTPUT_BYTES_MAX of each output.
    """

    def __init__(self) -> None:
        self.running: Running | None = None
        self.is_over = False
        """The last word was said: ProgramEnd, Refusal, ProgramList or Left."""
        self._reader = FrameReader()
        self._received = [0, 0]
        self._written = [0, 0]
        self._sent = 0
        self._room = 0

    @property
    def room(self) -> int:
        """Bytes of input that may be sent."""
        return self._room - self._sent

    @property
    def unwritten(self) -> int:
        """Bytes of output that were received and are not written."""
        return sum(self._received) - sum(self._written)

    def receive(self, data: bytes) -> list[GuestWord]:
        """Take bytes of the guest's.

        Raises:
            BadFrame: It has said what may not be said here. What was said before is void, too.
        """
        told = [decode_told(frame) for frame in self._reader.feed(data)]
        for message in told:
            self._heed(message)
        return told

    def _heed(self, message: GuestWord) -> None:
        if self.is_over:
            raise BadFrame(f"{type(message).__name__} behind the last word")
        match message:
            case Running():
                if self.running is not None:
                    raise BadFrame("the program runs already")
                self.running = message
                self._sent = self._room = message.input
                self._received = list(message.outputs)
                self._written = list(message.outputs)
            case Refusal() | ProgramList():
                self.is_over = True
            case _ if self.running is None:
                raise BadFrame(f"{type(message).__name__} of a program that does not run")
            case OutputPart(which, data):
                self._received[which - 1] += len(data)
                if self._received[which - 1] - self._written[which - 1] > OUTPUT_BYTES_MAX:
                    raise BadFrame("more output than there is room for")
            case Room(offset):
                if not self._room <= offset <= self._sent + INPUT_BYTES_MAX:
                    raise BadFrame("room that there was already, or more than there can be")
                self._room = offset
            case ProgramEnd() | Left():
                self.is_over = True

    def sends(self, size: int) -> None:
        """So many bytes of input are sent."""
        assert size <= self.room
        self._sent += size

    def writes(self, which: int, size: int) -> Written:
        """So many bytes of output were written: what is to be said of it."""
        self._written[which - 1] += size
        assert self._written[which - 1] <= self._received[which - 1]
        return Written(which, self._written[which - 1])
