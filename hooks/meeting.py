"""Intercept torch functions while a module runs, and the names under which they are met."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

SUMS = frozenset({"add", "__add__", "__radd__", "add_", "__iadd__"})
MATRIX_PRODUCTS = frozenset({"matmul", "__matmul__", "bmm", "einsum"})


class Intercept(TorchFunctionMode):
    """Hands every call of a torch function to :meth:`meet`, by the function's name."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self.meets():
            return func(*args, **kwargs)
        return self.meet(func, getattr(func, "__name__", ""), args, kwargs)

    def meets(self) -> bool:
        """Whether the code that runs now is to be met."""
        return True

    def meet(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func`` with whatever it needs before and after."""
        return func(*args, **kwargs)
