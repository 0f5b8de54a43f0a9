"""A service of the control plane that calls what it is told to, by unmodified oslo.messaging.

In a process of its own: oslo.messaging starts threads that nothing ends. Lines in and out are JSON:
[topic, server, method, args] in; ["ok", result] or ["failed", class, text] out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
CALL_TIMEOUT_S = 60


class CallFailed(Exception):
    """The method raised, or was not reached."""

    def __init__(self, kind: str, text: str) -> None:
        self.kind = kind
        super().__init__(f"{kind}: {text}")


class Caller:
    """The process.

    Args:
        url: The broker's.
        log: For its standard error.
        modules: Whose exceptions it rebuilds, if a callee says that it raised one.
    """

    def __init__(self, url: str, log: Path, *, modules: Sequence[str] = ()) -> None:
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.rig.caller", url, *modules],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def call(self, topic: str, server: str, method: str, **args: Any) -> Any:
        """Call a method and return its result.

        Raises:
            CallFailed: It raised, or was not reached.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([topic, server, method, args]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the caller has ended: see {self._log.name}"
        kind, *rest = json.loads(line)
        if kind != "ok":
            raise CallFailed(*rest)
        return rest[0]

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def main() -> None:
    """The process's own program."""
    import oslo_messaging
    from oslo_config import cfg

    conf = cfg.CONF
    conf([])
    url, *modules = sys.argv[1:]
    transport = oslo_messaging.get_rpc_transport(conf, url=url, allowed_remote_exmods=modules)
    for line in sys.stdin:
        topic, server, method, args = json.loads(line)
        client = oslo_messaging.get_rpc_client(transport, oslo_messaging.Target(topic=topic))
        try:
            result = client.prepare(server=server, timeout=CALL_TIMEOUT_S).call({}, method, **args)
            answer = ["ok", result]
        except Exception as error:  # noqa: BLE001 - told to who asked
            kind = getattr(error, "exc_type", None) or type(error).__name__
            answer = ["failed", kind, str(error)]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
