"""What comes in a VM's own queue: answers to its requests, and notes from host to host.

Rules of this file
1. Pure: no I/O, no clock, no randomness.
2. Whatever the bytes, reading them raises `EnvelopeError` and nothing else.

An answer is a service's reply, as `downward_envelope` has it. The other two are vchan's own: a note
says what a host that served the VM before has published, for the one that serves it now.

    arrival   {"vchan.arrival": stay}
    note      {"vchan.note": [stays], "taken": [ids], "calls": [ids], "gone": [ids], "doubt": [ids],
               "unclear": [stays], "waited_ms": [numbers, as many], "is_last": true or false}

A stay is a host's time with the VM: a name that no other has. `vm.handover` explains.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Mapping
from typing import Any, Final, NamedTuple

from vchan.errors import LimitExceeded
from vchan.host.oslo_wire.envelope import (
    ID_PATTERN,
    EnvelopeError,
    bounded_json,
    encode_json,
    open_envelope,
)
from vchan.rpc.bodies import encode_failure
from vchan.rpc.messages import NAME_BYTES_MAX
from vchan.session import MESSAGE_BYTES_MAX

VM_QUEUE_PREFIX: Final = "vchan_vm_"
ARRIVAL_KEY: Final = "vchan.arrival"
NOTE_KEY: Final = "vchan.note"
NOTE_IDS_MAX: Final = 20_000
"""Ids in a note: more than a host remembers of a VM."""
STAYS_MAX: Final = 64
"""Stays in a note."""
WAITED_MS_MAX: Final = 3_600_000
"""How long a note may say that a request has waited: as long as a call may take."""


def own_queue(vm: str) -> str:
    """The VM's own queue, for answers to its requests and for notes between hosts that serve it."""
    return VM_QUEUE_PREFIX + vm


class Answer(NamedTuple):
    """What a service says to a call. Not `ending`: it still works on it."""

    id: bytes
    ending: bool
    failed: bool
    body: bytes


class Arrival(NamedTuple):
    """A host serves the VM from now on."""

    stay: str


class Note(NamedTuple):
    """What a host knows to have been published when the VM leaves it.

    stays: those that it speaks for, all of one host. taken: casts. calls: calls, whose answers
    come, or are here. gone: calls that have no answer any more. doubt: requests that may have been
    published. unclear: stays before it of which it knows nothing. waited_ms: how long each of these
    has been waited for, while the VM was with a host. is_last: no better one follows, which knows
    what has become of those in doubt.
    """

    stays: tuple[str, ...]
    taken: tuple[bytes, ...] = ()
    calls: tuple[bytes, ...] = ()
    gone: tuple[bytes, ...] = ()
    doubt: tuple[bytes, ...] = ()
    unclear: tuple[str, ...] = ()
    waited_ms: tuple[int, ...] = ()
    is_last: bool = True


def encode_arrival(arrival: Arrival) -> bytes:
    """For the VM's own queue."""
    return encode_json({ARRIVAL_KEY: arrival.stay})


def encode_note(note: Note) -> bytes:
    """For the VM's own queue."""
    lists = {name: [each.hex() for each in getattr(note, name)] for name in _LISTS}
    stays, unclear = note.stays[-STAYS_MAX:], note.unclear[-STAYS_MAX:]
    waited_ms = note.waited_ms[-STAYS_MAX:]
    further = {"unclear": unclear, "waited_ms": waited_ms, "is_last": note.is_last}
    return encode_json({NOTE_KEY: stays, **lists, **further})


_LISTS: Final = ("taken", "calls", "gone", "doubt")


def read_mail(body: bytes) -> Answer | Arrival | Note:
    """A message of a VM's own queue. Its sender is trusted as far as the broker's accounts are.

    Raises:
        EnvelopeError: It is none of them.
    """
    value = open_envelope(body)
    if ARRIVAL_KEY in value:
        return Arrival(_stay(value[ARRIVAL_KEY]))
    if NOTE_KEY in value:
        taken, calls, gone, doubt = (_ids(value.get(name)) for name in _LISTS)
        stays, unclear = _stays(value[NOTE_KEY]), _stays(value.get("unclear"))
        waited_ms = _numbers(value.get("waited_ms", [0] * len(unclear)), len(unclear))
        is_last = value.get("is_last", not doubt) is True
        return Note(stays, taken, calls, gone, doubt, unclear, waited_ms, is_last)
    return _answer(value)


SLICE_BYTES: Final = 128 * 1024
"""Of a large answer, read at a time: half a millisecond. At it: the VM's share of time and bytes
decides when the next slice is read."""
_ESCAPE_BYTES: Final = 6
"""The longest escape of JSON's: \\uXXXX."""
_LARGE_HEAD: Final = b'{"oslo.version": "2.0", "oslo.message": "{\\"result\\": '
_LARGE_TAIL: Final = re.compile(
    rb', \\"failure\\": null, \\"ending\\": true, \\"_msg_id\\": \\"([0-9a-f]{32})\\"'
    rb'(?:, \\"_unique_id\\": \\"[0-9a-f]{32}\\")?}"}'
)
_TAIL_BYTES_MAX: Final = 256
"""The end of a large answer, in which its id stands."""


def reading(body: bytes) -> Generator[None, None, Answer | Arrival | Note]:
    """`read_mail` in steps, each of which takes about a millisecond, for what stock services send.

    The result in a large answer is not parsed, but cut out: the guest's agent parses it. What comes
    before and behind it is what oslo.messaging's servers write, byte for byte, so it begins and
    ends there if the whole is JSON. Anything else is read in one step.

    Raises:
        EnvelopeError: It is none of them.
    """
    message = None
    if len(body) > SLICE_BYTES:
        message = yield from _read_large(body)
    return message if message is not None else read_mail(body)


def large_answer_id(body: bytes) -> bytes | None:
    """Which request a stock service's large answer is for, by its last bytes. None: it must be read
    to know, or that is quickly done."""
    if len(body) <= SLICE_BYTES:
        return None
    tail = _LARGE_TAIL.search(body, len(body) - _TAIL_BYTES_MAX)
    return bytes.fromhex(tail[1].decode()) if tail is not None else None


def _read_large(body: bytes) -> Generator[None, None, Answer | None]:
    """None: it must be read as a whole."""
    tail_at = len(body) - _TAIL_BYTES_MAX
    tail = _LARGE_TAIL.search(body, tail_at)
    if not body.startswith(_LARGE_HEAD) or tail is None or tail.end() != len(body):
        return None
    request_id = bytes.fromhex(tail[1].decode())
    parts: list[bytes] = []
    size, at = 0, len(_LARGE_HEAD)
    while at < tail.start():
        until = min(_end_of_slice(body, at), tail.start())
        try:
            parts.append(json.loads(b'"%b"' % body[at:until]).encode())
        except ValueError:  # no JSON, or a lone surrogate
            return None
        size += len(parts[-1])
        if size > MESSAGE_BYTES_MAX:
            problem = LimitExceeded("the answer", size, MESSAGE_BYTES_MAX, "MESSAGE_BYTES_MAX")
            return Answer(request_id, True, True, encode_failure("LimitExceeded", str(problem)))
        at = until
        yield
    return Answer(request_id, True, False, b"".join(parts))


def _end_of_slice(body: bytes, at: int) -> int:
    """Where a slice that begins at `at` may end: within no escape, and no character of UTF-8."""
    end = min(at + SLICE_BYTES, len(body))
    while end < len(body) and body[end] & 0xC0 == 0x80:
        end -= 1
    backslash = body.rfind(b"\\", max(at, end - _ESCAPE_BYTES), end)
    if backslash < 0:
        return end
    run = body[at : backslash + 1]
    is_begun = (len(run) - len(run.rstrip(b"\\"))) % 2  # else they are pairs
    return backslash if is_begun else backslash + 1


def _stays(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > STAYS_MAX:
        raise EnvelopeError("a note's stays are not a list, or too many")
    return tuple(map(_stay, value))


def _numbers(value: object, count: int) -> tuple[int, ...]:
    """So many; none from a host that does not say them: zeros."""
    if not isinstance(value, list) or len(value) not in (0, count):
        raise EnvelopeError("a note's waited_ms are not a list, or not as many as its unclear")
    if not all(type(each) is int and 0 <= each <= WAITED_MS_MAX for each in value):
        raise EnvelopeError("a note's waited_ms are not all milliseconds")
    return tuple(value) or (0,) * count


def _stay(value: object) -> str:
    if not isinstance(value, str) or len(value) > NAME_BYTES_MAX:
        raise EnvelopeError("a stay is not a name")
    return value


def _ids(value: object) -> tuple[bytes, ...]:
    if not isinstance(value, list) or len(value) > NOTE_IDS_MAX:
        raise EnvelopeError("a note's ids are not a list, or too many")
    if not all(isinstance(each, str) and ID_PATTERN.fullmatch(each) for each in value):
        raise EnvelopeError("a note's ids are not all 32 hex digits")
    return tuple(bytes.fromhex(each) for each in value)


def _answer(value: Mapping[str, Any]) -> Answer:
    msg_id = value.get("_msg_id")
    if not isinstance(msg_id, str) or not ID_PATTERN.fullmatch(msg_id):
        raise EnvelopeError("an answer to none of a guest's requests: _msg_id is not 32 hex digits")
    request_id = bytes.fromhex(msg_id)
    failure = value.get("failure")
    if failure is not None:
        return Answer(request_id, True, True, _failure_for_guest(failure))
    ending = bool(value.get("ending", True))
    return Answer(request_id, ending, False, encode_json(value.get("result")))


def _failure_for_guest(failure: object) -> bytes:
    """A service's exception, less its traceback: that tells of the control plane's insides."""
    if isinstance(failure, str):
        failure = bounded_json(failure.encode("utf-8", "surrogatepass"), "an answer's failure")
    if not isinstance(failure, dict):
        raise EnvelopeError("an answer's failure is not an object")
    return encode_json({**failure, "tb": []})
