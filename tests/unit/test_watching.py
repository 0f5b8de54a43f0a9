"""vchan doctor and vchan metrics: what they make of what a daemon says of itself."""

from __future__ import annotations

import json
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.rig.ports import claim_ports
from tests.unit.local_host import LocalHost
from tests.unit.watched import UUID, Given, a_channel, daemon, detail, row
from vchan import __version__, cli
from vchan.host.ops.doctor import Finding, Level, examine_daemon, examine_vm
from vchan.host.ops.metrics import COUNTERS, STATES, DaemonCollector, as_text, serve
from vchan.host.vm.channel import Channel
from vchan.host.vm.reports import FILE_SYSTEMS_SHOWN_MAX, Reports

WAIT_S = 30.0


@pytest.fixture
def channel() -> Iterator[Channel]:
    with a_channel() as channel:
        yield channel


# --- doctor


def levels(findings: list[Finding]) -> dict[str, Level]:
    return {finding.where: finding.level for finding in findings}


def test_a_daemon_that_is_well() -> None:
    findings = examine_daemon(daemon(broker="none configured"), __version__)
    assert set(levels(findings).values()) == {Level.OK}
    assert set(levels(findings)) == {"vchan-host", "libvirt", "broker", "policy", "audit log"}


@pytest.mark.parametrize(
    ("changes", "where", "level", "text"),
    [
        ({"version": "0.0.1"}, "vchan-host", Level.WARNING, "0.0.1 runs"),
        ({"libvirt": "cannot be reached"}, "libvirt", Level.PROBLEM, "cannot be reached"),
        ({"broker": "refused"}, "broker", Level.PROBLEM, "refused"),
        ({"broker_blocked": "low on disk"}, "broker", Level.PROBLEM, "low on disk"),
        ({"policy_problem": "a.policy:1: no"}, "policy", Level.PROBLEM, "a.policy:1: no"),
        (
            {"audit": {"problem": "full", "written": 0, "lost": 7, "left_out": 0}},
            "audit log",
            Level.PROBLEM,
            "full; 7 lines lost",
        ),
        (
            {"audit": {"problem": None, "written": 0, "lost": 7, "left_out": 0}},
            "audit log",
            Level.WARNING,
            "7 lines lost",
        ),
    ],
)
def test_a_daemon_that_is_not(changes: dict[str, Any], where: str, level: Level, text: str) -> None:
    (finding,) = (
        each
        for each in examine_daemon(daemon(**changes), __version__)
        if each.level is not Level.OK
    )
    assert (finding.where, finding.level) == (where, level)
    assert text in finding.text


def test_every_state_of_a_channel_is_known(channel: Channel) -> None:
    assert channel.state in STATES
    said = {state: examine_vm(row(state), detail(channel)) for state in STATES}
    assert [state for state in STATES if not said[state]] == [
        "ready",
        "paused",
        "arriving",
        "leaving",
        "closed",
        "none",
    ]
    assert all(finding.remedy for findings in said.values() for finding in findings)
    assert said["refused"][0].level is Level.PROBLEM


def test_what_is_wrong_with_us_is_told_as_that(channel: Channel) -> None:
    failed = {**detail(channel), "fault": "KeyError in upward.py:1"}
    failed["channel"]["faults"] = 2
    (found,) = examine_vm(row("quarantined", "in quarantine"), failed)
    assert found.level is Level.PROBLEM
    assert "vchan-host itself failed on it, 2 times, last: KeyError in upward.py:1" in found.text
    unknown = {**row("none", "libvirt has this domain, and it could not be read: busy")}
    (found,) = examine_vm({**unknown, "domain": "unknown"}, {})
    assert found.level is Level.PROBLEM
    assert "could not be read: busy" in found.text and found.remedy


def test_a_vms_own_words_come_first(channel: Channel) -> None:
    (finding,) = examine_vm(row("quarantined", "in quarantine for 9 s more"), detail(channel))
    assert "in quarantine for 9 s more" in finding.text
    (finding,) = examine_vm(row("none", "no virtio-serial controller"), {"state": "none"})
    assert (finding.level, finding.text) == (Level.WARNING, "no virtio-serial controller")


def test_what_agents_may_not_serve(channel: Channel) -> None:
    status = detail(channel)
    status["requests"] |= {"denied_topics": ["openstack/x"], "topics_over_limit": 1}
    texts = " ".join(finding.text for finding in examine_vm(row(), status))
    assert "openstack/x" in texts
    assert "more topics than the limit" in texts


def test_what_the_broker_refuses_a_vm(channel: Channel) -> None:
    refused = ["405 RESOURCE_LOCKED", "exchange e was declared otherwise"]
    status = {**detail(channel), "broker_problems": refused}
    findings = examine_vm(row("ready", "; ".join(refused)), status)
    assert [finding.text for finding in findings] == [f"broker: {text}" for text in refused]
    assert all(finding.remedy for finding in findings)
    own = examine_vm(row("ready", "something else"), status)
    assert own[0].text == "something else"


def test_what_was_dropped_is_found(channel: Channel) -> None:
    status = detail(channel)
    assert examine_vm(row(), status) == []
    lost = ("casts_refused", "casts_agent_gone", "casts_expired", "casts_too_large")
    more = ("undecodable", "parked", "dropped_by_broker", "many_returns")
    status["requests"] |= dict.fromkeys((*lost, *more), 4)
    findings = examine_vm(row(), status)
    assert len(findings) == len({finding.text for finding in findings}) == 8
    assert all(finding.text.startswith("4 ") and finding.remedy for finding in findings)


# --- metrics


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_counter_is_told_and_explained(channel: Channel) -> None:
    assert set(channel.totals()) == set(COUNTERS)
    found = samples(as_text(Given(daemon(channel), [row()], [detail(channel)])))
    names = {name for name, _ in found}
    for name in COUNTERS:
        assert {f"vchan_{name}_total", f"vchan_vm_{name}_total"} <= names
    assert ("vchan_vm_frames_sent_total", frozenset({("uuid", UUID), ("name", "vm")})) in found


def test_values_are_the_daemons(channel: Channel) -> None:
    status = daemon(channel, broker="refused", policy_problem="line 1")
    status["totals"] = {**channel.totals(), "losses": 3}
    vm = detail(channel)
    vm["requests"] |= {"requests": 9, "open": 2}
    rows = [row(), {**row("waiting"), "loses_channel": "soon"}]
    found = samples(as_text(Given(status, rows, [vm])))
    of = {name: value for (name, labels), value in found.items() if not labels}
    assert of["vchan_up"] == of["vchan_libvirt_connected"] == of["vchan_audit_ok"] == 1
    assert of["vchan_broker_connected"] == of["vchan_policy_ok"] == 0
    assert of["vchan_losses_total"] == 3
    assert of["vchan_servers_losing_channel"] == 1
    assert of["vchan_audit_written_total"] == 5
    about_vm = frozenset({("uuid", UUID), ("name", "vm")})
    assert found["vchan_vm_requests_total", about_vm] == 9
    assert found["vchan_vm_open_requests", about_vm] == 2
    by_state = {
        dict(labels)["state"]: value
        for (name, labels), value in found.items()
        if name == "vchan_channels"
    }
    assert by_state == {**dict.fromkeys(STATES, 0.0), "ready": 1.0, "waiting": 1.0}


def test_a_daemon_of_another_version_may_count_other_things(channel: Channel) -> None:
    """It was upgraded, and who serves the metrics was not started anew; or the other way round."""
    status, vm = daemon(channel), detail(channel)
    for counters in (status["totals"], vm["requests"]):
        del counters["held_up"]
        counters["news"] = 1
    names = {name for name, _ in samples(as_text(Given(status, [row("dancing")], [vm])))}
    assert {"vchan_requests_total", "vchan_vm_requests_total"} <= names
    assert not any("held_up" in name or "news" in name for name in names)


def test_what_a_guest_has_measured_is_told_with_as_many_series_whatever_it_says(
    channel: Channel,
) -> None:
    reports = Reports()
    paths = ["/", '/a"\\b', "/c\nd", *(f"/{number}" for number in range(100))]
    rows = [{"path": path, "bytes": 7, "files": 8, "evil": 9} for path in paths]
    memory = {"total_bytes": 5, "available_bytes": 4, "evil": 1}
    report = {"memory": memory, "load": [0.5, 0, 0], "file_systems": rows, "evil": {"x": 1}}
    reports.note("metrics", {"report": report}, 0.0)
    vm = {**detail(channel), "measured": reports.measured()}
    found = samples(as_text(Given(daemon(channel), [row()], [vm])))
    about_vm = {"uuid": UUID, "name": "vm"}
    assert found["vchan_guest_memory_bytes", frozenset(about_vm.items())] == 5
    assert found["vchan_guest_load", frozenset(about_vm.items())] == 0.5
    odd = frozenset({**about_vm, "path": '/a"\\b'}.items())
    assert found["vchan_guest_file_system_bytes", odd] == 7
    guests = [name for name, _ in found if name.startswith("vchan_guest_") and "total" not in name]
    assert len(guests) == 3 + 2 * FILE_SYSTEMS_SHOWN_MAX
    assert not any("evil" in name for name, _ in found)


def test_a_broker_that_is_not_wanted_is_not_missed(channel: Channel) -> None:
    found = samples(as_text(Given(daemon(channel, broker="none configured"), [], [])))
    assert not any(name == "vchan_broker_connected" for name, _ in found)


# --- the commands


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        yield Path(name) / "host.sock"


@pytest.fixture
def host(path: Path, channel: Channel) -> Iterator[LocalHost]:
    with LocalHost(path) as host:
        host.status.update(daemon(channel))
        host.status.update(detail(channel))
        yield host


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit status, standard output, standard error) of a command."""

    def run(*words: str) -> tuple[int, str, str]:
        try:
            status = cli.run(["--socket", str(path), *words])
        except SystemExit as end:  # argparse
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    file = tmp_path / "vchan.conf"
    (tmp_path / "policy.d").mkdir()
    file.write_text(f"[vchan]\npolicy_dir = {tmp_path}/policy.d\nlisten_topics = agent\n")
    return file


def test_doctor_finds_nothing(host: LocalHost, run: Run, conf: Path) -> None:
    status, out, err = run("doctor", "--config-file", str(conf))
    assert (status, err) == (cli.EXIT_OK, "")
    assert "ok       libvirt: connected\n" in out
    assert out.endswith("problems: 0, warnings: 0\n")


def test_doctor_looks_at_files_and_daemon(host: LocalHost, run: Run, conf: Path) -> None:
    host.status["broker"] = "refused\x1b[2J"
    host.problem = "its agents are ill"
    with conf.open("a") as file:
        file.write("selct = *\n")
    status, out, _ = run("doctor", "--config-file", str(conf))
    assert status == cli.EXIT_FAILED
    assert "selct" in out
    assert "problem  broker: refused?[2J\n         -> see transport_url" in out
    assert "warning  vm: its agents are ill" in out
    assert out.endswith("problems: 1, warnings: 2\n")
    found = json.loads(run("--json", "doctor", "--config-file", str(conf))[1])
    assert {"level": "warning", "where": "vm", "text": "its agents are ill", "remedy": ""} in found


def test_doctor_without_a_daemon_still_looks_at_the_files(run: Run, conf: Path) -> None:
    (conf.parent / "policy.d" / "50-a.policy").write_text("nonsense\n")
    status, out, _ = run("doctor", "--config-file", str(conf))
    assert status == cli.EXIT_FAILED
    assert "50-a.policy:1" in out
    assert "problem  vchan-host: " in out


def test_metrics_are_printed(host: LocalHost, run: Run) -> None:
    status, out, _ = run("metrics")
    found = {name for name, _ in samples(out)}
    assert status == cli.EXIT_OK
    assert {"vchan_up", "vchan_vm_losses_total"} <= found
    found = {name for name, _ in samples(run("metrics", "--host-only")[1])}
    assert "vchan_losses_total" in found
    assert not any(name.startswith("vchan_vm_") for name in found)


def test_a_vm_that_cannot_be_told_of_is_said_not_left_out(
    host: LocalHost, run: Run, conf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host.bug_of = "u"  # as `list` names it
    found = samples(run("metrics")[1])
    assert found["vchan_up", frozenset()] == 1.0
    assert "no metrics of VM u: InternalError" in caplog.text
    status, out, _ = run("doctor", "--config-file", str(conf))
    assert status == cli.EXIT_FAILED
    assert "problem  vm: InternalError" in out


def test_metrics_without_a_daemon_say_so(run: Run) -> None:
    assert samples(run("metrics")[1]) == {("vchan_up", frozenset()): 0.0}


def test_metrics_are_served(host: LocalHost, path: Path) -> None:
    (port,) = claim_ports(1)
    collector = DaemonCollector(str(path), WAIT_S, with_vms=True)
    threading.Thread(target=serve, args=(collector, "127.0.0.1", port), daemon=True).start()
    deadline = threading.Event()
    for _ in range(int(WAIT_S / 0.05)):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                text = answer.read().decode()
            break
        except OSError:
            deadline.wait(0.05)
    assert samples(text)["vchan_up", frozenset()] == 1.0


@pytest.mark.parametrize("address", ["9177", ":9177", "127.0.0.1:", "127.0.0.1:70000"])
def test_an_address_that_is_none(run: Run, address: str) -> None:
    status, _, err = run("metrics", "--listen", address)
    assert status == cli.EXIT_USAGE
    assert "is no ADDRESS:PORT" in err
