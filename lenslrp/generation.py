"""``explain_generation``: relevance of every token that a model wrote, over all before it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lenslrp.errors import InputError
from lenslrp.files import whole
from lenslrp.hooks.composites import Composite
from lenslrp.hooks.rule_types import Rule
from lenslrp.ledger import Ledger
from lenslrp.running import architecture
from lenslrp.sessions import Session
from lenslrp.text.words import Word
from lenslrp.views.matrix import matrix_heatmap
from lenslrp.writing import write

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

FORMAT = "lenslrp.generation/1"
Span = str | tuple[int, int]
"""Positions from, to before; or a text that occurs once."""

_TENSORS = ("relevance", "token_ids", "values", "logits", "log_probs", "positional")


@dataclass(frozen=True, eq=False)
class Generation:
    """Relevance of every written token over all positions before it; see `explain_generation`.

    A position counts everything that was read and written: the prompt (of an encoder-decoder the
    encoder's text, then the decoder's start), then the written tokens, from ``start``.

    Attributes:
        relevance: [generated, position], in units of the target (logits for a logit), signed, at
            the token embeddings. 0 where a token had not been written yet.
        token_ids: [position].
        str_tokens: the tokens as text.
        start: the position of the first written token.
        encoder_length: positions that an encoder read; 0 for a model without one.
        of: what of each written token was explained: see `explain_generation`.
        values: [generated], the target's value.
        logits: [generated], of the written tokens.
        log_probs: [generated], likewise: natural logarithms of their probabilities.
        positional: [generated], relevance at learned positions; 0 for a model without them.
        ledgers: the account of each row.
        words_: what `words` reads.
        composite: the name of the rules.
        model_name: the model's name.
    """

    relevance: Float[Tensor, "generated position"] = field(repr=False)
    token_ids: Int[Tensor, " position"] = field(repr=False)
    str_tokens: list[str] = field(repr=False)
    start: int
    encoder_length: int
    of: str
    values: Float[Tensor, " generated"] = field(repr=False)
    logits: Float[Tensor, " generated"] = field(repr=False)
    log_probs: Float[Tensor, " generated"] = field(repr=False)
    positional: Float[Tensor, " generated"] = field(repr=False)
    ledgers: list[Ledger] = field(repr=False)
    words_: list[Word] = field(repr=False)
    composite: str
    model_name: str

    @property
    def written(self) -> list[str]:
        """The written tokens as text, one a row."""
        return self.str_tokens[self.start :]

    def __repr__(self) -> str:
        rows, text = len(self.values), "".join(self.written)
        return (
            f"Generation({rows} tokens after {self.start}, {self.of}, {self.composite}: {text!r})"
        )

    def positions(self, span: Span) -> range:
        """The positions of a span: (from, to before), or of a text that occurs once.

        Raises:
            InputError: positions that are not there, or a text that occurs not once.
        """
        return positions_of(span, self.str_tokens)

    def over(self, spans: Mapping[str, Span] | None = None) -> pd.DataFrame:
        """Sums of each row over spans of positions.

        Args:
            spans: name -> (from, to before), or a text that occurs once among all tokens. By
                default what was read and what was written before (an encoder's text besides).

        Returns:
            [generated, span], in the target's unit; the index is (row, token).

        Raises:
            InputError: a span that is not there, or a text that occurs not once.

        Examples:
            >>> G.over({"country": " France"})
        """
        if spans is None:
            whole, edges = len(self.str_tokens), (self.encoder_length, self.start)
            named = {"encoder": (0, edges[0])} if edges[0] else {}
            spans = {**named, "prompt": edges, "written": (edges[1], whole)}
        index = pd.MultiIndex.from_tuples(enumerate(self.written), names=["row", "token"])
        sums = {}
        for name, span in spans.items():
            places = self.positions(span)
            sums[name] = self.relevance[:, places.start : places.stop].sum(dim=1).tolist()
        return pd.DataFrame(sums, index=index)

    def words(self) -> pd.DataFrame:
        """The matrix by words: sums over the tokens of both.

        Returns:
            [written word, word], in the target's unit. A row is the explanation of the sum of its
            tokens' targets; what its later tokens owe to its first is at the word itself.
        """
        of_position = torch.zeros(len(self.str_tokens), len(self.words_)).to(self.relevance)
        for number, word in enumerate(self.words_):
            of_position[word.positions, number] = 1
        sums = of_position[self.start :].T @ (self.relevance @ of_position)
        names = [word.text for word in self.words_]
        kept = [n for n, word in enumerate(self.words_) if word.positions[-1] >= self.start]
        return pd.DataFrame(sums[kept].tolist(), index=[names[n] for n in kept], columns=names)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k largest entries by absolute value; columns as in `to_dataframe`.

        Raises:
            InputError: ``k`` below 1.
        """
        if k < 1:
            raise InputError(f"k must be at least 1, not {k}")
        table = self.to_dataframe()
        order = table["relevance"].abs().sort_values(ascending=False, kind="stable").index[:k]
        return table.loc[order].reset_index(drop=True)

    def to_dataframe(self) -> pd.DataFrame:
        """A row for each written token and each position before it.

        Returns:
            ``row``, ``written`` (the token), ``value`` (of its target), ``log_prob``,
            ``position``, ``token`` and ``relevance``.
        """
        lengths = torch.arange(len(self.values)) + self.start
        row, position = (torch.arange(len(self.str_tokens)) < lengths[:, None]).nonzero().T
        at = row.tolist()
        return pd.DataFrame(
            {
                "row": at,
                "written": [self.written[r] for r in at],
                "value": self.values.cpu()[row].tolist(),
                "log_prob": self.log_probs.cpu()[row].tolist(),
                "position": position.tolist(),
                "token": [self.str_tokens[p] for p in position.tolist()],
                "relevance": self.relevance.cpu()[row, position].tolist(),
            }
        )

    def html(self, *, scale: float | None = None, without_first: bool = False) -> str:
        """The matrix as an HTML fragment without JavaScript: a row a written token.

        Args:
            scale: relevance at the full colour, one for all rows; by default the largest.
            without_first: take the scale from the positions after the first.

        Raises:
            InputError: a scale that is not positive.
        """
        probabilities = [math.exp(value) for value in self.log_probs.tolist()]
        return matrix_heatmap(
            self.written,
            [f"{p:.2f}" for p in probabilities],
            self.str_tokens,
            self.relevance,
            lengths=[self.start + row for row in range(len(self.values))],
            borders=[edge for edge in (self.encoder_length, self.start) if edge],
            title=f"What each written token owes to the tokens before it ({self.of})",
            scale=scale,
            without_first=without_first,
        )

    def _repr_html_(self) -> str:
        return self.html()

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file (no pickle); `load` reads it back.

        Raises:
            InputError: the folder is not there, or ``path`` is one.
            StorageError: the file cannot be written, or another one is there.
        """
        fields = ("str_tokens", "start", "encoder_length", "of", "composite", "model_name")
        meta = {
            "format": FORMAT,
            **{name: getattr(self, name) for name in fields},
            "words_": self.words_,
            "ledgers": [
                {**ledger.to_dict(), "table": json.loads(ledger.table.to_json(orient="split"))}
                for ledger in self.ledgers
            ],
        }
        tensors = {name: getattr(self, name).cpu().contiguous() for name in _TENSORS}
        with whole(Path(path), ours=FORMAT.encode()) as part:
            save_file(tensors, part, metadata={"lenslrp": json.dumps(meta)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Generation:
        """Read what `save` wrote.

        Raises:
            InputError: a file that is something else.
        """
        with safe_open(str(path), framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("lenslrp", "{}"))
            if meta.pop("format", None) != FORMAT:
                raise InputError(f"{path} holds no saved generation")
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        words = [Word(*word) for word in meta.pop("words_")]
        ledgers = []
        for numbers in meta.pop("ledgers"):
            table = pd.DataFrame(**numbers.pop("table")).rename_axis(index="layer")
            del numbers["error"]
            ledgers.append(Ledger(**numbers, table=table))
        return cls(**tensors, **meta, words_=words, ledgers=ledgers)


def positions_of(span: Span, str_tokens: list[str], first: int = 0) -> range:
    """The positions of a span; a text is looked for from ``first`` on.

    Raises:
        InputError: positions that are not there, or a text that occurs not once.
    """
    if isinstance(span, str):
        starts, text = [], ""
        for token in str_tokens[first:]:
            starts.append(len(text))
            text += token
        if span not in text:
            raise InputError(f"{span!r} does not occur at the tokens from position {first} on")
        if text.count(span) != 1 or not span:
            raise InputError(f"{span!r} occurs {text.count(span)} times, not once: give positions")
        begin = text.index(span)
        ends = [*starts[1:], len(text)]
        found = [
            place
            for place, (a, b) in enumerate(zip(starts, ends, strict=True), start=first)
            if a < begin + len(span) and begin < b
        ]
        return range(found[0], found[-1] + 1)
    a, b = span
    if not 0 <= a < b <= len(str_tokens):
        raise InputError(f"a span is (from, to before) within {len(str_tokens)}, not {span!r}")
    return range(a, b)


def explain_generation(
    model: TransformerBridge,
    prompt: Any,
    *,
    text: Any = None,
    max_new_tokens: int = 20,
    of: str = "logit",
    composite: Composite | Mapping[str, Rule] | None = None,
    prepend_bos: bool | None = None,
    attention: str = "bridge",
    checkpoint: bool = False,
    strict: bool = True,
) -> Generation:
    """Explain every token that a model writes, from one forward pass and one backward pass a token.

    Row ``i`` is what `lenslrp.run_with_relevance` gives for the prompt with the ``i`` tokens
    written before, to rounding: a causal model makes the same of them whatever follows.

    Args:
        model: a ``TransformerBridge``, in eval mode: a decoder, or an encoder-decoder.
        prompt: a string, token ids of one row, or a conversation as for `lenslrp.chat`.
        text: the continuation, as a string or token ids; ``None`` for what the model itself writes
            greedily.
        max_new_tokens: how many tokens it writes; it may end earlier.
        of: ``"logit"`` of the written token, ``"log_prob"``, or its logit less that of the
            ``"runner_up"`` (the best other token) or less the ``"mean"`` of all others.
        composite: as for `lenslrp.run_with_relevance`, as is what follows.
        prepend_bos: likewise.
        attention: likewise.
        checkpoint: likewise.
        strict: likewise.

    Returns:
        Relevance [generated, position], with the account of every row.

    Raises:
        InputError: something given cannot be explained, a model that does not write, or one that is
            not causal: it reads tokens behind the one that it writes.
        CoverageError: an operation on the path has no rule, or a rule did not fire.

    Examples:
        >>> G = lenslrp.explain_generation(model, "The capital of France is", max_new_tokens=3)
        >>> G.relevance.shape
        torch.Size([3, 8])
        >>> G.over({"country": " France"}).loc[0]  # what the first token owes to it
    """
    writing = write(model, prompt, text, max_new_tokens=max_new_tokens, prepend_bos=prepend_bos)
    targets = writing.targets(of)
    with Session(
        model, composite, attention=attention, checkpoint=checkpoint, strict=strict,
        logits="target", stays=False,
    ) as session:  # fmt: skip
        rules = session.composite.name
        caches = session.relevance_for_targets(targets=targets, names_filter=[], **writing.inputs)
    relevance = torch.stack([writing.relevance(cache) for cache in caches])
    behind = torch.ones_like(relevance, dtype=torch.bool).triu(writing.start)
    if bool(relevance[behind].any()):
        raise InputError(
            f"{architecture(model)} reads tokens behind the one that it writes: its rows are not "
            "those of a generation; explain each prefix with lenslrp.run_with_relevance"
        )
    values, logits, log_probs = zip(
        *(target.notes[target.position] for target in targets), strict=True
    )
    shown, words = writing.text(model.tokenizer)
    numbers: dict[str, Any] = {"dtype": relevance.dtype, "device": relevance.device}
    places = [(cache.positions, cache.decoder_positions) for cache in caches]
    positional = [sum(float(x.sum()) for x in both if x is not None) for both in places]
    return Generation(
        relevance=relevance,
        token_ids=torch.tensor(writing.ids),
        str_tokens=shown,
        start=writing.start,
        encoder_length=len(writing.prompt) if writing.begun else 0,
        of=of,
        values=torch.tensor(values, **numbers),
        logits=torch.tensor(logits, **numbers),
        log_probs=torch.tensor(log_probs, **numbers),
        positional=torch.tensor(positional, **numbers),
        ledgers=[cache.ledger() for cache in caches],
        words_=words,
        composite=rules,
        model_name=caches[0].model_name,
    )
