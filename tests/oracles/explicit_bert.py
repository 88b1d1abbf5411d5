"""Layer-wise relevance propagation through a BertModel, written out without autograd.

Relevance itself is carried from the hidden states down, by the rules of
``tests/oracles/explicit_llama.py``. A LayerNorm is a linear centring, a division by a constant
(Prop. 3.4 of AttnLRP), and weights and a bias; GELU passes relevance unchanged (Eq. 9).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.oracles.explicit_llama import (
    addition_rule,
    affine,
    divide,
    epsilon_rule,
    merge_heads,
    pattern_value_rule,
    query_key_rule,
    softmax_rule,
    split_heads,
)

Backward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BertWeights:
    """A copy of the weights of a ``BertModel``, with the sizes that shape them."""

    tensors: dict[str, Tensor]
    n_layers: int
    n_heads: int
    eps: float

    @classmethod
    def copy_from(cls, model: Any) -> BertWeights:
        """Copy from a Hugging Face model; call it before a bridge takes the model over."""
        config = model.config
        tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        return cls(tensors, layers, heads, config.layer_norm_eps)

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        return self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]


def linear(weights: BertWeights, name: str, x: Tensor) -> tuple[Tensor, Backward]:
    """A linear layer's output, and its rule."""
    weight, bias = weights.of(name)
    return affine(x, weight, bias), lambda r: epsilon_rule(r, x, weight, bias)[0]


def layer_norm(weights: BertWeights, name: str, x: Tensor) -> tuple[Tensor, Backward]:
    """A LayerNorm's output, and its rule."""
    weight, bias = weights.of(name)
    size = x.shape[-1]
    centring = torch.eye(size, dtype=x.dtype) - 1 / size
    centred = x @ centring
    scale = (centred.pow(2).mean(dim=-1, keepdim=True) + weights.eps).sqrt()
    scaled = weight * centred / scale
    y = scaled + bias

    def back(r: Tensor) -> Tensor:
        kept = scaled * divide(r, y)
        return epsilon_rule(kept, x, centring, None)[0]

    return y, back


def attention(weights: BertWeights, root: str, x: Tensor, cp: bool) -> tuple[Tensor, Backward]:
    """Attention of one layer without padding, and its rules."""
    parts = {}
    for name in ("query", "key", "value"):
        out, back = linear(weights, f"{root}.self.{name}", x)
        parts[name] = (split_heads(out, weights.n_heads), back)
    q, k, v = (parts[name][0] for name in ("query", "key", "value"))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    pattern = scores.softmax(dim=-1)
    out, back_out = linear(weights, f"{root}.output.dense", merge_heads(pattern @ v))
    visible = torch.ones_like(scores, dtype=torch.bool)

    def back(r: Tensor) -> Tensor:
        z = split_heads(back_out(r), weights.n_heads)
        of_pattern, of_v = pattern_value_rule(z, pattern, v, cp)
        of_scores = softmax_rule(of_pattern, scores, pattern, visible)
        of_q, of_k = query_key_rule(of_scores, q, k, visible)
        arrived = {"query": of_q, "key": of_k, "value": of_v}
        return sum((parts[name][1](merge_heads(r)) for name, r in arrived.items()), torch.zeros(()))

    return out, back


def run(weights: BertWeights, token_ids: Tensor, *, cp: bool) -> tuple[Tensor, Backward]:
    """Hidden states [batch, pos, d] of rows without padding, and their rule.

    The rule gives relevance [3, batch, pos]: of words, of positions, of token types.
    """
    tables = [weights.tensors[f"embeddings.{name}_embeddings.weight"]
              for name in ("word", "position", "token_type")]  # fmt: skip
    length = token_ids.shape[1]
    indices = (token_ids, torch.arange(length), torch.zeros(length, dtype=torch.long))
    leaves = [table[index].expand(*token_ids.shape, -1)
              for table, index in zip(tables, indices, strict=True)]  # fmt: skip
    embedded = leaves[0] + leaves[1] + leaves[2]
    x, back = layer_norm(weights, "embeddings.LayerNorm", embedded)
    backs = [back]
    for layer in range(weights.n_layers):
        root = f"encoder.layer.{layer}"

        def attend(x: Tensor, root: str = root) -> tuple[Tensor, Backward]:
            return attention(weights, f"{root}.attention", x, cp)

        def expand(x: Tensor, root: str = root) -> tuple[Tensor, Backward]:
            inner, back_in = linear(weights, f"{root}.intermediate.dense", x)
            out, back_out = linear(weights, f"{root}.output.dense", torch.nn.functional.gelu(inner))
            return out, lambda r: back_in(back_out(r))

        for branch, norm in ((attend, "attention.output"), (expand, "output")):
            x, back = _residual(weights, branch, f"{root}.{norm}.LayerNorm", x)
            backs.append(back)

    def down(r: Tensor) -> Tensor:
        for back in reversed(backs):
            r = back(r)
        return torch.stack([(leaf * divide(r, embedded)).sum(dim=-1) for leaf in leaves])

    return x, down


def _residual(
    weights: BertWeights, branch: Callable[[Tensor], tuple[Tensor, Backward]], norm: str, x: Tensor
) -> tuple[Tensor, Backward]:
    """The norm of x + branch(x), and its rules."""
    out, back_branch = branch(x)
    y, back_norm = layer_norm(weights, norm, x + out)

    def back(r: Tensor) -> Tensor:
        stream, through = addition_rule(back_norm(r), x, out)
        return stream + back_branch(through)

    return y, back
