"""Compiles modules, if VCHAN_COMPILE=1 asks for it: mypyc makes C of the very sources.

    VCHAN_COMPILE=1 pip wheel --no-build-isolation .

It is for this kind of machine and this Python, and needs gcc, mypy and setuptools.

Otherwise everything is as pyproject.toml says, and the wheel is pure. See docs/packaging.md.
"""

import os
from typing import Any

COMPILED = {
    "vchan": (
        "vchan/guest/intake.py",
        "vchan/guest/router.py",
        "vchan/guest/upward.py",
        "vchan/io/link.py",
        "vchan/io/loop.py",
        "vchan/programs/connection.py",
        "vchan/programs/serving.py",
        "vchan/programs/working.py",
        "vchan/rpc/bodies.py",
        "vchan/rpc/deferred.py",
        "vchan/rpc/dispatcher.py",
        "vchan/rpc/in_flight.py",
        "vchan/rpc/messages.py",
        "vchan/session/contract.py",
        "vchan/session/handshake.py",
        "vchan/session/liveness.py",
        "vchan/session/receiver.py",
        "vchan/session/sender.py",
        "vchan/session/session.py",
        "vchan/streams/messages.py",
        "vchan/wire/frames.py",
        "vchan/wire/layout.py",
        "vchan/wire/value.py",
    ),
    "vchan.host": (
        "vchan/host/broker/amqp.py",
        "vchan/host/broker/amqp_content.py",
        "vchan/host/broker/amqp_frames.py",
        "vchan/host/broker/completions.py",
        "vchan/host/broker/confirms.py",
        "vchan/host/broker/events.py",
        "vchan/host/broker/reply_publisher.py",
        "vchan/host/broker/vm_queues.py",
        "vchan/host/faults.py",
        "vchan/host/oslo_wire/downward_envelope.py",
        "vchan/host/oslo_wire/envelope.py",
        "vchan/host/policy/rules.py",
        "vchan/host/policy/token_bucket.py",
        "vchan/host/vm/channel.py",
        "vchan/host/vm/consumption.py",
        "vchan/host/vm/downward.py",
        "vchan/host/vm/dropped_casts.py",
        "vchan/host/vm/finished_requests.py",
        "vchan/host/vm/gate.py",
        "vchan/host/vm/mail_turns.py",
        "vchan/host/vm/open_requests.py",
        "vchan/host/vm/presence.py",
        "vchan/host/vm/served_topics.py",
        "vchan/host/vm/throttle.py",
        "vchan/host/vm/upward.py",
        "vchan/host/vm/vm.py",
    ),
}
"""What runs for every frame and every request, by the package that has its library: what a guest
has too, and what only a host has. Constants that are Final are compiled in: those that a test sets
to something else are not Final."""


def extensions() -> list[Any]:
    """The compiled modules, and the two libraries that they are doors into.

    They are made one after the other, so that neither knows how the other is made: the host's sees
    sources in what it imports, and runs beside any build of that. Made in one go they call each
    other directly, and one of another day than the other ends whoever loads both.
    """
    from mypyc.build import mypycify

    options = ["--config-file=", "--strict", "--follow-imports=silent", "--ignore-missing-imports"]
    return [
        extension
        for package, names in COMPILED.items()
        for extension in mypycify(
            [*options, *names], debug_level="0", group_name=f"{package}.library"
        )
    ]


if __name__ == "__main__":
    from setuptools import setup

    setup(ext_modules=extensions() if os.environ.get("VCHAN_COMPILE") == "1" else [])
