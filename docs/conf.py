"""Sphinx's configuration: a site of the Markdown pages (`scripts/docs`).

The theme is not openstackdocstheme: that has OpenStack's logo, its navigation and its licence of
documents (CC BY) on every page, takes the version from git, and has no option for a project that
is not OpenStack's own.
"""

import sys
from pathlib import Path
from typing import Any

from docutils import nodes

sys.path.insert(0, str(Path(__file__).parents[1]))
from vchan import __version__

project = "vchan"
copyright = "vchan contributors"
version = release = __version__
extensions = ["myst_parser"]

# Anchors as GitHub makes them, so that a link is right in a checkout and on the site alike.
myst_heading_anchors = 4
# Some links leave docs/, to an example or the README: right in a checkout, no page of the site's.
# tests/unit/test_links.py is the check of links; it knows those, too.
suppress_warnings = ["myst.xref_missing"]

html_theme = "furo"
html_title = f"vchan {release}"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

# The reference part of the policy page is vchan-policy(5) in the package of a host.
man_pages = [("policy", "vchan-policy", "what guests may ask of the control plane", [], 5)]


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("doctree-resolved", _unlink_what_is_no_page)
    app.connect("doctree-resolved", _list_instead_of_table)


def _unlink_what_is_no_page(_app: Any, doctree: nodes.document, _name: str) -> None:
    """A link out of docs/ that MyST has found no file for keeps its text alone."""
    for link in list(doctree.findall(nodes.reference)):
        if link.get("refid", "").startswith("../"):
            link.replace_self(link.children)


def _list_instead_of_table(app: Any, doctree: nodes.document, _name: str) -> None:
    """A terminal is too narrow for tables: in a manual page a row is an entry of a list, its first
    cell the word that is explained."""
    if app.builder.name != "man":
        return
    for table in list(doctree.findall(nodes.table)):
        head, *rows = [list(row.findall(nodes.entry)) for row in table.findall(nodes.row)]
        entries = nodes.definition_list()
        for row in rows:
            definition = nodes.definition()
            for title, cell in zip(head[1:], row[1:], strict=True):
                text = nodes.paragraph()
                name = title.astext()
                if name and len(row) > 2:
                    text += nodes.Text(f"{name}: ")
                for part in cell.children:
                    text += part.children
                definition += text
            term = nodes.term("", "", *(child for part in row[0] for child in part.children))
            entries += nodes.definition_list_item("", term, definition)
        table.replace_self(entries)
