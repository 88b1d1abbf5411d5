"""What a unit writes to the vocabulary: its output direction read through the unembedding.

The projection of Geva et al. 2022 ("Transformer feed-forward layers build predictions by
promoting concepts in the vocabulary space") and Voita et al. 2023: a neuron adds a multiple of its
row of W_out to the residual stream, and the unembedding turns the residual stream into logits. In
between stands the final norm. Its gain scales the direction's components and belongs to the
reading; its denominator is one positive number for the whole vocabulary and cannot change the
order; biases are not part of what the neuron writes.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from lenslrp.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

_CHUNK = 16_384  # vocabulary rows a product: at d_model = 4096 in float32, 256 MiB at once


def _write_direction(model: TransformerBridge, layer: int, neuron: int) -> Tensor:
    """Row ``neuron`` of W_out in block ``layer``: [d_model]."""
    layers = len(model.blocks)
    if not 0 <= layer < layers:
        raise InputError(f"layer is {layer}, but the model has layers 0 to {layers - 1}")
    weight = None
    with contextlib.suppress(AttributeError):  # attention-only blocks, experts without one matrix
        weight = model.blocks[layer].mlp.W_out
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        raise InputError(
            f"block {layer} has no single W_out matrix (an expert layer, or no MLP), "
            "so none of its neurons has one write direction"
        )
    if not 0 <= neuron < weight.shape[0]:
        raise InputError(
            f"neuron is {neuron}, but layer {layer} has neurons 0 to {weight.shape[0] - 1}"
        )
    return weight[neuron]


def _through_final_gain(model: TransformerBridge, direction: Tensor) -> Tensor:
    """``direction`` times the final norm's gain, in the norm's own convention."""
    norm = getattr(model, "ln_final", None)
    gain = getattr(norm, "weight", None)  # absent once the gain is folded into W_U
    if not isinstance(gain, torch.Tensor):
        return direction
    gain = gain.detach().to(direction)
    offset = getattr(norm, "uses_weight_offset", False)  # Gemma stores the gain minus 1
    return direction * (1 + gain if offset else gain)


def _unembedding(model: TransformerBridge) -> Tensor:
    """W_U transposed: [d_vocab, d_model]."""
    unembed = getattr(model, "unembed", None)
    if unembed is None:
        raise InputError(
            "the model has no unembedding, so nothing that it writes can be read as tokens"
        )
    W_U: Tensor = unembed.W_U
    return W_U.detach().T


@torch.no_grad()
def neuron_writes(model: TransformerBridge, layer: int, neuron: int, k: int = 5) -> list[str]:
    """The ``k`` tokens whose logits an active MLP neuron raises most, best first.

    Args:
        model: the bridge.
        layer: block index, from 0.
        neuron: index into ``blocks.{layer}.mlp.hook_post``.
        k: how many tokens.

    Returns:
        ``k`` tokens as text, or ``"[17]"`` for an id where the model has no tokenizer.

    Raises:
        InputError: when layer, neuron or k is out of range, the block has no single W_out, or the
            model has no unembedding.
    """
    W_U = _unembedding(model)
    if not 1 <= k <= W_U.shape[0]:
        raise InputError(f"k is {k}, expected 1 to {W_U.shape[0]} (the vocabulary)")
    direction = _write_direction(model, layer, neuron).detach().float()
    direction = _through_final_gain(model, direction).to(W_U.device)
    scores = torch.cat([rows.float() @ direction for rows in torch.split(W_U, _CHUNK)])
    best = scores.topk(k).indices.tolist()
    if model.tokenizer is None:
        return [f"[{token}]" for token in best]
    return [str(model.tokenizer.decode([token])) for token in best]
