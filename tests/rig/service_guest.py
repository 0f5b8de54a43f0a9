"""A guest's daemon on a unix socket, hosts that have it one after the other, and the programs of a
service around them: for services whose agents the image of the tests' VMs has no room for.

That the VM moves is here that one host stops, and the next goes on.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

from tests.rig import wait_until
from tests.rig.rabbit import RabbitServer

ROOT: Final = Path(__file__).parents[2]
VM: Final = "0a9e0000-0000-4000-8000-00000000000a"
STOP_S: Final = 20.0
TIMEOUT_S: Final = 90.0


def block_of_page(page: str, name: str) -> str:
    """What a page of the documents has operators write: the block after the line with a file's
    name."""
    text = (ROOT / "docs" / page).read_text()
    found = re.search(rf"`{re.escape(name)}`(?:.|\n)*?\n\n((?:    [^\n]*\n)+)", text)
    assert found is not None, f"docs/{page} has no block for {name}"
    return re.sub(r"^    ", "", found[1], flags=re.MULTILINE).strip() + "\n"


class ServiceGuest:
    """All of it below one directory; each part is a context manager."""

    def __init__(self, directory: Path, rabbit: RabbitServer) -> None:
        self.directory = directory
        self.rabbit = rabbit
        self.journal = directory / "journal"
        self.agent_socket = directory / "agent.sock"

    def file(self, name: str, *lines: str) -> Path:
        """A file with these lines."""
        path = self.directory / name
        path.write_text("\n".join(lines) + "\n")
        return path

    @contextmanager
    def process(
        self, name: str, command: Sequence[str | Path], *, talks: bool = False
    ) -> Iterator[subprocess.Popen[str]]:
        """A program, until the block ends.

        Args:
            talks: Its standard output is a pipe to the test.
        """
        with (self.directory / f"{name}.out").open("a") as out:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                env={**os.environ, "JOURNAL": str(self.journal)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if talks else out,
                stderr=out,
                text=True,
            )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def guest_daemon(self) -> AbstractContextManager[subprocess.Popen[str]]:
        """The real one."""
        port, socket = f"listen:{self.directory}/channel", str(self.agent_socket)
        command = [sys.executable, "-m", "vchan.guest.daemon", "--port", port, "--socket", socket]
        return self.process("guest-daemon", command)

    def host(
        self, name: str, policies: Mapping[str, str], *options: str
    ) -> AbstractContextManager[subprocess.Popen[str]]:
        """A vchan-host with the policy that is shipped, these, and no more.

        Args:
            options: Lines of its own section.
        """
        directory = self.directory / name
        (directory / "policy.d").mkdir(parents=True)
        shipped = (ROOT / "etc" / "policy.d" / "90-default.policy").read_text()
        for policy, text in ({"90-default": shipped} | dict(policies)).items():
            (directory / "policy.d" / f"{policy}.policy").write_text(text)
        config = self.file(
            f"{name}.conf",
            "[DEFAULT]",
            f"transport_url = {self.rabbit.url}",
            f"log_file = {directory}/log",
            "[vchan]",
            f"host = {name}",
            "libvirt_uri =",
            f"audit_log = {directory}/audit.log",
            f"policy_dir = {directory}/policy.d",
            f"socket = {directory}/host.sock",
            f"channels = {VM}=connect:{self.directory}/channel",
            *options,
        )
        command = [sys.executable, "-m", "vchan.host.daemon", "--config-file", str(config)]
        return self.process(name, command)

    def cli(self, host: str, *words: str) -> str:
        """What `vchan` says to these, asking that host."""
        socket = self.directory / host / "host.sock"
        done = subprocess.run(
            [sys.executable, "-m", "vchan.cli", "--socket", str(socket), *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def logs(self) -> str:
        """The ends of all of them."""
        files = [*self.directory.glob("*.out"), *self.directory.glob("*/log")]
        return "\n".join(f"--- {file}\n{file.read_text()[-3000:]}" for file in files)

    def wait_for(self, reached: Callable[[], bool]) -> None:
        """Until it is so.

        Raises:
            RigError: Not in time; with the logs.
        """
        wait_until(reached, timeout_s=TIMEOUT_S, interval_s=0.5, failure=self.logs)
