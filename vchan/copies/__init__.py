"""Files and directories through one byte stream, either way: for `vchan cp`, and who serves it.

places      where a file appears: whole under its name, or not at all
trees       a tree of files, read from a disk and written to one
pipe        a socket, and the messages on it

What the two ends say to each other: `vchan.services.copies`, and docs/protocol.md, section 15.
Neither end trusts the other: what a guest sends is written below the path that the operator named,
or not at all.
"""
