"""How edges are scored: by conditional coefficients, along a line of them, or by path patching."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lenslrp.analysis.circuits.measured_pairs import batch_of
from lenslrp.analysis.circuits.node_methods import embedded
from lenslrp.analysis.circuits.nodes import TARGET, Node, Runs, Units, masking
from lenslrp.analysis.circuits.path_patching import exact_edges
from lenslrp.analysis.circuits.segments import EMBEDDINGS, coefficients, segmented
from lenslrp.batch import Batch
from lenslrp.errors import InputError
from lenslrp.inputs import prepare_text
from lenslrp.progress import progress_bar
from lenslrp.sessions import Session

Edge = tuple[Node, Node]

MAX_DOWNSTREAM = 4096
"""More downstream nodes than this must be asked for one by one."""

ScoredEdges = tuple[Tensor, Tensor, tuple[Node, ...], dict[str, Tensor]]
"""The metric of both runs, the downstream nodes, the scores."""


def estimated_scores(
    runs: Runs, *, session: Session, into: Iterable[Node] | None, rows: int
) -> ScoredEdges:
    """Coefficients of the base run: a backward pass for each downstream node of each pair."""
    other, other_units = runs.read_other()
    base, nodes = _coefficients(runs, session, input=runs.base)
    deltas = {
        hook: runs.exchanged(other_units.pop(hook), nodes[hook][0]) - nodes[hook][0]
        for hook in runs.hooks
    }
    downs = _downstream(runs, deltas) if into is None else tuple(into)
    _require(downs, deltas)
    batch = batch_of(runs.model, runs.base, runs.pairs)
    return base, other, downs, _conditional(runs, session, batch, nodes, deltas, downs, rows)


def integrated_scores(
    runs: Runs, *, session: Session, into: Iterable[Node] | None, rows: int, steps: int
) -> ScoredEdges:
    """Coefficients averaged over points on the line between the two runs' embeddings."""
    (base, base_units, start), (other, other_units, end) = (
        embedded(runs.model, read) for read in (runs.read, runs.read_other)
    )
    deltas = {hook: other_units[hook] - base_units[hook] for hook in runs.hooks}
    # Embeddings that are given fire no hook point of the tokens; the leaf itself stands in for it.
    behind = {hook: name for hook, name in runs.hooks.items() if name != "tokens"}
    deltas |= {hook: (end - start).unsqueeze(2) for hook in runs.hooks if hook not in behind}
    if not behind:
        raise InputError("integrated edges need nodes behind the tokens: give more components")
    downs = _downstream(runs, deltas) if into is None else tuple(into)
    _require(downs, {hook: deltas[hook] for hook in behind})
    runs, scores = replace(runs, hooks=behind), dict[str, Tensor]()
    for step in range(steps):
        embeds = torch.lerp(start, end, (step + 0.5) / steps)
        _, nodes = _coefficients(runs, session, inputs_embeds=embeds)
        mask = masking(runs.pairs, embeds.device).get("attention_mask")
        batch = prepare_text(runs.model, None, inputs_embeds=embeds, attention_mask=mask)
        found = _conditional(runs, session, batch, nodes, deltas, downs, rows)
        scores = {h: x / steps + (scores[h] if scores else 0) for h, x in found.items()}
    return base, other, downs, scores


def _coefficients(
    runs: Runs, session: Session, **read: Tensor
) -> tuple[Tensor, dict[str, tuple[Units, Units]]]:
    """The metric, and the activation and coefficient of every node, where `read` is what runs."""
    given = {**read, **masking(runs.pairs, runs.base.device)}
    cache, nodes = coefficients(session, runs.hooks, target=runs.pairs, **given)
    runs.passes.forward += len(runs.pairs)
    runs.passes.backward += len(runs.pairs)
    return cache.target.value, nodes


def _conditional(
    runs: Runs,
    session: Session,
    prepared: Batch,
    nodes: Mapping[str, tuple[Tensor, Tensor]],
    deltas: Mapping[str, Tensor],
    downs: Sequence[Node],
    rows: int,
) -> dict[str, Tensor]:
    """What arrives at every node from each downstream one, times the activation difference."""
    pairs = runs.pairs
    tokens = next((hook for hook in deltas if hook not in nodes), None)
    scores = {
        hook: delta.new_zeros(
            len(pairs), len(downs), *delta.shape[1 if runs.by_position else 2 : 3]
        )
        for hook, delta in deltas.items()
    }
    copies = max(1, min(len(downs), rows // len(pairs)))
    target = pairs.repeated(copies)
    with segmented(session, prepared.repeated(copies), target, runs.hooks) as segments:
        runs.passes.forward += copies * len(pairs)
        batches = list(_batches(downs, list(runs.hooks), copies))
        for batch in progress_bar("nodes that edges go to", batches):
            arriving, _ = segments.into([downs[i] for i in batch], nodes)
            runs.passes.backward += len(batch) * len(pairs)
            for hook, g in arriving.items():
                if hook == EMBEDDINGS:
                    if tokens is None:
                        continue  # their own hook point, right behind them, is a node or conducts
                    hook, g = tokens, g[..., : deltas[tokens].shape[-1]]
                g = g.unflatten(0, (copies, len(pairs)))[: len(batch)]
                sums = torch.einsum("bpuf,kbpuf->bkpu", deltas[hook], g)
                scores[hook][:, batch] = sums if runs.by_position else sums.sum(dim=2)
    return scores


def _batches(downs: Sequence[Node], hooks: list[str], size: int) -> Iterator[list[int]]:
    """Indices of downstream nodes, those of the same depth together."""
    depth = {hook: index for index, hook in enumerate(hooks)}
    order = sorted(range(len(downs)), key=lambda i: depth.get(downs[i].hook, len(hooks)))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _downstream(runs: Runs, deltas: Mapping[str, Units]) -> tuple[Node, ...]:
    """All nodes that have anything before them, and the target."""
    downs = []
    for hook, delta in deltas.items():
        if runs.hooks[hook] == "tokens":
            continue
        length, units = delta.shape[1:3]
        positions = range(length) if runs.by_position else (None,)
        downs += [Node(hook, unit, p) for unit in range(units) for p in positions]
    if len(downs) > MAX_DOWNSTREAM:
        raise InputError(
            f"there are {len(downs)} downstream nodes, and each takes a backward pass: name those "
            "that you want with into=, or score_nodes() first"
        )
    return (*downs, TARGET)


def _require(downs: Sequence[Node], deltas: Mapping[str, Units]) -> None:
    for node in downs:
        if node == TARGET:
            continue
        if node.hook not in deltas:
            raise InputError(f"{node} is no node of these components")
        length, units = deltas[node.hook].shape[1:3]
        if not 0 <= node.unit < units or (node.position or 0) >= length:
            raise InputError(f"{node}: {node.hook} has {units} units and {length} positions")


def exact_scores(runs: Runs, *, edges: Sequence[Edge]) -> ScoredEdges:
    """The edges that are asked for, by path patching; others are NaN."""
    wanted: dict[Node, list[Node]] = {}
    for up, down in edges:
        if (up.position is not None) != runs.by_position:
            raise InputError(
                f"{up}: an edge starts at one position with by_position=True, and only then"
            )
        wanted.setdefault(up, []).append(down)
    base, other, effects = exact_edges(runs, wanted)
    downs = tuple(dict.fromkeys(down for _, down in edges))
    sizes: dict[str, int] = {}
    for up in wanted:
        sizes[up.hook] = max(sizes.get(up.hook, 0), up.unit + 1)
    length = (runs.base.shape[1],) if runs.by_position else ()
    scores = {
        hook: base.new_full((len(base), len(downs), *length, size), torch.nan)
        for hook, size in sizes.items()
    }
    for (up, down), effect in effects.items():
        into = scores[up.hook][:, downs.index(down), ..., up.unit]
        if up.position is None:
            into[:] = effect
        else:
            runs.pairs.put(into, up.position, effect)
    return base, other, downs, scores
