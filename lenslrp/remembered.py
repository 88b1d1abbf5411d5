"""What earlier passes of a model have shown, so that a later one need not look again.

Kept with the model, and forgotten when its hooks change. Whether the books of a graph balance is
known by the operations in it; what its code cuts off the graph, by the hooks that were there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from lenslrp.hooks.coverage import Walk


@dataclass
class Remembered:
    """One model's past passes.

    Attributes:
        hooks: the hooks, and forward passes of single modules, that it had.
        cuts: where values were cut off the graph; ``None`` before anybody has looked.
        balanced: the graphs whose books have been found to balance.
    """

    hooks: int = 0
    cuts: list[str] | None = None
    balanced: set[Any] = field(default_factory=set)


_models: WeakKeyDictionary[nn.Module, Remembered] = WeakKeyDictionary()


def remembered(model: nn.Module, parts: Sequence[tuple[str, nn.Module]]) -> Remembered:
    """What is known of a model with the hooks that it has now; called before rules are attached."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    own = ((id(part), *(key for kind in kinds for key in getattr(part, kind))) for _, part in parts)
    hooks = hash((*own, *(id(part.__dict__.get("forward")) for _, part in parts)))
    known = _models.get(model)
    if known is None or known.hooks != hooks:
        known = _models[model] = Remembered(hooks)
    return known


_conditional: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@contextmanager
def conditional(model: nn.Module) -> Iterator[None]:
    """Inside the block gradients are masked on purpose, so that no account can add up."""
    _conditional[model] = _conditional.get(model, 0) + 1
    try:
        yield
    finally:
        _conditional[model] -= 1


def is_conditional(model: nn.Module) -> bool:
    """Whether a block of :func:`conditional` is open."""
    return _conditional.get(model, 0) > 0


def kind_of(found: Walk, *conditions: Any) -> Any:
    """A graph by its operations, whatever the length of the input, and what it was made under."""
    operations = Counter(type(node).__name__ for node in found.nodes.values())
    return (*conditions, frozenset(operations.items()))
