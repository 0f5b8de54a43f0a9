"""What puts vchan-host on compute hosts: the Ansible role, kolla-ansible's, devstack's plugin.

docs/deploy.md says what is run here, and what is not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.rig import debian_image, rig_directory
from tests.rig.debian_image import chroot_command, copy_of_tree, in_chroot
from tests.rig.environment import environment
from tests.rig.packages import ROOT, Artefacts, package

pytestmark = pytest.mark.real

TOOLS: Final = ("kolla-ansible==22.2.0", "ansible-lint", "yamllint", "bashate")
CONTAINERS: Final = ("kolla==22.2.0",)
"""For what kolla's containers do when they start: a file of it."""
WAIT_S: Final = 600.0
ANSIBLE: Final = ROOT / "packaging" / "ansible"
KOLLA: Final = ROOT / "packaging" / "kolla"
NO_DEBIAN = debian_image.missing_for_debian()
needs_debian = pytest.mark.skipif(bool(NO_DEBIAN), reason=str(NO_DEBIAN))
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts in a namespace: run as root")


@pytest.fixture(scope="module")
def tools() -> Path:
    """The programs of an environment with Ansible and the fields' linters."""
    return environment("deploy", TOOLS, without=CONTAINERS).parent


def run(*command: str | Path, status: int = 0, **options: Any) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT_S, **options)
    assert done.returncode == status, done.stdout[-6000:] + done.stderr[-3000:]
    return str(done.stdout)


# ---------------------------------------------------------------- linters


def test_bashate_has_nothing_against_devstacks_plugin(tools: Path) -> None:
    """With what devstack itself leaves out: lines over 79 characters, and what is only sourced."""
    files = (ROOT / "devstack" / name for name in ("plugin.sh", "settings"))
    assert run(tools / "bashate", "-i", "E005,E006", "-e", "E042", *files) == ""


def test_yamllint_has_nothing_against_the_roles(tools: Path) -> None:
    rules = {"extends": "default", "rules": {"line-length": {"max": 140}}}
    rules["rules"] |= {
        "comments": {"min-spaces-from-content": 1},
        "braces": {"max-spaces-inside": 1},
    }  # type: ignore[operator]
    assert run(tools / "yamllint", "--strict", "-d", json.dumps(rules), ANSIBLE, KOLLA) == ""


@pytest.fixture(scope="module")
def beside(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kolla-ansible's playbooks and roles with ours beside them, as docs/deploy.md has them put."""
    beside = tmp_path_factory.mktemp("kolla") / "ansible"
    shutil.copytree(tools.parent / "share" / "kolla-ansible" / "ansible", beside)
    shutil.copy(KOLLA / "vchan.yml", beside)
    shutil.copytree(KOLLA / "vchan", beside / "roles" / "vchan")
    return beside


def lint(tools: Path, directory: Path, *files: str) -> None:
    program = ("ansible-lint", "--offline", "--strict", "--nocolor", "--profile", "production")
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    # As kolla-ansible sets them for its own linter; elsewhere there are no such directories.
    there = {
        f"ANSIBLE_{name.upper()}": str(directory / name)
        for name in ("library", "action_plugins", "filter_plugins")
    }
    environment = os.environ | there | {"PATH": path}
    run(tools / program[0], *program[1:], *files, cwd=directory, env=environment)


def test_ansible_lint_has_nothing_against_the_role(tools: Path, tmp_path: Path) -> None:
    shutil.copytree(ANSIBLE, tmp_path / "ansible")
    lint(tools, tmp_path / "ansible", "hosts.yml", "roles/vchan_host")


def test_ansible_lint_has_nothing_against_kollas_role(tools: Path, beside: Path) -> None:
    """With what kolla-ansible leaves out: variables' names need not begin with the role's."""
    (beside / ".ansible-lint").write_text("skip_list: ['var-naming[no-role-prefix]']\n")
    lint(tools, beside, "vchan.yml", "roles/vchan")


# ---------------------------------------------------------------- role vchan_host

SYSTEMCTL: Final = """#!/bin/sh
# In place of systemd's: a unit is enabled and runs once it was told to.
echo "$*" >>/root/systemctl
case "$*" in
    *is-enabled*) cat /root/enabled 2>/dev/null || { echo disabled; exit 1; } ;;
    *enable*) echo enabled >/root/enabled ;;
    *reload\\ * | *restart\\ * | *start\\ *) echo active >/root/active ;;
    *show*)
        echo LoadState=loaded
        echo "ActiveState=$(cat /root/active 2>/dev/null || echo inactive)" ;;
esac
"""
READ: Final = """
import json
from vchan.host import config
from vchan.host.broker.config import BrokerConfig
conf = config.load([])
(node,) = BrokerConfig.from_oslo(conf).hosts
print(json.dumps({
    "unknown": [str(each) for each in config.unknown_options(conf)],
    "select": conf.vchan.select,
    "listen_topics": conf.vchan.listen_topics,
    "password": node.password,
    "quorum": BrokerConfig.from_oslo(conf).quorum,
}))
"""
PASSWORD: Final = "p%24$w"


class ComputeHost:
    """A Debian in a tree of files, and Ansible inside of it: its connection is local."""

    def __init__(self, tree: Path, tools: Path, artefacts: Artefacts) -> None:
        self.tree = tree
        self._libraries = next((tools.parent / "lib").glob("python3.*/site-packages"))
        in_chroot(tree, "apt-get", "update", "--quiet")
        (tree / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")
        (tree / "usr/sbin/policy-rc.d").chmod(0o755)
        for group in ("libvirt", "libvirt-qemu", "kvm"):
            in_chroot(tree, "groupadd", "--force", "--system", group)
        systemctl = tree / "usr/bin/systemctl"
        systemctl.unlink()
        systemctl.write_text(SYSTEMCTL)
        systemctl.chmod(0o755)
        shutil.copytree(ANSIBLE, tree / "root/ansible")
        self.packages = [f"/root/{deb.name}" for deb in (artefacts.guest, artefacts.host)]
        for deb in (artefacts.guest, artefacts.host):
            shutil.copy(deb, tree / "root")

    def apply(self, status: int = 0, **variables: Any) -> dict[str, int]:
        """ansible-playbook's count of what it did."""
        (self.tree / "root/variables.json").write_text(json.dumps(variables))
        words = ["-i", "localhost,", "-c", "local", "-e", "@/root/variables.json"]
        words += ["-e", "ansible_python_interpreter=/usr/bin/python3", "/root/ansible/hosts.yml"]
        path = f"PYTHONPATH={self._libraries}"
        python = ["env", path, "ANSIBLE_NOCOLOR=1", "python3", "-m", "ansible", "playbook"]
        said = run(
            *chroot_command(self.tree, shared=self._libraries), *python, *words, status=status
        )
        recap = said.partition("PLAY RECAP")[2]
        return {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", recap)}

    def told(self) -> list[str]:
        """What systemctl was told to do since the last look."""
        log = self.tree / "root/systemctl"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [
            line for line in lines if line.split()[0] not in ("show", "is-enabled", "is-active")
        ]


@pytest.fixture(scope="module")
def host(tools: Path) -> Iterator[ComputeHost]:
    with rig_directory() as directory:
        tree = directory / "debian"
        copy_of_tree(debian_image.build(), tree)
        found = in_chroot(
            tree, "python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"
        )
        if found.output.strip() != f"{sys.version_info[0]}.{sys.version_info[1]}":
            pytest.skip(f"Ansible's environment is not for Debian's Python {found.output}")
        yield ComputeHost(tree, tools, package(directory / "dist"))


def variables(host: ComputeHost, **others: Any) -> dict[str, Any]:
    """As docs/deploy.md has them."""
    return {
        "vchan_host_group": "all",
        "vchan_host_packages": host.packages,
        "vchan_host_transport_url": "rabbit://nova:p%2524%24w@controller:5672/",
        "vchan_host_options": {"select": ["name:a*", "name:b"], "listen_topics": "agent"},
        "vchan_host_rabbit": {"rabbit_quorum_queue": True},
        "vchan_host_policies": {"50-backup": "cast,notify any openstack/backup-manager allow\n"},
        **others,
    }


@needs_debian
def test_a_bare_debian_becomes_a_compute_host(host: ComputeHost) -> None:
    host.apply(**variables(host))
    in_chroot(host.tree, "dpkg", "--verify", "vchan-host", "vchan-guest")
    read = json.loads(in_chroot(host.tree, "python3", "-c", READ).output.splitlines()[-1])
    assert read == {
        "unknown": [],
        "select": ["name:a*", "name:b"],
        "listen_topics": ["agent"],
        "password": PASSWORD,
        "quorum": True,
    }
    configuration = host.tree / "etc/vchan/vchan.conf.d/50-ansible.conf"
    assert configuration.stat().st_mode & 0o777 == 0o640
    groups = in_chroot(host.tree, "id", "--name", "--groups", "vchan").output.split()
    assert {"libvirt", "libvirt-qemu", "kvm"} <= set(groups)
    allowed = ("policy", "check", "--dir", "/etc/vchan/policy.d", "cast", "backup-manager")
    in_chroot(host.tree, "vchan", *allowed)
    assert "restart vchan-host.service" in host.told()
    assert (host.tree / "root/enabled").exists(), "at boot, too"
    assert host.apply(**variables(host))["changed"] == 0, "the second time nothing is to be done"
    assert host.told() == []


@needs_debian
def test_a_policy_is_reloaded_and_a_configuration_restarted(host: ComputeHost) -> None:
    host.apply(**variables(host))
    host.told()
    host.apply(**variables(host, vchan_host_policies={"50-backup": ""}))
    assert host.told() == ["reload vchan-host.service"]
    host.apply(**variables(host, vchan_host_rabbit={}))
    assert "restart vchan-host.service" in host.told()


@needs_debian
def test_a_policy_with_an_error_is_not_put_in_force(host: ComputeHost) -> None:
    host.apply(**variables(host))
    host.told()
    wrong = {"60-wrong": "cast any\n"}
    assert host.apply(**variables(host, vchan_host_policies=wrong), status=2)["failed"] == 1
    assert host.told() == []
    assert not (host.tree / "etc/vchan/policy.d/60-wrong.policy").exists()


# ---------------------------------------------------------------- role vchan, of kolla-ansible


class Kolla:
    """kolla-ansible, on this machine alone, in a namespace with its own /run."""

    def __init__(self, directory: Path, tools: Path, beside: Path) -> None:
        self.directory = directory
        self.hosts_files = directory / "node" / "vchan-host"
        self.deployed: list[Any] = []
        self._tools = tools
        self._beside = beside
        self._wanted = directory / "wanted"
        for module in ("kolla_container_worker.py", "kolla_docker_worker.py"):
            shutil.copy(ROOT / "tests/rig/kolla_worker.py", beside / "module_utils" / module)
        share = tools.parent / "share" / "kolla-ansible"
        self.configuration = directory / "kolla"
        shutil.copytree(share / "etc_examples" / "kolla", self.configuration)
        run(tools / "kolla-genpwd", "-p", self.configuration / "passwords.yml")
        self.configure()

    def configure(self, **variables: Any) -> None:
        """globals.yml."""
        basis = {
            "kolla_internal_vip_address": "127.0.0.1",
            "network_interface": "lo",
            "kolla_base_distro": "debian",
            "node_config_directory": str(self.directory / "node"),
            "docker_registry": "registry.example.org",
        }
        (self.configuration / "globals.yml").write_text(json.dumps(basis | variables))

    def act(self, action: str, *options: str) -> list[Any]:
        """What was asked of docker."""
        mounts = "true"
        for name, place in (("run", "/run"), ("tmpfiles", "/etc/tmpfiles.d")):
            (self.directory / name).mkdir(exist_ok=True)
            mounts += f" && mount --bind {self.directory / name} {place}"
        command: list[str | Path] = [
            self._tools / "kolla-ansible",
            action,
            *options,
            f"--configdir={self.configuration}",
            f"--extra-vars=ansible_python_interpreter={self._tools / 'python'}",
            f"--inventory={self._beside / 'inventory' / 'all-in-one'}",
            f"--playbook={self._beside / 'vchan.yml'}",
        ]
        path = os.pathsep.join([str(self._tools), os.environ["PATH"]])
        before = len(self._notes())
        run(
            *("unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh"),
            *command,
            env={**os.environ, "PATH": path, "WANTED": str(self._wanted)},
        )
        return self._notes()[before:]

    def _notes(self) -> list[Any]:
        lines = self._wanted.read_text().splitlines() if self._wanted.exists() else []
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def kolla(tools: Path, beside: Path, tmp_path_factory: pytest.TempPathFactory) -> Kolla:
    """Deployed, with a policy and an option of the operator's."""
    kolla = Kolla(tmp_path_factory.mktemp("deployed"), tools, beside)
    policies = kolla.configuration / "config" / "vchan" / "policy.d"
    policies.mkdir(parents=True)
    (policies / "50-own.policy").write_text("cast any openstack/x allow\n")
    (kolla.configuration / "config" / "vchan.conf").write_text("[vchan]\nset_guest_time = true\n")
    kolla.deployed = kolla.act("deploy")
    return kolla


@needs_root
def test_kolla_ansible_makes_the_container(kolla: Kolla) -> None:
    ((action, wanted),) = kolla.deployed
    assert action == "recreate_or_restart_container"
    assert wanted["name"] == "vchan_host"
    assert wanted["image"].startswith("registry.example.org/openstack.kolla/vchan-host:")
    assert not wanted["privileged"]
    node = kolla.hosts_files
    assert sorted(wanted["volumes"]) == sorted(
        [
            f"{node}/:/var/lib/kolla/config_files/:ro",
            "libvirtd:/var/lib/libvirt:ro",
            "/run/libvirt:/run/libvirt:ro",
            "/run/vchan:/run/vchan",
            "kolla_logs:/var/log/kolla/",
        ]
    )
    assert wanted["environment"]["LIBVIRT_AUTH_FILE"] == "/etc/vchan/libvirt-auth.conf"
    assert wanted["environment"]["KOLLA_CONFIG_STRATEGY"] == "COPY_ALWAYS"
    passwords = yaml.safe_load((kolla.configuration / "passwords.yml").read_text())
    check_configuration(node, passwords)
    assert {each.name for each in (node / "policy.d").iterdir()} == {
        "50-own.policy",
        "90-default.policy",
    }


def check_configuration(node: Path, passwords: dict[str, str]) -> None:
    """As the daemon and libvirt read it."""
    pytest.importorskip("oslo_messaging")
    from vchan.host import config
    from vchan.host.broker.config import BrokerConfig

    conf = config.load(["--config-file", str(node / "vchan.conf")])
    assert config.unknown_options(conf) == []
    assert conf.vchan.libvirt_uri == "qemu+tcp://127.0.0.1/system"
    assert (conf.vchan.select, conf.vchan.listen_topics) == (["*"], [])
    assert conf.vchan.set_guest_time is True, "the operator's own file"
    broker = BrokerConfig.from_oslo(conf)
    assert broker is not None and broker.quorum
    assert [(each.user, each.password) for each in broker.hosts] == [
        ("openstack", passwords["rabbitmq_password"])
    ]
    assert f"password={passwords['libvirt_sasl_password']}\n" in (node / "auth.conf").read_text()


@needs_debian
def test_what_the_container_does_when_it_starts(
    kolla: Kolla, host: ComputeHost, tools: Path
) -> None:
    """kolla's own program puts the files into a tree that stands for the image."""
    tree = host.tree
    if not (tree / "usr/bin/vchan").exists():
        host.apply(**variables(host))
    inside = tree / "var/lib/kolla/config_files"
    shutil.rmtree(inside, ignore_errors=True)
    shutil.copytree(kolla.hosts_files, inside)
    script = next(tools.parent.rglob("set_configs.py"))
    shutil.copy(script, tree / "root/set_configs.py")
    ((_, wanted),) = kolla.deployed
    environment = (f"{name}={value}" for name, value in wanted["environment"].items())
    in_chroot(tree, "env", *environment, "python3", "/root/set_configs.py")
    command = (tree / "run_command").read_text().split()
    as_vchan = ("setpriv", "--reuid=vchan", "--regid=vchan", "--init-groups")
    in_chroot(tree, *as_vchan, "test", "-r", "/etc/vchan/vchan.conf")
    in_chroot(tree, *as_vchan, "test", "-w", "/run/vchan")
    in_chroot(tree, *as_vchan, "test", "-w", "/var/log/kolla/vchan")
    in_chroot(tree, *as_vchan, "test", "-r", "/etc/vchan/libvirt-auth.conf")
    in_chroot(tree, *as_vchan, "vchan", "policy", "check", "--dir", "/etc/vchan/policy.d")
    assert command == ["vchan-host", "--config-file", "/etc/vchan/vchan.conf"]


@needs_root
def test_a_change_reaches_the_hosts_and_the_end(kolla: Kolla) -> None:
    """A policy that is taken away, TLS; and stop. After the tests of what was deployed."""
    keys = kolla.directory / "node" / "nova-compute"
    keys.mkdir(parents=True)
    for name in ("cacert.pem", "clientcert.pem", "clientkey.pem"):
        (keys / name).write_text(name)
    (kolla.configuration / "config" / "vchan" / "policy.d" / "50-own.policy").unlink()
    authority = kolla.configuration / "certificates" / "ca" / "root.crt"
    authority.parent.mkdir(parents=True)
    authority.write_text("root.crt")
    kolla.configure(libvirt_tls=True, rabbitmq_enable_tls=True, kolla_copy_ca_into_containers=True)
    assert kolla.act("reconfigure") == [], "as a container it is the same"
    node = kolla.hosts_files
    assert [each.name for each in (node / "policy.d").iterdir()] == ["90-default.policy"]
    text = (node / "vchan.conf").read_text()
    assert f"libvirt_uri = qemu+tls://{socket.gethostname()}/system" in text
    assert "ssl = true" in text
    assert (node / "clientkey.pem").read_text() == "clientkey.pem"
    files = json.loads((node / "config.json").read_text())["config_files"]
    assert "/etc/pki/libvirt/private/clientkey.pem" in {each["dest"] for each in files}
    assert (node / "ca-certificates" / "root.crt").read_text() == "root.crt"
    ((action, stopped),) = kolla.act("stop", "--yes-i-really-really-mean-it")
    assert (action, stopped["name"]) == ("stop_container", "vchan_host")


# ---------------------------------------------------------------- the containers' volumes

VCHAN, NOVA = 61011, 61012
CONNECT: Final = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"


@needs_root
def test_a_channel_is_reached_on_a_volume_that_is_read_only() -> None:
    """By a member of the group that kolla's QEMU runs in."""
    with rig_directory() as directory, socket.socket(socket.AF_UNIX) as listener:
        channels = directory / "qemu"
        channels.mkdir()
        path = channels / "channel"
        listener.bind(str(path))
        listener.listen()
        accepting = threading.Thread(target=lambda: listener.accept()[0].close())
        accepting.start()
        for each, mode in ((channels, 0o750), (path, 0o775)):
            os.chown(each, NOVA, NOVA)
            each.chmod(mode)
        mounts = f"mount --bind {channels} {channels} && mount -o remount,ro,bind {channels}"
        inside = ("unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh")
        user = ("setpriv", f"--reuid={VCHAN}", f"--regid={VCHAN}")
        python = ("/usr/bin/python3", "-c", CONNECT, path)
        run(*inside, *user, "--clear-groups", *python, status=1)
        run(*inside, *user, f"--groups={NOVA}", *python)
        accepting.join(WAIT_S)
        touched = ("touch", channels / "new")
        run(*inside, *touched, status=1)
