"""A caller of the standard agent: runs a program in a VM, as on a terminal.

python3 run_in_guest.py VM /usr/bin/uptime [ARGUMENT ...]

On the compute host, as a user who may use vchan-host's socket. A service does the same through
oslo.messaging, with Target(topic="vchan.standard").
"""

import base64
import sys

from vchan.client import Client
from vchan.errors import VchanError

TOPIC = "vchan.standard"
NEWS_S = 10


def main() -> int:
    """Run it; returns its exit status."""
    vm, *argv = sys.argv[1:] or [""]
    if not argv or vm.startswith("-"):
        sys.stderr.write("usage: run_in_guest.py VM /PROGRAM [ARGUMENT ...]\n")
        return 2
    with Client() as client:
        run = client.call(TOPIC, "exec", {"argv": argv}, server=vm)["id"]
        out = err = 0
        while True:
            where = {"id": run, "stdout_from": out, "stderr_from": err, "wait_s": NEWS_S}
            part = client.call(TOPIC, "exec_read", where, server=vm)
            sys.stdout.buffer.write(base64.b64decode(part["stdout"]))
            sys.stderr.buffer.write(base64.b64decode(part["stderr"]))
            sys.stdout.flush()
            out, err = part["stdout_next"], part["stderr_next"]
            if part["ended"]:
                break
        client.call(TOPIC, "exec_end", {"id": run}, server=vm)
    return int(part["status"]) if part["signal"] is None else 128 + int(part["signal"])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except VchanError as error:  # nobody is there, or it is refused: the text says why
        sys.exit(f"run_in_guest.py: {error}")
