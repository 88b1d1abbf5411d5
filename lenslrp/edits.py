"""Changes to activations: every edit of this library goes through here, with one set of checks.

A hook point's activations are put through a function, or some of its units are switched off, scaled
or set in chosen rows of a batch. An intervention is what a relevance score must predict: a neuron
that mattered for an answer is one whose removal takes the answer away. Because an edit of units
names its rows, one forward pass tries many interventions on copies of one prompt::

    prompt = tokens.expand(3, -1)
    edits = [
        Edit("blocks.5.mlp.hook_post", (17, 40), scale=0, rows=(1,)),  # row 0 stays as it is
        Edit("blocks.5.mlp.hook_post", (17, 40), scale=5, rows=(2,)),
    ]
    with edit_units(model, edits):
        logits = model(prompt)

Edits work inside `lenslrp.run_with_relevance` and beside the user's own hooks. For edits of
what is generated, and for directions, see `lenslrp.analysis.steering.operations`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lenslrp.batch import PAIRED
from lenslrp.errors import InputError
from lenslrp.followed import TrackedPass, TrackedPasses, follow
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.readers import forget, is_total, owners, stacks
from lenslrp.hooks.scan_points import scan_points
from lenslrp.hooks.scans import mixers
from lenslrp.hooks.shown_scans import show_scans
from lenslrp.hooks.structure import components, position_axis
from lenslrp.hooks.turns import in_force
from lenslrp.running import undone
from lenslrp.unused import require_used, why_unused

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Edit:
    """What is done at one hook point: ``x -> scale * x + shift`` for some units, or any function.

    Attributes:
        hook: a hook point whose activations are [batch, pos, unit], such as
            ``"blocks.5.mlp.hook_post"``, or [batch, pos, head, d_head]: there a unit is a head.
        units: indices into the third axis; ``None`` where there is a ``function``.
        scale: 0 switches off, 1 changes nothing (equal to the last bit), more amplifies.
        shift: what is added, in units of the activation; ``scale=0`` with a shift sets a value.
        rows: batch rows in which to do it; ``None`` for all.
        positions: of the row's own prompt, padding left out; negative from its end. In an
            encoder-decoder, of the text of the hook point's own stack. ``None`` for everything,
            generated tokens among it.
        function: makes the new activations of the old, in the form in which TransformerLens shows
            them.
    """

    hook: str
    units: tuple[int, ...] | None = None
    scale: float = 0.0
    shift: float = 0.0
    rows: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    function: Change | None = None

    def __post_init__(self) -> None:
        chosen = (self.scale, self.shift, self.rows, self.positions) != (0.0, 0.0, None, None)
        if (self.units is None) == (self.function is None) or (self.function and chosen):
            raise InputError(
                f"an edit at {self.hook} is of units, or by a function, which sees all of the "
                "hook point's activations and is given alone"
            )


@contextmanager
def edit_units(model: TransformerBridge, edits: Iterable[Edit]) -> Iterator[None]:
    """Apply ``edits`` in every forward pass inside the context, and undo them however it ends.

    Args:
        model: a ``TransformerBridge``.
        edits: any number of them; one unit must not be edited twice in one place. Functions act
            after what is done to units of their hook point, in the order given.

    Raises:
        InputError: a hook point that the model does not have, one given by two names, one that is
            not where its name says, or one whose tensor nothing uses; in the forward pass, a unit,
            row or position out of range, a unit edited twice, or activations of another shape; at
            the end of the context, a hook point that never fired, so that nothing was done there.
    """
    by_hook: dict[str, list[Edit]] = {}
    stacked = stacks(model.modules())
    for edit in edits:
        if edit.function is None and model.hook_dict.get(edit.hook) in stacked:
            raise InputError(
                f"{edit.hook} is [stream, batch, pos, d_model], several residual streams: edit the "
                "active one at hook_resid_pre or hook_resid_post, or all of them by a function"
            )
        by_hook.setdefault(edit.hook, []).append(edit)
    anywhere = all(edit.positions is None for hook_edits in by_hook.values() for edit in hook_edits)
    with ExitStack() as stack:
        passes = TrackedPasses() if anywhere else stack.enter_context(follow(model))
        changes: dict[str, list[Change]] = {}
        for name, hook_edits in by_hook.items():
            of_units = [edit for edit in hook_edits if edit.function is None]
            changes[name] = [_apply(model, name, of_units, passes)] if of_units else []
            changes[name] += [edit.function for edit in hook_edits if edit.function is not None]
        stack.enter_context(_put_through(model, changes))
        yield


@contextmanager
def _put_through(
    model: TransformerBridge, changes: Mapping[str, Sequence[Change]]
) -> Iterator[None]:
    parts = components(model)
    scans = scan_points(mixers(parts))
    points: dict[str, Any] = {**model.hook_dict, **scans}
    for name in changes:
        if name not in points:
            near = difflib.get_close_matches(name, points, n=3)
            raise InputError(f"no hook point is called {name!r}; nearest: {', '.join(near)}")
        require_on_stream(model, name, points)
    only_ruled = require_used(model, changes)
    objects = {id(points[name]): name for name in changes}
    if len(objects) < len(changes):
        alias = next(n for n in changes if n not in objects.values())
        other = objects[id(points[alias])]
        raise InputError(f"{alias!r} and {other!r} are one hook point: use one name")
    fired: set[str] = set()

    def hook_of(name: str) -> Callable[..., Tensor]:
        def hook(x: Tensor, hook: Any) -> Tensor:
            if name in only_ruled and not in_force(model):
                raise InputError(why_unused(model, name))
            fired.add(name)
            for change in changes[name]:
                x = change(x)
            return x

        return hook

    hooks = {name: hook_of(name) for name in changes}
    level = model.context_level
    try:
        try:
            with undone(Attached()) as at, model.hooks(fwd_hooks=_of_model(hooks, scans)):
                show_scans(at, parts, hooks)
                for name in hooks.keys() & scans.keys():
                    points[name].add_hook(hooks[name])
                yield
        finally:
            _remove(points, hooks)
            model.context_level = level
    finally:  # an interrupt may have cut the first short
        _remove(points, hooks)
        model.context_level = level
    idle = [name for name in changes if name not in fired]
    if idle:
        raise InputError(
            f"nothing was edited at {', '.join(idle[:4])}: no forward pass inside the context "
            "reached it"
        )


def _of_model(
    hooks: Mapping[str, Callable[..., Tensor]], scans: Mapping[str, Any]
) -> list[tuple[str, Callable[..., Tensor]]]:
    """Those at hook points of TransformerLens' own, which it puts on itself."""
    return [(name, hook) for name, hook in hooks.items() if name not in scans]


def _remove(points: Mapping[str, Any], hooks: Mapping[str, Callable[..., Tensor]]) -> None:
    """Take functions off hook points, however far TransformerLens has come with them."""
    ours = {id(hook) for hook in hooks.values()}
    for name in hooks:
        point = points[name]
        for handle in [h for h in point.fwd_hooks if id(h.user_hook) in ours]:
            point.fwd_hooks.remove(handle)
        for key, hook in list(point._forward_hooks.items()):
            theirs = getattr(hook, "__qualname__", "").endswith("add_hook.<locals>.full_hook")
            if theirs and any(id(cell.cell_contents) in ours for cell in hook.__closure__):
                point._forward_hooks.pop(key, None)
        forget(point)


def edit_gradient(x: Tensor, change: Callable[[Tensor], Tensor | None]) -> None:
    """Call ``change`` with the gradient that arrives at ``x``, a tensor of the pass that is made.

    What it returns, if anything, goes on in the gradient's place.
    """
    x.register_hook(change)


def require_on_stream(model: TransformerBridge, hook: str, points: Mapping[str, Any]) -> None:
    """Refuse a name of the residual stream that is the input of a component inside the block.

    On most architectures ``hook_resid_mid`` is what the MLP or its norm is given: the stream itself
    passes by.
    """
    point = points[hook]
    block = hook.rpartition(".")[0]
    if not is_total(hook) or point is points.get(f"{block}.hook_in"):
        return
    owned = owners(model.modules())
    if id(point) in owned:
        inner = next(n for n, p in points.items() if p is point and n.endswith("hook_in"))
        where = inner.removeprefix(f"{block}.").removesuffix(".hook_in")
        raise InputError(
            f"in this model {hook} is the input of {where}: a change there does not stay in the "
            f"residual stream between attention and MLP. Change {block}.hook_resid_post or "
            f"{block}.hook_attn_out (or {inner}, if what {where} is given is meant)"
        )


def _apply(model: TransformerBridge, name: str, edits: list[Edit], passes: TrackedPasses) -> Change:
    axis = position_axis(model.hook_dict.get(name))
    tables: dict[Any, tuple[Tensor, ...]] = {}  # by batch size and length, or of the last pass
    anywhere = all(edit.positions is None for edit in edits)

    def change(x: Tensor) -> Tensor:
        if x.ndim not in (3, 4) or name.endswith(PAIRED):
            raise InputError(
                f"{name} has shape {list(x.shape)}; edits need [batch, pos, unit] or "
                "[batch, pos, head, d_head]"
            )
        x = x.movedim(axis, 1)
        key = x.shape[:2] if anywhere else (passes.now, x.shape[:2])
        if key not in tables:
            tables.clear()
            tables[key] = _table(name, edits, x, passes)
        rows, columns, units, scale, shift = tables[key]
        place = (rows, columns, units)
        return x.index_put(place, x[place] * scale + shift).movedim(1, axis)

    return change


def _table(name: str, edits: list[Edit], x: Tensor, passes: TrackedPasses) -> tuple[Tensor, ...]:
    """Row, column and unit of every change at one hook point, its scale and its shift: [n]."""
    batch, length, width = x.shape[:3]
    tables = []
    for edit in edits:
        rows = tuple(range(batch)) if edit.rows is None else edit.rows
        _require_inside(f"row of the edit at {name}", rows, batch)
        units = edit.units or ()
        _require_inside(f"unit of {name}", units, width)
        columns = torch.arange(length).expand(len(rows), -1)
        if edit.positions is not None:
            columns = _columns(name, x, rows, edit.positions, passes.now)
        shape = (*columns.shape, len(units))
        grid = (torch.tensor(rows)[:, None, None], columns[..., None], torch.tensor(units))
        places = torch.stack([axis.long().expand(shape).flatten() for axis in grid])
        tables.append((places, edit.scale, edit.shift))
    places = torch.cat([at for at, _, _ in tables], dim=1)
    unique, counts = places.unique(dim=1, return_counts=True)
    if unique.shape[1] < places.shape[1]:
        row, column, unit = unique[:, counts > 1][:, 0].tolist()
        raise InputError(f"unit {unit} of {name} is edited twice in row {row} at column {column}")
    shape = (-1, *(1 for _ in x.shape[3:]))  # the same for every entry of a head
    scale = torch.cat([x.new_full((at.shape[1],), scale) for at, scale, _ in tables]).view(shape)
    shift = torch.cat([x.new_full((at.shape[1],), shift) for at, _, shift in tables]).view(shape)
    return (*places.to(x.device), scale, shift)


def _columns(
    name: str, x: Tensor, rows: tuple[int, ...], positions: tuple[int, ...], now: TrackedPass
) -> Tensor:
    """[row, position], where in ``x`` the rows' positions are; none, where a cache holds them."""
    wanted = torch.tensor(positions, dtype=torch.long)
    text = now.at(name, x)
    if text is None:
        return wanted.new_empty(len(rows), 0)
    for position in positions:
        text.require(position, f"position of the edit at {name}:", rows)
    return text.columns_at(torch.tensor(rows, dtype=torch.long)[:, None], wanted).cpu()


def _require_inside(what: str, indices: Iterable[int], stop: int) -> None:
    for index in indices:
        if not 0 <= index < stop:
            raise InputError(f"{what} is {index}, expected 0 to {stop - 1}")
