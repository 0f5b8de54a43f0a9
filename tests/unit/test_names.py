"""A name stands for one thing: no two modules give different things the same CamelCase name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import vchan

PACKAGE = Path(vchan.__file__).parent
SPECIFICATION = PACKAGE / "protocol.py"
"""Names what it specifies as the modules do that implement it: that is its purpose."""
TWICE: Mapping[str, str] = {
    "Agent": "the same class, for threads (client) and for asyncio (aio)",
    "Client": "as Agent",
    "_Caller": "what the two of each of these modules share",
    "Daemon": "guest.daemon and host.daemon: what each of the two programs starts",
    "Options": "what a program is told on its command line: three programs, one each",
}
"""Names that several modules define, and why nobody takes one for another."""


def defined(source: str) -> Iterator[str]:
    """The classes and the named types of a module."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name
    for statement in tree.body:
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        for target in targets:
            if isinstance(target, ast.Name) and re.match(r"_?[A-Z][a-z]", target.id):
                yield target.id


def places(files: Mapping[str, str]) -> dict[str, list[str]]:
    """Of each name that is defined more than once: where."""
    found: dict[str, list[str]] = {}
    for file, source in files.items():
        for name in defined(source):
            found.setdefault(name, []).append(file)
    return {name: where for name, where in found.items() if len(where) > 1}


def test_no_name_is_defined_twice_without_a_reason() -> None:
    files = {
        str(file.relative_to(PACKAGE)): file.read_text(encoding="utf-8")
        for file in sorted(PACKAGE.rglob("*.py"))
        if file != SPECIFICATION
    }
    assert len(files) > 100, "it looks at nothing"
    twice = places(files)
    unexplained = {name: where for name, where in twice.items() if name not in TWICE}
    assert unexplained == {}, "rename one, or say in TWICE why a reader takes none for the other"
    assert TWICE.keys() - twice.keys() == set(), "they are defined once: take them out of TWICE"


@pytest.mark.parametrize(
    "source",
    [
        "class Queue: ...",
        "def make():\n    class Queue: ...",
        "Queue = tuple[str, int]",
        "Queue: TypeAlias = tuple[str, int]",
    ],
)
def test_a_second_definition_is_found(source: str) -> None:
    """Else the test above would find nothing, whatever the modules define."""
    assert places({"a.py": "class Queue: ...", "b.py": source}) == {"Queue": ["a.py", "b.py"]}
    assert places({"a.py": source, "b.py": "QUEUE = 1\nqueue = 2\nfrom a import Queue"}) == {}
