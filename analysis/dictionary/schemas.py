"""What the files of a dictionary look like, and refusing those that look otherwise.

A dictionary may be damaged, or come from a stranger who made its checksums agree. So what is read
from it is compared with the plan before it is used: columns and row groups when a file is opened,
rows as they are read. Whatever differs is a `StorageError` that names the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lenslrp.analysis.common.storage import open_parquet, read_groups, require_range
from lenslrp.analysis.dictionary.plan import Place, Plan
from lenslrp.errors import StorageError

EXAMPLE_GROUP = 64
"""Units in a row group of examples: opening one unit reads one of these."""

UNIT_GROUP = EXAMPLE_GROUP * 16

HISTOGRAM_BINS = 40
"""Of a histogram."""

STATISTICS = 512
"""Documents, one token each, from which statistics are estimated."""

WINDOWS = ("activation", "relevance")
MOMENTS = ("mean", "std", "skew", "kurtosis", "min", "max", "density")

UNIT_BYTES, EXAMPLE_BYTES = 4096, 256
"""Of a row, unpacked and without its windows: no more."""

Slots = tuple[tuple[str, int], ...]


def kinds(plan: Plan) -> tuple[str, ...]:
    return WINDOWS if plan.relevance else WINDOWS[:1]


def sampled_tokens(plan: Plan) -> int:
    """From how many tokens statistics were estimated."""
    return min(STATISTICS, int(plan.corpus["documents"]))


def unit_schema(plan: Plan) -> pa.Schema:
    about = {
        "unit": pa.int32(),
        "site": pa.string(),
        "kind": pa.string(),
        "hook": pa.string(),
        "layer": pa.int32(),
        "index": pa.int32(),
    }
    for kind in kinds(plan):
        about |= {f"{kind}_{name}": pa.float32() for name in MOMENTS}
        about[f"{kind}_histogram"] = pa.list_(pa.int32())
    return pa.schema(about)


def example_schema(plan: Plan) -> pa.Schema:
    about = {
        "unit": pa.int32(),
        "criterion": pa.dictionary(pa.int8(), pa.string()),
        "rank": pa.int16(),
        "score": pa.float32(),
        "document": pa.int64(),
        "position": pa.int16(),
        "start": pa.int16(),
    }
    return pa.schema(about | {f"{kind}s": pa.list_(pa.float32()) for kind in kinds(plan)})


def example_bytes(plan: Plan) -> int:
    """Of one row of `examples.parquet`, unpacked."""
    return EXAMPLE_BYTES + 16 * min(sum(plan.window) + 1, int(plan.corpus["cut"]["context"]))


def group_sizes(plan: Plan, units: int, rows: int = 1) -> list[int]:
    """Rows of each row group, of `units` units at one hook point with `rows` rows each."""
    return [
        rows * min(units, place.size - first)
        for place in plan.places
        for first in range(0, place.size, units)
    ]


def read_slots(path: Path, value: Any, plan: Plan) -> Slots:
    """The (criterion, rank) of each example of a unit, as the manifest says them."""
    fits = isinstance(value, list) and all(
        isinstance(slot, list) and len(slot) == 2 and type(slot[1]) is int for slot in value
    )
    slots = tuple((str(name), int(rank)) for name, rank in value) if fits else ()
    counts = {name: sum(name == other for other, _ in slots) for name in plan.criteria}
    if slots != tuple((name, r) for name, n in counts.items() for r in range(n)) or not all(
        counts.values()
    ):
        raise StorageError(
            f"{path} is damaged: its slots are not ranks from 0 of {', '.join(plan.criteria)}"
        )
    return slots


def require_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """The rest of what a manifest says: how many tokens, and which libraries."""
    libraries, tokens = manifest["libraries"], manifest["tokens_seen"]
    if type(tokens) is not int or tokens < 0:
        raise StorageError(f"{path} is damaged: tokens_seen is {tokens!r:.40}")
    if not isinstance(libraries, dict) or not all(isinstance(v, str) for v in libraries.values()):
        raise StorageError(f"{path} is damaged: libraries is no table of versions")


def require_units(path: Path, table: pa.Table, plan: Plan, units: range) -> None:
    """Rows of `units.parquet`: of these units, with numbers that are some."""
    ends = np.array([place.end for place in plan.places])
    numbers = np.arange(units.start, units.stop)
    places: list[Place] = [
        plan.places[i] for i in np.searchsorted(ends, numbers, side="right").tolist()
    ]
    expected: dict[str, list[Any]] = {
        "unit": numbers.tolist(),
        "site": [place.site for place in places],
        "kind": [place.kind for place in places],
        "hook": [place.hook for place in places],
        "layer": [place.layer for place in places],
        "index": [n - place.first for n, place in zip(numbers.tolist(), places, strict=True)],
    }
    for name, values in expected.items():
        if table[name].to_pylist() != values:
            raise StorageError(f"{path} is damaged: its {name} are not those of the plan")
    for kind in kinds(plan):
        for moment in MOMENTS:
            _require_finite(path, f"{kind}_{moment}", table)
        name = f"{kind}_histogram"
        lengths = pc.list_value_length(table[name])
        if not pc.all(pc.equal(lengths, HISTOGRAM_BINS)).as_py():
            raise StorageError(f"{path} is damaged: {name} does not have {HISTOGRAM_BINS} bins")
        counts = _numbers(pc.list_flatten(table[name])).reshape(-1, HISTOGRAM_BINS).astype(np.int64)
        require_range(path, name, counts, 0, sampled_tokens(plan) + 1)
        if not (counts.sum(axis=1) == sampled_tokens(plan)).all():
            raise StorageError(
                f"{path} is damaged: {name} does not count {sampled_tokens(plan)} tokens"
            )


def require_examples(path: Path, table: pa.Table, plan: Plan, slots: Slots, units: range) -> None:
    """Rows of `examples.parquet`: of these units, in the order of the slots."""
    expected: dict[str, Any] = {
        "unit": np.repeat(np.arange(units.start, units.stop), len(slots)),
        "rank": np.tile([rank for _, rank in slots], len(units)),
        "criterion": np.tile([name for name, _ in slots], len(units)),
    }
    for name, values in expected.items():
        column = table[name]
        values_read = column.cast(pa.string()) if name == "criterion" else column
        if not pc.all(pc.equal(values_read, pa.array(values, values_read.type))).as_py():
            raise StorageError(f"{path} is damaged: its {name}s are not in the order of its slots")
    _require_finite(path, "score", table)
    position = _numbers(table["position"])
    require_range(path, "position", position, 0, int(plan.corpus["cut"]["context"]))
    require_range(path, "document", _numbers(table["document"]), 0, plan.corpus["documents"])
    if "start" not in table.column_names:
        return
    start = np.maximum(position.astype(np.int64) - plan.window[0], 0)
    if not np.array_equal(_numbers(table["start"]), start):
        raise StorageError(f"{path} is damaged: a window does not begin {plan.window[0]} tokens "
                           "before its hit")  # fmt: skip
    lengths = [_numbers(pc.list_value_length(table[f"{kind}s"])) for kind in kinds(plan)]
    hit = position - start
    for kind, length in zip(kinds(plan), lengths, strict=True):
        if not np.array_equal(length, lengths[0]) or (length <= hit).any():
            raise StorageError(f"{path} is damaged: a window of {kind}s ends before its hit")
        require_range(path, "length of a window", length, 1, sum(plan.window) + 2)


def _require_finite(path: Path, name: str, table: pa.Table) -> None:
    if not np.isfinite(_numbers(table[name])).all():
        raise StorageError(f"{path} is damaged: {name} holds values that are no numbers")


def _numbers(column: Any) -> NDArray[Any]:
    values: NDArray[Any] = column.to_numpy()
    return values


class UnitTables:
    """`units.parquet` and `examples.parquet`, read as they are asked for."""

    def __init__(self, path: Path, plan: Plan, slots: Slots) -> None:
        self.path, self.plan, self.slots = path, plan, slots
        self._unit_sizes = group_sizes(plan, UNIT_GROUP)
        self._example_sizes = group_sizes(plan, EXAMPLE_GROUP, len(slots))
        self._examples = open_parquet(
            path / "examples.parquet", example_schema(plan), example_bytes(plan),
            self._example_sizes,
        )  # fmt: skip
        self._units = open_parquet(
            path / "units.parquet", unit_schema(plan), UNIT_BYTES, self._unit_sizes
        )

    def close(self) -> None:
        self._examples.close()
        self._units.close()

    def units(self, units: range) -> pa.Table:
        """Rows of `units.parquet`, from the row groups that hold them."""
        path = self.path / "units.parquet"
        table = _rows(path, self._units, self._unit_sizes, units, empty=("layer",))
        require_units(path, table, self.plan, units)
        return table

    def examples(self, units: range, columns: list[str] | None = None) -> pa.Table:
        """Rows of `examples.parquet`, likewise."""
        path, slots = self.path / "examples.parquet", len(self.slots)
        rows = range(units.start * slots, units.stop * slots)
        table = _rows(path, self._examples, self._example_sizes, rows, columns)
        require_examples(path, table, self.plan, self.slots, units)
        return table


def _rows(
    path: Path,
    file: pq.ParquetFile,
    sizes: list[int],
    rows: range,
    columns: list[str] | None = None,
    empty: tuple[str, ...] = (),
) -> pa.Table:
    """Some rows of a file whose row groups have these sizes."""
    starts = np.concatenate([[0], np.cumsum(sizes)])
    first = int(np.searchsorted(starts, rows.start, side="right")) - 1
    stop = int(np.searchsorted(starts, rows.stop, side="left"))
    table = read_groups(path, file, list(range(first, stop)), columns, empty=empty)
    return table.slice(rows.start - int(starts[first]), len(rows))
