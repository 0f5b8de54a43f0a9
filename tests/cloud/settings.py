"""The configuration files of the cloud's parts. Pure: texts from facts.

Each line that is not plain says what happens without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PASSWORD: Final = "secret"
"""Of every account: nothing outside the cloud's own network reaches it."""
DATABASE, KEYSTONE, PLACEMENT, GLANCE, NOVA, NEUTRON = 3306, 5000, 8778, 9292, 8774, 9696
DATABASES: Final = ("keystone", "placement", "glance", "nova", "nova_api", "nova_cell0")
AUTH_URL: Final = f"http://127.0.0.1:{KEYSTONE}/v3"
CELL_TRANSPORT: Final = "{scheme}://{username}:{password}@{hostname}:{port}//"
"""nova fills it in from its configuration. The cell is in the database, which is kept, and the
broker has another port each time."""
NO_BROKER: Final = "rabbit://guest:guest@127.0.0.1:5672//"
"""While the databases are made: looked at for its form alone."""
SERVICE_DOWN_S: Final = 20
REPORT_S: Final = 5
SHUTDOWN_S: Final = 10
"""How long nova waits for a guest to shut down: ours never does."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the cloud's files are."""

    base: Path
    venv: Path

    @property
    def etc(self) -> Path:
        """Configuration files."""
        return self.base / "etc"

    @property
    def logs(self) -> Path:
        """Every part's log."""
        return self.base / "log"

    @property
    def instances(self) -> Path:
        """nova's directory of servers: the same path on every host, and another directory."""
        return self.base / "instances"

    def program(self, name: str) -> Path:
        """A program of the environment."""
        return self.venv / "bin" / name


def address(number: int) -> str:
    """Of a compute host."""
    return f"127.0.0.{10 + number}"


def host_name(number: int) -> str:
    """Of a compute host."""
    return f"comp{number}"


def database_url(name: str) -> str:
    """For SQLAlchemy."""
    return f"mysql+pymysql://root@127.0.0.1:{DATABASE}/{name}?charset=utf8mb3"


def ini(sections: Mapping[str, Mapping[str, object]]) -> str:
    """The text of a file."""
    lines = []
    for name, options in sections.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {value}" for key, value in options.items()]
    return "\n".join(lines) + "\n"


def _account(user: str) -> dict[str, object]:
    return {
        "auth_type": "password",
        "auth_url": AUTH_URL,
        "username": user,
        "password": PASSWORD,
        "project_name": "service",
        "user_domain_id": "default",
        "project_domain_id": "default",
        "region_name": "RegionOne",
    }


def _authtoken(user: str) -> dict[str, object]:
    return {
        **_account(user),
        "www_authenticate_uri": AUTH_URL,
        "service_token_roles": "service",
        "service_token_roles_required": "true",
    }


def keystone(place: Place) -> str:
    """keystone.conf"""
    return ini(
        {
            "DEFAULT": {"log_file": place.logs / "keystone-api.log"},
            "database": {"connection": database_url("keystone")},
            "fernet_tokens": {"key_repository": place.base / "keys" / "fernet"},
            "credential": {"key_repository": place.base / "keys" / "credential"},
            "token": {"provider": "fernet", "expiration": 86400},
            "cache": {"enabled": "false"},
            "identity": {"password_hash_rounds": 4},
        }
    )


def placement(place: Place) -> str:
    """placement.conf"""
    return ini(
        {
            "DEFAULT": {"log_file": place.logs / "placement-api.log"},
            "api": {"auth_strategy": "keystone"},
            "placement_database": {"connection": database_url("placement")},
            "keystone_authtoken": _authtoken("nova"),
        }
    )


def glance(place: Place) -> str:
    """glance-api.conf"""
    return ini(
        {
            "DEFAULT": {
                "log_file": place.logs / "glance-api.log",
                "enabled_backends": "files:file",
            },
            "database": {"connection": database_url("glance")},
            "glance_store": {"default_backend": "files"},
            "files": {"filesystem_store_datadir": place.base / "images"},
            "os_glance_staging_store": {"filesystem_store_datadir": place.base / "staging"},
            "os_glance_tasks_store": {"filesystem_store_datadir": place.base / "tasks"},
            "paste_deploy": {"flavor": "keystone"},
            "oslo_concurrency": {"lock_path": place.base / "lock"},
            "keystone_authtoken": _authtoken("glance"),
        }
    )


def nova(place: Place, transport_url: str) -> str:
    """nova.conf of the API, the conductor and the scheduler."""
    sections = _nova(place, transport_url, "control")
    sections["api_database"] = {"connection": database_url("nova_api")}
    sections["database"] = {"connection": database_url("nova")}
    return ini(sections)


def nova_compute(place: Place, transport_url: str, number: int) -> str:
    """nova.conf of a compute service."""
    name = host_name(number)
    sections = _nova(place, transport_url, name)
    sections["DEFAULT"] |= {
        "host": name,
        "my_ip": address(number),
        "instances_path": place.instances,
        "compute_driver": "libvirt.LibvirtDriver",
        "shutdown_timeout": SHUTDOWN_S,
        "vif_plugging_is_fatal": "false",
        "vif_plugging_timeout": 0,
        "reserved_host_memory_mb": 0,
        "resume_guests_state_on_host_boot": "true",
    }
    sections["libvirt"] = {
        "virt_type": "qemu",
        "connection_uri": "qemu:///system",
        # The guest hangs after "Run /init" on nova's default, qemu64. Of the host's own model TCG
        # gets two features wrong.
        "cpu_mode": "host-model",
        "cpu_model_extra_flags": "-erms,-fsrm",
        "hw_machine_type": "x86_64=q35",
        "num_pcie_ports": 12,
        "images_type": "qcow2",
        "live_migration_scheme": "tcp",
        "live_migration_inbound_addr": address(number),
        "live_migration_completion_timeout": 120,
        "wait_soft_reboot_seconds": SERVICE_DOWN_S,
    }
    # We are root already: no sudo, no rootwrap.
    helper = f"{place.program('privsep-helper')} --config-file {place.etc}/{name}/nova.conf"
    for section in ("nova_sys_admin", "vif_plug_ovs_privileged", "privsep_osbrick"):
        sections[section] = {"helper_command": helper}
    # The destination of a block migration refuses the kernel as an unsafe image, and the server
    # stays where it is, without a word in the API.
    sections["workarounds"] = {"disable_deep_image_inspection": "true"}
    return ini(sections)


def _nova(place: Place, transport_url: str, name: str) -> dict[str, dict[str, object]]:
    return {
        "DEFAULT": {
            "log_file": place.logs / f"nova-{name}.log",
            "transport_url": transport_url,
            "state_path": place.base / f"state-{name}",
            "osapi_compute_workers": 1,
            "allow_resize_to_same_host": "true",
            "report_interval": REPORT_S,
            "service_down_time": SERVICE_DOWN_S,
            "ram_allocation_ratio": 8.0,
            "cpu_allocation_ratio": 32.0,
            "initial_disk_allocation_ratio": 16.0,
        },
        "oslo_concurrency": {"lock_path": place.base / f"lock-{name}"},
        "oslo_messaging_rabbit": {"heartbeat_timeout_threshold": 60},
        "oslo_messaging_notifications": {"driver": "noop"},
        "conductor": {"workers": 1},
        "scheduler": {"workers": 1},
        "filter_scheduler": {"track_instance_changes": "false"},
        "cache": {"enabled": "false"},
        "vnc": {"enabled": "false"},
        "spice": {"enabled": "false"},
        "glance": {"endpoint_override": f"http://127.0.0.1:{GLANCE}"},
        "placement": _account("nova"),
        "neutron": {**_account("nova"), "endpoint_override": f"http://127.0.0.1:{NEUTRON}"},
        "service_user": {**_account("nova"), "send_service_user_token": "true"},
        "keystone_authtoken": _authtoken("nova"),
    }


def libvirtd(place: Place, number: int) -> str:
    """libvirtd.conf"""
    return (
        f'host_uuid = "76636861-6e00-4000-8000-{number:012d}"\n'
        'auth_unix_rw = "none"\nunix_sock_rw_perms = "0777"\n'
        f'listen_tls = 0\nlisten_tcp = 1\nauth_tcp = "none"\nlisten_addr = "{address(number)}"\n'
        f'log_outputs = "3:file:{place.logs}/libvirtd-{host_name(number)}.log"\n'
    )


def qemu(number: int) -> str:
    """qemu.conf"""
    return (
        'security_driver = "none"\nstdio_handler = "file"\ncgroup_controllers = []\n'
        'namespaces = []\nuser = "root"\ngroup = "root"\nremember_owner = 0\n'
        f'migration_address = "{address(number)}"\nmigration_host = "{address(number)}"\n'
    )


def policy(projects: Sequence[str]) -> str:
    """What guests may do: the servers of these projects serve a topic, and nobody else's.

    A server that answers is one whose project vchan-host has read.
    """
    return "".join(f"listen,reply  project:{project}  agent  allow\n" for project in projects)


def vchan(place: Place, directory: Path, transport_url: str, number: int) -> str:
    """vchan.conf: what the README has but topics, and where this host's files are."""
    name = host_name(number)
    return ini(
        {
            "DEFAULT": {
                "transport_url": transport_url,
                "log_file": place.logs / f"vchan-{name}.log",
            },
            "vchan": {
                "select": "*",
                "host": name,
                "socket": directory / "host.sock",
                "policy_dir": directory / "policy.d",
                "audit_log": place.logs / f"audit-{name}.log",
            },
        }
    )
