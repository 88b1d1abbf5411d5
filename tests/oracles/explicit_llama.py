"""Layer-wise relevance propagation through a Llama, written out without autograd.

Relevance itself (not a gradient) is carried from the logits to the tokens, one operation at a
time, by the equations of Achtibat et al., "AttnLRP", ICML 2024 (arXiv:2402.05602):

- linear layers and residual additions: epsilon rule with epsilon -> 0 (Eq. 8), in which a bias
  keeps its share;
- products of two factors (pattern @ value, query @ key, gate * up): uniform rule, half to each
  factor (Prop. 3.2 and 3.3, Eq. 14 and 15);
- softmax: R_i = x_i (R_i - s_i sum_j R_j) (Prop. 3.1, Eq. 13), exactly 0 where masked;
- RMS norm and SiLU: identity rule, relevance passes unchanged (Eq. 9 and 19).

CP-LRP (Ali et al. 2022) takes the attention pattern for a constant: all relevance of
pattern @ value goes to the values.

Everything is float64. Hugging Face computes RMS norms and the attention softmax in float32
whatever the type of the model, so both types are options of the forward pass here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Relevance = dict[str, Tensor]


@dataclass(frozen=True)
class LlamaWeights:
    """A float64 copy of the weights of a ``LlamaForCausalLM``, with the sizes that shape them."""

    tensors: dict[str, Tensor]
    n_layers: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    inverse_frequencies: Tensor
    rotary_scale: float

    @classmethod
    def copy_from(cls, model: Any) -> LlamaWeights:
        """Copy from a Hugging Face model; call it before a bridge takes the model over."""
        config = model.config
        return cls(
            tensors={k: v.detach().clone().double() for k, v in model.state_dict().items()},
            n_layers=config.num_hidden_layers,
            n_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
            norm_eps=config.rms_norm_eps,
            inverse_frequencies=model.model.rotary_emb.inv_freq.detach().clone().float(),
            rotary_scale=float(model.model.rotary_emb.attention_scaling),
        )

    def linear(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight [out, in] and bias [out] (or None) of a linear layer."""
        return self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")


@dataclass(frozen=True)
class Explanation:
    """What the explicit propagation returns; every quantity is in logits."""

    relevance: Relevance  # by TransformerLens hook name, each [batch, ...]
    tokens: Tensor  # [batch, pos], at the embeddings
    target: Tensor  # [batch], the logit explained
    biases: Tensor  # [batch], absorbed by all biases
    softmax: Tensor  # [batch], sum over layers of R(pattern) - R(scores)
    logits: Tensor  # [batch, pos, vocabulary]


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient, and 0 where the denominator is 0: what sends nothing receives nothing."""
    zero = denominator == 0
    return torch.where(zero, 0.0, numerator / torch.where(zero, 1.0, denominator))


# ------------------------------------------------------------------ rules, on relevance


def epsilon_rule(
    relevance: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Eq. 8: R_i = sum_j x_i w_ji / z_j R_j, and what the bias keeps, [batch]."""
    z = torch.einsum("bti,ji->btj", x, weight)
    if bias is not None:
        z = z + bias
    per_output = divide(relevance, z)
    received = torch.einsum("bti,ji,btj->bti", x, weight, per_output)
    if bias is None:
        return received, torch.zeros(x.shape[0], dtype=x.dtype)
    return received, torch.einsum("j,btj->b", bias, per_output)


def addition_rule(relevance: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The epsilon rule on x + y: each summand receives its proportion."""
    return x * divide(relevance, x + y), y * divide(relevance, x + y)


def softmax_rule(relevance: Tensor, x: Tensor, s: Tensor, visible: Tensor) -> Tensor:
    """Prop. 3.1: R_i = x_i (R_i - s_i sum_j R_j), over the visible entries only."""
    relevance = torch.where(visible, relevance, 0.0)
    total = relevance.sum(dim=-1, keepdim=True)
    return torch.where(visible, x * (relevance - s * total), 0.0)


def pattern_value_rule(
    relevance: Tensor, pattern: Tensor, value: Tensor, constant_pattern: bool
) -> tuple[Tensor, Tensor]:
    """z[q, d] = sum_k pattern[q, k] value[k, d]: relevance of pattern and of value.

    Uniform (Prop. 3.3) gives half to each; CP gives everything to the value.
    """
    z = torch.einsum("bhqk,bhkd->bhqd", pattern, value)
    share = torch.einsum("bhqk,bhkd,bhqd->bhqkd", pattern, value, divide(relevance, z))
    if constant_pattern:
        return torch.zeros_like(pattern), share.sum(dim=2)
    return 0.5 * share.sum(dim=-1), 0.5 * share.sum(dim=2)


def query_key_rule(
    relevance: Tensor, query: Tensor, key: Tensor, visible: Tensor
) -> tuple[Tensor, Tensor]:
    """x[q, k] = scale * sum_d query[q, d] key[k, d]: half to each; the scale cancels."""
    x = torch.einsum("bhqd,bhkd->bhqk", query, key)
    per_output = torch.where(visible, divide(relevance, x), 0.0)
    share = torch.einsum("bhqd,bhkd,bhqk->bhqkd", query, key, per_output)
    return 0.5 * share.sum(dim=3), 0.5 * share.sum(dim=2)


def rotary_rule(relevance: Tensor, x: Tensor, rotation: Tensor) -> Tensor:
    """The epsilon rule on y[t, i] = sum_j rotation[t, i, j] x[t, j]; x is [batch, head, t, j]."""
    y = torch.einsum("tij,bhtj->bhti", rotation, x)
    return torch.einsum("bhtj,tij,bhti->bhtj", x, rotation, divide(relevance, y))


# ------------------------------------------------------------------ forward pass


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMS norm whose square and mean are taken in ``dtype``, returned in float64."""
    narrow = x.to(dtype)
    narrow = narrow * torch.rsqrt(narrow.pow(2).mean(-1, keepdim=True) + eps)
    return weight * narrow.double()


def rotation_matrices(weights: LlamaWeights, n_pos: int) -> Tensor:
    """The rotary embedding as one matrix [pos, d_head, d_head] per position.

    Coordinate i < d/2 is paired with i + d/2. Angles are float32, as in Hugging Face.
    """
    angles = torch.arange(n_pos).float()[:, None] * weights.inverse_frequencies
    cos = (angles.cos() * weights.rotary_scale).double()
    sin = (angles.sin() * weights.rotary_scale).double()
    return torch.cat(
        [
            torch.cat([torch.diag_embed(cos), torch.diag_embed(-sin)], dim=-1),
            torch.cat([torch.diag_embed(sin), torch.diag_embed(cos)], dim=-1),
        ],
        dim=-2,
    )


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """[batch, pos, head * d] -> [batch, head, pos, d]."""
    return x.reshape(*x.shape[:-1], n_heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[batch, head, pos, d] -> [batch, pos, head * d]."""
    return x.transpose(1, 2).flatten(2)


def sum_groups(x: Tensor, n_kv_heads: int) -> Tensor:
    """[batch, head, pos, d] -> [batch, kv head, pos, d]: a shared head gets all of its group's."""
    batch, n_heads, n_pos, d_head = x.shape
    return x.reshape(batch, n_kv_heads, n_heads // n_kv_heads, n_pos, d_head).sum(dim=2)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b."""
    out = torch.einsum("bti,ji->btj", x, weight)
    return out if bias is None else out + bias


def forward_block(
    weights: LlamaWeights,
    layer: int,
    resid_pre: Tensor,
    rotation: Tensor,
    norm_dtype: torch.dtype,
    softmax_dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Every activation of one block that the backward equations need."""
    root = f"model.layers.{layer}"
    repeat = weights.n_heads // weights.n_kv_heads
    a = {"resid_pre": resid_pre, "rotation": rotation}

    def norm(x: Tensor, name: str) -> Tensor:
        weight = weights.tensors[f"{root}.{name}.weight"]
        return rms_norm(x, weight, weights.norm_eps, norm_dtype)

    def project(x: Tensor, name: str) -> Tensor:
        return affine(x, *weights.linear(f"{root}.{name}"))

    a["ln1"] = norm(resid_pre, "input_layernorm")
    a["q"] = split_heads(project(a["ln1"], "self_attn.q_proj"), weights.n_heads)
    a["k"] = split_heads(project(a["ln1"], "self_attn.k_proj"), weights.n_kv_heads)
    a["v"] = split_heads(project(a["ln1"], "self_attn.v_proj"), weights.n_kv_heads)
    a["rot_q"] = torch.einsum("tij,bhtj->bhti", rotation, a["q"])
    a["rot_k"] = torch.einsum("tij,bhtj->bhti", rotation, a["k"])
    a["keys"] = a["rot_k"].repeat_interleave(repeat, dim=1)
    a["values"] = a["v"].repeat_interleave(repeat, dim=1)
    n_pos, d_head = a["q"].shape[-2:]
    a["visible"] = torch.ones(n_pos, n_pos, dtype=torch.bool).tril()
    a["scores"] = torch.einsum("bhqd,bhkd->bhqk", a["rot_q"], a["keys"]) / d_head**0.5
    masked = torch.where(a["visible"], a["scores"], -torch.inf)
    a["pattern"] = masked.softmax(dim=-1, dtype=softmax_dtype).double()
    a["z"] = torch.einsum("bhqk,bhkd->bhqd", a["pattern"], a["values"])
    a["attn_out"] = project(merge_heads(a["z"]), "self_attn.o_proj")
    a["resid_mid"] = resid_pre + a["attn_out"]
    a["ln2"] = norm(a["resid_mid"], "post_attention_layernorm")
    a["gate"] = project(a["ln2"], "mlp.gate_proj")
    a["up"] = project(a["ln2"], "mlp.up_proj")
    a["post"] = a["gate"] * torch.sigmoid(a["gate"]) * a["up"]
    a["mlp_out"] = project(a["post"], "mlp.down_proj")
    a["resid_post"] = a["resid_mid"] + a["mlp_out"]
    return a


# ------------------------------------------------------------------ propagation


def propagate_mlp(
    weights: LlamaWeights,
    layer: int,
    a: dict[str, Tensor],
    relevance: Tensor,
    gate: Literal["uniform", "up"],
    out: Relevance,
) -> tuple[Tensor, Tensor]:
    """From relevance of the MLP's output to relevance of ``resid_mid`` through it, and biases."""
    root, block = f"model.layers.{layer}.mlp", f"blocks.{layer}"
    out[f"{block}.hook_mlp_out"] = relevance
    post, down = epsilon_rule(relevance, a["post"], *weights.linear(f"{root}.down_proj"))
    to_gate, to_up = (0.5 * post, 0.5 * post) if gate == "uniform" else (0.0 * post, post)
    through_gate, b_gate = epsilon_rule(to_gate, a["ln2"], *weights.linear(f"{root}.gate_proj"))
    through_up, b_up = epsilon_rule(to_up, a["ln2"], *weights.linear(f"{root}.up_proj"))
    branch = through_gate + through_up
    out[f"{block}.mlp.hook_post"] = post
    out[f"{block}.mlp.hook_pre"] = to_gate
    out[f"{block}.mlp.hook_pre_linear"] = to_up
    out[f"{block}.mlp.gate.hook_in"] = through_gate
    out[f"{block}.mlp.in.hook_in"] = through_up
    for name in ("ln2.hook_in", "ln2.hook_out", "mlp.hook_in"):
        out[f"{block}.{name}"] = branch
    return branch, down + b_gate + b_up


def propagate_attention(
    weights: LlamaWeights,
    layer: int,
    a: dict[str, Tensor],
    relevance: Tensor,
    constant_pattern: bool,
    out: Relevance,
) -> tuple[Tensor, Tensor, Tensor]:
    """From attention's output to ``resid_pre`` through it; also biases and the softmax's leak."""
    root, block = f"model.layers.{layer}.self_attn", f"blocks.{layer}"
    out[f"{block}.hook_attn_out"] = relevance
    z, b_out = epsilon_rule(relevance, merge_heads(a["z"]), *weights.linear(f"{root}.o_proj"))
    z = split_heads(z, weights.n_heads)
    pattern, values = pattern_value_rule(z, a["pattern"], a["values"], constant_pattern)
    scores = softmax_rule(pattern, a["scores"], a["pattern"], a["visible"])
    rot_q, keys = query_key_rule(scores, a["rot_q"], a["keys"], a["visible"])
    v = sum_groups(values, weights.n_kv_heads)
    rot_k = sum_groups(keys, weights.n_kv_heads)
    q = rotary_rule(rot_q, a["q"], a["rotation"])
    k = rotary_rule(rot_k, a["k"], a["rotation"])
    branch, absorbed = torch.zeros_like(a["ln1"]), b_out
    for name, part in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
        through, kept = epsilon_rule(merge_heads(part), a["ln1"], *weights.linear(f"{root}.{name}"))
        out[f"{block}.attn.{name[0]}.hook_in"] = through
        branch, absorbed = branch + through, absorbed + kept
    by_name = {"z": z, "q": q, "k": k, "v": v, "rot_q": rot_q, "rot_k": rot_k}
    for name, part in by_name.items():
        out[f"{block}.attn.hook_{name}"] = part.transpose(1, 2)
    out[f"{block}.attn.hook_pattern"] = pattern
    out[f"{block}.attn.hook_attn_scores"] = scores
    for name in ("ln1.hook_in", "ln1.hook_out", "attn.hook_in"):
        out[f"{block}.{name}"] = branch
    return branch, absorbed, (pattern - scores).sum(dim=(1, 2, 3))


def explain(
    weights: LlamaWeights,
    token_ids: Tensor,
    target_ids: Tensor,
    *,
    method: Literal["attnlrp", "cp"],
    gate: Literal["uniform", "up"] = "uniform",
    norm_dtype: torch.dtype = torch.float32,
    softmax_dtype: torch.dtype = torch.float32,
) -> Explanation:
    """Relevance of the logit of ``target_ids`` [batch] at the last position, at every hook.

    ``token_ids`` is [batch, pos], without padding. Residual names (``hook_resid_*``,
    ``ln_final.hook_in``) hold the total of the stream. ``hook_attn_out``, ``hook_mlp_out`` and
    every ``hook_in`` of a norm or a layer hold what flows through that branch alone; relevance
    through a norm is the same on both of its sides.
    """
    x = weights.tensors["model.embed_tokens.weight"][token_ids]
    rotation = rotation_matrices(weights, token_ids.shape[1])
    blocks = []
    for layer in range(weights.n_layers):
        blocks.append(forward_block(weights, layer, x, rotation, norm_dtype, softmax_dtype))
        x = blocks[-1]["resid_post"]
    final = rms_norm(x, weights.tensors["model.norm.weight"], weights.norm_eps, norm_dtype)
    head, head_bias = weights.linear("lm_head")
    logits = affine(final, head, head_bias)

    rows = torch.arange(token_ids.shape[0])
    start = torch.zeros_like(logits)
    start[rows, -1, target_ids] = logits[rows, -1, target_ids]
    out: Relevance = {"unembed.hook_out": start}
    total, biases = epsilon_rule(start, final, head, head_bias)
    out["ln_final.hook_out"] = out["ln_final.hook_in"] = total
    softmax = torch.zeros_like(biases)
    for layer in reversed(range(weights.n_layers)):
        a = blocks[layer]
        out[f"blocks.{layer}.hook_resid_post"] = total
        stream, branch = addition_rule(total, a["resid_mid"], a["mlp_out"])
        through, absorbed = propagate_mlp(weights, layer, a, branch, gate, out)
        total, biases = stream + through, biases + absorbed
        out[f"blocks.{layer}.hook_resid_mid"] = total
        stream, branch = addition_rule(total, a["resid_pre"], a["attn_out"])
        through, absorbed, leak = propagate_attention(
            weights, layer, a, branch, method == "cp", out
        )
        total, biases, softmax = stream + through, biases + absorbed, softmax + leak
        out[f"blocks.{layer}.hook_resid_pre"] = total
    out["hook_embed"] = total
    return Explanation(out, total.sum(dim=-1), start.sum(dim=(1, 2)), biases, softmax, logits)
