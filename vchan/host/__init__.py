"""The daemon on a compute host. docs/architecture.md has the floors and the path of a request.

daemon         the wiring: the loop, the threads, the table of VMs
vm             one VM: its channel, its requests in both directions
broker         RabbitMQ: one thread, one connection
oslo_wire      oslo.messaging's bytes
hypervisor     which VMs run here, and when each may be spoken to
policy         what a guest may do; `enforcer` applies it to each VM and records what it decided
local          programs of this host, and services that it names
ops            programs beside the daemon, for the operator
config         the options; `config_files` is how this daemon and the conductor read theirs
threads        threads that cannot die unseen; `faults` is how our own code's failures are logged
help_text      what --help and --version say
dev            `vchan dev`: both daemons on a laptop
"""

from vchan import builds

builds.choose(builds.HOST)
