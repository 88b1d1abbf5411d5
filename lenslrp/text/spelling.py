"""What a row of tokens spells, and which characters of it each token holds.

A tokenizer's pieces are not text: byte-level vocabularies (GPT-2, Llama 3) and byte fallback
(SentencePiece) split characters, and the space before a word is a mark of its own in every kind.
Here tokens are read in their row. Those that stand for bytes are put together as bytes; every
other one is what decoding adds after the token before it. A character that several tokens share
is in the spans of all of them, and bytes that make no character are written ``⟨0xE6⟩``, so that
U+FFFD is shown only where a text has it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

Spans = list[tuple[int, int]]

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes one
_JOINS = "@@"  # how CTRL and PhoBERT mark a piece that is not the end of its word
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Spelling:
    """A row of tokens as text.

    Attributes:
        text: what they spell.
        spans: the characters of each token, (start, stop); empty where it has none in the text.
        special: which tokens mark something (a beginning, padding) instead of spelling it.
    """

    text: str
    spans: Spans
    special: list[bool]


class Speller:
    """Reads rows of one tokenizer's tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = special_ids(tokenizer)
        self._fast = bool(getattr(tokenizer, "is_fast", False))
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        self._byte_level = (
            hasattr(tokenizer, "byte_decoder")
            if decoder is None
            else b'"ByteLevel"' in decoder.__getstate__()
        )
        # CLIP's words end with a mark; decoders of bytes leave it in.
        ends = getattr(getattr(backend, "model", None), "end_of_word_suffix", None)
        self._ends = str(ends or "") if self._byte_level else ""
        self._alone: dict[int, str] = {}
        self._bytes: dict[int, bytes | None] = {}

    def decode(self, ids: Sequence[int]) -> str:
        """The tokenizer's own decoding, nothing left out or tidied."""
        text = str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
        last = None if self._fast else self._piece(ids[-1])
        goes_on = isinstance(last, str) and last.endswith(_JOINS) and last != _JOINS
        return text.removesuffix(_JOINS) if goes_on else text

    def token(self, token: int) -> str:
        """One token as text on its own, with the space that it begins with."""
        data = self._raw(token)
        if data is not None and token not in self.special:
            return _characters([data])[0]
        text, piece = self._decoded(token), self._piece(token)
        begins = isinstance(piece, str) and piece.startswith(_SPACE)
        return f" {text}" if begins and not text.startswith(" ") else text

    def spell(self, ids: Sequence[int]) -> Spelling:
        """The text of a row, special tokens by their names."""
        text, spans, special = "", [], []
        at = 0
        before: list[int] = []  # what decoding needs to have seen: back to a token that has text
        while at < len(ids):
            stop = at + 1
            marks = ids[at] in self.special
            if marks:
                new = self._decoded(ids[at])
                inside = [(0, len(new))]
            elif self._raw(ids[at]) is not None:
                while stop < len(ids) and self._continues(ids[stop], raw=True):
                    stop += 1
                new, inside = _characters(self._run(before, ids[at:stop]))
            else:
                new = self._after(before, ids[at:stop])
                while (  # parts of characters in a vocabulary whose bytes are not known
                    new.endswith(_BROKEN)
                    and stop < len(ids)
                    and self._continues(ids[stop], raw=False)
                ):
                    stop += 1
                    new = self._after(before, ids[at:stop])
                inside = [(0, len(new))] * (stop - at)
            spans += [(len(text) + a, len(text) + b) for a, b in inside]
            special += [marks] * (stop - at)
            text += new
            if not marks:
                before = [*before, *ids[at:stop]] if not new else [ids[stop - 1]]
            at = stop
        return Spelling(text, spans, special)

    def read(self, ids: Sequence[int], text: str, spelled: Spelling | None = None) -> Spelling:
        """The same for a row that was made from ``text``, whose characters are then the text's.

        What was put before and after it is spelled. A row that is not the text's is spelled whole.

        Args:
            spelled: what `spell` made of ``ids``, where that is known.
        """
        row = self.spell(ids) if spelled is None else spelled
        pieces = standing(self.tokenizer, text, ids)
        if pieces is None:
            return row
        start, stop, spans = pieces
        first = row.spans[start - 1][1] if start else 0
        last = row.spans[stop - 1][1]
        own, special = row.text[first:last], row.special[start:stop]
        lead = int(own == f" {text}")  # put there by the tokenizer
        if own == text or lead:  # finer than what the tokenizer keeps, and spaces are included
            inside = [
                (max(0, a - first - lead), max(0, b - first - lead))
                for a, b in row.spans[start:stop]
            ]
        elif spans is not None:  # normalised on the way
            inside = spans
            special = [  # the unknown may have the end's name
                marks and text[a:b] == self._decoded(token)
                for marks, token, (a, b) in zip(special, ids[start:stop], spans, strict=True)
            ]
        else:
            return row
        gained = first + len(text) - last
        return Spelling(
            row.text[:first] + text + row.text[last:],
            [
                *row.spans[:start],
                *((first + a, first + b) for a, b in inside),
                *((a + gained, b + gained) for a, b in row.spans[stop:]),
            ],
            [*row.special[:start], *special, *row.special[stop:]],
        )

    def _piece(self, token: int) -> Any:
        convert = getattr(self.tokenizer, "convert_ids_to_tokens", None)
        return None if convert is None else convert(token)

    def _decoded(self, token: int) -> str:
        if token not in self._alone:
            text = self.decode([token])
            self._alone[token] = text.removesuffix(self._ends) if self._ends else text
        return self._alone[token]

    def _raw(self, token: int) -> bytes | None:
        """The bytes that a token stands for, ``None`` where it stands for characters."""
        if token not in self._bytes:
            self._bytes[token] = self._find_bytes(self._piece(token), self._decoded(token))
        return self._bytes[token]

    def _find_bytes(self, piece: Any, alone: str) -> bytes | None:
        if isinstance(piece, bytes):
            return piece
        if not isinstance(piece, str):
            return None
        slow = hasattr(self.tokenizer, "sp_model")  # decodes them as they are written
        if (found := _BYTE.fullmatch(piece)) and (slow or alone != piece):
            return bytes.fromhex(found[1])
        if self._byte_level:
            table = [_table().get(char) for char in piece.removesuffix(self._ends)]
            known = [byte for byte in table if byte is not None]
            data = bytes(known)
            if len(known) == len(table) and data.decode(errors="replace").strip() == alone.strip():
                return data
            return None  # added to the vocabulary, as the text that it is
        whole = alone != "" and _BROKEN not in alone
        # ByT5, Perceiver: a byte is the character of its number
        return piece.encode("latin-1") if not whole and "\x7f" < piece < "\u0100" else None

    def _continues(self, token: int, *, raw: bool) -> bool:
        """Whether a token goes on with a run of bytes, or of broken pieces."""
        if token in self.special or (self._raw(token) is not None) != raw:
            return False
        return raw or _BROKEN in self._decoded(token)

    def _run(self, before: Sequence[int], ids: Sequence[int]) -> list[bytes]:
        """The bytes of a run, with the space that a mark at the end of a word stands for."""
        raw = [self._raw(token) or b"" for token in ids]
        if not self._ends:
            return raw
        earlier = [None, *ids] if not before else [before[-1], *ids]
        ended = [last is not None and self._piece(last).endswith(self._ends) for last in earlier]
        return [b" " + data if after else data for data, after in zip(raw, ended, strict=False)]

    def _after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """What decoding adds for ``ids`` after other tokens."""
        if before:
            start, whole = self.decode(before), self.decode([*before, *ids])
            if whole.startswith(start):
                return whole[len(start) :]
        return self.decode(ids)


def str_token(tokenizer: Any, token: int) -> str:
    """One token as text, with the space that it begins with; half a character as its bytes."""
    return Speller(tokenizer).token(token)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that mark something. One that only stands for what is unknown does not."""
    try:
        added = getattr(tokenizer, "added_tokens_decoder", {})
    except NotImplementedError:  # mistral-common's, which lists all of them below
        added = {}
    ids = {index for index, token in added.items() if token.special}
    ids |= {i for i in getattr(tokenizer, "all_special_ids", ()) if i is not None}
    unknown = getattr(tokenizer, "unk_token_id", None)
    names = ("bos", "eos", "pad", "cls", "sep", "mask")
    if unknown not in [getattr(tokenizer, f"{name}_token_id", None) for name in names]:
        ids.discard(unknown)
    return frozenset(ids)


def standing(tokenizer: Any, text: str, ids: Sequence[int]) -> tuple[int, int, Spans | None] | None:
    """Where the tokens of a text stand in a row, (start, stop), and what each covers of the text.

    ``None`` where they are not in the row; no spans where the tokenizer keeps no positions.
    """
    keeps = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=keeps)
    whole, row = list(encoded["input_ids"]), list(ids)
    for start in range(len(row) - len(whole) + 1):
        if whole and row[start : start + len(whole)] == whole:
            spans = [(int(a), int(b)) for a, b in encoded["offset_mapping"]] if keeps else None
            return start, start + len(whole), spans
    return None


def _characters(parts: Sequence[bytes]) -> tuple[str, Spans]:
    """UTF-8 that was cut into parts, and the characters that each part has bytes of."""
    shown: list[str] = []
    where: Spans = []
    length = 0
    for char in b"".join(parts).decode(errors="surrogateescape"):
        lost = "\udc80" <= char <= "\udcff"
        new = f"⟨0x{ord(char) - 0xDC00:02X}⟩" if lost else char
        where += [(length, length + len(new))] * (1 if lost else len(char.encode()))
        shown.append(new)
        length += len(new)
    spans, at = [], 0
    for part in parts:
        some = where[at : at + len(part)]
        spans.append((some[0][0], some[-1][1]) if some else (length, length))
        at += len(part)
    return "".join(shown), spans


@cache
def _table() -> dict[str, int]:
    """Characters that byte-level vocabularies write bytes with (GPT-2's)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
