"""Tasks on real models: what they answer right, and that a metric of each comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lenslrp
from lenslrp import targets
from lenslrp.analysis.common.records import in_order, read_records
from lenslrp.analysis.evaluation.harness import evaluate
from lenslrp.analysis.evaluation.tasks import TASKS, Unfit

pytestmark = pytest.mark.real


def made(model: Any, name: str, source: Any, wanted: int, length: int = 400) -> tuple[list, int]:
    """The first examples, and how many records it took."""
    found: list[Any] = []
    for tried, record in enumerate(in_order(source, seed=0), start=1):
        try:
            found.append((record, TASKS[name].make(model, record, length)))
        except Unfit:
            continue
        if len(found) == wanted:
            return found, tried
    raise AssertionError(f"only {len(found)} examples of {name}")


@pytest.mark.parametrize("name", ["indirect_object", "agreement"])
def test_smollm2_knows_most_of_the_templates(smollm2: Any, name: str) -> None:
    task = TASKS[name]
    assert task.records is not None
    found, tried = made(smollm2, name, task.records(), wanted=8)
    assert tried <= 12
    for record, example in found:
        ids = example.prompt.tokens.tolist()
        key = [ids[i] for i in np.flatnonzero(example.key)]
        assert record["key"] in smollm2.tokenizer.decode(key)
        assert not (example.key & example.distractor).any()


def test_smollm2_tells_reviews_apart(smollm2: Any, shared_data: Path) -> None:
    source = read_records(shared_data / "movie_reviews.jsonl", TASKS["sentiment"].fields, [])
    found, tried = made(smollm2, "sentiment", source, wanted=6)
    assert tried <= 10
    for record, example in found:
        ids = example.prompt.tokens[torch.from_numpy(example.removable)]
        text = smollm2.tokenizer.decode(ids).strip()
        assert text == record["text"].strip()


@pytest.mark.parametrize("name", ["smollm2-135m", "flan-t5-small-titles"])
def test_answers_are_explained_where_they_are_right(
    name: str, smollm2: Any, shared_data: Path
) -> None:
    model = smollm2
    if name != "smollm2-135m":
        model = lenslrp.load(name, dtype=torch.float32, device="cpu")
    source = read_records(shared_data / "squad_dev.jsonl", TASKS["squad"].fields, [])
    ((record, example),), _ = made(model, "squad", source, wanted=1, length=220)
    target = example.prompt.target
    assert isinstance(target, targets.Sequence)
    answer = model.tokenizer.decode(target.tokens).strip().lower().rstrip(".")
    inside = example.prompt.tokens[: example.prompt.length][torch.from_numpy(example.key)]
    assert answer in model.tokenizer.decode(inside).lower().strip()
    assert answer in record["context"].lower()
    assert not (example.key & ~example.removable).any()


def test_attnlrp_finds_the_indirect_object(smollm2: Any, tmp_path: Path) -> None:
    results = evaluate(
        "indirect_object", smollm2, ["random", "attnlrp"], n=6, steps=2, folder=tmp_path,
        progress=False,
    )  # fmt: skip
    table = results.table("hit").set_index("method")
    assert table.loc["attnlrp", "n"] == 6
    assert table.loc["random", "difference_high"] < 0
