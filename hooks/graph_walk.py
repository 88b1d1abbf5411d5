"""The coverage check: a walk over the autograd graph, from the target down to the leaves.

Components are not enough: raw operations hide inside wrapped modules (clips, gates, multipliers).
So every node of the graph must belong to a rule, or be linear in what flows through it, or be the
very operation that the rule above it stands for (the matrix product below an attention's uniform
rule, the softmax below a pattern), or lie inside a region that a composite marks as plain.

A rule's share belongs to its operation: *every* path below the rule must reach that operation
before it reaches another rule or a leaf. A term beside a product (``gate * up + up``) would get a
share of the product, so it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules._functions import BackwardHookFunction
from transformer_lens.model_bridge.generalized_components.base import _ScaledHookGradient

from lenslrp.hooks import attention_functions, functions, recurrence_functions
from lenslrp.hooks.sharding import is_gathering
from lenslrp.hooks.sites import Site, has_values
from lenslrp.hooks.view_writes import VIEW_WRITES, is_noted

RULE_FUNCTIONS = frozenset(
    kind
    for module in (functions, attention_functions, recurrence_functions)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, torch.autograd.Function)
)
"""The autograd Functions of rules: only their nodes are trusted to say what they cover."""

LINEAR_NODES = frozenset(
    re.findall(
        r"\w+",
        """
        AccumulateGrad AdaptiveAvgPool1D AdaptiveAvgPool2D Add Alias AsStrided AvgPool1D AvgPool2D
        Cat Chunk Clone Complex ConstantPadNd Contiguous Copy Cumsum Detach Embedding Expand Fill
        Flatten Flip Gather Identity Im2Col Index IndexAdd IndexCopy IndexPut IndexSelect MaskedFill
        MaskedScatter Max Mean Movedim Narrow Neg Pad Permute Real Repeat RepeatInterleave Reshape
        ReshapeAlias Roll Rsub Scatter ScatterAdd Select SelectScatter Slice SliceScatter Sort Split
        SplitWithSizes Squeeze Stack Sub Sum T TensorSplit ToCopy Topk Transpose Tril Triu Unbind
        Unfold UnsafeView Unsqueeze UpsampleBicubic2D UpsampleBilinear2D View ViewAs ViewAsComplex
        ViewAsReal Where Zero
        """,
    )
)
"""Operations linear in every tensor input; a node's name up to its ``Backward`` suffix."""

BILINEAR_NODES = frozenset(
    re.findall(
        r"\w+",
        """
        Addbmm Addcmul Addmm Addmv Baddbmm Bmm Convolution ConvolutionOverrideable Dot Einsum
        GroupedMm LinalgSolveTriangular Linear Matmul MkldnnLinear Mm Mul Mv Outer
        """,
    )
)
"""Linear while only one factor is on the graph; with two they are a product and need a rule."""

DEVIATION_NODES = frozenset({"Std"})
"""``y = sum c c / ((n - 1) y)``: with half to each c and a constant denominator ([A] Prop. 3.2 and
3.4) the rule is the gradient of calculus, and conserves."""

QUOTIENT_NODES = frozenset({"Div", "Addcdiv"})
SOFTMAX_NODES = frozenset({"Softmax", "LogSoftmax"})
CLIP_NODES = frozenset({"Clamp", "ClampMin", "ClampMax"})
"""Linear where nothing is out of bounds (T5's guard against overflow in float16)."""

ROOT = "the target"
LOCATED_GAPS = 12
"""How many gaps are traced to their component; a recurrent mixer has several for each token."""


def depends_on_values(names: Iterable[str]) -> bool:
    """Whether some of the nodes, by their type's name, are linear for some values only."""
    kinds = {re.sub(r"Backwards?\d*$", "", name) for name in names}
    return not kinds.isdisjoint({*CLIP_NODES, "Maximum"})


@dataclass(frozen=True)
class Gap:
    """An operation on the path that no rule answers for."""

    operation: str
    above: str
    component: str = ""

    def __str__(self) -> str:
        place = f"in {self.component}" if self.component else f"below {self.above}"
        return f"{self.operation} {place}"


def operation(node: Any) -> str:
    """``MulBackward0`` -> ``Mul``."""
    return re.sub(r"Backwards?\d*$", "", type(node).__name__)


def inputs_of(node: Any) -> list[Any]:
    """The nodes that a graph node hands its gradient on to."""
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
            names: reached as a plain linear operation, they are gaps.
        place: names the component that a node belongs to, for messages.
        writes: writes into views that were watched: id of the graph node -> what it hides, "" where
            that is linear. Others are gaps.
        latent: the roots are units inside the model.
    """
    walked = Walk([], set(), {}, [], [])
    seen: set[tuple[int, frozenset[tuple[int, str]], tuple[int, ...]]] = set()
    reported: set[int] = set()
    reached: dict[tuple[int, str], Site] = {}
    used: set[tuple[int, str]] = set()
    leaked: dict[int, Site] = {}
    stack: list[tuple[Any, frozenset[tuple[int, str]], tuple[int, ...], str]] = [
        (root.grad_fn, frozenset(), (), ROOT) for root in roots if root.grad_fn is not None
    ]

    def gap(node: Any, name: str, above: str) -> None:
        if id(node) not in reported:
            reported.add(id(node))
            component = place(node) if len(walked.gaps) < LOCATED_GAPS else ""
            walked.gaps.append(Gap(name, above, component))

    while stack:
        node, pending, region, above = stack.pop()
        key = (id(node), pending, region)
        if key in seen:
            continue
        seen.add(key)
        walked.nodes[id(node)] = node
        below = inputs_of(node)
        site = _site(node)
        if pending and not region and (site is not None or not below):
            leaked.update((id(reached[item]), reached[item]) for item in pending)
        if site is not None:
            # A latent unit may be inside a region, for which the site then does not answer.
            begins = latent and node.region < 0 and not region and above == ROOT
            if not begins:
                walked.sites.add(id(site))
            above = f"{site.hook} ({site.role})"
            if site.role == "attention_qk":  # the softmax's own node is at the pattern
                sites: dict[str, Site] = getattr(node, "sites", {})
                walked.sites.update(id(s) for role, s in sites.items() if role != "softmax")
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
    walked.misplaced = [site for item, site in reached.items() if item not in used]
    walked.leaks = list(leaked.values())
    return walked


def _site(node: Any) -> Site | None:
    """The site of a rule's node; an attribute of that name on another node does not count."""
    has_rule = getattr(node, "_forward_cls", None) in RULE_FUNCTIONS
    return getattr(node, "site", None) if has_rule else None


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
    if name in LINEAR_NODES | DEVIATION_NODES or name.startswith("MkldnnReorder"):
        return ""
    if name in VIEW_WRITES:
        unseen = "" if is_noted(node) else "an unknown write into a view"
        hidden = writes.get(id(node), unseen)
        return f"?{hidden}" if hidden else ""
    if name in BILINEAR_NODES:
        return "product"
    if name in QUOTIENT_NODES:
        edges = [below for below, _ in node.next_functions]
        return "" if all(edge is None for edge in edges[-1:]) else "?"
    if name in SOFTMAX_NODES:
        return "softmax"
    if name == "Tanh":
        return "tanh"
    if name in CLIP_NODES:
        return "?" if _clips(node) else ""
    if name == "Maximum":
        return "" if _floors(node) else "?"
    return "?"


def _is_foreign(node: Any) -> bool:
    """Whether a node is a Function from elsewhere: nothing is known of its gradient."""
    kind = getattr(node, "_forward_cls", None)
    if kind is None or kind in RULE_FUNCTIONS or is_gathering(kind):
        return False
    return kind not in (BackwardHookFunction, _ScaledHookGradient)  # the latter scales


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
    on_graph = [below is not None for below, _ in node.next_functions]
    if sum(on_graph) != 1 or not has_values(node._saved_self):
        return False
    x, floor = node._saved_self, node._saved_other
    if on_graph[1]:
        x, floor = floor, x
    return bool(((x >= floor) | (floor <= torch.finfo(x.dtype).min)).all())


def _factors(node: Any, name: str) -> int:
    """How many factors of a product are on the graph."""
    edges = [below for below, _ in node.next_functions]
    if name in ("Addmm", "Baddbmm", "Addbmm", "Addcmul", "Addmv"):
        edges = edges[1:]
    if name in QUOTIENT_NODES:
        return 2 if len(edges) > 1 and edges[1] is not None else 1
    return sum(edge is not None for edge in edges)
