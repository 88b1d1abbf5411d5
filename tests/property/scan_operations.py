"""Recurrent mixers of transformers, with what stands around their scans.

The reference writes each out step by step, on the weights of the same module: a selective state
space and a gated delta rule, short convolutions, gates, gated norms.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mamba2Config, MambaConfig, Qwen3NextConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from tests.conformance.zoo import Widened
from tests.oracles import explicit_recurrent as explicit
from tests.property.operation import Env, Op, of_the_model, tagged
from tests.property.program import Node


def half(x: Tensor) -> Tensor:
    """``x``, with half of its gradient."""
    return x.detach() + (x - x.detach()) / 2


class Rules:
    """The rules of a mixer in a reference; ``real``: the gradients of calculus."""

    def __init__(self, env: Env, real: bool) -> None:
        self.real, self.uniform = real, env.uniform

    def values(self, x: Tensor) -> Tensor:
        return half(x) if self.uniform and not self.real else x

    def operator(self, x: Tensor) -> Tensor:
        return x if self.real else half(x) if self.uniform else x.detach()

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(x) if self.real else x * x.detach().sigmoid()

    def gated(self, x: Tensor, z: Tensor) -> Tensor:
        y = self.silu(z)
        return x * y if self.real else half(x) * half(y)

    def normed(self, x: Tensor, norm: Any) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        return x * (scale if self.real else scale.detach()) * norm.weight

    def scanned(self, scan: Callable[..., Tensor], *parts: Tensor) -> Tensor:
        """In float32, as Hugging Face's, where the model's own type is narrower."""
        if parts[0].dtype == torch.float64:
            return scan(*parts)
        return scan(*(x.float() for x in parts)).to(parts[0].dtype)


def _selective(x: Tensor, decay: Tensor, written: Tensor, read: Tensor) -> Tensor:
    return explicit.selective(x, decay, written, read, x.new_zeros(()))[0]


def _mamba(mixer: Any, x: Tensor, rules: Rules) -> Tensor:
    inner, z = F.linear(x, mixer.in_proj.weight, mixer.in_proj.bias).chunk(2, dim=-1)
    taps, bias = mixer.conv1d.weight[:, 0], mixer.conv1d.bias
    values = rules.silu(explicit.convolved(inner, taps, bias))
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    step, written, read = F.linear(values, mixer.x_proj.weight).split(sizes, dim=-1)
    step = F.softplus(F.linear(step, mixer.dt_proj.weight, mixer.dt_proj.bias))[..., None]
    decay = torch.exp(step * -mixer.A_log.exp())
    operator = (decay, step * written[:, :, None], read[:, :, None].expand_as(decay))
    held = [rules.operator(part) for part in operator]
    scanned = rules.scanned(_selective, rules.values(values), *held) + mixer.D * values
    return F.linear(rules.gated(scanned, z), mixer.out_proj.weight, mixer.out_proj.bias)


def _mamba2(mixer: Any, x: Tensor, rules: Rules) -> Tensor:
    width, state = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size
    projected = F.linear(x, mixer.in_proj.weight, mixer.in_proj.bias)
    z, inner, step = projected.split([width, mixer.conv_dim, mixer.num_heads], dim=-1)
    taps, bias = mixer.conv1d.weight[:, 0], mixer.conv1d.bias
    mixed = rules.silu(explicit.convolved(inner, taps, bias))
    values, written, read = mixed.split([width, state, state], dim=-1)
    step = F.softplus(step + mixer.dt_bias).repeat_interleave(mixer.head_dim, -1)[..., None]
    rate = -mixer.A_log.exp().repeat_interleave(mixer.head_dim)[:, None]
    decay = torch.exp(step * rate).expand(*step.shape[:3], state)
    operator = (decay, step * written[:, :, None], read[:, :, None].expand_as(decay))
    held = [rules.operator(part) for part in operator]
    scanned = rules.scanned(_selective, rules.values(values), *held)
    scanned = scanned + mixer.D.repeat_interleave(mixer.head_dim) * values
    normed = rules.normed(rules.gated(scanned, z), mixer.norm)
    return F.linear(normed, mixer.out_proj.weight, mixer.out_proj.bias)


def _delta_rule(v: Tensor, q: Tensor, k: Tensor, decay: Tensor, b: Tensor) -> Tensor:
    """All [batch, pos, head, feature]: ``S = a S + k (v - S k) b``, ``o = S q``."""
    q, k = (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    state, outputs = v.new_zeros(*v[:, 0].shape[:2], k.shape[-1], v.shape[-1]), []
    for t in range(v.shape[1]):
        state = state * decay[:, t].exp()[..., None]
        change = (v[:, t] - (state * k[:, t, :, :, None]).sum(-2)) * b[:, t]
        state = state + k[:, t, :, :, None] * change[:, :, None]
        outputs.append((state * q[:, t, :, :, None]).sum(-2) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1)


def _delta(mixer: Any, x: Tensor, rules: Rules) -> Tensor:
    (query, key, value, gate, decay, beta), _ = explicit.delta_parts(mixer, x)
    taps = mixer.conv1d.weight[:, 0]
    mixed = rules.silu(explicit.convolved(torch.cat([query, key, value], -1), taps, None))
    q, k, v = mixed.split([mixer.key_dim, mixer.key_dim, mixer.value_dim], dim=-1)
    repeat = mixer.num_v_heads // mixer.num_k_heads
    q, k = (
        rules.operator(part).unflatten(-1, (mixer.num_k_heads, -1)).repeat_interleave(repeat, 2)
        for part in (q, k)
    )
    v = rules.values(v).unflatten(-1, (mixer.num_v_heads, -1))
    decay = rules.operator(-mixer.A_log.exp() * F.softplus(decay + mixer.dt_bias))[..., None]
    out = rules.scanned(_delta_rule, v, q, k, decay, rules.operator(beta.sigmoid())[..., None])
    z = gate.unflatten(-1, (mixer.num_v_heads, -1))
    return F.linear(
        rules.gated(rules.normed(out, mixer.norm), z).flatten(-2), mixer.out_proj.weight
    )


def _build(kind: str, n: int) -> nn.Module:
    """A mixer of transformers of width ``n``."""
    if kind == "mamba":
        sizes = {"state_size": 3, "conv_kernel": 3, "expand": 1, "time_step_rank": 2}
        return MambaMixer(MambaConfig(hidden_size=n, num_hidden_layers=1, **sizes), 0)
    if kind == "mamba2":
        sizes = {"state_size": 3, "conv_kernel": 3, "expand": 1, "n_groups": 1, "chunk_size": 3}
        heads = {"num_heads": 2, "head_dim": n // 2}
        return Mamba2Mixer(Mamba2Config(hidden_size=n, num_hidden_layers=1, **sizes, **heads), 0)
    heads = {"linear_num_value_heads": 2, "linear_num_key_heads": 1}
    dims = {"linear_key_head_dim": 3, "linear_value_head_dim": 4, "linear_conv_kernel_dim": 3}
    return Qwen3NextGatedDeltaNet(Qwen3NextConfig(hidden_size=n, **heads, **dims), 0)


def _make(env: Env, node: Node, widths: list[int]) -> nn.Module:
    """The module of a node; ``args[0]`` says which mixer."""
    with torch.random.fork_rng(devices=[]):
        mixer = _build(node.args[0], widths[0])
    for which, (name, weight) in enumerate(mixer.named_parameters()):
        into = weight[0].numel() if weight.ndim > 1 else 4
        made = env.const(node, *weight.shape, which=which, scale=1.2 / into**0.5)
        weight.data = 1 + 0.3 * made if "norm" in name else made
        if name == "A_log":
            weight.data = made.clamp(-1, 1)
    return mixer.to(env.dtype).eval().requires_grad_(False)


MIXERS: dict[str, Callable[[Any, Tensor, Rules], Tensor]] = {
    "mamba": _mamba,
    "mamba2": _mamba2,
    "delta": _delta,
}


def _run(env: Env, node: Node, x: Tensor) -> Tensor:
    """In float64 throughout, where the model is: what float32 rounds is no error of a rule."""
    with Widened() if env.dtype == torch.float64 else nullcontext():
        out: Tensor = env.module(node)(x)
        return out


def _explicit(real: bool, env: Env, node: Node, x: Tensor) -> Tensor:
    mixer = _make(env, node, [x.shape[-1]])
    return MIXERS[node.args[0]](mixer, x, Rules(env, real))


SCANNED: dict[str, Op] = {
    "scan": Op(
        _run,
        partial(_explicit, True),
        partial(_explicit, False),
        status=of_the_model,
        make=_make,
        tags=tagged("scan"),
    )
}
