"""The least of neutron that nova asks for when no server has a network: that there is nothing.

    python neutron.py PORT

nova asks for extensions and ports all the same: for a server's addresses, migrations and quotas.
"""

import http.server
import json
import sys
from typing import Any

KINDS = ("ports", "networks", "subnets", "floatingips", "security_groups", "agents")
EXTENSIONS: list[dict[str, Any]] = [
    {
        "alias": name,
        "name": name,
        "description": "",
        "links": [],
        "updated": "2016-01-01T00:00:00-00:00",
    }
    for name in ("binding", "binding-extended", "security-group", "agent", "multi-provider")
]


def answer(path: str) -> dict[str, Any] | None:
    """What there is at a path; None: nothing."""
    kind = path.rpartition("/")[2].removesuffix(".json").replace("-", "_")
    if kind == "extensions":
        return {"extensions": EXTENSIONS}
    if path in ("", "/v2.0"):
        return {"versions": [{"id": "v2.0", "status": "CURRENT", "links": []}]}
    return {kind: []} if kind in KINDS else None


class Handler(http.server.BaseHTTPRequestHandler):
    """GET alone finds something."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """An answer, or 404."""
        path = self.path.partition("?")[0].rstrip("/")
        found = answer(path)
        if found is None:
            self._refuse(path)
        else:
            self._reply(200, found)

    def do_other(self) -> None:
        """404, when the body is read."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._refuse(self.path)

    do_POST = do_PUT = do_DELETE = do_other  # noqa: N815

    def _refuse(self, path: str) -> None:
        error = {"type": "NotFound", "message": path, "detail": ""}
        self._reply(404, {"NeutronError": error})

    def _reply(self, status: int, found: dict[str, Any]) -> None:
        body = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
