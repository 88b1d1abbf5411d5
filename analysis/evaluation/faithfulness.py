"""How faithful relevance is: the target while features are taken away in the order it gives.

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

All of them take values from `lenslrp.analysis.evaluation.features.Features`, each set of features
once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from lenslrp.analysis.common.statistics import Numbers, area
from lenslrp.analysis.evaluation.features import Features, Masks, token_values, tokens_of
from lenslrp.analysis.passes.prompts import ExplainedPrompt, Values
from lenslrp.errors import InputError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ERASER_SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
"""ERASER's shares of the features."""

BEAM = 5
EXACT = 12
"""Up to so many features, all 2^n sets are cheap enough for exact bounds."""

Of = Literal["value", "probability"]

CURVE_SCORES = ("area", "deletion", "insertion", "comprehensiveness", "sufficiency")
"""Properties of `PerturbationCurve` that are metrics of an evaluation."""


@dataclass(frozen=True, eq=False)
class PerturbationCurve:
    """The target while features are taken away. Arrays are [step + 1], from none gone to all gone.

    Attributes:
        shares: the share of the features that is gone, 0 to 1.
        morf: the target's value, most relevant first (MoRF), in units of the target.
        lerf: the same, least relevant first (LeRF).
        morf_probability: the target's probability, most relevant first.
        lerf_probability: the same, least relevant first.
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
        steps = (self.shares > 0) & (self.shares <= 0.5)
        losses = self.morf_probability[0] - self.morf_probability[steps]
        return float(losses.mean()) if steps.any() else math.nan

    @property
    def sufficiency(self) -> float:
        """Mean loss of probability with nothing but the most relevant, at steps up to half of
        them: lower is better; NaN if there are none."""
        steps = (self.shares >= 0.5) & (self.shares < 1)
        losses = self.lerf_probability[0] - self.lerf_probability[steps]
        return float(losses.mean()) if steps.any() else math.nan

    def scores(self) -> dict[str, float]:
        """The `CURVE_SCORES` by name."""
        return {name: getattr(self, name) for name in CURVE_SCORES}


def curves(
    features: Features, relevance: Mapping[str, Numbers], *, steps: int = 8
) -> dict[str, PerturbationCurve]:
    """Perturbation curves of several relevance vectors of one input, from one set of passes.

    Args:
        features: what is taken away.
        relevance: name -> [size], one number a feature (``features.of`` picks them). Equal numbers
            keep their order.
        steps: equal steps from none to all; at most one a feature.

    Returns:
        For each name the curve, [steps + 1] (fewer for fewer features), in units of the target.

    Raises:
        InputError: no features, fewer than one step, or relevance that is not finite or not [size].

    Examples:
        ```python
        features = tokens_of(model, prompt)
        curve = curves(features, {"attnlrp": features.of(R.tokens[0])}, steps=5)["attnlrp"]
        curve.shares  # [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        curve.area    # LeRF less MoRF, over the shares: chance is 0
        ```
    """
    masks = {name: _both_orders(features.size, values, steps) for name, values in relevance.items()}
    values = _values_of(features, list(masks.values()))
    return {
        name: _curve(features.size, steps, part) for name, part in zip(masks, values, strict=True)
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
    """`curves` of several prompts' tokens at once: their rows share forward passes.

    Args:
        relevance: for each prompt, name -> [pos] over all its tokens.
        baseline: as in `tokens_of`.
        keep: as in `tokens_of`.
    """
    sizes, masks = [], []
    for prompt, by_name in zip(prompts, relevance, strict=True):
        features = tokens_of(model, prompt, baseline=baseline, keep=keep)
        for values in by_name.values():
            inner = _both_orders(features.size, features.of(values), steps)
            whole = np.zeros((len(inner), prompt.length), dtype=bool)
            whole[:, features.index] = inner
            masks.append(whole)
        sizes.append(features.size)
    repeated = [prompt for prompt, names in zip(prompts, relevance, strict=True) for _ in names]
    values_of_each = iter(token_values(model, repeated, masks, baseline=baseline))
    return [
        {name: _curve(size, steps, next(values_of_each)) for name in by_name}
        for size, by_name in zip(sizes, relevance, strict=True)
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


def _both_orders(size: int, relevance: Numbers, steps: int) -> Masks:
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


def _values_of(features: Features, masks: Sequence[Masks]) -> list[Values]:
    """Values of several lists of sets; equal sets are evaluated once."""
    if not masks:
        return []
    unique, where = np.unique(np.concatenate(masks), axis=0, return_inverse=True)
    values, where = features.without(unique), where.reshape(-1)
    ends = np.cumsum([len(part) for part in masks])[:-1]
    return [Values(values.value[part], values.probability[part]) for part in np.split(where, ends)]


def comprehensiveness(
    features: Features, relevance: Numbers, bins: Sequence[float] = ERASER_SHARES
) -> float:
    """ERASER's: mean over ``bins`` of the probability lost without the most relevant features.

    A bin is a share of the features, rounded up. Higher is better.
    """
    order = _order(features.size, relevance)
    return _mean_loss(features, _first(order, _bins(features.size, bins)))


def sufficiency(
    features: Features, relevance: Numbers, bins: Sequence[float] = ERASER_SHARES
) -> float:
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
    nothing_gone = np.zeros((1, features.size), dtype=bool)
    before, after = _values_of(features, [nothing_gone, masks])
    return float((before.probability[0] - after.probability).mean())


def aopc(features: Features, relevance: Numbers, of: Of = "probability") -> float:
    """Area over the perturbation curve: mean loss over all steps of one feature, MoRF.

    Edin et al. 2024 (arXiv:2408.08137), equation 1:
    ``(1/N) sum_i f(x) - f(x without the i most relevant)``.

    Args:
        features: what is taken away.
        relevance: [size], one number a feature.
        of: the target's ``"probability"`` (0 to 1) or its ``"value"`` (logits).

    Raises:
        InputError: relevance that is not finite or not [size].
    """
    order = _order(features.size, relevance)
    masks = _first(order, range(features.size + 1))
    curve: Numbers = getattr(_values_of(features, [masks])[0], of)
    return float((curve[0] - curve[1:]).mean())


def aopc_bounds(
    features: Features, *, beam: int | None = None, of: Of = "probability"
) -> tuple[float, float]:
    """The lowest and the highest `aopc` that an order of the features has on this input.

    Args:
        features: what is taken away.
        beam: how many sets of each size are followed (the paper's NAOPC-beam; about
            ``beam * n^2`` rows for both bounds). ``None``: exact where there are at most
            12 features (all ``2^n`` sets), else a beam of 5.
        of: as for `aopc`.

    Returns:
        (lowest, highest), in the unit of ``of``.

    Raises:
        InputError: a beam of less than 1.
    """
    if beam is None and features.size > EXACT:
        beam = BEAM
    if beam is not None and beam < 1:
        raise InputError(f"a beam follows at least one set, not {beam}")
    nothing_gone = np.zeros((1, features.size), dtype=bool)
    values = {nothing_gone.tobytes(): float(getattr(features.without(nothing_gone), of)[0])}

    def losses(masks: Masks) -> Numbers:
        new = {mask.tobytes(): mask for mask in masks if mask.tobytes() not in values}
        if new:
            added = getattr(features.without(np.stack(list(new.values()))), of)
            values.update(zip(new, added.tolist(), strict=True))
        return values[nothing_gone.tobytes()] - np.array([values[mask.tobytes()] for mask in masks])

    low, high = (_best(features.size, losses, beam, sign) for sign in (-1, 1))
    return low / features.size, high / features.size


def _best(size: int, losses: Callable[[Masks], Numbers], beam: int | None, sign: int) -> float:
    """The largest (smallest) sum of losses along an order, following the best sets of each size.

    The loss of a set does not depend on the order in it, so of two orders that reach one set the
    better is kept; with every set followed, that is the exact bound.
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
        added = losses(np.stack([np.frombuffer(key, dtype=bool) for key in reached]))
        sums = {key: reached[key] + sign * loss for key, loss in zip(reached, added, strict=True)}
        ranked = sorted(sums, key=lambda key: (-sums[key], key))
        best = {key: sums[key] for key in ranked[:beam]}
    return sign * max(best.values())


def normalised_aopc(value: float, bounds: tuple[float, float]) -> float:
    """Edin et al. 2024, equation 4: where ``value`` lies between the bounds, 0 to 1.

    With bounds of a beam, an order can be better than the best that was found: then it is above 1.
    NaN where all orders are equal.

    Examples:
        >>> normalised_aopc(0.25, (0.0, 0.5))
        0.5
    """
    low, high = bounds
    return (value - low) / (high - low) if high > low else float("nan")
