"""libvirt: what its domains are and do, and channels plugged into them.

Rules of this file
1. Events are posted from our own threads by the `post` given; it must return at once and must not
   raise (the daemon's is `loop.call_soon_threadsafe`). Commands return at once as well.
2. Threads: libvirt's event loop (one per process, `_EventLoop`) only takes events in, so that an
   edge is never late; the *reader* opens the connection and reads facts; the *worker* attaches and
   detaches on a connection of its own. libvirt lets a call about one domain wait: 2 s while its
   QEMU is being killed, 30 s for a device change during a migration. Such a wait must not hold up
   another domain's migration.
3. Facts are never stale: an event marks its domain to be read, under the same lock under which
   events are posted, and facts whose domain was marked again while they were read are dropped.
4. Nothing grows with the number of events, only with the number of domains: marks are a set.
5. One domain's trouble is that domain's: what cannot be read of it is `Unreadable` and never
   `Gone`, whatever it was that failed. Only libvirt's word that there is none makes it gone.
6. A thread that fails in anything else tells `died`.

libvirt and its constants are used here alone.
"""

from __future__ import annotations

import enum
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic
from typing import Any, Final, NamedTuple

from vchan.errors import ConfigError, VchanError
from vchan.host.faults import attempt, describe_fault, log_fault
from vchan.host.hypervisor.domain_xml import (
    TARGET_NAME,
    ChannelElement,
    DomainFacts,
    DomainState,
    channel_xml,
    domain_facts,
    find_channel_element,
    free_alias,
)
from vchan.host.hypervisor.domains import (
    IN_RESCUE,
    AttachDone,
    Changed,
    DetachDone,
    DomainEvent,
    Gone,
    Happened,
    HypervisorEvent,
    HypervisorLost,
    Rebooted,
    Resync,
    Unreadable,
    no_controller,
)
from vchan.host.hypervisor.known_sockets import KnownSockets
from vchan.host.threads import OnDeath, watched_thread

try:
    import libvirt
except ImportError:
    libvirt = None  # Hypervisor() says so

LOG = logging.getLogger(__name__)


POLL_S: Final = 30.0
"""Every domain is read this often: missed events are rare (none were seen in testing), and reading
a domain takes a millisecond."""
RECONNECT_MIN_S: Final = 0.5
"""libvirtd restarts within a second ..."""
RECONNECT_MAX_S: Final = 10.0
"""... and one that is down for long is asked no more often than this."""
KEEPALIVE_INTERVAL_S: Final = 5
"""How often libvirtd is asked whether it is there."""
KEEPALIVE_COUNT: Final = 5
"""Answers that may be missing. At it: libvirtd is taken for dead, and connected to anew."""
ENDING_EVENTS: Final = frozenset({DomainEvent.SUSPENDED_MIGRATED, DomainEvent.SHUTDOWN})
"""After these a domain stops, mostly within 2 s."""
ENDING_S: Final = 5.0
"""Until then, or until something else happens to it, it is not read: libvirt lets the reader wait
while it kills QEMU, and then says less than the event will. At it: it is read."""
UNREAD_RETRY_S: Final = 5.0
"""A domain that could not be read is read again after so long: what holds a lock gives it up by and
by. At it: it is read again."""
NOT_UTF8: Final = (
    "its name, title, description or metadata is not UTF-8, and was read with "
    "\N{REPLACEMENT CHARACTER} for what is not: see virsh desc, desc --title and metadata"
)
"""libvirt keeps texts as the bytes that it was given, and libvirt-python refuses those that are not
UTF-8, with all of them in its exception."""
REFUSAL_CHARS_MAX: Final = 200
"""Of what libvirt says when it quotes a domain's XML. At it: the rest is cut."""
COMMANDS_MAX: Final = 2000
"""Attaches and detaches that wait; one for each domain and kind, so a host would need as many VMs.
At it: further ones are refused."""
FAULTS_MAX: Final = 1000
"""Kinds of failure at reading a domain that are remembered, each to be in the log once. At it: all
are forgotten, and logged once more."""
STOP_WAIT_S: Final = 5.0
"""For a thread that is inside a libvirt call, when the daemon ends: the call ends when its
connection does. At it: it ends with the process."""

Post = Callable[[HypervisorEvent], None]


class Hypervisor:
    """One libvirt connection, kept up.

    Args:
        uri: libvirt's, e.g. "qemu:///system".
        post: Takes each event, from any thread, in order.
        target_name: The channel's name.
        poll_s: Every domain is read again after this many seconds, in case an event was missed.
        died: Told when one of our threads fails: nothing is followed any more.
        sockets: What was known of channels before this daemon started.

    Raises:
        ConfigError: libvirt-python is not installed.
    """

    def __init__(
        self,
        uri: str,
        post: Post,
        *,
        target_name: str = TARGET_NAME,
        poll_s: float = POLL_S,
        died: OnDeath = lambda _: None,
        sockets: KnownSockets | None = None,
    ) -> None:
        require_libvirt()
        self._uri = uri
        self._post = post
        self._target_name = target_name
        self._poll_s = poll_s
        self._wake = threading.Condition()  # guards all that follows
        self._stopping = False
        self._lost: str | None = None
        self._resync_wanted = False
        self._following = False  # a Resync was posted on this connection: events may be
        self._marked: dict[str, float] = {}  # to be read, in order, and not before when
        self._rebooted: set[str] = set()
        self._polled: deque[str] = deque()  # to be read when nothing is marked
        self._known: dict[str, str] = {}  # names by uuid, as posted; the reader's alone
        self._died = died
        self._sockets = sockets or KnownSockets()  # the reader's alone
        self._faults: set[tuple[str, str]] = set()  # that are in the log: a domain, and what failed
        self._reader = watched_thread("vchan-libvirt", self._run, lambda: self._stopping, died)
        self._worker = _Worker(uri, target_name, self._finished, died)

    def start(self) -> None:
        """Begin. A Resync or a HypervisorLost is the first event. Once only."""
        EVENT_LOOP.acquire(self._died)
        self._reader.start()
        self._worker.start()

    def stop(self) -> None:
        """Post nothing more, close the connections, end the threads. At most 2 x STOP_WAIT_S."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        self._worker.stop()
        self._reader.join(STOP_WAIT_S)
        EVENT_LOOP.release(self._died)

    # --- commands, from any thread ---

    def attach(self, uuid: str) -> None:
        """Plug a channel in, live and for the next boot as far as it is missing; AttachDone
        follows."""
        if not self._worker.submit(_Command.ATTACH, uuid):
            self._finished(AttachDone(uuid, live=False, config=False, problem=_TOO_MANY))

    def detach(self, uuid: str) -> None:
        """Unplug the channel, live and for the next boot; DetachDone follows."""
        if not self._worker.submit(_Command.DETACH, uuid):
            self._finished(DetachDone(uuid, _TOO_MANY))

    def resync(self) -> None:
        """Read all domains again; Resync follows."""
        with self._wake:
            self._resync_wanted = True
            self._wake.notify_all()

    # --- callbacks of libvirt's event loop ---

    def _on_lifecycle(self, _conn: Any, domain: Any, kind: int, detail: int, _data: Any) -> None:
        heard_s = monotonic()
        uuid, name = domain.UUIDString(), _text(domain.name)
        event = _lifecycle_event(kind, detail)
        LOG.debug("%s (%s): libvirt says at %.6f s: %s", name, uuid, heard_s, event.value)
        with self._wake:
            if self._following:
                self._say(Happened(uuid, name, event))
            self._mark(uuid, delay_s=ENDING_S if event in ENDING_EVENTS else 0.0)

    def _on_reboot(self, _conn: Any, domain: Any, _data: Any) -> None:
        with self._wake:
            # A guest can reset itself all day: what is posted is bounded by what is read.
            self._rebooted.add(domain.UUIDString())
            self._mark(domain.UUIDString())

    def _on_other(self, _conn: Any, domain: Any, *_details: Any) -> None:
        with self._wake:
            self._mark(domain.UUIDString())

    def _on_close(self, _conn: Any, reason: int, _data: Any) -> None:
        with self._wake:
            self._lost = _close_reason(reason)
            self._wake.notify_all()

    def _contained(self, callback: Any) -> Callable[..., None]:
        """libvirt-python prints what a callback lets out, and goes on. We miss an edge, then: the
        level that is read instead makes it good."""

        def contained(*args: Any) -> None:
            _, error = attempt(lambda: callback(*args), None)
            if error is not None:
                log_fault(LOG, "libvirt: an event was missed", error)
                self.resync()

        return contained

    def _mark(self, uuid: str, delay_s: float = 0.0) -> None:
        self._marked[uuid] = monotonic() + delay_s
        self._wake.notify_all()

    def _say(self, event: HypervisorEvent) -> None:
        if not self._stopping:
            self._post(event)

    def _finished(self, event: AttachDone | DetachDone) -> None:
        with self._wake:
            self._say(event)
            self._mark(event.uuid)

    # --- the reader ---

    def _run(self) -> None:
        delay_s = RECONNECT_MIN_S
        told = False
        while not self._stopping:
            try:
                with _connection(self._uri) as conn, self._registered(conn):
                    self._follow(conn)
                reason = self._lost or "the connection was closed"
            except libvirt.libvirtError as error:
                reason = self._lost or explain(error)
            with self._wake:
                was_up, self._following, self._lost = self._following, False, None
                if was_up or not told:
                    self._say(HypervisorLost(f"{self._uri}: {reason}"))
                told = True
                delay_s = RECONNECT_MIN_S if was_up else min(delay_s * 2, RECONNECT_MAX_S)
                self._wake.wait_for(lambda: self._stopping, timeout=delay_s)

    @contextmanager
    def _registered(self, conn: Any) -> Iterator[None]:
        with self._wake:
            # What is marked belongs to the connection before; the Resync reads everything.
            self._marked.clear()
            self._rebooted.clear()
            self._lost = None
        conn.registerCloseCallback(self._on_close, None)
        conn.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
        callbacks = {
            libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE: self._on_lifecycle,
            libvirt.VIR_DOMAIN_EVENT_ID_REBOOT: self._on_reboot,
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED: self._on_other,
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED: self._on_other,
            libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE: self._on_other,
        }
        numbers = [
            conn.domainEventRegisterAny(None, event_id, self._contained(callback), None)
            for event_id, callback in callbacks.items()
        ]
        try:
            yield
        finally:
            _deregister(conn, numbers)

    def _follow(self, conn: Any) -> None:
        """Post the whole truth, then every change, until the connection or the daemon ends."""
        self._post_all(conn)
        poll_at_s = monotonic() + self._poll_s
        while (uuid := self._next_to_read(poll_at_s)) is not None:
            if self._resync_wanted:
                self._post_all(conn)
            if uuid:
                self._post_one(conn, uuid)
            if monotonic() >= poll_at_s:
                self._start_poll(conn)
                poll_at_s = monotonic() + self._poll_s

    def _next_to_read(self, poll_at_s: float) -> str | None:
        """Wait for work: a uuid to read, '' for other work, None for the end."""
        with self._wake:
            while True:
                if self._stopping or self._lost is not None:
                    return None
                now_s = monotonic()
                uuid = self._take(now_s)
                if uuid is not None or self._resync_wanted or now_s >= poll_at_s:
                    return uuid or ""
                self._wake.wait(min([poll_at_s, *self._marked.values()]) - now_s)

    def _take(self, now_s: float) -> str | None:
        """What to read next; unmarked now, so that a mark set while it is read makes it stale."""
        for uuid, not_before_s in self._marked.items():
            if not_before_s <= now_s:
                del self._marked[uuid]
                return uuid
        while self._polled:
            uuid = self._polled.popleft()
            if uuid not in self._marked:
                return uuid
        return None

    def _post_all(self, conn: Any) -> None:
        with self._wake:
            self._resync_wanted = False
            self._polled.clear()
        answers = [self._read(domain) for domain in conn.listAllDomains(0)]
        listed = {answer.uuid for answer in answers if not isinstance(answer, Gone)}
        # libvirt leaves out, without a word, what we may not see: only when asked it says so.
        absent = [uuid for uuid in self._known if uuid not in listed]
        answers += [self._look_up_and_read(conn, uuid) for uuid in absent]
        found = tuple(answer for answer in answers if isinstance(answer, DomainFacts))
        unread = tuple(answer for answer in answers if isinstance(answer, Unreadable))
        with self._wake:
            # Whatever happened since is marked, and read next; its edge is not told twice.
            self._known = {facts.uuid: facts.name for facts in found}
            self._known.update((each.uuid, each.name) for each in unread)
            self._following = True
            self._say(Resync(found, unread))
            for each in unread:
                self._mark_unread(each.uuid)
        self._sockets.keep_only(frozenset(self._known))

    def _post_one(self, conn: Any, uuid: str) -> None:
        answer = self._look_up_and_read(conn, uuid)
        with self._wake:
            if uuid in self._marked:
                return
            if uuid in self._rebooted:
                self._rebooted.discard(uuid)
                self._say(Rebooted(uuid))
            if isinstance(answer, Gone):
                if (name := self._known.pop(uuid, None)) is not None:
                    self._say(Gone(uuid, name))
                return
            self._known[uuid] = answer.name
            if isinstance(answer, DomainFacts):
                self._say(Changed(answer))
            else:
                self._say(answer)
                self._mark_unread(uuid)

    def _mark_unread(self, uuid: str) -> None:
        if uuid not in self._marked:
            self._mark(uuid, delay_s=UNREAD_RETRY_S)

    def _start_poll(self, conn: Any) -> None:
        present = {domain.UUIDString() for domain in conn.listAllDomains(0)}
        with self._wake:
            # Those that are gone are looked up in vain, which tells Gone.
            self._polled = deque([*present, *(uuid for uuid in self._known if uuid not in present)])

    def _look_up_and_read(self, conn: Any, uuid: str) -> DomainFacts | Unreadable | Gone:
        name = self._known.get(uuid, "")
        domain, error = attempt(lambda: conn.lookupByUUIDString(uuid), None)
        if error is not None:  # this domain's trouble, or the connection's
            return self._unread(conn, uuid, name, error)
        return self._read(domain)

    def _read(self, domain: Any) -> DomainFacts | Unreadable | Gone:
        uuid = domain.UUIDString()
        facts, error = attempt(lambda: read_facts(domain, self._target_name), None)
        if error is not None:
            answer = self._unread(domain.connect(), uuid, _text(domain.name), error)
            if isinstance(answer, Unreadable):
                path = self._sockets.find(uuid, domain.ID()) if _is_running(domain) else None
                return replace(answer, channel_path=path)
            return answer
        assert facts is not None
        self._sockets.note(uuid, domain.ID(), facts.served_path)
        return facts

    def _unread(self, conn: Any, uuid: str, name: str, error: Exception) -> Unreadable | Gone:
        """What an exception at reading a domain says of it.

        Raises:
            libvirt.libvirtError: It is the connection that failed.
        """
        if isinstance(error, libvirt.libvirtError):
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return Gone(uuid, name)
            if not conn.isAlive():
                raise error
            return Unreadable(uuid, name, explain(error))
        if isinstance(error, VchanError):
            return Unreadable(uuid, name, str(error))
        if refusal := _undecodable_refusal(error):
            return Unreadable(uuid, name, refusal)
        fault = describe_fault(error)
        if (uuid, fault) not in self._faults:
            if len(self._faults) >= FAULTS_MAX:
                self._faults.clear()
            self._faults.add((uuid, fault))
            log_fault(LOG, f"{name} ({uuid}): unexpected, at reading it", error)
        return Unreadable(uuid, name, f"vchan-host failed on it: {fault}")


class _Command(enum.Enum):
    ATTACH = "attaching its channel"
    DETACH = "detaching its channel"


class _Worker:
    """Plugs channels in and out, one after the other, on a connection of its own."""

    def __init__(
        self,
        uri: str,
        target_name: str,
        done: Callable[[AttachDone | DetachDone], None],
        died: OnDeath,
    ) -> None:
        self._uri = uri
        self._target_name = target_name
        self._done = done
        self._wake = threading.Condition()
        self._stopping = False
        self._commands: dict[tuple[_Command, str], None] = {}  # in order
        self._conn: Any = None  # the thread's alone
        self._thread = watched_thread(
            "vchan-libvirt-attach", self._run, lambda: self._stopping, died
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        self._thread.join(STOP_WAIT_S)

    def submit(self, command: _Command, uuid: str) -> bool:
        """False if too many are waiting. One that is waiting already is not queued again."""
        with self._wake:
            if len(self._commands) >= COMMANDS_MAX:
                return False
            self._commands[command, uuid] = None
            self._wake.notify_all()
            return True

    def _run(self) -> None:
        while (task := self._next_task()) is not None:
            command, uuid = task
            self._done(self._attempt(command, uuid))
        self._disconnect()

    def _next_task(self) -> tuple[_Command, str] | None:
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._commands)
            if self._stopping:
                return None
            task = next(iter(self._commands))
            del self._commands[task]
            return task

    def _attempt(self, command: _Command, uuid: str) -> AttachDone | DetachDone:
        done, error = attempt(lambda: self._carry_out(command, uuid), None)
        if done is not None:
            return done
        if isinstance(error, libvirt.libvirtError):
            problem = explain(error)
        elif isinstance(error, VchanError):
            problem = str(error)
        elif refusal := _undecodable_refusal(error):
            problem = refusal
        else:  # one domain's trouble: the others' go on
            assert error is not None
            fault = log_fault(LOG, f"{uuid}: unexpected, at {command.value}", error)
            problem = f"vchan-host failed on it: {fault}: see its log"
        if command is _Command.ATTACH:
            return AttachDone(uuid, live=False, config=False, problem=problem)
        return DetachDone(uuid, problem)

    def _carry_out(self, command: _Command, uuid: str) -> AttachDone | DetachDone:
        domain = self._connected().lookupByUUIDString(uuid)
        if command is _Command.ATTACH:
            return attach_channel(domain, self._target_name)
        return DetachDone(uuid, detach_channel(domain, self._target_name))

    def _connected(self) -> Any:
        if self._conn is None or not self._conn.isAlive():
            self._disconnect()
            self._conn = _open(self._uri)
            self._conn.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
        return self._conn

    def _disconnect(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None:
            _close(conn)


# --- one domain at a time ---------------------------------------------------------------------


def read_facts(domain: Any, target_name: str = TARGET_NAME) -> DomainFacts:
    """Read one domain: 4 calls of about 0.3 ms, 5 if it is migrating.

    Raises:
        libvirt.libvirtError: Not reachable, or gone meanwhile (VIR_ERR_NO_DOMAIN).
        DomainXmlError, LimitExceeded: libvirt's XML is not as documented.
    """
    current_xml, is_utf8 = _decoded(lambda: domain.XMLDesc(0))
    persistent = domain.isPersistent()
    next_boot_xml = _xml(domain, libvirt.VIR_DOMAIN_XML_INACTIVE) if persistent else None
    code, reason = domain.state()
    state = _state(code)
    operation = _migration(domain, reason) if state is DomainState.PAUSED else None
    return domain_facts(
        current_xml,
        next_boot_xml,
        state=state,
        incoming=operation == libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN,
        outgoing=operation == libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT,
        target_name=target_name,
        note="" if is_utf8 else NOT_UTF8,
    )


def _xml(domain: Any, flags: int) -> str:
    return _text(lambda: domain.XMLDesc(flags))


def _text(read: Callable[[], str]) -> str:
    return _decoded(read)[0]


def _decoded(read: Callable[[], str]) -> tuple[str, bool]:
    """What libvirt-python returns, or refuses to, as it is not UTF-8; and whether it is."""
    try:
        return read(), True
    except UnicodeDecodeError as error:
        return error.object.decode(errors="replace"), False


def _is_running(domain: Any) -> bool:
    """Whether it certainly runs, which can be asked when its XML cannot be read."""
    try:
        return bool(domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING)
    except libvirt.libvirtError:
        return False


def _state(code: int) -> DomainState:
    if code in (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_CRASHED):
        return DomainState.SHUTOFF
    if code in (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PMSUSPENDED):
        return DomainState.PAUSED
    return DomainState.RUNNING  # also while it shuts down: QEMU is there


def _migration(domain: Any, paused_reason: int) -> int | None:
    """Which way a paused domain is migrating, as a job operation; None if it is not.

    Both ends show the same state and reason while they wait for each other, so the job must tell.
    Only the source has statistics of it; at the destination libvirt refuses them as unsupported.
    """
    if paused_reason in (
        libvirt.VIR_DOMAIN_PAUSED_POSTCOPY,
        libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED,
    ):
        return int(libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT)
    if paused_reason not in (
        libvirt.VIR_DOMAIN_PAUSED_MIGRATION,
        libvirt.VIR_DOMAIN_PAUSED_STARTING_UP,  # the destination, in its first moments
    ):
        return None
    try:
        operation = domain.jobStats().get(libvirt.VIR_DOMAIN_JOB_OPERATION)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_OPERATION_UNSUPPORTED:
            return int(libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN)
        raise
    return None if operation is None else int(operation)


def attach_channel(domain: Any, target_name: str = TARGET_NAME) -> AttachDone:
    """Give the domain what it lacks of a channel, live and for the next boot.

    The two are tried apart: libvirt's one call for both does neither if one fails.

    Raises:
        libvirt.libvirtError: The domain cannot be read.
    """
    facts = read_facts(domain, target_name)
    if facts.rescued:
        return AttachDone(facts.uuid, live=False, config=False, problem=IN_RESCUE)
    problems: list[str] = []
    config = facts.persistent and not facts.configured
    if config:
        problem = _plug(domain, target_name, _NEXT_BOOT)
        config = problem is None
        problems += [f"next boot: {problem}"] if problem else []
    live = facts.active and facts.channel_path is None
    if live and not facts.has_controller:
        live = False
        problems.append(no_controller(facts, configured=facts.configured or config))
    elif live:
        problem = _plug(domain, target_name, _LIVE)
        live = problem is None
        problems += [f"running VM: {problem}"] if problem else []
    return AttachDone(facts.uuid, live, config, "; ".join(problems) or None)


class _Definition(NamedTuple):
    """Which of a domain's two: each has its own XML, and a channel must be looked for in it."""

    read: int
    affect: int


def _plug(domain: Any, target_name: str, definition: _Definition) -> str | None:
    try:
        alias = free_alias(_xml(domain, definition.read), target_name)
        domain.attachDeviceFlags(channel_xml(target_name, alias=alias), definition.affect)
    except libvirt.libvirtError as error:
        return explain(error)
    return None


def detach_channel(domain: Any, target_name: str = TARGET_NAME) -> str | None:
    """Unplug the channel, live and from the next boot: both or neither. None, or why neither; and
    what remains, should libvirt take one half and not give it back.

    Raises:
        libvirt.libvirtError: The domain cannot be read.
    """
    live = _find(domain, target_name, _LIVE) if domain.isActive() else None
    config = _find(domain, target_name, _NEXT_BOOT) if domain.isPersistent() else None
    try:
        if live is None and config is None:
            return f"it has no channel {target_name}"
        if live and config and live.has_own_alias and live.alias == config.alias:
            domain.detachDeviceAlias(live.alias, _LIVE.affect | _NEXT_BOOT.affect)
            return None
        # The next boot first: that can be taken back without the guest's noticing.
        if config is not None:
            _unplug(domain, config, _NEXT_BOOT)
        if live is not None:
            _unplug_live(domain, live, config)
    except libvirt.libvirtError as error:
        return explain(error)
    return None


def _unplug_live(domain: Any, live: ChannelElement, config: ChannelElement | None) -> None:
    try:
        _unplug(domain, live, _LIVE)
    except libvirt.libvirtError:
        if config is not None:
            domain.attachDeviceFlags(config.xml, _NEXT_BOOT.affect)
        raise


def _unplug(domain: Any, channel: ChannelElement, definition: _Definition) -> None:
    """By alias where there is one: live devices all have, next-boot ones those that users gave."""
    if channel.alias is not None:
        domain.detachDeviceAlias(channel.alias, definition.affect)
    else:
        domain.detachDeviceFlags(channel.xml, definition.affect)


def _find(domain: Any, target_name: str, definition: _Definition) -> ChannelElement | None:
    return find_channel_element(_xml(domain, definition.read), target_name)


def explain(error: Any) -> str:
    """A libvirt error as one line that says what to do, where we know."""
    lines = (error.get_error_message() or str(error)).splitlines()
    message = lines[0] if lines else "an error without a word"
    code = error.get_error_code()
    advice = {
        libvirt.VIR_ERR_NO_DOMAIN: "this host has no such VM",
        libvirt.VIR_ERR_OPERATION_TIMEOUT: "the VM is busy, perhaps migrating: try again later",
        libvirt.VIR_ERR_OPERATION_DENIED: "the libvirt connection is read-only: "
        "configure a URI with write access",
        libvirt.VIR_ERR_AUTH_FAILED: "this user may not talk to libvirtd: "
        "add it to the group that may (libvirt on Debian)",
    }.get(code)
    if code == libvirt.VIR_ERR_SYSTEM_ERROR and error.get_error_domain() == libvirt.VIR_FROM_RPC:
        advice = "libvirtd cannot be reached"
    return f"{advice} ({message})" if advice else message


def _undecodable_refusal(error: BaseException | None) -> str:
    """What libvirt refuses in words that are not UTF-8, or "": it quotes a domain's texts, and
    libvirt-python fails on that."""
    while error is not None and not isinstance(error, UnicodeDecodeError):
        error = error.__cause__ or error.__context__
    if error is None:
        return ""
    lines = error.object.decode(errors="replace").splitlines()
    said = lines[0][:REFUSAL_CHARS_MAX] if lines else ""
    return f"libvirt refuses it ({said}): {NOT_UTF8}"


# --- the small print --------------------------------------------------------------------------


def require_libvirt() -> None:
    """Check that libvirt-python is there.

    From a source tree, `import libvirt` finds the folder of XML snippets instead, as an empty
    package: hence the second question.

    Raises:
        ConfigError: It is not.
    """
    if libvirt is None or not hasattr(libvirt, "open"):
        raise ConfigError(
            "libvirt-python", 'is not installed; install it with: pip install "vchan[host]"'
        )


def _lifecycle_events() -> dict[tuple[int, int], DomainEvent]:
    """By event and detail. Details not listed mean what their event means by itself."""
    lv = libvirt
    started, suspended = lv.VIR_DOMAIN_EVENT_STARTED, lv.VIR_DOMAIN_EVENT_SUSPENDED
    resumed, stopped = lv.VIR_DOMAIN_EVENT_RESUMED, lv.VIR_DOMAIN_EVENT_STOPPED
    postcopy_failed = lv.VIR_DOMAIN_EVENT_RESUMED_POSTCOPY_FAILED
    return {
        (started, lv.VIR_DOMAIN_EVENT_STARTED_MIGRATED): DomainEvent.STARTED_INCOMING,
        (suspended, lv.VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED): DomainEvent.SUSPENDED_MIGRATED,
        (suspended, lv.VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY): DomainEvent.SUSPENDED_POSTCOPY,
        (suspended, lv.VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY_FAILED): DomainEvent.SUSPENDED_POSTCOPY,
        (resumed, lv.VIR_DOMAIN_EVENT_RESUMED_MIGRATED): DomainEvent.RESUMED_MIGRATED,
        (resumed, lv.VIR_DOMAIN_EVENT_RESUMED_POSTCOPY): DomainEvent.RESUMED_POSTCOPY,
        (resumed, postcopy_failed): DomainEvent.RESUMED_POSTCOPY,  # runs here all the same
        (stopped, lv.VIR_DOMAIN_EVENT_STOPPED_MIGRATED): DomainEvent.STOPPED_MIGRATED,
        (stopped, lv.VIR_DOMAIN_EVENT_STOPPED_FAILED): DomainEvent.STOPPED_FAILED,
        (stopped, lv.VIR_DOMAIN_EVENT_STOPPED_SAVED): DomainEvent.STOPPED_SAVED,
    }


def _lifecycle_event(kind: int, detail: int) -> DomainEvent:
    plain = {
        libvirt.VIR_DOMAIN_EVENT_DEFINED: DomainEvent.DEFINED,
        libvirt.VIR_DOMAIN_EVENT_UNDEFINED: DomainEvent.UNDEFINED,
        libvirt.VIR_DOMAIN_EVENT_STARTED: DomainEvent.STARTED,
        libvirt.VIR_DOMAIN_EVENT_SUSPENDED: DomainEvent.SUSPENDED,
        libvirt.VIR_DOMAIN_EVENT_PMSUSPENDED: DomainEvent.SUSPENDED,
        libvirt.VIR_DOMAIN_EVENT_RESUMED: DomainEvent.RESUMED,
        libvirt.VIR_DOMAIN_EVENT_SHUTDOWN: DomainEvent.SHUTDOWN,
        libvirt.VIR_DOMAIN_EVENT_STOPPED: DomainEvent.STOPPED,
    }
    default = plain.get(kind, DomainEvent.OTHER)
    return _lifecycle_events().get((kind, detail), default)


def _close_reason(reason: int) -> str:
    return {
        libvirt.VIR_CONNECT_CLOSE_REASON_EOF: "libvirtd closed the connection",
        libvirt.VIR_CONNECT_CLOSE_REASON_KEEPALIVE: "libvirtd does not answer",
        libvirt.VIR_CONNECT_CLOSE_REASON_ERROR: "the connection failed",
    }.get(reason, "the connection was closed")


@contextmanager
def _connection(uri: str) -> Iterator[Any]:
    conn = _open(uri)
    try:
        yield conn
    finally:
        _close(conn)


def _open(uri: str) -> Any:
    """Connect; name and password, if libvirtd asks for them (SASL), are in libvirt's auth.conf.

    libvirt looks there only for those who say that they could be asked. We are asked for what
    is not there, and do not have it either.
    """
    credentials = [libvirt.VIR_CRED_AUTHNAME, libvirt.VIR_CRED_PASSPHRASE]
    return libvirt.openAuth(uri, [credentials, lambda *_: -1, None])


def _close(conn: Any) -> None:
    try:
        conn.close()
    except libvirt.libvirtError as error:
        LOG.debug("Closing a libvirt connection: %s", explain(error))


def _deregister(conn: Any, numbers: list[int]) -> None:
    try:
        conn.unregisterCloseCallback()
        for number in numbers:
            conn.domainEventDeregisterAny(number)
    except libvirt.libvirtError as error:
        # The usual reason to be here is that the connection is dead.
        LOG.debug("Deregistering from libvirt: %s", explain(error))


class _EventLoop:
    """libvirt's own event loop, on a thread of ours, while anybody uses it.

    libvirt has one per process and it cannot be unregistered; only the thread ends.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: list[OnDeath] = []
        self._thread: threading.Thread | None = None
        self._ending = False
        self._timer: int | None = None

    def acquire(self, died: OnDeath) -> None:
        """Have it run.

        Args:
            died: Told if it does no longer, before `release`.
        """
        with self._lock:
            self._users.append(died)
            if len(self._users) > 1:
                return
            if self._timer is None:
                libvirt.virEventRegisterDefaultImpl()
                # Otherwise libvirt prints every error to stderr as well.
                libvirt.registerErrorHandler(lambda _data, _error: None, None)
                # Never due by itself: it is how `release` interrupts the loop.
                self._timer = libvirt.virEventAddTimeout(-1, self._on_timer, None)
            self._ending = False
            self._thread = watched_thread(
                "vchan-libvirt-events", self._run, lambda: self._ending, self._tell_died
            )
            self._thread.start()

    def _tell_died(self, problem: str) -> None:
        for died in list(self._users):
            died(problem)

    def release(self, died: OnDeath) -> None:
        """Somebody needs it no more."""
        with self._lock:
            self._users.remove(died)
            if self._users or self._thread is None:
                return
            self._ending = True
            libvirt.virEventUpdateTimeout(self._timer, 0)
            self._thread.join(STOP_WAIT_S)
            self._thread = None

    def _on_timer(self, timer: int, _data: Any) -> None:
        libvirt.virEventUpdateTimeout(timer, -1)

    def _run(self) -> None:
        while not self._ending:
            libvirt.virEventRunDefaultImpl()


EVENT_LOOP: Final = _EventLoop()

_LIVE: Final = _Definition(0, 1)  # VIR_DOMAIN_AFFECT_LIVE
_NEXT_BOOT: Final = _Definition(2, 2)  # VIR_DOMAIN_XML_INACTIVE, VIR_DOMAIN_AFFECT_CONFIG

_TOO_MANY = f"over {COMMANDS_MAX} attaches and detaches are waiting (COMMANDS_MAX): try again later"
