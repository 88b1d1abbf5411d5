"""Every word of a text is found in a dictionary, in ten scripts, however characters are split."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lenslrp.analysis import page_html
from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
from lenslrp.analysis.dictionary.pages.terminal import render_unit
from lenslrp.analysis.dictionary.text_search import folded
from lenslrp.text.words import joined
from tests.unit.tiny import tiny
from tests.unit.tiny_tokenizers import LINES, SCRIPTS, tokenizer

LOST = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module", params=["byte-level BPE", "SentencePiece BPE, byte fallback"])
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NeuronDictionary]:
    made = tokenizer(request.param)
    bridge = tiny("llama", tokenizer=made, vocab_size=len(made), max_position_embeddings=256)
    d = NeuronDictionary.build(
        bridge, LINES * 2, tmp_path_factory.mktemp("d") / "d", sites="mlp.hook_post", k=4,
        context=128, window=(12, 6), batch_size=4, sample=20, criteria=("actmax", "random"),
        progress=False,
    )  # fmt: skip
    yield d
    d.close()


def found(d: NeuronDictionary, query: str) -> Any:
    frame = d.search_text(query)
    assert len(frame), query
    return frame


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_word_of_a_text_is_found(built: NeuronDictionary, script: str) -> None:
    for word in SCRIPTS[script].split():
        frame = found(built, word)
        texts = built.texts.documents(frame["doc"])
        assert all(folded(word) in folded(document.text) for document in texts.values())


@pytest.mark.parametrize("word", ["Łódź", "Ελλάδα", "ёлка", "naïve", "한국어는", "हिन्दी"])
def test_case_and_composition_make_no_difference(built: NeuronDictionary, word: str) -> None:
    rows = found(built, word).to_dict("records")
    for query in (
        word.upper(), word.lower(), f'"{word}"', unicodedata.normalize("NFD", word),
        unicodedata.normalize("NFKD", word.upper()),
    ):  # fmt: skip
        assert built.search_text(query).to_dict("records") == rows


@pytest.mark.parametrize("part", ["東京", "京", "首都", "タワー", "ไทย", "กรุงเทพ", "한국", "국어"])
def test_parts_of_texts_without_spaces_are_found(built: NeuronDictionary, part: str) -> None:
    found(built, part)


@pytest.mark.parametrize("emoji", ["👨‍👩‍👧", "👍🏽", "👍", "❤️", "❤", "🇵🇱"])
def test_emoji_are_found(built: NeuronDictionary, emoji: str) -> None:
    found(built, emoji)


def test_what_is_in_no_text_is_not_found(built: NeuronDictionary) -> None:
    for query in ("Lo", "京東", "Łódźx", "odź", "👍🏿", "🇵🇹", "हिन्द्", '"Łódź Eiffel"'):
        assert built.search_text(query).empty, query


def test_windows_are_text(built: NeuronDictionary) -> None:
    for frame in (built.search_text("東京"), built.search_text("Łódź")):
        for row in frame.itertuples():
            document = built.texts.documents([row.doc])[row.doc]
            assert row.window in document.text
            start, tokens = built.window(document, row.position)
            assert start <= row.position < start + len(tokens)


def test_pages_show_whole_characters(built: NeuronDictionary) -> None:
    for index in range(0, 24, 6):
        page = built[1, index]
        frame = page.examples("actmax")
        for row in frame.itertuples():
            document = built.texts.documents([row.doc])[row.doc]
            assert len(row.tokens) == len(row.activations)
            assert joined(row.tokens).removeprefix("<s>").strip() in document.text
        shown = [page_html(page), str(render_unit(page)), "".join(page.vocabulary()["token"])]
        assert not any(LOST in where for where in shown)
        best = joined(frame["tokens"].iloc[0]).removeprefix("<s>")
        doc = int(frame["doc"].iloc[0])
        words = built.texts.documents([doc])[doc].text.split()
        whole = [word for word in best.split() if word in words] or [best]  # pages cut at words
        assert all(character in shown[0] for character in "".join(whole) if character.isalpha())


def test_documents_that_were_cut_inside_of_characters(tmp_path: Path) -> None:
    """What is left of a character is shown as bytes, and all that is whole is found."""
    made = tokenizer("byte-level BPE")
    bridge = tiny("llama", tokenizer=made, vocab_size=len(made), max_position_embeddings=256)
    d = NeuronDictionary.build(
        bridge, LINES, tmp_path / "d", sites="mlp.hook_post", k=4, context=17, window=(16, 16),
        batch_size=4, sample=60, criteria=("actmax", "random"), progress=False,
    )  # fmt: skip
    cited = d.texts.documents(d.to_dataframe()["doc"].unique().tolist()).values()
    assert any("⟨0x" in document.text for document in cited)
    for document in cited:
        shown = joined(d.texts.pieces(document)).removeprefix("<s>")
        assert shown == document.text and LOST not in shown
        for word in document.text.split():
            assert document.id in found(d, word)["doc"].tolist()
    d.close()


def test_a_word_outside_of_every_window_is_found_in_its_document(tmp_path: Path) -> None:
    made = tokenizer("byte-level BPE")
    bridge = tiny("llama", tokenizer=made, vocab_size=len(made), max_position_embeddings=256)
    d = NeuronDictionary.build(
        bridge, LINES, tmp_path / "d", sites="mlp.hook_post", k=1, context=128, window=(0, 0),
        batch_size=4, criteria=("actmax",), progress=False,
    )  # fmt: skip
    frame = d.search_text("क्षत्रिय")
    assert len(frame) and "क्षत्रिय" not in "".join(frame["window"])
    assert d.search_text("भारत भाषा Eiffel").empty
    d.close()
