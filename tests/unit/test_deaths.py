"""A guest is called dead when it is, and never because it is paused, moves, or nobody sees it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from vchan.errors import LinkDown
from vchan.host.ops import masakari
from vchan.host.ops.deaths import GAP_S, Death, Deaths
from vchan.host.ops.masakari import RETRY_S, WAITING_MAX, Watch, notification

DEAD_S = 60.0
LOOK_S = 5.0
AT = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)


def row(
    uuid: str = "a",
    channel: str = "silent",
    *,
    domain: str = "running",
    heard_s: float | None = 0.0,
    phase: str | None = "ready",
) -> dict[str, Any]:
    return {
        "uuid": uuid,
        "name": f"name-{uuid}",
        "domain": domain,
        "channel": channel,
        "heard_s": heard_s,
        "guest": {"phase": phase},
    }


class Looks:
    """One look after another."""

    def __init__(self) -> None:
        self.deaths = Deaths(DEAD_S)
        self.now_s = 1000.0

    def at(self, for_s: float, *rows: dict[str, Any], sees_libvirt: bool = True) -> list[str]:
        """Everybody is so for so long; who dies."""
        dead: list[Death] = []
        until_s = self.now_s + for_s
        while self.now_s < until_s:
            self.now_s += LOOK_S
            for each in rows:
                if each["channel"] == "silent" and each["heard_s"] is not None:
                    each["heard_s"] += LOOK_S
            dead += self.deaths.look(rows, self.now_s, sees_libvirt=sees_libvirt)
        return [death.uuid for death in dead]


def test_who_is_silent_for_long_is_dead_once() -> None:
    looks = Looks()
    assert looks.at(DEAD_S - LOOK_S, row()) == []
    assert looks.at(2 * LOOK_S, row()) == ["a"]
    assert looks.at(DEAD_S * 3, row()) == []
    looks.at(LOOK_S, row(channel="ready"))
    assert looks.at(DEAD_S + 2 * LOOK_S, row()) == ["a"]


@pytest.mark.parametrize(
    "alive",
    [
        row(channel="ready"),
        row(channel="paused"),
        row(channel="arriving"),
        row(channel="leaving"),
        row(channel="waiting", heard_s=None),
        row(channel="quarantined"),
        row(channel="connecting"),
        row(channel="none"),
        row(domain="paused"),
        row(domain="off"),
        row(domain="unknown"),
        row(phase="ending"),
        row(phase="booting"),
        row(phase=None),
        row(heard_s=None),
        {**row(), "guest": None},
    ],
)
def test_who_is_not_dead(alive: dict[str, Any]) -> None:
    assert Looks().at(DEAD_S * 5, alive) == []


def test_who_was_paused_and_is_late_is_not_dead() -> None:
    """`heard_s` is long, and almost all of it was a pause."""
    looks = Looks()
    looks.at(DEAD_S * 5, row(channel="paused", heard_s=600.0))
    assert looks.at(DEAD_S / 2, row(heard_s=600.0)) == []


def test_nothing_is_told_while_libvirt_is_away() -> None:
    looks = Looks()
    assert looks.at(DEAD_S * 2, row(), sees_libvirt=False) == []
    assert looks.at(DEAD_S / 2, row(heard_s=DEAD_S * 2)) == []


def test_who_looks_stood_still() -> None:
    looks = Looks()
    looks.at(LOOK_S, row())
    looks.now_s += DEAD_S + GAP_S
    assert looks.at(LOOK_S, row(heard_s=DEAD_S + GAP_S)) == []


def test_many_at_once_are_the_hosts_trouble() -> None:
    rows = [row(uuid) for uuid in "abcd"]
    assert Looks().at(DEAD_S * 3, *rows, row("e", "ready")) == []
    assert Looks().at(DEAD_S * 3, *rows, *(row(f"ok{n}", "ready") for n in range(20))) == list(
        "abcd"
    )
    assert Looks().at(DEAD_S * 3, row("a"), row("b")) == ["a", "b"]


class Fleet(RuleBasedStateMachine):
    """Two VMs do as they like; who was told dead had been silent, running and ready all the time
    since at least DEAD_S."""

    def __init__(self) -> None:
        super().__init__()
        self.deaths = Deaths(DEAD_S)
        self.now_s = 0.0
        self.rows = {uuid: row(uuid, "ready") for uuid in "ab"}
        self.silent_since_s: dict[str, float | None] = dict.fromkeys("ab")

    @rule(
        uuid=st.sampled_from("ab"),
        channel=st.sampled_from(["ready", "silent", "silent", "paused", "leaving", "waiting"]),
        domain=st.sampled_from(["running", "running", "paused"]),
        phase=st.sampled_from(["ready", "ready", "ending", None]),
    )
    def change(self, uuid: str, channel: str, domain: str, phase: str | None) -> None:
        self.rows[uuid] = row(uuid, channel, domain=domain, phase=phase)

    @rule(times=st.integers(1, 15), step_s=st.sampled_from([1.0, 5.0, 20.0, GAP_S + 1]))
    def time_passes(self, times: int, step_s: float) -> None:
        for _ in range(times):
            self.now_s += step_s
            for uuid, each in self.rows.items():
                is_silent = (each["channel"], each["domain"]) == ("silent", "running")
                if not (is_silent and each["guest"]["phase"] == "ready"):
                    self.silent_since_s[uuid] = None
                elif self.silent_since_s[uuid] is None:
                    self.silent_since_s[uuid] = self.now_s
            rows = list(self.rows.values())
            for death in self.deaths.look(rows, self.now_s, sees_libvirt=True):
                since_s = self.silent_since_s[death.uuid]
                assert since_s is not None and self.now_s - since_s >= DEAD_S


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


# --- telling


class Site:
    """A daemon that says what it is told to, and a masakari that takes, or does not."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = [row()]
        self.libvirt = "connected"
        self.away = False
        self.sent: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self.now_s = 0.0
        self.watch = Watch(self._ask, self._send, "compute-1", Deaths(DEAD_S))

    def _ask(self, method: str) -> Any:
        if self.away:
            raise LinkDown("/run/vchan/host.sock", "no such file")
        return {"status": {"libvirt": self.libvirt}, "list": self.rows}[method]

    def _send(self, attributes: dict[str, Any]) -> None:
        if self.error is not None:
            raise self.error
        self.sent.append(attributes)

    def passes(self, for_s: float) -> None:
        until_s = self.now_s + for_s
        while self.now_s < until_s:
            self.now_s += LOOK_S
            self.watch.look(self.now_s, AT)


def test_masakari_is_told_once() -> None:
    site = Site()
    site.passes(DEAD_S * 4)
    assert site.sent == [
        {
            "type": "VM",
            "hostname": "compute-1",
            "generated_time": "2026-01-02T03:04:05",
            "payload": {
                "event": "QEMU_GUEST_AGENT_ERROR",
                "instance_uuid": "a",
                "vir_domain_event": "STOPPED_FAILED",
            },
        }
    ]


def test_a_masakari_that_is_away_is_told_later() -> None:
    site = Site()
    site.error = ConnectionError("refused")
    site.passes(DEAD_S * 2)
    site.error = None
    site.passes(RETRY_S)
    assert len(site.sent) == 1


@pytest.mark.parametrize("rows", [[row(channel="ready")], [], [row(domain="off")]])
def test_who_lives_again_or_has_gone_is_not_told_any_more(rows: list[dict[str, Any]]) -> None:
    site = Site()
    site.error = ConnectionError("refused")
    site.passes(DEAD_S * 2)
    site.rows = rows
    site.passes(LOOK_S)
    site.error = None
    site.passes(DEAD_S)
    assert site.sent == []


def test_what_masakari_knows_is_not_told_again() -> None:
    class Conflict(Exception):
        status_code = 409

    site = Site()
    site.error = Conflict("a duplicate")
    site.passes(DEAD_S * 2)
    site.error = None
    site.passes(DEAD_S * 2)
    assert site.sent == []


def test_a_daemon_that_is_away_kills_nobody() -> None:
    site = Site()
    site.passes(LOOK_S)
    site.away = True
    site.passes(DEAD_S * 2)
    site.away = False
    site.passes(DEAD_S / 2)
    assert site.sent == []


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masakari, "WAITING_MAX", 3)
    site = Site()
    site.rows = [row(f"{n}") for n in range(10)] + [row(f"ok{n}", "ready") for n in range(30)]
    site.error = ConnectionError("refused")
    site.passes(DEAD_S * 2)
    site.error = None
    site.passes(RETRY_S)
    assert len(site.sent) == 3 < WAITING_MAX


def test_who_is_meant() -> None:
    told = notification(Death("u", "n", 60.0), "h", AT)
    assert told["payload"]["instance_uuid"] == "u" and told["hostname"] == "h"
