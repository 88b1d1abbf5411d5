"""Where the rules go: TransformerLens' component classes, and what each gets.

Each ``attach_*`` function takes one component of a bridge, creates its sites and registers forward
hooks on hook points and wrapped modules. :mod:`lenslrp.hooks.assignment` says which component gets
which. Attention has a file of its own, :mod:`lenslrp.hooks.attention`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    GatedMLPBridge,
    SSMBlockBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.gated_mlp import resolve_activation_fn
from transformer_lens.model_bridge.sources.native import model as native
from transformers import activations as hf_activations
from transformers.models.bloom.modeling_bloom import BloomGelu
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from lenslrp.errors import InputError
from lenslrp.hooks import functions as F
from lenslrp.hooks.adapted import adapter_points
from lenslrp.hooks.checks import elementwise, known_forward
from lenslrp.hooks.constants import measure_bias
from lenslrp.hooks.context import Context
from lenslrp.hooks.convolution import CONVOLUTION_CLASSES, attach_convolution
from lenslrp.hooks.experts import ExpertPoint, expert_points
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.leaf_modules import PER_LAYER_EMBEDDING
from lenslrp.hooks.linear_rules import Epsilon, LinearRule
from lenslrp.hooks.packed import attach_unpacked, is_packed_linear
from lenslrp.hooks.readers import STACKS, stacks
from lenslrp.hooks.rule_types import Plain, product_shares
from lenslrp.hooks.scan_points import scan_points
from lenslrp.hooks.scans import mixers
from lenslrp.hooks.structure import NamedModules, layer_of, original

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

LAYER_WEIGHTS = "layer_weights"
"""The parameter by which a head weighs the hidden states of all layers."""

ACTIVATION_CLASSES: tuple[type, ...] = (
    nn.SiLU,
    nn.GELU,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.Tanh,
    nn.Mish,
    nn.Hardswish,
    BloomGelu,
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
            "XIELUActivation",
        )
        if hasattr(hf_activations, name)
    ),
)
"""Element-wise modules with f(0) = 0, for which the identity rule holds."""

ACTIVATION_FORWARDS = frozenset(vars(cls)["forward"] for cls in ACTIVATION_CLASSES)
"""Their forward methods: a sub-class with a forward of its own is not one of them."""

LINEAR_CLASSES: tuple[type, ...] = (nn.Linear, Conv1D, *CONVOLUTION_CLASSES)
"""Linear layers: the epsilon rule leaves their gradient as it is."""

PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward, FalconLinear.forward)
"""Forward passes that are a product with ``weight``, plus ``bias``, and nothing else."""

NATIVE_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = tuple(
    native._ACTIVATIONS[name] for name in ("gelu", "gelu_new", "relu", "silu")
)


def attach_bias_meter(at: Attached, ctx: Context, path: str, module: nn.Module) -> None:
    """A linear layer's bias under the epsilon rule: it absorbs its share."""
    layer: Any = module
    if ctx.accounts is None or getattr(layer, "bias", None) is None:
        return
    role, dim = "linear", -1
    if isinstance(module, CONVOLUTION_CLASSES):
        role, dim = "convolution", 1 - layer.weight.ndim  # the channels, before the places
    site = ctx.site(path, module, role, Epsilon())
    at.meter(module, lambda y: measure_bias(y, layer.bias, site, dim))  # FSDP gathers it


def attach_position_gate(at: Attached, ctx: Context, path: str, module: nn.Module) -> None:
    """A gate on a bias of the scores is a constant, so that the bias is one."""
    at.hook(module, lambda _, args, y: y.detach())


def attach_linear(at: Attached, ctx: Context, path: str, module: nn.Module, role: str) -> None:
    """A linear layer or a convolution: under epsilon its bias; otherwise the rule in its place."""
    rule = ctx.composite[role]
    convolves = isinstance(module, CONVOLUTION_CLASSES)
    plain = convolves or known_forward(module) in PLAIN_FORWARDS or not isinstance(rule, LinearRule)
    if is_packed_linear(module) or not isinstance(module, LINEAR_CLASSES) or not plain:
        attach_unpacked(at, ctx, path, module, role, rule)
        return
    if not isinstance(rule, LinearRule):
        attach_bias_meter(at, ctx, path, module)
        return
    site = ctx.site(path, module, role)
    site.cut = ctx.cuts(path)
    at.sites.append(site)
    if convolves:  # also one whose weight is parametrised
        attach_convolution(at, module, rule, site)
        return
    transposed = isinstance(module, Conv1D)

    def apply(x: Tensor, y: Tensor) -> Tensor:
        weight = module.weight.T if transposed else module.weight
        return F.apply(F.Linear, x, y, weight, module.bias, rule, site)

    at.wrap(module, apply)


def attach_activation(
    at: Attached,
    ctx: Context,
    path: str,
    module: nn.Module,
    rule: Any,
    share: float,
    declared: bool,
) -> None:
    """An activation module.

    Args:
        share: what a gate gets relative to the product's own share.
        declared: the composite has a rule for the module's class.
    """
    site = ctx.site(path, module, "activation", rule)
    site.cut, site.passed_over = share == 0, bool(module._forward_hooks)
    if isinstance(rule, Plain):
        at.region(module, site, lambda _: None)
    else:
        at.sites.append(site)
        at.wrap(module, elementwise(module, rule, site, declared=declared))
    if share != 1:
        at.hook(module, lambda _, args, y: F.shared(y, share, site))


def attach_native_activation(
    at: Attached, ctx: Context, path: str, mlp: nn.Module, share: float
) -> None:
    """TransformerLens' own MLPs keep their activation as a function on the instance."""
    act: Any = mlp.act
    if act not in NATIVE_ACTIVATIONS:
        return
    site = ctx.site(path, mlp, "activation")
    site.cut = share == 0
    at.sites.append(site)

    def ruled(x: Tensor) -> Tensor:
        return F.shared(F.activated(act, x, site), share, site)

    at.attribute(mlp, "act", ruled)


def attach_gated_mlp(at: Attached, ctx: Context, path: str, mlp: GatedMLPBridge) -> None:
    """gate * up: each factor's share, at ``out.hook_in``.

    With processed weights (compatibility mode) the bridge computes the MLP by functions, without
    its modules; the modules hold the same weights, so they are run instead.

    Raises:
        InputError: the bridge's function is not the module's.
    """
    if getattr(mlp, "_use_processed_weights", False):
        _require_same_activation(path, mlp)
        at.attribute(mlp, "_use_processed_weights", False)
    rule = ctx.composite["gate"]
    first, second = product_shares(rule)
    site = ctx.site(f"{path}.out.hook_in", mlp, "gate")
    at.sites.append(site)
    at.first_hook(
        mlp.out.hook_in,
        lambda _, args, y: F.apply(F.ProductOutput, y, first, second, site),
    )


def attach_all_cycles(at: Attached, model: Any) -> None:
    """HRM runs all but its last cycles without gradients, which is a means of training only."""
    config = model.config
    at.attribute(model, "L_bp_cycles_padded", [config.L_cycles] * config.H_cycles)


def _require_same_activation(path: str, mlp: GatedMLPBridge) -> None:
    function: Callable[[Tensor], Tensor] = resolve_activation_fn(mlp.config)
    known: list[Any] = [m for m in original(mlp).children() if isinstance(m, ACTIVATION_CLASSES)]
    for module in known:
        probe = torch.linspace(-4.0, 4.0, 33, device=mlp.out.weight.device)
        if not torch.equal(function(probe), type(module).forward(module, probe)):  # past any rule
            raise InputError(
                f"{path}: in compatibility mode TransformerLens computes another activation than "
                f"the model's {type(module).__name__}, so this is not the model any more; load it "
                "without enable_compatibility_mode(), or with no_processing=True"
            )


STREAM_BLOCKS = (BlockBridge, SSMBlockBridge)
"""Blocks that the whole residual stream enters at ``hook_in`` and leaves at ``hook_out``."""


def watched_blocks(parts: NamedModules) -> dict[int, nn.Module]:
    """The blocks by layer, where a block's number says what flows through it.

    None in two stacks (an encoder and a decoder, HRM's cycles), or where blocks have a second
    entrance (Gemma 4's embedding per layer, Zamba2's embeddings read again) or exit (a head that
    sums all layers), or are gone round (DeBERTa's convolution).
    """
    stacks = {path.split(".")[0] for path, _ in parts if re.fullmatch(r"\w*blocks\.\d+", path)}
    entered = any(path.endswith(PER_LAYER_EMBEDDING) for path, _ in parts)
    left = any(LAYER_WEIGHTS in module._parameters for _, module in parts)
    if len(stacks) > 1 or entered or left:
        return {}
    if any(type(module).__name__ in ("ConvLayer", "Zamba2HybridLayer") for _, module in parts):
        return {}
    blocks = {layer_of(path + "."): m for path, m in parts if isinstance(m, STREAM_BLOCKS)}
    return {layer: block for layer, block in blocks.items() if layer is not None}


def hook_points(model: TransformerBridge, parts: NamedModules) -> dict[str, nn.Module]:
    """Every hook point by name: the bridge's own, those of experts, adapters and scans."""
    STACKS.update(stacks(module for _, module in parts))
    inside = {**expert_points(parts), **adapter_points(parts), **scan_points(mixers(parts))}
    return {**model.hook_dict, **inside}


__all__ = ["BlockBridge", "ExpertPoint", "UnembeddingBridge", "hook_points"]
