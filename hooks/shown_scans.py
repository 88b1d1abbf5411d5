"""The hook points of recurrent mixers in passes of the model as it is, without relevance rules.

A mixer's own ``forward`` runs with functions behind the names of its scans that call the hook
points of values and output on the way (:mod:`lenslrp.hooks.scan_points`), and the model's own
function between them: the arithmetic is the model's. Relevance rules have their say in the same
place (:mod:`lenslrp.hooks.recurrence`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from types import MethodType
from typing import Any

from torch import Tensor
from torch.nn import functional
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.gated_delta_net import GatedDeltaNetBridge

from lenslrp.errors import InputError
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.readers import ON_REQUEST, SCAN_HOOKS
from lenslrp.hooks.scan_points import ScanPoints, points_of, scan_points, shown
from lenslrp.hooks.scans import (
    DELTA_ATTRIBUTE,
    SCAN_MODULES,
    SCANS,
    STEPS,
    Scan,
    mixers,
    with_functions,
)
from lenslrp.hooks.structure import NamedModules, original


def show_scans(at: Attached, parts: NamedModules, names: Collection[str]) -> None:
    """Have those hook points of mixers called that are among ``names``, in every pass from now on.

    Raises:
        InputError: one that is made in a backward pass under rules, which no pass calls.
    """
    names = [name for name in names if name.endswith(SCAN_HOOKS)]
    for path, mixer in mixers(parts) if names else ():
        wanted = [name for name in scan_points([(path, mixer)]) if name in names]
        for name in wanted:
            if name.endswith(ON_REQUEST):
                raise InputError(
                    f"{name} is made of relevance in the backward pass: it can be read with "
                    "run_with_relevance, and there is no activation to read or edit"
                )
        if wanted:
            attach_scans(at, path, mixer)


def attach_scans(at: Attached, path: str, mixer: Any) -> None:
    """Have what computes a mixer's scan call its hook points, or the rules that are attached."""
    points = points_of(mixer)
    if points.shown:
        return
    at.setting(points, "shown", True)
    scanned: list[bool] = []  # in the pass that runs

    def around(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        scanned.clear()
        out = run(*args, **kwargs)
        seen = points.values._forward_hooks or points.out._forward_hooks
        if seen and not scanned and points.ruled is None:
            raise InputError(
                f"{path}: this pass goes on from a cached state, by code that has no hook points "
                "around its scan; run it without a cache (generate: use_past_kv_cache=False)"
            )
        return out

    if type(mixer).__name__ in SCAN_MODULES:

        def call(run: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if points.ruled is not None:
                ruled: Tensor = points.ruled(run, x, *args, **kwargs)
                return ruled
            return shown(points.out, run(shown(points.values, x), *args, **kwargs))

        at.around(mixer, call)
        return
    inner: Any = original(mixer) if isinstance(mixer, GatedDeltaNetBridge) else mixer
    known = inspect.unwrap(type(inner).forward).__globals__

    def handed(name: str, form: Scan) -> Callable[..., Any]:
        function = known[name]
        signature = inspect.signature(function)

        def scan(*args: Any, **kwargs: Any) -> Any:
            scanned.append(True)
            given = signature.bind(*args, **kwargs)
            ruled = points.ruled if name in SCANS else None
            return (ruled or plain_scan)(function, given, form, points)

        return scan

    forms = {**SCANS, **STEPS}
    functions = {name: handed(name, forms[name]) for name in forms.keys() & known.keys()}
    if inner is not mixer:
        at.attribute(inner, DELTA_ATTRIBUTE, functions[f"torch_{DELTA_ATTRIBUTE}"])
    # Where accelerate moves the inputs, the model's own forward is the one that it calls.
    name = "_old_forward" if "_old_forward" in inner.__dict__ else "forward"
    run = getattr(inner, name)
    at.attribute(inner, name, MethodType(with_functions(run.__func__, functions), inner))
    at.around(mixer, around, name if inner is mixer else "forward")


def plain_scan(
    function: Callable[..., Any], given: inspect.BoundArguments, form: Scan, points: ScanPoints
) -> Any:
    """What a scan returns, as the model computes it, past the hook points."""
    arguments = given.arguments
    arguments[form.values] = _seen(points.values, arguments[form.values], form)
    gate = arguments.get(form.gate) if points.out._forward_hooks else None
    if gate is not None:
        arguments[form.gate] = None
    out = function(*given.args, **given.kwargs)
    y, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
    y = _seen(points.out, y, form)
    if gate is not None:
        y = y * functional.silu(gate)
    return y if rest is None else (y, *rest)


def _seen(point: HookPoint, x: Tensor, form: Scan) -> Tensor:
    return shown(point, x[:, None])[:, 0] if form.single else shown(point, x, form.axis)
