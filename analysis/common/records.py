"""What an evaluation reads: one record an example, from a file, a ``datasets`` object or a list.

Records are data from outside. A line that cannot be used is named and left out, never guessed at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lenslrp.errors import InputError
from lenslrp.fingerprints import canonical

Record = dict[str, Any]

SURROGATE = "half of a surrogate pair in its text, which is no character"

SPLITS = ("development", "held-out")


def is_text(value: str) -> bool:
    """Whether all of a string are characters: JSON can spell halves of them, ``"\\ud83d"``."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_records(source: Any, fields: Mapping[str, type], skipped: list[str]) -> Iterator[Record]:
    """The records of a source, one after the other, with the ``fields`` only.

    Args:
        source: a path to a ``.jsonl`` file, or anything that gives dicts (a list, a ``datasets``
            object, streaming or not).
        fields: what a record must have: name -> type.
        skipped: gets the name of every record that cannot be read, and why.

    Raises:
        InputError: no such file, or another kind of source.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.is_file():
            raise InputError(f"no file at {str(path)[:200]!r}")
        entries: Iterable[tuple[str, Any]] = _lines(path)
    elif isinstance(source, Iterable):
        entries = ((f"record {n}", entry) for n, entry in enumerate(source))
    else:
        raise InputError(
            "records come from a .jsonl file, a list of dicts or a datasets object, not "
            f"{type(source).__name__}"
        )
    for name, entry in entries:
        if isinstance(entry, ValueError):
            skipped.append(f"{name}: {entry}")
            continue
        if not isinstance(entry, dict):
            skipped.append(f"{name}: no JSON object")
            continue
        wrong = [field for field, kind in fields.items() if not isinstance(entry.get(field), kind)]
        if wrong:
            kinds = ", ".join(f"{field!r} ({fields[field].__name__})" for field in wrong)
            skipped.append(f"{name}: it has no {kinds}")
            continue
        texts = (entry[field] for field, kind in fields.items() if kind is str)
        if not all(map(is_text, texts)):
            skipped.append(f"{name}: {SURROGATE}")
            continue
        yield {field: entry[field] for field in fields}


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry: Any = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                entry = ValueError("not UTF-8")
            except (ValueError, RecursionError):
                entry = ValueError("not JSON")
            yield f"{path.name} line {number}", entry


def record_id(record: Record) -> str:
    """A record's identifier: 16 hexadecimal digits of the SHA-256 of its contents."""
    return _digest(canonical(record))[:16]


def split_of(text: str) -> str:
    """Whether a text is in the development or the held-out split: by its own hash, so that it is in
    the same one in every file that has it."""
    return SPLITS[int(_digest(text)[:8], 16) % 2]


def in_order(records: Iterable[Record], seed: int) -> list[Record]:
    """Records without repetition, in an order drawn by ``seed`` and their contents alone."""
    by_id = {record_id(record): record for record in records}
    return [by_id[name] for name in sorted(by_id, key=lambda name: _digest(f"{seed}|{name}"))]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
