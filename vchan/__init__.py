"""vchan: RPC between OpenStack's control plane and agents inside virtual machines.

The words this package uses, one meaning each:

frame     what crosses a channel: checked and numbered (`vchan.wire.frames`).
session   the numbered, acknowledged conversation of two daemons (`vchan.session`).
link      a session bound to one byte stream (`vchan.io.link`).
message   what a session carries; big ones travel as several frames (`vchan.rpc.messages`).
request   a call, cast, fanout or notification.
receipt   "I have taken responsibility for this request"; not a frame's ACK, which only
          says "this frame reached my memory".
instance  the random 128-bit number of one run of one daemon.

Targets, exchanges, topics, servers and namespaces are oslo.messaging's; domains,
channels, target names and lifecycle events are libvirt's.
"""

from vchan import builds

__version__ = "0.1.0"

builds.choose(builds.COMMON)
