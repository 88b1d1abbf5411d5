"""On real weights: does it point at what a person would point at, and in every dtype alike?

The prompts are the eight most robust of ``benchmarks/faithfulness/keyword_prompts.json``, whose key
words were written before any relevance was looked at (``benchmarks/faithfulness/keywords.py
--per-prompt`` ranks them), and the tower.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

import lenslrp
from tests.conftest import ROOT

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

pytestmark = pytest.mark.real
PROMPTS = json.loads((ROOT / "benchmarks" / "faithfulness" / "keyword_prompts.json").read_text())[
    "prompts"
]
ROBUST = [44, 43, 11, 10, 49, 40, 48, 45]
EIFFEL = PROMPTS[0]


def explain(model: TransformerBridge, entry: dict[str, Any]) -> lenslrp.RelevanceCache:
    return lenslrp.run_with_relevance(
        model, entry["prompt"], target=entry["target"], names_filter=[]
    )[1]


@pytest.mark.parametrize("entry", [PROMPTS[i] for i in ROBUST], ids=lambda e: e["target"].strip())
def test_the_key_word_is_the_most_relevant(
    smollm2: TransformerBridge, entry: dict[str, Any]
) -> None:
    relevance = explain(smollm2, entry)
    best = int(relevance.tokens[0].argmax())
    start = len("".join(relevance.str_tokens[0][:best]))
    end = start + len(relevance.str_tokens[0][best])
    text = entry["prompt"]
    spans = [
        (at, at + len(word))
        for word in entry["keywords"]
        for at in range(len(text))
        if text.startswith(word, at)
    ]
    assert any(start < stop and begin < end for begin, stop in spans), relevance.str_tokens[0][best]


def test_the_towers_name_explains_paris(smollm2: TransformerBridge) -> None:
    relevance = explain(smollm2, EIFFEL)
    assert relevance.str_tokens[0][int(relevance.tokens[0].argmax())] == "iffel"
    assert abs(relevance.ledger().error) < 1e-5


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    model = lenslrp.load("smollm2-135m", dtype=torch.float64, device="cpu")
    return explain(model, EIFFEL).tokens[0].double()


@pytest.mark.parametrize(
    ("dtype", "least"),
    [(torch.float32, 0.999999), (torch.bfloat16, 0.999), (torch.float16, 0.9995)],
    ids=["float32", "bfloat16", "float16"],
)
def test_every_dtype_agrees_with_float64(
    exact: torch.Tensor, dtype: torch.dtype, least: float
) -> None:
    model = lenslrp.load("smollm2-135m", dtype=dtype, device="cpu")
    tokens = explain(model, EIFFEL).tokens[0].double()
    assert torch.nn.functional.cosine_similarity(tokens, exact, dim=0) > least


def test_k_targets_from_one_forward_pass_equal_k_runs(smollm2: TransformerBridge) -> None:
    targets = [" Paris", " London", " France"]
    together = lenslrp.relevance_for_targets(
        smollm2, EIFFEL["prompt"], targets=targets, names_filter=["blocks.3.mlp.hook_post"]
    )
    for target, relevance in zip(targets, together, strict=True):
        alone = lenslrp.run_with_relevance(
            smollm2, EIFFEL["prompt"], target=target, names_filter=["blocks.3.mlp.hook_post"]
        )[1]
        torch.testing.assert_close(relevance.tokens, alone.tokens, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            relevance["blocks.3.mlp.hook_post"],
            alone["blocks.3.mlp.hook_post"],
            rtol=1e-4,
            atol=1e-6,
        )
        assert abs(relevance.ledger().error) < 1e-4
