"""Where the rules go: TransformerLens' component classes, and what each gets.

Each ``attach_*`` function takes one component of a bridge, creates its sites and registers forward
hooks on hook points and wrapped modules. :func:`_attach` says which class gets which; a new
component class is one line there. Attention has a file of its own, :mod:`lenslrp.hooks.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    GatedMLPBridge,
    JointGateUpMLPBridge,
    MLPBridge,
    NormalizationBridge,
    PosEmbedBridge,
    T5BlockBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.sources.native import model as native
from transformers import activations as hf_activations
from transformers.pytorch_utils import Conv1D

from lenslrp.errors import InputError
from lenslrp.hooks import functions as F
from lenslrp.hooks.attach import Attached, Context, components, layer_of, original
from lenslrp.hooks.attention import attach_attention, softcap_of
from lenslrp.hooks.rules import Epsilon, Identity, LinearRule, Normalisation, Plain
from lenslrp.hooks.sites import Site

ACTIVATIONS: tuple[type, ...] = (
    nn.SiLU,
    nn.GELU,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.Tanh,
    nn.Mish,
    nn.Hardswish,
    *(
        getattr(hf_activations, name)
        for name in (
            "NewGELUActivation",
            "GELUActivation",
            "GELUTanh",
            "PytorchGELUTanh",
            "FastGELUActivation",
            "QuickGELUActivation",
            "AccurateGELUActivation",
            "SiLUActivation",
            "MishActivation",
            "ReLUSquaredActivation",
            "LinearActivation",
        )
        if hasattr(hf_activations, name)
    ),
)
"""Element-wise modules with f(0) = 0, for which the identity rule holds."""

NATIVE_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = tuple(
    native._ACTIVATIONS[name] for name in ("gelu", "gelu_new", "relu", "silu")
)


LAYER_NORMS = (nn.LayerNorm.forward, native.NativeLayerNormPre.forward)


def embeddings(parts: Iterable[tuple[str, nn.Module]]) -> list[tuple[nn.Module, bool]]:
    """The modules whose outputs are the leaves, and whether each embeds positions (or types).

    A stack that has an embedding of its own around the shared weight (T5) counts as well. Rotary
    tables are no embeddings, and neither is T5's relative-position bias, which is added to scores.
    """
    found: dict[int, tuple[nn.Module, bool]] = {}
    parts = list(parts)
    for path, module in parts:
        if not isinstance(module, EmbeddingBridge | PosEmbedBridge):
            continue
        inner = original(module)
        if inner is None or not any(True for _ in inner.parameters()):
            continue
        position = isinstance(module, PosEmbedBridge) or "token_type" in path
        if position and _adds_to_scores(module):
            continue
        found[id(inner)] = (inner, position)
    for weight, position in [(m.weight, p) for m, p in found.values() if hasattr(m, "weight")]:
        for _, module in parts:
            if isinstance(module, nn.Embedding) and module.weight is weight:
                found.setdefault(id(module), (module, position))
    return list(found.values())


def _adds_to_scores(bridge: Any) -> bool:
    return "relative" in str(bridge.name)


def attach_leaf(at: Attached, inner: nn.Module) -> None:
    """Embeddings are the leaves: with the weights frozen, nothing else would start a graph."""

    def leaf(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return out.requires_grad_() if torch.is_grad_enabled() else out

    at.hook(inner, leaf)


def attach_norm(at: Attached, ctx: Context, path: str, norm: NormalizationBridge) -> None:
    """Norms: around the wrapped module, or at ``hook_scale`` when the bridge computes the norm.

    Which of the two runs is the bridge's choice at every forward (a user's backward hook on
    ``hook_normalized`` changes it), so both are ready and the one that is taken fires.
    """
    component = original(norm)
    if isinstance(component, nn.Identity):
        return
    own = ctx.composite.modules.get(type(component))
    rule = ctx.composite["norm"] if own is None else own

    def bias() -> Tensor | None:
        if isinstance(own, Normalisation) and _native(norm):
            return _bias_of(component, own)
        return None if norm.uses_rms_norm else getattr(component, "bias", None)

    site = ctx.site(path, norm, "norm", rule)
    site.cut = ctx.cuts(path)
    if isinstance(rule, Plain):
        at.region(norm, site, bias)
    else:
        at.sites.append(site)
        if isinstance(own, Normalisation):
            _wrap_own_norm(at, component, own, site)
        elif isinstance(own, Identity):
            at.wrap(component, lambda x, y: F.apply(F.Elementwise, x, y, own, site))
        else:
            _attach_wrapped_norm(at, component, site)

        cut: list[bool] = []

        def constant_scale(_: nn.Module, args: tuple[Any, ...], scale: Tensor) -> Tensor | None:
            # On the native path the scale is computed for reading only; touch it there and the
            # bridge would leave the wrapped norm.
            if not scale.requires_grad or (_native(norm) and scale is args[0]):
                return None
            cut.append(True)
            return scale.detach()

        def mark(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
            if not cut:
                return None
            cut.clear()
            return F.apply(F.Mark, y, site)

        at.hook(norm.hook_scale, constant_scale)
        at.hook(norm, mark)
    if ctx.books is not None:
        _attach_norm_bias(at, ctx, path, norm, bias)


def _native(norm: NormalizationBridge) -> bool:
    """Whether the bridge will run the wrapped norm (and not its own Python form)."""
    folded = bool(getattr(norm.config, "layer_norm_folding", False))
    hooked = bool(norm.hook_scale.bwd_hooks or norm.hook_normalized.bwd_hooks)
    return (norm.use_native_layernorm_autograd or folded) and not hooked


def _attach_wrapped_norm(at: Attached, component: nn.Module, site: Site) -> None:
    name = type(component).__name__
    if type(component).forward in LAYER_NORMS:  # not a subclass with a forward of its own
        weight, eps = getattr(component, "weight", None), component.eps
        at.wrap(component, lambda x, y: F.apply(F.LayerNorm, x, y, weight, eps, site))
    elif "RMSNorm" in name or name == "T5LayerNorm":
        at.wrap(component, lambda x, y: F.apply(F.Elementwise, x, y, Identity(), site))
    # Any other class stays on the graph, where the coverage check meets it and names it.


def _bias_of(module: Any, rule: Normalisation) -> Tensor | None:
    bias: Tensor | None = getattr(module, rule.bias, None)
    return bias


def _wrap_own_norm(at: Attached, module: nn.Module, rule: Normalisation, site: Site) -> None:
    def apply(x: Tensor, y: Tensor) -> Tensor:
        bias = _bias_of(module, rule)
        if not (x.is_meta or rule.fits(x, y, bias)):
            other = replace(rule, centred=not rule.centred)
            hint = (
                f"; it fits Normalisation(centred={other.centred})"
                if other.fits(x, y, bias)
                else "; is its bias an attribute named otherwise (bias=...), or is it no norm?"
            )
            raise InputError(
                f"{site.hook}: {type(module).__name__} does not return its input"
                f"{' less its mean,' if rule.centred else ''} times a gain for each feature and a "
                f"scale for each position, plus its {rule.bias!r}, as "
                f"Normalisation(centred={rule.centred}) says{hint}"
            )
        return F.apply(F.Normalised, x, y, bias, rule, site)

    at.wrap(module, apply)


def attach_own_norm(
    at: Attached, ctx: Context, path: str, module: nn.Module, rule: Normalisation
) -> None:
    """A norm of a user's own class, where no ``NormalizationBridge`` wraps it."""
    site = ctx.site(path, module, "norm", rule)
    site.cut = ctx.cuts(path)
    at.sites.append(site)
    _wrap_own_norm(at, module, rule, site)
    if ctx.books is not None:
        at.hook(module, lambda _, args, y: _measure_bias(y, _bias_of(module, rule), site))


def _attach_norm_bias(
    at: Attached,
    ctx: Context,
    path: str,
    norm: NormalizationBridge,
    bias: Callable[[], Tensor | None],
) -> None:
    if bias() is None:
        return
    site = ctx.site(path, norm, "norm")
    called: list[bool] = []

    def native_ran(*_: Any) -> None:
        called.append(True)

    def meter(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        _measure_bias(y, bias(), site)

    # Split query-key-value inputs call the wrapped norm directly, past the bridge.
    at.hook(original(norm), meter)
    at.hook(original(norm), native_ran)

    def python_path(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        if not called:
            _measure_bias(y, bias(), site)
        called.clear()

    at.hook(norm, python_path)


def _measure_bias(y: Tensor, bias: Tensor | None, site: Site) -> None:
    """Report ``sum(bias * g)`` when the gradient at ``y`` arrives."""
    if bias is None or not y.requires_grad:
        return

    def measure(g: Tensor) -> None:
        wide = torch.float32 if g.device.type == "mps" else torch.float64
        summed = g.detach().flatten(0, -2).sum(dim=0, dtype=wide)
        site.report("biases", summed @ bias.detach().to(wide))

    y.register_hook(measure)


def attach_bias_meter(at: Attached, ctx: Context, path: str, module: nn.Module) -> None:
    """A linear layer's bias under the epsilon rule: it absorbs its share."""
    bias: Tensor | None = getattr(module, "bias", None)
    if ctx.books is None or bias is None:
        return
    site = ctx.site(path, module, "linear", Epsilon())
    at.hook(module, lambda _, args, y: _measure_bias(y, bias, site))


def attach_linear(at: Attached, ctx: Context, path: str, module: nn.Module, role: str) -> None:
    """A linear layer: nothing under epsilon but its bias; otherwise the rule in its place."""
    if not role:  # its parts are called instead
        return
    rule = ctx.composite[role]
    if not isinstance(rule, LinearRule):
        attach_bias_meter(at, ctx, path, module)
        return
    site = ctx.site(path, module, role)
    site.cut = ctx.cuts(path)
    at.sites.append(site)
    transposed = isinstance(module, Conv1D)

    def apply(x: Tensor, y: Tensor) -> Tensor:
        weight = module.weight.T if transposed else module.weight
        return F.apply(F.Linear, x, y, weight, module.bias, rule, site)

    at.wrap(module, apply)


def attach_activation(
    at: Attached, ctx: Context, path: str, module: nn.Module, rule: Any, share: float
) -> None:
    """An activation module; ``share`` is what a gate gets relative to the product's own share."""
    site = ctx.site(path, module, "activation", rule)
    site.cut = share == 0
    if isinstance(rule, Plain):
        at.region(module, site, lambda: None)
    else:
        at.sites.append(site)
        at.wrap(module, lambda x, y: F.apply(F.Elementwise, x, y, rule, site))
    if share != 1:
        at.hook(module, lambda _, args, y: _share(y, share, site))


def _share(y: Tensor, share: float, site: Site) -> Tensor:
    return y.detach() if share == 0 else F.apply(F.Share, y, share, site)


def attach_native_activation(
    at: Attached, ctx: Context, path: str, mlp: nn.Module, share: float
) -> None:
    """TransformerLens' own MLPs keep their activation as a function on the instance."""
    act: Any = mlp.act
    rule = ctx.composite["activation"]
    if act not in NATIVE_ACTIVATIONS:
        return
    site = ctx.site(path, mlp, "activation")
    site.cut = share == 0
    at.sites.append(site)

    def ruled(x: Tensor) -> Tensor:
        if isinstance(rule, Plain):
            x = F.apply(F.RegionInput, x, "plain", site)
            y = F.apply(F.RegionOutput, act(x), None, "plain", site)
        else:
            y = F.apply(F.Elementwise, x, act(x.detach()), rule, site)
        return y if share == 1 else _share(y, share, site)

    at.attribute(mlp, "act", ruled)


def attach_gated_mlp(at: Attached, ctx: Context, path: str, mlp: GatedMLPBridge) -> None:
    """gate * up: at ``out.hook_in``, half to each."""
    rule = ctx.composite["gate"]
    first, second = F.product_shares(rule)
    site = ctx.site(f"{path}.out.hook_in", mlp, "gate")
    at.sites.append(site)
    at.hook(
        mlp.out.hook_in,
        lambda _, args, y: F.apply(F.ProductOutput, y, first, second, site),
    )


def gate_share(ctx: Context) -> float:
    """What the gate gets relative to the product's common share (``up``'s)."""
    first, second = F.product_shares(ctx.composite["gate"])
    if second == 0:
        raise InputError("a gate rule must give `up` a share; Product(first, second) has second=0")
    return first / second


def attach_all(model: nn.Module, ctx: Context) -> Attached:
    """Attach the composite's rules to every component of a bridge.

    Returns the sites and how to undo them. What has no rule is left on the autograd graph, where
    :mod:`lenslrp.hooks.coverage` finds it.
    """
    at = Attached()
    found = list(components(model))
    at.wrapped = {id(original(m)) for _, m in found if isinstance(m, NormalizationBridge)}
    gates: dict[int, float] = {}
    roles: dict[int, str] = {}
    for path, module in found:
        if isinstance(module, T5BlockBridge) and module.is_decoder:
            ctx.queries.add(f"{path}.ln2")  # before cross-attention, whose keys are the encoder's
        if isinstance(module, AttentionBridge):
            for key in ("q", "k", "v", "o"):
                roles[id(_wrapped(module, key))] = "projection"
            # The bridge splits a joint projection and calls its parts, unless it delegates.
            roles[id(_wrapped(module, "qkv"))] = "projection" if ctx.attention == "fused" else ""
        if isinstance(module, JointGateUpMLPBridge):
            roles[id(_wrapped(module, "gate_up"))] = ""
            roles[id(getattr(original(module), module.fused_attr, None))] = ""
        if isinstance(module, GatedMLPBridge) and original(module) is not None:
            share = gate_share(ctx)
            for inner in [*original(module).children(), *module.children(), original(module)]:
                gates[id(inner)] = share
    for path, module in found:
        role = roles.get(id(module), "linear")
        rule = ctx.composite[role] if role else None
        if isinstance(module, nn.Linear | Conv1D) and isinstance(rule, LinearRule):
            at.weights[module.weight.data_ptr()] = path
    try:
        for inner, _ in embeddings(found):
            attach_leaf(at, inner)
        for path, module in found:
            _attach(at, ctx, path, module, gates, roles)
    except BaseException:
        for undo in reversed(at.undo):
            undo()
        raise
    return at


def _wrapped(module: nn.Module, key: str) -> Any:
    child = module._modules.get(key)
    return None if child is None else original(child)


def _attach(
    at: Attached,
    ctx: Context,
    path: str,
    module: nn.Module,
    gates: dict[int, float],
    roles: dict[int, str],
) -> None:
    own = ctx.composite.modules.get(type(module))
    share = gates.get(id(module), 1.0)
    if own is not None and id(module) in at.wrapped:
        return  # its NormalizationBridge has seen to it
    if isinstance(own, Normalisation):
        attach_own_norm(at, ctx, path, module, own)
    elif own is not None:
        attach_activation(at, ctx, path, module, own, share)
    elif isinstance(module, NormalizationBridge):
        attach_norm(at, ctx, path, module)
    elif isinstance(module, AttentionBridge):
        attach_attention(at, ctx, path, module)
    elif isinstance(module, GatedMLPBridge) and original(module) is not None:
        attach_gated_mlp(at, ctx, path, module)
    elif isinstance(module, ACTIVATIONS):
        attach_activation(at, ctx, path, module, ctx.composite["activation"], share)
    elif isinstance(module, native.NativeMLP | native.NativeGatedMLP):
        attach_native_activation(at, ctx, path, module, share)
    elif isinstance(module, nn.Linear | Conv1D):
        attach_linear(at, ctx, path, module, roles.get(id(module), "linear"))


__all__ = [
    "ACTIVATIONS",
    "Attached",
    "BlockBridge",
    "Context",
    "EmbeddingBridge",
    "MLPBridge",
    "PosEmbedBridge",
    "UnembeddingBridge",
    "attach_all",
    "components",
    "embeddings",
    "layer_of",
    "original",
    "softcap_of",
]
