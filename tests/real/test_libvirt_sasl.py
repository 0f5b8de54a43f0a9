"""A libvirtd that asks for a name and a password, as kolla-ansible's does: vchan-host has them from
libvirt's auth.conf."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.rig import rig_directory
from tests.rig.kept import cache_directory
from tests.rig.ports import claim_ports
from tests.rig.requirements import INSTALL, missing_for_libvirt

MECHANISM: Final = "DIGEST-MD5"
"""kolla-ansible's, without TLS."""
LIBRARY: Final = "libsasl2.so.2"
MISSING = missing_for_libvirt()
if not MISSING and not list(Path("/usr/lib").glob("*/sasl2/libdigestmd5.so")):
    MISSING = f"no SASL mechanism {MECHANISM}: {INSTALL}"
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

ROOT: Final = Path(__file__).parents[2]
WAIT_S: Final = 120.0
NAME, PASSWORD = "nova", "secret"
SASL_SET_CREATE: Final = 1
SAVE: Final = f"""
import ctypes, sys
sasl = ctypes.CDLL("{LIBRARY}")
def check(result):
    if result:
        sys.exit(f"SASL says {{result}}")
check(sasl.sasl_server_init(None, b"libvirt"))
connection = ctypes.c_void_p()
none = (None,) * 5
check(sasl.sasl_server_new(b"libvirt", *none, 0, ctypes.byref(connection)))
word = b"{PASSWORD}"
check(sasl.sasl_setpass(connection, b"{NAME}", word, len(word), None, 0, {SASL_SET_CREATE}))
"""
"""What saslpasswd2 does."""
SHOW: Final = """
import logging, sys
from vchan.host.hypervisor import libvirt_client
import libvirt
libvirt.registerErrorHandler(lambda *_: None, None)
try:
    connection = libvirt_client._open(sys.argv[1])
except libvirt.libvirtError as error:
    sys.exit(str(error))
print(connection.getHostname())
"""


@pytest.fixture(scope="module")
def uri() -> Iterator[str]:
    """Of a libvirtd that asks for a name and a password."""
    from tests.rig.libvirtd import LibvirtHost

    (port,) = claim_ports(1)

    class Asking(LibvirtHost):
        def _command(self) -> tuple[Any, list[str | Path]]:
            account, command = super()._command()
            return account, [*command, "--listen"]

        def _environment(self) -> dict[str, str]:
            return super()._environment() | {"SASL_CONF_PATH": str(self.directory)}

        def _write_configuration(self) -> None:
            (self.directory / "libvirt.conf").write_text(
                f"mech_list: {MECHANISM}\nsasldb_path: {self.directory}/passwords\n"
            )
            environment = os.environ | {"SASL_CONF_PATH": str(self.directory)}
            subprocess.run([sys.executable, "-c", SAVE], env=environment, check=True)
            super()._write_configuration()
            with (self.directory / "config/libvirt/libvirtd.conf").open("a") as configuration:
                configuration.write(
                    'listen_tls = 0\nlisten_tcp = 1\nauth_tcp = "sasl"\n'
                    f'listen_addr = "127.0.0.1"\ntcp_port = "{port}"\n'
                )

    with rig_directory() as directory:
        here = directory / "h"
        here.mkdir()
        with Asking(here, 1, cache_directory() / "libvirt-qemu"):
            yield f"qemu+tcp://127.0.0.1:{port}/session"


def connect(uri: str, auth: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LIBVIRT_AUTH_FILE": str(auth)}
    if not auth.exists():
        environment = os.environ | {"HOME": str(auth.parent)}
    return subprocess.run(
        [sys.executable, "-c", SHOW, uri],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )


def auth_file(directory: Path, password: str) -> Path:
    """As kolla-ansible's role for nova makes it, and ours after it."""
    file = directory / "auth.conf"
    file.write_text(
        f"[credentials-default]\nauthname={NAME}\npassword={password}\n\n"
        "[auth-libvirt-default]\ncredentials=default\n"
    )
    return file


def test_libvirts_own_file_has_the_credentials(uri: str, tmp_path: Path) -> None:
    done = connect(uri, auth_file(tmp_path, PASSWORD))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_wrong_password_is_said_to_be_one(uri: str, tmp_path: Path) -> None:
    done = connect(uri, auth_file(tmp_path, "other"))
    assert done.returncode == 1
    assert "authentication failed" in done.stderr


def test_without_the_file_nobody_is_asked(uri: str, tmp_path: Path) -> None:
    done = connect(uri, tmp_path / "none")
    assert done.returncode == 1
    assert "Failed to collect auth credentials" in done.stderr
