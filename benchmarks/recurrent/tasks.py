"""Three kinds of sequence of 24 tokens; in two of them it is known where an answer comes from.

* *recall*: six pairs of a key and a value, then some of them again. An answer is the value of the
  key before it; its source is that value among the pairs, and beside it the key. The first answer
  is explained.
* *copying* (selective copying, Gu & Dao 2023): four different letters among noise, a mark, and the
  letters in their order. The source of an answer is the letter in the noise. An answer drawn at
  random is explained.
* *text*: characters of English paragraphs, each an answer. No source is known. The last is
  explained.

Keys, values, letters, noise and characters are different tokens. No key, value or letter is twice
in one context, so a source is one position.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

LENGTH = 24
PAIRS, LETTERS = 6, 4
CHARACTERS = " abcdefghijklmnopqrstuvwxyz.,0"
"""What text is reduced to: digits are 0, all else is left out."""

KEYS, VALUES, COPIED = range(2, 18), range(18, 34), range(34, 50)
NOISE, MARK, FIRST_CHARACTER = range(50, 54), 54, 55
VOCABULARY = FIRST_CHARACTER + len(CHARACTERS)


@dataclass(frozen=True)
class Sequence:
    """One sequence.

    Attributes:
        tokens: [LENGTH].
        answers: positions of the tokens to be predicted, each from all before it.
        asked: which of the answers is explained.
        context: how many tokens come before the question: its first tokens.
        sources: for each answer the position of the same token in the context, if one is known.
        keys: for each answer the position of its key in the context, likewise.
    """

    tokens: tuple[int, ...]
    answers: tuple[int, ...]
    asked: int
    context: int
    sources: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """The position of the answer that is explained; the prompt is what comes before it."""
        return self.answers[self.asked]

    @property
    def source(self) -> int | None:
        """Where the explained answer comes from, if that is known."""
        return self.sources[self.asked] if self.sources else None

    @property
    def key(self) -> int | None:
        """Where the key of the explained answer stands in the context, likewise."""
        return self.keys[self.asked] if self.keys else None


Task = Callable[[np.random.Generator], Sequence]


def recall(rng: np.random.Generator, pairs: int = PAIRS) -> Sequence:
    keys, values = (rng.choice(kind, pairs, replace=False) for kind in (KEYS, VALUES))
    asked = rng.choice(pairs, LENGTH // 2 - pairs)
    tokens = [int(x) for i in (*range(pairs), *asked) for x in (keys[i], values[i])]
    return Sequence(
        tuple(tokens),
        tuple(range(2 * pairs + 1, LENGTH, 2)),
        0,
        2 * pairs,
        tuple((2 * asked + 1).tolist()),
        tuple((2 * asked).tolist()),
    )


def copying(rng: np.random.Generator, letters: int = LETTERS) -> Sequence:
    context = LENGTH - letters - 1
    tokens = rng.choice(NOISE, context)
    places = np.sort(rng.choice(context, letters, replace=False))
    tokens[places] = rng.choice(COPIED, letters, replace=False)
    return Sequence(
        (*tokens.tolist(), MARK, *tokens[places].tolist()),
        tuple(range(context + 1, LENGTH)),
        int(rng.integers(letters)),
        context,
        tuple(places.tolist()),
    )


def text(rng: np.random.Generator, *, corpus: str) -> Sequence:
    start = int(rng.integers(len(corpus) - LENGTH))
    characters = corpus[start : start + LENGTH]
    tokens = tuple(FIRST_CHARACTER + CHARACTERS.index(c) for c in characters)
    answers = tuple(range(1, LENGTH))
    return Sequence(tokens, answers, len(answers) - 1, LENGTH - 1)


def read_corpus(path: Path) -> tuple[str, str]:
    """Paragraphs of a .jsonl file as one text for training and, every tenth, one for the rest."""
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [
        "".join("0" if c.isdigit() else c for c in json.loads(line)["text"].lower())
        for line in lines
    ]
    kept = ["".join(c for c in paragraph if c in CHARACTERS) for paragraph in kept]
    training = [paragraph for i, paragraph in enumerate(kept) if i % 10]
    return " ".join(training), " ".join(kept[::10])


def shown(token: int) -> str:
    """A key or value, such as ``k3``; other tokens by their number."""
    for letter, kind in (("k", KEYS), ("v", VALUES)):
        if token in kind:
            return f"{letter}{token - kind.start}"
    return str(token)


def tasks(corpus: str | None) -> dict[str, Task]:
    """By name; text only where there is a corpus."""
    known: dict[str, Task] = {"recall": recall, "copying": copying}
    return known if corpus is None else {**known, "text": partial(text, corpus=corpus)}


def training(corpus: str | None) -> dict[str, Task]:
    """The same tasks, with from one pair or letter up to as many as are asked for later."""
    sizes = {"recall": PAIRS, "copying": LETTERS}
    known = tasks(corpus)
    return known | {name: partial(_smaller, known[name], most) for name, most in sizes.items()}


def _smaller(task: Callable[..., Sequence], most: int, rng: np.random.Generator) -> Sequence:
    return task(rng, int(rng.integers(1, most + 1)))
