"""What earlier passes of a model have shown, so that a later one need not look again.

Kept with the model, and forgotten when its hooks change. Whether the books of a graph balance is
known by the operations in it; what its code cuts off the graph, by the hooks that were there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from lenslrp.hooks.graph_walk import Walk

GRAPHS = 64
"""How many graphs of a model are remembered."""


@dataclass
class Seen:
    """What a walk over a graph has shown.

    Attributes:
        sites: which rules are on the path, by their place among all.
        kind: what the graph is made of.
        writes: something is written into a view.
        uses: how often that was taken for granted since.
    """

    sites: frozenset[int]
    kind: Any
    writes: bool
    uses: int = 0


@dataclass
class Remembered:
    """One model's past passes.

    Attributes:
        hooks: the hooks, and forward passes of single modules, that it had.
        cuts: where values were cut off the graph; ``None`` before anybody has looked.
        balanced: the graphs whose books have been found to balance.
        walked: what was found in graphs of code that does the same at every call.
    """

    hooks: int = 0
    cuts: list[str] | None = None
    balanced: set[Any] = field(default_factory=set)
    walked: dict[Any, Seen] = field(default_factory=dict)

    def keep(self, key: Any, seen: Seen) -> None:
        """Remember what a walk has shown, unless nothing tells such a graph from another."""
        if key is not None:
            if len(self.walked) >= GRAPHS:
                self.walked.clear()
            self.walked[key] = seen


_models: WeakKeyDictionary[nn.Module, Remembered] = WeakKeyDictionary()


def remembered(model: nn.Module, hooks: int) -> Remembered:
    """What is known of a model with the hooks that it had before rules were attached."""
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
