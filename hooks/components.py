"""Where the rules go: TransformerLens' component classes, and what each gets.

Each ``attach_*`` function takes one component of a bridge, creates its sites and registers forward
hooks on hook points and wrapped modules. :func:`_attach` says which class gets which; a new
component class is one line there. Attention has a file of its own, :mod:`lenslrp.hooks.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    GatedMLPBridge,
    JointGateUpMLPBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    PosEmbedBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.gated_mlp import resolve_activation_fn
from transformer_lens.model_bridge.sources.native import model as native
from transformers import activations as hf_activations
from transformers.models.bloom.modeling_bloom import BloomGelu
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from lenslrp.errors import CoverageError, InputError
from lenslrp.hooks import functions as F
from lenslrp.hooks.attach import Attached, Context, components, layer_of, original
from lenslrp.hooks.attention import attach_attention, gates_its_output, softcap_of
from lenslrp.hooks.checks import elementwise, known_forward
from lenslrp.hooks.constants import measure_bias, meter_edits, watch_gradients
from lenslrp.hooks.convolution import CONVOLUTIONS, attach_convolution
from lenslrp.hooks.embeddings import attach_leaf, attach_patches, embeddings
from lenslrp.hooks.experts import ExpertPoint, Mixture, attach_mixture, expert_points, mixtures
from lenslrp.hooks.norms import (
    attach_loose_norm,
    attach_norm,
    attach_own_norm,
    is_norm,
)
from lenslrp.hooks.operations import (
    ATTENTION,
    ATTENTION_GATE,
    ROUTER,
    attach_operations,
    declared,
    is_known,
)
from lenslrp.hooks.patches import below, embedders
from lenslrp.hooks.rules import Epsilon, Identity, LinearRule, Normalisation, Operations, Plain

ACTIVATIONS: tuple[type, ...] = (
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

KNOWN_ACTIVATIONS = frozenset(vars(cls)["forward"] for cls in ACTIVATIONS)
"""Their code: a sub-class that computes something else is not one of them."""

LAYERS: tuple[type, ...] = (nn.Linear, Conv1D, *CONVOLUTIONS)
"""Linear layers: the epsilon rule leaves their gradient as it is."""

PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward, FalconLinear.forward)
"""Forward passes that are a product with ``weight``, plus ``bias``, and nothing else."""

NATIVE_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = tuple(
    native._ACTIVATIONS[name] for name in ("gelu", "gelu_new", "relu", "silu")
)


def attach_bias_meter(at: Attached, ctx: Context, path: str, module: nn.Module) -> None:
    """A linear layer's bias under the epsilon rule: it absorbs its share."""
    bias: Tensor | None = getattr(module, "bias", None)
    if ctx.books is None or bias is None:
        return
    role, dim = "linear", -1
    if isinstance(module, CONVOLUTIONS):
        layer: Any = module
        role, dim = "convolution", 1 - layer.weight.ndim  # the channels, before the places
    site = ctx.site(path, module, role, Epsilon())
    at.meter(module, lambda y: measure_bias(y, bias, site, dim))


def attach_linear(at: Attached, ctx: Context, path: str, module: nn.Module, role: str) -> None:
    """A linear layer or a convolution: under epsilon its bias; otherwise the rule in its place."""
    if not role:  # its parts are called instead
        return
    rule = ctx.composite[role]
    if not isinstance(rule, LinearRule):
        attach_bias_meter(at, ctx, path, module)
        return
    convolves = isinstance(module, CONVOLUTIONS)
    if not convolves and known_forward(module) not in PLAIN_FORWARDS:
        raise InputError(
            f"{path} is a {type(module).__name__}, whose weight the {rule.name} rule cannot read "
            "(quantised, or with something added to it): use epsilon for its role "
            f"({role!r}), or load the model with plain linear layers"
        )
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
    *,
    declared: bool = False,
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
    """gate * up: at ``out.hook_in``, half to each.

    With processed weights (compatibility mode) the bridge computes the MLP by functions, without
    its modules; the modules hold the same weights, so they are run instead.

    Raises:
        InputError: the bridge's function is not the module's.
    """
    if getattr(mlp, "_use_processed_weights", False):
        _require_same_activation(path, mlp)
        at.attribute(mlp, "_use_processed_weights", False)
    rule = ctx.composite["gate"]
    first, second = F.product_shares(rule)
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
    known: list[Any] = [m for m in original(mlp).children() if isinstance(m, ACTIVATIONS)]
    for module in known:
        probe = torch.linspace(-4.0, 4.0, 33, device=mlp.out.weight.device)
        if not torch.equal(function(probe), type(module).forward(module, probe)):  # past any rule
            raise InputError(
                f"{path}: in compatibility mode TransformerLens computes another activation than "
                f"the model's {type(module).__name__}, so this is not the model any more; load it "
                "without enable_compatibility_mode(), or with no_processing=True"
            )


def gate_share(ctx: Context) -> float:
    """What the gate gets relative to the product's common share (``up``'s)."""
    first, second = F.product_shares(ctx.composite["gate"])
    if second == 0:
        raise InputError("a gate rule must give `up` a share; Product(first, second) has second=0")
    return first / second


def attach_all(
    model: nn.Module, found: list[tuple[str, nn.Module]], ctx: Context, at: Attached
) -> None:
    """Attach the composite's rules to every component of a bridge.

    ``at`` learns the sites and how to undo them, as far as it went. What has no rule is left on the
    autograd graph, where :mod:`lenslrp.hooks.coverage` finds it.
    """
    require_modules_of_their_own(model)
    at.edits = meter_edits(at, ctx, found)
    at.changed = watch_gradients(at, found)
    at.wrapped = {id(original(m)) for _, m in found if isinstance(m, NormalizationBridge)}
    gates: dict[int, float] = {}
    roles: dict[int, str] = {}
    mixed = mixtures(found)
    mixing = {id(part) for mixture in mixed for part, _ in mixture.specs()}
    raw = _raw_modules(found, mixed, ctx)
    linear = {id(original(m)) for _, m in found if isinstance(m, LinearBridge)}
    roles.update(dict.fromkeys(mixing, ""))  # met where they run
    roles.update(_router_roles(found, mixed, raw))
    for path, module in found:
        if "cross_attn" in module._modules and "ln2" in module._modules:
            ctx.queries.add(f"{path}.ln2")  # before cross-attention, whose keys are the encoder's
        if isinstance(module, AttentionBridge):
            for key in ("q", "k", "v", "o"):
                roles[id(_wrapped(module, key))] = "projection"
            # The bridge splits a joint projection and calls its parts, unless it delegates.
            roles[id(_wrapped(module, "qkv"))] = "projection" if ctx.attention == "fused" else ""
        if isinstance(module, JointGateUpMLPBridge):
            roles[id(_wrapped(module, "gate_up"))] = ""
            roles[id(getattr(original(module), module.fused_attr, None))] = ""
        if id(module) in raw and raw[id(module)].gated:  # its activation feeds a gated product
            gates.update((id(inner), gate_share(ctx)) for inner in module.children())
        if isinstance(module, GatedMLPBridge) and _computes_itself(ctx, module):
            share = gate_share(ctx)
            for inner in [*original(module).children(), *module.children(), original(module)]:
                gates[id(inner)] = share
    at.weights = _ruled_weights(found, ctx, roles, raw)
    inside: set[int] = set()  # what an embedding does inside it (a norm) comes before its leaf
    for inner, _ in embeddings(found):
        attach_leaf(at, inner)
        inside.update(id(part) for part in inner.modules() if part is not inner)
    for _, module in found:  # what has a rule as a whole
        if isinstance(ctx.composite.modules.get(type(module)), Identity | Normalisation | Plain):
            inside.update(id(part) for part in module.modules() if part is not module)
        if isinstance(module, NormalizationBridge) and isinstance(ctx.composite["norm"], Plain):
            component: Any = original(module)
            inside.update(id(part) for part in component.modules() if part is not component)
    for path, module in found:
        if id(module) in inside:
            continue
        if hasattr(module, "L_bp_cycles_padded"):
            attach_all_cycles(at, module)
        _attach(at, ctx, path, module, gates, roles)
        if id(module) in linear and not isinstance(module, LAYERS):
            attach_linear(at, ctx, path, module, roles.get(id(module), "linear"))
        if id(module) in raw and id(module) not in mixing:
            attach_operations(at, ctx, path, module, raw[id(module)])
    for mixture in mixed:
        attach_mixture(at, ctx, mixture)
    for place in embedders(found):
        attach_patches(at, place.projection, below(found, at.sites))


def require_modules_of_their_own(model: nn.Module) -> None:
    """Refuse a model in which one module stands in two places.

    Norms, activations and embeddings may. Elsewhere the bridge replaces the module's parts once for
    each place, and its hook points would mean both.

    Raises:
        CoverageError: naming the places.
    """
    shared = (NormalizationBridge, EmbeddingBridge, PosEmbedBridge, UnembeddingBridge)
    places: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        inner = original(module) if isinstance(module, GeneralizedComponent) else None
        if inner is None or isinstance(module, shared) or "_original_component" in path:
            continue
        wrapped_twice = isinstance(inner, GeneralizedComponent) and type(inner) is type(module)
        first = places.setdefault(id(inner), path)
        # Inside one block several components may stand for parts of one module.
        if path.split(".")[:2] != first.split(".")[:2] or wrapped_twice:
            other = "one of another place" if first == path else first
            raise CoverageError(
                f"{path} ({type(inner).__name__}) is the same module as {other}: relevance there "
                "would be that of both; give each place a module of its own (copy.deepcopy)"
            )


def _raw_modules(
    parts: list[tuple[str, nn.Module]], mixed: list[Mixture], ctx: Context
) -> dict[int, Operations]:
    """Modules whose own code multiplies or activates, by id: where no component has a rule."""
    gated = (GatedMLPBridge, JointGateUpMLPBridge)
    bridged = {id(original(module)) for _, module in parts if isinstance(module, gated)}
    raw = {id(part): spec for mixture in mixed for part, spec in mixture.specs()}
    met = _attended(parts)
    for _, module in parts:
        if gates_its_output(module):
            raw[id(module)] = ATTENTION_GATE
        spec = declared(module)
        taught = type(module) in ctx.composite.modules
        if spec is None or taught or isinstance(module, GeneralizedComponent):
            continue
        if spec is ATTENTION and id(module) in met:
            continue  # its bridge has hook points for it
        if id(module) not in bridged or is_known(module):
            raw.setdefault(id(module), spec)
    return raw


def _ruled_weights(
    parts: list[tuple[str, nn.Module]],
    ctx: Context,
    roles: dict[int, str],
    raw: dict[int, Operations],
) -> dict[int, str]:
    """Addresses of weights whose products have a rule other than epsilon, and where they are.

    Batched experts, say, keep theirs as parameters of their own, one matrix after another.
    """
    found: dict[int, str] = {}
    ruled: dict[str, bool] = {}
    attended = _attended(parts)
    for path, module in parts:
        layer: Any = module
        # A parametrised weight is a new tensor at every call.
        if isinstance(module, nn.Embedding) or parametrize.is_parametrized(module):
            continue
        if isinstance(module, LAYERS):
            role, matrices = roles.get(id(module), _linear_role(module)), [layer.weight]
        elif raw.get(id(module)) == ROUTER:
            continue
        else:
            role = "projection" if id(module) in attended else "linear"
            own = [w for w in module._parameters.values() if w is not None]
            matrices = [m for w in own if w.ndim in (2, 3) for m in (w if w.ndim == 3 else [w])]
        if role not in ruled:  # a check of a protocol is slow, and roles are few
            ruled[role] = bool(role) and isinstance(ctx.composite[role], LinearRule)
        if ruled[role]:
            # On the meta device no tensor has an address.
            found.update((m.data_ptr(), path) for m in matrices if not m.is_meta)
    return found


def _computes_itself(ctx: Context, mlp: GatedMLPBridge) -> bool:
    """Whether a gated MLP has its rules from its bridge: its class is not declared."""
    inner = original(mlp)
    return inner is not None and type(inner) not in ctx.composite.modules


def _attended(parts: list[tuple[str, nn.Module]]) -> set[int]:
    """What lies inside attention that has a bridge."""
    inner = [original(m) for _, m in parts if isinstance(m, AttentionBridge)]
    return {id(part) for module in inner if module is not None for part in module.modules()}


def _router_roles(
    parts: list[tuple[str, nn.Module]], mixed: list[Mixture], raw: dict[int, Operations]
) -> dict[int, str]:
    """Linear layers that weigh experts: they keep the epsilon rule, whatever that of the others."""
    found: dict[int, str] = {}
    for _, module in parts:
        if raw.get(id(module)) == ROUTER:
            found.update((id(inner), "router") for inner in module.modules())
            found[id(module)] = ""
    for mixture in mixed:  # the weight of a shared expert: one number a position
        for inner in mixture.block.modules():
            if isinstance(inner, nn.Linear) and inner.out_features == 1:
                found[id(inner)] = "router"
    return found


def hook_points(model: Any, parts: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Every hook point by name: the bridge's own, and those at the neurons of experts."""
    return {**model.hook_dict, **expert_points(parts)}


def _linear_role(module: nn.Module) -> str:
    return "convolution" if isinstance(module, CONVOLUTIONS) else "linear"


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
    if isinstance(own, Operations):
        attach_operations(at, ctx, path, module, own)
    elif isinstance(own, Normalisation):
        attach_own_norm(at, ctx, path, module, own)
    elif own is not None:
        attach_activation(at, ctx, path, module, own, share, declared=True)
    elif isinstance(module, NormalizationBridge):
        attach_norm(at, ctx, path, module)
    elif isinstance(module, AttentionBridge):
        if type(original(module)) not in ctx.composite.modules:  # taught: it has rules of its own
            attach_attention(at, ctx, path, module)
    elif isinstance(module, GatedMLPBridge) and original(module) is not None:
        if _computes_itself(ctx, module) and not is_known(original(module)):
            attach_gated_mlp(at, ctx, path, module)
    elif id(module) not in at.wrapped and is_norm(module):
        attach_loose_norm(at, ctx, path, module)
    elif known_forward(module) in KNOWN_ACTIVATIONS:
        attach_activation(at, ctx, path, module, ctx.composite["activation"], share)
    elif isinstance(module, native.NativeMLP | native.NativeGatedMLP):
        attach_native_activation(at, ctx, path, module, share)
    elif isinstance(module, LAYERS):
        attach_linear(at, ctx, path, module, roles.get(id(module), _linear_role(module)))


__all__ = [
    "ACTIVATIONS",
    "Attached",
    "BlockBridge",
    "Context",
    "EmbeddingBridge",
    "ExpertPoint",
    "MLPBridge",
    "PosEmbedBridge",
    "UnembeddingBridge",
    "attach_all",
    "components",
    "hook_points",
    "layer_of",
    "original",
    "softcap_of",
]
