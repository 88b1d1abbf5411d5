"""The tasks of the recurrent benchmark, and what it measures with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.recurrent import models, tables, tasks


@pytest.mark.parametrize("pairs", [1, tasks.PAIRS])
def test_an_answer_of_recall_is_the_value_beside_its_key(pairs: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        one = tasks.recall(rng, pairs)
        assert len(one.tokens) == tasks.LENGTH
        context = one.tokens[: one.context]
        assert len(set(context)) == len(context) == 2 * pairs
        for answer, source, key in zip(one.answers, one.sources, one.keys, strict=True):
            assert source == key + 1 < one.context < answer
            assert one.tokens[answer] == context[source]
            assert one.tokens[answer - 1] == context[key]
            assert context[source] in tasks.VALUES
            assert context[key] in tasks.KEYS
        assert (one.end, one.source, one.key) == (one.context + 1, one.sources[0], one.keys[0])


@pytest.mark.parametrize("letters", [1, tasks.LETTERS])
def test_answers_of_copying_are_the_letters_in_their_order(letters: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        one = tasks.copying(rng, letters)
        assert len(one.tokens) == tasks.LENGTH
        context = one.tokens[: one.context]
        assert one.tokens[one.context] == tasks.MARK
        assert [i for i, token in enumerate(context) if token in tasks.COPIED] == [*one.sources]
        assert [one.tokens[i] for i in one.answers] == [context[i] for i in one.sources]
        assert len({context[i] for i in one.sources}) == letters
        assert context[one.source or 0] == one.tokens[one.end]
        assert one.key is None


def test_tasks_share_no_token_and_training_asks_for_less(tmp_path: Path) -> None:
    path = tmp_path / "paragraphs.jsonl"
    lines = [json.dumps({"text": f"Die {i}te Ähre: " + "abc" * 20}) for i in range(20)]
    path.write_text("\n".join(lines), encoding="utf-8")
    seen, held_out = tasks.read_corpus(path)
    assert held_out.startswith("die 0te hre abc")
    assert held_out.count("die") == 2 and seen.count("die") == 18
    rng = np.random.default_rng(0)
    tokens = {
        name: {token for _ in range(50) for token in task(rng).tokens}
        for name, task in tasks.tasks(seen).items()
    }
    assert not tokens["recall"] & tokens["copying"]
    assert not tokens["text"] & (tokens["recall"] | tokens["copying"])
    assert max(map(max, tokens.values())) < tasks.VOCABULARY
    sizes = {tasks.training(None)["recall"](rng).context for _ in range(200)}
    assert sizes == {2 * pairs for pairs in range(1, tasks.PAIRS + 1)}
    assert [*tasks.tasks(None)] == ["recall", "copying"]


def test_only_answers_are_learned() -> None:
    one = tasks.copying(np.random.default_rng(0))
    (row,) = models.labels([one])
    assert (row >= 0).nonzero().flatten().tolist() == [*one.answers]
    assert row[[*one.answers]].tolist() == [one.tokens[i] for i in one.answers]


ROW: dict[str, Any] = {
    "model": "m", "task": "recall",
    "source": [1, 3, 5, 7], "key": [0, 2, 4, 6], "end": [9] * 4,
    "first": {"a": [1, 3, 4, 0], "b": [0, 3, 5, 7]},
    "area": {"a": [1.0, 2.0, 3.0, 4.0], "b": [3.0, 4.0, 5.0, 6.0]},
    "map": {"blocks.0": [1, 2, 0, 0], "blocks.1": [8, 8, 8, 6]},
}  # fmt: skip


def test_leads_are_paired_and_counted_by_their_whole_interval() -> None:
    assert tables.hits(ROW, "a").tolist() == [1, 1, 0, 0]
    assert tables.hits(ROW, "a", "key").tolist() == [0, 0, 1, 0]
    assert tables.lead([ROW, ROW], tables.hits, "a", "b").tolist() == [-1, 0, 1, 1] * 2
    groups = tables.by_model_and_task([ROW, {**ROW, "task": "copying"}])
    assert tables.verdict(groups.values(), tables.areas, "a", "b") == [2, 0]
    assert tables.verdict(groups.values(), tables.areas, "b", "a") == [0, 2]
    assert tables.verdict(groups.values(), tables.hits, "a", "b") == [0, 0]


def test_the_best_layer_is_chosen_on_the_other_half() -> None:
    either = [tables.map_hits(ROW, hook, "either").tolist() for hook in ROW["map"]]
    assert either == [[1, 1, 0, 0], [0, 0, 0, 1]]
    assert tables.map_at_best(ROW, "either").tolist() == [0, 0, 0, 0]
    assert tables.map_hits(ROW, "blocks.1", "key").tolist() == [0, 0, 0, 1]
    assert tables.map_hits(ROW, "blocks.1", "reach").tolist() == [0, 0, 1, 0]
    assert tables.map_chance(ROW, "either").tolist() == [0.25] * 4
    assert tables.map_chance(ROW, "reach").tolist() == [0.5, 0.5, 3 / 8, 1 / 8]
