"""``explain_to``: one table, whatever happens on the way to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

import lenslrp
from lenslrp import explaining_file
from lenslrp.errors import InputError, StorageError
from lenslrp.explaining import input_windows
from lenslrp.explaining_file import explain_to
from lenslrp.targets import Custom
from tests.unit.core.test_explaining import texts
from tests.unit.tiny import tiny, word_tokenizer

PROMPTS = texts(17)
PROMPTS[5] = ""
TARGETS = [5, "b", None, "a b", 7] * 3 + [5, 99]
"""The last one is no token; the sixth prompt is empty."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("gpt2", tokenizer=word_tokenizer())


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of four inputs: seventeen inputs are five windows."""
    monkeypatch.setattr(explaining_file, "input_windows", lambda *given: input_windows(*given, 4))


@pytest.fixture(scope="module")
def expected(model: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The table that one run leaves, byte by byte."""
    path = tmp_path_factory.mktemp("whole") / "r.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explaining_file, "input_windows", lambda *given: input_windows(*given, 4))
        made = explain_to(path, model, PROMPTS, TARGETS)
    assert made.complete and made.prompts == 15
    return path.read_bytes()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_table_is_that_of_every_prompt_alone(model: Any, tmp_path: Path) -> None:
    made = explain_to(tmp_path / "r.parquet", model, PROMPTS, TARGETS)
    assert left(tmp_path) == ["r.parquet"]
    assert made.path == tmp_path / "r.parquet"
    assert [index for index, _ in made.skipped] == [5, 16]
    assert "empty prompt" in made.skipped[0][1] and "99" in made.skipped[1][1]
    frame = pd.read_parquet(made.path)
    assert len(frame) == made.rows
    assert str(made) == f"{made.path}: 15 prompts, {made.rows} tokens, 2 skipped"
    alone = []
    for index, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        if index not in (5, 16):
            _, R = lenslrp.run_with_relevance(model, prompt, target, names_filter=[])
            alone.append(R.to_dataframe().assign(row=index))
    pd.testing.assert_frame_equal(frame, pd.concat(alone, ignore_index=True), rtol=1e-6, atol=1e-6)
    assert "positional" in frame


def test_lines_of_json_hold_the_same(model: Any, tmp_path: Path) -> None:
    explain_to(tmp_path / "r.parquet", model, PROMPTS[:5], 5)
    explain_to(tmp_path / "r.jsonl", model, PROMPTS[:5], 5)
    lines = (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()
    records = pd.read_parquet(tmp_path / "r.parquet").to_dict("records")
    assert [json.loads(line) for line in lines] == records


class Killed(BaseException):
    """As a signal would end the process."""


def killed_after(prompts: list[str], n: int) -> Iterator[str]:
    for index, prompt in enumerate(prompts):
        if index == n:
            raise Killed
        yield prompt


@pytest.mark.parametrize("n", [0, 3, 4, 9, 16])
def test_a_run_that_was_killed_goes_on(model: Any, tmp_path: Path, expected: bytes, n: int) -> None:
    path = tmp_path / "r.parquet"
    with pytest.raises(Killed):
        explain_to(path, model, killed_after(PROMPTS, n), TARGETS)
    assert not path.exists()
    parts = {p: p.stat().st_mtime_ns for p in (tmp_path / "r.parquet.parts").iterdir()}
    assert len(parts) == n // 4
    seen = []
    made = explain_to(path, model, (seen.append(p) or p for p in PROMPTS), TARGETS)
    assert made.complete and seen == PROMPTS
    assert path.read_bytes() == expected
    assert left(tmp_path) == ["r.parquet"]


def test_finished_parts_are_not_made_again(
    model: Any, tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.parquet"
    with pytest.raises(Killed):
        explain_to(path, model, killed_after(PROMPTS, 12), TARGETS)
    ran = []
    run = lenslrp.Session.run_with_relevance

    def listed(self: Any, given: Any, *rest: Any, **options: Any) -> Any:
        ran.extend(given)
        return run(self, given, *rest, **options)

    monkeypatch.setattr(lenslrp.Session, "run_with_relevance", listed)
    explain_to(path, model, PROMPTS, TARGETS)
    assert sorted(ran) == sorted(PROMPTS[12:])
    assert path.read_bytes() == expected


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shares_give_the_table_of_one_process(
    model: Any, tmp_path: Path, expected: bytes, order: tuple[int, ...]
) -> None:
    path = tmp_path / "r.parquet"
    made = [explain_to(path, model, PROMPTS, TARGETS, shard=(share, 3)) for share in order]
    assert [m.complete for m in made] == [False, False, True]
    assert "other shares are not done yet" in str(made[0])
    assert path.read_bytes() == expected
    assert left(tmp_path) == ["r.parquet"]
    assert made[-1].prompts == 15


def test_a_share_that_was_killed_is_taken_up_by_one_process(
    model: Any, tmp_path: Path, expected: bytes
) -> None:
    path = tmp_path / "r.parquet"
    explain_to(path, model, PROMPTS, TARGETS, shard=(1, 2))
    with pytest.raises(Killed):
        explain_to(path, model, killed_after(PROMPTS, 6), TARGETS, shard=(0, 2))
    explain_to(path, model, PROMPTS, TARGETS)
    assert path.read_bytes() == expected


def test_other_inputs_and_options_are_refused_by_name(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    with pytest.raises(Killed):
        explain_to(path, model, killed_after(PROMPTS, 9), 5)

    def refused(message: str, inputs: Any = PROMPTS, target: Any = 5, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            explain_to(path, options.pop("model", model), inputs, target, **options)

    refused('target "5", now "6"', target=6)
    refused("target .*one for each input", target=TARGETS)
    refused('rules.name "AttnLRP", now "CP-LRP"', composite=lenslrp.CPLRP())
    refused('attention "bridge", now "fused"', attention="fused")
    refused('batch "384 tokens", now "3 prompts"', batch_size=3)
    refused("prepend_bos null, now false", prepend_bos=False)
    refused("model.weights", model=tiny("gpt2", seed=1, tokenizer=word_tokenizer()))
    refused("from other inputs: those from 4 to 7 differ", ["a b", *PROMPTS][1:5] + ["a"] * 8)
    refused("from other inputs: those from 0 to 2 differ", PROMPTS[:3])
    refused("from more inputs than there are now", PROMPTS[:4])
    assert explain_to(path, model, PROMPTS, 5, checkpoint=True).complete


def test_a_function_as_target_is_the_same_in_another_process(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"

    def target() -> Custom:
        return Custom(lambda logits: logits[:, -1, :3].sum(dim=1), "three")

    with pytest.raises(Killed):
        explain_to(path, model, killed_after(PROMPTS, 9), target())
    assert explain_to(path, model, PROMPTS, target()).complete


def test_what_is_there_is_not_replaced(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    path.write_text("mine")
    with pytest.raises(StorageError, match=r"r\.parquet is there already and is not replaced"):
        explain_to(path, model, PROMPTS, 5)
    assert path.read_text() == "mine" and left(tmp_path) == ["r.parquet"]
    path.unlink()
    with pytest.raises(Killed):
        explain_to(path, model, killed_after(PROMPTS, 9), 5)
    path.write_text("mine")
    with pytest.raises(StorageError, match="is there already"):
        explain_to(path, model, PROMPTS, 5)
    assert path.read_text() == "mine"


def test_a_run_that_was_killed_before_it_tidied_up_is_finished(
    model: Any, tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.parquet"

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(explaining_file.TableParts, "_clear", killed)
        with pytest.raises(Killed):
            explain_to(path, model, PROMPTS, TARGETS)
    assert path.read_bytes() == expected
    assert (tmp_path / "r.parquet.parts").is_dir()
    assert explain_to(path, model, PROMPTS, TARGETS).prompts == 15
    assert path.read_bytes() == expected and left(tmp_path) == ["r.parquet"]


def test_a_damaged_part_is_named(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    with pytest.raises(Killed):
        explain_to(path, model, killed_after(PROMPTS, 9), 5)
    part = tmp_path / "r.parquet.parts" / "window-00000001.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:100])
    with pytest.raises(StorageError, match=r"window-00000001\.parquet is damaged"):
        explain_to(path, model, PROMPTS, 5)
    flipped = bytearray(whole)
    flipped[40] ^= 1
    part.write_bytes(flipped)
    with pytest.raises(StorageError, match=r"window-00000001\.parquet is damaged"):
        explain_to(path, model, PROMPTS, 5)
    pq.write_table(pq.read_table(tmp_path / "r.parquet.parts" / "window-00000000.parquet")
                   .replace_schema_metadata({}), part)  # fmt: skip
    with pytest.raises(StorageError, match="is damaged, or no part of a table"):
        explain_to(path, model, PROMPTS, 5)
    part.unlink()
    assert explain_to(path, model, PROMPTS, 5).complete


def test_files_of_others_in_the_folder_stay(model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "r.parquet.parts"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert explain_to(tmp_path / "r.parquet", model, PROMPTS, 5).complete
    assert left(tmp_path) == ["notes.txt", "r.parquet", "r.parquet.parts"]


def test_a_window_in_which_nothing_can_be_explained(model: Any, tmp_path: Path) -> None:
    prompts = ["a b", "c", "d", "e", "", "", "", "", "f"]
    made = explain_to(tmp_path / "r.parquet", model, prompts, 5)
    assert [index for index, _ in made.skipped] == [4, 5, 6, 7]
    assert pd.read_parquet(made.path)["row"].unique().tolist() == [0, 1, 2, 3, 8]
    made = explain_to(tmp_path / "again.parquet", model, ["", "", "", "", "a"], 5)
    assert pd.read_parquet(made.path)["row"].unique().tolist() == [4]


@pytest.mark.parametrize(
    ("name", "inputs", "options", "message"),
    [
        ("r.csv", ["a"], {}, r"a table is one of \.parquet, \.jsonl"),
        ("none/r.parquet", ["a"], {}, "there is no directory"),
        ("r.parquet", ["a"], {"shard": (2, 2)}, r"\(2, 2\) is none"),
        ("r.parquet", [], {}, "there are no inputs"),
        ("r.parquet", ["", ""], {}, "not one could be explained: it is an empty prompt"),
        ("r.parquet", ["a"], {"batch_size": 0}, "batch_size"),
        ("r.parquet", ["a"], {"attention": "flash"}, "flash"),
    ],
)
def test_bad_arguments(
    model: Any, tmp_path: Path, name: str, inputs: Any, options: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        explain_to(tmp_path / name, model, inputs, 5, **options)
    assert not any(path.suffix == ".parquet" for path in tmp_path.rglob("*"))


def test_a_full_disk_keeps_what_was_finished(
    model: Any, tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.parquet"
    write = explaining_file._write

    def full(place: Path, *rest: Any) -> None:
        if "00000002" in place.name:
            raise OSError(28, "No space left on device")
        write(place, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(explaining_file, "_write", full)
        with pytest.raises(StorageError, match="no space left on the disk"):
            explain_to(path, model, PROMPTS, TARGETS)
    assert len(left(tmp_path / "r.parquet.parts")) == 2
    explain_to(path, model, PROMPTS, TARGETS)
    assert path.read_bytes() == expected


def test_the_file_says_what_it_was_made_with(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    explain_to(path, model, PROMPTS, TARGETS)
    about = json.loads(pq.read_schema(path).metadata[b"lenslrp"])
    assert about["settings"]["rules"]["name"] == "AttnLRP"
    assert about["prompts"] == 15 and [index for index, _ in about["skipped"]] == [5, 16]
    shutil.rmtree(tmp_path)


def test_progress_goes_to_standard_error(model: Any, tmp_path: Path, capsys: Any) -> None:
    explain_to(tmp_path / "r.parquet", model, PROMPTS[:5], 5, progress=True)
    printed = capsys.readouterr()
    assert "5/5" in printed.err and "prompts/s" in printed.err and not printed.out
