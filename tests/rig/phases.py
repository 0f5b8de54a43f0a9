"""A channel and its domain, taken through phases as `Domains` and the daemon do it."""

from __future__ import annotations

from vchan.host.hypervisor.domains import Connect, Hush, PhaseChange, Release, Speak, Why
from vchan.host.vm.channel import Channel


def go_through(channel: Channel, *changes: PhaseChange) -> None:
    """Change the phase, and have the channel carry that out."""
    for change in changes:
        channel._domain.change(change)
        match change:
            case Connect():
                channel.connect()
            case Speak():
                channel.speak()
            case Hush():
                channel.hush()
            case Release(_, why):
                channel.release(why.value)


def serve(channel: Channel, path: object) -> None:
    """Connect to the socket, and speak."""
    go_through(channel, Connect(channel.vm, str(path)), Speak(channel.vm))


def hush(channel: Channel) -> None:
    """Its guest is leaving."""
    go_through(channel, Hush(channel.vm))


def speak(channel: Channel) -> None:
    """Its guest stays after all."""
    go_through(channel, Speak(channel.vm))


def release(channel: Channel) -> None:
    """It is over."""
    go_through(channel, Release(channel.vm, Why.STOPPED))
