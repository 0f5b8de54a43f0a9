"""What a daemon of this host says of itself and of each VM: asked by programs that show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vchan.client import Client
from vchan.errors import RemoteError
from vchan.programs.connection import HOST_TOPIC


class HostAnswers(NamedTuple):
    """One look at a daemon.

    Attributes:
        status: What its method `status` returned.
        rows: What its method `list` returned.
        vms: What `status` returned of each VM, by UUID.
        untold: Why it did not tell of a VM, by UUID.
    """

    status: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    vms: Mapping[str, Mapping[str, Any]]
    untold: Mapping[str, str]


def ask(socket: str, timeout_s: float, *, with_vms: bool) -> HostAnswers:
    """Ask one question at a time, so that the daemon's loop is held up by none for long.

    Args:
        socket: The daemon's.
        timeout_s: Of each question.
        with_vms: Also of each VM.

    Raises:
        VchanError: It cannot be asked, or did not answer in time.
    """
    with Client(socket) as client:
        status = client.call(HOST_TOPIC, "status", timeout_s=timeout_s)
        rows = client.call(HOST_TOPIC, "list", timeout_s=timeout_s)
        vms: dict[str, Mapping[str, Any]] = {}
        untold: dict[str, str] = {}
        for row in rows if with_vms else ():
            uuid = row["uuid"]
            try:
                vms[uuid] = client.call(HOST_TOPIC, "status", {"vm": uuid}, timeout_s=timeout_s)
            except RemoteError as error:
                if error.class_name != "NoSuchDomain":  # it is gone since the list was made
                    untold[uuid] = str(error)
        return HostAnswers(status, rows, vms, untold)
