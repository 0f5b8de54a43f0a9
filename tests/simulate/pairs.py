"""The two ends of one session, looked at together: what neither end can see alone.

What one end has counted as sent, the other has counted as received, or it is on the way: credit
that leaks by some bytes a frame stalls a session only after hours, and shows here at once.
"""

from __future__ import annotations

from collections.abc import Iterable

from tests.simulate.world import World
from vchan.session import Role, Session, State
from vchan.wire.frames import OVERHEAD_BYTES, ZERO_ID


class Pairs:
    """Every session of the world, by its id."""

    def __init__(self, world: World) -> None:
        self._world = world

    def check(self, sessions: Iterable[Session], *, at_rest: bool = False) -> None:
        """Look at each, and at each with its other end.

        Args:
            at_rest: Everything is over: nothing may be under way or half done.
        """
        ends: dict[bytes, list[Session]] = {}
        for session in sessions:
            self._check_alone(session)
            if session._handshake.session_id != ZERO_ID:
                ends.setdefault(session._handshake.session_id, []).append(session)
        for both in ends.values():
            if sorted(session.config.role for session in both) == [Role.HOST, Role.GUEST]:
                self._check_way(both[0], both[1], at_rest=at_rest)
                self._check_way(both[1], both[0], at_rest=at_rest)
                self._world.stats["pairs of ends compared"] += 1

    def _fail(self, session: Session, text: str) -> None:
        self._world.fail(f"{session.config.role.name} {session.config.name!r}: {text}")

    def _check_alone(self, session: Session) -> None:
        """What is counted is what is there."""
        sender, receiver = session._sender, session._receiver
        in_flight = sum(len(payload) + OVERHEAD_BYTES for *_, payload in sender._sent)
        queued = sum(
            sum(map(len, outgoing.messages)) - outgoing.offset
            for outgoing in sender._streams.values()
        )
        large = sum(len(sender._streams[stream].messages[0]) for stream in sender._large)
        begun = sum(partial.total for partial in receiver._partials.values())
        for what, counted, is_there in (
            ("bytes in flight", sender.in_flight, in_flight),
            ("frames in flight", sender.tail - sender.base, len(sender._sent)),
            ("bytes queued", sender.backlog, queued),
            ("bytes of large messages", sender._large_open, large),
            ("bytes in reassembly", receiver.reassembly, begun),
        ):
            if counted != is_there:
                self._fail(session, f"{what}: {counted} are counted, {is_there} are there")

    def _check_way(self, sends: Session, receives: Session, *, at_rest: bool) -> None:
        """One direction of a session."""
        sender, receiver = sends._sender, receives._receiver
        if not sender.base <= receiver.next <= sender.tail:
            kept = f"{sender.base} to {sender.tail}"
            self._fail(
                sends, f"keeps frames {kept}, and {receiver.next} is what its peer waits for"
            )
            return
        under_way = list(sender._sent)[receiver.next - sender.base :]
        cost = sum(len(payload) + OVERHEAD_BYTES for *_, payload in under_way)
        if receiver.cost != sender._tx_cost - cost:
            counted = f"{receiver.cost} bytes as received"
            self._fail(receives, f"counts {counted}; {sender._tx_cost - cost} were sent to it")
        granted = max(receiver.credit_told, receiver.credit_greeted)
        if sender.credit > granted:
            self._fail(sends, f"has credit up to {sender.credit}; {granted} was granted")
        if at_rest and sends.state is receives.state is State.OPEN:
            self._check_rest(sends, receives)

    def _check_rest(self, sends: Session, receives: Session) -> None:
        sender, receiver = sends._sender, receives._receiver
        left = (sender.backlog, len(sender._sent), sender.tail - receiver.next)
        if any(left) or receiver.reassembly:
            self._fail(sends, f"at rest, and has {left} and {receiver.reassembly} bytes open")
        room = sender.credit - sender._tx_cost
        if room < receives.config.window_bytes // 2:
            self._fail(sends, f"at rest, and may send {room} bytes only")
