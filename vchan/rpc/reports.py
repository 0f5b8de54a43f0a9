"""What a guest's daemon tells the host of its guest: names that both ends share. Pure.

A report is a cast to TOPIC, which a host's daemon serves itself and never forwards. Its method is
what is reported; its arguments are

    {"report": {...}, "known": false}

`known`: a host has taken just this before, and it is told again for one that has not.
"""

from typing import Final

from vchan.rpc.messages import Topic

TOPIC: Final = Topic("", "vchan.host")
"""A host that takes reports says so by a Subscribe that names it; others are sent none."""

PHASE: Final = "phase"
"""Whether the guest boots, is ready or ends, and what cloud-init made of it."""
FACTS: Final = "facts"
"""Hostname, system, addresses, versions."""
AGENTS: Final = "agents"
"""The units that the daemon runs: how each is."""
METRICS: Final = "metrics"
"""Memory, load, file systems."""
WHAT: Final = (PHASE, FACTS, AGENTS, METRICS)
"""Everything that there are reports of."""

BOOTING: Final = "booting"
READY: Final = "ready"
ENDING: Final = "ending"
PHASES: Final = (BOOTING, READY, ENDING)

PRODUCT_CHARS_MAX: Final = 64
"""Of what an agent says that it is, `NAME/VERSION`, as the name in its greeting. At it: the agent
does not start; a guest's daemon passes over a longer one."""

REPORT_BYTES_MAX: Final = 16 * 1024
"""A report with its envelope: 32 addresses and 64 units are half of it. At it: the guest's daemon
leaves out what is least needed, and says how much; a host refuses a longer one."""


def is_product(text: str) -> bool:
    """Whether a program says by this what it is, and its version. Nobody decides by it."""
    name, slash, version = text.partition("/")
    fits = len(text) <= PRODUCT_CHARS_MAX and text.isprintable() and " " not in text
    return bool(name and slash and version and fits)
