"""What moves bytes: the event loop, the streams, and the link that binds a session to a stream.

`loop` waits for `streams` and `pipes`; `green_loop` does so where eventlet has replaced threads.
`unix_socket` is what both stand on. `link` runs one session on one stream. `local_socket` is a
daemon's unix socket: each peer that `access` admits has a session. `targets` are what byte streams
are connected to in a guest. `service_manager` tells systemd how the process is, `activation` takes
a listener that systemd has opened. `steps` are what an arrival took, for the log. No module of
this room knows what a request is.
"""
