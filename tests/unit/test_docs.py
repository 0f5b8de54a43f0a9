"""Documents: the parts that are made from the code are up to date; every limit has a reason."""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests import docs
from tests.docs import Limit, exit_statuses, limits, limits_in, programs, replaced, table, with_unit

CODE = '''
"""A module."""
QUEUE_MAX: Final = 8
"""What waits: as much as
one look takes. At it: the next one is refused."""
# A peer that comes back
# does so within a second.
RETRY_MIN_S = 0.5
RETRY_MAX_S = 8.0
LOOK_S = 1.0  # as long as a look takes
NAKED_BYTES: Final = 4096

PREFETCH: Final = 64
"""Handed out. At it: the rest waits."""
WORDS: Final = ("a", "b")
"""No limit."""
'''


def test_a_limit_has_the_text_beside_it() -> None:
    assert list(limits_in(CODE, "m")) == [
        Limit(
            "m", "QUEUE_MAX", "What waits: as much as one look takes.", "the next one is refused."
        ),
        Limit("m", "RETRY_MIN_S", "A peer that comes back does so within a second.", ""),
        Limit("m", "RETRY_MAX_S", "A peer that comes back does so within a second.", ""),
        Limit("m", "LOOK_S", "as long as a look takes", ""),
        Limit("m", "NAKED_BYTES", "", ""),
        Limit("m", "PREFETCH", "Handed out.", "the rest waits."),
    ]


def test_every_limit_has_a_reason() -> None:
    found = list(limits())
    assert len(found) > 200
    bare = [f"vchan.{each.module}.{each.name}" for each in found if not each.reason]
    assert bare == [], "a text below each says what it bounds, and why it is what it is"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("FRAME_BYTES_MAX", 16 * 1024, "16 KiB"),
        ("BACKLOG_BYTES_MAX", 3 * 1024**2, "3 MiB"),
        ("ODD_BYTES", 1025, "1025 bytes"),
        ("TURN_S", 0.0002, "0.2 ms"),
        ("ACK_DELAY_S", 0.02, "20 ms"),
        ("BURST_S", 1.5, "1500 ms"),
        ("CALL_S_MAX", 3600.0, "1 h"),
        ("PATIENCE_MS", 500, "500 ms"),
        ("TOPICS_JUDGED_PER_S", 256, "256 a second"),
        ("LINE_CHARS_MAX", 1000, "1000 characters"),
        ("PEERS_MAX", 128, "128"),
    ],
)
def test_a_value_has_the_unit_that_its_name_says(name: str, value: float, text: str) -> None:
    assert with_unit(name, value) == text


def test_a_part_of_a_document_is_replaced_and_the_rest_is_kept() -> None:
    page = "head\n<!-- made of the code: x -->\n\nold\n\n<!-- end of x -->\ntail"
    made = replaced(page, "x", table(("a", "b"), [("1", "x|y")]))
    part = "| a | b |\n| --- | --- |\n| 1 | x\\|y |"
    assert made == f"head\n<!-- made of the code: x -->\n\n{part}\n\n<!-- end of x -->\ntail"
    assert replaced(made, "x", part) == made


@pytest.mark.parametrize(
    "page",
    [
        "",
        "<!-- made of the code: x -->",
        "<!-- end of x --> <!-- made of the code: x -->",
        "<!-- made of the code: x --> <!-- made of the code: x --> <!-- end of x -->",
    ],
)
def test_a_document_without_the_place_for_a_part_is_an_error(page: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        replaced(page, "x", "")


def test_a_document_that_differs_is_named_and_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- made of the code: x -->\n8\n<!-- end of x -->")
    monkeypatch.setattr(docs, "PARTS", {"x": ("page.md", lambda: "9")})
    assert docs.main(write=False, root=tmp_path) == ["page.md: x"]
    assert "8" in page.read_text()
    assert docs.main(write=True, root=tmp_path) == ["page.md: x"]
    assert docs.main(write=False, root=tmp_path) == []
    assert "\n9\n" in page.read_text()


@pytest.mark.long
def test_the_documents_are_as_the_code_has_them() -> None:
    pytest.importorskip("amqp", reason="amqp is not installed: some limits are the broker's")
    pytest.importorskip("oslo_config", reason="oslo.config is not installed")
    pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
    stale = docs.main(write=False)
    if sys.version_info >= (3, 13):  # whose argparse words its help otherwise
        stale = [part for part in stale if part != "docs/commands.md: commands"]
    assert stale == [], "python -m tests.docs --write"


def test_every_program_says_how_it_ends() -> None:
    statuses = {name: exit_statuses(module) for name, module in programs().items()}
    assert len(statuses) >= 7
    for name, found in statuses.items():
        numbers = [status.number for status in found]
        assert numbers[0] == 0 and len(set(numbers)) == len(numbers) > 1, name
        assert all(status.meaning.endswith(".") for status in found), name
        assert name == "vchan" or 1 in numbers, f"{name}: its --help may not be written"


def test_every_command_and_argument_of_it_is_in_the_page() -> None:
    def leaf(name: str) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog=f"top {name}")
        parser.add_argument(f"--{name}-option", help=f"help of {name}")
        return parser

    top = argparse.ArgumentParser(prog="top")
    commands = top.add_subparsers()
    for name in ("one", "two"):
        commands.add_parser(name, parents=[leaf(name)], add_help=False)
    nested = commands.choices["two"].add_subparsers()
    nested.add_parser("deep", help="the deepest")
    helps = [docs._help_of(parser) for parser in docs._parsers(top)]
    titles = [text.partition("\n")[0] for text in helps]
    assert titles == ["## top", "### top one", "### top two", "### top two deep"]
    assert "--one-option" in helps[1] and "help of one" in helps[1]


ROOT = Path(__file__).parents[2]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
    "contracts"
]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_floors_are_drawn_as_the_contracts_have_them() -> None:
    drawing = PAGE.partition("floors of vchan.host\n")[2].partition("\n`protocol` stands")[0]
    lines = [line for line in drawing.splitlines() if line.strip()]
    # Two columns; a floor's rooms, then at least two blanks, then what it knows.
    for first, container in ((4, "vchan"), (60, "vchan.host")):
        drawn = [re.split(" {2,}", line[first:])[0] for line in lines if line[first:].strip()]
        floors = next(c["layers"] for c in CONTRACTS if c.get("containers") == [container])
        assert drawn == floors


def test_each_module_is_in_the_table_and_pure_as_the_contract_says() -> None:
    pure = next(c["source_modules"] for c in CONTRACTS if c["name"].startswith("Pure"))
    rows = re.findall(r"^\| (`[^|]*) \| (pure|I/O) \|", PAGE, re.MULTILINE)
    said = {
        f"vchan.{name}": kind for names, kind in rows for name in re.findall("`([^`]+)`", names)
    }
    modules = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in (ROOT / "vchan").rglob("*.py")
        if file.name != "__init__.py"
    }
    held = {m: any(f"{m}.".startswith(f"{p}.") for p in pure) for m in modules}
    assert said == {m: "pure" if is_pure else "I/O" for m, is_pure in held.items()}


def modules_in_the_tree(page: str) -> set[str]:
    """The modules that a drawing of vchan/ names, a line each: "  room/", "    module.py  what"."""
    rooms: list[str] = []
    found = set()
    line = re.compile(r"^    ((?:  )*)([a-z_]+(?:/|\.py))(?: |$)", re.MULTILINE)
    for indent, name in line.findall(page):
        del rooms[len(indent) // 2 :]
        if name.endswith("/"):
            rooms.append(name.removesuffix("/"))
        else:
            found.add(".".join([*rooms, name.removesuffix(".py")]))
    return found


def modules_of(package: Path) -> set[str]:
    """Its modules, less what only names a package or starts one."""
    files = {file.relative_to(ROOT).with_suffix("") for file in package.rglob("*.py")}
    return {".".join(each.parts) for each in files if not each.name.startswith("__")}


def test_the_tree_of_decision_11_has_every_module_and_no_other() -> None:
    page = (ROOT / "docs" / "decisions" / "0011-rooms.md").read_text()
    assert modules_in_the_tree(page) == modules_of(ROOT / "vchan")


def test_the_path_of_a_request_is_drawn_through_modules_that_there_are() -> None:
    drawing = PAGE.partition("## A request, end to end\n")[2].partition("\n1. ")[0]
    named = set(re.findall(r"(?:[a-z_]+\.)+[a-z_]+|[a-z]+_[a-z_]+", drawing))
    assert len(named) > 12, "it looks at nothing"
    known = modules_of(ROOT / "vchan")
    assert [name for name in named if not any(f".{m}".endswith(f".{name}") for m in known)] == []


def test_a_module_that_the_tree_leaves_out_is_missed() -> None:
    lines = ("vchan/", "  errors.py   P  what", "  io/", "    loop.py  it", "  cli/", "    top.py")
    page = "".join(f"    {line}\n" for line in lines)
    assert modules_in_the_tree(page) == {"vchan.errors", "vchan.io.loop", "vchan.cli.top"}


PACKAGES = sorted(
    file.parent for file in (ROOT / "vchan").rglob("__init__.py") if file.parent.name != "vchan"
)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_a_packages_docstring_says_what_each_of_its_modules_is(package: Path) -> None:
    said = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    modules = [file.stem for file in package.glob("*.py") if not file.stem.startswith("__")]
    rooms = [file.parent.name for file in package.glob("*/__init__.py")]
    assert [name for name in (*modules, *rooms) if not re.search(rf"\b{name}\b", said)] == []


def test_each_page_is_in_the_site() -> None:
    docs = ROOT / "docs"
    blocks = re.findall(r"```\{toctree\}\n(.*?)```", (docs / "index.md").read_text(), re.DOTALL)
    lines = (line for block in blocks for line in block.splitlines())
    listed = {line for line in lines if line and not line.startswith(":")}
    assert {path.stem for path in docs.glob("*.md")} - {"index"} == listed - {"decisions/index"}
