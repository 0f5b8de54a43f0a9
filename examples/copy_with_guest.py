"""A caller of the standard agent: copies a file out of a VM, or into it.

python3 copy_with_guest.py VM:/PATH FILE
python3 copy_with_guest.py FILE VM:/PATH

To copy files on a compute host there is `vchan cp`. This shows what a service does with the methods
of the standard agent, here at vchan-host's socket: the bytes go as they are; where something on the
way is too old for that, as base64, which is slower.
"""

import base64
import hashlib
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vchan.client import Client
from vchan.errors import Rejected, RemoteError, VchanError

TOPIC = "vchan.standard"
PART_BYTES = 1 << 20
HEAD = struct.Struct(">QQ")  # the file's size, its date


class Guest:
    """A VM with a standard agent."""

    def __init__(self, client: Client, vm: str) -> None:
        self._client = client
        self._vm = vm
        self._is_raw = True

    def _ask(self, method: str, **args: Any) -> Any:
        return self._client.call(TOPIC, method, args, server=self._vm)

    def _ask_raw(self, method: str, data: bytes, **args: Any) -> bytes | None:
        """None: it cannot be asked so."""
        if not self._is_raw:
            return None
        try:
            return self._client.call_raw(TOPIC, method, data, args, server=self._vm)
        except Rejected:  # something on the way is too old, and says what
            self._is_raw = False
        except RemoteError as error:
            if error.class_name != "NoSuchMethod":  # else the standard agent is
                raise
            self._is_raw = False
        return None

    def read(self, path: str) -> Iterator[bytes]:
        """The file's parts."""
        offset, size = 0, 1
        while offset < size:
            part = self._ask_raw("file_read_raw", b"", path=path, offset=offset, count=PART_BYTES)
            if part is not None:
                (size, _), data = HEAD.unpack_from(part), part[HEAD.size :]
            else:
                told = self._ask("file_read", path=path, offset=offset, count=PART_BYTES)
                size, data = told["size"], base64.b64decode(told["data"])
            if not data and offset < size:
                raise EOFError(f"{path}: has become shorter")
            offset += len(data)
            yield data

    def write(self, path: str, content: bytes) -> None:
        """Have the file there, whole, or as it was."""
        digest = hashlib.sha256(content).hexdigest()
        begun = self._ask("file_write_begin", path=path, size=len(content), sha256=digest)["id"]
        for offset in range(0, len(content), PART_BYTES):
            part = content[offset : offset + PART_BYTES]
            if self._ask_raw("file_write_raw", part, id=begun, offset=offset) is None:
                data = base64.b64encode(part).decode()
                self._ask("file_write", id=begun, offset=offset, data=data)
        self._ask("file_write_end", id=begun)


def main() -> int:
    """Copy it; returns the exit status."""
    source, target = sys.argv[1:] if len(sys.argv) == 3 else ("", "")
    (from_vm, from_colon, from_path), (to_vm, to_colon, to_path) = (
        source.partition(":"),
        target.partition(":"),
    )
    if bool(from_colon) == bool(to_colon):
        sys.stderr.write("usage: copy_with_guest.py VM:/PATH FILE, or FILE VM:/PATH\n")
        return 2
    with Client() as client:
        if from_colon:
            with Path(target).open("wb") as file:
                for data in Guest(client, from_vm).read(from_path):
                    file.write(data)
        else:
            Guest(client, to_vm).write(to_path, Path(source).read_bytes())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (VchanError, OSError, EOFError) as error:  # the text says what, where and why
        sys.exit(f"copy_with_guest.py: {error}")
