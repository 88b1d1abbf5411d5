"""Positional relevance and the softmax ablations equal an explicit propagation on tiny Llamas.

The oracle carries relevance without autograd (``tests/oracles/explicit_llama.py``); here its rule
for the rotation, or for the softmax, is exchanged for the one in question, written as the papers
write it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from lenslrp.analysis.attribution.methods import attribute
from tests.conformance.hooks.test_explicit_llama import (
    TARGETS,
    TOKENS,
    explain_model,
    make_model,
    softmax_in_float64,
)
from tests.oracles import explicit_llama

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in float64, the softmax too."""
    monkeypatch.setattr(AttentionBridge, "_masked_softmax", softmax_in_float64)


def engine(model: Any, method: str, **options: Any) -> Tensor:
    bridge = build_bridge_from_module(
        model, architecture="LlamaForCausalLM", hf_config=model.config, device="cpu"
    ).eval()
    return attribute(method, bridge, TOKENS, TARGETS, **options).tokens


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_positional_relevance_is_what_the_rotation_hands_to_cos_and_sin(
    kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[tuple[Tensor, Tensor]] = []  # of queries, then of keys, the last layer first

    def halved(relevance: Tensor, x: Tensor, rotation: Tensor) -> Tensor:
        """y = x cos + rot(x) sin: the epsilon rule on the sum, then half to each factor."""
        cos = torch.diag_embed(rotation.diagonal(dim1=-2, dim2=-1))
        y = torch.einsum("tij,bhtj->bhti", rotation, x)
        per_output = explicit_llama.divide(relevance, y)
        by_cos = torch.einsum("bhtj,tij,bhti->bhtij", x, cos, per_output)
        by_sin = torch.einsum("bhtj,tij,bhti->bhtij", x, rotation - cos, per_output)
        sinks = [0.5 * part.sum(dim=(1, 3, 4)) for part in (by_cos, by_sin)]
        parts.append((sinks[0], sinks[1]))
        return 0.5 * (by_cos + by_sin).sum(dim=3)

    monkeypatch.setattr(explicit_llama, "rotary_rule", halved)
    model = make_model(kv_heads, wide=True)
    tokens = explain_model(model, "attnlrp").tokens
    signed, absolute = tokens.clone(), tokens.clone()
    for queries, keys in zip(parts[::2], parts[1::2], strict=True):
        for of_queries, of_keys in zip(queries, keys, strict=True):
            signed += of_queries + of_keys
            absolute += (of_queries + of_keys).abs()  # cos is one tensor for all heads and both
    torch.testing.assert_close(engine(model, "attnlrp_positional"), absolute, **CLOSE)
    model = make_model(kv_heads, wide=True)
    found = engine(model, "attnlrp_positional", absolute=False)
    torch.testing.assert_close(found, signed, **CLOSE)


def identity(relevance: Tensor, x: Tensor, s: Tensor, visible: Tensor) -> Tensor:
    return torch.where(visible, relevance, 0.0)


def distributed(relevance: Tensor, x: Tensor, s: Tensor, visible: Tensor) -> Tensor:
    """What Taylor's expansion leaves, to every visible key alike."""
    relevance = torch.where(visible, relevance, 0.0)
    total = relevance.sum(dim=-1, keepdim=True)
    taylor = torch.where(visible, x * (relevance - s * total), 0.0)
    left = total - taylor.sum(dim=-1, keepdim=True)
    return torch.where(visible, taylor + left / visible.sum(dim=-1, keepdim=True), 0.0)


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        ("attnlrp_softmax_identity", identity),
        ("attnlrp_softmax_distributed", distributed),
    ],
)
def test_the_ablations_of_the_softmax(
    method: str, rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explicit_llama, "softmax_rule", rule)
    model = make_model(2, biases=True, wide=True)
    expected = explain_model(model, "attnlrp").tokens
    torch.testing.assert_close(engine(model, method), expected, **CLOSE)
