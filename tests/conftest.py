"""How hard the property tests try: HYPOTHESIS_PROFILE is dev (the default), ci or nightly; or
caught: as ci, where a failure is expected and need not be made small."""

import os
import signal
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.rig.copies import let_sessions_be_copied
from tests.rig.ending import end_on_signals

_COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

settings.register_profile("dev", max_examples=30, **_COMMON)
settings.register_profile("ci", max_examples=100, derandomize=True, **_COMMON)
settings.register_profile(
    "caught", settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate)
)
settings.register_profile("nightly", max_examples=5000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

# Where CI is set, pytest writes out the whole difference of what it compared: of 700 kB that are
# not equal, for longer than any test may take. Here and there the same is tested in the same way.
for _name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(_name, None)

# What a shell starts in the background ignores Ctrl-C; so would every program that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Fixtures end what they have started. Of a SystemExit pytest makes a test that has failed, and goes
# on to the next.
end_on_signals(lambda _: KeyboardInterrupt())

let_sessions_be_copied()


@pytest.hookimpl(trylast=True)  # when it is known which are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each worker begins with its share of the long ones: at the end none of them is waited for."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers == 1:
        return
    long = [item for item in items if item.get_closest_marker("long")]
    others = [item for item in items if not item.get_closest_marker("long")]
    ordered: list[pytest.Item] = []
    for number in range(workers):  # xdist's `worksteal` gives each as many, in their order
        ends = len(ordered) + (len(items) - len(ordered)) // (workers - number)
        ordered += long[number::workers]
        given = max(0, ends - len(ordered))
        ordered += others[:given]
        del others[:given]
    items[:] = ordered
