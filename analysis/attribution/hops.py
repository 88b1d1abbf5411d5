"""Hops: relevance of an answer, carried back through what the model wrote before it.

A written token is an input of what follows, so it takes relevance. In the next hop the relevance
that reached it starts anew, at the logit for which it was written; hop by hop it moves to earlier
tokens until the prompt holds it. After FlashTrace (Pan et al. 2026, arXiv:2602.01914), whose hops
go through importance that is normalised and not signed; here they are backward passes under rules,
each with its own account.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lenslrp.analysis.units.parsing import parse_unit
from lenslrp.cache import RelevanceCache
from lenslrp.errors import InputError
from lenslrp.generation import Span, positions_of
from lenslrp.hooks.composites import Composite
from lenslrp.hooks.rule_types import Rule
from lenslrp.ledger import Ledger
from lenslrp.sessions import Session
from lenslrp.targets import Sum
from lenslrp.views.matrix import matrix_heatmap
from lenslrp.writing import Writing, write

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_SMALLEST = 1e-3
"""Of the largest target of a written token: relevance is not shared out by a smaller one."""

_TERMS = ("softmax", "biases", "recurrence", "positional", "stabiliser", "plain")


@dataclass(frozen=True, eq=False)
class Hop:
    """One backward pass of `explain_hops`.

    Attributes:
        carried: [generated], with how much each written token started: its target's value times
            the weight that makes it what the hop before left there.
        relevance: [position], where it arrived, at the token embeddings.
        heads: relevance through each attention head, largest first: ``head``, ``relevance``.
        ledger: the account of the pass; its target is the sum of ``carried``.
    """

    carried: Float[Tensor, " generated"] = field(repr=False)
    relevance: Float[Tensor, " position"] = field(repr=False)
    heads: pd.DataFrame = field(repr=False)
    ledger: Ledger


@dataclass(frozen=True, eq=False)
class Hops:
    """How an answer goes back to the prompt; see `explain_hops`.

    Attributes:
        hops: one a backward pass, in order.
        span: the written tokens that were explained, as numbers from 0 (from, to before).
        str_tokens: of everything that was read and written.
        writing: their ids, and where the prompt ends.
        composite: the name of the rules.
    """

    hops: list[Hop] = field(repr=False)
    span: tuple[int, int]
    str_tokens: list[str] = field(repr=False)
    writing: Writing = field(repr=False)
    composite: str

    @property
    def start(self) -> int:
        """The position of the first written token."""
        return self.writing.start

    @property
    def relevance(self) -> Float[Tensor, "hop position"]:
        """Where each hop's relevance arrived, in units of the target (logits)."""
        return torch.stack([hop.relevance for hop in self.hops])

    @property
    def prompt(self) -> Float[Tensor, " prompt"]:
        """Relevance that ended at each token of the prompt, summed over the hops."""
        return self.relevance[:, : self.start].sum(dim=0)

    @property
    def left(self) -> float:
        """Relevance that the last hop left at written tokens, and no hop carried on."""
        return float(self.hops[-1].relevance[self.start :].sum())

    def __repr__(self) -> str:
        return (
            f"Hops({len(self.hops)} from {self._answer!r} to {self.start} tokens, {self.composite})"
        )

    @property
    def _answer(self) -> str:
        return "".join(self.str_tokens[self.start :][slice(*self.span)])

    def table(self) -> pd.DataFrame:
        """The account, a row a hop: what started, and where it went.

        ``started = prompt + written + positions + absorbed``, and what was ``written`` starts the
        next hop: the answer's value is the sum over the hops of all but ``written``, and what is
        `left`.

        Returns:
            ``started``, ``prompt`` (ended there), ``written`` (at written tokens), ``positions``
            (at learned ones), ``absorbed`` (by the rules: see `lenslrp.Ledger`), ``error`` (the
            ledger's, relative), in units of the target.
        """
        rows = []
        for hop in self.hops:
            ledger, written = hop.ledger, float(hop.relevance[self.start :].sum())
            prompt = float(hop.relevance[: self.start].sum())
            rows.append(
                {
                    "started": ledger.target,
                    "prompt": prompt,
                    "written": written,
                    "positions": ledger.leaves - prompt - written,
                    "absorbed": ledger.accounted - ledger.leaves,
                    "error": ledger.error,
                }
            )
        return pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="hop"))

    def heads(self, k: int = 5) -> pd.DataFrame:
        """The k heads of each hop that carried most, by absolute relevance.

        Returns:
            ``hop``, ``head`` (as `parse_unit` reads it) and ``relevance``.

        Raises:
            InputError: ``k`` below 1.
        """
        if k < 1:
            raise InputError(f"k must be at least 1, not {k}")
        tables = [hop.heads[:k].assign(hop=n) for n, hop in enumerate(self.hops, start=1)]
        return pd.concat(tables, ignore_index=True)[["hop", "head", "relevance"]]

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k tokens of the prompt at which most relevance ended, by absolute value.

        Returns:
            ``position``, ``token``, ``relevance``, and ``hop 1``, ``hop 2``, ...

        Raises:
            InputError: ``k`` below 1.
        """
        if k < 1:
            raise InputError(f"k must be at least 1, not {k}")
        frame = self.to_dataframe().query(f"position < {self.start}")
        table = frame.pivot(index=["position", "token"], columns="hop", values="relevance")
        table.columns = [f"hop {hop}" for hop in table.columns]
        table.insert(0, "relevance", table.sum(axis=1))
        order = table["relevance"].abs().sort_values(ascending=False, kind="stable").index[:k]
        return table.loc[order].reset_index()

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each hop and position: ``hop``, ``position``, ``token``, ``relevance``."""
        values = self.relevance.tolist()
        return pd.DataFrame(
            [
                (hop, position, token, row[position])
                for hop, row in enumerate(values, start=1)
                for position, token in enumerate(self.str_tokens)
            ],
            columns=["hop", "position", "token", "relevance"],
        )

    def _repr_html_(self) -> str:
        table = self.table()
        return matrix_heatmap(
            [*(f"hop {hop}" for hop in table.index), "prompt, all hops"],
            [*(f"{value:+.2f}" for value in table["started"]), f"{self.prompt.sum():+.2f}"],
            self.str_tokens,
            torch.cat([self.relevance, torch.zeros_like(self.relevance[:1])]).index_put(
                (torch.tensor(-1), torch.arange(self.start)), self.prompt
            ),
            lengths=[*(len(self.str_tokens) for _ in self.hops), self.start],
            borders=[self.start],
            title=f"{len(self.hops)} hops from {self._answer!r}, by {self.composite}",
        )


def explain_hops(
    model: TransformerBridge,
    prompt: Any,
    span: Span | None = None,
    *,
    text: Any = None,
    max_new_tokens: int = 20,
    of: str = "logit",
    max_hops: int = 10,
    until: float = 0.01,
    composite: Composite | Mapping[str, Rule] | None = None,
    prepend_bos: bool | None = None,
    attention: str = "bridge",
    checkpoint: bool = False,
    strict: bool = True,
) -> Hops:
    """Explain an answer by the prompt, through the thought that was written between them.

    The first hop explains the sum of the span's targets. Each further hop explains the weighted sum
    of the written tokens' targets, with weights that make each token's share what the hop before
    left at it: relevance at the token divided by its target's value. All of a row's relevance is
    shared out as that row is, and signs are kept. Each hop goes to earlier tokens only, so there is
    an end.

    Conserved: every hop by its ledger, and from hop to hop what is at written tokens. Not conserved
    to the prompt: what rules absorb (with AttnLRP the softmax, mostly) is gone in each hop, so
    long chains lose more; `Hops.table` says where.

    Args:
        model: a ``TransformerBridge``, in eval mode: a decoder, or an encoder-decoder.
        prompt: as for `lenslrp.explain_generation`.
        span: the answer among the written tokens: a text that occurs once, or (from, to before),
            from 0; the last token if not given.
        text: as for `lenslrp.explain_generation`, as are the next two.
        max_new_tokens: likewise.
        of: likewise.
        max_hops: the most backward passes.
        until: stop where less than this part of the first hop's value is at written tokens (of
            absolute relevance).
        composite: as for `lenslrp.run_with_relevance`, as is what follows.
        prepend_bos: likewise.
        attention: likewise.
        checkpoint: likewise.
        strict: likewise.

    Returns:
        Relevance of each hop over all positions, its heads and its ledger.

    Raises:
        InputError: something given cannot be explained, or a written token with a target so near 0
            that nothing can be shared out by it.
        CoverageError: an operation on the path has no rule, or a rule did not fire.

    Examples:
        >>> H = explain_hops(model, "Tom: dog\\ndog: Rome\\nTom:", text=" dog\\ndog: Rome")
        >>> H.top(2)["token"].tolist()
        >>> H.table()["written"]
    """
    if max_hops < 1:
        raise InputError(f"max_hops is a number of backward passes from 1, not {max_hops}")
    writing = write(model, prompt, text, max_new_tokens=max_new_tokens, prepend_bos=prepend_bos)
    shown, _ = writing.text(model.tokenizer)
    n, start = len(writing.written), writing.start
    answer = positions_of((n - 1, n) if span is None else span, shown[start:])
    targets = writing.targets(of)
    weights = torch.zeros(n, dtype=torch.float64)
    weights[answer.start : answer.stop] = 1
    hops: list[Hop] = []
    with Session(
        model, composite, attention=attention, checkpoint=checkpoint, strict=strict,
        logits="target",
    ) as session:  # fmt: skip
        while True:
            target = Sum(tuple(targets), tuple(weights.tolist()))
            _, cache = session.run_with_relevance(
                target=target, names_filter=_is_head, reduce="sum", **writing.inputs
            )
            values = torch.tensor([t.notes[t.position][0] for t in targets], dtype=torch.float64)
            relevance = writing.relevance(cache).cpu()
            hops.append(Hop(weights * values, relevance, _heads(cache), cache.ledger()))
            left = relevance[start:].double()
            enough = until * float(hops[0].carried.abs().sum())
            if len(hops) == max_hops or float(left.abs().sum()) <= enough:
                break
            _require_shareable(left, values, shown[start:], of)
            weights = torch.where(left == 0, 0.0, left / values)
        rules = session.composite.name
    return Hops(hops, (answer.start, answer.stop), shown, writing, rules)


def _is_head(hook: str) -> bool:
    return hook.endswith("hook_z")


def _heads(cache: RelevanceCache) -> pd.DataFrame:
    """Relevance through each head, summed over positions, of the largest absolute value first."""
    rows = [
        (str(parse_unit(f"{hook}[{head}]")), relevance)
        for hook in cache
        for head, relevance in enumerate(cache[hook][0].sum(dim=0).tolist())
    ]
    table = pd.DataFrame(rows, columns=["head", "relevance"])
    return table.sort_values("relevance", key=abs, ascending=False, ignore_index=True)


def _require_shareable(left: Tensor, values: Tensor, written: list[str], of: str) -> None:
    small = (values.abs() < _SMALLEST * values.abs().max()) & (left != 0)
    if bool(small.any()):
        row = int(small.nonzero()[0])
        raise InputError(
            f"the {of} of the written token {written[row]!r} (number {row}) is {values[row]:.3g}, "
            "too near 0 for relevance to be shared out by it: explain hops with of='mean', the "
            "logit less the mean of all others"
        )
