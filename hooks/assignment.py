"""Which rule each component of a bridge gets: decided first, then attached.

:func:`assign` looks at a model and changes nothing; its table has a row for everything that is
attached. A new architecture is rows in that table: a class in one of the lists that it goes by
(:data:`~lenslrp.hooks.components.ACTIVATION_CLASSES`, :data:`~lenslrp.hooks.norms.NAMED_NORMS`,
:data:`~lenslrp.hooks.declared.OPERATIONS_BY_CLASS`), or a branch of :class:`_Decision`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import nn
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    GatedMLPBridge,
    JointGateUpMLPBridge,
    LinearBridge,
    NormalizationBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources.native import model as native

from lenslrp.errors import InputError
from lenslrp.hooks.adapted import attach_adapted, is_adapted
from lenslrp.hooks.attention import attach_attention, calls_the_module, gates_its_output
from lenslrp.hooks.checks import known_forward
from lenslrp.hooks.components import (
    ACTIVATION_FORWARDS,
    LINEAR_CLASSES,
    attach_activation,
    attach_gated_mlp,
    attach_linear,
    attach_native_activation,
    attach_position_gate,
)
from lenslrp.hooks.composites import Composite
from lenslrp.hooks.declared import (
    ATTENTION_GATE_SPEC,
    ATTENTION_SPEC,
    declared_operations,
    has_declared_class,
)
from lenslrp.hooks.experts import Mixture, attach_mixture, mixtures, router_roles
from lenslrp.hooks.gated_norms import attach_gated_norm, is_gated_norm
from lenslrp.hooks.joint import JointRows
from lenslrp.hooks.leaf_modules import embeddings, relative_positions
from lenslrp.hooks.linear_rules import Epsilon, LinearRule
from lenslrp.hooks.norms import attach_norm, attach_registered_norm, attach_unbridged_norm, is_norm
from lenslrp.hooks.operations import attach_operations
from lenslrp.hooks.recurrence import attach_recurrence
from lenslrp.hooks.rule_types import Identity, Normalisation, Operations, Plain, product_shares
from lenslrp.hooks.ruled_weights import attended_parts, linear_role, ruled_weights
from lenslrp.hooks.scans import mixer_roles, mixers
from lenslrp.hooks.similarity import SIMILARITY_CLASSES, attach_similarity
from lenslrp.hooks.streams import SCALED_STREAMS_CLASSES, attach_magnitudes, mixing_roles
from lenslrp.hooks.structure import (
    NamedModules,
    check_once,
    components,
    original,
    require_modules_of_their_own,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

POSITION_GATE = "gru_rel_pos_linear"
"""The layer from whose output WavLM makes the gates on its position bias."""


@dataclass(frozen=True)
class Assignment:
    """One component and the rule that it gets.

    Attributes:
        path: its name in the bridge.
        module: the component.
        role: a key of :data:`~lenslrp.hooks.composites.ROLES`; of attention, of a mixture and of a
            module's own operations, which have several, the first.
        rule: the rule, as the composite has it.
        share: of an activation that feeds a gated product, what it gets relative to the other
            factor.
        attach: called with ``Attached``, ``Context``, path, module and ``options``.
    """

    path: str
    module: nn.Module = field(repr=False)
    role: str
    rule: Any
    share: float = 1.0
    attach: Callable[..., None] = field(default=attach_linear, repr=False)
    options: tuple[Any, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Assignments:
    """What :func:`assign` gives.

    Attributes:
        rows: one for each component that gets a rule, in the order in which they are attached.
        queries: names of norms that feed nothing but queries.
        weights: addresses of weights whose products have a rule other than epsilon, by layer.
        wrapped: ids of the modules that norms of the bridge wrap.
        embedded: the embeddings, and whether each is one of positions.
    """

    rows: list[Assignment]
    queries: set[str]
    weights: dict[int, str]
    wrapped: set[int]
    embedded: list[tuple[nn.Module, bool]]

    def table(self) -> pd.DataFrame:
        """One row for each component: path, component (its class), role, rule and share."""
        rows = [
            (row.path, type(row.module).__name__, row.role, row.rule.name, row.share)
            for row in self.rows
        ]
        return pd.DataFrame(rows, columns=["path", "component", "role", "rule", "share"])


def assign(
    model: TransformerBridge, composite: Composite, attention: str = "bridge"
) -> Assignments:
    """Decide which component of a bridge gets which rule of a composite; nothing is changed.

    What has no rule gets no row: it stays on the autograd graph, where
    :mod:`lenslrp.hooks.graph_walk` finds it.

    Args:
        model: a ``TransformerBridge``.
        composite: ``AttnLRP()``, ``CPLRP()``, ... or a ``Composite`` of your own.
        attention: ``"bridge"`` or ``"fused"``, as for :func:`lenslrp.hooks.relevance_rules`.

    Raises:
        CoverageError: one module stands in two places.
        InputError: a rule that gives ``up`` no share, or one that reads a weight which FSDP gathers
            for the pass only.

    Examples:
        Of a Llama with gamma on its linear layers::

            table = assign(model, Composite("mine", {"linear": Gamma(0.05)})).table()
            table[table.role == "linear"].path  # blocks.0.mlp.gate, blocks.0.mlp.in, ...
    """
    check_once(model, require_modules_of_their_own)
    modules = components(model)
    gates: dict[int, float] = {}
    roles: dict[int, str] = {}
    mixture_blocks = mixtures(modules)
    mixing = {id(part) for mixture in mixture_blocks for part, _ in mixture.specs()}
    recurrence = mixers(modules)
    recurrent = {id(mixer) for _, mixer in recurrence}
    operations_of = _raw_modules(modules, mixture_blocks, composite)
    operations_of = {key: spec for key, spec in operations_of.items() if key not in recurrent}
    wrapped = {id(original(m)) for _, m in modules if isinstance(m, NormalizationBridge)}
    roles.update(dict.fromkeys(mixing, ""))  # intercepted where they run
    roles.update(router_roles(modules, mixture_blocks, operations_of))
    roles.update(mixer_roles(modules, recurrence))
    roles.update(mixing_roles(modules))
    queries: set[str] = set()
    gated = product_shares(composite["recurrence_gate"])[0] != 0
    for path, module in modules:
        if "cross_attn" in module._modules and "ln2" in module._modules:
            queries.add(f"{path}.ln2")  # before cross-attention, whose keys are the encoder's
        if isinstance(module, AttentionBridge):
            for key in ("q", "k", "v", "o"):
                roles[id(_wrapped(module, key))] = "projection"
            if product_shares(composite["attention_gate"])[0] == 0:
                roles[id(getattr(original(module), POSITION_GATE, None))] = "attention_gate"
            # The bridge splits a joint projection and calls its parts, unless it delegates.
            whole = attention == "fused" or calls_the_module(module)
            whole = whole or isinstance(_wrapped(module, "v"), JointRows)
            roles[id(_wrapped(module, "qkv"))] = "projection" if whole else ""
        if isinstance(module, JointGateUpMLPBridge):
            role = "linear" if isinstance(_wrapped(module, "gate"), JointRows) else ""
            fused: Any = getattr(original(module), module.fused_attr, None)
            for joint in (_wrapped(module, "gate_up"), fused, original(fused)):
                roles[id(joint)] = role
        spec = operations_of.get(id(module))
        if spec is not None and spec.gated:  # its activation feeds a gated product
            gates.update((id(inner), gate_share(composite)) for inner in module.children())
        if spec is not None and spec.product == "recurrence_gate" and not gated:
            gates.update((id(inner), 0.0) for inner in module.children())
        if isinstance(module, GatedMLPBridge) and _computes_itself(composite, module):
            share = gate_share(composite)
            for inner in [*original(module).children(), *module.children(), original(module)]:
                gates[id(inner)] = share
    for _, module in modules:
        if is_adapted(module):
            role = roles.get(id(module), linear_role(module))
            roles.update(dict.fromkeys(map(id, module.modules()), role))
    decide = _Decision(composite, gates, roles, wrapped)
    embedded = embeddings(modules)
    of_positions = relative_positions(modules)
    inside = _answered_for(modules, composite, embedded) | of_positions
    linear = {id(original(m)) for _, m in modules if isinstance(m, LinearBridge)}
    rows: list[Assignment] = []
    for path, module in modules:
        if id(module) in inside:
            continue
        rows.extend(decide.row(path, module))
        if id(module) in linear and not (isinstance(module, LINEAR_CLASSES) or is_adapted(module)):
            rows.extend(decide.linear(path, module))
        if id(module) in operations_of and id(module) not in mixing:
            rows.append(decide.operations(path, module, operations_of[id(module)]))
        if id(module) in recurrent and type(module) not in composite.modules:
            options = (path, module, "recurrence", composite["recurrence"])
            rows.append(Assignment(*options, attach=attach_recurrence))
    rows.extend(
        Assignment(
            mixture.path, mixture.block, "router", composite["router"],
            attach=attach_mixture, options=(mixture,),
        )
        for mixture in mixture_blocks
    )  # fmt: skip
    roles.update(dict.fromkeys(of_positions, ""))
    weights = ruled_weights(modules, composite, roles, operations_of)
    return Assignments(rows, queries, weights, wrapped, embedded)


def _answered_for(
    modules: NamedModules, composite: Composite, embedded: list[tuple[nn.Module, bool]]
) -> set[int]:
    """Modules inside one that has a rule as a whole; and what an embedding does before its leaf."""
    inside: set[int] = set()
    for inner, _ in embedded:
        inside.update(id(part) for part in inner.modules() if part is not inner)
    for _, module in modules:
        if is_adapted(module):
            inside.update(id(part) for part in module.modules() if part is not module)
        if isinstance(composite.modules.get(type(module)), Identity | Normalisation | Plain):
            inside.update(id(part) for part in module.modules() if part is not module)
        if isinstance(module, NormalizationBridge) and isinstance(composite["norm"], Plain):
            component: Any = original(module)
            inside.update(id(part) for part in component.modules() if part is not component)
    return inside


@dataclass(frozen=True)
class _Decision:
    """What :func:`assign` goes by: shares of gates, roles of layers, modules that norms wrap."""

    composite: Composite
    gates: dict[int, float]
    roles: dict[int, str]
    wrapped: set[int]

    def row(self, path: str, module: nn.Module) -> Iterator[Assignment]:
        """The row of a component by its class, if it gets one."""
        rules = self.composite
        registered = rules.modules.get(type(module))
        share = self.gates.get(id(module), 1.0)
        if registered is not None and id(module) in self.wrapped:
            return  # its NormalizationBridge has seen to it
        if isinstance(registered, Operations):
            yield self.operations(path, module, registered)
        elif isinstance(registered, Normalisation):
            options = (registered,)
            yield Assignment(path, module, "norm", registered, 1.0, attach_registered_norm, options)
        elif registered is not None:
            yield self.activation(path, module, registered, share, True)
        elif isinstance(module, NormalizationBridge):
            yield Assignment(path, module, "norm", rules["norm"], attach=attach_norm)
        elif isinstance(module, AttentionBridge):
            if type(original(module)) not in rules.modules:  # registered: it has rules of its own
                rule = rules["attention_av"]
                yield Assignment(path, module, "attention_av", rule, attach=attach_attention)
        elif isinstance(module, GatedMLPBridge) and original(module) is not None:
            if _computes_itself(rules, module) and not has_declared_class(original(module)):
                yield Assignment(path, module, "gate", rules["gate"], attach=attach_gated_mlp)
        elif is_gated_norm(module):
            yield Assignment(path, module, "norm", rules["norm"], attach=attach_gated_norm)
        elif id(module) not in self.wrapped and is_norm(module):
            yield Assignment(path, module, "norm", rules["norm"], attach=attach_unbridged_norm)
        elif known_forward(module) in ACTIVATION_FORWARDS:
            if self.roles.get(id(module)) == "":
                return
            yield self.activation(path, module, rules["activation"], share, False)
        elif type(module).__name__ in SCALED_STREAMS_CLASSES:
            yield Assignment(path, module, "norm", rules["norm"], attach=attach_magnitudes)
        elif type(module).__name__ in SIMILARITY_CLASSES:
            rule = rules["attention_qk"]
            yield Assignment(path, module, "attention_qk", rule, attach=attach_similarity)
        elif isinstance(module, native.NativeMLP | native.NativeGatedMLP):
            yield Assignment(
                path, module, "activation", rules["activation"], share,
                attach_native_activation, (share,),
            )  # fmt: skip
        elif is_adapted(module):
            yield from self.linear(path, module, attach_adapted)
        elif isinstance(module, LINEAR_CLASSES):
            yield from self.linear(path, module)

    def linear(
        self, path: str, module: nn.Module, attach: Callable[..., None] = attach_linear
    ) -> Iterator[Assignment]:
        """A linear layer or a convolution, unless its parts are called instead."""
        role = self.roles.get(id(module), linear_role(module))
        if role == "attention_gate":
            rule = self.composite[role]
            yield Assignment(path, module, role, rule, attach=attach_position_gate)
        elif role and not isinstance(module, JointRows):
            rule = self.composite[role]
            if not isinstance(rule, LinearRule):  # the weight of an expert, too
                rule = Epsilon()
            yield Assignment(path, module, role, rule, attach=attach, options=(role,))

    def activation(
        self, path: str, module: nn.Module, rule: Any, share: float, declared: bool
    ) -> Assignment:
        """An activation module; ``declared`` by the composite for its class."""
        options = (rule, share, declared)
        return Assignment(path, module, "activation", rule, share, attach_activation, options)

    def operations(self, path: str, module: nn.Module, spec: Operations) -> Assignment:
        """A module whose own code multiplies or activates."""
        rule = self.composite[spec.product]
        return Assignment(path, module, spec.product, rule, 1.0, attach_operations, (spec,))


def gate_share(composite: Composite) -> float:
    """What the gate gets relative to the product's common share (``up``'s)."""
    first, second = product_shares(composite["gate"])
    if second == 0:
        raise InputError("a gate rule must give `up` a share; Product(first, second) has second=0")
    return first / second


def _raw_modules(
    parts: NamedModules, mixed: list[Mixture], composite: Composite
) -> dict[int, Operations]:
    """Modules whose own code multiplies or activates, by id: where no component has a rule."""
    gated = (GatedMLPBridge, JointGateUpMLPBridge)
    bridged = {id(original(module)) for _, module in parts if isinstance(module, gated)}
    operations_of = {id(part): spec for mixture in mixed for part, spec in mixture.specs()}
    attended = attended_parts(parts)
    for _, module in parts:
        if gates_its_output(module):
            operations_of[id(module)] = ATTENTION_GATE_SPEC
        spec = declared_operations(module)
        registered = type(module) in composite.modules
        if spec is None or registered or isinstance(module, GeneralizedComponent):
            continue
        if spec is ATTENTION_SPEC and id(module) in attended:
            continue  # its bridge has hook points for it
        if id(module) not in bridged or has_declared_class(module):
            operations_of.setdefault(id(module), spec)
    return operations_of


def _computes_itself(composite: Composite, mlp: GatedMLPBridge) -> bool:
    """Whether a gated MLP has its rules from its bridge: its class is not declared."""
    inner = original(mlp)
    return inner is not None and type(inner) not in composite.modules


def _wrapped(module: nn.Module, key: str) -> Any:
    child = module._modules.get(key)
    return None if child is None else original(child)
