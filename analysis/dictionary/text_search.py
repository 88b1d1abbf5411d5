"""How text is found: words as a reader compares them, whatever the script and the tokeniser.

Text is folded first: compatibility forms and accents composed (NFKC), upper and lower case alike,
what is never seen (joiners, variation selectors, soft hyphens) dropped, every white space one
space. Then it is taken apart into what an index holds: runs of letters, marks and digits, and one
by one the characters of scripts that are written without spaces (and of Korean, whose words take
endings) and symbols such as emoji, so that any part of such a text can be found as a phrase.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import regex

_NEVER_SEEN = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
_UNSPACED = "".join(
    rf"\p{{scx={script}}}"
    for script in ("Han", "Hira", "Kana", "Bopo", "Hang", "Yi", "Thai", "Lao", "Khmer", "Mymr")
)
_ATOM = regex.compile(
    rf"(?V1)[{_UNSPACED}--\p{{ASCII}}--\p{{P}}]"
    rf"|[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+|[\p{{S}}--\p{{ASCII}}]"
)


def folded(text: str) -> str:
    """`text` as it is compared."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", _NEVER_SEEN.sub("", text)).casefold()
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.lower().split())


def indexed(text: str) -> str:
    """What an index holds of `text`, with spaces between: no quotes, no ASCII but a-z and 0-9."""
    return " ".join(_ATOM.findall(folded(text)))


def occurrences(text: str, phrases: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Where each phrase's words follow one another in `text`, as characters (start, stop)."""
    seen = [i for i, character in enumerate(text) if not _NEVER_SEEN.match(character)]
    atoms = [
        (atom, seen[match.start()], seen[match.end() - 1] + 1)
        for match in _ATOM.finditer("".join(text[i] for i in seen))
        for atom in indexed(match.group()).split()
    ]
    words = [atom for atom, _, _ in atoms]
    places = []
    for wanted in (indexed(phrase).split() for phrase in phrases):
        n = len(wanted)
        starts = [i for i, word in enumerate(words) if word == wanted[0]] if wanted else []
        places.append(
            [(atoms[i][1], atoms[i + n - 1][2]) for i in starts if words[i : i + n] == wanted]
        )
    return places


def inside_word(text: str, at: int) -> bool:
    """Whether the character `at` continues a word, so that a cut before it would part the word."""
    return any(match.start() < at < match.end() for match in _ATOM.finditer(text))


def terms(query: str) -> list[str]:
    """Words and quoted phrases of a query; operators of a query language are words like others."""
    words: list[str] = []
    for n, piece in enumerate(query.split('"')):
        words += [piece.strip()] if n % 2 else piece.split()
    return [word for word in words if indexed(word)]
