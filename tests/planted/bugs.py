"""Bugs that were planted to prove that the tests would find them.

Each is a small textual patch and the check that catches it: the simulation, from a seed that shows
it quickly, or a named test. `python -m tests.planted` applies each to a copy and runs its check;
one that survives, or whose text is no longer there, is a failure. Some of them were real once: the
simulation found them (`was_real`).
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Patch(NamedTuple):
    """Replace `old`, which stands exactly once in `file`, by `new`."""

    file: str
    old: str
    new: str


class Simulation(NamedTuple):
    """Caught by one of these seeds, left to chance or in a scenario."""

    start: int
    seeds: int = 60
    scenario: str = ""


class Test(NamedTuple):
    """Caught by this test."""

    name: str


class Bug(NamedTuple):
    """A planted bug."""

    name: str
    patch: Patch
    caught_by: Simulation | Test
    was_real: bool = False


_FRAMES: Final = "vchan/frames.py"
_SESSION: Final = "vchan/session.py"
_EXCHANGE: Final = "vchan/exchange.py"
_ROUTER: Final = "vchan/guest/router.py"
_RELAY: Final = "vchan/host/relay.py"
_CHANNELS: Final = "vchan/host/channels.py"
_DOMAINS: Final = "vchan/host/domains.py"
_LINK: Final = "vchan/link.py"
_CLIENT: Final = "vchan/client.py"
_UPWARD: Final = "vchan/guest/upward.py"
_OUTBOUND: Final = "vchan/host/outbound.py"
_HISTORY: Final = "vchan/host/history.py"
_BROKER_VM: Final = "vchan/host/broker_vm.py"
_OUTBOUND_TESTS: Final = "tests/unit/test_outbound.py::"
_UPWARD_TESTS: Final = "tests/unit/test_upward.py::"
_BROKER: Final = "tests/simulate/broker.py"

BUGS: Final = (
    # ---------------------------------------------------------------- frames
    Bug(
        "CRC not seeded with the session's key",
        Patch(
            _FRAMES,
            "return Key(words[0], words[1]), Key(words[2], words[3])",
            "return Key(1, 1), Key(1, 1)",
        ),
        Test(
            "tests/unit/test_session.py::test_old_frames_that_arrive_in_the_new_session_mean_nothing"
        ),
    ),
    Bug(
        "payload CRC not checked",
        Patch(
            _FRAMES,
            "if crc32(payload, header_crc ^ key[1]) != _unpack_crc(data, stop)[0]:",
            "if False:",
        ),
        Simulation(60),
    ),
    # ---------------------------------------------------------------- session
    Bug(
        "no flush before HELLO",
        Patch(_SESSION, "        self._dues |= _FLUSH\n", ""),
        Test("tests/unit/test_session.py::test_a_stream_opens_with_a_flush_and_a_hello"),
    ),
    Bug(
        "resumed without a check of what the peer has",
        Patch(
            _SESSION,
            "            and self._base <= peer.recv_next <= self._tail\n"
            "            and peer.send_base <= mine.recv_next <= peer.send_next\n",
            "",
        ),
        Test("tests/unit/test_session.py::test_a_clone_that_greets_its_twins_host_starts_anew"),
    ),
    Bug(
        "go-back-N off by one",
        Patch(
            _SESSION,
            "            self._rewind_not_before_s = self._now_s + REWIND_S\n"
            "            self._cursor = self._base\n",
            "            self._rewind_not_before_s = self._now_s + REWIND_S\n"
            "            self._cursor = min(self._base + 1, self._tail)\n",
        ),
        Simulation(0),
    ),
    Bug(
        "credit ignored",
        Patch(_SESSION, "            or self._tx_cost + cost > self._peer_credit\n", ""),
        Test("tests/unit/test_session.py::test_an_unread_peer_is_written_to_up_to_its_credit_only"),
    ),
    Bug(
        "a new message overtakes older ones of its stream",
        Patch(
            _SESSION,
            "        outgoing.messages.append(message)\n",
            "        outgoing.messages.insert(1 if outgoing.offset else 0, message)\n",
        ),
        Simulation(0),
    ),
    Bug(
        "HELLO trusted",
        Patch(
            _SESSION,
            "        self._welcome = candidate.mine\n        self._dues |= _WELCOME\n\n",
            "        self._welcome = candidate.mine\n        self._dues |= _WELCOME\n"
            "        self._establish(*candidate)\n\n",
        ),
        Test("tests/unit/test_session.py::test_a_hello_alone_changes_nothing_in_an_open_session"),
    ),
    Bug(
        "silence never told, so a wedge is never cured",
        Patch(
            _SESSION,
            "            self._events.append(Silent(now_s - self._heard_s))\n",
            "",
        ),
        Simulation(0, 60, "wedged_in_company"),
    ),
    Bug(
        "duplicates accepted as new",
        Patch(
            _SESSION,
            "        if seq != self._recv_next:\n            if seq < self._recv_next:",
            "        if seq > self._recv_next:\n            if seq < self._recv_next:",
        ),
        Test(
            "tests/unit/test_session.py::test_frames_that_come_twice_are_dropped_and_acknowledged_at_once"
        ),
    ),
    # ---------------------------------------------------------------- exchange
    Bug(
        "a new session repeats nothing",
        Patch(
            _EXCHANGE,
            "        self._holds = False\n        for item in self._open.values():\n",
            "        self._holds = False\n        for item in ():\n",
        ),
        Simulation(0, 60, "guest_daemon_restarts_under_load"),
    ),
    Bug(
        "a cast's receipt is not given again",
        Patch(
            _EXCHANGE,
            "        if record.state == _TAKEN:\n"
            "            self._send(encode_receipt(request_id), CONTROL)\n",
            "        if record.state == _TAKEN:\n            pass\n",
        ),
        Simulation(0),
    ),
    Bug(
        "an expired call is kept and answered late",
        Patch(
            _EXCHANGE,
            "        for request_id in self._deadlines.due(now_s):\n"
            "            item = self._open[request_id]\n"
            "            # Before us, perhaps, by who asks us: to a daemon that is no more.\n"
            "            was_sent = item.sent or item.request.flags & REDELIVERED != 0\n"
            "            self.cancel(request_id)\n"
            "            outcomes.append(Overdue(request_id, was_sent))\n",
            "        self._deadlines.due(now_s)\n",
        ),
        Simulation(0),
    ),
    Bug(
        "settled ids forgotten at once",
        Patch(_EXCHANGE, "SETTLED_MAX: Final = 2048", "SETTLED_MAX: Final = 0"),
        Simulation(0),
        was_real=True,
    ),
    Bug(
        "a call whose agent died is forgotten",
        Patch(_EXCHANGE, "        if reason == AGENT_GONE:\n", "        if reason < 0:\n"),
        Test("tests/unit/test_exchange.py::test_a_copy_of_what_may_have_run_does_not_run"),
        was_real=True,
    ),
    # ---------------------------------------------------------------- router
    Bug(
        "receipt before the agent acknowledged",
        Patch(
            _ROUTER,
            "        self._owners[request.id] = set(keys)\n",
            "        self._owners[request.id] = set(keys)\n"
            "        if not request.is_call:\n"
            "            self._host.take(request.id, now_s)\n",
        ),
        Test(
            "tests/unit/test_router.py::test_casts_of_an_agent_that_left_go_to_the_next_in_their_order"
        ),
    ),
    Bug(
        "who holds a request is ignored",
        Patch(
            _ROUTER,
            "        holder = self._holders.get(request.id)\n        if holder is not None",
            "        holder = None\n        if holder is not None",
        ),
        Test(
            "tests/unit/test_router.py::test_during_the_grace_what_is_held_goes_straight_to_its_holder"
        ),
    ),
    Bug(
        "dedup forgotten at a new session",
        Patch(
            _ROUTER,
            "            self._told = None\n            self._tell_host()\n",
            "            self._told = None\n            self._host._over.clear()\n"
            "            self._host._settled.clear()\n            self._tell_host()\n",
        ),
        Simulation(0, 60, "there_and_back_again"),
    ),
    Bug(
        "put back in reverse",
        Patch(
            _ROUTER,
            "for request in reversed(requests))",
            "for request in requests)",
        ),
        Test(
            "tests/unit/test_router.py::test_casts_of_an_agent_that_left_go_to_the_next_in_their_order"
        ),
    ),
    Bug(
        "a fanout goes only to who holds it",
        Patch(
            _ROUTER,
            "        if holder is not None and not is_fanout:\n",
            "        if holder is not None:\n",
        ),
        Test("tests/unit/test_router.py::test_a_fanout_during_the_grace_waits_for_all_agents"),
        was_real=True,
    ),
    Bug(
        "casts handed back when no agent is there",
        Patch(
            _ROUTER,
            "        casts = deque(item for item in waiting if not item.request.timeout_ms)\n"
            "        if casts:\n"
            "            self._waiting[topic] = casts\n"
            "        for item in waiting:\n"
            "            if item.request.timeout_ms:\n"
            "                self._refuse(item.request)\n",
            "        for item in waiting:\n            self._refuse(item.request)\n",
        ),
        Test("tests/unit/test_router.py::test_what_waits_when_a_topic_is_given_up"),
        was_real=True,
    ),
    Bug(
        "a redelivered call is called unrun",
        Patch(
            _ROUTER,
            "        if request.is_call and request.flags & REDELIVERED:\n            # Nobody",
            "        if False:\n            # Nobody",
        ),
        Test("tests/unit/test_router.py::test_a_call_nobody_serves_is_handed_back"),
        was_real=True,
    ),
    # ---------------------------------------------------------------- relay
    Bug(
        "acknowledged before the reply is confirmed",
        Patch(
            _RELAY,
            "        self._broker.publish_reply(entry.origin.reply_q, entry.reply, request_id)\n",
            "        self._broker.publish_reply(entry.origin.reply_q, entry.reply, request_id)\n"
            "        for token in entry.tokens:\n            self._broker.ack(token)\n",
        ),
        Test("tests/unit/test_relay.py::test_a_call_is_acknowledged_when_its_reply_is_published"),
    ),
    Bug(
        "settled without the broker's proof",
        Patch(
            _RELAY,
            "            self._broker.barrier(self.vm, self._settle_token, ids)\n",
            "            self._requester.settle(ids)\n",
        ),
        Simulation(0),
    ),
    Bug(
        "only the last copy is acknowledged",
        Patch(
            _RELAY,
            "        for token in entry.tokens:\n            self._broker.ack(token)\n        if",
            "        for token in entry.tokens[-1:]:\n"
            "            self._broker.ack(token)\n        if",
        ),
        Test("tests/unit/test_relay.py::test_every_copy_is_acknowledged"),
    ),
    Bug(
        "deliveries of a released channel are taken",
        Patch(
            _RELAY,
            "        if self._handing_back or topic not in self._consumed:\n",
            "        if False:\n",
        ),
        Test(
            "tests/unit/test_relay.py::test_deliveries_of_another_topic_or_a_channel_that_is_gone_are_ignored"
        ),
        was_real=True,
    ),
    Bug(
        "ids of a lost channel are settled",
        Patch(
            _RELAY,
            "    def _drop_tokens(self) -> None:\n        self._settle_ids.clear()\n",
            "    def _drop_tokens(self) -> None:\n",
        ),
        Simulation(0, 60, "broker_is_cut_again_and_again"),
    ),
    Bug(
        "a VM that has left is consumed for",
        Patch(
            _RELAY,
            "            self._broker.release(self.vm)\n            self._drop_tokens()\n",
            "            self._drop_tokens()\n",
        ),
        Simulation(0),
    ),
    # ---------------------------------------------------------------- requests out of guests
    Bug(
        "receipted before the broker has it",
        Patch(
            _OUTBOUND,
            "        self._broker.publish_request(self.vm, request.id, made)\n",
            "        self._broker.publish_request(self.vm, request.id, made)\n"
            "        if not request.is_call:\n"
            "            self._forget(request.id)\n"
            "            self._responder.take(request.id, now_s)\n",
        ),
        Simulation(0),
    ),
    Bug(
        "order lost on retry",
        Patch(
            _OUTBOUND,
            "self._queue.extendleft(reversed(self._unsent))",
            "self._queue.extend(self._unsent)",
        ),
        Test(_OUTBOUND_TESTS + "test_what_was_refused_goes_again_before_what_is_new"),
    ),
    Bug(
        "not marked as perhaps published before",
        Patch(_OUTBOUND, "redelivered=item.doubtful)", "redelivered=False)"),
        Simulation(0),
    ),
    Bug(
        "no note left",
        Patch(
            _OUTBOUND,
            "        if self._listening:\n            self._note_is_due",
            "        if False:\n            self._note_is_due",
        ),
        Simulation(0),
    ),
    Bug(
        "what a note says was taken is forgotten",
        Patch(
            _HISTORY, "                self.remember(request_id, past)\n", "                pass\n"
        ),
        Simulation(0),
    ),
    Bug(
        "a note without what is in doubt",
        Patch(
            _OUTBOUND,
            "return Past.DOUBT if self.doubtful or self.state is not _State.QUEUED else None",
            "return None",
        ),
        Test(_OUTBOUND_TESTS + "test_the_note"),
        was_real=True,
    ),
    Bug(
        "what was given up is noted as taken",
        Patch(_EXCHANGE, "            if record.state != _GIVEN_UP\n", ""),
        Test(_OUTBOUND_TESTS + "test_a_host_s_clock_ends_nothing_for_the_guest"),
        was_real=True,
    ),
    Bug(
        "a note that only says what was published",
        Patch(
            _OUTBOUND,
            "        self._note_is_due = bool(self._sending)",
            "        self._note_is_due = False",
        ),
        Test(_OUTBOUND_TESTS + "test_a_vm_that_is_let_go_before_the_broker_has_spoken"),
        was_real=True,
    ),
    Bug(
        "published before everything written before is read",
        Patch(_OUTBOUND, "(not history.is_read or is_again or", "(is_again or"),
        Test(_OUTBOUND_TESTS + "test_it_publishes_when_its_arrival_has_come_back"),
        was_real=True,
    ),
    Bug(
        "our own arrival is taken out of the queue",
        Patch(
            _OUTBOUND,
            "                self._arrival_tokens.append(self._log_tokens.pop())\n",
            "                pass\n",
        ),
        Test(_OUTBOUND_TESTS + "test_it_publishes_when_its_arrival_has_come_back"),
    ),
    Bug(
        "what the next host has written is taken out of the queue",
        Patch(
            _OUTBOUND,
            "        if not history.is_read or history.is_ours(message):\n",
            "        if True:\n",
        ),
        Test(_OUTBOUND_TESTS + "test_what_was_written_before_is_taken_out_of_the_queue"),
        was_real=True,
    ),
    Bug(
        "a note speaks for the last stay only",
        Patch(_OUTBOUND, "            history.stays(),\n", "            (history.stay,),\n"),
        Test(_OUTBOUND_TESTS + "test_a_new_session_begins_a_new_stay"),
        was_real=True,
    ),
    Bug(
        "a host that died is not missed",
        Patch(_HISTORY, "            self._open[stay] = True\n", "            pass\n"),
        Simulation(0),
    ),
    Bug(
        "what waited here while the guest was elsewhere is new",
        Patch(_OUTBOUND, " or self.number <= number\n", "\n"),
        Test(_OUTBOUND_TESTS + "test_a_guest_that_comes_back_may_have_been_elsewhere"),
        was_real=True,
    ),
    Bug(
        "an answer acknowledged before the guest has it",
        Patch(
            _OUTBOUND,
            "            self._hold(token, answer.id, None, now_s)\n            self._reply(",
            "            self._broker.ack(token)\n            self._reply(",
        ),
        Test(_OUTBOUND_TESTS + "test_a_call_s_answer_is_the_broker_s_until_the_guest_has_it"),
    ),
    Bug(
        "two answers to one call, and one is never acknowledged",
        Patch(
            _OUTBOUND,
            "self._broker.ack(held.token)  # the same again: it was called, or handed out, twice",
            "pass",
        ),
        Test(_OUTBOUND_TESTS + "test_an_answer_that_comes_twice"),
        was_real=True,
    ),
    Bug(
        "an answer that nobody waits for is held",
        Patch(
            _OUTBOUND,
            "        elif item is None and self._responder.is_over(answer.id):\n",
            "        elif False:\n",
        ),
        Test(_OUTBOUND_TESTS + "test_an_answer_that_nobody_waits_for"),
        was_real=True,
    ),
    Bug(
        "a note does not get past answers that nobody asks for",
        Patch(_BROKER_VM, "OWN_PREFETCH: Final = 64", "OWN_PREFETCH: Final = 2"),
        Simulation(0),
        was_real=True,
    ),
    Bug(
        "what may have run is refused as unrun",
        Patch(_OUTBOUND, "        if maybe_ran:\n", "        if False:\n"),
        Test(_OUTBOUND_TESTS + "test_what_may_have_run_is_not_said_to_be_unserved"),
        was_real=True,
    ),
    Bug(
        "outcomes are not settled with the host",
        Patch(
            _UPWARD,
            "self._host.settle([each for each in ids if not isinstance(outcomes[each], Overdue)])",
            "pass",
        ),
        Test(_UPWARD_TESTS + "test_there_and_back"),
    ),
    Bug(
        "settled by an agent that hears that its time is up",
        Patch(_UPWARD, " if not isinstance(outcomes[each], Overdue)])", "])"),
        Test(_UPWARD_TESTS + "test_its_time_is_up"),
        was_real=True,
    ),
    Bug(
        "an agent that asks again is not heard",
        Patch(_UPWARD, "            item.key = key\n", ""),
        Test(_UPWARD_TESTS + "test_an_agent_that_asks_again_too_early_is_told_later"),
    ),
    Bug(
        "orphans are kept for ever",
        Patch(_UPWARD, "            self._look_for_orphans(now_s)\n", "            pass\n"),
        Simulation(0),
    ),
    Bug(
        "settled before it is over",
        Patch(
            _UPWARD,
            "        return item is not None and item.outcome is not None\n",
            "        return item is not None\n",
        ),
        Test(_UPWARD_TESTS + "test_what_is_settled_before_it_is_over_is_not"),
        was_real=True,
    ),
    Bug(
        "answers that agents have not settled are kept without a limit",
        Patch(_UPWARD, "        self._make_room(0)\n", ""),
        Test(_UPWARD_TESTS + "test_answers_that_are_kept_have_a_limit"),
        was_real=True,
    ),
    # ---------------------------------------------------------------- the broker's port
    Bug(
        "consumers cancelled instead of the channel closed",
        Patch(
            _BROKER,
            "        self.cancels_consumers = False\n",
            "        self.cancels_consumers = True\n",
        ),
        Simulation(0),
    ),
    Bug(
        "barrier not bound to the channel's generation",
        Patch(
            _BROKER,
            ' == token.generation and not state.closing:\n            self._say("barrier"',
            ' and not state.closing:\n            self._say("barrier"',
        ),
        Simulation(0, 60, "broker_is_cut_again_and_again"),
    ),
    # ---------------------------------------------------------------- channels and domains
    Bug(
        "a wedge is not cured",
        Patch(_CHANNELS, "                self._cure(for_s)\n", ""),
        Simulation(0, 60, "wedged_in_company"),
    ),
    Bug(
        "spoken to before the guest runs",
        Patch(
            _DOMAINS,
            "    def _connect_silently(self, domain: _Domain) -> list[Effect]:\n"
            "        return self._connect(domain, Phase.ARRIVING)\n",
            "    def _connect_silently(self, domain: _Domain) -> list[Effect]:\n"
            "        return self._connect_and_speak(domain)\n",
        ),
        Simulation(0),
    ),
    Bug(
        "a source goes on consuming after the guest has left",
        Patch(
            _DOMAINS,
            "        domain.phase = Phase.LEAVING\n        return [Hush(domain.uuid)]\n",
            "        domain.phase = Phase.LEAVING\n        return []\n",
        ),
        Test("tests/unit/test_domains.py::test_migration_seen_by_the_source"),
    ),
    Bug(
        "a VM given up a minute after a failed migration",
        Patch(
            _CHANNELS,
            "        if self._session.state is not State.OPEN:  # after",
            "        if True:  # after",
        ),
        Simulation(0, 60, "migration_fails_at_the_end"),
        was_real=True,
    ),
    Bug(
        "a relay that put off consuming is never woken",
        Patch(
            _CHANNELS,
            "            self.relay.opened(resumed=True, now_s=self._loop.time())\n"
            "            self.set_timer()\n",
            "            self.relay.opened(resumed=True, now_s=self._loop.time())\n",
        ),
        Simulation(0, 60, "migration_fails_at_the_end"),
        was_real=True,
    ),
    # ---------------------------------------------------------------- the link
    Bug(
        "last words unread when a write fails",
        Patch(
            _LINK,
            "                self._loop.call_soon(self._end_after_reading)\n",
            "                self._fail(self._write_problem)\n",
        ),
        Simulation(0, 60, "agents_die_with_casts_in_their_hands"),
        was_real=True,
    ),
    # ---------------------------------------------------------------- the agent
    Bug(
        "an agent does not say what it holds",
        Patch(
            _CLIENT,
            "        for chunk in id_chunks(self.responder.remembered()):\n",
            "        for chunk in ():\n",
        ),
        Simulation(0, 60, "guest_daemon_restarts_under_load"),
    ),
    Bug(
        "an agent runs before it gives its receipt",
        Patch(
            _CLIENT,
            "            if not responder.take(request.id, self.loop.time()):\n",
            "            if False:\n",
        ),
        Simulation(0),
    ),
)
