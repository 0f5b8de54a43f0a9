"""The command `vchan proxy`, and its options. What it does is loaded when it is called."""

from __future__ import annotations

import argparse
from typing import Any, Final

from vchan.cli.way import add_sockets

DEFAULT_LISTEN: Final = "127.0.0.1:9179"

_EPILOG: Final = """\
NAME in CONNECT NAME:PORT is a VM's name, its UUID, an address that nova has given it, or a name
of the file --names. PORT is one of the guest's loopback interface.

  vchan proxy --listen unix:/run/me/proxy.sock
  vchan proxy --users users                        127.0.0.1:9179, with tokens
  vchan proxy --listen 192.0.2.10:9179 --users users --certificate proxy.pem --key proxy.key \\
              --client-ca ca.pem                   on a network, with certificates or tokens

  curl --proxy http://ci:TOKEN@127.0.0.1:9179 --proxytunnel http://VM:8080/

--users: a line for each, NAME PROOF TARGETS. PROOF is certificate:NAME (of its subject, a DNS
name or URI of it; * is any that the CA has signed) or token:TOKEN. TARGETS are tcp:PORT and
unix:/PATH, with commas between them, in which * and ? stand for any.
--names: lines NAME VM or NAME:PORT VM TARGET. SIGHUP has all files read again.

What a user may reach, the policy of this host (kind forward) and the guest's own configuration
(option forward) have to allow as well. Tunnels go on as connections of vchan forward do.
"""


def add_commands(commands: Any) -> None:
    """The command of this group."""
    proxy = commands.add_parser(
        "proxy",
        help="an HTTP proxy whose CONNECT leads into VMs, for those who may use it",
        description="Serve HTTP's CONNECT: connect who may to what listens in a VM.",
        epilog=_EPILOG,
    )
    proxy.add_argument(
        "--listen",
        metavar="ADDRESS:PORT|unix:PATH",
        help=f"where; a unix socket is for its owner and group, and needs no --users "
        f"[{DEFAULT_LISTEN}, or the socket that systemd has opened]",
    )
    proxy.add_argument("--users", metavar="FILE", help="who may use it, and for what")
    proxy.add_argument("--names", metavar="FILE", help="what further names and addresses mean")
    proxy.add_argument(
        "--certificate", metavar="FILE", help="of the proxy, PEM: TLS. Must be given on a network"
    )
    proxy.add_argument("--key", metavar="FILE", help="of --certificate, if not in the same file")
    proxy.add_argument(
        "--client-ca", metavar="FILE", help="who signs the certificates of users, PEM"
    )
    add_sockets(proxy)
    proxy.set_defaults(run=_proxy, is_text=True)


def _proxy(options: argparse.Namespace) -> int:
    from vchan.cli.proxy.server import serve  # TLS, which other commands need not load

    return serve(options)
