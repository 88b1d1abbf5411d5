"""The HTML document that holds each of our pages: one file, nothing loaded from elsewhere.

Text is escaped by Jinja2, which is the first wall; the policy in the head, under which a browser
loads and sends nothing and runs only the scripts that it names by their hashes, is the second.
"""

from __future__ import annotations

import base64
import hashlib
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lenslrp.errors import InputError
from lenslrp.files import HTML, whole
from lenslrp.text.visible_text import visible

_PACKAGES = ("lenslrp", "torch", "transformers", "transformer-lens")

_DOCUMENT = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="generator" content="LensLRP">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'{{ scripts }}{{ allow }}">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>{{ style }}</style></head>
<body>{{ body }}</body></html>
"""


def environment() -> Any:
    """Jinja2 with autoescape on."""
    import jinja2

    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)


def html_document(
    title: str, body: str, *, style: str = "", scripts: Sequence[str] = (), allow: str = ""
) -> str:
    """A whole page.

    Args:
        title: text, which is escaped.
        body: markup that this package made, with everything else in it escaped.
        style: rules of its own.
        scripts: the text of every inline script in the body; no other is run.
        allow: what the policy permits beside inline styles, such as `"; img-src data:"`.
    """
    from markupsafe import Markup

    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    policy = "".join(f" 'sha256-{digest}'" for digest in hashes)
    page: str = (
        environment()
        .from_string(_DOCUMENT)
        .render(
            title=visible(title),
            body=Markup(body),
            style=Markup(style),
            scripts=Markup(f"; script-src{policy}" if policy else ""),
            allow=Markup(allow),
        )
    )
    return page


def write_document(path: Path, page: str) -> Path:
    """Write a page to `path`, whole or not at all; only a page of ours is replaced."""
    with whole(path, ours=HTML) as part:
        part.write_text(page, encoding="utf-8", errors="replace")
    return path


def section(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns, or why it cannot: hook points that were not read."""
    try:
        return make()
    except (InputError, KeyError) as error:
        return {"absent": str(error.args[0]) if error.args else "its hook points were not read"}


def provenance(**facts: str) -> list[tuple[str, str]]:
    """What a page was made from: ``facts``, and the versions of everything."""
    versions = [(package, _version(package)) for package in _PACKAGES]
    return [*facts.items(), *versions, ("Python", platform.python_version())]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"
