"""`vocabulary.parquet`: the tokens that each unit writes and reads, one row a token.

Made of the files that `lenslrp.analysis.dictionary.vocabulary_lists` leaves, one a hook point, in
the order of the units. Whatever is read is compared with what such a file must hold.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from lenslrp.analysis.common.storage import (
    load_tensors,
    open_parquet,
    read_groups,
    require_forms,
    require_numbers,
    require_range,
)
from lenslrp.analysis.dictionary.plan import Place, Plan
from lenslrp.analysis.units.readability import STATUSES
from lenslrp.errors import InputError, StorageError
from lenslrp.files import parquet_writer, whole

LISTED_TOKENS = 10
"""Tokens kept at either end of a list."""

LIMIT = 1000

UNITS_IN_GROUP = 256
"""Units in a row group."""

ROW_BYTES = 64
"""Of a row, unpacked: no more."""

LIST_ROLES = ("writes", "reads")
VECTOR_NAMES = ("out", "in", "gate", "q", "k", "v")
LIST_ENDS = ("top", "bottom")

VOCABULARY_SCHEMA = pa.schema(
    {
        "unit": pa.int32(),
        "role": pa.dictionary(pa.int8(), pa.string()),
        "name": pa.dictionary(pa.int8(), pa.string()),
        "side": pa.dictionary(pa.int8(), pa.string()),
        "rank": pa.int16(),
        "id": pa.int32(),
        "score": pa.float32(),
        "status": pa.dictionary(pa.int8(), pa.string()),
    }
)


def write_vocabulary(path: Path, plan: Plan, parts: list[Path]) -> tuple[dict[str, Any], set[int]]:
    """Write `vocabulary.parquet` from the files of all places.

    Returns:
        What the manifest says of it: `tokens` at either end, and for each site and role that is
        `missing` why; and the tokens that occur.
    """
    shown: set[int] = set()
    missing: dict[str, dict[str, str]] = {}
    tokens = 0
    with (
        whole(path, fresh=True) as temporary,
        parquet_writer(temporary, VOCABULARY_SCHEMA) as writer,
    ):
        for place, part in zip(plan.places, parts, strict=True):
            tensors, about = load_tensors(part)
            columns, reasons = _read_part(part, tensors, about, plan, place)
            tokens = int(about["tokens"])
            for role, reason in reasons.items():
                missing.setdefault(place.site, {}).setdefault(role, reason)
            ids, values = tensors["ids"].numpy(), tensors["scores"].numpy()
            statuses = tensors["statuses"].numpy()
            shown.update(np.unique(ids).tolist())
            for first in range(0, place.size if columns else 0, UNITS_IN_GROUP):
                some = slice(first, min(first + UNITS_IN_GROUP, place.size))
                numbers = np.arange(place.first + some.start, place.first + some.stop)
                writer.write_table(_rows(numbers, columns, ids[some], values[some], statuses[some]))
    return {"tokens": tokens, "missing": missing}, shown


def _read_part(
    path: Path, tensors: dict[str, Tensor], about: dict[str, str], plan: Plan, place: Place
) -> tuple[list[list[Any]], dict[str, str]]:
    """Columns and missing roles of a file of `project_places`, if it is one."""
    require_numbers(path, about, ("tokens",))
    try:
        columns, missing = json.loads(about["columns"]), json.loads(about["missing"])
        known = all(
            role in LIST_ROLES and name in VECTOR_NAMES and side in LIST_ENDS and 0 <= rank < LIMIT
            for role, name, side, rank in columns
        )
        reasons = {str(role): str(reason) for role, reason in missing.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{path} is damaged: it does not say what its columns are") from error
    if not known or about.get("plan") != plan.fingerprint() or not set(reasons) <= set(LIST_ROLES):
        raise StorageError(f"{path} is damaged: its columns are not those of this dictionary")
    shape = (place.size, len(columns))
    types = {"ids": torch.int32, "scores": torch.float32, "statuses": torch.int8}
    require_forms(path, tensors, {name: (dtype, shape) for name, dtype in types.items()})
    require_range(path, "statuses", tensors["statuses"], 0, len(STATUSES))
    require_range(path, "ids", tensors["ids"], 0, 1 << 31)
    return columns, reasons


def _rows(
    numbers: NDArray[Any],
    columns: Any,
    ids: NDArray[Any],
    values: NDArray[Any],
    statuses: NDArray[Any],
) -> pa.Table:
    roles, names, sides, ranks = zip(*columns, strict=True)

    def spelt(words: Sequence[str], known: tuple[str, ...]) -> pa.DictionaryArray:
        codes = np.tile(np.array([known.index(word) for word in words], np.int8), len(numbers))
        return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(known))

    return pa.table(
        {
            "unit": np.repeat(numbers.astype(np.int32), len(columns)),
            "role": spelt(roles, LIST_ROLES),
            "name": spelt(names, VECTOR_NAMES),
            "side": spelt(sides, LIST_ENDS),
            "rank": np.tile(np.array(ranks, np.int16), len(numbers)),
            "id": ids.reshape(-1),
            "score": values.reshape(-1),
            "status": pa.DictionaryArray.from_arrays(
                pa.array(statuses.reshape(-1)), pa.array(STATUSES)
            ),
        },
        schema=VOCABULARY_SCHEMA,
    )


class Projections:
    """`vocabulary.parquet`, read as it is asked for.

    Attributes:
        tokens: how many there are at either end of a list.
        missing: site -> role -> why it has no lists.
    """

    def __init__(self, path: Path, about: Any, units: int) -> None:
        self.path = path
        self.tokens, self.missing = _checked(path, about)
        self._file = open_parquet(path, VOCABULARY_SCHEMA, ROW_BYTES)
        groups = self._file.metadata
        parts = [groups.row_group(i) for i in range(groups.num_row_groups)]
        spans = [part.column(0).statistics for part in parts]
        if not all(s is not None and isinstance(s.min, int) for s in spans):
            raise StorageError(f"{path} does not say which units its row groups hold")
        starts = np.array([span.min for span in spans], dtype=np.int64)
        ends = np.array([span.max for span in spans], dtype=np.int64)
        most = UNITS_IN_GROUP * len(VECTOR_NAMES) * len(LIST_ENDS) * self.tokens
        if (
            (
                (ends < starts) | (ends >= starts + UNITS_IN_GROUP) | (starts < 0) | (ends >= units)
            ).any()
            or (starts[1:] <= ends[:-1]).any()
            or any(part.num_rows > most for part in parts)
        ):
            raise StorageError(
                f"{path} is damaged: its row groups are not of up to {UNITS_IN_GROUP} units each, "
                "in order"
            )
        self._starts = starts
        self._ends = np.cumsum([part.num_rows for part in parts])

    def close(self) -> None:
        self._file.close()

    def of(self, unit: int, site: str) -> pd.DataFrame:
        """The rows of one unit.

        Raises:
            InputError: it has none; says why.
        """
        at = int(np.searchsorted(self._starts, unit, side="right")) - 1
        groups = [] if at < 0 else [at]
        table = read_groups(self.path, self._file, groups)
        frame = _plain(table.filter(pc.equal(table["unit"], unit)))
        if frame.empty:
            raise InputError(self._reason([site], LIST_ROLES))
        self._require_lists(frame)
        return frame

    def _require_lists(self, frame: pd.DataFrame) -> None:
        """Each list has both ends, with ranks from 0."""
        columns = (frame[name].tolist() for name in ("role", "name", "side", "rank"))
        ranks: dict[tuple[str, str, str], list[int]] = {}
        for *key, rank in zip(*columns, strict=True):
            ranks.setdefault(tuple(key), []).append(rank)
        whole_lists = all(
            side in LIST_ENDS
            and name in VECTOR_NAMES
            and role == LIST_ROLES[name != "out"]
            and present == list(range(min(len(present), self.tokens)))
            and present == ranks.get((role, name, LIST_ENDS[1 - LIST_ENDS.index(side)]))
            for (role, name, side), present in ranks.items()
        )
        known = frame["status"].isin(STATUSES).all()
        if not whole_lists or not known or frame["id"].min() < 0:
            raise StorageError(
                f"{self.path} is damaged: the lists of unit {frame['unit'].iloc[0]} are not whole"
            )

    def naming(self, tokens: list[int], role: str, sites: Sequence[str]) -> pd.DataFrame:
        """The rows of one role with one of `tokens`: best ranks first, then largest scores.

        Raises:
            InputError: no unit of `sites`, which are all there are, has such lists; says why.
        """
        rows = np.isin(self._ids, tokens).nonzero()[0]
        if len(rows) == 0 and all(role in self.missing.get(site, {}) for site in sites):
            raise InputError(self._reason(sites, (role,)))
        groups = np.unique(np.searchsorted(self._ends, rows, side="right"))
        table = read_groups(self.path, self._file, groups.tolist())
        wanted = pc.is_in(table["id"], pa.array(tokens, pa.int32()))
        table = table.filter(pc.and_(wanted, pc.equal(table["role"].cast(pa.string()), role)))
        order = np.lexsort((table["unit"], -np.abs(table["score"].to_numpy()), table["rank"]))
        return _plain(table.take(pa.array(order)))

    @cached_property
    def _ids(self) -> NDArray[np.int32]:
        ids: NDArray[np.int32] = read_groups(self.path, self._file, None, ["id"])["id"].to_numpy()
        return ids

    def _reason(self, sites: Sequence[str], roles: Sequence[str]) -> str:
        """Why nothing is there, each reason once."""
        reasons = [self.missing.get(site, {}).get(role) for site in sites for role in roles]
        known = [reason for reason in dict.fromkeys(reasons) if reason]
        return "no projection on the vocabulary: " + ("; ".join(known) or "the file has no rows")


def _plain(table: pa.Table) -> pd.DataFrame:
    frame: pd.DataFrame = table.to_pandas()
    return frame.astype(dict.fromkeys(("role", "name", "side", "status"), object))


def _checked(path: Path, about: Any) -> tuple[int, dict[str, dict[str, str]]]:
    """What a manifest says of the file, if it has the form of ours."""
    fits = isinstance(about, dict) and type(about.get("tokens")) is int
    fits = fits and 0 <= about["tokens"] <= LIMIT
    missing = about.get("missing") if fits else None
    if not isinstance(missing, dict) or not all(
        isinstance(why, dict) and all(isinstance(text, str) for text in why.values())
        for why in missing.values()
    ):
        raise StorageError(
            f"{path.parent / 'manifest.json'} is damaged: it does not say what {path.name} holds"
        )
    return about["tokens"], missing
