# Licensed under the Apache License, Version 2.0 (see https://www.apache.org/licenses/LICENSE-2.0)
"""Ansible in a VM that has no network: its commands by `vchan exec`, its files by `vchan cp`.

Rules of this file
1. It runs the vchan command and knows nothing else of vchan: streams, migrations and restarts are
   that command's.
2. A program's own status is the task's. What vchan itself says of a program that did not run, or
   whose end is not known, makes the host unreachable, in vchan's own words.
"""

from __future__ import annotations

DOCUMENTATION = r"""
author:
  - vchan contributors (!UNKNOWN)
name: vchan
short_description: Run tasks in a virtual machine through its vchan channel
version_added: 0.1.0
description:
  - Runs commands in a virtual machine by C(vchan exec), and copies files to and from it by
    C(vchan cp). The virtual machine needs no network, no SSH server and no account.
  - Both go on while the virtual machine migrates to a host that O(also) names.
notes:
  - Run it where C(vchan-host) runs, or where the sockets of its hosts were brought to, as by
    C(ssh -L).
  - The host's policy has to allow C(forward) to C(service:exec) and C(service:files); the guest's
    daemon the same, by its option C(forward); and the guest's standard agent the shell and the
    directory for Ansible's temporary files, and for the fetch module what it reads.
  - Tasks run as the user of the guest's standard agent, which is root unless its unit says
    otherwise. The remote user of a play is ignored; privilege escalation makes it another.
    A password for that is not asked for.
  - The agent ends a program after C(time_s_max), 60 seconds unless it is configured otherwise.
requirements:
  - The C(vchan) command on the controller.
  - vchan's guest daemon and standard agent in the virtual machine, and for modules Python.
extends_documentation_fragment:
  - connection_pipelining
options:
  remote_addr:
    description:
      - The virtual machine, by its name in libvirt, its UUID, or the beginning of its UUID.
    type: str
    default: inventory_hostname
    vars:
      - name: inventory_hostname
      - name: ansible_host
      - name: ansible_vchan_host
  vchan_executable:
    description:
      - The C(vchan) command, as a path or as a name that is looked for in E(PATH).
    type: str
    default: vchan
    vars:
      - name: ansible_vchan_executable
    env:
      - name: ANSIBLE_VCHAN_EXECUTABLE
    ini:
      - section: vchan_connection
        key: executable
  socket:
    description:
      - The socket of the C(vchan-host) that is asked first.
      - C(vchan)'s own default, unless it is given.
    type: str
    vars:
      - name: ansible_vchan_socket
    env:
      - name: ANSIBLE_VCHAN_SOCKET
    ini:
      - section: vchan_connection
        key: socket
  also:
    description:
      - Sockets of other hosts' C(vchan-host), where the virtual machine may be, or go, too.
    type: list
    elements: str
    default: []
    vars:
      - name: ansible_vchan_also
    env:
      - name: ANSIBLE_VCHAN_ALSO
    ini:
      - section: vchan_connection
        key: also
  timeout:
    description:
      - Seconds for C(vchan-host) to answer. It does not limit how long a task takes.
    type: float
    default: 10
    vars:
      - name: ansible_vchan_timeout
    env:
      - name: ANSIBLE_VCHAN_TIMEOUT
    ini:
      - section: vchan_connection
        key: timeout
"""

EXAMPLES = r"""
- name: Two virtual machines that live on this host, or move to another
  hosts: db-1,fe3a04c2-6a3f-4d7e-a1c1-0d8f2a9d2a3c
  vars:
    ansible_connection: vchan.vm.vchan
    ansible_pipelining: true
    ansible_vchan_also:
      - /run/other-host.sock
  tasks:
    - name: Have the guest's time zone
      ansible.builtin.command: cat /etc/timezone
      changed_when: false
"""

import contextlib
import subprocess
from itertools import takewhile
from pathlib import Path

from ansible.errors import AnsibleConnectionFailure, AnsibleError, AnsibleFileNotFound
from ansible.module_utils.common.text.converters import to_text
from ansible.plugins.connection import ConnectionBase
from ansible.utils.display import Display

SHELL = "/bin/sh"
"""What takes a command apart in the guest, unless ansible_shell_executable names another."""
NOT_RUN = 255
"""Of `vchan exec`: there was no program, or its end is not known. A program may have it, too."""
USAGE = 2
"""Of vchan: the command is not one that it takes. A program may have it, too."""
NO_WAY = (3, 4)
"""Of `vchan cp`: the host's daemon cannot be reached, or does not answer."""
END_S = 5.0
"""For a program in the guest to end when its task is given up. At it: `vchan` is killed."""

display = Display()


class Connection(ConnectionBase):
    """One virtual machine. Each command, and each file, is a run of vchan."""

    transport = "vchan.vm.vchan"
    has_pipelining = True
    has_tty = False
    default_user = "root"

    def _connect(self):
        """There is nothing to hold open."""
        super()._connect()
        self._connected = True
        return self

    def exec_command(self, cmd, in_data=None, sudoable=True):
        """Run a command line; returns its status, its output and its errors."""
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        shell = self._play_context.executable or SHELL
        vm = self.get_option("remote_addr")
        words = [*self._way("exec"), vm, "--", shell, "-c", to_text(cmd)]
        status, output, errors = self._run(words, in_data or b"")
        problem = _own_words(errors)
        if status == NOT_RUN and problem:
            raise AnsibleConnectionFailure(problem)
        if status == USAGE and problem:
            raise AnsibleError(problem)
        return status, output, errors

    def put_file(self, in_path, out_path):
        """Copy a file into the virtual machine. It is there whole, or not at all."""
        super().put_file(in_path, out_path)
        if not Path(to_text(in_path)).is_file():
            raise AnsibleFileNotFound(f"{to_text(in_path)}: no such file on the controller")
        self._copy(_here(in_path), self._there(out_path))

    def fetch_file(self, in_path, out_path):
        """Copy a file out of the virtual machine. It is there whole, or not at all."""
        super().fetch_file(in_path, out_path)
        self._copy(self._there(in_path), _here(out_path))

    def reset(self):
        """There is nothing to begin anew."""

    def close(self):
        """There is nothing held open."""
        self._connected = False

    def _copy(self, source, target):
        status, _output, errors = self._run([*self._way("cp"), "--quiet", source, target])
        if status == 0:
            return
        problem = _own_words(errors) or to_text(errors).strip() or f"vchan cp: status {status}"
        raise (AnsibleConnectionFailure if status in NO_WAY else AnsibleError)(problem)

    def _way(self, command):
        """A command of vchan's, with the options that say where the virtual machine may be."""
        words = [self.get_option("vchan_executable"), command]
        if self.get_option("socket"):
            words += ["--socket", self.get_option("socket")]
        for path in self.get_option("also"):
            words += ["--also", path]
        return [*words, "--timeout", str(self.get_option("timeout"))]

    def _there(self, path):
        """A file in the virtual machine. As with other connections that have no home directory, a
        path that is relative begins at the root."""
        return f"{self.get_option('remote_addr')}:{Path('/', to_text(path))}"

    def _run(self, words, data=b""):
        display.vvv(f"EXEC {words}", host=self.get_option("remote_addr"))
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe)
        except OSError as error:
            problem = f"{words[0]}: {error.strerror}: is vchan installed here? see vchan_executable"
            raise AnsibleError(problem) from error
        with process:
            try:
                output, errors = process.communicate(data)
            except BaseException:  # the task's time is over, say: the program is to end with it
                _end(process)
                raise
        return process.returncode, output, errors


def _here(path):
    """A file of the controller's: an absolute path is not taken for one in a virtual machine."""
    return str(Path(to_text(path)).absolute())


def _own_words(errors):
    """What vchan said last of itself; "" if the last words are the program's."""
    prefix = "vchan: "
    lines = to_text(errors, errors="surrogate_or_replace").rstrip().splitlines()
    last = list(takewhile(lambda line: line.startswith(prefix), reversed(lines)))
    return "; ".join(line.removeprefix(prefix) for line in reversed(last))


def _end(process):
    """End a command: it hands the signal on to its program."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=END_S)
    if process.poll() is None:
        process.kill()
