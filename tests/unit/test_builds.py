"""Which build runs: what is compiled, if it loads; the sources otherwise."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from sysconfig import get_config_var
from typing import Any

import pytest

from vchan import builds
from vchan.cli import run
from vchan.host.vm import vm
from vchan.session import session

ROOT = Path(__file__).parents[2]
SUFFIX = str(get_config_var("EXT_SUFFIX"))
IMPORT = "import vchan.guest.daemon; from vchan import builds; print(builds.running())"
HOST_LIBRARY = "vchan/host/library__mypyc"


def compiled_modules() -> dict[str, tuple[str, ...]]:
    """By the package that has their library."""
    names: Any = runpy.run_path(str(ROOT / "setup.py"), run_name="read")["COMPILED"]
    return dict(names)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The sources, alone."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "vchan", tmp_path / "vchan", ignore=ignored)
    return tmp_path


def running(tree: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-S", "-c", IMPORT],  # site has imported much
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def damage(tree: Path, *names: str) -> None:
    """Put what is no library where compiled modules would be."""
    for name in names:
        (tree / f"{name}{SUFFIX}").write_bytes(b"\x7fELF, and no more")


def test_sources_alone_are_pure(tree: Path) -> None:
    assert running(tree) == "pure"


def test_sources_run_where_the_library_does_not_load(tree: Path) -> None:
    damage(tree, "vchan/library__mypyc", *(name[:-3] for name in compiled_modules()["vchan"]))
    said = running(tree)
    assert said.startswith("pure: ") and "vchan/library__mypyc" in said


def test_the_hosts_sources_run_where_its_library_does_not_load(tree: Path) -> None:
    damage(tree, HOST_LIBRARY, *(name[:-3] for name in compiled_modules()["vchan.host"]))
    said = running(tree)
    assert said.startswith("pure: ") and HOST_LIBRARY in said


def test_a_guest_has_no_modules_of_the_hosts(tree: Path) -> None:
    shutil.rmtree(tree / "vchan" / "host")
    assert running(tree) == "pure"


def test_what_is_compiled_for_another_python_is_left_aside(tree: Path) -> None:
    (tree / "vchan/library__mypyc.cpython-39-x86_64-linux-gnu.so").write_bytes(b"")
    (tree / "vchan/session/session.cpython-39-x86_64-linux-gnu.so").write_bytes(b"")
    assert running(tree) == "pure"


def test_the_environment_has_the_sources_run(tree: Path) -> None:
    damage(tree, "vchan/library__mypyc", "vchan/session/session")
    damage(tree, HOST_LIBRARY, "vchan/host/vm/vm")
    assert running(tree, VCHAN_BUILD="pure") == "pure: VCHAN_BUILD=pure"
    assert running(ROOT, VCHAN_BUILD="pure") == "pure: VCHAN_BUILD=pure"


def test_vchan_says_which_build_runs(capsys: pytest.CaptureFixture[str]) -> None:
    is_compiled = not str(session.__file__).endswith(".py")
    assert str(vm.__file__).endswith(".py") is not is_compiled
    assert builds.running() == ("compiled" if is_compiled else "pure")
    assert run(["version"]) == 0
    line = capsys.readouterr().out
    assert re.fullmatch(r"vchan [0-9.]+, (compiled|pure)\n", line)
    assert ("compiled" in line) is is_compiled
    with pytest.raises(SystemExit):
        run(["--version"])
    assert capsys.readouterr().out == line


@pytest.mark.parametrize(
    ("common", "host", "said"),
    [
        ("compiled", "compiled", "compiled"),
        ("pure", "pure", "pure"),
        ("compiled", "", "compiled"),
        ("compiled", "pure: too old", "compiled; the host's modules pure: too old"),
        ("pure", "compiled", "pure; the host's modules compiled"),
        ("pure: too old", "pure: this, too", "pure: too old"),
        ("pure", "pure: too old", "pure: too old"),
    ],
)
def test_both_libraries_are_told_of_where_they_differ(
    monkeypatch: pytest.MonkeyPatch, common: str, host: str, said: str
) -> None:
    found = {builds.COMMON: common, builds.HOST: host}
    monkeypatch.setattr(builds, "_build", found.__getitem__)
    assert builds.running() == said


def test_what_is_compiled_is_there_and_is_no_program() -> None:
    for package, names in compiled_modules().items():
        for name in names:
            source = (ROOT / name).read_text()
            assert "__main__" not in source, f"{name}: python -m cannot run what is compiled"
            assert name.startswith("vchan/host/") is (package == builds.HOST)


def test_each_library_has_the_module_that_tells_its_build() -> None:
    for package, names in compiled_modules().items():
        assert f"{builds._SAMPLES[package].replace('.', '/')}.py" in names


def test_no_test_sets_a_constant_that_is_compiled_in() -> None:
    """It would have no effect where the modules are compiled."""
    modules = [name for names in compiled_modules().values() for name in names]
    constants = {
        name.removesuffix(".py").replace("/", "."): set(
            re.findall(r"^(\w+): Final\b", (ROOT / name).read_text(), re.MULTILINE)
        )
        for name in modules
    }
    for file in sorted((ROOT / "tests").rglob("*.py")):
        text = file.read_text()
        if "setattr(" not in text:
            continue
        tree = ast.parse(text)
        known = {
            each.asname or each.name: f"{node.module}.{each.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for each in node.names
        }
        for node in ast.walk(tree):
            match node:
                case ast.Call(
                    ast.Attribute(attr="setattr"),
                    [ast.Name(module), ast.Constant(str(constant)), *_],
                ):
                    found = constants.get(known.get(module, ""), set())
                    assert constant not in found, f"{file}:{node.lineno}: {constant} is Final"
                case _:
                    pass
