"""In a guest: octavia's own amphora agent, as its image starts it, and what it expects around it.

amphora.py                 runs the agent
amphora.py trace DIRECTORY prints which files the agent needs, as {path in the guest: file here}
"""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
import warnings

CONFIG = "/etc/octavia/amphora-agent.conf"
LOG_SOCKET = "/run/rsyslog/octavia/log"
"""Its access log goes there, to rsyslogd in an amphora. Here it is thrown away."""


def main() -> None:
    """The agent, until it is killed."""
    assert pathlib.Path("/etc/vchan-init").exists(), "it makes itself at home: in a guest alone"
    socket.sethostname("amphora")
    subprocess.run(["/bin/ip", "link", "set", "lo", "up"], check=True)
    for directory in ("/run/rsyslog/octavia", "/var/log", "/var/lib/octavia/certs", "/etc/octavia"):
        pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        pathlib.Path(LOG_SOCKET).unlink(missing_ok=True)  # of the run before
        log.bind(LOG_SOCKET)
        if not os.fork():
            while True:  # who writes would wait for ever, once ten messages lie there
                log.recv(65536)
        from octavia.cmd import agent

        sys.argv[1:] = ["--config-file", CONFIG]
        agent.main()


def trace(directory: str) -> None:
    """Every request that the tests make, without a server; then what was loaded for them."""
    warnings.simplefilter("ignore")
    config = pathlib.Path(directory, "agent.conf")
    config.write_text(
        f"[amphora_agent]\nagent_server_network_dir = {directory}\n"
        f"[haproxy_amphora]\nbase_path = {directory}\nbase_cert_dir = {directory}/certs\n"
    )
    import loaded  # type: ignore[import-not-found,unused-ignore]
    from octavia.amphorae.backends.agent.api_server import server
    from octavia.cmd import agent  # noqa: F401 - what it imports
    from octavia.common import service

    service.prepare_service(["agent", "--config-file", str(config)])
    client = server.Server(None).app.test_client()
    pem = f"/1.0/loadbalancer/lb/certificates/{'0' * 40}.pem"
    client.put(pem, data=b"a certificate")
    for asked in ("/", "/1.0/info", pem, "/1.0/none"):
        client.get(asked)
    print(json.dumps(loaded.files("gunicorn")))


if __name__ == "__main__":
    trace(sys.argv[2]) if sys.argv[1:2] == ["trace"] else main()
