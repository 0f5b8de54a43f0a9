"""Hostile guests beside one that behaves: processes on sockets, real VMs, and a real broker.

What comes of each attack in every detail is in tests/unit/test_attacks.py; what it costs the
neighbour, `tests.attack.run` measures.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import amqp
import pytest

from tests.attack import crowd
from tests.attack.hostile import ATTACKS
from tests.attack.stream_user import TARGET, using_streams
from tests.rig import end_process, rig_directory, tail, wait_until
from tests.rig.guest import GuestSpec, QemuGuest
from tests.rig.guest_image import VCHAN_PORT, Service, build
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit
from vchan.client import Client
from vchan.errors import CallTimeout, RemoteError
from vchan.host.policy.log_budget import BURST_BYTES, BYTES_PER_S
from vchan.host.policy.vm_limits import Limits
from vchan.host.vm.upward import ANSWERS_BYTES_MAX
from vchan.session import BACKLOG_BYTES_MAX

if TYPE_CHECKING:
    from tests.rig.rabbit import RabbitServer
    from tests.rig.undriven import UndrivenHost

MISSING = missing_for_libvirt()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]
needs_rabbit = pytest.mark.skipif(bool(missing_for_rabbit()), reason=str(missing_for_rabbit()))

ROOT = Path(__file__).resolve().parents[2]
NEIGHBOUR = "good"
SECONDS = 1.2
WAIT_S = 300.0
"""Until something is seen, which is mostly soon: an emulated guest on a busy machine takes a minute
to begin an attack."""
CALL_S = 30.0
RSS_KIB_MAX = 32 * 1024
"""What an attack may add to the daemon's memory."""
LOG_LINES_MAX = 100
"""What an attack may add to the daemon's log."""
LIMITS = Limits(
    bytes_per_s=256 * 1024,
    messages_per_s=600,
    frames_per_s=1000,
    handshakes_per_min=10,
    violations_per_min=3,
)
"""The attackers': low ones, so that they are reached on a machine that is busy, too."""
VM_LIMITS = replace(LIMITS, handshakes_per_min=60)
"""For one VM that attacks in many ways: it soon has some again."""


def policy(limits: Limits) -> str:
    """Some topics may be served and asked; all but the neighbour are held to these limits."""
    return f"""
listen,reply  any  agent          allow
listen,reply  any  t*             allow
call          any  nobody         allow
call,cast     any  control        allow
forward       any  {TARGET}         allow
limit  name:{NEIGHBOUR}  {_line_of(Limits())}
limit  any               {_line_of(limits)}
"""


def _line_of(limits: Limits) -> str:
    names = ("bytes_per_s", "messages_per_s", "frames_per_s", "handshakes_per_min")
    values = {name: getattr(limits, name) for name in (*names, "violations_per_min")}
    return " ".join(f"{name}={value}" for name, value in values.items())


HANDSHAKES = "handshakes a minute"
VIOLATIONS = f"{LIMITS.violations_per_min + 1} violations in a minute, the last: "
EXPECTED: dict[str, tuple[str, ...]] = {
    "torn_frame_smuggling": ("bad_payloads", "throttled"),
    "hello_storm": ("quarantines", HANDSHAKES),
    "handshake_storm": ("quarantines", HANDSHAKES),
    "giant_lengths": ("quarantines", f"{VIOLATIONS}a message of 4294967295 bytes"),
    "never_finishing": ("frames_received",),
    "tiny_frames": ("throttled",),
    "tiny_fragments": ("throttled",),
    "unread_replies": ("guest_requests",),
    "unread_answers": ("guest_requests",),  # here nobody serves what they ask
    "large_answers": ("guest_requests",),
    "acks_of_unsent": ("quarantines", f"{VIOLATIONS}it acknowledged frame"),
    "holes": ("throttled", "losses"),
    "credit_games": ("throttled", "guest_denied"),
    "id_forgery": ("throttled", "guest_requests"),
    "replies_for_others": ("throttled",),
    "subscription_bomb": ("throttled", "topics_over_limit"),
    "topic_squatting": ("guest_denied",),
    "context_injection": ("throttled", "guest_requests"),
    "exception_injection": (),
    "json_bombs": ("throttled", "guest_refused"),
    "json_bombs_in_answers": (),
    "audit_injection": ("throttled", "guest_denied"),
    "stops_reading": (),
    "unasked_streams": ("quarantines", f"{VIOLATIONS}Open: no streams are taken out of a guest"),
    "stream_games": ("throttled",),
    "taken_streams": ("throttled", "streams_reset"),
    "garbage": ("throttled", "bytes_skipped"),
}
"""The counters that must show it, and why the VM is closed off."""


class Attacker:
    """An attacking process on a VM's channel.

    Args:
        host: Not started yet: it looks ever more rarely for a socket that is not there.
    """

    def __init__(self, host: UndrivenHost, vm: str) -> None:
        self._host = host
        self.vm = vm
        self._channel = socket.socket(socket.AF_UNIX)
        self._channel.bind(str(host.vms[vm].path))
        self._channel.listen()

    @contextlib.contextmanager
    def attacking(
        self, name: str, seconds: float, word: str = ""
    ) -> Iterator[subprocess.Popen[str]]:
        """From the first word to the host on; to its end, unless left before."""
        fd = self._channel.fileno()
        command = [
            sys.executable,
            "-m",
            "tests.attack.hostile",
            f"fd:{fd}",
            name,
            str(seconds),
            word,
        ]
        with subprocess.Popen(
            command, cwd=ROOT, pass_fds=[fd], stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                wait_until(
                    lambda: self.status()["session"]["greetings"] > 0,
                    timeout_s=WAIT_S,
                    interval_s=0.02,
                    failure=lambda: f"{name} never began: {self.status()}",
                )
                yield process
            finally:
                if process.poll() is None:
                    process.kill()

    def status(self) -> Any:
        """What the operator sees of this VM."""
        return self._host.daemon.status(self.vm)

    def close(self) -> None:
        """The VM's QEMU ends."""
        self._channel.close()


class Scene:
    """A host, a neighbour that answers calls, and a VM for each attacker."""

    def __init__(self, directory: Path, vms: Sequence[str], **host: Any) -> None:
        from tests.rig.undriven import UndrivenHost

        self.host = UndrivenHost(directory, [NEIGHBOUR, *vms], **{"policy": policy(LIMITS), **host})
        self.daemon = self.host.daemon
        self.attackers = {vm: Attacker(self.host, vm) for vm in vms}
        self._exit = contextlib.ExitStack()
        self._numbers = iter(range(10**9))

    def __enter__(self) -> Self:
        with self._exit:
            for attacker in self.attackers.values():
                self._exit.callback(attacker.close)
            command = [sys.executable, "-m", "tests.attack.neighbour"]
            self.neighbour = subprocess.Popen(
                [*command, self.path_of(NEIGHBOUR)], cwd=ROOT, start_new_session=True
            )
            self._exit.callback(end_process, self.neighbour, grace_s=0.0)
            self._exit.enter_context(self.host)
            self.client = self._exit.enter_context(Client(str(self.daemon.socket)))
            self.daemon.wait_ready(NEIGHBOUR, topics=["agent"])
            self._exit = self._exit.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit.__exit__(kind, error, trace)

    def path_of(self, vm: str) -> str:
        """Of its channel."""
        return str(self.host.vms[vm].path)

    def uuid_of(self, vm: str) -> str:
        """As libvirt says."""
        return self.host.vms[vm].uuid

    def call_neighbour(self) -> None:
        """It answers, and with the answer to this call."""
        number = next(self._numbers)
        server = self.uuid_of(NEIGHBOUR)
        answer = self.client.call("agent", "m", {"n": number}, server=server, timeout_s=CALL_S)
        assert answer["args"] == {"n": number}

    def audit(self, vm: str) -> list[Any]:
        """The audit log's lines of a VM."""
        lines = map(json.loads, self.host.audit_log.read_bytes().splitlines())
        return [line for line in lines if line["vm"] == self.uuid_of(vm)]


class Bounds:
    """What an attack may cost the daemon. Fails if it was more."""

    def __init__(self, daemon: Any) -> None:
        self._daemon = daemon

    def _memory_kib(self, name: str) -> int:
        for line in Path(f"/proc/{self._daemon.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
        raise AssertionError(name)

    def _lines(self) -> int:
        return int(self._daemon.log.read_text(errors="replace").count("\n"))

    def _log_bytes(self) -> int:
        return int(self._daemon.log.stat().st_size)

    def __enter__(self) -> None:
        Path(f"/proc/{self._daemon.pid}/clear_refs").write_text("5")  # the peak begins anew
        self._before = self._memory_kib("VmRSS"), self._lines()
        self._log_before, self._began_s = self._log_bytes(), time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            rss_kib, lines = self._before
            assert self._daemon.is_running
            assert self._memory_kib("VmHWM") - rss_kib < RSS_KIB_MAX
            assert self._lines() - lines < LOG_LINES_MAX, tail(self._daemon.log)
            budget = BURST_BYTES + BYTES_PER_S * (time.monotonic() - self._began_s)
            written = self._log_bytes() - self._log_before
            assert written < 2 * budget, tail(self._daemon.log)  # the time stands in each line


def counters_in(status: Any) -> dict[str, int]:
    """All of them, by name."""
    found: dict[str, int] = {}
    for key, value in status.items():
        if isinstance(value, dict):
            found |= counters_in(value)
        elif isinstance(value, int):
            found[key] = value
    return found


def outlive(name: str, scene: Scene | VmScene, status: Callable[[], Any], *, since: Any) -> None:
    """Call the neighbour until the attack shows as it must, and for SECONDS at least.

    Args:
        status: Of the VM that attacks.
        since: What that was before.
    """
    before = counters_in(since)
    at_least_s, deadline_s = time.monotonic() + SECONDS, time.monotonic() + WAIT_S

    def shows(expected: str, now: Any) -> bool:
        if " " in expected:
            return expected in (now["quarantine"] or "")
        return counters_in(now)[expected] > before.get(expected, 0)

    while True:
        scene.call_neighbour()
        now = status()
        missing = [each for each in EXPECTED[name] if not shows(each, now)]
        if not missing and time.monotonic() >= at_least_s:
            break
        assert time.monotonic() < deadline_s, (missing, now)
    assert bool(now["quarantine"]) == ("quarantines" in EXPECTED[name])


# --- processes on sockets


@pytest.fixture(scope="module")
def sockets() -> Iterator[Scene]:
    with rig_directory() as directory, Scene(directory / "h", [*ATTACKS]) as scene:
        yield scene


def test_every_attack_has_an_expectation() -> None:
    assert set(EXPECTED) == set(ATTACKS)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(sockets: Scene, name: str) -> None:
    attacker = sockets.attackers[name]
    word = {"topic_squatting": sockets.uuid_of(NEIGHBOUR), "replies_for_others": "ab" * 16}
    with Bounds(sockets.daemon):
        with attacker.attacking(name, WAIT_S, word.get(name, "")), asking(sockets, name):
            outlive(name, sockets, attacker.status, since={})
        sockets.call_neighbour()


@contextlib.contextmanager
def asking(scene: Scene, name: str) -> Iterator[None]:
    """Some attackers wait to be asked, once or all the while."""
    ask(scene, name, name)
    if name == "taken_streams":
        scene.daemon.wait_ready(name)
        with using_streams(str(scene.daemon.socket), name):
            yield
    else:
        yield


def ask(scene: Scene | VmScene, name: str, vm: str) -> None:
    """Some attackers wait to be asked."""

    def call(timeout_s: float) -> Any:
        return scene.client.call("agent", "m", {"x": "y" * 10_000}, server=vm, timeout_s=timeout_s)

    if name in ("exception_injection", "json_bombs_in_answers", "stops_reading"):
        scene.daemon.wait_ready(vm, topics=["agent"])
    if name == "exception_injection":
        with pytest.raises(RemoteError) as caught:
            call(CALL_S)
        assert caught.value.class_name == "system"
    elif name == "json_bombs_in_answers":
        with pytest.raises(RemoteError, match="the result is not JSON"):
            call(CALL_S)
    elif name == "stops_reading":
        for _ in range(20):
            with pytest.raises(CallTimeout):
                call(0.05)


def test_the_audit_log_is_whole_after_all_that(sockets: Scene) -> None:
    """Every line is one decision on one of its VMs, and no byte of it steers a terminal."""
    known = {vm.uuid: name for name, vm in sockets.host.vms.items()}
    for line in sockets.host.audit_log.read_bytes().splitlines():
        assert all(32 <= byte < 127 for byte in line)
        record = json.loads(line)
        assert record["name"] == known[record["vm"]]
    closed = {
        name for name in ATTACKS if any(e["verdict"] == "quarantine" for e in sockets.audit(name))
    }
    assert closed == {name for name, expected in EXPECTED.items() if "quarantines" in expected}


# --- a real VM attacks, another one behaves

PORT = f"/dev/virtio-ports/{VCHAN_PORT}"
FROM_GUEST = (
    "garbage",
    "torn_frame_smuggling",
    "tiny_frames",
    "stops_reading",
    "subscription_bomb",  # after which this VM may serve no other topic
    "hello_storm",
)
"""What means most, with QEMU and the virtio rings between."""


class VmScene:
    """A host, a VM with the daemon and an agent, and a VM that does what it likes."""

    def __init__(self, directory: Path) -> None:
        from tests.rig.undriven import UndrivenHost

        rig = ROOT / "tests"
        image = build(
            {
                "app/hostile.py": rig / "attack" / "hostile.py",
                "app/agent.py": rig / "rig" / "counting_agent.py",
            }
        )
        good = (
            Service("vchan-guest", "python3 -m vchan.guest.daemon"),
            Service("agent", "python3 /app/agent.py agent"),
        )
        self.host = UndrivenHost(directory / "h", [NEIGHBOUR, "bad"], policy=policy(VM_LIMITS))
        self.daemon = self.host.daemon
        self.guests = {
            NEIGHBOUR: QemuGuest(directory / "g", GuestSpec(image, good)),
            "bad": QemuGuest(directory / "b", GuestSpec(image)),
        }
        self._exit = contextlib.ExitStack()
        self._number = 0

    def __enter__(self) -> Self:
        with self._exit:
            for name, guest in self.guests.items():
                self._exit.enter_context(guest)
                self.host.vms[name].path.symlink_to(guest.port())
            self._exit.enter_context(self.host)
            self.client = self._exit.enter_context(Client(str(self.daemon.socket)))
            self.daemon.wait_ready(NEIGHBOUR, topics=["agent"])
            self.guests["bad"].shell("true")
            self._exit = self._exit.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit.__exit__(kind, error, trace)

    def call_neighbour(self) -> None:
        """Its agent answers, and with the answer to this call."""
        self._number += 1
        args = {"sender": "test", "number": self._number}
        server = self.host.vms[NEIGHBOUR].uuid
        answer = self.client.call("agent", "echo", args, server=server, timeout_s=CALL_S)
        assert answer == ["test", self._number, ""]

    def status(self) -> Any:
        """What the operator sees of the VM that attacks."""
        return self.daemon.status("bad")

    def release(self) -> None:
        """From quarantine, by the operator; once it may greet ten times again."""
        if self.status()["quarantine"]:
            time.sleep(600 / VM_LIMITS.handshakes_per_min)
            self.daemon.call("release", vm="bad")

    @contextlib.contextmanager
    def attacking(self, name: str) -> Iterator[None]:
        """In the VM, at full speed."""
        before = self.status()["session"]["greetings"]
        shell = self.guests["bad"].shell
        shell(f"python3 /app/hostile.py {PORT} {name} 600 >/dev/console 2>&1 & echo $! >/run/bad")
        try:
            wait_until(
                lambda: self.status()["session"]["greetings"] > before,
                timeout_s=WAIT_S,
                interval_s=0.1,
                failure=lambda: f"{name} never began: {self.status()}",
            )
            yield
        finally:
            shell("kill $(cat /run/bad); while kill -0 $(cat /run/bad); do sleep 0.1; done")


def test_a_crowd_of_attackers_is_measured_and_nobody_else_fails() -> None:
    with rig_directory() as directory:
        result = crowd.measure(directory, vms=6, hostile=2, seconds=0.5, rounds=1)
    for row in (result["without"], result["with"]):
        assert row["calls"] > 0
        assert row["failed"] == 0
        assert row["wait_p99_us"] > 0
    assert result["with"]["attacker_ms_per_s"] > result["without"]["attacker_ms_per_s"]


@pytest.fixture(scope="module")
def vms() -> Iterator[VmScene]:
    with rig_directory() as directory, VmScene(directory) as scene:
        yield scene


@pytest.mark.parametrize("name", FROM_GUEST)
def test_attack_from_a_real_vm(vms: VmScene, name: str) -> None:
    vms.release()
    before = vms.status()
    with Bounds(vms.daemon):
        with vms.attacking(name):
            if name == "stops_reading":
                ask(vms, name, "bad")
            outlive(name, vms, vms.status, since=before)
        vms.call_neighbour()


def test_a_vm_that_was_closed_off_is_served_again_when_it_behaves(vms: VmScene) -> None:
    """By the operator's word."""
    vms.release()
    with vms.attacking("giant_lengths"):
        outlive("giant_lengths", vms, vms.status, since={})
    assert vms.status()["state"] == "quarantined"
    vms.release()
    vms.guests["bad"].shell("python3 -m vchan.guest.daemon >/dev/console 2>&1 &")
    vms.daemon.wait_ready("bad")
    vms.call_neighbour()


# --- with a broker


@pytest.fixture(scope="module")
def rabbit() -> Iterator[RabbitServer]:
    from tests.rig.rabbit import RabbitServer

    with rig_directory() as directory, RabbitServer(directory / "rabbit") as server:
        yield server


@pytest.fixture
def directory() -> Iterator[Path]:
    with rig_directory() as directory:
        yield directory


OPEN = """
listen,reply  any  any                  allow
call,cast     any  control              allow
call          any  nobody               allow
"""
"""As careless as may be: whatever a guest asks to serve, it may."""
HOSTS_KEYS = {"vchan_host", "vchan_instance_uuid", "vchan_project_id"}


@pytest.fixture
def brokered(directory: Path, rabbit: RabbitServer) -> Iterator[Scene]:
    url = rabbit.url
    with Scene(directory / "h", ["bad"], policy=OPEN, transport_url=url) as scene:
        wait_until(
            lambda: f"agent.{scene.uuid_of(NEIGHBOUR)}" in consumed_queues(rabbit),
            timeout_s=WAIT_S,
            interval_s=0.1,
            failure=lambda: f"{rabbit.queues()}",
        )
        yield scene


def consumed_queues(rabbit: RabbitServer) -> set[str]:
    return {name for name, facts in rabbit.queues().items() if facts.consumers}


def finish(process: subprocess.Popen[str]) -> Any:
    """Wait for the attack's end; what it did."""
    out, _ = process.communicate(timeout=WAIT_S)
    return json.loads(out.splitlines()[-1])


@needs_rabbit
def test_a_squatter_hears_nothing_that_is_for_its_neighbour(
    brokered: Scene, rabbit: RabbitServer, directory: Path
) -> None:
    """Nor what a service says to all its servers; and what it says so itself, nobody hears."""
    from tests.rig.caller import Caller
    from tests.rig.control_service import ControlService

    good, bad = brokered.uuid_of(NEIGHBOUR), brokered.uuid_of("bad")
    log = directory / "service.log"
    with ControlService(rabbit.url, "control", log) as service, Caller(rabbit.url, log) as caller:
        with brokered.attackers["bad"].attacking("topic_squatting", 6.0, good) as process:
            wait_until(
                lambda: f"agent.{bad}" in consumed_queues(rabbit),
                timeout_s=WAIT_S,
                interval_s=0.1,
                failure=lambda: f"it squats nowhere: {tail(brokered.daemon.log)}",
            )
            for number in range(20):
                answer = caller.call("agent", good, "m", number=number)
                assert answer["args"] == {"number": number}
            publish(rabbit, "control_fanout", "", "note", {"sender": "all", "number": 1})
            did = finish(process)
        ran = service.finish()
    assert did["requests_heard"] == 0
    assert [entry.number for entry in ran["all"]] == [1]
    assert "hostile" not in ran
    squatted = {name for name in rabbit.queues() if name.endswith(bad)}
    assert f"agent.{good}.{bad}" in squatted  # it was let, and it is of no use
    denied = {each["exchange"] for each in brokered.audit("bad") if each["verdict"] == "deny"}
    assert denied >= {"control_fanout", "control_fan\nout", "agent_fanout", "amq.fanout"}
    assert all(line[:2] == "20" for line in brokered.daemon.log.read_text().splitlines())


def publish(
    rabbit: RabbitServer,
    exchange: str,
    key: str,
    method: str,
    args: dict[str, Any],
    **more: Any,
) -> None:
    """As oslo.messaging does."""
    from tests.rig.broker_peers import raw_channel

    unique_id = more.pop("unique_id", uuid.uuid4().hex)
    message = {"method": method, "args": args, "_unique_id": unique_id, **more}
    body = json.dumps({"oslo.version": "2.0", "oslo.message": json.dumps(message)})
    properties = {"content_type": "application/json", "content_encoding": "utf-8"}
    with raw_channel(rabbit) as channel:
        channel.basic_publish(amqp.Message(body, **properties), exchange, key)


@needs_rabbit
def test_a_service_sees_the_hosts_context_and_nothing_of_the_guests(
    brokered: Scene, rabbit: RabbitServer, directory: Path
) -> None:
    from tests.rig.control_service import ControlService

    with ControlService(rabbit.url, "control", directory / "service.log") as service:
        with brokered.attackers["bad"].attacking("context_injection", 3.0) as process:
            finish(process)
        ran = service.finish()["hostile"]
    assert ran
    for entry in ran:
        assert entry.instance_uuid == brokered.uuid_of("bad")
        assert set(entry.keys) == HOSTS_KEYS | {"client_timeout"}  # oslo.messaging's own


@needs_rabbit
def test_a_request_that_is_replayed_runs_once(
    brokered: Scene, rabbit: RabbitServer, directory: Path
) -> None:
    from tests.rig.control_service import ControlService

    with ControlService(rabbit.url, "control", directory / "service.log") as service:
        with brokered.attackers["bad"].attacking("id_forgery", 3.0) as process:
            finish(process)
        assert brokered.attackers["bad"].status()["requests"]["from_guest"]["guest_published"] == 1
        ran = service.finish()["hostile"]
    assert len(ran) == 1


@needs_rabbit
def test_answers_that_nobody_reads_stay_with_the_broker(
    brokered: Scene, rabbit: RabbitServer, directory: Path
) -> None:
    """And the memory that they take comes back when who did not read them is gone."""
    from tests.rig.control_service import ControlService

    attacker = brokered.attackers["bad"]
    own = f"vchan_vm_{brokered.uuid_of('bad')}"

    def held() -> Any:
        return attacker.status()["backlog_bytes"]

    with ControlService(rabbit.url, "control", directory / "service.log"):
        with attacker.attacking("unread_answers", 60.0):
            wait_until(
                lambda: attacker.status()["requests"]["from_guest"]["answers_wait"],
                timeout_s=WAIT_S,
                interval_s=0.1,
                failure=lambda: f"{attacker.status()}",
            )
            over_s = time.monotonic() + 3.0
            while time.monotonic() < over_s:
                brokered.call_neighbour()
                assert held() <= ANSWERS_BYTES_MAX
            assert rabbit.queues()[own].ready > 0
            verdicts = {(each["verdict"], each.get("kind")) for each in brokered.audit("bad")}
            assert ("refused", "call") in verdicts
        wait_until(
            lambda: held() < BACKLOG_BYTES_MAX,
            timeout_s=WAIT_S,
            interval_s=0.1,
            failure=lambda: f"{attacker.status()}",
        )
    brokered.call_neighbour()


@needs_rabbit
def test_nobody_answers_for_the_neighbour(brokered: Scene, rabbit: RabbitServer) -> None:
    """The attacker knows the id of a call that is open to the neighbour, which is slow."""
    from tests.rig.broker_peers import raw_channel

    unique_id = uuid.uuid4().hex
    good = brokered.uuid_of(NEIGHBOUR)
    with raw_channel(rabbit) as channel:
        reply_q = channel.queue_declare(exclusive=True).queue
        brokered.neighbour.send_signal(signal.SIGSTOP)
        try:
            asked = {"_msg_id": unique_id, "_reply_q": reply_q, "unique_id": unique_id}
            publish(rabbit, "openstack", f"agent.{good}", "m", {"x": 1}, **asked)
            wait_until(
                lambda: brokered.daemon.status(NEIGHBOUR)["requests"]["open"] == 1,
                timeout_s=WAIT_S,
                interval_s=0.05,
                failure=lambda: f"{brokered.daemon.status(NEIGHBOUR)}",
            )
            attack = brokered.attackers["bad"].attacking("replies_for_others", 2.0, unique_id)
            with attack as process:
                assert finish(process)["sessions"] == 1
            assert brokered.daemon.status(NEIGHBOUR)["requests"]["open"] == 1
            assert channel.basic_get(reply_q, no_ack=True) is None
        finally:
            brokered.neighbour.send_signal(signal.SIGCONT)
        answers: list[Any] = []

        def is_answered() -> bool:
            got = channel.basic_get(reply_q, no_ack=True)
            if got is not None:
                answers.append(json.loads(json.loads(got.body)["oslo.message"]))
            return bool(answers)

        wait_until(is_answered, timeout_s=WAIT_S, interval_s=0.05, failure=lambda: "no answer")
    (answer,) = answers
    assert (answer["_msg_id"], answer["failure"]) == (unique_id, None)
    assert answer["result"]["args"] == {"x": 1}


@needs_rabbit
@pytest.mark.parametrize("host_allows", [False, True])
def test_no_caller_imports_what_a_guest_names(
    directory: Path, rabbit: RabbitServer, monkeypatch: pytest.MonkeyPatch, host_allows: bool
) -> None:
    """Not even one that would; unless the host's operator lets that module pass, too."""
    from tests.rig.caller import Caller, CallFailed

    trap = "tests.rig.trap"
    sprung = directory / "sprung"
    monkeypatch.setenv("TRAP_SPRUNG", str(sprung))
    options = [f"failure_modules = {trap}"] if host_allows else []
    scene = Scene(directory / "h", ["bad"], policy=OPEN, transport_url=rabbit.url, options=options)
    log = directory / "caller.log"
    attack = scene.attackers["bad"].attacking("exception_injection", WAIT_S, trap)
    with scene, Caller(rabbit.url, log, modules=[trap]) as caller, attack:
        wait_until(
            lambda: f"agent.{scene.uuid_of('bad')}" in consumed_queues(rabbit),
            timeout_s=WAIT_S,
            interval_s=0.1,
            failure=lambda: "it serves nothing",
        )
        with pytest.raises(CallFailed) as caught:
            caller.call("agent", scene.uuid_of("bad"), "m")
    assert sprung.exists() is host_allows
    assert caught.value.kind == ("system_Remote" if host_allows else "system")  # oslo's; a text
