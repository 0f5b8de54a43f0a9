"""Trove, as it is installed from PyPI: its programs, run by Trove's own Python.

    trove_parts.py guest CONFIG       the guest's agent, on a manager of ours
    trove_parts.py conductor CONFIG
    trove_parts.py make CONFIG        an instance in the database: a line, [ID, {file: text}],
                                      with what the task manager has nova put into its VM
    trove_parts.py tell ID CONFIG     task manager's side, by lines of JSON
    trove_parts.py trace CONFIG       what the guest's agent needs, {path in the guest: file here}

CONFIG is --config-file FILE or --config-dir DIRECTORY. What is not Trove's: the datastore's
manager, which notes what it is asked in $JOURNAL instead of running a database; a conductor's
manager that notes what reaches it, and is Trove's in all else; and in the guest, no user is created
and no disk is formatted.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

BACKUP = "b0"
"""The backup that the instance has."""


def note(*words: object) -> None:
    """A line of the journal."""
    with Path(os.environ["JOURNAL"]).open("a") as journal:
        journal.write(json.dumps(words) + "\n")


def noted() -> list[list[Any]]:
    """Its lines."""
    return [json.loads(line) for line in Path(os.environ["JOURNAL"]).read_text().splitlines()]


def guest() -> None:
    """Trove's own `main`."""
    import trove.cmd.guest as program  # patches this process by eventlet

    class Disk:
        """One that is mounted."""

        def __init__(self, _: str) -> None:
            pass

        def mount_points(self, _: str) -> list[str]:
            return ["/"]

    program.volume.VolumeDevice = Disk
    program.operating_system.create_user = lambda *_, **__: None
    sys.exit(program.main())


def conductor() -> None:
    """Trove's own `main`."""
    from trove.cmd.conductor import main

    sys.exit(main())


def make() -> None:
    """An instance and its backup, by Trove's models."""
    from trove.cmd.common import initialize

    initialize()
    from trove.backup.models import DBBackup
    from trove.common.context import TroveContext
    from trove.datastore import models as datastores
    from trove.instance import models, service_status, tasks

    datastores.update_datastore("mysql", "")
    datastores.update_datastore_version("mysql", "8.0", "mysql", "an-image", None, "", 1)
    version = datastores.DBDatastoreVersion.find_by(name="8.0")
    made = models.DBInstance.create(
        name="db1",
        tenant_id="t",
        task_status=tasks.InstanceTasks.NONE,
        datastore_version_id=version.id,
        flavor_id="1",
    )
    status = models.InstanceServiceStatus.create(
        instance_id=made.id, status=service_status.ServiceStatuses.NEW
    )
    DBBackup.create(id=BACKUP, name=BACKUP, instance_id=made.id, tenant_id="t", state="NEW")
    instance = models.FreshInstance(TroveContext(is_admin=True), made, None, status)
    print(json.dumps([made.id, instance.get_injected_files("mysql", "8.0")]))


def tell(instance: str) -> None:
    """Trove's own API; a line of standard input is [METHOD, ARGUMENT...], its answer a line."""
    from trove.cmd.common import initialize  # patches this process, as its services are

    initialize()
    from trove.common.context import TroveContext
    from trove.guestagent.api import API

    context = TroveContext(user_id="u1", project_id="p1", auth_token="SECRET", is_admin=True)
    api = API(context, instance)
    for line in sys.stdin:
        method, *args = json.loads(line)
        try:
            said: Any = [True, getattr(api, method)(*args)]
        except Exception as error:  # noqa: BLE001 - it is the answer
            said = [False, f"{type(error).__name__}: {error}"]
        print(json.dumps(said, default=str), flush=True)


def trace() -> None:
    """All that `guest` does before the first request comes."""
    import eventlet.hubs
    import loaded  # type: ignore[import-not-found,unused-ignore]
    import oslo_messaging
    import trove.cmd.guest  # noqa: F401 - what it imports
    from trove import rpc
    from trove.common import cfg
    from trove.common.context import TroveContext
    from trove.common.rpc import service
    from trove.conductor.api import API
    from trove.guestagent import dbaas

    cfg.parse_args([sys.argv[0], *sys.argv[-2:]])
    eventlet.hubs.get_hub()
    manager = dbaas.datastore_registry()["mysql"]
    rpc.init(cfg.CONF)
    service.RpcService(key="k" * 32, topic="t", manager=manager, host="h", rpc_api_version="1.0")
    rpc.get_server(oslo_messaging.Target(topic="t", server="s"), [], key="k" * 32)
    API(TroveContext()).client.serializer.serialize_context(TroveContext())
    print(json.dumps(loaded.files("eventlet", "oslo_log", "trove/common", "trove/guestagent")))


if __name__ == "__main__":
    word, *rest = sys.argv[1:-2]
    sys.argv[1:-2] = []
    sys.path.insert(0, str(Path(__file__).parent))  # where the managers are
    if word == "tell":
        tell(*rest)
    else:
        {"guest": guest, "conductor": conductor, "make": make, "trace": trace}[word]()
