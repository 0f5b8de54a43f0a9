"""Trove from PyPI, unmodified and with its encryption on: the guest's agent on vchan://, the
conductor and the task manager's side on rabbit://. docs/trove.md is what is set here.

The guest's daemon is real and runs beside this test, on a channel that is a unix socket: the image
of the tests' VMs has no room for Trove. That the VM moves is here that one host stops, and the next
goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from tests.rig import rig_directory, wait_until
from tests.rig.guest_image import cache_directory
from tests.rig.rabbit import RabbitServer
from tests.rig.requirements import missing_for_rabbit

MISSING = missing_for_rabbit()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

ROOT: Final = Path(__file__).parents[2]
PARTS: Final = ROOT / "tests" / "rig" / "trove_parts.py"
TROVE: Final = "26.0.0"
VM: Final = "0a9e0000-0000-4000-8000-00000000000a"
TIMEOUT_S: Final = 90.0


@pytest.fixture(scope="module")
def python() -> Path:
    """The Python of an environment with Trove, made once."""
    key = hashlib.sha256(f"{sys.version} {TROVE}".encode()).hexdigest()[:12]
    environment = cache_directory() / f"trove-{TROVE}-{key}"
    python = environment / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    if not (environment / "complete").exists():
        venv = [sys.executable, "-m", "venv", "--clear", str(environment)]
        subprocess.run(venv, check=True, timeout=600)
        subprocess.run([*pip, f"trove=={TROVE}"], check=True, timeout=900)
        (environment / "complete").touch()
    subprocess.run([*pip, "--no-deps", "--editable", str(ROOT)], check=True, timeout=600)
    return python


def page_block(name: str) -> str:
    """What the page has operators write: the block after the line that names the file."""
    page = (ROOT / "docs" / "trove.md").read_text()
    found = re.search(rf"`{re.escape(name)}`(?:.|\n)*?\n\n((?:    [^\n]*\n)+)", page)
    assert found is not None, f"docs/trove.md has no block for {name}"
    return re.sub(r"^    ", "", found[1], flags=re.MULTILINE).strip() + "\n"


class Cloud:
    """A control side with Trove, and a compute host's parts."""

    def __init__(self, directory: Path, rabbit: RabbitServer, python: Path) -> None:
        self.directory = directory
        self.rabbit = rabbit
        self.python = python
        self.journal = directory / "journal"
        self._stack = ExitStack()
        self.control = self._file(
            "control.conf",
            "[DEFAULT]",
            f"transport_url = {rabbit.url}",
            "control_exchange = trove",
            "trove_conductor_workers = 1",
            "agent_call_low_timeout = 30",
            "[database]",
            f"connection = sqlite:///{directory}/db.sqlite",
        )
        manage = python.with_name("trove-manage")
        self._run(str(manage), "--config-file", str(self.control), "db_sync")
        made = self._run(str(python), "-W", "ignore", *self._part("make", self.control))
        self.instance, self.key = made.split()[-2:]

    def _file(self, name: str, *lines: str) -> Path:
        path = self.directory / name
        path.write_text("\n".join(lines) + "\n")
        return path

    def _run(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _part(self, *words: str | Path) -> list[str]:
        *parts, file = words
        return [str(PARTS), *map(str, parts), "--config-file", str(file)]

    @contextmanager
    def process(self, name: str, command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
        """A program, until the block ends."""
        with (self.directory / f"{name}.out").open("a") as out:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "JOURNAL": str(self.journal)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if name == "tell" else out,
                stderr=out,
                text=True,
            )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def trove(self, *words: str | Path) -> Any:
        """One of Trove's programs."""
        return self.process(str(words[0]), [str(self.python), "-W", "ignore", *self._part(*words)])

    def guest_daemon(self) -> Any:
        port, socket = f"listen:{self.directory}/channel", f"{self.directory}/agent.sock"
        command = [sys.executable, "-m", "vchan.guest.daemon", "--port", port, "--socket", socket]
        return self.process("guest-daemon", command)

    def host(self, name: str) -> Any:
        """A vchan-host, with the page's policy and no more."""
        directory = self.directory / name
        (directory / "policy.d").mkdir(parents=True)
        (directory / "policy.d" / "90-default.policy").write_text(
            (ROOT / "etc" / "policy.d" / "90-default.policy").read_text()
        )
        policy = page_block("/etc/vchan/policy.d/50-trove.policy")
        owners = page_block("/etc/vchan/policy.d/51-trove-owners.policy")
        owner, *_ = owners.splitlines()
        owner = re.sub(
            r"uuid:\S+ +trove/guestagent[.]\S+",
            f"uuid:{VM} trove/guestagent.{self.instance}",
            owner,
        )
        (directory / "policy.d" / "50-trove.policy").write_text(policy)
        (directory / "policy.d" / "51-trove-owners.policy").write_text(owner + "\n")
        config = self._file(
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
        )
        command = [sys.executable, "-m", "vchan.host.daemon", "--config-file", str(config)]
        return self.process(name, command)

    def agent(self) -> Any:
        """Trove's agent, without a credential."""
        file = self._file(
            "guest.conf",
            "[DEFAULT]",
            f"guest_id = {self.instance}",
            f"instance_rpc_encr_key = {self.key}",
            "datastore_manager = mysql",
            "datastore_registry_ext = mysql:trove_manager.Manager",
            "report_interval = 2",
            page_block("/etc/trove/conf.d/vchan.conf").replace(
                "/run/vchan/agent.sock", f"{self.directory}/agent.sock"
            ),
        )
        assert "rabbit" not in file.read_text()
        return self.trove("guest", file)

    def noted(self) -> list[list[Any]]:
        if not self.journal.exists():
            return []
        return [json.loads(line) for line in self.journal.read_text().splitlines()]

    def status(self) -> list[Any]:
        with closing(sqlite3.connect(self.directory / "db.sqlite")) as database:
            query = "select status_description from service_statuses"
            return [row[0] for row in database.execute(query)]

    def logs(self) -> str:
        files = [*self.directory.glob("*.out"), *self.directory.glob("*/log")]
        return "\n".join(f"--- {file}\n{file.read_text()[-3000:]}" for file in files)


def ask(teller: subprocess.Popen[str], method: str, *args: Any) -> Any:
    assert teller.stdin is not None and teller.stdout is not None
    teller.stdin.write(json.dumps([method, *args]) + "\n")
    teller.stdin.flush()
    line = teller.stdout.readline()
    return json.loads(line) if line else [False, "it has ended"]


def test_trove_unmodified_while_its_vm_moves(python: Path) -> None:
    with rig_directory() as directory, RabbitServer(directory / "rabbit") as rabbit:
        cloud = Cloud(directory, rabbit, python)
        try:
            run(cloud)
        except BaseException:
            print(cloud.logs())
            raise


def run(cloud: Cloud) -> None:
    with (
        cloud.trove("conductor", cloud.control),
        cloud.trove("tell", cloud.instance, cloud.control) as teller,
    ):
        # As the task manager does: before the VM is there.
        prepare = [512, [], [], [], "/dev/vdb", "/var/lib/mysql", None, None, None, None, None]
        assert ask(teller, "prepare", *prepare) == [True, None]
        with cloud.guest_daemon(), cloud.agent():
            with cloud.host("one"):
                wait_for(cloud, lambda: len(cloud.noted()) == 1)
                assert cloud.noted() == [["prepare", "u1", "p1"]]
                assert ask(teller, "rpc_ping") == [True, True]
                assert ask(teller, "list_users")[1][0] == [{"_name": "joe", "_host": "%"}]
                assert "User nobody cannot be found" in str(ask(teller, "get_user", "nobody", "%"))
                wait_for(cloud, lambda: cloud.status() == ["healthy"])
                for number in range(10):
                    ask(teller, "create_user", [{"_name": f"u{number}"}])
            for number in range(10, 20):  # nobody has the VM
                ask(teller, "create_user", [{"_name": f"u{number}"}])
            with cloud.host("two"):
                wait_for(cloud, lambda: len(cloud.noted()) >= 21)
                assert ask(teller, "rpc_ping") == [True, True]
                users = [name for what, name in cloud.noted()[1:] if what == "create_user"]
                assert users == [f"u{number}" for number in range(20)]


def wait_for(cloud: Cloud, reached: Any) -> None:
    wait_until(reached, timeout_s=TIMEOUT_S, interval_s=0.5, failure=cloud.logs)
