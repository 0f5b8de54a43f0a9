"""SSH into a guest: dropbear there, its client here, of the same package.

keys = SshKeys(directory)
spec = GuestSpec(build({**extra, **keys.files()}, ssh=True, network=True), (SERVER, ...))
subprocess.run([*keys.client(port), "cat /file"])        # port: one that leads to the guest's PORT
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

from tests.rig import RigError
from tests.rig.guest_image import Service, ssh_root

PORT: Final = 22
WINDOW_BYTES: Final = 1 << 20
"""In place of dropbear's own 24 KiB, which would be the measure of its speed."""
HOST_KEY: Final = "etc/dropbear/host_key"
SERVER: Final = Service("sshd", f"dropbear -F -E -s -r /{HOST_KEY} -p {PORT} -W {WINDOW_BYTES}")


class SshKeys:
    """The guest's key and its user's, made in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._host, self._user = directory / "ssh-host-key", directory / "ssh-user-key"
        self._public = {key: self._make(key) for key in (self._host, self._user)}

    def _program(self, name: str) -> list[str]:
        root = ssh_root()
        libraries = root / "usr" / "lib" / "x86_64-linux-gnu"
        variables = [f"LD_LIBRARY_PATH={libraries}", f"HOME={self._directory}"]
        return ["env", *variables, str(root / "usr" / "bin" / name)]

    def _make(self, key: Path) -> str:
        """A new key; returns its public half."""
        words = [*self._program("dropbearkey"), "-t", "ed25519", "-f", str(key)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("ssh-ed25519 ")]
        if done.returncode or not lines:
            raise RigError(f"no SSH key: {done.stdout}{done.stderr}")
        return lines[0]

    def files(self) -> dict[str, bytes | Path]:
        """What the guest's image needs: root, who has no password, and the keys."""
        return {
            HOST_KEY: self._host,
            "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\n",
            "root/.ssh/authorized_keys": f"{self._public[self._user]}\n".encode(),
        }

    def client(self, port: int, *options: str) -> list[str]:
        """The client's words, to the guest behind a port of loopback; a command may follow."""
        words = self._program("dbclient")
        words += ["-T", "-y", "-y", "-i", str(self._user), "-W", str(WINDOW_BYTES)]
        return [*words, *options, "-p", str(port), "root@127.0.0.1"]
