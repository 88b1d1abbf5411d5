"""A circuit pruned to a size, and what the model still does when everything else is ablated.

Every node outside the circuit is set to what it is in the corrupted run, or to its mean, while the
clean prompt runs. Faithfulness is the share of the logit difference that is left (Wang et al. 2022;
MIB, Mueller et al. 2025): 0 where the circuit does nothing, 1 where it does all. Completeness asks
the opposite question: what is left of the logit difference when the circuit is what is ablated?
Minimality: what does each node of it add?
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lenslrp.analysis.circuits.ablation import ablations
from lenslrp.analysis.circuits.faces import strips
from lenslrp.analysis.circuits.files import Saved
from lenslrp.analysis.circuits.metrics import Metric, MetricFunction, metric_of
from lenslrp.analysis.circuits.node_methods import answered
from lenslrp.analysis.circuits.nodes import Node
from lenslrp.analysis.circuits.pairs import PAIRS_AT_ONCE, Pairs
from lenslrp.analysis.circuits.scores import NodeScores
from lenslrp.analysis.circuits.solved import TaskWarning, warn_of_failures
from lenslrp.analysis.common.statistics import RESAMPLES
from lenslrp.analysis.passes.problems import PassCount
from lenslrp.errors import InputError
from lenslrp.hooks.structure import unchanged
from lenslrp.progress import progress_bar
from lenslrp.views.cards import Face, Shown

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False, repr=False)
class Circuit(Shown, Saved):
    """Some of the nodes of some component classes.

    Attributes:
        components: hook point -> component name.
        keep: hook point -> [unit], True where a node is in the circuit.
        metric: by which it was found.

    Examples:
        >>> circuit = Circuit(
        ...     {"blocks.0.attn.hook_z": "heads"},
        ...     {"blocks.0.attn.hook_z": torch.tensor([True, False, True])},
        ... )
        >>> circuit.sizes()
        {'heads': (2, 3)}
        >>> [str(node) for node in circuit.complement().nodes()]
        ['blocks.0.attn.hook_z[1]']
    """

    components: Mapping[str, str]
    keep: Mapping[str, Bool[Tensor, " unit"]]
    metric: str = "logit_difference"

    def face(self) -> Face:
        sizes = {name: f"{kept:,} of {total:,}" for name, (kept, total) in self.sizes().items()}
        note = "Each line is a hook point, each mark one of its units that is in the circuit."
        return Face("Circuit", sizes, notes=[note], body=strips(self.keep))

    def nodes(self) -> list[Node]:
        """The nodes that are in the circuit."""
        return [
            Node(hook, unit)
            for hook, keep in self.keep.items()
            for unit in keep.nonzero()[:, 0].tolist()
        ]

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Component -> how many of its nodes are in the circuit, and how many there are."""
        sizes: dict[str, tuple[int, int]] = {}
        for hook, keep in self.keep.items():
            kept, total = sizes.get(self.components[hook], (0, 0))
            sizes[self.components[hook]] = (kept + int(keep.sum()), total + len(keep))
        return sizes

    def complement(self) -> Circuit:
        """All nodes that are not in the circuit."""
        return replace(self, keep={hook: ~keep for hook, keep in self.keep.items()})

    def without(self, node: Node) -> Circuit:
        """The circuit less one node."""
        keep = {hook: mask.clone() for hook, mask in self.keep.items()}
        keep[node.hook][node.unit] = False
        return replace(self, keep=keep)


def mean_scores(scores: NodeScores, component: str) -> Float[Tensor, " node"]:
    """The nodes' means over pairs; above 0 what the clean run's metric owes to them.

    Raises:
        InputError: scores by position, a component of which not all nodes were scored.
    """
    if scores.by_position:
        raise InputError("a circuit is of nodes at all positions: score with by_position=False")
    mean = scores.of(component).mean(dim=0).cpu()
    if bool(mean.isnan().any()):
        raise InputError(f"not all {component} were scored, so the best of them are not known")
    return mean if scores.direction == "denoising" else -mean


def ranking(
    mean: Float[Tensor, " node"], by: str, generator: torch.Generator
) -> Int[Tensor, " node"]:
    """Indices of nodes, the best first; `by` as for `prune`."""
    if by not in ("score", "size", "random"):
        raise InputError(f"by must be 'score', 'size' or 'random', not {by!r}")
    if by == "random":
        mean = torch.rand(len(mean), generator=generator)
    return (mean.abs() if by == "size" else mean).argsort(descending=True, stable=True)


def prune(
    scores: NodeScores,
    share: float | Mapping[str, float] | None = None,
    *,
    nodes: int | Mapping[str, int] | None = None,
    components: Sequence[str] | None = None,
    by: str = "score",
    seed: int = 0,
) -> Circuit:
    """The best nodes, a share of each component class or a number. Warns where the task failed.

    Args:
        scores: of nodes at all positions.
        share: how much of each class to keep, from 0 to 1: of all, or by component name. Rounded
            down to whole nodes.
        nodes: instead of a share, how many nodes: of all classes together, or by component name.
        components: the classes that the circuit is of; all that were scored if not given. Nodes of
            others are no part of the question, and are never ablated.
        by: `"score"`: what the clean run's metric owes most to (mean over pairs); `"size"`: what
            moves it most, either way; `"random"`: by a shuffle of the nodes.
        seed: of the shuffle.

    Returns:
        The circuit, over the hook points of `scores` that hold `components`.

    Raises:
        InputError: scores by position, shares or numbers out of range, a component that was not
            scored.

    Examples:
        >>> scores = score_nodes(gpt2, pairs)  # 144 heads, 36,864 neurons
        >>> prune(scores, {"heads": 0.1, "neurons": 0.01}).sizes()
        {'heads': (14, 144), 'neurons': (368, 36864)}
        >>> prune(scores, nodes=20, components=["heads"]).sizes()
        {'heads': (20, 144)}
    """
    if (share is None) == (nodes is None):
        raise InputError("give a share of the nodes or a number of nodes")
    names = list(dict.fromkeys(scores.components.values() if components is None else components))
    if not names:
        raise InputError("a circuit is of one component class or more; no components were given")
    means = {name: mean_scores(scores, name) for name in names}
    sizes = {name: len(mean) for name, mean in means.items()}
    groups = {"all": names} if isinstance(nodes, int) else {name: [name] for name in names}
    numbers = _numbers(share, nodes, {g: sum(sizes[n] for n in of) for g, of in groups.items()})
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, Tensor] = {}
    for group, members in groups.items():
        ranked = ranking(torch.cat([means[name] for name in members]), by, generator)
        kept = torch.zeros(len(ranked), dtype=torch.bool)
        kept[ranked[: numbers[group]]] = True
        chosen.update(zip(members, kept.split([sizes[name] for name in members]), strict=True))
    keep: dict[str, Tensor] = {}
    for name, kept in chosen.items():
        hooks = [hook for hook, other in scores.components.items() if other == name]
        parts = kept.split([scores.values[hook].shape[-1] for hook in hooks])
        keep.update(zip(hooks, parts, strict=True))
    if scores.correct is not None:
        warn_of_failures(scores.correct)
    placed = {hook: name for hook, name in scores.components.items() if hook in keep}
    return Circuit(placed, {hook: keep[hook] for hook in placed}, scores.metric)


def _numbers(
    share: float | Mapping[str, float] | None,
    nodes: int | Mapping[str, int] | None,
    sizes: Mapping[str, int],
) -> dict[str, int]:
    """How many nodes to keep of each class.

    Raises:
        InputError: shares or numbers out of range, or not of these classes.
    """
    given: Any = share if nodes is None else nodes
    amounts = given if isinstance(given, Mapping) else dict.fromkeys(sizes, given)
    most = dict.fromkeys(sizes, 1) if nodes is None else sizes
    if set(amounts) != set(sizes) or not all(0 <= amounts[n] <= most[n] for n in sizes):
        if nodes is None:
            names = ", ".join(sizes)
            raise InputError(f"share must be from 0 to 1 for each of {names}, not {share!r}")
        limits = ", ".join(f"{size} of {name}" for name, size in sizes.items())
        raise InputError(f"nodes must be from 0 to {limits}, not {nodes!r}")
    if nodes is None:
        return {name: int(amounts[name] * size) for name, size in sizes.items()}
    return dict(amounts)


def between(resampled: NDArray[np.float64]) -> tuple[float, float, float]:
    """A value and its 95% bootstrap interval, from the value and those of its samples, [1 + n]."""
    low, high = np.percentile(resampled[1:], [2.5, 97.5])
    return float(resampled[0]), float(low), float(high)


@dataclass(frozen=True, eq=False, repr=False)
class Verdict(Shown, Saved):
    """What circuits do when all else is ablated; a metric, [pair] each.

    Attributes:
        clean: of the whole model.
        floor: of the corrupted run; under mean ablation, of the clean prompt with every node
            ablated.
        gaps: [circuit, pair], of each circuit.
        correct: [pair], whether the clean run prefers the answer to the incorrect one.
        metric: its name.
    """

    clean: Float[Tensor, " pair"]
    floor: Float[Tensor, " pair"]
    gaps: Float[Tensor, "circuit pair"]
    correct: Bool[Tensor, " pair"]
    metric: str = "logit_difference"

    def face(self) -> Face:
        intervals = [self.interval(index) for index in range(len(self.gaps))]
        frame = pd.DataFrame(intervals, columns=["faithfulness", "low", "high"])
        frame.insert(0, self.metric.replace("_", " "), self.gaps.double().mean(dim=1).tolist())
        frame.insert(0, "circuit", range(len(frame)))
        return Face(
            "Verdict: circuits with all else ablated",
            {
                "pairs": len(self.clean),
                "whole model": float(self.clean.mean()),
                "floor": float(self.floor.mean()),
                "model is right in": f"{self.solved:.0%}",
            },
            frame,
            notes=["Faithfulness: (circuit - floor) / (whole - floor), 95% bootstrap interval."],
        )

    def __repr__(self) -> str:
        kept = ", ".join(f"{share:.3g}" for share in self.faithfulness)
        return f"{super().__repr__()[:-1]}, faithfulness {kept})"

    @property
    def solved(self) -> float:
        """The share of pairs in which the whole model prefers the answer to the incorrect one."""
        return float(self.correct.double().mean())

    @property
    def faithfulness(self) -> list[float]:
        """Of each circuit: the share of the metric, meaned over pairs, that it keeps."""
        return [self.interval(index)[0] for index in range(len(self.gaps))]

    def interval(self, index: int = 0, seed: int = 0) -> tuple[float, float, float]:
        """Faithfulness of one circuit with its 95% bootstrap interval over pairs.

        Args:
            index: which circuit.
            seed: of the bootstrap.

        Returns:
            Faithfulness (a ratio of means), lower and upper end.
        """
        return between(self.resampled(index, seed))

    def resampled(self, index: int, seed: int = 0) -> NDArray[np.float64]:
        """Faithfulness of one circuit, [1 + n]: over all pairs, then over bootstrap samples."""
        total = (self.clean - self.floor).double().cpu().numpy()
        kept = (self.gaps[index] - self.floor).double().cpu().numpy()
        picks = np.random.default_rng(seed).integers(0, len(total), (RESAMPLES, len(total)))
        whole = kept.mean() / total.mean()
        ratios: NDArray[np.float64] = np.append(
            whole, kept[picks].mean(axis=1) / total[picks].mean(axis=1)
        )
        return ratios


def verify(
    model: TransformerBridge,
    pairs: Pairs,
    circuits: Sequence[Circuit],
    *,
    metric: str | Metric | MetricFunction | None = None,
    ablation: str = "corrupt",
    reference: Pairs | None = None,
    chunk: int = PAIRS_AT_ONCE,
) -> Verdict:
    """Run the clean prompts with all that is outside a circuit ablated, one circuit after another.

    Faithfulness is (circuit - floor) / (clean - floor), as in Wang et al. (2022) and MIB (Mueller
    et al. 2025). Warns of pairs in which the model itself does not do the task.

    Args:
        model: a `TransformerBridge`.
        pairs: best ones that were not used to find the circuit.
        circuits: over the same hook points.
        metric: what is measured of a run, as for `score_nodes`; that by which the circuits were
            found, if not given.
        ablation: nodes outside are set to the pair's `"corrupt"` run, or to their `"mean"`.
        reference: the pairs over which means are taken; `pairs` if not given.
        chunk: how many pairs run at once.

    Returns:
        The metric of the whole model and of each circuit.

    Raises:
        InputError: no circuits, circuits over different hook points, an unknown ablation, the
            corrupted run's activations for prompts of different lengths.

    Examples:
        >>> whole = prune(scores, 1.0)
        >>> verify(model, held_out, [whole]).faithfulness  # nothing is ablated
        [1.0]
    """
    if not circuits or any(set(c.keep) != set(circuits[0].keep) for c in circuits):
        raise InputError("give one or more circuits over the same hook points")
    components = circuits[0].components
    parts = []
    measured = metric_of(metric, [circuit.metric for circuit in circuits])
    with unchanged(model):
        for part in ablations(model, pairs, components, measured, ablation, reference, chunk):
            tried = torch.stack([part.run(c.keep) for c in progress_bar("circuits", circuits)])
            parts.append((part.clean, part.floor, tried))
    clean, floor, gaps = (torch.cat(each, dim=-1) for each in zip(*parts, strict=True))
    correct = answered(model, pairs, measured, clean, PassCount())
    verdict = Verdict(clean, floor, gaps, correct, measured.name)
    _require_task(verdict)
    return verdict


def _require_task(verdict: Verdict) -> None:
    """Warn where there is no task to be faithful to, or not in all pairs."""
    n = len(verdict.clean)
    chance = min(1.0, 0.5 + 1.645 * (0.25 / n) ** 0.5)  # 19 coins of 20 do worse
    if verdict.solved < chance or verdict.clean.mean() <= verdict.floor.mean():
        warnings.warn(
            f"the model does not do the task: it prefers the answer in {verdict.solved:.0%} of {n} "
            f"clean prompts, and its mean {verdict.metric.replace('_', ' ')} is "
            f"{float(verdict.clean.mean()):.3g}, that of the floor "
            f"{float(verdict.floor.mean()):.3g}. Faithfulness is a share of the difference and "
            "says nothing here",
            TaskWarning,
            stacklevel=3,
        )
        return
    warn_of_failures(verdict.correct, stacklevel=4)


def completeness(model: TransformerBridge, pairs: Pairs, circuit: Circuit, **options: Any) -> float:
    """1 minus the faithfulness of everything but the circuit: 1 where nothing else does it.

    Args:
        model, pairs, circuit: as for `verify`.
        options: as for `verify`.
    """
    return 1 - verify(model, pairs, [circuit.complement()], **options).faithfulness[0]


def minimality(
    model: TransformerBridge,
    pairs: Pairs,
    circuit: Circuit,
    *,
    component: str = "heads",
    **options: Any,
) -> pd.DataFrame:
    """What faithfulness loses when one more node is ablated, for each node of a class.

    Args:
        model, pairs, circuit: as for `verify`.
        component: the class.
        options: as for `verify`.

    Returns:
        Columns `node` and `loss`, the largest first.
    """
    nodes = [node for node in circuit.nodes() if circuit.components[node.hook] == component]
    tried = [circuit, *(circuit.without(node) for node in nodes)]
    whole, *less = verify(model, pairs, tried, **options).faithfulness
    frame = pd.DataFrame({"node": list(map(str, nodes)), "loss": [whole - one for one in less]})
    return frame.sort_values("loss", ascending=False, kind="stable", ignore_index=True)
