"""Clean and corrupted prompts that call for opposite answers.

A circuit is found by what differs between two runs: the clean prompt calls for an answer, the
corrupted one, changed in one word, for another, which is incorrect for the clean prompt. What is
explained is the difference of the two logits at the last token. Templates as in
`lenslrp.analysis.common.templates`: indirect objects, where the repeated name is exchanged (Wang et
al. 2022), and subject-verb agreement, where the subject changes its number.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lenslrp.analysis.circuits.alignment import counterparts
from lenslrp.analysis.circuits.files import Saved
from lenslrp.analysis.circuits.measured_pairs import MeasuredPairs, batch_of, metric_values
from lenslrp.analysis.circuits.metrics import Metric, MetricFunction, logit_difference
from lenslrp.analysis.circuits.rows import PairRows
from lenslrp.analysis.common.records import Record
from lenslrp.analysis.common.templates import NOUNS, agreement, indirect_objects
from lenslrp.batch import Batch
from lenslrp.errors import InputError
from lenslrp.inputs import is_encoder_decoder
from lenslrp.logits import Outputs
from lenslrp.media import labels_of
from lenslrp.text.names import Token, token_id, token_ids
from lenslrp.text.spelling import str_token
from lenslrp.text.tokenization import tokenize
from lenslrp.views.cards import Face, Shown

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

PAIRS_AT_ONCE = 32
"""How many pairs run at once."""

PATCH_DIRECTIONS = ("denoising", "noising")
"""Clean activations patched into the corrupted run, or corrupted ones into the clean run."""


SHOWN_PAIRS, SHOWN_CHARACTERS = 5, 160
"""Pairs that a card shows, and the characters from the end of each prompt."""

_Side = TypeVar("_Side")


@dataclass(frozen=True, eq=False, repr=False)
class Pairs(Shown, Saved, PairRows):
    """A batch of pairs; see `from_texts`. Its attributes are those of `PairRows`, and

    Attributes:
        texts: of each pair: clean, corrupt, answer, rival; empty where only tokens are known.
    """

    texts: tuple[tuple[str, ...], ...] = ()

    made_from: ClassVar = {"texts": lambda rows: tuple(map(tuple, rows))}

    def _each(self, function: Callable[[Tensor], Tensor]) -> Pairs:
        chosen = function(torch.arange(len(self.texts))).tolist() if self.texts else []
        return replace(super()._each(function), texts=tuple(self.texts[row] for row in chosen))

    def to_dataframe(self) -> pd.DataFrame:
        """A row a pair, as text: `clean`, `corrupt`, `answer`, `rival`."""
        return pd.DataFrame(self.texts, columns=["clean", "corrupt", "answer", "rival"])

    def face(self) -> Face:
        lengths = self.mask.sum(dim=1)
        span = f"{int(lengths.min())} to {int(lengths.max())}" if len(lengths) else "none"
        answers = 1 if self.answers.ndim == 1 else self.answers.shape[1]
        return Face(
            "Pairs of clean and corrupted prompts",
            {"pairs": len(self.clean), "tokens": span, "most tokens of an answer": answers},
            self.to_dataframe().map(_short),
            notes=["pairs.correct(model) says in which the model does the task."],
            rows=SHOWN_PAIRS,
        )

    def logit_difference(
        self, logits: Float[Tensor, "pair pos_or_one vocab"]
    ) -> Float[Tensor, " pair"]:
        """Logit of the answer minus that of the incorrect answer, at each row's last token.

        Args:
            logits: [pair, pos, vocab], or [pair, 1, vocab] of the last token only.

        Raises:
            InputError: answers of several tokens.
        """
        if self.answers.ndim == 2:
            raise InputError(
                "answers of several tokens have no logits at one token: their metrics are those of "
                "score_nodes, score_edges and verify"
            )
        last = logits if logits.shape[1] == 1 else self.batch.picked(logits, -1)[:, None]
        return logit_difference(last, self)

    gap = logit_difference  # its name in 0.1

    def columns(self, outputs: Outputs | None = None) -> Int[Tensor, "pair one"]:
        """[pair, 1], where the target reads the logits: at each row's last token."""
        return self.batch.columns(-1)[:, None]

    def values(self, outputs: Outputs) -> Tensor:
        """The logit difference as a target of `lenslrp.run_with_relevance`."""
        return self.logit_difference(outputs.logits_at(self.columns()))

    def text(self, outputs: Outputs) -> str:
        """The target in words."""
        return "logit of the answer minus logit of the incorrect answer at the last token"

    def measured(
        self,
        model: TransformerBridge,
        metric: str | Metric | MetricFunction = "logit_difference",
        *,
        side: str = "clean",
        chunk: int = PAIRS_AT_ONCE,
    ) -> Float[Tensor, " pair"]:
        """The metric of every pair in one of the two runs, by a forward pass.

        Args:
            model: a `TransformerBridge`.
            metric: as for `score_nodes`.
            side: `"clean"` or `"corrupt"`.
            chunk: how many pairs run at once.

        Raises:
            InputError: no pairs, no such metric or side.
        """
        if side not in ("clean", "corrupt"):
            raise InputError(f"side must be 'clean' or 'corrupt', not {side!r}")
        measured = MeasuredPairs.of(self, metric)
        values = []
        for part in measured.chunks(chunk):
            rows = part.beside_clean(model).seen_from(side)
            batch = batch_of(model, getattr(rows, side), rows)
            values.append(metric_values(model, batch, rows))
        return measured.folded(torch.cat(values))

    def correct(self, model: TransformerBridge, *, both: bool = False) -> Bool[Tensor, " pair"]:
        """Whether the clean run prefers the answer to the incorrect one, pair by pair.

        Accuracy is its mean, and `pairs[pairs.correct(model)]` are the pairs that the model does.

        Args:
            model: a `TransformerBridge`.
            both: and the corrupted run the incorrect answer to the answer.
        """
        correct = self.measured(model) > 0
        return correct & (self.measured(model, side="corrupt") < 0) if both else correct

    @classmethod
    def from_texts(
        cls,
        model: TransformerBridge,
        clean: Sequence[str],
        corrupt: Sequence[str],
        answers: Sequence[Token],
        rivals: Sequence[Token],
        *,
        prepend_bos: bool | None = None,
        align: str | None = None,
        several_tokens: bool = False,
    ) -> Pairs:
        """Pairs from prompts.

        Args:
            model: a `TransformerBridge` with a tokenizer.
            clean, corrupt: prompts, one each a pair.
            answers, rivals: the answer and the incorrect answer of each pair: single tokens, as
                strings (with their space) or ids.
            prepend_bos: `None` is the model's own default.
            align: which tokens correspond where the prompts of a pair have different numbers of
                them: `"span"` (one stretch differs; in it, from its end) or `"words"` (word by
                word; in a word, from its end). `None` refuses such pairs.
            several_tokens: take answers of several tokens, which are teacher-forced.

        Raises:
            InputError: a text in a list's place, lists of different lengths, none at all, a pair
                whose prompts differ in length (and `align` does not say how) or not at all, an
                answer that is not one token or is the incorrect one, an encoder-decoder.

        Examples:
            >>> pairs = Pairs.from_texts(
            ...     model,
            ...     clean=["When Mary and John went out, John gave a book to"],
            ...     corrupt=["When Mary and John went out, Mary gave a book to"],
            ...     answers=[" Mary"],
            ...     rivals=[" John"],
            ... )
            >>> len(pairs)
            1
        """
        if is_encoder_decoder(model):
            raise InputError("pairs are for decoders: an encoder-decoder has two inputs")
        if labels_of(model) is not None:
            raise InputError("pairs are of next tokens, and this model gives classes")
        for some in (clean, corrupt, answers, rivals):
            if isinstance(some, str):
                raise InputError(f"prompts and answers are lists, not one text: [{some!r}]")
        counts = [len(some) for some in (clean, corrupt, answers, rivals)]
        if len(set(counts)) > 1 or counts[0] == 0:
            raise InputError(f"a pair has one of each; got {counts} prompts, answers and rivals")
        rows = [[tokenize(model, t, prepend_bos) for t in texts] for texts in (clean, corrupt)]
        places = []
        for index, (a, b) in enumerate(zip(*rows, strict=True)):
            try:
                places.append(counterparts(a, b, align, model.tokenizer))
            except InputError as error:
                raise InputError(f"pair {index}: {error}") from error
            if a == b:
                raise InputError(f"pair {index}: the two prompts are the same: {clean[index]!r}")
        ids = [
            [_answer(model, token, several_tokens) for token in tokens]
            for tokens in (answers, rivals)
        ]
        for index, (answer, incorrect) in enumerate(zip(*ids, strict=True)):
            if answer == incorrect:
                raise InputError(
                    f"pair {index}: {answers[index]!r} is both the answer and the incorrect one, "
                    "whose logits do not differ"
                )
        sides = [Batch.of_rows(side) for side in rows]
        both = Batch.of_rows([*ids[0], *ids[1]], pad=-1).tokens
        both = both[:, 0] if both.shape[1] == 1 else both
        named = (
            [
                token if isinstance(token, str) else str_token(model.tokenizer, token)
                for token in side
            ]
            for side in (answers, rivals)
        )
        optional: dict[str, Any] = {"texts": tuple(zip(clean, corrupt, *named, strict=True))}
        if not torch.equal(sides[0].mask, sides[1].mask):
            optional["corrupt_mask"] = sides[1].mask
            optional["counterpart"] = Batch.of_rows(places, pad=-1).tokens
        return cls(
            sides[0].tokens, sides[1].tokens, sides[0].mask, *both.split(len(rows[0])), **optional
        )


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"…{text[-SHOWN_CHARACTERS:]}"


def _answer(model: TransformerBridge, token: Token, several_tokens: bool) -> list[int]:
    """The ids of an answer.

    Raises:
        InputError: several tokens that were not asked for, or no token.
    """
    ids = token_ids(model.tokenizer, token) if isinstance(token, str) else []
    if len(ids) > 1 and not several_tokens:
        raise InputError(
            f"{token!r} is {len(ids)} tokens: give one token, or several_tokens=True for the "
            "log-probability of all of them"
        )
    return ids if len(ids) > 1 else [token_id(model.tokenizer, token, int(model.cfg.d_vocab))]


def ordered(direction: str, corrupt: _Side, clean: _Side) -> tuple[_Side, _Side]:
    """Which run is the base, and which the other one, whose activations are patched in.

    Takes the corrupted and the clean one and returns base and other; and back: base and other as
    corrupted and clean.

    Raises:
        InputError: no such direction.
    """
    if direction not in PATCH_DIRECTIONS:
        raise InputError(
            f"direction must be one of {', '.join(PATCH_DIRECTIONS)}, not {direction!r}"
        )
    return (corrupt, clean) if direction == "denoising" else (clean, corrupt)


def _other_name(record: Record) -> str:
    """The repeated name becomes the other one: "... Mary gave a drink to" calls for John."""
    head, name, tail = record["text"].rpartition(record["distractor"])
    return f"{head}{record['key']}{tail}" if name else record["text"]


def _other_number(record: Record) -> str:
    """The subject's number changes, and with it the verb's."""
    other = {**NOUNS, **{plural: singular for singular, plural in NOUNS.items()}}
    return str(record["text"].replace(f" {record['key']} ", f" {other[record['key']]} ", 1))


TEMPLATES: Mapping[str, tuple[Callable[[], Iterable[Record]], Callable[[Record], str]]] = {
    "indirect_object": (indirect_objects, _other_name),
    "agreement": (agreement, _other_number),
}
"""Task -> the records of its sentences, and what makes the corrupt sentence of a record."""


def template_pairs(model: TransformerBridge, task: str, n: int, *, seed: int = 0) -> Pairs:
    """`n` different pairs of a task, drawn from its templates.

    Every word that differs, and both answers, are checked to be single tokens of this model.

    Args:
        model: a `TransformerBridge` with a tokenizer.
        task: `"indirect_object"` or `"agreement"`.
        n: how many pairs.
        seed: of the draw.

    Returns:
        The pairs, [n, pos], padded on the right.

    Raises:
        InputError: no such task, or fewer than `n` sentences of single-token words.

    Examples:
        >>> pairs = template_pairs(model, "agreement", 8)
        >>> len(pairs), pairs.clean.shape == pairs.corrupt.shape
        (8, True)
    """
    if task not in TEMPLATES:
        raise InputError(f"task must be one of {', '.join(TEMPLATES)}, not {task!r}")
    make, corrupt = TEMPLATES[task]
    tokenizer = model.tokenizer

    def single(word: str) -> bool:
        return len(tokenizer.encode(word, add_special_tokens=False)) == 1

    usable = []
    for record in make():
        changed = zip(record["text"].split(), corrupt(record).split(), strict=True)
        words = {f" {word}" for pair in changed if pair[0] != pair[1] for word in pair}
        if all(map(single, (record["answer"], record["rival"], *words))):
            usable.append(record)
    if len(usable) < n:
        raise InputError(
            f"{task} has {len(usable)} pairs of single-token words, {n} were asked for"
        )
    chosen = random.Random(seed).sample(usable, n)
    return Pairs.from_texts(
        model,
        [record["text"] for record in chosen],
        [corrupt(record) for record in chosen],
        [record["answer"] for record in chosen],
        [record["rival"] for record in chosen],
    )
