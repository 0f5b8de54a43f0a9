"""The agent that the benchmark calls, as a stock oslo.messaging RPC server: nothing of vchan in it.

python3 oslo_server.py TRANSPORT_URL SERVER
"""

import sys
import threading
from typing import Any

from oslo_service import backend

backend.init_backend(backend.BackendType.THREADING)

import oslo_messaging  # noqa: E402 - not before its backend is chosen
from oslo_config import cfg  # noqa: E402


class Endpoint:
    """As the light agent's."""

    def __init__(self) -> None:
        self._noted = 0
        self._lock = threading.Lock()

    def ping(self, ctxt: Any, **values: str) -> dict[str, str]:
        """Give back what was given."""
        return values

    def note(self, ctxt: Any, **values: str) -> None:
        """For casts."""
        with self._lock:
            self._noted += 1

    def count(self, ctxt: Any) -> int:
        """How many casts came."""
        return self._noted


def main() -> None:
    """Serve until killed."""
    url, name = sys.argv[1:]
    cfg.CONF([], project="vchan-bench", default_config_files=[], default_config_dirs=[])
    transport = oslo_messaging.get_rpc_transport(cfg.CONF, url)
    target = oslo_messaging.Target(topic="bench", server=name)
    oslo_messaging.get_rpc_server(transport, target, [Endpoint()]).start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
