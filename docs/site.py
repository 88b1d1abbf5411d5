"""What MkDocs does to the pages on their way to the site (``hooks`` in ``mkdocs.yml``).

Pages are written to be read on GitHub too, so their links are relative to the repository. Those
that leave ``docs`` become links to the repository here, and the notebooks become pages.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
FENCED = re.compile(r"(^ *(?P<ticks>`{3,}).*?^ *(?P=ticks) *$)", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)((?:#[^)\s]*)?)(?=\))")
PICTURE = re.compile(
    r'<picture>\s*<source[^>]*srcset="(?P<dark>[^"]+)">\s*<img src="(?P<light>[^"]+)" '
    r'width="(?P<width>\d+)" alt="(?P<alt>[^"]*)">\s*</picture>'
)
BOTH = "\n".join(
    rf"![\g<alt>](\g<{mode}>#only-{mode}){{ width=\g<width> }}" for mode in ("light", "dark")
)
ROLE = re.compile(r":\w+:<code>~?([\w.]+\.)?(\w+)</code>")


def anchor(heading: str, separator: str = "-") -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def on_config(config: MkDocsConfig) -> None:
    config.mdx_configs["toc"]["slugify"] = anchor


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds a page for each notebook, with its pictures."""
    for path in NOTEBOOKS:
        resources = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
        text, made = MarkdownExporter().from_filename(str(path), resources=resources)
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=text))
        for name, picture in made["outputs"].items():
            files.append(File.generated(config, f"tutorials/{name}", content=picture))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Links as the site has them, outside of fenced code."""
    uri = page.file.src_uri
    notebook = page.file.generated_by is not None
    source = Path("tutorials") if notebook else Path("docs", uri).parent

    def link(match: re.Match[str]) -> str:
        file, place = match.groups()
        if notebook and file.startswith(f"{Path(uri).stem}_files/"):
            return match.group()
        target = Path(os.path.normpath(source / file))
        if target.suffix == ".ipynb":
            target = Path("docs/tutorials", target.stem + ".md")
        if target.parts[0] == "docs" and target.suffix != ".py":
            start = Path("docs", uri).parent
            return Path(os.path.relpath(target, start)).as_posix() + place
        return f"{config.repo_url}/blob/main/{target.as_posix()}{place}"

    parts = FENCED.split(markdown)
    for i in range(0, len(parts), 3):  # text, fenced block, its ticks, text, ...
        parts[i] = LINK.sub(link, PICTURE.sub(BOTH, parts[i]))
        if i + 2 < len(parts):
            parts[i + 2] = ""
    return "".join(parts)


def on_page_content(html: str, **_: Any) -> str:
    """Cross-references of docstrings, where the site has what they name."""
    return ROLE.sub(r'<autoref identifier="\1\2" optional><code>\2</code></autoref>', html)
