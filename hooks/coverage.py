"""What the coverage check reports: a table of rules, where gaps are, and what its errors say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
from torch import Tensor, nn

from lenslrp.errors import CoverageError
from lenslrp.hooks.graph_walk import Gap, Walk, inputs_of
from lenslrp.hooks.sites import Site
from lenslrp.hooks.structure import NamedModules
from lenslrp.views.cards import Face, Shown

SITE_COLUMNS = ["hook", "component", "role", "rule", "layer", "forward", "fired"]

RECURRENT_CLASSES = re.compile(
    r"(Mamba\d*Mixer|MambaLayer|BambaMixer|FalconH1Mixer|GatedDeltaNet|RecurrentBlock|"
    r"RwkvSelfAttention)$"
)
"""Classes that carry a state from token to token: named where their scan has no rule."""


@dataclass(frozen=True, repr=False)
class Coverage(Shown):
    """Which rule sat where, whether it fired, and what had none.

    Attributes:
        table: one row for each attached rule, see :attr:`sites`.
        uncovered: operations on the path without a rule (empty unless ``strict=False``).
        off_path: hook points that were asked for implicitly and are not on the path.
        notes: what a reader of these results should know.
        cuts: where the model's own code, or a hook, cut values on the path off the graph
            (``detach``, ``.data``, ``no_grad``): a rule takes them for constants.
        balanced: whether leaves and ledger terms add up to the target, within rounding.
    """

    table: pd.DataFrame | list[tuple[Any, ...]] = field(repr=False)
    uncovered: list[str] = field(default_factory=list)
    off_path: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cuts: list[str] = field(default_factory=list)
    balanced: bool = True

    @cached_property
    def sites(self) -> pd.DataFrame:
        """One row for each attached rule.

        Columns: hook (where it sits), component (class), role, rule, layer (missing outside the
            blocks), forward (how often it ran), fired (whether its backward ran).
        """
        if isinstance(self.table, pd.DataFrame):
            return self.table
        return pd.DataFrame(self.table, columns=SITE_COLUMNS).astype({"layer": "Int64"})

    @property
    def ok(self) -> bool:
        """Whether every operation on the path has its rule, each fired, and relevance adds up."""
        return not self.uncovered and self.balanced and bool(self.sites["fired"].all())

    def face(self) -> Face:
        rules = self.sites.groupby(["role", "rule"], sort=False)
        frame = rules.agg(places=("hook", "size"), fired=("fired", "sum")).reset_index()
        state = "every operation has its rule" if self.ok else "not all is covered"
        return Face(
            f"Coverage: {state}",
            {"rules": len(self.sites), "fired": int(self.sites["fired"].sum()),
             "gaps": len(self.uncovered), "adds up": self.balanced},
            frame,
            notes=[*(f"no rule: {gap}" for gap in self.uncovered),
                   *(f"constant: {cut}" for cut in self.cuts), *self.notes],
            rows=len(frame),
        )  # fmt: skip

    def __str__(self) -> str:
        rules = self.sites.groupby(["role", "rule"]).size()
        lines = [f"{role}: {rule} at {n} places" for (role, rule), n in rules.items()]
        lines += [f"NO RULE: {gap}" for gap in self.uncovered]
        return "\n".join([*lines, *(f"constant: {cut}" for cut in self.cuts), *self.notes])


def site_rows(sites: list[Site], on_path: set[int] | None = None) -> list[tuple[Any, ...]]:
    """One row a site; ``fired`` is whether its backward ran."""
    return [
        (s.hook, s.component, s.role, s.rule.name, s.layer, s.forward, s.backward > 0)
        for s in sites
        if (on_path is None or id(s) in on_path) and not (s.optional and s.forward == 0)
    ]


class Tracer:
    """Learns, during one forward pass, which graph nodes each module created.

    Used only when a walk has found a gap, to name the component: the innermost module between whose
    inputs and outputs a node lies.
    """

    def __init__(self, parts: NamedModules) -> None:
        self.calls: list[tuple[str, str, list[Any], list[Any]]] = []
        self._recurrent: dict[str, str] = {}
        self._handles = [
            module.register_forward_hook(self._record(name, module), with_kwargs=True)
            for name, module in parts
            if name
        ]

    def _record(self, name: str, module: nn.Module) -> Any:
        kind = type(module).__name__
        inner = type(getattr(module, "original_component", None)).__name__
        for cls in (kind, inner):
            if RECURRENT_CLASSES.search(cls):
                self._recurrent[name] = cls

        def record(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            inputs = [t.grad_fn for t in _tensors((args, kwargs)) if t.grad_fn is not None]
            outputs = [t.grad_fn for t in _tensors(out) if t.grad_fn is not None]
            self.calls.append((name, kind, inputs, outputs))

        return record

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def place(self, node: Any) -> str:
        """``blocks.2.mlp (GatedMLPBridge)``: the innermost module that made ``node``."""
        best: tuple[int, str] = (1 << 30, "")
        for name, kind, inputs, outputs in self.calls:
            inside = _between(outputs, {id(i) for i in inputs}, best[0])
            if id(node) in inside and len(inside) < best[0]:
                best = (len(inside), f"{name} ({kind})")
        return best[1]

    def recurrent(self, gaps: Sequence[Gap]) -> list[str]:
        """The recurrent mixers that all located gaps lie in: ``blocks.0.mixer (MambaMixer)``.

        Empty where one lies elsewhere: then that is what has no rule.
        """
        places = [gap.component.split(" ")[0] for gap in gaps if gap.component]
        inside = [[m for m in self._recurrent if f"{at}.".startswith(f"{m}.")] for at in places]
        found = {mixer for mixers in inside for mixer in mixers} if all(inside) else set()
        return [f"{name} ({cls})" for name, cls in self._recurrent.items() if name in found]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _between(outputs: list[Any], inputs: set[int], limit: int) -> set[int]:
    inside: set[int] = set()
    stack = list(outputs)
    while stack and len(inside) <= limit:
        node = stack.pop()
        if id(node) in inside or id(node) in inputs:
            continue
        inside.add(id(node))
        stack.extend(inputs_of(node))
    return inside


def gap_message(gaps: Sequence[Gap | str], architecture: str, recurrent: Sequence[str] = ()) -> str:
    """What a :class:`CoverageError` says: the operations, where, and what to do."""
    if recurrent:
        return (
            f"{architecture}: no rule for the recurrent mixer {_some(recurrent)}. Its state runs "
            "from token to token. Relevance past it would be wrong, so none is given, nor for the "
            "attention layers of a hybrid. strict=False takes the plain gradient there and says so "
            "in R.coverage."
        )
    return (
        f"{architecture}: no rule for {_some([str(gap) for gap in gaps])}. Relevance past it would "
        "be wrong. Give the operation a rule (docs/how-to/extending.md, 'Adding a rule'): an "
        "element-wise module through composite.extended({ModuleClass: Identity()}), a norm with "
        "Normalisation(centred=...), or Plain() for its plain gradient. If a "
        "hook of your own does this, it is what has no rule. strict=False takes the plain gradient "
        "there and says so in R.coverage."
    )


def _some(names: Sequence[str], shown: int = 6) -> str:
    more = f" (and {len(names) - shown} more)" if len(names) > shown else ""
    return "; ".join(dict.fromkeys(names[:shown])) + more


def require_in_place(walked: Walk, architecture: str) -> None:
    """Raise where a rule stands above no operation of its kind, or reaches something beside it.

    Raises:
        CoverageError: naming the rules.
    """
    faults = walked.faults()
    if faults:
        raise CoverageError(
            f"{architecture}: {'; '.join(faults[:6])}; the model's forward pass differs from what "
            "the rules expect, so the relevance would be wrong"
        )


def require_fired(sites: list[Site]) -> None:
    """Raise unless every site has been reached by the backward pass.

    Raises:
        CoverageError: naming the sites that were attached and never fired.
    """
    idle = [s for s in sites if s.backward == 0]
    if idle:
        names = ", ".join(f"{s.rule.name} at {s.hook}" for s in idle[:6])
        more = f" and {len(idle) - 6} more" if len(idle) > 6 else ""
        raise CoverageError(
            f"rules were attached and never fired: {names}{more}. The forward pass went "
            "round them, so the relevance would be wrong."
        )
