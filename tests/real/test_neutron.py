"""neutron-metering-agent from PyPI, unmodified, on vchan://; the control side on rabbit:// with
neutron's own library. docs/oslo.md has what is set here.

Eventlet patches nothing of it in this release.
"""

from __future__ import annotations

import json
import re
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import pytest

from tests.rig import rig_directory
from tests.rig.environment import environment
from tests.rig.rabbit import RabbitServer
from tests.rig.requirements import missing_for_rabbit
from tests.rig.service_guest import TIMEOUT_S, VM, ServiceGuest, block_of_page

MISSING = missing_for_rabbit()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

ROOT: Final = Path(__file__).parents[2]
NEUTRON: Final = "29.0.0"
REPORT_S: Final = 2
CASTS: Final = 5


@pytest.fixture(scope="module")
def python() -> Path:
    """The Python of an environment with neutron, made once."""
    return environment("neutron", [f"neutron=={NEUTRON}"], vchan=True)


class Cloud(ServiceGuest):
    """A control side with neutron's RPC, and a compute host's parts."""

    def __init__(self, directory: Path, rabbit: RabbitServer, python: Path) -> None:
        super().__init__(directory, rabbit)
        self.python = python

    def server(self) -> AbstractContextManager[subprocess.Popen[str]]:
        conf = self.file("server.conf", "[DEFAULT]", f"transport_url = {self.rabbit.url}")
        program = ROOT / "tests" / "rig" / "neutron_server.py"
        command = [str(self.python), "-W", "ignore", str(program), "--config-file", str(conf)]
        return self.process("server", command, talks=True)

    def agent(self) -> AbstractContextManager[subprocess.Popen[str]]:
        conf = self.file(
            "agent.conf",
            block_of_page("oslo.md", "neutron.conf")
            .replace("/run/vchan/agent.sock", str(self.agent_socket))
            .replace("VM_UUID", VM),
            f"state_path = {self.directory}",
            "rpc_response_timeout = 20",
            "debug = true",
            "[agent]",
            f"report_interval = {REPORT_S}",
            "root_helper =",
            "[oslo_concurrency]",
            f"lock_path = {self.directory}",
        )
        assert "rabbit" not in conf.read_text()
        return self.process(
            "agent", [self.python.with_name("neutron-metering-agent"), "--config-file", conf]
        )

    def with_neutron(self, name: str) -> AbstractContextManager[subprocess.Popen[str]]:
        """A vchan-host, with the page's policy and no more."""
        policy = block_of_page("oslo.md", "/etc/vchan/policy.d/50-neutron.policy")
        return self.host(name, {"50-neutron": policy})

    def asked(self, what: str) -> list[list[Any]]:
        """Of the endpoints."""
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [noted for noted in map(json.loads, lines) if noted[0] == what]

    def removed(self) -> list[str]:
        """Routers that the agent was told of, in the order in which it told its driver."""
        log = (self.directory / "agent.out").read_text()
        return re.findall(r"method remove_router called with arguments .*'(\w+)'\) \{", log)


def tell(server: subprocess.Popen[str], how: str, method: str, **arguments: Any) -> Any:
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps([how, method, arguments]) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def test_the_metering_agent_unmodified(python: Path) -> None:
    with rig_directory() as directory, RabbitServer(directory / "rabbit") as rabbit:
        cloud = Cloud(directory, rabbit, python)
        try:
            run(cloud)
        except BaseException:
            print(cloud.logs())
            raise


def run(cloud: Cloud) -> None:
    with cloud.server() as server, cloud.guest_daemon():
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        with cloud.agent() as agent:
            with cloud.with_neutron("one"):
                cloud.wait_for(lambda: bool(cloud.asked("get_sync_data_metering")))
                cloud.wait_for(lambda: len(cloud.asked("report_state")) >= 2)
                _, is_admin, state = cloud.asked("report_state")[0]
                assert state == {"binary": "neutron-metering-agent", "host": VM}
                assert not is_admin, "a guest's word does not make it an administrator"
                assert tell(server, f"call:{VM}", "routers_updated", routers=[]) == [True, None]
                for number in range(CASTS):
                    assert tell(server, f"cast:{VM}", "router_deleted", router_id=f"r{number}")[0]
                cloud.wait_for(lambda: len(cloud.removed()) == CASTS)
                assert tell(server, "fanout", "router_deleted", router_id="all")[0]
                cloud.wait_for(lambda: len(cloud.removed()) == CASTS + 1)
            for number in range(CASTS, 2 * CASTS):  # nobody has the VM
                assert tell(server, f"cast:{VM}", "router_deleted", router_id=f"r{number}")[0]
            reported = len(cloud.asked("report_state"))
            with cloud.with_neutron("two"):
                cloud.wait_for(lambda: len(cloud.asked("report_state")) > reported)
                cloud.wait_for(lambda: len(cloud.removed()) == 2 * CASTS + 1)
                assert tell(server, f"call:{VM}", "routers_updated", routers=[]) == [True, None]
                numbers = [f"r{number}" for number in range(2 * CASTS)]
                assert cloud.removed() == [*numbers[:CASTS], "all", *numbers[CASTS:]]
            agent.terminate()
            assert agent.wait(TIMEOUT_S) == 0
