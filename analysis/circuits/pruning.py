"""A circuit pruned to a size, and what the model still does when everything else is ablated.

Every node outside the circuit is set to what it is in the corrupted run, or to its mean, while the
clean prompt runs. Faithfulness is the share of the logit difference that is left (Wang et al. 2022;
MIB, Mueller et al. 2025): 0 where the circuit does nothing, 1 where it does all. Over circuits of
growing size, CPR is the area under that curve and CMD the area between it and 1. Completeness asks
the opposite question: what is left of the logit difference when the circuit is what is ablated?
Minimality: what does each node of it add?
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lenslrp.analysis.circuits.nodes import (
    COMPONENTS,
    Node,
    Units,
    as_units,
    batch_of,
    logit_differences,
    read_units,
)
from lenslrp.analysis.circuits.pairs import Pairs
from lenslrp.analysis.circuits.scores import PAIRS_AT_ONCE, NodeScores
from lenslrp.analysis.common.statistics import RESAMPLES, area
from lenslrp.edits import Edit
from lenslrp.errors import InputError
from lenslrp.hooks.structure import unchanged

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SHARES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


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


def prune(
    scores: NodeScores,
    share: float | Mapping[str, float],
    *,
    by: str = "score",
    seed: int = 0,
) -> Circuit:
    """The best nodes of each component class.

    Args:
        scores: of nodes at all positions.
        share: how much of each class to keep, from 0 to 1: of all, or by component name. Rounded
            down to whole nodes.
        by: `"score"`: what the logit difference gains most by (mean over pairs); `"size"`: what
            moves it most, either way; `"random"`: by a shuffle of the nodes.
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
    if scores.by_position:
        raise InputError("a circuit is of nodes at all positions: score with by_position=False")
    names = list(dict.fromkeys(scores.components.values()))
    shares = share if isinstance(share, Mapping) else dict.fromkeys(names, share)
    if set(shares) != set(names) or not all(0 <= s <= 1 for s in shares.values()):
        raise InputError(f"share must be from 0 to 1 for each of {', '.join(names)}, not {share!r}")
    if by not in ("score", "size", "random"):
        raise InputError(f"by must be 'score', 'size' or 'random', not {by!r}")
    keep: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        mean = scores.of(name).mean(dim=0)
        if bool(mean.isnan().any()):
            raise InputError(f"not all {name} were scored, so the best of them are not known")
        if by == "random":
            mean = torch.rand(len(mean), generator=generator)
        ranked = (mean.abs() if by == "size" else mean).argsort(descending=True, stable=True)
        chosen = torch.zeros(len(mean), dtype=torch.bool)
        chosen[ranked[: int(shares[name] * len(mean))].cpu()] = True
        hooks = [hook for hook, other in scores.components.items() if other == name]
        sizes = [scores.values[hook].shape[-1] for hook in hooks]
        keep.update(zip(hooks, chosen.split(sizes), strict=True))
    return Circuit(scores.components, {hook: keep[hook] for hook in scores.components})


def mean_activations(
    model: TransformerBridge,
    pairs: Pairs,
    components: Mapping[str, str],
    *,
    chunk: int = PAIRS_AT_ONCE,
) -> dict[str, Float[Tensor, "unit feature"]]:
    """Each node's mean over both prompts of all pairs and all their real tokens."""
    sums: dict[str, Tensor] = {}
    for part in pairs.chunks(chunk):
        for tokens in (part.clean, part.corrupt):
            batch = batch_of(model, tokens, part)
            for hook, x in read_units(model, batch, part, components)[1].items():
                total = x[part.mask.to(x.device)].sum(dim=0)
                sums[hook] = sums[hook] + total if hook in sums else total
    return {hook: total / (2 * int(pairs.mask.sum())) for hook, total in sums.items()}


def ablated(circuit: Circuit, instead: Mapping[str, Units]) -> list[Edit]:
    """Every node outside `circuit`, set to what `instead` holds.

    Args:
        circuit: what is left as it is.
        instead: hook point -> [pair, pos, unit, feature]; pair and pos may be 1.
    """

    def put(x: Tensor, *, name: str) -> Tensor:
        units = as_units(COMPONENTS[circuit.components[name]].kind, x, name)
        keep = circuit.keep[name].to(x.device)[:, None]
        return torch.where(keep, units, instead[name]).reshape(x.shape)

    names = [name for name, keep in circuit.keep.items() if not keep.all()]
    return [Edit(name, function=partial(put, name=name)) for name in names]


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
        total = (self.clean - self.floor).double().cpu().numpy()
        kept = (self.gaps[index] - self.floor).double().cpu().numpy()
        picks = np.random.default_rng(seed).integers(0, len(total), (RESAMPLES, len(total)))
        ratios = kept[picks].mean(axis=1) / total[picks].mean(axis=1)
        low, high = np.percentile(ratios, [2.5, 97.5])
        return float(kept.mean() / total.mean()), float(low), float(high)


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
    if ablation not in ("corrupt", "mean"):
        raise InputError(f"ablation must be 'corrupt' or 'mean', not {ablation!r}")
    if not circuits or any(set(c.keep) != set(circuits[0].keep) for c in circuits):
        raise InputError("give one or more circuits over the same hook points")
    components = circuits[0].components
    means = {}
    if ablation == "mean":
        by_unit = mean_activations(model, reference or pairs, components, chunk=chunk)
        means = {hook: mean[None, None] for hook, mean in by_unit.items()}
    elif reference is not None:
        raise InputError("reference is what means are taken over: it goes with ablation='mean'")
    nothing = Circuit(
        components, {hook: torch.zeros_like(k) for hook, k in circuits[0].keep.items()}
    )
    clean, floor, kept = [], [], []
    with unchanged(model):
        for part in pairs.chunks(chunk):
            batch, instead = batch_of(model, part.clean, part), means
            run = partial(logit_differences, model, batch, part)
            clean.append(run())
            if ablation == "corrupt":
                corrupted = batch_of(model, part.corrupt, part)
                value, instead = read_units(model, corrupted, part, components)
                floor.append(value)
            else:
                floor.append(run(edits=ablated(nothing, instead)))
            kept.append(torch.stack([run(edits=ablated(each, instead)) for each in circuits]))
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


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve:
    """Faithfulness of circuits of growing size.

    Attributes:
        table: `share`, `nodes`, `faithfulness`, `low` and `high` (95%).
        cpr: area under faithfulness over the share of nodes kept (higher is better).
        cmd: area between it and 1 (lower is better).
    """

    table: pd.DataFrame
    cpr: float
    cmd: float


def faithfulness_curve(
    model: TransformerBridge,
    pairs: Pairs,
    scores: NodeScores,
    *,
    shares: Sequence[float] = SHARES,
    by: str = "score",
    **options: Any,
) -> FaithfulnessCurve:
    """Faithfulness over size: more and more of the best nodes of every class are kept.

    CPR and CMD are of MIB (Mueller et al. 2025).

    Args:
        model, pairs: as for `verify`.
        scores: of nodes at all positions.
        shares: how much of each class to keep, from 0 to 1.
        by: as for `prune`.
        options: as for `verify`.

    Returns:
        A curve with one row a share, and its areas.

    Raises:
        InputError: as `prune` and `verify`.

    Examples:
        >>> curve = faithfulness_curve(model, held_out, scores, shares=[0.0, 0.1, 1.0])
        >>> list(curve.table.columns), len(curve.table)
        (['share', 'nodes', 'faithfulness', 'low', 'high'], 3)
    """
    circuits = [prune(scores, share, by=by) for share in shares]
    verdict = verify(model, pairs, circuits, **options)
    intervals = [verdict.interval(index) for index in range(len(circuits))]
    kept = [sum(n for n, _ in circuit.sizes().values()) for circuit in circuits]
    table = pd.DataFrame(intervals, columns=["faithfulness", "low", "high"])
    table.insert(0, "share", list(shares))
    table.insert(1, "nodes", kept)
    values, at = table["faithfulness"].to_numpy(), np.array(shares)
    return FaithfulnessCurve(table, area(values, at), area(np.abs(1 - values), at))
