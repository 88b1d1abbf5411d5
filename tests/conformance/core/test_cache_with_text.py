"""A ``RelevanceCache`` of text: string targets, words, saved, loaded and subtracted.

The tokenizer is made here, of words and word pieces, so that nothing is fetched.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lenslrp
from lenslrp.targets import LogProb
from lenslrp.text.spelling import Spelling, str_token
from lenslrp.text.words import words as words_of
from tests.conformance.families import FAMILIES, randomise

PIECES = ["<pad>", "<s>", "?", " the", " cat", " sat", " on", " mat", "s", " un", "believ", "able"]
PROMPT = " the cats sat on the unbelievable"


def tokenizer(scheme: str = "never") -> PreTrainedTokenizerFast:
    """Whole words and pieces, a leading space inside the token as in byte-level vocabularies.

    With ``scheme="always"`` it is SentencePiece's way: a space is put before the text, and decoding
    drops the first one.
    """
    vocabulary = [(piece.replace(" ", "▁"), -1.0 - 0.01 * i) for i, piece in enumerate(PIECES)]
    made = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", pad_token="<pad>", unk_token="?"
    )


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    llama = FAMILIES["llama"].build(True)
    randomise(llama, bias=True)
    return lenslrp.load(llama.double(), tokenizer=tokenizer(), prepend_bos=False)


@pytest.fixture(scope="module")
def cache(model: Any) -> lenslrp.RelevanceCache:
    return lenslrp.run_with_relevance(model, PROMPT, " mat")[1]


def test_text_in_and_out(model: Any, cache: lenslrp.RelevanceCache) -> None:
    expected = [" the", " cat", "s", " sat", " on", " the", " un", "believ", "able"]
    assert cache.token_ids[0].tolist() == [PIECES.index(piece) for piece in expected]
    assert "".join(cache.str_tokens[0]).split() == PROMPT.split()
    assert "' mat'" in cache.target.text
    assert "position -1" in cache.target.text
    by_id = lenslrp.run_with_relevance(model, cache.token_ids, PIECES.index(" mat"))[1]
    assert torch.equal(by_id.tokens, cache.tokens)


def test_tokens_of_sentencepiece_keep_the_space_that_decoding_drops(model: Any) -> None:
    made = tokenizer("always")
    assert made.decode(made.encode(" the cats")) == "the cats"
    texts = [str_token(made, i) for i in made.encode("the cats sat")]
    assert texts == [" the", " cat", "s", " sat"]
    assert str_token(made, 1) == "<s>"


def test_a_lone_space_belongs_to_the_pieces_after_it(cache: lenslrp.RelevanceCache) -> None:
    pieces = ["</s>", " ", "un", "able", " cat", " ", " the", ".", " "]
    ends = [sum(map(len, pieces[: i + 1])) for i in range(9)]
    spans = list(zip([0, *ends], ends, strict=False))
    row = Spelling("".join(pieces), spans, [i == 0 for i in range(9)])
    words = replace(cache, words_=[words_of(row)], tokens=torch.arange(9.0)[None]).words()
    assert words["word"].tolist() == ["</s>", " unable", " cat", " ", " the", ".", " "]
    assert words["relevance"].tolist() == [0.0, 6.0, 4.0, 5.0, 6.0, 7.0, 8.0]


def test_a_string_of_several_tokens_is_a_span(model: Any) -> None:
    _, span = lenslrp.run_with_relevance(model, PROMPT, " cats sat")
    assert span.tokens.shape[1] == 9 + 2
    assert "span" in span.target.text
    assert " cats sat" in span.target.text


def test_batches_of_text_are_padded(model: Any) -> None:
    single = [lenslrp.run_with_relevance(model, text, " mat")[1] for text in (PROMPT, " the cat")]
    # float64 with left padding gives NaN in the model itself, so the right side is asked for.
    model.tokenizer.padding_side = "right"
    _, both = lenslrp.run_with_relevance(model, [PROMPT, " the cat"], " mat")
    for row, alone in enumerate(single):
        real = both.attention_mask[row]
        torch.testing.assert_close(both.tokens[row][real], alone.tokens[0], rtol=1e-6, atol=1e-7)


def test_words(cache: lenslrp.RelevanceCache) -> None:
    words = cache.words()
    assert [word.strip() for word in words["word"]] == PROMPT.split()
    assert words["positions"].tolist() == [[0], [1, 2], [3], [4], [5], [6, 7, 8]]
    assert words["relevance"].sum() == pytest.approx(float(cache.tokens.sum()))
    assert words["relevance"][1] == pytest.approx(float(cache.tokens[0, 1:3].sum()))


def test_saved_and_loaded(cache: lenslrp.RelevanceCache, tmp_path: Path) -> None:
    back = lenslrp.RelevanceCache.load(cache.save(tmp_path / "relevance.safetensors"))
    assert sorted(back.keys()) == sorted(cache.keys())
    for name in cache.keys():  # noqa: SIM118
        assert torch.equal(back[name], cache[name]), name
    for name in ("tokens", "embeddings", "token_ids", "attention_mask"):
        assert torch.equal(getattr(back, name), getattr(cache, name)), name
    assert back.positions is None
    assert back.str_tokens == cache.str_tokens
    assert back.target.text == cache.target.text
    assert torch.equal(back.target.value, cache.target.value)
    assert back.composite.name == "AttnLRP"
    assert back.model_name == cache.model_name
    assert back.coverage.off_path == cache.coverage.off_path
    assert back.coverage.sites.to_dict() == cache.coverage.sites.to_dict()
    assert back.ledger().to_dict() == cache.ledger().to_dict()
    pd.testing.assert_frame_equal(back.ledger().table, cache.ledger().table)
    assert back.top(k=3).to_dict() == cache.top(k=3).to_dict()
    assert back.words().to_dict() == cache.words().to_dict()


def test_learned_positions_and_sparse_tensors_are_saved(tmp_path: Path) -> None:
    from tests.conformance.families import make, tokens

    _, before = lenslrp.run_with_relevance(
        make("gpt2"), tokens(), 5, names_filter="mlp.hook_post", reduce=lenslrp.TopK(3)
    )
    after = lenslrp.RelevanceCache.load(before.save(tmp_path / "gpt2"))
    assert before.positions is not None
    assert torch.equal(after.positions, before.positions)
    name = "blocks.0.mlp.hook_post"
    assert torch.equal(after[name], before[name].to_dense())
    total = before.tokens.sum() + before.positions.sum()
    assert float(total) == pytest.approx(before.ledger().leaves)


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(lenslrp.InputError, match="holds no saved relevance"):
        lenslrp.RelevanceCache.load(tmp_path / "other.safetensors")


def test_difference(model: Any, cache: lenslrp.RelevanceCache) -> None:
    _, other = lenslrp.run_with_relevance(model, PROMPT, LogProb(" sat"), lenslrp.CPLRP())
    difference = cache - other
    assert torch.equal(difference.tokens, cache.tokens - other.tokens)
    name = "blocks.1.mlp.hook_post"
    assert torch.equal(difference[name], cache[name] - other[name])
    assert difference.target.text == f"({cache.target.text}) - ({other.target.text})"
    assert torch.equal(difference.target.value, cache.target.value - other.target.value)
    assert difference.composite.name == "AttnLRP - CP-LRP"
    with pytest.raises(lenslrp.InputError, match="difference"):
        difference.ledger()
    _, shorter = lenslrp.run_with_relevance(model, " the cat", " mat")
    with pytest.raises(lenslrp.InputError, match="cannot subtract"):
        cache - shorter
