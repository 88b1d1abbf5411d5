"""Watching a forward pass for what the autograd graph does not show.

The graph hides two things. A write into a view (``y[..., :4] = z``, ``y[0].tanh_()``) is one node,
``CopySlices``, whatever was written; and a value that is cut off (``detach``, ``.data``,
``no_grad``) leaves no node at all. Both are seen by the call that does them.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lenslrp.hooks.intercept import Intercept
from lenslrp.hooks.structure import NamedModules
from lenslrp.hooks.view_writes import is_linear_write, node_of_write

DETACHING = frozenset({"detach", "detach_"})

INTERCEPTING_FUNCTIONS = frozenset({"intercept", "__torch_function__"})
"""Functions that hand on a call that they have intercepted."""


class Observer(Intercept):
    """Notes writes into views and values that are cut off, while a model runs.

    Args:
        parts: the model's modules by name, to say where a cut is.

    Attributes:
        writes: id of a ``CopySlices`` node -> the operation that it hides, "" where that is linear.
        touched: how often code other than LensLRP's has reached for a gradient (``register_hook``,
            ``grad_fn``).
    """

    def __init__(self, parts: NamedModules) -> None:
        super().__init__()
        self.writes: dict[int, str] = {}
        self.touched = 0
        self._names = {id(module): name for name, module in parts if name}
        self._nodes: list[Any] = []  # kept alive, so that no id is used twice
        self._cuts: list[tuple[Any, str]] = []

    def intercept(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = args[0] if args else None
        if not isinstance(first, Tensor):
            return func(*args, **kwargs)
        cut = name in DETACHING or (name == "__get__" and func.__self__ is torch.Tensor.data)
        if cut or not (torch.is_grad_enabled() or name == "__get__"):
            self._saw_cut(args, name)
        reached = name == "__get__" and func.__self__ is torch.Tensor.grad_fn
        if reached or name == "register_hook":
            self.touched += not _is_of(_caller(), "lenslrp.")
        out = func(*args, **kwargs)
        node = node_of_write(first)
        if node is not None and id(node) not in self.writes:
            self._nodes.append(node)
            self.writes[id(node)] = "" if is_linear_write(name, args, kwargs) else name
        return out

    def _saw_cut(self, args: tuple[Any, ...], name: str) -> None:
        nodes = [x.grad_fn for x in args if isinstance(x, Tensor) and x.grad_fn is not None]
        if not nodes:
            return
        frame = _caller()
        if frame is None or _is_of(frame, "lenslrp.", "transformer_lens."):
            return  # a rule, or the bridge's own reading of what its hook points show
        how = name if name in DETACHING else "data" if name == "__get__" else "no_grad"
        description = f"{how} in {self._component(frame)}"
        self._nodes.extend(nodes)
        self._cuts.extend((node, description) for node in nodes)

    def _component(self, frame: FrameType) -> str:
        """The module whose code cut a value, by its name, and the line of code."""
        line = f"{frame.f_code.co_name}, line {frame.f_lineno}"
        caller: FrameType | None = frame
        while caller is not None:
            module = caller.f_locals.get("self")
            if isinstance(module, nn.Module) and id(module) in self._names:
                return f"{self._names[id(module)]} ({type(module).__name__}; {line})"
            caller = caller.f_back
        return line

    def cuts(self, nodes: dict[int, Any]) -> list[str]:
        """Where values of the nodes given were cut off, in words, each place once."""
        return list(dict.fromkeys(said for node, said in self._cuts if id(node) in nodes))


def _caller() -> FrameType | None:
    """Whose code has called the function that is intercepted."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (
        _is_of(frame, "torch.", __name__) or frame.f_code.co_name in INTERCEPTING_FUNCTIONS
    ):
        frame = frame.f_back
    return frame


def _is_of(frame: FrameType | None, *packages: str) -> bool:
    return frame is not None and str(frame.f_globals.get("__name__", "")).startswith(packages)
