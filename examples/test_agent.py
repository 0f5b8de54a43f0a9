"""Tests of agent.py, without a VM: `pytest test_agent.py`, in this directory or in a copy of it."""

import agent
import pytest

from vchan.errors import AgentGone, RemoteError
from vchan.testing import FakeGuest

pytest_plugins = ["vchan.pytest_plugin"]  # the fixture vchan_guest


@pytest.fixture
def guest(vchan_guest: FakeGuest) -> FakeGuest:
    """A guest in which the agent runs."""
    vchan_guest.serve("agent", agent.Endpoint())
    return vchan_guest


def test_echo(guest: FakeGuest) -> None:
    """A call, as a service makes it."""
    assert guest.call("agent", "echo", {"x": 1}) == {"x": 1}


def test_fail(guest: FakeGuest) -> None:
    """What a method raises is the caller's to see, and in the agent's log."""
    with pytest.raises(RemoteError, match="ValueError: no"):
        guest.call("agent", "fail", {"text": "no"})
    assert "raise ValueError" in guest.log[-1]


def test_a_migration_in_the_middle_of_a_cast(
    guest: FakeGuest, capsys: pytest.CaptureFixture[str]
) -> None:
    """40 bytes of it cross the channel, the rest is lost. It runs, and once."""
    guest.migrate(after_bytes=40)
    guest.cast("agent", "note", {"text": "hello"})
    assert capsys.readouterr().out == "hello\n"


def test_the_agent_dies(vchan_guest: FakeGuest) -> None:
    """Who calls is told, at once, that the method may have run."""

    class Dying(agent.Endpoint):
        def hostname(self) -> str:
            vchan_guest.kill(running)
            return "nobody hears this"

    running = vchan_guest.serve("agent", Dying())
    with pytest.raises(AgentGone):
        vchan_guest.call("agent", "hostname", timeout_s=3600)
