"""Recurrent mixers computed step by step in float64, relevance handed out contribution by
contribution, backwards over time: no gradient, no chunk, no region.

The rules are those of the constant operator: every number of the state gets relevance from what it
was read for, and hands it to its own past and to what was written to it, each in proportion to its
contribution ([A] Achtibat et al., AttnLRP, ICML 2024, Eq. 8). Gates take half ([A] Eq. 14-15),
activations and norms pass all, number by number ([A] Eq. 9, Prop. 3.4); a sigmoid gate is constant.

Each function takes a mixer of Hugging Face, its input [batch, pos, d_model] and a function from its
output to the relevance there; it returns output and relevance of the input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Explained = tuple[Tensor, Tensor]
Start = Callable[[Tensor], Tensor]


def linear(R: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Epsilon rule of ``y = weight x + bias``, the bias keeping its share."""
    return x * ((R / y) @ weight)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A causal depthwise convolution; ``x`` is [batch, pos, channel], ``weight`` [channel, tap]."""
    y = torch.zeros_like(x) if bias is None else bias.expand(x.shape).clone()
    for t in range(x.shape[1]):
        for tap in range(weight.shape[1]):
            s = t - weight.shape[1] + 1 + tap
            if s >= 0:
                y[:, t] += weight[:, tap] * x[:, s]
    return y


def convolution(R: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """What :func:`convolved` hands to each position that it looks at."""
    below = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for tap in range(weight.shape[1]):
            s = t - weight.shape[1] + 1 + tap
            if s >= 0:
                below[:, s] += weight[:, tap] * x[:, s] * R[:, t] / y[:, t]
    return below


def normalised(x: Tensor, gain: Any, eps: float, groups: int = 1) -> Tensor:
    parts = x.unflatten(-1, (groups, -1))
    return (parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * gain


def weight_of(module: Any) -> Any:
    """A layer's weight; 1 for norms that keep one and do not use it."""
    return 1.0 if "Weightless" in type(module).__name__ else module.weight.detach()


def bias_of(module: Any) -> Any:
    return None if module.bias is None else module.bias.detach()


def selective(
    x: Tensor, decay: Tensor, written: Tensor, read: Tensor, skip: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``h_t = decay_t h_(t-1) + written_t x_t``, ``y_t = sum(read_t h_t) + skip x_t``.

    Args:
        x: [batch, pos, channel].
        decay, written, read: [batch, pos, channel, state].
        skip: [channel].
    """
    states = [torch.zeros_like(decay[:, 0])]
    for t in range(x.shape[1]):
        states.append(decay[:, t] * states[-1] + written[:, t] * x[:, t, :, None])
    h = torch.stack(states, dim=1)
    y = (read * h[:, 1:]).sum(-1) + skip * x

    def explain(R: Tensor) -> Tensor:
        below, on_state = torch.zeros_like(x), torch.zeros_like(h[:, 0])
        for t in reversed(range(x.shape[1])):
            ratio = R[:, t] / y[:, t]
            below[:, t] += skip * x[:, t] * ratio
            on_state = on_state + read[:, t] * h[:, t + 1] * ratio[..., None]
            share = on_state / h[:, t + 1]
            below[:, t] += (written[:, t] * x[:, t, :, None] * share).sum(-1)
            on_state = decay[:, t] * h[:, t] * share
        return below

    return y, explain


def mamba(mixer: Any, u: Tensor, start: Start) -> Explained:
    """Mamba; FalconMamba and Jamba, which normalise steps, keys and queries."""
    projected = functional.linear(u, weight_of(mixer.in_proj), bias_of(mixer.in_proj))
    x, z = projected.chunk(2, dim=-1)
    taps = weight_of(mixer.conv1d)[:, 0]
    c = convolved(x, taps, bias_of(mixer.conv1d))
    values = functional.silu(c)
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    step, written, read = (values @ weight_of(mixer.x_proj).T).split(sizes, dim=-1)
    if hasattr(mixer, "b_layernorm"):
        norms = (mixer.dt_layernorm, mixer.b_layernorm, mixer.c_layernorm)
        epsilons = [getattr(n, "variance_epsilon", getattr(n, "eps", None)) for n in norms]
        parts = zip((step, written, read), norms, epsilons, strict=True)
        step, written, read = (normalised(part, weight_of(n), eps) for part, n, eps in parts)
    step = functional.softplus(step @ weight_of(mixer.dt_proj).T + bias_of(mixer.dt_proj))
    decay = torch.exp(step[..., None] * -mixer.A_log.detach().exp())
    scanned, explain = selective(
        values,
        decay,
        step[..., None] * written[:, :, None],
        read[:, :, None].expand_as(decay),
        mixer.D.detach(),
    )
    gated = scanned * functional.silu(z)
    y = functional.linear(gated, weight_of(mixer.out_proj), bias_of(mixer.out_proj))
    R = linear(start(y), gated, y, weight_of(mixer.out_proj)) / 2
    on_x = convolution(explain(R), x, c, taps)
    return y, linear(torch.cat([on_x, R], -1), u, projected, weight_of(mixer.in_proj))


def mamba2(mixer: Any, u: Tensor, start: Start) -> Explained:
    """Mamba2 and its hybrids: one decay for each head, and (mostly) a norm behind the gate."""
    u_scaled = u * getattr(mixer, "ssm_in_multiplier", 1.0)
    projected = functional.linear(u_scaled, weight_of(mixer.in_proj), bias_of(mixer.in_proj))
    multiplied = projected * getattr(mixer, "mup_vector", 1.0)
    z, x, step = multiplied.split(
        [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1
    )
    taps = weight_of(mixer.conv1d)[:, 0]
    c = convolved(x, taps, bias_of(mixer.conv1d))
    state = mixer.n_groups * mixer.ssm_state_size
    values, written, read = functional.silu(c).split([mixer.intermediate_size, state, state], -1)
    per_group, head = mixer.num_heads // mixer.n_groups, mixer.head_dim

    def spread(part: Tensor) -> Tensor:
        """[batch, pos, group * state] -> [batch, pos, channel, state]"""
        groups = part.unflatten(-1, (mixer.n_groups, -1))
        return groups.repeat_interleave(per_group * head, dim=2)

    step = functional.softplus(step + mixer.dt_bias.detach()).clamp(*mixer.time_step_limit)
    step = step.repeat_interleave(head, dim=-1)[..., None]
    rate = -mixer.A_log.detach().exp().repeat_interleave(head)[:, None]
    decay = torch.exp(step * rate).expand_as(spread(written))
    skip = mixer.D.detach().repeat_interleave(head)
    scanned, explain = selective(values, decay, step * spread(written), spread(read), skip)
    first, last, norm = scanned, scanned * functional.silu(z), mixer.norm
    if hasattr(norm, "weight"):
        before = getattr(norm, "norm_before_gate", False)
        first, last = (
            normalised(x, weight_of(norm), norm.variance_epsilon, mixer.n_groups)
            for x in (first, last)
        )
        last = first * functional.silu(z) if before else last
    gated = last
    y = functional.linear(gated, weight_of(mixer.out_proj), bias_of(mixer.out_proj))
    R = linear(start(y), gated, y, weight_of(mixer.out_proj)) / 2
    on_c = torch.zeros_like(c)
    on_c[..., : mixer.intermediate_size] = explain(R)
    on_x = convolution(on_c, x, c, taps)
    whole = torch.cat([R, on_x, torch.zeros_like(step[..., ::head, 0])], -1)
    return y, linear(whole, u_scaled, projected, weight_of(mixer.in_proj))


def delta_parts(mixer: Any, u: Tensor) -> tuple[list[Tensor], list[tuple[Any, Tensor]]]:
    """Query, key, value, gate, decay and write strength; and the projections with the rows of
    value and gate in each."""
    flat = u.shape[:2]
    if hasattr(mixer, "in_proj_qkvz"):  # Qwen3-Next: interleaved by heads
        layers = (mixer.in_proj_qkvz, mixer.in_proj_ba)
        outputs = [u @ weight_of(layer).T for layer in layers]
        parts = list(mixer.fix_query_key_value_ordering(*outputs))
        places = [torch.arange(out.shape[-1]).view(1, 1, -1) for out in outputs]
        _, _, v, z, _, _ = mixer.fix_query_key_value_ordering(*places)
        rows = [(mixer.in_proj_qkvz, v.flatten()), (mixer.in_proj_qkvz, z.flatten())]
        query, key, value, gate, beta, decay = parts
    elif hasattr(mixer, "in_proj_qkv"):  # Qwen3.5
        query, key, value = (u @ weight_of(mixer.in_proj_qkv).T).split(
            [mixer.key_dim, mixer.key_dim, mixer.value_dim], dim=-1
        )
        layers = (mixer.in_proj_z, mixer.in_proj_b, mixer.in_proj_a)
        gate, beta, decay = (u @ weight_of(layer).T for layer in layers)
        start, every = 2 * mixer.key_dim, torch.arange(mixer.value_dim)
        rows = [(mixer.in_proj_qkv, start + every), (mixer.in_proj_z, every)]
    else:  # OLMo Hybrid
        layers = (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj, mixer.b_proj)
        query, key, value, gate, beta = (u @ weight_of(layer).T for layer in layers)
        decay = u @ weight_of(mixer.a_proj).T
        every = torch.arange(mixer.value_dim)
        rows = [(mixer.v_proj, every), (mixer.g_proj, every)]
    parts = [part.reshape(*flat, -1) for part in (query, key, value, gate, decay, beta)]
    return parts, rows


def delta_net(mixer: Any, u: Tensor, start: Start) -> Explained:
    """``S_t = a_t S - k (k.(a_t S)) b + k v b``, ``o_t = S_t q``: the gated delta rule."""
    (query, key, value, gate, decay, beta), rows = delta_parts(mixer, u)
    taps = weight_of(mixer.conv1d)[:, 0]
    mixed = functional.silu(convolved(torch.cat([query, key, value], -1), taps, None))
    q, k, v = mixed.split([mixer.key_dim, mixer.key_dim, mixer.value_dim], dim=-1)
    repeat = mixer.num_v_heads // mixer.num_k_heads

    def heads(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (mixer.num_k_heads, -1)).repeat_interleave(repeat, dim=2)
        return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    q, k = heads(q) * mixer.head_k_dim**-0.5, heads(k)
    v = v.unflatten(-1, (mixer.num_v_heads, -1))
    b = beta.sigmoid() * (2.0 if getattr(mixer, "allow_neg_eigval", False) else 1.0)
    rate = mixer.A_log.detach().exp()
    a = torch.exp(-rate * functional.softplus(decay + mixer.dt_bias.detach()))
    length = u.shape[1]
    states = [torch.zeros(*v[:, 0].shape[:2], mixer.head_k_dim, mixer.head_v_dim, dtype=u.dtype)]
    memories = []
    for t in range(length):
        faded = a[:, t, :, None, None] * states[-1]
        memories.append((k[:, t, :, :, None] * faded).sum(-2))
        change = (v[:, t] - memories[-1]) * b[:, t, :, None]
        states.append(faded + k[:, t, :, :, None] * change[:, :, None])
    out = torch.stack([(q[:, t, :, :, None] * states[t + 1]).sum(-2) for t in range(length)], 1)
    norm = getattr(mixer, "norm", None) or mixer.o_norm
    z = gate.unflatten(-1, (mixer.num_v_heads, -1))
    gated = (normalised(out, weight_of(norm), norm.variance_epsilon) * functional.silu(z)).flatten(
        -2
    )
    last = getattr(mixer, "out_proj", None) or mixer.o_proj
    y = gated @ weight_of(last).T
    R = linear(start(y), gated, y, weight_of(last)) / 2
    on_out = R.unflatten(-1, (mixer.num_v_heads, -1))
    on_v, on_state = torch.zeros_like(v), torch.zeros_like(states[0])
    for t in reversed(range(length)):
        read = q[:, t, :, :, None] * states[t + 1]
        on_state = on_state + read * (on_out[:, t] / out[:, t])[:, :, None]
        share = on_state / states[t + 1]
        write = k[:, t, :, :, None] * b[:, t, :, None, None] * share
        on_v[:, t] = (write * v[:, t, :, None]).sum(-2)
        faded = a[:, t, :, None, None] * states[t]
        # What is taken out again, a read of every row: - k_i b sum_m k_m faded_m
        taken = write.sum(-2, keepdim=True) * k[:, t, :, :, None] * faded
        on_state = faded * share - taken
    width = 2 * mixer.key_dim
    c = convolved(value, taps[width:], None)
    on_value = convolution(on_v.flatten(-2), value, c, taps[width:])
    below = torch.zeros_like(u)
    for (layer, indices), part in zip(rows, (on_value, R), strict=True):
        weight = weight_of(layer)[indices]
        below += linear(part, u, u @ weight.T, weight)
    return y, below


def rg_lru(block: Any, u: Tensor, start: Start) -> Explained:
    """``h_t = a_t h_(t-1) + sqrt(1 - a_t^2) gate_t x_t`` (RecurrentGemma's recurrent block)."""
    lru = block.rg_lru
    gate = functional.linear(u, weight_of(block.linear_y), bias_of(block.linear_y))
    x = functional.linear(u, weight_of(block.linear_x), bias_of(block.linear_x))
    taps = weight_of(block.conv_1d)[:, 0]
    c = convolved(x, taps, bias_of(block.conv_1d))
    heads = c.unflatten(-1, (lru.num_attention_heads, -1))

    def sigmoid(weight: Tensor, bias: Tensor) -> Tensor:
        return (torch.einsum("bthi,hij->bthj", heads, weight) + bias).flatten(-2).sigmoid()

    admits = sigmoid(lru.input_gate_weight.detach(), lru.input_gate_bias.detach())
    keeps = sigmoid(lru.recurrent_gate_weight.detach(), lru.recurrent_gate_bias.detach())
    a = torch.exp(-8.0 * keeps * functional.softplus(lru.recurrent_param.detach()))
    scale = (1 - a * a).sqrt()
    scale[:, 0], a[:, 0] = 1.0, 0.0  # the first position starts anew
    ones = torch.ones_like(c)[..., None]
    none = torch.zeros(c.shape[-1], dtype=c.dtype)
    scanned, explain = selective(c, a[..., None], (scale * admits)[..., None], ones, none)
    product = scanned * block.act_fn(gate)
    y = functional.linear(product, weight_of(block.linear_out), bias_of(block.linear_out))
    R = linear(start(y), product, y, weight_of(block.linear_out)) / 2
    on_x = convolution(explain(R), x, c, taps)
    below = linear(on_x, u, x, weight_of(block.linear_x))
    return y, below + linear(R, u, gate, weight_of(block.linear_y))


def rwkv(mixer: Any, u: Tensor, start: Start) -> Explained:
    """A mean of all values so far, weighed by exp(key) and decay (RWKV's time mixing)."""
    shifted = torch.cat([torch.zeros_like(u[:, :1]), u[:, :-1]], 1)

    def mixed(mix: Tensor) -> Tensor:
        return u * mix.detach() + shifted * (1 - mix.detach())

    mix = mixer.time_mix_value.detach()
    key = mixed(mixer.time_mix_key) @ weight_of(mixer.key).T
    value = mixed(mix) @ weight_of(mixer.value).T
    receptance = (mixed(mixer.time_mix_receptance) @ weight_of(mixer.receptance).T).sigmoid()
    first, decay = mixer.time_first.detach(), -mixer.time_decay.detach().exp()
    length = u.shape[1]
    weights = torch.zeros(*key.shape[:1], length, length, key.shape[-1], dtype=u.dtype)
    for t in range(length):
        weights[:, t, t] = (key[:, t] + first).exp()
        for s in range(t):
            weights[:, t, s] = (key[:, s] + (t - 1 - s) * decay).exp()
    weights = weights / weights.sum(2, keepdim=True)
    scanned = torch.einsum("btsc,bsc->btc", weights, value)
    gated = receptance * scanned
    y = gated @ weight_of(mixer.output).T
    R = linear(start(y), gated, y, weight_of(mixer.output))
    on_value = torch.einsum("btsc,btc->bsc", weights, R / scanned) * value
    on_mixed = linear(on_value, mixed(mix), value, weight_of(mixer.value))
    ratio = on_mixed / mixed(mix)
    below = u * mix * ratio
    below[:, :-1] += (shifted * (1 - mix) * ratio)[:, 1:]
    return y, below
