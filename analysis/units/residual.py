"""The vectors of a unit as the residual stream sees them: through the norms around its branch.

A branch reads the residual stream through a norm and, in some models (Gemma 2, OLMo 2), writes to
it through another. A head reads and writes whole subspaces, of which one component is taken: a
singular component of its OV or QK circuit, or its image of one source.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lenslrp.analysis.units.kinds import (
    Direction,
    Feature,
    Head,
    Neuron,
    Unit,
    require_unit,
)
from lenslrp.analysis.units.locations import Side, block_of, blocks_name
from lenslrp.analysis.units.unembedding import (
    branch_norm,
    embedding,
    final_norm,
    input_norm,
    measure_gain,
    unembedding,
)
from lenslrp.errors import InputError
from lenslrp.hooks.structure import layer_of
from lenslrp.text.names import token_ids

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def _location(unit: Unit) -> tuple[int, str, Side] | None:
    """Layer, part of the block, encoder or decoder; None for what is at a hook point."""
    if isinstance(unit, Neuron):
        return unit.layer, "mlp", unit.side
    if isinstance(unit, Head):
        return unit.layer, "cross_attn" if unit.cross else "attn", unit.side
    return None


def _at_least_float32(vectors: Tensor) -> Tensor:
    narrow = vectors.dtype in (torch.float16, torch.bfloat16)
    return vectors.float() if narrow else vectors


def as_written(model: TransformerBridge, unit: Unit, vectors: Tensor) -> Tensor:
    """Vectors as they arrive in the residual stream: through the branch's own norm, if any.

    Raises:
        InputError: a cross-layer feature whose branches have norms of their own.
    """
    location, norm = _location(unit), None
    if location is not None:
        layer, part, side = location
        norm = branch_norm(block_of(model, layer, side), part)
    elif isinstance(unit, Feature):
        norms = [_norm_after(model, hook) for hook in unit.coder.decoders]
        norm = norms[0]
        if unit.coder.later and any(norms):
            raise InputError(f"{unit} writes through norms of several layers, not through one")
    wide = _at_least_float32(vectors)
    return wide if norm is None else measure_gain(model, norm, vectors).forward(wide)


def as_read(model: TransformerBridge, unit: Unit, name: str, vectors: Tensor) -> Tensor:
    """Vectors as they meet the residual stream: through the norm before the branch, if any."""
    location, norm = _location(unit), None
    wide = _at_least_float32(vectors)
    if location is not None:
        layer, part, side = location
        if part == "cross_attn" and name in ("k", "v"):
            norm = final_norm(model, "encoder")
        else:
            norm = input_norm(model, block_of(model, layer, side), side, part)
    elif isinstance(unit, Feature | Direction):
        norm = _norm_before(model, hook := unit.hook(model))
        if norm is not None and hook.endswith("hook_normalized"):  # ahead of the gain
            gain = measure_gain(model, norm, vectors)
            return replace(gain, gain=torch.ones_like(gain.gain)).backward(wide)
    return wide if norm is None else measure_gain(model, norm, vectors).backward(wide)


def _branches(model: TransformerBridge, hook: str) -> Iterator[tuple[Any, Side, str, Any]]:
    """The block of a hook point, which stack it is in, and its branches with their names."""
    side: Side = "encoder" if hook.startswith("encoder_") else "decoder"
    layer = layer_of(hook)
    if layer is not None:
        block = block_of(model, layer, side)
        for name in ("attn", "self_attn", "cross_attn", "mlp"):
            if block._modules.get(name) is not None:
                yield block, side, name.removeprefix("self_"), block._modules[name]


def _norm_after(model: TransformerBridge, hook: str) -> nn.Module | None:
    """The norm between a branch's output, where it is at a hook point, and the stream."""
    for block, _, part, branch in _branches(model, hook):
        if branch.hook_out is model.hook_dict.get(hook):
            return branch_norm(block, part)
    return None


def _norm_before(model: TransformerBridge, hook: str) -> nn.Module | None:
    """The norm between the stream and a hook point: a branch's input, or of that norm itself."""
    for block, side, part, branch in _branches(model, hook):
        norm = input_norm(model, block, side, part)
        shown = [getattr(norm, name, branch.hook_in) for name in ("hook_out", "hook_normalized")]
        if any(model.hook_dict.get(hook) is point for point in (branch.hook_in, *shown)):
            return norm
    return None


def require_decoder(model: TransformerBridge, unit: Unit) -> None:
    """Refuse a unit whose writes no vocabulary reads.

    Raises:
        InputError: no unit, a model without an unembedding, or a unit of an encoder.
    """
    require_unit(unit)
    unembedding(model)  # raises where there is none
    location = _location(unit)
    if location is not None and blocks_name(model, location[2]) == "encoder_blocks":
        raise InputError(
            f"{unit}: an encoder writes to cross-attention, not to the unembedding; "
            "what it reads can be asked for"
        )


def head_writes(
    model: TransformerBridge, head: Head, source: Any, component: int
) -> tuple[Tensor, float]:
    """One vector that a head writes [d_model], see `writes`, and its singular value."""
    out = _at_least_float32(head.writes(model)["out"])
    value = as_read(model, head, "v", head.reads(model)["v"])
    if source is None:
        _, strength, write = _components(value, out, component)
        return write, strength
    if isinstance(source, str | int):
        source = embedding(model)[_token(model, source)]
    if source.shape[-1] != value.shape[1]:
        raise InputError(f"source has {source.shape[-1]} values, expected {value.shape[1]}")
    return (value @ source.to(value)) @ out, 1.0


def head_reads(
    model: TransformerBridge, head: Head, component: int
) -> dict[str, tuple[Tensor, float]]:
    """One query, key and value vector of a head [d_model], and their singular values."""
    vectors = {n: as_read(model, head, n, v) for n, v in head.reads(model).items()}
    query, strength, key = _components(vectors["q"], vectors["k"], component)
    value, size, _ = _components(
        vectors["v"], _at_least_float32(head.writes(model)["out"]), component
    )
    return {"q": (query, strength), "k": (key, strength), "v": (value, size)}


def _components(
    a: Float[Tensor, "d_head d_model"], b: Float[Tensor, "d_head d_model"], component: int
) -> tuple[Tensor, float, Tensor]:
    """One singular component of ``a.T @ b``, [d_model, d_model] but never formed.

    Both signs of a pair of singular vectors are the same component; the one is chosen whose first
    vector has its largest entry positive.
    """
    if not 0 <= component < len(a):
        raise InputError(f"component is {component}, but the head has 0 to {len(a) - 1}")
    left, lower = torch.linalg.qr(a.T)
    right, upper = torch.linalg.qr(b.to(a).T)
    u, sizes, v = torch.linalg.svd(lower @ upper.T)
    first, second = left @ u[:, component], right @ v[component]
    sign = first[first.abs().argmax()].sign()
    return sign * first, float(sizes[component]), sign * second


def _token(model: TransformerBridge, token: str | int) -> int:
    size = len(embedding(model))
    if isinstance(token, int):
        if not 0 <= token < size:
            raise InputError(f"token is {token}, expected 0 to {size - 1}")
        return token
    ids = token_ids(model.tokenizer, token)
    if len(ids) != 1:
        raise InputError(f"{token!r} is {len(ids)} tokens; a head attends to one")
    return int(ids[0])
