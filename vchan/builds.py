"""Which build runs: modules that were compiled (`setup.py` names them), or their sources.

Compiled modules lie beside their sources, and Python takes them first where they are of its
version. Each is a door into a library: one for what guests and hosts have in common, and for the
guest's daemon; one for the host's own modules. Either works beside the sources of the other. Where
a library does not load (it needs a newer libc, say), or if VCHAN_BUILD=pure says so, the sources
run.
"""

import os
import sys
from importlib import import_module
from typing import Any, Final

COMMON: Final = "vchan"
HOST: Final = "vchan.host"
"""Packages that have a library, each for its own modules. Where that of the first does not load,
all sources run."""
VARIABLE: Final = "VCHAN_BUILD"
"""In the environment: "pure" has the sources run."""
_SAMPLES: Final = {COMMON: "vchan.session.session", HOST: "vchan.host.vm.vm"}
"""A module of each that is compiled if any is."""

_problems: dict[str, str] = {}  # why it is not the compiled modules, of packages that were asked


class _Sources:
    """Finds a package's modules as if none had been compiled."""

    def __init__(self, package: str) -> None:
        self._prefix = f"{package}."

    def find_spec(self, name: str, path: Any = None, _target: Any = None) -> Any:
        """As importlib asks its finders."""
        if not name.startswith(self._prefix):
            return None
        from importlib import machinery  # which may not be there yet: it is looked for here, too

        kinds = (
            (machinery.SourceFileLoader, machinery.SOURCE_SUFFIXES),
            (machinery.SourcelessFileLoader, machinery.BYTECODE_SUFFIXES),
        )
        specs = (machinery.FileFinder(each, *kinds).find_spec(name) for each in path or ())
        return next(filter(None, specs), None)


def choose(package: str) -> None:
    """Before any other module of this package is imported: see the top of this file."""
    is_pure = os.environ.get(VARIABLE) == "pure"
    problem = f"{VARIABLE}=pure" if is_pure else _load(f"{package}.library__mypyc")
    _problems[package] = problem
    if problem:
        sys.meta_path.insert(0, _Sources(package))


def _load(library: str) -> str:
    """Why a library does not load, if there is one for this Python."""
    try:
        import_module(library)
    except ModuleNotFoundError as error:
        return "" if error.name == library else str(error)
    except ImportError as error:
        return str(error)
    return ""


def running() -> str:
    """By the modules that would run: "compiled" or "pure"; and why, if what is compiled does not
    load. Where the host's own modules are there, and of the other build: that, too."""
    common, host = _build(COMMON), _build(HOST)
    if not host:
        return common
    if host.partition(":")[0] == common.partition(":")[0]:
        return common if ":" in common else host
    return f"{common}; the host's modules {host}"


def _build(package: str) -> str:
    """Of the modules that a package has a library for; "": they are not installed."""
    from importlib.util import find_spec

    try:
        found = find_spec(_SAMPLES[package])
    except ModuleNotFoundError:
        return ""
    build = "compiled" if found and (found.origin or "").endswith(".so") else "pure"
    problem = _problems[package]
    return f"{build}: {problem}" if problem else build


def version_line(program: str) -> str:
    """What a program says of its version."""
    version: str = import_module("vchan").__version__
    return f"{program} {version}, {running()}"
