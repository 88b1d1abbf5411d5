"""Words, tokens and prompts of explained texts: every kind of tokenizer on a tiny model, batches,
encoder-decoders, ids; and everything that shows them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from rich.console import Console

import lenslrp
from lenslrp.analysis.circuits.graph.graphs import attribution_graph
from lenslrp.analysis.views import figures as plots
from lenslrp.analysis.views.report import report_html
from lenslrp.views.terminal import render
from tests.unit.tiny import tiny
from tests.unit.tiny_tokenizers import SCRIPTS, tokenizer

TEXT = "The Eiffels in Łódź 東京 हिन्दी 👨‍👩‍👧"
KINDS = [
    "byte-level BPE", "SentencePiece BPE, byte fallback", "WordPiece, lower case", "</w> BPE",
    "WordLevel", "characters",
]  # fmt: skip
LOST = "\N{REPLACEMENT CHARACTER}"


def model(kind: str) -> Any:
    made = tokenizer(kind)
    return tiny("llama", tokenizer=made, vocab_size=len(made), max_position_embeddings=256)


def explained(bridge: Any, text: Any, target: Any = 5, **options: Any) -> lenslrp.RelevanceCache:
    return lenslrp.run_with_relevance(bridge, text, target, names_filter=[], **options)[1]


def own_words(R: lenslrp.RelevanceCache, bridge: Any, row: int = 0, **options: Any) -> list[str]:
    """Without special tokens."""
    ids = (bridge.tokenizer.bos_token_id, bridge.tokenizer.eos_token_id)
    frame = R.words(row, **options)
    return [
        word
        for word, positions in zip(frame["word"], frame["positions"], strict=True)
        if int(R.token_ids[row, positions[0]]) not in ids
    ]


@pytest.fixture(scope="module", params=KINDS)
def bridge(request: pytest.FixtureRequest) -> Any:
    return model(request.param)


def test_words_are_the_texts_and_keep_the_total(bridge: Any) -> None:
    R = explained(bridge, TEXT)
    words = R.words()
    assert "".join(own_words(R, bridge)) == TEXT and R.prompts == [TEXT]
    positions = [i for word in words["positions"] for i in word]
    assert positions == list(range(R.tokens.shape[1]))
    assert words["relevance"].sum() == pytest.approx(float(R.tokens.sum()), rel=1e-12)
    for word in words.itertuples():
        assert word.relevance == pytest.approx(float(R.tokens[0, word.positions].sum()), rel=1e-12)
    assert {" Eiffels", " Łódź", " हिन्दी", " 👨‍👩‍👧"} <= set(words["word"])


def test_words_of_a_padded_batch_are_those_of_its_rows(bridge: Any) -> None:
    bridge.tokenizer.padding_side = "right"
    both = explained(bridge, [TEXT, "The Łódź"])
    for row, text in enumerate([TEXT, "The Łódź"]):
        alone, words = explained(bridge, text).words(), both.words(row)
        assert words["word"].tolist() == alone["word"].tolist()
        assert words["positions"].tolist() == alone["positions"].tolist()
        assert words["relevance"].tolist() == pytest.approx(
            alone["relevance"].tolist(), rel=1e-6, abs=1e-7
        )


def test_words_of_ids_are_those_that_they_spell(bridge: Any) -> None:
    given = explained(bridge, TEXT)
    R = explained(bridge, given.token_ids)
    words = R.words()
    assert "".join(words["word"]) == R.prompts[0]
    assert words["relevance"].sum() == pytest.approx(float(R.tokens.sum()), rel=1e-12)
    assert R.str_tokens == given.str_tokens
    if TEXT in R.prompts[0]:  # nothing was lost on the way to ids
        assert words["word"].tolist() == given.words()["word"].tolist()
    else:
        assert bridge.tokenizer.unk_token_id in R.token_ids or "łodz" in R.prompts[0]


def test_a_span_is_spelled_after_the_text(bridge: Any) -> None:
    R = explained(bridge, "The Eiffel", lenslrp.targets.Sequence(" in Łódź"))
    assert R.prompts == ["The Eiffel"]
    spelled = [word.strip().casefold() for word in own_words(R, bridge)]
    assert spelled[:3] == ["the", "eiffel", "in"]
    assert LOST not in R.target.text


def test_files_keep_words_and_prompts(bridge: Any, tmp_path: Path) -> None:
    R = explained(bridge, TEXT)
    back = lenslrp.RelevanceCache.load(R.save(tmp_path / "R"))
    assert back.words().to_dict() == R.words().to_dict()
    assert back.prompts == R.prompts and back.str_tokens == R.str_tokens
    difference = R - back
    assert difference.words()["word"].tolist() == R.words()["word"].tolist()
    assert difference.words()["relevance"].abs().max() == 0


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_nothing_shows_half_a_character(kind: str, script: str, tmp_path: Path) -> None:
    bridge, text = model(kind), SCRIPTS[script][:24]
    _, R = lenslrp.run_with_relevance(bridge, text)
    terminal = io.StringIO()
    Console(file=terminal, width=10_000).print(render(R))
    graph = attribution_graph(bridge, text, k=8)
    made = json.loads(graph.to_neuronpedia(tmp_path / "graph.json").read_text(encoding="utf-8"))
    assert made["metadata"]["prompt"] == graph.prompt == text
    report = report_html(R, model=bridge)
    shown = [
        R._repr_html_(), terminal.getvalue(), report, graph.to_html(),
        json.dumps(made, ensure_ascii=False),
        R.top()["token"].str.cat(), repr(R), "".join(R.str_tokens[0]), "".join(R.words()["word"]),
        *(label.get_text() for label in plots.token_bars(R).axes[0].get_xticklabels()),
    ]  # fmt: skip
    for where in shown:
        assert LOST not in where
    for character in text.split()[0]:
        assert character in R._repr_html_()


def test_an_encoder_decoder_has_words_on_both_sides() -> None:
    made = tokenizer("unigram, byte fallback")
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=len(made), d_model=16, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    bridge = lenslrp.load(hf.T5ForConditionalGeneration(config).double().eval(), tokenizer=made)
    R = explained(bridge, TEXT, decoder_input="Łódź is naïve")
    assert "".join(R.words()["word"]) == f"{TEXT}</s>"
    assert R.words()["relevance"].sum() == pytest.approx(float(R.tokens.sum()), rel=1e-12)
    written = R.words(decoder=True)
    assert written["word"].tolist() == ["<pad>", "Łódź", " is", " naïve"]
    assert R.decoder_tokens is not None
    assert written["relevance"].sum() == pytest.approx(float(R.decoder_tokens.sum()), rel=1e-12)
    with pytest.raises(lenslrp.InputError, match="decoder=True is for encoder-decoders"):
        explained(model("WordLevel"), "The Eiffel").words(decoder=True)


def test_rows_without_text_have_a_word_a_position() -> None:
    plain = explained(tiny("llama"), torch.tensor([[3, 17, 5]]))
    assert plain.words()["word"].tolist() == ["3", "17", "5"]
    bridge = tiny("llama")
    embedded = torch.randn(1, 3, 16, dtype=torch.float64)
    R = explained(bridge, None, inputs_embeds=embedded)
    assert R.words()["positions"].tolist() == [[0], [1], [2]]
