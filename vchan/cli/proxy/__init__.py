"""proxy: an HTTP proxy whose CONNECT leads into VMs.

command       the command, and its options
server        the process: the files that it reads, where it listens
clients       who has connected, from the first byte to the tunnel
passages      the ways to VMs that clients share
tls           TLS on sockets that never wait
users         who may use it, for what; and what names mean
wire          HTTP: one CONNECT, one answer
"""

from vchan.cli.proxy.command import add_commands

__all__ = ["add_commands"]
