"""Trove, as it is installed from PyPI: its programs, run by Trove's own Python.

    python3 trove_parts.py guest     --config-file FILE     the guest's agent, on a manager of ours
    python3 trove_parts.py conductor --config-file FILE
    python3 trove_parts.py make      --config-file FILE     an instance in the database: ID KEY
    python3 trove_parts.py tell ID   --config-file FILE     task manager's side, by lines of JSON

What is not Trove's: the datastore's manager, which notes what it is asked in $JOURNAL instead of
running a database; and in the guest, no user is created and no disk is formatted.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def note(*words: object) -> None:
    """A line of the journal."""
    with Path(os.environ["JOURNAL"]).open("a") as journal:
        journal.write(json.dumps(words) + "\n")


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
    """An instance, by Trove's models."""
    _configure()
    from trove.instance import models, service_status, tasks

    made = models.DBInstance.create(
        name="db1",
        tenant_id="t",
        task_status=tasks.InstanceTasks.NONE,
        compute_instance_id="none",
        datastore_version_id=None,
        flavor_id="1",
    )
    models.InstanceServiceStatus.create(
        instance_id=made.id, status=service_status.ServiceStatuses.NEW
    )
    print(made.id, made.key.decode() if isinstance(made.key, bytes) else made.key)


def tell(instance: str) -> None:
    """Trove's own API; a line of standard input is [METHOD, ARGUMENT...], its answer a line."""
    import trove.cmd  # noqa: F401 - patches this process, as its services are

    _configure()
    from trove import rpc
    from trove.common import cfg
    from trove.common.context import TroveContext
    from trove.guestagent.api import API

    rpc.init(cfg.CONF)
    context = TroveContext(user_id="u1", project_id="p1", auth_token="SECRET", is_admin=True)
    api = API(context, instance)
    for line in sys.stdin:
        method, *args = json.loads(line)
        try:
            said: Any = [True, getattr(api, method)(*args)]
        except Exception as error:  # noqa: BLE001 - it is the answer
            said = [False, f"{type(error).__name__}: {error}"]
        print(json.dumps(said, default=str), flush=True)


def _configure() -> None:
    from trove.common import cfg

    cfg.parse_args([sys.argv[0], *sys.argv[-2:]])
    from trove.db import get_db_api

    get_db_api().configure_db()


if __name__ == "__main__":
    word, *rest = sys.argv[1:-2]
    sys.argv[1:-2] = []
    sys.path.insert(0, str(Path(__file__).parent))  # where the manager is
    if word == "tell":
        tell(*rest)
    else:
        {"guest": guest, "conductor": conductor, "make": make}[word]()
