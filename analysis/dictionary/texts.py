"""The documents that a dictionary references, with a full-text index, in one SQLite file.

Each document is kept once, however many units reference it, as its tokens, as its text, and with
the characters of the text that each token holds. The full-text index is SQLite's own FTS5 over the
words of the text as `lenslrp.analysis.dictionary.text_search` takes them apart. A file from
a stranger is opened read-only, with a schema that is compared to ours word for word, so that it
brings no view, trigger or virtual table of its own.
"""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from lenslrp.analysis.common.storage import require_plain
from lenslrp.analysis.dictionary.text_search import indexed, terms
from lenslrp.errors import InputError, StorageError
from lenslrp.files import whole
from lenslrp.text.spelling import Spelling
from lenslrp.text.words import pieces

DAMAGED = (sqlite3.DatabaseError, UnicodeDecodeError)
"""What reading a damaged database raises: SQLite's messages hold its bytes as they are."""

SQL_SCHEMA = (
    "CREATE TABLE documents (id INTEGER PRIMARY KEY, source INTEGER, start INTEGER, tokens BLOB, "
    "aim_position INTEGER, aim_token INTEGER, aim_value REAL, text TEXT, spans BLOB)",
    "CREATE TABLE tokens (id INTEGER PRIMARY KEY, text TEXT)",
    "CREATE VIRTUAL TABLE search USING fts5(words, content='', tokenize='ascii')",
)
TOKEN_CHARACTERS = 4096
"""Characters of a token: no vocabulary has longer ones."""

SQL_TABLES = frozenset({"documents", "tokens", "search"})


@dataclass(frozen=True)
class Document:
    """One document of a dictionary.

    Attributes:
        id: its number in the corpus.
        source: which text of the corpus it was cut from.
        start: at which of that text's tokens (a beginning-of-sequence token not counted).
        tokens: ids, [pos].
        aim_position: where the target of relevance was read; -1 without one.
        aim_token: the token that was explained; -1 likewise.
        aim_value: the target's value.
        text: the tokens as one string.
        spans: the characters of each token in it, (start, stop); empty where it has none.
    """

    id: int
    source: int
    start: int
    tokens: Int64[Tensor, " pos"]
    aim_position: int
    aim_token: int
    aim_value: float
    text: str
    spans: Int64[Tensor, "pos 2"]


def write_texts(
    path: Path, documents: Iterable[Document], names: Iterator[tuple[int, str]]
) -> None:
    """Write the file. `names` is asked for the text of each token after the documents."""
    with whole(path, fresh=True) as temporary:
        try:
            with closing(sqlite3.connect(temporary)) as database:
                database.execute("PRAGMA journal_mode = OFF")
                database.execute("PRAGMA synchronous = OFF")
                for statement in SQL_SCHEMA:
                    database.execute(statement)
                database.executemany(
                    "INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        (
                            d.id, d.source, d.start, _packed(d.tokens),
                            d.aim_position, d.aim_token, d.aim_value, d.text, _packed(d.spans),
                        )
                        for d in documents
                    ),
                )  # fmt: skip
                database.executemany("INSERT INTO tokens VALUES (?, ?)", names)
                database.create_function("words", 1, indexed, deterministic=True)
                database.execute(
                    "INSERT INTO search(rowid, words) SELECT id, words(text) FROM documents"
                )
                database.execute("INSERT INTO search(search) VALUES ('optimize')")
                database.commit()
        except sqlite3.OperationalError as error:
            number = errno.ENOSPC if "full" in str(error) else errno.EIO
            raise OSError(number, str(error)) from error


class Texts:
    """The file, opened for reading."""

    def __init__(self, path: Path) -> None:
        require_plain(path)
        self.path = path
        self._names: dict[int, str] = {}
        self._database = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False
        )
        try:
            for pragma in ("trusted_schema = OFF", "query_only = ON", "cell_size_check = ON"):
                self._database.execute(f"PRAGMA {pragma}")
            self._require_schema()
        except DAMAGED as error:
            self._database.close()
            raise StorageError(f"{path} is damaged: {error}") from error

    def close(self) -> None:
        self._database.close()

    def _require_schema(self) -> None:
        tables = self._database.execute("SELECT type, name, sql FROM sqlite_schema").fetchall()
        statements = {sql for _, name, sql in tables if name in SQL_TABLES}
        foreign = [
            name for kind, name, sql in tables
            if name not in SQL_TABLES and not (kind == "table" and str(name) in _SHADOWS)
        ]  # fmt: skip
        if statements != set(SQL_SCHEMA) or foreign:
            raise StorageError(
                f"{self.path} has tables that are not a dictionary's ({str(foreign)[:100]}): it "
                "was not made by LensLRP and is not opened"
            )

    def documents(self, ids: Iterable[int]) -> dict[int, Document]:
        """Documents by id; unknown ids are left out."""
        documents = {}
        for doc in dict.fromkeys(ids):
            row = self._one("SELECT * FROM documents WHERE id = ?", doc)
            if row is not None:
                self._require_types(doc, row)
                tokens, spans = self._unpacked(row[3], 1)[:, 0], self._unpacked(row[8], 2)
                text = row[7]
                inside = bool((spans >= 0).all() and (spans <= len(text)).all())
                if len(spans) != len(tokens) or not inside:
                    raise StorageError(
                        f"{self.path} is damaged: the tokens of document {doc} do not fit its text"
                    )
                documents[doc] = Document(
                    row[0], row[1], row[2], tokens, row[4], row[5], row[6], text, spans
                )
        return documents

    def referenced(self, ids: Iterable[int]) -> dict[int, Document]:
        """Documents by id, all of which are there.

        Raises:
            StorageError: one is not.
        """
        wanted = list(ids)
        documents = self.documents(wanted)
        missing = sorted(set(wanted) - set(documents))
        if missing:
            raise StorageError(
                f"{self.path} is damaged: documents that examples reference are missing, such as "
                f"{missing[0]}"
            )
        return documents

    def _require_types(self, doc: int, row: tuple[Any, ...]) -> None:
        """SQLite keeps what it is given, whatever the column says."""
        numbers = all(isinstance(row[i], int) for i in (0, 1, 2, 4, 5))
        blob = isinstance(row[3], bytes) and 0 < len(row[3]) <= 4 << 15 and not len(row[3]) % 4
        if not numbers or not blob or not isinstance(row[6], float) or not isinstance(row[7], str):
            raise StorageError(f"{self.path} is damaged: document {doc} is not one of a dictionary")
        if int(np.frombuffer(row[3], dtype=np.int32).min()) < 0:
            raise StorageError(f"{self.path} is damaged: document {doc} has a negative token")

    def pieces(self, document: Document) -> list[str]:
        """What each token shows of its document; a token without characters, its name."""
        spans = [(int(start), int(stop)) for start, stop in document.spans.tolist()]
        shown = pieces(Spelling(document.text, spans, [False] * len(spans)))
        return [
            piece or self.token(token)
            for piece, token in zip(shown, document.tokens.tolist(), strict=True)
        ]

    def token(self, token: int) -> str:
        """A token as text; its id in brackets where the model had no tokenizer."""
        if token not in self._names:
            row = self._one("SELECT text FROM tokens WHERE id = ?", token)
            if row is not None and not (
                isinstance(row[0], str) and len(row[0]) <= TOKEN_CHARACTERS
            ):
                raise StorageError(
                    f"{self.path} is damaged: token {token} is no text of up to {TOKEN_CHARACTERS} "
                    "characters"
                )
            self._names[token] = f"[{token}]" if row is None else str(row[0])
        return self._names[token]

    def tokens_called(self, text: str) -> list[int]:
        """The tokens whose text is `text`, white space aside."""
        try:
            rows = self._database.execute("SELECT id, text FROM tokens").fetchall()
        except DAMAGED as error:
            raise StorageError(f"{self.path} is damaged: {error}") from error
        return [int(token) for token, name in rows if str(name).strip() == text.strip()]

    def matching(self, query: str) -> list[int]:
        """The documents in which words all occur, the best first; `"..."` is a phrase.

        Raises:
            InputError: an empty query.
        """
        words = terms(query)
        if not words:
            raise InputError(f"nothing to search for in {query!r}; give at least one word")
        wanted = " ".join(f'"{indexed(word)}"' for word in words)
        try:
            rows = self._database.execute(
                "SELECT rowid FROM search WHERE search MATCH ? ORDER BY rank, rowid", (wanted,)
            ).fetchall()
        except DAMAGED as error:
            raise StorageError(f"{self.path} is damaged: {error}") from error
        return [int(doc) for (doc,) in rows]

    def _unpacked(self, data: Any, columns: int) -> Tensor:
        if not isinstance(data, bytes) or len(data) % (4 * columns):
            raise StorageError(f"{self.path} is damaged: a document's tokens are no int32")
        values = np.frombuffer(data, dtype=np.int32).astype(np.int64)
        return torch.from_numpy(values.reshape(-1, columns))

    def _one(self, sql: str, key: int) -> tuple[Any, ...] | None:
        try:
            row: tuple[Any, ...] | None = self._database.execute(sql, (key,)).fetchone()
        except DAMAGED as error:
            raise StorageError(f"{self.path} is damaged: {error}") from error
        return row


_SHADOWS = frozenset(f"search_{part}" for part in ("data", "idx", "docsize", "config"))


def _packed(values: Tensor) -> bytes:
    return values.int().numpy().tobytes()
