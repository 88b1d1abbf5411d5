"""Metrics: what is measured of a run, one number a pair.

A node's effect, a circuit's faithfulness and the value that relevance starts from are all of one
metric. It is computed of the logits that predict the answer's tokens, and more of it is nearer to
the clean run's answer. Backward passes start at the logits with its gradient there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lenslrp.analysis.circuits.rows import PairRows
from lenslrp.errors import InputError

MetricFunction = Callable[[Tensor, Any, Tensor | None], Tensor]


@dataclass(frozen=True)
class Metric:
    """A function of the logits of a run.

    Attributes:
        name: what results say was measured.
        function: `function(logits, pairs, clean_logits)` -> [pair], differentiable in `logits`,
            which are [pair, token, vocab]: those that predict each token of the answer, one where
            it is one token. `pairs` has the rows' `answers` and `rivals`, [pair], or
            [pair, token] with -1 behind the shorter ones. `clean_logits` are the clean run's, of
            the same shape.
        everywhere: logits at all positions, [pair, pos, vocab], instead: `pairs.mask` is True where
            there is a token. Costs the unembedding of every position.
        reads_clean: whether it needs the clean run's logits, by a forward pass more; without,
            `clean_logits` is None.
        stationary: its gradient at the clean run is 0, so that nothing can be estimated from there.
        sequences: where answers have several tokens, the function of one answer that stands in for
            `function`: it is taken of the answer and of the incorrect answer, each in a run of its
            own, and what counts is the difference.
    """

    name: str
    function: MetricFunction
    everywhere: bool = False
    reads_clean: bool = False
    stationary: bool = False
    sequences: MetricFunction | None = None

    def of(
        self, logits: Float[Tensor, "pair pos vocab"], pairs: PairRows, clean: Tensor | None
    ) -> Float[Tensor, " pair"]:
        """Its value in every row.

        Raises:
            InputError: the function gives something else than a real number a row.
        """
        several = pairs.answers.ndim == 2 and self.sequences is not None
        function = self.sequences if several else self.function
        assert function is not None
        values = function(logits, pairs, clean)
        if not isinstance(values, Tensor) or values.shape != (len(pairs),) or values.is_complex():
            got = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else values
            raise InputError(
                f"the metric {self.name} must return {len(pairs)} real numbers, one a row of its "
                f"logits, not {got!s:.60}"
            )
        return values


def _answers(pairs: PairRows, device: torch.device) -> tuple[Tensor, Tensor]:
    """[pair, token, 1] ids to gather with, and [pair, token], True where there is a token."""
    answers = pairs.answers.to(device).reshape(len(pairs), -1)
    return answers.clamp(min=0)[..., None], answers >= 0


def logit_difference(logits: Tensor, pairs: PairRows, clean: Tensor | None = None) -> Tensor:
    """Logit of the answer minus that of the incorrect answer: [pair]."""
    rows, last = torch.arange(len(pairs), device=logits.device), logits[:, -1]
    return last[rows, pairs.answers.to(last.device)] - last[rows, pairs.rivals.to(last.device)]


def log_prob(logits: Tensor, pairs: PairRows, clean: Tensor | None = None) -> Tensor:
    """Log-probability of the answer, in nats: the sum over its tokens, [pair]."""
    ids, real = _answers(pairs, logits.device)
    each = logits.log_softmax(dim=-1).gather(2, ids)[..., 0]
    return torch.where(real, each, 0).sum(dim=1)


def minus_kl(logits: Tensor, pairs: PairRows, clean: Tensor | None = None) -> Tensor:
    """Minus KL(clean || run) of the next token, summed over the answer's: [pair], in nats."""
    assert clean is not None
    before, after = clean.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    each = (before.exp() * (before - after)).sum(dim=-1)
    return -torch.where(_answers(pairs, logits.device)[1], each, 0).sum(dim=1)


def margin(logits: Tensor, pairs: PairRows, clean: Tensor | None = None) -> Tensor:
    """Logit of the answer minus the largest other logit, the least over its tokens: [pair].

    Greedy decoding writes the answer where this is above 0.
    """
    ids, real = _answers(pairs, logits.device)
    others = logits.scatter(2, ids, -torch.inf).amax(dim=-1)
    each = logits.gather(2, ids)[..., 0] - others
    return torch.where(real, each, torch.inf).amin(dim=1)


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("logit_difference", logit_difference, sequences=log_prob),
        Metric("log_prob", log_prob),
        Metric("kl", minus_kl, reads_clean=True, stationary=True),
        Metric("margin", margin),
    )
}
"""Name -> metric."""


def metric_of(metric: str | Metric | MetricFunction | None, found_by: Iterable[str]) -> Metric:
    """The metric that is given, or that by whose name results were found.

    Raises:
        InputError: as `as_metric`; several names, or that of a function, which it does not bring
            back.
    """
    if metric is not None:
        return as_metric(metric)
    names = set(found_by)
    if len(names) > 1 or not names <= set(METRICS):
        raise InputError(
            f"this was found by {' and '.join(sorted(names))}: say which metric to measure, metric="
        )
    return METRICS[names.pop()]


def as_metric(metric: str | Metric | MetricFunction) -> Metric:
    """A metric from what a caller may give: a name of `METRICS`, a `Metric`, a function.

    Raises:
        InputError: no such name, or something else.
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str) and metric in METRICS:
        return METRICS[metric]
    if not callable(metric):
        raise InputError(
            f"metric must be one of {', '.join(METRICS)}, a Metric, or a function of logits, pairs "
            f"and the clean run's logits, not {metric!r}"
        )
    return Metric(getattr(metric, "__name__", "metric"), metric, reads_clean=True)
