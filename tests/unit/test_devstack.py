"""devstack's plugin, phase by phase as stack.sh, unstack.sh and clean.sh source it.

devstack's functions are small ones of ours here, which note what they are asked. With $DEVSTACK, a
checkout's path, the same tests run on devstack's own, and only what would change this machine (pip,
systemctl, sudo, usermod) is ours.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Final

import pytest

pytest.importorskip("oslo_config", reason='oslo.config is not installed: pip install "vchan[host]"')
pytest.importorskip("oslo_messaging", reason="oslo.messaging is not installed")

from vchan.host import config
from vchan.host.broker.config import BrokerConfig, BrokerHost

ROOT: Final = Path(__file__).parents[2]
DEVSTACK: Final = os.environ.get("DEVSTACK")
PASSWORD: Final = "secret*"
WAIT_S: Final = 60.0

OURS = """
note() { printf '%s\\n' "$*" >>"$NOTES"; }
sudo() { "$@"; }
# Whoever runs this is no devstack's user: the mode is what counts.
install() { local words=(); while (($#)); do
    case $1 in -o) shift ;; *) words+=("$1") ;; esac; shift; done; command install "${words[@]}"; }
openstack() { note openstack "${@:3}"; case "$*" in *list*) echo one; echo two ;; esac; }
getent() { case $2 in kvm | libvirt-qemu) ;; *) return 2 ;; esac; }
add_user_to_group() { note group "$@"; }
setup_develop() { note setup_develop "$@"; }
systemctl_of_ours() { note systemctl "$@"; }
"""
STUBS = """
define_plugin() { :; }
enable_service() { ENABLED_SERVICES+=",$1"; }
is_service_enabled() { [[ ,$ENABLED_SERVICES, == *,$1,* ]]; }
echo_summary() { note summary "$@"; }
get_python_exec_prefix() { echo /venv/bin; }
iniset_rpc_backend() {
    local url="rabbit://$RABBIT_USERID:$RABBIT_PASSWORD@$RABBIT_HOST:5672/"
    sed -i "/^\\[DEFAULT\\]/ a transport_url = $url" "$2"; }
run_process() { note ExecStart "$2"; note systemctl start "devstack@$1.service"; }
stop_process() { note systemctl stop "devstack@$1.service"; }
"""
REAL = """
TOP_DIR=$DEVSTACK
source $DEVSTACK/functions
source $DEVSTACK/lib/rpc_backend
echo_summary() { note summary "$@"; }
time_start() { :; }
time_stop() { :; }
SYSTEMCTL=systemctl_of_ours KILL_PATH=/bin/kill
DEVSTACK_VENV=/venv GLOBAL_VENV=True
"""
DRIVE = """
cd "$DIRECTORY"
source {root}/devstack/settings
for words in {phases}; do source {root}/devstack/plugin.sh $words; done
"""


class Stack:
    """One host of devstack's, below a directory."""

    def __init__(self, directory: Path, services: str) -> None:
        self.directory = directory
        self.conf = directory / "etc" / "vchan.conf"
        self._notes = directory / "notes"
        self._services = services
        (directory / "a-file").touch()  # what a careless * would become

    def run(self, *phases: str, **settings: str) -> None:
        """Source the plugin with each of these words, as one run of stack.sh does."""
        parts = REAL + OURS if DEVSTACK else OURS + STUBS
        words = " ".join(f'"{phase}"' for phase in phases)
        script = parts + DRIVE.format(root=ROOT, phases=words)
        environment = {
            "PATH": os.environ["PATH"],
            "DIRECTORY": str(self.directory),
            "NOTES": str(self._notes),
            "DEVSTACK": DEVSTACK or "",
            "DEST": str(self.directory),
            "DATA_DIR": str(self.directory / "data"),
            "SYSTEMD_DIR": str(self.directory / "systemd"),
            "ENABLED_SERVICES": self._services,
            "STACK_USER": "stack",
            "LIBVIRT_GROUP": "libvirt",
            "RABBIT_USERID": "stackrabbit",
            "RABBIT_PASSWORD": PASSWORD,
            "RABBIT_HOST": "10.0.0.1",
            "SERVICE_HOST": "10.0.0.1",
            "VCHAN_DIR": str(ROOT),
            "VCHAN_CONF_DIR": str(self.conf.parent),
            **settings,
        }
        done = subprocess.run(
            ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=WAIT_S
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def notes(self, of: str) -> list[str]:
        lines = self._notes.read_text().splitlines() if self._notes.exists() else []
        return [line.partition(" ")[2] for line in lines if line.startswith(of + " ")]

    def command(self) -> str:
        """What systemd would run."""
        unit = self.directory / "systemd" / "devstack@vchan-host.service"
        text = unit.read_text() if DEVSTACK else "ExecStart = " + self.notes("ExecStart")[0]
        (line,) = (line for line in text.splitlines() if line.startswith("ExecStart"))
        return line.partition("=")[2].strip()


STACK = ("stack pre-install", "stack install", "stack post-config", "stack extra")


@pytest.fixture
def compute(tmp_path: Path) -> Stack:
    return Stack(tmp_path, "rabbit,g-api,n-cpu")


def test_the_whole_of_stack_sh(compute: Stack) -> None:
    compute.run(*STACK, "stack test-config")
    assert compute.notes("setup_develop") == [f"{ROOT} host"]
    assert compute.notes("group") == [
        f"stack {name}" for name in ("libvirt", "libvirt-qemu", "kvm")
    ]
    assert compute.command() == f"/venv/bin/vchan-host --config-file {compute.conf}"
    assert compute.notes("systemctl")[-1] == "start devstack@vchan-host.service"
    said = compute.notes("summary")
    assert said == ["Installing vchan", "Configuring vchan", "Starting vchan-host"]


def test_what_it_configures_is_what_vchan_host_reads(compute: Stack) -> None:
    compute.run(*STACK, VCHAN_LISTEN_TOPICS="agent,trove/guestagent.*")
    loaded = config.load(["--config-file", str(compute.conf)])
    assert config.unknown_options(loaded) == []
    assert loaded.vchan.select == ["*"]
    assert loaded.vchan.listen_topics == ["agent", "trove/guestagent.*"]
    assert loaded.vchan.socket == str(compute.directory / "data/vchan/host.sock")
    broker = BrokerConfig.from_oslo(loaded)
    assert broker is not None
    (node,) = broker.hosts
    assert node == BrokerHost("10.0.0.1", 5672, "stackrabbit", PASSWORD)
    assert stat.S_IMODE(compute.conf.stat().st_mode) == 0o640
    policy = Path(loaded.vchan.policy_dir) / "90-default.policy"
    assert policy.read_text() == (ROOT / "etc/policy.d/90-default.policy").read_text()


def test_images_get_the_property_unless_told_otherwise(compute: Stack) -> None:
    compute.run("stack extra", VCHAN_SET_IMAGE_PROPERTY="False")
    assert compute.notes("openstack") == []
    compute.run("stack extra")
    assert compute.notes("openstack")[1:] == [
        f"image set --property hw_qemu_guest_agent=yes {image}" for image in ("one", "two")
    ]


def test_a_host_without_vms_has_only_the_images_changed(tmp_path: Path) -> None:
    control = Stack(tmp_path, "rabbit,g-api")
    control.run(*STACK)
    assert len(control.notes("openstack")) == 3
    assert not control.conf.exists()
    assert control.notes("setup_develop") == control.notes("ExecStart") == []


def test_a_second_run_begins_anew(compute: Stack) -> None:
    compute.run(*STACK)
    compute.run(*STACK, VCHAN_SELECT="name:one")
    assert config.load(["--config-file", str(compute.conf)]).vchan.select == ["name:one"]


def test_unstack_stops_it_and_clean_leaves_nothing(compute: Stack) -> None:
    compute.run(*STACK)
    compute.run("unstack")
    assert "stop devstack@vchan-host.service" in compute.notes("systemctl")
    assert compute.conf.exists()
    compute.run("unstack", "clean")
    assert not compute.conf.parent.exists()
    assert not (compute.directory / "data" / "vchan").exists()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    """But for what is devstack's: variables set elsewhere, words that are to be split."""
    theirs = "SC2154,SC2034,SC2086"
    files = [str(ROOT / "devstack" / name) for name in ("settings", "plugin.sh")]
    command = ["shellcheck", "--shell=bash", f"--exclude={theirs}", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stdout
