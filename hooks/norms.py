"""Norms: the denominator is a constant, the centring is linear, the bias absorbs its share.

A norm runs in one of three ways: the bridge calls the module that it wraps, the bridge computes it
in Python, or Hugging Face's code calls the module past the bridge (an unbridged norm).
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
from lenslrp.hooks import checks
from lenslrp.hooks import functions as F
from lenslrp.hooks.checks import elementwise, known_forward
from lenslrp.hooks.constants import measure_bias
from lenslrp.hooks.context import Context
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.rule_types import Identity, Normalisation, Plain
from lenslrp.hooks.sites import Site
from lenslrp.hooks.structure import original

LAYER_NORMS = (nn.LayerNorm.forward, native.NativeLayerNormPre.forward)
GROUP_NORMS = (nn.GroupNorm.forward,)

NAMED_NORMS: Mapping[str, Normalisation] = {
    "T5LayerNorm": Normalisation(),
    "MT5LayerNorm": Normalisation(),
    "LongT5LayerNorm": Normalisation(),
    "SwitchTransformersLayerNorm": Normalisation(),
    "Llama4TextL2Norm": Normalisation(),
    "DebertaLayerNorm": Normalisation(centred=True),
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
    registered_rule = ctx.composite.modules.get(type(component))
    rule = ctx.composite["norm"] if registered_rule is None else registered_rule

    def bias() -> Tensor | None:
        if isinstance(registered_rule, Normalisation) and _native(norm):
            return _bias_of(component, registered_rule)
        return None if norm.uses_rms_norm else getattr(component, "bias", None)

    first = id(component) not in at.replaced
    site = ctx.site(path, norm, "norm", rule) if first else at.replaced[id(component)]
    site.cut, site.passed_over = ctx.cuts(path), bool(component._forward_hooks)
    if isinstance(rule, Plain):
        _plain_norm(at, norm, site, bias)
    else:
        if not first:
            pass  # one norm under two names: its rule is in its place already
        elif isinstance(registered_rule, Normalisation):
            _wrap_registered_norm(at, component, registered_rule, site)
        elif isinstance(registered_rule, Identity):
            at.wrap(component, elementwise(component, registered_rule, site, declared=True))
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
    if first:
        at.sites.append(site)
        at.replaced[id(component)] = site
    if ctx.accounts is not None:
        _attach_norm_bias(at, norm, bias, site, first=first)


def _plain_norm(
    at: Attached, norm: NormalizationBridge, site: Site, bias: Callable[[], Tensor | None]
) -> None:
    """The norm as it is, measured where it begins and ends: as the bridge runs it, in Python
    or by the module, or called past the bridge (split query, key and value inputs do so)."""
    component = original(norm)
    inside = at.plain.setdefault(id(component), [])

    def call(run: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if inside:
            return run(x, *args, **kwargs)
        inside.append(True)
        try:
            y = run(F.apply(F.RegionInput, x, "plain", site), *args, **kwargs)
        finally:
            inside.clear()
        return F.apply(F.RegionOutput, y, bias(), "plain", site)

    at.around(component, call)
    for method in ("_python_norm_forward", "_hf_autograd_forward_with_hooks"):
        at.around(norm, call, method)


def _native(norm: NormalizationBridge) -> bool:
    """Whether the bridge will run the wrapped norm (and not its own Python form)."""
    folded = bool(getattr(norm.config, "layer_norm_folding", False))
    hooked = bool(norm.hook_scale.bwd_hooks or norm.hook_normalized.bwd_hooks)
    return (norm.use_native_layernorm_autograd or folded) and not hooked


def _attach_wrapped_norm(at: Attached, component: nn.Module, site: Site) -> None:
    norm: Any = component
    forward = known_forward(norm)
    if forward in GROUP_NORMS:
        groups, eps = norm.num_groups, norm.eps
        at.wrap(norm, lambda x, y: F.apply(F.GroupNorm, x, y, norm.weight, groups, eps, site))
    elif forward in LAYER_NORMS:  # not a subclass with a forward of its own
        eps = norm.eps
        at.wrap(norm, lambda x, y: F.apply(F.Norm, x, y, _weight_of(norm), eps, True, site))
    elif type(norm).__name__ in NAMED_NORMS:
        _wrap_registered_norm(at, norm, NAMED_NORMS[type(norm).__name__], site)
    elif _is_rms_norm(norm):
        # The class's name is a promise that its values have to keep.
        run, form = norm.forward, Normalisation()

        def apply(x: Tensor, y: Tensor) -> Tensor | None:
            fits = checks.norm_form(norm, run, x, y, form, None)
            slim = _slim(norm, fits, x, y, site)
            if slim is None and fits:
                return F.apply(F.Elementwise, x, y, Identity(), site)
            return slim

        at.wrap(norm, apply)
    # Any other class stays on the graph, where the coverage check finds and names it.


def _slim(norm: nn.Module, form: str, x: Tensor, y: Tensor, site: Site) -> Tensor | None:
    """A norm that divides by the root mean square, which alone it saves; ``None`` for others.

    In float64 the values it returned have the say: transformers' norms compute in float32.
    """
    if form not in checks.FORMS[2:] or x.dtype == torch.float64:
        return None
    gain = checks.gain_of(norm, form)
    return F.apply(F.Norm, x, y, gain, checks.norm_epsilon(norm), False, site)


def _weight_of(norm: Any) -> Tensor | None:
    """The gain of a norm; looked up at each pass, since FSDP gathers it."""
    weight: Tensor | None = getattr(norm, "weight", None)
    return weight


def _bias_of(module: Any, rule: Normalisation) -> Tensor | None:
    bias: Tensor | None = getattr(module, rule.bias, None)
    return bias


def _wrap_registered_norm(at: Attached, module: nn.Module, rule: Normalisation, site: Site) -> None:
    run = module.forward

    def apply(x: Tensor, y: Tensor) -> Tensor:
        bias = _bias_of(module, rule)
        form = checks.norm_form(module, run, x, y, rule, bias)
        if not form:
            other_rule = replace(rule, centred=not rule.centred)
            hint = (
                f"; it fits Normalisation(centred={other_rule.centred})"
                if checks.norm_form(module, run, x, y, other_rule, bias)
                else "; is its bias an attribute named otherwise (bias=...), or is it no norm?"
            )
            raise InputError(
                f"{site.hook}: {type(module).__name__} does not return its input"
                f"{' less its mean,' if rule.centred else ''} times a gain for each feature and a "
                f"scale for each position, plus its {rule.bias!r}, as "
                f"Normalisation(centred={rule.centred}) says{hint}"
            )
        slim = _slim(module, form, x, y, site) if bias is None else None
        return F.apply(F.Normalised, x, y, bias, rule, site) if slim is None else slim

    at.wrap(module, apply)


def attach_registered_norm(
    at: Attached, ctx: Context, path: str, module: nn.Module, rule: Normalisation
) -> None:
    """A norm of a user's own class, where no ``NormalizationBridge`` wraps it."""
    site = ctx.site(path, module, "norm", rule)
    site.cut = ctx.cuts(path)
    at.sites.append(site)
    _wrap_registered_norm(at, module, rule, site)
    if ctx.accounts is not None:
        at.meter(module, lambda y: measure_bias(y, _bias_of(module, rule), site))


def attach_unbridged_norm(at: Attached, ctx: Context, path: str, module: nn.Module) -> None:
    """A norm that Hugging Face's own code calls and the bridge has no component for."""
    rule = ctx.composite["norm"]
    site = ctx.site(path, module, "norm")
    site.cut = ctx.cuts(path)
    if isinstance(rule, Plain):
        at.region(module, site, lambda y: _broadcast_bias(module, y))
    else:
        at.sites.append(site)
        _attach_wrapped_norm(at, module, site)
    if ctx.accounts is not None:
        dim = 1 if isinstance(module, nn.GroupNorm) else -1
        at.meter(module, lambda y: measure_bias(y, getattr(module, "bias", None), site, dim))


def _broadcast_bias(module: nn.Module, y: Tensor) -> Tensor | None:
    bias: Tensor | None = getattr(module, "bias", None)
    if bias is None or not isinstance(module, nn.GroupNorm):
        return bias
    return bias.view(-1, *[1] * (y.ndim - 2))


def is_norm(module: nn.Module) -> bool:
    """Whether a module is of a norm class that has a rule."""
    known = known_forward(module) in (*LAYER_NORMS, *GROUP_NORMS)
    return known or type(module).__name__ in NAMED_NORMS or _is_rms_norm(module)


def _is_rms_norm(module: nn.Module) -> bool:
    name = type(module).__name__
    return "RMSNorm" in name and "Gated" not in name and "Bridge" not in name


def _attach_norm_bias(
    at: Attached,
    norm: NormalizationBridge,
    bias: Callable[[], Tensor | None],
    site: Site,
    *,
    first: bool,
) -> None:
    if bias() is None:
        return
    called: list[bool] = []
    # Split query-key-value inputs call the wrapped norm directly, past the bridge.
    if first:
        at.meter(original(norm), lambda y: measure_bias(y, bias(), site))
    at.hook(original(norm), lambda *_: called.append(True))

    def python_path(_: nn.Module, args: tuple[Any, ...]) -> None:
        if not called:
            measure_bias(args[0], bias(), site)
        called.clear()

    at.pre_hook(norm.hook_out, python_path)
