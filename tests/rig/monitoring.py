"""etc/'s alerts and dashboard, and what their expressions name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
RULES_FILE: Final = ROOT / "etc" / "prometheus" / "vchan.rules.yaml"
DASHBOARD_FILE: Final = ROOT / "etc" / "grafana" / "vchan.json"
ALERTS: Final[list[dict[str, Any]]] = [
    rule for group in yaml.safe_load(RULES_FILE.read_text())["groups"] for rule in group["rules"]
]
DASHBOARD: Final[dict[str, Any]] = json.loads(DASHBOARD_FILE.read_text())

_STRING: Final = re.compile(r'"[^"]*"')
_METRIC: Final = re.compile(r"\b([a-z]+_[a-z_]+)\b(?!\s*\()(?:\{([^}]*)\})?")
_LABEL: Final = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")


def panels() -> list[dict[str, Any]]:
    """The dashboard's."""
    return list(DASHBOARD["panels"])


def queries() -> Iterator[tuple[str, str]]:
    """Where it stands, and the expression, for each of the dashboard's panels."""
    for panel in panels():
        for target in panel.get("targets", ()):
            yield f"panel {panel['title']!r}", target["expr"]


def variables() -> Iterator[tuple[str, str]]:
    """The same for the dashboard's variables."""
    for each in DASHBOARD["templating"]["list"]:
        if each["type"] == "query":
            yield f"variable {each['name']}", each["query"]["query"]


def expressions() -> Iterator[tuple[str, str]]:
    """All of them, the alerts' too."""
    yield from queries()
    yield from variables()
    for rule in ALERTS:
        yield f"alert {rule['alert']}", rule["expr"]


def metrics_in(expression: str) -> list[tuple[str, set[str]]]:
    """Each metric that an expression names, and the labels that it is chosen by.

    Functions are known by the bracket after them; a metric's name has an underscore.
    """
    plain = _STRING.sub('""', expression)
    return [(match[1], set(_LABEL.findall(match[2] or ""))) for match in _METRIC.finditer(plain)]


def filled(expression: str) -> str:
    """With Grafana's variables as Grafana fills them in."""
    values = {"$__rate_interval": "1m", "$instance": ".*", "$vm": ".*"}
    for name, value in values.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression
