"""Documentation is executed: every Python block of README.md and the pages below docs, in order.

The blocks of one file share one namespace, as a reader would type them. A block is skipped when the
line before its fence is ``<!-- no-run -->``. Line numbers in a traceback are those of the page.
Links and paths in code spans must lead somewhere too, in the notebooks as well, and the index leads
to every page and notebook.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT

README = ROOT / "README.md"
RUN = [path for path in (README, *sorted((ROOT / "docs").rglob("*.md"))) if path.is_file()]
EMBEDDED_MODEL = re.compile(r'lenslrp\.load\("(?:smollm2|flan-t5-small|vit-s14|all-minilm)')
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))
PAGES = [
    *RUN,
    ROOT / "CONTRIBUTING.md",
    ROOT / "tutorials" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *TUTORIALS,
]
LARGEST_PICTURE = 100_000  # bytes
NO_RUN = "<!-- no-run -->"
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[\w+-]*)\s*$")
LINK = re.compile(r"\[[^\]]*\]\((?!\w+:)(?P<file>[^)#\s]*)(?:#(?P<anchor>[^)\s]*))?\)")
EMBEDDED = re.compile(r'(?:src|srcset|href)="(?!\w+:)([^"#]+)"')
PATH = re.compile(r"`((?:hooks|lenslrp|analysis|tests|benchmarks|docs|tutorials|\.ci)/[\w./-]*)`")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its first line of text (1-based), whether to run it."""

    language: str
    line: int
    text: str
    run: bool


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a Markdown page, in order.

    Raises:
        ValueError: a fence that is never closed.
    """
    found: list[Block] = []
    opened: re.Match[str] | None = None
    start, run, last = 0, True, ""
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        fence = FENCE.match(line)
        if opened is None:
            if fence is not None:
                opened, start, run = fence, number + 1, last != NO_RUN
            elif line.strip():
                last = line.strip()
        elif fence is not None and not fence["language"] and fence["ticks"] == opened["ticks"]:
            inside = [row.removeprefix(opened["indent"]) for row in lines[start - 1 : number - 1]]
            found.append(Block(opened["language"], start, "\n".join(inside) + "\n", run))
            opened, last = None, ""
    if opened is not None:
        raise ValueError(f"the fence in line {start - 1} is never closed")
    return found


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read(page: Path) -> str:
    """A page, or what a notebook says in Markdown."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def needs_weights(page: Path) -> bool:
    """Whether its blocks load a model that arrives as a package file, fetched once."""
    return EMBEDDED_MODEL.search(page.read_text(encoding="utf-8")) is not None


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    kept, inside = [], False
    for line in text.splitlines():
        if FENCE.match(line):
            inside = not inside
        elif not inside:
            kept.append(line)
    return "\n".join(kept)


def anchors(text: str) -> set[str]:
    """What GitHub makes of a page's headings, and ids that the page gives itself."""
    headings = re.findall(r"^#+ +(.*)$", prose(text), flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {*(heading.replace(" ", "-") for heading in plain), *re.findall(r'<a id="(\w+)"', text)}


def leads(page: Path, link: re.Match[str]) -> bool:
    """Whether a link's file, and the heading in it, exist."""
    target = page.parent / link["file"] if link["file"] else page
    if not target.exists():
        return False
    return not link["anchor"] or link["anchor"] in anchors(read(target))


def test_blocks_are_found_with_their_lines_and_the_skipped_ones_marked() -> None:
    page = f"text\n\n```python\na = 1\n```\n\n{NO_RUN}\n```python\nb\n```\n```bash\nls\n```\n"
    assert blocks(page) == [
        Block("python", 4, "a = 1\n", True),
        Block("python", 9, "b\n", False),
        Block("bash", 12, "ls\n", True),
    ]


def test_an_open_fence_is_refused() -> None:
    with pytest.raises(ValueError, match="line 2 is never closed"):
        blocks("text\n```python\na = 1\n")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")  # asked by peft
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, id=name(p), marks=[pytest.mark.real] if needs_weights(p) else [])
        for p in RUN
    ],
)
def test_every_python_block_runs(
    page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # what an example writes
    module = ModuleType(f"docs_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "python" and block.run:
            padded = "\n" * (block.line - 1) + block.text
            exec(compile(padded, str(page), "exec"), vars(module))  # noqa: S102 - our own pages


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = prose(read(page))
    broken = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    broken += [link.group() for link in LINK.finditer(text) if not leads(page, link)]
    broken += [path for path in EMBEDDED.findall(text) if not (page.parent / path).exists()]
    assert broken == []


@pytest.mark.parametrize("index", ["docs/README.md", "docs/tutorials/README.md"])
def test_the_index_leads_to_everything(index: str) -> None:
    page = ROOT / index
    wanted = {*TUTORIALS, *(RUN[1:] if index == "docs/README.md" else ())}
    linked = {(page.parent / link["file"]).resolve() for link in LINK.finditer(prose(read(page)))}
    assert {name(path) for path in wanted - linked - {page}} == set()


def test_pictures_are_small_and_have_a_dark_twin_where_they_say_so() -> None:
    pictures = sorted((ROOT / "docs" / "images").glob("*.png"))
    assert {p.name: p.stat().st_size for p in pictures if p.stat().st_size > LARGEST_PICTURE} == {}
    dark = {p.name.replace("-dark.png", ".png") for p in pictures if p.stem.endswith("-dark")}
    assert dark <= {p.name for p in pictures}
    named = re.findall(r'<img src="docs/images/([\w-]+)\.png"', read(README))
    offered = re.findall(r'srcset="docs/images/([\w-]+)-dark\.png"', read(README))
    assert offered and {*offered} == {*named} & {path.removesuffix(".png") for path in dark}


def test_the_page_that_a_coverage_error_refers_to_has_that_heading() -> None:
    from lenslrp.hooks.coverage import gap_message

    found = re.search(r"\((docs/[\w./-]+), '([^']+)'\)", gap_message([], "Model"))
    assert found is not None
    page, heading = found.groups()
    assert f"## {heading}\n" in (ROOT / page).read_text(encoding="utf-8")


def test_the_api_reference_has_every_public_name() -> None:
    import lenslrp.analysis
    import lenslrp.hooks

    pages = sorted((ROOT / "docs" / "reference" / "api").rglob("*.md"))
    shown = re.findall(r"^::: ([\w.]+)", "\n".join(map(read, pages)), flags=re.MULTILINE)
    public = {
        f"{package.__name__}.{name}"
        for package in (lenslrp, lenslrp.hooks, lenslrp.analysis)
        for name in package.__all__
    }
    assert {*shown} == public


def test_every_page_is_in_the_site_s_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("nav:\n")[-1]
    pages = [*RUN[1:], *(ROOT / "docs" / "tutorials" / f"{p.stem}.md" for p in TUTORIALS)]
    wanted = {page.relative_to(ROOT / "docs").as_posix() for page in pages}
    assert {*re.findall(r"[\w/-]+\.md", navigation)} == wanted
