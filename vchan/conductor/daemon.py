"""vchan-conductor: the process, and the service that hosts ask.

Threads: the main thread has the loop (signals, the audit log); oslo.messaging's have the requests,
one each. They share the desk, under a lock.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any, Final

from oslo_config import cfg
from oslo_log import log as oslo_log

from vchan import __version__
from vchan.conductor import config
from vchan.conductor.desk import Desk, Handed, read
from vchan.conductor.forward import Forwarder, oslo_messaging
from vchan.errors import ConfigError, Rejected
from vchan.host.audit import AuditLog
from vchan.host.audit_record import Record
from vchan.host.authority import CONDUCTOR
from vchan.host.envelope import EnvelopeError
from vchan.host.gate import CONDUCTOR_VERSION, REDELIVERED_KEY
from vchan.host.identity import build_context
from vchan.host.policy import Effect, Kind, Policy
from vchan.loop import Loop
from vchan.notify import ServiceManager

LOG = logging.getLogger("vchan.conductor")

EXIT_CONFIG: Final = 2
STOP_S: Final = 10.0
"""For requests under way when the process ends. A call may take an hour: its caller is told nothing
then, and times out."""


class Conductor:
    """Judges requests, puts them on record, sends them on.

    Raises:
        ConfigError: As `main` reports it.
    """

    def __init__(self, conf: Any) -> None:
        options = conf[config.GROUP]
        self.loop = Loop()
        self._conf = conf
        self._allow = config.context_allow(conf)
        self._lock = threading.Lock()
        self._under_way = 0
        self._is_serving = False
        self._audit = AuditLog(self.loop, options.audit_log, options.host, LOG.warning)
        self._desk = Desk(
            Policy.denying("it has not been read"),
            requests_per_s=options.project_requests_per_s,
            calls_max=options.project_calls,
        )
        self.reload()
        config.register_messaging(conf)
        self._manager = ServiceManager(self.loop)
        self._server = self._make_server()

    def _make_server(self) -> Any:
        options = self._conf[config.GROUP]
        try:
            transport = oslo_messaging.get_rpc_transport(self._conf)
            self._forwarder = Forwarder(self._conf, options.services_url or None)
        except (oslo_messaging.InvalidTransportURL, oslo_messaging.DriverLoadFailure) as error:
            # The URL has a password in it: what is said of it goes into logs.
            kind = type(error).__name__
            raise ConfigError("transport_url or services_url", f"is not usable: {kind}") from None
        target = oslo_messaging.Target(
            exchange=CONDUCTOR.exchange, topic=CONDUCTOR.name, server=options.host
        )
        return oslo_messaging.get_rpc_server(transport, target, [_Endpoint(self)])

    def reload(self) -> None:
        """Read the policy again, and go on in a new audit log if the old one was moved."""
        problem = ""
        try:
            policy = config.policy(self._conf)
        except ConfigError as error:
            problem = str(error)
        if problem:
            kept = "the policy before it holds"
            if self._desk.policy.problem:
                self._desk.policy = Policy.denying(problem)
                kept = "everything is denied"
            LOG.warning("policy: %s: %s", problem, kept)
        else:
            self._desk.policy = policy
            LOG.info("policy: %d rules", len(policy.rules))
        self._audit.reopen()

    # ---------------------------------------------------------------- a request, on its thread

    def handle(self, kind: Kind, context: Mapping[str, Any], handed: Mapping[str, Any]) -> Any:
        """Take a request of a host's. A call's result.

        Raises:
            Rejected: It may not pass, and is a call: otherwise nobody waits to hear it.
            Exception: What the target raised.
        """
        request, problem = None, ""
        try:
            request = read(kind, context, handed)
        except EnvelopeError as error:
            problem = str(error)
        if request is None:
            host = str(context.get("vchan_host"))[:255]
            LOG.warning("host %r handed in what is no request: %s", host, problem)
            raise Rejected(f"the conductor cannot read the request: {problem}")
        with self._lock:
            record = self._desk.judge(request, self.loop.time())
            lines_per_s = self._desk.policy.limits(request.facts).audit_lines_per_s
        self.loop.call_soon_threadsafe(lambda: self._audit.write(record, lines_per_s))
        if record.verdict == Effect.ALLOW:
            return self._forward(request)
        if kind is Kind.CALL:
            raise Rejected(_refusal(record))
        return None

    def _forward(self, request: Handed) -> Any:
        context = build_context(request.context, request.facts, self._allow, host=request.host)
        if request.is_redelivered:
            context[REDELIVERED_KEY] = True
        with self._lock:
            self._under_way += 1
        try:
            return self._forwarder.send(request, context)
        finally:
            with self._lock:
                self._under_way -= 1
                if request.ask.kind is Kind.CALL:
                    self._desk.call_over(request)

    # ---------------------------------------------------------------- the process

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; SIGHUP reads the policy again."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.loop.stop())
        signal.signal(signal.SIGHUP, lambda *_: self.loop.call_soon_threadsafe(self.reload))
        # It waits for the broker, for ever if need be: not in this thread, which hears signals.
        threading.Thread(target=self._start, name="start", daemon=True).start()
        self._manager.ready("waiting for the broker")  # it is no reason to hold up a boot
        self.loop.run()
        self._manager.stopping()
        self._stop()

    def _start(self) -> None:
        self._server.start(self._conf[config.GROUP].threads)
        self.loop.call_soon_threadsafe(self._started)

    def _started(self) -> None:
        self._is_serving = True
        LOG.info("vchan-conductor %s: serving %s/%s", __version__, *CONDUCTOR)
        self._manager.status("serving")

    def _stop(self) -> None:
        if self._is_serving:
            self._server.stop()
        until_s = self.loop.time() + STOP_S
        while self._under_way and self.loop.time() < until_s:
            self.loop.run_once(0.1)
        self.loop.run_once(0.0)  # what is to be audited yet
        self._audit.close()
        if self._under_way or not self._is_serving:
            LOG.warning("ended with %d requests under way", self._under_way)
            logging.shutdown()
            os._exit(0)  # threads wait for answers, or for the broker
        self._server.wait()
        self._forwarder.close()
        self.loop.close()


def _refusal(record: Record) -> str:
    if record.reason:
        return f"the conductor refuses it: {record.reason}"
    return "the conductor's policy denies it"


class _Endpoint:
    """The methods that hosts call, named for the kinds (`vchan.host.gate.VmGate.conduct`)."""

    target = oslo_messaging.Target(version=CONDUCTOR_VERSION)

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor

    def call(self, context: Mapping[str, Any], **handed: Any) -> Any:
        return self._expect(Kind.CALL, context, handed)

    def cast(self, context: Mapping[str, Any], **handed: Any) -> None:
        self._expect(Kind.CAST, context, handed)

    def notify(self, context: Mapping[str, Any], **handed: Any) -> None:
        self._expect(Kind.NOTIFY, context, handed)

    def _expect(self, kind: Kind, context: Mapping[str, Any], handed: Mapping[str, Any]) -> Any:
        try:
            return self._conductor.handle(kind, context, handed)
        except Exception as error:  # noqa: BLE001  # the caller's to know, without a traceback here
            expected = oslo_messaging.ExpectedException()  # holds what is being handled now
            problem = str(error)[:500]
        if kind is not Kind.CALL:
            LOG.warning("a %s was lost: %s", kind.value, problem)
        raise expected


def main() -> None:
    """The command."""
    try:
        # oslo.messaging registers some of its options there and nowhere else.
        conf = config.load(sys.argv[1:], cfg.CONF)
        oslo_log.setup(conf, "vchan")
        conductor = Conductor(conf)
    except ConfigError as error:
        sys.stderr.write(f"vchan-conductor: {error}\n")
        sys.exit(EXIT_CONFIG)
    conductor.run()


if __name__ == "__main__":
    main()
