"""Which units a concept belongs to: words are given, units are ranked by their examples.

A unit's examples of one criterion are matched with the words: an example matches where the window
that is shown of it holds one of them. Common words match by chance, so a match counts for as many
bits as the word is rare among the windows of all units, and a unit's score is the mean over its
examples, each weighed by its strength (the size of its activation, or relevance)::

    bits(word) = -log2(share of all examples whose window holds it)
    score(unit) = sum over examples of |strength| max bits of the words it holds / sum |strength|

`expected` is the share of examples that match in a unit taken at random, and `lift` how many times
more this one's do. Units that are shown with the same places are one group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lenslrp.analysis.common.storage import require_range
from lenslrp.analysis.dictionary.text_search import indexed, occurrences
from lenslrp.errors import InputError
from lenslrp.text.visible_text import running
from lenslrp.views.cards import Face, Shown

if TYPE_CHECKING:
    from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
    from lenslrp.analysis.dictionary.texts import Document

SHOWN_EXAMPLES = 3
SAME_PLACES = 0.5
"""Share of the matching places of two units, of those of either, from which on they are a group."""

COLUMNS = ["unit", "hook", "index", "matched", "of", "share", "expected", "lift", "score", "group"]


@dataclass(frozen=True)
class Match:
    """An example that holds one of the words.

    Attributes:
        unit: the unit's number.
        strength: the example's score.
        document, position: where its hit is.
        word: the rarest of the words that its window holds.
        pieces: the window as text, each piece with whether it is one of the words.
    """

    unit: int
    strength: float
    document: int
    position: int
    word: str
    pieces: tuple[tuple[str, bool], ...] = field(repr=False)

    @property
    def window(self) -> str:
        return "".join(piece for piece, _ in self.pieces)


@dataclass(frozen=True, eq=False)
class Found(Shown):
    """Units by words, best first; a notebook shows them with examples.

    Attributes:
        words: what was asked for.
        criterion: whose examples were matched.
        units: one row a unit: `unit, hook, index`; `matched` of its `of` examples, their `share`;
            the share `expected` of a unit taken at random, and `lift`, the one over the other;
            `score` in bits; `group`, the same number for units shown with the same places.
        bits: word -> what a match with it counts for; absent where no example holds it.
        matches: unit's number -> its matching examples, strongest first.
    """

    words: tuple[str, ...]
    criterion: str
    units: pd.DataFrame = field(repr=False)
    bits: dict[str, float] = field(repr=False)
    matches: dict[int, list[Match]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.units)

    def __repr__(self) -> str:
        best = ", ".join(f"{row.hook}[{row.index}]" for row in self.top(3).itertuples())
        return f"Found({', '.join(map(repr, self.words))}: {len(self)} units; best {best or '-'})"

    def top(self, k: int = 10) -> pd.DataFrame:
        """The first `k` rows of `units`."""
        return self.units.head(k)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a matching example: `unit, hook, index, score, doc, position, word, window`."""
        rows = [
            (row.unit, row.hook, row.index, m.strength, m.document, m.position, m.word, m.window)
            for row in self.units.itertuples(index=False)
            for m in self.matches[row.unit]
        ]
        names = ["unit", "hook", "index", "score", "doc", "position", "word", "window"]
        return pd.DataFrame(rows, columns=names)

    def groups(self) -> Iterator[tuple[str, list[str], list[Match]]]:
        """Of each group: its first unit with its measures, the other units, the first's matches."""
        for _, rows in self.units.groupby("group", sort=False):
            names = [f"{row.hook}[{row.index}]" for row in rows.itertuples()]
            first = rows.iloc[0]
            head = (
                f"{names[0]}  {first['matched']} of {first['of']} examples, "
                f"{first['lift']:.0f} times chance, {first['score']:.2f} bits"
            )
            yield head, names[1:], self.matches[int(first["unit"])][:SHOWN_EXAMPLES]

    def face(self) -> Face:
        parts = []
        for head, others, matches in self.groups():
            lines = "".join(f'<div style="margin-left:1.2em">{_marked(m)}</div>' for m in matches)
            same = f"the same places: {', '.join(others)}" if others else ""
            note = f'<div class="lenslrp-note">{escape(same)}</div>'
            parts.append(
                f'<div style="margin-top:.7em"><code>{escape(head)}</code>{lines}{note}</div>'
            )
        rare = ", ".join(f"{word} {bits:.1f}" for word, bits in self.bits.items())
        return Face(
            f"Units by {', '.join(self.words)}",
            {"units": len(self), "examples": self.criterion, "bits of a match": rare or "-"},
            body="".join(parts),
            notes=[
                "Share of a unit's examples whose window holds a word, beside that of all units; "
                "by strength of the examples and rarity of the words."
            ],
        )


def _marked(match: Match) -> str:
    return "".join(
        f"<mark>{escape(running(piece))}</mark>" if marked else escape(running(piece))
        for piece, marked in match.pieces
    )


def require_words(words: Sequence[object]) -> None:
    """Words that can be looked for.

    Raises:
        InputError: no word, one of which an index holds nothing, or a list in a word's place.
    """
    if not words or not all(isinstance(word, str) and indexed(word) for word in words):
        given = words[0] if len(words) == 1 else words
        raise InputError(f"find takes words, such as find('church', 'bishop'), not {given!r}")


def find(
    d: NeuronDictionary, words: Sequence[str], criterion: str = "actmax", limit: int = 20
) -> Found:
    """Units by the words of a concept; see the module.

    Args:
        d: an open dictionary.
        words: words or phrases, any of which will do.
        criterion: whose examples.
        limit: how many units.

    Raises:
        InputError: no word, or an unknown criterion.
    """
    d.require_criterion(criterion)
    require_words(words)
    wanted = tuple(dict.fromkeys(words))
    held = _matching_examples(d, wanted, criterion)
    strengths, counts = d.citations.strengths(d.slots, criterion, len(d))
    total = int(counts.sum())
    share = held.words.sum(axis=0) / max(total, 1)
    bits = np.where(share > 0, -np.log2(np.where(share > 0, share, 1.0)), 0.0)
    best = (held.words * bits).argmax(axis=1) if len(held.words) else np.zeros(0, np.int64)
    sizes = np.abs(held.scores)
    score = np.bincount(held.units, sizes * bits[best], len(d)) / np.maximum(strengths, 1e-30)
    matched = np.bincount(held.units, minlength=len(d))
    order = np.lexsort((-matched, -score))[:limit]
    order = order[matched[order] > 0]
    matches: dict[int, list[Match]] = {}
    for unit in order.tolist():
        rows = np.flatnonzero(held.units == unit)
        rows = rows[np.argsort(-sizes[rows], kind="stable")]
        matches[unit] = [_match(d, held, row, wanted, int(best[row])) for row in rows.tolist()]
    expected = len(held.units) / max(total, 1)
    groups = _groups([{(m.document, m.position) for m in matches[u]} for u in order.tolist()])
    frame = pd.DataFrame(
        [
            (
                *d.named(unit), int(matched[unit]), int(counts[unit]),
                matched[unit] / counts[unit], expected, matched[unit] / counts[unit] / expected,
                score[unit], group,
            )
            for unit, group in zip(order.tolist(), groups, strict=True)
        ],
        columns=COLUMNS,
    )  # fmt: skip
    known = {word: float(b) for word, b, s in zip(wanted, bits, share, strict=True) if s > 0}
    return Found(wanted, criterion, frame, known, matches)


@dataclass(frozen=True, eq=False)
class _Held:
    """Examples whose window holds one of the words.

    Attributes:
        units: [example], numbers of units.
        scores: [example].
        documents, positions: [example], of the hits.
        words: [example, word], which the window holds.
    """

    units: NDArray[np.int64]
    scores: NDArray[np.float32]
    documents: NDArray[np.int64]
    positions: NDArray[np.int64]
    words: NDArray[np.bool_]


def _matching_examples(d: NeuronDictionary, words: Sequence[str], criterion: str) -> _Held:
    searched = np.array([name == criterion for name, _ in d.slots])
    documents = sorted({doc for word in words for doc in d.texts.matching(f'"{word}"')})
    parts: list[tuple[NDArray[Any], ...]] = []
    before, after = d.plan.window
    for number in documents:
        entries, positions, scores = d.citations.of(number)
        kept = searched[entries % len(d.slots)]
        if not kept.any():
            continue
        document = d.texts.referenced([number])[number]
        require_range(d.citations.path, "positions", positions, 0, len(document.tokens))
        hits = positions[kept]
        inside = _inside(document, words, hits - before, hits + after + 1)
        some = inside.any(axis=1)
        units = entries[kept][some] // len(d.slots)
        same = np.full(len(units), number)
        parts.append((units, scores[kept][some], same, positions[kept][some], inside[some]))
    if not parts:
        none = np.zeros(0, np.int64)
        return _Held(none, none.astype(np.float32), none, none, np.zeros((0, len(words)), bool))
    return _Held(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _inside(
    document: Document,
    words: Sequence[str],
    first: NDArray[np.int64],
    stop: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Whether windows of tokens hold each word whole, [window, word]."""
    spans = document.spans.numpy()
    columns = []
    for places in occurrences(document.text, words):
        tokens = [np.flatnonzero((spans[:, 0] < b) & (spans[:, 1] > a)) for a, b in places]
        begin = np.array([some[0] for some in tokens], np.int64)
        end = np.array([some[-1] for some in tokens], np.int64)
        columns.append(np.searchsorted(end, stop) > np.searchsorted(begin, first))
    return np.stack(columns, axis=1)


def _match(d: NeuronDictionary, held: _Held, row: int, words: Sequence[str], best: int) -> Match:
    number, position = int(held.documents[row]), int(held.positions[row])
    document = d.texts.referenced([number])[number]
    (text,) = d.shown(document, np.array([position]))
    marked = np.zeros(len(text), bool)
    for start, stop in (place for places in occurrences(text, words) for place in places):
        marked[start:stop] = True
    cuts = [0, *(np.flatnonzero(np.diff(marked)) + 1).tolist(), len(text)]
    pieces = tuple((text[a:b], bool(marked[a])) for a, b in pairwise(cuts) if a < b)
    strength = float(held.scores[row])
    return Match(int(held.units[row]), strength, number, position, words[best], pieces)


def _groups(places: list[set[tuple[int, int]]]) -> list[int]:
    """A number for each unit: that of the first unit that has the same places."""
    groups: list[int] = []
    for i, mine in enumerate(places):
        same = (
            groups[j]
            for j in range(i)
            if len(mine & places[j]) >= SAME_PLACES * len(mine | places[j])
        )
        groups.append(next(same, i))
    return groups
