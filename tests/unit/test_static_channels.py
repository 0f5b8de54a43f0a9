"""Channels that the configuration names."""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from vchan.errors import ConfigError, PortAbsent, PortBusy
from vchan.guest.port import port_opener
from vchan.host.hypervisor.domain_xml import DomainState
from vchan.host.vm.channel import End
from vchan.host.vm.static_channels import (
    StaticChannel,
    StaticChannels,
    parse_channels,
    parse_topics,
)
from vchan.io.streams import Listener, connect_unix
from vchan.rpc.messages import TOPICS_MAX, Topic
from vchan.session import Role

WHERE = "[vchan] channels"


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        yield Path(name) / "relay.sock"


def test_channels() -> None:
    words = ["tenant=connect:/run/a.sock", "control-1.x=listen:/run/b.sock"]
    assert parse_channels(words, WHERE) == (
        StaticChannel("tenant", "connect", "/run/a.sock"),
        StaticChannel("control-1.x", "listen", "/run/b.sock"),
    )
    facts = parse_channels(words, WHERE)[0].facts()
    assert (facts.uuid, facts.channel_path, facts.state) == (
        "tenant",
        "/run/a.sock",
        DomainState.RUNNING,
    )


@pytest.mark.parametrize(
    "words",
    [
        ["tenant"],
        ["tenant=/run/a.sock"],
        ["tenant=connect:a.sock"],
        ["tenant=dial:/run/a.sock"],
        ["=connect:/run/a.sock"],
        ["a b=connect:/run/a.sock"],
        ["a=connect:/run/a", "a=connect:/run/b"],
        ["a=connect:/run/a", "b=listen:/run/a"],
    ],
)
def test_wrong_channels(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="channels"):
        parse_channels(words, WHERE)


def test_topics() -> None:
    assert parse_topics(["agent", "nova/compute"], WHERE) == (
        Topic("openstack", "agent"),
        Topic("nova", "compute"),
    )
    for wrong in (["a*"], ["a/b/c"], ["a b"], [""], ["/a"], [f"t{n}" for n in range(65)]):
        with pytest.raises(ConfigError):
            parse_topics(wrong, WHERE)
    assert TOPICS_MAX == 64


def test_the_ends(path: Path) -> None:
    words = ["near=connect:/run/a.sock", f"far=listen:{path}"]
    channels = StaticChannels(parse_channels(words, WHERE), (Topic("e", "t"),), 0o600)
    assert channels.end("a VM's") == End()
    assert channels.end("near").role is Role.HOST
    assert channels.end("far").role is Role.GUEST
    assert channels.end("far").topics == channels.end("near").topics == (Topic("e", "t"),)
    assert [facts.name for facts in channels.facts()] == ["near", "far"]
    with pytest.raises(PortAbsent):
        channels.end("far").open_stream(str(path))
    channels.close()
    assert not path.exists()


def test_the_listening_end(path: Path) -> None:
    listener = Listener(0o600)
    with closing(listener):
        with pytest.raises(PortAbsent, match="has not connected yet"):
            listener.open(str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with closing(connect_unix(str(path))) as there, closing(listener.open(str(path))) as here:
            there.write(b"hello")
            assert here.read() == b"hello"
        other = Listener(0o600)
        with pytest.raises(PortBusy):
            other.open(str(path))
    assert not path.exists()
    listener.close()


def test_a_guest_s_port_may_be_the_listening_end(path: Path) -> None:
    open_port: Any = port_opener(f"listen:{path}")
    with closing(open_port.func.__self__):
        with pytest.raises(PortAbsent):
            open_port()
        with closing(connect_unix(str(path))) as host, closing(open_port()) as guest:
            host.write(b"hello")
            assert guest.read() == b"hello"
