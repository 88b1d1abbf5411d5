"""Recurrent mixers: a state that is carried from token to token.

A recurrent mixer is a linear operator on its values, given its operator: decays, keys, queries and
steps, which it computes from the same input (MambaLRP, Rezaei Jafari et al., NeurIPS 2024, for
Mamba). Under the constant rule the operator is a constant, so that the scan is a linear layer and
conserves relevance. Under the uniform rule values and operator get half each, once for the whole
scan: at every step, a value would be damped by 2 to the power of its distance. Within the operator
the gradient is the plain one; what it does not conserve is the ledger's ``recurrence`` term.

The scans are functions of transformers' modelling files (:mod:`lenslrp.hooks.scans`). While rules
are attached, a mixer's own ``forward`` runs with other functions behind those names, which hand the
model's own function its arguments apart from the graph, or in a region; the arithmetic is the
model's, call by call. What a mixer computes around its scan (a short convolution, activations, a
gate) is intercepted as in other modules (:mod:`lenslrp.hooks.operations`).
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.gated_delta_net import GatedDeltaNetBridge

from lenslrp.errors import InputError
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
from lenslrp.hooks.scan_points import ScanPoints, measured, points_of, shown
from lenslrp.hooks.scans import SCAN_MODULES, Scan, require_torch_scan, require_whole_text
from lenslrp.hooks.shown_scans import attach_scans, plain_scan
from lenslrp.hooks.sites import Site
from lenslrp.hooks.structure import original
from lenslrp.hooks.view_writes import note_write

MIXER_SPEC = Operations("recurrence_gate", leaks=("sigmoid", "softplus"), attention=False)
MIXER_SPECS: Mapping[str, Operations] = {
    # Receptance is a sigmoid on the output, as the gates of attention are.
    "RwkvSelfAttention": Operations("attention_gate", leaks=("sigmoid",), attention=False),
}


class RecurrenceIntercept(OperationIntercept):
    """Intercepts what one mixer computes around its scan, and gives the scan its rule.

    Args:
        recurrence, convolution: the sites of the scan and of the short convolution.
        points: the mixer's hook points.
        running: holds this while it runs.
    """

    def __init__(
        self,
        *args: Any,
        recurrence: Site,
        convolution: Site,
        points: ScanPoints,
        running: list[RecurrenceIntercept],
    ) -> None:
        super().__init__(*args)
        self.recurrence, self.convolution, self.points = recurrence, convolution, points
        self.left: Callable[[Tensor], Tensor] = torch.clone  # at the output of the scan that runs
        self.constant = product_shares(recurrence.rule)[0] == 0
        self.scanning = False
        self.skip: Tensor | None = None
        self.gate: Tensor | None = None  # what was activated last
        self.running = running
        running[:] = [self]

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self.gate, self.skip, self.left = None, None, torch.clone  # no graph outlives its pass here
        self.running.clear()

    def scan(self, function: Callable[..., Any], given: inspect.BoundArguments, form: Scan) -> Any:
        """What a scan returns, under its rule."""
        arguments, site = given.arguments, self.recurrence
        if not arguments[form.values].requires_grad:
            return plain_scan(function, given, form, self.points)
        values = self.seen(self.points.values, arguments[form.values], form.axis)
        first, second = product_shares(site.rule)
        arguments[form.values] = values if self.constant else enter(values, second, site)
        for name in form.operator:
            x = arguments[name]
            if x.requires_grad:
                arguments[name] = x.detach() if self.constant else enter(x, first, site)
        again = partial(scanned_again, function, detached(given), form, second)

        def left(y: Tensor) -> Tensor:
            y = measured(self.points, leave(y, site), values, values, again, site, form.axis)
            return self.seen(self.points.out, y, form.axis)

        self.left, self.scanning, self.skip = left, True, arguments.get(form.skip)
        out = function(*given.args, **given.kwargs)
        if not self.scanning:  # it gated its output itself
            return out
        self.scanning = False
        return (left(out[0]), *out[1:]) if isinstance(out, tuple) else left(out)

    def seen(self, point: HookPoint, x: Tensor, axis: int) -> Tensor:
        """As :func:`shown`; what a user's hook computes is no code of the mixer's."""
        self.depth[0] += 1
        x = shown(point, x, axis)
        self.depth[0] -= 1
        return x

    def intercept(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.scanning:
            if name == "silu" and args[0].requires_grad:
                return self.activation(func, args[0])
            if name in PRODUCT_FUNCTIONS and any(x is self.gate for x in args[:2]):
                self.scanning = False
                scanned, gate = args[:2] if args[1] is self.gate else args[1::-1]
                return self.product(self.left(scanned), gate)
            # Its operator is a constant, or measured as a whole: there is no other rule inside it.
            out = func(*(args if self.constant else self.skipped(name, args)), **kwargs)
            note_write(name, args, kwargs)
            return out
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


def detached(given: inspect.BoundArguments) -> inspect.BoundArguments:
    """The same arguments, apart from the graph."""
    apart = {
        name: x.detach() if isinstance(x, Tensor) else x for name, x in given.arguments.items()
    }
    return inspect.BoundArguments(given.signature, OrderedDict(apart))


def scanned_again(
    function: Callable[..., Any],
    given: inspect.BoundArguments,
    form: Scan,
    share: float,
    values: Tensor,
) -> Tensor:
    """The scan of other values by the same operator, before the gate, with the share of the values.

    What passes by the skip is all theirs.
    """

    def scan(**changed: Any) -> Tensor:
        arguments = {**given.arguments, form.values: values, **changed}
        if form.gate in arguments:
            arguments[form.gate] = None
        again = inspect.BoundArguments(given.signature, OrderedDict(arguments))
        out = function(*again.args, **again.kwargs)
        y: Tensor = out[0] if isinstance(out, tuple) else out
        return y

    whole = scan()
    if share == 1 or form.skip not in given.arguments:
        return whole * share
    return whole + scan(**{form.skip: None}) * (share - 1)


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
    points = points_of(module)
    mixer: Any = original(module) if isinstance(module, GatedDeltaNetBridge) else module
    bridged = mixer is not module
    at.pre_hook(
        module,
        lambda _, args, kwargs: require_whole_text(path, mixer, bridged, args, kwargs),
        with_kwargs=True,
    )
    if type(module).__name__ in SCAN_MODULES:
        attach_scans(at, path, module)
        attach_scan_module(at, module, site, points)
        return
    require_torch_scan(path, mixer)
    convolution = ctx.site(path, module, "short_convolution", Epsilon())
    running: list[RecurrenceIntercept] = []

    def ruled(function: Any, given: inspect.BoundArguments, form: Scan, _: ScanPoints) -> Any:
        if not running[0].intercepts():
            return plain_scan(function, given, form, points)
        return running[0].scan(function, given, form)

    attach_scans(at, path, module)
    at.setting(points, "ruled", ruled)
    attach_operations(
        at,
        ctx,
        path,
        module,
        MIXER_SPECS.get(type(mixer).__name__, MIXER_SPEC),
        mode=RecurrenceIntercept,
        recurrence=site,
        convolution=convolution,
        points=points,
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
        out = func(*args, **kwargs)
        note_write(name, args, kwargs)
        return out


def attach_scan_module(at: Attached, module: Any, site: Site, points: ScanPoints) -> None:
    """A module that computes values and operator from one input."""
    first, second = product_shares(site.rule)
    scan = module._rnn_scan
    given: dict[str, Any] = {}

    def noted(**arguments: Any) -> Any:
        given.update(arguments)
        return scan(**arguments)

    def call(run: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = shown(points.values, x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return shown(points.out, run(x, *args, **kwargs))
        with SigmoidIntercept(site):
            y = leave(run(enter(x, second, site) if first else x, *args, **kwargs), site)
        admitted = given["hidden_states"]
        operator = {k: v.detach() if isinstance(v, Tensor) else v for k, v in given.items()}
        given.clear()

        def again(values: Tensor) -> Tensor:
            out: Tensor = scan(**{**operator, "hidden_states": values})[0]
            return out * second

        return shown(points.out, measured(points, y, x, admitted, again, site))

    at.attribute(module, "_rnn_scan", noted)
    at.setting(points, "ruled", call)
