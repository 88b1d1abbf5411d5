"""How faithful relevance is: what happens to the target when features go in the order it gives.

* **Perturbation curves** (Samek et al. 2017; Achtibat et al. 2024, section 4.1): the target while
  the most relevant features go first (MoRF) and while the least relevant go first (LeRF). Score:
  the area between the two, over the share of features gone, in units of the target.
* **Deletion and insertion** (RISE, Petsiuk et al. 2018): the areas under the two curves of the
  target's probability. LeRF read from its end is insertion: only the most relevant are there.
* **Comprehensiveness and sufficiency** (ERASER, DeYoung et al. 2020): how much probability goes
  with the most relevant features, and how much is missing when they are all there is.
* **Normalised AOPC** (Edin et al. 2024, arXiv 2408.08137): the area over the MoRF curve, one
  feature a step, between the lowest and the highest that any order has on this input. Raw areas
  say as much about a model as about a method; this one can be compared across models.

All of them ask :class:`~lenslrp.analysis.evaluation.features.Features` for values, and ask for
every set once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from lenslrp.analysis.common.statistics import area
from lenslrp.analysis.evaluation.features import Features, Masks, token_values, tokens_of
from lenslrp.analysis.passes.prompts import ExplainedPrompt, Numbers, Values
from lenslrp.errors import InputError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

BINS = (0.01, 0.05, 0.1, 0.2, 0.5)
"""ERASER's shares of the features."""

BEAM = 5
EXACT = 12
"""Up to so many features, all 2^n sets are cheap enough for exact bounds."""

Of = Literal["value", "probability"]


@dataclass(frozen=True, eq=False)
class PerturbationCurve:
    """The target while features go. All arrays are [step + 1], from none gone to all gone.

    Attributes:
        shares: of the features that are gone.
        morf, lerf: value, the most and the least relevant gone first, in units of the target.
        morf_probability, lerf_probability: likewise.
    """

    shares: Numbers
    morf: Numbers
    lerf: Numbers
    morf_probability: Numbers
    lerf_probability: Numbers

    @property
    def area(self) -> float:
        """Between LeRF and MoRF, in units of the target: higher is better, chance is 0."""
        return area(self.lerf - self.morf, self.shares)

    @property
    def deletion(self) -> float:
        """Under the probability while the most relevant go: lower is better."""
        return area(self.morf_probability, self.shares)

    @property
    def insertion(self) -> float:
        """Under the probability while the most relevant come: higher is better."""
        return area(self.lerf_probability, self.shares)

    @property
    def comprehensiveness(self) -> float:
        """Mean loss of probability without the most relevant, at this curve's steps up to half;
        NaN if it has none there."""
        some = (self.shares > 0) & (self.shares <= 0.5)
        lost = self.morf_probability[0] - self.morf_probability[some]
        return float(lost.mean()) if some.any() else math.nan

    @property
    def sufficiency(self) -> float:
        """Mean loss of probability with nothing but the most relevant, at steps up to half of
        them: lower is better; NaN if there are none."""
        some = (self.shares >= 0.5) & (self.shares < 1)
        lost = self.lerf_probability[0] - self.lerf_probability[some]
        return float(lost.mean()) if some.any() else math.nan

    def scores(self) -> dict[str, float]:
        """Every number above, by its name."""
        names = ("area", "deletion", "insertion", "comprehensiveness", "sufficiency")
        return {name: getattr(self, name) for name in names}


def curves(
    features: Features, relevance: Mapping[str, Numbers], *, steps: int = 8
) -> dict[str, PerturbationCurve]:
    """Perturbation curves of several relevance vectors of one input, from one set of passes.

    Args:
        features: what is taken away.
        relevance: name -> [size], one number a feature (``features.of`` picks them). Equal numbers
            keep their order.
        steps: equal steps from none to all; at most one a feature.

    Raises:
        InputError: no features, fewer than one step, or relevance that is not finite or not [size].
    """
    masks = {name: _both_ways(features.size, values, steps) for name, values in relevance.items()}
    found = _asked_once(features, list(masks.values()))
    return {
        name: _curve(features.size, steps, values)
        for name, values in zip(masks, found, strict=True)
    }


def token_curves(
    model: TransformerBridge,
    prompts: Sequence[ExplainedPrompt],
    relevance: Sequence[Mapping[str, Numbers]],
    *,
    steps: int = 8,
    baseline: str = "zero",
    keep: Sequence[int] = (),
) -> list[dict[str, PerturbationCurve]]:
    """:func:`curves` of several prompts' tokens at once: their rows share forward passes.

    Args:
        relevance: for each prompt, name -> [pos] over all its tokens.
        baseline, keep: as in :func:`~lenslrp.analysis.evaluation.features.tokens_of`.
    """
    sizes, asked = [], []
    for prompt, own in zip(prompts, relevance, strict=True):
        features = tokens_of(model, prompt, baseline=baseline, keep=keep)
        for values in own.values():
            inner = _both_ways(features.size, features.of(values), steps)
            whole = np.zeros((len(inner), prompt.length), dtype=bool)
            whole[:, features.index] = inner
            asked.append(whole)
        sizes.append(features.size)
    owners = [prompt for prompt, own in zip(prompts, relevance, strict=True) for _ in own]
    found = iter(token_values(model, owners, asked, baseline=baseline))
    return [
        {name: _curve(size, steps, next(found)) for name in own}
        for size, own in zip(sizes, relevance, strict=True)
    ]


def _counts(size: int, steps: int) -> list[int]:
    """How many features are gone after each step."""
    if size < 1:
        raise InputError("there are no features to take away")
    if steps < 1:
        raise InputError(f"a curve has at least one step, not {steps}")
    return sorted({round(size * k / steps) for k in range(steps + 1)})


def _order(size: int, relevance: Numbers) -> NDArray[np.int64]:
    """The most relevant first."""
    values = np.asarray(relevance, dtype=np.float64)
    if values.shape != (size,):
        raise InputError(f"relevance is {list(values.shape)}, but there are {size} features")
    if not np.isfinite(values).all():
        raise InputError(f"relevance of feature {int(np.isfinite(values).argmin())} is not finite")
    return np.argsort(-values, kind="stable")


def _first(order: NDArray[np.int64], counts: Sequence[int]) -> Masks:
    """[count, size]: the first so many of an order are gone."""
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    return ranks[None] < np.asarray(counts)[:, None]


def _both_ways(size: int, relevance: Numbers, steps: int) -> Masks:
    counts, order = _counts(size, steps), _order(size, relevance)
    return np.concatenate([_first(order, counts), _first(order[::-1].copy(), counts)])


def _curve(size: int, steps: int, values: Values) -> PerturbationCurve:
    counts = _counts(size, steps)
    n = len(counts)
    return PerturbationCurve(
        np.array(counts) / size,
        values.value[:n],
        values.value[n:],
        values.probability[:n],
        values.probability[n:],
    )


def _asked_once(features: Features, masks: Sequence[Masks]) -> list[Values]:
    """Values of several lists of sets; equal sets are asked for once."""
    if not masks:
        return []
    every = np.concatenate(masks)
    unique, where = np.unique(every, axis=0, return_inverse=True)
    found, where = features.without(unique), where.reshape(-1)
    ends = np.cumsum([len(part) for part in masks])[:-1]
    return [Values(found.value[part], found.probability[part]) for part in np.split(where, ends)]


def comprehensiveness(
    features: Features, relevance: Numbers, bins: Sequence[float] = BINS
) -> float:
    """ERASER's: mean over ``bins`` of the probability lost without the most relevant features.

    A bin is a share of the features, rounded up. Higher is better.
    """
    order = _order(features.size, relevance)
    return _mean_loss(features, _first(order, _bins(features.size, bins)))


def sufficiency(features: Features, relevance: Numbers, bins: Sequence[float] = BINS) -> float:
    """ERASER's: mean over ``bins`` of the probability lost with the most relevant features alone.

    Lower is better.
    """
    order = _order(features.size, relevance)
    return _mean_loss(features, ~_first(order, _bins(features.size, bins)))


def _bins(size: int, bins: Sequence[float]) -> list[int]:
    for share in bins:
        if not 0 < share <= 1:
            raise InputError(f"a bin is a share of the features in (0, 1], not {share}")
    return [math.ceil(share * size - 1e-9) for share in bins]


def _mean_loss(features: Features, masks: Masks) -> float:
    whole = np.zeros((1, features.size), dtype=bool)
    every, some = _asked_once(features, [whole, masks])
    return float((every.probability[0] - some.probability).mean())


def aopc(features: Features, relevance: Numbers, of: Of = "probability") -> float:
    """Area over the perturbation curve: mean loss over all steps of one feature, MoRF.

    Edin et al. 2024, equation 1: ``(1/N) sum_i f(x) - f(x without the i most relevant)``.
    """
    order = _order(features.size, relevance)
    masks = _first(order, range(features.size + 1))
    found: Numbers = getattr(_asked_once(features, [masks])[0], of)
    return float((found[0] - found[1:]).mean())


def aopc_bounds(
    features: Features, *, beam: int | None = None, of: Of = "probability"
) -> tuple[float, float]:
    """The lowest and the highest :func:`aopc` that an order of the features has on this input.

    Args:
        beam: how many sets of each size are followed (the paper's NAOPC-beam; about
            ``beam * n^2`` rows for both bounds). ``None``: exact where there are at most
            ``EXACT`` features (all ``2^n`` sets), else a beam of ``BEAM``.
    """
    if beam is None and features.size > EXACT:
        beam = BEAM
    if beam is not None and beam < 1:
        raise InputError(f"a beam follows at least one set, not {beam}")
    values: dict[bytes, float] = {}

    def losses(masks: Masks) -> Numbers:
        new = {mask.tobytes(): mask for mask in masks if mask.tobytes() not in values}
        if new:
            found = getattr(features.without(np.stack(list(new.values()))), of)
            values.update(zip(new, found.tolist(), strict=True))
        return values[nothing] - np.array([values[mask.tobytes()] for mask in masks])

    nothing = np.zeros(features.size, dtype=bool).tobytes()
    values[nothing] = float(getattr(features.without(np.zeros((1, features.size), bool)), of)[0])
    low, high = (_best(features.size, losses, beam, sign) for sign in (-1, 1))
    return low / features.size, high / features.size


def _best(size: int, losses: Callable[[Masks], Numbers], beam: int | None, sign: int) -> float:
    """The largest (smallest) sum of losses along an order, following the best sets of each size.

    The loss of a set does not depend on the order in it, so of two ways to one set the better is
    kept; with every set followed, that is the exact bound.
    """
    best: dict[bytes, float] = {np.zeros(size, dtype=bool).tobytes(): 0.0}
    for _ in range(size):
        reached: dict[bytes, float] = {}
        for key, total in best.items():
            for feature in np.flatnonzero(~np.frombuffer(key, dtype=bool)):
                mask = np.frombuffer(key, dtype=bool).copy()
                mask[feature] = True
                known = reached.get(mask.tobytes(), -np.inf)
                reached[mask.tobytes()] = max(known, total)
        lost = losses(np.stack([np.frombuffer(key, dtype=bool) for key in reached]))
        sums = {key: reached[key] + sign * loss for key, loss in zip(reached, lost, strict=True)}
        ranked = sorted(sums, key=lambda key: (-sums[key], key))
        best = {key: sums[key] for key in ranked[:beam]}
    return sign * max(best.values())


def normalised_aopc(value: float, bounds: tuple[float, float]) -> float:
    """Edin et al. 2024, equation 4: where ``value`` lies between the bounds, 0 to 1.

    With bounds of a beam, an order can be better than the best that was found: then it is above 1.
    NaN where all orders are equal.
    """
    low, high = bounds
    return (value - low) / (high - low) if high > low else float("nan")
