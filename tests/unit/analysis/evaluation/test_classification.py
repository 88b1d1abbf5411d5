"""The task of a classifier of texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import lenslrp
from lenslrp.analysis.evaluation.tasks import TASKS, Unfit
from lenslrp.errors import InputError
from lenslrp.targets import LogitDiff
from tests.unit.tiny import WORDS, tiny, word_tokenizer


def test_classification_follows_the_label_that_is_right() -> None:
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        id2label={0: "bad", 1: "fair", 2: "good"},
        pad_token_id=0,
    )
    torch.manual_seed(0)
    classifier = lenslrp.load(
        LlamaForSequenceClassification(config).eval(), tokenizer=word_tokenizer()
    )
    text = "a b c"
    logits = classifier(classifier.tokenizer(text, return_tensors="pt")["input_ids"])[0]
    first, second = logits.topk(2).indices.tolist()
    make, labels = TASKS["classification"].make, config.id2label
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


def test_classification_needs_a_classifier() -> None:
    model: Any = tiny(tokenizer=word_tokenizer())
    with pytest.raises(InputError, match="needs a classifier"):
        TASKS["classification"].make(model, {"text": "a", "label": "b"}, 8)
