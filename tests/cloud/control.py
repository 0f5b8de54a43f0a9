"""The control side: database, keystone, placement, glance, neutron's stub, nova."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Final

from tests.cloud import openstack, settings
from tests.cloud.processes import Processes
from tests.cloud.settings import Place, database_url
from tests.rig import NOBODY, Account

WSGI: Final = (
    *("--master", "--processes", "1", "--threads", "8", "--lazy-apps", "--die-on-term"),
    *("--need-app", "--disable-logging", "--buffer-size", "65535"),
    # Without these two a connection whose body the program did not read is reset: placement then
    # fails now and then, and servers are in ERROR ("Exhausted all hosts").
    *("--post-buffering", "65536", "--add-header", "Connection: close"),
)


class Control:
    """The control side of a cloud.

    Args:
        kept: Where its databases are kept, when they have been made.
    """

    def __init__(self, place: Place, processes: Processes, kept: Path) -> None:
        self._place = place
        self._processes = processes
        self._kept = kept / "databases"
        self._keys = place.base / "keys"
        self._data = place.base / "db"

    @property
    def is_made(self) -> bool:
        """The databases are there from another time."""
        return self._kept.exists()

    def make(self) -> None:
        """Fill the databases, once: schemas, keystone's accounts, nova's cell; a minute or two."""
        run, program = self._processes.run, self._place.program
        self._data.mkdir(exist_ok=True)
        Account.first_of(NOBODY).own(self._data)
        run(
            [
                *("mariadb-install-db", "--no-defaults", f"--datadir={self._data}"),
                *(f"--user={NOBODY}", "--skip-test-db", "--skip-name-resolve"),
                "--auth-root-authentication-method=normal",
            ]
        )
        self._start_database()
        self._create_databases()
        nova: list[str | Path] = [
            program("nova-manage"),
            "--config-file",
            self._write_nova(settings.NO_BROKER),
        ]
        cell0 = database_url("nova_cell0")
        cell1 = ["--transport-url", settings.CELL_TRANSPORT]
        cell1 += ["--database_connection", database_url("nova")]
        run([*nova, "api_db", "sync"])
        run([*nova, "cell_v2", "map_cell0", "--database_connection", cell0])
        run([*nova, "db", "sync"])
        run([*nova, "cell_v2", "create_cell", "--name", "cell1", *cell1])
        conf = self._write("placement/placement.conf", settings.placement(self._place))
        run([program("placement-manage"), "--config-file", conf, "db", "sync"])
        conf = self._write("glance/glance-api.conf", settings.glance(self._place))
        run([program("glance-manage"), "--config-file", conf, "db_sync"])
        self._make_keystone()
        for name in ("keystone", "mariadb"):
            self._processes.stop(name)
        self._keep()

    def _make_keystone(self) -> None:
        conf = self._write("keystone/keystone.conf", settings.keystone(self._place))
        manage: list[str | Path] = [self._place.program("keystone-manage"), "--config-file", conf]
        owner = ["--keystone-user", "root", "--keystone-group", "root"]
        for name in ("fernet", "credential"):
            (self._keys / name).mkdir(mode=0o700, parents=True)
        run = self._processes.run
        run([*manage, "db_sync"])
        run([*manage, "fernet_setup", *owner])
        run([*manage, "credential_setup", *owner])
        urls = [
            word
            for kind in ("public", "internal", "admin")
            for word in (f"--bootstrap-{kind}-url", settings.AUTH_URL)
        ]
        password = ["--bootstrap-password", settings.PASSWORD]
        run([*manage, "bootstrap", *password, "--bootstrap-region-id", "RegionOne", *urls])
        self._start_keystone()
        openstack.make_accounts()

    def _keep(self) -> None:
        # Renamed when complete: another run may make them at the same time, and be first.
        with tempfile.TemporaryDirectory(dir=self._kept.parent) as holder:
            new = Path(holder) / "new"
            new.mkdir()
            for directory in (self._data, self._keys):
                shutil.move(directory, new / directory.name)
            with contextlib.suppress(OSError):
                new.rename(self._kept)

    def start(self, transport_url: str) -> None:
        """Start everything, from databases that are kept, and wait until it answers."""
        for directory in (self._data, self._keys):
            shutil.copytree(self._kept / directory.name, directory)
        Account.first_of(NOBODY).own(self._data)
        self._start_database()
        self._start_wsgi_services(transport_url)
        for name, port in (
            ("keystone", settings.KEYSTONE),
            ("placement", settings.PLACEMENT),
            ("glance", settings.GLANCE),
            ("nova-api", settings.NOVA),
        ):
            self._processes.wait_for(name, lambda port=port: openstack.answers(port))  # type: ignore[misc]

    def _start_wsgi_services(self, transport_url: str) -> None:
        place, program = self._place, self._place.program
        self._start_keystone(wait=False)
        conf = self._write("placement/placement.conf", settings.placement(place))
        where = {"OS_PLACEMENT_CONFIG_DIR": str(conf.parent)}
        self._wsgi("placement", "placement.wsgi.api", settings.PLACEMENT, where)
        conf = self._write("glance/glance-api.conf", settings.glance(place))
        (place.base / "images").mkdir()
        shutil.copy(place.venv / "etc/glance/glance-api-paste.ini", conf.parent)
        where = {"OS_GLANCE_CONFIG_DIR": str(conf.parent), "OS_GLANCE_CONFIG_FILES": conf.name}
        self._wsgi("glance", "glance.wsgi.api", settings.GLANCE, where)
        stub = Path(__file__).with_name("neutron.py")
        self._processes.start("neutron", [program("python"), stub, str(settings.NEUTRON)])
        conf = self._write_nova(transport_url)
        # Its directory is asked for exactly two files: this one and nova.conf.
        shutil.copy(place.venv / "etc/nova/api-paste.ini", conf.parent)
        where = {"OS_NOVA_CONFIG_DIR": str(conf.parent)}
        self._wsgi("nova-api", "nova.wsgi.osapi_compute", settings.NOVA, where)
        for service in ("conductor", "scheduler"):
            log: list[str | Path] = ["--log-file", place.logs / f"nova-{service}.log"]
            self._processes.start(
                f"nova-{service}", [program(f"nova-{service}"), "--config-file", conf, *log]
            )

    def has_hosts(self, names: list[str]) -> bool:
        """Put compute services that have come up into the cell; whether all of these are."""
        manage = self._nova_manage("cell_v2")
        self._processes.run([*manage, "discover_hosts"])
        listed = self._processes.run([*manage, "list_hosts"])
        return all(name in listed for name in names)

    def set_image_property(self, uuid: str, name: str, value: str) -> None:
        """What `vchan list` tells an operator to do with a server that is stopped."""
        manage = self._nova_manage("image_property")
        self._processes.run([*manage, "set", uuid, "--property", f"{name}={value}"])

    def _nova_manage(self, command: str) -> list[str | Path]:
        conf = self._place.etc / "control" / "nova.conf"
        return [self._place.program("nova-manage"), "--config-file", conf, command]

    # --- parts

    def _start_database(self) -> None:
        self._processes.start(
            "mariadb",
            [
                *("mariadbd", "--no-defaults", f"--datadir={self._data}", f"--user={NOBODY}"),
                *(f"--socket={self._data}/sock", f"--pid-file={self._data}/pid"),
                *("--bind-address=127.0.0.1", f"--port={settings.DATABASE}"),
                *("--skip-name-resolve", "--innodb-flush-log-at-trx-commit=0"),
                *("--innodb-buffer-pool-size=64M", "--max-connections=500"),
            ],
        )
        self._processes.wait_for("mariadb", lambda: _accepts(settings.DATABASE))

    def _create_databases(self) -> None:
        statements = [
            f"create database {name} character set utf8mb3" for name in settings.DATABASES
        ]
        program = (
            "import pymysql, sys\n"
            "cursor = pymysql.connect(host='127.0.0.1', user='root').cursor()\n"
            "for statement in sys.argv[1:]: cursor.execute(statement)\n"
        )
        self._processes.run([self._place.program("python"), "-c", program, *statements])

    def _start_keystone(self, *, wait: bool = True) -> None:
        conf = self._write("keystone/keystone.conf", settings.keystone(self._place))
        where = {"OS_KEYSTONE_CONFIG_FILES": str(conf)}
        self._wsgi("keystone", "keystone.wsgi.api", settings.KEYSTONE, where)
        if wait:
            self._processes.wait_for("keystone", lambda: openstack.answers(settings.KEYSTONE))

    def _wsgi(self, name: str, module: str, port: int, environment: dict[str, str]) -> None:
        what: list[str | Path] = [
            "--module",
            f"{module}:application",
            "--virtualenv",
            self._place.venv,
        ]
        listen = ["--http-socket", f"127.0.0.1:{port}"]
        uwsgi = self._place.program("uwsgi")
        self._processes.start(name, [uwsgi, *listen, *what, *WSGI], environment)

    def _write_nova(self, transport_url: str) -> Path:
        (self._place.base / "state-control").mkdir(exist_ok=True)
        return self._write("control/nova.conf", settings.nova(self._place, transport_url))

    def _write(self, name: str, text: str) -> Path:
        path = self._place.etc / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5.0).close()
    except OSError:
        return False
    return True
