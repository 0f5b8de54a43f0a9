"""The wire: what crosses a channel, byte for byte. Pure.

`layout` is generated from `vchan.protocol`. `frames` turns payloads into numbered, checked frames,
and finds frames again in whatever bytes arrive. What a kind of frame means, the tables in
`vchan.session.session` say. `value` is what is made for each frame and message: values with names
that are no tuples. `reserved_ports` are names of ports that others talk on.
"""
