"""Where logits are computed: at every position, or only where a target reads them.

The unembedding of one position costs as much as a large part of a block, and its output is the
largest tensor of a pass. What is read at the target alone is the same to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lenslrp.errors import InputError
from lenslrp.hooks.components import UnembeddingBridge
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.state import users_hooks
from lenslrp.targets import Outputs, PerRow, Target

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

LOGITS = ("all", "target")

Columns = Int[Tensor, "batch n"]


def require_logits(logits: str) -> None:
    """Refuse another choice than those of :data:`LOGITS`."""
    if logits not in LOGITS:
        raise InputError(f"logits must be one of {LOGITS}, not {logits!r}")


def columns_of(targets: Iterable[Target], outputs: Outputs) -> Columns | None:
    """The columns that targets read the logits at, each once; ``None`` where one reads them all.

    Args:
        targets: targets of one batch.
        outputs: without logits: masks and lengths of the batch.

    Raises:
        InputError: a position outside a row.
    """
    found: dict[tuple[int, ...], Columns] = {}
    for target in targets:
        columns = _columns(target, outputs)
        if columns is None:
            return None
        for column in columns.unbind(dim=1):
            found[tuple(column.tolist())] = column
    return torch.stack(list(found.values()), dim=1)


def _columns(target: Target, outputs: Outputs) -> Columns | None:
    if not isinstance(target, PerRow):
        columns = getattr(target, "columns", None)
        return None if columns is None else columns(outputs)
    rows = [_columns(part, outputs.row(row)) for row, part in enumerate(target.targets)]
    if any(row is None for row in rows):
        return None
    return torch.cat([row for row in rows if row is not None])


def head_component(model: TransformerBridge) -> nn.Module | None:
    """The component that makes logits of the residual stream, where the bridge has one."""
    unembed = getattr(model, "_modules", {}).get("unembed")
    return unembed if isinstance(unembed, UnembeddingBridge) else None


def is_hooked(model: TransformerBridge, unembed: nn.Module) -> bool:
    """Whether somebody else's hooks see the logits, or what they are made of."""
    inner = getattr(model, "original_model", model)
    after = [hook for of in (model, inner) for hook in users_hooks(of, ("_forward_hooks",))]
    return bool(after) or any(True for of in unembed.modules() for _ in users_hooks(of))


def unembed_at(at: Attached, unembed: nn.Module, columns: Columns, length: int) -> list[bool]:
    """Unembed the chosen columns of a batch of ``length`` positions alone.

    Returns a list that is not empty once that has happened.
    """
    picked: list[bool] = []

    def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[:2] != (len(columns), length):
            return None  # of another text
        picked.append(True)
        return (at_columns(x, columns), *args[1:])

    at.first_pre_hook(unembed, pick)
    return picked


def at_columns(x: Tensor, columns: Columns) -> Tensor:
    """``x`` [batch, pos, ...] at the columns of each row: [batch, n, ...]."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, columns.to(x.device)]


def spread(x: Tensor, columns: Columns, length: int) -> Tensor:
    """The inverse of :func:`at_columns`: 0 at the positions that were not picked."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    full = x.new_zeros(len(x), length, *x.shape[2:])
    full[rows, columns.to(x.device)] = x
    return full
