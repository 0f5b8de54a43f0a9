"""OpenStack's APIs, by plain HTTP: what is asked stands here."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.cloud.settings import AUTH_URL, GLANCE, NEUTRON, NOVA, PASSWORD, PLACEMENT
from tests.rig import RigError, wait_until

MICROVERSION: Final = "2.96"
"""nova's API of 2024.1 and later."""
REQUEST_TIMEOUT_S: Final = 120.0
STATUS_TIMEOUT_S: Final = 240.0
POLL_S: Final = 0.3
JSON: Final = "application/json"

TENANTS: Final = ("blue", "green")
"""Projects, each with a user of its name."""
SERVICES: Final = {
    "placement": ("placement", PLACEMENT, ""),
    "glance": ("image", GLANCE, ""),
    "nova": ("compute", NOVA, "/v2.1"),
    "neutron": ("network", NEUTRON, ""),
}


class Refused(RigError):
    """An API answered with an error.

    Args:
        status: HTTP's.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Api:
    """One service, for the holder of one token."""

    def __init__(
        self, base: str, token: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        self._base = base
        self._headers = {"X-Auth-Token": token} if token else {}
        self._headers |= headers or {}

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """JSON there and back."""
        data = None if body is None else json.dumps(body).encode()
        return self.send(method, path, data)[0]

    def send(
        self, method: str, path: str, data: bytes | None, content_type: str = JSON
    ) -> tuple[Any, Mapping[str, str]]:
        """Bytes there, JSON and headers back.

        Raises:
            Refused: It answered with an error.
        """
        headers = dict(self._headers)
        if data is not None:
            headers["Content-Type"] = content_type
        request = urllib.request.Request(
            self._base + path, data=data, method=method, headers=headers
        )
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:
                text = answer.read()
                return (json.loads(text) if text else None), answer.headers
        except urllib.error.HTTPError as error:
            with error:
                said = error.read().decode(errors="replace")[:600]
            raise Refused(error.code, f"{method} {self._base}{path}: {error.code} {said}") from None


def answers(port: int) -> bool:
    """Whether something there speaks HTTP."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
    except urllib.error.HTTPError as error:
        error.close()
    except OSError:
        return False
    return True


def authenticate(user: str, project: str) -> tuple[str, str]:
    """A token, and the project's id."""
    domain = {"id": "default"}
    body = {
        "auth": {
            "identity": {
                "methods": ["password"],
                "password": {"user": {"name": user, "domain": domain, "password": PASSWORD}},
            },
            "scope": {"project": {"name": project, "domain": domain}},
        }
    }
    answer, headers = Api(AUTH_URL).send("POST", "/auth/tokens", json.dumps(body).encode())
    return headers["X-Subject-Token"], answer["token"]["project"]["id"]


def make_accounts() -> None:
    """The services' users and endpoints, and tenants."""
    keystone = Api(AUTH_URL, authenticate("admin", "admin")[0])
    roles = {role["name"]: role["id"] for role in keystone.ask("GET", "/roles")["roles"]}

    def project(name: str) -> str:
        body = {"project": {"name": name, "domain_id": "default"}}
        return str(keystone.ask("POST", "/projects", body)["project"]["id"])

    def user(name: str, of: str, *names: str) -> None:
        body = {"user": {"name": name, "domain_id": "default", "password": PASSWORD}}
        made = keystone.ask("POST", "/users", body)["user"]["id"]
        for role in names:
            keystone.ask("PUT", f"/projects/{of}/users/{made}/roles/{roles[role]}")

    service = project("service")
    for name, (kind, port, path) in SERVICES.items():
        user(name, service, "admin", "service")
        body = {"service": {"name": name, "type": kind}}
        made = keystone.ask("POST", "/services", body)["service"]["id"]
        endpoint = {
            "interface": "public",
            "region_id": "RegionOne",
            "service_id": made,
            "url": f"http://127.0.0.1:{port}{path}",
        }
        for interface in ("public", "internal", "admin"):
            keystone.ask("POST", "/endpoints", {"endpoint": {**endpoint, "interface": interface}})
    for name in TENANTS:
        user(name, project(name), "member", "reader")


@dataclass(frozen=True, slots=True)
class Images:
    """What servers are made of: ids."""

    plain: str
    qga: str
    """As `plain`, with hw_qemu_guest_agent=yes."""
    small: str
    large: str


class Nova:
    """nova's API, for one user; an admin may do more.

    Args:
        user: Also the project's name.
    """

    def __init__(self, user: str) -> None:
        token, self.project = authenticate(user, user)
        version = {"OpenStack-API-Version": f"compute {MICROVERSION}"}
        self._api = Api(f"http://127.0.0.1:{NOVA}/v2.1", token, version)
        self._glance = Api(f"http://127.0.0.1:{GLANCE}", token)

    def make_images(self, kernel: Path, initrd: Path, disk: Path, command_line: str) -> Images:
        """The images and flavors of all servers."""
        common = {
            "kernel_id": self._image("kernel", kernel, disk_format="aki", container_format="aki"),
            "ramdisk_id": self._image("initrd", initrd, disk_format="ari", container_format="ari"),
            "os_command_line": command_line,
            # Without it, as nova has it, a kernel finds no timer on a busy host without KVM.
            "hw_time_hpet": "true",
        }
        return Images(
            plain=self._image("plain", disk, **common),
            qga=self._image("qga", disk, hw_qemu_guest_agent="yes", **common),
            small=self._flavor("small", 256),
            large=self._flavor("large", 320),
        )

    def _image(self, name: str, path: Path, **properties: str) -> str:
        body = {"name": name, "visibility": "public", "container_format": "bare"}
        body |= {"disk_format": "raw", **properties}
        made = str(self._glance.ask("POST", "/v2/images", body)["id"])
        content = path.read_bytes()
        self._glance.send("PUT", f"/v2/images/{made}/file", content, "application/octet-stream")
        return made

    def _flavor(self, name: str, ram_mib: int) -> str:
        body = {"name": name, "id": name, "ram": ram_mib, "vcpus": 1, "disk": 1}
        return str(self._api.ask("POST", "/flavors", {"flavor": body})["flavor"]["id"])

    def create(self, name: str, image: str, flavor: str) -> str:
        """A server that is being made; its UUID."""
        body = {"name": name, "imageRef": image, "flavorRef": flavor, "networks": "none"}
        return str(self._api.ask("POST", "/servers", {"server": body})["server"]["id"])

    def server(self, uuid: str) -> Any:
        """All that nova tells of it."""
        return self._api.ask("GET", f"/servers/{uuid}")["server"]

    def host(self, uuid: str) -> str:
        """Where it is; for an admin."""
        return str(self.server(uuid)["OS-EXT-SRV-ATTR:host"])

    def act(self, uuid: str, action: str, arguments: Any = None) -> None:
        """Ask for an action; nova has begun it when this returns."""
        self._api.ask("POST", f"/servers/{uuid}/action", {action: arguments})

    def wait(self, uuid: str, status: str) -> None:
        """Wait until a server has this status, and nova does nothing with it.

        Raises:
            RigError: It is in ERROR, or took over STATUS_TIMEOUT_S.
        """
        last = ""

        def is_so() -> bool:
            nonlocal last
            server = self.server(uuid)
            task = server.get("OS-EXT-STS:task_state")
            last = f"{server['status']}, {task}"
            if server["status"] == "ERROR" and status != "ERROR":
                raise RigError(f"nova has {uuid} in ERROR: {server.get('fault')}")
            return bool(server["status"] == status and task is None)

        wait_until(
            is_so,
            timeout_s=STATUS_TIMEOUT_S,
            interval_s=POLL_S,
            failure=lambda: f"{uuid} is {last} after {STATUS_TIMEOUT_S:.0f} s, not {status}",
        )

    def do(self, uuid: str, action: str, status: str, arguments: Any = None) -> None:
        """Ask for an action, and wait until it has led to this status."""
        self.act(uuid, action, arguments)
        self.wait(uuid, status)

    def delete(self, uuid: str) -> None:
        """Delete a server, and wait until it is gone."""
        self._api.ask("DELETE", f"/servers/{uuid}")

        def is_gone() -> bool:
            try:
                self.server(uuid)
            except Refused as error:
                return error.status == 404
            return False

        wait_until(
            is_gone,
            timeout_s=STATUS_TIMEOUT_S,
            interval_s=POLL_S,
            failure=lambda: f"{uuid} is still there after {STATUS_TIMEOUT_S:.0f} s",
        )

    def abort_live_migration(self, uuid: str) -> None:
        """Wait until a live migration is under way, and end it."""
        running: list[int] = []

        def is_running() -> bool:
            rows = self._api.ask("GET", f"/servers/{uuid}/migrations")["migrations"]
            running[:] = [row["id"] for row in rows if row["status"] == "running"]
            return bool(running)

        wait_until(
            is_running,
            timeout_s=STATUS_TIMEOUT_S,
            interval_s=POLL_S,
            failure=lambda: f"no live migration of {uuid} is under way",
        )
        self._api.ask("DELETE", f"/servers/{uuid}/migrations/{running[0]}")

    def service_is_up(self, host: str) -> bool:
        """Whether nova believes that a compute service runs."""
        path = f"/os-services?binary=nova-compute&host={host}"
        return any(row["state"] == "up" for row in self._api.ask("GET", path)["services"])
