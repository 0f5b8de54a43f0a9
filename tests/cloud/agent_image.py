"""What servers boot: the rig's small Linux, vchan-guest, and an agent that says what it ran."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.rig import guest_image
from tests.rig.compute import GUEST_DAEMON, agent_service
from tests.rig.guest_image import GuestImage

PROPERTY_CHARACTERS_MAX: Final = 255
"""An image's property becomes a row of the server's metadata."""


def build() -> GuestImage:
    """The image, made now or kept from before."""
    return guest_image.build({"app/agent.py": Path(__file__).with_name("agent.py")})


def command_line() -> str:
    """The kernel's."""
    line = guest_image.command_line([GUEST_DAEMON, agent_service("agent", "/app/agent.py")])
    assert len(line) <= PROPERTY_CHARACTERS_MAX, line
    return line
