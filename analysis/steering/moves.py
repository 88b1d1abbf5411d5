"""How the activations at a hook point move with the activation of one unit."""

from __future__ import annotations

import torch
from torch import Tensor

from lenslrp.analysis.units.kinds import Direction, Feature, Head, Neuron, Unit, require_unit
from lenslrp.analysis.units.recurrent import Channel, RecurrentHead
from lenslrp.errors import InputError


def moved(unit: Unit, x: Tensor, a: Tensor, change: Tensor) -> Tensor:
    """`x`, in which `unit` has activation `a`, with `change` added to it."""
    if isinstance(unit, Direction):
        vector = unit.vector.detach().to(x)
        return x + change[..., None] * (vector / vector.square().sum())
    if isinstance(unit, Feature):
        return unit.coder.moved(x, unit.index, change)
    assert isinstance(unit, Neuron | Channel | Head | RecurrentHead)
    y = x.clone()
    if isinstance(unit, Neuron | Channel):
        unit.activation(y).copy_(a + change)  # a view
        return y
    some = a > 0  # a head that writes nothing has no direction to be lengthened in
    ratio = torch.where(some, (a + change) / torch.where(some, a, 1.0), 1.0).detach()
    at = (...,) if unit.index is None else (..., unit.index, slice(None))
    y[at] = x[at] * ratio[..., None]
    return y


def step_length(unit: Unit) -> float:
    """How far `x` moves where a unit's activation changes by 1, times a coder's scale."""
    if isinstance(unit, Direction):
        return 1 / float(unit.vector.detach().double().norm())
    if isinstance(unit, Feature):
        return float(unit.coder.W_dec[unit.index].double().norm())
    return 1.0


def require_movable(unit: Unit) -> None:
    """Refuse a unit that cannot be moved.

    Raises:
        InputError: saying why.
    """
    require_unit(unit)
    if isinstance(unit, Neuron) and isinstance(unit.expert, int):
        raise InputError(
            f"{unit}: which expert sits in which slot is not known at its hook point, so an "
            "expert's neuron cannot be steered; written_by gives the direction that it writes"
        )
    if isinstance(unit, Direction) and not 0 < float(unit.vector.detach().norm()) < float("inf"):
        raise InputError(f"{unit} has no length or an infinite one: it points nowhere")
    if isinstance(unit, Feature) and unit.coder.hook_out is None and not unit.coder.writes_back:
        raise InputError(
            f"{unit}: its coder writes {unit.coder.W_dec.shape[1]} values a position and reads "
            f"{unit.coder.W_enc.shape[0]}: give it hook_out, the hook point that it writes"
        )
