"""Unmodified oslo.messaging at both ends: on RabbitMQ at one, on vchan:// in a real VM at the
other."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.rig import wait_until
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit

if TYPE_CHECKING:
    from tests.rig.cloud import Cloud, Vm

MISSING = missing_for_rabbit() or missing_for_libvirt()
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]

RIG = Path(__file__).parents[1] / "rig"
JOURNAL = "/run/ran"


class Control:
    """A service of the control side."""

    def __init__(self) -> None:
        self.noted: Counter[int] = Counter()
        self.doubled: Counter[int] = Counter()

    def note(self, ctxt: Any, number: int) -> None:
        self.noted[number] += 1

    def double(self, ctxt: Any, number: int) -> int:
        self.doubled[number] += 1
        return 2 * number


@pytest.fixture
def vm(cloud: Cloud) -> Iterator[Vm]:
    """With an agent that is an oslo.messaging program."""
    from tests.rig import oslo_image
    from tests.rig.cloud import TOPIC, Vm
    from tests.rig.compute import GUEST_DAEMON, agent_service
    from tests.rig.guest_image import build

    problem = oslo_image.can_carry()
    if problem:
        pytest.skip(problem)
    programs = {f"app/{name}": RIG / name for name in ("oslo_agent.py", "counting_agent.py")}
    image = build({**oslo_image.files(), **programs}).staged(cloud.directory)
    words = [f"/{oslo_image.CONFIG}", TOPIC, JOURNAL]
    services = [GUEST_DAEMON, agent_service("agent", "/app/oslo_agent.py", *words)]
    vm = Vm(cloud, "oslo", cloud.a.start_vm("oslo", image, services, memory_mib=384))
    vm.wait_ready()
    yield vm
    vm.discard()


@pytest.fixture
def oslo() -> Any:
    with warnings.catch_warnings():  # their modules warn about their own future
        warnings.simplefilter("ignore")
        import oslo_messaging
        from oslo_config import cfg

        cfg.CONF([], default_config_files=[])
    return oslo_messaging


def test_both_ways_through_a_live_migration(vm: Vm, cloud: Cloud, oslo: Any) -> None:
    from oslo_config import cfg

    from tests.rig.cloud import TOPIC

    control = Control()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        transport = oslo.get_rpc_transport(cfg.CONF, cloud.url)
        server = oslo.get_rpc_server(transport, oslo.Target(topic="control", server="c"), [control])
        server.start()
        client = oslo.get_rpc_client(
            transport, oslo.Target(topic=TOPIC, server=vm.uuid), timeout=90
        )
        try:
            with pytest.raises(LookupError, match="not here") as raised:
                client.call({}, "fail", text="not here")
            assert raised.value.args[1] == 7
            assert "oslo_agent.py" in str(raised.value)  # the agent's own traceback
            client.call({}, "start_asking")
            with vm.traffic(callers=2, casts_per_s=20, fanouts_per_s=2) as traffic:
                before = sum(control.noted.values())
                vm.migrate()
                vm.wait_ready()
                traffic.flows()
                report = traffic.finish()
            asked = client.call({}, "stop_asking")
            # The broker has what was cast; it may not have run yet.
            wait_until(
                lambda: len(control.noted) >= asked["casts"],
                timeout_s=60,
                interval_s=0.1,
                failure=lambda: f"{len(control.noted)} of {asked['casts']} casts ran",
            )
        finally:
            server.stop()
            server.wait()
            transport.cleanup()
    report.check()
    assert asked["errors"] == []
    assert sum(control.noted.values()) > before
    assert set(control.noted.values()) == set(control.doubled.values()) == {1}
    assert len(control.noted) == asked["casts"] > 0
    assert len(control.doubled) == asked["calls"] > 0
