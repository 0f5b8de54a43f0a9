"""A stock service of oslo.messaging in a process that eventlet has patched: see test_oslo_eventlet.

    python3 -m tests.rig.green_agent serve URL TOPIC EXECUTOR WORKERS [PARTS]
    python3 -m tests.rig.green_agent call URL TOPIC SERVER

`serve` runs it under oslo.service, which forks WORKERS (0: none). PARTS, with commas, are what is
patched alone. `call` prints what it has heard.
"""

import sys

import eventlet

parts = sys.argv[6].split(",") if len(sys.argv) > 6 else []
eventlet.monkey_patch(**dict.fromkeys(parts, True))

import json  # noqa: E402 - after the patch, as services do
import os  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from typing import Any  # noqa: E402

import oslo_messaging  # noqa: E402
from oslo_config import cfg  # noqa: E402
from oslo_service import service  # noqa: E402


class Endpoint:
    """What tests call."""

    def echo(self, ctxt: Any, x: Any) -> Any:
        """It, and in which process."""
        return [x, os.getpid()]

    def wait(self, ctxt: Any, seconds: float) -> float:
        """As a green thread waits."""
        time.sleep(seconds)
        return seconds

    def fail(self, ctxt: Any) -> None:
        """Raise."""
        raise LookupError("green")


class Service(service.Service):  # type: ignore[misc]
    """As the services of OpenStack are made: the transport before the fork, the server after it."""

    def __init__(self, url: str, topic: str, executor: str) -> None:
        super().__init__()
        self._transport = oslo_messaging.get_rpc_transport(cfg.CONF, url)
        self._target = oslo_messaging.Target(topic=topic, server="green")
        self._executor = executor
        self._server: Any = None

    def start(self) -> None:
        """After the fork."""
        super().start()
        self._server = oslo_messaging.get_rpc_server(
            self._transport, self._target, [Endpoint()], executor=self._executor
        )
        self._server.start()

    def stop(self, graceful: bool = True) -> None:
        """At SIGTERM; also in the parent, which has started nothing."""
        if self._server is not None:
            self._server.stop()
            self._server.wait()
        self._transport.cleanup()
        super().stop(graceful)


def serve(url: str, topic: str, executor: str, workers: str) -> None:
    """Until a signal comes."""
    made = Service(url, topic, executor)
    service.launch(cfg.CONF, made, workers=int(workers) or None).wait()


def call(url: str, topic: str, server: str) -> None:
    """Calls at once, one more that fails, a cast to nobody; and a green thread that goes on."""
    transport = oslo_messaging.get_rpc_transport(cfg.CONF, url)
    target = oslo_messaging.Target(topic=topic, server=server)
    # The oldest release has no function for it.
    make = getattr(oslo_messaging, "get_rpc_client", None) or oslo_messaging.RPCClient
    client = make(transport, target, timeout=20)
    ticks: list[float] = []
    is_over = threading.Event()

    def tick() -> None:
        while not is_over.wait(0.01):
            ticks.append(time.monotonic())

    ticker = threading.Thread(target=tick)
    ticker.start()
    began_s = time.monotonic()
    pool = eventlet.GreenPool()
    waited = list(pool.imap(lambda _: client.call({}, "wait", seconds=0.5), range(8)))
    said: dict[str, Any] = {"waited": waited, "took_s": time.monotonic() - began_s}
    for what in ("fail", "echo"):
        try:
            said[what] = client.call({}, what, **({"x": 7} if what == "echo" else {}))
        except LookupError as error:
            said[what] = str(error).splitlines()[0]
    try:
        client.prepare(topic="nobody").cast({}, "echo", x=1)
    except oslo_messaging.MessagingException as error:
        said["nobody"] = type(error).__name__
    is_over.set()
    ticker.join()
    said["ticks"] = len(ticks)
    transport.cleanup()
    print(json.dumps(said))


if __name__ == "__main__":
    cfg.CONF([], project="green", default_config_files=[], default_config_dirs=[])
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:6])
    else:
        call(*sys.argv[2:5])
