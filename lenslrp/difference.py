"""``R - other``: relevance of one target, composite or checkpoint minus that of another."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lenslrp.errors import InputError
from lenslrp.hooks.composites import Composite
from lenslrp.targets import Explained

if TYPE_CHECKING:
    from lenslrp.cache import RelevanceCache

AT_LEAVES = (
    "embeddings", "positions", "decoder_tokens", "decoder_positions", "patches", "patch_positions",
    "special",
)  # fmt: skip
"""The tensors of relevance that not every model has."""


def subtracted(a: RelevanceCache, b: RelevanceCache) -> RelevanceCache:
    """Relevance in ``a`` minus relevance in ``b``, hook point by hook point.

    For two runs on the same tokens: of two targets, two composites, or two checkpoints of one
    architecture, before and after fine-tuning. A hook point that was off the path in one of the two
    is left out; there is no ledger.

    Raises:
        InputError: other tokens, other padding, other hook points, or values of other shapes.
    """
    _require_same_tokens(a, b)
    _require_same_hooks(a, b)
    values = {name: _minus(x, b.values[name]) for name, x in a.values.items() if name in b.values}
    leaves: dict[str, Any] = {}
    for name in AT_LEAVES:
        x, y = getattr(a, name), getattr(b, name)
        leaves[name] = x - y if x is not None and y is not None and x.shape == y.shape else None
    composite = Composite(
        _both(a.composite.name, b.composite.name), a.composite.rules, a.composite.modules
    )
    return replace(
        a,
        **leaves,
        values=values,
        activations={},
        tokens=a.tokens - b.tokens,
        target=Explained(
            f"({a.target.text}) - ({b.target.text})",
            a.target.value - b.target.value,
            tuple(f"({x}) - ({y})" for x, y in zip(a.target.texts, b.target.texts, strict=True)),
        ),
        composite=composite,
        ledger_=None,
        model_name=_both(a.model_name, b.model_name),
        dtype=_both(a.dtype, b.dtype),
        routing={k: x for k, x in a.routing.items() if _equal(x, b.routing.get(k))},
        inputs={
            name: x - b.inputs[name]
            for name, x in a.inputs.items()
            if name in b.inputs and b.inputs[name].shape == x.shape
        },
    )


def _both(a: str, b: str) -> str:
    return a if a == b else f"{a} - {b}"


def _minus(x: Tensor, y: Tensor) -> Tensor:
    if x.is_sparse != y.is_sparse:
        x, y = (v.to_dense() if v.is_sparse else v for v in (x, y))
    return x - y


def _equal(x: Tensor | None, y: Tensor | None) -> bool:
    return x is not None and y is not None and torch.equal(x, y)


def _require_same_tokens(a: RelevanceCache, b: RelevanceCache) -> None:
    """Refuse two runs that did not read, and write, the same tokens at the same positions."""
    for side, ids, mask in (
        ("", "token_ids", "attention_mask"),
        (" of the decoder", "decoder_token_ids", "decoder_attention_mask"),
    ):
        x, y = getattr(a, ids), getattr(b, ids)
        if x is None or y is None:  # saved by a version that did not keep the decoder's
            continue
        if x.shape != y.shape:
            raise InputError(
                f"cannot subtract: {list(x.shape)} tokens{side} here, {list(y.shape)} there"
            )
        real = getattr(a, mask)
        if not torch.equal(real, getattr(b, mask)):
            raise InputError(f"cannot subtract: the padding{side} stands at other positions there")
        other = ((x != y) & real).nonzero()
        if len(other):
            row, column = other[0].tolist()
            raise InputError(
                f"cannot subtract: other tokens{side}, the first in row {row} at column {column} "
                f"(id {int(x[row, column])} here, {int(y[row, column])} there); explain the same "
                "text in both, with tokenizers that agree on it"
            )


def _require_same_hooks(a: RelevanceCache, b: RelevanceCache) -> None:
    """Refuse hook points that were read in one run alone, or not with the same shape."""
    for x, y, where in ((a, b, "here"), (b, a, "there")):
        only = sorted(x.values.keys() - y.values.keys() - {*y.coverage.off_path})
        if only:
            raise InputError(
                f"cannot subtract: {', '.join(only[:3])} {'was' if len(only) == 1 else 'were'} "
                f"read {where} alone; give both runs the same names_filter"
            )
    for name, value in sorted(a.values.items()):
        shape = value.shape if name not in b.values else b.values[name].shape
        if value.shape != shape or a.reduced.get(name) != b.reduced.get(name, a.reduced.get(name)):
            raise InputError(
                f"cannot subtract: {name} is {list(value.shape)} here and {list(shape)} there; "
                "compare checkpoints of one architecture, read with the same reduce"
            )
