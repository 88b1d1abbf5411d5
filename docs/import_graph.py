"""The import graph by rooms: checks its arrows, and draws it into CONTRIBUTING.md.

    python docs/import_graph.py            print rooms, what each imports, and arrows that go back
    python docs/import_graph.py --write    the same, and the drawing in CONTRIBUTING.md

A room is a package below ``lenslrp``. The modules at its top are two rooms: the ``foundation``,
which imports nothing of ours, and the ``core``. Imports inside functions count, those for type
checkers alone do not. ``LAYERS`` is the order: a room may import those before it, and what
``EXCEPTIONS`` lists.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOUNDATION = {"errors", "extras", "files", "former", "quiet", "version"}
LAYERS = (
    "foundation",
    "hooks",
    "text",
    "views",
    "core",
    "models",
    "analysis.common",
    "analysis.units",
    "analysis.passes",
    "analysis.views",
    "analysis.attribution",
    "analysis.evaluation",
    "analysis.circuits",
    "analysis.steering",
    "analysis.dictionary",
    "cli",
)
# what a room never imports, though it comes later: rooms beside each other
APART = {
    "analysis.views": {"analysis.passes"},
    "analysis.circuits": {"analysis.attribution", "analysis.evaluation"},
    "analysis.steering": {"analysis.attribution", "analysis.evaluation", "analysis.circuits"},
    "analysis.dictionary": {
        "analysis.attribution",
        "analysis.evaluation",
        "analysis.circuits",
        "analysis.steering",
    },
}
# (module, module): how a result is drawn, and what is said of a pass that ran out of memory
EXCEPTIONS = {
    ("lenslrp.cache", "lenslrp.analysis.views.figures"),
    ("lenslrp.hooks.coverage", "lenslrp.views.cards"),
    ("lenslrp.out_of_memory", "lenslrp.models.surveying"),
}
MARKERS = ("<!-- import graph: begin -->", "<!-- import graph: end -->")


def modules() -> dict[str, Path]:
    """Every module of the library, by its dotted name."""
    found = {}
    for folder in ("hooks", "lenslrp", "analysis"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if parts[:2] in (["lenslrp", "hooks"], ["lenslrp", "analysis"]):
                continue  # links to the folders beside
            if parts[0] != "lenslrp":
                parts.insert(0, "lenslrp")
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join(parts)] = path
    return found


def room(module: str) -> str:
    """The room of a module; of the three packages' own ``__init__`` their name, empty for none."""
    parts = module.split(".")[1:]
    if not parts or parts == ["analysis"]:
        return ""
    if parts[0] == "analysis":
        return ".".join(parts[:2])
    if len(parts) == 1 and parts[0] in FOUNDATION:
        return "foundation"
    if parts[0] in LAYERS:
        return parts[0]
    return "core"


def imports(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules of ours that a file imports anywhere, but for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lenslrp"):
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield whole if whole in known else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in known)


def edges() -> set[tuple[str, str]]:
    """(module, module that it imports)."""
    known = modules()
    return {(m, other) for m, path in known.items() for other in imports(path, known)}


def arrows(pairs: set[tuple[str, str]]) -> dict[str, set[str]]:
    """Which rooms each room imports, exceptions left out."""
    drawn: dict[str, set[str]] = {name: set() for name in LAYERS}
    for module, other in pairs - EXCEPTIONS:
        here, there = room(module), room(other)
        if here and there and here != there:
            drawn[here].add(there)
    return drawn


def faults(pairs: set[tuple[str, str]]) -> list[str]:
    """Imports against the order of rooms, one line each."""
    order = {name: index for index, name in enumerate(LAYERS)}
    found = []
    for module, other in sorted(pairs - EXCEPTIONS):
        here, there = room(module), room(other)
        if not here or here == there:
            continue
        if not there:
            found.append(f"{module} imports {other}: import the module that has the name")
        elif order[there] > order[here] or there in APART.get(here, ()):
            found.append(f"{module} imports {other}: {here} comes before {there}")
    return found


def drawing() -> str:
    """The rooms from the top down as a Mermaid graph, without arrows that others imply."""
    drawn = arrows(edges())

    def below(name: str) -> set[str]:
        reached: set[str] = set()
        waiting = [*drawn[name]]
        while waiting:
            following = waiting.pop()
            if following not in reached:
                reached.add(following)
                waiting.extend(drawn[following])
        return reached

    lines = ["```mermaid", "graph TD"]
    for name in reversed(LAYERS):
        implied = set().union(*(below(other) for other in drawn[name])) if drawn[name] else set()
        lines += [f"    {name} --> {other}" for other in LAYERS if other in drawn[name] - implied]
    return "\n".join([*lines, "```"])


def main() -> None:
    """Print the graph, and write the drawing if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--write", action="store_true", help="write the drawing into CONTRIBUTING.md"
    )
    options = parser.parse_args()
    pairs = edges()
    for name, others in arrows(pairs).items():
        print(f"{name}: {', '.join(other for other in LAYERS if other in others) or '-'}")
    print("\n".join(faults(pairs)) or "no arrow goes back")
    if options.write:
        page = ROOT / "CONTRIBUTING.md"
        text = page.read_text(encoding="utf-8")
        before, rest = text.split(MARKERS[0])
        after = rest.split(MARKERS[1])[1]
        page.write_text(f"{before}{MARKERS[0]}\n{drawing()}\n{MARKERS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
