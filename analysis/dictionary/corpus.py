"""A corpus as fixed blocks of tokenised documents with stable ids.

A text is cut into documents of at most `context` tokens, numbered in the order of the corpus.
Documents are kept in parts of 4,096; within a part they are put into blocks by length, so that
little is padded. A block is the unit of work: the same documents in the same order and padding in
every scan and replay, however many shards there are (another padding alone moves values by 2e-6).
Tokenised once and read back part by part, a corpus of any size takes the memory of one part.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from lenslrp.analysis.common.storage import load_json, load_tensors, save_json, save_tensors
from lenslrp.analysis.dictionary.sources import texts_of
from lenslrp.errors import InputError, StorageError
from lenslrp.quiet import quiet_transformers

PART = 4096
"""Documents in a file."""

TEXTS = 256
"""Texts tokenised at a time."""

SHORTEST = 3
"""Tokens a document has at least: one masked, one to read at, one to predict."""


@dataclass(frozen=True)
class Cut:
    """How texts become blocks.

    Args:
        context: tokens a document has at most, the beginning-of-sequence token included.
        block: documents in a block.
        bos: the token put before every document, `None` for none.
        field: where a record (jsonl, parquet, `datasets`) has its text.
    """

    context: int = 128
    block: int = 16
    bos: int | None = None
    field: str = "text"

    def __post_init__(self) -> None:
        if not SHORTEST + 1 <= self.context < 2**15:
            raise InputError(f"context must be from {SHORTEST + 1} to {2**15 - 1}: {self.context}")
        if not 1 <= self.block <= PART or PART % self.block:
            raise InputError(f"batch_size must be a divisor of {PART}, not {self.block}")


@dataclass(frozen=True)
class Block:
    """One unit of work.

    Attributes:
        index: its number in the corpus.
        docs: ids, [row].
        tokens: padded on the right, [row, pos].
        mask: True where a token is real.
    """

    index: int
    docs: Int64[Tensor, " row"]
    tokens: Int64[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]

    @property
    def lengths(self) -> list[int]:
        counts: list[int] = self.mask.sum(dim=1).tolist()
        return counts


@dataclass(frozen=True)
class Part:
    """Documents of one file, in the order of their ids.

    Attributes:
        first: id of the first document.
        tokens: of all documents, one after the other.
        offsets: where each begins, and the end: [document + 1].
        sources: which text of the corpus each was cut from.
        starts: at which of that text's tokens.
        order: documents in the order of the blocks, counted from `first`.
    """

    first: int
    tokens: Tensor
    offsets: Tensor
    sources: Tensor
    starts: Tensor
    order: Tensor

    def document(self, doc: int) -> Tensor:
        at = doc - self.first
        return self.tokens[int(self.offsets[at]) : int(self.offsets[at + 1])].long()


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus on disk.

    Attributes:
        folder: its files.
        about: what `corpus.json` says: `documents, blocks, tokens, texts, skipped, short,
            digest, parts` and the cut.
    """

    folder: Path
    about: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Corpus:
        """Raises `StorageError` where nothing has been tokenised, or it is damaged."""
        path = Path(folder) / "corpus.json"
        about = load_json(path)
        numbers = ("documents", "blocks", "tokens", "texts", "short", "skipped")
        parts = about.get("parts")
        if not all(type(about.get(name)) is int and about[name] >= 0 for name in numbers):
            raise StorageError(f"{path} is damaged: it does not say {', '.join(numbers)}")
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise StorageError(f"{path} is damaged: it does not list its parts")
        if len(parts) != -(-about["documents"] // PART) or about.get("digest") != _joined(parts):
            raise StorageError(f"{path} is damaged: its parts are not those of its documents")
        try:
            cut = Cut(**about["cut"])
        except (KeyError, TypeError, InputError) as error:
            raise StorageError(f"{path} is damaged: its cut is none: {error}") from error
        if about["blocks"] != -(-about["documents"] // cut.block):
            raise StorageError(f"{path} is damaged: {about['blocks']} blocks")
        return cls(Path(folder), about)

    @property
    def documents(self) -> int:
        return int(self.about["documents"])

    @property
    def blocks(self) -> int:
        return int(self.about["blocks"])

    @property
    def cut(self) -> Cut:
        return Cut(**self.about["cut"])

    def part(self, number: int) -> Part:
        """One file's documents; the last few are kept in memory.

        Raises:
            StorageError: the file is damaged or another corpus' own.
        """
        return _part(str(self.folder), number, self.about["parts"][number])

    def part_of(self, doc: int) -> Part:
        return self.part(doc // PART)

    def block(self, index: int) -> Block:
        """Block `index`: its documents, padded on the right with token 0."""
        cut = self.cut
        number, inside = divmod(index, PART // cut.block)
        part = self.part(number)
        chosen = part.order[inside * cut.block : (inside + 1) * cut.block].long()
        chosen = chosen.sort().values
        lengths = part.offsets[chosen + 1] - part.offsets[chosen]
        tokens = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.int64)
        for row, at in enumerate(chosen.tolist()):
            tokens[row, : int(lengths[row])] = part.document(part.first + at)
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        return Block(index, chosen + part.first, tokens, mask)

    def block_of(self, docs: Tensor) -> Tensor:
        """The block that each document is in."""
        cut, blocks = self.cut, torch.empty_like(docs)
        for number in torch.unique(docs // PART).tolist():
            inside = docs // PART == number
            order = self.part(number).order.long()
            place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
            blocks[inside] = place[docs[inside] % PART] // cut.block + number * (PART // cut.block)
        return blocks


@lru_cache(maxsize=4)
def _part(folder: str, number: int, digest: str) -> Part:
    path = Path(folder) / _part_name(number)
    tensors, metadata = load_tensors(path)
    if metadata.get("digest") != digest or _digest(tensors) != digest:
        raise StorageError(f"{path} is not the file that corpus.json lists: it was replaced")
    return Part(number * PART, **tensors)


def _digest(tensors: dict[str, Tensor]) -> str:
    """Of the contents of a part."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _joined(digests: list[str]) -> str:
    """Of a whole corpus, from those of its parts."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _part_name(number: int) -> str:
    return f"part-{number:06d}.safetensors"


def tokenise(
    corpus: Any, tokenizer: Any, folder: Path, cut: Cut, identity: str | None = None
) -> Corpus:
    """Cut a corpus into blocks on disk.

    Args:
        corpus: see `lenslrp.analysis.dictionary.sources.texts_of`.
        tokenizer: the model's.
        folder: for the files.
        cut: how.
        identity: what `describe_corpus` says of it; kept in `corpus.json`.

    Raises:
        InputError: no text in it, or a model without a tokenizer.
        StorageError: the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(folder, cut)
    skipped: list[str] = []
    texts = 0
    with quiet_transformers():  # it warns of every text longer than the model's positions
        for some in _batched(texts_of(corpus, cut.field, skipped), TEXTS):
            for ids in _encode(some, tokenizer):
                writer.take(ids, texts)
                texts += 1
    parts = writer.close()
    if writer.documents == 0:
        raise InputError(
            f"the corpus has no document of {SHORTEST} or more tokens ({texts} texts were read, "
            f"{len(skipped)} lines skipped)"
        )
    if skipped:
        warnings.warn(
            f"{len(skipped)} records of the corpus could not be read and were skipped: "
            f"{'; '.join(skipped[:3])}",
            stacklevel=2,
        )
    about = {
        "cut": asdict(cut),
        "documents": writer.documents,
        "blocks": -(-writer.documents // cut.block),
        "tokens": writer.tokens,
        "texts": texts,
        "short": writer.short,
        "skipped": len(skipped),
        "identity": identity,
        "parts": parts,
        "digest": _joined(parts),
    }
    save_json(folder / "corpus.json", about)
    return Corpus(folder, about)


class _Writer:
    """Collects documents and writes a part whenever one is full."""

    def __init__(self, folder: Path, cut: Cut) -> None:
        self.folder, self.cut = folder, cut
        self.documents = self.tokens = self.short = 0
        self.digests: list[str] = []
        self._rows: list[tuple[list[int], int, int]] = []

    def take(self, ids: list[int], source: int) -> None:
        before = [] if self.cut.bos is None else [self.cut.bos]
        room = self.cut.context - len(before)
        for start in range(0, max(len(ids), 1), room):
            piece = ids[start : start + room]
            if len(piece) < SHORTEST:
                self.short += 1
                continue
            self._rows.append(([*before, *piece], source, start))
            self.documents += 1
            self.tokens += len(before) + len(piece)
            if len(self._rows) == PART:
                self._flush()

    def close(self) -> list[str]:
        if self._rows:
            self._flush()
        return self.digests

    def _flush(self) -> None:
        lengths = torch.tensor([len(row) for row, _, _ in self._rows])
        zero = torch.zeros(1, dtype=torch.int64)
        tensors = {
            "tokens": torch.tensor([i for row, _, _ in self._rows for i in row], dtype=torch.int32),
            "offsets": torch.cat([zero, lengths.cumsum(0)]),
            "sources": torch.tensor([source for _, source, _ in self._rows]),
            "starts": torch.tensor([start for _, _, start in self._rows], dtype=torch.int32),
            "order": lengths.sort(stable=True).indices.int(),
        }
        path = self.folder / _part_name(len(self.digests))
        self.digests.append(_digest(tensors))
        save_tensors(path, tensors, {"digest": self.digests[-1]})
        self._rows = []


def _batched(items: Iterable[Any], n: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while some := list(islice(iterator, n)):
        yield some


def _encode(texts: list[Any], tokenizer: Any) -> list[list[int]]:
    if not isinstance(texts[0], str):
        return [[int(i) for i in row] for row in texts]
    if tokenizer is None:
        raise InputError("this model has no tokenizer: give the corpus as rows of token ids")
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids
