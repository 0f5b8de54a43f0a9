"""vchan-host with VMs that are sockets: the real daemon, no hypervisor."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from xml.sax.saxutils import escape

from tests.rig import end_process, tail, wait_until
from tests.rig.compute import ROOT, HostDaemon
from tests.unit.cable import Cable
from vchan.client import Client
from vchan.errors import LinkError

START_S = 90.0
NOVA = "http://openstack.org/xmlns/libvirt/nova/1.1"


class UndrivenVm:
    """A domain that runs as far as libvirt knows, and the path of its channel's socket.

    Who listens there is its QEMU.
    """

    def __init__(self, directory: Path, name: str, project: str) -> None:
        self.name = name
        self.project = project
        self.uuid = str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{name}.{directory.name}"))
        self.path = directory / f"{name}.channel"

    def xml(self, number: int) -> str:
        """For the test driver's node."""
        return f"""<domain type='test' id='{number}'>
  <name>{escape(self.name)}</name><uuid>{self.uuid}</uuid>
  <metadata><n:instance xmlns:n="{NOVA}"><n:owner>
    <n:project uuid="{self.project}">rig</n:project>
  </n:owner></n:instance></metadata>
  <memory>65536</memory><os><type>hvm</type></os>
  <devices><controller type='virtio-serial' index='0'/>
    <channel type='unix'><source mode='bind' path='{self.path}'/>
      <target type='virtio' name='org.openstack.vchan.0'/></channel>
  </devices>
</domain>
"""


class UndrivenHost:
    """A vchan-host process and its domains.

    Args:
        directory: A short path.
        vms: Names, or NAME:PROJECT.
        policy: The text of its only policy file; None: everything is allowed.
        options: Further lines for [vchan].
    """

    def __init__(
        self,
        directory: Path,
        vms: Sequence[str],
        *,
        transport_url: str | None = None,
        policy: str | None = None,
        options: Sequence[str] = (),
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.audit_log = directory / "audit.log"
        named = [each.partition(":") for each in vms]
        self.vms = {
            name: UndrivenVm(directory, name, project or "rig") for name, _, project in named
        }
        node = directory / "node.xml"
        domains = [vm.xml(number) for number, vm in enumerate(self.vms.values(), 1)]
        node.write_text(f"<node>{''.join(domains)}</node>")
        self.daemon = HostDaemon(
            directory,
            "undriven",
            f"test://{node}",
            transport_url,
            options=[f"audit_log = {self.audit_log}", *options],
        )
        self.daemon.program = (sys.executable, "-m", "tests.rig.undriven_host")
        if policy is not None:
            self.daemon.policy.write_text(policy)

    def __enter__(self) -> Self:
        try:
            self.daemon.start()
        except BaseException:
            self.daemon.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.daemon.stop()


class UndrivenGuest:
    """A vchan-guest process in such a VM.

    Args:
        directory: A short path, for the cable, the agents' socket and the log.
    """

    def __init__(self, directory: Path, vm: UndrivenVm) -> None:
        directory.mkdir(exist_ok=True)
        self.socket = directory / "agent.sock"
        self._log = directory / "guest.log"
        self._vm = vm
        self._cable = Cable(directory)
        self._cable.host.rename(vm.path)  # it goes on listening
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._cable.__enter__()
        options = ["--port", f"unix:{self._cable.guest}", "--socket", str(self.socket)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vchan.guest.daemon", *options],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_until(
                self._is_up,
                timeout_s=START_S,
                interval_s=0.05,
                failure=lambda: f"vchan-guest does not answer: {tail(self._log)}",
            )
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _is_up(self) -> bool:
        with contextlib.suppress(LinkError):
            Client(str(self.socket)).close()
            return True
        return False

    def client(self) -> Client:
        """A program in the guest that asks the control side."""
        return Client(str(self.socket))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            end_process(self._process, grace_s=0.0)
        self._cable.__exit__()
