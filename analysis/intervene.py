"""Units switched off, scaled or set, in chosen rows of a batch, for as long as a context lasts.

An intervention is what a relevance score must predict: a neuron that mattered for an answer is one
whose removal takes the answer away. Because every edit names its rows, one forward pass tries many
interventions on copies of one prompt::

    prompt = tokens.expand(3, -1)
    edits = [
        Edit("blocks.5.mlp.hook_post", (17, 40), scale=0, rows=(1,)),  # row 0 stays as it is
        Edit("blocks.5.mlp.hook_post", (17, 40), scale=5, rows=(2,)),
    ]
    with edit_units(model, edits):
        logits = model(prompt)

Edits work inside :func:`lenslrp.run_with_relevance` and beside the user's own hooks.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lenslrp.errors import InputError


@dataclass(frozen=True)
class Edit:
    """``x -> scale * x + shift`` for units of one hook point, at all positions.

    Attributes:
        hook: a hook point whose activations are [batch, pos, unit], such as
            ``"blocks.5.mlp.hook_post"``.
        units: indices into the last axis.
        scale: 0 switches off, 1 changes nothing (to the last bit), more amplifies.
        shift: what is added, in units of the activation; ``scale=0`` with a shift sets a value.
        rows: batch rows in which to do it; ``None`` for all.
    """

    hook: str
    units: tuple[int, ...]
    scale: float = 0.0
    shift: float = 0.0
    rows: tuple[int, ...] | None = None


@contextmanager
def edit_units(model: Any, edits: Iterable[Edit]) -> Iterator[None]:
    """Apply ``edits`` in every forward pass inside the context, and undo them however it ends.

    Args:
        model: a ``TransformerBridge``.
        edits: any number of them. Edits of one unit in one row must not be given twice.

    Raises:
        InputError: a hook point that the model does not have; in the forward pass, a unit or a row
            out of range, a unit edited twice, or activations that are not [batch, pos, unit]; at
            the end of the context, a hook point that never fired, so that nothing was done there.
    """
    by_hook: dict[str, list[Edit]] = {}
    for edit in edits:
        if edit.hook not in model.hook_dict:
            near = difflib.get_close_matches(edit.hook, model.hook_dict, n=3)
            raise InputError(f"no hook point is called {edit.hook!r}; nearest: {', '.join(near)}")
        by_hook.setdefault(edit.hook, []).append(edit)
    objects = {id(model.hook_dict[name]): name for name in by_hook}
    if len(objects) < len(by_hook):
        alias = next(n for n in by_hook if n not in objects.values())
        raise InputError(
            f"{alias!r} and {objects[id(model.hook_dict[alias])]!r} are one hook point: use one name"
        )
    fired: set[str] = set()
    hooks = [(name, _apply(name, own, fired)) for name, own in by_hook.items()]
    with model.hooks(fwd_hooks=hooks):
        yield
    idle = [name for name in by_hook if name not in fired]
    if idle:
        raise InputError(
            f"nothing was edited at {', '.join(idle[:4])}: no forward pass inside the context "
            "reached it"
        )


def _apply(name: str, edits: list[Edit], fired: set[str]) -> Callable[..., Tensor]:
    made: dict[int, tuple[Tensor, Tensor, Tensor, Tensor | None]] = {}  # by batch size

    def hook(x: Tensor, hook: Any) -> Tensor:
        fired.add(name)
        if x.ndim != 3:
            raise InputError(f"{name} has shape {list(x.shape)}; edits need [batch, pos, unit]")
        if len(x) not in made:
            made[len(x)] = _table(name, edits, x)
        rows, units, scale, shift = made[len(x)]
        new = x[rows, :, units] * scale.to(x.dtype)
        if shift is not None:
            new = new + shift.to(x.dtype)
        return x.index_put((rows[:, None], torch.arange(x.shape[1], device=x.device)[None], units[:, None]), new)  # noqa: E501

    return hook


def _table(name: str, edits: list[Edit], x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Row and unit of every change at one hook point [n], its scale and its shift [n, 1]."""
    batch, _, width = x.shape
    seen: dict[tuple[int, int], Edit] = {}
    for edit in edits:
        rows = range(batch) if edit.rows is None else edit.rows
        _require_inside(f"row of the edit at {name}", rows, batch)
        _require_inside(f"unit of {name}", edit.units, width)
        for row in rows:
            for unit in edit.units:
                if (row, unit) in seen:
                    raise InputError(f"unit {unit} of {name} is edited twice in row {row}")
                seen[row, unit] = edit
    places = torch.tensor(list(seen), dtype=torch.long, device=x.device).reshape(-1, 2)
    scale = torch.tensor([[e.scale] for e in seen.values()], dtype=torch.float64).reshape(-1, 1)
    shift = torch.tensor([[e.shift] for e in seen.values()], dtype=torch.float64).reshape(-1, 1)
    return places[:, 0], places[:, 1], scale.to(x.device), shift.to(x.device) if shift.any() else None


def _require_inside(what: str, indices: Iterable[int], size: int) -> None:
    for index in indices:
        if not 0 <= index < size:
            raise InputError(f"{what} is {index}, expected 0 to {size - 1}")
