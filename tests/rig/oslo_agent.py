"""An unmodified oslo.messaging program in a guest: an RPC server, and a client of the control side.

    python3 oslo_agent.py CONFIG_FILE TOPIC JOURNAL

What `Counting` has, served by oslo.messaging's RPC server; and casts and calls to topic "control".
That it is on vchan:// it knows from its configuration file alone.
"""

import sys
import threading
from pathlib import Path
from typing import Any

from oslo_service import backend

backend.init_backend(backend.BackendType.THREADING)
sys.path.insert(0, str(Path(__file__).parent))

import oslo_messaging  # noqa: E402 - not before its backend is chosen
from counting_agent import Counting  # type: ignore[import-not-found,unused-ignore]  # noqa: E402
from oslo_config import cfg  # noqa: E402


class Endpoint:
    """Counts what runs, and asks the control side."""

    def __init__(self, counting: Any, client: Any) -> None:
        self._counting = counting
        self._client = client
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._asked: dict[str, Any] = {}

    def note(self, ctxt: Any, **values: Any) -> None:
        """See Counting."""
        self._counting.note(**values)

    def echo(self, ctxt: Any, **values: Any) -> Any:
        """See Counting."""
        return self._counting.echo(**values)

    def executed(self, ctxt: Any, **values: Any) -> Any:
        """See Counting."""
        return self._counting.executed(**values)

    def fail(self, ctxt: Any, text: str) -> None:
        """Raise, to show how a caller sees it."""
        raise LookupError(text, 7)

    def start_asking(self, ctxt: Any) -> None:
        """Cast and call to the control side, until `stop_asking`."""
        self._stop.clear()
        self._asked = {"casts": 0, "calls": 0, "errors": []}
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        asked, number = self._asked, 0
        while not self._stop.wait(0.02):
            number += 1
            try:
                if number % 5:
                    self._client.cast({}, "note", number=number)
                    asked["casts"] += 1
                elif self._client.call({}, "double", number=number) == 2 * number:
                    asked["calls"] += 1
            except oslo_messaging.MessagingException as error:
                asked["errors"].append(f"{number}: {error!r}")

    def stop_asking(self, ctxt: Any) -> dict[str, Any]:
        """What came of it."""
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        return self._asked


def main() -> None:
    """Serve."""
    config_file, topic, journal = sys.argv[1:]
    cfg.CONF(["--config-file", config_file], project="agent")
    transport = oslo_messaging.get_rpc_transport(cfg.CONF)
    control = oslo_messaging.Target(topic="control")
    client = oslo_messaging.get_rpc_client(transport, control, timeout=90)
    endpoint = Endpoint(Counting(journal), client)
    target = oslo_messaging.Target(topic=topic, server="whatever-it-calls-itself")
    server = oslo_messaging.get_rpc_server(transport, target, [endpoint])
    server.start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
