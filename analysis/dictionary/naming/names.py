"""Naming a unit with a provider of explanations, and scoring the name on examples it has not seen.

A provider reads sentences in which a unit is active, and says what they have in common. How good
that is, is measured as in delphi (Paulo et al. 2024, "Automatically Interpreting Millions of
Features in Large Language Models"), on held-out examples:

* **detection**: given the explanation and a text, does the unit fire in it?
* **fuzzing**: given the explanation and a text with some tokens marked, are these the tokens on
  which it fires?

Both are scored by the area under the ROC curve (0.5 is chance), which does not care where a
provider puts its threshold, with a bootstrap 95 % interval. Texts are data: nothing in them is
executed, and what a provider returns is shown escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lenslrp.errors import InputError
from lenslrp.text.words import joined

MARK = ("<<", ">>")


@dataclass(frozen=True)
class NamingExample:
    """A window of text with a unit's activation at each token."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.activations):
            raise InputError(
                f"an example has one activation a token: {len(self.tokens)} tokens, "
                f"{len(self.activations)} activations"
            )

    @property
    def text(self) -> str:
        """The window as one string."""
        return joined(self.tokens)

    def peaks(self, share: float = 0.5) -> list[int]:
        """Where the activation is at least `share` of its maximum (in absolute value)."""
        size = [abs(a) for a in self.activations]
        return [i for i, a in enumerate(size) if a > 0 and a >= share * max(size)]

    def marked(self, positions: Iterable[int]) -> str:
        """The text with tokens at `positions` between `<<` and `>>`."""
        chosen = set(positions)
        return "".join(
            f"{MARK[0]}{token}{MARK[1]}" if i in chosen else token
            for i, token in enumerate(self.tokens)
        )


@runtime_checkable
class Provider(Protocol):
    """Whatever explains a unit and judges texts by an explanation."""

    @property
    def name(self) -> str:
        """What it is called in results."""
        ...

    def explain(self, examples: Sequence[NamingExample], writes: Sequence[str]) -> str:
        """What the examples have in common; `writes` are the tokens that the unit promotes."""
        ...

    def detect(self, explanation: str, texts: Sequence[str]) -> list[float]:
        """For each text how likely the unit fires in it; any scale that orders them."""
        ...

    def fuzz(self, explanation: str, marked: Sequence[str]) -> list[float]:
        """For each text how likely the marked tokens are those on which the unit fires."""
        ...


@dataclass(frozen=True)
class Score:
    """An area under the ROC curve with its bootstrap 95 % interval and the number of texts."""

    area: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.area:.2f} ({self.low:.2f}-{self.high:.2f}, n={self.n})"


@dataclass(frozen=True)
class Name:
    """A unit's explanation, who gave it, and how it did on held-out examples."""

    explanation: str
    provider: str
    detection: Score
    fuzzing: Score


def name_unit(
    provider: Provider,
    examples: Sequence[NamingExample],
    others: Sequence[NamingExample],
    *,
    writes: Sequence[str] = (),
    held_out: float = 0.5,
    seed: int = 0,
) -> Name:
    """Explain a unit from some of its examples and score the explanation on the rest.

    Detection and fuzzing are of Paulo et al. (2024).

    Args:
        provider: who explains and judges.
        examples: windows in which the unit fires.
        others: windows in which it does not (random ones).
        writes: the tokens that it promotes, if the provider may know them.
        held_out: share of the examples that is kept for scoring; all of `others` is.
        seed: of the split, of the wrong marks and of the bootstrap.

    Returns:
        The explanation, and its areas under the ROC curve (0.5 is chance).

    Raises:
        InputError: fewer than two examples on either side, or a share outside (0, 1).

    Examples:
        >>> fires = [NamingExample((" a", " cat"), (0.0, 1.0))] * 4
        >>> silent = [NamingExample((" a", " dog"), (0.0, 0.0))] * 4
        >>> name = name_unit(TokenRule(), fires, silent)
        >>> name.explanation, name.detection.area
        ('fires on: cat', 1.0)
    """
    if len(examples) < 2 or len(others) < 2:
        raise InputError(
            f"naming needs at least 2 examples and 2 others, got {len(examples)} and {len(others)}"
        )
    if not 0 < held_out < 1:
        raise InputError(f"held_out is a share between 0 and 1, not {held_out}")
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(examples))
    kept = min(max(1, round(held_out * len(examples))), len(examples) - 1)
    shown = [examples[i] for i in order[kept:]]
    unseen = [examples[i] for i in order[:kept]]
    explanation = provider.explain(shown, writes)
    texts = [e.text for e in (*unseen, *others)]
    fires = [True] * len(unseen) + [False] * len(others)
    marked = [e.marked(e.peaks()) for e in unseen]
    wrong = [e.marked(_elsewhere(e, generator)) for e in unseen]
    right = [True] * len(marked) + [False] * len(wrong)
    return Name(
        explanation,
        provider.name,
        _score(provider.detect(explanation, texts), fires, generator),
        _score(provider.fuzz(explanation, [*marked, *wrong]), right, generator),
    )


def _elsewhere(example: NamingExample, generator: np.random.Generator) -> list[int]:
    """As many positions as there are peaks, at random among the others."""
    peaks = example.peaks()
    rest = [i for i in range(len(example.tokens)) if i not in peaks]
    count = min(len(peaks), len(rest))
    return [int(i) for i in generator.choice(rest, count, replace=False)] if count else []


def _score(judged: Sequence[float], truth: Sequence[bool], rng: np.random.Generator) -> Score:
    scores, labels = np.asarray(judged, dtype=float), np.asarray(truth)
    if len(scores) != len(labels):
        raise InputError(f"the provider judged {len(scores)} of {len(labels)} texts")
    areas = []
    for _ in range(1000):
        index = rng.integers(0, len(labels), len(labels))
        if labels[index].any() and not labels[index].all():
            areas.append(area_under_roc(scores[index], labels[index]))
    low, high = np.quantile(areas, [0.025, 0.975]) if areas else (float("nan"),) * 2
    return Score(area_under_roc(scores, labels), float(low), float(high), len(labels))


def area_under_roc(scores: Any, labels: Any) -> float:
    """How often a true one scores above a false one; ties count half."""
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    above = scores[labels][:, None] - scores[~labels][None, :]
    return float((np.sign(above) + 1).mean() / 2)


Example = NamingExample  # its name in 0.1
