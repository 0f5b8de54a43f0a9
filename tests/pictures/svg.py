"""SVG, as a tree of elements. Numbers are written with one decimal, so that equal pictures are
equal bytes on every machine."""

from __future__ import annotations

from typing import Final
from xml.etree import ElementTree

Element = ElementTree.Element

FONT: Final = "system-ui, sans-serif"
FIXED_FONT: Final = "ui-monospace, Menlo, Consolas, monospace"


def number(value: float) -> str:
    """As it stands in an attribute."""
    return f"{value:.1f}".removesuffix(".0")


def element(tag: str, text: str = "", *parts: Element, **attributes: str | float) -> Element:
    """An element; a name's `_` stands for `-`, and one at its end for nothing."""
    made = Element(
        tag,
        {
            name.rstrip("_").replace("_", "-"): value if isinstance(value, str) else number(value)
            for name, value in attributes.items()
        },
    )
    made.text = text or None
    made.extend(parts)
    return made


def picture(width: float, height: float, title: str, style: str, *parts: Element) -> str:
    """A whole picture.

    Args:
        width: In pixels, as height.
        title: What it shows, for those who cannot see it.
        style: Its CSS.
    """
    root = element(
        "svg",
        "",
        element("title", title),
        element("style", style),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {number(width)} {number(height)}",
        width=width,
        height=height,
        role="img",
    )
    ElementTree.indent(root)
    return ElementTree.tostring(root, "unicode") + "\n"
