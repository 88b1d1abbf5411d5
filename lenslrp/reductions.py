"""What to keep of each hook's relevance, decided the moment it is formed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lenslrp.errors import InputError
from lenslrp.hooks.sites import dots, widened
from lenslrp.hooks.structure import layer_of

Reducer = Callable[[Tensor], Tensor]
Reduce = str | Reducer | Mapping[str, str | Reducer | None] | None


@dataclass(frozen=True)
class OverFeatures:
    """Sum over the last axis: per token, per head and token, or per query."""

    def __call__(self, relevance: Tensor) -> Tensor:
        return relevance.sum(dim=-1)

    def of_product(self, x: Tensor, g: Tensor, masked: bool) -> Tensor:
        """The same from activation and gradient, without a tensor for their product."""
        return dots(x, g, masked=masked)


def over_positions(relevance: Tensor) -> Tensor:
    """Sum over the token axis: per neuron or per head feature, [batch, ...]."""
    return relevance.sum(dim=1)


@dataclass(frozen=True)
class TopK:
    """Keep the k largest by absolute value along the last axis and set the others to zero.

    For ``reduce=``: relevance of a whole model then takes little memory.

    Args:
        k: how many entries are kept of each position.

    Examples:
        >>> lenslrp.TopK(1)(torch.tensor([[1.0, -3.0, 2.0]])).to_dense()
        tensor([[ 0., -3.,  0.]])
    """

    k: int

    def __call__(self, relevance: Tensor) -> Tensor:
        """A sparse tensor of the same shape."""
        k = min(self.k, relevance.shape[-1])
        index = relevance.abs().topk(k, dim=-1).indices
        largest = torch.zeros_like(relevance).scatter(-1, index, relevance.gather(-1, index))
        return largest.to_sparse()


REDUCTIONS: Mapping[str, Reducer | None] = {
    "none": None,
    "sum": OverFeatures(),
    "sum_positions": over_positions,
}


def check_reduce(reduce: Reduce, hooks: Iterable[str]) -> None:
    """Refuse a reduction that does not exist, or one for a hook that does not.

    Raises:
        InputError: naming the choices, or the nearest hooks.
    """
    if not isinstance(reduce, Mapping):
        _one(reduce)
        return
    names = list(hooks)
    for key, value in reduce.items():
        _one(value)
        if key != "*" and not any(name == key or name.endswith("." + key) for name in names):
            ends = {name.split(".", 2)[2] for name in names if layer_of(name) is not None}
            near = difflib.get_close_matches(str(key), [*ends, *names], n=3)
            raise InputError(f"reduce names no hook point: {key!r}; nearest: {', '.join(near)}")


def _one(reduce: str | Reducer | None) -> Reducer | None:
    if isinstance(reduce, str) and reduce in REDUCTIONS:
        return REDUCTIONS[reduce]
    if reduce is None or callable(reduce):
        return reduce
    raise InputError(f"reduce must be one of {', '.join(REDUCTIONS)} or a function: {reduce!r}")


def reduction_for(reduce: Reduce, name: str) -> Reducer | None:
    """The reducer for one hook name.

    In a dict, a key is a whole hook name, its end (``"mlp.hook_post"``), or ``"*"`` for all others.

    Raises:
        InputError: a name of a reduction that does not exist.
    """
    if isinstance(reduce, Mapping):
        keys = [key for key in reduce if name == key or name.endswith("." + key)]
        return reduction_for(reduce[max(keys, key=len)] if keys else reduce.get("*"), name)
    return _one(reduce)


def reduction_names(reducers: Mapping[str, Reducer | None], names: Iterable[str]) -> dict[str, str]:
    """By hook name, what to call a reduction: ``"sum"``, ``"sum_positions"`` or ``"custom"``.

    Hooks whose values keep all of their axes are left out.
    """
    by_name = {name: reducers.get(name) for name in names}
    called: dict[int, str] = {}
    for reducer in {id(reducer): reducer for reducer in by_name.values()}.values():
        if reducer is not None and not isinstance(reducer, TopK):
            known = (name for name, one in REDUCTIONS.items() if one == reducer)
            called[id(reducer)] = next(known, "custom")
    return {name: called[id(r)] for name, r in by_name.items() if id(r) in called}


class Deliver:
    """A reduction that hands relevance on and keeps nothing of it."""

    def __init__(self, deliver: Callable[[Tensor, Tensor], None]) -> None:
        self.deliver = deliver

    def of_product(self, x: Tensor, g: Tensor, masked: bool) -> Tensor:
        self.deliver(widened(x), widened(g))
        return x.new_zeros(())

    def __call__(self, relevance: Tensor) -> Tensor:
        raise AssertionError("readers prefer of_product")
