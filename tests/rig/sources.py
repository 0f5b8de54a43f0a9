"""Modules as their sources have them, whichever build runs: their classes can be derived from."""

import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def from_source(name: str) -> ModuleType:
    """A module of vchan's. Where a compiled one runs, it is a second one beside that, made once."""
    module = import_module(name)
    source = ROOT / f"{name.replace('.', '/')}.py"
    if module.__file__ == str(source):
        return module
    beside = f"{name}_source"
    if beside not in sys.modules:
        spec = importlib.util.spec_from_file_location(beside, source)
        assert spec is not None and spec.loader is not None
        sys.modules[beside] = made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
    return sys.modules[beside]
