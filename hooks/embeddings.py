"""Embeddings: the modules whose outputs are the leaves, where relevance ends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components import EmbeddingBridge, PosEmbedBridge

from lenslrp.hooks.attach import Attached, original
from lenslrp.hooks.sites import Site, has_values

SINUSOIDS = "SinusoidalPositionalEmbedding"
"""How transformers' classes for positions without a weight end."""

PER_LAYER = "model.embed_tokens_per_layer"
"""Gemma 4 embeds the tokens once more for every layer, without a bridge."""


def embeddings(parts: Iterable[tuple[str, nn.Module]]) -> list[tuple[nn.Module, bool]]:
    """The modules whose outputs are the leaves, and whether each embeds positions (or types).

    Sinusoids kept in a buffer count as positions, and so does a stack's own embedding around the
    shared weight (T5). Rotary tables are no embeddings, and neither is T5's relative-position bias,
    which is added to scores.
    """
    found: dict[int, tuple[nn.Module, bool]] = {}
    parts = list(parts)
    for path, module in parts:
        if not isinstance(module, EmbeddingBridge | PosEmbedBridge):
            position = type(module).__name__.endswith(SINUSOIDS)  # XGLM's has no bridge
            if position or path.endswith(PER_LAYER):
                found.setdefault(id(module), (module, position))
            continue
        inner = original(module)
        if inner is None or not any(True for _ in (*inner.parameters(), *inner.buffers())):
            continue
        position = isinstance(module, PosEmbedBridge) or "token_type" in path
        if position and _adds_to_scores(module):
            continue
        found[id(inner)] = (inner, position)
    tables: list[tuple[Any, bool]] = [(m, position) for m, position in found.values()]
    for table, position in tables:
        for _, module in parts:
            weight = getattr(table, "weight", None)
            if not isinstance(module, nn.Embedding) or weight is None:
                continue
            if _same_table(module, weight):
                found.setdefault(id(module), (module, position))
    return list(found.values())


def _same_table(module: nn.Embedding, b: Any) -> bool:
    """One table, or the copy that TransformerLens makes of it when it processes weights."""
    a = module.weight
    alike = a.shape == b.shape and a.device == b.device and has_values(a)
    return a is b or (alike and torch.equal(a, b))


def _adds_to_scores(bridge: Any) -> bool:
    return "relative" in str(bridge.name)


def attach_leaf(at: Attached, inner: nn.Module) -> None:
    """Embeddings are the leaves: with the weights frozen, nothing else would start a graph."""

    def leaf(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return out.requires_grad_() if torch.is_grad_enabled() else out

    at.hook(inner, leaf)


def attach_patches(at: Attached, projection: nn.Module, sites: list[Site]) -> None:
    """Patches are leaves where nothing before them is: ``sites`` are then off the path.

    Attached behind the projection's own rule, which cuts the graph.
    """

    def leaf(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return out
        for site in sites:
            site.cut = not out.requires_grad
        return out.requires_grad_()

    at.hook(projection, leaf)
