"""Documents: every link within the project leads somewhere, and so does every mention of a page in
the code. Links to other sites are not followed: tests need no network."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OUTSIDE = re.compile(r"[a-z][a-z0-9+.-]*:")
"""A target with a scheme is another site's."""
LINK = re.compile(r"\]\(([^()\s]+)\)")
MENTION = re.compile(r"\bdocs/[\w./-]+\.md(?:, [\"“]?([A-Z][\w ]+))?")
"""A page by its path, and maybe the heading that is meant: `docs/broker.md, RabbitMQ 4`."""


def tracked(*patterns: str) -> list[Path]:
    """Files of the project; in a source distribution, which has no history, all that are there."""
    if not (ROOT / ".git").exists():
        return [path for pattern in patterns for path in ROOT.rglob(pattern) if path.is_file()]
    command = ["git", "ls-files", "-co", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def prose(text: str) -> str:
    """A page without what stands in it as code."""
    fenced = re.sub(r"(?ms)^```.*?^```", "", text)
    return re.sub(r"(?m)^    .*$", "", fenced)


def headings(page: Path) -> list[str]:
    return re.findall(r"(?m)^#{1,6} (.+?) *#*$", prose(page.read_text()))


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub and MyST make them."""
    found: set[str] = set()
    for heading in headings(page):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        twins = (f"{slug}-{number}" for number in range(1, 100))
        found.add(slug if slug not in found else next(t for t in twins if t not in found))
    return found


def broken_links(page: Path, root: Path) -> Iterator[str]:
    for number, line in enumerate(prose_lines(page.read_text()), 1):
        for target in LINK.findall(line):
            path, _, anchor = target.partition("#")
            where = f"{page.relative_to(root)}:{number}: {target}"
            file = (page.parent / path) if path else page
            if OUTSIDE.match(target):
                continue
            if not file.exists():
                yield f"{where}: no such file"
            elif anchor and anchor not in anchors(file):
                yield f"{where}: no such heading"


def prose_lines(text: str) -> list[str]:
    """The lines of a page; those of code are empty, so that the numbers stay."""
    lines, fenced = [], False
    for line in text.splitlines():
        fence = line.startswith("```")
        lines.append("" if fenced or fence or line.startswith("    ") else line)
        fenced ^= fence
    return lines


def test_every_link_leads_somewhere() -> None:
    pages = tracked("*.md")
    assert len(pages) > 25
    assert [broken for page in pages for broken in broken_links(page, ROOT)] == []


def test_every_page_that_code_names_is_there_with_its_heading() -> None:
    wrong, seen = [], 0
    for file in tracked("*.py", "*.service", "*.conf", "*.toml", "*.policy", "*.sh", "scripts/*"):
        text = " ".join(re.sub(r'"\n\s+"', "", file.read_text()).split())
        for mention in MENTION.finditer(text):
            seen += 1
            path, title = mention[0].partition(",")[0], mention[1]
            page = ROOT / path
            if not page.exists():
                wrong.append(f"{file.relative_to(ROOT)}: {path}")
            elif title and not any(title.startswith(each) for each in headings(page)):
                wrong.append(f"{file.relative_to(ROOT)}: {mention[0]}: no such heading")
    assert wrong == []
    assert seen > 10


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[a](b.md)", []),
        ("[a](b.md#a-heading)", []),
        ("[a](#own)\n\n# Own", []),
        ("[a](https://example.org/none#x)", []),
        ("    [a](in-code.md)", []),
        ("```\n[a](in-code.md)\n```", []),
        ("[a](c.md)", ["c.md: no such file"]),
        ("[a](b.md#other)", ["b.md#other: no such heading"]),
        ("x\n[a](#other)", ["#other: no such heading"]),
    ],
)
def test_a_broken_link_is_found(text: str, found: list[str], tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# B\n\n## A heading!\n")
    page = tmp_path / "a.md"
    page.write_text(text)
    assert [broken.partition(": ")[2] for broken in broken_links(page, tmp_path)] == found


def test_equal_headings_have_different_anchors(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text("# One `two`\n\n# One two\n")
    assert anchors(page) == {"one-two", "one-two-1"}
