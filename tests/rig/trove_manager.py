"""A datastore's manager on Trove's own base classes, without a database: see trove_parts."""

from typing import Any

from oslo_utils import timeutils
from trove.common import cfg, exception
from trove.conductor import api
from trove.guestagent.datastore import manager, service
from trove.instance import service_status
from trove_parts import note, noted


class Status(service.BaseDbStatus):  # type: ignore[misc]
    """Always well."""

    is_installed = True

    def __init__(self) -> None:
        super().__init__(None)

    def get_actual_db_status(self) -> Any:
        return service_status.ServiceStatuses.HEALTHY

    def set_status(self, status: Any, force: bool = False) -> None:
        super().set_status(status, force)
        note("sent a heartbeat")


class Manager(manager.Manager):  # type: ignore[misc]
    """Notes what it is asked."""

    docker_client = None
    configuration_manager = None

    def __init__(self) -> None:
        super().__init__("mysql")
        self.status = Status()

    def get_service_status(self) -> Any:
        return service_status.ServiceStatuses.HEALTHY

    def prepare(self, context: Any, *_: Any, **__: Any) -> None:
        note("prepare", context.user_id, context.project_id)
        # As the real ones end it: a cast tells the conductor. The next would come in a minute.
        self.status.set_status(service_status.ServiceStatuses.HEALTHY, force=True)

    def create_user(self, context: Any, users: Any) -> None:
        note("create_user", users[0]["_name"])

    def list_users(self, context: Any, **_: Any) -> Any:
        names = [words[1] for words in noted() if words[0] == "create_user"]
        return [{"_name": name, "_host": "%"} for name in names], None

    def get_user(self, context: Any, username: str, hostname: str) -> None:
        raise exception.UserNotFound(uuid=username)

    def create_backup(self, context: Any, backup_info: Any) -> None:
        # As the real ones do it, around a container that makes the backup.
        conductor = api.API(context)
        for state in ("BUILDING", "COMPLETED"):
            conductor.update_backup(
                cfg.CONF.guest_id,
                sent=timeutils.utcnow_ts(microsecond=True),
                backup_id=backup_info["id"],
                size=backup_info["size"],
                state=state,
            )
