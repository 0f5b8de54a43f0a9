"""How hard the property tests try: HYPOTHESIS_PROFILE is dev (the default), ci or nightly."""

import os
import signal
from typing import Any

from hypothesis import HealthCheck, settings

_COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

settings.register_profile("dev", max_examples=30, **_COMMON)
settings.register_profile("ci", max_examples=100, derandomize=True, **_COMMON)
settings.register_profile("nightly", max_examples=5000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

# Where CI is set, pytest writes out the whole difference of what it compared: of 700 kB that are
# not equal, for longer than any test may take. Here and there the same is tested in the same way.
for _name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(_name, None)

# What a shell starts in the background ignores Ctrl-C; so would every program that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
