"""The daemon in a VM.

daemon         the wiring: the port, the agents' socket, the router
intake         messages for the router, with the time beside each
router         the host's requests to agents (pure)
upward         the agents' requests to the control side (pure)
reports        what the host is told of this guest, and when (pure)
arrivals       what each arrival at a host took here, for a log that is to tell it
observer       looks at the guest for what `reports` tells
forwards       byte streams of programs on the host, connected to what runs here
freezer        its file systems, frozen under a lease
port           the channel's end, kept open; `serial_port` and `windows_port` are kinds of it
options        command lines and configuration files of the guest's programs
stderr_log     their logs' lines
"""
