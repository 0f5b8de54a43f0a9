"""Trove from PyPI, unmodified and with its encryption on: the guest's agent on vchan://, the
conductor and the task manager's side on rabbit://. docs/trove.md is what is set here.

Each release runs beside this test, with a guest's daemon on a unix socket: that its VM moves is
there that one host stops, and the next goes on. One release runs in a VM that migrates.
"""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.rig import oslo_image, rig_directory, tail, wait_until
from tests.rig.environment import carried, environment, pinned
from tests.rig.rabbit import RabbitServer
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit
from tests.rig.service_guest import ROOT, TIMEOUT_S, VM, ServiceGuest, block_of_page

if TYPE_CHECKING:
    from tests.rig.cloud import Cloud, Vm

MISSING = missing_for_rabbit()
MISSING_FOR_VM = MISSING or missing_for_libvirt() or oslo_image.can_carry()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

RIG: Final = ROOT / "tests" / "rig"
INJECTED: Final = "/etc/trove/conf.d"
"""Where Trove puts its files in a VM, and its agent looks for them."""
MEMORY_MIB: Final = 768
IMPORT_S: Final = 900.0
"""An emulated guest on a busy machine imports 1300 modules."""
MAKE_S: Final = 300.0
"""Trove makes a database in some 5 s of a processor's time."""
STATES: Final = ("BUILDING", "COMPLETED")

page_block = partial(block_of_page, "trove.md")


@dataclass(frozen=True)
class Release:
    """One of Trove's, and what it is installed with."""

    name: str
    requirements: tuple[str, ...]
    python_max: tuple[int, int] | None = None

    def python(self) -> Path:
        """The Python of an environment with it, made once."""
        if self.python_max and sys.version_info[:2] > self.python_max:
            newest = ".".join(map(str, self.python_max))
            pytest.skip(
                f"what Trove {self.name} was released with is for Python {newest} and older"
            )
        return environment("trove", self.requirements, vchan=True)


NEWEST: Final = Release("26.0.0", ("trove==26.0.0",))
OLDEST: Final = Release("21.0.0", tuple(pinned("trove-2024.1.txt")), python_max=(3, 11))


class Trove(ServiceGuest):
    """Trove's control side, with one instance."""

    def __init__(self, directory: Path, rabbit: RabbitServer, url: str, python: Path) -> None:
        super().__init__(directory, rabbit)
        self.python = python
        # As the page has it; what comes after is for this test's guest.
        guest = self.file(
            "trove-guestagent.conf",
            page_block("/etc/trove/trove-guestagent.conf"),
            "datastore_registry_ext = mysql:trove_manager.Manager",
            "report_interval = 2",
        )
        self.control = self.file(
            "control.conf",
            "[DEFAULT]",
            f"log_file = {directory}/control.out",
            f"transport_url = {url}",
            "control_exchange = trove",
            "trove_conductor_workers = 1",
            "conductor_manager = trove_conductor.Manager",
            "agent_call_low_timeout = 90",
            f"guest_config = {guest}",
            "[database]",
            f"connection = sqlite:///{directory}/db.sqlite",
            "[network]",
            "network_isolation = false",  # of a guest that runs on this machine
        )
        self._run(python.with_name("trove-manage"), "--config-file", self.control, "db_sync")
        made = self._run(python, "-W", "ignore", *self._part("make", self.control))
        self.instance, self.injected = json.loads(made.splitlines()[-1])

    def _run(self, *command: str | Path) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MAKE_S)
        assert done.returncode == 0, f"{done.stderr} {self.logs()}"
        return done.stdout

    def _part(self, *words: str | Path) -> list[str | Path]:
        *parts, config = words
        option = "--config-dir" if Path(config).is_dir() else "--config-file"
        return [RIG / "trove_parts.py", *parts, option, config]

    def trove(self, *words: str | Path) -> AbstractContextManager[subprocess.Popen[str]]:
        """One of Trove's programs."""
        command = [self.python, "-W", "ignore", *self._part(*words)]
        return self.process(str(words[0]), command, talks=words[0] == "tell")

    @contextmanager
    def control_side(self) -> Iterator[Teller]:
        """The conductor and the task manager, which has the instance prepared before the VM is
        there."""
        with (
            self.trove("conductor", self.control),
            self.trove("tell", self.instance, self.control) as process,
        ):
            teller = Teller(process)
            prepare = [512, "", [], [], "/dev/vdb", "/var/lib/mysql", None, None, None, None, None]
            assert teller.ask("prepare", *prepare) == [True, None]
            yield teller

    def _database(self) -> AbstractContextManager[sqlite3.Connection]:
        return closing(sqlite3.connect(self.directory / "db.sqlite"))

    def is_server(self, uuid: str) -> None:
        """Nova has answered the task manager."""
        with self._database() as database, database:
            database.execute("update instances set compute_instance_id = ?", (uuid,))

    def owners(self) -> str:
        """The page's lines, by the page's query."""
        (query,) = re.findall(r"^    (select .*)$", (ROOT / "docs/trove.md").read_text(), re.M)
        example = page_block("/etc/vchan/policy.d/51-trove-owners.policy")
        with self._database() as database:
            rows = list(database.execute(query))
        ours = r"uuid:{} \1trove/guestagent.{}"
        pattern = r"uuid:\S+ ( *)trove/guestagent[.]\S+"
        return "".join(re.sub(pattern, ours.format(*row), example) for row in rows)

    def status(self) -> list[Any]:
        with self._database() as database:
            query = "select status_description from service_statuses"
            return [row[0] for row in database.execute(query)]

    def noted(self) -> list[list[Any]]:
        """What the conductor notes, and a guest beside it."""
        return lines_of(self.journal.read_text()) if self.journal.exists() else []


class Teller:
    """The task manager's side."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.casts = 0

    def ask(self, method: str, *args: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([method, *args]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        return json.loads(line) if line else [False, "it has ended"]

    def cast(self) -> None:
        """The next user, and the next state of the backup."""
        user, backup = {"_name": f"u{self.casts}"}, {"id": "b0", "size": self.casts}
        assert self.ask("create_user", [user]) == [True, None]
        assert self.ask("create_backup", backup) == [True, None]
        self.casts += 1


def lines_of(journal: str) -> list[Any]:
    return [json.loads(line) for line in journal.splitlines()]


def check(guest: list[list[Any]], conductor: list[list[Any]], casts: int) -> None:
    """Nothing was lost, nothing ran twice, and in order.

    Args:
        guest: What was noted there, and `conductor` after it.
    """
    assert [words for words in guest if words[0] == "prepare"] == [["prepare", "u1", "p1"]]
    users = [name for what, *rest in guest if what == "create_user" for name in rest]
    assert users == [f"u{number}" for number in range(casts)]
    backups = [(size, state) for what, size, state in of(conductor, "update_backup")]
    assert Counter(backups) == Counter((size, state) for size in range(casts) for state in STATES)
    for size in range(casts):
        assert [state for each, state in backups if each == size] == list(STATES)
    beats = [sent for _, sent in of(conductor, "heartbeat")]
    assert len(beats) >= len(of(guest, "sent a heartbeat")) > 0
    assert beats == sorted(set(beats))


def of(noted: list[list[Any]], what: str) -> list[list[Any]]:
    return [words for words in noted if words[0] == what]


# --- beside this test


class Beside(Trove):
    """Its guest, and compute hosts that have it one after the other."""

    def with_trove(self, name: str) -> AbstractContextManager[subprocess.Popen[str]]:
        """A vchan-host, with the page's policy and no more."""
        policy = page_block("/etc/vchan/policy.d/50-trove.policy")
        return self.host(name, {"50-trove": policy, "51-trove-owners": self.owners()})

    def agent(self) -> AbstractContextManager[subprocess.Popen[str]]:
        """Trove's agent, with the files that the task manager gives it and nothing else."""
        directory = self.directory / "conf.d"
        directory.mkdir()
        for path, text in self.injected.items():
            assert Path(path).parent == Path(INJECTED) and "rabbit" not in text
            text = text.replace("/run/vchan/agent.sock", str(self.agent_socket))
            (directory / Path(path).name).write_text(text)
        return self.trove("guest", directory)


@pytest.mark.parametrize("release", [NEWEST, OLDEST], ids=lambda release: release.name)
def test_trove_unmodified_while_its_vm_moves(release: Release) -> None:
    python = release.python()
    with rig_directory() as directory, RabbitServer(directory / "rabbit") as rabbit:
        trove = Beside(directory, rabbit, rabbit.url, python)
        try:
            run(trove)
        except BaseException:
            print(trove.logs())
            raise


def run(trove: Beside) -> None:
    with trove.control_side() as teller, trove.guest_daemon(), trove.agent():
        with trove.with_trove("one") as host:
            trove.wait_for((trove.directory / "one" / "host.sock").exists)
            trove.is_server(VM)
            trove.file("one/policy.d/51-trove-owners.policy", trove.owners())
            reload_as_the_page_says(trove, host)
            trove.wait_for(lambda: bool(trove.noted()))
            assert trove.noted()[0] == ["prepare", "u1", "p1"]
            assert teller.ask("rpc_ping") == [True, True]
            teller.cast()
            trove.wait_for(lambda: len(of(trove.noted(), "create_user")) == 1)
            assert teller.ask("list_users")[1][0] == [{"_name": "u0", "_host": "%"}]
            assert "User nobody cannot be found" in str(teller.ask("get_user", "nobody", "%"))
            trove.wait_for(lambda: trove.status() == ["healthy"])
            look_as_the_page_says(trove, "one")
            for _ in range(10):
                teller.cast()
        for _ in range(10):  # nobody has the VM
            teller.cast()
        with trove.with_trove("two"):
            assert teller.ask("rpc_ping") == [True, True]
            everything = len(STATES) * teller.casts
            trove.wait_for(lambda: len(of(trove.noted(), "update_backup")) >= everything)
            guest = trove.noted()
            sent = len(of(guest, "sent a heartbeat"))
            trove.wait_for(lambda: len(of(trove.noted(), "heartbeat")) >= sent)
            check(guest, trove.noted(), teller.casts)


def reload_as_the_page_says(trove: Beside, host: subprocess.Popen[str]) -> None:
    (check, reload) = page_command("vchan policy check").split(" && ")
    assert reload == "systemctl reload vchan-host"  # the unit's ExecReload: this signal
    trove.cli("one", *check.split()[1:])
    host.send_signal(signal.SIGHUP)


def look_as_the_page_says(trove: Beside, name: str) -> None:
    topic = f"trove/guestagent.{trove.instance}"
    listed = json.loads(trove.cli(name, "--json", *words_of("vchan list")))
    assert [(row["uuid"], row["topics"]) for row in listed] == [(VM, [topic])]
    rows = lines_of(trove.cli(name, "--json", *words_of("vchan log")))
    assert {(row["kind"], row["topic"], row["verdict"]) for row in rows} == {
        ("cast", "trove-conductor", "allow")
    }


def page_command(begin: str) -> str:
    found = re.search(rf"^    ({begin}.*)$", (ROOT / "docs/trove.md").read_text(), re.M)
    assert found is not None, begin
    return found[1]


def words_of(begin: str) -> list[str]:
    return [word.strip("'") for word in page_command(begin).split()[1:]]


# --- in a VM


@pytest.fixture
def in_vm(cloud: Cloud, tmp_path: Path) -> Iterator[tuple[Trove, Vm, Teller]]:
    """It boots; both hosts have the page's policy meanwhile."""
    from tests.rig.compute import GUEST_DAEMON
    from tests.rig.guest_image import Service, build

    trove = Trove(tmp_path, cloud.rabbit, cloud.url, NEWEST.python())
    image = build(guest_files(trove)).staged(cloud.directory)
    program = f"python3 /app/trove_parts.py guest --config-dir {INJECTED}"
    services = (GUEST_DAEMON, Service("trove", f"env JOURNAL=/run/journal {program}"))
    with trove.control_side() as teller:
        vm = cloud.boot("trove", services, wait=False, image=image, memory_mib=MEMORY_MIB)
        trove.is_server(vm.uuid)
        with policy_on_hosts(cloud, trove):
            yield trove, vm, teller
            vm.discard()


def guest_files(trove: Trove) -> dict[str, bytes]:
    """Trove's agent, what it needs, and the task manager's files."""
    config = trove.file("guest.conf", *trove.injected.values())
    command = (RIG / "trove_parts.py", "trace", "--config-file", config)
    files = carried(trove.python, *command, cwd=trove.directory)
    for name in ("trove_parts.py", "trove_manager.py"):
        files[f"app/{name}"] = (RIG / name).read_bytes()
    return files | {path.lstrip("/"): text.encode() for path, text in trove.injected.items()}


@contextmanager
def policy_on_hosts(cloud: Cloud, trove: Trove) -> Iterator[None]:
    policies = {
        "50-trove": page_block("/etc/vchan/policy.d/50-trove.policy"),
        "51-trove-owners": trove.owners(),
    }
    hosts = (cloud.a, cloud.b)
    paths = [host.daemon.policy.with_name(f"{name}.policy") for host in hosts for name in policies]
    for path in paths:
        path.write_text(policies[path.stem])
    try:
        for host in hosts:
            host.daemon.signal(signal.SIGHUP)
        yield
    finally:
        for path in paths:
            path.unlink()
        for host in hosts:
            host.daemon.signal(signal.SIGHUP)


@pytest.mark.skipif(bool(MISSING_FOR_VM), reason=str(MISSING_FOR_VM))
def test_its_vm_migrates_live(in_vm: tuple[Trove, Vm, Teller]) -> None:
    """Calls, casts, heartbeats and what is said of backups go on: there, and back."""
    trove, vm, teller = in_vm

    def serves() -> bool:
        rows = vm.here.daemon.call("list")
        return [f"trove/guestagent.{trove.instance}"] in [row["topics"] for row in rows]

    console = vm.here.libvirt.console_path(vm.name)
    wait_until(serves, timeout_s=IMPORT_S, interval_s=1.0, failure=lambda: tail(console))
    with under_load(teller) as answered:
        for _ in range(2):
            more(answered, console)
            vm.migrate()
        more(answered, console)
    assert all(each == [True, True] for each in answered), answered
    users = teller.ask("list_users")
    wait_until(
        lambda: len(of(trove.noted(), "update_backup")) >= len(STATES) * teller.casts,
        timeout_s=TIMEOUT_S,
        interval_s=0.5,
        failure=lambda: f"{teller.casts}: {trove.noted()}",
    )
    with vm.shell() as shell:
        guest = lines_of(shell.check("cat /run/journal"))
    sent = len(of(guest, "sent a heartbeat"))
    trove.wait_for(lambda: len(of(trove.noted(), "heartbeat")) >= sent)
    check(guest, trove.noted(), teller.casts)
    assert len(users[1][0]) == teller.casts


@contextmanager
def under_load(teller: Teller) -> Iterator[list[Any]]:
    """Casts, and calls among them; gives what the calls have been answered."""
    answered: list[Any] = []
    is_enough = threading.Event()

    def drive() -> None:
        while not is_enough.is_set():
            for _ in range(3):
                teller.cast()
            answered.append(teller.ask("rpc_ping"))

    thread = threading.Thread(target=drive, name="task manager")
    thread.start()
    try:
        yield answered
    finally:
        is_enough.set()
        thread.join(TIMEOUT_S)
    assert not thread.is_alive()


def more(answered: list[Any], console: Path) -> None:
    """Wait for three more answers."""
    least = len(answered) + 3
    wait_until(
        lambda: len(answered) >= least,
        timeout_s=2 * TIMEOUT_S,
        interval_s=0.1,
        failure=lambda: f"{answered} {tail(console)}",
    )
