"""The host's policy at work: read, read again, and on record."""

from __future__ import annotations

import json
import logging
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("oslo_config", reason='oslo.config is not installed: pip install "vchan[host]"')

from vchan.host import config
from vchan.host.enforcer import Enforcer, facts_of
from vchan.host.hypervisor.domain_xml import DomainFacts, DomainState
from vchan.host.policy.rules import Ask, Effect, Facts, Kind
from vchan.io.loop import Loop
from vchan.rpc.messages import Topic

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

    def enforcer(self) -> Enforcer:
        return Enforcer(self.loop, config.load(["--config-file", str(self._file)]))

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
    enforcer = place.enforcer()
    gate = enforcer.gate(VM)
    assert not gate.may_listen(AGENT)
    assert gate.judge(CALL, b"").rule.startswith(f"policy error: {place.files}/50-a.policy:1: ")
    assert "50-a.policy:1: the line ends" in enforcer.summary()["policy"]
    assert "everything is denied" in caplog.text

    place.write("any any any deny\nlisten any")  # another error is told, and nothing allowed
    enforcer.reload()
    assert "50-a.policy:2" in gate.judge(CALL, b"").rule

    place.write("call any any allow\n")
    enforcer.reload()
    assert gate.may_listen(AGENT)
    assert gate.judge(CALL, b"").effect is Effect.ALLOW
    assert enforcer.summary()["policy"] == "2 rules"
    enforcer.close()


def test_one_that_cannot_be_read_later_leaves_the_one_before(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.write("call any any allow\n")
    enforcer = place.enforcer()
    gate = enforcer.gate(VM)
    place.write("call any any deny\ncall\n")
    enforcer.reload()
    assert gate.judge(CALL, b"").effect is Effect.ALLOW
    assert "50-a.policy:2: the line ends" in enforcer.summary()["policy"]
    assert "the policy before it holds" in caplog.text
    place.write("call any any deny\n")
    enforcer.reload()
    assert gate.judge(CALL, b"").effect is Effect.DENY
    assert enforcer.problem == ""
    enforcer.close()


def test_no_rules_at_all_are_a_policy_too(place: Place) -> None:
    """That of a host that allows nothing: an error later must not be taken for one at the start."""
    enforcer = place.enforcer()
    place.write("call\n")
    enforcer.reload()
    assert enforcer.gate(VM).judge(CALL, b"").rule == "default"
    enforcer.close()


def test_decisions_are_on_record(place: Place) -> None:
    place.write("call any any allow\nlisten any agent allow\nreply name:vm1 openstack/* deny\n")
    enforcer = place.enforcer()
    gate = enforcer.gate(VM)
    gate.judge(CALL, b"\x01" * 16)
    gate.may_listen(AGENT)
    gate.may_listen(Topic("openstack", "other"))
    gate.may_reply(AGENT)
    gate.refused(CALL, b"\x02" * 16, "32 calls wait")
    enforcer.quarantined(VM, "over 30 handshakes a minute")
    enforcer.close()
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


def test_a_decision_about_a_topic_is_on_record_once_a_change(place: Place) -> None:
    place.write("listen any agent allow\n")
    enforcer = place.enforcer()
    gate = enforcer.gate(VM)

    def said() -> list[tuple[str, str]]:
        return [(line["topic"], line["verdict"]) for line in place.lines()]

    for _ in range(3):
        assert gate.may_listen(AGENT)
        assert not gate.may_listen(Topic("openstack", "other"))
        enforcer.reload()
    assert said() == [("agent", "allow"), ("other", "deny")]
    place.write("listen any agent deny\n")
    enforcer.reload()
    assert not gate.may_listen(AGENT)
    assert said()[2:] == [("agent", "deny")]
    assert enforcer.gate(VM).may_listen(AGENT) is False  # it came again: on record again
    assert said()[3:] == [("agent", "deny")]


def test_the_topics_that_a_mute_vm_is_given_are_on_record_once(place: Place) -> None:
    place.write("listen any agent allow\nmode any one-way-cast\n")
    gate = place.enforcer().gate(VM)
    assert gate.is_mute
    for topic in (*gate.given_topics, *gate.given_topics):
        gate.may_listen(topic)
    assert [line["verdict"] for line in place.lines()] == ["allow"]


def test_what_a_mute_vm_asks_is_on_record(place: Place) -> None:
    place.write("mode any one-way-cast\n")
    gate = place.enforcer().gate(VM)
    gate.unheard(CALL._replace(method=""), bytes(15) + b"\1")
    (line,) = place.lines()
    assert (line["kind"], line["topic"], line["verdict"]) == ("call", "conductor", "deny")
    assert line["rule"].endswith("50-a.policy:1")
    assert line["request"] == "00" * 15 + "01"
    assert "method" not in line
    place.write("call any any allow\n")  # but its channel has no way back
    gate = place.enforcer().gate(VM)
    gate.is_one_way = True
    gate.unheard(CALL, b"")
    assert place.lines()[-1]["rule"] == "the channel has no way back"


def test_the_rules_that_denied_something_are_known(place: Place) -> None:
    place.write("listen any agent deny\nlisten any any allow\nreply any other deny\n")
    enforcer = place.enforcer()
    gate = enforcer.gate(VM)
    other = Topic("openstack", "other")
    assert [gate.may_listen(AGENT), gate.may_listen(other)] == [False, True]
    assert [gate.may_reply(AGENT), gate.may_reply(other)] == [False, False]
    where = f"{place.files}/50-a.policy"
    assert gate.denials() == {
        "denied_by": {"openstack/agent": f"{where}:1"},
        "replies_denied_by": {"openstack/agent": "default", "openstack/other": f"{where}:3"},
        "mute_by": "default",
    }
    place.write("listen any any allow\nreply any any allow\n")
    enforcer.reload()
    assert gate.may_listen(AGENT) and gate.may_reply(AGENT) and gate.may_reply(other)
    assert gate.denials() == {"denied_by": {}, "replies_denied_by": {}, "mute_by": ""}
    enforcer.close()


def test_why_a_vm_may_not_answer(place: Place) -> None:
    """The rule by its file and line, for who is told that there is no answer."""
    place.write("reply any agent deny\nmode name:vm1 one-way-cast\n")
    enforcer = place.enforcer()
    gate, where = enforcer.gate(VM), f"{place.files}/50-a.policy"
    assert gate.why_no_reply(AGENT) == f"{where}:1 denies reply openstack/agent"
    other = Topic("openstack", "other")
    assert gate.why_no_reply(other) == f"{where}:2 denies reply openstack/other"
    assert gate.denials()["mute_by"] == f"{where}:2"
    place.write("listen any any allow\n")
    enforcer.reload()
    assert gate.why_no_reply(AGENT) == "no rule allows reply openstack/agent"
    assert gate.denials()["mute_by"] == "default"
    place.write("call\n")
    enforcer.reload()
    gate.is_one_way = True
    assert gate.why_no_reply(AGENT) == "the channel has no way back"
    assert gate.denials()["mute_by"] == "the channel has no way back"
    assert place.lines() == []
    enforcer.close()


def test_replies_that_are_allowed_are_not_on_record(place: Place) -> None:
    place.write("reply any any allow\n")
    enforcer = place.enforcer()
    assert enforcer.gate(VM).may_reply(AGENT)
    assert place.lines() == []
    enforcer.close()


def test_a_gate_knows_its_vms_limits_context_and_exceptions(place: Place) -> None:
    place.configure("failure_modules = trove.*", "guest_context_allow = request_id")
    place.write(
        "limit name:vm1 calls_up=3 requests_up=5 topics=7 json_values=9000 bytes_per_s=1M\n"
    )
    enforcer = place.enforcer()
    gate = enforcer.gate(VM)
    limits = gate.limits
    assert (limits.calls_up, limits.requests_up, limits.topics) == (3, 5, 7)
    assert limits.json_values == 9000
    assert enforcer.throttle(VM).limits.bytes_per_s == 1024 * 1024
    assert gate.may_raise("trove.x") and not gate.may_raise("builtins")
    given = {"request_id": "r", "global_request_id": "g", "is_admin": True}
    ask = Ask(Kind.CALL, "nova", "conductor")
    assert gate.context(given, ask, redelivered=False) == {
        "request_id": "r",
        "vchan_instance_uuid": UUID,
        "vchan_project_id": "p1",
        "vchan_host": "h1",
    }
    enforcer.close()


def test_other_facts_are_other_rights(place: Place) -> None:
    place.write("call flavor:big any allow\n")
    enforcer = place.enforcer()
    gate = enforcer.gate(VM)
    assert gate.judge(CALL, b"").effect is Effect.DENY
    gate.facts = VM._replace(flavor="big")
    assert gate.judge(CALL, b"").effect is Effect.ALLOW
    enforcer.close()


def test_an_audit_log_that_was_moved_is_left_at_a_reload(place: Place) -> None:
    enforcer = place.enforcer()
    gate = enforcer.gate(VM)
    gate.judge(CALL, b"")
    place.audit.rename(place.audit.with_suffix(".1"))
    enforcer.reload()
    gate.judge(CALL, b"")
    assert len(place.lines()) == 1
    assert enforcer.summary()["audit"]["written"] == 2
    enforcer.close()


def test_an_audit_log_that_cannot_be_written_stops_nothing(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.audit.mkdir()
    place.write("call any any allow\n")
    enforcer = place.enforcer()
    with caplog.at_level(logging.WARNING):
        assert enforcer.gate(VM).judge(CALL, b"").effect is Effect.ALLOW
    assert enforcer.summary()["audit"]["lost"] == 1
    assert "Is a directory" in enforcer.summary()["audit"]["problem"]
    enforcer.close()


def test_facts_of_a_domain() -> None:
    metadata = {"project": "p1", "user": "u1", "flavor": "f1", "image": "i1", "name": "displayed"}
    domain = DomainFacts(
        UUID, "vm1", DomainState.RUNNING, metadata=types.MappingProxyType(metadata)
    )
    assert facts_of(domain) == VM  # nova's display name is the tenant's choice
    assert facts_of(DomainFacts(UUID, "vm1", DomainState.RUNNING)) == Facts(UUID, "vm1")
    labelled = replace(domain, labels={"property:b": "2", "extra-spec:a": "1"})
    assert facts_of(labelled) == VM._replace(labels=(("extra-spec:a", "1"), ("property:b", "2")))


def test_a_targets_keys_pass_with_its_requests_alone_and_what_does_not_is_told_once(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "vchan.host")
    place.write(
        "context out any trove/trove-conductor context=1K csz-instance-id\n"
        "context in name:vm1 trove/guestagent.* context\n"
    )
    enforcer = place.enforcer()
    gate = enforcer.gate(VM)
    ask = Ask(Kind.CAST, "trove", "trove-conductor")
    given = {"context": "x" * 1024, "csz-instance-id": "7", "is_admin": True, "other": "o"}
    context = gate.context(given, ask, redelivered=False)
    assert {"context", "csz-instance-id"} <= context.keys()
    assert not {"is_admin", "other"} & context.keys()
    longer = {**given, "context": "x" * 1025, "csz-instance-id": "y" * 256}
    assert not {"context", "csz-instance-id"} & gate.context(longer, ask, redelivered=False).keys()
    for other in (Ask(Kind.CAST, "nova", "trove-conductor"), Ask(Kind.CAST, "trove", "conductor")):
        assert "context" not in gate.context(given, other, redelivered=False)
    assert gate.context_into(Topic("trove", "guestagent.7")) == {"context"}
    assert gate.context_into(Topic("trove", "other")) == frozenset()
    assert gate.context_into(Topic("nova", "guestagent.7")) == frozenset()
    for _ in range(3):
        gate.removed("out", Topic("trove", "t"), {"is_admin", "roles"})
        gate.removed("in", Topic("trove", "t"), ["auth_token\n" + "z" * 99])
    told = [record.getMessage() for record in caplog.records if "do not pass" in record.message]
    assert len(told) == 2
    assert "out of guests, trove/t: keys that do not pass: 'is_admin', 'roles'" in told[0]
    assert "\n" not in told[1] and len(told[1]) < 200
    enforcer.close()


def test_which_vms_programs_may_be_connected_to(place: Place) -> None:
    place.write("forward project:p1 tcp:80 allow\nany any any allow\n")
    enforcer = place.enforcer()
    assert enforcer.lets_forward(VM, "tcp:80")
    assert not enforcer.lets_forward(VM, "tcp:81")
    assert not enforcer.lets_forward(VM._replace(project="p2"), "tcp:80")
    assert not enforcer.lets_forward(VM, "nonsense")
