"""When what a guest has sent may be published a second time, marked: nobody can know better."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from vchan.host.vm.handover import SETTLED_S

if TYPE_CHECKING:
    from tests.simulate.broker import Broker


def may_be_marked(broker: Broker, request_id: bytes, made_s: float, vm: str) -> bool:
    """The broker may have had it, and its host did not hear of that. Or a host's daemon or its
    connection to the broker was lost since. Or the host had had no note when it was made, and the
    guest had just arrived there."""
    if request_id in broker.doubted or any(at_s >= made_s for at_s in broker.losses):
        return True
    return made_s <= _unclear_until_s(broker, vm)


def _unclear_until_s(broker: Broker, vm: str) -> float:
    """Until when a host that got no note could not know what was published before."""
    losses = [(at_s, "lost") for at_s in broker.losses]
    moves = [(at_s, what) for at_s, uuid, what in broker.moves if uuid == vm]
    until_s = 0.0
    stands_still = False  # its time does not run while the guest is silent
    for at_s, what in sorted(losses + moves):
        if what == "lost" or (what == "goes" and at_s <= until_s):
            until_s, stands_still = math.inf, False
        elif what == "silent" and at_s <= until_s < math.inf:
            until_s, stands_still = math.inf, True
        elif at_s <= until_s and (what == "comes" or (what == "heard" and stands_still)):
            until_s, stands_still = at_s + SETTLED_S + 0.1, False
    return until_s
