"""Layers with several residual streams in float64, relevance handed out contribution by
contribution: hyper-connections (DeepSeek V4) and AltUp (Gemma 3n), without any gradient.

The rules are CP-LRP's: what a sum, a linear layer or a mix by constant weights hands on is in
proportion to the contributions ([A] Achtibat et al., AttnLRP, ICML 2024, Eq. 8); patterns, router
weights, mixing weights and magnitudes are constants; a gate takes half ([A] Eq. 14-15), activations
and norms pass all, number by number ([A] Eq. 9, Prop. 3.4).

Layers are those of Hugging Face. Streams are [batch, pos, stream, d_model].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.oracles.explicit_llama import divide

Back = Callable[[Tensor], Tensor]
"""From the relevance of an output to that of the input."""


def linear(R: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Epsilon rule of ``y = weight x``."""
    return x * (divide(R, x @ weight.T) @ weight)


def shares(R: Tensor, *summands: Tensor) -> list[Tensor]:
    """What each summand of a sum gets."""
    total = torch.stack(torch.broadcast_tensors(*summands)).sum(0)
    return [part * divide(R, total) for part in summands]


def normed(x: Tensor, norm: Any) -> Tensor:
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * getattr(norm, "weight", 1.0)


def mixed(streams: Tensor, weights: Tensor) -> Tensor:
    """``out_k = sum_j weights_jk stream_j``; weights are [batch, pos, from, to]."""
    return torch.einsum("btjk,btjd->btkd", weights, streams)


def unmixed(R: Tensor, streams: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """What :func:`mixed` hands to each stream, as a part of a sum that came to ``out``."""
    return torch.einsum("btjk,btjd,btkd->btjd", weights, streams, divide(R, out))


# ------------------------------------------------------------------ DeepSeek V4


def hyper_connection(hc: Any, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights that collapse streams, that spread an output, and that mix: pre, post, comb."""
    n = hc.hc_mult
    raw = normed(streams.flatten(2), hc.input_norm) @ hc.fn.T
    sizes = [n, n, n * n]
    (a, b, c), (p, q, r) = raw.split(sizes, -1), hc.base.split(sizes)
    pre = torch.sigmoid(a * hc.scale[0] + p) + hc.hc_eps
    post = 2 * torch.sigmoid(b * hc.scale[1] + q)
    comb = torch.softmax((c * hc.scale[2] + r).unflatten(-1, (n, n)), -1) + hc.hc_eps
    for i in range(hc.hc_sinkhorn_iters):
        if i:
            comb = comb / (comb.sum(-1, keepdim=True) + hc.hc_eps)
        comb = comb / (comb.sum(-2, keepdim=True) + hc.hc_eps)
    return pre, post, comb


def rotations(rotary: Any, kind: str, places: Tensor, size: int) -> Tensor:
    """Interleaved rotary embedding of the last features, one matrix [pos, size, size] a place."""
    angles = places.double()[:, None] * getattr(rotary, f"{kind}_inv_freq").double()
    matrix = torch.eye(size, dtype=torch.float64).repeat(len(places), 1, 1)
    first = size - 2 * angles.shape[1]
    for i in range(angles.shape[1]):
        a, b = first + 2 * i, first + 2 * i + 1
        matrix[:, a, a] = matrix[:, b, b] = angles[:, i].cos()
        matrix[:, b, a] = angles[:, i].sin()
        matrix[:, a, b] = -angles[:, i].sin()
    return matrix


def compressed(c: Any, x: Tensor, *, uniform: bool = False) -> tuple[Tensor, Back]:
    """The entries of compressed attention [batch, entry, d_head], and how they hand relevance back.

    Each is a sum over the positions of a window, of the window before it too where a token has two
    series, weighted by a softmax for each feature: constants, or with half of the relevance
    (``uniform``), which the softmax hands on as ``R_i = x_i (R_i - s_i sum_j R_j)`` ([A] Prop.
    3.1), and of which the position bias in x keeps its share.
    """
    rate, size, (batch, length, _) = c.compress_rate, c.head_dim, x.shape
    series = c.kv_proj.out_features // size
    values, scores = x @ c.kv_proj.weight.T, x @ c.gate_proj.weight.T
    n = length // rate
    weights = torch.zeros(batch, n, length, series, size, dtype=x.dtype)
    for entry in range(n):
        for feature in range(size):
            places = [
                (entry * rate - shift * rate + i, s, i)
                for s, shift in ([(0, 1), (1, 0)] if series == 2 else [(0, 0)])
                for i in range(rate)
                if entry >= shift
            ]
            at = [s * size + feature for _, s, _ in places]
            logits = torch.stack(
                [
                    scores[:, t, f] + c.position_bias[i, f]
                    for (t, _, i), f in zip(places, at, strict=True)
                ],
                -1,
            )
            for (t, s, _), weight in zip(places, logits.softmax(-1).unbind(-1), strict=True):
                weights[:, entry, t, s, feature] = weight
    by_series = values.unflatten(-1, (series, size))
    pooled = torch.einsum("betsf,btsf->bef", weights, by_series)
    turn = rotations(c.rotary_emb, "compress", torch.arange(n) * rate, size)
    entries = torch.einsum("eij,bej->bei", turn, normed(pooled, c.kv_norm))

    def back(R: Tensor) -> Tensor:
        unturned = normed(pooled, c.kv_norm) * torch.einsum(
            "eij,bei->bej", turn, divide(R, entries)
        )
        parts = weights * by_series[:, None] * divide(unturned, pooled)[:, :, None, None]
        if not uniform:
            return linear(parts.sum(1).flatten(2), x, c.kv_proj.weight)
        on_pattern = parts / 2
        slopes = on_pattern - weights * on_pattern.sum((2, 3), keepdim=True)
        on_scores = scores * slopes.sum(1).flatten(2)
        on_values = (parts / 2).sum(1).flatten(2)
        return linear(on_values, x, c.kv_proj.weight) + linear(on_scores, x, c.gate_proj.weight)

    return entries, back


def attention(a: Any, rotary: Any, x: Tensor, hidden: Tensor) -> tuple[Tensor, Back]:
    """Attention whose keys are its values, of tokens and of compressed entries.

    ``hidden`` [batch, query, entry] is added to the scores of entries: which ones are not seen.
    """
    length, size = x.shape[1], a.head_dim
    turn = rotations(rotary, a.rope_layer_type, torch.arange(length), size)
    projected = normed(x @ a.q_a_proj.weight.T, a.q_a_norm) @ a.q_b_proj.weight.T
    q = normed(projected.unflatten(-1, (-1, size)), a.q_b_norm)
    q = torch.einsum("tij,bthj->bhti", turn, q)
    own = normed(x @ a.kv_proj.weight.T, a.kv_norm)
    turned = torch.einsum("tij,btj->bti", turn, own)
    entries, to_entries = compressed(a.compressor, x)
    kv = torch.cat([turned, entries], 1)
    future = torch.full((length, length), -math.inf, dtype=x.dtype).triu(1)
    seen = torch.cat([future.expand(len(x), -1, -1), hidden], -1)
    scores = torch.einsum("bhqi,bki->bhqk", q, kv) * a.scaling + seen[:, None]
    sinks = a.sinks[None, :, None, None].expand(*scores.shape[:-1], 1)
    pattern = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    z = torch.einsum("bhqk,bki->bqhi", pattern, kv)
    unturned = torch.einsum("tji,bthj->bthi", turn, z)
    groups = unturned.reshape(*x.shape[:2], a.o_a_proj.n_groups, -1)
    by_group = a.o_a_proj.weight.unflatten(0, (a.o_a_proj.n_groups, -1))
    low = torch.einsum("btgi,goi->btgo", groups, by_group)
    out = low.flatten(2) @ a.o_b_proj.weight.T

    def back(R: Tensor) -> Tensor:
        on_low = linear(R, low.flatten(2), a.o_b_proj.weight).view_as(low)
        on_groups = groups * torch.einsum("btgo,goi->btgi", divide(on_low, low), by_group)
        on_unturned = on_groups.view_as(unturned)
        on_z = z * torch.einsum("tij,bthj->bthi", turn, divide(on_unturned, unturned))
        on_kv = torch.einsum("bhqk,bki,bqhi->bki", pattern, kv, divide(on_z, z))
        on_turned, on_entries = on_kv[:, :length], on_kv[:, length:]
        on_own = own * torch.einsum("tij,bti->btj", turn, divide(on_turned, turned))
        return linear(on_own, x, a.kv_proj.weight) + to_entries(on_entries)

    return out, back


def gated(gate: Tensor, up: Tensor, down: Tensor, act: Any, x: Tensor) -> tuple[Tensor, Back]:
    """A gated MLP of three weights."""
    g, u = x @ gate.T, x @ up.T
    post = act(g) * u

    def back(R: Tensor) -> Tensor:
        half = linear(R, post, down) / 2
        return linear(half, x, gate) + linear(half, x, up)

    return post @ down.T, back


def mixture(m: Any, x: Tensor, ids: Tensor) -> tuple[Tensor, Back]:
    """Experts weighed by constants, and one that every token is sent to."""
    raw = functional.softplus(x @ m.gate.weight.T).sqrt()
    if m.is_hash:
        chosen = m.gate.tid2eid[ids]
    else:
        chosen = (raw + m.gate.e_score_correction_bias).topk(m.gate.top_k, -1).indices
    weights = raw.gather(-1, chosen)
    weights = weights / weights.sum(-1, keepdim=True) * m.gate.routed_scaling_factor
    parts, backs = [], []
    for i in range(m.experts.num_experts):
        gate, up = m.experts.gate_up_proj[i].chunk(2)
        y, back = gated(gate, up, m.experts.down_proj[i], functional.silu, x)
        parts.append(y * (weights * (chosen == i)).sum(-1, keepdim=True))
        backs.append(back)
    s = m.shared_experts
    y, back = gated(s.gate_proj.weight, s.up_proj.weight, s.down_proj.weight, functional.silu, x)
    parts.append(y)
    backs.append(back)

    def together(R: Tensor) -> Tensor:
        each = shares(R, *parts)
        return torch.stack([back(part) for back, part in zip(backs, each, strict=True)]).sum(0)

    return torch.stack(parts).sum(0), together


def branch(hc: Any, norm: Any, streams: Tensor, inner: Any) -> tuple[Tensor, Back]:
    """Streams collapsed into one, which a norm and ``inner`` read; its output spread on them."""
    pre, post, comb = hyper_connection(hc, streams)
    collapsed = (pre[..., None] * streams).sum(2)
    y, through = inner(normed(collapsed, norm))
    kept, spread = mixed(streams, comb), post[..., None] * y[:, :, None]

    def back(R: Tensor) -> Tensor:
        on_streams = unmixed(R, streams, comb, kept + spread)
        on_y = (spread * divide(R, kept + spread)).sum(2)
        on_collapsed = through(on_y)
        weighed = pre[..., None] * streams
        return on_streams + weighed * divide(on_collapsed, collapsed)[:, :, None]

    return kept + spread, back


def hyper_layer(
    layer: Any, rotary: Any, streams: Tensor, ids: Tensor, hidden: Tensor
) -> tuple[Tensor, Back]:
    """A layer of DeepSeek V4."""
    middle, first = branch(
        layer.attn_hc,
        layer.input_layernorm,
        streams,
        lambda x: attention(layer.self_attn, rotary, x, hidden),
    )
    out, second = branch(
        layer.ffn_hc,
        layer.post_attention_layernorm,
        middle,
        lambda x: mixture(layer.mlp, x, ids),
    )
    return out, lambda R: first(second(R))


def hyper_head(head: Any, streams: Tensor) -> tuple[Tensor, Back]:
    """The streams collapsed for the unembedding."""
    raw = normed(streams.flatten(2), head.input_norm) @ head.hc_fn.T
    weighed = (torch.sigmoid(raw * head.hc_scale + head.hc_base) + head.eps)[..., None] * streams
    out = weighed.sum(2)
    return out, lambda R: weighed * divide(R, out)[:, :, None]


# ------------------------------------------------------------------ Gemma 3n


def modalities(altup: Any, x: Tensor) -> Tensor:
    routed = normed(x, altup.router_norm) / x.shape[-1] @ altup.modality_router.weight.T
    return torch.tanh(routed)


def half_turned(rotary: Any, kind: str, x: Tensor) -> Tensor:
    """Rotary embedding, feature i with i + d/2, of [batch, pos, head, d]."""
    angles = torch.arange(x.shape[1]).double()[:, None] * getattr(rotary, f"{kind}_inv_freq")
    cos, sin = (f(angles)[None, :, None] for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def plain_attention(a: Any, rotary: Any, x: Tensor) -> tuple[Tensor, Back]:
    """Attention with norms on queries, keys and values; its pattern is a constant."""
    kind, size = a.layer_type, a.head_dim
    q, k, v = ((x @ p.weight.T).unflatten(-1, (-1, size)) for p in (a.q_proj, a.k_proj, a.v_proj))
    q, k, v = normed(q, a.q_norm), normed(k, a.k_norm), normed(v, a.v_norm)
    q, k = half_turned(rotary, kind, q), half_turned(rotary, kind, k)
    group = q.shape[2] // k.shape[2]
    keys, values = (t.repeat_interleave(group, 2) for t in (k, v))
    future = torch.full((x.shape[1],) * 2, -math.inf, dtype=x.dtype).triu(1)
    pattern = (torch.einsum("bqhi,bkhi->bhqk", q, keys) + future).softmax(-1)
    z = torch.einsum("bhqk,bkhi->bqhi", pattern, values)

    def back(R: Tensor) -> Tensor:
        on_z = linear(R, z.flatten(2), a.o_proj.weight).view_as(z)
        on_values = torch.einsum("bhqk,bkhi,bqhi->bkhi", pattern, values, divide(on_z, z))
        on_v = on_values.unflatten(2, (-1, group)).sum(3)
        return linear(on_v.flatten(2), x, a.v_proj.weight)

    return z.flatten(2) @ a.o_proj.weight.T, back


def sparse_mlp(m: Any, x: Tensor) -> tuple[Tensor, Back]:
    """A gated MLP whose gate is cut off below its mean plus a number of standard deviations."""
    gate, up = x @ m.gate_proj.weight.T, x @ m.up_proj.weight.T
    n, below = gate.shape[-1], gate
    centred = gate - gate.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt()
    times = 0.0
    if m.activation_sparsity > 0:
        times = float(torch.distributions.Normal(0, 1).icdf(torch.tensor(m.activation_sparsity)))
        below = centred - times * deviation
    left = below.clamp(min=0) if m.activation_sparsity > 0 else gate
    post = functional.gelu(left, approximate="tanh") * up

    def back(R: Tensor) -> Tensor:
        half = linear(R, post, m.down_proj.weight) / 2
        on_gate = half
        if m.activation_sparsity > 0:
            ratio = divide(half, below)
            # gate less its mean less the deviation, which is sum(centred^2) / (n deviation)
            total = ratio.sum(-1, keepdim=True)
            on_gate = gate * (ratio - total / n - times * total * centred / (n * deviation))
        return linear(on_gate, x, m.gate_proj.weight) + linear(half, x, m.up_proj.weight)

    return post @ m.down_proj.weight.T, back


def altup_layer(
    layer: Any, rotary: Any, streams: Tensor, embedded: Tensor
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """A layer of Gemma 3n whose active stream is the first.

    ``embedded`` is what the layer has of the tokens, [batch, pos, feature]; relevance goes to the
    streams and to it.
    """
    n, altup, root = streams.shape[2], layer.altup, math.sqrt(2)
    own = modalities(altup, streams[:, :, 0]) @ altup.prediction_coefs.weight.T
    weights = own.unflatten(-1, (n, n)).mT + torch.eye(n, dtype=streams.dtype)
    predicted = mixed(streams, weights)
    active = predicted[:, :, 0]
    x = normed(active, layer.input_layernorm)
    low = x @ layer.laurel.linear_left.weight.T
    wide = low @ layer.laurel.linear_right.weight.T
    learnt = normed(wide, layer.laurel.post_laurel_norm)
    attended, to_attention = plain_attention(layer.self_attn, rotary, x)
    added = normed(attended, layer.post_attention_layernorm)
    middle = (active + added + x + learnt) / root
    computed, to_mlp = sparse_mlp(layer.mlp, normed(middle, layer.pre_feedforward_layernorm))
    written = normed(computed, layer.post_feedforward_layernorm)
    found = middle + written
    change = modalities(altup, found) @ altup.correction_coefs.weight.T + 1
    corrected = predicted + change[..., None] * (found - active)[:, :, None]
    scaled = corrected[:, :, 0] * altup.correct_output_scale
    gate = scaled @ layer.per_layer_input_gate.weight.T
    product = functional.gelu(gate, approximate="tanh") * embedded
    projected = product @ layer.per_layer_projection.weight.T
    extra = normed(projected, layer.post_per_layer_input_norm)
    others = torch.ones(n, 1, dtype=streams.dtype)
    others[0] = 0
    out = corrected + others * extra[:, :, None]

    def back(R: Tensor) -> tuple[Tensor, Tensor]:
        on_corrected, on_extra = shares(R, corrected, others * extra[:, :, None])
        half = linear(on_extra.sum(2), product, layer.per_layer_projection.weight) / 2
        on_corrected[:, :, 0] += linear(half, scaled, layer.per_layer_input_gate.weight)
        on_predicted, on_found, on_active = shares(
            on_corrected,
            predicted,
            change[..., None] * found[:, :, None],
            -change[..., None] * active[:, :, None],
        )
        on_middle, on_written = shares(on_found.sum(2), middle, written)
        on_middle = on_middle + to_mlp(on_written)
        direct, on_added, on_x, on_learnt = shares(on_middle, active, added, x, learnt)
        on_low = linear(on_learnt, low, layer.laurel.linear_right.weight)
        on_x = on_x + linear(on_low, x, layer.laurel.linear_left.weight) + to_attention(on_added)
        on_predicted[:, :, 0] += on_active.sum(2) + direct + on_x
        return unmixed(on_predicted, streams, weights, predicted), half

    return out, back


def joined(model: Any, streams: Tensor) -> tuple[Tensor, Back]:
    """Gemma 3n's streams made one: the mean of the first and the others, projected to its size."""

    def size(x: Tensor) -> Tensor:
        return x.square().mean(-1, keepdim=True).sqrt()

    parts = [streams[:, :, 0]]
    for i, layer in enumerate(model.altup_unembed_projections, 1):
        y = streams[:, :, i] @ layer.weight.T
        parts.append(y * size(parts[0]) / size(y))

    def back(R: Tensor) -> Tensor:
        first, *each = shares(R, *parts)
        on = [
            linear(part, streams[:, :, i], layer.weight)
            for i, (part, layer) in enumerate(
                zip(each, model.altup_unembed_projections, strict=True), 1
            )
        ]
        return torch.stack([first, *on], 2)

    return torch.stack(parts).mean(0), back


def opened(model: Any, x: Tensor) -> tuple[Tensor, Back]:
    """Gemma 3n's streams from one embedding."""
    parts = [x]
    for layer in model.altup_projections:
        y = x @ layer.weight.T
        sizes = [t.square().mean(-1, keepdim=True).sqrt() for t in (x, y)]
        parts.append(y * sizes[0] / sizes[1])

    def back(R: Tensor) -> Tensor:
        first, *others = R.unbind(2)
        each = zip(others, model.altup_projections, strict=True)
        return first + torch.stack([linear(part, x, layer.weight) for part, layer in each]).sum(0)

    return torch.stack(parts, 2), back
