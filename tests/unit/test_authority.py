"""The host's policy at work: read, read again, and on record."""

from __future__ import annotations

import json
import logging
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("oslo_config", reason='oslo.config is not installed: pip install "vchan[host]"')

from vchan.host import config
from vchan.host.authority import Authority, facts_of
from vchan.host.domain_xml import DomainFacts, DomainState
from vchan.host.policy import Ask, Effect, Facts, Kind
from vchan.loop import Loop
from vchan.messages import Topic

UUID = "11111111-2222-3333-4444-555555555555"
VM = Facts(UUID, "vm1", "p1", "u1", "f1", "i1")
CALL = Ask(Kind.CALL, "nova", "conductor", method="report")
AGENT = Topic("openstack", "agent")


class Place:
    """A policy directory, a configuration and an audit log."""

    def __init__(self, directory: Path) -> None:
        self.files = directory / "policy.d"
        self.files.mkdir()
        self.audit = directory / "audit.log"
        self._file = directory / "vchan.conf"
        self.configure()
        self.loop = Loop()

    def configure(self, *lines: str) -> None:
        fixed = ("[vchan]", "host = h1", f"policy_dir = {self.files}", f"audit_log = {self.audit}")
        self._file.write_text("\n".join([*fixed, *lines]))

    def write(self, text: str) -> None:
        (self.files / "50-a.policy").write_text(text)

    def authority(self) -> Authority:
        return Authority(self.loop, config.load(["--config-file", str(self._file)]))

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.audit.read_text().splitlines()]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.loop.close()


def test_a_policy_that_cannot_be_read_at_the_start_denies_everything(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.configure("listen_topics = *")
    place.write("listen any\n")
    authority = place.authority()
    gate = authority.gate(VM)
    assert not gate.may_listen(AGENT)
    assert gate.judge(CALL, b"").rule.startswith(f"policy error: {place.files}/50-a.policy:1: ")
    assert "50-a.policy:1: the line ends" in authority.summary()["policy"]
    assert "everything is denied" in caplog.text

    place.write("any any any deny\nlisten any")  # another error is told, and nothing allowed
    authority.reload()
    assert "50-a.policy:2" in gate.judge(CALL, b"").rule

    place.write("call any any allow\n")
    authority.reload()
    assert gate.may_listen(AGENT)
    assert gate.judge(CALL, b"").effect is Effect.ALLOW
    assert authority.summary()["policy"] == "2 rules"
    authority.close()


def test_one_that_cannot_be_read_later_leaves_the_one_before(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.write("call any any allow\n")
    authority = place.authority()
    gate = authority.gate(VM)
    place.write("call any any deny\ncall\n")
    authority.reload()
    assert gate.judge(CALL, b"").effect is Effect.ALLOW
    assert "50-a.policy:2: the line ends" in authority.summary()["policy"]
    assert "the policy before it holds" in caplog.text
    place.write("call any any deny\n")
    authority.reload()
    assert gate.judge(CALL, b"").effect is Effect.DENY
    assert authority.problem == ""
    authority.close()


def test_no_rules_at_all_are_a_policy_too(place: Place) -> None:
    """That of a host that allows nothing: an error later must not be taken for one at the start."""
    authority = place.authority()
    place.write("call\n")
    authority.reload()
    assert authority.gate(VM).judge(CALL, b"").rule == "default"
    authority.close()


def test_decisions_are_on_record(place: Place) -> None:
    place.write("call any any allow\nlisten any agent allow\nreply name:vm1 openstack/* deny\n")
    authority = place.authority()
    gate = authority.gate(VM)
    gate.judge(CALL, b"\x01" * 16)
    gate.may_listen(AGENT)
    gate.may_listen(Topic("openstack", "other"))
    gate.may_reply(AGENT)
    gate.refused(CALL, b"\x02" * 16, "32 calls wait")
    authority.quarantined(VM, "over 30 handshakes a minute")
    authority.close()
    where = f"{place.files}/50-a.policy"
    assert [
        (line.get("kind"), line.get("topic"), line["verdict"], line["rule"])
        for line in place.lines()
    ] == [
        ("call", "conductor", "allow", f"{where}:1"),
        ("listen", "agent", "allow", f"{where}:2"),
        ("listen", "other", "deny", "default"),
        ("reply", "agent", "deny", f"{where}:3"),
        ("call", "conductor", "refused", "limit"),
        (None, None, "quarantine", "limit"),
    ]
    assert {(line["vm"], line["project"], line["host"]) for line in place.lines()} == {
        (UUID, "p1", "h1")
    }
    assert place.lines()[0]["request"] == "01" * 16
    assert place.lines()[4]["reason"] == "32 calls wait"


def test_replies_that_are_allowed_are_not_on_record(place: Place) -> None:
    place.write("reply any any allow\n")
    authority = place.authority()
    assert authority.gate(VM).may_reply(AGENT)
    assert place.lines() == []
    authority.close()


def test_a_gate_knows_its_vms_limits_context_and_exceptions(place: Place) -> None:
    place.configure("failure_modules = trove.*", "guest_context_allow = request_id")
    place.write(
        "limit name:vm1 calls_up=3 requests_up=5 topics=7 json_values=9000 bytes_per_s=1M\n"
    )
    authority = place.authority()
    gate = authority.gate(VM)
    assert (gate.calls_max, gate.requests_max, gate.topics_max) == (3, 5, 7)
    assert gate.values_max == 9000
    assert authority.guard(VM).limits.bytes_per_s == 1024 * 1024
    assert gate.may_raise("trove.x") and not gate.may_raise("builtins")
    given = {"request_id": "r", "global_request_id": "g", "is_admin": True}
    assert gate.context(given, redelivered=False) == {
        "request_id": "r",
        "vchan_instance_uuid": UUID,
        "vchan_project_id": "p1",
        "vchan_host": "h1",
    }
    authority.close()


def test_other_facts_are_other_rights(place: Place) -> None:
    place.write("call flavor:big any allow\n")
    authority = place.authority()
    gate = authority.gate(VM)
    assert gate.judge(CALL, b"").effect is Effect.DENY
    gate.facts = VM._replace(flavor="big")
    assert gate.judge(CALL, b"").effect is Effect.ALLOW
    authority.close()


def test_an_audit_log_that_was_moved_is_left_at_a_reload(place: Place) -> None:
    authority = place.authority()
    gate = authority.gate(VM)
    gate.judge(CALL, b"")
    place.audit.rename(place.audit.with_suffix(".1"))
    authority.reload()
    gate.judge(CALL, b"")
    assert len(place.lines()) == 1
    assert authority.summary()["audit"]["written"] == 2
    authority.close()


def test_an_audit_log_that_cannot_be_written_stops_nothing(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.audit.mkdir()
    place.write("call any any allow\n")
    authority = place.authority()
    with caplog.at_level(logging.WARNING):
        assert authority.gate(VM).judge(CALL, b"").effect is Effect.ALLOW
    assert authority.summary()["audit"]["lost"] == 1
    assert "Is a directory" in authority.summary()["audit"]["problem"]
    authority.close()


def test_facts_of_a_domain() -> None:
    metadata = {"project": "p1", "user": "u1", "flavor": "f1", "image": "i1", "name": "displayed"}
    domain = DomainFacts(
        UUID, "vm1", DomainState.RUNNING, metadata=types.MappingProxyType(metadata)
    )
    assert facts_of(domain) == VM  # nova's display name is the tenant's choice
    assert facts_of(DomainFacts(UUID, "vm1", DomainState.RUNNING)) == Facts(UUID, "vm1")
