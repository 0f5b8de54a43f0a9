"""Run by another environment's Python: which files of it this process has loaded, for the image of
a guest whose Python is of the same version."""

from __future__ import annotations

import pathlib
import sys

SITE = "site"
_DATA = (".json", ".j2", ".template", ".pem")
_OWN = "__editable__"
"""vchan itself, which every image has."""


def files(*whole: str) -> dict[str, str]:
    """{path in the guest: file here}: modules, the libraries beside them, data, entry points.

    Args:
        whole: Packages that import as they go: all of their modules.
    """
    found: dict[str, str] = {}
    for module in list(sys.modules.values()):
        path = pathlib.Path(getattr(module, "__file__", None) or "/")
        if "site-packages" in path.parts:
            _add(found, path)
    for library in [each for each in map(pathlib.Path, found.values()) if each.suffix == ".so"]:
        for more in library.parent.glob("*.so*"):
            _add(found, more)
    site = next(pathlib.Path(path) for path in sys.path if path.endswith("site-packages"))
    for name in {each.split("/")[1] for each in found}:
        for more in (site / name).rglob("*"):
            if more.suffix in _DATA:
                _add(found, more)
    for name in whole:
        for more in (site / name).rglob("*.py"):
            _add(found, more)
    for pattern in ("*.libs/*", "*.dist-info/METADATA", "*.dist-info/entry_points.txt"):
        for more in site.glob(pattern):
            _add(found, more)
    return found


def _add(found: dict[str, str], path: pathlib.Path) -> None:
    at = path.parts.index("site-packages") + 1
    if not path.parts[at].startswith(_OWN):
        found["/".join((SITE, *path.parts[at:]))] = str(path)
