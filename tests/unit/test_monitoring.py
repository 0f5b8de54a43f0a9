"""The alerts and the dashboard of etc/: what they name is there, and Grafana knows their fields.

tests/real/test_monitoring.py gives them to a Prometheus.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.rig.monitoring import ALERTS, DASHBOARD, expressions, metrics_in, panels
from tests.unit.watched import Given, a_channel, daemon, detail, row


@pytest.fixture(scope="module")
def told() -> dict[str, set[str]]:
    """Every metric that `vchan metrics` tells, and its labels; Prometheus adds job and instance."""
    with a_channel() as channel:
        status = detail(channel)
        status["first_answer_s"] = 0.5
        collected = list(Given(daemon(channel), [row()], [status]).collect())
    found: dict[str, set[str]] = {}
    for family in collected:
        for sample in family.samples:
            found.setdefault(sample.name, {"instance", "job"}).update(sample.labels)
    return found


def test_every_metric_that_is_named_is_told(told: dict[str, set[str]]) -> None:
    for place, expression in expressions():
        named = metrics_in(expression)
        assert named, place
        for metric, labels in named:
            assert metric in told, f"{place}: no metric {metric}"
            assert labels <= told[metric], f"{place}: {metric} has no labels {labels}"


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("vchan_up == 0", [("vchan_up", set())]),
        (
            'topk(10, rate(vchan_vm_x_total{instance=~"$instance", name!="a=b"}[5m]))',
            [("vchan_vm_x_total", {"instance", "name"})],
        ),
        ("sum by (state) (vchan_channels{})", [("vchan_channels", set())]),
        ("label_values(vchan_up, instance)", [("vchan_up", set())]),
        ("a_b + vchan_c", [("a_b", set()), ("vchan_c", set())]),
    ],
)
def test_what_an_expression_names(expression: str, found: list[tuple[str, set[str]]]) -> None:
    assert metrics_in(expression) == found


def test_every_alert_says_what_and_what_to_do() -> None:
    names = [rule["alert"] for rule in ALERTS]
    assert len(names) == len(set(names)) > 10
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("critical", "warning", "info"), rule
        assert "$labels.instance" in rule["annotations"]["summary"], rule
        assert rule["annotations"]["action"], rule


def test_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in panels():
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert x < 24, panel["title"]
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    numbers = [panel["id"] for panel in panels()]
    assert len(numbers) == len(set(numbers))


def test_grafana_knows_every_field() -> None:
    """Read by Grafana's own model, which passes over what it does not know, and written again."""
    pytest.importorskip("grafana_foundation_sdk", reason="package grafana-foundation-sdk")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()

    def again(dashboard: Any) -> Any:
        return json.loads(json.dumps(Dashboard.from_json(dashboard), cls=JSONEncoder))

    assert lost(DASHBOARD, again(DASHBOARD)) == []
    for odd in ({"titel": 1}, {"panels": [{**panels()[1], "grid": {}}]}):
        broken = {**DASHBOARD, **odd}
        assert lost(broken, again(broken))


def lost(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """What stands in ours and not in theirs; the model adds defaults, and those are no loss."""
    if isinstance(ours, dict):
        found = [f"{where}.{name}" for name in ours if name not in theirs]
        both = [(ours[name], theirs[name], f"{where}.{name}") for name in ours if name in theirs]
    elif isinstance(ours, list):
        found = [where] if len(ours) != len(theirs) else []
        both = [(*pair, where) for pair in zip(ours, theirs, strict=False)]
    else:
        return [where] if ours != theirs else []
    return found + [each for pair in both for each in lost(*pair)]
