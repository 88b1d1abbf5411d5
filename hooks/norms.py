"""Norms: the denominator is a constant, the centring is linear, the bias absorbs its share.

Three ways lead to a norm: the bridge wraps it and calls it, the bridge computes it in Python, or
Hugging Face's own code calls it past the bridge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components import NormalizationBridge
from transformer_lens.model_bridge.sources.native import model as native

from lenslrp.errors import InputError
from lenslrp.hooks import functions as F
from lenslrp.hooks.attach import Attached, Context, original
from lenslrp.hooks.rules import Identity, Normalisation, Plain
from lenslrp.hooks.sites import Site, has_values, widest

LAYER_NORMS = (nn.LayerNorm.forward, native.NativeLayerNormPre.forward)
GROUP_NORMS = (nn.GroupNorm.forward,)

NAMED_NORMS: Mapping[str, Normalisation] = {
    "T5LayerNorm": Normalisation(),
    "MT5LayerNorm": Normalisation(),
    "LongT5LayerNorm": Normalisation(),
    "SwitchTransformersLayerNorm": Normalisation(),
    "Llama4TextL2Norm": Normalisation(),
    "OlmoLayerNorm": Normalisation(centred=True),
    "NemotronLayerNorm1P": Normalisation(centred=True),
}
"""Classes of transformers with a form of their own, checked against it at every forward pass."""


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
        at.region(norm, site, lambda _: bias())
        _region_past_the_bridge(at, norm, site, bias)
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


def _region_past_the_bridge(
    at: Attached, norm: NormalizationBridge, site: Site, bias: Callable[[], Tensor | None]
) -> None:
    """The same region around the wrapped norm, where it is called without its bridge.

    So do split query, key and value inputs.
    """
    within: list[bool] = []

    def enter(*_: Any) -> None:
        within.append(True)

    def leave(*_: Any) -> None:
        within.clear()

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return None if within else (F.apply(F.RegionInput, args[0], "plain", site), *args[1:])

    def after(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        return None if within else F.apply(F.RegionOutput, y, bias(), "plain", site)

    at.pre_hook(norm, enter)
    at.hook(norm, leave)
    at.pre_hook(original(norm), before)
    at.hook(original(norm), after)


def _native(norm: NormalizationBridge) -> bool:
    """Whether the bridge will run the wrapped norm (and not its own Python form)."""
    folded = bool(getattr(norm.config, "layer_norm_folding", False))
    hooked = bool(norm.hook_scale.bwd_hooks or norm.hook_normalized.bwd_hooks)
    return (norm.use_native_layernorm_autograd or folded) and not hooked


def _attach_wrapped_norm(at: Attached, component: nn.Module, site: Site) -> None:
    name = type(component).__name__
    if isinstance(component, nn.GroupNorm) and is_norm(component):
        norm: Any = component
        gain, groups = norm.weight, norm.num_groups
        at.wrap(norm, lambda x, y: F.apply(F.GroupNorm, x, y, gain, groups, norm.eps, site))
    elif type(component).forward in LAYER_NORMS:  # not a subclass with a forward of its own
        weight, eps = getattr(component, "weight", None), component.eps
        at.wrap(component, lambda x, y: F.apply(F.LayerNorm, x, y, weight, eps, site))
    elif name in NAMED_NORMS:
        _wrap_own_norm(at, component, NAMED_NORMS[name], site)
    elif "RMSNorm" in name and "Gated" not in name:
        at.wrap(component, lambda x, y: F.apply(F.Elementwise, x, y, Identity(), site))
    # Any other class stays on the graph, where the coverage check meets it and names it.


def _bias_of(module: Any, rule: Normalisation) -> Tensor | None:
    bias: Tensor | None = getattr(module, rule.bias, None)
    return bias


def _wrap_own_norm(at: Attached, module: nn.Module, rule: Normalisation, site: Site) -> None:
    def apply(x: Tensor, y: Tensor) -> Tensor:
        bias = _bias_of(module, rule)
        if has_values(x) and not rule.fits(x, y, bias):
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
        at.hook(module, lambda _, args, y: measure_bias(y, _bias_of(module, rule), site))


def attach_loose_norm(at: Attached, ctx: Context, path: str, module: nn.Module) -> None:
    """A norm that Hugging Face's own code calls and the bridge has no component for."""
    rule = ctx.composite["norm"]
    site = ctx.site(path, module, "norm")
    site.cut = ctx.cuts(path)
    if isinstance(rule, Plain):
        at.region(module, site, lambda y: _broadcast_bias(module, y))
    else:
        at.sites.append(site)
        _attach_wrapped_norm(at, module, site)
    if ctx.books is not None:
        dim = 1 if isinstance(module, nn.GroupNorm) else -1
        at.hook(
            module, lambda _, args, y: measure_bias(y, getattr(module, "bias", None), site, dim)
        )


def _broadcast_bias(module: nn.Module, y: Tensor) -> Tensor | None:
    bias: Tensor | None = getattr(module, "bias", None)
    if bias is None or not isinstance(module, nn.GroupNorm):
        return bias
    return bias.view(-1, *[1] * (y.ndim - 2))


def is_norm(module: nn.Module) -> bool:
    """Whether a module is of a norm class that has a rule."""
    name = type(module).__name__
    known = type(module).forward in (*LAYER_NORMS, *GROUP_NORMS) or name in NAMED_NORMS
    return known or ("RMSNorm" in name and "Gated" not in name and "Bridge" not in name)


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
        measure_bias(y, bias(), site)

    # Split query-key-value inputs call the wrapped norm directly, past the bridge.
    at.hook(original(norm), meter)
    at.hook(original(norm), native_ran)

    def python_path(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        if not called:
            measure_bias(y, bias(), site)
        called.clear()

    at.hook(norm, python_path)


ROWS = 1 << 22
"""How many numbers of a gradient are widened at once."""


def measure_bias(y: Tensor, bias: Tensor | None, site: Site, dim: int = -1) -> None:
    """Report ``sum(bias * g)`` when the gradient at ``y`` arrives; the bias is along ``dim``.

    In chunks: a float64 copy of the gradient of all logits would be the largest tensor of the pass.
    Books that keep rows get one amount for each.
    """
    if bias is None or not y.requires_grad or (has_values(bias) and not bool(bias.any())):
        return  # TransformerLens gives every unembedding a bias of zeros

    def measure(g: Tensor) -> None:
        wide, last = widest(g), g.detach().movedim(dim, -1)
        kept = 1 if site.books is None or site.books.rows is None else site.books.rows
        rows = last.reshape(kept, -1, last.shape[-1])
        summed = torch.zeros(kept, rows.shape[-1], dtype=wide, device=g.device)
        for chunk in rows.split(max(1, ROWS // (kept * rows.shape[-1])), dim=1):
            summed += chunk.sum(dim=1, dtype=wide)
        site.report("biases", summed @ bias.detach().to(g.device, wide))

    y.register_hook(measure)
