"""What each core's tables must say of each other, at every moment; and what may be left at the end.

Limits are `check.Bounds`'. This is about sums that are kept beside what they are the sum of, and
about an id that stands in several tables at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import pairwise
from typing import Any

from tests.simulate.broker import HostBroker
from tests.simulate.world import World
from vchan.guest.router import Router
from vchan.guest.upward import GuestUpward
from vchan.host.vm.downward import Downward
from vchan.host.vm.upward import Upward, _State
from vchan.rpc.dispatcher import Dispatcher
from vchan.rpc.in_flight import Requester, Responder


class Tables:
    """Looks at the cores of one world."""

    def __init__(self, world: World) -> None:
        self._world = world

    def _same(self, who: str, what: str, one: Any, other: Any) -> None:
        if one != other:
            self._world.fail(f"{who}: {what}: {one} is not {other}")

    # ------------------------------------------------------------ at every moment

    def check_responder(self, who: str, responder: Responder) -> None:
        """An id is running, or over, or settled; answers are kept of what is over."""
        running, over, settled = responder._running, responder._over, responder._settled
        doubled = (running.keys() & over.keys()) | ((running.keys() | over.keys()) & settled.keys())
        self._same(who, "ids in two tables", len(doubled), 0)
        kept = sum(len(record.reply) for record in over.values() if record.reply is not None)
        self._same(who, "bytes of kept answers", responder._reply_bytes, kept)
        answers = {each for each, record in over.items() if record.reply is not None}
        timed = responder._deadlines._at_s.keys()
        self._same(who, "times of ids that are gone", len(timed - running.keys() - answers), 0)

    def check_requester(self, who: str, requester: Requester) -> None:
        """Only what is open has a deadline, and all that has one is in the heap; nothing, where
        another keeps the time."""
        timed = {
            each
            for each, item in requester._open.items()
            if item.deadline_s is not None and requester._is_timed
        }
        self._same(who, "ids with a deadline", requester._deadlines._at_s.keys(), timed)
        heaped = {each for _, each in requester._deadlines._heap}
        self._same(who, "deadlines that never come", len(timed - heaped), 0)

    def check_downward(self, downward: Downward) -> None:
        """What Downward holds of the broker and of programs on the host."""
        entries, answers = downward._open.by_id, downward._finished._answers
        held = sum(e.bytes for e in entries.values()) + sum(a.size for a in answers.values())
        self._same(downward.vm, "bytes open", downward._open.bytes + downward._finished.bytes, held)
        local = sum(entry.local is not None for entry in entries.values())
        self._same(downward.vm, "local requests", downward._open.local, local)
        asked = downward._requester._open.keys()
        self._same(downward.vm, "requests that nobody waits for", asked - entries.keys(), set())
        self._same(downward.vm, "entries that wait for nothing", entries.keys() - asked, set())
        self._same(downward.vm, "open though completed", entries.keys() & answers.keys(), set())
        if downward._consumption.is_handing_back:
            tokens = sum(len(entry.tokens) for entry in entries.values())
            self._same(downward.vm, "tokens while handing back", tokens, 0)
        self.check_requester(downward.vm, downward._requester)
        self.check_host_upward(downward.upward)

    def check_host_upward(self, host_upward: Upward) -> None:
        """Each request is in its one place, in the order of its number."""
        who, items = f"{host_upward.vm} host upward", host_upward._items
        self._same(who, "bytes", host_upward._bytes, sum(item.bytes for item in items.values()))
        calls = sum(item.request.is_call for item in items.values())
        self._same(who, "calls", host_upward._calls, calls)
        states = Counter(item.state for item in items.values())
        queued = [*host_upward._unsent, *host_upward._queue]
        self._same(who, "queued", states[_State.QUEUED], len(queued))
        self._same(who, "queued twice", len({id(item) for item in queued}), len(queued))
        for before, after in pairwise(host_upward._queue):
            if before.number >= after.number:
                self._world.fail(f"{who}: number {after.number} waits behind {before.number}")
        if host_upward._unsent and not host_upward._sending:
            self._world.fail(f"{who}: what was not confirmed waits for nothing")
        self._same(who, "open", items.keys(), host_upward._responder._running.keys())
        self.check_responder(who, host_upward._responder)

    def check_router(self, router: Router) -> None:
        """What is the host's is with the dispatcher; what is in doubt may yet be given."""
        who, dispatcher = "router", router._dispatcher
        self._same(who, "open", dispatcher._open.keys(), router._host._running.keys())
        self._same(who, "agents", dispatcher._servers.keys(), router._agents.keys())
        in_doubt = [each for each in router._doubtful if not dispatcher.may_be_given(each)]
        self._same(who, "in doubt, and over", in_doubt, [])
        self.check_dispatcher(who, dispatcher)
        self.check_responder(who, router._host)
        self.check_upward(router._upward)

    def check_dispatcher(self, who: str, dispatcher: Dispatcher) -> None:
        """A request is with servers, or waits; who has it, knows it."""
        servers, requests = dispatcher._servers, dispatcher._open
        lined_up = [each.request.id for line in dispatcher._lines.values() for each in line]
        waiting = [*lined_up, *dispatcher._later]
        self._same(who, "waiting twice", len(set(waiting)), len(waiting))
        unowned = {each for each, served in requests.items() if not served.owners}
        self._same(who, "waiting", unowned, set(waiting))
        self._same(
            who, "lines of nobody", [t for t, line in dispatcher._lines.items() if not line], []
        )
        owned = {(key, each) for each, served in requests.items() for key in served.owners}
        asked = {(key, each) for key, server in servers.items() for each in server.requester._open}
        self._same(who, "by one table only", owned ^ asked, set())
        served = {(key, topic) for topic, keys in dispatcher._by_topic.items() for key in keys}
        said = {(key, topic) for key, server in servers.items() for topic in server.topics}
        self._same(who, "topics served", served, said)
        self._same(who, "holders", set(dispatcher._holders.values()) - servers.keys(), set())
        lingering = dispatcher._linger_until_s.keys() & dispatcher._by_topic.keys()
        self._same(who, "topics that linger and are served", lingering, set())
        for server in servers.values():
            self.check_requester("a server's requester", server.requester)

    def check_upward(self, upward: GuestUpward) -> None:
        """What agents have asked, and what was said of it."""
        items = upward._items
        self._same("upward", "bytes", upward._bytes, sum(item.bytes for item in items.values()))
        open_ones = {each for each, item in items.items() if item.outcome is None}
        self._same("upward", "open", open_ones, set(upward._host._open))
        keys = {item.key for item in items.values()} - {None}
        self._same("upward", "agents that are gone", keys - upward._agents.keys(), set())
        self.check_requester("upward", upward._host)

    # ------------------------------------------------------------ at the end

    def check_forgotten(self, who: str, responder: Responder, ids: Collection[bytes]) -> None:
        """These were asked when everything was well: they are over, settled, and freed."""
        left = [each for each in ids if each in responder._running or each in responder._over]
        if left:
            self._world.fail(f"{who} was never told to forget {len(left)} of {len(ids)} ids")
        self._world.stats["ids that had to be forgotten"] += len(ids)

    def check_nothing_is_completing(self, host: str, broker: HostBroker) -> None:
        """Every proof has come, and every reply is confirmed."""
        busy = [vm for vm, state in broker._vms.items() if state.completions]
        self._same(f"{host} at rest", "completing", busy, [])

    def check_downward_is_empty(self, downward: Downward) -> None:
        """Nothing is open, so nothing is held."""
        still_open, over = downward._open, downward._finished
        held = (len(still_open), still_open.bytes, over.bytes, len(over._answers))
        self._same(f"{downward.vm} at rest", "held", held, (0, 0, 0, 0))
        host_upward = downward.upward
        its = (host_upward._bytes, host_upward._calls, len(host_upward._sending))
        self._same(f"{downward.vm} host upward at rest", "held", its, (0, 0, 0))

    def check_router_is_empty(self, router: Router) -> None:
        """Likewise."""
        dispatcher = router._dispatcher
        held = (len(dispatcher), dispatcher.waiting, len(router._doubtful))
        self._same("router at rest", "held", held, (0, 0, 0))
