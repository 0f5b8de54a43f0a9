"""Parts of the documents that are made from the code, so that a fact stands once.

    python -m tests.docs            names the documents that differ from the code; 1 if any does
    python -m tests.docs --write    writes what the code says into them

A part stands between two comments, which the page does not show: `<!-- made of the code: NAME -->`
and `<!-- end of NAME -->`. What a limit is for stands in the text below the constant; what happens
when it is reached follows the words "At it:", which put the limit into the table of limits.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.api_page import api_reference
from vchan.rpc.outcomes import ENDINGS

ROOT: Final = Path(__file__).parents[1]
AT_IT: Final = "At it:"

LIMIT_NAME: Final = re.compile(r"_?[A-Z][A-Z0-9_]*_(MAX|MIN)|[A-Z][A-Z0-9_]*_(S|MS|BYTES|FRAMES)")
"""Constants that bound something, or say for how long."""


class Limit(NamedTuple):
    """A constant of a module.

    Args:
        module: Without `vchan.`
        reason: What it bounds and why; "" if nobody says.
        at_it: What happens when it is reached; "" if that is not told.
    """

    module: str
    name: str
    reason: str
    at_it: str


# ---------------------------------------------------------------- read from the code


def limits(package: Path = ROOT / "vchan") -> Iterator[Limit]:
    """Every limit of the package, module by module, in the order of the code."""
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package.parent).with_suffix("").as_posix()
        yield from limits_in(path.read_text(), name.replace("/", ".").partition(".")[2])


def limits_in(source: str, module: str) -> Iterator[Limit]:
    """Constants that are called as limits are, and what else says what happens at it."""
    body = ast.parse(source).body
    lines = source.split("\n")
    shared = ""
    for node, below in zip_longest(body, body[1:]):
        name = _constant(node)
        if not name:
            continue
        shared = _comment_above(lines, node) or shared * _is_grouped(lines, node)
        own = _text_below(below) or _comment_beside(lines, node)
        said, shared = own or shared, "" if own else shared
        reason, _, at_it = said.partition(AT_IT)
        if at_it or LIMIT_NAME.fullmatch(name):
            yield Limit(module, name, reason.strip(), at_it.strip())


def _constant(node: ast.stmt) -> str:
    """The name that a statement gives a value to, if it is a constant's."""
    match node:
        case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
            return name if name.isupper() else ""
        case _:
            return ""


def _text_below(node: ast.stmt | None) -> str:
    match node:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return " ".join(text.split())
        case _:
            return ""


def _comment_above(lines: list[str], node: ast.stmt) -> str:
    above: list[str] = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.startswith("# ") or line.startswith("# ---"):
            break
        above.append(line[2:])
    return " ".join(reversed(above))


def _comment_beside(lines: list[str], node: ast.stmt) -> str:
    return lines[(node.end_lineno or node.lineno) - 1].partition("  # ")[2]


def _is_grouped(lines: list[str], node: ast.stmt) -> bool:
    """Whether another constant stands right above it, whose text then is about both."""
    return bool(re.match(r"_?[A-Z][A-Z0-9_]* ?[:=]", lines[node.lineno - 2]))


# ---------------------------------------------------------------- written for people


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    columns = list(head)
    every = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in every
    )


def value_of(limit: Limit) -> str:
    """A limit's value with its unit, which the name says."""
    value = getattr(importlib.import_module(f"vchan.{limit.module}"), limit.name)
    return ", ".join(with_unit(limit.name, each) for each in _each(value))


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def with_unit(name: str, value: float) -> str:
    """One value: bytes as KiB and MiB, times as ms, s, min and h; of what there are just many, the
    number."""
    if "_PER_" in name:
        return f"{value:g} a {'second' if name.endswith('_S') else 'minute'}"
    if "BYTES" in name:
        return _in_units(value, {"MiB": 1024**2, "KiB": 1024, "bytes": 1})
    if re.search(r"_S(_|$)", name):
        return _in_units(value, {"h": 3600, "min": 60, "s": 1, "ms": 0.001})
    if re.search(r"_MS(_|$)", name):
        return f"{value:g} ms"
    if "CHARS" in name:
        return f"{value} characters"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _in_units(value: float, units: dict[str, float]) -> str:
    """In the largest unit of which it is a whole number; else in the smallest."""
    for unit, size in units.items():
        number = value / size
        if number >= 1 and abs(number - round(number)) < 1e-9:
            return f"{round(number)} {unit}"
    return f"{value / size:g} {unit}"


# ---------------------------------------------------------------- the parts


def limits_table() -> str:
    """Limits that say what happens when they are reached."""
    rows = (
        (f"`{each.module}.{each.name}`", value_of(each), each.reason, each.at_it)
        for each in limits()
        if each.at_it
    )
    return table(("limit", "value", "of what, and why", "at it"), rows)


def vm_limits_table() -> str:
    """What a policy's `limit` lines set."""
    module = importlib.import_module(_module_of("class LimitInfo("))
    defaults = module.Limits()
    rows = []
    for name, info in module.LIMITS.items():
        written = _with_letter if info.is_bytes else str
        least, most = written(info.minimum), written(info.maximum)
        default = written(getattr(defaults, name))
        rows.append((f"`{name}`", default, f"{least} to {most}", info.reason))
    return table(("limit", "default", "from, to", "of what, and why"), rows)


def _with_letter(value: int) -> str:
    """Bytes as the policy may write them."""
    for letter, size in (("G", 1024**3), ("M", 1024**2), ("K", 1024)):
        if value % size == 0:
            return f"{value // size}{letter}"
    return str(value)


def metrics_table() -> str:
    """What `vchan metrics` tells of a host, and of each VM."""
    module = importlib.import_module(_module_of("class DaemonCollector("))
    counters = dict.fromkeys(module.COUNTERS, 0)
    audit = {"problem": None, "written": 0, "lost": 0, "left_out": 0}
    status = {
        "version": "",
        "host": "",
        "libvirt": "connected",
        "broker": "connected",
        "policy_problem": None,
        "audit": audit,
        "domains": 0,
        "totals": counters,
    }
    suffix = {"counter": "_total", "info": "_info"}
    rows = [
        (
            f"`{family.name}{suffix.get(family.type, '')}`",
            family.type,
            family.documentation.removesuffix(" Of all VMs."),
        )
        for family in module.families(status, (), ())
        if not family.name.startswith("vchan_vm_") or family.type != "counter"
    ]
    return table(("metric", "kind", "what it tells"), rows)


def alerts_table() -> str:
    """What Prometheus is to say, and what to do then."""
    from tests.rig.monitoring import ALERTS  # here: it needs PyYAML

    rows = [
        (
            f"`{rule['alert']}`",
            f"`{rule['expr']}`" + (f" for {rule['for']}" if "for" in rule else ""),
            rule["labels"]["severity"],
            rule["annotations"]["action"],
        )
        for rule in ALERTS
    ]
    return table(("alert", "when", "severity", "what to do"), rows)


def _module_of(text: str) -> str:
    """The module in which this stands."""
    package = ROOT / "vchan"
    (path,) = (each for each in sorted(package.rglob("*.py")) if text in each.read_text())
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")


def endings_table() -> str:
    """How a request ends that gets no answer, by the reason in its Returned."""
    rows = [
        (
            f"{each.reason} {each.name}",
            each.meaning,
            each.ran.value,
            f"`{each.error.__name__}`",
            str(each.http_status),
        )
        for each in ENDINGS
    ]
    return table(("reason", "meaning", "has it run?", "a caller gets", "over HTTP"), rows)


def options_table(module: str) -> str:
    """The options of a daemon's own, as it registers them."""
    rows = (
        (f"`{option.name}`", default_of(option), option.help.replace("*", "\\*"))
        for option in importlib.import_module(module).OPTIONS
    )
    return table(("option", "default", "what it is"), rows)


def default_of(option: Any) -> str:
    """An option's default as one would write it into the file; of many values, each as code."""
    value = option.default if option.sample_default is None else option.sample_default
    if option.sample_default is not None:
        return str(value).strip("<>")
    return ", ".join(f"`{each}`" for each in _each_of(value) if each != "") or "none"


def _each_of(value: Any) -> list[str]:
    if isinstance(value, float):
        return [f"{value:g}"]
    return [str(each) for each in (value if isinstance(value, list) else [value])]


class Status(NamedTuple):
    """An exit status of a program.

    Args:
        meaning: "" if nobody says.
    """

    number: int
    meaning: str


WRITE_HELP = frozenset({"vchan.host.config_files", "vchan.host.help_text"})
"""What writes programs' --help and --version, and ends them if that cannot be done."""


def exit_statuses(module: str) -> list[Status]:
    """What a program's module names EXIT_..., its own and what it imports, with the text below."""
    found: set[Status] = set()
    for name in _modules_with_statuses(module, set()):
        body = _tree_of(name).body
        for node, below in zip_longest(body, body[1:]):
            match node:
                case ast.AnnAssign(value=ast.Constant(value=int(number))):
                    if _constant(node).startswith("EXIT_"):
                        found.add(Status(number, _text_below(below)))
                case _:
                    pass
    return sorted(found)


def _modules_with_statuses(module: str, seen: set[str]) -> set[str]:
    """A module, those that it imports of its own package, those that it has an EXIT_ of, and those
    that write its --help."""
    seen.add(module)
    package = module.rpartition(".")[0]
    inside = package if package != "vchan" else module
    for node in ast.walk(_tree_of(module)):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        names = [name.name for name in node.names]
        others = {node.module} if any(name.startswith("EXIT_") for name in names) else set()
        imported = {node.module, *(f"{node.module}.{name}" for name in names)}
        others |= imported & WRITE_HELP
        if f"{node.module}.".startswith(f"{inside}."):
            others |= imported
        for other in others - seen:
            if _source_of(other) is not None:
                _modules_with_statuses(other, seen)
    return seen


def _source_of(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.exists()), None)


@cache
def _tree_of(module: str) -> ast.Module:
    source = _source_of(module)
    assert source is not None, module
    return ast.parse(source.read_text())


def programs() -> dict[str, str]:
    """Every command that is installed, and the module that it is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {name: target.partition(":")[0] for name, target in project["scripts"].items()}
    return dict(sorted(found.items()))


def statuses_table() -> str:
    """How each program ends; programs that end alike are in one row."""
    who: dict[tuple[int, str], list[str]] = {}
    for program, module in programs().items():
        for status in exit_statuses(module):
            who.setdefault(status, []).append(f"`{program}`")
    rows = ((str(number), ", ".join(who[number, text]), text) for number, text in sorted(who))
    return table(("status", "of", "means"), rows)


def commands_help() -> str:
    """What each command says of itself. The daemons of a host are left to oslo.config's words,
    which are another project's."""
    parts = []
    for program, module in programs().items():
        beside = f"{module.rpartition('.')[0]}.parser"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # oslo's own
            code = importlib.import_module(module if _source_of(beside) is None else beside)
        if hasattr(code, "build_parser"):
            parts += [_help_of(parser) for parser in _parsers(code.build_parser())]
        elif hasattr(code, "USAGE"):
            parts.append(f"## {program}\n\n```text\n{code.USAGE.strip()}\n```")
    return "\n\n".join(parts)


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser, and those of its commands, depth first; a command with two names comes once."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in dict.fromkeys(action.choices.values()):
                yield from _parsers(command)


def _form_of_any_python(formatter: Any) -> Any:
    """argparse's, but of options with a value as Python has them before 3.13: documents that are
    compared with the code are the same with each."""

    def option(self: Any, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return str(formatter._format_action_invocation(self, action))
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return ", ".join(f"{name} {value}" for name in action.option_strings)

    return type("Formatter", (formatter,), {"_format_action_invocation": option})


def _help_of(parser: argparse.ArgumentParser) -> str:
    formatter = _form_of_any_python(parser.formatter_class)
    parser.formatter_class = partial(formatter, width=100)  # not as wide as the terminal
    depth = "###" if " " in parser.prog else "##"
    return f"{depth} {parser.prog}\n\n```text\n{parser.format_help().strip()}\n```"


def decisions_list() -> str:
    """Every decision by its title."""
    pages = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    titles = (page.read_text().partition("\n")[0].removeprefix("# ") for page in pages)
    return "\n".join(f"- [{title}]({page.name})" for title, page in zip(titles, pages, strict=True))


PARTS: Final[dict[str, tuple[str, Callable[[], str]]]] = {
    "limits": ("docs/limits.md", limits_table),
    "limits of a VM": ("docs/policy.md", vm_limits_table),
    "metrics": ("docs/monitoring.md", metrics_table),
    "alerts": ("docs/monitoring.md", alerts_table),
    "endings": ("docs/protocol.md", endings_table),
    "options of vchan-host": ("docs/host.md", partial(options_table, "vchan.host.config")),
    "options of vchan-conductor": (
        "docs/conductor.md",
        partial(options_table, "vchan.conductor.config"),
    ),
    "decisions": ("docs/decisions/index.md", decisions_list),
    "exit statuses": ("docs/commands.md", statuses_table),
    "commands": ("docs/commands.md", commands_help),
    "api": ("docs/api.md", api_reference),
}
"""By its name: the document that a part stands in, and what makes it."""


def replaced(text: str, name: str, part: str) -> str:
    """A document with one of its parts made anew.

    Raises:
        ValueError: The comments around it are not there, or are there twice.
    """
    begin, end = f"<!-- made of the code: {name} -->", f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin!r}, and after it {end!r}, once each")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n\n{part}\n\n{end}{rest.partition(end)[2]}"


def main(write: bool, root: Path = ROOT) -> list[str]:
    """Make every part.

    Returns:
        The documents that were not as the code has them, and in which part.
    """
    stale = []
    for name, (document, make) in PARTS.items():
        path = root / document
        text = path.read_text()
        made = replaced(text, name, make())
        if made != text:
            stale.append(f"{document}: {name}")
            if write:
                path.write_text(made)
    return stale


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tests.docs", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--write", action="store_true", help="write them")
    options = parser.parse_args()
    found = main(options.write)
    print("\n".join(found) or "the documents are as the code has them")
    sys.exit(1 if found and not options.write else 0)
