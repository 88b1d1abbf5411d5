"""Extras: what is imported is declared, and a missing package is one line that names its extra.

A package is missing here when ``sys.modules`` says so: then importing it fails as if it were not
installed.
"""

from __future__ import annotations

import ast
import json
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lenslrp
from docs.import_graph import modules
from lenslrp import analysis
from lenslrp.analysis.dictionary import launch
from lenslrp.analysis.evaluation import image_files
from lenslrp.analysis.evaluation.figures import perturbation_curves
from lenslrp.analysis.views.drawing import LIGHT, new_figure
from lenslrp.analysis.views.figures import plot
from lenslrp.analysis.views.report import report_html, write_report
from lenslrp.cli import commands as cli
from lenslrp.extras import EXTRAS, require
from lenslrp.models import embedded, loading
from tests.conftest import ROOT
from tests.unit.fake_relevance import fake_relevance
from tests.unit.tiny import TOKENS, tiny, word_tokenizer

DISTRIBUTIONS = {
    "PIL": "pillow",
    "huggingface_hub": "huggingface-hub",
    "transformer_lens": "transformer-lens",
    "yaml": "pyyaml",
}
CALLED_LATER = {
    "_actors", "_figure_class", "installed_fonts", "colour_map", "_image", "_folder", "_tint",
    "_unpacked",  # a weight that is the package's own
}  # fmt: skip
"""Functions that are called only when their callers have asked."""


def missing(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = [name for name in sys.modules if name.split(".")[0] == package]
    for name in {package, *loaded}:
        monkeypatch.setitem(sys.modules, name, None)


# --- what is declared ----------------------------------------------------------------------------


def requirements(kind: str | None = None) -> set[str]:
    """Names of distributions: of the base installation, or of an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    given = project["dependencies"] if kind is None else project["optional-dependencies"][kind]
    return {entry.split(">")[0].split("[")[0].strip() for entry in given}


def imports() -> Iterator[tuple[str, str, ast.stmt, ast.FunctionDef | None]]:
    """Every import of a package that is not Python's own: file, package, statement, function."""
    for path in modules().values():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {
            id(node): function
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            for name in {name.split(".")[0] for name in names}:
                if name not in sys.stdlib_module_names and name != "lenslrp":
                    yield path.relative_to(ROOT).as_posix(), name, node, inside.get(id(node))


def test_what_is_imported_is_declared() -> None:
    """Also what another dependency brings today."""
    known = requirements() | {DISTRIBUTIONS.get(name, name) for name in EXTRAS}
    undeclared = {(file, n) for file, n, *_ in imports() if DISTRIBUTIONS.get(n, n) not in known}
    assert undeclared == set()


def test_every_extra_brings_what_it_is_named_for() -> None:
    for package, extra in EXTRAS.items():
        assert DISTRIBUTIONS.get(package, package) in requirements(extra)
    assert "matplotlib" in requirements("report")


def test_an_extras_package_is_asked_for_before_it_is_imported() -> None:
    for file, name, node, function in imports():
        if name not in EXTRAS or (function is None and node.col_offset):  # under TYPE_CHECKING
            continue
        assert function is not None, f"{file} imports {name} whenever it is imported itself"
        asked = [
            call.lineno
            for call in ast.walk(function)
            if isinstance(call, ast.Call)
            and getattr(call.func, "id", "") in ("require", "new_figure", "_gguf")
        ]
        before = any(line < node.lineno for line in asked)
        converter = file == "lenslrp/models/onnx_weights.py"  # ensure_cached has asked
        assert before or function.name in CALLED_LATER or converter, f"{file}: {function.name}"


# --- what is said --------------------------------------------------------------------------------


CALLS: dict[tuple[str, str], Callable[[Path], Any]] = {
    **{
        ("matplotlib", f"plot {kind}"): lambda _, kind=kind: plot(fake_relevance(), kind)
        for kind in ("residual", "heads", "neurons", "ledger", "tokens")
    },
    ("matplotlib", "new_figure"): lambda _: new_figure(1.0, 1.0, LIGHT, 1),
    ("matplotlib", "curves"): lambda _: perturbation_curves(
        np.linspace(0, 1, 2), {}, unit="logits", title=""
    ),
    ("matplotlib", "report_html"): lambda _: report_html(fake_relevance()),
    ("matplotlib", "write_report"): lambda folder: write_report(fake_relevance(), folder / "r"),
    ("captum", "attribute"): lambda _: analysis.attribute("integrated_gradients", None),
    ("captum", "evaluate"): lambda folder: analysis.evaluate(
        "agreement", None, ["random", "integrated_gradients"], n=1, folder=folder / "new"
    ),
    ("gguf", "save_control_vector"): lambda folder: analysis.save_control_vector(
        folder / "v", analysis.Direction("blocks.1.hook_resid_post", torch.ones(4)), model_hint="x"
    ),
    ("gguf", "load_control_vector"): lambda folder: analysis.load_control_vector(Path(__file__)),
    ("ray", "build_with_ray"): lambda folder: launch.build_with_ray(
        lambda: None, [], folder, workers=1
    ),
    ("ray", "explain_with_ray"): lambda folder: launch.explain_with_ray(
        lambda: None, folder / "r.parquet", [], workers=1
    ),
    ("PIL", "read_images"): lambda folder: image_files.read_images(None, folder, []),
}


@pytest.mark.parametrize("case", CALLS, ids=" ".join)
def test_a_missing_package_names_its_extra(
    case: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package, _ = case
    missing(package, monkeypatch)
    with pytest.raises(lenslrp.MissingExtraError) as raised:
        CALLS[case](tmp_path)
    said = str(raised.value)
    extra = "report" if "report" in case[1] else EXTRAS[package]
    assert said.endswith(
        f" needs {package}, which is not installed: pip install 'lenslrp[{extra}]'"
    )
    assert "\n" not in said
    assert isinstance(raised.value, ImportError)
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.mark.parametrize("name", [n for n, model in embedded.EMBEDDED.items() if model.package])
def test_an_embedded_model_is_not_fetched_when_it_could_not_be_read(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_network: None
) -> None:
    package = "gguf" if name == "smollm2-135m" else "onnx"
    missing(package, monkeypatch)
    monkeypatch.setenv("LENSLRP_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "fetch", lambda *_: pytest.fail("it was fetched"))
    with pytest.raises(lenslrp.LoadError, match=rf"{name} needs {package}.*'lenslrp\[demo\]'"):
        lenslrp.load(name)


def test_require_lets_pass_what_is_there() -> None:
    require("matplotlib", "a figure")


# --- the command line ----------------------------------------------------------------------------


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command line loads a tiny Llama whatever name is given; runs in an empty directory."""
    made = tiny("llama", tokenizer=word_tokenizer())
    monkeypatch.setattr(loading, "load", lambda *_, **__: made)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("model")
def test_explain_goes_without_its_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing("matplotlib", monkeypatch)
    assert cli.main(["explain", "a b c", "--target", "3"]) == 0
    captured = capsys.readouterr()
    for word in ("a", "b", "c", "leaves", "softmax", "error"):
        assert word in captured.out
    assert captured.err == (
        "lenslrp: no report is written: an HTML report needs matplotlib, which is not installed: "
        "pip install 'lenslrp[report]'\n"
    )
    assert cli.main(["explain", "a b c", "--target", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("matplotlib", ["explain", "a b", "--report", "r.html"]),
        ("captum", ["evaluate", "agreement", "--folder", "f", "--methods", "integrated_gradients"]),
    ],
)
def test_what_was_asked_for_and_cannot_be_done_is_said_before_the_work(
    package: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.chdir(tmp_path)
    missing(package, monkeypatch)
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lenslrp: ")
    assert captured.err.count("\n") == 1
    assert "pip install 'lenslrp[" in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("package", EXTRAS)
def test_doctor_and_relevance_need_no_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing(package, monkeypatch)
    assert cli.main(["doctor", "m"]) == 0
    _, R = lenslrp.run_with_relevance(loading.load("m"), TOKENS, 5)
    assert R._repr_html_() and repr(R)
