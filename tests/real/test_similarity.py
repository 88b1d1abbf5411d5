"""all-MiniLM-L6-v2: similarities are those of transformers, the words that make them are named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import lenslrp
from benchmarks.similarity.pairs import MODEL, sentences
from lenslrp.analysis import bilrp
from lenslrp.models.embedded import ensure_cached
from lenslrp.targets import SentenceEmbedding, Similarity

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

pytestmark = pytest.mark.real

CATS = ["A cat sat on the mat.", "The kitten is resting on a rug."]


@pytest.fixture(scope="module")
def encoder() -> TransformerBridge:
    return lenslrp.load(MODEL, device="cpu")


def test_the_checkpoint_says_how_texts_are_pooled(encoder: Any) -> None:
    assert encoder.sentence_embedding == SentenceEmbedding("mean", normalise=True, longest=256)


def test_similarities_are_those_of_transformers(encoder: Any) -> None:
    """Twenty pairs in one padded batch; transformers alone, a text at a time."""
    place = ensure_cached(MODEL)
    model, tokenizer = AutoModel.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)
    texts = [text for _, *pair in sentences() for text in pair]
    vectors = []
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        vectors.append(states[0].mean(dim=0))
    pairs = torch.stack(vectors).unflatten(0, (-1, 2))
    expected = torch.nn.functional.cosine_similarity(pairs[:, 0], pairs[:, 1], dim=1)
    _, R = lenslrp.run_with_relevance(encoder, texts, Similarity(), names_filter=[])
    torch.testing.assert_close(R.target.value, expected.repeat_interleave(2), rtol=0, atol=2e-6)
    assert abs(R.ledger().error) < 1e-5


def test_relevance_points_at_the_words_that_are_alike(encoder: Any) -> None:
    _, R = lenslrp.run_with_relevance(encoder, CATS, Similarity(), names_filter=[])
    for row, word in ((0, " cat"), (1, " kitten")):
        words = R.words(row)
        assert words["word"][words["relevance"].idxmax()] == word
    pairs = bilrp(encoder, *CATS, batch_size=96)
    best = pairs.words().top(1).iloc[0]
    assert (best["a"], best["b"]) == (" cat", " kitten")
    assert pairs.value == pytest.approx(float(R.target.value[0]), abs=2e-6)
