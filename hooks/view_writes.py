"""Writes into views: what one hides, and how those that are known are said on the graph.

A write into a view (``y[..., :4] = z``, ``y[0].tanh_()``) is one node of the autograd graph,
``CopySlices``, whatever was written. Only the call that writes tells what that was.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

VIEW_WRITES = frozenset({"CopySlices"})
"""Graph nodes of writes into views."""

LINEAR_IN_PLACE_FUNCTIONS = frozenset(
    {
        "__iadd__", "__isub__", "__setitem__", "add_", "copy_", "fill_", "fill_diagonal_",
        "index_add_", "index_copy_", "index_fill_", "index_put_", "masked_fill_",
        "masked_scatter_", "neg_", "scatter_add_", "sub_", "zero_",
    }
)  # fmt: skip
"""In-place functions that are linear in the tensor written to and in what is written."""

SCALING_FUNCTIONS = frozenset({"__imul__", "__itruediv__", "div_", "divide_", "mul_", "multiply_"})
"""In-place functions that are linear while only one factor is on the graph."""

_LINEAR = "lenslrp: linear"


def is_linear_write(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an in-place function is linear in what is on the graph."""
    if name in SCALING_FUNCTIONS:
        return not any(isinstance(x, Tensor) and x.requires_grad for x in args[1:])
    return name in LINEAR_IN_PLACE_FUNCTIONS and "reduce" not in kwargs


def node_of_write(x: Tensor) -> Any:
    """The node of the write into a view that a tensor has just seen, or ``None``."""
    node = (x if x._base is None else x._base).grad_fn
    return node if type(node).__name__ in VIEW_WRITES else None


def note_write(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Say on the graph that what has just been written is linear, where it is.

    The note is on the node itself, and lives as long.
    """
    node = node_of_write(args[0]) if name in LINEAR_IN_PLACE_FUNCTIONS else None
    if node is not None and is_linear_write(name, args, kwargs):
        node.metadata[_LINEAR] = True


def is_noted(node: Any) -> bool:
    """Whether the code that wrote was intercepted, and the write is linear."""
    return _LINEAR in node.metadata
