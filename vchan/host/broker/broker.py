"""The broker: one thread, one AMQP connection, one channel per VM, some to publish on.

Why not oslo.messaging's server: it acknowledges a request when it arrives, and takes a connection
and a thread per VM. Here a request stays with the broker until `ack`; closing a VM's channel hands
back, in order, all that was not acknowledged; and a channel's error touches that VM alone.

    broker             Broker: commands, the connection, who is next (this file)
    vm_queues          VmQueues: a VM's channel and its queues
    completions        Completions: what is over of a VM's requests, carried to its end
    reply_publisher    ReplyPublisher: the channel for replies to callers
    request_publisher  Requests: publishes what guests ask of the control side
    confirms           what both have published, and the broker has not confirmed
    topology           Declared: exchanges, and queues of notifications
    parked             ParkingLot: messages that break us, put aside
    amqp               py-amqp made non-blocking
    events             what is posted
    config             where the broker is

What stands below "any thread" in `Broker` is for any thread. Everything else runs on the broker's
thread, and nothing there waits, but for the handshake of a new connection.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

from vchan.host.broker.amqp import BROKEN, AmqpLink, explain, spec
from vchan.host.broker.config import BrokerConfig
from vchan.host.broker.events import (
    Blocked,
    BrokerEvent,
    Connected,
    Died,
    Disconnected,
    Failed,
    PublishResult,
    Released,
    Token,
)
from vchan.host.broker.parked import Parking, ParkingLot
from vchan.host.broker.reply_publisher import ReplyPublisher
from vchan.host.broker.request_publisher import Outgoing, Quota, Requests
from vchan.host.broker.topology import Declared
from vchan.host.broker.vm_queues import Sweep, VmQueues, back_off, is_usable
from vchan.host.faults import attempt, describe_fault, log_fault
from vchan.host.oslo_wire.downward_envelope import ReplyPublication
from vchan.host.oslo_wire.upward_envelope import Publication
from vchan.io.loop import Loop, Timer
from vchan.rpc.messages import Topic

LOG = logging.getLogger(__name__)

COMMANDS_MAX: Final = 100_000
"""Commands given and not yet carried out: what the broker's thread does in some seconds. At it:
requests and heartbeats are not published; what is wished for a VM is summed up, in one entry a VM.
What ends a message that the broker has handed out counts, and always has room: the broker hands out
no more until it is ended (`prefetch`)."""
DELETIONS_MAX: Final = 10_000
"""VMs whose queues are to be deleted when the broker is back. At it: the queues stay until they
expire; logged."""
OPENINGS_MAX: Final = 32
"""VMs whose queues are being declared at a time: a broker that just came back has enough to do."""
SETTLED_IN_S: Final = 10.0
"""A connection that lived this long was a good one: the next back-off starts over."""
_OVERRUN: Final = "limit: the broker's thread is behind by COMMANDS_MAX commands"
WATCH_S: Final = 10.0
"""How often it is looked for what the broker has not answered."""


class _Wish:
    """What is wished for a VM while there are too many commands: what they would come to."""

    def __init__(self) -> None:
        self.releases = False
        self.is_for_good = False
        self.listens = False
        self.topics: frozenset[Topic] | None = None
        self.owned: frozenset[Topic] = frozenset()
        self.deletes: frozenset[Topic] | None = None

    def release(self, for_good: bool) -> None:
        self.releases, self.listens, self.topics = True, False, None
        self.is_for_good = self.is_for_good or for_good

    def consume(self, topics: frozenset[Topic], owned: frozenset[Topic]) -> None:
        self.topics, self.owned, self.deletes = topics, owned, None

    def listen(self) -> None:
        self.listens, self.deletes = True, None

    def delete(self, topics: frozenset[Topic]) -> None:
        self.deletes = (self.deletes or frozenset()) | topics


T = TypeVar("T")


class Broker:
    """The host daemon's side of the broker.

    Commands may be given from any thread, return at once, never raise, and are carried out in the
    order given; before `start` they wait, after `stop` they are nothing. `post` is called on the
    broker's thread, or on the one that gives a command: it must hand over and return.

    Promises
    - `Released` comes once for each time a VM's channel was lost or closed, and once for each
      `release` of a VM that has none. After it the VM's older tokens are ignored.
    - `Completed` comes once for each `complete`, and before `Released` for what was acknowledged
      on that channel; `PublishResult` comes once for each `publish_request`.
    - Connections and channels that are lost are opened again, with back-off, until `release` or
      `stop`.
    """

    def __init__(self, config: BrokerConfig, post: Callable[[BrokerEvent], None]) -> None:
        self.config = config
        self.post = post
        self.loop = Loop()
        self.link: AmqpLink | None = None
        self.declared = Declared(self)
        self._openings: deque[VmQueues] = deque()
        self._opening: set[VmQueues] = set()
        self._vms: dict[str, VmQueues] = {}
        self._deletions: dict[str, frozenset[Topic]] = {}
        self._owned: dict[str, frozenset[Topic]] = {}  # topics that were ever a VM's alone
        self._sweep: Sweep | None = None  # the one of these under way
        self._replies = ReplyPublisher(self)
        self._requests = Requests(self)
        self._parking = ParkingLot(self)
        self._generations = 0
        self._hosts = list(config.hosts)
        if config.shuffle:
            random.shuffle(self._hosts)
        self._host_index = 0
        self._tried = 0  # hosts in a row that could not be connected to
        self._problems: dict[str, str] = {}  # by their address, as the log has it
        self._attempts = 0
        self._connected_at_s = 0.0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="vchan-broker", daemon=True)
        # Shared with the threads that give commands.
        self._lock = threading.Lock()
        self._is_over = False
        self._commands: deque[tuple[str, Callable[[], None]]] = deque()  # whose, and what
        self._wishes: dict[str, _Wish] = {}  # over COMMANDS_MAX
        self._quota = Quota()

    # ---------------------------------------------------------------- any thread

    def start(self) -> None:
        """Start the thread, which connects."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Close everything and end the thread; unacknowledged messages go back to the broker.

        While a connection is being made this can take CONNECT_TIMEOUT_S or more.
        """
        with self._lock:
            was_over, self._is_over = self._is_over, True
        if was_over:
            return
        if self._thread.ident is None:
            self.loop.close()
            return
        self.loop.call_soon_threadsafe(self._stop)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            LOG.error("the broker's thread did not end in %s s", timeout_s)

    def consume(
        self, vm: str, topics: frozenset[Topic], owned: frozenset[Topic] = frozenset()
    ) -> None:
        """From now on consume these topics for the VM, and no others.

        A topic has two queues: TOPIC.VM, and TOPIC_fanout_VM for fanout; one that is the VM's alone
        (`owned`) has its own, TOPIC, which services may have declared. Taking a topic away closes
        the VM's channel and opens it again, so that what it held is handed out again: as soon as
        the proofs have come that callers wait for.
        """
        usable = frozenset(topic for topic in topics if is_usable(vm, topic))
        if usable != topics:
            LOG.warning("%s: no names for a topic: %s", vm, sorted(topics - usable))
        own = owned & usable
        self._wish(
            vm, partial(self._consume, vm, usable, own), lambda wish: wish.consume(usable, own)
        )

    def listen_for_answers(self, vm: str) -> None:
        """Consume the VM's own queue, too, until `release`: what is in it comes as `Mail`.

        Its name is `own_queue(vm)`. A channel that is open stays open.
        """
        self._wish(vm, partial(self._listen, vm), _Wish.listen)

    def release(self, vm: str, *, for_good: bool = False) -> None:
        """Close the VM's channel: the broker puts back, in order, what was not acknowledged.

        Args:
            for_good: The VM is not here any more: what is being completed for it is given up.
        """
        command = partial(self._release, vm, for_good)
        self._wish(vm, command, lambda wish: wish.release(for_good))

    def complete(
        self,
        vm: str,
        request_id: bytes,
        tokens: tuple[Token, ...],
        reply: ReplyPublication | None = None,
    ) -> None:
        """A request is over: publish the reply until the broker confirms it, acknowledge the
        messages, have the broker prove that it has forgotten them. `Completed` follows.

        Args:
            tokens: Of all the copies that were handed out. One that comes while the reply is under
                way is given by a further `complete`, without a reply.
            reply: None: nobody waits for one. Its `has_not_run` says that the proof comes first.
        """
        command = partial(self._complete, vm, request_id, tokens, reply)
        self._submit(command, vm, always=True)

    def ack(self, token: Token) -> None:
        """The broker may forget this message."""
        self._submit(partial(self._dispose, token, spec.Basic.Ack), token.vm, always=True)

    def reject(self, token: Token) -> None:
        """The broker shall drop this message: it can never be delivered."""
        self._submit(partial(self._dispose, token, spec.Basic.Reject), token.vm, always=True)

    def park_message(self, token: Token, queue: str, body: bytes, reason: str) -> None:
        """Put a message aside that breaks this daemon; `Parked` follows, unless `Released` does."""
        command = partial(self._park, token, queue, body, reason)
        self._submit(command, token.vm, always=True)

    def publish_heartbeat(self, reply_q: str, body: bytes) -> None:
        """Tell a caller that its call is under way, if that can be done now."""
        self._submit(partial(self._replies.publish, reply_q, body, _ignore))

    def publish_request(self, vm: str, request_id: bytes, publication: Publication) -> None:
        """Publish a VM's request to the control side. `PublishResult` tells what became of it.

        A VM's requests are published in the order of these commands. While the broker is away, or
        REQUESTS_MAX, REQUESTS_BYTES_MAX, VM_REQUESTS_MAX or VM_REQUESTS_BYTES_MAX is exceeded, one
        is not published and `PublishResult` says so.
        """
        outgoing = Outgoing(vm, request_id, publication)
        with self._lock:
            problem = self._quota.admit(outgoing)
        if problem:
            self.post(PublishResult(vm, request_id, ok=False, unroutable=False, reason=problem))
        elif not self._submit(partial(self._requests.publish, outgoing), vm):
            self.request_done(outgoing)
            self.post(PublishResult(vm, request_id, ok=False, unroutable=False, reason=_OVERRUN))

    def delete_queues(self, vm: str, topics: frozenset[Topic]) -> None:
        """Delete those of the VM's queues that are empty and that nobody consumes from, and its own
        queue with what is in it.

        If the broker is away this waits for it. A later `consume` of the VM calls it off.
        """
        command = partial(self._delete_queues, vm, topics)
        self._wish(vm, command, lambda wish: wish.delete(topics))

    def _submit(self, command: Callable[[], None], vm: str = "", *, always: bool = False) -> bool:
        """Have it carried out. False: there are COMMANDS_MAX already.

        Args:
            vm: Whose it is: what goes wrong with it is that VM's.
            always: Whatever there are already.
        """
        with self._lock:
            if self._is_over:
                return True
            if len(self._commands) >= COMMANDS_MAX and not always:
                return False
            self._commands.append((vm, command))
            self._wake()
            return True

    def _wish(self, vm: str, command: Callable[[], None], sum_up: Callable[[_Wish], None]) -> None:
        """Likewise, and never without room."""
        with self._lock:
            is_known = vm in self._wishes  # then this one must not overtake it
        if is_known or not self._submit(command, vm):
            with self._lock:
                sum_up(self._wishes.setdefault(vm, _Wish()))

    def _wake(self) -> None:
        """The first of many. Under the lock: after `stop` the loop may be gone."""
        if len(self._commands) == 1:
            self.loop.call_soon_threadsafe(self._carry_out)

    # ---------------------------------------------------------------- commands

    def _carry_out(self) -> None:
        with self._lock:
            commands, self._commands = self._commands, deque()
            wishes, self._wishes = self._wishes, {}
        for name, command in commands:
            if name:
                self.within(name, command, None)
            else:
                command()
        for name, wish in wishes.items():
            self.within(name, partial(self._fulfil, name, wish), None)

    def _fulfil(self, vm: str, wish: _Wish) -> None:
        if wish.releases:
            self._release(vm, wish.is_for_good)
        if wish.listens:
            self._listen(vm)
        if wish.topics is not None:
            self._consume(vm, wish.topics, wish.owned)
        if wish.deletes is not None:
            self._delete_queues(vm, wish.deletes)

    def _consume(self, vm: str, topics: frozenset[Topic], owned: frozenset[Topic]) -> None:
        self._keep_queues(vm)
        self._note_owned(vm, owned)
        if topics or vm in self._vms:
            self._vm(vm).want(topics, owned)

    def _note_owned(self, vm: str, owned: frozenset[Topic]) -> None:
        """For the day on which its queues are to go."""
        known = self._owned.pop(vm, frozenset()) | owned
        if known:
            self._owned[vm] = known
        if len(self._owned) > DELETIONS_MAX:
            del self._owned[next(iter(self._owned))]

    def _listen(self, vm: str) -> None:
        self._keep_queues(vm)
        self._vm(vm).listen()

    def _release(self, vm: str, for_good: bool) -> None:
        self._vm(vm).release(for_good=for_good)

    def _complete(
        self,
        vm: str,
        request_id: bytes,
        tokens: tuple[Token, ...],
        reply: ReplyPublication | None,
    ) -> None:
        self._vm(vm).completions.complete(request_id, tokens, reply)

    def _vm(self, vm: str) -> VmQueues:
        if vm not in self._vms:
            self._vms[vm] = VmQueues(self, vm)
        return self._vms[vm]

    def _dispose(self, token: Token, method: tuple[int, int]) -> None:
        vm = self._vms.get(token.vm)
        if vm is not None:
            vm.dispose(token, method)

    def _park(self, token: Token, queue: str, body: bytes, reason: str) -> None:
        vm = self._vms.get(token.vm)
        if vm is not None:
            vm.park(token, queue, body, reason)

    def _delete_queues(self, vm: str, topics: frozenset[Topic]) -> None:
        if vm not in self._deletions and len(self._deletions) >= DELETIONS_MAX:
            LOG.error("%s: its queues stay: too many are to be deleted (DELETIONS_MAX)", vm)
            return
        usable = frozenset(topic for topic in topics if is_usable(vm, topic))
        self._deletions[vm] = self._deletions.get(vm, frozenset()) | usable
        self._sweep_next()

    def _keep_queues(self, vm: str) -> None:
        self._deletions.pop(vm, None)
        if self._sweep is not None and self._sweep.vm == vm:
            self._sweep.call_off()

    def _sweep_next(self) -> None:
        """One VM after the other: there is no hurry."""
        if self.link is None or self._sweep is not None or not self._deletions:
            return
        vm, topics = next(iter(self._deletions.items()))
        self._sweep = Sweep(self, vm, topics, self._owned.get(vm, frozenset()), self._swept)
        self.within(vm, self._sweep.start, None)

    def _swept(self, sweep: Sweep) -> None:
        if self._deletions.get(sweep.vm) == sweep.topics:  # else more was asked for meanwhile
            del self._deletions[sweep.vm]
            self._owned.pop(sweep.vm, None)
        self._sweep = None
        self.loop.call_soon(self._sweep_next)

    # ---------------------------------------------------------------- one VM's trouble

    def within(self, vm: str, work: Callable[[], T], otherwise: T) -> T:
        """Do something for one VM alone. Whatever is unexpected there costs that VM its channel,
        and the daemon is told; nobody else notices."""
        result, error = attempt(work, otherwise)
        if error is not None:
            what = f"{vm}: unexpected, its channels are closed"
            self.vm_failed(vm, log_fault(LOG, what, error))
        return result

    def vm_failed(self, vm: str, fault: str) -> None:
        """Something unexpected in one VM's code, which is in the log."""
        self._forget_failed(vm, fault)
        self.post(Released(vm, fault))
        self.post(Failed(vm, fault))

    def time(self) -> float:
        """Seconds."""
        return self.loop.time()

    def later(self, vm: str, delay_s: float, work: Callable[[], None]) -> Timer:
        """Do something for one VM alone after so many seconds."""
        return self.loop.call_later(delay_s, partial(self.within, vm, work, None))

    def _forget_failed(self, vm: str, fault: str) -> None:
        """Nothing of it is trusted: the next `consume` makes it anew."""
        known = self._vms.pop(vm, None)
        self._deletions.pop(vm, None)
        if self._sweep is not None and self._sweep.vm == vm:
            self._sweep = None
            self.loop.call_soon(self._sweep_next)
        steps: list[Callable[[], None]] = [partial(self._requests.discard, vm, fault)]
        if known is not None:
            steps += [known.discard, partial(self.opened, known)]
        for step in steps:
            _, error = attempt(step, None)
            if error is not None:  # one part is broken; the others may be
                LOG.debug("%s: after a fault: %s", vm, describe_fault(error))

    # ---------------------------------------------------------------- for the channels

    def next_generation(self) -> int:
        """1, 2, ...: a channel's run."""
        self._generations += 1
        return self._generations

    def park(self, parking: Parking) -> None:
        """Put a message aside that breaks this daemon."""
        self._parking.park(parking)

    def line_up(self, vm: VmQueues) -> None:
        """It wants to open a channel."""
        self._openings.append(vm)
        self.loop.call_soon(self._open_next)

    def opened(self, vm: VmQueues) -> None:
        """It is open, or has failed to: the next may try."""
        if vm in self._opening:
            self._opening.discard(vm)
            self.loop.call_soon(self._open_next)

    def forget(self, vm: VmQueues) -> None:
        """It wants nothing and has nothing."""
        if self._vms.get(vm.vm) is vm:
            del self._vms[vm.vm]

    def publish_reply(
        self, vm: str, reply: ReplyPublication, told: Callable[[str, bool], None]
    ) -> None:
        """See `completions.BrokerThread`."""

        def tell(problem: str, is_gone: bool) -> None:
            self.within(vm, partial(told, problem, is_gone), None)

        self._replies.publish(reply.reply_q, reply.body, tell)

    def request_done(self, outgoing: Outgoing) -> None:
        """It is confirmed, or will never be."""
        with self._lock:
            self._quota.done(outgoing)

    def _open_next(self) -> None:
        while self.link is not None and self._openings and len(self._opening) < OPENINGS_MAX:
            vm = self._openings.popleft()
            if self.within(vm.vm, partial(vm.open, self.link), otherwise=False):
                self._opening.add(vm)

    # ---------------------------------------------------------------- the connection

    def _run(self) -> None:
        self.loop.call_soon(self._connect)
        self._watch()
        reason = ""
        try:
            self.loop.run()
        except Exception as error:  # nobody sees a thread die: it says so itself
            LOG.critical("the broker's thread ended by a fault of its own", exc_info=True)
            reason = f"{type(error).__name__}: {error}"
        try:
            if self.link is not None:
                self.link.fail("the broker's thread ended")
            self.loop.close()
        finally:
            if reason:
                self.post(Died(reason))

    def _connect(self) -> None:
        if self._stopping:
            return
        host = self._hosts[self._host_index]
        problem = ""
        try:
            link = AmqpLink(self.config, host, self.loop, self._on_lost, self._on_blocked)
            link.connect()
        except BROKEN as error:
            problem = explain(error, self.config)
        if problem:
            self._on_no_connection(host.address, problem)
            return
        self._problems.clear()
        LOG.info("connected to the broker at %s", host.address)
        self.link = link
        self._connected_at_s = self.loop.time()
        self.post(Connected())
        self._replies.open()
        self._sweep_next()
        for vm in list(self._vms.values()):
            self.within(vm.vm, vm.open_in_turn, None)

    def _watch(self) -> None:
        self.loop.call_later(WATCH_S, self._watch)
        now_s = self.loop.time()
        self._requests.watch(now_s)
        self._parking.watch(now_s)
        if self._sweep is not None:
            self._sweep.watch(now_s)
        if self.link is not None and not self._stopping:
            self.declared.watch(self.link, now_s)
        for vm in list(self._vms.values()):
            if self.link is None or self._stopping:
                return
            self.within(vm.vm, partial(vm.watch, self.link, now_s), None)

    def _on_blocked(self, reason: str) -> None:
        self._replies.on_blocked(reason)
        self._requests.on_blocked(reason)
        self.post(Blocked(reason))

    def _on_no_connection(self, address: str, problem: str) -> None:
        if self._problems.get(address) != problem:  # it may be away for hours: once is enough
            self._problems[address] = problem
            LOG.warning("no connection to the broker: %s: %s; it is tried again", address, problem)
        self.post(Disconnected(f"{address}: {problem}"))
        self._next_host()
        self._tried += 1
        if self._tried < len(self._hosts):
            self.loop.call_soon(self._connect)
        else:
            self._connect_later()

    def _on_lost(self, reason: str) -> None:
        """The connection is gone. First what that means, then that it is so."""
        self.link = None
        self._sweep = None
        self.declared.clear()
        self._openings.clear()
        self._opening.clear()
        for vm in list(self._vms.values()):
            self.within(vm.vm, partial(vm.on_disconnected, reason), None)
        self._replies.on_disconnected(reason)
        self._requests.on_disconnected(reason)
        self._parking.on_disconnected()
        self.post(Disconnected(reason))
        if self._stopping:
            self.loop.stop()
            return
        LOG.warning("lost the broker: %s", reason)
        if self.loop.time() - self._connected_at_s > SETTLED_IN_S:
            self._attempts = 0
        self._next_host()
        self._connect_later()

    def _next_host(self) -> None:
        self._host_index = (self._host_index + 1) % len(self._hosts)

    def _connect_later(self) -> None:
        self._tried = 0
        config = self.config
        delay_s = back_off(self._attempts, config.retry_min_s, config.retry_max_s)
        self.loop.call_later(delay_s, self._connect)
        self._attempts += 1

    def _stop(self) -> None:
        self._carry_out()
        self._stopping = True
        if self.link is None:
            self.loop.stop()
        else:
            self.link.close_softly()


def _ignore(_problem: str, _is_gone: bool) -> None:
    pass
