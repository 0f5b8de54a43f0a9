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
    is_long: bool = False
    """Its check waits for what never comes."""


_FRAMES: Final = "vchan/wire/frames.py"
_SESSION: Final = "vchan/session/session.py"
_HANDSHAKE: Final = "vchan/session/handshake.py"
_SENDER: Final = "vchan/session/sender.py"
_RECEIVER: Final = "vchan/session/receiver.py"
_LIVENESS: Final = "vchan/session/liveness.py"
_MESSAGES: Final = "vchan/rpc/messages.py"
_EXCHANGE: Final = "vchan/rpc/in_flight.py"
_ROUTER: Final = "vchan/guest/router.py"
_DISPATCHER: Final = "vchan/rpc/dispatcher.py"
_DOWNWARD: Final = "vchan/host/vm/downward.py"
_CONSUMPTION: Final = "vchan/host/vm/consumption.py"
_OPEN_REQUESTS: Final = "vchan/host/vm/open_requests.py"
_FINISHED: Final = "vchan/host/vm/finished_requests.py"
_DOWNWARD_TESTS: Final = "tests/unit/test_vm_downward.py::"
_CHANNELS: Final = "vchan/host/vm/channel.py"
_DOMAINS: Final = "vchan/host/hypervisor/domains.py"
_DOMAIN_XML: Final = "vchan/host/hypervisor/domain_xml.py"
_HOSTED: Final = "vchan/host/vm/vm.py"
_HOST_BROKER: Final = "vchan/host/broker/broker.py"
_REPORTS: Final = "vchan/guest/reports.py"
_KEPT_REPORTS: Final = "vchan/host/vm/reports.py"
_KEPT_TESTS: Final = "tests/unit/test_vm_reports.py::"
_REPORTS_TESTS: Final = "tests/unit/test_guest_reports.py::"
_CONTAINMENT_TESTS: Final = "tests/unit/test_containment.py::"
_CONTAINMENT_ANY: Final = _CONTAINMENT_TESTS + "test_a_fault_in_any_method_costs_one_vm_its_channel"
_LINK: Final = "vchan/io/link.py"
_CLIENT: Final = "vchan/client.py"
_CONNECTION: Final = "vchan/programs/connection.py"
_SERVING: Final = "vchan/programs/serving.py"
_WORKING: Final = "vchan/programs/working.py"
_UPWARD: Final = "vchan/guest/upward.py"
_HOST_UPWARD: Final = "vchan/host/vm/upward.py"
_HISTORY: Final = "vchan/host/vm/handover.py"
_BROKER_VM: Final = "vchan/host/broker/vm_queues.py"
_COMPLETIONS: Final = "vchan/host/broker/completions.py"
_COMPLETIONS_TESTS: Final = "tests/unit/test_completions.py::"
_OUTBOUND_TESTS: Final = "tests/unit/test_vm_upward.py::"
_UPWARD_TESTS: Final = "tests/unit/test_upward.py::"
_BROKER: Final = "tests/simulate/broker.py"

_AMQP_CONTENT: Final = "vchan/host/broker/amqp_content.py"
_AMQP_LINK_TESTS: Final = "tests/unit/test_amqp.py::"
_DROPPED_TESTS: Final = "tests/unit/test_dropped_casts.py::"
_STREAM_ENDS: Final = "vchan/streams/ends.py"
_STREAM_HALVES: Final = "vchan/streams/halves.py"
_STREAM_TESTS: Final = "tests/unit/test_byte_streams.py::"
_SWITCHBOARD: Final = "vchan/streams/switchboard.py"
_BOARD_TESTS: Final = "tests/unit/test_byte_streams_switchboard.py::"
_FORWARD_TESTS: Final = "tests/unit/test_forward_parts.py::"
_COPIES: Final = "vchan/services/copies.py"
_COPY_ORDER: Final = "vchan/services/copy_order.py"
_TREES: Final = "vchan/copies/trees.py"
_PLACES: Final = "vchan/copies/places.py"
_COPIES_TESTS: Final = "tests/unit/test_copies.py::"
_PROGRAMS: Final = "vchan/agents/standard/programs.py"
_PROGRAMS_TESTS: Final = "tests/unit/test_standard_programs.py::"
_PROXY_TESTS: Final = "tests/unit/test_proxy.py::"
_PROXY_PARTS: Final = "tests/unit/test_proxy_parts.py::"
_CARRIED: Final = "tests/unit/test_byte_streams_carried.py"

_BODIES: Final = "vchan/rpc/bodies.py"
_FEATURES_TESTS: Final = "tests/unit/test_features.py::"
_RAW_TESTS: Final = "tests/unit/test_raw_bodies.py::"

BUGS: Final = (
    # ---------------------------------------------------------------- topics that belong to a VM
    Bug(
        "what names no server is left in the topic's own queue",
        Patch(
            _CONSUMPTION,
            "        return frozenset(filter(self._gate.owns, self._served.allowed))\n",
            "        return frozenset()\n",
        ),
        Simulation(1, seeds=1),
    ),
    # ---------------------------------------------------------------- raw bodies, plain payloads
    Bug(
        "a raw body loses its last byte",
        Patch(
            _BODIES,
            "return body[start:stop], body[stop:]",
            "return body[start:stop], body[stop:-1]",
        ),
        Simulation(0),
    ),
    Bug(
        "a raw answer is altered on its way through the guest's daemon",
        Patch(
            _EXCHANGE,
            "    def tell(self, outcome: Outcome, now_s: float) -> None:\n",
            "    def tell(self, outcome: Outcome, now_s: float) -> None:\n"
            "        if isinstance(outcome, Answered):\n"
            '            body = outcome.body.replace(b"\\0", b" ")\n'
            "            outcome = Answered(outcome.id, outcome.failed, body)\n",
        ),
        Simulation(0),
    ),
    Bug(
        "a body is altered between two that are in flight",
        Patch(
            _MESSAGES,
            "encoded[self.names.end :]",
            'encoded[self.names.end :].replace(b"\\xff", b"")',
        ),
        Test("tests/unit/test_in_flight.py::test_the_exchange"),
    ),
    Bug(
        "what has changed goes on as it came",
        Patch(
            _MESSAGES,
            "            names=None if is_renamed else self._names,\n",
            "            encoded=self.encoded,\n            names=self._names,\n",
        ),
        Test("tests/unit/test_messages.py::test_what_was_changed_goes_on_changed"),
    ),
    Bug(
        "names are known by their letters, whichever is whose",
        Patch(
            _MESSAGES,
            "    said = data[_NAMES_AT:end]\n    names = _known_names.get(said)\n",
            "    said = data[_NAMES_AT:end]\n"
            "    alike = (n for k, n in _known_names.items() if k[3:] == said[3:])\n"
            "    names = next(alike, None)\n",
        ),
        Test("tests/unit/test_messages.py::test_names_of_the_same_letters_are_told_apart"),
    ),
    Bug(
        "names that were said are known for ever",
        Patch(_MESSAGES, "        _known_names.clear()\n", "        pass\n"),
        Test("tests/unit/test_messages.py::test_names_are_known_up_to_a_bound"),
    ),
    Bug(
        "the result of a raw call is not marked",
        Patch(
            _EXCHANGE,
            "        flags = FINAL | FAILURE if failed else record.result_flags\n",
            "        flags = FINAL | FAILURE if failed else FINAL\n",
        ),
        Simulation(0),
    ),
    Bug(
        "what the guest could not be reached for is doubted",
        Patch(_EXCHANGE, "OUT_OF_TURN | IN_PLACE if", "OUT_OF_TURN if"),
        Test("tests/unit/test_in_flight.py::test_what_is_late_says_if_it_kept_its_place"),
        was_real=True,
    ),
    Bug(
        "what is repeated to another run keeps its place",
        Patch(
            _EXCHANGE,
            "flags = (flags | self._again_flags) & ~IN_PLACE",
            "flags |= self._again_flags",
        ),
        Test("tests/unit/test_in_flight.py::test_what_is_late_says_if_it_kept_its_place"),
    ),
    Bug(
        "bytes pass for JSON",
        Patch(_EXCHANGE, "!= item.result_flags and not", "> 99 and not"),
        Test(_RAW_TESTS + "test_an_answer_of_the_wrong_kind_is_a_failure"),
    ),
    Bug(
        "raw requests go to who does not take them",
        Patch(_EXCHANGE, "if no_raw:", "if False:"),
        Test(_RAW_TESTS + "test_an_older_guest_is_named"),
    ),
    Bug(
        "raw casts go to who takes raw calls alone",
        Patch(_EXCHANGE, "RAW_CASTS else NO_RAW_CASTS", 'RAW_CASTS else ""'),
        Test(_RAW_TESTS + "test_a_peer_that_takes_raw_calls_alone_is_sent_no_raw_cast"),
    ),
    Bug(
        "a cast of bytes is taken and never runs",
        Patch(
            _SERVING,
            "        return lambda **args: method(data, **args), invocation",
            "        method = method if request.is_call else lambda *_, **__: b''\n"
            "        return lambda **args: method(data, **args), invocation",
        ),
        Simulation(0, 60),
    ),
    Bug(
        "a raw request goes over the broker",
        Patch(
            _HOST_UPWARD,
            "        if request.flags & RAW:\n",
            "        if False:\n",
        ),
        Test(_RAW_TESTS + "test_a_raw_request_does_not_go_over_the_broker"),
    ),
    Bug(
        "the channel does without its payloads' CRC",
        Patch(
            _HANDSHAKE,
            "        if mine.features & peer.features & PLAIN_PAYLOADS:\n",
            "        if mine.features:\n",
        ),
        Simulation(0),
    ),
    Bug(
        "one end alone does without its payloads' CRC",
        Patch(
            _HANDSHAKE,
            "        if mine.features & peer.features & PLAIN_PAYLOADS:\n",
            "        if mine.features & PLAIN_PAYLOADS:\n",
        ),
        Test(_FEATURES_TESTS + "test_an_older_peer_gets_small_frames_with_their_crc"),
    ),
    Bug(
        "a plain session leaves headers alone, too",
        Patch(
            _FRAMES,
            "is_usual = key is not None and _crc32(header, key[0]) == crc",
            "is_usual = key is not None and (key[2] or _crc32(header, key[0]) == crc)",
        ),
        Test(_FEATURES_TESTS + "test_the_header_of_a_plain_frame_is_looked_at"),
    ),
    Bug(
        "frames are larger than the peer takes",
        Patch(
            _SENDER,
            "        frame_bytes_max = min(self._config.frame_bytes_max, peer.frame_bytes_max)\n",
            "        frame_bytes_max = self._config.frame_bytes_max\n",
        ),
        Test(_FEATURES_TESTS + "test_an_older_peer_gets_small_frames_with_their_crc"),
    ),
    # ---------------------------------------------------------------- forwards
    Bug(
        "the end of the output ends the command, whatever is left to be said",
        Patch(
            "vchan/cli/forward.py",
            "if self._is_over and self._is_written:",
            "if self._is_written:",
        ),
        Test("tests/unit/test_forward.py::test_what_is_said_behind_the_others_last_word_arrives"),
        was_real=True,
    ),
    Bug(
        "a guest of an earlier release is sent streams",
        Patch(
            _SWITCHBOARD, "self._guest_offer_due = takes_streams", "self._guest_offer_due = True"
        ),
        Test(_FORWARD_TESTS + "test_a_guest_that_does_not_take_streams_is_sent_none"),
    ),
    Bug(
        "a program that goes takes its last words along",
        Patch(
            _SWITCHBOARD,
            "if message[0] in (layout.BYTE_STREAM_RESET, layout.BYTE_STREAM_PROGRESS):",
            "if False:",
        ),
        Test(_FORWARD_TESTS + "test_a_program_that_goes_has_the_last_word"),
    ),
    Bug(
        "bytes on record are what a guest makes up",
        Patch(
            _SWITCHBOARD,
            "        if part.offset <= self.next < stop:",
            "        if self.next < stop:",
        ),
        Test(_FORWARD_TESTS + "test_bytes_are_counted_once_and_the_end_is_told_once"),
    ),
    Bug(
        "a program says itself who it is",
        Patch(
            "vchan/host/vm/streams.py",
            'return opened._replace(facts=json.dumps(facts, separators=(",", ":")))',
            "return opened",
        ),
        Test(_FORWARD_TESTS + "test_the_guest_is_told_who_asks_by_the_hosts_word"),
    ),
    Bug(
        "any lets programs on the host into guests",
        Patch(
            "vchan/host/policy/rule_parser.py",
            "            kinds.update(ANY_KINDS)",
            "            kinds.update(KINDS)",
        ),
        Test(
            "tests/unit/test_policy_rules.py::"
            "test_any_does_not_include_what_programs_on_the_host_ask"
        ),
    ),
    Bug(
        "a socket's half close closes both ways",
        Patch(
            "vchan/splices.py",
            "            self.ends.finish(joint.id)",
            "            self.ends.reset(joint.id, CLOSED)",
        ),
        Test(_FORWARD_TESTS + "test_each_side_ends_what_it_says_by_itself"),
    ),
    Bug(
        "what a stream does not take is lost",
        Patch(
            "vchan/splices.py",
            "        joint.for_stream = data[taken:]",
            '        joint.for_stream = data[taken:] and b"x"',
        ),
        Test(_FORWARD_TESTS + "test_what_a_socket_does_not_take_is_not_read_from_the_stream"),
    ),
    # ---------------------------------------------------------------- vchan proxy
    Bug(
        "a token is good for any name",
        Patch(
            "vchan/cli/proxy/users.py",
            '        if found is not None and presented.name not in ("", found.name):\n',
            "        if False:\n",
        ),
        Test(_PROXY_PARTS + "test_who_is_who"),
    ),
    Bug(
        "a certificate without a name is the first user's",
        Patch(
            "vchan/cli/proxy/users.py", "            if user.certificate and (", "            if ("
        ),
        Test(_PROXY_PARTS + "test_a_user_with_a_token_has_no_certificate"),
    ),
    Bug(
        "a CONNECT may have a body",
        Patch(
            "vchan/cli/proxy/wire.py",
            '    if "transfer-encoding" in headers or headers',
            "    if headers",
        ),
        Test(_PROXY_PARTS + "test_what_is_no_request_that_is_served"),
    ),
    Bug(
        "a user of the proxy reaches any target",
        Patch(
            "vchan/cli/proxy/clients.py",
            "            if not user.allowed.allows(meant.target):",
            "            if False:",
        ),
        Test(_PROXY_TESTS + "test_who_is_refused_is_told_why"),
    ),
    Bug(
        "what comes behind a CONNECT is lost",
        Patch(
            "vchan/cli/proxy/clients.py",
            "        return self._socket, self._asked.rest",
            '        return self._socket, b""',
        ),
        Test(_PROXY_TESTS + "test_what_comes_behind_the_request_is_the_tunnels"),
    ),
    Bug(
        "who shows nothing is kept for ever",
        Patch(
            "vchan/cli/proxy/server.py",
            "        if len(self._unproven) >= UNPROVEN_MAX:",
            "        if len(self._unproven) > 10 * UNPROVEN_MAX:",
        ),
        Test(_PROXY_TESTS + "test_many_who_say_nothing_are_in_nobodys_way"),
    ),
    # ---------------------------------------------------------------- byte streams
    Bug(
        "bytes behind a hole are taken",
        Patch(_STREAM_HALVES, "        if offset > have:", "        if False:"),
        Test(_CARRIED),
    ),
    Bug(
        "bytes that overlap are taken twice",
        Patch(_STREAM_HALVES, "data[have - offset :]", "data"),
        Test(_STREAM_TESTS + "test_what_bytes_are_to_an_incoming_half"),
    ),
    Bug(
        "an acknowledgement of what is being sent again leaves a hole",
        Patch(_STREAM_HALVES, "            self.sent = max(self.sent, received)\n", ""),
        Test(_CARRIED),
    ),
    Bug(
        "old news takes credit back",
        Patch(_STREAM_HALVES, "self.credit = max(self.credit, credit)", "self.credit = credit"),
        Test(_STREAM_TESTS + "test_an_outgoing_half_sends_within_its_credit_and_its_end_last"),
    ),
    Bug(
        "an end counts as read before it was",
        Patch(
            _STREAM_HALVES,
            "        if is_end:\n            self.end = stop\n",
            "        if is_end:\n            self.end = stop\n"
            "            self.is_done = not self._held\n",
        ),
        Test("tests/unit/test_byte_streams_stateful.py"),
        was_real=True,
    ),
    Bug(
        "a half is ended before the stream is accepted",
        Patch(
            _STREAM_ENDS,
            "            if stream.phase is not StreamPhase.OPEN or stream.is_unheard:",
            "            if stream.is_unheard:",
        ),
        Test(_STREAM_TESTS + "test_bytes_written_before_it_is_accepted_wait"),
        was_real=True,
    ),
    Bug(
        "credit is told of a stream that is not accepted",
        Patch(_STREAM_ENDS, "if stream.phase is StreamPhase.OPEN and untold", "if untold"),
        Test(_STREAM_TESTS + "test_reading_before_it_is_accepted_says_nothing"),
        was_real=True,
    ),
    Bug(
        "two runs of an end are taken for one",
        Patch(_STREAM_ENDS, "        if stream.tag == tag:", "        if True:"),
        Test(_STREAM_TESTS + "test_an_open_that_comes_late_to_a_new_run_does_not_mix_two_streams"),
    ),
    Bug(
        "streams do not ask in a new session",
        Patch(
            _STREAM_ENDS,
            "                stream.owe(ASK)\n",
            "                pass\n",
        ),
        Test(_STREAM_TESTS + "test_a_new_session_makes_up_for_what_was_lost"),
    ),
    Bug(
        "an answer that shows a loss is not acted on",
        Patch(_STREAM_ENDS, "message.received < stream.asked_sent", "False"),
        Test(_STREAM_TESTS + "test_a_new_session_makes_up_for_what_was_lost"),
    ),
    Bug(
        "a peer may have everything sent again as often as it likes",
        Patch(_STREAM_ENDS, "        if now_s - stream.rewind_s < REWIND_S:", "        if False:"),
        Test(_STREAM_TESTS + "test_a_peer_that_asks_for_everything_again_and_again_gets_it_seldom"),
    ),
    Bug(
        "two ends that are done answer each other for ever",
        Patch(_STREAM_ENDS, "        elif is_again or flags & ASK:", "        else:"),
        Test(_STREAM_TESTS + "test_a_stream_that_is_over_answers_who_asks_and_not_who_tells"),
    ),
    Bug(
        "many streams fill the session's window",
        Patch(_STREAM_ENDS, "IN_FLIGHT_BYTES_MAX - self.in_flight", "IN_FLIGHT_BYTES_MAX"),
        Test(_STREAM_TESTS + "test_in_flight_is_bounded_over_all_streams"),
    ),
    Bug(
        "streams whose programs were killed fill the session's window",
        Patch(
            _STREAM_ENDS,
            "        if stream.is_unheard:\n            stream.outgoing.rewind()\n",
            "",
        ),
        Test(_STREAM_TESTS + "test_many_that_are_gone_hold_up_the_others_until_they_were_asked"),
        was_real=True,
    ),
    Bug(
        "streams that stand still fill what a daemon keeps for their program",
        Patch(_STREAM_ENDS, "UNDER_WAY_BYTES_MAX - under_way", "IN_FLIGHT_BYTES_MAX"),
        Test(_STREAM_TESTS + "test_many_that_are_gone_hold_up_the_others_until_they_were_asked"),
    ),
    Bug(
        "a program that was stopped holds up the streams of others",
        Patch(_STREAM_ENDS, "HELD_UP_S: Final = 0.25", "HELD_UP_S: Final = 60.0"),
        Test(_STREAM_TESTS + "test_a_program_that_stands_still_holds_up_others_for_a_moment"),
        was_real=True,
    ),
    Bug(
        "what stood still and was heard counts no more",
        Patch(_STREAM_ENDS, "        stream.is_stuck = False\n", ""),
        Test(_STREAM_TESTS + "test_who_was_heard_again_is_waited_for_again"),
    ),
    Bug(
        "streams do not rest while requests are about",
        Patch(
            _STREAM_ENDS,
            "        if self._rests_until_s is not None and now_s < self._rests_until_s:",
            "        if False:",
        ),
        Test(
            _STREAM_TESTS
            + "test_a_call_beside_a_stream_waits_for_little_of_it_and_the_stream_goes_on"
        ),
    ),
    Bug(
        "streams are not told of requests",
        Patch(
            "vchan/guest/forwards.py",
            "        self._splices.give_way()\n",
            "        pass\n",
        ),
        Test("tests/unit/test_forward.py::test_streams_give_way_to_requests_in_the_guest"),
    ),
    Bug(
        "streams rest as long as requests are about",
        Patch(_STREAM_ENDS, ", now_s + REST_S_MAX)", ", now_s + 60.0)"),
        Test(_STREAM_TESTS + "test_rests_are_bounded_and_end_with_the_requests"),
    ),
    Bug(
        "a stream uses up its VM's rate, and answers wait",
        Patch(_CHANNELS, "self.throttle.reserved(self._loop.time())", "0.0"),
        Test(
            "tests/unit/test_forward.py::test_a_stream_that_has_all_of_a_rate_makes_no_answer_wait"
        ),
        was_real=True,
    ),
    Bug(
        "what a killed daemon had open never ends on record",
        Patch("vchan/host/policy/audit_log.py", "        self._end_begun()\n", ""),
        Test(
            "tests/unit/test_audit.py::"
            "test_what_a_killed_daemon_had_open_is_ended_by_the_next_and_once"
        ),
        was_real=True,
    ),
    Bug(
        "the first stream sends as long as it can",
        Patch(
            _STREAM_ENDS,
            "                self._streams[stream.id] = self._streams.pop(stream.id)"
            "  # the others' turn\n",
            "",
        ),
        Test(_STREAM_TESTS + "test_streams_take_turns"),
    ),
    Bug(
        "an open storm is answered without a limit",
        Patch(
            _STREAM_ENDS,
            "if len(self._replies) >= REPLIES_MAX and stream_id not in self._replies:",
            "if False:",
        ),
        Test(_STREAM_TESTS + "test_an_open_storm_costs_bounded_memory"),
    ),
    Bug(
        "a guest asks a new daemon in vain about a stream that is done",
        Patch(
            _STREAM_ENDS,
            "            doubt.is_due = doubt.was_asked = True\n",
            "            pass\n",
        ),
        Test(_BOARD_TESTS + "test_the_guest_hears_from_a_new_daemon_that_a_stream_is_done"),
        was_real=True,
    ),
    Bug(
        "the streams of a command that was killed stay open in the guest",
        Patch("vchan/host/vm/streams.py", 'ended=HAS_ENDED if has_ended else ""', 'ended=""'),
        Test(_FORWARD_TESTS + "test_a_program_that_has_ended_ends_its_streams"),
        was_real=True,
    ),
    Bug(
        "what a program has received at last is dropped when it goes",
        Patch(
            _SWITCHBOARD,
            "in (layout.BYTE_STREAM_RESET, layout.BYTE_STREAM_PROGRESS)",
            "== layout.BYTE_STREAM_RESET",
        ),
        Test(
            _BOARD_TESTS
            + "test_the_last_acknowledgement_of_a_program_that_is_gone_reaches_the_guest"
        ),
        was_real=True,
    ),
    Bug(
        "a program speaks for another's stream",
        Patch(
            "vchan/streams/switchboard.py",
            "        if route is None or route.number != number:",
            "        if route is None:",
        ),
        Test("tests/unit/test_byte_streams_switchboard.py"),
    ),
    Bug(
        "a stream that is no longer allowed goes on in the guest",
        Patch(
            "vchan/streams/switchboard.py",
            "                self._put(program.down, refusal)\n",
            "                pass\n",
        ),
        Test("tests/unit/test_byte_streams_switchboard.py"),
    ),
    Bug(
        "a stream that was opened once is not judged again",
        Patch(
            "vchan/streams/switchboard.py",
            "        judged = self._judge(number, message)\n",
            "        known = message.id in self._routes\n"
            "        judged = message if known else self._judge(number, message)\n",
        ),
        Test("tests/unit/test_byte_streams_switchboard.py"),
    ),
    Bug(
        "who reads tells his sender of no room",
        Patch(_STREAM_ENDS, "untold >= WINDOW_BYTES // 4", "False"),
        Test(_STREAM_TESTS + "test_who_does_not_read_stops_its_sender_and_nobody_else"),
    ),
    # ---------------------------------------------------------------- programs in guests
    Bug(
        "what was written comes again to who attaches",
        Patch(_PROGRAMS, "            self.start = offset\n", "            pass\n"),
        Test(_PROGRAMS_TESTS + "test_kept_output_by_offsets"),
    ),
    Bug(
        "what was said and not written does not come again",
        Patch(_PROGRAMS, "        self.sent = self.start\n", "        pass\n"),
        Test(_PROGRAMS_TESTS + "test_what_was_written_does_not_come_again_and_the_rest_comes_once"),
    ),
    Bug(
        "what was written is not heard from who has gone",
        Patch(
            _PROGRAMS,
            "            self._unheard()\n",
            "            self._loop.call_soon(self.close)\n",
        ),
        Test(_PROGRAMS_TESTS + "test_who_has_gone_is_still_heard_of_what_he_has_written"),
        was_real=True,
    ),
    Bug(
        "a program that nobody reads is read on and on",
        Patch(
            _PROGRAMS, "            self._child.listen(which - 1, to=False)\n", "            pass\n"
        ),
        Test(_PROGRAMS_TESTS + "test_a_program_that_nobody_reads_waits_and_loses_nothing"),
    ),
    Bug(
        "a guest may have a command hold what it likes",
        Patch(
            "vchan/services/programs.py",
            "self._received[which - 1] - self._written[which - 1] > OUTPUT_BYTES_MAX",
            "False",
        ),
        Test("tests/unit/test_programs_wire.py::test_output_is_bounded_by_what_is_not_written"),
    ),
    Bug(
        "a pattern of paths reaches services",
        Patch(
            "vchan/io/targets.py",
            'elif os.path.realpath(target.name).startswith(f"{os.path.realpath(services)}/"):',
            "elif False:",
        ),
        Test(
            _FORWARD_TESTS
            + "test_services_are_reached_by_name_in_a_directory_that_nobody_else_writes_to"
        ),
    ),
    # ---------------------------------------------------------------- the broker's messages
    Bug(
        "VMs' quorum queues without a delivery limit of their own",
        Patch(_BROKER_VM, '        arguments["x-delivery-limit"] = DELIVERY_LIMIT\n', ""),
        Simulation(0, 3, "given_back_again_and_again_with_nonsense_between"),
        was_real=True,
    ),
    Bug(
        "a header of a type that is not known is an error",
        Patch(
            _AMQP_CONTENT,
            "            if size is None:\n                break\n",
            "            assert size is not None\n",
        ),
        Test(_AMQP_LINK_TESTS + "test_an_unknown_header_type_costs_nothing"),
        was_real=True,
    ),
    Bug(
        "an exception of one VM's owner goes on to the connection",
        Patch(
            "vchan/host/broker/amqp.py",
            'return "" if error is None else fault  # it serves',
            "return fault  # it serves",
        ),
        Test(_AMQP_LINK_TESTS + "test_a_fault_of_ours_costs_its_vm_the_channel_and_no_other"),
    ),
    Bug(
        "what came before the broker's close is told when the channels are gone",
        Patch(
            "vchan/host/broker/amqp.py",
            "            self._hand_over_all()\n            self.amqp.on_inbound_frame",
            "            self.amqp.on_inbound_frame",
        ),
        Test(
            _AMQP_LINK_TESTS
            + "test_what_came_before_the_brokers_close_is_told_while_the_channel_is_there"
        ),
        was_real=True,
    ),
    Bug(
        "a cast that the guest refused is acknowledged without a word",
        Patch(
            _DOWNWARD,
            "        if not is_call and reason not in COMES_AGAIN:",
            "        if False:",
        ),
        Test(_DROPPED_TESTS + "test_a_cast_that_comes_back_for_good"),
        was_real=True,
    ),
    Bug(
        "what the broker drops after a return is not noticed",
        Patch(
            _OPEN_REQUESTS,
            "                self.awaited.add(request_id)\n",
            "                pass\n",
        ),
        Test(_DROPPED_TESTS + "test_what_does_not_come_again_before_what_is_new_was_dropped"),
    ),
    # ---------------------------------------------------------------- frames
    Bug(
        "CRC not seeded with the session's key",
        Patch(
            _FRAMES,
            "return Key(words[0], words[1]), Key(words[2], words[3])",
            "return Key(1, 1), Key(1, 1)",
        ),
        Test("tests/unit/test_session.py::test_frames_of_an_old_session_are_ignored_in_a_new_one"),
    ),
    Bug(
        "payload CRC not checked",
        Patch(
            _FRAMES,
            "            if not key[2] and data[stop",
            "            if False and data[stop",
        ),
        Simulation(74),
    ),
    # ---------------------------------------------------------------- session
    Bug(
        "no flush with HELLO",
        Patch(_SESSION, "        self._dues |= _FLUSH\n", ""),
        Test("tests/unit/test_session.py::test_a_stream_opens_with_a_hello_and_a_flush"),
    ),
    Bug(
        "resumed without a check of what the peer has",
        Patch(
            _HANDSHAKE,
            "            and self._sender.base <= peer.recv_next <= mine.send_next\n"
            "            and peer.send_base <= mine.recv_next <= peer.send_next\n",
            "",
        ),
        Test("tests/unit/test_session.py::test_a_clone_that_greets_its_twins_host_starts_anew"),
    ),
    Bug(
        "go-back-N off by one",
        Patch(
            _SENDER,
            "            self._rewind_not_before_s = now_s + REWIND_S\n"
            "            self.cursor = self.base\n",
            "            self._rewind_not_before_s = now_s + REWIND_S\n"
            "            self.cursor = min(self.base + 1, self.tail)\n",
        ),
        Simulation(0),
    ),
    Bug(
        "credit ignored",
        Patch(_SENDER, "            or self._tx_cost + cost > self.credit\n", ""),
        Test("tests/unit/test_session.py::test_an_unread_peer_is_written_to_up_to_its_credit_only"),
    ),
    Bug(
        "a new message overtakes older ones of its stream",
        Patch(
            _SENDER,
            "        outgoing.messages.append(message)\n",
            "        outgoing.messages.insert(1 if outgoing.offset else 0, message)\n",
        ),
        Simulation(0),
    ),
    Bug(
        "HELLO trusted",
        Patch(
            _SESSION,
            "        handshake.welcome_candidate()\n",
            "        handshake.welcome_candidate()\n"
            "        assert handshake.candidate is not None\n"
            "        self._establish(*handshake.candidate)\n",
        ),
        Test("tests/unit/test_session.py::test_a_hello_alone_changes_nothing_in_an_open_session"),
    ),
    Bug(
        "a host waits for its tick to ask, and is late",
        Patch(_LIVENESS, "(at_s // tick_s - 1.0) * tick_s", "(at_s // tick_s + 1.0) * tick_s"),
        Test(
            "tests/unit/test_session.py::"
            "test_a_host_that_asks_at_common_times_tells_silence_no_later"
        ),
    ),
    Bug(
        "silence never told, so a wedge is never cured",
        Patch(
            _LIVENESS,
            "        return Silent(now_s - self.heard_s)\n",
            "        return None\n",
        ),
        Simulation(0, 60, "wedged_in_company"),
    ),
    Bug(
        "duplicates accepted as new",
        Patch(
            _SESSION,
            "        if frame.seq == receiver.next:\n",
            "        if frame.seq <= receiver.next:\n",
        ),
        Test(
            "tests/unit/test_session.py::test_frames_that_come_twice_are_dropped_and_acknowledged_at_once"
        ),
    ),
    Bug(
        "credit leaks by a frame's overhead",
        Patch(
            _RECEIVER,
            "        self.cost += len(frame.payload) + OVERHEAD_BYTES\n",
            "        self.cost += len(frame.payload)\n",
        ),
        Simulation(0),
    ),
    Bug(
        "what was acknowledged still counts as in flight",
        Patch(
            _SENDER,
            "            freed += len(payload) + OVERHEAD_BYTES\n",
            "            freed += len(payload)\n",
        ),
        Simulation(0),
    ),
    Bug(
        "credit that a greeting gave is taken back",
        Patch(
            _RECEIVER,
            "            return max(self.credit_told, self.credit_greeted, self.cost)\n",
            "            return max(self.credit_told, self.cost)\n",
        ),
        Test(
            "tests/unit/test_session.py::test_a_host_does_not_take_back_the_credit_it_greeted_with"
        ),
        was_real=True,
    ),
    Bug(
        "more is acknowledged than was sent, and believed",
        Patch(_SENDER, "        if ack > self.tail:\n            return False\n", ""),
        Simulation(54),
    ),
    Bug(
        "a frame that has not come is acknowledged",
        Patch(
            _SESSION,
            "credit = self._tx_key, receiver.next, receiver.grant(sender.backlog)\n",
            "credit = self._tx_key, receiver.next + 1, receiver.grant(sender.backlog)\n",
        ),
        Simulation(0),
    ),
    Bug(
        "reassembly memory is never given back",
        Patch(_RECEIVER, "            self.reassembly -= partial.total\n", ""),
        Simulation(0),
    ),
    Bug(
        "a place in the peer's reassembly memory is never given back",
        Patch(_SENDER, "            self._large_open -= total\n", ""),
        Simulation(0),
    ),
    Bug(
        "a fragment of no message is taken for one",
        Patch(
            _RECEIVER,
            '            return "a fragment of no message"\n',
            '            return ""\n',
        ),
        Simulation(0, 72),
    ),
    Bug(
        "a question whether the peer is there is not answered",
        Patch(
            _SESSION,
            "        if self._on_any(frame):\n            self._dues |= _PONG\n",
            "        self._on_any(frame)\n",
        ),
        Simulation(0),
    ),
    # ---------------------------------------------------------------- exchange
    Bug(
        "Settled names the first id alone",
        Patch(
            _MESSAGES,
            "_encode_ids(layout.MESSAGE_SETTLED, message.ids)",
            "_encode_ids(layout.MESSAGE_SETTLED, message.ids[:1])",
        ),
        Simulation(0),
    ),
    Bug(
        "of what is settled, a responder forgets the first id alone",
        Patch(
            _EXCHANGE,
            "                for request_id in ids:\n                    self._settle(",
            "                for request_id in ids[:1]:\n                    self._settle(",
        ),
        Simulation(0),
    ),
    Bug(
        "agents are told of the first settled id alone",
        Patch(_DISPATCHER, "server.requester.settle(ids)", "server.requester.settle(ids[:1])"),
        Simulation(0),
    ),
    Bug(
        "of a lot that is proved the first id alone is told",
        Patch(
            _COMPLETIONS,
            "            ids = tuple(completion.id for completion in completions)\n",
            "            ids = tuple(completion.id for completion in completions[:1])\n",
        ),
        Simulation(0),
    ),
    Bug(
        "answers that were settled still count as kept",
        Patch(_EXCHANGE, "            self._reply_bytes -= len(record.reply)\n", ""),
        Simulation(0),
    ),
    Bug(
        "a deadline outlives its request",
        Patch(
            _EXCHANGE,
            "        self._deadlines.discard(request_id)\n        return item\n",
            "        return item\n",
        ),
        Simulation(0),
    ),
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
        Patch(_EXCHANGE, "SETTLED_MAX = 2048", "SETTLED_MAX = 0"),
        Simulation(0),
        was_real=True,
    ),
    Bug(
        "a call whose agent died is forgotten",
        Patch(_EXCHANGE, "if is_over or reason == AGENT_GONE:\n", "if is_over:\n"),
        Test("tests/unit/test_in_flight.py::test_a_copy_of_what_may_have_run_does_not_run"),
        was_real=True,
    ),
    # ---------------------------------------------------------------- router
    Bug(
        "receipt before the agent acknowledged",
        Patch(
            _DISPATCHER,
            "            served.owners.add(key)\n",
            "            served.owners.add(key)\n"
            "        if not request.is_call:\n"
            "            served.told(Taken(request.id), now_s)\n",
        ),
        Test(
            "tests/unit/test_router.py::test_casts_of_an_agent_that_left_go_to_the_next_in_their_order"
        ),
    ),
    Bug(
        "who holds a request is ignored",
        Patch(
            _DISPATCHER,
            "return None if request.flags & FANOUT else self._holders.get(request.id)",
            "return None",
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
            _DISPATCHER,
            "extendleft(reversed(requests))",
            "extendleft(requests)",
        ),
        Test(
            "tests/unit/test_router.py::test_casts_of_an_agent_that_left_go_to_the_next_in_their_order"
        ),
    ),
    Bug(
        "a fanout goes only to who holds it",
        Patch(
            _DISPATCHER,
            "return None if request.flags & FANOUT else self._holders.get(request.id)",
            "return self._holders.get(request.id)",
        ),
        Test("tests/unit/test_router.py::test_a_fanout_during_the_grace_waits_for_all_agents"),
        was_real=True,
    ),
    Bug(
        "casts handed back when no agent is there",
        Patch(
            _DISPATCHER,
            "give_up_s = _FOREVER if forever else now_s",
            "give_up_s = now_s",
        ),
        Test("tests/unit/test_router.py::test_what_waits_when_a_topic_is_given_up"),
        was_real=True,
    ),
    Bug(
        "a redelivered call is called unrun",
        Patch(
            _ROUTER,
            "        if not (is_unserved and self._is_doubtful(outcome.id)):\n",
            "        if True:\n",
        ),
        Test("tests/unit/test_router.py::test_a_call_nobody_serves_is_handed_back"),
        was_real=True,
    ),
    # ---------------------------------------------------------------- downward
    Bug(
        "acknowledged before the reply is confirmed",
        Patch(
            _COMPLETIONS,
            "        else:\n            self._publish(completion)\n\n    def channel_ended",
            "        else:\n            self._publish(completion)\n"
            "            self._acknowledge(completion)\n\n    def channel_ended",
        ),
        Test(_COMPLETIONS_TESTS + "test_a_call_is_acknowledged_when_its_reply_is_confirmed"),
    ),
    Bug(
        "settled without the broker's proof",
        Patch(
            _COMPLETIONS,
            "        self._channel.prove(self._proved)\n",
            "        self._proved()\n",
        ),
        Simulation(0),
    ),
    Bug(
        "what is acknowledged on a channel that ends is told as proved",
        Patch(
            _COMPLETIONS,
            "        self._end(lost, proven=False)\n",
            "        self._end(lost, proven=True)\n",
        ),
        Simulation(24),
    ),
    Bug(
        "a lot whose proof is under way is forgotten when the channel ends",
        Patch(_COMPLETIONS, "(*self._asked, self._take_lot())", "(self._take_lot(),)"),
        Test(_COMPLETIONS_TESTS + "test_the_channel_ends_before_the_proof"),
    ),
    Bug(
        "the second lot's proof is taken for the first's",
        Patch(_COMPLETIONS, "self._asked.pop(0)", "self._asked.pop()"),
        Test(_COMPLETIONS_TESTS + "test_lots_are_proved_in_their_order"),
    ),
    Bug(
        "only the last copy is acknowledged",
        Patch(
            _COMPLETIONS, "        for token in tokens:\n", "        for token in tokens[-1:]:\n"
        ),
        Test(_COMPLETIONS_TESTS + "test_every_copy_is_acknowledged"),
    ),
    Bug(
        "a copy that comes while the reply is under way is not acknowledged with it",
        Patch(
            _COMPLETIONS,
            "        completion.tokens += filter(self._channel.holds, tokens)\n"
            "        if known is not None:\n",
            "        if known is None:\n"
            "            completion.tokens += filter(self._channel.holds, tokens)\n"
            "        else:\n",
        ),
        Simulation(28),
    ),
    Bug(
        "a reply that the broker did not confirm is not published again",
        Patch(
            _COMPLETIONS,
            "        elif self._retry_timer is None:\n",
            "        elif self._retry_timer is None and is_gone:\n",
        ),
        Simulation(0),
    ),
    Bug(
        "a reply under way is given up with its channel",
        Patch(
            _COMPLETIONS,
            "            completion.tokens.clear()\n",
            "            completion.tokens.clear()\n        self._replies.clear()\n",
        ),
        Test(_COMPLETIONS_TESTS + "test_a_reply_is_published_though_the_channel_ends"),
    ),
    Bug(
        "what is acknowledged by a dead token is proved on the next channel",
        Patch(_COMPLETIONS, "            completion.tokens.clear()\n", "            pass\n"),
        Test(_COMPLETIONS_TESTS + "test_a_reply_is_published_though_the_channel_ends"),
    ),
    Bug(
        "a channel is closed for other topics while a caller waits for its proof",
        Patch(
            _BROKER_VM,
            "            if self._leaves and not self.completions.waits_for_proof:\n",
            "            if self._leaves:\n",
        ),
        Test(
            _COMPLETIONS_TESTS
            + "test_topics_are_not_taken_away_before_what_was_returned_is_forgotten"
        ),
    ),
    Bug(
        "what a channel delivers that is about to be closed is posted",
        Patch(
            _BROKER_VM,
            "        if self._is_closing or self._leaves:\n",
            "        if self._is_closing:\n",
        ),
        Test(
            _COMPLETIONS_TESTS
            + "test_topics_are_not_taken_away_before_what_was_returned_is_forgotten"
        ),
    ),
    Bug(
        "a reply that comes back counts as confirmed",
        Patch(
            "vchan/host/broker/reply_publisher.py",
            '"returned" if is_returned else problem',
            "problem",
        ),
        Test(_COMPLETIONS_TESTS + "test_a_reply_that_nobody_takes_is_given_up_in_the_end"),
    ),
    Bug(
        "deliveries of a released channel are taken",
        Patch(
            _DOWNWARD,
            "        if not self._consumption.takes(topic):\n",
            "        if False:\n",
        ),
        Test(
            _DOWNWARD_TESTS
            + "test_deliveries_of_another_topic_or_a_channel_that_is_gone_are_ignored"
        ),
        was_real=True,
    ),
    Bug(
        "a VM that has left is consumed for",
        Patch(
            _CONSUMPTION,
            "            self._broker.release(self._vm, for_good=for_good)\n"
            "            self._let_go()\n",
            "            self._let_go()\n",
        ),
        Simulation(0),
    ),
    # ---------------------------------------------------------------- requests out of guests
    Bug(
        "receipted before the broker has it",
        Patch(
            _HOST_UPWARD,
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
            _HOST_UPWARD,
            "self._queue[:0] = self._unsent",
            "self._queue += self._unsent",
        ),
        Test(_OUTBOUND_TESTS + "test_what_was_refused_goes_again_before_what_is_new"),
    ),
    Bug(
        "order lost among what was not confirmed",
        Patch(_HOST_UPWARD, "            self._unsent.sort(key=lambda item: item.number)\n", ""),
        Simulation(0, 60, "broker_is_in_trouble"),
    ),
    Bug(
        "new requests overtake what was not confirmed",
        Patch(
            _HOST_UPWARD,
            "self._retry_at_s is not None or bool(self._unsent)",
            "self._retry_at_s is not None",
        ),
        Simulation(0, 60, "broker_is_in_trouble"),
    ),
    Bug(
        "what was not confirmed goes behind what is new",
        Patch(
            _HOST_UPWARD,
            "            self._queue[:0] = self._unsent\n",
            "            self._queue += self._unsent\n",
        ),
        Simulation(0, 60, "broker_is_in_trouble"),
    ),
    Bug(
        "doubt forgotten at the next attempt",
        Patch(
            _HOST_UPWARD,
            "item.doubtful = item.doubtful or doubtful",
            "item.doubtful = doubtful",
        ),
        Simulation(0, 60, "broker_is_in_trouble"),
    ),
    Bug(
        "doubt left out of the note",
        Patch(
            _HOST_UPWARD,
            "return Past.DOUBT if self.doubtful or self.state is not _State.QUEUED else None",
            "return Past.DOUBT if self.state is not _State.QUEUED else None",
        ),
        Simulation(0, 60, "broker_is_in_trouble"),
    ),
    Bug(
        "the time to ask again runs while the guest stands still",
        Patch(_CHANNELS, "                self.downward.upward.silent()\n", ""),
        Simulation(0, 60, "paused_after_its_host_died"),
        was_real=True,
    ),
    Bug(
        "not marked as perhaps published before",
        Patch(_HOST_UPWARD, "redelivered=item.doubtful)", "redelivered=False)"),
        Simulation(0),
    ),
    Bug(
        "no note left",
        Patch(
            _HOST_UPWARD,
            "        if self._listening:\n            self._note_is_due",
            "        if False:\n            self._note_is_due",
        ),
        Simulation(71),
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
            _HOST_UPWARD,
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
            _HOST_UPWARD,
            "        self._note_is_due = not note.is_last",
            "        self._note_is_due = False",
        ),
        Test(_OUTBOUND_TESTS + "test_a_vm_that_is_let_go_before_the_broker_has_spoken"),
        was_real=True,
    ),
    Bug(
        "published before everything written before is read",
        Patch(_HOST_UPWARD, "(not history.is_read or is_again or", "(is_again or"),
        Test(_OUTBOUND_TESTS + "test_it_publishes_when_its_arrival_has_come_back"),
        was_real=True,
    ),
    Bug(
        "our own arrival is taken out of the queue",
        Patch(
            _HOST_UPWARD,
            "                self._arrival_tokens.append(self._log_tokens.pop())\n",
            "                pass\n",
        ),
        Test(_OUTBOUND_TESTS + "test_it_publishes_when_its_arrival_has_come_back"),
    ),
    Bug(
        "what the next host has written is taken out of the queue",
        Patch(
            _HOST_UPWARD,
            "        if not history.is_read or history.is_ours(message):\n",
            "        if True:\n",
        ),
        Test(_OUTBOUND_TESTS + "test_what_was_written_before_is_taken_out_of_the_queue"),
        was_real=True,
    ),
    Bug(
        "a note speaks for the last stay only",
        Patch(_HOST_UPWARD, "            history.stays(),\n", "            (history.stay,),\n"),
        Test(_OUTBOUND_TESTS + "test_a_new_session_begins_a_new_stay"),
        was_real=True,
    ),
    Bug(
        "a host that died is not missed",
        Patch(_HISTORY, "            self._await(arrival.stay, 0.0)\n", "            pass\n"),
        Simulation(0),
    ),
    Bug(
        "what waited here while the guest was elsewhere is new",
        Patch(_HOST_UPWARD, " or self.number <= number\n", "\n"),
        Test(_OUTBOUND_TESTS + "test_a_guest_that_comes_back_may_have_been_elsewhere"),
        was_real=True,
    ),
    Bug(
        "an answer acknowledged before the guest has it",
        Patch(
            _HOST_UPWARD,
            "self._hold(token, answer.id, None, now_s)\n            self._responder.answer(",
            "self._broker.ack(token)\n            self._responder.answer(",
        ),
        Test(_OUTBOUND_TESTS + "test_a_call_s_answer_is_the_broker_s_until_the_guest_has_it"),
    ),
    Bug(
        "two answers to one call, and one is never acknowledged",
        Patch(
            _HOST_UPWARD,
            "self._broker.ack(held.token)  # the same again: it was called, or handed out, twice",
            "pass",
        ),
        Test(_OUTBOUND_TESTS + "test_an_answer_that_comes_twice"),
        was_real=True,
    ),
    Bug(
        "an answer that nobody waits for is held",
        Patch(
            _HOST_UPWARD,
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
        Patch(_HOST_UPWARD, "        if maybe_ran:\n", "        if False:\n"),
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
        Test(_UPWARD_TESTS + "test_calls_of_an_agent_that_is_gone_are_cancelled"),
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
    # ---------------------------------------------------------------- channels and domains
    Bug(
        "a paused VM's connection is cut every few seconds",
        Patch(
            _CHANNELS, " is Phase.SERVING and not self._domain.is_paused\n", " is Phase.SERVING\n"
        ),
        Simulation(0),
    ),
    Bug(
        "a wedge is not cured",
        Patch(_CHANNELS, "                self._cure(for_s)\n", ""),
        Simulation(0, 60, "wedged_in_company"),
    ),
    Bug(
        "spoken to before the guest runs",
        Patch(
            _DOMAINS,
            "    (Phase.IDLE, Situation.INCOMING): Domains._connect,\n",
            "    (Phase.IDLE, Situation.INCOMING): Domains._connect_and_speak,\n",
        ),
        Simulation(0),
    ),
    Bug(
        "a source goes on consuming after the guest has left",
        Patch(
            _DOMAINS,
            "        return domain.change(Hush(domain.uuid))\n",
            "        domain.change(Hush(domain.uuid))\n        return []\n",
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
        "a VM that put off consuming is never woken",
        Patch(
            _CHANNELS,
            "            self.downward.opened(resumed=True, now_s=self._loop.time())\n"
            "            self.set_timer()\n",
            "            self.downward.opened(resumed=True, now_s=self._loop.time())\n",
        ),
        Test(
            "tests/unit/test_failed_migration.py::test_it_is_consumed_again_though_nothing_else_happens"
        ),
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
            _CONNECTION,
            "        for chunk in id_chunks(self.responder.remembered() + self._charges):\n",
            "        for chunk in ():\n",
        ),
        Test("tests/unit/test_guest_daemon.py::test_the_daemon_is_killed_and_the_agent_lives"),
    ),
    Bug(
        "an agent runs before it gives its receipt",
        Patch(
            _SERVING,
            "        if not responder.take(request.id, self._scheduler.time()):\n",
            "        if False:\n",
        ),
        Simulation(0),
    ),
    Bug(
        "a worker that is to end leaves its caller without an answer",
        Patch(
            _WORKING, "        except BaseException as error:", "        except OSError as error:"
        ),
        Test("tests/unit/test_agent_log.py::test_a_worker_that_is_to_end_answers"),
        was_real=True,
        is_long=True,
    ),
    Bug(
        "what a method asks goes out with its answer",
        Patch(
            "vchan/client.py",
            "        self._connection.uncork()\n        while not",
            "        while not",
        ),
        Test("tests/unit/test_agent_requests.py::test_nothing_waits_for_a_methods_end"),
    ),
    Bug(
        "an answer waits for the methods behind it",
        Patch(
            _WORKING,
            "            if self._holds and not is_quick:\n",
            "            if False:\n",
        ),
        Test("tests/unit/test_agent_requests.py::test_nothing_waits_for_a_methods_end"),
    ),
    Bug(
        "the answers of quick methods go out one by one",
        Patch(
            _WORKING,
            "            if self._holds and not is_quick:\n",
            "            if self._holds:\n",
        ),
        Test("tests/unit/test_quick.py::test_those_of_quick_methods_go_out_together"),
    ),
    Bug(
        "an agent's methods run in a row however long",
        Patch(
            _WORKING,
            "if self.is_stopped or self._scheduler.time() >= until_s:",
            "if self.is_stopped:",
        ),
        Test(
            "tests/unit/test_agent_requests.py"
            "::test_what_is_withdrawn_behind_a_long_method_does_not_run"
        ),
    ),
    Bug(
        "a task that is cancelled leaves its call behind",
        Patch(
            "vchan/aio.py",
            "            connection.withdraw(request.id)\n            raise\n",
            "            raise\n",
        ),
        Test("tests/unit/test_aio.py::test_a_task_that_is_cancelled_withdraws_its_call"),
        is_long=True,
    ),
    # ---------------------------------------------------------------- one VM's trouble
    Bug(
        "what a VM's loop callbacks let out is everybody's",
        Patch(
            _HOSTED,
            "        self._loop.call_soon(partial(self._run, callback))\n",
            "        self._loop.call_soon(callback)\n",
        ),
        Test(_CONTAINMENT_ANY + "[Link.uncork]"),
    ),
    Bug(
        "a channel that failed keeps its socket",
        Patch(_HOSTED, ", channel.close_stream]", "]"),
        Test(_CONTAINMENT_TESTS + "test_a_channel_that_cannot_be_taken_apart_gives_up_its_socket"),
        was_real=True,
    ),
    Bug(
        "a channel made anew speaks whatever its phase",
        Patch(_HOSTED, "        if self._domain.phase is Phase.SERVING:\n", "        if True:\n"),
        Test(
            _CONTAINMENT_TESTS
            + "test_a_vm_that_leaves_in_quarantine_is_said_nothing_until_it_stays"
        ),
    ),
    Bug(
        "a guest that we found leaving is not hushed",
        Patch(
            _DOMAINS,
            "        return [*self._connect(domain), *self._hush(domain)]\n",
            "        return self._connect(domain)\n",
        ),
        Test("tests/unit/test_domains.py::test_levels"),
    ),
    Bug(
        "a VM's timers at the broker are everybody's",
        Patch(_HOST_BROKER, "partial(self.within, vm, work, None)", "work"),
        Test(_CONTAINMENT_TESTS + "test_a_fault_in_a_vms_timer_at_the_broker_is_its_own"),
    ),
    Bug(
        "a message of a VM's own queue breaks us for ever",
        Patch(
            "vchan/host/vm/mail_turns.py",
            "self._handle(token, body, partial(upward.work, now_s))",
            "upward.work(now_s)",
        ),
        Test(_CONTAINMENT_TESTS + "test_so_is_one_of_the_vms_own_queue"),
    ),
    Bug(
        "a domain that could not be read counts as gone",
        Patch(
            _DOMAINS,
            "        return frozenset(read | {unread.uuid for unread in self.unreadable})\n",
            "        return frozenset(read)\n",
        ),
        Test("tests/unit/test_domains.py::test_what_cannot_be_read_stays_what_it_was"),
        was_real=True,
    ),
    Bug(
        "a document type is looked for in all of the text",
        Patch(
            _DOMAIN_XML,
            "        _refuse_document_type(xml)\n",
            '        if "<!DOCTYPE" in xml:\n            raise ValueError(xml)\n',
        ),
        Test("tests/unit/test_domain_xml.py::test_what_stands_in_texts_is_text"),
        was_real=True,
    ),
    Bug(
        "channels of every name have the same alias",
        Patch(_DOMAIN_XML, "    if target_name == TARGET_NAME:\n", "    if target_name:\n"),
        Test(
            "tests/unit/test_domain_xml.py::test_aliases_are_such_that_libvirt_keeps_and_one_each"
        ),
        was_real=True,
    ),
    Bug(
        "a secret's value is shown when it is wrong",
        Patch(
            "vchan/host/config_files.py",
            '            f"{path}:{error.lineno}",\n            f"',
            '            f"{path}:{error.lineno}",\n            f"{error.line}: ',
        ),
        Test("tests/unit/test_host_config.py::test_a_refusal_names_file_and_option_and_no_secret"),
    ),
    Bug(
        "a link that nobody keeps is believed",
        Patch(
            "vchan/guest/port.py",
            "    if is_links or not os.path.exists(device):\n",
            "    if os.path.exists(link) or not os.path.exists(device):\n",
        ),
        Test("tests/unit/test_port.py::test_a_stale_udev_link_is_not_followed"),
    ),
    # ---------------------------------------------------------------- told, and in doubt
    Bug(
        "a caller hears that its call has not run before the broker has proved it",
        Patch(
            _COMPLETIONS,
            "        if reply is None or completion.waits_for_proof:\n",
            "        completion.waits_for_proof = False\n        if reply is None:\n",
        ),
        Simulation(400),
        was_real=True,
    ),
    Bug(
        "the guest's daemon forgets what it has refused",
        Patch(
            _EXCHANGE,
            "(record.is_told or reason not in COMES_AGAIN)",
            "reason not in COMES_AGAIN",
        ),
        Test("tests/unit/test_router.py::test_a_call_nobody_serves_is_handed_back"),
        was_real=True,
    ),
    Bug(
        "a call in doubt runs",
        Patch(
            _ROUTER,
            "        if request.is_call:\n            return None\n",
            "",
        ),
        Simulation(0, 60, "guests_lose_their_memory"),
        was_real=True,
    ),
    Bug(
        "a cast in doubt is not marked",
        Patch(
            _ROUTER,
            "return request.changed(body=mark_redelivered(request.body, is_raw=is_raw))",
            "return request",
        ),
        Simulation(0, 60, "guests_lose_their_memory"),
        was_real=True,
    ),
    Bug(
        "a cast that an agent was given is in doubt no more",
        Patch(
            _DISPATCHER,
            "        return not served.owners or not served.request.is_call\n",
            "        return not served.owners\n",
        ),
        Test(
            "tests/unit/test_router.py"
            "::test_a_cast_stays_in_doubt_until_somebody_has_taken_it[False]"
        ),
        was_real=True,
    ),
    Bug(
        "a fresh request says that nothing older can come, though it is a program's",
        Patch(
            "vchan/rpc/messages.py",
            "    return request.topic, request.flags & (FANOUT | LOCAL)\n",
            "    return request.topic, request.flags & FANOUT\n",
        ),
        Test(
            "tests/unit/test_router.py::"
            "test_after_the_first_fresh_request_of_a_queue_nothing_is_older_than_the_daemon"
        ),
    ),
    Bug(
        "an agent keeps its charge when another serves the topic",
        Patch(
            _ROUTER,
            "sorted({topic.name for topic in self._dispatcher.topics_of(key)} - others)",
            "sorted({topic.name for topic in self._dispatcher.topics_of(key)})",
        ),
        Simulation(0, 150, "guests_lose_their_memory"),
    ),
    Bug(
        "an agent has its charge while what a dead one had is not settled",
        Patch(_ROUTER, "        if self._orphaned:\n            return ()\n", ""),
        Test(
            "tests/unit/test_router.py::test_an_agent_is_not_charged_alone_with_what_another_serves_or_had"
        ),
    ),
    Bug(
        "an agent does not tell the next daemon of its charges",
        Patch(
            _CONNECTION,
            "self.responder.remembered() + self._charges",
            "self.responder.remembered()",
        ),
        Test("tests/unit/test_charges.py::test_the_next_daemon_hears_of_it"),
    ),
    Bug(
        "a second copy is given to a later run of the guest",
        Patch(
            _FINISHED,
            "        return request_id in self._answers or not known\n",
            "        return request_id in self._answers\n",
        ),
        Test(
            _DOWNWARD_TESTS + "test_a_second_copy_of_what_an_earlier_run_of_the_guest_had_is_over"
        ),
    ),
    Bug(
        "each host waits anew for a note that is lacking",
        Patch(_HISTORY, "self._await(stay, waited_ms / 1000)", "self._await(stay, 0.0)"),
        Simulation(0, 20, "moves_on_and_on_after_a_host_daemon_died"),
        was_real=True,
    ),
    Bug(
        "a note with doubts is followed by a better one, for ever",
        Patch(
            _HISTORY,
            "if not (note.is_last or self.is_settled) and",
            "if note.doubt and not self.is_settled and",
        ),
        Simulation(0, 40, "moves_on_and_on_after_a_host_daemon_died"),
        was_real=True,
    ),
    Bug(
        "a cast to the guest's daemon runs before it is receipted",
        Patch(
            _ROUTER,
            "            self._flush()\n",
            "",
        ),
        Test("tests/unit/test_router.py::test_a_cast_to_the_daemon_is_receipted_before_it_runs"),
        was_real=True,
    ),
    Bug(
        "a channel whose stream ended while its guest was to leave is given up",
        Patch(
            _CHANNELS,
            "        if self._domain.phase is not Phase.LEAVING:\n",
            '        self._gone = self._domain.phase is Phase.LEAVING or hasattr(self, "_gone")\n'
            "        if not self._gone:\n",
        ),
        Test(
            "tests/unit/test_failed_migration.py::"
            "test_a_guest_that_stays_is_connected_to_however_often_its_stream_ends"
        ),
        was_real=True,
        is_long=True,
    ),
    Bug(
        "the old connection of a program that came back cancels its request",
        Patch(
            "vchan/host/local/programs.py",
            "            self._let_go(before, request.id)\n",
            "            pass\n",
        ),
        Test("tests/unit/test_local_repeats.py::test_the_new_connection_hears_the_answer"),
        was_real=True,
    ),
    Bug(
        "an agent says its charges to the daemon that it had them from",
        Patch(_CONNECTION, "        if daemon.instance == self._daemon:\n", "        if False:\n"),
        Test("tests/unit/test_charges.py::test_the_same_daemon_has_given_it_to_others"),
    ),
    Bug(
        "a daemon does not take back the charges that an agent had before",
        Patch(
            _ROUTER,
            ".charges += tuple(filter(is_charge, ids))",
            ".charges += ()",
        ),
        Test("tests/unit/test_router.py::test_a_charge_that_is_not_true_any_more_is_taken_back"),
    ),
    Bug(
        "a host that is new to a guest is not told what another knows",
        Patch(
            _REPORTS, "            state.here = state.is_refused", "            state.is_refused"
        ),
        Test(f"{_REPORTS_TESTS}test_a_new_host_is_told_again_what_another_knows"),
    ),
    Bug(
        "services hear of a guest's state again from each host that it comes to",
        Patch(_REPORTS, '"known": state.now == state.told}', '"known": False}'),
        Test(f"{_REPORTS_TESTS}test_a_new_host_is_told_again_what_another_knows"),
    ),
    Bug(
        "a report whose fate nobody knows is taken for one that services have heard of",
        Patch(_KEPT_REPORTS, "and self._of(what) == report", ""),
        Test(f"{_KEPT_TESTS}test_that_services_have_heard_of_one_state_says_nothing_of_the_next"),
    ),
    Bug(
        "a host does not believe that another has told services",
        Patch(_KEPT_REPORTS, 'args.get("known") is True or what', "what"),
        Simulation(1),
    ),
    Bug(
        "a host tells services of what it has known",
        Patch(_HOST_UPWARD, "            self.reports.heard(*item.news)\n", "            pass\n"),
        Simulation(17),
    ),
    Bug(
        "what changes while a report is under way is taken for told",
        Patch(
            _REPORTS, "            state.told = report\n", "            state.told = state.now\n"
        ),
        Simulation(33),
    ),
    Bug(
        "a report is receipted before the broker has it",
        Patch(
            _HOST_UPWARD,
            "        self._broker.publish_request(self.vm, request.id, made)\n",
            "        self._broker.publish_request(self.vm, request.id, made)\n"
            "        if item.news:\n"
            "            self._forget(request.id)\n"
            "            self._responder.take(request.id, now_s)\n",
        ),
        Simulation(49),
    ),
    Bug(
        "what is still being completed cannot come again behind what is given meanwhile",
        Patch(_FINISHED, "self._left_over = set(self._completing)", "self._left_over = set()"),
        Test(
            _DOWNWARD_TESTS
            + "test_while_what_an_earlier_run_had_may_come_again_nothing_says_that_it_has_come"
        ),
        was_real=True,
    ),
    Bug(
        "what was sent behind a HELLO that waits counts for one end alone",
        Patch(
            "vchan/session/handshake.py",
            "<= peer.recv_next <= mine.send_next",
            "<= peer.recv_next <= self._sender.tail",
        ),
        Test(
            "tests/unit/test_session.py::"
            "test_both_ends_decide_alike_of_what_was_sent_behind_a_hello_that_waits"
        ),
        was_real=True,
    ),
    Bug(
        "a program is not told that a host without a broker may have had the request",
        Patch(
            _HOST_UPWARD,
            "item.doubtful or (item.is_repeated and self._history.may_lack_stays)",
            "item.doubtful",
        ),
        Test(
            _OUTBOUND_TESTS
            + "test_a_program_is_told_that_a_host_without_a_broker_may_have_had_the_request"
        ),
        was_real=True,
    ),
    Bug(
        "a report that waits to be published counts as told",
        Patch(
            _HOST_UPWARD,
            "        if any(item.news == (what, news) for item in self._items.values()):\n",
            "        if any(item.news == (what, news) for item in self._items.values()):\n"
            "            self._responder.take(request.id, now_s)\n"
            "            return None\n",
        ),
        Test(f"{_KEPT_TESTS}test_what_waits_to_be_published_is_not_said_to_have_been"),
        was_real=True,
    ),
    Bug(
        "what no service listens for is never told to the host again",
        Patch(_HOST_UPWARD, "if item.news is not None:  # kept", "if False:  # kept"),
        Test(f"{_KEPT_TESTS}test_a_report_that_no_service_listens_for_is_taken_all_the_same"),
        was_real=True,
    ),
    Bug(
        "a host that cannot say what came of a report is told nothing more",
        Patch(_REPORTS, "message.reason == REFUSED", "message.reason >= 0"),
        Test(f"{_REPORTS_TESTS}test_a_host_that_has_not_refused_is_told_again_later"),
        was_real=True,
    ),
    Bug(
        "file systems stay frozen when the daemon is killed",
        Patch(
            "vchan/guest/freezer.py",
            '            self._why = "the daemon is gone"\n',
            "            time.sleep(0.1)\n",
        ),
        Test("tests/unit/test_freezer.py::test_the_daemon_is_gone"),
        is_long=True,
    ),
    Bug(
        "a pause counts when a guest is called dead",
        Patch(
            "vchan/host/ops/deaths.py",
            "now_s - silence.seen_s < self._dead_s",
            "now_s - silence.began_s < self._dead_s",
        ),
        Test("tests/unit/test_deaths.py::test_who_was_paused_and_is_late_is_not_dead"),
    ),
    Bug(
        "any VM may serve a topic that another one owns",
        Patch(
            "vchan/host/policy/rules.py",
            "Verdict(Effect.ALLOW if is_owner else Effect.DENY, own.where)",
            "Verdict(Effect.ALLOW, own.where)",
        ),
        Test("tests/unit/test_policy_rules.py::test_each_vm_owns_the_topic_with_its_uuid"),
    ),
    Bug(
        "a rescue image is given what is sent to the server",
        Patch(
            _DOMAIN_XML,
            "return None if self.rescued else self.channel_path",
            "return self.channel_path",
        ),
        Test(
            "tests/unit/test_domains.py::"
            "test_a_server_in_rescue_is_not_served_and_nothing_is_attached"
        ),
        was_real=True,
    ),
    Bug(
        "a shelved server's queues are deleted",
        Patch(
            "vchan/host/config.py",
            '"delete_queues_after",\n        default=0,',
            '"delete_queues_after",\n        default=600,',
        ),
        Test("tests/unit/test_host_config.py::test_the_defaults"),
        was_real=True,
    ),
    Bug(
        "the controller that our own channel has brought counts as nova's",
        Patch(
            _DOMAIN_XML,
            '_target_type(port) == "virtio" and not _is_attached(port)',
            '_target_type(port) == "virtio"',
        ),
        Test(
            "tests/unit/test_domain_xml.py::"
            "test_a_server_loses_its_channel_if_nova_gives_it_no_controller"
        ),
    ),
    Bug(
        "an unknown extra spec matches any pattern",
        Patch(
            "vchan/host/policy/rules.py",
            "        if not value or not glob.matches(value):",
            "        if not glob.matches(value):",
        ),
        Test("tests/unit/test_policy_rules.py::test_rules_by_extra_spec_and_property"),
    ),
    Bug(
        "a topic that a reload gives to a VM is not consumed as its own",
        Patch(
            _CONSUMPTION,
            "is_known = (topics, owned) == (self._consumed, self._owned)",
            "is_known = topics == self._consumed",
        ),
        Test(_DOWNWARD_TESTS + "test_a_topic_that_a_reload_gives_to_the_vm"),
    ),
    Bug(
        "a name in a copy may be a path",
        Patch(_COPIES, 'or b"/" in name ', ""),
        Test(_COPIES_TESTS + "test_nothing_is_written_elsewhere"),
    ),
    Bug(
        "a copy brings set-user-id bits",
        Patch(_COPIES, "is_known = mode <= MODE_MAX and ", "is_known = "),
        Test("tests/unit/test_copies_protocol.py::test_what_is_no_message"),
    ),
    Bug(
        "more bytes may come than a file has",
        Patch(_COPY_ORDER, "self.at <= self._size, message", "True, message"),
        Test("tests/unit/test_copies_protocol.py::test_what_may_not_be_said"),
    ),
    Bug(
        "a link in the place of a directory is followed",
        Patch(
            _TREES,
            "os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC",
            "os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC",
        ),
        Test(_COPIES_TESTS + "test_a_link_that_is_there_is_not_followed"),
    ),
    Bug(
        "what is there is gone on with, whatever it is",
        Patch(_TREES, "if digest.digest() != had.sha256:", "if False:"),
        Test(_COPIES_TESTS + "test_another_content_begins_anew"),
    ),
    Bug(
        "a full disk stays full",
        Patch(
            _TREES,
            "            file.new.discard()\n            file.new = None\n",
            "            file.new = None\n",
        ),
        Test(_COPIES_TESTS + "test_a_full_disk_leaves_nothing_and_the_rest_goes_on"),
    ),
    Bug(
        "a file appears whose checksum is another",
        Patch(_PLACES, "if self._digest.digest() != sha256:", "if False:"),
        Test(_COPIES_TESTS + "test_another_checksum_is_no_file"),
    ),
    Bug(
        "two copies write one file",
        Patch(
            _PLACES,
            "            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
            "            pass\n",
        ),
        Test(_COPIES_TESTS + "test_two_copies_of_one_file_do_not_mix"),
    ),
    Bug(
        "another name of a file is taken for a part of a copy",
        Patch(_PLACES, "not is_ours or found.st_nlink > 1", "not is_ours"),
        Test(_COPIES_TESTS + "test_what_is_in_the_place_of_a_part_is_not_written_to"),
    ),
    Bug(
        "who copies is kept waiting by a command that was killed",
        Patch(
            "vchan/agents/standard/copies.py",
            "            self._take_over(connection, place)\n",
            "",
        ),
        Test(
            "tests/unit/test_copy_service.py::"
            "test_a_later_copy_takes_the_place_of_one_that_stands_still"
        ),
        was_real=True,
    ),
)
