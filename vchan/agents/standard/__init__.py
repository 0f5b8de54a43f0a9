"""The standard agent: what most control planes want of a guest, as far as its owner allows it.

`agent` serves the methods and `permissions` is the owner's word on them; `facts`, `metrics`, `exec`
and `files` do the work. `services` listens for byte streams, `programs` has what is run over these,
and `copies` the trees of files that go through them.
"""
