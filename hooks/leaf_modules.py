"""The modules whose outputs are the leaves, where relevance ends: embeddings, patches, frames.

A vision transformer cuts an image into patches with one convolution, puts learned tokens (CLS,
distillation, registers) before them and adds learned positions. These are raw parameters of the
module that does it, named alike across transformers; here they are found by those names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components import EmbeddingBridge, PosEmbedBridge

from lenslrp.hooks.handles import Attached
from lenslrp.hooks.sites import Site, has_values
from lenslrp.hooks.structure import NamedModules, original

SINUSOIDAL_SUFFIX = "SinusoidalPositionalEmbedding"
"""How transformers' classes for positions without a weight end."""

PER_LAYER_EMBEDDING = ".embed_tokens_per_layer"
"""Gemma 3n and 4 embed the tokens once more for every layer, without a bridge."""

MORE_EMBEDDINGS = (
    PER_LAYER_EMBEDDING,
    *("embed_vision.embedding", "embed_audio.embedding"),
)
"""Embeddings without a bridge: Gemma 3n has others for the ids that surround images and sounds."""

SPECIAL_TOKENS = {
    "cls_token": "[CLS]",
    "class_embedding": "[CLS]",
    "class_token": "[CLS]",
    "distillation_token": "[DIST]",
    "register_tokens": "[REG]",
}
"""Parameters that are tokens of their own, in the order in which they precede the patches."""

POSITION_NAMES = ("position_embeddings", "position_embedding", "pos_embed", "positional_embedding")
"""Parameters, or embeddings, that are added to every token of an image."""

FRAME_COMPONENT = "feat_proj"
"""The bridge's component whose linear layer, or convolution, makes the frames of a sound."""

FRAME_NORM = "feat_ln"
"""The bridge's component of a norm before it, where that is no part of it (SEW)."""

FRAMING = (nn.Linear, nn.Conv1d)
"""The layers that make frames; where a component has none, it makes them itself."""

WAVE_COMPONENT = "audio_feature_extractor"
"""How the bridge's components with the convolutions before it begin."""

OF_POSITIONS = {
    "DisentangledSelfAttention": ("pos_key_proj", "pos_query_proj", "pos_proj", "pos_q_proj"),
    "DebertaV2Encoder": ("LayerNorm",),
}
"""Class -> children that read nothing but a table of relative positions."""

INPUT_PARAMETERS = frozenset({*SPECIAL_TOKENS, *POSITION_NAMES})


def embeddings(parts: NamedModules) -> list[tuple[nn.Module, bool]]:
    """The modules whose outputs are the leaves, and whether each embeds positions (or types).

    Sinusoids kept in a buffer count as positions, and so does a stack's own embedding around the
    shared weight (T5). Rotary tables are no embeddings, and neither is T5's relative-position bias,
    which is added to scores.
    """
    found: dict[int, tuple[nn.Module, bool]] = {}
    for path, module in parts:
        if not isinstance(module, EmbeddingBridge | PosEmbedBridge):
            position = type(module).__name__.endswith(SINUSOIDAL_SUFFIX)  # XGLM's has no bridge
            if position or path.endswith(MORE_EMBEDDINGS):
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


def relative_positions(parts: NamedModules) -> set[int]:
    """Modules, by id, that read relative positions alone: what they give is a constant.

    Where it is a factor of the scores, it takes its share (`HookableAttention`).
    """
    return {
        id(module._modules[name])
        for _, module in parts
        for name in OF_POSITIONS.get(type(module).__name__, ())
        if name in module._modules
    }


def _same_table(module: nn.Embedding, b: Any) -> bool:
    """One table, or the copy that TransformerLens makes of it when it processes weights."""
    a = module.weight
    alike = a.shape == b.shape and a.device == b.device and has_values(a)
    return a is b or (alike and torch.equal(a, b))


def _adds_to_scores(bridge: Any) -> bool:
    return "relative" in str(bridge.name)


@dataclass(frozen=True, eq=False)
class MediaEmbedder:
    """One place where an image or a sound becomes a sequence.

    Attributes:
        projection: the patch convolution, whose output is [batch, d_model, row, column], or the
            linear layer behind a stack of convolutions, whose output is [batch, frame, d_model];
            or the last of a few convolutions, whose output is [batch, d_model, frame].
        owner: the module whose own parameters the constants are, if there are any.
        special: attribute -> how its tokens are called.
        positions: attributes added to the tokens: parameters, or ``nn.Embedding`` children.
    """

    projection: nn.Module
    owner: nn.Module | None
    special: dict[str, str]
    positions: tuple[str, ...]


def media_embedders(parts: NamedModules) -> list[MediaEmbedder]:
    """Every place of a bridge where an image or a sound becomes a sequence."""
    places: dict[int, MediaEmbedder] = {}
    for _, module in parts:
        if INPUT_PARAMETERS.isdisjoint({*module._parameters, *module._modules}):
            continue
        special = {name: text for name, text in SPECIAL_TOKENS.items() if _has(module, name)}
        positions = tuple(name for name in POSITION_NAMES if _has(module, name))
        if special or positions:
            patches = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
            if patches is not None:
                places.setdefault(id(patches), MediaEmbedder(patches, module, special, positions))
    for path, module in parts:
        inner: Any = original(module) if path == FRAME_COMPONENT else None
        if isinstance(inner, nn.Module):
            frames = next((m for m in inner.modules() if isinstance(m, FRAMING)), inner)
            places[id(frames)] = MediaEmbedder(frames, None, {}, ())
    if not places:  # positions that are rotations, and no token but the patches
        patches = next((m for _, m in parts if isinstance(m, nn.Conv2d)), None)
        if patches is not None:
            return [MediaEmbedder(patches, None, {}, ())]
    return list(places.values())


def sites_before_sequence(parts: NamedModules, sites: Iterable[Site]) -> list[Site]:
    """The sites of what runs before there are patches or frames, the layer that makes them too."""
    inside = {id(m) for place in media_embedders(parts) for m in place.projection.modules()}
    for path, module in parts:
        if path.startswith((FRAME_COMPONENT, FRAME_NORM, WAVE_COMPONENT)) and "." not in path:
            inside |= {id(m) for m in module.modules()}
    paths = {path for path, module in parts if id(module) in inside}
    return [site for site in sites if site.hook in paths]


def _has(module: nn.Module, name: str) -> bool:
    """Whether a module itself, and not one that it wraps, holds a parameter or embedding."""
    if module._parameters.get(name) is not None:
        return True
    return isinstance(module._modules.get(name), nn.Embedding)


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
