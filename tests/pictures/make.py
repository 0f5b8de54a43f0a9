"""Which pictures there are, and what each is made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from tests.bench.suite import GA, IN_AGENT, IN_DAEMON, RAW_C, RAW_PYTHON, RAW_RELAY
from tests.pictures import bars, recording
from tests.pictures.bars import Bar, Chart

ROOT: Final = Path(__file__).parents[2]
PICTURES: Final = ROOT / "docs" / "pictures"
CAST: Final = PICTURES / "demo.cast"


def demo(data: str) -> str:
    """The demo, as it ran."""
    speed = f"scripts/demo, {recording.SPEED} times as fast as it was"
    return recording.draw(data, speed)


def calls_in_a_guest(data: str) -> str:
    """`scripts/bench --json`: calls into an emulated guest."""
    measured = json.loads(data)
    rates = [
        (GA, "1", False), (IN_DAEMON, "1", True), (IN_DAEMON, "16", True), (IN_DAEMON, "64", True),
        (IN_AGENT, "1", True), (IN_AGENT, "16", True), (IN_AGENT, "64", True),
    ]  # fmt: skip
    charts = [
        Chart(
            "One call at a time: median, microseconds (less is better)",
            [
                bar(subject, measured["p50_us"][subject], "{:,.0f}")
                for subject in (RAW_C, RAW_PYTHON, RAW_RELAY, GA, IN_DAEMON, IN_AGENT)
            ],
        ),
        Chart(
            "Calls a second, by how many are in flight (more is better)",
            [
                Bar(f"{name}, {many}", rate, f"{rate:,.0f}", ours)
                for name, many, ours in rates
                for rate in [measured[f"rate_{many}"][name]]
            ],
        ),
        Chart(
            "Memory in the guest after the load, MiB (less is better)",
            [
                bar(subject, measured["rss_after_mib"][subject], "{:.1f}")
                for subject in (GA, IN_DAEMON, IN_AGENT)
            ],
        ),
    ]
    return bars.draw(charts, "Calls into a guest, beside qemu-ga and bare channels", note(measured))


def calls_through_a_broker(data: str) -> str:
    """`scripts/bench --broker --json`: beside stock oslo.messaging on the same broker."""
    measured = json.loads(data)
    compared = measured["compared"]
    charts = [
        Chart(title, [bar(name, value, form) for name, value in compared[measure].items()])
        for title, measure, form in (
            ("One call at a time: median, ms (less is better)", "p50_ms", "{:.2f}"),
            ("The server's CPU time a call, ms (less is better)", "cpu_ms", "{:.2f}"),
            ("Calls a second, from 16 threads (more is better)", "calls_s", "{:,.0f}"),
            ("Casts a second, from 16 threads (more is better)", "casts_s", "{:,.0f}"),
        )
    ]
    charts.append(
        Chart(
            "Many VMs on one host: memory for each after a call to it, KiB (less is better)",
            [bar(name, of["rss_after_kib"], "{:.0f}") for name, of in measured["many"].items()],
        )
    )
    return bars.draw(charts, "Calls through a broker, beside oslo.messaging", note(measured))


def many_vms_on_a_host(data: str) -> str:
    """`scripts/bench --broker --json`: how the cost grows with the number of VMs."""
    measured = json.loads(data)
    costs, many = measured["cost"], measured["many"]
    several = [name for name in costs if name in many and not name.endswith(" 1 VM")]
    charts = []
    for kind in ("cast", "call"):
        bars_of_kind = [bar(name, of[kind]["cpu_us"], "{:.0f}") for name, of in costs.items()]
        brokers = [
            bar(f"RabbitMQ, for {name}", of[kind]["broker_us"], "{:.0f}")
            for name, of in costs.items()
            if name in many
        ]
        title = f"Processor time a {kind}, microseconds (less is better)"
        charts.append(Chart(title, bars_of_kind + brokers))
    charts += [
        Chart(title, [bar(name, many[name][key], form) for name in several])
        for title, key, form in (
            ("Memory for each VM at rest, KiB (less is better)", "rss_kib", "{:.0f}"),
            ("All VMs at rest: % of a core (less is better)", "idle_cpu_percent", "{:.1f}"),
            ("Back after a cut connection, s (less is better)", "back_s", "{:.1f}"),
        )
    ]
    return bars.draw(charts, "One vchan-host, by how many VMs it has", note(measured))


def bar(label: str, value: float, form: str) -> Bar:
    """One of a subject, which is ours if its name says so."""
    return Bar(label, value, form.format(value), label.startswith("vchan"))


def note(measured: Mapping[str, Any]) -> str:
    """How quiet the machine was."""
    before, after = measured["load"]
    return f"The machine's load: {before:.1f} before, {after:.1f} after the run."


MADE: Final[dict[str, tuple[str, Callable[[str], str]]]] = {
    "demo.svg": ("demo.cast", demo),
    "bench.svg": ("bench.json", calls_in_a_guest),
    "broker.svg": ("broker.json", calls_through_a_broker),
    "vms.svg": ("broker.json", many_vms_on_a_host),
}
"""By a picture's name: its data's, and what makes one of the other."""


def present() -> list[str]:
    """The pictures whose data are there: the demo's are from when somebody records it."""
    return [name for name, (data, _) in MADE.items() if (PICTURES / data).exists()]


def made(name: str) -> str:
    """A picture as its data make it."""
    data, make = MADE[name]
    return make((PICTURES / data).read_text())


def differing() -> list[str]:
    """The pictures that are not what their data make."""
    return [
        name
        for name in present()
        if not (PICTURES / name).exists() or (PICTURES / name).read_text() != made(name)
    ]


def write() -> None:
    """Make them all."""
    for name in present():
        (PICTURES / name).write_text(made(name))
