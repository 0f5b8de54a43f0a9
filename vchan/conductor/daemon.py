"""vchan-conductor: the process, and the service that hosts ask.

Threads: the main thread has the loop (signals, the audit log); oslo.messaging's have the requests,
one each. They share the admission, under a lock.
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

from vchan import __version__
from vchan.conductor import config
from vchan.conductor.admission import Admission, Handed, read
from vchan.conductor.forward import Forwarder, oslo_messaging
from vchan.errors import ConfigError, Rejected
from vchan.host import config_files
from vchan.host.enforcer import CONDUCTOR
from vchan.host.oslo_wire.envelope import EnvelopeError
from vchan.host.policy.audit_log import AuditLog
from vchan.host.policy.audit_record import Record
from vchan.host.policy.guest_context import build_context
from vchan.host.policy.rules import Effect, Kind, Policy
from vchan.host.threads import EXIT_SOFTWARE, run_and_exit, watch_all_threads
from vchan.host.vm.gate import CONDUCTOR_VERSION
from vchan.io.loop import Loop
from vchan.io.service_manager import ServiceManager
from vchan.rpc.bodies import REDELIVERED_KEY

LOG = logging.getLogger("vchan.conductor")

EXIT_OK: Final = 0
"""Ended by SIGTERM or SIGINT; requests under way had 10 s."""
EXIT_CONFIG: Final = 2
"""A wrong option or file, or a file that is not there: starting again does not help."""
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
        self._lock = threading.Lock()  # guards the admission and `_under_way`
        self._under_way = 0
        self._is_serving = False
        self._failure = ""  # why this ends, if it was not told to
        self._audit = AuditLog(self.loop, options.audit_log, options.host, LOG.warning)
        self._admission = Admission(
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
        config.check_urls(self._conf)
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
        return oslo_messaging.get_rpc_server(transport, target, [_ConductorEndpoint(self)])

    def reload(self) -> None:
        """Read the policy again, and go on in a new audit log if the old one was moved."""
        problem = ""
        try:
            policy = config.policy(self._conf)
        except ConfigError as error:
            problem = str(error)
        if problem:
            kept = "the policy before it holds"
            with self._lock:
                if self._admission.policy.problem:
                    self._admission.policy = Policy.denying(problem)
                    kept = "everything is denied"
            LOG.warning("policy: %s: %s", problem, kept)
        else:
            with self._lock:
                self._admission.policy = policy
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
            record = self._admission.judge(request, self.loop.time())
            lines_per_s = self._admission.policy.limits(request.facts).audit_lines_per_s
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
                    self._admission.call_over(request)

    # ---------------------------------------------------------------- the process

    def thread_died(self, problem: str) -> None:
        """A thread has ended that should not have, and is in the log: from any thread."""
        self._failure = self._failure or problem
        self.loop.stop()

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; SIGHUP reads the policy again.

        Returns:
            The exit status: EXIT_OK, or EXIT_SOFTWARE when a thread has died, as the one does that
            finds that it cannot serve at all.
        """
        for text in config.unknown_names(self._conf):
            LOG.warning("%s", text)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.loop.stop())
        signal.signal(signal.SIGHUP, lambda *_: self.loop.call_soon_threadsafe(self.reload))
        # It waits for the broker, for ever if need be: not in this thread, which hears signals.
        threading.Thread(target=self._start, name="vchan-start", daemon=True).start()
        self._manager.ready("waiting for the broker")  # it is no reason to hold up a boot
        self.loop.run()
        self._manager.stopping()
        status = EXIT_OK
        if self._failure:
            LOG.critical("vchan-conductor ends: %s", self._failure)
            status = EXIT_SOFTWARE
        self._stop(status)
        return status

    def _start(self) -> None:
        """What it fails with ends the process, as of any thread: one that lives and serves nothing
        would look well."""
        self._server.start(self._conf[config.GROUP].threads)
        self.loop.call_soon_threadsafe(self._started)

    def _started(self) -> None:
        self._is_serving = True
        LOG.info("vchan-conductor %s: serving %s/%s", __version__, *CONDUCTOR)
        self._manager.status("serving")

    def _stop(self, status: int) -> None:
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
            os._exit(status)  # threads wait for answers, or for the broker
        self._server.wait()
        self._forwarder.close()
        self.loop.close()


def _refusal(record: Record) -> str:
    if record.reason:
        return f"the conductor refuses it: {record.reason}"
    return "the conductor's policy denies it"


class _ConductorEndpoint:
    """The methods that hosts call, named for the kinds (`vchan.host.vm.gate.VmGate.conduct`)."""

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
    conf: Any = None
    try:
        # oslo.messaging registers some of its options there and nowhere else.
        conf = config.load(sys.argv[1:], cfg.CONF)
        config_files.set_up_log(conf, "vchan")
        conductor = Conductor(conf)
    except ConfigError as error:
        sys.stderr.write(f"vchan-conductor: {config_files.located(error, conf)}\n")
        sys.exit(EXIT_CONFIG)
    watch_all_threads(conductor.thread_died)
    run_and_exit("vchan-conductor", conductor.run)


if __name__ == "__main__":
    main()
