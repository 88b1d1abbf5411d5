"""The scans of recurrent mixers: which functions and modules they are, and their arguments.

Scans are functions of transformers' modelling files, named alike in all families. A module whose
``forward`` calls one is a mixer; a new family needs a row here only where its function is new.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn
from transformer_lens.model_bridge.generalized_components.gated_delta_net import GatedDeltaNetBridge
from transformers.utils.import_utils import is_mambapy_available

from lenslrp.errors import CoverageError, InputError
from lenslrp.hooks.structure import NamedModules, original


@dataclass(frozen=True)
class Scan:
    """The arguments of a function that carries a state from token to token.

    Attributes:
        values: what the function is linear in.
        operator: what makes the linear operator.
        skip: a constant weight that the values are multiplied by past the state, all theirs.
        gate: what the function multiplies its output by.
        axis: of the positions.
        single: there is one position, without an axis.
    """

    values: str
    operator: tuple[str, ...]
    skip: str = ""
    gate: str = ""
    axis: int = 1
    single: bool = False


SELECTIVE = Scan("hidden_states", ("dt", "B", "C"), skip="D", gate="z")

SCANS: Mapping[str, Scan] = {
    "mamba_selective_scan": replace(SELECTIVE, axis=2),
    "mamba2_chunk_scan": SELECTIVE,
    "torch_chunk_gated_delta_rule": Scan("value", ("query", "key", "g", "beta")),
    "rwkv_linear_attention": Scan("value", ("key",)),
}
"""The scans of transformers' modelling files; a module whose ``forward`` calls one is a mixer."""

STEPS: Mapping[str, Scan] = {
    "mamba_selective_state_update": replace(SELECTIVE, single=True),
    "mamba2_selective_state_update": replace(SELECTIVE, single=True),
    "torch_recurrent_gated_delta_rule": SCANS["torch_chunk_gated_delta_rule"],
}
"""What goes on from a cached state by one position. Rules have nothing to say of it."""

WITH_HEADS = frozenset({"mamba2_chunk_scan", "torch_chunk_gated_delta_rule"})
"""The scans whose values are [batch, pos, head, channel]."""

DELTA_ATTRIBUTE = "chunk_gated_delta_rule"
"""Where TransformerLens looks first for the scan of a gated delta net that it computes itself."""

SCAN_MODULES = frozenset({"RecurrentGemmaRglru"})
"""Modules whose sigmoids, gates inside the state update, make the operator on their input."""

KEPT_STATES = frozenset({"recurrent_states", "conv1d_state"})
"""Attributes in which a module keeps the state of its last pass (RecurrentGemma)."""

OPERATOR_PARTS = frozenset(
    {
        *("x_proj", "dt_proj", "dt_layernorm", "b_layernorm", "c_layernorm"),
        *("in_proj_a", "in_proj_b", "in_proj_ba", "a_proj", "b_proj", "q_proj", "k_proj", "key"),
    }
)
"""Sub-modules of mixers that feed nothing but the operator."""


def mixers(parts: NamedModules) -> NamedModules:
    """The modules of a model that scan, under the component that runs their code."""
    bridged = {id(original(m)) for _, m in parts if isinstance(m, GatedDeltaNetBridge)}
    return [
        (path, module)
        for path, module in parts
        if (isinstance(module, GatedDeltaNetBridge) or scans_itself(module))
        and id(module) not in bridged
    ]


def mixer_roles(parts: NamedModules, recurrent: NamedModules) -> dict[int, str]:
    """What roles the parts of mixers have, by id: "" for those that never run as modules.

    Args:
        recurrent: the :func:`mixers` among them.

    Raises:
        CoverageError: TransformerLens would compute the scan itself.
    """
    roles: dict[int, str] = {}
    for path, module in parts:
        if vars(module).get("eager_scan", False):
            raise CoverageError(
                f"{path}: with eager_scan=True TransformerLens computes a scan of its own, which "
                "has no rule and is the model's to rounding only; set eager_scan=False"
            )
    for _, mixer in recurrent:
        inner = original(mixer) if isinstance(mixer, GatedDeltaNetBridge) else mixer
        for name, child in inner.named_children():
            if name in OPERATOR_PARTS:
                roles.update((id(part), "recurrence") for part in child.modules())
            elif name == "act":  # its function is called by name
                roles[id(child)] = ""
    called = any(type(module).__name__ in SCAN_MODULES for _, module in parts)
    for _, module in parts:
        if scans_itself(module) or (called and _calls_a_scan(module)):
            convolutions = (m for m in module.modules() if isinstance(m, nn.Conv1d))
            roles.update((id(part), "short_convolution") for part in convolutions)
    return roles


def heads_of(mixer: Any) -> int | None:
    """How many heads a mixer scans with; ``None`` where every channel has a scan of its own.

    Args:
        mixer: the module that has the weights.
    """
    if not _names(type(mixer).forward) & WITH_HEADS:
        return None
    return int(getattr(mixer, "num_v_heads", None) or mixer.num_heads)


def scans_itself(module: nn.Module) -> bool:
    """Whether a module's own code scans."""
    cls = type(module)
    if cls.__name__ in SCAN_MODULES:
        return True
    return cls.__module__.startswith("transformers.") and _scans(cls.forward)


def _calls_a_scan(module: nn.Module) -> bool:
    return any(type(child).__name__ in SCAN_MODULES for child in module.children())


@cache
def _scans(function: Callable[..., Any]) -> bool:
    return bool(_names(function) & SCANS.keys())


def _names(function: Callable[..., Any]) -> set[str]:
    """The global names that a function refers to, past its decorators."""
    return set(getattr(getattr(inspect.unwrap(function), "__code__", None), "co_names", ()))


def with_functions(function: FunctionType, functions: Mapping[str, Any]) -> FunctionType:
    """The same code with other functions behind some of its global names, past its decorators."""
    known, cells = {**function.__globals__, **functions}, function.__closure__ or ()
    inner = function.__dict__.get("__wrapped__")
    if inner is not None:
        ruled = CellType(with_functions(inner, functions))
        known = function.__globals__
        cells = tuple(ruled if cell.cell_contents is inner else cell for cell in cells)
    same = FunctionType(
        function.__code__, known, function.__name__, function.__defaults__, cells or None
    )
    same.__kwdefaults__ = function.__kwdefaults__
    return same


def require_torch_scan(path: str, mixer: Any) -> None:
    """Refuse scans of another package: their backward pass has one gradient, calculus's.

    Raises:
        CoverageError: naming the function and the package.
    """
    known = inspect.unwrap(type(mixer).forward).__globals__
    for name in sorted(_names(type(mixer).forward) & known.keys()):
        package = _kernel_of(known[name])
        if package:
            raise CoverageError(
                f"{path}: {name} of {type(mixer).__name__} would be computed by {package}, whose "
                "kernel has one backward pass, without rules; uninstall it, so that transformers "
                "computes the same in torch"
            )
    if getattr(mixer, "use_mambapy", False) and is_mambapy_available():
        raise CoverageError(
            f"{path}: the scan of {type(mixer).__name__} would be computed by mambapy, which has "
            "a backward pass of its own; set use_mambapy=False in the model's configuration"
        )


def require_whole_text(
    path: str, mixer: Any, bridged: bool, args: tuple[Any, ...], kwargs: Any
) -> None:
    """Refuse a pass that goes on from a cache: what came before it is no part of the graph.

    Args:
        mixer: Hugging Face's.
        bridged: TransformerLens computes it, unless there is a cache.
        args, kwargs: what it is called with.

    Raises:
        InputError: naming the mixer.
    """
    if torch.is_grad_enabled() and _goes_on(mixer, bridged, args, kwargs):
        raise InputError(
            f"{path}: {type(mixer).__name__} is given a cache, and what it holds of earlier tokens "
            "is out of reach of the rules; give the whole text in one pass, with use_cache=False"
        )


@cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    """Of a mixer's ``forward``, which every pass binds: looked at once a class."""
    return inspect.signature(forward)


def _goes_on(mixer: Any, bridged: bool, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Whether a mixer is given the state of earlier tokens, or a cache that leads past rules."""
    if type(mixer).__name__ in SCAN_MODULES:  # keeps the state itself; a text begins at 0
        return mixer.recurrent_states is not None and bool(args[1][:, 0].any())
    given = _signature(type(mixer).forward).bind_partial(mixer, *args, **kwargs).arguments
    cache, state = given.get("cache_params"), given.get("state")
    if cache is not None:
        return bridged or cache.has_previous_state(mixer.layer_idx)
    return state is not None and bool(state[1][:, :, mixer.layer_id].any())


def _kernel_of(function: Any) -> str:
    """The package whose code runs behind a function of transformers, "" for transformers' own."""
    while isinstance(function, FunctionType):
        kept = inspect.getclosurevars(function).nonlocals.get("implementation")
        module = getattr(kept, "__module__", None) or ""
        if kept is not None and not module.startswith("transformers."):
            return module.split(".")[0] or type(kept).__module__
        function = getattr(function, "__wrapped__", None)
    return ""
