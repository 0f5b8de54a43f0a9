"""The same as echo_select.py, on asyncio.

python3 echo_asyncio.py PORT
"""

import asyncio
import os
import sys
import time


def main() -> None:
    """Echo until killed."""
    port = os.open(sys.argv[1], os.O_RDWR | os.O_NONBLOCK)

    def readable() -> None:
        received = os.read(port, 4096)
        if received:
            os.write(port, received)
        else:  # no host is there yet
            time.sleep(0.02)

    loop = asyncio.new_event_loop()
    loop.add_reader(port, readable)
    loop.run_forever()


if __name__ == "__main__":
    main()
