"""The task of a classifier of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import lenslrp
from lenslrp.analysis import NeuronDictionary, Pairs, as_prompt
from lenslrp.analysis.evaluation.features import token_values
from lenslrp.analysis.evaluation.tasks import TASKS, Unfit
from lenslrp.errors import InputError
from lenslrp.targets import LogitDiff
from tests.unit.tiny import WORDS, tiny, word_tokenizer


def of_words() -> Any:
    """A classifier of words, whose padding token is not 0."""
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        id2label={0: "bad", 1: "fair", 2: "good"},
        pad_token_id=1,
    )
    torch.manual_seed(0)
    return lenslrp.load(LlamaForSequenceClassification(config).eval(), tokenizer=word_tokenizer())


def test_classification_follows_the_label_that_is_right() -> None:
    classifier = of_words()
    text = "a b c"
    logits = classifier(classifier.tokenizer(text, return_tensors="pt")["input_ids"])[0]
    first, second = logits.topk(2).indices.tolist()
    make, labels = TASKS["classification"].make, classifier.original_model.config.id2label
    example = make(classifier, {"text": text, "label": labels[first]}, 8)
    assert example.prompt.target == LogitDiff(first, second)
    words = classifier.tokenizer.convert_ids_to_tokens(example.prompt.tokens.tolist())
    assert example.removable.tolist() == [word in text for word in words]
    with pytest.raises(Unfit, match="answered otherwise"):
        make(classifier, {"text": text, "label": labels[second]}, 8)
    with pytest.raises(Unfit, match="longer than 2 tokens"):
        make(classifier, {"text": text, "label": labels[first]}, 2)
    with pytest.raises(InputError, match="one of bad, fair, good, not 'poor'"):
        make(classifier, {"text": text, "label": "poor"}, 8)


def test_texts_of_unlike_length_share_a_pass() -> None:
    """Each is what it is alone: its end is where its own tokens end."""
    classifier = of_words()
    prompts = [as_prompt(classifier, text) for text in ("a b", "c d e f g")]
    none = [np.zeros((1, len(prompt.tokens)), dtype=bool) for prompt in prompts]
    together = token_values(classifier, prompts, none)
    for prompt, mask, values in zip(prompts, none, together, strict=True):
        alone = token_values(classifier, [prompt], [mask])[0]
        np.testing.assert_allclose(values.value, alone.value, rtol=1e-5, atol=1e-7)


def test_what_looks_at_next_tokens_refuses_a_classifier(tmp_path: Path) -> None:
    classifier = of_words()
    with pytest.raises(InputError, match="next_word needs a language model"):
        TASKS["next_word"].make(classifier, {"text": "a b c"}, 2)
    with pytest.raises(InputError, match="pairs are of next tokens"):
        Pairs.from_texts(classifier, ["a b"], ["a c"], ["d"], ["e"])
    with pytest.raises(InputError, match="this model predicts none"):
        NeuronDictionary.build(
            classifier, ["a b c d"], tmp_path / "d", sites="mlp.hook_post", k=1, context=4
        )


def test_classification_needs_a_classifier() -> None:
    model: Any = tiny(tokenizer=word_tokenizer())
    with pytest.raises(InputError, match="needs a classifier"):
        TASKS["classification"].make(model, {"text": "a", "label": "b"}, 8)
