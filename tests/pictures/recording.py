"""A program's output as it came: recorded in asciicast's format (version 2), drawn as a moving SVG.

Only plain lines: a program that moves the cursor is refused, not drawn wrongly.
"""

from __future__ import annotations

import codecs
import json
import os
import pty
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.pictures.svg import FIXED_FONT, FONT, Element, element, picture

COLUMNS: Final = 100
LINES: Final = 40
SPEED: Final = 4
"""The picture runs so many times as fast as it was."""
STANDS_S: Final = 8.0
"""How long the last line stands until the picture begins again."""
PROMPT: Final = "$ "
READ_BYTES: Final = 65536

_CHAR: Final = 7.8
_LINE: Final = 17.0
_MARGIN: Final = 14.0
_BAR: Final = 30.0


class Line(NamedTuple):
    """A line of output, and when it was whole."""

    at_s: float
    text: str


def record(command: Sequence[str], shown_as: str, directory: Path) -> str:
    """Run a program on a terminal, and return what it wrote, as an asciicast.

    Args:
        shown_as: What the recording's first line has as the command.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    terminal, end = pty.openpty()
    os.set_inheritable(end, True)
    header = {"version": 2, "width": COLUMNS, "height": LINES, "title": shown_as}
    out = [json.dumps(header), json.dumps([0.0, "o", f"{PROMPT}{shown_as}\r\n"])]
    began_s = time.monotonic()
    decoder = codecs.getincrementaldecoder("utf-8")()
    with subprocess.Popen(
        command, cwd=directory, stdin=subprocess.DEVNULL, stdout=end, stderr=end
    ) as process:
        os.close(end)
        try:
            while data := _read(terminal):
                at_s = round(time.monotonic() - began_s, 3)
                out.append(json.dumps([at_s, "o", decoder.decode(data)]))
        except BaseException:
            process.terminate()  # it is waited for, and stops its parts
            raise
    os.close(terminal)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command), "\n".join(out))
    return "\n".join(out) + "\n"


def _read(terminal: int) -> bytes:
    """What came; nothing when the program has ended, which Linux tells as an error."""
    try:
        return os.read(terminal, READ_BYTES)
    except OSError:
        return b""


def lines(cast: str) -> list[Line]:
    """A recording's lines.

    Raises:
        ValueError: It is no asciicast of version 2, or has more than lines.
    """
    head, *events = (json.loads(line) for line in cast.splitlines())
    if head.get("version") != 2:
        raise ValueError("no asciicast of version 2")
    found: list[Line] = []
    begun = ""
    for at_s, kind, data in events:
        if kind != "o":
            raise ValueError(f"at {at_s}: {kind!r} is no output")
        *whole, begun = (begun + data).replace("\r\n", "\n").split("\n")
        found += [Line(at_s, text) for text in whole]
    if begun:
        found.append(Line(found[-1].at_s if found else 0.0, begun))
    for line in found:
        if not line.text.isprintable():
            raise ValueError(f"at {line.at_s}: {line.text!r} is more than a line")
    return found


def draw(cast: str, title: str) -> str:
    """A recording as a picture that moves, and stands still where movement is not wanted."""
    shown = lines(cast)
    while shown and not shown[-1].text:
        shown.pop()
    whole_s = shown[-1].at_s / SPEED + STANDS_S
    width = COLUMNS * _CHAR + 2 * _MARGIN
    height = _BAR + len(shown) * _LINE + 2 * _MARGIN
    steps = sorted({line.at_s for line in shown if line.at_s > 0})
    style = [
        f"text {{ font: 13px {FIXED_FONT}; fill: #d8dee9; white-space: pre; }}",
        f".bar {{ font: 12px {FONT}; fill: #9aa4b5; }}",
        ".prompt { fill: #8fbf7f; }",
        "@media (prefers-reduced-motion: no-preference) {",
    ]
    for name, at_s in enumerate(steps):
        share = 100 * at_s / SPEED / whole_s
        style += [
            f"@keyframes k{name} {{ 0%, {share:.2f}% {{ opacity: 0 }} "
            f"{share + 0.01:.2f}%, 100% {{ opacity: 1 }} }}",
            f".k{name} {{ animation: k{name} {whole_s:.1f}s step-end infinite }}",
        ]
    style.append("}")
    parts: list[Element] = [
        element("rect", width=width, height=height, rx=8.0, fill="#1b1f27"),
        element("text", title, x=_MARGIN, y=20.0, class_="bar"),
    ]
    for row, line in enumerate(shown):
        if not line.text:
            continue
        attributes: dict[str, Any] = {"x": _MARGIN, "y": _BAR + _MARGIN + (row + 0.7) * _LINE}
        classes = [f"k{steps.index(line.at_s)}"] if line.at_s > 0 else []
        classes += ["prompt"] if line.text.startswith(PROMPT) else []
        if classes:
            attributes["class"] = " ".join(classes)
        parts.append(element("text", line.text, **attributes))
    return picture(width, height, title, "\n".join(style), *parts)
