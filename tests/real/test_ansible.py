"""The Ansible collection: playbooks against VMs that have no network, one of which moves.

What needs no VM has a guest's daemon and agent of this machine, with a cable where QEMU would be.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.rig import wait_until
from tests.rig.ansible import PLUGIN, Ansible, end
from tests.rig.programs import SH, Programs
from tests.rig.requirements import missing_for_libvirt, missing_for_rabbit

if TYPE_CHECKING:
    from tests.rig.cloud import Cloud, Vm

MISSING = missing_for_rabbit() or missing_for_libvirt()
pytestmark = pytest.mark.real
needs_vm = pytest.mark.skipif(bool(MISSING), reason=str(MISSING))

WAIT_S: Final = 600.0
"""A module takes ten seconds in an emulated guest of a machine that has other things to do."""
SANITY: Final = (
    *("action-plugin-docs", "ansible-doc", "compile", "empty-init", "ignores", "import"),
    *("line-endings", "no-assert", "no-get-exception", "no-illegal-filenames", "no-smart-quotes"),
    *("pep8", "pylint", "replace-urlopen", "runtime-metadata", "shebang", "symlinks"),
    *("use-argspec-type-path", "use-compat-six", "validate-modules", "yamllint"),
)


# ---------------------------------------------------------------- without a VM


class Here:
    """A guest that is this machine, and Ansible that manages it."""

    def __init__(self, directory: Path, world: Programs) -> None:
        self.directory = directory
        self.world = world
        self.ansible = Ansible(
            *(directory, "vm", [world.socket]),
            ansible_remote_tmp=str(directory / "allowed" / "tmp"),
            ansible_python_interpreter="/usr/bin/python3",
        )


@pytest.fixture(scope="module")
def here() -> Iterator[Here]:
    with tempfile.TemporaryDirectory(prefix="vc", dir="/tmp") as name:
        directory = Path(name).resolve()
        (directory / "allowed").mkdir()
        rules = f"""\
[exec]
allow = ["/bin/sh", "{SH}"]
time_s_max = 300
[shell]
command = ["{SH}"]
[read]
allow = ["{directory}/allowed/**"]
[write]
allow = ["{directory}/allowed/**"]
"""
        (directory / "world").mkdir()
        with Programs(directory / "world", standard=rules) as world:
            world.wait_served("files")
            yield Here(directory, world)


def test_ansible_doc_shows_every_option(here: Here) -> None:
    done = here.ansible.run("ansible-doc", "-t", "connection", "--json", PLUGIN)
    assert done.status == 0, done.said
    doc = json.loads(done.said)[PLUGIN]["doc"]
    ours = {"also", "remote_addr", "socket", "timeout", "vchan_executable"}
    assert set(doc["options"]) == ours | {"pipelining"}


def test_ansible_test_has_nothing_against_it(here: Here) -> None:
    done = here.ansible.sanity(*SANITY)
    assert done.status == 0, done.said


@pytest.mark.parametrize("status", [0, 3, 255])
def test_a_programs_status_is_its_own(here: Here, status: int) -> None:
    done = here.ansible.module("raw", f"echo out; echo err >&2; exit {status}")
    word = "FAILED" if status else "CHANGED"
    assert f"vm | {word} | rc={status}" in done.said
    assert "out" in done.said and "err" in done.said


def unreachable(here: Here, *words: str) -> str:
    done = here.ansible.module("raw", "true", *words)
    assert done.status == 4 and "vm | UNREACHABLE!" in done.said, done.said
    return done.said


def test_vchan_says_why_a_vm_is_unreachable(here: Here) -> None:
    said = unreachable(here, "-e", "ansible_host=nobody")
    assert "'nobody': this host has no such domain" in said
    said = unreachable(here, "-e", f"ansible_vchan_socket={here.directory}/none")
    assert f"{here.directory}/none: no such socket: is vchan-host running?" in said
    said = unreachable(here, "-e", "ansible_shell_executable=/bin/cat")
    assert "/bin/cat: is not allowed" in said and "[exec] allow" in said


def test_a_vm_of_another_hosts_is_found(here: Here) -> None:
    also = {"ansible_vchan_socket": f"{here.directory}/none"}
    also |= {"ansible_vchan_also": [str(here.world.socket)]}  # type: ignore[dict-item]
    done = here.ansible.module("raw", "echo found", "-e", json.dumps(also))
    assert "found" in done.said and done.status == 0, done.said


def test_vchan_is_not_there(here: Here) -> None:
    done = here.ansible.module("raw", "true", "-e", "ansible_vchan_executable=/no/vchan")
    assert done.status != 0
    assert "/no/vchan: No such file or directory: is vchan installed here?" in done.said


def test_a_command_that_is_too_long(here: Here) -> None:
    playbook = f"- hosts: all\n  gather_facts: false\n  tasks: [{{raw: ': {'x' * 70_000}'}}]\n"
    done = here.ansible.playbook(playbook)
    assert done.counts["failed"] == 1, done.said
    assert "the guest would not take it: too long: " in done.said


def test_a_copy_that_the_guest_does_not_allow(here: Here) -> None:
    source = here.directory / "source"
    source.write_text("text")
    given = {"src": str(source), "dest": f"{here.directory}/allowed/copied"}
    tmp = f"ansible_remote_tmp={here.directory}/elsewhere"
    done = here.ansible.module("copy", given, "-e", tmp)
    assert done.status == 2 and "UNREACHABLE" not in done.said, done.said
    assert "is not allowed" in done.said and "[write] allow" in done.said
    assert here.ansible.module("copy", given).status == 0
    assert (here.directory / "allowed" / "copied").read_text() == "text"


def test_a_fetch_that_the_guest_does_not_allow(here: Here) -> None:
    (here.directory / "secret").write_text("text")
    given = {"src": f"{here.directory}/secret", "dest": f"{here.directory}/fetched/"}
    done = here.ansible.module("fetch", given)
    assert done.status == 2 and "[read] allow" in done.said, done.said
    assert not any(path.is_file() for path in (here.directory / "fetched").rglob("*"))


def test_a_task_whose_time_is_over_is_ended_in_the_guest(here: Here) -> None:
    pid = here.directory / "pid"
    command = f"echo $$ >{pid}.new; mv {pid}.new {pid}; exec sleep 1000"
    playbook = f"""
- hosts: all
  gather_facts: false
  tasks: [{{raw: "{command}", timeout: 15}}]
"""
    assert here.ansible.playbook(playbook).status == 2
    number = int(pid.read_text())
    wait_until(
        lambda: not Path(f"/proc/{number}").exists(),
        timeout_s=WAIT_S,
        interval_s=0.05,
        failure=lambda: "the program goes on",
    )


def test_a_task_that_is_not_waited_for(here: Here) -> None:
    done = here.ansible.module("command", "echo later", "-B", "60", "-P", "1")
    assert done.status == 0 and "later" in done.said, done.said


# ---------------------------------------------------------------- in a VM

STANDARD: Final = b"""\
[exec]
allow = ["/bin/sh", "/usr/bin/busybox"]
time_s_max = 600
[read]
allow = ["/tmp/work/**"]
[write]
allow = ["/tmp/.ansible/tmp/**"]
"""
ACCOUNTS: Final = b"root:x:0:0:root:/tmp:/bin/sh\nweb:x:1000:1000:web:/tmp:/bin/sh\n"
PLAYBOOK: Final = """
- name: All that is done to a VM
  hosts: all
  gather_facts: false
  tasks:
    - name: A command, with its input
      ansible.builtin.command: {cmd: cat, stdin: "given, 'quoted' $HOME"}
      register: said
    - ansible.builtin.assert: {that: 'said.stdout == "given, ''quoted'' $HOME"'}
    - name: A directory
      ansible.builtin.file: {path: /tmp/work, state: directory, mode: "0755"}
    - name: A copy
      ansible.builtin.copy: {src: "{{ large }}", dest: /tmp/work/copied, mode: "0640"}
    - name: The same copy
      ansible.builtin.copy: {src: "{{ large }}", dest: /tmp/work/copied, mode: "0640"}
      register: again
    - ansible.builtin.assert: {that: not again.changed}
    - name: A command under way while the VM moves
      ansible.builtin.shell: |
        echo before; touch /tmp/here
        until [ -e /tmp/moved ]; do sleep 0.1; done
        cat; echo after
      args: {stdin: "what was given before"}
      register: moved
    - ansible.builtin.assert:
        that: 'moved.stdout_lines == ["before", "what was given before", "after"]'
    - name: A loop
      ansible.builtin.command: "sha256sum {{ item }}"
      args: {chdir: /tmp/work}
      loop: [copied, ../here]
      register: looped
    - ansible.builtin.assert:
        that:
          - looped.results[0].stdout == sum ~ "  copied"
          - looped.results[1].stdout is match(".*  ../here")
    - name: A template
      ansible.builtin.template: {src: "{{ template }}", dest: /tmp/work/rendered}
    - name: What comes back
      ansible.builtin.fetch: {src: "/tmp/work/{{ item }}", dest: "{{ fetched }}/", flat: true}
      loop: [copied, rendered]
    - name: A failure
      ansible.builtin.shell: "echo out; echo err >&2; exit 3"
      register: failed
      ignore_errors: true
    - ansible.builtin.assert:
        that: [failed.rc == 3, failed.stdout == "out", failed.stderr == "err"]
    - name: Raw
      ansible.builtin.raw: "echo raw; exit 255"
      register: raw
      ignore_errors: true
    - ansible.builtin.assert: {that: [raw.rc == 255, 'raw.stdout_lines == ["raw"]']}
    - name: Somebody else
      ansible.builtin.raw: id -un
      become: true
      become_method: ansible.builtin.su
      become_user: web
      register: who
    - ansible.builtin.assert: {that: 'who.stdout_lines == ["web"]'}
    - name: The guest's own facts
      ansible.builtin.setup: {gather_subset: ["!all", "!min", "virtual", "platform"]}
    - ansible.builtin.assert: {that: 'ansible_facts.system == "Linux"'}
"""
TASKS: Final = PLAYBOOK.count("ansible.builtin.") - 1  # su is none
LARGE_BYTES: Final = 1 << 20


@pytest.fixture(scope="module")
def vm(cloud: Cloud) -> Iterator[Vm]:
    """A VM that lets Ansible in, and no network; both hosts allow it."""
    from tests.rig.guest_image import Service, build

    image = build({"app/standard.toml": STANDARD, "etc/passwd": ACCOUNTS})
    services = (
        Service("vchan-guest", "python3 -m vchan.guest.daemon --forward service:*"),
        Service("agent", "python3 -m vchan.agents.standard.agent --config /app/standard.toml"),
    )
    for host in (cloud.a, cloud.b):
        host.heal()
        policy = host.daemon.policy
        policy.write_text(f"{policy.read_text()}forward any service:* allow\n")
        host.daemon.signal(signal.SIGHUP)
    staged = image.staged(cloud.directory)
    made = cloud.boot("managed", services, wait=False, image=staged, memory_mib=512)
    made.here.daemon.wait_ready(made.name, topics=["vchan.standard"])
    yield made
    made.discard()


def in_guest(vm: Vm, script: str) -> str:
    """By another way than vchan."""
    with vm.shell() as shell:
        return shell.check(script, timeout_s=60.0).strip()


def move_under(vm: Vm, playing: subprocess.Popen[str]) -> None:
    """Migrate it when the playbook's task waits for that."""

    def waits() -> bool:
        assert playing.poll() is None, end(playing)
        return in_guest(vm, "ls /tmp").find("here") >= 0

    wait_until(waits, timeout_s=WAIT_S, interval_s=0.5, failure=lambda: "no task waits")
    vm.migrate()
    vm.here.daemon.wait_ready(vm.name)
    in_guest(vm, "touch /tmp/moved")


@needs_vm
@pytest.mark.parametrize("pipelining", [True, False])
def test_a_playbook_manages_a_vm_that_moves(vm: Vm, tmp_path: Path, pipelining: bool) -> None:
    in_guest(vm, "rm -rf /tmp/work /tmp/here /tmp/moved")
    ansible = Ansible(
        *(tmp_path, "db-1", [vm.here.daemon.socket, vm.there.daemon.socket]),
        ansible_host=vm.uuid if pipelining else vm.name,
        ansible_pipelining=pipelining,
        ansible_python_interpreter="/usr/bin/python3",
    )
    content = os.urandom(LARGE_BYTES)
    (tmp_path / "large").write_bytes(content)
    (tmp_path / "template.j2").write_text("{{ inventory_hostname }} says {{ said.stdout }}\n")
    given = {"large": "large", "template": "template.j2", "fetched": "fetched"}
    started_at = vm.here
    paths = {name: f"{tmp_path}/{path}" for name, path in given.items()}
    digest = hashlib.sha256(content).hexdigest()
    with ansible.begin_playbook(PLAYBOOK, sum=digest, **paths) as playing:
        try:
            move_under(vm, playing)
            done = end(playing)
        finally:
            playing.terminate()
    assert done.status == 0, done.said
    assert (done.counts["ok"], done.counts["ignored"]) == (TASKS, 2), done.said
    assert done.counts["failed"] == done.counts["unreachable"] == 0, done.said
    assert vm.here is not started_at

    rendered = "db-1 says given, 'quoted' $HOME\n"
    assert (tmp_path / "fetched" / "copied").read_bytes() == content
    assert (tmp_path / "fetched" / "rendered").read_text() == rendered
    assert in_guest(vm, "cat /tmp/work/rendered") == rendered.strip()
    assert in_guest(vm, "stat -c '%a %s' /tmp/work/copied") == f"640 {LARGE_BYTES}"
    assert in_guest(vm, "ls -A /tmp/.ansible/tmp") == "", "nothing of Ansible's is left"
