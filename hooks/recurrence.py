"""Recurrent mixers: a state that is carried from token to token.

A recurrent mixer is a linear operator on its values, given its operator: decays, keys, queries and
steps, which it computes from the same input (MambaLRP, Rezaei Jafari et al., NeurIPS 2024, for
Mamba). Under the constant rule the operator is a constant, so that the scan is a linear layer and
conserves relevance. Under the uniform rule values and operator get half each, once for the whole
scan: at every step, a value would be damped by 2 to the power of its distance. Within the operator
the gradient is the plain one; what it does not conserve is the ledger's ``recurrence`` term.

The scans are functions of transformers' modelling files. While rules are attached, a mixer's own
``forward`` runs with other functions behind those names (:func:`with_functions`), which hand the
model's own function its arguments apart from the graph, or in a region; the arithmetic is the
model's, call by call. What a mixer computes around its scan (a short convolution, activations, a
gate) is intercepted as in other modules (:mod:`lenslrp.hooks.operations`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components.gated_delta_net import GatedDeltaNetBridge
from transformers.utils.import_utils import is_mambapy_available

from lenslrp.errors import CoverageError, InputError
from lenslrp.hooks import functions as F
from lenslrp.hooks.constants import measure_bias
from lenslrp.hooks.context import Context
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.intercept import Intercept
from lenslrp.hooks.linear_rules import Epsilon
from lenslrp.hooks.operations import (
    CONVOLUTION_FUNCTIONS,
    PRODUCT_FUNCTIONS,
    OperationIntercept,
    attach_operations,
)
from lenslrp.hooks.rule_types import Operations, Plain, product_shares
from lenslrp.hooks.sites import Site
from lenslrp.hooks.structure import NamedModules, original


@dataclass(frozen=True)
class Scan:
    """The arguments of a function that carries a state from token to token.

    Attributes:
        values: what the function is linear in.
        operator: what makes the linear operator.
        skip: a constant weight that the values are multiplied by past the state, all theirs.
    """

    values: str
    operator: tuple[str, ...]
    skip: str = ""


SELECTIVE = Scan("hidden_states", ("dt", "B", "C"), skip="D")
DELTA_RULE = Scan("value", ("query", "key", "g", "beta"))

SCANS: Mapping[str, Scan] = {
    "mamba_selective_scan": SELECTIVE,
    "mamba_selective_state_update": SELECTIVE,
    "mamba2_chunk_scan": SELECTIVE,
    "mamba2_selective_state_update": SELECTIVE,
    "torch_chunk_gated_delta_rule": DELTA_RULE,
    "torch_recurrent_gated_delta_rule": DELTA_RULE,
    "rwkv_linear_attention": Scan("value", ("key",)),
}
"""The scans of transformers' modelling files; a module whose ``forward`` calls one is a mixer."""

DELTA_ATTRIBUTE = "chunk_gated_delta_rule"
"""Where TransformerLens looks first for the scan of a gated delta net that it computes itself."""

SCAN_MODULES = frozenset({"RecurrentGemmaRglru"})
"""Modules whose sigmoids, gates inside the state update, make the operator on their input."""

OPERATOR_PARTS = frozenset(
    {
        *("x_proj", "dt_proj", "dt_layernorm", "b_layernorm", "c_layernorm"),
        *("in_proj_a", "in_proj_b", "in_proj_ba", "a_proj", "b_proj", "q_proj", "k_proj", "key"),
    }
)
"""Sub-modules of mixers that feed nothing but the operator."""

MIXER_SPEC = Operations("recurrence_gate", leaks=("sigmoid", "softplus"), attention=False)
MIXER_SPECS: Mapping[str, Operations] = {
    # Receptance is a sigmoid on the output, as the gates of attention are.
    "RwkvSelfAttention": Operations("attention_gate", leaks=("sigmoid",), attention=False),
}


def mixers(parts: NamedModules) -> NamedModules:
    """The modules of a model that scan, under the component that runs their code."""
    bridged = {id(original(m)) for _, m in parts if isinstance(m, GatedDeltaNetBridge)}
    return [
        (path, module)
        for path, module in parts
        if (isinstance(module, GatedDeltaNetBridge) or _scans(module)) and id(module) not in bridged
    ]


def mixer_roles(parts: NamedModules) -> dict[int, str]:
    """What roles the parts of mixers have, by id: "" for those that never run as modules.

    Raises:
        CoverageError: TransformerLens would compute the scan itself.
    """
    roles: dict[int, str] = {}
    for path, module in parts:
        if getattr(module, "eager_scan", False):
            raise CoverageError(
                f"{path}: with eager_scan=True TransformerLens computes a scan of its own, which "
                "has no rule and is the model's to rounding only; set eager_scan=False"
            )
    for _, mixer in mixers(parts):
        inner = original(mixer) if isinstance(mixer, GatedDeltaNetBridge) else mixer
        for name, child in inner.named_children():
            if name in OPERATOR_PARTS:
                roles.update((id(part), "recurrence") for part in child.modules())
            elif name == "act":  # its function is called by name
                roles[id(child)] = ""
    for _, module in parts:
        if _scans(module) or any(type(m).__name__ in SCAN_MODULES for m in module.children()):
            convolutions = (m for m in module.modules() if isinstance(m, nn.Conv1d))
            roles.update((id(part), "short_convolution") for part in convolutions)
    return roles


def _scans(module: nn.Module) -> bool:
    cls = type(module)
    if cls.__name__ in SCAN_MODULES:
        return True
    return cls.__module__.startswith("transformers.") and bool(_names(cls.forward) & SCANS.keys())


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


class RecurrenceIntercept(OperationIntercept):
    """Intercepts what one mixer computes around its scan, and gives the scan its rule.

    Args:
        recurrence, convolution: the sites of the scan and of the short convolution.
        running: holds this while it runs.
    """

    def __init__(
        self, *args: Any, recurrence: Site, convolution: Site, running: list[RecurrenceIntercept]
    ) -> None:
        super().__init__(*args)
        self.recurrence, self.convolution = recurrence, convolution
        self.constant = product_shares(recurrence.rule)[0] == 0
        self.scanning = False
        self.skip: Tensor | None = None
        self.gate: Tensor | None = None  # what was activated last
        self.running = running
        running[:] = [self]

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.gate = self.skip = None  # no graph outlives its pass here
        self.running.clear()

    def scan(self, function: Callable[..., Any], given: inspect.BoundArguments, form: Scan) -> Any:
        """What a scan returns, under its rule."""
        values, arguments = given.arguments[form.values], given.arguments
        if not values.requires_grad:
            return function(*given.args, **given.kwargs)
        first, second = product_shares(self.recurrence.rule)
        if not self.constant:
            arguments[form.values] = enter(values, second, self.recurrence)
        for name in form.operator:
            x = arguments[name]
            if x.requires_grad:
                arguments[name] = x.detach() if self.constant else enter(x, first, self.recurrence)
        self.scanning, self.skip = True, arguments.get(form.skip)
        out = function(*given.args, **given.kwargs)
        if not self.scanning:  # it gated its output itself
            return out
        self.scanning = False
        if isinstance(out, tuple):
            return (leave(out[0], self.recurrence), *out[1:])
        return leave(out, self.recurrence)

    def intercept(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.scanning:
            if name == "silu" and args[0].requires_grad:
                return self.activation(func, args[0])
            if name in PRODUCT_FUNCTIONS and any(x is self.gate for x in args[:2]):
                self.scanning = False
                scanned, gate = args[:2] if args[1] is self.gate else args[1::-1]
                return self.product(leave(scanned, self.recurrence), gate)
            if not self.constant:
                return func(*self.skipped(name, args), **kwargs)
        if name in CONVOLUTION_FUNCTIONS:
            out = func(*args, **kwargs)
            bias = kwargs.get("bias", args[2] if len(args) > 2 else None)
            measure_bias(out, bias, self.convolution, 1 - out.ndim)
            return out
        return super().intercept(func, name, args, kwargs)

    def skipped(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The factors of a product with the weight of the skip: values get all of its gradient."""
        second = product_shares(self.recurrence.rule)[1]
        if name not in PRODUCT_FUNCTIONS or not any(_is_of(x, self.skip) for x in args):
            return args
        return tuple(
            F.shared(x, 1 / second, self.recurrence) if x.requires_grad else x for x in args
        )

    def activation(self, act: Callable[..., Tensor], x: Tensor, **options: Any) -> Tensor:
        self.gate = super().activation(act, x, **options)
        return self.gate

    def product(self, a: Tensor, b: Tensor, multiply: Callable[..., Tensor] = torch.mul) -> Tensor:
        """A gate's, whose factor has just been activated; any other is no product that we know."""
        if any(x is self.gate for x in (a, b)):
            return super().product(a, b, multiply)
        return multiply(a, b)

    def leak(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """A sigmoid or softplus of the operator, which a constant operator leaves off the path."""
        if self.spec is not MIXER_SPEC:
            self.gate = super().leak(function, *inputs)
            return self.gate
        if self.constant:
            return function(*inputs)
        return leave(function(*(enter(x, 1.0, self.recurrence) for x in inputs)), self.recurrence)


def _is_of(x: Any, whole: Tensor | None) -> bool:
    """Whether a tensor is another, or a view of it."""
    return whole is not None and isinstance(x, Tensor) and (x is whole or x._base is whole)


def enter(x: Tensor, share: float, site: Site) -> Tensor:
    """An input of a scan's region, with its share of the gradient."""
    return F.shared(F.apply(F.RegionInput, x, _term(site), site), share, site)


def leave(y: Tensor, site: Site) -> Tensor:
    """The output of a scan: of its region, or of a linear operator that is constant."""
    if not y.requires_grad:
        return y
    first, second = product_shares(site.rule)
    if first == 0:
        return F.apply(F.ProductOutput, y, first, second, site)
    return F.apply(F.RegionOutput, y, None, _term(site), site)


def _term(site: Site) -> str:
    return "plain" if isinstance(site.rule, Plain) else "recurrence"


def attach_recurrence(at: Attached, ctx: Context, path: str, module: nn.Module) -> None:
    """Give a mixer's scan its rule, and the operations around it theirs.

    Raises:
        CoverageError: a fused kernel would run.
        InputError: a rule that gives the values no share.
    """
    site = ctx.site(path, module, "recurrence")
    if product_shares(site.rule)[1] == 0:
        raise InputError("a recurrence rule must give the values a share; this one has second=0")
    at.sites.append(site)
    if type(module).__name__ in SCAN_MODULES:
        attach_scan_module(at, module, site)
        return
    mixer: Any = original(module) if isinstance(module, GatedDeltaNetBridge) else module
    require_torch_scan(path, mixer)
    convolution = ctx.site(path, module, "short_convolution", Epsilon())
    running: list[RecurrenceIntercept] = []
    known = inspect.unwrap(type(mixer).forward).__globals__

    def ruled(name: str) -> Callable[..., Any]:
        function = known[name]
        signature = inspect.signature(function)

        def scan(*args: Any, **kwargs: Any) -> Any:
            if not running[0].intercepts():
                return function(*args, **kwargs)
            return running[0].scan(function, signature.bind(*args, **kwargs), SCANS[name])

        return scan

    scans = {name: ruled(name) for name in SCANS.keys() & known.keys()}
    if mixer is not module:
        at.attribute(mixer, DELTA_ATTRIBUTE, scans[f"torch_{DELTA_ATTRIBUTE}"])
    else:
        # Where accelerate moves the inputs, the model's own forward is the one that it calls.
        name = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
        run = getattr(module, name)
        at.attribute(module, name, MethodType(with_functions(run.__func__, scans), module))
    attach_operations(
        at,
        ctx,
        path,
        module,
        MIXER_SPECS.get(type(mixer).__name__, MIXER_SPEC),
        mode=RecurrenceIntercept,
        recurrence=site,
        convolution=convolution,
        running=running,
    )


class SigmoidIntercept(Intercept):
    """Gives the sigmoids of a module that scans, its operator, their share."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    def intercept(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "sigmoid":
            first, second = product_shares(self.site.rule)
            return func(F.shared(args[0], first / second, self.site))
        return func(*args, **kwargs)


def attach_scan_module(at: Attached, module: nn.Module, site: Site) -> None:
    """A module that computes values and operator from one input, and keeps its last state."""
    at.attribute(module, "recurrent_states", getattr(module, "recurrent_states", None))
    first, second = product_shares(site.rule)

    def call(run: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return run(x, *args, **kwargs)
        with SigmoidIntercept(site):
            return leave(run(enter(x, second, site) if first else x, *args, **kwargs), site)

    at.around(module, call)


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


def _kernel_of(function: Any) -> str:
    """The package whose code runs behind a function of transformers, "" for transformers' own."""
    while isinstance(function, FunctionType):
        kept = inspect.getclosurevars(function).nonlocals.get("implementation")
        module = getattr(kept, "__module__", None) or ""
        if kept is not None and not module.startswith("transformers."):
            return module.split(".")[0] or type(kept).__module__
        function = getattr(function, "__wrapped__", None)
    return ""
