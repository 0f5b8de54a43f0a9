"""A channel whose guest was to leave and stays: its stream may have ended meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.phases import hush, release, speak
from tests.unit.test_channel_limits import LIMITS, Guest, Host, SilentBroker
from vchan.rpc.messages import Subscribe, Topic, encode
from vchan.session import CONTROL

AGENT = Topic("openstack", "agent")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path, LIMITS, SilentBroker())
    yield host
    host.close()


def test_a_guest_that_stays_is_connected_to_however_often_its_stream_ends(host: Host) -> None:
    stream = host.accept()
    hush(host.channel)
    stream.close()
    host.until(lambda: host.channel._link is None)
    speak(host.channel)
    for _ in range(3):
        host.accept().close()


def test_what_its_agents_serve_is_consumed_again(host: Host) -> None:
    broker = host.channel.downward._broker
    assert isinstance(broker, SilentBroker)
    guest = Guest(host, host.accept())
    guest.link.send(encode(Subscribe((AGENT,))), CONTROL)
    host.until(lambda: broker.consumed == {AGENT})
    hush(host.channel)
    host.channel.downward.released()
    guest.link.close()
    host.until(lambda: host.channel._link is None)
    assert broker.consumed == frozenset()
    speak(host.channel)
    host.until(lambda: broker.consumed == {AGENT})
    assert host.channel.downward.topics == {AGENT}


def test_it_is_consumed_again_though_nothing_else_happens(host: Host) -> None:
    """Consuming is put off for a moment: nothing but the channel's own timer wakes it for that."""
    downward = host.channel.downward
    broker = downward._broker
    assert isinstance(broker, SilentBroker)
    guest = Guest(host, host.accept())
    guest.link.send(encode(Subscribe((AGENT,))), CONTROL)
    host.until(lambda: downward.topics == {AGENT})
    hush(host.channel)
    downward.released()
    host.turns()
    host.channel._alarm.cancel()  # what it was set to before would come in time by accident
    speak(host.channel)
    host.until(lambda: broker.consumed == {AGENT})
    guest.link.close()


def test_a_guest_that_leaves_is_not_called_after(host: Host) -> None:
    stream = host.accept()
    hush(host.channel)
    stream.close()
    host.until(lambda: host.channel._link is None)
    # Nothing is wrong meanwhile: `vchan watch` would tell of a problem in every migration.
    assert (host.channel.state, host.channel.problem) == ("leaving", "")
    release(host.channel)
    assert not host.is_called()


def test_a_guest_found_in_the_middle_of_its_switch_over_is_spoken_to_when_it_stays(
    tmp_path: Path,
) -> None:
    """A daemon that was started meanwhile has connected, and said nothing."""
    host = Host(tmp_path, LIMITS, SilentBroker(), is_leaving=True)
    try:
        stream = host.accept()
        host.turns()
        assert host.channel.state == "leaving"
        stream.close()
        host.until(lambda: host.channel._link is None)
        assert host.channel.state == "leaving"
        assert not host.is_called()
        speak(host.channel)
        Guest(host, host.accept()).link.close()
    finally:
        host.close()
