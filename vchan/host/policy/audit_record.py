"""What stands in the audit log: one decision, one line; and how many lines one VM gets.

Rules of this file
1. Pure: no I/O, no clock. The time of day comes in as text.
2. What a guest chose is cut to FIELD_CHARS_MAX and escaped to printable ASCII: it can neither end a
   line nor steer a terminal. Bodies never come here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from vchan.host.policy.rules import Ask, Effect, Facts, Kind
from vchan.host.policy.token_bucket import TokenBucket

FIELD_CHARS_MAX: Final = 255
"""As long as AMQP's names may be; a method's name might be longer."""
REASON_CHARS_MAX: Final = 500
"""A line's reason: the rest is cut, a line stays readable."""
LINE_BYTES_MAX: Final = 32 * 1024
"""No line is longer: an astral character takes twelve bytes, and journald takes 48 KiB."""
BURST_S: Final = 5.0
"""A VM that was quiet may have so many seconds' lines at once: agents subscribe to all their topics
when they start."""

REFUSED: Final = "refused"
"""The verdict where not the policy but a limit decided."""
ENDED: Final = "ended"
"""The verdict where a stream that was allowed has ended."""
NO_END: Final = "the daemon that carried it was killed: how much it carried is not known"
"""The reason of an end that the next daemon writes."""
_ALWAYS: Final = frozenset({"vm", "name", "project", "bytes_in", "bytes_out"})
"""There even if empty: to be searched for."""
_CUT: Final = "..."
_FORWARD: Final = b'"kind": "forward"'
_encode = json.JSONEncoder(separators=(", ", ": ")).encode


class Record(NamedTuple):
    """One decision.

    Attributes:
        verdict: An Effect, or REFUSED.
        rule: The policy's FILE:LINE, or "default", or the limit's name.
        reason: Why it was refused, in words.
        via: The host that it came from, where that is not the one that writes this.
        by: The program on this host that asked.
        into, out_of: Bytes that a stream has carried into the guest and out of it; None: it is no
            stream's end.
    """

    facts: Facts
    ask: Ask | None
    verdict: str
    rule: str
    request_id: bytes = b""
    reason: str = ""
    via: str = ""
    by: str = ""
    into: int | None = None
    out_of: int | None = None


def format_record(record: Record, *, time: str, host: str, left_out: int = 0) -> bytes:
    """The line, with its end.

    Args:
        left_out: Lines of this VM that were not written since its last one.
    """
    facts, ask = record.facts, record.ask
    fields: dict[str, str | int | bool | None] = {
        "time": time,
        "host": host,
        "vm": facts.uuid,
        "name": facts.name,
        "project": facts.project,
    }
    if ask is not None:
        fields |= {
            "kind": ask.kind.value,
            "exchange": ask.exchange,
            "topic": ask.topic,
            "server": ask.server,
            "namespace": ask.namespace,
            "method": ask.method,
            "fanout": ask.fanout,
        }
    fields |= {
        "verdict": record.verdict,
        "rule": record.rule,
        "request": record.request_id.hex(),
        "reason": _cut(record.reason, REASON_CHARS_MAX),
        "via": record.via,
        "by": record.by,
        "left_out": left_out,
    }
    if record.into is not None:
        fields |= {"bytes_in": record.into, "bytes_out": record.out_of}
    shown = {
        name: _cut(value, REASON_CHARS_MAX if name in ("reason", "rule") else FIELD_CHARS_MAX)
        if isinstance(value, str)
        else value
        for name, value in fields.items()
        if value or name in _ALWAYS
    }
    line = _encode(shown).encode("ascii")
    assert b"\n" not in line, "whatever a guest has named, it writes no line of its own"
    return line + b"\n"


def format_left_out(facts: Facts, left_out: int, *, time: str, host: str) -> bytes:
    """The line that says how many were not written, where none comes that could say it."""
    record = Record(facts, None, "left out", "audit_lines_per_s")
    return format_record(record, time=time, host=host, left_out=left_out)


def unended(lines: Iterable[bytes], host: str) -> list[dict[str, Any]]:
    """The streams that this host's daemon has begun, by these lines of its log, and not ended."""
    forward, begun = Kind.FORWARD.value, dict[str, dict[str, Any]]()
    for line in lines:
        if _FORWARD not in line:  # most of them; and to parse is slow
            continue
        try:
            row = json.loads(line)
            stream, verdict = row["request"], row["verdict"]
            if row["host"] != host or row["kind"] != forward:
                continue
        except (ValueError, RecursionError, TypeError, LookupError):
            continue  # half a line, or not ours
        if verdict == Effect.ALLOW.value:
            begun[stream] = row
        elif verdict == ENDED:
            begun.pop(stream, None)
    return list(begun.values())


def format_end(begun: dict[str, Any], *, time: str) -> bytes:
    """The end of a stream that a daemon before this one has begun."""
    kept = {name: value for name, value in begun.items() if name not in ("rule", "left_out")}
    ended = {"time": time, "verdict": ENDED, "reason": NO_END}
    return _encode({**kept, **ended}).encode("ascii") + b"\n"


def _cut(text: str, chars_max: int) -> str:
    return text if len(text) <= chars_max else text[: chars_max - len(_CUT)] + _CUT


class _Quota:
    """What one VM has left."""

    __slots__ = ("bucket", "facts", "left_out")

    def __init__(self, rate: float) -> None:
        self.bucket = TokenBucket(rate, max(1.0, rate * BURST_S))
        self.facts: Facts | None = None
        self.left_out = 0


class Sampler:
    """Lets each VM's first lines through, then so many a second, and counts the others."""

    def __init__(self) -> None:
        self._quotas: dict[str, _Quota] = {}

    def admit(self, facts: Facts, lines_per_s: float, now_s: float) -> int | None:
        """None if the line is to be left out; otherwise how many were, since the last one."""
        quota = self._quotas.get(facts.uuid)
        if quota is None or quota.bucket.rate != lines_per_s:
            left_out = quota.left_out if quota else 0
            quota = self._quotas[facts.uuid] = _Quota(lines_per_s)
            quota.left_out = left_out
        quota.facts = facts
        if not quota.bucket.try_take(1, now_s):
            quota.left_out += 1
            return None
        left_out, quota.left_out = quota.left_out, 0
        return left_out

    def overdue(self, now_s: float) -> Iterator[tuple[Facts, int]]:
        """VMs with lines left out that may have one to say so."""
        for quota in self._quotas.values():
            if quota.left_out and quota.facts and quota.bucket.try_take(1, now_s):
                left_out, quota.left_out = quota.left_out, 0
                yield quota.facts, left_out

    @property
    def is_owing(self) -> bool:
        """Whether lines were left out that no line has told of."""
        return any(quota.left_out for quota in self._quotas.values())

    def forget(self, vm: str) -> tuple[Facts, int] | None:
        """The VM is gone. What was left out of it and not told, if anything."""
        quota = self._quotas.pop(vm, None)
        if quota is None or not quota.left_out or quota.facts is None:
            return None
        return quota.facts, quota.left_out
