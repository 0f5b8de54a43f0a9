"""What the Ansible collection says of vchan is so. tests/real/test_ansible.py runs it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, Final

import pytest

import vchan
from vchan.cli.failures import EXIT_OURS, EXIT_TIMEOUT, EXIT_UNREACHABLE, EXIT_USAGE

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

ROOT: Final = Path(__file__).parents[2]
COLLECTION: Final = ROOT / "packaging" / "ansible-collection"


def constants() -> dict[str, Any]:
    """Of the plugin, which needs Ansible to be imported."""
    tree = ast.parse((COLLECTION / "plugins" / "connection" / "vchan.py").read_text())
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                pass
    return found


def test_its_version_is_ours() -> None:
    galaxy = yaml.safe_load((COLLECTION / "galaxy.yml").read_text())
    plugin = yaml.safe_load(constants()["DOCUMENTATION"])
    assert (galaxy["version"], galaxy["namespace"], galaxy["name"]) == (
        vchan.__version__,
        "vchan",
        "vm",
    )
    assert plugin["name"] == "vchan"


def test_the_exit_statuses_that_it_knows_are_vchans() -> None:
    plugin = constants()
    assert plugin["NOT_RUN"] == EXIT_OURS
    assert plugin["USAGE"] == EXIT_USAGE
    assert plugin["NO_WAY"] == (EXIT_UNREACHABLE, EXIT_TIMEOUT)


@pytest.mark.parametrize("page", ["docs/host.md", "packaging/ansible-collection/README.md"])
def test_the_documents_name_variables_that_it_has(page: str) -> None:
    options = yaml.safe_load(constants()["DOCUMENTATION"])["options"]
    known = {row["name"] for option in options.values() for row in option["vars"]}
    named = set(re.findall(r"ansible_vchan_\w+", (ROOT / page).read_text()))
    assert named and named <= known
