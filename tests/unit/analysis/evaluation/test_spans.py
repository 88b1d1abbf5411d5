"""Where relevance should point: spans, words, thresholds, hits."""

from __future__ import annotations

import numpy as np
import pytest

from lenslrp.analysis.evaluation import spans
from lenslrp.errors import InputError
from tests.unit.tiny import tiny, word_tokenizer


def test_iou_by_every_way_to_binarise() -> None:
    values = np.array([0.1, 4.0, 3.0, -9.0, 0.2])
    key = np.array([False, True, True, False, False])
    assert spans.ious(values, key) == dict.fromkeys(spans.ious(values, key), 1.0)
    half = spans.ious(values, np.array([False, True, False, False, True]))
    assert half == {"half of max": 1 / 3, "Otsu": 1 / 3, "span length": 1 / 3, "best": 2 / 3}
    assert spans.ious(-np.ones(5), key)["half of max"] == 0.4  # nothing positive: all are chosen


def test_otsu_splits_two_groups_and_ignores_negative_values() -> None:
    assert 0.3 <= spans.otsu(np.array([-50.0, 0.1, 0.2, 0.3, 5.0, 6.0])) < 5.0
    assert spans.otsu(np.array([-1.0, 2.0])) == 0.0


def test_tokens_words_and_spans() -> None:
    context = "a cat, a catalogue, a Cat"
    assert spans.occurrences(context, "cat") == [(2, 5), (22, 25)]
    offsets = [(0, 1), (1, 5), (5, 6), (6, 8), (8, 12), (12, 18)]
    assert spans.overlap(offsets, [(2, 5)]).tolist() == [False, True, False, False, False, False]
    assert spans.words_of(offsets, "a cat, a catalogue")[1] == [1, 2]
    assert spans.normalise("The  Old-Mill!") == "oldmill"


def test_a_hit_is_in_the_key_and_equal_values_keep_their_order() -> None:
    values = np.array([0.5, 2.0, 2.0, -9.0])
    assert spans.hit(values, np.array([False, True, False, False])) == 1
    assert spans.hit(values, np.array([False, False, True, False])) == 0
    assert spans.hit(values, np.array([False, False, True, False]), k=2) == 1
    assert spans.hit(values, np.array([False, False, False, True]), k=3) == 0


def test_tokens_stand_where_the_tokenizer_says_and_added_ones_nowhere() -> None:
    tokenizer = word_tokenizer()
    assert spans.token_spans(tokenizer, "a b  c", [2, 3, 4]) == [(0, 1), (2, 3), (5, 6)]
    added = spans.token_spans(tokenizer, "a b", [0, 2, 3, 1])
    assert added == [(0, 0), (0, 1), (2, 3), (0, 0)]
    assert spans.overlap(added, [(0, 3)]).tolist() == [False, True, True, False]
    with pytest.raises(InputError, match="not those of 'a b'"):
        spans.token_spans(tokenizer, "a b", [2, 4])
    with pytest.raises(InputError, match="does not say where"):
        spans.token_spans(tiny().tokenizer, "a b", [2, 3])
