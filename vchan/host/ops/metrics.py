"""The daemon's counters for Prometheus: as text, or served over HTTP by a process of its own.

A scrape asks the daemon what `vchan list` and `vchan status VM` ask, one VM at a time: each
question costs its loop a fraction of a millisecond, so that a scrape of many VMs delays nobody.

A daemon of another version may count other things: only what both know is exported.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from http.server import ThreadingHTTPServer
from typing import Any, Final

from prometheus_client import CollectorRegistry, MetricsHandler, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from vchan.errors import VchanError
from vchan.host.ops.asking import ask

LOG = logging.getLogger(__name__)

STATES: Final = (
    "ready",
    "paused",
    "silent",
    "waiting",
    "connecting",
    "arriving",
    "leaving",
    "refused",
    "quarantined",
    "closed",
    "none",
)
"""Every state of a channel, as `vchan list` has them."""

COUNTERS: Final = {
    # The session.
    "sessions": "Sessions begun anew.",
    "resumptions": "Sessions that went on from the exact point.",
    "greetings": "Handshakes that the guest began.",
    "frames_sent": "Frames sent.",
    "frames_received": "Frames received.",
    "frames_resent": "Frames sent again.",
    "duplicates": "Frames that came twice and were dropped.",
    "losses": "Holes found in what came, each repaired.",
    "frames_lost": "Frames in those holes.",
    "violations": "Breaches of the protocol.",
    "messages_sent": "Messages sent.",
    "messages_received": "Messages received.",
    "pings_sent": "Pings sent.",
    "bytes_skipped": "Bytes received that belonged to no valid frame.",
    "bad_payloads": "Frames whose payload was damaged.",
    # The channel.
    "reconnects": "Connections to the channel's socket that were lost.",
    "cures": "Silent channels that were connected anew.",
    "frames_in_doubt": "Frames not acknowledged when their session ended.",
    "requests_in_doubt": "Requests in the guest and not over when their session ended.",
    "throttled": "Times that the guest was read more slowly, to keep its limits.",
    "quarantines": "Times that the VM was put into quarantine.",
    "faults": "Times that vchan-host itself failed on the VM, and closed its channel.",
    # Requests into the guest.
    "requests": "Requests that the broker handed out.",
    "redelivered": "Requests that the broker handed out again.",
    "taken": "Casts that an agent has taken.",
    "answered": "Calls that an agent has answered.",
    "handed_back": "Requests that the guest handed back.",
    "expired": "Requests whose time was over.",
    "replies_given_up": "Replies whose caller's queue did not come back.",
    "bad_messages": "Messages of the guest's that are none.",
    "unknown_messages": "Messages of the guest's of kinds that are not known here: passed over.",
    "discarded": "Messages of the guest's that its policy leaves unheard.",
    "replies_denied": "Replies that the policy denied.",
    "topics_over_limit": "Topics over the limit of the VM.",
    "held_up": "Times that the broker kept a VM's requests, because it does not take what it has.",
    "casts_refused": "Casts dropped: the guest refused them.",
    "casts_agent_gone": "Casts dropped: their agent went away with them.",
    "casts_expired": "Casts dropped: their time was over.",
    "casts_too_large": "Casts dropped: larger than a message may be.",
    "undecodable": "Messages dropped: they could not be read.",
    "parked": "Messages put aside, because they broke the daemon.",
    "dropped_by_broker": "Messages that the broker took back and dropped.",
    "many_returns": "Messages that came back to their queue often: the broker may drop them.",
    "context_keys_removed": "Keys of requests' contexts that may not enter the VM.",
    # Requests from the guest.
    "guest_requests": "Requests of the guest's.",
    "guest_published": "Requests of the guest's that the broker has confirmed.",
    "guest_local": "Requests of the guest's that went to programs on this host.",
    "guest_answered": "Calls of the guest's that were answered.",
    "guest_denied": "Requests of the guest's that the policy denied.",
    "guest_refused": "Requests of the guest's that a limit refused.",
    "guest_context_keys_removed": "Keys of its requests' contexts that may not leave the VM.",
    "guest_redelivered": "Requests of the guest's published again, and marked so.",
    "guest_unroutable": "Requests of the guest's that nobody serves.",
    "guest_expired": "Requests of the guest's whose time was over.",
    "guest_reports": "Reports of the guest's of itself that were kept.",
    "guest_unread": "Times that the broker kept answers, as the guest had not read those here.",
    # Byte streams.
    "streams": "Byte streams that programs on this host have opened into the guest.",
    "streams_refused": "Byte streams that the policy denied.",
    "streams_reset": "Byte streams that ended with a reason, before their end.",
    "stream_bytes_in": "Bytes that streams which are over have carried into the guest.",
    "stream_bytes_out": "Bytes that streams which are over have carried out of the guest.",
}
"""Every counter of a channel, with what it counts."""

_VM_GAUGES: Final[dict[str, tuple[str, Callable[[Mapping[str, Any]], float | None]]]] = {
    "backlog_bytes": ("Bytes that wait for the guest to take them.", lambda v: v["backlog_bytes"]),
    "unacknowledged_frames": (
        "Frames sent and not acknowledged.",
        lambda v: v["unacknowledged_frames"],
    ),
    "open_requests": ("Requests in the guest that are not over.", lambda v: v["requests"]["open"]),
    "open_guest_requests": (
        "Requests of the guest's that are not over.",
        lambda v: v["requests"]["from_guest"]["open"],
    ),
    "heard_seconds": ("Since the guest's daemon was heard last.", lambda v: v["heard_s"]),
    "first_answer_seconds": (
        "From taking the channel up, at a start or after a migration, to the guest's first word.",
        lambda v: v["first_answer_s"],
    ),
}

_GUEST_GAUGES: Final[dict[str, tuple[str, Callable[[Mapping[str, Any]], float | None]]]] = {
    "memory_bytes": ("The guest's memory.", lambda m: m["memory"].get("total_bytes")),
    "memory_available_bytes": (
        "What programs in the guest may still have of it.",
        lambda m: m["memory"].get("available_bytes"),
    ),
    "load": ("The guest's load, of one minute.", lambda m: m["load"]),
}
"""Of what guests report: their own claim. A VM has as many series as are here, and as
FILE_SYSTEMS_SHOWN_MAX times those of `_FILE_SYSTEM_GAUGES`, whatever it reports."""
_FILE_SYSTEM_GAUGES: Final = {
    "bytes": "Size of a file system of the guest's.",
    "available_bytes": "What is free of it for whoever is not root.",
    "files": "Files that it can have.",
    "free_files": "Files that it can have more.",
}

_PREFIX: Final = "vchan"
_VM_LABELS: Final = ("uuid", "name")


def families(
    status: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], vms: Iterable[Mapping[str, Any]]
) -> Iterator[Metric]:
    """A daemon's state as metrics.

    Args:
        status: What its method `status` returns.
        rows: What its method `list` returns.
        vms: What `status` returns of each VM that is to have metrics of its own.
    """
    yield _gauge("up", "Whether vchan-host answers.", 1)
    about = {"version": status["version"], "host": status["host"]}
    yield InfoMetricFamily(_PREFIX, "The daemon.", value=about)
    for part in ("libvirt", "broker"):
        if status[part] != "none configured":
            text = f"Whether vchan-host is connected to {part}."
            yield _gauge(f"{part}_connected", text, status[part] == "connected")
    text = "Whether the policy's files are in force as they are."
    yield _gauge("policy_ok", text, not status["policy_problem"])
    yield from _audit(status["audit"])
    yield _gauge("domains", "Domains of this host.", status["domains"])
    rows = list(rows)
    yield _channels(rows)
    text = "Servers of nova's that lose their channel at the next hard reboot, or stop and start."
    losing = sum(1 for row in rows if row.get("loses_channel"))
    yield _gauge("servers_losing_channel", text, losing)
    totals = status["totals"]
    for name, what in COUNTERS.items():
        if name in totals:
            yield CounterMetricFamily(
                f"{_PREFIX}_{name}", f"{what} Of all VMs.", value=totals[name]
            )
    yield from _of_vms(vms)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=float(value))


def _audit(audit: Mapping[str, Any]) -> Iterator[Metric]:
    yield _gauge("audit_ok", "Whether the audit log can be written.", not audit["problem"])
    for name, text in (
        ("written", "Lines written to the audit log."),
        ("lost", "Lines of the audit log that could not be written."),
        ("left_out", "Lines of the audit log over a VM's limit."),
    ):
        yield CounterMetricFamily(f"{_PREFIX}_audit_{name}", text, value=audit[name])


def _channels(rows: Iterable[Mapping[str, Any]]) -> Metric:
    count = dict.fromkeys(STATES, 0)
    for row in rows:
        count[row["channel"]] = count.get(row["channel"], 0) + 1
    family = GaugeMetricFamily(f"{_PREFIX}_channels", "Domains by channel.", labels=["state"])
    for state, number in count.items():
        family.add_metric([state], number)
    return family


def _of_vms(vms: Iterable[Mapping[str, Any]]) -> Iterator[Metric]:
    """One sample a VM and name, of VMs that have a channel."""
    gauges = {
        name: GaugeMetricFamily(f"{_PREFIX}_vm_{name}", text, labels=_VM_LABELS)
        for name, (text, _) in _VM_GAUGES.items()
    }
    counters = {
        name: CounterMetricFamily(f"{_PREFIX}_vm_{name}", text, labels=_VM_LABELS)
        for name, text in COUNTERS.items()
    }
    measured = _measured_families()
    for vm in vms:
        if vm["state"] == "none":
            continue
        labels = [vm[name] for name in _VM_LABELS]
        for name, (_, value_of) in _VM_GAUGES.items():
            value = value_of(vm)
            if value is not None:
                gauges[name].add_metric(labels, value)
        requests = vm["requests"]
        _add_measured(measured, labels, vm.get("measured"))
        streams = vm.get("streams", {})  # an earlier daemon has none
        values = {
            **streams,
            **vm["session"],
            **vm["channel"],
            **requests["from_guest"],
            **requests,
        }
        for name, counter in counters.items():
            if name in values:
                counter.add_metric(labels, values[name])
    yield from gauges.values()
    yield from measured.values()
    yield from counters.values()


def _measured_families() -> dict[str, Any]:
    families = {
        name: GaugeMetricFamily(f"{_PREFIX}_guest_{name}", text, labels=_VM_LABELS)
        for name, (text, _) in _GUEST_GAUGES.items()
    }
    for name, text in _FILE_SYSTEM_GAUGES.items():
        families[f"file_system_{name}"] = GaugeMetricFamily(
            f"{_PREFIX}_guest_file_system_{name}", text, labels=(*_VM_LABELS, "path")
        )
    return families


def _add_measured(
    families: Mapping[str, Any], labels: list[str], measured: Mapping[str, Any] | None
) -> None:
    """What a guest reported last; None from a daemon that takes no reports."""
    if measured is None:
        return
    for name, (_, value_of) in _GUEST_GAUGES.items():
        value = value_of(measured)
        if value is not None:
            families[name].add_metric(labels, value)
    for path, values in measured["file_systems"].items():
        for name in _FILE_SYSTEM_GAUGES.keys() & values.keys():
            families[f"file_system_{name}"].add_metric([*labels, path], values[name])


class DaemonCollector(Collector):
    """Asks the daemon anew at each scrape.

    Args:
        socket: The daemon's.
        timeout_s: Of each question.
        with_vms: Also each VM's own metrics, not only the host's.
    """

    def __init__(self, socket: str, timeout_s: float, *, with_vms: bool) -> None:
        self._socket = socket
        self._timeout_s = timeout_s
        self._with_vms = with_vms

    def collect(self) -> Iterable[Metric]:
        """What there is now. A daemon that cannot be asked is not up: that is all there is."""
        try:
            return list(self._ask())
        except VchanError:
            return [_gauge("up", "Whether vchan-host answers.", 0)]

    def describe(self) -> Iterable[Metric]:
        """Nothing: so that the daemon is not asked when the registry is made."""
        return []

    def _ask(self) -> Iterator[Metric]:
        told = ask(self._socket, self._timeout_s, with_vms=self._with_vms)
        for uuid, problem in told.untold.items():
            LOG.warning("no metrics of VM %s: %s", uuid, problem)
        yield from families(told.status, told.rows, told.vms.values())


def as_text(collector: Collector) -> str:
    """In Prometheus' text format."""
    return generate_latest(_registry(collector)).decode()


def serve(collector: Collector, address: str, port: int) -> None:
    """Serve scrapes over HTTP, until the process is ended.

    Raises:
        OSError: The address cannot be listened on.
    """
    family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]

    class _MetricsServer(ThreadingHTTPServer):
        address_family = family

    # Not start_http_server: what it returns differs between releases of prometheus-client.
    with _MetricsServer((address, port), MetricsHandler.factory(_registry(collector))) as server:
        server.serve_forever()


def _registry(collector: Collector) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(collector)
    return registry
