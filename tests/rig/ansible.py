"""Ansible with the collection in it, as somebody has it who has installed both."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.rig.environment import environment
from tests.rig.kept import cache_directory

ROOT: Final = Path(__file__).parents[2]
COLLECTION: Final = ROOT / "packaging" / "ansible-collection"
RELEASE: Final = ("ansible-core==2.19.14",)
PIP_SCRIPT: Final = "get_pip_24_2.py"
"""As this release's ansible-test calls it."""
PYTHON: Final = ".".join(map(str, sys.version_info[:2]))
PLUGIN: Final = "vchan.vm.vchan"
WAIT_S: Final = 900.0
_COUNTS: Final = re.compile(r"(\w+)=(\d+)")


class Ended(NamedTuple):
    """How a program of Ansible's has ended."""

    status: int
    said: str

    @property
    def counts(self) -> dict[str, int]:
        """The recap of a playbook with one host."""
        recap = self.said.partition("PLAY RECAP")[2]
        return {name: int(count) for name, count in _COUNTS.findall(recap)}


class Ansible:
    """It, and an inventory of one host.

    Args:
        directory: For all that it writes.
        host: What the inventory calls it.
        variables: Of the host, beside what connects to it.
    """

    def __init__(
        self, directory: Path, host: str, sockets: Sequence[Path], **variables: object
    ) -> None:
        self.directory = directory
        self.host = host
        self.programs = environment("ansible", RELEASE).parent
        self.collections = directory / "collections"
        self._inventory = directory / "inventory.json"
        ours = {
            "ansible_connection": PLUGIN,
            "ansible_vchan_executable": str(self._command()),
            "ansible_vchan_socket": str(sockets[0]),
            "ansible_vchan_also": [str(path) for path in sockets[1:]],
        }
        inventory = {"all": {"hosts": {host: ours | variables}}}
        self._inventory.write_text(json.dumps(inventory))
        self._install()

    def _command(self) -> Path:
        """This tree's vchan, by the Python that runs the tests."""
        script = self.directory / "vchan"
        script.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m vchan.cli "$@"\n')
        script.chmod(0o755)
        return script

    def _install(self) -> None:
        """The collection, from the archive that would be handed out."""
        archives = self.directory / "archives"
        galaxy = ("ansible-galaxy", "collection")
        for words in (
            (*galaxy, "build", str(COLLECTION), "--output-path", str(archives)),
            (*galaxy, "install", "--offline", "-p", str(self.collections), "ARCHIVE"),
        ):
            found = [str(path) for path in archives.glob("*.tar.gz")]
            done = self.run(*words[:-1], *(found if words[-1] == "ARCHIVE" else words[-1:]))
            assert done.status == 0, done.said

    def begin(
        self, program: str, *words: str, cwd: Path | None = None, **variables: str
    ) -> subprocess.Popen[str]:
        """A program of Ansible's, begun."""
        path = os.pathsep.join([str(self.programs), os.environ["PATH"]])
        home = {
            "ANSIBLE_HOME": str(self.directory / "home"),
            "ANSIBLE_COLLECTIONS_PATH": str(self.collections),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_RETRY_FILES_ENABLED": "0",
            "LC_ALL": "C.UTF-8",
            "PATH": path,
        }
        return subprocess.Popen(
            [str(self.programs / program), *words],
            cwd=cwd or self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | home | variables,
        )

    def run(self, program: str, *words: str, cwd: Path | None = None, **variables: str) -> Ended:
        """A program of Ansible's, to its end."""
        return end(self.begin(program, *words, cwd=cwd, **variables))

    def module(self, name: str, arguments: dict[str, Any] | str, *words: str) -> Ended:
        """One module, as `ansible HOST -m NAME -a ARGUMENTS` runs it."""
        given = arguments if isinstance(arguments, str) else json.dumps(arguments)
        where = (self.host, "-i", str(self._inventory))
        return self.run("ansible", *where, "-m", name, "-a", given, *words)

    def begin_playbook(self, text: str, **variables: object) -> subprocess.Popen[str]:
        """`ansible-playbook`, begun."""
        path = self.directory / "playbook.yml"
        path.write_text(text)
        extra = ("--extra-vars", json.dumps(variables))
        return self.begin("ansible-playbook", "-i", str(self._inventory), *extra, str(path))

    def playbook(self, text: str, **variables: object) -> Ended:
        """`ansible-playbook`, to its end."""
        return end(self.begin_playbook(text, **variables))

    def sanity(self, *tests: str) -> Ended:
        """`ansible-test sanity`, in a copy at the path that it wants."""
        place = self.directory / "sanity" / "ansible_collections" / "vchan" / "vm"
        if not place.exists():
            shutil.copytree(COLLECTION, place)
        words = ["sanity", "--color", "no", "--python", PYTHON]
        words += [word for test in tests for word in ("--test", test)]
        return self.run("ansible-test", *words, cwd=place, HOME=str(_sanity_home()))


def _sanity_home() -> Path:
    """Where ansible-test keeps its environments. It fetches pip for them from a site of its own,
    unless it has it; Python brings one, too."""
    home = cache_directory() / "ansible-test"
    script = home / ".ansible" / "test" / "cache" / PIP_SCRIPT
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text("import ensurepip\nensurepip.bootstrap(default_pip=True)\n")
    return home


def end(process: subprocess.Popen[str]) -> Ended:
    """Wait for the end of what was begun."""
    try:
        said, _ = process.communicate(timeout=WAIT_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    return Ended(process.returncode, said)
