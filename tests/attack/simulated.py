"""A host's daemon less its threads, beside it an attacker: one clock, no I/O but the audit log's.

Everything of the host's that a guest's bytes meet is the real code: link, session, channel,
throttle, Downward, gate, policy, identity, audit. The broker confirms what it is given, and notes
it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from tests.attack.hostile import STAND_S, Gone, Hostile
from tests.attack.neighbour import Neighbour
from tests.rig.phases import serve
from tests.simulate import network
from tests.simulate.patches import installed
from tests.simulate.world import Machine, Process, World
from vchan.host import config
from vchan.host.broker.vm_queues import OWN_PREFETCH
from vchan.host.enforcer import Enforcer
from vchan.host.hypervisor.domains import Domain, DomainFacts, DomainState
from vchan.host.oslo_wire.downward_envelope import CONTEXT_ALLOW, BrokerRequest, ReplyPublication
from vchan.host.oslo_wire.upward_envelope import Form, Publication
from vchan.host.policy.rules import Facts
from vchan.host.vm.channel import Channel, End, Home
from vchan.io.loop import Loop
from vchan.rpc.bodies import encode_invocation
from vchan.rpc.dispatcher import Told
from vchan.rpc.in_flight import Outcome
from vchan.rpc.messages import CALL, Request, Topic

NEIGHBOUR, ATTACKER = "good", "bad"
UUIDS = {
    NEIGHBOUR: "600d0000-0000-4000-8000-000000000001",
    ATTACKER: "0bad0000-0000-4000-8000-000000000002",
}
AGENT = Topic("openstack", "agent")
LATENCY_S = 10e-6
CALL_EVERY_S = 0.1
CALL_S = 5.0
SETTLE_S = 12.0
"""After the attack, until its calls and the lines left out of the audit log have been told of."""
SERVED = "control"
"""The topic that a service on the control side serves; nobody serves others."""


class QuickWorld(World):
    """One in which nothing but limits takes time."""

    def latency_s(self) -> float:
        return LATENCY_S


class SimulatedWire:
    """An attacker's end: while it waits, the others live. See `hostile.Wire`."""

    def __init__(self, process: Process, path: str) -> None:
        self._world = process.world
        self.random = process.world.rng.randbytes
        self._server = network.Listener(process.world, path, process)
        self._stream = network.LocalSocket(process.world, path, process)
        self._stream.close()

    def connect(self) -> bool:
        self._stream.close()
        self._live_until(self._server.readable)
        if not self._server.readable():
            return False
        self._stream, _ = self._server.accept()
        return True

    def wait(self, *, read: bool, write: bool) -> tuple[bool, bool]:
        stream = self._stream
        self._live_until(lambda: (read and stream.readable()) or (write and stream.writable()))
        return read and stream.readable(), write and stream.writable()

    def _live_until(self, done: Callable[[], bool]) -> None:
        self._world.run(self._world.now_s + STAND_S, done)
        assert self._world.failure is None, self._world.failure

    def read(self) -> bytes:
        data = self._stream.read()
        if not data:
            raise Gone
        return data

    def write(self, data: bytes | memoryview) -> int:
        try:
            return self._stream.write(bytes(data))
        except BrokenPipeError as error:
            raise Gone from error

    def time(self) -> float:
        return self._world.now_s

    def close(self) -> None:
        self._stream.close()
        self._server.close()


def stock_reply(request_id: bytes, result: object) -> bytes:
    """As oslo.messaging's servers write it."""
    message = {"result": result, "failure": None, "ending": True, "_msg_id": request_id.hex()}
    message["_unique_id"] = request_id.hex()
    return json.dumps({"oslo.version": "2.0", "oslo.message": json.dumps(message)}).encode()


class Consumed(NamedTuple):
    """What a VM's Downward has asked of the broker."""

    vm: str
    topics: frozenset[Topic]


class Broker:
    """Confirms everything, a moment later."""

    def __init__(self, host: SimulatedHost, vm: str) -> None:
        self._host = host
        self._vm = vm
        self._token = 0
        self.answer_bytes = 0
        """Of the answers to calls of what is SERVED; 0: none comes."""
        self.waiting: deque[Callable[[], bytes]] = deque()  # in the VM's own queue
        self._unacked: dict[int, Callable[[], bytes]] = {}
        self._listens = False
        self.consumed: list[Consumed] = []
        self.published: list[Publication] = []
        self.replies: list[Any] = []

    @property
    def _downward(self) -> Any:
        return self._host.channels[self._vm].downward

    def _later(self, call: Callable[..., object], *args: Any, **named: Any) -> None:
        def do() -> None:
            call(*args, **named)
            self._host.channels[self._vm].set_timer()

        self._host.after(LATENCY_S, do)

    def consume(self, vm: str, topics: frozenset[Topic], owned: frozenset[Topic]) -> None:
        self.consumed.append(Consumed(vm, topics))

    def release(self, vm: str, *, for_good: bool = False) -> None:
        assert vm == self._host.uuid(self._vm)
        self._listens = False
        self.waiting.extendleft(reversed(self._unacked.values()))
        self._unacked.clear()
        self._later(self._downward.released)

    def ack(self, token: Any) -> None:
        if self._unacked.pop(token, None) is not None:
            self._hand_out()

    def complete(
        self,
        vm: str,
        request_id: bytes,
        tokens: tuple[object, ...],
        reply: ReplyPublication | None = None,
    ) -> None:
        assert vm == self._host.uuid(self._vm)
        if reply is not None:
            self.publish_heartbeat(*reply[:2])
        self._later(self._downward.completed, (request_id,), proven=True)

    def publish_heartbeat(self, reply_q: str, body: bytes) -> None:
        self.replies.append(json.loads(json.loads(body)["oslo.message"]))

    def listen_for_answers(self, vm: str) -> None:
        assert vm == self._host.uuid(self._vm)
        self._listens = True
        self._hand_out()

    def _hand_out(self) -> None:
        while self._listens and self.waiting and len(self._unacked) < OWN_PREFETCH:
            self._token += 1
            make = self._unacked[self._token] = self.waiting.popleft()
            self._later(self._mail, self._token, make)

    def publish_request(self, vm: str, request_id: bytes, publication: Publication) -> None:
        assert vm == self._host.uuid(self._vm)
        is_mail = publication.form is Form.MAIL
        if is_mail:
            self.waiting.append(lambda: publication.body)
        else:
            self.published.append(publication)
            if self.answer_bytes and publication.routing_key == SERVED:
                size = self.answer_bytes
                self.waiting.append(lambda: stock_reply(request_id, "x" * size))
        self._hand_out()
        self._later(self._sent, request_id, is_mail or publication.routing_key == SERVED)

    def _mail(self, token: int, make: Callable[[], bytes]) -> None:
        self._host.channels[self._vm].mail(token, make())

    def _sent(self, request_id: bytes, ok: bool) -> None:
        now_s = self._host.now_s
        self._downward.upward.sent(
            request_id, ok=ok, unroutable=not ok, doubtful=False, now_s=now_s
        )


class SimulatedHost:
    """Channels to VMs, on one loop.

    Args:
        directory: For the policy and the audit log.
        names: Its VMs, of UUIDS.
    """

    def __init__(
        self, world: World, directory: Path, policy: str, options: Sequence[str] = ()
    ) -> None:
        self._world = world
        self._process = Process(Machine(world, clock_stops=False), "host")
        self.log: list[str] = []
        self.audit = directory / "audit.log"
        files = directory / "policy.d"
        files.mkdir()
        (files / "50-attack.policy").write_text(policy)
        lines = ["[vchan]", "host = h1", f"policy_dir = {files}", f"audit_log = {self.audit}"]
        (directory / "vchan.conf").write_text("\n".join([*lines, *options]))
        conf = config.load(["--config-file", str(directory / "vchan.conf")])
        self.enforcer = Enforcer(cast(Loop, self._process.loop), conf)
        self.brokers: dict[str, Broker] = {}
        self.channels: dict[str, Channel] = {}

    def uuid(self, name: str) -> str:
        return UUIDS[name]

    @property
    def now_s(self) -> float:
        return self._process.loop.time()

    def after(self, delay_s: float, call: Callable[..., object], *args: Any) -> None:
        """In a turn of the host's own loop."""
        self._world.after(delay_s, self._process.enter, call, *args)

    def open(self, name: str, path: str) -> None:
        """A VM's channel, as the daemon makes it."""
        facts = Facts(UUIDS[name], name, f"project of {name}", "", "", "")
        broker = self.brokers[name] = Broker(self, name)
        domain = Domain(UUIDS[name], DomainFacts(UUIDS[name], name, DomainState.RUNNING))
        channel = self.channels[name] = Channel(
            cast(Loop, self._process.loop),
            domain,
            Home("h1", bytes(16), CONTEXT_ALLOW, self.log.append),
            broker,
            self.enforcer.gate(facts),
            _offer_nothing,
            self.enforcer.throttle(facts),
            lambda reason, for_s: self._quarantined(facts, reason, for_s),
            End(lambda path: cast(Any, network.connect(self._world, path))),
        )
        self._process.enter(serve, channel, path)

    def _quarantined(self, facts: Facts, reason: str, for_s: float) -> None:
        self.log.append(f"{facts.name} ({facts.uuid}): in quarantine for {for_s:.0f} s: {reason}")
        self.enforcer.quarantined(facts, reason)

    def ask(self, name: str, request_id: bytes, args: Mapping[str, Any]) -> list[Outcome]:
        """A local program's call to the topic `agent`. What it is told is added to the list."""
        told: list[Outcome] = []
        body, timeout_ms = encode_invocation("echo", args), int(CALL_S * 1000)
        target = (AGENT.exchange, AGENT.name, UUIDS[name])
        request = Request(request_id, CALL, timeout_ms, 0, *target, body)
        channel = self.channels[name]

        def submit() -> None:
            channel.downward.submit_local(request, told.append, self.now_s)
            channel.set_timer()

        self._process.enter(submit)
        return told

    def deliver(
        self, name: str, number: int, *, size: int = 10_000, timeout_s: float = CALL_S
    ) -> None:
        """A service's call to the topic `agent`, from the broker, if that is consumed."""
        request_id, args = number.to_bytes(16), {"x": "y" * size}
        origin = BrokerRequest(
            request_id, "m", args, None, None, {}, f"{number}", "reply", None, timeout_s
        )
        channel = self.channels[name]

        def deliver() -> None:
            channel.downward.delivered(
                number, origin, AGENT, fanout=False, redelivered=False, now_s=self.now_s
            )
            channel.set_timer()

        self._process.enter(deliver)

    def audit_lines(self, name: str) -> list[dict[str, Any]]:
        """Of one VM."""
        text = self.audit.read_bytes()
        lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
        return [line for line in lines if line["vm"] == UUIDS[name]]


def _offer_nothing(request: Request, told: Told) -> Callable[[], None] | None:
    return None


class Scene:
    """A host, a neighbour that is called all the while, and who attacks.

    Attributes:
        asked: What the neighbour's callers were told, by request id.
        peaks: The most that was ever held for the attacker, by what it is.
        is_over: The attack is.
    """

    def __init__(self, world: World, directory: Path, policy: str, options: Sequence[str]) -> None:
        self.world = world
        self.host = SimulatedHost(world, directory, policy, options)
        self.neighbour_machine = Machine(world, clock_stops=False)
        process = Process(self.neighbour_machine, NEIGHBOUR)
        neighbour = Neighbour(cast(Loop, process.loop), world.rng.randbytes)
        server = network.Listener(world, f"/{NEIGHBOUR}", process)
        server.watch_read(process, lambda: neighbour.serve(cast(Any, server.accept()[0])))
        self.wire = SimulatedWire(
            Process(Machine(world, clock_stops=False), ATTACKER), f"/{ATTACKER}"
        )
        self.host.open(NEIGHBOUR, f"/{NEIGHBOUR}")
        self.host.open(ATTACKER, f"/{ATTACKER}")
        self.asked: dict[bytes, list[Outcome]] = {}
        self.peaks: dict[str, int] = {}
        self._calls = 0
        self.is_over = False
        world.run(world.now_s + 1.0)
        assert self.neighbour.state == "ready"
        world.after_step = self._watch

    @property
    def neighbour(self) -> Channel:
        return self.host.channels[NEIGHBOUR]

    @property
    def attacked(self) -> Channel:
        """The attacker's channel."""
        return self.host.channels[ATTACKER]

    def attack(self, name: str, seconds: float, word: str = "") -> None:
        """From beginning to end, and until what it was sent is over."""
        self.seconds = seconds
        self.hostile = Hostile(self.wire, seconds)
        self.world.after(0.0, self._call_neighbour)
        self.hostile.attack(name, word)
        self.is_over = True
        self.world.run(self.world.now_s + SETTLE_S)
        assert self.world.failure is None, self.world.failure

    def _call_neighbour(self) -> None:
        if not self.is_over:
            self._calls += 1
            request_id = self._calls.to_bytes(16)
            self.asked[request_id] = self.host.ask(NEIGHBOUR, request_id, {"number": self._calls})
            self.world.after(CALL_EVERY_S, self._call_neighbour)

    def _watch(self) -> None:
        for name, size in held(self.attacked).items():
            if size > self.peaks.get(name, 0):
                self.peaks[name] = size


def held(channel: Channel) -> dict[str, int]:
    """What the host holds for a guest: bytes, and how many of what has no bytes to speak of."""
    session: Any = channel._session
    downward: Any = channel.downward
    upward: Any = downward.upward
    responder = upward._responder
    link: Any = channel._link
    return {
        "decoder": session._decoder._held,
        "reassembly": sum(partial.received for partial in session._receiver._partials.values()),
        "backlog": session.backlog_bytes,
        "mail": upward.mailbox.bytes,
        "in flight": session._sender.in_flight,
        "output": len(link._out) if link is not None else 0,
        "entries": len(downward._open),
        "topics": downward._served.seen + len(downward._served.asked),
        "requests": len(upward._items),
        "request bytes": upward._bytes,
        "responder": len(responder._running) + len(responder._over) + len(responder._settled),
        "replies": responder._reply_bytes,
        "past": len(upward._history),
    }


@contextmanager
def scene(
    directory: Path, policy: str, options: Sequence[str] = (), seed: int = 1
) -> Iterator[Scene]:
    """A scene, while the simulated world stands in for the real one."""
    world = QuickWorld(seed)
    with ExitStack() as stack:
        stack.enter_context(installed(world, {}))
        made = Scene(world, directory, policy, options)
        stack.callback(made.host.enforcer.close)
        yield made
