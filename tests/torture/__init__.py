"""The torture: every fault of the promises on real parts, at random, judged by the records alone.

    python -m tests.torture --minutes 5 --seed 1

Words
    lane      what happens to one part, one step after another: a VM, the hosts, the broker
    step      one fault, with its time: it is carried out, and healed, before the lane's next one
    round     lanes at work for a while; then everything is healed, the traffic stands, and the
              oracle judges all that was ever recorded
    record    one fact, written down where it happened before anything can come of it. The guest's
              are bytes on virtio ports that the hypervisor writes to files: they outlive the VM.

Rules of this package
1. It imports nothing of tests.simulate: the simulator and the torture check each other.
2. What is judged are records. No count of a program's own memory, which dies with it.
3. Modules that guests run (`payload`, `records`, `in_guest`) need the standard library and vchan.
4. It stops everything that it started.
"""
