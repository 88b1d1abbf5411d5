"""The harness on a tiny model: resumed, refused, repeated; tasks, records, tables, command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import lenslrp
from lenslrp import targets
from lenslrp.analysis.attribution import methods as baselines
from lenslrp.analysis.attribution.methods import Method
from lenslrp.analysis.common import records
from lenslrp.analysis.common.statistics import bootstrap
from lenslrp.analysis.common.templates import agreement, indirect_objects
from lenslrp.analysis.evaluation.faithfulness import aopc, aopc_bounds, curves, normalised_aopc
from lenslrp.analysis.evaluation.features import tokens_of
from lenslrp.analysis.evaluation.harness import Perturbation, evaluate
from lenslrp.analysis.evaluation.model_features import patches_of
from lenslrp.analysis.evaluation.results import JOURNAL, PARQUET, Results
from lenslrp.analysis.evaluation.tasks import (
    IMAGES,
    REVIEW,
    SENTIMENTS,
    TASKS,
    Task,
    Unfit,
    image_task,
)
from lenslrp.analysis.passes.prompts import as_prompt
from lenslrp.cli import commands as cli
from lenslrp.cli import evaluate as cli_evaluate
from lenslrp.errors import InputError, StorageError
from lenslrp.models import loading
from tests.conformance import zoo
from tests.unit.tiny import WORDS, tiny, word_tokenizer

METHODS = ("random", "cp_lrp", "attnlrp")
TIMES = ["seconds", "cost"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(tokenizer=word_tokenizer())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve texts, one of them too short, and what a file should not have."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[2:], size=8)) for _ in range(11)] + ["a b"]
    lines = [json.dumps({"text": text, "more": 1}).encode() for text in texts]
    path = tmp_path / "texts.jsonl"
    lines[3:3] = [b'{"text": "a b', b"", b'{"text": 3}', b"\xff\xfe", b'["a"]']
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def run(model: Any, folder: Path, data: Any, **changes: Any) -> Any:
    options = {"n": 5, "length": 6, "steps": 3, "progress": False, "seed": 1} | changes
    methods = options.pop("methods", METHODS)
    return evaluate(options.pop("task", "next_word"), model, methods, folder=folder, data=data,
                    **options)  # fmt: skip


def numbers(results: Any) -> pd.DataFrame:
    return results.to_dataframe().drop(columns=TIMES)


def test_two_runs_with_one_seed_give_the_same_numbers(
    model: Any, data: Path, tmp_path: Path
) -> None:
    first, second = (run(model, tmp_path / name, data) for name in "ab")
    pd.testing.assert_frame_equal(numbers(first), numbers(second), check_exact=True)
    other = run(model, tmp_path / "c", data, seed=2)
    assert set(other.frame["example"]) != set(first.frame["example"])
    shared = pd.merge(numbers(first), numbers(other), on=["example", "method"])
    random = shared[shared["method"] == "random"]
    assert not np.allclose(random["area_x"], random["area_y"])


def test_scores_are_those_of_the_metrics(model: Any, data: Path, tmp_path: Path) -> None:
    results = run(model, tmp_path / "a", data, n=2, perturbations=["zero", "mean+first"], beam=2)
    assert results.n == 2
    assert len(results.frame) == 2 * 2 * 3
    text = next(json.loads(line)["text"] for line in data.read_bytes().splitlines()[:1])
    by_text = {
        records.record_id({"text": t}): t
        for t in (json.loads(x)["text"] for x in data.read_bytes().splitlines() if b"more" in x)
    }
    assert text in by_text.values()
    for row in results.frame.to_dict("records"):
        ids = model.to_tokens(by_text[row["example"]])[0, :6]
        prompt = as_prompt(model, ids)
        values = baselines.attribute(row["method"], model, ids[None], prompt.target, seed=1)
        first = row["perturbation"] == "mean+first"
        features = tokens_of(
            model, prompt, baseline="mean" if first else "zero", keep=[0] if first else []
        )
        own = features.of(values.tokens[0])
        curve = curves(features, {"a": own}, steps=3)["a"]
        for name, score in curve.scores().items():
            assert row[name] == pytest.approx(score, rel=1e-9, abs=1e-12)
        np.testing.assert_allclose(row["morf"], curve.morf, rtol=1e-9)
        expected = normalised_aopc(aopc(features, own), aopc_bounds(features, beam=2))
        assert row["naopc"] == pytest.approx(expected, rel=1e-6)
        assert row["forward"] == row["backward"] == (row["method"] != "random")
        assert row["cost"] > 0


def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_numbers(
    model: Any, data: Path, tmp_path: Path
) -> None:
    whole = run(model, tmp_path / "whole", data)
    calls: list[int] = []

    def dying(question: Any, *, seed: int) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return baselines.METHODS["attnlrp"].function(question, seed=seed)

    methods = ["random", "cp_lrp", Method("attnlrp", dying, "")]
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "cut", data, methods=methods)
    journal = tmp_path / "cut" / JOURNAL
    done = journal.read_text().splitlines()
    assert sum('"methods": {' in line for line in done) == 2
    journal.write_text(journal.read_text() + done[-1][: len(done[-1]) // 2])
    calls.clear()
    resumed = run(model, tmp_path / "cut", data, methods=[*methods[:2], "attnlrp"])
    pd.testing.assert_frame_equal(numbers(whole), numbers(resumed), check_exact=True)
    assert (tmp_path / "whole" / JOURNAL).read_text().count("\n") == journal.read_text().count("\n")


def test_more_examples_go_on_where_fewer_ended(model: Any, data: Path, tmp_path: Path) -> None:
    few = run(model, tmp_path / "a", data, n=2)
    before = (tmp_path / "a" / JOURNAL).read_bytes()
    more = run(model, tmp_path / "a", data, n=4)
    assert (tmp_path / "a" / JOURNAL).read_bytes().startswith(before)
    pd.testing.assert_frame_equal(
        numbers(few), numbers(more).iloc[: len(few.frame)], check_exact=True
    )
    assert run(model, tmp_path / "a", data, n=2).n == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 4}, "steps 3, now 4"),
        ({"seed": 2}, "seed 1, now 2"),
        ({"methods": METHODS[:2]}, r'methods \["random", "cp_lrp", "attnlrp"\], now'),
        ({"perturbations": ["mean"]}, r'perturbations \["zero"\], now \["mean"\]'),
        ({"length": 5}, "length 6, now 5"),
        ({"half": "held-out"}, 'half null, now "held-out"'),
        ({"beam": 1}, "beam null, now 1"),
    ],
)
def test_other_options_are_refused_by_name(
    model: Any, data: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    run(model, tmp_path / "a", data, n=1)
    with pytest.raises(InputError, match=named):
        run(model, tmp_path / "a", data, n=1, **changes)
    with pytest.raises(InputError, match=r"\(model\.weights "):
        run(tiny(tokenizer=word_tokenizer(), seed=9), tmp_path / "a", data, n=1)


def test_lines_that_cannot_be_read_are_named_and_counted(
    model: Any, data: Path, tmp_path: Path
) -> None:
    results = run(model, tmp_path / "a", data, n=99)
    assert results.skipped == (
        "texts.jsonl line 4: not JSON",
        "texts.jsonl line 6: it has no 'text' (str)",
        "texts.jsonl line 7: not UTF-8",
        "texts.jsonl line 8: no JSON object",
    )
    assert results.unfit == {"shorter than 6 tokens": 1}
    assert results.n == 11
    assert "skipped input lines: 4, such as texts.jsonl line 4: not JSON" in str(results)
    assert "left out: 1 shorter than 6 tokens" in str(results)


def test_a_damaged_journal_is_named(model: Any, data: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "a", data, n=2)
    journal = tmp_path / "a" / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([lines[0], lines[1][:50] + b"\n", *lines[2:]]))
    with pytest.raises(StorageError, match=r"examples\.jsonl line 2 is damaged"):
        run(model, tmp_path / "a", data, n=2)


def test_data_from_a_list_is_the_same_as_from_a_file(
    model: Any, data: Path, tmp_path: Path
) -> None:
    listed = list(records.read_records(data, {"text": str}, []))
    first = run(model, tmp_path / "a", data, n=2)
    second = run(model, tmp_path / "b", list(reversed(listed)), n=2)
    pd.testing.assert_frame_equal(numbers(first), numbers(second), check_exact=True)


def test_halves_are_disjoint_and_go_by_the_text(model: Any, data: Path, tmp_path: Path) -> None:
    parts = [
        set(run(model, tmp_path / half, data, n=99, half=half).frame["example"])
        for half in records.SPLITS
    ]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 11
    assert records.split_of("a b") == records.split_of("a b")


def test_tables_have_intervals_and_paired_differences(
    model: Any, data: Path, tmp_path: Path
) -> None:
    results = run(model, tmp_path / "a", data, perturbations=["zero", "eos"])
    table = results.table("insertion").set_index(["perturbation", "method"])
    assert list(table.index) == [(way, m) for way in ("zero", "eos") for m in METHODS]
    wide = results.frame.pivot(
        index=["perturbation", "example"], columns="method", values="insertion"
    ).loc["eos"]
    row = table.loc["eos", "cp_lrp"]
    assert row["n"] == 5
    expected = bootstrap(wide["cp_lrp"].to_numpy(), 1)[0]
    assert row["mean"] == pytest.approx(expected)
    lead = bootstrap((wide["cp_lrp"] - wide["attnlrp"]).to_numpy(), 1)
    assert tuple(row[["difference", "difference_low", "difference_high"]]) == pytest.approx(lead)
    assert np.isnan(table.loc["eos", "attnlrp"]["difference"])
    other = results.table("area", against="random").set_index(["perturbation", "method"])
    assert np.isnan(other.loc["zero", "random"]["difference"])
    assert not np.isnan(other.loc["zero", "attnlrp"]["difference"])
    for call, message in (
        (lambda: results.table("hit"), "no metric 'hit'; there are area, deletion"),
        (lambda: results.table(against="lime"), "no method 'lime'"),
        (lambda: results.plot("blur"), "no perturbation 'blur'; there are zero, eos"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_a_measure_that_no_example_has_is_shown_as_missing(
    model: Any, data: Path, tmp_path: Path
) -> None:
    table = run(model, tmp_path / "a", data, n=2, steps=1).table("sufficiency")
    assert table["n"].tolist() == [0, 0, 0]
    assert table["mean"].isna().all()


def test_results_are_kept_as_parquet_and_drawn(model: Any, data: Path, tmp_path: Path) -> None:
    results = run(model, tmp_path / "a", data, n=2)
    stored = pd.read_parquet(tmp_path / "a" / PARQUET)
    again = Results.read(tmp_path / "a")
    assert str(Results.read(tmp_path / "a" / PARQUET)) == str(again)
    assert "area: Area between the curves, least relevant first less most" in str(again)
    assert (again.settings, again.skipped, again.unfit) == (
        results.settings,
        results.skipped,
        results.unfit,
    )
    pd.testing.assert_frame_equal(again.table(), results.table())
    assert str(again) == str(results)
    with pytest.raises(InputError, match="no run was finished"):
        Results.read(tmp_path)
    results.frame.to_parquet(tmp_path / PARQUET)
    with pytest.raises(InputError, match="does not say what it was made with"):
        Results.read(tmp_path)
    pd.testing.assert_frame_equal(
        stored.drop(columns=["shares", "morf", "lerf", "morf_probability", "lerf_probability"]),
        results.frame.drop(
            columns=["shares", "morf", "lerf", "morf_probability", "lerf_probability"]
        ),
    )
    (axes,) = results.plot().axes
    assert len(axes.lines) == 2 * len(METHODS)
    own = results.frame[results.frame["method"] == "random"]
    np.testing.assert_allclose(
        axes.lines[0].get_ydata(), np.mean([np.array(x) for x in own["morf"]], axis=0)
    )
    assert results.plot(probability=True).axes[0].get_ylabel() == "probability of the target"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "chess"}, "no task 'chess'; the tasks are next_word, sentiment"),
        ({"methods": []}, "at least one method"),
        ({"methods": ["lime"]}, "no method 'lime'"),
        ({"methods": ["random", "random"]}, "two methods have one name"),
        ({"half": "third"}, "half is one of development, held-out or None, not 'third'"),
        ({"n": 0}, "one example"),
        ({"length": 10}, r"not one example \(shorter than 10 tokens: 12\)"),
        ({"perturbations": ["blank"]}, "baseline is 'zero'"),
    ],
)
def test_bad_options_are_named(
    model: Any, data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(model, tmp_path / "a", data, **changes)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, r"next_word needs data: records with text \(str\)"),
        ("nowhere.jsonl", "no file at 'nowhere.jsonl'"),
        (3, "not int"),
    ],
)
def test_bad_data_is_named(model: Any, tmp_path: Path, source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(model, tmp_path / "a", source)


# tasks


def known(model: Any, text: str, right: bool) -> dict[str, str]:
    """A record that the model answers right, or wrong."""
    with torch.no_grad():
        logits = model(model.to_tokens(text))[0, -1]
    order = logits.argsort(descending=right).tolist()
    answer, rival = (WORDS[i] for i in (order[0], order[-1]))
    return {"text": text, "answer": answer, "rival": rival, "key": "c", "distractor": "e"}


def test_a_known_answer_has_a_key_and_a_distractor(model: Any) -> None:
    task = TASKS["indirect_object"]
    record = known(model, "a c d e c b", right=True)
    example = task.make(model, record, 64)
    assert example.key is not None and example.distractor is not None
    words = ["<s>", *"acdecb"]  # after this model's own start token
    assert example.key.tolist() == [word == "c" for word in words]
    assert example.distractor.tolist() == [word == "e" for word in words]
    assert example.prompt.target == targets.LogitDiff(record["answer"], record["rival"])
    with pytest.raises(Unfit, match="answered otherwise"):
        task.make(model, known(model, "a c d e c b", right=False), 64)
    with pytest.raises(Unfit, match="'x' or 'e' is not in the text"):
        task.make(model, record | {"key": "x"}, 64)
    with pytest.raises(Unfit, match="'d d' is more than one token"):
        task.make(model, record | {"answer": "d d"}, 64)


def test_hits_are_in_the_table(model: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(["c", *rng.choice(WORDS[2:], size=4), "e"]) for _ in range(8)]
    data = [known(model, text, right=k % 2 == 0) for k, text in enumerate(texts)]
    results = run(
        model, tmp_path / "a", data, task="agreement", n=99, perturbations=["zero", "mean"]
    )
    assert results.n == 4
    assert results.unfit == {"answered otherwise": 4}
    for row in results.frame.to_dict("records"):
        record = next(d for d in data if records.record_id(d) == row["example"])
        ids = model.to_tokens(record["text"])
        target = targets.LogitDiff(record["answer"], record["rival"])
        found = baselines.attribute(row["method"], model, ids, target, seed=1).tokens[0]
        words = ["<s>", *record["text"].split()]
        best = sorted(range(7), key=lambda i: -float(found[i]))
        assert row["hit"] == (words[best[0]] == "c")
        assert row["hit_at_3"] == any(words[i] == "c" for i in best[:3])
        k = words.count("c")
        chosen, key = set(best[:k]), {i for i in range(7) if words[i] == "c"}
        assert row["iou"] == pytest.approx(len(chosen & key) / len(chosen | key))
        above = max(found[i] for i in key) > max(found[i] for i in range(7) if words[i] == "e")
        assert row["above_distractor"] == above
    assert {"hit", "iou"} <= set(results.metrics())
    table = results.table("hit")
    assert table["perturbation"].tolist() == ["none"] * 3
    assert table["n"].tolist() == [4] * 3
    assert "hit" in str(results)


def test_of_a_review_only_its_own_tokens_go(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SENTIMENTS, "positive", "d")
    monkeypatch.setitem(SENTIMENTS, "negative", "e")
    with torch.no_grad():
        logits = model(model.to_tokens(REVIEW.format(text="a b c")))[0, -1]
    right, wrong = ("positive", "negative") if logits[5] > logits[6] else ("negative", "positive")
    make = TASKS["sentiment"].make
    with pytest.raises(Unfit, match="answered otherwise"):
        make(model, {"text": "a b c", "label": wrong}, 64)
    with pytest.raises(Unfit, match="longer than 5 tokens"):
        make(model, {"text": "a b c", "label": right}, 5)
    example = make(model, {"text": "a b c", "label": right}, 64)
    words = ["<s>", *REVIEW.format(text="a b c").split()]
    assert example.removable.tolist() == [word in ("a", "b", "c") for word in words]
    with pytest.raises(InputError, match="one of positive, negative, not 'mixed'"):
        TASKS["sentiment"].make(model, {"text": "a", "label": "mixed"}, 64)


@pytest.mark.parametrize("make", [indirect_objects, agreement])
def test_templates_give_records_without_repetition(make: Any) -> None:
    made = list(make())
    assert len({record["text"] for record in made}) == len(made) >= 100
    for record in made:
        assert record["answer"] != record["rival"]
        assert record["key"] in record["text"].split()[1:] or record["key"] in record["text"]
        assert record["distractor"] in record["text"]
    if make is indirect_objects:
        for record in made:
            assert record["text"].count(record["key"]) == 1
            assert record["text"].count(record["distractor"]) == 2


def test_a_task_of_your_own(model: Any, tmp_path: Path) -> None:
    task = Task("mine", {"words": list}, lambda m, r, n: TASKS["next_word"].make(
        m, {"text": " ".join(r["words"])}, n), split_by="words")  # fmt: skip
    data = [{"words": ["a", "b", "c", "d"]}, {"words": ["d", "c", "b", "a"]}]
    results = run(model, tmp_path / "a", data, task=task, length=4)
    assert results.n == 2
    assert results.settings["task"] == "mine"


def test_images_lose_patches(tmp_path: Path) -> None:
    model = zoo.build("ViTForImageClassification")
    images = {f"image {k}": lenslrp.media.example(model, seed=k)["pixel_values"][0] for k in (0, 1)}
    task = image_task(images)
    results = run(
        model, tmp_path / "a", None, task=task, n=2, perturbations=["zero", "mean"], steps=4
    )
    assert len(results.frame) == 2 * 2 * 3
    for row in results.frame.to_dict("records"):
        name = next(r["image"] for r in task.records() if records.record_id(r) == row["example"])
        pixels = images[name][None]
        prompt = as_prompt(model, pixel_values=pixels)
        found = baselines.attribute(
            row["method"], model, target=prompt.target, pixel_values=pixels, seed=1
        )
        features = patches_of(model, prompt, baseline=row["perturbation"])
        curve = curves(features, {"a": features.of(found.tokens[0])}, steps=4)["a"]
        assert row["area"] == pytest.approx(curve.area, rel=1e-6)
        assert row["features"] == features.size
    with pytest.raises(InputError, match="an image has no first token"):
        run(model, tmp_path / "b", None, task=image_task(images), perturbations=["zero+first"])


def test_perturbations_as_text() -> None:
    for text in ("zero", "zero+first", "token:</s>", "mean+first"):
        assert str(Perturbation.parse(text)) == text
    assert Perturbation.parse("eos+first") == Perturbation("eos", keep_first=True)


# the command line


@pytest.fixture
def loaded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load", lambda name, **options: model)


def test_the_command_prints_tables_or_json(
    loaded: None, data: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "out"
    arguments = ["evaluate", "next_word", "--data", str(data), "--folder", str(folder)]
    options = ["--n", "2", "--length", "6", "--steps", "3", "--methods", "random,attnlrp"]
    perturb = ["--perturb", "zero,zero+first"]
    assert cli.main([*arguments, *options, *perturb]) == 0
    printed = capsys.readouterr().out
    assert "n = 2 examples" in printed
    assert "zero+first" in printed
    path = printed.splitlines()[-1].removeprefix("every number (Results.read): ")
    assert path == str(folder / PARQUET)
    assert str(Results.read(path)) in printed
    assert cli.main([*arguments, *options, *perturb, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["n"] == 2
    assert len(told["skipped"]) == 4
    assert [row["method"] for row in told["tables"]["area"]] == ["random", "attnlrp"] * 2
    assert told["settings"]["length"] == 6
    assert cli.main([*arguments, *options]) == 2  # other perturbations: refused
    assert "was made with other settings" in capsys.readouterr().err


def test_the_command_knows_the_tasks_without_importing_torch() -> None:
    assert (*TASKS, IMAGES) == cli_evaluate.TASKS
    assert all(name in baselines.METHODS for name in cli_evaluate.DEFAULT_METHODS.split(","))
