"""Where the units of a bridge are: encoder and decoder blocks, hook points, rows of weights.

TransformerLens gives most weights in one convention (``W_in``: [d_model, neuron], ``W_out``:
[neuron, d_model], ``W_Q``: [head, d_model, d_head]). Batched experts keep those of Hugging Face,
which differ in the order of axes and in how gate and up are joined; transformers records both on
the class.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge.generalized_components import AttentionBridge

from lenslrp.errors import InputError
from lenslrp.hooks.adapted import has_adapter
from lenslrp.hooks.components import hook_points
from lenslrp.hooks.experts import mixtures
from lenslrp.hooks.packed import is_packed_linear
from lenslrp.hooks.scans import mixers
from lenslrp.hooks.structure import NamedModules, components, layer_of, original

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Side = Literal["encoder", "decoder"]

TRANSPOSED = frozenset({"Llama4TextExperts"})
"""Experts that keep [expert, in, out] without saying so by ``is_transposed``."""

_AFTER = re.compile(r"blocks\.(\d+)\.(?:hook_resid_post|hook_out)")
_BEFORE = re.compile(r"blocks\.(\d+)\.(?:hook_resid_pre|hook_in)")

Vectors = dict[str, Float[Tensor, "vectors d_model"]]
"""What is read or written, by name ("in", "gate", "q", ...): one row a vector."""


def blocks_name(model: TransformerBridge, side: Side = "decoder") -> str:
    """The name of a model's blocks: ``blocks``, ``encoder_blocks`` or ``decoder_blocks``.

    Raises:
        InputError: an unknown side, or the encoder of a model without one.
    """
    if side not in get_args(Side):
        raise InputError(f"side is 'encoder' or 'decoder', not {side!r}")
    modules = getattr(model, "_modules", {})
    if f"{side}_blocks" in modules:
        return f"{side}_blocks"
    if side == "encoder" and "blocks" in modules and "decoder_blocks" not in modules:
        raise InputError("side='encoder' is for encoder-decoders; this model has one stack")
    return "blocks"


def block_of(model: TransformerBridge, layer: int, side: Side = "decoder") -> Any:
    """Block ``layer`` of the encoder or the decoder.

    Raises:
        InputError: the layer is out of range.
    """
    blocks = getattr(model, blocks_name(model, side), ())
    if not 0 <= layer < len(blocks):
        raise InputError(f"layer is {layer}, but the model has layers 0 to {len(blocks) - 1}")
    return blocks[layer]


def block_before(hook: str) -> int | None:
    """The block whose output the residual stream at a hook point is, -1 before the first."""
    after, before = _AFTER.fullmatch(hook), _BEFORE.fullmatch(hook)
    return int(after[1]) if after else int(before[1]) - 1 if before else None


def known_hook(model: TransformerBridge, name: str) -> str:
    """``name``, if it is a hook point of ``model``.

    Raises:
        InputError: it is none; the message names the nearest.
    """
    names = hook_points(model, components(model))
    if not isinstance(name, str):
        stream = f"{blocks_name(model)}.{name}.hook_resid_post"
        near = difflib.get_close_matches(stream, names, n=1)
        raise InputError(f"{name!r} is not the name of a hook point, such as {', '.join(near)}")
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        raise InputError(f"no hook point {name!r} in this model; nearest: {', '.join(near)}")
    return name


def head_hooks(points: Mapping[str, Any]) -> list[str]:
    """Where heads are, layer by layer: those of attention, and those of recurrent mixers."""
    ends = (".attn.hook_z", ".hook_scan_out")
    names = [name for end in ends for name in points if name.endswith(end)]
    return sorted(names, key=lambda name: layer_of(name) or 0)


def require_readable_heads(parts: NamedModules) -> None:
    """Refuse a hybrid whose attention TransformerLens has no hook points for: half its heads.

    Raises:
        InputError: naming the layers.
    """
    recurrent = {id(module) for _, module in mixers(parts)}
    bridged = {id(original(module)) for _, module in parts if isinstance(module, AttentionBridge)}
    hidden = [
        path
        for path, module in parts
        if type(module).__name__.endswith("Attention") and id(module) not in recurrent | bridged
    ]
    if recurrent and hidden:
        raise InputError(
            f"the attention at {', '.join(hidden[:4])} has no hook_z here, so that the heads of "
            "this model are not all to be had; those of its mixers are at hook_scan_out "
            "(components=['recurrent'] in circuits)"
        )


def require_one_meaning(points: Mapping[str, Any], name: str) -> None:
    """Refuse a hook point of neurons that is the output of a mixture by another name.

    Raises:
        InputError: naming the output.
    """
    if name.endswith("hook_post") and points[name] is points.get(f"{name[:-4]}out"):
        raise InputError(
            f"{name} is another name of {name[:-4]}out here: a mixture of experts has no one "
            "set of neurons; take its output by that name, or a dense layer"
        )


def require_plain_weights(component: Any) -> None:
    """Refuse to read weights that are packed, or that an adapter adds to.

    Raises:
        InputError: naming the kind of layer.
    """
    for module in getattr(component, "modules", tuple)():
        if is_packed_linear(module) or has_adapter(module):
            raise InputError(
                f"what a unit reads and writes is in weights, and those of a "
                f"{type(module).__name__} are packed, or not all that it computes with: load the "
                "model without quantization_config, and its adapters merged"
            )


def weight(component: Any, name: str, dims: int = 2) -> Tensor | None:
    """A weight in TransformerLens' convention, None where the component has no such matrix.

    Raises:
        InputError: weights of the component are packed, or have an adapter.
    """
    require_plain_weights(component)
    value = None
    # Attention of other geometry refuses with errors of TransformerLens' own or NotImplementedError
    with contextlib.suppress(AttributeError, NotImplementedError, ValueError, RuntimeError):
        value = getattr(component, name)
    if not isinstance(value, Tensor) or value.ndim != dims:
        return None
    return value.detach()


def shared_name(mlp: Any) -> str:
    """The attribute that holds the shared expert of a mixture.

    Raises:
        InputError: it has none.
    """
    for name in ("shared_experts", "shared_expert"):
        if getattr(mlp, "_modules", {}).get(name) is not None:
            return name
    raise InputError("this mixture has no shared expert that the bridge knows")


def expert_reads(experts: Any, expert: int, index: int, size: int) -> Vectors:
    """Rows of the input projections: one matrix of gate and up (stacked or alternating), or one."""
    joint = getattr(experts, "gate_up_proj", None)
    single = getattr(experts, "up_proj", None)
    weight = joint if joint is not None else single
    if weight is None:
        raise InputError(f"{type(experts).__name__} has no gate_up_proj and no up_proj")
    rows = weight.detach()[expert]
    if _transposed(experts):  # [d_model, rows]
        rows = rows.mT
    if joint is None:
        return {"in": rows[index][None]}
    if getattr(experts, "is_concatenated", True):
        return {"gate": rows[index][None], "in": rows[size + index][None]}
    return {"gate": rows[2 * index][None], "in": rows[2 * index + 1][None]}


def batched_experts(model: TransformerBridge, path: str) -> Any:
    """The module that holds the experts of the mixture at ``path``; None if it is not batched."""
    at_path = (mixture for mixture in mixtures(components(model)) if mixture.path == path)
    mixture = next(at_path, None)
    return None if mixture is None else mixture.batched_experts()


def experts_down(experts: Any) -> Float[Tensor, "expert neuron d_model"]:
    """The vectors that all neurons of all experts write."""
    down: Tensor = experts.down_proj.detach()
    return down if _transposed(experts) else down.mT


def _transposed(experts: Any) -> bool:
    name = type(experts).__name__
    return bool(getattr(experts, "is_transposed", name in TRANSPOSED))
