"""The command line: what it prints, where it writes, and the exit codes scripts rely on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lenslrp.cli import commands as cli
from lenslrp.errors import CoverageError, InputError, LoadError
from lenslrp.models import doctor, loading
from lenslrp.models.loading import load
from tests.conftest import ROOT
from tests.unit.models.test_loading import tiny_llama, word_tokenizer


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The command line loads a tiny Llama whatever name is given; runs in an empty directory."""
    asked = []

    def remember(name, **arguments):
        asked.append((name, arguments))
        return load(tiny_llama(), tokenizer=word_tokenizer(), prepend_bos=False)

    monkeypatch.setattr(loading, "load", remember)
    monkeypatch.chdir(tmp_path)
    return asked


def test_explain_prints_tokens_ledger_and_report_path(tiny, tmp_path, capsys):
    assert cli.main(["explain", "the cat sat", "--target", "cat"]) == 0
    printed = capsys.readouterr().out
    report = tmp_path / "lenslrp-report.html"
    assert str(report) in printed
    assert "<html" in report.read_text(encoding="utf-8")
    for word in ("the", "cat", "sat", "leaves", "softmax", "error"):
        assert word in printed
    assert tiny[0][0] == "smollm2-135m"


def test_explain_json(tiny, capsys):
    arguments = ["explain", "the cat", "--json", "--report", "r.html", "--composite", "CPLRP"]
    assert cli.main([*arguments, "--dtype", "float64", "--target", "3"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == ["the", " cat"]  # which join to the text
    assert len(result["relevance"]) == 2
    assert "'cat'" in result["target"]
    assert result["uncovered"] == []
    assert result["ledger"]["leaves"] == pytest.approx(sum(result["relevance"]))
    assert result["ledger"]["target"] == pytest.approx(result["value"])


def test_explain_says_what_a_change_does_to_the_prediction(tiny, capsys):
    arguments = ["explain", "the cat sat the cat sat", "--target", "cat"]
    assert cli.main([*arguments, "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert checks["token"] == "'cat'" and checks["rank"] >= 1
    *_, trial = checks["trials"]
    assert " replaced by " in trial["what"] and trial["before"] == checks["probability"]
    assert trial["agrees"] == (trial["after"] < min(trial["before"], trial["control_after"]))

    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    lines = printed[printed.index("probability of 'cat': ") :].splitlines()
    shapes = (
        r"probability of 'cat': 0\.\d{3}, rank \d+",
        r"  head 0\.\d off: 0\.\d{3}; control, head 0\.\d off: .*",
        r"  '\w+' replaced by .*: 0\.\d{3}; control, .*: 0\.\d{3} \((agrees|does not agree)\)",
        r"  predicted: ('\S+' 0\.\d{3}(, )?){5}",
    )
    for line, shape in zip(lines, shapes, strict=False):
        assert re.fullmatch(shape, line)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["explain"], "PROMPT"),
        (["explain", "x", "--composite", "LRP0"], "AttnLRP"),
        (["explain", "x", "--dtype", "int8"], "bfloat16"),
    ],
)
def test_usage_errors_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "the cat", "--report", "nowhere/r.html"], "there is no directory"),
        (["explain", "the cat", "--report", "."], "is a directory"),
        (["explain", "the cat", "--device", "toaster"], "no such device: 'toaster'"),
        (["explain", "the cat", "--target", "99"], "99"),
        (["explain", ""], "empty"),
    ],
)
def test_bad_input_exits_with_2_and_a_message(tiny, arguments, message, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("lenslrp: ")
    assert captured.out == ""


@pytest.mark.parametrize(("error", "code"), [(LoadError, 1), (CoverageError, 1), (InputError, 2)])
def test_errors_have_exit_codes(tiny, monkeypatch, capsys, error, code):
    def fails(*_, **__):
        raise error("because")

    monkeypatch.setattr(loading, "load", fails)
    assert cli.main(["doctor", "gpt2"]) == code
    assert capsys.readouterr().err == "lenslrp: because\n"


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_doctor_exits_by_its_diagnosis(tiny, monkeypatch, capsys, ok, code):
    diagnosis = SimpleNamespace(ok=ok, render=lambda: "a table")
    monkeypatch.setattr(doctor, "examine", lambda model, composite: diagnosis)
    assert cli.main(["doctor", "gpt2", "--revision", "v1"]) == code
    assert capsys.readouterr().out == "a table\n"
    assert tiny[0][0] == "gpt2"
    assert tiny[0][1]["revision"] == "v1"


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_does_not_import_torch(argument):
    code = (
        "import sys; from lenslrp.cli.commands import main\n"
        f"try: main([{argument!r}])\n"
        "except SystemExit as stopped: assert stopped.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "lenslrp" in done.stdout


def test_an_earlier_report_is_kept_and_named(tiny, tmp_path, capsys):
    made = []
    for word in ("cat", "sat", "the"):
        assert cli.main(["explain", "the cat sat", "--target", word]) == 0
        made.append((tmp_path / "lenslrp-report.html").read_bytes())
    said = capsys.readouterr().err
    assert "the earlier lenslrp-report.html is kept as" in said
    assert "lenslrp-report-1.html" in said and "lenslrp-report-2.html" in said
    names = ["lenslrp-report-1.html", "lenslrp-report-2.html", "lenslrp-report.html"]
    assert [(tmp_path / name).read_bytes() for name in names] == made


def test_a_report_does_not_take_the_place_of_another_file(tiny, tmp_path, capsys):
    (tmp_path / "notes.html").write_text("<html>mine")
    assert cli.main(["explain", "the cat sat", "--report", "notes.html"]) == 2
    assert "notes.html exists and was not made by LensLRP" in capsys.readouterr().err
    assert (tmp_path / "notes.html").read_text() == "<html>mine"
    assert tiny == []  # refused before the model is loaded


def test_a_report_goes_through_links_and_devices(tiny, tmp_path):
    (tmp_path / "link.html").symlink_to("target.html")
    for path in ("link.html", "/dev/null"):
        assert cli.main(["explain", "the cat", "--target", "cat", "--report", path]) == 0
    assert (tmp_path / "link.html").is_symlink()
    assert "<html" in (tmp_path / "target.html").read_text(encoding="utf-8")
    assert os.stat("/dev/null").st_size == 0 and not os.path.isfile("/dev/null")


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "caf\udce9"],
        ["explain", "the cat", "--target", "\udcff"],
        ["explain", "the cat", "--report", "\udcff.html"],
        ["dictionary", "search", "d", "\udcff"],
        ["doctor", "\udcff"],
    ],
)
def test_text_that_is_not_utf8_is_refused(tiny, capsys, arguments):
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert re.search(r"argument \d is not UTF-8: b'(caf.xe9|.xff(\.html)?)'", said)


def test_bytes_of_a_shell_that_are_not_utf8():
    command = [sys.executable, "-m", "lenslrp.cli", "explain", b"caf\xe9"]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        b"lenslrp: argument 2 is not UTF-8: b'caf\\xe9'. Give text and names of files in UTF-8\n"
    )
