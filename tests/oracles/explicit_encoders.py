"""Encoders and their heads written out a second time, in plain float64, each rule on its own.

Weights are looked up by name; nothing here is called by, or calls, the engine. A rule is a form
with the values of the operation, in which some of them are constants, so that activation times
gradient is relevance (Arras et al. 2025, arXiv:2502.15886):

- normalisation: the denominator is a constant (Achtibat et al. 2024, arXiv:2402.05602, Eq. 19);
- element by element: the quotient f(x) / x is a constant (Eq. 9);
- a product of two factors: half of it with either of them constant (Prop. 3.2 and 3.3);
- softmax: as it is (Prop. 3.1), or a constant (CP-LRP; Ali et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass
class Explicit:
    """One model's weights, and one pass.

    Attributes:
        w: the weights by name, float64.
        config: the model's configuration.
        constant_pattern: CP-LRP instead of AttnLRP.
        softmax_dtype: in which a softmax is computed.
        kept: activations by name, whose relevance :meth:`relevance` gives.
    """

    w: dict[str, Tensor]
    config: Any
    constant_pattern: bool = False
    softmax_dtype: torch.dtype = torch.float64
    kept: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, **options: Any) -> Explicit:
        """Of a model that no bridge has taken over."""
        weights = {k: v.detach().clone().double() for k, v in model.state_dict().items()}
        return cls(weights, model.config, **options)

    def leaf(self, name: str, x: Tensor) -> Tensor:
        """A leaf: embeddings of tokens or positions."""
        self.kept[name] = x.detach().clone().requires_grad_()
        return self.kept[name]

    def keep(self, name: str, x: Tensor) -> Tensor:
        """An activation whose relevance is asked for."""
        if x.requires_grad:
            x.retain_grad()
            self.kept[name] = x
        return x

    def relevance(self, target: Tensor) -> dict[str, Tensor]:
        """Activation times gradient of everything kept, for a scalar."""
        target.backward()
        return {
            name: x.detach() * x.grad
            for name, x in self.kept.items()
            if x.grad is not None  # constants under CP-LRP have none
        }

    # -------------------------------------------------------------- rules

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Epsilon with epsilon -> 0: the plain gradient; a bias keeps its share."""
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def layer_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        """The denominator is a constant."""
        centred = x - x.mean(dim=-1, keepdim=True)
        scale = (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt().detach()
        y = centred / scale * self.w[f"{name}.weight"]
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def attend(self, scores: Tensor, values: Tensor, visible: Tensor, name: str) -> Tensor:
        """Softmax and A@V: [batch, head, query, d] merged to [batch, query, head * d]."""
        scores = self.keep(f"{name}.hook_attn_scores", scores)
        masked = scores.masked_fill(~visible, -torch.inf)
        pattern = masked.softmax(dim=-1, dtype=self.softmax_dtype).double()
        pattern = self.keep(f"{name}.hook_pattern", pattern)
        if self.constant_pattern:
            z = pattern.detach() @ values
        else:
            z = product(torch.matmul, pattern, values)
        return z.transpose(1, 2).flatten(2)

    def attention(
        self, x: Tensor, read: Tensor, names: tuple[str, ...], visible: Tensor, name: str
    ) -> Tensor:
        """Scaled dot-product attention from ``x`` to what is ``read``; names of q, k, v, o."""
        q, k, v = (
            self.heads(self.linear(side, path))
            for side, path in zip((x, read, read), names, strict=False)
        )
        scores = product(torch.matmul, q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        return self.linear(self.attend(scores, v, visible, name), names[3])

    def heads(self, x: Tensor) -> Tensor:
        """[batch, pos, head * d] -> [batch, head, pos, d]."""
        return x.unflatten(-1, (self.config.num_attention_heads, -1)).transpose(1, 2)


def product(multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Half to each of two factors."""
    return (multiply(a, b.detach()) + multiply(a.detach(), b)) / 2


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The quotient is a constant."""
    return x * (function(x) / x).detach()


# ------------------------------------------------------------------ BERT, RoBERTa, DeBERTa


def bert_embeddings(e: Explicit, tokens: Tensor, base: str, first_position: int) -> Tensor:
    """Of tokens; of absolute positions and types, if any, which are one leaf; then a norm."""
    path, places = f"{base}.embeddings", torch.arange(tokens.shape[1]) + first_position
    x = e.leaf("tokens", e.w[f"{path}.word_embeddings.weight"][tokens])
    added = torch.zeros_like(x)
    if f"{path}.position_embeddings.weight" in e.w:
        added = added + e.w[f"{path}.position_embeddings.weight"][places]
    if f"{path}.token_type_embeddings.weight" in e.w:
        added = added + e.w[f"{path}.token_type_embeddings.weight"][0]
    if added.any():
        x = x + e.leaf("positions", added)
    if f"{path}.embed_proj.weight" in e.w:
        x = e.linear(x, f"{path}.embed_proj")
    return e.layer_norm(x, f"{path}.LayerNorm", e.config.layer_norm_eps)


def bert_block(e: Explicit, x: Tensor, base: str, attended: Tensor) -> Tensor:
    """What follows attention in a block with its norms behind its branches."""
    eps = e.config.layer_norm_eps
    x = e.layer_norm(x + attended, f"{base}.attention.output.LayerNorm", eps)
    hidden = elementwise(functional.gelu, e.linear(x, f"{base}.intermediate.dense"))
    return e.layer_norm(
        x + e.linear(hidden, f"{base}.output.dense"), f"{base}.output.LayerNorm", eps
    )


def bert(e: Explicit, tokens: Tensor, base: str, first_position: int = 0) -> Tensor:
    """Hidden states [batch, pos, d] of BERT, or of RoBERTa, of rows without padding."""
    x = bert_embeddings(e, tokens, base, first_position)
    visible = torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool)
    for i in range(e.config.num_hidden_layers):
        path = f"{base}.encoder.layer.{i}"
        names = (*(f"{path}.attention.self.{n}" for n in ("query", "key", "value")),)
        names = (*names, f"{path}.attention.output.dense")
        attended = e.attention(x, x, names, visible, f"blocks.{i}.attn")
        x = bert_block(e, x, path, attended)
    return x


def bucket(distance: int, buckets: int, longest: int) -> int:
    """The bucket of a distance (He et al. 2021, arXiv:2111.09543): a logarithm beyond half."""
    middle = buckets // 2
    if buckets <= 0 or abs(distance) <= middle:
        return distance
    far = math.log(abs(distance) / middle) / math.log((longest - 1) / middle) * (middle - 1)
    return (math.ceil(far) + middle) * (1 if distance > 0 else -1)


def disentangled_scores(
    e: Explicit, q: Tensor, k: Tensor, position_k: Tensor | None, position_q: Tensor | None
) -> Tensor:
    """Content to content, content to position, position to content; entry by entry.

    Args:
        q, k: [batch, head, pos, d].
        position_k, position_q: [1, head, distance, d], ``None`` where there is no such term.
    """
    terms = 1 + (position_k is not None) + (position_q is not None)
    longest, buckets = _longest(e), getattr(e.config, "position_buckets", -1)
    scale = float(torch.tensor(float(terms * q.shape[-1])).sqrt())  # in float32

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return product(torch.mul, a, b.expand_as(a)).sum(dim=-1)

    rows = []
    for i in range(q.shape[2]):
        row = []
        for j in range(q.shape[2]):
            score = dot(q[:, :, i], k[:, :, j])
            for content, positions in ((q[:, :, i], position_k), (k[:, :, j], position_q)):
                if positions is not None:
                    span = positions.shape[2] // 2
                    place = min(max(bucket(i - j, buckets, longest) + span, 0), 2 * span - 1)
                    score = score + dot(content, positions[:, :, place])
            row.append(score / scale)
        rows.append(torch.stack(row, dim=-1))
    return torch.stack(rows, dim=-2)


def _longest(e: Explicit) -> int:
    longest = int(getattr(e.config, "max_relative_positions", -1))
    return longest if longest > 0 else int(e.config.max_position_embeddings)


def deberta(e: Explicit, tokens: Tensor) -> Tensor:
    """Hidden states of DeBERTa (He et al. 2021, arXiv:2006.03654), v1 to v3, without padding."""
    x = first = bert_embeddings(e, tokens, "deberta", 0)
    visible = torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool)
    for i in range(e.config.num_hidden_layers):
        path, name = f"deberta.encoder.layer.{i}", f"blocks.{i}.attn"
        q, k, v = _queries_keys_values(e, x, f"{path}.attention.self", name)
        at_k = _positions(e, f"{path}.attention.self", "c2p", i, len(x[0]))
        at_q = _positions(e, f"{path}.attention.self", "p2c", i, len(x[0]))
        z = e.attend(disentangled_scores(e, q, k, at_k, at_q), v, visible, name)
        x = bert_block(e, x, path, e.linear(z, f"{path}.attention.output.dense"))
        if i == 0 and getattr(e.config, "conv_kernel_size", 0) > 0:
            x = _convolved(e, first, x)
    return x


def _queries_keys_values(e: Explicit, x: Tensor, path: str, name: str) -> list[Tensor]:
    """[batch, head, pos, d] each; v1 has them in one projection, head by head."""
    if f"{path}.in_proj.weight" in e.w:
        joint = e.keep(f"{name}.qkv.hook_out", e.linear(x, f"{path}.in_proj"))
        q, k, v = e.heads(joint).chunk(3, dim=-1)
        biases = [e.heads(e.w[f"{path}.{part}_bias"][None, None]) for part in ("q", "v")]
        return [q + biases[0], k, v + biases[1]]
    parts = ("query_proj", "key_proj", "value_proj")
    return [
        e.heads(e.keep(f"{name}.{part[0]}.hook_out", e.linear(x, f"{path}.{part}")))
        for part in parts
    ]


def _positions(e: Explicit, path: str, term: str, layer: int, length: int) -> Tensor | None:
    """Keys (for ``c2p``) or queries of relative positions: a leaf, [1, head, distance, d]."""
    config, first = e.config, f"{path}.in_proj.weight" in e.w
    if not config.relative_attention or term not in config.pos_att_type:
        return None
    table = e.w["deberta.encoder.rel_embeddings.weight"]
    if getattr(config, "norm_rel_ebd", "none") == "layer_norm":
        table = e.layer_norm(table, "deberta.encoder.LayerNorm", config.layer_norm_eps)
    kind = "key" if term == "c2p" else "query"
    own = "" if getattr(config, "share_att_key", False) else "pos_"
    projection = f"{own}{kind}_proj"
    if first:  # only as far as the text goes
        span = min(length, _longest(e))
        table = table[_longest(e) - span : _longest(e) + span]
        projection = "pos_proj" if term == "c2p" else "pos_q_proj"
    return e.heads(e.leaf(f"{term}.{layer}", e.linear(table, f"{path}.{projection}"))[None])


def _convolved(e: Explicit, embedded: Tensor, x: Tensor) -> Tensor:
    """Of DeBERTa v2: a convolution over the embeddings, beside the first block."""
    path, kernel = "deberta.encoder.conv", e.config.conv_kernel_size
    weight, bias = e.w[f"{path}.conv.weight"], e.w[f"{path}.conv.bias"]
    edge = (kernel - 1) // 2
    padded = functional.pad(embedded, (0, 0, edge, edge))
    out = torch.zeros_like(x)
    for step in range(kernel):
        out = out + padded[:, step : step + x.shape[1]] @ weight[:, :, step].T
    act = {"tanh": torch.tanh, "gelu": functional.gelu}[e.config.conv_act]
    out = elementwise(act, out + bias)
    return e.layer_norm(x + out, f"{path}.LayerNorm", e.config.layer_norm_eps)


# ------------------------------------------------------------------ ModernBERT, BART


def modern_bert(e: Explicit, tokens: Tensor) -> Tensor:
    """Hidden states of ModernBERT (Warner et al. 2024, arXiv:2412.13663), without padding."""
    config, eps = e.config, e.config.norm_eps
    x = e.leaf("tokens", e.w["model.embeddings.tok_embeddings.weight"][tokens])
    x = e.layer_norm(x, "model.embeddings.norm", eps)
    places = torch.arange(tokens.shape[1])
    for i, kind in enumerate(config.layer_types):
        path = f"model.layers.{i}"
        distance = (places[:, None] - places).abs()
        window = config.sliding_window if kind == "sliding_attention" else len(places)
        normed = x if i == 0 else e.layer_norm(x, f"{path}.attn_norm", eps)
        joint = e.linear(normed, f"{path}.attn.Wqkv").unflatten(-1, (3, -1))
        q, k, v = (e.heads(joint[..., part, :]) for part in range(3))
        theta = config.rope_parameters[kind]["rope_theta"]
        q, k = (rotated(part, theta) for part in (q, k))
        scores = product(torch.matmul, q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        z = e.attend(scores, v, (distance <= window)[None, None], f"blocks.{i}.attn")
        x = x + e.linear(z, f"{path}.attn.Wo")
        wide = e.linear(e.layer_norm(x, f"{path}.mlp_norm", eps), f"{path}.mlp.Wi")
        gate, up = wide.chunk(2, dim=-1)
        x = x + e.linear(
            product(torch.mul, elementwise(functional.gelu, gate), up), f"{path}.mlp.Wo"
        )
    return e.layer_norm(x, "model.final_norm", eps)


def rotated(x: Tensor, theta: float) -> Tensor:
    """The rotary embedding of [batch, head, pos, d], its angles in float32."""
    d = x.shape[-1]
    angles = torch.arange(x.shape[2]).float()[:, None] / theta ** (
        torch.arange(0, d, 2).float() / d
    )
    cos, sin = angles.cos().double(), angles.sin().double()
    a, b = x.float().double().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def bart(e: Explicit, tokens: Tensor, written: Tensor) -> Tensor:
    """Hidden states of BART's decoder (Lewis et al. 2019, arXiv:1910.13461), without padding."""
    x = _bart_stack(e, tokens, "encoder", None)
    return _bart_stack(e, written, "decoder", x)


def _bart_stack(e: Explicit, tokens: Tensor, side: str, read: Tensor | None) -> Tensor:
    base, n = f"model.{side}", tokens.shape[1]
    prefix = "decoder_" if side == "decoder" else ""
    x = e.leaf(f"{prefix}tokens", e.w["model.shared.weight"][tokens])
    positions = e.w[f"{base}.embed_positions.weight"][torch.arange(n) + 2].expand_as(x)
    x = e.layer_norm(
        x + e.leaf(f"{prefix}positions", positions), f"{base}.layernorm_embedding", 1e-5
    )
    own = torch.ones(n, n, dtype=torch.bool)
    own = own.tril() if side == "decoder" else own
    for i in range(e.config.num_hidden_layers):
        path = f"{base}.layers.{i}"

        def names(attention: str, path: str = path) -> tuple[str, ...]:
            return tuple(f"{path}.{attention}.{n}_proj" for n in ("q", "k", "v", "out"))

        attended = e.attention(x, x, names("self_attn"), own[None, None], path)
        x = e.layer_norm(x + attended, f"{path}.self_attn_layer_norm", 1e-5)
        if read is not None:
            all_of_it = torch.ones(1, 1, n, read.shape[1], dtype=torch.bool)
            attended = e.attention(x, read, names("encoder_attn"), all_of_it, f"{path}.cross")
            x = e.layer_norm(x + attended, f"{path}.encoder_attn_layer_norm", 1e-5)
        hidden = elementwise(functional.gelu, e.linear(x, f"{path}.fc1"))
        x = e.layer_norm(x + e.linear(hidden, f"{path}.fc2"), f"{path}.final_layer_norm", 1e-5)
    return x
