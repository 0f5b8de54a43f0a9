"""A compute host: namespaces in which libvirt's directories are its own, a root libvirtd, a
nova-compute and a vchan-host, each with its real default paths."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import libvirt

from tests.cloud import settings
from tests.cloud.processes import Processes
from tests.cloud.settings import Place
from tests.rig import RigError
from vchan.client import Client
from vchan.errors import LinkError

ROOT: Final = Path(__file__).resolve().parents[2]
CALL_TIMEOUT_S: Final = 60.0
LIBVIRTD: Final = ("/usr/sbin/libvirtd", "--listen", "--pid-file", "/run/libvirt/libvirtd.pid")
# libvirtd does not start as root without Debian's users, whatever qemu.conf names. They come with
# packages of services, which are not wanted here: these hosts alone get them.
USERS: Final = "libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin\n"
GROUPS: Final = "libvirt-qemu:x:64055:\nlibvirt:x:64056:\nkvm:x:64057:\n"
PARTS: Final = ("libvirtd", "nova-compute", "vchan-host")


class Compute:
    """One host.

    Args:
        number: 1 to 9: its name is comp1, its address 127.0.0.11.
        warm_cache: Where what libvirt found out about QEMU is kept between runs.
    """

    def __init__(
        self,
        place: Place,
        processes: Processes,
        number: int,
        transport_url: str,
        warm_cache: Path,
    ) -> None:
        self.number = number
        self.name = settings.host_name(number)
        self._place = place
        self._processes = processes
        self._url = transport_url
        self._warm_cache = warm_cache
        self._directory = place.base / f"h{number}"
        self._holder = 0

    # --- starting and ending

    def make(self) -> None:
        """Make its namespaces and files, and start its libvirtd without waiting for it."""
        here = self._directory
        for name in ("run", "lib", "cache", "log", "etc/hooks", "vchan/policy.d", "instances"):
            (here / name).mkdir(parents=True)
        if self._warm_cache.is_dir():
            shutil.copytree(self._warm_cache, here / "cache/qemu")
        place, number = self._place, self.number
        (here / "etc/libvirtd.conf").write_text(settings.libvirtd(place, number))
        (here / "etc/qemu.conf").write_text(settings.qemu(number))
        (here / "hosts").write_text(
            "127.0.0.1 localhost\n"
            + "".join(f"{settings.address(n)} {settings.host_name(n)}\n" for n in range(1, 10))
        )
        for name, lines in (("passwd", USERS), ("group", GROUPS)):
            (here / name).write_text(_with_missing(Path("/etc", name).read_text(), lines))
        self._hold()
        (here / "vchan/vchan.conf").write_text(
            settings.vchan(place, here / "vchan", self._url, number)
        )
        conf = place.etc / self.name / "nova.conf"
        conf.parent.mkdir(parents=True)
        conf.write_text(settings.nova_compute(place, self._url, number))
        (place.base / f"state-{self.name}").mkdir()
        self.start("libvirtd")

    def _hold(self) -> None:
        here = self._directory
        targets = {
            "run": "/run/libvirt",
            "lib": "/var/lib/libvirt",
            "cache": "/var/cache/libvirt",
            "log": "/var/log/libvirt",
            "etc": "/etc/libvirt",
            "instances": str(self._place.instances),
            "hosts": "/etc/hosts",
            "passwd": "/etc/passwd",
            "group": "/etc/group",
        }
        for target in targets.values():
            if not Path(target).exists():
                Path(target).mkdir(parents=True)
        steps = [f"hostname {self.name}"]
        steps += [f"mount --bind {here}/{mine} {target}" for mine, target in targets.items()]
        steps += [f"touch {here}/ready", "exec sleep infinity"]
        self._holder = self._processes.start(
            f"{self.name}-namespaces",
            [
                *("unshare", "--mount", "--uts", "--propagation", "private"),
                *("sh", "-c", " && ".join(steps)),
            ],
        )
        (here / "holder.pid").write_text(str(self._holder))
        ready = here / "ready"
        self._processes.wait_for(f"{self.name}-namespaces", ready.exists)

    def set_policy(self, text: str) -> None:
        """What its vchan-host, which is not started yet, lets guests do."""
        (self._directory / "vchan/policy.d/50-cloud.policy").write_text(text)

    def start(self, part: str) -> None:
        """Start one of PARTS."""
        program = self._place.program("nova-compute")
        conf = self._place.etc / self.name / "nova.conf"
        command: dict[str, list[str | Path]] = {
            "libvirtd": list(LIBVIRTD),
            "nova-compute": [program, "--config-file", conf],
            "vchan-host": [
                *(sys.executable, "-m", "vchan.host.daemon"),
                *("--config-file", self._directory / "vchan" / "vchan.conf"),
            ],
        }
        inside = ["nsenter", f"--target={self._holder}", "--mount", "--uts", "--"]
        environment = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        self._processes.start(
            f"{self.name}-{part}",
            [*inside, *command[part]],
            environment if part == "vchan-host" else {},
        )

    def is_off(self) -> bool:
        """None of its parts is started."""
        return not any(self._processes.is_started(f"{self.name}-{part}") for part in PARTS)

    def stop(self, part: str) -> None:
        """End one of PARTS in order."""
        self._processes.stop(f"{self.name}-{part}")

    def kill(self, part: str) -> None:
        """End one of PARTS without a word."""
        self._processes.kill(f"{self.name}-{part}")

    def wait_libvirtd(self) -> None:
        """Wait until libvirtd knows what QEMU can do, and keep that for other times."""
        self._processes.wait_for(f"{self.name}-libvirtd", self._knows_qemu)
        found = self._directory / "cache/qemu"
        if found.is_dir() and not self._warm_cache.exists():
            shutil.copytree(found, self._warm_cache)

    def _knows_qemu(self) -> bool:
        try:
            with contextlib.closing(self._open()) as connection:
                connection.getCapabilities()
        except libvirt.libvirtError:
            return False
        return True

    def wait_vchan(self) -> None:
        """Wait until vchan-host has libvirt."""

        def is_ready() -> bool:
            try:
                return bool(self.ask("status")["libvirt"] == "connected")
            except LinkError:
                return False

        self._processes.wait_for(f"{self.name}-vchan-host", is_ready)

    def kill_guests(self) -> None:
        """End its QEMUs, as a power failure does."""
        for file in (self._directory / "run" / "qemu").glob("*.pid"):
            with contextlib.suppress(ValueError, ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)

    # --- asking

    def ask(self, method: str, **arguments: Any) -> Any:
        """One of vchan-host's own methods, as the command `vchan` asks it."""
        with Client(str(self.socket)) as client:
            return client.call("vchan.host", method, arguments, timeout_s=CALL_TIMEOUT_S)

    @property
    def socket(self) -> Path:
        """vchan-host's."""
        return self._directory / "vchan" / "host.sock"

    def row(self, uuid: str) -> dict[str, Any] | None:
        """What `vchan list` says of a server, if it is here."""
        command = [sys.executable, "-m", "vchan.cli", "--socket", str(self.socket)]
        done = subprocess.run(
            [*command, "--json", "list"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=CALL_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise RigError(f"vchan list on {self.name}: {done.stderr}")
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        return next((row for row in rows if row["uuid"] == uuid), None)

    def consoles(self, uuid: str) -> list[Path]:
        """Where a server's console may be written on this host; a resize renames its directory."""
        instances = self._directory / "instances"
        return [instances / name / "console.log" for name in (uuid, f"{uuid}_resize")]

    def forget_run(self) -> None:
        """What a host does not know after its reboot."""
        run = self._directory / "run"
        for path in run.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.socket.unlink(missing_ok=True)
        Path(f"{self.socket}.channels").unlink(missing_ok=True)

    def limit_migrations(self, uuid: str, mib_per_s: int) -> None:
        """How fast a server's memory may leave this host.

        Raises:
            RigError: It is not here.
        """
        with contextlib.closing(self._open()) as connection:
            try:
                connection.lookupByUUIDString(uuid).migrateSetMaxSpeed(mib_per_s, 0)
            except libvirt.libvirtError as error:
                raise RigError(f"{uuid} on {self.name}: {error}") from error

    def _open(self) -> Any:
        libvirt.registerErrorHandler(lambda context, error: None, None)  # it prints all errors
        return libvirt.open(f"qemu+unix:///system?socket={self._directory}/run/libvirt-sock")


def _with_missing(text: str, lines: str) -> str:
    """A file of accounts, with those of these lines that it lacks."""
    names = {line.partition(":")[0] for line in text.splitlines()}
    return text + "".join(
        line for line in lines.splitlines(keepends=True) if line.partition(":")[0] not in names
    )
