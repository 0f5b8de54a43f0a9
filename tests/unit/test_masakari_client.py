"""vchan-masakari's client, by whichever openstacksdk is installed: what goes out."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vchan.host.ops.masakari import connect

pytest.importorskip("openstack", reason='openstacksdk is not installed: "vchan[masakari]"')

Seen = list[tuple[str, Any]]


@pytest.fixture
def api() -> Iterator[tuple[str, Seen]]:
    """The address of what takes all notifications, and those that came."""
    seen: Seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            here = {"rel": "self", "href": f"http://{self.headers['Host']}/v1/"}
            self._answer({"versions": [{"id": "v1.0", "status": "CURRENT", "links": [here]}]})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, json.loads(body)))
            self._answer({"notification": {"notification_uuid": "0"}})

        def _answer(self, told: Any) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(told).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
        server.shutdown()
        thread.join()


def test_a_notification_goes_to_the_clouds_api(
    api: tuple[str, Seen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, seen = api
    cloud = {"auth_type": "none", "instance_ha_endpoint_override": url}
    (tmp_path / "clouds.yaml").write_text(json.dumps({"clouds": {"test": cloud}}))
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "clouds.yaml"))
    told = {
        "type": "VM",
        "hostname": "host1",
        "generated_time": "2026-01-01T00:00:00.000000",
        "payload": {"event": "QEMU_GUEST_AGENT_ERROR"},
    }
    connect("test")(told)
    assert seen == [("/v1/notifications", {"notification": told})]
