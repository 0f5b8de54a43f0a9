"""Copies into a VM and out of it, one after the other each way, while it migrates: counted, and
compared by checksums that the copying itself does not make."""

from __future__ import annotations

import hashlib
import random
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.rig.compute import ROOT, ComputeHost
from vchan.client import Client
from vchan.errors import VchanError

TOPIC = "vchan.standard"
"""Whose agent the guest must have, and let it read and write below /tmp."""
BLOCK_BYTES = 1 << 20
MAKE = """set -e
head -c 1048576 /dev/urandom >/tmp/block
for number in $(seq {blocks}); do echo $number; cat /tmp/block; done | head -c {size} >/tmp/out
rm /tmp/block
sha256sum /tmp/out
"""
"""Random bytes cost an emulated guest too much: one block of them, numbered each time."""
MAKE_S = 300.0
ANSWER_S = 120.0
END_S = 1800.0


class CopyTraffic:
    """Copies, from when the block is entered to `finish`.

    Args:
        vm: Its name.
        hosts: Where it may be; now, the first.
        directory: For files here.
        size: Of each copy.
    """

    def __init__(
        self, vm: str, uuid: str, hosts: Sequence[ComputeHost], directory: Path, size: int
    ) -> None:
        self._vm = vm
        self._uuid = uuid
        self._hosts = hosts
        self._directory = directory
        self._size = size
        self._content = directory / "copied"
        self._sum = ""  # of what goes in
        self._guests_sum = ""  # of what comes out
        self._is_enough = threading.Event()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._repeat, args=(copy,), name="copies")
            for copy in (self._copy_in, self._copy_out)
        ]
        self.copies = 0
        self.bytes = 0
        """Of copies that arrived as they were sent."""
        self.problems: list[str] = []

    def __enter__(self) -> Self:
        content = random.Random(self._size).randbytes(self._size)
        self._content.write_bytes(content)
        self._sum = hashlib.sha256(content).hexdigest()
        self._guests_sum = self._made_in_guest()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_enough.set()
        with self._lock:
            for process in self._running:
                process.terminate()
        for thread in self._threads:
            thread.join(END_S)

    def _made_in_guest(self) -> str:
        shell = self._hosts[0].shell(self._vm)
        try:
            script = MAKE.format(size=self._size, blocks=self._size // BLOCK_BYTES + 1)
            return shell.check(script, timeout_s=MAKE_S).split()[0]
        finally:
            shell.close()

    def end_early(self) -> None:
        """Begin no more copies."""
        self._is_enough.set()

    def finish(self) -> None:
        """Begin no more copies, and wait for those under way."""
        self.end_early()
        for thread in self._threads:
            thread.join(END_S)
            if thread.is_alive():
                self.problems.append(f"a copy is not done in {END_S:g} s")

    def _repeat(self, copy: object) -> None:
        assert callable(copy)
        while not self._is_enough.is_set():
            copy()

    def _copy_in(self) -> None:
        if self._cp(str(self._content), f"{self._vm}:/tmp/in"):
            self._note("into the VM", self._sum_in_guest("/tmp/in"), self._sum)

    def _copy_out(self) -> None:
        back = self._directory / "back"
        if self._cp(f"{self._vm}:/tmp/out", str(back)):
            found = hashlib.sha256(back.read_bytes()).hexdigest()
            self._note("out of the VM", found, self._guests_sum)

    def _note(self, what: str, found: str, expected: str) -> None:
        with self._lock:
            if found == expected:
                self.copies += 1
                self.bytes += self._size
            else:
                self.problems.append(f"{what}: other bytes have arrived: {found}")

    def _cp(self, *words: str) -> bool:
        """Whether the command says that it was copied."""
        first, *others = self._hosts
        also = [word for host in others for word in ("--also", str(host.daemon.socket))]
        process = subprocess.Popen(
            first.cli_words("cp", *also, *words),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        with self._lock:
            self._running.add(process)
        _, said = process.communicate()
        with self._lock:
            self._running.discard(process)
            if process.returncode:
                self.problems.append(said.decode().strip() or f"status {process.returncode}")
        return not process.returncode

    def _sum_in_guest(self, path: str) -> str:
        """By the host that has the VM."""
        until_s = time.monotonic() + ANSWER_S
        while True:
            for host in self._hosts:
                try:
                    with Client(str(host.daemon.socket)) as client:
                        args = {"path": path}
                        told = client.call(
                            TOPIC, "file_checksum", args, server=self._uuid, timeout_s=30.0
                        )
                        return str(told["sha256"])
                except VchanError as error:
                    if time.monotonic() > until_s:
                        return str(error)
