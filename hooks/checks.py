"""Whether a module computes what its rule supposes, seen by running it.

A rule in the place of a module's own backward pass holds for one form only: an activation maps each
number by itself and 0 to 0 ([A] Eq. 9); a norm multiplies each position by one scale, and each
feature by one gain ([A] Prop. 3.4). The name of a class proves neither. So the module is run on its
real input beside others: what is elsewhere must not matter, and the form must hold for all rows.

Modules whose code is torch's or transformers' are tried once; a user's at every forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lenslrp.errors import InputError, is_out_of_memory
from lenslrp.hooks import functions as F
from lenslrp.hooks.rule_types import Identity, Limited, Normalisation
from lenslrp.hooks.rules import inverse_rms
from lenslrp.hooks.sites import Site, has_values, widened
from lenslrp.hooks.structure import TRUSTED_PACKAGES

ModuleForward = Callable[[Tensor], Tensor]

ZERO_TOLERANCE = 1e-5
"""How far from 0 an activation's value at 0 may be (xIELU's is 1e-6)."""

TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-6,  # some modules compute in float32 whatever the model's type
    torch.float32: 1e-5,
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
}
"""How far apart, relatively, what a module returns twice for one number may be: two units of the
last place in the half types. Of numbers below a hundredth of the largest, a hundredth of that."""

FORMS = ("exact", "nearly", "weight", "1 + weight")
"""How a module can fit its rule: ``"nearly"`` where it is not quite 0 at 0. The last two are the
gain of a norm that divides by the root mean square, all of whose form is known."""

EPSILON_NAMES = ("variance_epsilon", "eps")
"""What such norms call the number that is added to the mean square."""

_proven: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def known_forward(module: nn.Module) -> Any:
    """The forward of a module's class, ``None`` where the instance has been given another.

    accelerate's, which moves inputs, and TransformerLens' own (Falcon) do not count.
    """
    forward = module.__dict__.get("forward")
    if forward is None or hasattr(module, "_hf_hook"):
        return type(module).forward
    theirs = str(getattr(forward, "__module__", "")).startswith("transformer_lens.")
    return type(module).forward if theirs else None


def _tried(module: nn.Module, run: ModuleForward, check: Callable[[], str]) -> str:
    """The outcome of a check, one of :data:`FORMS` or "", remembered where the code is known."""
    code, known = getattr(run, "__func__", None), _has_trusted_code(module, run)
    if known and module in _proven and _proven[module][0] is code:
        return _proven[module][1]
    try:
        with torch.no_grad():
            form = check()
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return ""  # it takes inputs of one kind only
    if form and known:
        _proven[module] = (code, form)
    return form


def _has_trusted_code(module: nn.Module, run: ModuleForward) -> bool:
    code = getattr(run, "__func__", None)  # of a method; a function on the instance is anyone's
    return code is type(module).forward and code.__module__.startswith(TRUSTED_PACKAGES)


def norm_form(
    module: nn.Module,
    run: ModuleForward,
    x: Tensor,
    y: Tensor,
    rule: Normalisation,
    bias: Tensor | None,
) -> str:
    """Whether ``run`` is a norm of the form that ``rule`` describes, position by position.

    Args:
        module: whose forward it is.
        run: that forward, past any rule.
        x, y: an input and what the module returned for it, [..., pos, features].
        bias: [features], of the module.

    Returns:
        One of :data:`FORMS`, or "".
    """
    gains = [] if rule.centred or not _has_trusted_code(module, run) else [*FORMS[2:]]
    gains = gains if norm_epsilon(module) and hasattr(module, "weight") else []
    if not has_values(x):
        return next(iter(gains), "exact")
    if y.shape != x.shape or x.ndim < 2:
        return ""

    def check() -> str:
        a, b = _finite(run, x, y)
        fits = rule.fits(a, b, bias) and all(
            _close(out[region], b) and rule.fits(both, out, bias)
            for both, region, out in _among_others(run, a)
        )
        if not (gains and fits):
            return "exact" if fits else ""
        # Also where the mean square is as small as what is added to it.
        low = a * inverse_rms(widened(a), 0.0).to(a.dtype) * norm_epsilon(module) ** 0.5
        pairs = [(a, b), (low, run(low.clone()))]
        alike = (f for f in gains if all(_close(_scaled(module, f, a), b) for a, b in pairs))
        return next(alike, "exact")

    return _tried(module, run, check)


def _finite(run: ModuleForward, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output with other values at positions that overflowed, which tell nothing."""
    finite = x.isfinite().all(dim=-1, keepdim=True)
    if bool(finite.all()):
        return x, y
    x = torch.where(finite, x, torch.ones_like(x))
    return x, torch.where(finite, y, run(x.clone()))


def norm_epsilon(module: nn.Module) -> float:
    """What a norm adds to the mean square, 0 where that is not known."""
    values = (getattr(module, name) for name in EPSILON_NAMES if hasattr(module, name))
    return float(next(values, None) or 0.0)


def gain_of(module: Any, form: str) -> Tensor | None:
    """The gain of a norm of one of the last two :data:`FORMS`, [features]."""
    weight: Tensor | None = module.weight
    return weight if weight is None or form == "weight" else 1.0 + widened(weight)


def _scaled(module: nn.Module, form: str, x: Tensor) -> Tensor:
    gain, wide = gain_of(module, form), widened(x)
    y = wide * inverse_rms(wide, norm_epsilon(module))
    return (y if gain is None else y * gain).to(x.dtype)


def _among_others(
    run: ModuleForward, x: Tensor
) -> Iterator[tuple[Tensor, tuple[slice, ...], Tensor]]:
    """``x`` before and after other rows, along each leading dimension, through the module."""
    for dim in range(x.ndim - 1):
        for first in (True, False):
            noise = _noise(x)
            both = torch.cat([x, noise] if first else [noise, x], dim=dim)
            start = 0 if first else x.shape[dim]
            region = [slice(None)] * x.ndim
            region[dim] = slice(start, start + x.shape[dim])
            yield both, tuple(region), run(both.clone())


def form_of(module: nn.Module, run: ModuleForward, x: Tensor, y: Tensor) -> str:
    """Whether ``run`` maps each number by itself, and 0 to 0: one of :data:`FORMS`, or "".

    Arguments as for :func:`norm_form`.
    """
    if not has_values(x):
        return "exact"
    if y.shape != x.shape:
        return ""

    def check() -> str:
        at_zero = run(torch.zeros_like(x)).abs().max()
        kept = torch.rand(x.shape, generator=_generator()).to(x.device) < 0.5
        for mask in (kept, ~kept):
            # Laid out in memory as x is: rounding goes by it (erf of float32 in a vector or alone).
            out = run(torch.empty_like(x).copy_(torch.where(mask, x, _noise(x))))
            if at_zero > ZERO_TOLERANCE or not _close(out[mask], y[mask]):
                return ""
        return "nearly" if at_zero > 0 else "exact"

    return _tried(module, run, check)


def limited_rule(run: ModuleForward, rule: Identity, x: Tensor) -> Identity:
    """The rule for a module whose value at 0 is not quite 0, with a factor that stays bounded."""
    with torch.no_grad():
        below, above = (run(torch.full_like(x, end)) / end for end in (-Limited.near, Limited.near))
    return Limited(rule.eps, rule.name, below, above)


def elementwise(
    module: nn.Module, rule: Identity, site: Site, *, declared: bool = False
) -> Callable[[Tensor, Tensor], Tensor | None]:
    """What :meth:`Attached.wrap` needs to put ``rule`` in the place of an activation.

    Raises (when it is called):
        InputError: the composite has declared the module's class, and it is no such function.
    """
    run, slimmest = module.forward, F.slimmest(rule, known_forward(module))

    def apply(x: Tensor, y: Tensor) -> Tensor | None:
        form = form_of(module, run, x.detach(), y)
        if form:
            fitting_rule = limited_rule(run, rule, x.detach()) if form == "nearly" else slimmest
            return F.apply(F.Elementwise, x, y, fitting_rule, site)
        if not declared:
            return None
        raise InputError(
            f"{site.hook}: {type(module).__name__} does not map each number by itself and 0 to 0, "
            f"as {type(rule).__name__}() says; declare it with Operations() or Plain()"
        )

    return apply


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _noise(x: Tensor) -> Tensor:
    size = x.abs().mean().clamp(min=1e-3)
    return torch.randn(x.shape, generator=_generator()).to(x.device, x.dtype) * size


def _close(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0:
        return True
    near = TOLERANCE[b.dtype]
    least = near * 1e-2 * float(b.abs().nan_to_num().max())
    # NaN at the same places: what a padded row computes is nobody's input.
    return bool(torch.isclose(a, b, rtol=near, atol=least, equal_nan=True).all())
