"""The control side of neutron's metering agent, on neutron's own library of RPC.

    python3 neutron_server.py --config-file FILE

Its endpoints stand for neutron-server's. What they are asked is a line of JSON in $JOURNAL.
A line of standard input is [HOW, METHOD, ARGUMENTS], sent to the agents: HOW is "call:SERVER",
"cast:SERVER" or "fanout". The answer is a line of standard output.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import oslo_messaging
from neutron.common import config
from neutron_lib import constants, context
from neutron_lib import rpc as neutron_rpc
from neutron_lib.agent import topics
from oslo_config import cfg

CALL_S = 20


def note(what: str, asked_by: Any, **others: Any) -> None:
    """A line of the journal."""
    with Path(os.environ["JOURNAL"]).open("a") as journal:
        journal.write(json.dumps([what, asked_by.is_admin, others]) + "\n")


class Reports:
    """Of all agents: that they live."""

    target = oslo_messaging.Target(version="1.4", namespace=constants.RPC_NAMESPACE_STATE)

    def has_alive_neutron_server(self, context: Any, **_: Any) -> bool:
        """An agent asks before it begins."""
        return True

    def report_state(self, context: Any, **given: Any) -> str:
        """At each interval."""
        state = given["agent_state"]["agent_state"]
        note("report_state", context, binary=state["binary"], host=state["host"])
        return "new"


class Metering:
    """Of the metering agent."""

    target = oslo_messaging.Target(version="1.0")

    def get_sync_data_metering(self, context: Any, **given: Any) -> list[Any]:
        """What is to be metered: nothing."""
        note("get_sync_data_metering", context, host=given["host"])
        return []


def tell(client: Any, how: str, method: str, arguments: dict[str, Any]) -> Any:
    """To the agents."""
    kind, _, server = how.partition(":")
    admin = context.get_admin_context()
    if kind == "call":
        return client.prepare(server=server, timeout=CALL_S).call(admin, method, **arguments)
    target = client.prepare(fanout=True) if kind == "fanout" else client.prepare(server=server)
    target.cast(admin, method, **arguments)
    return None


def main() -> None:
    """See the top of this file."""
    config.register_common_config_options()
    config.init(sys.argv[1:])
    neutron_rpc.init(cfg.CONF)
    connection = neutron_rpc.Connection()
    connection.create_consumer(topics.REPORTS, [Reports()], fanout=False)
    connection.create_consumer(topics.METERING_PLUGIN, [Metering()], fanout=False)
    connection.consume_in_threads()
    target = oslo_messaging.Target(topic=topics.METERING_AGENT, version="1.0")
    client = neutron_rpc.get_client(target)
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            answer: Any = [True, tell(client, *json.loads(line))]
        except Exception as error:  # noqa: BLE001 - whatever the caller is told
            answer = [False, f"{type(error).__name__}: {error}"]
        print(json.dumps(answer), flush=True)
    os._exit(0)  # its threads listen for ever


main()
