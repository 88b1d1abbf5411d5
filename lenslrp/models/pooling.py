"""Attention pooling: a learned query reads all patches (SigLIP's head, as torch has it).

``nn.MultiheadAttention`` keeps queries, keys and values in one weight and computes in one function,
where nothing can be read. The same attention is computed here by three linear layers, whose weights
are parts of that one, and by plain products. What is saved is the one weight.
"""

from __future__ import annotations

import math
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def open_pooling(attention: nn.MultiheadAttention) -> None:
    """Give an attention of torch the layers ``q_proj``, ``k_proj`` and ``v_proj``, and use them.

    Raises:
        ValueError: it is not the plain form that vision towers have.
    """
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    if weight is None or not attention.batch_first or attention.bias_k is not None:
        raise ValueError("this attention pooling has keys of another size, or more than its inputs")
    biases = (None,) * 3 if bias is None else bias.detach().chunk(3)
    for key, w, b in zip("qkv", weight.detach().chunk(3), biases, strict=True):
        layer = nn.Linear(w.shape[1], w.shape[0], bias=b is not None, device="meta")
        layer.weight = nn.Parameter(w, requires_grad=weight.requires_grad)
        if b is not None:
            layer.bias = nn.Parameter(b, requires_grad=weight.requires_grad)
        setattr(attention, f"{key}_proj", layer)
    vars(attention)["forward"] = MethodType(_attend, attention)


def _attend(self: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    def heads(x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(-1, (self.num_heads, -1))
        return split.transpose(1, 2)

    q, k, v = heads(self.q_proj(query)), heads(self.k_proj(key)), heads(self.v_proj(value))
    scores = torch.matmul(q * math.sqrt(1.0 / q.shape[-1]), k.transpose(-2, -1))
    pattern = torch.softmax(scores, dim=-1)
    z = torch.matmul(pattern, v).transpose(1, 2).flatten(2)
    out: Tensor = self.out_proj(z)
    return out, pattern
