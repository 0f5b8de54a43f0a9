"""What a guest's standard agent and the operator's command say to each other inside a byte stream.

framing     messages in a stream of bytes: a kind, a length, a payload
programs    what is said of one program, to the services exec and shell
copies      what is said of a tree of files, to the service files
copy_order  the order in which it may be said, for who sends a tree and for who receives one

A service is a program's socket in the guest (`io.targets`, kind SERVICE). A stream to it is ordered
and whole, or it is reset; so nothing is numbered here that need not outlive a stream.
docs/protocol.md, section 15, has all of it.
"""
