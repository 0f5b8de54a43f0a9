"""Gateways: programs of a guest, in any language, reach vchan through these processes.

`http` (with `http_wire`) and `zeromq` are the two, and `process` is how they run. `gateway` is what
programs may ask of either, as JSON objects, and the `Problem` that says what was wrong. `leases`
says which program has which request, and until when. To the guest's daemon each gateway is an
agent.
"""
