"""The modules of a model by name, looked up once for as long as they stay the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn
from transformer_lens.model_bridge.generalized_components import (
    EmbeddingBridge,
    NormalizationBridge,
    PosEmbedBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from lenslrp.errors import CoverageError

TRUSTED_PACKAGES = ("torch.", "transformers.", "transformer_lens.")
"""Packages whose modules do the same at every call."""

NamedModules = list[tuple[str, nn.Module]]


class _Structure:
    """What is known of one model; none of its modules is kept alive for it."""

    def __init__(self, parts: NamedModules) -> None:
        self.names = [name for name, _ in parts]
        self.modules = [ref(module) for _, module in parts]
        self.children = [_children(module) for _, module in parts]
        self.places: dict[str, list[int]] = {}
        self.passed: set[Callable[[nn.Module], None]] = set()
        self.held: NamedModules | None = None  # while nobody changes them

    def parts(self) -> NamedModules | None:
        """The modules, ``None`` where one has gone or has other children."""
        if self.held is not None:
            return self.held
        parts: NamedModules = []
        for name, alive in zip(self.names, self.modules, strict=True):
            module = alive()
            if module is None:
                return None
            parts.append((name, module))
        same = (_children(m) == own for (_, m), own in zip(parts, self.children, strict=True))
        return parts if all(same) else None


_known: WeakKeyDictionary[nn.Module, _Structure] = WeakKeyDictionary()


def components(model: nn.Module) -> NamedModules:
    """Every module once, under the first of its names that is not a wrapped module's own."""
    known = _known.get(model)
    parts = None if known is None else known.parts()
    if parts is None:
        parts = list(_named(model))
        _known[model] = _Structure(parts)
    return parts


def position_axis(point: Any) -> int:
    """Which axis of the tensor at a hook point is the positions', by what TransformerLens says.

    It is the second, but where heads or channels come first (q and k behind their norm, MLA).
    """
    axis: int | None = getattr(point, "pos_dim", None)
    return 1 if axis is None or axis < 1 else axis


def components_where(
    model: nn.Module, name: str, holds: Callable[[nn.Module], bool]
) -> NamedModules:
    """The components with a property of their class, remembered under ``name``."""
    parts = components(model)
    places = _known[model].places
    if name not in places:
        places[name] = [index for index, (_, module) in enumerate(parts) if holds(module)]
    return [parts[index] for index in places[name]]


def check_once(model: nn.Module, check: Callable[[nn.Module], None]) -> None:
    """Check a model, unless it has passed with the modules that it has now."""
    components(model)
    passed = _known[model].passed
    if check not in passed:
        check(model)
        passed.add(check)


@contextmanager
def unchanged(model: nn.Module, parts: NamedModules | None = None) -> Iterator[None]:
    """Inside the block the modules are known to be the same ones, and are not looked at again.

    ``parts`` are those, where somebody has just looked.
    """
    parts = components(model) if parts is None or model not in _known else parts
    known = _known[model]
    before, known.held = known.held, parts
    try:
        yield
    finally:
        known.held = before


def require_modules_of_their_own(model: nn.Module) -> None:
    """Refuse a model in which one module stands in two places.

    Norms, activations and embeddings may. Elsewhere the bridge replaces the module's parts once for
    each place, and its hook points would mean both.

    Raises:
        CoverageError: naming the places.
    """
    shared = (NormalizationBridge, EmbeddingBridge, PosEmbedBridge, UnembeddingBridge)
    places: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        inner = getattr(module, "original_component", None)
        inner = inner if isinstance(module, GeneralizedComponent) else None
        if inner is None or isinstance(module, shared) or "_original_component" in path:
            continue
        wrapped_twice = isinstance(inner, GeneralizedComponent) and type(inner) is type(module)
        first = places.setdefault(id(inner), path)
        # Inside one block several components may stand for parts of one module.
        if path.split(".")[:2] != first.split(".")[:2] or wrapped_twice:
            other = "one of another place" if first == path else first
            raise CoverageError(
                f"{path} ({type(inner).__name__}) is the same module as {other}: relevance there "
                "would be that of both; give each place a module of its own (copy.deepcopy)"
            )


def blocks(parts: NamedModules) -> list[nn.Module]:
    """The blocks of every stack, by their place: not all are a ``BlockBridge``."""
    return [
        module
        for path, module in parts
        if isinstance(module, GeneralizedComponent) and re.search(r"(?:^|\.)\w*blocks\.\d+$", path)
    ]


@cache
def layer_of(name: str) -> int | None:
    """The block index in a hook or component name, ``None`` outside the blocks."""
    match = re.search(r"(?:^|\.)\w*blocks\.(\d+)(?:\.|$)", name)
    return int(match.group(1)) if match else None


def original(component: nn.Module) -> Any:
    """The Hugging Face module that a bridge component wraps, or ``None``."""
    return getattr(component, "original_component", None)


def _children(module: nn.Module) -> list[int]:
    inner: Any = module.__dict__.get("original_model")  # a bridge's, past its own modules
    children = [id(child) for child in module._modules.values()]
    return children if inner is None else [*children, id(inner), *map(id, inner.children())]


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()
    named = list(model.named_modules(remove_duplicate=False))
    # What the bridge has no component for (a head's activation, a stack's embedding) runs as well.
    inner = getattr(model, "original_model", None)
    if isinstance(inner, nn.Module):
        named += [
            (f"original_model.{name}".rstrip("."), module) for name, module in inner.named_modules()
        ]
    named.sort(
        key=lambda item: (
            item[0].startswith("original_model"),
            item[0].count("_original_component"),
            "original_" in item[0],
        )
    )
    for name, module in named:
        if id(module) not in seen:
            seen.add(id(module))
            yield name.replace("._original_component", ""), module
