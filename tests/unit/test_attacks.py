"""Each named attack on a host, simulated: what comes of it, what it costs, and who does not notice.

The attackers are those of `tests.attack.hostile`; the host is the real code (`attack.simulated`).
"""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("oslo_config", reason='oslo.config is not installed: pip install "vchan[host]"')

from tests.attack.hostile import ASKED_BEFORE, AT_A_TIME, ATTACKS, STAND_S
from tests.attack.simulated import (
    ATTACKER,
    NEIGHBOUR,
    SERVED,
    SETTLE_S,
    UUIDS,
    Scene,
    held,
    scene,
)
from tests.simulate.network import SOCKET_BYTES
from vchan.host.broker.vm_queues import is_usable, queues_of
from vchan.host.oslo_wire.downward_envelope import UNKNOWN_MODULE
from vchan.host.oslo_wire.mail import own_queue
from vchan.host.policy import audit_record
from vchan.host.policy.guest_context import HOST_KEY, INSTANCE_KEY, PROJECT_KEY
from vchan.host.policy.vm_limits import Limits
from vchan.host.vm import downward
from vchan.host.vm.consumption import SUBSCRIBE_S
from vchan.host.vm.downward import LOCAL_REQUESTS_MAX
from vchan.host.vm.log_lines import LOG_LINES, LOG_PERIOD_S
from vchan.host.vm.served_topics import TOPICS_SEEN_MAX
from vchan.host.vm.streams import Program
from vchan.host.vm.throttle import BURST_S
from vchan.host.vm.upward import ANSWERS_BYTES_MAX, OPEN_BYTES_MAX
from vchan.io.streams import READ_BYTES
from vchan.rpc.in_flight import RECORDS_MAX, REPLY_BYTES_MAX, SETTLED_MAX, Answered
from vchan.rpc.messages import TOPICS_MAX, Returned, Topic
from vchan.session import (
    BACKLOG_BYTES_MAX,
    IN_FLIGHT_BYTES_MAX,
    REASSEMBLY_BYTES_MAX,
    WINDOW_BYTES,
    WRITE_BYTES_MAX,
    State,
)
from vchan.session.sender import REWIND_S
from vchan.streams import Ended, StreamEnds
from vchan.streams.halves import SEND_BYTES_MAX
from vchan.streams.switchboard import ROUTES_MAX, WAY_BYTES_MAX
from vchan.wire.frames import FRAME_BYTES_MAX, OVERHEAD_BYTES

SECONDS = 1.5
"""Of each attack, by the simulated clock."""
MEMORY_BYTES_MAX = 16 * 1024 * 1024
"""What host and attacker may take together, at any time: the most that may begin to arrive is half
of it."""
LIMITS = Limits(bytes_per_s=1024 * 1024)
"""The attacker's: so many bytes take this process a while."""
ANSWER_BYTES = 700_000
"""Of a large answer."""
OPENED = 16
"""Byte streams that a program has open at a time."""
SLOW_S = 0.3
"""How often their program looks at them: meanwhile more comes than may wait for it."""
SHARED_ID = bytes(range(16))
"""Of a call to the neighbour, which the attacker has come to know."""
POLICY = f"""
listen,reply  any  agent      allow
listen,reply  any  t*         allow
call          any  nobody     allow
call,cast     any  {SERVED}   allow
forward       any  tcp:22     allow
limit  name:{ATTACKER}  bytes_per_s={LIMITS.bytes_per_s}
"""


@dataclass(frozen=True)
class Expected:
    """What must come of an attack.

    Attributes:
        counters: Those of the channel that must show it.
        quarantine: Why the VM is closed off, as a pattern; "": it is not.
        check: What else must hold.
        word: What the attack is about.
        prepare: Done before it begins.
    """

    counters: tuple[str, ...] = ()
    quarantine: str = ""
    check: Callable[[Scene], None] = lambda _: None
    word: str = ""
    prepare: Callable[[Scene], None] = lambda _: None
    seconds: float = SECONDS
    held: Mapping[str, int] = field(default_factory=dict)  # where it is more than for others
    answer_bytes: int = 0


# --- what must hold, by attack


def nothing_gets_through(scene: Scene) -> None:
    totals = scene.attacked.totals()
    assert totals["messages_received"] == totals["guest_requests"] == 0
    assert totals["sessions"] == 1


def one_message_may_not_begin(scene: Scene) -> None:
    assert scene.peaks.get("reassembly", 0) == 0


def a_part_is_kept_no_more(scene: Scene) -> None:
    assert REASSEMBLY_BYTES_MAX / 2 < scene.peaks["reassembly"] <= REASSEMBLY_BYTES_MAX
    assert scene.attacked.totals()["messages_received"] == 0


def fragments_take_their_own_bytes(scene: Scene) -> None:
    frames = scene.attacked.totals()["frames_received"]
    assert 0 < scene.peaks["reassembly"] <= frames


def answers_to_nothing_are_none(scene: Scene) -> None:
    assert scene.attacked.downward.open_requests == 0
    its: Any = scene.attacked.downward
    assert its._requester.unmatched > 0


def the_window_is_all(scene: Scene) -> None:
    """Who reads nothing hears of no credit, and has asked for all that it will."""
    assert scene.hostile.counts["bytes_sent"] < WINDOW_BYTES + FRAME_BYTES_MAX + READ_BYTES
    assert scene.peaks["requests"] <= LIMITS.calls_up
    verdicts = verdicts_of(scene)
    assert verdicts >= {("allow", "call"), ("refused", "call")}


def the_rest_stays_with_the_broker(scene: Scene) -> None:
    """It waits there, and it is no more than the calls that the policy lets wait."""
    assert scene.peaks["backlog"] > ANSWERS_BYTES_MAX / 2
    broker = scene.host.brokers[ATTACKER]
    assert 0 < len(broker.waiting) <= LIMITS.calls_up + 1  # an arrival
    assert ("refused", "call") in verdicts_of(scene)


def all_is_answered_slowly(scene: Scene) -> None:
    """In its share of the daemon's bytes."""
    answered = scene.attacked.totals()["guest_answered"]
    for_s = scene.seconds + SETTLE_S + BURST_S
    assert AT_A_TIME < answered <= LIMITS.bytes_per_s * for_s / ANSWER_BYTES + 2


def little_is_sent_again(scene: Scene) -> None:
    resends = scene.attacked.totals()["frames_resent"] / ASKED_BEFORE
    assert resends <= (scene.seconds + STAND_S) / REWIND_S + 1


def unread_answers_end_its_credit(scene: Scene) -> None:
    assert BACKLOG_BYTES_MAX < scene.peaks["backlog"] < BACKLOG_BYTES_MAX + 2 * WINDOW_BYTES
    assert any("it sent more than its credit" in line for line in scene.host.log), scene.host.log


def a_replay_runs_once(scene: Scene) -> None:
    answers_to_nothing_are_none(scene)
    published = scene.host.brokers[ATTACKER].published
    ran = [each for each in published if each.routing_key == SERVED]
    assert len(ran) == 1
    assert scene.attacked.downward.upward._responder.repeats > 0


def the_neighbour_answers_for_itself(scene: Scene) -> None:
    answers_to_nothing_are_none(scene)
    (outcome,) = scene.asked[SHARED_ID]
    assert isinstance(outcome, Answered)
    assert json.loads(outcome.body)["args"] == {"shared": True}


def topics_are_few(scene: Scene) -> None:
    its: Any = scene.attacked.downward
    assert len(its.topics) <= TOPICS_MAX
    assert its._served.seen <= TOPICS_SEEN_MAX
    changes = scene.host.brokers[ATTACKER].consumed
    assert 0 < len(changes) <= scene.seconds / SUBSCRIBE_S + 2


def its_queues_are_its_own(scene: Scene) -> None:
    """Not one name that is another VM's, whatever it asks to serve; what is denied is said."""
    vm, other = UUIDS[ATTACKER], UUIDS[NEIGHBOUR]
    asked: Any = scene.attacked.downward._served
    at_ours = [topic for topic in asked.asked if topic.exchange == "openstack"]
    usable = frozenset(topic for topic in at_ours if is_usable(vm, topic))
    assert {"agent", other, f"agent.{other}"} <= {topic.name for topic in usable}
    assert not {"#", "*", "agent.*"} & {topic.name for topic in usable}
    agents = frozenset({Topic("openstack", "agent")})
    others = {queue.name for queue in queues_of(other, agents)} | {own_queue(other)}
    keys = {queue.routing_key for queue in queues_of(other, agents)} - {"agent"}
    for queue in queues_of(vm, usable):
        assert queue.name.endswith(vm)
        assert queue.name not in others
        assert queue.fanout or queue.routing_key not in keys
    assert scene.attacked.downward.topics == agents
    (consumed,) = scene.host.brokers[ATTACKER].consumed
    assert consumed == (vm, agents)
    assert len(scene.attacked.downward.denied) == len(asked.asked) - 1
    assert ("deny", "listen") in verdicts_of(scene)
    assert not scene.host.brokers[ATTACKER].published
    assert ("deny", "cast") in verdicts_of(scene)


def the_context_is_the_hosts(scene: Scene) -> None:
    published = scene.host.brokers[ATTACKER].published
    assert published
    for each in published:
        message = json.loads(json.loads(each.body)["oslo.message"])
        context = {key: value for key, value in message.items() if key.startswith("_context_")}
        assert context == {
            f"_context_{INSTANCE_KEY}": UUIDS[ATTACKER],
            f"_context_{PROJECT_KEY}": f"project of {ATTACKER}",
            f"_context_{HOST_KEY}": "h1",
        }
        assert message["_reply_q"] == own_queue(UUIDS[ATTACKER])
        assert message["_msg_id"] == message["_unique_id"] != "0" * 32


def the_callers_get_text(scene: Scene) -> None:
    failures = failures_of(scene)
    assert {(each["module"], each["class"]) for each in failures} == {(UNKNOWN_MODULE, "system")}
    assert all(each["args"] == [] for each in failures)


def the_callers_get_a_failure(scene: Scene) -> None:
    for each in failures_of(scene):
        assert (each["class"], each["module"]) == ("BadReply", "vchan.errors")
        assert "nested over 100 deep" in each["message"]


def bombs_are_defused(scene: Scene) -> None:
    """Each is refused with its reason, or passes as what it says, written anew."""
    returned = {message.text for message in scene.hostile.heard if isinstance(message, Returned)}
    for reason in ("nested over 100 deep", "309 are allowed", "can't decode byte", "objects"):
        assert any(reason in text for text in returned), (reason, returned)
    bodies = [each.body for each in scene.host.brokers[ATTACKER].published]
    args = [json.loads(json.loads(body)["oslo.message"])["args"] for body in bodies]
    assert {"a": 1} in args  # of the two thousand of that name, one
    assert {"s": "\ud800"} in args
    assert all(len(each) <= 1 for each in args)


def no_line_is_forged(scene: Scene) -> None:
    lines = scene.host.audit.read_bytes().splitlines()
    assert all(32 <= byte < 127 for line in lines for byte in line)
    records = scene.host.audit_lines(ATTACKER)
    assert len(records) > 0
    assert {(each["verdict"], each["name"]) for each in records} == {
        ("deny", ATTACKER),
        ("left out", ATTACKER),
    }
    told = sum(each["verdict"] == "deny" for each in records)
    left_out = sum(each.get("left_out", 0) for each in records)
    assert told + left_out == scene.attacked.totals()["guest_denied"]


def its_callers_time_out(scene: Scene) -> None:
    assert 0 < scene.peaks["entries"] <= LOCAL_REQUESTS_MAX
    assert scene.attacked.downward.counters["expired"] > 0
    assert scene.attacked.downward.open_requests == 0


def no_stream_is_there(scene: Scene) -> None:
    assert scene.attacked.streams.summary()["open"] == 0
    assert scene.attacked.totals()["streams"] == 0
    assert scene.attacked.streams._board._routes == {}


def only_its_programs_streams_suffer(scene: Scene) -> None:
    """What is on its way is bounded, and who breaks a stream's rules loses that one."""
    streams = scene.attacked.streams
    assert scene.attacked.totals()["streams"] > OPENED
    assert streams.summary()["programs"] == 1
    assert streams.summary()["dropped"] > 0
    board = streams._board
    assert len(board._routes) <= ROUTES_MAX
    (program,) = board._programs.values()
    assert max(program.up._bytes, program.down._bytes) <= WAY_BYTES_MAX


# --- before it


def open_streams(scene: Scene) -> None:
    """A program has byte streams into the VM, always has bytes for each, and opens another when one
    has ended."""
    streams, host = scene.attacked.streams, scene.host
    ends = StreamEnds(scene.world.rng.randbytes, asks_max=None, offer_s=None)
    mine: set[bytes] = set()

    def turn() -> None:
        now_s = host.now_s
        while (message := streams.next_for_program(1)) is not None:
            ends.receive(message, now_s)
        ends.handle_timeout(now_s)
        mine.difference_update(each.id for each in ends.take_events() if isinstance(each, Ended))
        while len(mine) < OPENED:
            mine.add(ends.open("tcp:22", "{}", now_s))
        for stream in mine:
            ends.write(stream, bytes(SEND_BYTES_MAX))
        while (message := ends.next_message(now_s)) is not None:
            streams.from_program(1, message)
        (program,) = streams._board._programs.values()
        held_now = program.up._bytes + program.down._bytes
        scene.peaks["streams"] = max(scene.peaks.get("streams", 0), held_now)
        if not scene.is_over:
            host.after(SLOW_S, turn)

    def begin() -> None:
        ends.connected(host.now_s)
        streams.attach(1, Program(0, 1, lambda: None, lambda reason: None))
        turn()

    host.after(0.0, begin)


def call_it(scene: Scene) -> None:
    """Services call its agent all the while."""
    numbers = iter(range(10**6, 10**9))

    def call() -> None:
        scene.host.deliver(ATTACKER, next(numbers))
        if not scene.is_over:
            scene.world.after(0.02, call)

    scene.world.after(0.5, call)


def hold_up_the_neighbour(scene: Scene) -> None:
    """Its call stays open for a while."""

    def begin() -> None:
        scene.neighbour_machine.freeze()
        scene.asked[SHARED_ID] = scene.host.ask(NEIGHBOUR, SHARED_ID, {"shared": True})

    scene.world.after(0.1, begin)
    scene.world.after(SECONDS - 0.1, scene.neighbour_machine.thaw)


EXPECTED = {
    "torn_frame_smuggling": Expected(
        ("bad_payloads", "bytes_skipped", "throttled"), check=nothing_gets_through
    ),
    "hello_storm": Expected(("greetings",), "over 30 handshakes a minute"),
    "handshake_storm": Expected(("greetings", "sessions"), "over 30 handshakes a minute"),
    "giant_lengths": Expected(
        ("violations",),
        "11 violations in a minute, the last: a message of 4294967295 bytes: over MESSAGE_BYTES_M",
        one_message_may_not_begin,
    ),
    "never_finishing": Expected(("frames_received",), check=a_part_is_kept_no_more, seconds=5.0),
    "tiny_frames": Expected(("throttled",), check=answers_to_nothing_are_none),
    "tiny_fragments": Expected(("throttled",), check=fragments_take_their_own_bytes),
    "unread_replies": Expected(("guest_refused", "guest_unroutable"), check=the_window_is_all),
    "unread_answers": Expected(
        ("guest_unread", "guest_refused", "guest_answered"),
        check=the_rest_stays_with_the_broker,
        held={"backlog": ANSWERS_BYTES_MAX, "mail": ANSWERS_BYTES_MAX, "replies": REPLY_BYTES_MAX},
        seconds=20.0,
        answer_bytes=ANSWER_BYTES,
    ),
    "large_answers": Expected(
        ("guest_answered", "throttled"),
        check=all_is_answered_slowly,
        held={"backlog": ANSWERS_BYTES_MAX, "mail": ANSWERS_BYTES_MAX, "replies": REPLY_BYTES_MAX},
        seconds=20.0,
        answer_bytes=ANSWER_BYTES,
    ),
    "acks_of_unsent": Expected(
        ("violations",),
        "11 violations in a minute, the last: it acknowledged frame 1152921504606846976; 0 were ",
    ),
    "holes": Expected(("losses", "throttled", "frames_resent"), check=little_is_sent_again),
    "credit_games": Expected(
        ("violations", "guest_denied"), check=unread_answers_end_its_credit, seconds=5.0
    ),
    "id_forgery": Expected(("throttled", "guest_published"), check=a_replay_runs_once),
    "replies_for_others": Expected(
        ("throttled",),
        check=the_neighbour_answers_for_itself,
        word=SHARED_ID.hex(),
        prepare=hold_up_the_neighbour,
    ),
    "subscription_bomb": Expected(("throttled", "topics_over_limit"), check=topics_are_few),
    "topic_squatting": Expected(
        ("guest_denied",), check=its_queues_are_its_own, word=UUIDS[NEIGHBOUR]
    ),
    "context_injection": Expected(
        ("throttled", "guest_published", "guest_refused"), check=the_context_is_the_hosts
    ),
    "exception_injection": Expected(("answered",), check=the_callers_get_text, prepare=call_it),
    "json_bombs": Expected(("guest_refused", "throttled"), check=bombs_are_defused),
    "json_bombs_in_answers": Expected(
        ("answered",), check=the_callers_get_a_failure, prepare=call_it
    ),
    "audit_injection": Expected(("guest_denied", "throttled"), check=no_line_is_forged),
    "stops_reading": Expected(("expired",), check=its_callers_time_out, prepare=call_it),
    "unasked_streams": Expected(
        ("messages_received",),
        "11 violations in a minute, the last: Open: no streams are taken out of a guest",
        no_stream_is_there,
    ),
    "stream_games": Expected(("throttled",), check=no_stream_is_there),
    "taken_streams": Expected(
        ("throttled", "streams_reset"),
        check=only_its_programs_streams_suffer,
        prepare=open_streams,
    ),
    "garbage": Expected(("bytes_skipped", "throttled"), check=nothing_gets_through),
}


def test_every_attack_has_an_expectation() -> None:
    assert set(EXPECTED) == set(ATTACKS)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name: str, tmp_path: Path) -> None:
    expected = EXPECTED[name]
    with scene(tmp_path, POLICY) as at:
        expected.prepare(at)
        at.host.brokers[ATTACKER].answer_bytes = expected.answer_bytes
        with memory_bounded(MEMORY_BYTES_MAX + expected.held.get("replies", 0)):
            at.attack(name, expected.seconds, expected.word)
        check_outcome(at, expected)
        check_held(at, expected.held)
        check_work(at)
        check_neighbour(at)
        expected.check(at)


def test_a_mute_vm_is_told_so_and_is_on_record_within_its_lines(tmp_path: Path) -> None:
    with scene(tmp_path, f"mode name:{ATTACKER} one-way-cast\n{POLICY}") as at:
        at.attack("id_forgery", SECONDS)
        returned = [each for each in at.hostile.heard if isinstance(each, Returned)]
        assert returned
        assert all("not listened to" in each.text for each in returned)
        given = {("allow", "listen")}  # what rules name for it
        assert {verdict for verdict, _ in verdicts_of(at) - given} == {"deny", "left out"}
        told = [each for each in at.host.audit_lines(ATTACKER) if each["verdict"] == "deny"]
        assert {each["kind"] for each in told} == {"call", "cast"}
        assert not at.host.brokers[ATTACKER].published
        check_held(at, {})
        check_work(at)
        check_neighbour(at)


def test_memory_comes_back_when_who_reads_nothing_hangs_up(tmp_path: Path) -> None:
    with scene(tmp_path, POLICY) as at:
        broker = at.host.brokers[ATTACKER]
        broker.answer_bytes = ANSWER_BYTES
        at.attack("unread_answers", 15.0)
        assert at.peaks["backlog"] > ANSWERS_BYTES_MAX / 2
        at.world.run(at.world.now_s + 60.0)  # it has hung up, and its calls are over
        now = held(at.attacked)
        assert now["backlog"] + now["mail"] + now["replies"] < BACKLOG_BYTES_MAX
        check_neighbour(at)


def test_what_callers_have_given_up_is_not_kept_without_end(tmp_path: Path) -> None:
    """Their time is up, and the guest, which goes on speaking, has read none of it."""
    most, size = downward.OPEN_BYTES_MAX, 800_000
    with scene(tmp_path, POLICY) as at:
        numbers = iter(range(10**6, 10**9))

        def call() -> None:
            at.host.deliver(ATTACKER, next(numbers), size=size, timeout_s=0.1)
            at.world.after(0.02, call)

        at.world.after(0.5, call)
        at.attack("stops_reading", 4.0)
        assert at.attacked.downward.counters["held_up"] > 0
        assert most / 2 < at.peaks["backlog"] <= most + size
        check_neighbour(at)


def check_outcome(scene: Scene, expected: Expected) -> None:
    """It is counted where an operator looks, and closed off if it must be, on record."""
    totals = scene.attacked.totals()
    assert all(totals[name] > 0 for name in expected.counters), totals
    quarantines = [each for each in scene.host.audit_lines(ATTACKER) if "quarantine" in str(each)]
    if not expected.quarantine:
        assert totals["quarantines"] == 0
        assert quarantines == []
        return
    assert totals["quarantines"] == 1
    assert scene.attacked.state == "quarantined"
    assert expected.quarantine in scene.attacked.problem
    (line,) = quarantines
    assert line["verdict"] == "quarantine"
    assert expected.quarantine in line["reason"]
    assert any("in quarantine for" in each for each in scene.host.log)


def check_held(scene: Scene, more: Mapping[str, int]) -> None:
    """At no time did the host hold more for it than its limits say."""
    most = {
        "decoder": FRAME_BYTES_MAX + READ_BYTES,
        "reassembly": REASSEMBLY_BYTES_MAX,
        # Over the backlog no credit is granted: what was sent before, is answered still.
        "backlog": BACKLOG_BYTES_MAX + 2 * WINDOW_BYTES,
        "in flight": IN_FLIGHT_BYTES_MAX,
        "output": WRITE_BYTES_MAX,
        "entries": LOCAL_REQUESTS_MAX,
        "topics": TOPICS_SEEN_MAX + TOPICS_MAX,
        "requests": LIMITS.requests_up,
        "request bytes": OPEN_BYTES_MAX,
        "responder": LIMITS.requests_up + RECORDS_MAX + SETTLED_MAX,
        "replies": 0,
        "past": RECORDS_MAX,
        "mail": 1024,  # arrivals and notes
        "streams": 2 * WAY_BYTES_MAX,  # of one program
        **more,
    }
    for name, size in scene.peaks.items():
        assert size <= most[name], (name, size)


def check_work(scene: Scene) -> None:
    """The host did no more for it than its rates say, and wrote no more lines."""
    for_s = scene.seconds + BURST_S
    left = 2 * SOCKET_BYTES  # in the socket, and read from it, when it was over
    totals = scene.attacked.totals()
    assert totals["frames_received"] <= LIMITS.frames_per_s * for_s + left / OVERHEAD_BYTES
    assert totals["messages_received"] <= LIMITS.messages_per_s * for_s + left / OVERHEAD_BYTES
    assert scene.hostile.counts["bytes_sent"] <= LIMITS.bytes_per_s * for_s + left
    periods = math.ceil((scene.seconds + SETTLE_S) / LOG_PERIOD_S) + 1
    assert len(scene.host.log) <= (LOG_LINES + 1) * periods
    lines = LIMITS.audit_lines_per_s * (scene.seconds + SETTLE_S + audit_record.BURST_S)
    assert len(scene.host.audit_lines(ATTACKER)) <= lines + 1


def check_neighbour(scene: Scene) -> None:
    """Each call to it got its own answer; nothing else became of its channel."""
    assert len(scene.asked) >= scene.seconds / 0.11
    for request_id, told in scene.asked.items():
        (outcome,) = told
        assert isinstance(outcome, Answered)
        assert (outcome.id, outcome.failed) == (request_id, False)
        if request_id != SHARED_ID:
            assert json.loads(outcome.body)["args"] == {"number": int.from_bytes(request_id)}
    channel = scene.neighbour
    assert (channel.state, channel.problem) == ("ready", "")
    assert channel._session.state is State.OPEN
    totals = channel.totals()
    used = {"sessions", "greetings", "messages_received", "messages_sent"}
    used |= {"frames_received", "frames_sent", "pings_sent", "bytes_skipped"}
    assert {name for name, value in totals.items() if value} <= used, totals
    assert totals["sessions"] == 1
    assert totals["bytes_skipped"] == FRAME_BYTES_MAX  # the FLUSH
    assert {each["verdict"] for each in scene.host.audit_lines(NEIGHBOUR)} == {"allow"}


class memory_bounded:  # noqa: N801 - read as a statement
    """Fails if more bytes than that come to be in use meanwhile."""

    def __init__(self, most: int) -> None:
        self._most = most

    def __enter__(self) -> None:
        tracemalloc.start()

    def __exit__(self, *_: object) -> None:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < self._most


def verdicts_of(scene: Scene) -> set[tuple[str, str]]:
    return {(each["verdict"], each.get("kind", "")) for each in scene.host.audit_lines(ATTACKER)}


def failures_of(scene: Scene) -> list[Any]:
    """What callers of the attacker's agent got."""
    replies = scene.host.brokers[ATTACKER].replies
    assert replies
    return [json.loads(each["failure"]) for each in replies]
