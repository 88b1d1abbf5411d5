"""A second device for machines that have one: tensors that compute here and say they are elsewhere.

Every tensor made in :func:`devices` carries the name of a device and holds real values; operations
follow torch's rule: all on one device, but for scalars and indices on the CPU. Anything else
is the ``RuntimeError`` that two accelerators would give. Moving is ``.to(device)``, as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CPU = torch.device("cpu")
MOVES = ("aten._to_copy", "aten.copy_")
ASKS = tuple(
    f"aten.{name}"
    for name in (
        "_local_scalar_dense",
        "nonzero",
        "equal",
        "is_nonzero",
        "masked_select",
        "_unique2",
    )
)
INDEXED = ("aten.index", "aten.index_put", "aten._index_put_impl", "aten._unsafe_index")


class Elsewhere(Tensor):
    """A tensor of the CPU that reports another device."""

    @staticmethod
    def __new__(cls, inner: Tensor, where: torch.device) -> Elsewhere:
        made: Elsewhere = Tensor._make_subclass(
            cls, inner.detach(), inner.requires_grad, dispatch_device=True
        )
        return made

    def __init__(self, inner: Tensor, where: torch.device) -> None:
        self.inner, self.where = inner.detach(), where

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.where

    def __repr__(self, **_: Any) -> str:
        return f"{self.inner!r} at {self.where}"

    def tolist(self) -> Any:
        if self.where != CPU and Waits.counting is not None:
            Waits.counting.waits += 1
        return self.inner.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run(func, args, dict(kwargs or {}))


def where(tensor: Tensor) -> torch.device:
    return tensor.where if isinstance(tensor, Elsewhere) else CPU


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: devices checked, values computed, results labelled."""
    if func is torch.ops.prim.device.default:
        return where(args[0])
    name = str(func).rsplit(".", 1)[0]
    flat = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    if name.startswith(INDEXED):  # indices may stay on the CPU
        flat = [flat[0], *(t for t in flat[1:] if where(t) != CPU)]
    places = [where(t) for t in flat if (t.ndim and t.numel()) or where(t) != CPU]
    asked = kwargs.get("device")
    if len(set(places)) > 1 and name not in MOVES:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} got {places}"
        )
    target = torch.device(asked) if asked is not None else (places[0] if places else CPU)
    if asked is not None:
        kwargs["device"] = CPU
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    written = name.endswith("_") and not name.endswith("__")  # as relu_, not as __lshift__
    if written and isinstance(args[0], Tensor):  # in place: the tensor itself
        return args[0]
    return tree_map(lambda t: Elsewhere(t, target) if isinstance(t, Tensor) else t, out)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


class Labels(TorchDispatchMode):
    """Labels tensors that are made on another device: ``torch.zeros(..., device=...)``."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        return run(func, args, kwargs)


class Waits(Labels):
    """Simulates devices, and counts what is asked of them.

    Attributes:
        waits: how often the host waited for what a device had computed.
        kernels: operations that compute something on a device, views and empty tensors apart.
    """

    counting: Waits | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits = self.kernels = 0

    def __enter__(self) -> Any:
        Waits.counting = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Waits.counting = None
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, options = str(func).rsplit(".", 1)[0], kwargs or {}
        flat = [t for t in tree_flatten((args, options))[0] if isinstance(t, Tensor)]
        if any(where(t) != CPU for t in flat) and func is not torch.ops.prim.device.default:
            returned = [r.alias_info for r in func._schema.returns]
            views = bool(returned) and all(a is not None and not a.is_write for a in returned)
            self.kernels += not (views or "empty" in name or name == "aten.detach")
            given, to = args[0], options.get("device")
            if name == "aten.copy_":
                given, to = args[1], where(args[0])
            leaves = name in MOVES and to is not None and torch.device(to) == CPU
            masks = name in INDEXED and any(
                m is not None and m.dtype == torch.bool for m in args[1]
            )
            asked = name in ASKS or leaves or masks
            self.waits += asked and isinstance(given, Tensor) and where(given) != CPU
        return super().__torch_dispatch__(func, types, args, kwargs)

    def during(self, act: Callable[[], Any]) -> tuple[int, int]:
        """How often the host waited meanwhile, and how many kernels there were."""
        before = self.waits, self.kernels
        act()
        return self.waits - before[0], self.kernels - before[1]


@contextmanager
def devices() -> Iterator[None]:
    with Labels():
        yield


def place(module: nn.Module, device: torch.device) -> None:
    """Put a module's weights and buffers on a device."""
    target = device
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for key, value in table.items():
                if value is None:
                    continue
                moved = Elsewhere(_inner(value.detach()), target)
                table[key] = (
                    nn.Parameter(moved, requires_grad=False) if table is part._parameters else moved
                )
