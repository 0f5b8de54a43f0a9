"""One VM on this host: its channel, and its requests in both directions.

vm                 the VM as the daemon holds it: what fails in it stays in it
channel            the host's end of the virtio channel: connects, reconnects, goes into quarantine
static_channels    stands for it where the configuration names a socket instead of a VM
downward           requests into the guest
open_requests      those of these that are not over
finished_requests  those that are over, and still being completed, or remembered
dropped_casts      those that no agent will take: counted, and said
served_topics      which topics the guest's agents serve, and may; how often they change
consumption        which of them the broker is asked to consume, and when all is handed back
upward             requests out of the guest: judged, published, tried again, answered
mailbox            what came in the VM's own queue, read in slices
mail_turns         when it is read, as the VM's share of the daemon's time allows
presence           whether the guest is heard, silent, or away
log_lines          what one VM's channel may have logged
handover           what earlier hosts of the VM have published
gate               what the VM may do
streams            byte streams of programs on this host into the guest
throttle           what its stream may cost, and when that puts it into quarantine
reports            what the guest has told of itself
clock              the guest's clock, set after the guest stood still
"""
