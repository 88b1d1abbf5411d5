"""Attention: its rules at hook points, native modules made hookable, and the fused path.

Q@K^T has its rule at ``hook_attn_scores``, the softmax at ``hook_pattern``, A@V at ``o.hook_in``.

Native attention is made hookable: the same operations in the same order, with the bridge's own
``hook_attn_scores`` and ``hook_pattern`` between them.

TransformerLens' modes ``use_split_qkv_input``, ``use_attn_in`` and ``use_attn_result`` project head
by head, past the linear modules and so past what is attached to them: their biases are metered
where they are added then, and a rule other than epsilon is refused.

The fused path (``attention="fused"``) sends the bridge back to the Hugging Face module, which runs
torch's scaled-dot-product kernel. Patterns and scores are not formed. Relevance is the same to
rounding, since the softmax backward is linear in the gradient: a quarter to queries and keys, half
to values, or nothing and everything under a constant pattern.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components import (
    ALiBiJointQKVAttentionBridge,
    AttentionBridge,
    BloomAttentionBridge,
    JointQKVAttentionBridge,
    PositionEmbeddingsAttentionBridge,
)
from transformer_lens.model_bridge.sources.native import model as native
from transformer_lens.utilities.activation_functions import apply_softcap
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lenslrp.errors import CoverageError, InputError
from lenslrp.hooks import functions as F
from lenslrp.hooks.attention_functions import (
    FusedInput,
    FusedOutput,
    Pattern,
    Scores,
    SoftmaxReplaced,
)
from lenslrp.hooks.constants import measure_bias
from lenslrp.hooks.context import Context
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.intercept import attach_at_product, attach_hookable_attention, attach_score_meter
from lenslrp.hooks.linear_rules import Epsilon, LinearRule
from lenslrp.hooks.rule_types import (
    Product,
    Softmax,
    SoftmaxRule,
    SoftmaxTemperature,
    product_shares,
)
from lenslrp.hooks.sites import has_values, row_sums, state_of
from lenslrp.hooks.structure import original

FUSED = "lenslrp_fused"
"""The name under which the fused attention is registered with transformers."""


PER_HEAD_SETTINGS = ("use_split_qkv_input", "use_attn_in", "use_attn_result")
"""Settings of the bridge under which projections run head by head."""


def softcap_of(attn: AttentionBridge) -> float | None:
    """The attention soft-cap of a component, ``None`` without one."""
    inner = original(attn)
    cap = getattr(inner, "attn_logit_softcapping", None)
    if cap is None:
        cap = getattr(inner, "attn_scores_soft_cap", None)
    return float(cap) if cap is not None and float(cap) > 0 else None


SUPPORTED_PACKAGES = ("transformers", "transformers_modules", "transformer_lens")
"""Packages whose attention TransformerLens can compute itself; that of others it has to call."""


def passes_over(attn: AttentionBridge) -> bool:
    """Whether the bridge computes an attention itself that the module computes otherwise.

    TransformerLens goes by the architecture, and never calls the module that a user has put there.
    """
    package = type(original(attn)).forward.__module__.partition(".")[0]
    return not calls_the_module(attn) and package not in SUPPORTED_PACKAGES


def calls_the_module(attn: AttentionBridge) -> bool:
    """Whether the bridge has an attention computed by the module that it wraps."""
    return "forward" in attn.__dict__ or type(attn).forward is AttentionBridge.forward


def own_attention(model: nn.Module) -> list[AttentionBridge]:
    """The attention components of a bridge that pass over a module of the user's own."""
    attentions = [m for m in model.modules() if isinstance(m, AttentionBridge)]
    return [attn for attn in attentions if original(attn) is not None and passes_over(attn)]


def call_the_module(attn: AttentionBridge) -> None:
    """Make a bridge call the module that it wraps, as it does for attention that it delegates."""
    attn.__dict__["forward"] = partial(AttentionBridge.forward, attn)


def gates_its_output(module: nn.Module) -> bool:
    """Whether the bridge itself multiplies the output of an attention by a gate (HRM, Qwen3.5)."""
    return isinstance(module, PositionEmbeddingsAttentionBridge) and (
        "gate" in module._modules or hasattr(module, "hook_q_gate")
    )


def _goes_on(attn: AttentionBridge) -> bool:
    """Whether the bridge does more to the product of pattern and values before ``o``."""
    plain = PositionEmbeddingsAttentionBridge._pre_output_projection
    method = getattr(type(attn), "_pre_output_projection", plain)
    return gates_its_output(attn) or method is not plain


def attach_attention(at: Attached, ctx: Context, path: str, attn: AttentionBridge) -> None:
    """Q@K^T at ``hook_attn_scores``, the softmax at ``hook_pattern``, A@V at ``o.hook_in``."""
    if original(attn) is not None and passes_over(attn):
        raise CoverageError(
            f"{path} ({type(original(attn)).__name__}): TransformerLens computes this attention "
            "itself and never calls the module's own forward, so its logits are not the model's; "
            "load the model with lenslrp.load, which has the module called"
        )
    attach_per_head(at, ctx, path, attn)
    if ctx.attention == "fused":
        attach_fused(at, ctx, path, attn)
        return
    inner = original(attn)
    if isinstance(inner, native.NativeAttention):
        at.attribute(inner, "forward", native_forward(attn, inner))
    if not hasattr(attn, "o") and isinstance(inner, native.NativeAttention):
        return  # its products stay on the graph, where the coverage check names them
    roles = {role: ctx.composite[role] for role in ("attention_qk", "softmax", "attention_av")}
    first, second = product_shares(roles["attention_av"])
    if second == 0:
        raise InputError("an attention_av rule must give the values a share")
    z = ctx.site(f"{path}.o.hook_in", attn, "attention_av")
    biases = ctx.site(path, attn, "linear", Epsilon())
    at.sites.append(z)
    ruled: list[bool] = []  # the product inside a delegated module has had its rule

    def at_product(y: Tensor) -> Tensor:
        ruled.append(True)
        return F.apply(F.ProductOutput, y, first, second, z)

    def at_output(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        if ruled:
            ruled.clear()
            return None
        return F.apply(F.ProductOutput, y, first, second, z)

    if hasattr(attn, "o"):
        at.first_hook(attn.o.hook_in, at_output)
    if _goes_on(attn):
        attach_at_product(at, attn, at_product)
    if first == 0:
        at.hook(attn.hook_pattern, lambda _, args, y: y.detach())
        if not isinstance(inner, native.NativeAttention):
            attach_hookable_attention(at, attn, at_product, None, 1.0, biases)
        return
    sites = {
        "attention_qk": ctx.site(f"{path}.hook_attn_scores", attn, "attention_qk"),
        "softmax": ctx.site(f"{path}.hook_pattern", attn, "softmax"),
    }
    cap = softcap_of(attn)
    if cap is not None:
        sites["softcap"] = ctx.site(f"{path}.hook_attn_scores", attn, "softcap")
    at.sites.extend(sites.values())
    q_share, k_share = product_shares(roles["attention_qk"])
    if q_share != k_share:
        raise InputError("an attention_qk rule must give queries and keys the same share")
    if isinstance(attn, ALiBiJointQKVAttentionBridge | BloomAttentionBridge) and ctx.accounts:
        attach_score_meter(at, attn, sites["attention_qk"], q_share)
    elif not isinstance(inner, native.NativeAttention):
        attach_hookable_attention(at, attn, at_product, sites["attention_qk"], q_share, biases)
    # pooling has learned queries
    share = None if isinstance(inner, nn.MultiheadAttention) else q_share
    replaces = isinstance(roles["softmax"], SoftmaxRule)
    needs_scores = replaces or isinstance(roles["softmax"], SoftmaxTemperature)
    stash: list[Tensor] = []
    edited = ctx.accounts is not None and bool(attn.hook_attn_scores._forward_hooks)
    with_rule = {role: site for role, site in sites.items() if not (edited and role == "softmax")}

    def at_scores(_: nn.Module, args: tuple[Any, ...], scores: Tensor) -> Tensor:
        return F.apply(Scores, scores, share, cap, with_rule)

    def leaves(x: Tensor, g: Tensor) -> None:
        if sites["softmax"].backward:  # not where relevance starts at a score
            sites["softmax"].report("softmax", -row_sums(x, g))

    def measure(_: nn.Module, args: tuple[Any, ...], scores: Tensor) -> Tensor:
        return F.apply(F.Read, scores, leaves, ctx.copies)

    def keep(_: nn.Module, args: tuple[Any, ...], scores: Tensor) -> None:
        stash[:] = [scores if replaces else scores.detach()]  # what the softmax is given

    def at_pattern(_: nn.Module, args: tuple[Any, ...], pattern: Tensor) -> Tensor:
        if needs_scores and not stash:
            raise CoverageError(
                f"{path}: hook_pattern ran without hook_attn_scores before it, and the "
                f"{roles['softmax'].name} rule needs the scores"
            )
        scores = stash.pop() if needs_scores else None
        if replaces:
            site = sites["softmax"]
            return F.apply(SoftmaxReplaced, pattern.detach(), scores, first / second, site)
        return F.apply(Pattern, pattern, scores, first / second, sites["softmax"])

    if edited:  # what the softmax is given, behind the edits
        at.hook(attn.hook_attn_scores, measure)
    at.first_hook(attn.hook_attn_scores, at_scores)
    if needs_scores:
        at.hook(attn.hook_attn_scores, keep)
    at.first_hook(attn.hook_pattern, at_pattern)


def attach_per_head(at: Attached, ctx: Context, path: str, attn: Any) -> None:
    """Meter the biases of projections that run head by head.

    Raises:
        InputError: under a rule that needs the whole projection, or the fused kernel, which runs
            none of this; it names the setting.
    """
    flags = [flag for flag in PER_HEAD_SETTINGS if getattr(attn.config, flag, False)]
    rule = ctx.composite["projection"]
    if flags and (isinstance(rule, LinearRule) or ctx.attention == "fused"):
        why = 'attention="fused"' if ctx.attention == "fused" else f"projection={rule.name}"
        raise InputError(
            f"{path}: {flags[0]} projects head by head, where {why} has no place; "
            f"call model.set_{flags[0]}(False), or use the epsilon rule for projections with "
            'attention="bridge"'
        )
    if ctx.accounts is None:
        return
    project, result = attn._project_per_head_qkv, attn._compute_per_head_result

    def projected(linear: Any, *args: Any, **kwargs: Any) -> Tensor:
        key = next(key for key in ("q", "k", "v") if attn._modules.get(key) is linear)
        inner = original(linear)
        site = ctx.site(f"{path}.{key}", inner, "linear", Epsilon())

        def before(_: nn.Module, given: tuple[Any, ...]) -> None:
            measure_bias(given[0], inner.bias, site)

        handle = linear.hook_out.register_forward_pre_hook(before)
        try:
            with torch._C.DisableTorchFunction():  # the bias is no constant added to the scores
                out: Tensor = project(linear, *args, **kwargs)
        finally:
            handle.remove()
        return out

    def summed(*args: Any, **kwargs: Any) -> Tensor:
        with torch._C.DisableTorchFunction():
            out: Tensor = result(*args, **kwargs)
        inner = original(attn.o)
        site = ctx.site(f"{path}.o", inner, "linear", Epsilon())
        measure_bias(out, getattr(inner, "bias", None), site)
        return out

    at.attribute(attn, "_project_per_head_qkv", projected)
    at.attribute(attn, "_compute_per_head_result", summed)


def native_forward(attn: AttentionBridge, inner: Any) -> Callable[..., tuple[Tensor, None]]:
    """``NativeAttention.forward`` with hookable scores; it hands out the pattern only once."""

    def forward(
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pattern_fn: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        batch, seq, _ = hidden_states.shape
        q = inner.q(hidden_states).view(batch, seq, inner.n_heads, inner.d_head).transpose(1, 2)
        k = inner.k(hidden_states).view(batch, seq, inner.n_kv_heads, inner.d_head).transpose(1, 2)
        v = inner.v(hidden_states).view(batch, seq, inner.n_kv_heads, inner.d_head).transpose(1, 2)
        if inner.rotary is not None:
            q, k = inner.rotary.apply_rope(q, k, position_ids=position_ids)
        if inner.kv_repeats > 1:
            k = k.repeat_interleave(inner.kv_repeats, dim=1)
            v = v.repeat_interleave(inner.kv_repeats, dim=1)
        scores = torch.matmul(q, k.transpose(-2, -1)) / inner.scale
        scores = apply_softcap(scores, inner.attn_scores_soft_cap)
        if inner.causal:
            block = inner.causal_mask[:seq, :seq]
        else:
            block = torch.zeros(seq, seq, dtype=torch.bool, device=scores.device)
        if attention_mask is not None:
            block = inner._combine_attention_mask(block, attention_mask, batch=batch)
        scores = attn.hook_attn_scores(scores.masked_fill(block, float("-inf")))
        # A padded query sees no key: softmax's backward would make NaN of a row of -inf.
        scores = scores.masked_fill(block.all(dim=-1, keepdim=True), 0.0)
        pattern = torch.softmax(scores, dim=-1).masked_fill(block, 0.0)
        if pattern_fn is not None:
            pattern = pattern_fn(pattern)
        z = torch.matmul(pattern, v).transpose(1, 2).contiguous().view(batch, seq, -1)
        return inner.o(z), None

    return forward


def _fused_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: torch's kernel between our markers."""
    site, (qk, v) = module.__dict__["_lenslrp_fused"]
    if qk == 0:
        query, key = query.detach(), key.detach()
    else:
        query, key = (F.apply(FusedInput, x, qk, site) for x in (query, key))
    value = F.apply(FusedInput, value, v, site)
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return F.apply(FusedOutput, out, site), None


AttentionInterface.register(FUSED, _fused_attention)
AttentionMaskInterface.register(FUSED, sdpa_mask)


def _joint_is_current(attn: JointQKVAttentionBridge) -> bool:
    """Whether a joint projection holds the weights of the parts that the bridge has split it into.

    Processed weights go to the parts only. Compared once, and again when one has been written to.
    """
    parts = [original(attn.get_submodule(key)) for key in ("q", "k", "v")]
    joint = original(attn)
    weights = [p for module in (joint, *parts) for p in module.parameters()]
    states = [state_of(weight) for weight in weights if has_values(weight)]
    if _joints.get(attn, (None,))[0] != states:
        pairs = [
            (getattr(mine, name), getattr(theirs, name))
            for mine, theirs in zip(parts, attn.split_qkv_matrix(joint), strict=True)
            for name in ("weight", "bias")
        ]
        alike = all(torch.equal(a, b) for a, b in pairs if a is not None and has_values(a))
        _joints[attn] = (states, alike)
    return _joints[attn][1]


_joints: WeakKeyDictionary[nn.Module, tuple[list[tuple[int, int]], bool]] = WeakKeyDictionary()


def attach_fused(at: Attached, ctx: Context, path: str, attn: AttentionBridge) -> None:
    """Send one attention component through the fused kernel, scoped to the context.

    Raises:
        InputError: soft-caps, attention sinks or a rule that needs the pattern.
    """
    inner = original(attn)
    delegates = isinstance(attn, PositionEmbeddingsAttentionBridge | JointQKVAttentionBridge)
    config = getattr(inner, "config", None)
    if softcap_of(attn) is not None or getattr(inner, "sinks", None) is not None:
        raise InputError(
            f'attention="fused": {path} has a soft-cap or attention sinks, which the fused kernel '
            'cannot give a rule; use attention="bridge"'
        )
    if not delegates or config is None or not hasattr(config, "_attn_implementation"):
        raise InputError(
            f'attention="fused": {path} ({type(attn).__name__}) has no Hugging Face attention to '
            'delegate to; use attention="bridge"'
        )
    if isinstance(attn, JointQKVAttentionBridge) and not _joint_is_current(attn):
        raise InputError(
            f'attention="fused": the weights of {path} were processed (enable_compatibility_mode) '
            "and its joint projection, which Hugging Face runs, still holds the old ones; use "
            'attention="bridge"'
        )
    softmax, av, qk = (ctx.composite[r] for r in ("softmax", "attention_av", "attention_qk"))
    if not (isinstance(softmax, Softmax) and isinstance(av, Product) and isinstance(qk, Product)):
        raise InputError(
            f'attention="fused" holds for the softmax and product rules, not for softmax='
            f"{softmax.name}, attention_av={av.name}, attention_qk={qk.name}; "
            'use attention="bridge"'
        )
    site = ctx.site(f"{path}.hook_out", attn, "attention_av")
    at.sites.append(site)
    at.attribute(inner, "_lenslrp_fused", (site, (av.first * qk.first, av.second)))
    at.attribute(attn, "forward", lambda *a, **k: AttentionBridge.forward(attn, *a, **k))
    at.setting(config, "_attn_implementation", FUSED)
