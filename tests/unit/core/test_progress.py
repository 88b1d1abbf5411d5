"""Bars: where somebody looks, after a while, from one place; a first import warns of nothing."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from docs.import_graph import modules
from lenslrp import progress
from lenslrp.progress import progress_bar


def test_only_one_module_imports_tqdm() -> None:
    found = {name for name, path in modules().items() if "import tqdm" in path.read_text("utf-8")}
    assert found == {"lenslrp.progress"}


def test_nobody_looks_at_a_test(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar("things", range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_bar_waits_and_has_a_total(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(progress_bar("quick", range(3)))
    assert capsys.readouterr().err.strip() == ""
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    list(progress_bar("slow", range(3), mininterval=0))
    assert "slow:  33%" in capsys.readouterr().err
    list(progress_bar("never", range(3), shown=False))
    assert capsys.readouterr().err == ""


def test_a_bar_that_was_asked_for_is_there_without_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress_bar("asked", total=4, shown=True, unit="part") as bar:
        bar.update(4)
    assert "asked: 100%" in capsys.readouterr().err


class Kernel:
    """What IPython gives inside a kernel."""

    kernel = None


def test_a_bar_of_a_notebook_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not where a kernel was only imported: a command's output is its own."""
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    for shell, bars in ((None, False), (SimpleNamespace(), False), (Kernel(), True)):
        ipython = SimpleNamespace(get_ipython=lambda shell=shell: shell)
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        list(progress_bar("things", range(3), mininterval=0, leave=True))
        said = capsys.readouterr()
        assert ("things: 100%" in said.out) == bars and said.err == ""


def test_a_notebook_without_widgets_is_not_warned() -> None:
    script = (
        "import sys; import ipykernel.zmqshell; sys.modules['ipywidgets'] = None; "
        "import lenslrp; import tqdm.auto; print(tqdm.auto.tqdm.__mro__[1].__module__)"
    )
    command = [sys.executable, "-W", "error::tqdm.TqdmWarning", "-c", script]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "IProgress" not in told.stderr
