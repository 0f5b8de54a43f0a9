"""The hypervisor: which VMs run here, and when the channel of each may be opened and spoken on.

`libvirt_client` follows libvirt on threads of its own, `domain_xml` (pure) reads and writes what
libvirt says of a domain, `domains` (pure) decides. A domain is libvirt's word for a VM.
`known_sockets` remembers the channels over a restart.
"""
