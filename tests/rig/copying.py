"""What `vchan cp` is the other end of: a guest's standard agent that reads and writes files, behind
a host's daemon; all real processes, with a cable where QEMU would be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.rig import end_process, tail, wait_until
from tests.rig.forwarding import ROOT, WAIT_S, Forwarding, Part

POLICY = "reply any any allow\nforward name:vm service:files allow\n"
ALLOW = "service:*"


class Copying(Forwarding):
    """The world. What the guest's owner allows is below `guest_files`.

    Args:
        rules: The standard agent's configuration; {} stands for `guest_files`.
        guest: The words that start its daemon.
    """

    RULES = '[read]\nallow = ["{0}/**"]\n[write]\nallow = ["{0}/**"]\n'

    def __init__(
        self, directory: Path, rules: str = RULES, policy: str = POLICY, allow: str = ALLOW
    ) -> None:
        super().__init__(directory, policy, allow)
        self.guest_files = directory / "in-vm"
        self.guest_files.mkdir()
        self.here = directory / "on-host"
        self.here.mkdir()
        config = directory / "standard.toml"
        config.write_text(rules.format(self.guest_files))
        config.chmod(0o644)
        words = ["--config", str(config), "--socket", str(directory / "agent.sock")]
        self.agent = self._part("agent", "-m", "vchan.agents.standard.agent", *words)

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self.start_agent()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def start_agent(self) -> None:
        """And wait until it listens."""
        listening = self.directory / "services" / "files"
        listening.unlink(missing_ok=True)  # of one that was killed
        self.agent.start()
        failure = lambda: f"no service: {tail(self.agent.log)}"  # noqa: E731
        wait_until(listening.exists, timeout_s=WAIT_S, interval_s=0.02, failure=failure)

    def inside(self, name: str) -> str:
        """A path in the VM, as `vchan cp` is told it."""
        return f"vm:{self.guest_files}/{name}"

    def cp(self, *words: str) -> tuple[int, str]:
        """`vchan cp`, to its end: its status, and what it has said."""
        done = self.cli("cp", *words)
        assert done.stdout == b""
        return done.returncode, done.stderr.decode()

    def begin_cp(self, *words: str) -> Command:
        """`vchan cp`, begun."""
        return Command(self, words)


class Command:
    """`vchan cp`, under way."""

    def __init__(self, world: Copying, words: tuple[str, ...]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *world.cli_words("cp", *words)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end_process(self.process, grace_s=5.0)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def wait_part(self, path: Path, size: int) -> None:
        """Until so much of a file has come."""
        part = path.with_name(f".{path.name}.vchan-part")

        def has_come() -> bool:
            assert self.process.poll() is None, self.end()
            return part.exists() and part.stat().st_size >= size

        failure = lambda: f"{part}: {sorted(part.parent.iterdir())}"  # noqa: E731
        wait_until(has_come, timeout_s=WAIT_S, interval_s=0.01, failure=failure)

    def end(self) -> tuple[int, str]:
        """Wait for its end: its status, and what it has said."""
        _, said = self.process.communicate(timeout=3 * WAIT_S)
        return self.process.returncode, said.decode()


__all__ = ["ALLOW", "POLICY", "Command", "Copying", "Part"]
