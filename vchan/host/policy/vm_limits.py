"""What one VM may cost the host: every limit with its default and its reason.

Pure. Every limit of a VM is a field of `Limits`; the policy's `limit` lines set them by these
names.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Final, NamedTuple

from vchan.rpc.messages import TOPICS_MAX
from vchan.session import MESSAGE_BYTES_MAX, MESSAGE_BYTES_MIN, REASSEMBLY_BYTES_MAX


class LimitInfo(NamedTuple):
    """What a limit may be set to, and why it is what it is."""

    minimum: int
    maximum: int
    reason: str

    @property
    def is_bytes(self) -> bool:
        """Its value may be written with K, M or G."""
        return self.reason.startswith("Bytes")


# The least rates are those of a guest that works: slower, its own daemon could not keep up its end.


def _limit(default: int, minimum: int, maximum: int, reason: str) -> Any:
    return field(default=default, metadata={"info": LimitInfo(minimum, maximum, reason)})


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one VM."""

    messages_per_s: int = _limit(
        2000,
        600,
        1_000_000,
        "Messages from the guest: an answer costs the daemon some 30 us, a request 100.",
    )
    frames_per_s: int = _limit(
        4000,
        1000,
        1_000_000,
        "Frames from the guest, acknowledgements among them: two for each message.",
    )
    bytes_per_s: int = _limit(
        8 * 1024 * 1024,
        64 * 1024,
        1024**3,
        "Bytes from the guest: the daemon handles some 80 MB/s, so one VM gets a tenth of it.",
    )
    busy_ms_per_s: int = _limit(
        100,
        20,
        1000,
        "Milliseconds of the daemon's time in a second: a tenth, whatever the guest spends it on.",
    )
    message_bytes: int = _limit(
        MESSAGE_BYTES_MAX,
        MESSAGE_BYTES_MIN,
        MESSAGE_BYTES_MAX,
        "Bytes of one message from the guest: what a session can carry.",
    )
    reassembly_bytes: int = _limit(
        REASSEMBLY_BYTES_MAX,
        MESSAGE_BYTES_MIN,
        REASSEMBLY_BYTES_MAX,
        "Bytes of messages that have begun to arrive: two of the largest, one behind the other.",
    )
    json_values: int = _limit(
        20_000,
        1000,
        10_000_000,
        "Values in one request or answer: 20,000 take the daemon some 15 ms, in one piece.",
    )
    topics: int = _limit(
        TOPICS_MAX,
        0,
        TOPICS_MAX,
        "Topics that agents serve at a time: each is two queues with the broker.",
    )
    requests_up: int = _limit(
        128,
        0,
        1024,
        "The guest's requests that are not over: enough to keep the broker busy with one VM.",
    )
    calls_up: int = _limit(
        32,
        0,
        1024,
        "The guest's calls among them that wait for an answer: they may wait for minutes.",
    )
    handshakes_per_min: int = _limit(
        30,
        2,
        6000,
        "New sessions: a guest that boots in a loop needs some 10 a minute.",
    )
    violations_per_min: int = _limit(
        10,
        1,
        6000,
        "Breaches of the protocol before the VM is put into quarantine: a guest's daemon that "
        "works commits none.",
    )
    quarantine_s: int = _limit(
        30,
        1,
        86_400,
        "Seconds of the first quarantine: each next one takes twice as long.",
    )
    quarantine_max_s: int = _limit(
        600,
        1,
        86_400,
        "Seconds of the longest quarantine: a guest that is repaired is back within ten minutes.",
    )
    audit_lines_per_s: int = _limit(
        20,
        1,
        10_000,
        "Lines of the audit log: 20 are some 500 MB a day at worst. What is left out is counted.",
    )


LIMITS: Final[dict[str, LimitInfo]] = {item.name: item.metadata["info"] for item in fields(Limits)}
"""Every limit by name."""
