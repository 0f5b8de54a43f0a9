"""vchan-masakari and masakari's own API: told of a guest that is dead, of no other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.rig import end_process, tail, wait_until
from tests.rig.environment import environment
from tests.rig.ports import claim_ports
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit

if TYPE_CHECKING:
    from tests.rig.cloud import Cloud, Vm
    from tests.rig.compute import ComputeHost

MISSING = missing_for_rabbit() or missing_for_libvirt()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

ROOT = Path(__file__).parents[2]
RELEASES = ("masakari==22.0.0", "openstacksdk>=4,<5")
DEAD_S = 20
WAIT_S = 120.0


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of an environment with masakari."""
    return environment("masakari", RELEASES)


class Masakari:
    """Its API, and what came there."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def seen(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.url}/seen", timeout=30) as answer:
            found: list[dict[str, Any]] = json.load(answer)
        return found

    def told_of(self, vm: Vm) -> list[dict[str, Any]]:
        return [each for each in self.seen() if each["payload"]["instance_uuid"] == vm.uuid]


@contextlib.contextmanager
def running(log: Path, *command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        end_process(process, grace_s=5.0)


@pytest.fixture
def masakari(tmp_path: Path, python: Path) -> Iterator[Masakari]:
    (port,) = claim_ports(1)
    log = tmp_path / "masakari.log"
    program = ROOT / "tests" / "rig" / "masakari_api.py"
    with running(log, str(python), str(program), str(tmp_path), str(port), "host1"):
        wait_until(
            lambda: log.read_text().endswith("ready\n"),
            timeout_s=WAIT_S,
            interval_s=0.1,
            failure=lambda: tail(log),
        )
        yield Masakari(port)


def clouds_file(directory: Path, masakari: Masakari) -> Path:
    """The operator's."""
    clouds = directory / "clouds.yaml"
    auth = {"endpoint": f"{masakari.url}/v1", "token": "admin:admin"}
    cloud = {"auth_type": "admin_token", "auth": auth}
    clouds.write_text(json.dumps({"clouds": {"test": cloud}}))  # JSON is YAML
    return clouds


@contextlib.contextmanager
def telling(host: ComputeHost, python: Path, masakari: Masakari, directory: Path) -> Iterator[Path]:
    """A vchan-masakari beside this host's daemon; gives its log."""
    clouds = clouds_file(directory, masakari)
    words = ("--socket", str(host.daemon.socket), "--os-cloud", "test")
    log = directory / f"{host.name}.log"
    command = (str(python), "-m", "vchan.host.ops.masakari", *words, "--dead-after", str(DEAD_S))
    with running(log, *command, OS_CLIENT_CONFIG_FILE=str(clouds), PYTHONPATH=str(ROOT)) as process:
        yield log
        assert process.poll() is None, tail(log)


TELL = """
import sys
from datetime import UTC, datetime
from vchan.host.ops.deaths import Death, Deaths
from vchan.host.ops.masakari import Watch, connect

row = {"uuid": sys.argv[1], "name": "n", "domain": "running", "channel": "silent", "heard_s": 5.0}
row["guest"] = {"phase": "ready"}
answers = {"status": {"libvirt": "connected"}, "list": [row]}
for hostname in ("unknown", "host1", "host1"):  # the last is as after a restart of ours
    watch = Watch(answers.__getitem__, connect("test"), hostname, Deaths(20.0))
    for now_s in range(0, 60, 5):
        watch.look(float(now_s), datetime.now(UTC))
    print(hostname, len(watch._waiting))
"""


def test_what_its_api_takes(masakari: Masakari, python: Path, tmp_path: Path) -> None:
    uuid = "0a0a0a0a-0000-4000-8000-000000000000"
    done = subprocess.run(
        [str(python), "-c", TELL, uuid],
        cwd=ROOT,
        env={**os.environ, "OS_CLIENT_CONFIG_FILE": str(clouds_file(tmp_path, masakari))},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    # A host that no segment has is refused, and kept; a duplicate is as good as told.
    assert done.stdout.splitlines() == ["unknown 1", "host1 0", "host1 0"], done.stderr
    (told,) = masakari.seen()
    assert told["acts"] and told["payload"]["instance_uuid"] == uuid


def test_a_dead_guest_is_told_and_no_other(
    cloud: Cloud, masakari: Masakari, python: Path, tmp_path: Path
) -> None:
    """Of two: one is paused for a while, and dies later; the other migrates, and is paused."""
    for host in (cloud.a, cloud.b):
        policy = host.daemon.policy
        if "report any" not in policy.read_text():
            policy.write_text(f"{policy.read_text()}\nreport any any allow\n")
            host.daemon.signal(signal.SIGHUP)
    vm, other = (cloud.boot(name, wait=False) for name in ("mortal", "other"))
    try:
        wait_for(lambda: all(phase(each) == "ready" for each in (vm, other)), cloud.logs)
        with contextlib.ExitStack() as stack:
            logs = [
                stack.enter_context(telling(host, python, masakari, tmp_path))
                for host in (cloud.a, cloud.b)
            ]
            pause(vm)
            vm.domain.resume()
            vm.wait_ready()
            with vm.shell() as shell, contextlib.suppress(Exception):
                hang = "echo 0 >/proc/sys/kernel/panic; echo c >/proc/sysrq-trigger"
                shell.run(hang, timeout_s=2.0)
            other.migrate()
            other.migrate()
            pause(other)
            paused_s = time.monotonic()
            wait_for(lambda: bool(masakari.told_of(vm)), cloud.logs, *logs)
            # Nothing can be waited for here: neither is told of the other, nor of this one again.
            told_s = time.monotonic()
            time.sleep(max(paused_s, told_s) + DEAD_S + 10 - time.monotonic())
            (told,) = masakari.seen()
            assert told["acts"] and told["payload"]["instance_uuid"] == vm.uuid
    finally:
        vm.discard()
        other.discard()


def wait_for(reached: Callable[[], bool], why: Callable[[], str], *logs: Path) -> None:
    wait_until(
        reached,
        timeout_s=WAIT_S,
        interval_s=0.2,
        failure=lambda: "\n".join([*map(tail, logs), why()]),
    )


def pause(vm: Vm) -> None:
    vm.domain.suspend()
    wait_for(lambda: channel(vm) == "paused", vm.cloud.logs)


def row_of(vm: Vm) -> dict[str, Any]:
    rows = {row["uuid"]: row for row in vm.here.daemon.call("list")}
    found: dict[str, Any] = rows.get(vm.uuid) or {"channel": "none", "guest": None}
    return found


def channel(vm: Vm) -> str:
    word: str = row_of(vm)["channel"]
    return word


def phase(vm: Vm) -> str | None:
    found: str | None = (row_of(vm)["guest"] or {}).get("phase")
    return found
