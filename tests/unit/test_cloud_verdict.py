"""The verdict of scripts/cloud on made-up runs: what is lost, twice, told, or needed a hand."""

from __future__ import annotations

import pytest

from tests.cloud.verdict import Call, Cast, Ran, Row, Sent, Times, judge, parse, table

TIMES = Times(began_s=10.0, done_s=20.0, back_s=21.5)


def sent() -> Sent:
    """A call and a cast each second from 5 to 25; nothing is answered between 10 and 21."""
    calls = [
        Call(number, at_s, at_s + 0.1 if at_s < 10 or at_s > 21 else 21.5, "")
        for number, at_s in enumerate(map(float, range(5, 26)), 100)
    ]
    casts = [Cast(number, float(at_s)) for number, at_s in enumerate(range(5, 26), 200)]
    return Sent(calls, casts)


def all_ran(of: Sent) -> list[Ran]:
    return [Ran("call", call.number, False) for call in of.calls] + [
        Ran("cast", cast.number, False) for cast in of.casts
    ]


def row(of: Sent, ran: list[Ran], *, kills: bool = False, problem: str = "") -> Row:
    return judge("it", TIMES, of, ran, kills=kills, problem=problem)


def test_all_is_well() -> None:
    of = sent()
    found = row(of, all_ran(of))
    assert found.is_well
    assert (found.nova_s, found.first_answer_s, found.longest_silence_s) == (10.0, 1.5, 12.4)
    assert (found.calls_sent, found.calls_answered) == (21, 21)
    assert (found.casts_sent, found.casts_lost, found.casts_twice) == (21, 0, 0)


def test_what_others_sent_does_not_count() -> None:
    of = sent()
    assert row(of, [*all_ran(of), Ran("cast", 1, False), Ran("cast", 1, False)]).is_well


def test_a_lost_cast() -> None:
    of = sent()
    found = row(of, [run for run in all_ran(of) if run.number != 203])
    assert (found.casts_lost, found.is_well) == (1, False)


@pytest.mark.parametrize("number", [203, 103])
def test_a_request_that_ran_twice(number: int) -> None:
    of = sent()
    kind = "cast" if number > 200 else "call"
    found = row(of, [*all_ran(of), Ran(kind, number, False)])
    assert (found.casts_twice if kind == "cast" else found.calls_twice) == 1
    assert not found.is_well


def test_a_cast_that_ran_again_and_says_so() -> None:
    of = sent()
    ran = [*all_ran(of), Ran("cast", 203, True)]
    found = row(of, ran, kills=True)
    assert (found.casts_twice, found.casts_marked, found.is_well) == (0, 1, True)
    assert not row(of, ran).is_well  # nothing died


def test_a_cast_that_ran_after_a_later_one() -> None:
    of = sent()
    ran = all_ran(of)
    swapped = [*ran[:-2], ran[-1], ran[-2]]
    found = row(of, swapped)
    assert (found.casts_overtaken, found.is_well) == (1, False)
    assert not row(of, swapped, kills=True).is_well, "no death excuses that"


def test_all_that_the_last_one_overtook() -> None:
    of = sent()
    *calls, last = all_ran(of)
    found = row(of, [last, *calls])
    assert found.casts_overtaken == len(of.casts) - 1


def test_the_order_is_that_of_first_runs_and_marked_ones_have_none() -> None:
    of = sent()
    again = [*all_ran(of), Ran("cast", 203, True)]
    assert row(of, again, kills=True).is_well
    late = [run for run in all_ran(of) if run.number != 203] + [Ran("cast", 203, True)]
    assert row(of, late, kills=True).is_well
    calls_last_first = list(reversed(all_ran(of)[:21])) + all_ran(of)[21:]
    assert row(of, calls_last_first).is_well, "calls of several threads have no order"


@pytest.mark.parametrize(("at_s", "is_lost"), [(9.0, False), (10.0, False), (7.0, True)])
def test_what_dies_with_a_guest_is_what_it_had_just_received(at_s: float, is_lost: bool) -> None:
    """The last answer came at 9.1 s: the guest died after that."""
    of = sent()
    (gone,) = (cast.number for cast in of.casts if cast.sent_s == at_s)
    ran = [run for run in all_ran(of) if run.number != gone]
    found = row(of, ran, kills=True)
    assert (found.casts_lost, found.casts_died) == (int(is_lost), int(not is_lost))
    assert found.is_well is not is_lost
    assert row(of, ran).casts_lost == 1  # an operation that lets the guest live has no such excuse


def test_a_death_takes_two_casts_at_most() -> None:
    """Sent at 8, 9 and 10 s; the last answer came at 9.1 s."""
    of = sent()
    found = row(of, [run for run in all_ran(of) if run.number not in (203, 204, 205)], kills=True)
    assert (found.casts_lost, found.casts_died, found.is_well) == (1, 2, False)


@pytest.mark.parametrize(
    ("failure", "kills", "is_well"),
    [
        ("AgentGone", True, True),
        ("AgentGone", False, False),
        ("MessagingTimeout", True, False),
        ("wrong answer 7", True, False),
    ],
)
def test_a_call_that_is_not_answered(failure: str, kills: bool, is_well: bool) -> None:
    of = sent()
    of.calls[4] = Call(104, 9.0, None, failure)
    found = row(of, all_ran(of), kills=kills)
    assert (found.calls_answered, found.is_well) == (20, is_well)
    assert is_well or failure in found.problem


def test_a_server_that_does_not_come_back() -> None:
    of = Sent([call for call in sent().calls if call.sent_s < 10], [])
    times = Times(began_s=10.0, done_s=20.0, back_s=None)
    found = judge("it", times, of, all_ran(of), kills=True)
    assert not found.is_well
    assert (found.first_answer_s, found.longest_silence_s) == (None, 10.9)


def test_a_hand_was_needed() -> None:
    of = sent()
    assert not row(of, all_ran(of), problem="somebody had to help").is_well


def test_lines_of_a_console() -> None:
    console = b"[    1.2] kernel\r\n\r\nRAN cast 7 once .\r\ninit: ready\r\nRAN call 8 again .\r\n"
    console += b"RAN cast 9"
    assert parse(console) == [Ran("cast", 7, False), Ran("call", 8, True)]


def test_the_table() -> None:
    of = sent()
    text = table([row(of, all_ran(of)), row(of, [], problem="it is gone")])
    head, first, second, below = text.splitlines()
    assert head.split()[:4] == ["operation", "nova", "first", "silence"]
    assert first.split() == ["it", "10.0", "1.5", "12.4", "21/21", "21", "0", "0", "0", "0"]
    assert second.endswith("NOT WELL")
    assert below == "  it: it is gone"
