"""Pairs as they are run and measured: the rows of tokens, and the metric that is read of them.

An answer of several tokens is teacher-forced: its tokens but the last follow the prompt, and the
logits before each of them say how likely it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from lenslrp.analysis.circuits.metrics import Metric, MetricFunction, as_metric
from lenslrp.analysis.circuits.rows import PairRows
from lenslrp.batch import Batch
from lenslrp.errors import InputError
from lenslrp.forward import columns_for, forward
from lenslrp.inputs import prepare_text
from lenslrp.logits import Outputs, Target

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False)
class MeasuredPairs(PairRows):
    """Rows of tokens, teacher-forced where answers are long, and what is measured of them.

    A target of `lenslrp.run_with_relevance`.

    Attributes:
        metric: what is measured.
        signs: [pair], what a row's value is multiplied by.
        parts: how many rows there are of each pair, one block of rows after the other.
        clean_logits: [pair, token, vocab], or at all positions: the clean run's, for a metric that
            needs them.
    """

    metric: Metric = field(kw_only=True)
    signs: Float[Tensor, " pair"] = field(kw_only=True)
    parts: int = field(default=1, kw_only=True)
    clean_logits: Float[Tensor, "pair n vocab"] | None = field(default=None, kw_only=True)

    @classmethod
    def of(cls, pairs: PairRows, metric: str | Metric | MetricFunction) -> MeasuredPairs:
        """How pairs are run for a metric.

        Raises:
            InputError: no pairs, no such metric, or one at all positions for prompts of different
                lengths.
        """
        metric = as_metric(metric)
        if len(pairs) == 0:
            raise InputError("no pairs to measure")
        if metric.everywhere and pairs.corrupt_mask is not None:
            raise InputError(
                f"the metric {metric.name} reads all positions, and the prompts of these pairs "
                "have different numbers of tokens"
            )
        blocks = [forced(pairs)]
        if pairs.answers.ndim == 2 and metric.sequences is not None:
            blocks.append(forced(replace(pairs, answers=pairs.rivals, rivals=pairs.answers)))
        signs = torch.ones(len(blocks), len(pairs))
        signs[1:] = -1
        return cls(**_joined(blocks), metric=metric, signs=signs.flatten(), parts=len(blocks))

    def columns(self, outputs: Outputs | None = None) -> Int[Tensor, "pair token"] | None:
        """Where the logits are read: before each token of the answer; None for all positions."""
        if self.metric.everywhere:
            return None
        real = self.answers.reshape(len(self), -1) >= 0
        count, index = real.sum(dim=1, keepdim=True), torch.arange(real.shape[1])
        places = index.to(real.device).minimum(count - 1) - count  # from the row's end
        rows = torch.arange(len(self))[:, None].expand_as(places)
        return self.batch.columns_at(rows.flatten(), places.flatten()).view_as(places)

    def values(self, outputs: Outputs) -> Float[Tensor, " pair"]:
        """The metric in every row, as a target of `lenslrp.run_with_relevance`."""
        columns = self.columns()
        logits = outputs.logits if columns is None else outputs.logits_at(columns)
        return self.metric.of(logits, self, self.clean_logits) * self.signs.to(logits)

    def text(self, outputs: Outputs) -> str:
        """The target in words."""
        return f"{self.metric.name} of the answer"

    def beside_clean(self, model: TransformerBridge) -> MeasuredPairs:
        """The same with the logits of the clean run, where the metric needs them."""
        if not self.metric.reads_clean:
            return self
        clean = self.seen_from("clean")
        batch = batch_of(model, clean.clean, clean)
        with forward(model, batch, columns=clean.columns()) as run:
            assert run.logits is not None
            return replace(self, clean_logits=run.logits.detach())

    def folded(self, rows: Tensor) -> Tensor:
        """[row, ...] as [pair, ...]: what the parts of a pair come to together."""
        parts: Tensor = rows.unflatten(0, (self.parts, -1))
        return parts.sum(dim=0)


def forced(pairs: PairRows) -> PairRows:
    """Both prompts with the tokens of the answer but the last behind them."""
    if pairs.answers.ndim == 1:
        return pairs
    ends = [row[row >= 0][:-1].tolist() for row in pairs.answers]

    def longer(tokens: Tensor, mask: Tensor) -> Batch:
        rows = zip(tokens, mask, ends, strict=True)
        return Batch.of_rows([[*row[real].tolist(), *end] for row, real, end in rows])

    other_mask = pairs.mask if pairs.corrupt_mask is None else pairs.corrupt_mask
    clean, corrupt = longer(pairs.clean, pairs.mask), longer(pairs.corrupt, other_mask)
    if pairs.counterpart is None:
        return PairRows(clean.tokens, corrupt.tokens, clean.mask, pairs.answers, pairs.rivals)
    lengths = other_mask.sum(dim=1).tolist()
    columns = [
        [*row[real].tolist(), *range(length, length + len(end))]
        for row, real, length, end in zip(pairs.counterpart, pairs.mask, lengths, ends, strict=True)
    ]
    counterpart = Batch.of_rows(columns, pad=-1).tokens
    return PairRows(clean.tokens, corrupt.tokens, clean.mask, pairs.answers, pairs.rivals,
                    corrupt.mask, counterpart)  # fmt: skip


def _joined(blocks: Sequence[PairRows]) -> dict[str, Any]:
    """The rows of all blocks, one block after the other, padded to one width."""
    joined: dict[str, Any] = {}
    for name in (item.name for item in fields(PairRows)):
        tensors = [getattr(block, name) for block in blocks]
        joined[name] = None
        if tensors[0] is not None:
            wide = max(x.shape[-1] for x in tensors)
            fill = -1 if name == "counterpart" else 0
            joined[name] = torch.cat([
                x if x.ndim == 1 else pad(x, (0, wide - x.shape[1]), value=fill) for x in tensors
            ])  # fmt: skip
    return joined


def batch_of(model: TransformerBridge, tokens: Tensor, pairs: PairRows) -> Batch:
    """What the model reads: the tokens of one of the runs, with the mask of the pairs."""
    return prepare_text(model, tokens, attention_mask=pairs.mask)


def metric_values(
    model: TransformerBridge, batch: Batch, target: Target, **options: Any
) -> Float[Tensor, " pair"]:
    """What is measured of each row, by one forward pass; options of `lenslrp.forward.forward`."""
    columns = columns_for(model, batch, [target])
    with forward(model, batch, columns=columns, **options) as run:
        return target.values(run.outputs())
