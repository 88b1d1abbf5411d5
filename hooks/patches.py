"""Where an image or a sound becomes a sequence: the layer that makes its tokens, and its constants.

A vision transformer cuts an image into patches with one convolution, puts learned tokens (CLS,
distillation, registers) before them and adds learned positions. These are raw parameters of the
module that does it, named alike across transformers; here they are found by those names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lenslrp.hooks.attach import original
from lenslrp.hooks.sites import Site

SPECIAL = {
    "cls_token": "[CLS]",
    "class_embedding": "[CLS]",
    "class_token": "[CLS]",
    "distillation_token": "[DIST]",
    "register_tokens": "[REG]",
}
"""Parameters that are tokens of their own, in the order in which they precede the patches."""

POSITIONS = ("position_embeddings", "position_embedding", "pos_embed", "positional_embedding")
"""Parameters, or embeddings, that are added to every token of an image."""

FRAMES = "feat_proj"
"""The bridge's component whose linear layer makes the frames of a waveform."""

WAVES = "audio_feature_extractor"
"""The bridge's component with the convolutions before it."""


NAMED = frozenset({*SPECIAL, *POSITIONS})


@dataclass(frozen=True, eq=False)
class Embedder:
    """One place where an image or a sound becomes a sequence.

    Attributes:
        projection: the patch convolution, whose output is [batch, d_model, row, column], or the
            linear layer behind a stack of convolutions, whose output is [batch, frame, d_model].
        owner: the module whose own parameters the constants are, if there are any.
        special: attribute -> how its tokens are called.
        positions: attributes added to the tokens: parameters, or ``nn.Embedding`` children.
    """

    projection: nn.Module
    owner: nn.Module | None
    special: dict[str, str]
    positions: tuple[str, ...]


def embedders(parts: Iterable[tuple[str, nn.Module]]) -> list[Embedder]:
    """Every place of a bridge where an image or a sound becomes a sequence."""
    parts = list(parts)
    found: dict[int, Embedder] = {}
    for _, module in parts:
        if NAMED.isdisjoint(module._parameters) and NAMED.isdisjoint(module._modules):
            continue
        special = {name: text for name, text in SPECIAL.items() if _has(module, name)}
        positions = tuple(name for name in POSITIONS if _has(module, name))
        if special or positions:
            patches = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
            if patches is not None:
                found.setdefault(id(patches), Embedder(patches, module, special, positions))
    for path, module in parts:
        inner: Any = original(module) if path == FRAMES else None
        if isinstance(inner, nn.Module):
            frames = next((m for m in inner.modules() if isinstance(m, nn.Linear)), None)
            if frames is not None:
                found[id(frames)] = Embedder(frames, None, {}, ())
    if not found:  # positions that are rotations, and no token but the patches
        patches = next((m for _, m in parts if isinstance(m, nn.Conv2d)), None)
        if patches is not None:
            return [Embedder(patches, None, {}, ())]
    return list(found.values())


def below(parts: Iterable[tuple[str, nn.Module]], sites: Iterable[Site]) -> list[Site]:
    """The sites of what runs before there are patches or frames, the layer that makes them too."""
    parts = list(parts)
    inside = {id(m) for place in embedders(parts) for m in place.projection.modules()}
    for path, module in parts:
        if path in (FRAMES, WAVES):
            inside |= {id(m) for m in module.modules()}
    paths = {path for path, module in parts if id(module) in inside}
    return [site for site in sites if site.hook in paths]


def _has(module: nn.Module, name: str) -> bool:
    """Whether a module itself, and not one that it wraps, holds a parameter or embedding."""
    if module._parameters.get(name) is not None:
        return True
    return isinstance(module._modules.get(name), nn.Embedding)
