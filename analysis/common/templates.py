"""Sentences with known answers, made from templates: indirect objects, subject-verb agreement.

In each, one word decides the answer and another is there to mislead: the other name (Wang et al.
2022, "Interpretability in the wild"), or a noun of the other number between subject and verb
(Linzen et al. 2016).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations, product

from lenslrp.analysis.common.records import Record

NAMES = ("Mary", "John", "Anna", "James", "Sarah", "David", "Laura", "Peter", "Alice", "Robert")

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
    """``text``, the ``answer`` after it, the ``rival`` name; the answer's name is the key."""
    for template, (a, b) in product(INDIRECT_OBJECT, permutations(NAMES, 2)):
        for subject, answer in ((a, b), (b, a)):
            yield {
                "text": template.format(a=a, b=b, s=subject),
                "answer": f" {answer}",
                "rival": f" {subject}",
                "key": answer,
                "distractor": subject,
            }


def agreement() -> Iterator[Record]:
    """``text``, the verb that agrees with the subject, the one that agrees with the noun between;
    the subject is the key."""
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
