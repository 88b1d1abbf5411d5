"""Finding units in a dictionary: by words, by tokens, by what they have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lenslrp.analysis.common.storage import require_header, require_range
from lenslrp.analysis.dictionary.text_search import folded, terms
from lenslrp.analysis.dictionary.vocabulary_file import LIST_ROLES
from lenslrp.errors import InputError, StorageError

if TYPE_CHECKING:
    from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary


def search_text(
    d: NeuronDictionary, query: str, criterion: str | None = None, limit: int = 50
) -> pd.DataFrame:
    """Units by the sentences they are shown with.

    The text is searched, not its tokens: case, composed and decomposed accents and characters that
    are not seen make no difference, and in scripts without spaces any part of a text is found.

    Args:
        d: an open dictionary.
        query: words that must all occur in what is shown around the hit; `"..."` is a phrase. Where
            no example shows them all, examples of the documents in which they all stand.
        criterion: only examples of this one.
        limit: how many rows.

    Returns:
        `unit, hook, index, criterion, rank, score, doc, position, window`: best ranks first, then
        the best match.

    Raises:
        InputError: an empty query, several of them, or an unknown criterion.
    """
    _require_text(query, "a query")
    d.require_criterion(criterion)
    wanted = [folded(term) for term in terms(query)]
    documents = d.texts.matching(query)

    def holds(text: str) -> bool:
        comparable = folded(text)
        return all(term in comparable for term in wanted)

    examples = _examples_in(d, documents, criterion, limit, holds)
    return (
        examples
        if len(examples)
        else _examples_in(d, documents, criterion, limit, holds, anywhere=True)
    )


def search_tokens(
    d: NeuronDictionary,
    token: str,
    by: str = "hits",
    criterion: str = "actmax",
    limit: int = 50,
) -> pd.DataFrame:
    """Units by a token: those that fire (or matter) at it, or that write or read it by weights.

    Args:
        d: an open dictionary.
        token: the token's text; white space around it does not matter.
        by: `"hits"`: the examples' hits are at the token; `"writes"`, `"reads"`: the token is in
            the lists of `Page.vocabulary`.
        criterion: whose examples, of `"hits"`.
        limit: how many rows.

    Returns:
        For hits `unit, hook, index, share`: the share of the unit's examples whose hit is at the
        token, largest first. Otherwise `unit, hook, index, name, side, rank, token, score`: best
        ranks first, then the largest scores.

    Raises:
        InputError: several tokens, another `by`, an unknown criterion, or a dictionary without such
            lists.
    """
    _require_text(token, "a token")
    if by not in ("hits", *LIST_ROLES):
        raise InputError(f"by is one of hits, {', '.join(LIST_ROLES)}, not {by!r}")
    d.require_criterion(criterion)
    wanted = d.texts.tokens_called(token)
    if by == "hits":
        return _hitting(d, wanted, criterion, limit)
    listed = d.projections.naming(wanted, by, [name for name, _ in d.plan.sites]).head(limit)
    listed["token"] = [d.texts.token(int(t)) for t in listed["id"]]
    names = pd.DataFrame(map(d.named, listed["unit"]), columns=["unit", "hook", "index"])
    return names.join(listed[["name", "side", "rank", "token", "score"]])


def _require_text(given: Any, what: str) -> None:
    if not isinstance(given, str):
        raise InputError(
            f'{what} is one string, not {given!r}; d.find("a", "b") takes several words'
        )


def _hitting(d: NeuronDictionary, wanted: list[int], criterion: str, limit: int) -> pd.DataFrame:
    counts = d.citations.at_tokens(wanted, d.slots, criterion, len(d))
    total = sum(name == criterion for name, _ in d.slots)
    best = np.lexsort((np.arange(len(counts)), -counts))[:limit]
    rows = [(*d.named(int(unit)), counts[unit] / total) for unit in best if counts[unit]]
    return pd.DataFrame(rows, columns=["unit", "hook", "index", "share"])


def similar(d: NeuronDictionary, key: Any, k: int = 10, kind: str = "activation") -> pd.DataFrame:
    """Units that fire (or matter) at the same tokens: correlation over the sampled tokens.

    Args:
        key: a unit, as for `dictionary[key]`.
        k: how many.
        kind: `"activation"` or `"relevance"`.

    Returns:
        `unit, hook, index, correlation`, largest first, the unit itself left out.
    """
    place, index = d.unit_number(key)
    if kind not in d.samples:
        raise InputError(f"kind is one of {', '.join(d.samples)}, not {kind!r}")
    values = d.samples[kind]
    mine = values[place.first + index].float()
    dots = torch.cat([some.float() @ mine for some in values.split(8192)])
    lengths = torch.cat([some.float().norm(dim=1) for some in values.split(8192)])
    correlation = dots / (lengths * mine.norm()).clamp_min(1e-9)
    correlation[place.first + index] = -torch.inf
    best = correlation.topk(min(k, len(d) - 1))
    rows = [d.named(int(unit)) for unit in best.indices]
    return pd.DataFrame(
        [(*row, float(c)) for row, c in zip(rows, best.values, strict=True)],
        columns=["unit", "hook", "index", "correlation"],
    )


def _examples_in(
    d: NeuronDictionary,
    documents: list[int],
    criterion: str | None,
    limit: int,
    holds: Callable[[str], bool],
    *,
    anywhere: bool = False,
) -> pd.DataFrame:
    """The examples of the best documents whose window (or whole text) holds what is wanted.

    Documents are read until there are `limit` examples: those of the best ranks, of what was
    read.
    """
    allowed = np.array([criterion in (None, name) for name, _ in d.slots])
    ranks = np.array([rank for _, rank in d.slots])
    windows: dict[tuple[int, int], str] = {}
    batches: list[NDArray[Any]] = []
    for first in range(0, len(documents), max(1, limit)):
        some = d.texts.documents(documents[first : first + limit])
        for order, document in enumerate(some.values(), first):
            entries, positions, scores = d.citations.of(document.id)
            require_range(d.citations.path, "positions", positions, 0, len(document.tokens))
            shown = np.zeros(len(document.tokens), dtype=bool)
            places = np.unique(positions)
            for position, text in zip(places.tolist(), d.shown(document, places), strict=True):
                windows[document.id, position] = text
                shown[position] = anywhere or holds(text)
            if anywhere and not holds(document.text):
                continue
            slot = entries % len(d.slots)
            kept = shown[positions] & allowed[slot]
            ranked = ranks[slot[kept]]
            same = [np.full(len(ranked), value) for value in (order, document.id)]
            columns = [ranked, same[0], entries[kept], scores[kept], same[1], positions[kept]]
            batches.append(np.stack(columns, axis=1))
        if sum(map(len, batches)) >= limit:
            break
    rows = np.concatenate(batches) if batches else np.zeros((0, 6))
    rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))][:limit]
    examples = []
    for rank, _, entry, score, doc, position in rows.tolist():
        unit, column = divmod(int(entry), len(d.slots))
        text = windows[int(doc), int(position)]
        about = d.slots[column][0], int(rank), score, int(doc), int(position), text
        examples.append((*d.named(unit), *about))
    names = ["criterion", "rank", "score", "doc", "position", "window"]
    return pd.DataFrame(examples, columns=["unit", "hook", "index", *names])


class Citations:
    """Which examples reference a document; read from disk as it is asked for.

    Examples with score 0 are not among them: of a feature that is active in fewer documents than it
    is shown with, the rest are documents in which it does nothing.
    """

    def __init__(self, path: Path, examples: int) -> None:
        require_header(path)
        self.path, self.examples = path, examples
        try:
            file: Any = safe_open(path, framework="np")
            tensors = {
                name: (part.get_dtype(), part.get_shape())
                for name in file.keys()  # noqa: SIM118 - safetensors' own
                for part in (file.get_slice(name),)
            }
        except (SafetensorError, OSError) as error:
            raise StorageError(f"{path} is damaged or truncated: {error}") from error
        documents = tensors.get("documents", ("", [0]))[1]
        cited = tensors.get("entries", ("", [0]))[1]
        entry = "I32" if examples < 2**31 else "I64"
        expected = {
            "documents": ("I64", documents),
            "offsets": ("I64", [sum(documents) + 1]),
            "entries": (entry, cited),
            "positions": ("I16", cited),
            "tokens": ("I32", cited),
            "scores": ("F32", cited),
        }
        if tensors != expected or len(documents) != 1 or len(cited) != 1 or cited[0] > examples:
            raise StorageError(
                f"{path} is damaged: it holds {str(tensors)[:300]}, expected {expected}"
            )
        self._file = file
        self._documents = file.get_tensor("documents")
        self._offsets = file.get_tensor("offsets")
        ends = int(self._offsets[0]), int(self._offsets[-1])
        if (
            ends != (0, cited[0])
            or (np.diff(self._offsets) < 0).any()
            or (np.diff(self._documents) <= 0).any()
        ):
            raise StorageError(f"{path} is damaged: its documents do not follow one another")

    @property
    def documents(self) -> list[int]:
        """Those that an example references."""
        return [int(document) for document in self._documents]

    def of(self, document: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Examples (rows of `examples.parquet`), positions and scores."""
        at = int(np.searchsorted(self._documents, document))
        known = at < len(self._documents) and int(self._documents[at]) == document
        a, b = (int(self._offsets[at]), int(self._offsets[at + 1])) if known else (0, 0)
        names = ("entries", "positions", "scores")
        entries, positions, scores = (self._file.get_slice(name)[a:b] for name in names)
        require_range(self.path, "entries", entries, 0, self.examples)
        require_range(self.path, "positions", positions, 0, 1 << 15)
        return entries.astype(np.int64), positions.astype(np.int64), scores

    def strengths(
        self, slots: tuple[tuple[str, int], ...], criterion: str, units: int
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """The sum of the sizes of each unit's scores of a criterion, and how many there are."""
        entries = self._entries()
        right = np.array([name == criterion for name, _ in slots])[entries % len(slots)]
        of, sizes = entries[right] // len(slots), np.abs(self._file.get_tensor("scores")[right])
        return np.bincount(of, sizes, units), np.bincount(of, minlength=units)

    def _entries(self) -> NDArray[np.int64]:
        entries: NDArray[np.int64] = self._file.get_tensor("entries").astype(np.int64)
        require_range(self.path, "entries", entries, 0, self.examples)
        return entries

    def at_tokens(
        self, tokens: list[int], slots: tuple[tuple[str, int], ...], criterion: str, units: int
    ) -> NDArray[np.int64]:
        """How many of each unit's examples of a criterion have their hit at one of `tokens`."""
        hits = np.isin(self._file.get_tensor("tokens"), tokens).nonzero()[0]
        entries = self._entries()[hits]
        right = np.array([name == criterion for name, _ in slots])[entries % len(slots)]
        return np.bincount(entries[right] // len(slots), minlength=units)
