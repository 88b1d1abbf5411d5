"""The ledger: an account of the whole target, each term measured at its own site.

Relevance is conserved from layer to layer (Bach et al., PLOS ONE 2015), apart from what a rule
absorbs on purpose: biases and stabilisers, and the softmax rule's own term (Achtibat et al., ICML
2024). Each is reported where it happens:
``target = leaves + biases + softmax + recurrence + positional + stabiliser + plain +
nonlinear_target``. No term is a remainder; ``error`` is what the account misses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lenslrp.hooks.sites import LEDGER_TERMS, Accounts, widest
from lenslrp.views.cards import Face, Shown

BALANCED = {
    torch.float64: 1e-5,  # where a model computes in float32: 1e-6; elsewhere 1e-14
    torch.float32: 2e-4,
    torch.bfloat16: 2e-1,
    torch.float16: 3e-2,
}
"""What an account may miss, relative to its largest entry: nearly twice and more of what right
passes miss (``benchmarks/balance.py``: at most 2.5e-6, 1.1e-1 and 1.1e-2 in the last three)."""


ACCOUNT = {
    "biases": "stayed in biases",
    "softmax": "stayed in the softmax",
    "positional": "went to positions",
    "stabiliser": "was taken by stabilisers",
    "plain": "was lost in operations without a rule of their own",
    "nonlinear_target": "is what the target adds to the logits it reads",
    "recurrence": "stayed in operators of recurrent mixers",
}
"""What becomes of each term, as a sentence says it."""


@dataclass(frozen=True, repr=False)
class Ledger(Shown):
    """Where the target went, in the target's unit (logits), summed over the batch.

    Printed, it is a column of numbers; in a notebook, a table.

    Examples:
        >>> account = R.ledger()
        >>> account.error  # what the account misses, relative to the target
        -4.9e-07
        >>> account.table.loc["5", ["resid_out", "resid_in", "biases"]]  # one block

    Attributes:
        target: the value that was explained, as a sum over the rows.
        leaves: relevance that arrived at token (and position) embeddings.
        biases: what biases absorbed.
        softmax: what the softmax rule leaked, R(pattern) - R(scores) summed over layers.
        positional: what positional terms took.
        stabiliser: what stabilisers and saturated soft-caps took.
        plain: what operations marked plain lost (negative: gained).
        nonlinear_target: what a target that is not linear in the logits adds.
        table: the same per layer; ``resid_out = resid_in + terms`` in each row, and its error.
        recurrence: what the operators of recurrent mixers leaked, where they get a share.
    """

    target: float
    leaves: float
    biases: float
    softmax: float
    positional: float
    stabiliser: float
    plain: float
    nonlinear_target: float
    table: pd.DataFrame
    recurrence: float = 0.0

    @property
    def accounted(self) -> float:
        """The sum of the terms: the target, up to rounding."""
        terms = sum(getattr(self, term) for term in LEDGER_TERMS)
        return float(self.leaves + terms + self.nonlinear_target)

    @property
    def largest(self) -> float:
        """The largest entry: rounding goes by it, not by the target."""
        return max(abs(float(getattr(self, term))) for term in ("target", "leaves", *LEDGER_TERMS))

    @property
    def imbalance(self) -> float:
        """What the account misses, relative to its largest entry: held against ``BALANCED``."""
        return abs(self.target - self.accounted) / self.largest if self.largest else 0.0

    @property
    def error(self) -> float:
        """(target - sum of the terms) / |target|, signed.

        Relative to the largest entry, where the target itself is (nearly) zero.
        """
        largest = self.largest
        scale = abs(self.target) if abs(self.target) > 1e-6 * largest else largest
        return (self.target - self.accounted) / scale if scale else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The terms by name, and the error; without the table."""
        numbers = {k: v for k, v in asdict(self).items() if k != "table"}
        return {**numbers, "error": self.error}

    @property
    def sentence(self) -> str:
        """The account in words: what reached the leaves, and the largest terms that did not.

        Examples:
            >>> R.ledger().sentence
            'Of the target, 17.4, 6.7 (39%) reached the leaves and 11 (61%) stayed in the softmax.'
        """

        def part(value: float) -> str:
            share = f" ({value / self.target:.0%})" if self.target else ""
            return f"{value:.3g}{share}"

        kept = [(getattr(self, term), phrase) for term, phrase in ACCOUNT.items()]
        kept = [(value, phrase) for value, phrase in kept if abs(value) >= 5e-3 * self.largest]
        kept.sort(key=lambda entry: -abs(entry[0]))
        parts = [f"{part(self.leaves)} reached the leaves"]
        parts += [f"{part(value)} {phrase}" for value, phrase in kept]
        listed = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
        return f"Of the target, {self.target:.3g}, {listed}."

    def __repr__(self) -> str:
        return f"Ledger({self.sentence} Missed: {self.error:.1e})"

    def __str__(self) -> str:
        rows = [f"{name:>16} {value:+.6g}" for name, value in self.to_dict().items()]
        return "\n".join(rows)

    def face(self) -> Face:
        rows = [("leaves", self.leaves, "reached the leaves")]
        rows += [(term, getattr(self, term), phrase) for term, phrase in ACCOUNT.items()]
        frame = pd.DataFrame(
            [
                (name, value, f"{value / self.target:.0%}" if self.target else "–", phrase)
                for name, value, phrase in rows
                if value
            ],
            columns=["term", "relevance", "share", "what it is"],
        )
        return Face(
            "Ledger: where the target went",
            {"target": self.target, "account misses": f"{self.error:.1e} of it"},
            frame,
            coloured=["relevance"],
            notes=[self.sentence, "In units of the target, summed over rows; .table has layers."],
        )


def read_sums(tensors: Iterable[Tensor]) -> list[float]:
    """The sum of each tensor, with one transfer a device: the host waits for a GPU only here."""
    flat = [x.detach().reshape(-1).to(widest(x)) for x in tensors]
    numbers: dict[int, float] = {}
    for device in dict.fromkeys(x.device for x in flat):
        indices = [i for i, x in enumerate(flat) if x.device == device]
        values = iter(torch.cat([flat[i] for i in indices]).tolist())
        numbers.update((i, math.fsum(islice(values, len(flat[i])))) for i in indices)
    return [numbers[i] for i in range(len(flat))]


def make_ledger(
    accounts: Accounts,
    values: Tensor,
    arrived: Sequence[Tensor],
    at_roots: Sequence[Tensor],
    layers: int,
) -> Ledger:
    """Close the account of one backward pass.

    Args:
        values: the explained values, [batch].
        arrived: relevance at the leaves.
        begun: relevance with which the backward pass started (the sum of logit times gradient).
        layers: how many blocks the model has.
    """
    named: list[tuple[Any, Tensor]] = [
        ("target", values),
        *(("leaves", amount) for amount in arrived),
        *(("start", amount) for amount in at_roots),
        *((key, amount) for key, amounts in accounts.reported.items() for amount in amounts),
        *accounts.flows.items(),
    ]
    sums: dict[Any, float] = {"leaves": 0.0, "start": 0.0}
    for (key, _), value in zip(named, read_sums(tensor for _, tensor in named), strict=True):
        sums[key] = sums.get(key, 0.0) + value
    target, leaves, start = sums["target"], sums["leaves"], sums["start"]
    totals = dict.fromkeys(LEDGER_TERMS, 0.0)
    per_layer: dict[tuple[int | None, str], float] = {}
    for key in accounts.reported:
        term, layer, _ = key
        totals[term] += sums[key]
        per_layer[layer, term] = per_layer.get((layer, term), 0.0) + sums[key]
    rows: list[dict[str, Any]] = []
    for layer in range(layers):
        into, out = (sums.get((layer, side)) for side in ("in", "out"))
        if into is None:
            continue
        terms = {term: per_layer.get((layer, term), 0.0) for term in LEDGER_TERMS}
        if out is None:  # a block that hands out a list fires no hook_out
            out = sums.get((layer + 1, "in"))
        if out is None:  # a latent target inside a block: relevance starts there, never left it
            out = start
        missed = out - into - sum(terms.values())
        rows.append(
            {"layer": str(layer), "resid_in": into, **terms, "resid_out": out, "error": missed}
        )
    if not rows:  # no residual stream was watched (two stacks, or no blocks): one row for all
        missed = start - leaves - sum(totals.values())
        row = {"layer": "all", "resid_in": leaves, **totals, "resid_out": start, "error": missed}
        table = pd.DataFrame([row]).set_index("layer")
        return Ledger(
            target=target, leaves=leaves, **totals, nonlinear_target=target - start, table=table
        )
    outside = {term: per_layer.get((None, term), 0.0) for term in LEDGER_TERMS}
    first = rows[0]["resid_in"] if rows else start - sum(outside.values())
    last = rows[-1]["resid_out"] if rows else first
    # Outside the blocks: final norm and unembedding above, embeddings below.
    missed = (start - last) + (first - leaves) - sum(outside.values())
    rows.append(
        {"layer": "outside", "resid_in": leaves, **outside, "resid_out": start, "error": missed}
    )
    table = pd.DataFrame(rows).set_index("layer")
    return Ledger(
        target=target, leaves=leaves, **totals, nonlinear_target=target - start, table=table
    )
