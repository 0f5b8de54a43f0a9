"""What this machine lacks for tests with real parts: a reason for pytest to skip, or None."""

import importlib.util
import platform
import shutil
from pathlib import Path

from tests.rig.rabbit import SCRIPTS

INSTALL = "run scripts/install-deps"


def missing_for_rabbit() -> str | None:
    """None if `RabbitServer` can work here."""
    if not (SCRIPTS / "rabbitmq-server").exists():
        return f"no RabbitMQ in {SCRIPTS}: {INSTALL}"
    return _missing_programs("epmd", "erl")


def missing_for_qemu() -> str | None:
    """None if `guest_image.build` and `QemuGuest` can work here."""
    if platform.machine() != "x86_64":
        return f"the rig's guests are x86_64, this machine is {platform.machine()}"
    return _missing_programs("qemu-system-x86_64", "apt-get", "apt-cache", "dpkg-deb")


def missing_for_libvirt() -> str | None:
    """None if `LibvirtHost` and its guests can work here."""
    if not Path("/usr/sbin/libvirtd").exists():
        return f"no /usr/sbin/libvirtd: {INSTALL}"
    found = importlib.util.find_spec("libvirt")
    # Our own folder libvirt/ passes for a package when libvirt-python is not installed.
    if found is None or found.origin is None:
        return "libvirt-python is not installed in this Python: pip install libvirt-python"
    return missing_for_qemu()


def missing_for_peers() -> str | None:
    """None if `guest_image.build(peers=True)` can work here."""
    return missing_for_qemu() or _missing_programs("gcc")


def missing_for_prometheus() -> str | None:
    """None if the alerts and the dashboard can be tried here."""
    return _missing_programs("prometheus", "promtool")


def missing_for_rpm() -> str | None:
    """None if rpms can be built and checked here."""
    return _missing_programs("rpm", "rpmbuild", "rpmlint")


def missing_for_browser() -> str | None:
    """None if pages can be looked at here."""
    return _missing_programs("chromium")


def _missing_programs(*names: str) -> str | None:
    missing = [name for name in names if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}: {INSTALL}" if missing else None
