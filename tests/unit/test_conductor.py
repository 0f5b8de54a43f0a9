"""The conductor's admission: what is handed in, who may, and how much."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vchan.conductor import admission as admission
from vchan.conductor import config
from vchan.conductor.admission import Admission, Handed, read
from vchan.errors import ConfigError
from vchan.host.oslo_wire.envelope import EnvelopeError
from vchan.host.oslo_wire.upward_envelope import Asked
from vchan.host.policy.audit_record import REFUSED
from vchan.host.policy.guest_context import build_context
from vchan.host.policy.rule_parser import parse
from vchan.host.policy.rules import Ask, Effect, Facts, Kind, Policy
from vchan.host.threads import EXIT_SOFTWARE
from vchan.host.vm.gate import VmGate
from vchan.rpc.messages import CALL, Request, Topic

VM = Facts("b1b1f4b2-0000-4000-8000-000000000001", "vm", "project-1", "user", "m1", "image")
ID = bytes(range(16))


def handed_in(
    kind: Kind = Kind.CALL, facts: Facts = VM, **changes: Any
) -> tuple[Kind, dict[str, Any], dict[str, Any]]:
    """(kind, context, arguments), as a host's gate makes them."""
    ask = Ask(kind, "nova", "topic", "server", "space", changes.pop("method", "method"))
    gate = VmGate(facts, Policy, lambda *_: None, lambda *_: {}, Topic("openstack", "vchan"))
    request = Request(ID, CALL, 5000, 1500, "nova", "topic", "server", b"{}")
    args = changes.pop("args", {"x": 1})
    made = gate.conduct(Asked(ask, args, "1.2", {}), request)
    assert made.ask.method == kind.value
    context = build_context({}, facts, frozenset(), host="compute-1")
    return kind, {**context, **changes.pop("context", {})}, {**made.args, **changes}


def request_of(project: str = "project-1", kind: Kind = Kind.CALL, number: int = 1) -> Handed:
    vm = VM._replace(uuid=str(number), project=project)
    return read(*handed_in(kind, vm))


class TestRead:
    def test_what_a_host_hands_in(self) -> None:
        assert read(*handed_in()) == Handed(
            VM,
            "compute-1",
            build_context({}, VM, frozenset(), host="compute-1"),
            Ask(Kind.CALL, "nova", "topic", "server", "space", "method"),
            {"x": 1},
            "1.2",
            ID,
            5.0,
            1.5,
            False,
        )

    def test_a_vms_labels_are_handed_in_too(self) -> None:
        """So that the conductor's rules may go by them. Hosts of an earlier release have none."""
        labelled = VM._replace(labels=(("extra-spec:a", "1"), ("property:b", "2")))
        assert read(*handed_in(facts=labelled)).facts == labelled
        kind, context, args = handed_in()
        del args["vm"]["labels"]
        assert read(kind, context, args).facts == VM
        many = {f"property:{number}": "" for number in range(admission.LABELS_MAX + 1)}
        wrong: list[tuple[Any, str]] = [
            ([1], "not an object"),
            ({"property:a": 1}, "not a string"),
            (many, "over 128 labels"),
        ]
        for labels, reason in wrong:
            args["vm"]["labels"] = labels
            with pytest.raises(EnvelopeError, match=reason):
                read(kind, context, args)

    def test_no_time_and_perhaps_a_copy(self) -> None:
        context = {"vchan_redelivered": True}
        read_in = read(*handed_in(timeout_s=0, monitor_s=0, context=context))
        assert (read_in.timeout_s, read_in.monitor_s, read_in.is_redelivered) == (None, None, True)

    def test_a_fanout_is_a_casts(self) -> None:
        kind, context, args = handed_in(Kind.CAST)
        args["target"]["fanout"] = True
        assert read(kind, context, args).ask.fanout
        assert not read(Kind.CALL, context, args).ask.fanout

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"context": {"vchan_instance_uuid": "another"}}, "the context is of another VM"),
            ({"context": {"vchan_project_id": "another"}}, "the context is of another VM"),
            ({"vm": None}, "vm is not an object"),
            ({"vm": {}}, "the VM has no uuid"),
            ({"vm": {"uuid": 1}}, "uuid is 1, not a string"),
            ({"target": []}, "target is not an object"),
            ({"target": {}}, "there is no exchange"),
            ({"args": None}, "args is not an object"),
            ({"method": ""}, "there is no method"),
            ({"args": {"ctxt": 1}}, "arguments named ctxt"),
            ({"args": {"method": 1, "self": 2}}, "arguments named method, self"),
            ({"request_id": "x"}, "request_id is not 32 hex digits"),
            ({"timeout_s": "1"}, "timeout_s is not a number"),
            ({"timeout_s": True}, "timeout_s is not a number"),
            ({"monitor_s": -1}, "monitor_s is not a time"),
            ({"monitor_s": float("inf")}, "monitor_s is not a time"),
        ],
    )
    def test_what_is_no_request(self, changes: dict[str, Any], reason: str) -> None:
        with pytest.raises(EnvelopeError, match=reason):
            read(*handed_in(**changes))

    def test_a_notification_has_a_priority(self) -> None:
        assert read(*handed_in(Kind.NOTIFY, method="info")).ask.method == "info"
        with pytest.raises(EnvelopeError, match="no priority"):
            read(*handed_in(Kind.NOTIFY, method="system"))


def make_desk(policy: str = "call,cast any any allow", **limits: Any) -> Admission:
    return Admission(parse([("p", policy)]), **{"requests_per_s": 10.0, "calls_max": 2, **limits})


class TestDesk:
    @pytest.mark.parametrize(
        ("policy", "verdict", "rule"),
        [
            ("call project:project-1 nova/topic method:m* allow", Effect.ALLOW, "p:1"),
            ("call project:project-2 any allow", Effect.DENY, "default"),
            ("call any any method:method deny\ncall any any allow", Effect.DENY, "p:1"),
            ("call any any conductor", Effect.DENY, "p:1"),
            ("", Effect.DENY, "default"),
        ],
    )
    def test_the_policy(self, policy: str, verdict: str, rule: str) -> None:
        record = make_desk(policy).judge(read(*handed_in()), 0.0)
        assert (record.verdict, record.rule, record.via) == (verdict, rule, "compute-1")
        assert record.request_id == ID

    def test_calls_of_a_project_from_all_its_vms(self) -> None:
        admission = make_desk()
        calls = [request_of(number=number) for number in range(3)]
        verdicts = [admission.judge(call, 0.0) for call in calls]
        assert [each.verdict for each in verdicts] == ["allow", "allow", REFUSED]
        assert verdicts[2].rule == "project_calls"
        assert admission.judge(request_of(kind=Kind.CAST), 0.0).verdict == "allow"
        assert admission.judge(request_of("project-2"), 0.0).verdict == "allow"
        admission.call_over(calls[0])
        assert admission.judge(calls[2], 0.0).verdict == "allow"

    def test_the_rate_of_a_project(self) -> None:
        admission = make_desk(requests_per_s=5.0)
        cast = request_of(kind=Kind.CAST)
        burst = [admission.judge(cast, 0.0).verdict for _ in range(11)]
        assert burst == ["allow"] * 10 + [REFUSED]
        assert admission.judge(cast, 0.1).rule == "project_requests_per_s"
        assert admission.judge(cast, 0.3).verdict == "allow"
        assert admission.judge(request_of("project-2", Kind.CAST), 0.0).verdict == "allow"

    def test_what_is_refused_takes_no_place(self) -> None:
        admission = make_desk(requests_per_s=0.5)
        assert admission.judge(request_of(), 0.0).verdict == "allow"
        assert admission.judge(request_of(), 0.0).rule == "project_requests_per_s"
        assert admission._projects["project-1"].calls == 1

    def test_projects_are_forgotten_but_for_those_that_wait(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(admission, "PROJECTS_MAX", 3)
        known = make_desk()
        waiting = request_of("waits")
        known.judge(waiting, 0.0)
        for number in range(10):
            known.judge(request_of(f"p{number}", Kind.CAST), 0.0)
        assert set(known._projects) == {"waits", "p8", "p9"}
        known.call_over(waiting)


class TestConfig:
    def test_a_project_must_not_take_all_threads(self, tmp_path: Any) -> None:
        config = pytest.importorskip("vchan.conductor.config", reason="no oslo.messaging")
        file = tmp_path / "conductor.conf"
        file.write_text("[vchan_conductor]\nthreads = 4\nproject_calls = 4\n")
        with pytest.raises(ConfigError, match="expected fewer than threads"):
            config.load(["--config-file", str(file)])
        file.write_text("[vchan_conductor]\npolicy_dir = here\n")
        with pytest.raises(ConfigError, match="policy_dir: 'here' is no absolute path"):
            config.load(["--config-file", str(file)])
        file.write_text("[vchan_conductor]\nguest_context_allow = is_admin\n")
        with pytest.raises(ConfigError, match="no guest may set it"):
            config.load(["--config-file", str(file)])


def test_a_conductor_that_cannot_serve_ends_and_says_why(tmp_path: Path) -> None:
    """Its server starts on a thread of its own: what is unexpected there must not die with it."""
    (tmp_path / "conductor.conf").write_text(
        f"[DEFAULT]\ntransport_url = fake://\n[{config.GROUP}]\n"
        f"policy_dir = {tmp_path}\naudit_log = -\n"
    )
    script = f"""
import sys
from vchan.conductor import daemon
class Broken(daemon.Conductor):
    def _make_server(self):
        return self
    def start(self, threads):
        raise ZeroDivisionError("as asked")
daemon.Conductor = Broken
sys.argv = ["vchan-conductor", "--config-file", "{tmp_path}/conductor.conf"]
daemon.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == EXIT_SOFTWARE, done.stdout + done.stderr
    assert (
        "vchan-conductor ends: thread vchan-start: ZeroDivisionError" in done.stdout + done.stderr
    )
    assert "ZeroDivisionError: as asked" in done.stdout + done.stderr
