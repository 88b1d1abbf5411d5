"""What a dictionary knows of one unit: its examples, its statistics, where it all comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Int64
from numpy.typing import NDArray
from torch import Tensor

from lenslrp.analysis.dictionary.plan import Place
from lenslrp.analysis.units.kinds import Unit
from lenslrp.analysis.units.parsing import parse_unit
from lenslrp.batch import Batch
from lenslrp.errors import InputError, StorageError
from lenslrp.fingerprints import describe_model
from lenslrp.inputs import prepare_text
from lenslrp.sessions import Session
from lenslrp.targets import Activation, PerRow

if TYPE_CHECKING:
    import pyarrow as pa
    from transformer_lens.model_bridge import TransformerBridge

    from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary

RULE_OPTIONS = {"composite", "attention", "checkpoint", "ledger", "strict"}
"""Options of `lenslrp.run_with_relevance` that go by the rules and not by the input."""


@dataclass(frozen=True)
class Histogram:
    """Of the unit's values at the sampled tokens.

    Attributes:
        counts: [bin].
        edges: [bin + 1].
    """

    counts: Int[np.ndarray, " bin"]
    edges: Float[np.ndarray, " edge"]


@dataclass(frozen=True, eq=False)
class Page:
    """One unit's page: its examples, statistics and vocabulary; a notebook shows it as HTML.

    Attributes:
        place: the hook point.
        index: which unit there.
        statistics: the unit's row of `units.parquet`: mean, std, skew, kurtosis, min, max and
            density of `activation` and `relevance`, and their histograms.
        rows: its rows of `examples.parquet`.
        dictionary: where it is from.
    """

    place: Place
    index: int
    statistics: dict[str, Any]
    rows: pa.Table
    dictionary: NeuronDictionary

    @property
    def name(self) -> str:
        """The unit as text: `blocks.5.mlp.hook_post[17]`, `...[sae 40]`."""
        return self.place.name(self.index)

    @property
    def unit(self) -> Unit:
        """The unit.

        Raises:
            InputError: it is no neuron or head: directions and features hold vectors, which the
                dictionary does not.
        """
        return parse_unit(self.name)

    @property
    def criteria(self) -> tuple[str, ...]:
        """What was searched, as `examples` takes it."""
        return self.dictionary.plan.criteria

    def _repr_html_(self) -> str:
        from lenslrp.analysis.dictionary.pages.page import fragment

        return fragment(self)

    def __repr__(self) -> str:
        return f"Page({self.name}: {len(self.rows)} examples by {', '.join(self.criteria)})"

    def examples(self, criterion: str = "actmax") -> pd.DataFrame:
        """The sentences of one criterion, best first (deciles: lowest first).

        Args:
            criterion: one of `criteria`.

        Returns:
            Columns `rank`; `score` (of the hit); `doc`; `position` (of the hit, in the document);
            `start` (of the window, likewise); `tokens` (the window as text); `activations` and,
            where it was searched, `relevances` [window] of this unit at each token; `target`,
            `target_position` and `target_value`: the token that relevance explains, the position at
            which it is predicted, and its logit (None, -1 and NaN without one); `source` (number of
            the text in the corpus).

        Raises:
            InputError: a criterion that was not searched.

        Examples:
            >>> best = d[5, 17].examples("actmax").iloc[0]
            >>> best["tokens"][best["position"] - best["start"]]  # the token at which it fires most
            >>> best["activations"].shape == (len(best["tokens"]),)
            True
        """
        self.dictionary.require_criterion(criterion)
        slots = self.dictionary.slots
        chosen = [i for i, (name, _) in enumerate(slots) if name == criterion]
        rows = self.rows.slice(chosen[0], len(chosen)) if chosen else self.rows.slice(0, 0)
        texts = self.dictionary.texts
        documents = texts.referenced(rows["document"].to_pylist())
        windows = [
            self.dictionary.window(documents[doc], position)
            for doc, position in zip(
                rows["document"].to_pylist(), rows["position"].to_pylist(), strict=True
            )
        ]
        self._require_lengths(rows, [len(tokens) for _, tokens in windows])
        aims = [documents[doc] for doc in rows["document"].to_pylist()]
        frame = pd.DataFrame(
            {
                "rank": rows["rank"].to_pylist(),
                "score": rows["score"].to_pylist(),
                "doc": rows["document"].to_pylist(),
                "position": rows["position"].to_pylist(),
                "start": [start for start, _ in windows],
                "tokens": [tokens for _, tokens in windows],
                "activations": _arrays(rows["activations"]),
            }
        )
        if self.dictionary.plan.relevance:
            frame["relevances"] = _arrays(rows["relevances"])
        frame["target"] = [texts.token(d.aim_token) if d.aim_token >= 0 else None for d in aims]
        frame["target_position"] = [d.aim_position for d in aims]
        frame["target_value"] = [d.aim_value if d.aim_position >= 0 else float("nan") for d in aims]
        frame["source"] = [d.source for d in aims]
        return frame

    def _require_lengths(self, rows: pa.Table, tokens: list[int]) -> None:
        """A window has a value for each of its tokens."""
        lengths = [len(values) for values in rows["activations"].to_pylist()]
        if lengths != tokens:
            raise StorageError(
                f"{self.dictionary.path} is damaged: windows of {self.name} have {lengths} values "
                f"for {tokens} tokens"
            )

    def vocabulary(self) -> pd.DataFrame:
        """What the unit writes to and reads from the vocabulary, by its weights.

        Returns:
            Columns `role` (`"writes"` or `"reads"`); `name` (`"out"`; `"in"`, `"gate"`; of a head
                `"q"`,
            `"k"`, `"v"`: the largest components of QK and OV); `side` (`"top"` or `"bottom"`);
                `rank`;
            `id`, `token`; `score`, in logits up to one positive factor a list (see
            `lenslrp.analysis.units.projection`); `status`: `"related"`, one of the list's largest
            group of related tokens, `"unrelated"`, or `"junk"` (see
            `lenslrp.analysis.units.readability`: where four of ten are related the list is
            readable).

        Raises:
            InputError: no such lists; says why not.
        """
        dictionary = self.dictionary
        frame = dictionary.projections.of(self.place.first + self.index, self.place.site)
        frame = frame.drop(columns="unit")
        tokens = [dictionary.texts.token(token) for token in frame["id"].tolist()]
        frame.insert(frame.columns.get_loc("id") + 1, "token", tokens)
        return frame

    def histogram(self, kind: str = "activation") -> Histogram:
        """The unit's values at the sampled tokens.

        Args:
            kind: `"activation"` or `"relevance"`.

        Returns:
            Counts [40] and edges [41].

        Raises:
            InputError: relevance, where it was not searched.
        """
        counts = self.statistics.get(f"{kind}_histogram")
        if counts is None:
            raise InputError(f"this dictionary has no statistics of {kind!r}")
        low, high = self.statistics[f"{kind}_min"], self.statistics[f"{kind}_max"]
        return Histogram(np.asarray(counts), np.linspace(low, high, len(counts) + 1))

    @property
    def provenance(self) -> dict[str, Any]:
        """Model, corpus, rules, target and library versions."""
        plan, manifest = self.dictionary.plan, self.dictionary.manifest
        names = ("model", "tokenizer", "corpus", "target", "rules", "attention", "through", "seed")
        about = {name: getattr(plan, name) for name in names}
        return {**about, "libraries": manifest["libraries"], "schema": manifest["schema"]}

    def attributed(
        self, model: TransformerBridge, criterion: str = "actmax", k: int = 8, **options: Any
    ) -> pd.DataFrame:
        """The first `k` examples with `attributions`: which tokens made the unit fire there.

        Relevance of the tokens up to the hit for the unit's activation at the hit
        (`targets.Activation`), so its unit is that of the activation. One forward and one backward
        pass, up to the unit's layer, for all of them.

        Args:
            model: the bridge that the dictionary was built from.
            criterion: whose examples.
            k: how many.
            options: of `lenslrp.run_with_relevance`.

        Returns:
            The columns of `examples`, and `attributions` [window].

        Raises:
            InputError: a head or a feature, whose activation is no component of its hook point.
        """
        if self.place.kind != "neuron":
            raise InputError(
                f"{self.name} is a {self.place.kind}; tokens are attributed for single components"
            )
        frame = self.examples(criterion).head(k).copy()
        frame["attributions"] = _attributions(model, self, frame, options)
        return frame


def require_same_model(dictionary: NeuronDictionary, model: TransformerBridge) -> None:
    """Refuse a model with other weights than the dictionary's.

    Raises:
        InputError: naming both.
    """
    mine, other = dictionary.plan.model, describe_model(model)
    if mine["weights"] != other["weights"]:
        raise InputError(
            f"the dictionary was built from {mine['name']!r} in {mine['dtype']}; given is "
            f"{other['name']!r} in {other['dtype']}, with other weights"
        )


@dataclass(frozen=True, eq=False)
class ExampleRows:
    """The documents of some examples as one batch, padded on the right.

    Attributes:
        batch: the tokens, and where in a row a position is.
        hits: the positions of the hits.
    """

    batch: Batch
    hits: list[int]

    @classmethod
    def of(cls, page: Page, frame: pd.DataFrame) -> ExampleRows:
        documents = page.dictionary.texts.referenced(frame["doc"])
        rows = [documents[doc].tokens for doc in frame["doc"]]
        return cls(Batch.of_rows(rows), frame["position"].tolist())

    def columns(self, positions: Sequence[int]) -> Int64[Tensor, " row"]:
        """The column of a position in each row."""
        return self.batch.columns_at(torch.arange(len(positions)), torch.tensor(positions))

    def activations(self, page: Page) -> PerRow:
        """The unit's activation at each hit, as a target."""
        return PerRow(tuple(Activation(page.place.hook, page.index, hit) for hit in self.hits))

    def prepared(self, model: TransformerBridge) -> Batch:
        """What the model reads."""
        return prepare_text(model, self.batch.tokens, attention_mask=self.batch.mask)


def _attributions(
    model: TransformerBridge, page: Page, frame: pd.DataFrame, options: dict[str, Any]
) -> list[NDArray[np.float32]]:
    rows = ExampleRows.of(page, frame)
    rules = {name: options[name] for name in options.keys() & RULE_OPTIONS}
    inputs = {name: options[name] for name in options.keys() - RULE_OPTIONS}
    rules = {"ledger": False, "logits": "target", "stays": False, **rules}
    with Session(model, **rules) as session:
        target, mask = rows.activations(page), rows.batch.mask
        _, cache = session.run_with_relevance(
            rows.batch.tokens, target, [], attention_mask=mask, **inputs
        )
    relevance = cache.tokens.float().cpu().numpy()
    return [
        relevance[i, start : start + len(shown)]
        for i, (start, shown) in enumerate(zip(frame["start"], frame["tokens"], strict=True))
    ]


def _arrays(column: Any) -> list[NDArray[np.float32]]:
    return [np.asarray(row, dtype=np.float32) for row in column.to_pylist()]
