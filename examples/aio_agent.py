"""An agent on asyncio: serves topic "aio".

vchan dev run aio_agent.py          on a laptop
python3 aio_agent.py [SOCKET]       in a guest
"""

import asyncio
import signal
import sys

from vchan.aio import Agent


class Endpoint:
    """Its methods run at the same time."""

    async def echo(self, **values: object) -> dict[str, object]:
        """Give back what was given."""
        return values

    async def later(self, s: float) -> str:
        """Take a while. If the caller gives up, this is cancelled."""
        await asyncio.sleep(s)
        return "done"


async def main() -> None:
    """Serve until SIGINT or SIGTERM; what runs may end."""
    agent = Agent(*sys.argv[1:2])
    agent.serve("aio", Endpoint())
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, agent.stop)
    await agent.run()


if __name__ == "__main__":
    asyncio.run(main())
