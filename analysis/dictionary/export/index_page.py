"""The index of a folder of pages, which is searched without a server.

The page holds all that its search reads, so that it works from a folder too (`file://`, where a
page may load nothing). The script is `search.js` beside this file, put into the page; the page's
policy names it by its SHA-256, and nothing else runs. Without scripts the index is a table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lenslrp.analysis.dictionary.pages.template import AROUND, INDEX, UNIT_STYLE
from lenslrp.analysis.views.document import environment, html_document
from lenslrp.text.visible_text import visible

LISTS = {"most active at": "actmax", "matters most at": "relmax", "writes": "writes"}
"""Headings of columns of tokens, and their names in a row; one that is empty is left out."""


def index_html(
    title: str, what: str, rows: list[dict[str, Any]], sentences: list[list[str]]
) -> str:
    """The index as a document.

    Args:
        title, what: above the table.
        rows: of the table, as the template takes them.
        sentences: what the search reads of each row, beside what the row shows.
    """
    from markupsafe import Markup

    lists = {heading: name for heading, name in LISTS.items() if any(row[name] for row in rows)}
    script = Path(__file__).with_name("search.js").read_text(encoding="utf-8")
    data = json.dumps(sentences).replace("<", "\\u003c")  # or a text could end the element
    body = (
        environment()
        .from_string(INDEX)
        .render(
            style=Markup(UNIT_STYLE), title=visible(title), what=visible(what), rows=rows,
            lists=lists, sentences=Markup(data), script=Markup(script),
        )
    )  # fmt: skip
    return html_document(title, body, style=AROUND, scripts=[script])
