"""The control side: unmodified oslo.messaging code that calls, casts and fans out to VMs' agents,
and a service that agents ask and that hears what guests report. Each is a process; each writes its
records to a file.

    python -m tests.torture.control sender --url URL --records FILE --vms UUID,UUID
    python -m tests.torture.control service --url URL --records FILE

Standard input commands: "stand" and "go" (the sender's), and its end ends it. Each command, and
the beginning, is answered by one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.rig import RigError, tail
from tests.torture.in_guest import ALL, CONTROL, GUESTS, MARK, RUNNER, who_named
from tests.torture.payload import answer_is_right, answer_to, checksum, payload_of
from tests.torture.records import (
    ANSWERED,
    CALL,
    CAST,
    CONFIRMED,
    EVERYBODY,
    FANOUT,
    REPORT,
    WRONG,
    Ran,
    Sent,
    Told,
    Writer,
)

ROOT: Final = Path(__file__).resolve().parents[2]
CALL_TIMEOUT_S: Final = 90
"""By default: over what any fault of ours takes, also on a slow machine."""
CALL_PAUSE_S: Final = 0.1
CAST_PAUSE_S: Final = 0.2
FANOUT_PAUSE_S: Final = 1.0
BEHIND_S: Final = 3.0
"""While a call to a VM waits for longer, no casts are sent to it: on a machine that is slow just
now they would come faster than the guest runs them, and what waits would grow for ever."""
SERVER: Final = "controller"
FACTS_EVENT: Final = "vchan.guest.facts"
START_S: Final = 30.0


class Gate:
    """Where senders wait while the traffic stands."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_open = True
        self._inside: dict[str, float] = {}

    @contextmanager
    def passing(self, sender: str) -> Iterator[None]:
        """Wait until the gate is open; who is inside is not idle."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_open)
            self._inside[sender] = time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                del self._inside[sender]
                self._changed.notify_all()

    def waits_s(self, sender: str) -> float:
        """How long a sender has been inside."""
        with self._changed:
            return time.monotonic() - self._inside.get(sender, time.monotonic())

    def go(self) -> None:
        """Open it."""
        with self._changed:
            self._is_open = True
            self._changed.notify_all()

    def stand(self, timeout_s: float) -> list[str]:
        """Close it and wait until nobody is inside; returns who still is."""
        with self._changed:
            self._is_open = False
            self._changed.wait_for(lambda: not self._inside, timeout_s)
            return sorted(self._inside)


class Sender:
    """A caller and a caster for each VM, and one who fans out."""

    def __init__(
        self, transport: Any, oslo: Any, writer: Writer, vms: Iterable[str], call_timeout_s: int
    ) -> None:
        self._oslo = oslo
        self._writer = writer
        self.gate = Gate()
        target = oslo.Target(topic=RUNNER)
        client = oslo.get_rpc_client(transport, target)
        for vm in vms:
            to_vm = client.prepare(server=vm, timeout=call_timeout_s)
            caller = f"{vm}-caller"
            casting = self._casting(to_vm, "note")
            self._start(CALL, vm, caller, self._calling(to_vm), CALL_PAUSE_S)
            self._start(CAST, vm, f"{vm}-caster", casting, CAST_PAUSE_S, behind=caller)
        everybody = oslo.get_rpc_client(transport, oslo.Target(topic=ALL)).prepare(fanout=True)
        casting = self._casting(everybody, "hear")
        self._start(FANOUT, EVERYBODY, "fanner", casting, FANOUT_PAUSE_S)

    def _start(
        self,
        kind: str,
        target: str,
        sender: str,
        ask: Callable[[str, int], str],
        pause_s: float,
        *,
        behind: str = "",
    ) -> None:
        def repeat() -> None:
            number = 0
            while True:
                while self.gate.waits_s(behind) > BEHIND_S:
                    time.sleep(pause_s)
                with self.gate.passing(sender):
                    number += 1
                    self._writer.write(Sent(time.monotonic(), kind, target, sender, number))
                    outcome = self._outcome(ask, sender, number)
                    self._writer.write(Told(time.monotonic(), sender, number, outcome))
                time.sleep(pause_s)

        threading.Thread(target=repeat, name=sender, daemon=True).start()

    def _outcome(self, ask: Callable[[str, int], str], sender: str, number: int) -> str:
        try:
            return ask(sender, number)
        except Exception as error:  # noqa: BLE001 - what it is called is what is recorded
            return str(getattr(error, "exc_type", None) or type(error).__name__)

    @staticmethod
    def _calling(client: Any) -> Callable[[str, int], str]:
        def call(sender: str, number: int) -> str:
            args = {"sender": sender, "number": number, "payload": payload_of(sender, number)}
            answer = client.call({}, "echo", **args)
            return ANSWERED if answer_is_right(answer, sender, number) else WRONG

        return call

    @staticmethod
    def _casting(client: Any, method: str) -> Callable[[str, int], str]:
        def cast(sender: str, number: int) -> str:
            args = {"sender": sender, "number": number, "payload": payload_of(sender, number)}
            client.cast({}, method, **args)
            return CONFIRMED

        return cast


class Endpoint:
    """The service's methods: written down, and answered."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def note(self, context: dict[str, Any], sender: str, number: int, payload: str) -> None:
        """For casts."""
        self._ran(context, CAST, sender, number, payload)

    def echo(self, context: dict[str, Any], sender: str, number: int, payload: str) -> list[object]:
        """For calls."""
        self._ran(context, CALL, sender, number, payload)
        return [sender, number, answer_to(sender, number)]

    def _ran(
        self, context: dict[str, Any], kind: str, sender: str, number: int, payload: str
    ) -> None:
        marked = bool(context.get(MARK))
        vm = str(context.get("vchan_instance_uuid"))
        crc = checksum(payload)
        self._writer.write(Ran(time.monotonic(), kind, sender, number, crc, marked, vm))


class Listener:
    """What services hear of guests: their names are written down."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def info(
        self, context: dict[str, Any], publisher: str, event_type: str, payload: Any, metadata: Any
    ) -> None:
        """See oslo.messaging."""
        named = who_named(str(payload["report"].get("hostname")))
        if event_type == FACTS_EVENT and named is not None:
            marked, vm = bool(context.get(MARK)), str(context.get("vchan_instance_uuid"))
            crc = checksum(payload_of(*named))
            self._writer.write(Ran(time.monotonic(), REPORT, *named, crc, marked, vm))


class Program:
    """One of the two, as a process.

    Args:
        log: For its standard error.
    """

    def __init__(self, words: list[str], log: Path) -> None:
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.torture.control", *words],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )

    def __enter__(self) -> Self:
        self._answer()
        return self

    def ask(self, command: str) -> Any:
        """A command's answer.

        Raises:
            RigError: The process has ended.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RigError(f"the control side ended: {tail(self._log)}")
        return json.loads(line)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._process:  # closes its pipes
            self._process.kill()


def sender_program(
    url: str, records: Path, vms: Iterable[str], log: Path, call_timeout_s: int
) -> Program:
    """Sends at once, and until it is told to stand."""
    words = ["sender", "--url", url, "--records", str(records), "--vms", ",".join(vms)]
    return Program([*words, "--call-timeout", str(call_timeout_s)], log)


def service_program(url: str, records: Path, log: Path) -> Program:
    """Serves CONTROL until it is ended."""
    return Program(["service", "--url", url, "--records", str(records)], log)


def _serve(oslo: Any, conf: Any, transport: Any, heard: Any, writer: Writer) -> None:
    target = oslo.Target(topic=CONTROL, server=SERVER)
    server = oslo.get_rpc_server(transport, target, [Endpoint(writer)], executor="threading")
    guests = [oslo.Target(topic=GUESTS)]
    listener = oslo.get_notification_listener(
        heard, guests, [Listener(writer)], executor="threading"
    )
    # One by one: several threads would write their records in another order than it came in.
    conf.set_override("executor_thread_pool_size", 1)
    server.start()
    listener.start()
    print(json.dumps("serves"), flush=True)
    sys.stdin.read()


def _send(oslo: Any, transport: Any, writer: Writer, vms: list[str], call_timeout_s: int) -> None:
    sender = Sender(transport, oslo, writer, vms, call_timeout_s)
    print(json.dumps("sends"), flush=True)
    for line in sys.stdin:
        if line.strip() == "go":
            sender.gate.go()
            print(json.dumps("goes"), flush=True)
        else:
            # Whatever was asked is over by then, or the promise that everything ends is broken.
            print(json.dumps(sender.gate.stand(call_timeout_s + START_S)), flush=True)


def main() -> None:
    """The processes' own program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("sender", "service"))
    parser.add_argument("--url", required=True)
    parser.add_argument("--records", required=True)
    parser.add_argument("--vms", default="")
    parser.add_argument("--call-timeout", type=int, default=CALL_TIMEOUT_S)
    options = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # oslo's own deprecations
        import oslo_messaging as oslo
        from oslo_config import cfg
    conf = cfg.CONF
    conf([])
    transport = oslo.get_rpc_transport(conf, url=options.url)
    writer = Writer(options.records)
    if options.part == "service":
        heard = oslo.get_notification_transport(conf, url=options.url)
        _serve(oslo, conf, transport, heard, writer)
    else:
        _send(oslo, transport, writer, options.vms.split(","), options.call_timeout)
    # Threads of ours and of oslo's may wait for a broker that is gone: nothing to be tidied.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
