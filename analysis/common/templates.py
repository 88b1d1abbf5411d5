"""Sentences with known answers, made from templates: indirect objects, subject-verb agreement.

In each, one word decides the answer and another is a distractor: the other name (Wang et al.
2022, "Interpretability in the wild"), or a noun of the other number between subject and verb
(Linzen et al. 2016).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations, product

from lenslrp.analysis.common.records import Record

FIRST_NAMES = (
    "Mary",
    "John",
    "Anna",
    "James",
    "Sarah",
    "David",
    "Laura",
    "Peter",
    "Alice",
    "Robert",
)

INDIRECT_OBJECT = (
    "When {a} and {b} went to the store, {s} gave a drink to",
    "When {a} and {b} got home, {s} handed the keys to",
    "After {a} and {b} had dinner, {s} passed a letter to",
    "While {a} and {b} were at the office, {s} gave a book to",
    "Then {a} and {b} had a long talk. Afterwards {s} gave a ring to",
)

NOUNS = {
    "key": "keys", "report": "reports", "picture": "pictures", "letter": "letters",
    "window": "windows", "teacher": "teachers", "author": "authors", "door": "doors",
}  # fmt: skip
ATTRACTORS = {
    "cabinet": "cabinets", "house": "houses", "student": "students", "garden": "gardens",
    "building": "buildings", "book": "books",
}  # fmt: skip
AGREEMENT = ("The {subject} near the {other}", "The {subject} behind the {other}",
             "I think that the {subject} next to the {other}")  # fmt: skip


def indirect_objects() -> Iterator[Record]:
    """Sentences about two people, one of whom gives something to the other (IOI, Wang et al. 2022).

    Yields:
        Records ``text``; ``answer``, the next word; ``rival``, the incorrect answer; ``key``, the
        name that decides, and ``distractor``, the other one.

    Examples:
        >>> next(indirect_objects())["text"]
        'When Mary and John went to the store, Mary gave a drink to'
    """
    for template, (a, b) in product(INDIRECT_OBJECT, permutations(FIRST_NAMES, 2)):
        for subject, answer in ((a, b), (b, a)):
            yield {
                "text": template.format(a=a, b=b, s=subject),
                "answer": f" {answer}",
                "rival": f" {subject}",
                "key": answer,
                "distractor": subject,
            }


def agreement() -> Iterator[Record]:
    """Sentences whose verb agrees with the subject, not with the noun between (Linzen et al. 2016).

    Yields:
        Records as of `indirect_objects`; the subject is the ``key``, the noun between the
        ``distractor``.

    Examples:
        >>> next(agreement())["text"]
        'The key near the cabinets'
    """
    for template, pair, between in product(AGREEMENT, NOUNS.items(), ATTRACTORS.items()):
        for number in (0, 1):
            subject, other = pair[number], between[1 - number]
            verbs = (" is", " are")
            yield {
                "text": template.format(subject=subject, other=other),
                "answer": verbs[number],
                "rival": verbs[1 - number],
                "key": subject,
                "distractor": other,
            }
