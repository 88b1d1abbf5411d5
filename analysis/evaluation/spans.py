"""Does relevance point at the right place? Spans of text, hits, intersection over union.

Spans are pairs of character positions, (start, stop). A token is in a span if it shares a character
with it.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lenslrp.analysis.common.statistics import Numbers
from lenslrp.errors import InputError
from lenslrp.text.spelling import Spans, standing

Mask = NDArray[np.bool_]
POINTING = ("hit", "hit_at_3", "iou", "above_distractor")
"""Metrics of `pointing_scores`, in which no perturbation has a part."""


def token_spans(tokenizer: Any, text: str, token_ids: Sequence[int]) -> Spans:
    """The span of each token in the text; a token that is no part of it (a start or end token) has
    the empty span (0, 0).

    Raises:
        InputError: the tokens are not those of the text, or the tokenizer keeps no positions.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("this model's tokenizer does not say where its tokens stand in the text")
    part = standing(tokenizer, text, token_ids)
    if part is None:
        raise InputError(f"the tokens explained are not those of {text[:80]!r}")
    start, stop, spans = part
    return [(0, 0)] * start + (spans or []) + [(0, 0)] * (len(token_ids) - stop)


def overlap(pieces: Spans, spans: Spans) -> Mask:
    """Whether each piece shares a character with one of the spans."""
    return np.array([any(a < d and c < b for c, d in spans) for a, b in pieces], dtype=bool)


def occurrences(text: str, words: str, *, ignore_case: bool = True) -> Spans:
    """Everywhere that ``words`` stand in the text as whole words."""
    pattern = rf"(?<!\w){re.escape(words)}(?!\w)"
    flags = re.IGNORECASE if ignore_case else re.NOFLAG
    return [match.span() for match in re.finditer(pattern, text, flags)]


def words_of(offsets: Spans, text: str) -> list[list[int]]:
    """Token positions of each whitespace word of the text."""
    bounds = [match.span() for match in re.finditer(r"\S+", text)]
    words = [
        [i for i, (a, b) in enumerate(offsets) if a < stop and start < b] for start, stop in bounds
    ]
    return [word for word in words if word]


def normalise(text: str) -> str:
    """SQuAD's way to compare answers: lower case, no punctuation, no articles, single spaces."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def hit(values: Numbers, key: Mask, k: int = 1) -> float:
    """1 if one of the k most relevant is in the key, else 0. Equal values keep their order."""
    return float(key[np.argsort(-values, kind="stable")[:k]].any())


def iou(chosen: Mask, key: Mask) -> float:
    """Intersection over union of two sets of tokens."""
    return float((chosen & key).sum() / max((chosen | key).sum(), 1))


def otsu(values: Numbers) -> float:
    """The threshold that splits the positive values with the largest variance between classes."""
    ordered = np.sort(values[values > 0])
    if len(ordered) < 2:
        return 0.0
    counts = np.arange(1, len(ordered))
    below = np.cumsum(ordered)[:-1]
    means = below / counts, (ordered.sum() - below) / (len(ordered) - counts)
    between = counts * (len(ordered) - counts) * (means[0] - means[1]) ** 2
    return float(ordered[int(between.argmax())])


def best_iou(values: Numbers, key: Mask) -> float:
    """IoU at the best of all thresholds: an upper bound, which looks at the key."""
    hits = np.cumsum(key[np.argsort(-values, kind="stable")])
    union = np.arange(1, len(values) + 1) + key.sum() - hits
    return float((hits / union).max())


def ious(values: Numbers, key: Mask) -> dict[str, float]:
    """IoU by each method of making relevance binary."""
    largest = np.argsort(-values, kind="stable")[: key.sum()]
    return {
        "half of max": iou(values > values.max() / 2 if values.max() > 0 else values < 0, key),
        "Otsu": iou(values > otsu(values), key),
        "span length": iou(np.isin(np.arange(len(values)), largest), key),
        "best": best_iou(values, key),
    }


def pointing_scores(values: Numbers, key: Mask, distractor: Mask | None) -> dict[str, float]:
    """Whether relevance points at the tokens that decide the answer.

    Args:
        values: [pos], the relevance of every token.
        key: [pos], the tokens that decide.
        distractor: [pos], the tokens that are evidence for the wrong answer, where there are any.
    """
    scores = {
        "hit": hit(values, key),
        "hit_at_3": hit(values, key, 3),
        "iou": ious(values, key)["span length"],
    }
    if distractor is not None:
        scores["above_distractor"] = float(values[key].max() > values[distractor].max())
    return scores
