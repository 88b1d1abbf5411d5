"""The rooms of the library: which may import which, how large a file is, what is listed."""

from __future__ import annotations

import ast
import tomllib
from collections import defaultdict

from docs.import_graph import MARKERS, arrows, drawing, edges, faults, modules
from tests.conftest import ROOT

LINES = 400


def test_no_arrow_goes_back() -> None:
    assert faults(edges()) == []


def test_an_arrow_back_would_be_found() -> None:
    back = ("lenslrp.analysis.units.kinds", "lenslrp.analysis.dictionary.plan")
    circle = ("lenslrp.hooks.rules", "lenslrp.sessions")
    assert len(faults({back, circle})) == 2
    assert arrows({back})["analysis.units"] == {"analysis.dictionary"}


def test_the_drawing_is_up_to_date() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    drawn = text.split(MARKERS[0])[1].split(MARKERS[1])[0].strip()
    assert drawn == drawing(), "run python docs/import_graph.py --write"


def test_packaging_lists_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert set(listed["tool"]["setuptools"]["packages"]) == found


def test_no_file_has_too_many_lines() -> None:
    sizes = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in modules().values()
    }
    assert {name: size for name, size in sizes.items() if size > LINES} == {}


def test_one_noun_one_type() -> None:
    homes = defaultdict(list)
    for name, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(name)
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


def test_no_private_name_crosses_files() -> None:
    crossing = [
        f"{name} takes {alias.name} from {node.module}"
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lenslrp")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert crossing == []


def test_no_module_hides_a_public_name_of_its_package() -> None:
    """Once imported, a module stands in its package under its own name."""
    hidden = []
    known = modules()
    for package, path in known.items():
        if path.name != "__init__.py":
            continue
        public: set[str] = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                public = set(ast.literal_eval(node.value))
        hidden += [f"{package}.{name}" for name in public if f"{package}.{name}" in known]
    assert hidden == ["lenslrp.targets"]  # a module that is itself public
