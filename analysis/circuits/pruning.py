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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lenslrp.analysis.circuits.ablation import ablations
from lenslrp.analysis.circuits.nodes import Node
from lenslrp.analysis.circuits.pairs import Pairs
from lenslrp.analysis.circuits.scores import PAIRS_AT_ONCE, NodeScores
from lenslrp.analysis.common.statistics import RESAMPLES
from lenslrp.errors import InputError
from lenslrp.hooks.structure import unchanged

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False)
class Circuit:
    """Some of the nodes of some component classes.

    Attributes:
        components: hook point -> component name.
        keep: hook point -> [unit], True where a node is in the circuit.

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
        return Circuit(self.components, {hook: ~keep for hook, keep in self.keep.items()})

    def without(self, node: Node) -> Circuit:
        """The circuit less one node."""
        keep = {hook: mask.clone() for hook, mask in self.keep.items()}
        keep[node.hook][node.unit] = False
        return Circuit(self.components, keep)


def classes(components: Mapping[str, str], pooled: bool = False) -> dict[str, list[str]]:
    """Component -> its hook points; `pooled`: all hook points in one class."""
    found: dict[str, list[str]] = {}
    for hook, name in components.items():
        found.setdefault("nodes" if pooled else name, []).append(hook)
    return found


def ranking(
    scores: NodeScores, hooks: Sequence[str], by: str, generator: torch.Generator
) -> Int[Tensor, " node"]:
    """Indices of the nodes of some hook points, the best first; arguments as for `prune`."""
    if scores.by_position:
        raise InputError("a circuit is of nodes at all positions: score with by_position=False")
    if by not in ("score", "size", "random"):
        raise InputError(f"by must be 'score', 'size' or 'random', not {by!r}")
    mean = torch.cat([scores.values[hook] for hook in hooks], dim=1).mean(dim=0).cpu()
    if bool(mean.isnan().any()):
        names = " and ".join(dict.fromkeys(scores.components[hook] for hook in hooks))
        raise InputError(f"not all {names} were scored, so the best of them are not known")
    if by == "random":
        mean = torch.rand(len(mean), generator=generator)
    elif by == "size":
        mean = mean.abs()
    elif scores.direction == "noising":  # what a node does for the answer is lost with it
        mean = -mean
    return mean.argsort(descending=True, stable=True)


def prune(
    scores: NodeScores,
    share: float | Mapping[str, float],
    *,
    by: str = "score",
    pooled: bool = False,
    seed: int = 0,
) -> Circuit:
    """The best nodes of each component class.

    Args:
        scores: of nodes at all positions.
        share: how much of each class to keep, from 0 to 1: of all, or by component name. Rounded
            down to whole nodes.
        by: `"score"`: what the clean run's logit difference owes most to (mean over pairs);
            `"size"`: what moves it most, either way; `"random"`: by a shuffle of the nodes.
        pooled: keep the best of all nodes together, as MIB does, and not of each class.
        seed: of the shuffle.

    Returns:
        The circuit, over the hook points of `scores`.

    Raises:
        InputError: scores by position, shares out of range, a component that was not scored.

    Examples:
        >>> scores = score_nodes(gpt2, pairs)  # 144 heads, 36,864 neurons
        >>> prune(scores, {"heads": 0.1, "neurons": 0.01}).sizes()
        {'heads': (14, 144), 'neurons': (368, 36864)}
    """
    hooks_of = classes(scores.components, pooled)
    shares = share if isinstance(share, Mapping) else dict.fromkeys(hooks_of, share)
    if set(shares) != set(hooks_of) or not all(0 <= s <= 1 for s in shares.values()):
        names = ", ".join(hooks_of)
        raise InputError(f"share must be from 0 to 1 for each of {names}, not {share!r}")
    keep: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    for name, hooks in hooks_of.items():
        ranked = ranking(scores, hooks, by, generator)
        chosen = torch.zeros(len(ranked), dtype=torch.bool)
        chosen[ranked[: int(shares[name] * len(ranked))]] = True
        sizes = [scores.values[hook].shape[-1] for hook in hooks]
        keep.update(zip(hooks, chosen.split(sizes), strict=True))
    return Circuit(scores.components, {hook: keep[hook] for hook in scores.components})


def between(resampled: NDArray[np.float64]) -> tuple[float, float, float]:
    """A value and its 95% bootstrap interval, from the value and those of its samples, [1 + n]."""
    low, high = np.percentile(resampled[1:], [2.5, 97.5])
    return float(resampled[0]), float(low), float(high)


@dataclass(frozen=True, eq=False)
class Verdict:
    """What circuits do when all else is ablated; logit differences, [pair] each.

    Attributes:
        clean: of the whole model.
        floor: of the corrupted run; under mean ablation, of the clean prompt with every node
            ablated.
        gaps: [circuit, pair], of each circuit.
    """

    clean: Float[Tensor, " pair"]
    floor: Float[Tensor, " pair"]
    gaps: Float[Tensor, "circuit pair"]

    @property
    def solved(self) -> float:
        """The share of pairs in which the whole model prefers the answer to the incorrect one."""
        return float((self.clean > 0).double().mean())

    @property
    def faithfulness(self) -> list[float]:
        """Of each circuit: the share of the mean logit difference that it keeps."""
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
        n = len(total)
        picks = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
        ratios: NDArray[np.float64] = np.append(
            kept.mean() / total.mean(), kept[picks].mean(axis=1) / total[picks].mean(axis=1)
        )
        return ratios


def verify(
    model: TransformerBridge,
    pairs: Pairs,
    circuits: Sequence[Circuit],
    *,
    ablation: str = "corrupt",
    reference: Pairs | None = None,
    chunk: int = PAIRS_AT_ONCE,
) -> Verdict:
    """Run the clean prompts with all that is outside a circuit ablated, one circuit after another.

    Faithfulness is (circuit - floor) / (clean - floor), as in Wang et al. (2022) and MIB (Mueller
    et al. 2025). Warns where the model itself is no better than chance at the task.

    Args:
        model: a `TransformerBridge`.
        pairs: best ones that were not used to find the circuit.
        circuits: over the same hook points.
        ablation: nodes outside are set to the pair's `"corrupt"` run, or to their `"mean"`.
        reference: the pairs over which means are taken; `pairs` if not given.
        chunk: how many pairs run at once.

    Returns:
        The logit differences of the whole model and of each circuit.

    Raises:
        InputError: no circuits, circuits over different hook points, an unknown ablation.

    Examples:
        >>> whole = prune(scores, 1.0)
        >>> verify(model, held_out, [whole]).faithfulness  # nothing is ablated
        [1.0]
    """
    if not circuits or any(set(c.keep) != set(circuits[0].keep) for c in circuits):
        raise InputError("give one or more circuits over the same hook points")
    components = circuits[0].components
    clean, floor, kept = [], [], []
    with unchanged(model):
        for part in ablations(model, pairs, components, ablation, reference, chunk):
            clean.append(part.clean)
            floor.append(part.floor)
            kept.append(torch.stack([part.run(each.keep) for each in circuits]))
    verdict = Verdict(torch.cat(clean), torch.cat(floor), torch.cat(kept, dim=1))
    _require_task(verdict)
    return verdict


def _require_task(verdict: Verdict) -> None:
    """Warn where there is no task to be faithful to."""
    n = len(verdict.clean)
    chance = min(1.0, 0.5 + 1.645 * (0.25 / n) ** 0.5)  # 19 coins of 20 do worse
    if verdict.solved < chance or verdict.clean.mean() <= verdict.floor.mean():
        warnings.warn(
            f"the model does not do the task: it prefers the answer in {verdict.solved:.0%} of {n} "
            f"clean prompts, and its mean logit difference is {float(verdict.clean.mean()):.3g}, "
            f"that of the floor {float(verdict.floor.mean()):.3g}. Faithfulness is a share of the "
            "difference and says nothing here",
            stacklevel=3,
        )


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
