"""The gallery shows the very lines that make its pictures."""

from __future__ import annotations

import re

from benchmarks.gallery.faces import LINES, LONG
from tests.conftest import ROOT

GALLERY = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")


def test_each_picture_of_a_face_stands_under_the_line_that_makes_it() -> None:
    picture = r"^`(.+)`: .*\n\n<picture>\n<source .*/face-(\w+)-dark\.png"
    shown = {name: line for line, name in re.findall(picture, GALLERY, flags=re.MULTILINE)}
    assert shown == {n: line for n, line in LINES.items() if f"face-{n}.png" in GALLERY}


def test_every_view_of_a_notebook_is_in_the_gallery() -> None:
    lines_alone = {"direction", "dictionary"}  # nothing to look at
    elsewhere = {"graph", *LONG} - {"diagnosis"}
    assert {n for n in LINES if f"face-{n}.png" not in GALLERY} == lines_alone | elsewhere
