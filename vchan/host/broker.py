"""The broker: one thread, one AMQP connection, one channel per VM, some to publish on.

Why not oslo.messaging's server: it acknowledges a request when it arrives, and takes a connection
and a thread per VM. Here a request stays with the broker until `ack`; closing a VM's channel hands
back, in order, all that was not acknowledged; and a channel's error touches that VM alone.

    broker          Broker: commands, the connection, who is next (this file)
    broker_vm        Vm: a VM's channel and its queues
    broker_replies   Publisher: the channel for replies to callers
    broker_requests  Requests: publishes what guests ask of the control side
    broker_declared  Declared: exchanges, and queues of notifications
    amqp_link        py-amqp made non-blocking
    broker_events    what is posted
    broker_config    where the broker is

Everything but `Broker`'s public methods runs on the broker's thread, and nothing there waits, but
for the handshake of a new connection.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from vchan.errors import LimitExceeded
from vchan.host.amqp_link import BROKEN, Link, explain, spec
from vchan.host.broker_config import BrokerConfig
from vchan.host.broker_declared import Declared
from vchan.host.broker_events import (
    BrokerEvent,
    Connected,
    Disconnected,
    Publication,
    Published,
    Sent,
    Token,
)
from vchan.host.broker_replies import Publisher, Reply
from vchan.host.broker_requests import Outgoing, Quota, Requests
from vchan.host.broker_vm import Sweep, Vm, back_off, is_usable
from vchan.host.envelope import REQUEST_BYTES_MAX
from vchan.loop import Loop
from vchan.messages import Topic

LOG = logging.getLogger(__name__)

COMMANDS_MAX: Final = 100_000
"""Commands given and not yet carried out: what the broker's thread does in some seconds."""
REPLIES_MAX: Final = 4096
"""Replies published and not yet confirmed."""
REPLIES_BYTES_MAX: Final = 64 * 1024 * 1024
REPLY_BYTES_MAX: Final = REQUEST_BYTES_MAX
"""One reply: over RabbitMQ's own limit it would close the channel that all VMs' replies share."""
DELETIONS_MAX: Final = 10_000
"""VMs whose queues are to be deleted when the broker is back."""
OPENINGS_MAX: Final = 32
"""VMs whose queues are being declared at a time: a broker that just came back has enough to do."""
SETTLED_IN_S: Final = 10.0
"""A connection that lived this long was a good one: the next back-off starts over."""
WATCH_S: Final = 10.0
"""How often it is looked for what the broker has not answered."""


class Broker:
    """The host daemon's side of the broker.

    Commands may be given from any thread, return at once, and are carried out in the order
    given; before `start` they wait, after `stop` they are nothing. `post` is called on the broker's
    thread: it must hand over and return.

    Promises
    - `Released` comes once for each time a VM's channel was lost or closed, and once for each
      `release` of a VM that has none. After it the VM's older tokens are ignored.
    - `Published` comes once for each `publish_reply`, `Sent` for each `publish_request`.
    - `Settled` comes for a `barrier` unless `Released` comes first.
    - Connections and channels that are lost are opened again, with back-off, until `release` or
      `stop`.
    """

    def __init__(self, config: BrokerConfig, post: Callable[[BrokerEvent], None]) -> None:
        self.config = config
        self.post = post
        self.loop = Loop()
        self.link: Link | None = None
        self.declared = Declared(self)
        self._openings: deque[Vm] = deque()
        self._opening: set[Vm] = set()
        self._vms: dict[str, Vm] = {}
        self._deletions: dict[str, frozenset[Topic]] = {}
        self._sweep: Sweep | None = None  # the one of these under way
        self._publisher = Publisher(self)
        self._requests = Requests(self)
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
        self._commands: deque[Callable[[], None]] = deque()
        self._replies = 0
        self._replies_bytes = 0
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

    def consume(self, vm: str, topics: frozenset[Topic]) -> None:
        """From now on consume these topics for the VM, and no others.

        A topic has two queues: TOPIC.VM, and TOPIC_fanout_VM for fanout. Taking a topic away closes
        the VM's channel and opens it again, so that what it held is handed out again.

        Raises:
            LimitExceeded: COMMANDS_MAX; likewise in every other command.
        """
        usable = frozenset(topic for topic in topics if is_usable(vm, topic))
        if usable != topics:
            LOG.warning("%s: no names for a topic: %s", vm, sorted(topics - usable))
        self._submit(partial(self._consume, vm, usable))

    def listen_for_answers(self, vm: str) -> None:
        """Consume the VM's own queue, too, until `release`: what is in it comes as `Mail`.

        Its name is `own_queue(vm)`. A channel that is open stays open.
        """
        self._submit(partial(self._listen, vm))

    def release(self, vm: str) -> None:
        """Close the VM's channel: the broker puts back, in order, what was not acknowledged."""
        self._submit(partial(self._release, vm))

    def ack(self, token: Token) -> None:
        """The broker may forget this message."""
        self._submit(partial(self._settle, token, spec.Basic.Ack))

    def reject(self, token: Token) -> None:
        """The broker shall drop this message: it can never be delivered."""
        self._submit(partial(self._settle, token, spec.Basic.Reject))

    def barrier(self, vm: str, token: Token, ids: tuple[bytes, ...]) -> None:
        """Ask for `Settled` when the broker has processed every `ack` given before.

        Args:
            token: One of those acknowledged. If its channel is gone there is no answer, because
                nobody knows whether the acknowledgement arrived.
        """
        self._submit(partial(self._barrier, vm, token, ids))

    def publish_reply(self, reply_q: str, body: bytes, key: bytes) -> None:
        """Publish a reply to a caller's queue. `Published` tells with `key` what became of it.

        While the broker is away, or REPLIES_MAX, REPLIES_BYTES_MAX or REPLY_BYTES_MAX is
        exceeded, it is not published and `Published` says so.
        """
        reply = Reply(reply_q, body, key)
        with self._lock:
            over = (
                self._replies >= REPLIES_MAX
                or self._replies_bytes + len(body) > REPLIES_BYTES_MAX
                or len(body) > REPLY_BYTES_MAX
            )
            if not over:
                self._replies += 1
                self._replies_bytes += len(body)
        if over:
            self._submit(partial(self.post, Published(key, ok=False, reason="limit")))
            return
        try:
            self._submit(partial(self._publisher.publish, reply))
        except LimitExceeded:
            self.reply_done(reply)
            raise

    def publish_request(self, vm: str, request_id: bytes, publication: Publication) -> None:
        """Publish a VM's request to the control side. `Sent` tells what became of it.

        A VM's requests are published in the order of these commands. While the broker is away, or
        REQUESTS_MAX, REQUESTS_BYTES_MAX, VM_REQUESTS_MAX or VM_REQUESTS_BYTES_MAX is exceeded, one
        is not published and `Sent` says so.
        """
        outgoing = Outgoing(vm, request_id, publication)
        with self._lock:
            problem = self._quota.admit(outgoing)
        if problem:
            sent = Sent(vm, request_id, ok=False, unroutable=False, reason=problem)
            self._submit(partial(self.post, sent))
            return
        try:
            self._submit(partial(self._requests.publish, outgoing))
        except LimitExceeded:
            self.request_done(outgoing)
            raise

    def delete_queues(self, vm: str, topics: frozenset[Topic]) -> None:
        """Delete those of the VM's queues that are empty and that nobody consumes from, and its own
        queue with what is in it.

        If the broker is away this waits for it. A later `consume` of the VM calls it off.
        """
        self._submit(partial(self._delete_queues, vm, topics))

    def _submit(self, command: Callable[[], None]) -> None:
        with self._lock:
            if self._is_over:
                return
            waiting = len(self._commands)
            if waiting >= COMMANDS_MAX:
                raise LimitExceeded("commands to the broker", waiting, COMMANDS_MAX, "COMMANDS_MAX")
            self._commands.append(command)
            if not waiting:
                # Under the lock: after `stop` the loop may be gone.
                self.loop.call_soon_threadsafe(self._carry_out)

    # ---------------------------------------------------------------- commands

    def _carry_out(self) -> None:
        with self._lock:
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()

    def _consume(self, vm: str, topics: frozenset[Topic]) -> None:
        self._keep_queues(vm)
        if vm not in self._vms:
            if not topics:
                return
            self._vms[vm] = Vm(self, vm)
        self._vms[vm].want(topics)

    def _listen(self, vm: str) -> None:
        self._keep_queues(vm)
        if vm not in self._vms:
            self._vms[vm] = Vm(self, vm)
        self._vms[vm].listen()

    def _release(self, vm: str) -> None:
        self._vms.get(vm, Vm(self, vm)).release()

    def _settle(self, token: Token, method: tuple[int, int]) -> None:
        vm = self._vms.get(token.vm)
        if vm is not None:
            vm.settle(token, method)

    def _barrier(self, vm: str, token: Token, ids: tuple[bytes, ...]) -> None:
        known = self._vms.get(vm)
        if known is not None:
            known.barrier(token, ids)

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
        self._sweep = Sweep(self, vm, topics, self._swept)
        self._sweep.start()

    def _swept(self, sweep: Sweep) -> None:
        if self._deletions.get(sweep.vm) == sweep.topics:  # else more was asked for meanwhile
            del self._deletions[sweep.vm]
        self._sweep = None
        self.loop.call_soon(self._sweep_next)

    # ---------------------------------------------------------------- for the channels

    def next_generation(self) -> int:
        """1, 2, ...: a channel's run."""
        self._generations += 1
        return self._generations

    def line_up(self, vm: Vm) -> None:
        """It wants to open a channel."""
        self._openings.append(vm)
        self.loop.call_soon(self._open_next)

    def opened(self, vm: Vm) -> None:
        """It is open, or has failed to: the next may try."""
        if vm in self._opening:
            self._opening.discard(vm)
            self.loop.call_soon(self._open_next)

    def forget(self, vm: Vm) -> None:
        """It wants nothing and has nothing."""
        if self._vms.get(vm.vm) is vm:
            del self._vms[vm.vm]

    def reply_done(self, reply: Reply) -> None:
        """It is confirmed, or will never be."""
        with self._lock:
            self._replies -= 1
            self._replies_bytes -= len(reply.body)

    def request_done(self, outgoing: Outgoing) -> None:
        """It is confirmed, or will never be."""
        with self._lock:
            self._quota.done(outgoing)

    def _open_next(self) -> None:
        while self.link is not None and self._openings and len(self._opening) < OPENINGS_MAX:
            vm = self._openings.popleft()
            if vm.open(self.link):
                self._opening.add(vm)

    # ---------------------------------------------------------------- the connection

    def _run(self) -> None:
        self.loop.call_soon(self._connect)
        self._watch()
        try:
            self.loop.run()
        finally:
            if self.link is not None:
                self.link.fail("the broker's thread ended")
            self.loop.close()

    def _connect(self) -> None:
        if self._stopping:
            return
        host = self._hosts[self._host_index]
        problem = ""
        try:
            link = Link(self.config, host, self.loop, self._on_lost, self._on_blocked)
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
        self._publisher.open()
        self._sweep_next()
        for vm in self._vms.values():
            vm.open_in_turn()

    def _watch(self) -> None:
        self.loop.call_later(WATCH_S, self._watch)
        now_s = self.loop.time()
        self._requests.watch(now_s)
        if self._sweep is not None:
            self._sweep.watch(now_s)
        watched: list[Declared | Vm] = [self.declared, *self._vms.values()]
        for each in watched:
            if self.link is None or self._stopping:
                return
            each.watch(self.link, now_s)

    def _on_blocked(self, reason: str) -> None:
        self._publisher.on_blocked(reason)
        self._requests.on_blocked(reason)

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
            vm.on_disconnected(reason)
        self._publisher.on_disconnected(reason)
        self._requests.on_disconnected(reason)
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
