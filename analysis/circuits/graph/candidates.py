"""What may become a node of a graph: one pass finds activation and coefficient of everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lenslrp.analysis.circuits.graph.pruning import Vector
from lenslrp.analysis.circuits.nodes import COMPONENTS, Node
from lenslrp.analysis.circuits.replacement import (
    ActiveFeatures,
    ErrorNode,
    FeatureNode,
    error_key,
    features_key,
)
from lenslrp.analysis.circuits.segments import EMBEDDINGS, coefficients, segmented, unit_at
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.analysis.units.coders import SparseCoder
from lenslrp.batch import Batch
from lenslrp.cache import RelevanceCache
from lenslrp.hooks.structure import layer_of
from lenslrp.logits import Target
from lenslrp.sessions import Session


@dataclass(frozen=True, eq=False)
class Candidates:
    """All heads, neurons, active features and errors of one prompt.

    Attributes:
        session: of the model and its rules.
        prepared: the prompt.
        target: what is explained.
        cache: the prompt, explained without coders.
        hooks: hook point -> component.
        coders: stand in the model's place.
        nodes: hook point, or key of a coder -> activation and coefficient, [1, pos, unit, feature]
            or [1, entry, 1, 1], in the order in which the model computes them.
        tokens: [pos], their relevance.
        active: which features of each coder are active.
        passes: of the prompt through the model.
    """

    session: Session
    prepared: Batch
    target: Target
    cache: RelevanceCache
    hooks: Mapping[str, str]
    coders: tuple[SparseCoder, ...]
    nodes: Mapping[str, tuple[Tensor, Tensor]]
    tokens: Vector
    active: Mapping[str, ActiveFeatures]
    passes: PassCount

    @property
    def errors(self) -> set[str]:
        """The keys of what coders leave out."""
        return {error_key(coder) for coder in self.coders}

    def coder(self, key: str) -> SparseCoder | None:
        """The coder whose features or errors are kept under a key."""
        keys = {key: c for c in self.coders for key in (features_key(c), error_key(c))}
        return keys.get(key)

    def __len__(self) -> int:
        return sum(x.shape[1] * x.shape[2] for x, _ in self.nodes.values())

    def choose(self, k: int, share: float) -> list[Node]:
        """The most relevant of them, in the order in which the model computes them.

        Args:
            k: how many at most.
            share: of all relevance, in size, that they need to hold.
        """
        sizes = [(x * g)[0].sum(dim=-1).abs().double().cpu() for x, g in self.nodes.values()]
        flat = torch.cat([size.flatten() for size in sizes])
        best = flat.sort(descending=True, stable=True)
        sums = best.values.cumsum(0)
        enough = int((sums < share * sums[-1]).sum()) + 1
        keys, ends = list(self.nodes), torch.tensor([size.numel() for size in sizes]).cumsum(0)
        chosen = []
        for index in best.indices[: min(k, enough)].tolist():
            place = int(torch.searchsorted(ends, index, right=True))
            offset = index - (int(ends[place - 1]) if place else 0)
            chosen.append((place, self._node(keys[place], *divmod(offset, sizes[place].shape[1]))))
        chosen.sort(key=lambda pair: (pair[0], pair[1].position or 0, pair[1].unit))
        return [node for _, node in chosen]

    def _node(self, key: str, place: int, unit: int) -> Node:
        if key in self.active:
            there = self.active[key]
            return FeatureNode(key, int(there.features[place]), int(there.positions[place]))
        return (ErrorNode if key in self.errors else Node)(key, unit, place)

    def masks(self, chosen: Sequence[Node]) -> dict[str, Tensor]:
        """Hook point or key -> which of its units are chosen, [pos, unit] or [entry, 1]."""
        masks = {
            key: torch.zeros(x.shape[1:3], dtype=torch.bool) for key, (x, _) in self.nodes.items()
        }
        for node in chosen:
            masks[node.hook][unit_at(node, self.active)] = True
        return masks

    def relevance(self, node: Node) -> float:
        x, g = self._at(node)
        return float((x.double() * g.double()).sum())

    def activation(self, node: Node) -> float:
        """Of a feature or a neuron its own, of what is a vector its length."""
        x, _ = self._at(node)
        entry = node.hook in self.hooks and COMPONENTS[self.hooks[node.hook]].kind == "entry"
        return float(x) if entry or node.hook in self.active else float(x.norm())

    def _at(self, node: Node) -> tuple[Tensor, Tensor]:
        x, g = self.nodes[node.hook]
        at = (0, *unit_at(node, self.active))
        return x[at], g[at]


def find_candidates(
    session: Session,
    prepared: Batch,
    target: Target,
    hooks: Mapping[str, str],
    coders: Sequence[SparseCoder],
    **inputs: Any,
) -> Candidates:
    """The candidates of one prompt.

    Args:
        session: of the model and its rules.
        prepared: the prompt, as a batch.
        target: what is explained.
        hooks: hook point -> component.
        coders: stand in the model's place.
        inputs: the prompt, as `lenslrp.sessions.Session.run_with_relevance` takes it.

    Raises:
        InputError: a coder that does not fit the model.
        CoverageError: an operation on the path has no rule.
    """
    if not coders:
        cache, nodes = coefficients(session, hooks, target=target, **inputs)
        # A backward pass came to the last ones first: inside a layer, reverse that order.
        order = list(nodes)[::-1]
        order.sort(key=lambda hook: layer_of(hook) or 0)
        leaves = cache.tokens if cache.positions is None else cache.tokens + cache.positions
        return Candidates(
            session, prepared, target, cache, hooks, (), {hook: nodes[hook] for hook in order},
            leaves[0].double().cpu().numpy(), {}, PassCount(1, 1),
        )  # fmt: skip
    # The rules are checked on the model as it is: what coders replace is off the path afterwards.
    _, cache = session.run_with_relevance(names_filter=[], target=target, **inputs)
    with segmented(session, prepared, target, hooks, coders=coders, conducts=True) as segments:
        arrived, _ = segments.conditional_gradients({}, torch.ones(1))
        # What coders replace gets no gradient. A pass keeps its outputs in the order in which
        # they are made.
        nodes = {
            key: (segments.at(key), arrived[key]) for key in segments.outputs if key in arrived
        }
        embedded = segments.embedded()
        tokens = (embedded * arrived.get(EMBEDDINGS, torch.zeros_like(embedded))).sum(dim=(0, 2, 3))
        on_path = {hook: name for hook, name in hooks.items() if hook in arrived}
    return Candidates(
        session, prepared, target, cache, on_path, tuple(coders), nodes,
        tokens.double().cpu().numpy(), segments.active, PassCount(2, 2),
    )  # fmt: skip
