"""The documents' pictures: made of the data beside them, and of nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.demo import ROWS
from tests.pictures.bars import Bar, Chart
from tests.pictures.bars import draw as draw_bars
from tests.pictures.make import CAST, MADE, PICTURES, ROOT, differing, present
from tests.pictures.recording import COLUMNS, SPEED, Line, draw, lines, record

SVG = "{http://www.w3.org/2000/svg}"


def cast(*events: tuple[float, str, str], version: int = 2) -> str:
    head = {"version": version, "width": COLUMNS, "height": 40}
    return "\n".join(map(json.dumps, (head, *events))) + "\n"


def texts(svg: str) -> list[str]:
    return [each.text or "" for each in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_the_pictures_are_what_their_data_make() -> None:
    assert differing() == [], "python -m tests.pictures --write"


def test_every_picture_is_shown_and_every_file_is_used() -> None:
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = {
        (document.parent / name).resolve()
        for document in documents
        for name in re.findall(r"!\[[^\]]+\]\(([^)]+\.svg)\)", document.read_text())
    }
    assert {PICTURES / name for name in present()} == shown
    data = {MADE[name][0] for name in present()}
    assert {path.name for path in PICTURES.iterdir()} == {*present(), *data}


@pytest.mark.parametrize("name", present())
def test_a_picture_asks_nobody_for_anything(name: str) -> None:
    text = (PICTURES / name).read_text()
    assert not re.search(r"<script|<image|<foreignObject|href|url\(|@import", text)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.skipif(not CAST.exists(), reason="no recording: python -m tests.pictures --record")
def test_the_recording_is_of_a_whole_demo() -> None:
    said = "\n".join(line.text for line in lines(CAST.read_text()))
    assert said.startswith("$ scripts/demo\n")
    for words in ("building the guest", "starting RabbitMQ", "migration 3: ", "stopping the"):
        assert words in said
    figures = {title: int(found[1]) for _, title in ROWS if (found := of(title, said))}
    assert len(figures) > 10, "the demo says other things now: record it again"
    assert figures["LOST"] == figures["DUPLICATED"] == figures["REORDERED"] == 0
    assert figures["live migrations"] == 3 and figures["calls sent"] > 20


def of(title: str, said: str) -> re.Match[str] | None:
    return re.search(rf"(?m)^  {re.escape(title)} +(\d+)$", said)


def test_a_programs_lines_and_their_times(tmp_path: Path) -> None:
    program = "import time; print('one', flush=True); time.sleep(0.3); print('zwei ü')"
    made = record([sys.executable, "-c", program], "a program", tmp_path)
    begun, one, two = lines(made)
    assert begun == Line(0.0, "$ a program")
    assert (one.text, two.text) == ("one", "zwei ü")
    assert two.at_s - one.at_s > 0.2
    with pytest.raises(subprocess.CalledProcessError):
        record([sys.executable, "-c", "raise SystemExit(3)"], "a program", tmp_path)


def test_lines_may_come_in_pieces() -> None:
    pieces = cast((0.0, "o", "a"), (1.0, "o", "b\r"), (2.0, "o", "\nc\r\n\r\nd"))
    assert lines(pieces) == [Line(2.0, "ab"), Line(2.0, "c"), Line(2.0, ""), Line(2.0, "d")]


@pytest.mark.parametrize(
    "bad",
    [
        cast((0.0, "o", "a\rb\n")),
        cast((0.0, "o", "\x1b[2Jx\n")),
        cast((0.0, "i", "x\n")),
        cast((0.0, "o", "x\n"), version=3),
    ],
)
def test_what_is_more_than_lines_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match=r"at 0|version 2"):
        lines(bad)


def test_a_line_is_seen_from_when_it_came() -> None:
    svg = draw(cast((0.0, "o", "$ x\r\n"), (8.0, "o", "<a> & b\r\n")), "a title")
    assert texts(svg) == ["a title", "$ x", "<a> & b"]
    # 8 s at 4 times the speed, of those and the 8 s that the end stands.
    assert SPEED == 4 and "@keyframes k0 { 0%, 20.00% { opacity: 0 } 20.01%" in svg
    assert "animation: k0 10.0s step-end infinite" in svg
    assert "prefers-reduced-motion: no-preference" in svg


def test_bars_are_as_long_as_their_values() -> None:
    bars = [Bar("a", 4.0, "4", True), Bar("b <", 1.0, "1", False), Bar("c", 0.0, "0", False)]
    svg = draw_bars([Chart("t", bars)], "title", "note")
    found = ElementTree.fromstring(svg).iter(f"{SVG}rect")
    widths = [float(each.attrib["width"]) for each in found if each.get("class") != "ground"]
    assert widths[0] == pytest.approx(4 * widths[1], abs=0.2)
    assert widths[2] == 1.0
    assert {"b <", "note", "t"} <= set(texts(svg))
