"""An agent that is an ordinary oslo.messaging server: topic "oslo".

    vchan dev run oslo_agent.py                              on a laptop
    python3 oslo_agent.py vchan:///run/vchan/agent.sock      in a guest

Needs `pip install 'vchan[oslo]'`. A service of yours that exists already needs none of this: its
configuration file says transport_url = vchan:///run/vchan/agent.sock.
"""

import os
import signal
import sys
import threading

try:  # before oslo.messaging is imported: or the newest would rather have eventlet, if it is there
    from oslo_service import backend

    backend.init_backend(backend.BackendType.THREADING)
except (ImportError, ValueError):
    pass  # an older release has no choice

import oslo_messaging
from oslo_config import cfg

# oslo.messaging looks some of its options up in the global cfg.CONF, whatever configuration it was
# given: with a ConfigOpts() of its own a program starts, and fails at its first request
# (NoSuchOptError). So it is cfg.CONF that is used, and it must have been called.
CONF = cfg.CONF


class Endpoint:
    """Every public method can be called. The context comes first."""

    target = oslo_messaging.Target(version="1.0")

    def echo(self, ctxt: dict[str, object], **values: object) -> dict[str, object]:
        """Give back what was given."""
        return values

    def note(self, ctxt: dict[str, object], text: str) -> None:
        """For casts: print it. `vchan_redelivered` in the context: it may have run before."""
        print(text, "again?" if ctxt.get("vchan_redelivered") else "", flush=True)


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    socket = os.environ.get("VCHAN_SOCKET", "/run/vchan/agent.sock")
    url = sys.argv[1] if len(sys.argv) > 1 else f"vchan://{socket}"
    CONF([], project="oslo-agent", default_config_files=[])
    transport = oslo_messaging.get_rpc_transport(CONF, url)
    # In a guest the server's name is the VM's, whatever stands here.
    target = oslo_messaging.Target(topic="oslo", server="me")
    server = oslo_messaging.get_rpc_server(transport, target, [Endpoint()], executor="threading")
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    server.start()
    over.wait()
    server.stop()
    server.wait()
    transport.cleanup()


if __name__ == "__main__":
    main()
