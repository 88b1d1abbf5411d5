"""Reading relevance at hook points while the backward pass goes by.

A reader turns (activation, gradient) into relevance the moment both exist, reduces it if asked, and
keeps only that; gradients are never kept. Names follow TransformerLens, and a name means one thing:
``hook_resid_pre``, ``hook_resid_mid`` and ``hook_resid_post`` read the total relevance of the
residual stream, every other name the branch that its hook point feeds.

A hook point can fire and its tensor be used by nothing (:mod:`lenslrp.unused`): no gradient comes
to it, which is not the same as a relevance of 0. ``Readers.silent`` names the points that got none.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint, LensHandle
from transformer_lens.model_bridge.generalized_components import AltUpBlockBridge

from lenslrp.errors import InputError
from lenslrp.hooks.functions import Read, apply, same
from lenslrp.hooks.handles import Attached
from lenslrp.hooks.sites import forget_products, widened
from lenslrp.hooks.structure import layer_of

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
Reducer = Callable[[Tensor], Tensor]

NON_FINITE_HOOKS = ("hook_attn_scores", "hook_pattern")
"""Where values are not finite although nothing reads them."""

WHEN_HOOKED = ("hook_attn_out", "hook_mlp_out", "hook_result", "hook_embed", "embed.hook_out")
"""Points that TransformerLens calls only where they have hooks of its own kind: what Granite adds
to the residual stream is multiplied by a constant after the module that made it."""

ON_REQUEST = ("hook_scan_map", "hook_scan_state")
"""Points that cost scans of their own, and are not read unless they are asked for."""

SCAN_HOOKS = ("hook_scan_in", "hook_scan_out", *ON_REQUEST)
"""The points of a recurrent mixer (:mod:`lenslrp.hooks.scan_points`)."""

TOTAL_HOOKS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")


_NO_HANDLE = RemovableHandle(OrderedDict())


def is_total(name: str) -> bool:
    """Whether a hook name reads the whole residual stream rather than a branch."""
    return name.rsplit(".", 1)[-1] in TOTAL_HOOKS


def is_middle(name: str) -> bool:
    """Whether a name is that of the residual stream between attention and MLP."""
    return name.rsplit(".", 1)[-1] == "hook_resid_mid"


def owners(modules: Iterable[nn.Module]) -> dict[int, nn.Module]:
    """The component of every ``hook_in``, by the id of that hook point.

    What a component is given is the residual stream itself; its ``hook_in`` is the branch.
    """
    return {
        id(point): module
        for module in modules
        for name, point in module._modules.items()
        if name == "hook_in" and point is not None
    }


def hidden_states_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The hidden states that a component was called with."""
    values = (*args, *(kwargs[k] for k in ("hidden_states",) if k in kwargs))
    return next((v for v in values if isinstance(v, Tensor)), None)


STACKS: WeakSet[nn.Module] = WeakSet()
"""Hook points where several residual streams are the first axis (Gemma 3n), [stream, batch, ...].

LensLRP reads them as [batch, pos, stream, d_model], as DeepSeek V4 has its own: rows come first.
"""


def stacks(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """The hook points of :data:`STACKS` among those of a model's modules."""
    blocks = [module for module in modules if isinstance(module, AltUpBlockBridge)]
    return {point for block in blocks for point in (block.hook_in, block.hook_out)}


def converted(point: Any, x: Tensor) -> Tensor:
    """A hook point's tensor in the form in which TransformerLens shows it to hooks, rows first."""
    if point in STACKS:
        return x.movedim(0, -2)
    conversion = getattr(point, "hook_conversion", None)
    if conversion is None:
        return x
    shown: Tensor = conversion.convert(x)
    forget(point)
    return shown


def reverted(point: Any, x: Tensor) -> Tensor:
    """The inverse of :func:`converted`."""
    if point in STACKS:
        return x.movedim(-2, 0)
    conversion = getattr(point, "hook_conversion", None)
    back: Tensor = x if conversion is None else conversion.revert(x)
    return back


def forget(point: Any) -> None:
    """Drop the note that some conversions keep of every tensor that they have shown."""
    notes = getattr(getattr(point, "hook_conversion", None), "_conversion_state", None)
    if notes is not None:
        notes.clear()


def listen(at: Attached, point: Any, names: Iterable[str], hook: Callable[..., Any]) -> None:
    """A forward hook that also makes TransformerLens call a point of :data:`WHEN_HOOKED`."""
    at.hook(point, hook)
    if not isinstance(point, HookPoint) or not any(name.endswith(WHEN_HOOKED) for name in names):
        return
    note = LensHandle(_NO_HANDLE)  # a reader goes when its pass ends

    def forget() -> None:
        if note in point.fwd_hooks:  # model.reset_hooks() may have been first
            point.fwd_hooks.remove(note)

    at.undo.append(forget)
    point.fwd_hooks.append(note)


def select_names(available: Iterable[str], names_filter: NamesFilter) -> tuple[list[str], bool]:
    """The hook names asked for, and whether they were asked for one by one.

    A name without a block, such as ``"mlp.hook_post"``, stands for that hook in every block; those
    of scans (``"hook_scan_out"``) for that of every mixer, whatever it is called.

    Raises:
        InputError: a name that is no hook point of this model, with the nearest ones.
    """
    names = list(available)
    if names_filter is None:
        return [name for name in names if not name.endswith(ON_REQUEST)], False
    if callable(names_filter):
        return [name for name in names if names_filter(name)], False
    if not isinstance(names_filter, str | Iterable):
        raise InputError(
            f"names_filter must be None, a hook name, names or a predicate, not {names_filter!r}"
        )
    wanted = [names_filter] if isinstance(names_filter, str) else list(names_filter)
    for name in wanted:
        if not isinstance(name, str):
            raise InputError(f"a hook name is a string, not {name!r}")
    known = set(names)
    chosen: list[str] = []
    for name in wanted:
        inside = [n for n in names if layer_of(n) is not None and n.endswith("." + name)]
        inside = [n for n in inside if n.split(".", 2)[2] == name or name in SCAN_HOOKS]
        if name in known:
            chosen.append(name)
        elif inside:
            chosen.extend(inside)
        elif is_middle(name) and not any(is_middle(n) for n in names):
            raise InputError(
                f"no hook point {name!r} in this model: parallel blocks, whose attention and MLP "
                "both read hook_resid_pre (and blocks without an MLP), have no residual stream "
                "between the two; ask for hook_resid_pre or hook_resid_post"
            )
        else:
            near = difflib.get_close_matches(name, names, n=3) or names[:3]
            raise InputError(f"no hook point {name!r} in this model; nearest: {', '.join(near)}")
    return list(dict.fromkeys(chosen)), True


@dataclass(eq=False)
class Reading:
    """One hook point, read as a total or as a branch; several names may share it."""

    names: list[str]
    point: nn.Module
    total: bool
    shape: tuple[int, ...] | None = None
    zero_like: Tensor | None = None
    seen: int = 0  #: how often it fired on the path
    waits: bool = False  #: a gradient may come: no rule cut the graph here
    late: bool = False  #: the MLP ran before it, so it is not between attention and MLP


def _inside(
    points: Mapping[str, nn.Module], middles: Mapping[str, nn.Module]
) -> list[tuple[str, nn.Module, bool]]:
    """Of blocks whose middle is read: where the block begins, and every hook point of its MLP."""
    points_of_blocks = []
    for name, point in points.items() if middles else ():
        block, _, rest = name.partition(".mlp.")
        if rest and block in middles and point is not middles[block]:
            points_of_blocks.append((block, point, False))
        elif name.endswith(".hook_in") and name[: -len(".hook_in")] in middles:
            points_of_blocks.append((name[: -len(".hook_in")], point, True))
    return points_of_blocks


def _shape(value: Any) -> Any:
    return getattr(value, "shape", None)


def _joined(pieces: dict[int, Any]) -> Any:
    """The uses of different lengths of one hook point one after the other, in forward order."""
    parts = [pieces[index] for index in sorted(pieces)]
    if len(parts) == 1:
        return parts[0]
    lengths = [set(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    return torch.cat(parts, dim=next(i for i, sizes in enumerate(lengths) if len(sizes) > 1))


@dataclass(eq=False)
class Readers:
    """All readings of a forward pass; ``pieces`` fills anew at each backward pass.

    They may stay attached from pass to pass: outside of one they do nothing.
    """

    readings: list[Reading]
    reduce: Callable[[str], Reducer | None]
    inside: list[tuple[str, nn.Module, bool]] = field(default_factory=list)
    pieces: dict[str, dict[int, Any]] = field(default_factory=dict)
    activations: dict[str, Tensor] = field(default_factory=dict)
    copies: bool = False  #: keep copies of what is written to in place
    ran: set[str] = field(default_factory=set)  #: blocks whose MLP has run since they began
    silent: set[str] = field(default_factory=set)  #: fired, and no gradient came, for some target
    #: gives a hook point's tensor for all positions, where only some are computed
    restore: Callable[[nn.Module, Tensor], Tensor] | None = None
    reducers: dict[str, Reducer | None] = field(default_factory=dict)  #: by name
    on: bool = False  #: a pass is being read
    state: Any = None  #: of the model that they stay attached to

    @contextmanager
    def reading(self, *, copies: bool) -> Iterator[None]:
        """One pass is read inside the block; nothing has been seen of it before."""
        self.copies, self.restore = copies, None
        self.pieces, self.activations = {}, {}
        self.ran.clear()
        self.silent = set()
        for reading in self.readings:
            reading.seen, reading.waits, reading.late = 0, False, False
            reading.shape = reading.zero_like = None
        self.on = True
        try:
            yield
        finally:
            self.on, self.restore = False, None

    @classmethod
    def plan(
        cls,
        points: Mapping[str, nn.Module],
        names: Iterable[str],
        reduce: Callable[[str], Reducer | None],
    ) -> Readers:
        """Group names by hook point object and reading."""
        names = list(names)
        groups: dict[tuple[int, bool], Reading] = {}
        for name in names:
            key = (id(points[name]), is_total(name))
            if key in groups:
                groups[key].names.append(name)
            else:
                groups[key] = Reading([name], points[name], is_total(name))
        blocks = {n.rpartition(".")[0]: points[n] for n in names if is_middle(n)}
        return cls(list(groups.values()), reduce, _inside(points, blocks))

    def attach(self, owned: Mapping[int, nn.Module], at: Attached) -> None:
        """Register after the rules, so that a reader sees the gradient the rule will receive.

        ``owned`` is what :func:`owners` gives for the model.
        """
        for block, point, begins in self.inside:
            change = self.ran.discard if begins else self.ran.add
            at.hook(point, lambda *_, b=block, c=change: c(b))
        for reading in self.readings:
            owner = owned.get(id(reading.point)) if reading.total else None
            if owner is not None:  # before what a rule or a mode puts on the branch
                at.first_pre_hook(owner, self._before(reading), with_kwargs=True)
            else:
                listen(at, reading.point, reading.names, self._after(reading))

    def _before(self, reading: Reading) -> Callable[..., None]:
        """Total readings: on the residual itself, before any hook point touches the branch."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.on:
                return
            x = hidden_states_of(args, kwargs)
            block = reading.names[0].rpartition(".")[0]
            if is_middle(reading.names[0]) and block in self.ran:
                reading.late = True
                return
            if x is not None and x.requires_grad:
                kept = same(x, self.copies)
                index = self._saw(reading, x)
                reading.waits = True
                x.register_hook(lambda g: self._deliver(reading, kept, g, index))

        return hook

    def _after(self, reading: Reading) -> Callable[..., Tensor | None]:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
            if not self.on or not isinstance(out, Tensor):
                return None
            if not out.requires_grad:
                if args and isinstance(args[0], Tensor) and args[0].requires_grad:
                    self._saw(reading, out)  # a rule cut it here: on the path, relevance zero
                return None
            index = self._saw(reading, out)
            reading.waits = True
            return apply(Read, out, lambda x, g: self._deliver(reading, x, g, index), self.copies)

        return hook

    def _saw(self, reading: Reading, x: Tensor) -> int:
        """Which of its firings in this pass this is."""
        reading.seen += 1
        reading.zero_like = x.detach().new_empty(0)
        reading.shape = tuple(x.shape)
        return reading.seen

    def _deliver(self, reading: Reading, x: Tensor, g: Tensor, index: int) -> None:
        x, g = x.detach(), g.detach() if g.requires_grad else g
        x, g = converted(reading.point, x), converted(reading.point, g)
        if self.restore is not None:
            x, g = self.restore(reading.point, x), self.restore(reading.point, g)
        values: dict[int, Tensor] = {}  # names of one hook point share one tensor
        for name in reading.names:
            if name not in self.reducers:
                self.reducers[name] = self.reduce(name)
            reduce = self.reducers[name]
            if id(reduce) not in values:
                values[id(reduce)] = self._relevance(reduce, x, g, name.endswith(NON_FINITE_HOOKS))
            value = values[id(reduce)]
            pieces = self.pieces.setdefault(name, {})
            if name.endswith(("hook_post", "hook_expert_post")) and reduce is None:
                wide = widened(x)
                self.activations[name] = self.activations[name] + wide if pieces else wide
            # A point that fires twice in one pass carries the sum of both uses; of two lengths
            # (T5Gemma 2 projects keys of decoder and encoder with one matrix), both.
            alike = (i for i, old in pieces.items() if _shape(old) == _shape(value))
            use = next(alike, index)
            pieces[use] = pieces[use] + value if use in pieces else value

    @staticmethod
    def _relevance(reduce: Reducer | None, x: Tensor, g: Tensor, masked: bool) -> Tensor:
        of_product = getattr(reduce, "of_product", None)
        if of_product is not None:  # a reduction that needs no tensor for x * g
            reduced: Tensor = of_product(x, g, masked)
            return reduced
        product = widened(x.nan_to_num(0.0, 0.0, 0.0) if masked else x) * widened(g)
        return product if reduce is None else reduce(product)

    def finish(self) -> dict[str, Any]:
        """The values of the backward pass that has just ended; zero where no gradient came."""
        for reading in self.readings:
            if reading.seen and reading.names[0] not in self.pieces:
                if reading.waits:
                    self.silent.update(reading.names)
                assert reading.shape is not None and reading.zero_like is not None
                zeros = reading.zero_like.new_zeros(reading.shape)
                self._deliver(reading, zeros, zeros, 0)
        values = {name: _joined(pieces) for name, pieces in self.pieces.items()}
        self.pieces = {}
        forget_products()
        return values

    def late(self) -> list[str]:
        """Names of the stream between attention and MLP that are not there in this model."""
        return [name for r in self.readings if r.late for name in r.names]

    def off_path(self) -> list[str]:
        """Names whose hook point never fired on the path."""
        return [name for r in self.readings if not r.seen for name in r.names]
