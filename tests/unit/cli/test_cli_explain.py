"""``lenslrp explain --data``: a file of prompts into a table."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import lenslrp
from lenslrp import explaining_file
from lenslrp.cli import commands as cli
from lenslrp.errors import InputError
from lenslrp.explaining import NO_INPUT, input_windows
from lenslrp.models import loading
from lenslrp.prompt_file import prompts_of
from tests.unit.tiny import tiny, word_tokenizer


@pytest.fixture(scope="module")
def bridge() -> Any:
    model = tiny("llama", tokenizer=word_tokenizer())
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} z{% endfor %}"
    return model


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bridge: Any) -> list[Any]:
    """The command line loads a tiny Llama whatever name is given; runs in an empty directory."""
    asked: list[Any] = []

    def load(name: str, **options: Any) -> Any:
        asked.append(options)
        return bridge

    monkeypatch.setattr(loading, "load", load)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    return asked


GOOD = [
    {"prompt": "a b c", "target": "b"},
    {"prompt": "d"},
    {"messages": [{"role": "user", "content": "e f"}], "target": 5},
    {"prompt": "g h", "target": "i j", "note": "what else there is does not matter"},
]


def jsonl(path: str, records: list[Any]) -> None:
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def test_a_file_of_prompts_becomes_a_table(bridge: Any, capsys: Any) -> None:
    jsonl("p.jsonl", GOOD)
    assert cli.main(["explain", "--data", "p.jsonl", "--out", "r.parquet", "--target", "7"]) == 0
    printed = capsys.readouterr()
    assert "r.parquet: 4 prompts" in printed.out
    assert "4/4" in printed.err and "prompts/s" in printed.err
    frame = pd.read_parquet("r.parquet")
    firsts = frame.groupby("row").first()
    assert firsts["target"].str.contains("'b'|logit of|span").all()
    ids = lenslrp.chat(bridge, GOOD[2]["messages"])
    for row, (given, target) in enumerate([("a b c", "b"), ("d", 7), (ids, 5), ("g h", "i j")]):
        _, R = lenslrp.run_with_relevance(bridge, given, target, names_filter=[])
        own = frame[frame["row"] == row]
        assert own["target"].iloc[0] == R.target.text
        assert own["relevance"].tolist() == pytest.approx(R.tokens[0].tolist(), rel=1e-5, abs=1e-6)


def test_text_has_a_prompt_a_line(capsys: Any) -> None:
    Path("p.txt").write_bytes("\ufeffa b\r\n\n  \nc d e\n".encode())
    assert cli.main(["explain", "--data", "p.txt", "--out", "r.jsonl"]) == 0
    records = [json.loads(line) for line in Path("r.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys((r["row"], r["prompt"]) for r in records)) == [
        (0, "a b"),
        (3, "c d e"),
    ]


def test_damaged_lines_are_named_and_the_others_are_explained(capsys: Any) -> None:
    damaged = [
        GOOD[0],
        '{"prompt": "a b',
        "[1, 2]",
        {"text": "a"},
        {"prompt": "a", "messages": []},
        {"prompt": 5},
        {"messages": "a"},
        {"messages": [{"role": "user"}]},
        {"prompt": "a", "target": 1.5},
        {"prompt": "a", "target": 99},
        {"prompt": ""},
        '{"prompt": "\\ud83d"}',
        GOOD[1],
    ]
    jsonl("p.jsonl", damaged)
    with open("p.jsonl", "ab") as file:
        file.write(b'{"prompt": "\xff"}\n')
    assert cli.main(["explain", "--data", "p.jsonl", "--out", "r.parquet"]) == 2
    printed = capsys.readouterr()
    assert "2 prompts" in printed.out and "12 skipped" in printed.out
    for number, why in {
        2: "no JSON",
        3: "no JSON object with either 'prompt' or 'messages'",
        4: "no JSON object with either",
        5: "no JSON object with either",
        6: "'prompt' is a string, not int",
        7: "'messages' is a list",
        8: "message 0 needs 'role' and 'content'",
        9: "'target' is a string or a token id, not float",
        10: "99",
        11: "empty prompt",
        12: "no JSON",
        14: "not UTF-8",
    }.items():
        assert f"lenslrp: line {number}: " in printed.err
        assert why in printed.err.split(f"line {number}: ")[1].splitlines()[0]
    assert pd.read_parquet("r.parquet")["row"].unique().tolist() == [0, 12]


def test_many_damaged_lines_are_counted(capsys: Any) -> None:
    jsonl("p.jsonl", ["{}"] * 25 + [GOOD[0]])
    assert cli.main(["explain", "--data", "p.jsonl", "--out", "r.parquet"]) == 2
    said = capsys.readouterr().err
    assert "line 20: " in said and "line 21: " not in said and "and 5 more lines" in said


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    given = io.BytesIO(b'a b\n{"prompt": "c", "target": 5}\n')
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=given))
    assert cli.main(["explain", "--data", "-", "--out", "r.parquet"]) == 0
    frame = pd.read_parquet("r.parquet")
    assert frame["prompt"].unique().tolist() == ["a b", "c"]


def test_a_run_that_was_interrupted_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(explaining_file, "input_windows", lambda *given: input_windows(*given, 2))
    jsonl("p.jsonl", GOOD)
    command = ["explain", "--data", "p.jsonl", "--out"]
    assert cli.main([*command, "whole.parquet"]) == 0
    with monkeypatch.context() as patch:

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(explaining_file.TableParts, "join", interrupted)
        assert cli.main([*command, "r.parquet"]) == 130
    assert len(list(Path("r.parquet.parts").iterdir())) == 2
    assert cli.main([*command, "r.parquet", "--target", "5"]) == 2
    assert "other inputs" in capsys.readouterr().err
    assert cli.main([*command, "r.parquet"]) == 0
    assert Path("r.parquet").read_bytes() == Path("whole.parquet").read_bytes()


def test_processes_of_a_launcher_share_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(explaining_file, "input_windows", lambda *given: input_windows(*given, 1))
    jsonl("p.jsonl", GOOD)
    command = ["explain", "--data", "p.jsonl", "--out"]
    assert cli.main([*command, "whole.parquet"]) == 0
    monkeypatch.setenv("WORLD_SIZE", "3")
    said = []
    for rank in ("2", "0", "1"):
        monkeypatch.setenv("RANK", rank)
        capsys.readouterr()
        assert cli.main([*command, "r.parquet"]) == 0
        said.append(capsys.readouterr())
    assert ["other shares" in one.out for one in said] == [True, True, False]
    assert ["prompts/s" in one.err for one in said] == [False, True, False]
    assert Path("r.parquet").read_bytes() == Path("whole.parquet").read_bytes()
    assert cli.main(["explain", "--data", "-", "--out", "s.parquet"]) == 2
    assert "cannot share standard input" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either PROMPT or --data"),
        (["a", "--data", "p.txt", "--out", "r.parquet"], "either PROMPT or --data"),
        (["--data", "p.txt"], "--data and --out go together"),
        (["a", "--out", "r.parquet"], "--data and --out go together"),
        (["a", "--batch-size", "3"], "--batch-size is for --data"),
        (["--data", "p.txt", "--out", "r.parquet", "--json"], "--out is the result of --data"),
        (
            ["--data", "p.txt", "--out", "r.parquet", "--report", "r.html"],
            "--report, --json and --generate",
        ),
    ],
)
def test_usage(arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["explain", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "out", "message"),
    [
        ("none.txt", "r.parquet", "none.txt cannot be read: No such file"),
        ("p.csv", "r.parquet", r"a file of prompts is one of .jsonl, .txt, or -"),
        ("p.txt", "r.csv", "a table is one of .parquet, .jsonl"),
        ("p.txt", "none/r.parquet", "there is no directory"),
        ("empty.txt", "r.parquet", "there are no inputs"),
        ("blank.txt", "r.parquet", "there is no table of these inputs"),
    ],
)
def test_files_that_do_not_fit(
    data: str, out: str, message: str, capsys: Any, loaded: list[Any]
) -> None:
    for name, text in (("p.csv", "a"), ("p.txt", "a"), ("empty.txt", ""), ("blank.txt", "\n\n")):
        Path(name).write_text(text)
    assert cli.main(["explain", "--data", data, "--out", out]) == 2
    assert message in capsys.readouterr().err
    assert not Path("r.parquet").exists()
    assert "cannot" not in message or not loaded  # said before the model is loaded


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('\n{"prompt": "a", "target": null}\nnothing\n')
    empty, first, wrong = prompts_of(path, 3)
    assert empty == (NO_INPUT, 3) and first == ("a", 3)
    assert isinstance(wrong[0], InputError)


def test_what_the_model_writes_is_explained(bridge: Any, capsys: Any) -> None:
    assert cli.main(["explain", "a b c", "--generate", "3", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    G = lenslrp.explain_generation(bridge, "a b c", max_new_tokens=3)
    assert said["tokens"] == G.str_tokens and said["start"] == G.start
    for row, values in enumerate(said["relevance"]):
        assert values == pytest.approx(G.relevance[row, : G.start + row].tolist())
    assert abs(said["ledgers"][0]["error"]) < 1e-6
    page = Path(said["report"]).read_text(encoding="utf-8")
    assert "What the model wrote" in page and page.count("<td style") == sum(
        G.start + row for row in range(len(G.values))
    )
    assert "<script" not in page
    assert cli.main(["explain", "a b c", "--generate", "3"]) == 0
    assert capsys.readouterr().out.count(" from ") == len(G.values)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a", "--generate", "3", "--target", "b"], "--generate explains what the model writes"),
        (["--data", "x.txt", "--out", "x.jsonl", "--generate", "3"], "--generate are for PROMPT"),
    ],
)
def test_generate_is_for_a_prompt_without_a_target(
    given: list[str], message: str, capsys: Any
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["explain", *given])
    assert message in capsys.readouterr().err
