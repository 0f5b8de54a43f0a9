"""oslo.messaging's own functional tests, as they come with its distribution, on any transport URL.

python -m tests.rig.oslo_functional threading|eventlet URL [NAME TO LEAVE OUT]...

It prints a line of JSON for each test.

What is changed of them, and why:

- They monkey-patch eventlet into the whole process when they are imported. With "eventlet" that is
  left as it is, as are the executors that they name. With "threading" it is not: their servers then
  run on native threads, as oslo.messaging itself is about to have it everywhere.
- Some are left out unless the URL begins with rabbit://, because other drivers that oslo.messaging
  comes with cannot do what they test. These run here: they see such a URL.
- After the first event of a kind they wait up to 15 s for more: here 1 s.
- MetricsTestCase is left out: it tests oslo.metrics, with a server of its own on a fixed port.
- test_rabbitmq tests RabbitMQ.
"""

import importlib
import json
import os
import queue
import sys
import types
import unittest
from contextlib import suppress
from typing import Any


def _without_eventlet() -> None:
    """So that its tests do not replace this process's threads."""
    with suppress(ImportError, ValueError):  # an old one, or without cotyledon
        from oslo_service import backend

        backend.init_backend(backend.BackendType.THREADING)
    importlib.import_module("oslo_messaging")
    fake: Any = types.ModuleType("eventlet")
    fake.monkey_patch = lambda *_, **__: None
    before = sys.modules.get("eventlet")
    sys.modules["eventlet"] = fake
    try:
        importlib.import_module("oslo_messaging.tests")
    finally:
        del sys.modules["eventlet"]
        if before is not None:
            sys.modules["eventlet"] = before


class _AsRabbit(str):
    """A URL that passes for one of RabbitMQ's."""

    def startswith(self, prefix: Any, *arguments: Any) -> bool:
        return prefix == "rabbit://" or super().startswith(prefix, *arguments)


class Result(unittest.TestResult):
    """Prints how each test ended."""

    def _say(self, test: unittest.TestCase, how: str, text: str = "") -> None:
        name = ".".join(test.id().split(".")[-2:])
        print(json.dumps({"test": name, "how": how, "text": text}), flush=True)

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self._say(test, "passed")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        super().addSkip(test, reason)
        self._say(test, "skipped", reason)

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        super().addFailure(test, err)
        self._say(test, "failed", self.failures[-1][1])

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        super().addError(test, err)
        self._say(test, "failed", self.errors[-1][1])


def _on_threads() -> None:
    """Instead of the executor "eventlet", which the suite names."""
    import oslo_messaging
    from oslo_messaging.tests.functional import utils

    utils.RpcServerFixture.__init__.__defaults__ = (None, None, "threading")
    for name in ("get_notification_listener", "get_batch_notification_listener"):
        function = getattr(oslo_messaging, name)
        setattr(oslo_messaging, name, _threading(function))


def _prepare() -> list[type[unittest.TestCase]]:
    from oslo_messaging.tests.functional import test_functional, utils
    from oslo_messaging.tests.functional.notify import test_logger

    utils.NotificationFixture.get_events = _get_events
    set_up = utils.SkipIfNoTransportURL.setUp

    def set_up_as_rabbit(self: Any, *arguments: Any, **options: Any) -> None:
        set_up(self, *arguments, **options)
        self.rpc_url = _AsRabbit(self.rpc_url)

    utils.SkipIfNoTransportURL.setUp = set_up_as_rabbit
    return [
        test_functional.CallTestCase,
        test_functional.CastTestCase,
        test_functional.NotifyTestCase,
        test_logger.LoggingNotificationHandlerTestCase,
    ]


def _get_events(self: Any, timeout: float = 0.5) -> list[Any]:
    events = []
    try:
        while True:
            events.append(self.events.get(timeout=timeout))
            timeout = min(timeout, 1.0)
    except queue.Empty:
        return events


def _threading(function: Any) -> Any:
    """Their notification fixtures ask for the executor "eventlet" by its place."""

    def made(transport: Any, targets: Any, endpoints: Any, _: str, **options: Any) -> Any:
        return function(transport, targets, endpoints, "threading", **options)

    return made


def main() -> None:
    """See the top of this file."""
    kind, url, *left_out = sys.argv[1:]
    os.environ["RPC_TRANSPORT_URL"] = os.environ["NOTIFY_TRANSPORT_URL"] = url
    if kind == "threading":
        _without_eventlet()
        _on_threads()
    suite = unittest.TestSuite()
    for case in _prepare():
        tests = unittest.defaultTestLoader.loadTestsFromTestCase(case)
        for test in tests:
            if not any(name in str(test) for name in left_out):
                suite.addTest(test)
    import testscenarios

    suite = unittest.TestSuite(testscenarios.generate_scenarios(suite))
    result = Result()
    suite.run(result)
    sys.exit(not result.wasSuccessful())


if __name__ == "__main__":
    main()
