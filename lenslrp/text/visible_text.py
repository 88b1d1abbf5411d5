"""Tokens as text that a reader can see: nothing invisible, nothing that reorders its neighbours.

A tokenizer hands out pieces of text that are not words: leading spaces, newlines, control
characters, zero-width joiners, marks that turn the reading direction around. Each character
that would not be seen, or that would act on the text beside it, is replaced by a symbol: space
``·``, newline ``↵``, tab ``⇥``, anything else its code point, ``⟨U+200B⟩``. The result is plain
text; whoever puts it in HTML still escapes it.
"""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

_SYMBOLS = {"\n": "↵", "\t": "⇥"}
# Letters and marks by category, yet drawn as nothing (Unicode's Default_Ignorable_Code_Point,
# and the blank of Braille).
_BLANK = frozenset(
    map(
        chr,
        [0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0, *range(0x180B, 0x1810)],
    )
)
_INVISIBLE = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"})


class Piece(NamedTuple):
    """A run of shown text; ``symbol`` says that it stands for a character that is not seen."""

    text: str
    symbol: bool


def _symbol(char: str, *, edge: bool) -> str | None:
    """What stands for ``char``, or None where the character shows itself."""
    if char == " ":
        return "·" if edge else None
    if char in _SYMBOLS:
        return _SYMBOLS[char]
    if char in _BLANK or unicodedata.category(char) in _INVISIBLE:
        return f"⟨U+{ord(char):04X}⟩"
    return None


def visible_pieces(token: str) -> list[Piece]:
    """Split ``token`` into runs that show themselves and symbols for what would not be seen.

    A space is a symbol at either end of the token and beside another space; a single space
    between words stays a space. A token that starts with a combining mark gets a dotted circle
    to carry it, and the empty token is ``∅``.
    """
    if not token:
        return [Piece("∅", True)]
    pieces: list[Piece] = []
    if unicodedata.category(token[0]).startswith("M") and token[0] not in _BLANK:
        pieces.append(Piece("◌", True))
    last = len(token) - 1
    for index, char in enumerate(token):
        edge = index in (0, last) or " " in (token[index - 1], token[index + 1])
        symbol = _symbol(char, edge=edge)
        shown = Piece(char if symbol is None else symbol, symbol is not None)
        follows_circle = pieces and pieces[-1].text == "◌"
        if pieces and (pieces[-1].symbol == shown.symbol or follows_circle):
            shown = Piece(pieces.pop().text + shown.text, shown.symbol)
        pieces.append(shown)
    return pieces


def visible(token: str) -> str:
    """``token`` as one line of plain text in which every character can be seen."""
    return "".join(piece.text for piece in visible_pieces(token))


def running(token: str) -> str:
    """A token as part of a running text: like `visible`, but a single space stays a space."""
    if token == " ":
        return token
    shown = visible(token)
    if len(token) > 1 and token[0] == " " != token[1]:
        shown = " " + shown[1:]
    if len(token) > 1 and token[-1] == " " != token[-2]:
        shown = shown[:-1] + " "
    return shown
