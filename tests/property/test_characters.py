"""Random texts in ten scripts, with spaces, marks, emoji and control characters between words."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lenslrp.analysis.dictionary.text_search import folded, indexed, terms
from lenslrp.text.spelling import Speller
from lenslrp.text.words import CONTINUED, joined, pieces, read_row, words
from lenslrp.views.heatmap import token_heatmap
from tests.unit.tiny_tokenizers import KINDS, LINES, tokenizer

WORDS = sorted({word for line in LINES for word in line.split()})
RANGES = [
    (0x41, 0x7A), (0xC0, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x900, 0x97F), (0x5D0, 0x5EA),
    (0x620, 0x652), (0xE01, 0xE3A), (0x3041, 0x30FF), (0x4E00, 0x4E80), (0xAC00, 0xAC80),
    (0x1100, 0x1112), (0x1F468, 0x1F470), (0x1F3FB, 0x1F3FF), (0x1F1E6, 0x1F1FF), (0x300, 0x308),
]  # fmt: skip
characters = st.one_of(
    *(st.integers(a, b).map(chr) for a, b in RANGES),
    st.sampled_from(["\u200d", "\ufe0f", "\u200c", "\ufffd", "'", ".", ",", "<", ">", "\u3002"]),
)
made_up = st.text(characters, min_size=1, max_size=8)
gaps = st.sampled_from([" ", " ", " ", "  ", "\n", "", "\t", "\u3000"])
texts = st.lists(
    st.tuples(st.one_of(st.sampled_from(WORDS), made_up), gaps), min_size=1, max_size=8
)
texts_of = texts.map(lambda parts: "".join(word + gap for word, gap in parts))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=texts_of)
def test_words_join_to_the_text_and_keep_every_token_and_character(kind: str, text: str) -> None:
    made = tokenizer(kind)
    ids = made(text)["input_ids"]
    row = Speller(made).read(ids, text)
    found = words(row)
    assert "".join(word.text for word in found) == row.text
    assert [i for word in found for i in word.positions] == list(range(len(ids)))
    relevance = torch.randn(len(ids), generator=torch.Generator().manual_seed(len(ids))).tolist()
    sums = [math.fsum(relevance[i] for i in word.positions) for word in found]
    assert math.fsum(sums) == pytest.approx(math.fsum(relevance), rel=1e-14, abs=1e-14)
    if made(text, add_special_tokens=False)["input_ids"]:
        own = [w.text for w in found if not any(row.special[i] for i in w.positions)]
        assert "".join(own) == text
    # No word ends inside of what a reader takes for a character.
    ends = {match.end() for match in regex.finditer(r"\X", row.text)}
    names = {
        end for span, marks in zip(row.spans, row.special, strict=True) if marks for end in span
    }
    reach = 0
    for word in found:
        reach += len(word.text)
        assert reach in ends | names


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(text=texts_of)
def test_what_is_shown_joins_to_what_was_read(kind: str, text: str) -> None:
    made = tokenizer(kind)
    ids = made(text)["input_ids"]
    row = Speller(made).spell(ids)
    shown = pieces(row)
    assert joined(shown) == row.text
    assert ("\ufffd" in row.text) <= ("\ufffd" in text)
    for piece in shown:  # each is a run of whole characters
        own = piece.removeprefix(CONTINUED)
        assert own == "" or own in row.text
    heat = token_heatmap(shown, [1.0] * len(shown)) if shown else ""
    assert ("\ufffd" in heat) <= ("\ufffd" in text)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_are_text_without_replacement_characters(kind: str, data: Any) -> None:
    made = tokenizer(kind)
    ids = data.draw(st.lists(st.integers(0, len(made) - 1), min_size=1, max_size=12))
    real = data.draw(st.integers(1, len(ids)))
    row = read_row(Speller(made), ids, [i < real for i in range(len(ids))], real, None)
    assert len(row.pieces) == len(ids)
    assert [i for word in row.words for i in word.positions] == list(range(real))
    assert "".join(word.text for word in row.words) == row.prompt
    assert "\ufffd" not in row.prompt + "".join(row.pieces)


@settings(max_examples=300, deadline=None)
@given(text=texts_of, data=st.data())
def test_every_word_of_a_text_is_found_in_its_index(text: str, data: Any) -> None:
    """As a phrase of what the index holds, whatever the case and composition of the query."""
    held = f" {indexed(text)} "
    change = data.draw(
        st.sampled_from(
            [
                str,
                str.upper,
                str.casefold,
                lambda word: unicodedata.normalize("NFD", word),
                lambda word: unicodedata.normalize("NFC", word),
            ]
        )
    )
    for word in text.split():
        for term in terms(change(word).replace('"', "")):
            if folded(change(word)) == folded(word):
                assert f" {indexed(term)} " in held and folded(term) in folded(text)
