"""The alerts and the dashboard of etc/, given to a Prometheus."""

from __future__ import annotations

import json
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.rig import tail, wait_until
from tests.rig.monitoring import ALERTS, RULES_FILE, filled, queries
from tests.rig.ports import claim_ports
from tests.rig.requirements import missing_for_prometheus
from tests.unit.local_host import LocalHost
from tests.unit.watched import UUID, a_channel, daemon, detail
from vchan.host.ops.metrics import DaemonCollector, serve

MISSING = missing_for_prometheus()
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(MISSING is not None, reason=MISSING or ""),
]

WAIT_S = 60.0
HOST = 'instance="a:9177"'
GROWS = "0x5 1 1"
"""0 for five minutes, then 1."""

# By alert: the series that make it go off, the same in order, and when it must have gone off.
CASES: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "VchanDown": ({"vchan_up": "0x9"}, {"vchan_up": "1x9"}, "3m"),
    "VchanBrokerAway": (
        {"vchan_broker_connected": "0x9"},
        {"vchan_broker_connected": "0 0 1 0 0 1 0 0 1"},
        "3m",
    ),
    "VchanLibvirtAway": (
        {"vchan_libvirt_connected": "0x9"},
        {"vchan_libvirt_connected": "1x9"},
        "3m",
    ),
    "VchanPolicyNotInForce": ({"vchan_policy_ok": "0x9"}, {"vchan_policy_ok": "1x9"}, "1m"),
    "VchanAuditNotWritten": ({"vchan_audit_ok": "0x9"}, {"vchan_audit_ok": "1x9"}, "1m"),
    "VchanAuditLinesLost": (
        {"vchan_audit_lost_total": GROWS},
        {"vchan_audit_lost_total": "7x9"},
        "7m",
    ),
    "VchanFault": ({"vchan_faults_total": GROWS}, {"vchan_faults_total": "3x9"}, "7m"),
    "VchanParked": ({"vchan_parked_total": GROWS}, {"vchan_parked_total": "3x9"}, "7m"),
    "VchanQuarantine": (
        {'vchan_channels{state="quarantined"}': "1x9"},
        {'vchan_channels{state="quarantined"}': "0x9", 'vchan_channels{state="ready"}': "9x9"},
        "2m",
    ),
    "VchanVersionsDiffer": (
        {'vchan_channels{state="refused"}': "1x9"},
        {'vchan_channels{state="refused"}': "0x9", 'vchan_channels{state="waiting"}': "9x9"},
        "6m",
    ),
    "VchanServersLosingChannel": (
        {"vchan_servers_losing_channel": "1x90"},
        {"vchan_servers_losing_channel": "1x30 0 1x59"},
        "70m",
    ),
    "VchanChannelNotOpened": (
        {'vchan_channels{state="connecting"}': "1x9"},
        {'vchan_channels{state="connecting"}': "1 0 1 0 1 0 1 0 1"},
        "6m",
    ),
    "VchanCastsDropped": (
        {"vchan_casts_expired_total": GROWS},
        {"vchan_casts_expired_total": "5x9"},
        "7m",
    ),
    "VchanMessagesDropped": (
        {"vchan_dropped_by_broker_total": GROWS},
        {"vchan_undecodable_total": "5x9"},
        "7m",
    ),
    "VchanManyReturns": (
        {"vchan_many_returns_total": GROWS},
        {"vchan_many_returns_total": "5x9"},
        "7m",
    ),
    "VchanRepliesGivenUp": (
        {"vchan_replies_given_up_total": GROWS},
        {"vchan_replies_given_up_total": "5x9"},
        "7m",
    ),
    "VchanGuestsDenied": (
        {"vchan_guest_denied_total": "0+120x20"},
        {"vchan_guest_denied_total": "0+30x20"},
        "14m",
    ),
}


def test_promtool_takes_the_rules() -> None:
    run("promtool", "check", "rules", str(RULES_FILE))


def test_each_alert_goes_off_when_it_must_and_only_then(tmp_path: Path) -> None:
    assert set(CASES) == {rule["alert"] for rule in ALERTS}
    tests = []
    for rule in ALERTS:
        bad, good, at = CASES[rule["alert"]]
        tests += [unit(rule, bad, at, goes_off=True), unit(rule, good, at, goes_off=False)]
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES_FILE)], "tests": tests}))
    run("promtool", "test", "rules", str(file))


def unit(rule: dict[str, Any], series: dict[str, str], at: str, *, goes_off: bool) -> Any:
    """One of promtool's tests."""
    # Sums have all their terms: vchan metrics tells every counter from the start.
    zeros = {name: "0x20" for name in terms(rule["expr"]) if name not in series}
    both = {**zeros, **series}
    labels = {"instance": "a:9177", **rule["labels"]}
    for name in series:
        if 'state="' in name:
            labels["state"] = name.split('"')[1]
    annotations = {
        name: text.replace("{{ $labels.instance }}", "a:9177").replace("{{ $value }}", "1")
        for name, text in rule["annotations"].items()
    }
    expected = [{"exp_labels": labels, "exp_annotations": annotations}] if goes_off else []
    return {
        "interval": "1m",
        "input_series": [
            {"series": with_host(name), "values": values} for name, values in both.items()
        ],
        "alert_rule_test": [{"eval_time": at, "alertname": rule["alert"], "exp_alerts": expected}],
    }


def terms(expression: str) -> list[str]:
    """The counters of a sum."""
    return [word.split("[")[0] for word in expression.split("increase(")[1:]]


def with_host(series: str) -> str:
    """As scraped."""
    if series.endswith("}"):
        return f"{series[:-1]}, {HOST}}}"
    return f"{series}{{{HOST}}}"


@pytest.fixture(scope="module")
def prometheus(short_directory: Path) -> Iterator[str]:
    """The address of one that has seen what vchan metrics serves, twice."""
    directory = short_directory / "prometheus"
    directory.mkdir()
    metrics_port, port = claim_ports(2)
    socket = short_directory / "metrics.sock"
    with a_channel() as channel, LocalHost(socket) as host:
        host.status.update(daemon(channel))
        host.status.update(detail(channel))
        host.status["first_answer_s"] = 0.5
        collector = DaemonCollector(str(socket), WAIT_S, with_vms=True)
        threading.Thread(
            target=serve, args=(collector, "127.0.0.1", metrics_port), daemon=True
        ).start()
        scrape = {
            "job_name": "vchan",
            "static_configs": [{"targets": [f"127.0.0.1:{metrics_port}"]}],
        }
        file = directory / "prometheus.yaml"
        file.write_text(
            yaml.safe_dump(
                {
                    "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                    "rule_files": [str(RULES_FILE)],
                    "scrape_configs": [scrape],
                }
            )
        )
        address = f"127.0.0.1:{port}"
        log = (directory / "log").open("wb")
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={file}",
                f"--storage.tsdb.path={directory}/data",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until(
                lambda: scraped(address, 3),
                timeout_s=WAIT_S,
                interval_s=0.2,
                failure=lambda: tail(directory / "log"),
            )
            yield address
        finally:
            process.terminate()
            process.wait(WAIT_S)
            log.close()


def scraped(address: str, times: int) -> bool:
    try:  # it listens, and answers 503, before it is ready
        with urllib.request.urlopen(f"http://{address}/-/ready"):
            found = ask(address, "count_over_time(vchan_up[1m])")
    except OSError:
        return False
    return bool(found) and int(found[0]["value"][1]) >= times


def ask(address: str, expression: str) -> list[dict[str, Any]]:
    """What Prometheus answers."""
    query = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"http://{address}/api/v1/query?{query}") as answer:
            data = json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{expression}: {error.read().decode()}") from error
    assert isinstance(data["result"], list)
    return data["result"]


def test_every_panel_shows_something(prometheus: str) -> None:
    for place, expression in queries():
        found = ask(prometheus, filled(expression))
        assert found, f"{place}: nothing for {expression}"
        if "name=~" in expression:
            assert UUID in {series["metric"]["uuid"] for series in found}


def test_prometheus_has_the_rules(prometheus: str) -> None:
    with urllib.request.urlopen(f"http://{prometheus}/api/v1/rules") as answer:
        (group,) = json.load(answer)["data"]["groups"]
    assert [rule["name"] for rule in group["rules"]] == [rule["alert"] for rule in ALERTS]
    assert all(rule["health"] in ("ok", "unknown") for rule in group["rules"])


def run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
