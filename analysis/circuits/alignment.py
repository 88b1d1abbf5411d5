"""Which tokens of two prompts of different lengths correspond."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lenslrp.errors import InputError
from lenslrp.text.spelling import Speller
from lenslrp.text.words import read_row

Row = Sequence[int]


def counterparts(clean: Row, corrupt: Row, align: str | None, tokenizer: Any) -> list[int]:
    """For each clean token the place of the corrupted one that corresponds to it, or -1.

    Args:
        clean, corrupt: token ids.
        align: of prompts of different lengths, a name of `ALIGNMENTS`. In prompts of the same
            length tokens at the same place correspond.
        tokenizer: the model's.

    Raises:
        InputError: no such alignment, one that these prompts do not have, or their last tokens,
            where the answer is read, do not correspond.
    """
    if len(clean) == len(corrupt):
        return list(range(len(clean)))
    sizes = f"the prompts have {len(clean)} and {len(corrupt)} tokens"
    if align is None:
        raise InputError(
            f"{sizes}, and must have the same number, so that positions correspond; "
            "align='span' or 'words' says which do where they have not"
        )
    if align not in ALIGNMENTS:
        raise InputError(f"align must be one of {', '.join(ALIGNMENTS)}, not {align!r}")
    places = ALIGNMENTS[align](clean, corrupt, tokenizer)
    if places[-1] != len(corrupt) - 1:
        raise InputError(f"{sizes}, and their last tokens do not correspond")
    return places


def _from_end(left: Sequence[int], right: Sequence[int]) -> list[int]:
    """`right`, as far as it goes from the end, at the places of `left`; -1 before."""
    kept = list(right)[max(0, len(right) - len(left)) :]
    return [-1] * (len(left) - len(kept)) + kept


def _by_span(clean: Row, corrupt: Row, tokenizer: Any) -> list[int]:
    shorter = min(len(clean), len(corrupt))
    same = [a == b for a, b in zip(clean, corrupt, strict=False)]
    start = same.index(False) if False in same else shorter
    end = 0
    while end < shorter - start and clean[-1 - end] == corrupt[-1 - end]:
        end += 1
    spans = [range(start, len(row) - end) for row in (clean, corrupt)]
    if {clean[i] for i in spans[0]} & {corrupt[i] for i in spans[1]}:
        raise InputError(
            "the prompts differ in more than one place, or repeat a token where they differ: "
            "align='words' goes word by word"
        )
    after = range(len(corrupt) - end, len(corrupt))
    return [*range(start), *_from_end(*spans), *after]


def _by_words(clean: Row, corrupt: Row, tokenizer: Any) -> list[int]:
    speller = Speller(tokenizer)
    left, right = (
        read_row(speller, row, [True] * len(row), len(row), None).words for row in (clean, corrupt)
    )
    if len(left) != len(right):
        raise InputError(
            f"the prompts have {len(left)} and {len(right)} words: align='words' needs as many"
        )
    places = [-1] * len(clean)
    for a, b in zip(left, right, strict=True):
        for place, other in zip(a.positions, _from_end(a.positions, b.positions), strict=True):
            places[place] = other
    return places


ALIGNMENTS: Mapping[str, Callable[[Row, Row, Any], list[int]]] = {
    "span": _by_span,
    "words": _by_words,
}
"""Name -> which tokens correspond. `span`: what the prompts begin and end with, and of the one
stretch in which they differ, token by token from its end. `words`: word by word, and in a word
token by token from its end. A token that is left over corresponds to none."""
