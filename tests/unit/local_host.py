"""A host daemon reduced to its local socket, on a thread; its guests are made up."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from vchan.bodies import decode_invocation, encode_failure, encode_json
from vchan.errors import NoSuchDomain, Rejected
from vchan.exchange import Answered, HandedBack, Heartbeat, Outcome, Taken
from vchan.host.local import Answer, LocalService, failure, result
from vchan.loop import Loop
from vchan.messages import AGENT_GONE, NO_AGENT, RELEASED, Request, Topic
from vchan.server import LocalServer


class LocalHost:
    """Serves a socket. Its one VM is "vm", with an agent of topic "agent".

    Args:
        path: Of the socket.
    """

    def __init__(self, path: Path) -> None:
        self.log: list[str] = []
        self.status: dict[str, str] = {}
        self.problem: str | None = None
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
        self._thread.join(10)
        self.server.close()
        self.loop.close()

    # What `local.Guests` asks for.

    def submit(
        self, server: str, request: Request, told: Callable[[Outcome], None]
    ) -> Callable[[], None]:
        if server == "off":
            raise Rejected("off: it is shut off; vchan attach off gives it one")
        if server != "vm":
            raise NoSuchDomain(f"{server!r}: this host has no such domain")
        self.requests.append(request)
        outcome = self._run(request)
        if outcome is not None:
            self.loop.call_soon(lambda: told(outcome))
        else:
            told(Heartbeat(request.id))
        return lambda: self.cancelled.append(request.id)

    def _run(self, request: Request) -> Outcome | None:
        if request.topic != "agent":
            return HandedBack(request.id, NO_AGENT, f"no agent serves topic {request.topic}")
        if not request.is_call:
            return Taken(request.id)
        call = decode_invocation(request.body)
        match call.method:
            case "echo":
                return Answered(request.id, False, encode_json(call.args))
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

    def method(self, name: str, args: Mapping[str, Any], answer: Answer) -> None:
        match name:
            case "list":
                row = {"uuid": "u", "name": "vm", "domain": "running", "channel": "ready"}
                answer(*result([{**row, "topics": ["openstack/agent"], "problem": self.problem}]))
            case "status":
                answer(*result({"version": "1", **self.status, **args}))
            case "attach":
                self._attach(answer, **args)
            case "release":
                known = args == {"vm": "vm"}
                answer(*(result(None) if known else failure(Rejected("not in quarantine"))))
            case _:
                raise KeyError(name)

    def _attach(self, answer: Answer, vm: str) -> None:
        self.loop.call_later(0.05, lambda: answer(*failure(Rejected(f"{vm}: no controller"))))
