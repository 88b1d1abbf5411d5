"""Did I cover everything? A walk over the autograd graph, from the target down to the leaves.

Components are not enough: raw operations hide inside wrapped modules (clips, gates, multipliers).
So every node of the graph must be one of ours, or linear in what flows through it, or the very
operation that the node of ours above it stands for (the matrix product below a half rule, the
softmax below a pattern), or inside a region that a composite marks as plain.

A rule's share belongs to its operation: *every* path below the rule must meet that operation before
it meets another rule or a leaf. A term beside a product (``gate * up + up``) would get the half of
the product, so it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules._functions import BackwardHookFunction
from transformer_lens.model_bridge.generalized_components.base import _ScaledHookGradient

from lenslrp.errors import CoverageError
from lenslrp.hooks.functions import OURS
from lenslrp.hooks.observing import WRITES
from lenslrp.hooks.sharding import is_gathering
from lenslrp.hooks.sites import Site, has_values

LINEAR = frozenset(
    re.findall(
        r"\w+",
        """
        AccumulateGrad AdaptiveAvgPool1D AdaptiveAvgPool2D Add Alias AsStrided AvgPool1D AvgPool2D
        Cat Chunk Clone Complex ConstantPadNd Contiguous Copy Cumsum Detach Embedding Expand Fill
        Flatten Flip Gather Identity Im2Col Index IndexAdd IndexCopy IndexPut IndexSelect MaskedFill
        MaskedScatter Max Mean Movedim Narrow Neg Pad Permute Real Repeat RepeatInterleave Reshape
        ReshapeAlias Roll RSub Scatter ScatterAdd Select SelectScatter Slice SliceScatter Sort Split
        SplitWithSizes Squeeze Stack Sub Sum T TensorSplit ToCopy Topk Transpose Tril Triu Unbind
        Unfold UnsafeView Unsqueeze UpsampleBicubic2D UpsampleBilinear2D View ViewAs ViewAsComplex
        ViewAsReal Where Zero
        """,
    )
)
"""Operations linear in every tensor input; a node's name up to its ``Backward`` suffix."""

BILINEAR = frozenset(
    re.findall(
        r"\w+",
        """
        Addbmm Addcmul Addmm Addmv Baddbmm Bmm Convolution ConvolutionOverrideable Dot Einsum
        GroupedMm Linear Matmul MkldnnLinear Mm Mul Mv Outer
        """,
    )
)
"""Linear while only one factor is on the graph; with two they are a product and need a rule."""

QUOTIENT = frozenset({"Div", "Addcdiv"})
SOFTMAX = frozenset({"Softmax", "LogSoftmax"})
CLIPS = frozenset({"Clamp", "ClampMin", "ClampMax"})
"""Linear where nothing is out of bounds (T5's guard against overflow in float16)."""


SITES = ["hook", "component", "role", "rule", "layer", "forward", "fired"]

TARGET = "the target"
PLACED = 12
"""How many gaps are traced to their component; a recurrent mixer has several for each token."""

RECURRENT = re.compile(
    r"(Mamba\d*Mixer|MambaLayer|BambaMixer|FalconH1Mixer|GatedDeltaNet|RecurrentBlock|"
    r"RwkvSelfAttention)$"
)
"""Classes of transformers that carry a state from token to token; none of them has a rule."""


def depends_on_values(names: Iterable[str]) -> bool:
    """Whether some of the nodes, by their type's name, are linear for some values only."""
    kinds = {re.sub(r"Backwards?\d*$", "", name) for name in names}
    return not kinds.isdisjoint({*CLIPS, "Maximum"})


@dataclass(frozen=True)
class Gap:
    """An operation on the path that no rule answers for."""

    operation: str
    above: str
    component: str = ""

    def __str__(self) -> str:
        place = f"in {self.component}" if self.component else f"below {self.above}"
        return f"{self.operation} {place}"


@dataclass(frozen=True)
class Coverage:
    """Which rule sat where, whether it fired, and what had none.

    Attributes:
        table: one row a rule, see :attr:`sites`.
        uncovered: operations on the path without a rule (empty unless ``strict=False``).
        off_path: hook points that were asked for implicitly and are not on the path.
        notes: what a reader of these results should know.
        cuts: where the model's own code, or a hook, cut values on the path off the graph
            (``detach``, ``.data``, ``no_grad``): a rule takes them for constants.
        balanced: whether the account of the target adds up, within what the type allows.
    """

    table: pd.DataFrame | list[tuple[Any, ...]] = field(repr=False)
    uncovered: list[str] = field(default_factory=list)
    off_path: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cuts: list[str] = field(default_factory=list)
    balanced: bool = True

    @cached_property
    def sites(self) -> pd.DataFrame:
        """One row a rule: hook, component, role, rule, layer, forward, fired."""
        if isinstance(self.table, pd.DataFrame):
            return self.table
        return pd.DataFrame(self.table, columns=SITES).astype({"layer": "Int64"})

    @property
    def ok(self) -> bool:
        return not self.uncovered and self.balanced and bool(self.sites["fired"].all())

    def __str__(self) -> str:
        rules = self.sites.groupby(["role", "rule"]).size()
        lines = [f"{role}: {rule} at {n} places" for (role, rule), n in rules.items()]
        lines += [f"NO RULE: {gap}" for gap in self.uncovered]
        return "\n".join([*lines, *(f"constant: {cut}" for cut in self.cuts), *self.notes])


def operation(node: Any) -> str:
    """``MulBackward0`` -> ``Mul``."""
    return re.sub(r"Backwards?\d*$", "", type(node).__name__)


def _inputs(node: Any) -> list[Any]:
    return [below for below, _ in node.next_functions if below is not None]


@dataclass
class Walk:
    """What a walk over the graph found.

    Attributes:
        gaps: operations that no rule answers for.
        sites: the sites on the path, by id.
        nodes: every node on the path, by id.
        misplaced: sites whose rule stands above no operation of its kind.
        leaks: sites whose rule also reaches something beside its operation.
    """

    gaps: list[Gap]
    sites: set[int]
    nodes: dict[int, Any]
    misplaced: list[Site]
    leaks: list[Site]

    def faults(self) -> list[str]:
        """Rules that do not stand where they belong, in words."""
        return [
            *(f"{_at(s)} found no operation of its kind below it" for s in self.misplaced),
            *(f"{_at(s)} also reaches something beside its operation" for s in self.leaks),
        ]


def _at(site: Site) -> str:
    return f"{site.rule.name} at {site.hook}"


def walk(
    roots: Iterable[Tensor],
    place: Callable[[Any], str] = lambda _: "",
    weights: Mapping[int, str] | None = None,
    writes: Mapping[int, str] | None = None,
    latent: bool = False,
) -> Walk:
    """Walk the graph from ``roots`` (where relevance starts) to the leaves.

    Args:
        roots: tensors at which the backward pass starts, after any non-linear target.
        weights: addresses of weights whose layers have a rule of their own (gamma, say), with their
            names: met as a plain linear operation, they are gaps.
        place: names the component that a node belongs to, for messages.
        writes: writes into views that were watched: id of the graph node -> what it hides, "" where
            that is linear. Others are gaps.
        latent: the roots are units inside the model.
    """
    found = Walk([], set(), {}, [], [])
    seen: set[tuple[int, frozenset[tuple[int, str]], tuple[int, ...]]] = set()
    reported: set[int] = set()
    reached: dict[tuple[int, str], Site] = {}
    used: set[tuple[int, str]] = set()
    leaked: dict[int, Site] = {}
    stack: list[tuple[Any, frozenset[tuple[int, str]], tuple[int, ...], str]] = [
        (root.grad_fn, frozenset(), (), TARGET) for root in roots if root.grad_fn is not None
    ]

    def gap(node: Any, name: str, above: str) -> None:
        if id(node) not in reported:
            reported.add(id(node))
            found.gaps.append(Gap(name, above, place(node) if len(found.gaps) < PLACED else ""))

    while stack:
        node, pending, region, above = stack.pop()
        key = (id(node), pending, region)
        if key in seen:
            continue
        seen.add(key)
        found.nodes[id(node)] = node
        below = _inputs(node)
        site = _site(node)
        if pending and not region and (site is not None or not below):
            leaked.update((id(reached[item]), reached[item]) for item in pending)
        if site is not None:
            # A latent unit may be inside a region, for which the site then does not answer.
            begins = latent and node.region < 0 and not region and above == TARGET
            if not begins:
                found.sites.add(id(site))
            above = f"{site.hook} ({site.role})"
            if site.role == "attention_qk":  # the softmax's own node is at the pattern
                sites: dict[str, Site] = getattr(node, "sites", {})
                found.sites.update(id(s) for role, s in sites.items() if role != "softmax")
            if node.region > 0:
                region = (*region, id(site))
            elif node.region < 0 and region[-1:] == (id(site),):
                region = region[:-1]
            elif node.region < 0 and not begins:
                gap(node, "a path that enters a region past its output", above)
            pending = frozenset((id(node), opens) for opens in node.opens if not region)
            for item in pending:
                reached[item] = site
        elif not region:
            name = operation(node)
            opens = {item[1]: item for item in pending}
            wants = _wants(node, name, writes or {})
            if wants == "product" and _factors(node, name) < 2:
                wants = ""
            if wants.startswith("?") or (weights and _weight(node) in weights):
                gap(node, wants[1:] or name, above)
            elif wants:
                if wants in opens:
                    used.add(opens[wants])
                    pending = pending - {opens[wants]}
                else:
                    gap(node, name, above)
        elif _is_foreign(node) and not node._forward_cls.__module__.startswith("transformers."):
            gap(node, operation(node), above)
        if region and not below:
            gap(node, "a path that leaves a region past its inputs", above)
        stack.extend((item, pending, region, above) for item in below)
    found.misplaced = [site for item, site in reached.items() if item not in used]
    found.leaks = list(leaked.values())
    return found


def _site(node: Any) -> Site | None:
    """The site of a node of ours; what another's function calls so does not count."""
    ours = getattr(node, "_forward_cls", None) in OURS
    return getattr(node, "site", None) if ours else None


def _weight(node: Any) -> int:
    """The address of the weight that a linear operation saved, 0 for other operations."""
    for name in ("_saved_mat2", "_saved_weight"):
        saved = getattr(node, name, None)
        if isinstance(saved, Tensor):
            return saved.data_ptr()
    return 0


def _wants(node: Any, name: str, writes: Mapping[int, str]) -> str:
    """Which kind of rule must stand above an operation.

    "" for none; "?" for one we lack, with what is hidden behind it if the node's name does not say.
    """
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # written in Python, any name
        return "?" if _is_foreign(node) else ""
    if name in LINEAR or name.startswith("MkldnnReorder"):
        return ""
    if name in WRITES:
        hidden = writes.get(id(node), "an unknown write into a view")
        return f"?{hidden}" if hidden else ""
    if name in BILINEAR:
        return "product"
    if name in QUOTIENT:
        edges = [below for below, _ in node.next_functions]
        return "" if all(edge is None for edge in edges[-1:]) else "?"
    if name in SOFTMAX:
        return "softmax"
    if name == "Tanh":
        return "tanh"
    if name in CLIPS:
        return "?" if _clips(node) else ""
    if name == "Maximum":
        return "" if _floors(node) else "?"
    return "?"


def _is_foreign(node: Any) -> bool:
    """Whether a node was written in Python by somebody else: nothing is known of its gradient."""
    kind = getattr(node, "_forward_cls", None)
    known = (BackwardHookFunction, _ScaledHookGradient)  # the other divides by a constant
    return kind is not None and kind not in OURS and kind not in known and not is_gathering(kind)


def _clips(node: Any) -> bool:
    """Whether a clamp changed any value."""
    x = node._saved_self
    if not has_values(x):
        return True  # nobody can tell
    low, high = getattr(node, "_saved_min", None), getattr(node, "_saved_max", None)
    below = low is not None and bool((x < low).any())
    return below or (high is not None and bool((x > high).any()))


def _floors(node: Any) -> bool:
    """Whether a maximum only keeps masked scores from falling below the type's minimum (XGLM)."""
    live = [below is not None for below, _ in node.next_functions]
    if sum(live) != 1 or not has_values(node._saved_self):
        return False
    x, floor = node._saved_self, node._saved_other
    if live[1]:
        x, floor = floor, x
    return bool(((x >= floor) | (floor <= torch.finfo(x.dtype).min)).all())


def _factors(node: Any, name: str) -> int:
    """How many factors of a product are on the graph."""
    edges = [below for below, _ in node.next_functions]
    if name in ("Addmm", "Baddbmm", "Addbmm", "Addcmul", "Addmv"):
        edges = edges[1:]
    if name in QUOTIENT:
        return 2 if len(edges) > 1 and edges[1] is not None else 1
    return sum(edge is not None for edge in edges)


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

    def __init__(self, parts: Iterable[tuple[str, nn.Module]]) -> None:
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
            if RECURRENT.search(cls):
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

    def recurrent(self, found: Walk) -> list[str]:
        """The recurrent mixers on the path: ``blocks.0.mixer (MambaMixer)``, lowest layer first."""
        on_path = {
            name
            for name, _, _, outputs in self.calls
            if name in self._recurrent and any(id(node) in found.nodes for node in outputs)
        }
        return [f"{name} ({cls})" for name, cls in self._recurrent.items() if name in on_path]


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
        stack.extend(_inputs(node))
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


def require_in_place(found: Walk, architecture: str) -> None:
    """Raise where a rule stands above no operation of its kind, or reaches something beside it.

    Raises:
        CoverageError: naming the rules.
    """
    faults = found.faults()
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
            f"rules were attached and never fired: {names}{more}. The forward pass took another "
            "way round them, so the relevance would be wrong."
        )
