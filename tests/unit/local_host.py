"""A host daemon reduced to its local socket, on a thread; its guests are made up."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from vchan.errors import NoSuchDomain, NoSuchMethod, Rejected
from vchan.host.local.programs import (
    LocalService,
    SendAnswer,
    Streams,
    call_with,
    failure,
    result,
)
from vchan.host.vm.streams import Program
from vchan.io.local_socket import LocalServer
from vchan.io.loop import Loop
from vchan.rpc.bodies import decode_invocation, encode_failure, encode_json
from vchan.rpc.in_flight import Answered, HandedBack, Heartbeat, Outcome, Taken
from vchan.rpc.messages import AGENT_GONE, NO_AGENT, RELEASED, Request, Topic


class LocalHost:
    """Serves a socket. Its one VM is "vm", with an agent of topic "agent"; of others, which `add`
    adds, it can only tell.

    Args:
        path: Of the socket.
    """

    def __init__(self, path: Path) -> None:
        self.log: list[str] = []
        self.status: dict[str, Any] = {}
        self.guest: dict[str, Any] | None = None
        self.facts: dict[str, Any] = {"facts": {"hostname": "a"}}
        self.details: dict[str, dict[str, Any]] = {}  # of a VM's status, by its name
        self.problem: str | None = None
        self.pings: list[float | None] = [0.0]  # seconds until each answer; None: there is none
        self.looks: list[
            Callable[[], None]
        ] = []  # what changes before the next lists, but the first
        self.lists = 0
        self._uuid = "u"
        self._others: list[dict[str, Any]] = []
        self.bug: Exception = KeyError("a bug's own")
        self.status_after_s = 0.0
        self.bug_of = ""  # the VM whose status cannot be told
        self.cancelled: list[bytes] = []
        self.requests: list[Request] = []
        self.loop = Loop()
        service = LocalService(self.loop, self, self.log.append)
        self.server = LocalServer(
            self.loop, str(path), 0o660, os.urandom(16), "host", service, self.log.append
        )
        self._thread = threading.Thread(target=self.loop.run, name="local-host")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.stop()
        self._thread.join(30)
        self.server.close()
        self.loop.close()

    def add(self, name: str, uuid: str, channel: str = "ready", **fields: Any) -> None:
        """One more VM."""
        row = {"uuid": uuid, "name": name, "domain": "running", "channel": channel}
        self._others.append({**row, "topics": [], "problem": None, **fields})

    def rename_first(self, uuid: str) -> None:
        """Its first VM has this UUID."""
        self._uuid = uuid

    def remove(self, name: str) -> None:
        """It is no more."""
        self._others = [row for row in self._others if row["name"] != name]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What the method `list` returns."""
        row = {"uuid": self._uuid, "name": "vm", "domain": "running", "channel": "ready"}
        return [
            {**row, "topics": ["openstack/agent"], "problem": self.problem, "guest": self.guest},
            *self._others,
        ]

    def _status_of(self, vm: str) -> dict[str, Any]:
        for row in self.rows:
            if vm in (row["uuid"], row["name"]):
                own = {
                    name: value for name, value in row.items() if name not in ("channel", "topics")
                }
                shown = {**own, "state": row["channel"], "requests": {"topics": row["topics"]}}
                return {**shown, **self.status, **self.details.get(row["name"], {})}
        raise NoSuchDomain(f"{vm!r}: this host has no such domain")

    # What `local.Guests` asks for.

    def submit(
        self, server: str, request: Request, told: Callable[[Outcome], None]
    ) -> Callable[[], None]:
        if server == "off":
            raise Rejected("off: it is shut off; vchan attach off gives it one")
        if server not in ("vm", self._uuid):
            raise NoSuchDomain(f"{server!r}: this host has no such domain")
        self.requests.append(request)
        outcome = self._run(request)
        if outcome is not None:
            self.loop.call_soon(lambda: told(outcome))
        else:
            told(Heartbeat(request.id))
        return lambda: self.cancelled.append(request.id)

    def _run(self, request: Request) -> Outcome | None:
        if request.topic == "vchan.guest":
            answers_s = self.pings.pop(0) if len(self.pings) > 1 else self.pings[0]
            return None if answers_s is None else Answered(request.id, False, b"true")
        if request.topic != "agent":
            text = f"no agent serves topic {request.exchange}/{request.topic}"
            return HandedBack(request.id, NO_AGENT, text)
        if not request.is_call:
            return Taken(request.id)
        call = decode_invocation(request.body)
        match call.method:
            case "echo":
                return Answered(request.id, False, encode_json(call.args))
            case "trace":
                lines = ["Traceback:\n", "  File \x1b[2J\n", "ValueError\n"]
                body = encode_failure("ValueError", "as asked", traceback=lines)
                return Answered(request.id, True, body)
            case "fail":
                return Answered(request.id, True, encode_failure("ValueError", "as asked"))
            case "nonsense":
                return Answered(request.id, False, b"{")
            case "gone":
                return HandedBack(request.id, AGENT_GONE, "the agent went away")
            case "move":
                return HandedBack(request.id, RELEASED, "migrated to another host")
            case _:
                return None  # it takes for ever

    def serving(self, topic: Topic) -> list[str]:
        return ["vm"] if topic.name == "agent" else []

    def open_streams(self, vm: str, target: str, number: int, program: Program) -> Streams:
        raise Rejected(f"{vm}: its vchan-guest takes no byte streams: upgrade it")

    def method(self, name: str, args: Mapping[str, Any], answer: SendAnswer) -> None:
        if self.bug_of and args.get("vm") == self.bug_of:
            raise self.bug
        match name:
            case "list":
                self.lists += 1
                if self.looks and self.lists > 1:
                    self.looks.pop(0)()
                answer(*result(self.rows))
            case "facts":
                answer(*result(self.facts))
            case "status":
                vm = args.get("vm")
                told = result(
                    self._status_of(vm) if vm is not None else {"version": "1", **self.status}
                )
                if self.status_after_s:
                    self.loop.call_later(self.status_after_s, lambda: answer(*told))
                else:
                    answer(*told)
            case "attach":
                call_with(partial(self._attach, answer), args)
            case "broken":
                raise self.bug
            case "release":
                known = args in ({"vm": "vm"}, {"vm": self._uuid})
                answer(*(result(None) if known else failure(Rejected("not in quarantine"))))
            case _:
                raise NoSuchMethod(f"the daemon has no method {name!r}")

    def _attach(self, answer: SendAnswer, vm: str) -> None:
        self.loop.call_later(0.05, lambda: answer(*failure(Rejected(f"{vm}: no controller"))))
