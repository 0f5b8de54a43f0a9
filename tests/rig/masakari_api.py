"""masakari's own API on loopback, with its database and checks. nova and its engine are not there.

    python masakari_api.py DIRECTORY PORT HOSTNAME

Run by the interpreter of an environment that has masakari. `/seen` is what came, with whether the
engine would act on it.
"""

import json
import sys
from pathlib import Path
from typing import Any
from wsgiref.simple_server import make_server

directory, port, hostname = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
paste = Path(sys.prefix) / "etc" / "masakari" / "api-paste.ini"
configuration = directory / "masakari.conf"
configuration.write_text(
    f"""[DEFAULT]
auth_strategy = noauth2
transport_url = fake:///
state_path = {directory}
[database]
connection = sqlite:///{directory}/masakari.sqlite
[taskflow]
connection = sqlite:///{directory}/taskflow.sqlite
[wsgi]
api_paste_config = {paste}
[oslo_messaging_notifications]
driver = noop
"""
)

from masakari import config, context, objects, rpc  # noqa: E402
from masakari.conf import CONF  # noqa: E402

config.parse_args(["masakari", "--config-file", str(configuration)])
objects.register_all()
rpc.init(CONF)

from masakari.db.sqlalchemy import migration  # noqa: E402

migration.db_sync()
admin = context.get_admin_context()
segment = objects.FailoverSegment(
    context=admin, name="segment", service_type="compute", recovery_method="auto", enabled=True
)
segment.create()
host = objects.Host(
    context=admin,
    name=hostname,
    failover_segment=segment,
    type="COMPUTE",
    control_attributes="SSH",
    on_maintenance=False,
    reserved=False,
)
host.create()

from masakari.engine.instance_events import is_valid_event  # noqa: E402
from paste import deploy  # noqa: E402

app = deploy.loadapp(f"config:{paste}", name="masakari_api")


def serve(environ: dict[str, Any], start_response: Any) -> Any:
    if environ["PATH_INFO"] == "/seen":
        found = objects.NotificationList.get_all(admin, filters={})
        rows = [
            {"status": each.status, "payload": each.payload, "acts": is_valid_event(each.payload)}
            for each in found
        ]
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(rows).encode()]
    return app(environ, start_response)


with make_server("127.0.0.1", port, serve) as server:
    print("ready", flush=True)
    server.serve_forever()
