"""Reading a corpus: text files, jsonl, parquet, strings, `datasets` objects, rows of token ids.

Everything is read as a stream, so a corpus need not fit into memory.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from lenslrp.analysis.common.records import SURROGATE, is_text
from lenslrp.errors import InputError, StorageError

CORPUS_SUFFIXES = (".txt", ".jsonl", ".parquet")
PARQUET_ROWS = 256
"""Rows of a parquet file read at a time."""


def describe_corpus(corpus: Any, *rest: Any) -> str | None:
    """What tells whether a corpus is the same one, without reading it all; None if nothing does.

    Names, sizes and times of files; the texts of a list; the fingerprint of a `datasets` object.
    `rest` is whatever else decides how it is tokenised.
    """
    if isinstance(corpus, str | Path):
        stats = [(path.name, path.stat()) for path in _files(Path(corpus))]
        known: Any = [(name, found.st_size, found.st_mtime_ns) for name, found in stats]
    elif isinstance(corpus, list | tuple):
        digest = hashlib.sha256()
        for item in corpus:
            digest.update(repr(item).encode() + b"|")
        known = digest.hexdigest()
    else:
        known = getattr(corpus, "_fingerprint", None)
    if known is None:
        return None
    return hashlib.sha256(repr((known, rest)).encode()).hexdigest()


def texts_of(corpus: Any, field: str = "text", skipped: list[str] | None = None) -> Iterator[Any]:
    """The texts of a corpus, one after the other.

    Args:
        corpus: a path (`.txt`: paragraphs between blank lines; `.jsonl`; `.parquet`; a folder
            of these, in the order of their names), strings, rows of token ids, records (as a
            `datasets` object yields them, streaming or not), or a function that returns one of
            these.
        field: where a record has its text.
        skipped: gets the name of every record that cannot be read.

    Raises:
        InputError: no such path, a kind of file that is not known, or a record of another kind.
    """
    skipped = [] if skipped is None else skipped
    if callable(corpus):
        corpus = corpus()
    if isinstance(corpus, str | Path):
        for path in _files(Path(corpus)):
            yield from _READERS[path.suffix](path, field, skipped)
        return
    if not isinstance(corpus, Iterable):
        raise InputError(
            "a corpus is a path, strings, rows of token ids or records with a text, not "
            f"{type(corpus).__name__}"
        )
    for number, item in enumerate(corpus):
        text = item
        if isinstance(item, dict):
            text = item.get(field)
            if not isinstance(text, str):
                raise InputError(
                    f"record {number} of the corpus has no text under {field!r}; it has "
                    f"{', '.join(map(str, item))}"
                )
        elif not isinstance(item, str | list | tuple | Tensor):
            raise InputError(f"item {number} of the corpus is a {type(item).__name__}, not a text")
        if isinstance(text, str) and not is_text(text):
            skipped.append(f"record {number}: {SURROGATE}")
        else:
            yield text.tolist() if isinstance(text, Tensor) else text


def _files(path: Path) -> list[Path]:
    try:
        folder = stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError) as error:  # also of a text, which may be too long for a name
        raise InputError(
            f"no corpus at {str(path)[:200]!r} (a string is a path; give texts as a list)"
        ) from error
    if folder:
        files = sorted(p for p in path.iterdir() if p.suffix in CORPUS_SUFFIXES and p.is_file())
        if not files:
            raise InputError(f"{path} has no {', '.join(CORPUS_SUFFIXES)} file in it")
        return files
    if path.suffix not in CORPUS_SUFFIXES:
        raise InputError(f"{path.name}: a corpus file is one of {', '.join(CORPUS_SUFFIXES)}")
    return [path]


def _from_text(path: Path, field: str, skipped: list[str]) -> Iterator[str]:
    paragraph: list[str] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.strip():
                paragraph.append(line)
            elif paragraph:
                yield "".join(paragraph).strip()
                paragraph = []
    if paragraph:
        yield "".join(paragraph).strip()


def _from_jsonl(path: Path, field: str, skipped: list[str]) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                text = record[field]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                skipped.append(f"{path.name} line {number}: no JSON object with a text {field!r}")
            elif not is_text(text):
                skipped.append(f"{path.name} line {number}: {SURROGATE}")
            else:
                yield text


def _from_parquet(path: Path, field: str, skipped: list[str]) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise InputError(
                    f"{path.name} has no column {field!r}; it has "
                    f"{', '.join(file.schema_arrow.names)}"
                )
            row = 0
            for some in file.iter_batches(batch_size=PARQUET_ROWS, columns=[field]):
                for value in some.column(0):
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError:
                        text = None
                    if isinstance(text, str):
                        yield text
                    else:
                        skipped.append(f"{path.name} row {row}: no text")
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{path} is damaged: {str(error)[:200]}") from error


_READERS = {".txt": _from_text, ".jsonl": _from_jsonl, ".parquet": _from_parquet}
