"""The cores state what they guarantee, where it is handed over: at least so often, in every part.

An assert is about ourselves, never about a peer's bytes: those are checked, counted and answered.
"""

from __future__ import annotations

import ast
import io
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PER_THOUSAND_LINES = 6.0

GROUPS = {
    "wire and session": ("vchan.wire", "vchan.session"),
    "requests": ("vchan.rpc",),
    "byte streams": ("vchan.streams",),
    "services": ("vchan.services",),
    "guest": ("vchan.guest", "vchan.agents", "vchan.gateways"),
    "host": ("vchan.host",),
    "link": ("vchan.io.link",),
}
OF_NO_GROUP = {
    "vchan.errors": "exceptions",
    "vchan.protocol": "a definition: what it generates is tested",
    "vchan.cli.changes": "it compares what a daemon says, and hands nothing on",
    "vchan.cli.completion": "it makes text of the parser",
    "vchan.cli.progress": "it makes text of two numbers",
    "vchan.cli.proxy.wire": "it reads one request, and hands nothing on",
    "vchan.conductor.admission": "it judges one request, and hands nothing on",
}


def pure_modules() -> list[str]:
    """As import-linter is told, and the link."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    pure = next(each for each in contracts if each["name"].startswith("Pure modules"))
    return [*pure["source_modules"], "vchan.io.link"]


GENERATED = frozenset({ROOT / "vchan/wire/layout.py"})


def files(module: str) -> list[Path]:
    path = ROOT / module.replace(".", "/")
    found = path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    return sorted(set(found) - GENERATED)


def docstring_lines(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            assert node.end_lineno is not None
            yield from range(node.lineno, node.end_lineno + 1)


def count(path: Path) -> tuple[int, int]:
    """Lines of code, without comments and docstrings; and asserts."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout and token.type != tokenize.ENDMARKER:
            lines.update(range(token.start[0], token.end[0] + 1))
    asserts = sum(isinstance(node, ast.Assert) for node in ast.walk(tree))
    return len(lines - set(docstring_lines(tree))), asserts


def group_of(module: str) -> str | None:
    for group, prefixes in GROUPS.items():
        if any(module == each or module.startswith(f"{each}.") for each in prefixes):
            return group
    return None


def test_every_core_is_of_a_group() -> None:
    left = {module for module in pure_modules() if group_of(module) is None}
    assert left == set(OF_NO_GROUP)


@pytest.mark.parametrize("group", GROUPS)
def test_cores_assert_what_they_guarantee(group: str) -> None:
    modules = [module for module in pure_modules() if group_of(module) == group]
    counted = [count(path) for module in modules for path in files(module)]
    lines, asserts = (sum(each) for each in zip(*counted, strict=True))
    per_thousand = asserts / lines * 1000
    assert per_thousand >= PER_THOUSAND_LINES, f"{asserts} in {lines} lines: {per_thousand:.1f}"


def test_an_assert_has_no_side_effect() -> None:
    """Without them, as with `python -O`, everything is the same."""
    changing = {"pop", "popleft", "append", "add", "discard", "remove", "take", "send", "submit"}
    for module in pure_modules():
        for path in files(module):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Assert):
                    continue
                for part in ast.walk(node.test):
                    assert not isinstance(part, ast.NamedExpr), f"{path}:{node.lineno}"
                    called = part.func if isinstance(part, ast.Call) else None
                    name = called.attr if isinstance(called, ast.Attribute) else ""
                    assert name not in changing, f"{path}:{node.lineno}: {name}()"
