"""The reference of what programs import, from its docstrings and annotations: docs/api.md."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any, Final

MODULES: Final[dict[str, tuple[str, ...]]] = {
    "vchan.client": ("Agent", "Client"),
    "vchan.aio": ("Agent", "Client"),
    "vchan.testing": ("FakeGuest", "Sent"),
    "vchan.errors": (),  # all of it
}
"""What is said to be for programs, and stays: decision 11."""

_SECTION: Final = re.compile(r"(Args|Attributes|Raises|Returns):$")
_TITLES: Final = {"Args": "Arguments", "Attributes": "Attributes", "Raises": "Raises"}
_ITEM: Final = re.compile(r"([\w, ]+): (.*)")


def api_reference() -> str:
    """Every module, class and method."""
    return "\n\n".join(part for name in MODULES for part in _module(name))


def _module(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    yield f"## {name}"
    yield from prose(inspect.getdoc(module) or "")
    for class_name in MODULES[name] or _classes_of(module):
        yield from _class(name, getattr(module, class_name))


def _classes_of(module: Any) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__
    ]


def _class(module: str, what: type) -> Iterator[str]:
    yield f"### {module}.{what.__name__}"
    if issubclass(what, Exception):
        yield f"*{', '.join(base.__name__ for base in what.__bases__)}*"
    elif not issubclass(what, tuple):
        yield _code(f"{what.__name__}{_signature(what)}")
    yield from prose(inspect.cleandoc(what.__dict__.get("__doc__") or ""))
    if issubclass(what, Exception):
        return
    if issubclass(what, tuple):
        fields = inspect.get_annotations(what)
        yield "\n".join(f"- `{name}: {_plain(kind)}`" for name, kind in fields.items())
        return
    for name, member in methods_of(what):
        if isinstance(member, property):
            returns = _signature(member.fget).rpartition(" -> ")[2]
            yield f"**`{name}: {returns}`**"
        else:
            begin = "async def" if inspect.iscoroutinefunction(member) else "def"
            yield f"**`{name}`**"
            yield _code(f"{begin} {name}{_signature(member)}")
        yield from prose(inspect.getdoc(member) or "")


def methods_of(what: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties, those of the bases that are nobody's to import too."""
    seen: set[str] = set()
    for each in what.__mro__:
        for name, member in vars(each).items():
            is_member = inspect.isfunction(member) or isinstance(member, property)
            if is_member and not name.startswith("_") and name not in seen:
                seen.add(name)
                yield name, member


def _signature(what: Any) -> str:
    signature = inspect.signature(what)
    parameters = [each for each in signature.parameters.values() if each.name != "self"]
    text = str(signature.replace(parameters=parameters))
    return _plain(text.removesuffix(" -> None") if inspect.isclass(what) else text)


def _plain(annotation: Any) -> str:
    """Without quotes and the modules' names, that a reader does without."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    for word in ("os.", "collections.abc.", "typing."):
        text = text.replace(word, "")
    return re.sub(r"'([A-Z][\w.\[\], |]*)'", r"\1", text)


def _code(text: str) -> str:
    if len(text) > 95:
        head, _, rest = text.partition("(")
        inside, _, tail = rest.rpartition(")")
        lines = re.split(r", (?=[*\w]+(?:[:,]|$))", inside)
        text = "\n".join([f"{head}(", *(f"    {line}," for line in lines), f"){tail}"])
    return f"```python\n{text}\n```"


def prose(doc: str) -> Iterator[str]:
    """A docstring's paragraphs: code that is indented stays so, sections become lists."""
    for paragraph in re.split(r"\n\s*\n", doc.strip()):
        head, _, rest = paragraph.partition("\n")
        found = _SECTION.fullmatch(head)
        if found is None:
            yield paragraph if paragraph.startswith("    ") else _escaped(paragraph)
        elif found[1] == "Returns":
            yield f"**Returns**: {_escaped(' '.join(textwrap.dedent(rest).split()))}"
        else:
            yield f"**{_TITLES[found[1]]}**"
            yield "\n".join(_items(textwrap.dedent(rest)))


def _items(text: str) -> Iterator[str]:
    item = ""
    for line in text.splitlines():
        if item and not line.startswith(" "):
            yield _item(item)
            item = ""
        item = f"{item} {line.strip()}".strip()
    if item:
        yield _item(item)


def _item(text: str) -> str:
    found = _ITEM.fullmatch(text)
    if found is None:
        return f"- {_escaped(text)}"
    names = ", ".join(f"`{name}`" for name in found[1].split(", "))
    return f"- {names}: {_escaped(found[2])}"


def _escaped(text: str) -> str:
    """What Markdown would take for its own, outside of code."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*<])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)
