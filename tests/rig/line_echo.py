"""In a guest: gives back every byte that comes in by a port, through the daemon's own streams.

python3 line_echo.py URL
"""

import sys
import time
from select import EPOLLIN, EPOLLOUT, epoll

from vchan.errors import LinkError
from vchan.guest.port import port_opener
from vchan.io.streams import Stream


def opened(url: str) -> Stream:
    """The port, as soon as it can be opened."""
    opener = port_opener(url)
    while True:
        try:
            return opener()
        except LinkError:
            time.sleep(0.02)


def main() -> None:
    """Echo until the other end is gone."""
    stream = opened(sys.argv[1])
    waiting = b""
    with epoll() as ready:
        ready.register(stream.fileno(), EPOLLIN)
        while True:
            ready.modify(stream.fileno(), EPOLLIN | (EPOLLOUT if waiting else 0))
            ready.poll()
            try:
                data = stream.read()
                if not data and stream.ends_at_hangup:
                    return
                waiting += data
            except BlockingIOError:
                pass
            try:
                while waiting:
                    waiting = waiting[stream.write(waiting) :]
            except BlockingIOError:
                pass


if __name__ == "__main__":
    main()
