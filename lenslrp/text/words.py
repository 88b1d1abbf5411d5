"""Characters and words of a row of tokens, by Unicode's rules (UAX 29).

A character is what a reader takes for one: an extended grapheme cluster, such as a letter with its
accents or a family of emoji. One that spans tokens is shown by the first of them; the others show
that they go on with it. A word is made of whole tokens: it ends where a token ends at a boundary of
words in the text. Scripts that are written without spaces have one after every character, so there
words are tokens, or as many of them as share a character.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import regex

from lenslrp.text.spelling import Speller, Spelling

CONTINUED = "⟨…⟩"
"""What a token shows in place of a character that began in a token before it."""

_CLUSTER = regex.compile(r"\X")
_BOUNDARY = regex.compile(r"(?w)\b")


class Word(NamedTuple):
    """A word with the space before it, and the columns of the tokens that it is made of."""

    text: str
    positions: list[int]


@dataclass(frozen=True)
class Row:
    """One row of a batch as text.

    Attributes:
        pieces: what each position shows.
        words: those of the positions that are not padding.
        prompt: what was given, as it was given; spelled, where that was ids.
    """

    pieces: list[str]
    words: list[Word]
    prompt: str


def read_row(
    speller: Speller, ids: Sequence[int], mask: Sequence[bool], length: int, text: str | None
) -> Row:
    """A row of ids, made from ``text`` where that is known; its prompt has ``length`` tokens."""
    places = [place for place, real in enumerate(mask) if real]
    real = [ids[place] for place in places]
    spelled = speller.spell(real)
    by_place = dict(zip(places, pieces(spelled), strict=True))
    shown = [by_place.get(i) or speller.token(token) for i, token in enumerate(ids)]
    spelled_words = words(spelled if text is None else speller.read(real, text, spelled))
    prompt = text
    if prompt is None:
        prompt = (spelled if length == len(real) else speller.spell(real[:length])).text
    row_words = [Word(word.text, [places[i] for i in word.positions]) for word in spelled_words]
    return Row(shown, row_words, prompt)


def row_of_names(names: Sequence[str], mask: Sequence[bool] | None = None) -> Row:
    """A row whose positions only have names: patches, embeddings, ids without a tokenizer."""
    words = [Word(name, [i]) for i, name in enumerate(names) if mask is None or mask[i]]
    return Row(list(names), words, " ".join(word.text for word in words))


def pieces(row: Spelling) -> list[str]:
    """What each token shows of its row; empty where it holds no character.

    Joined, without `CONTINUED`, they are the text.
    """
    stops, shown, names = _clusters(row), 0, []
    for start, stop in row.spans:
        if start == stop:
            names.append("")
        elif stop <= shown:
            names.append(CONTINUED)
        else:
            end = stops[bisect_left(stops, stop)]
            names.append((CONTINUED if start < shown else "") + row.text[shown:end])
            shown = end
    return names


def piece_at(shown: Sequence[str], place: int) -> str:
    """What a token shows by itself: if it only goes on, the piece that it goes on from."""
    while place and shown[place] == CONTINUED:
        place -= 1
    return shown[place]


def joined(shown: Sequence[str]) -> str:
    """The text of consecutive pieces."""
    return "".join(piece.removeprefix(CONTINUED) for piece in shown)


def words(row: Spelling) -> list[Word]:
    """The words of a row; special tokens are words of their own. Joined, they are the text."""
    stops = _clusters(row)
    bounds = {match.start() for match in _BOUNDARY.finditer(row.text)} & {0, *stops}
    begins: list[int] = []
    runs: list[list[int]] = []
    reach = 0
    for index, (start, stop) in enumerate(row.spans):
        alone = row.special[index] or (index > 0 and row.special[index - 1])
        if not runs or alone or _parts(row.text, begins[-1], reach, start, stop, bounds):
            begins.append(start if runs and row.special[index] else reach)
            runs.append([])
        runs[-1].append(index)
        if stop > start:
            reach = max(reach, stops[bisect_left(stops, stop)])
    ends = [*begins[1:], len(row.text)]
    return [Word(row.text[a:b], tokens) for a, b, tokens in zip(begins, ends, runs, strict=True)]


def _parts(text: str, begin: int, reach: int, start: int, stop: int, bounds: set[int]) -> bool:
    """Whether a token at (start, stop) begins a word, after one that is ``text[begin:reach]``."""
    if start < reach:
        return False
    if any(char.isspace() for char in text[reach : max(start, min(reach + 1, stop))]):
        return True
    if start == stop or text[begin:reach] in ("", " "):  # a lone space belongs to what follows
        return False
    return any(place in bounds for place in range(reach, start + 1))


def _clusters(row: Spelling) -> list[int]:
    """Where characters end; a special token is no part of any."""
    stops = {match.end() for match in _CLUSTER.finditer(row.text)}
    stops.update(end for span, marks in zip(row.spans, row.special, strict=True) if marks
                 for end in span)  # fmt: skip
    return sorted(stops)
