"""The reference of what programs import says what its docstrings say, and all of it."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

import vchan
from tests.api_page import MODULES, api_reference, methods_of, prose

PAGE = api_reference()
METHODS = [
    (f"{module}.{name}", method, member)
    for module, names in MODULES.items()
    for name in names
    for method, member in methods_of(getattr(importlib.import_module(module), name))
]


def test_a_docstring_becomes_prose() -> None:
    doc = inspect.cleandoc(
        """One line.

        More *of it*, with `code_*`.

            stays(as_it_is)

        Args:
            path: The socket's,
                in two lines.
            a, b: Both.

        Raises:
            As `cast`.

        Returns:
            What `call
            returns`.
        """
    )
    assert list(prose(doc)) == [
        "One line.",
        "More \\*of it\\*, with `code_*`.",
        "    stays(as_it_is)",
        "**Arguments**",
        "- `path`: The socket's, in two lines.\n- `a`, `b`: Both.",
        "**Raises**",
        "- As `cast`.",
        "**Returns**: What `call returns`.",
    ]


@pytest.mark.parametrize(("owner", "name", "member"), METHODS)
def test_every_public_method_is_there_typed_and_documented(
    owner: str, name: str, member: object
) -> None:
    doc = inspect.getdoc(member)
    assert doc, f"{owner}.{name} has no docstring"
    assert f"**`{name}" in PAGE.partition(f"### {owner}\n")[2]
    function = member.fget if isinstance(member, property) else member
    assert callable(function)
    signature = inspect.signature(function)
    bare = [
        each.name
        for each in signature.parameters.values()
        if each.name != "self" and each.annotation is inspect.Parameter.empty
    ]
    assert bare == [] and signature.return_annotation is not inspect.Signature.empty


def test_both_agents_and_both_clients_have_the_same_methods() -> None:
    """What is known of one is known of the other."""
    named = {owner: {name for o, name, _ in METHODS if o == owner} for owner, _, _ in METHODS}
    assert named["vchan.client.Agent"] == named["vchan.aio.Agent"]
    assert named["vchan.aio.Client"] - named["vchan.client.Client"] == {"connect"}
    assert named["vchan.client.Client"] <= named["vchan.aio.Client"]
    assert named["vchan.client.Client"] - {"close"} <= named["vchan.testing.FakeGuest"]


def test_the_package_has_types() -> None:
    assert (Path(vchan.__file__).parent / "py.typed").is_file()
