"""One VM, one object: the daemon speaks to it by methods, and reaches through none of its parts."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("oslo_config", reason='oslo.config is not installed: pip install "vchan[host]"')
pytest.importorskip("amqp", reason="py-amqp is not installed")

from tests.rig.sources import ROOT, from_source
from vchan.host import daemon
from vchan.host.hypervisor import domains

HostedVm = from_source("vchan.host.vm.vm").HostedVm

METHODS_MAX = 7
"""By which the daemon tells a VM something; the rest are what it may read."""
TABLE = "self._vms"
MAKERS = ("self._vm_of", "HostedVm")
"""What a VM is had from, beside the table."""


def names_of_vms(function: ast.AST) -> set[str]:
    """The local names in a function that stand for a VM."""
    names = {"hosted"}
    for node in ast.walk(function):
        match node:
            case ast.arg(arg=name, annotation=ast.expr() as kind) if "HostedVm" in ast.unparse(
                kind
            ):
                names.add(name)
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if is_vm(value, names):
                names.add(name)
            case (
                ast.For(target=target, iter=iterated)
                | ast.comprehension(target=target, iter=iterated)
            ) if ast.unparse(iterated).startswith(TABLE):
                names |= {each.id for each in ast.walk(target) if isinstance(each, ast.Name)}
            case _:
                pass
    return names


def is_vm(node: ast.expr, names: set[str]) -> bool:
    """Whether an expression is a VM."""
    match node:
        case ast.Name(id=name):
            return name in names
        case ast.Subscript(value=table):
            return ast.unparse(table) == TABLE
        case ast.Call(func=func):
            made_by = ast.unparse(func)
            return made_by in MAKERS or made_by in (f"{TABLE}.get", f"{TABLE}.pop")
        case _:
            return False


def reached(source: str) -> Iterator[tuple[str, list[str]]]:
    """Of each place where something of a VM is named: its text, and the names one after another."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        names = names_of_vms(function)
        inner = {id(node.value) for node in ast.walk(function) if isinstance(node, ast.Attribute)}
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and id(node) not in inner:
                path: list[str] = []
                at: ast.expr = node
                while isinstance(at, ast.Attribute):
                    path.append(at.attr)
                    at = at.value
                    while isinstance(at, ast.Call) and not is_vm(at, names):
                        at = at.func
                if is_vm(at, names):
                    yield ast.unparse(node), path[::-1]


def test_the_daemon_reaches_through_nothing_of_a_vm() -> None:
    places = list(reached(Path(inspect.getfile(daemon)).read_text(encoding="utf-8")))
    assert len(places) > 10, "it looks at nothing"
    assert [text for text, path in places if len(path) > 1 or path[0].startswith("_")] == []


@pytest.mark.parametrize(
    "line",
    [
        "hosted.channel.downward",
        "self._vms[uuid].guard.update(1)",
        "[each.guard.counters for each in self._vms.values()]",
        "self._vm_of(name).state().upper",
        "one = self._vms.get(uuid); one.downward.topics",
    ],
)
def test_reaching_through_is_found(line: str) -> None:
    """Else the test above would find nothing whatever the daemon does."""
    places = reached(f"def f(self, uuid, hosted):\n    {line}\n")
    assert any(len(path) > 1 for _, path in places)


def test_a_vm_is_spoken_to_by_a_handful_of_methods() -> None:
    used = {path[0] for _, path in reached(Path(inspect.getfile(daemon)).read_text())}
    told = {
        name
        for name in used
        if inspect.isfunction(member := inspect.getattr_static(HostedVm, name, None))
        and inspect.signature(member).return_annotation in ("None", "bool", "Callable[[], None]")
    }
    assert len(told) <= METHODS_MAX, told
    public = {name for name in vars(HostedVm) if not name.startswith("_")}
    assert public - used == set(), "nobody asks for these"


def test_the_daemon_knows_no_part_of_a_vm() -> None:
    tree = ast.parse(Path(inspect.getfile(daemon)).read_text(encoding="utf-8"))
    imported = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vchan.host.vm")
        for alias in node.names
    }
    assert imported == {
        "vchan.host.vm.channel.Home",
        "vchan.host.vm.streams.Program",  # who at the socket wants streams: no part of a VM
        "vchan.host.vm.vm.HostedVm",
        "vchan.host.vm.vm.VmEvent",
    }


@pytest.mark.parametrize("module", ["vm/channel.py", "vm/vm.py", "daemon.py"])
def test_the_phase_of_a_vm_stands_in_its_domain_alone(module: str) -> None:
    """Elsewhere it is asked for, never kept, and never changed."""
    words = {phase.value for phase in domains.Phase} | {"phase", "paused", "hushed", "speaks"}
    tree = ast.parse((ROOT / "vchan/host" / module).read_text(encoding="utf-8"))
    stored = {
        node.attr.strip("_")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    kept = {name for name in stored if set(name.removeprefix("is_").split("_")) & words}
    assert kept == set()
