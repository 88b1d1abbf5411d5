"""What all units of a dictionary write to the vocabulary and read from it: from weights alone.

The highest and lowest tokens of :func:`lenslrp.analysis.units.projection.writes` and ``reads`` (of
a
head: the largest component of OV and of QK), for the units of a place together: their vectors are
stacked and multiplied with the vocabulary in pieces of bounded size. Each place leaves a file of
its own in the work folder, so that a kill costs one place, and processes can share them out.
``vocabulary.parquet`` is made of these files: one row a token, in the order of the units.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float, Float32, Int32
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from lenslrp.analysis.common.storage import (
    load_tensors,
    open_parquet,
    read_groups,
    require_forms,
    require_numbers,
    require_range,
    save_tensors,
)
from lenslrp.analysis.dictionary.plan import Place, Plan
from lenslrp.analysis.units.kinds import Direction, Feature, Head, Unit, parse_unit
from lenslrp.analysis.units.projection import project
from lenslrp.analysis.units.readers import DirectionReader, FeatureReader, SearchedHook
from lenslrp.analysis.units.residual import (
    as_read,
    as_written,
    head_reads,
    head_writes,
    require_decoder,
)
from lenslrp.analysis.units.unembedding import dot_products, embedding
from lenslrp.errors import InputError, StorageError
from lenslrp.files import parquet_writer, whole

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenslrp.analysis.dictionary.scan import Job

TOKENS = 10
"""Tokens kept at either end of a list."""

LIMIT = 1000

PIECE = 1 << 24
"""Scores formed at once: 64 MiB in float32."""

GROUP = 256
"""Units in a row group."""

ROW_BYTES = 64
"""Of a row, unpacked: no more."""

ROLES = ("writes", "reads")
NAMES = ("out", "in", "gate", "q", "k", "v")
SIDES = ("top", "bottom")

SCHEMA = pa.schema(
    {
        "unit": pa.int32(),
        "role": pa.dictionary(pa.int8(), pa.string()),
        "name": pa.dictionary(pa.int8(), pa.string()),
        "side": pa.dictionary(pa.int8(), pa.string()),
        "rank": pa.int16(),
        "id": pa.int32(),
        "score": pa.float32(),
    }
)


@torch.no_grad()
def written_vectors(
    model: TransformerBridge, units: Sequence[Unit]
) -> dict[str, Float[Tensor, "unit d_model"]]:
    """What units of one place write, as it arrives in the residual stream.

    Raises:
        InputError: nothing that they write can be read as tokens.
    """
    require_decoder(model, units[0])
    if not hasattr(model.unembed, "W_U"):
        raise InputError(f"{type(model.original_model).__name__} unembeds classes, not tokens")
    vectors = [
        head_writes(model, unit, None, 0)[0]
        if isinstance(unit, Head)
        else unit.writes(model)["out"][0]
        for unit in units
    ]
    return {"out": as_written(model, units[0], torch.stack(vectors))}


@torch.no_grad()
def read_vectors(
    model: TransformerBridge, units: Sequence[Unit]
) -> dict[str, Float[Tensor, "unit d_model"]]:
    """What units of one place multiply the residual stream with, by name.

    Raises:
        InputError: nothing that they read is a token.
    """
    embedding(model)  # or say why not, before anything else
    if isinstance(units[0], Head):
        heads = [head_reads(model, unit, 0) for unit in units if isinstance(unit, Head)]
        return {name: torch.stack([head[name][0] for head in heads]) for name in heads[0]}
    found = [unit.reads(model) for unit in units]
    stacked = {name: torch.cat([vectors[name] for vectors in found]) for name in found[0]}
    return {name: as_read(model, units[0], name, vectors) for name, vectors in stacked.items()}


def _dots(model: TransformerBridge, vectors: Tensor) -> Float[Tensor, "n d_vocab"]:
    return dot_products(embedding(model), vectors)


WAYS = {"writes": (written_vectors, project), "reads": (read_vectors, _dots)}
"""Of each role: the vectors, and their product with the vocabulary."""


@dataclass(frozen=True, eq=False)
class Ends:
    """Both ends of the lists of some units.

    Attributes:
        columns: role, name, side and rank of each token of a unit.
        ids: tokens, [unit, column].
        scores: [unit, column].
        missing: for each role that cannot be read in the vocabulary, why not.
    """

    columns: list[tuple[str, str, str, int]]
    ids: Int32[Tensor, "unit column"]
    scores: Float32[Tensor, "unit column"]
    missing: dict[str, str]


@torch.no_grad()
def ends_of_lists(model: TransformerBridge, units: Sequence[Unit], tokens: int = TOKENS) -> Ends:
    """Both ends of what units of one hook point write and read.

    Args:
        model: the bridge.
        units: neurons, heads, directions or features.
        tokens: how many at either end; at most the vocabulary.
    """
    columns: list[tuple[str, str, str, int]] = []
    ids, found = [torch.zeros(len(units), 0).int()], [torch.zeros(len(units), 0)]
    missing: dict[str, str] = {}
    step = max(1, PIECE // max(1, int(model.cfg.d_vocab)))
    for role, (vectors_of, product) in WAYS.items():
        try:
            vectors = vectors_of(model, units)
        except InputError as error:
            missing[role] = str(error)
            continue
        for name, rows in vectors.items():
            pieces = [_both_ends(product(model, some), tokens) for some in rows.split(step)]
            best, values = (torch.cat(parts) for parts in zip(*pieces, strict=True))
            ids.append(best.int().cpu())
            found.append(values.float().cpu())
            k = best.shape[1] // 2
            columns += [(role, name, side, rank) for side in SIDES for rank in range(k)]
    return Ends(columns, torch.cat(ids, dim=1), torch.cat(found, dim=1), missing)


def _both_ends(rows: Float[Tensor, "n d_vocab"], tokens: int) -> tuple[Tensor, Tensor]:
    """Ids and scores of the highest, highest first, then of the lowest, lowest first."""
    k = min(tokens, rows.shape[1])
    high, low = rows.topk(k), rows.topk(k, largest=False)
    return torch.cat([high.indices, low.indices], 1), torch.cat([high.values, low.values], 1)


def project_places(
    job: Job, rank: int = 0, world: int = 1, *, tokens: int = TOKENS, progress: bool = True
) -> list[Path]:
    """Project the units of places ``rank, rank + world, ...``, and leave a file of each place.

    What lies there already is not done again.

    Args:
        job: see :func:`lenslrp.analysis.dictionary.job.prepare`.
        rank: which share, from 0.
        world: how many there are.
        tokens: how many at either end of a list; 0 for none.
        progress: show a bar.

    Returns:
        The files, in the order of the places.

    Raises:
        InputError: ``tokens`` is negative, or more than a list may have.
        StorageError: a damaged file, or a full disk.
    """
    if not 0 <= tokens <= LIMIT:
        raise InputError(f"vocabulary is 0 to {LIMIT} tokens at either end, not {tokens}")
    sites = {site.name: site for site in job.run.sites}
    mine = range(rank, len(job.plan.places), world)
    paths = [job.work / f"vocabulary-{number:05d}.safetensors" for number in mine]
    stamp = {"plan": job.plan.fingerprint(), "tokens": str(tokens)}
    for number, path in zip(tqdm(mine, "vocabulary", disable=not progress), paths, strict=True):
        if path.exists() and load_tensors(path)[1].items() >= stamp.items():
            continue
        place = job.plan.places[number]
        found = _project(job.run.model, place, sites[place.site], tokens)
        about = {"columns": json.dumps(found.columns), "missing": json.dumps(found.missing)}
        save_tensors(path, {"ids": found.ids, "scores": found.scores}, {**stamp, **about})
    return paths


def _project(model: TransformerBridge, place: Place, site: SearchedHook, tokens: int) -> Ends:
    try:
        if not tokens:
            raise InputError("not asked for: the dictionary was built with vocabulary=0")
        units = [_unit(place, index, site) for index in range(place.size)]
    except InputError as error:
        none = torch.zeros(place.size, 0)
        return Ends([], none.int(), none, dict.fromkeys(ROLES, str(error)))
    return ends_of_lists(model, units, tokens)


def _unit(place: Place, index: int, site: SearchedHook) -> Unit:
    if isinstance(site.reader, DirectionReader):
        return Direction(place.hook, site.reader.vectors[index])
    if isinstance(site.reader, FeatureReader):
        return Feature(site.reader.coder, index)
    return parse_unit(f"{place.hook}[{index}]")


def write_vocabulary(path: Path, plan: Plan, parts: list[Path]) -> tuple[dict[str, Any], set[int]]:
    """Write ``vocabulary.parquet`` from the files of all places.

    Returns:
        What the manifest says of it: ``tokens`` at either end, and for each site and role that is
        ``missing`` why; and the tokens that occur.
    """
    shown: set[int] = set()
    missing: dict[str, dict[str, str]] = {}
    tokens = 0
    with whole(path, fresh=True) as temporary, parquet_writer(temporary, SCHEMA) as writer:
        for place, part in zip(plan.places, parts, strict=True):
            tensors, about = load_tensors(part)
            columns, reasons = _read_part(part, tensors, about, plan, place)
            tokens = int(about["tokens"])
            for role, reason in reasons.items():
                missing.setdefault(place.site, {}).setdefault(role, reason)
            ids, values = tensors["ids"].numpy(), tensors["scores"].numpy()
            shown.update(np.unique(ids).tolist())
            for first in range(0, place.size if columns else 0, GROUP):
                some = slice(first, min(first + GROUP, place.size))
                numbers = np.arange(place.first + some.start, place.first + some.stop)
                writer.write_table(_rows(numbers, columns, ids[some], values[some]))
    return {"tokens": tokens, "missing": missing}, shown


def _read_part(
    path: Path, tensors: dict[str, Tensor], about: dict[str, str], plan: Plan, place: Place
) -> tuple[list[list[Any]], dict[str, str]]:
    """Columns and missing roles of a file of :func:`project_places`, if it is one."""
    require_numbers(path, about, ("tokens",))
    try:
        columns, missing = json.loads(about["columns"]), json.loads(about["missing"])
        known = all(
            role in ROLES and name in NAMES and side in SIDES and 0 <= rank < LIMIT
            for role, name, side, rank in columns
        )
        reasons = {str(role): str(reason) for role, reason in missing.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{path} is damaged: it does not say what its columns are") from error
    if not known or about.get("plan") != plan.fingerprint() or not set(reasons) <= set(ROLES):
        raise StorageError(f"{path} is damaged: its columns are not those of this dictionary")
    shape = (place.size, len(columns))
    require_forms(path, tensors, {"ids": (torch.int32, shape), "scores": (torch.float32, shape)})
    require_range(path, "ids", tensors["ids"], 0, 1 << 31)
    return columns, reasons


def _rows(numbers: NDArray[Any], columns: Any, ids: NDArray[Any], values: NDArray[Any]) -> pa.Table:
    roles, names, sides, ranks = zip(*columns, strict=True)

    def spelt(given: Sequence[str], known: tuple[str, ...]) -> pa.DictionaryArray:
        codes = np.tile(np.array([known.index(word) for word in given], np.int8), len(numbers))
        return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(known))

    return pa.table(
        {
            "unit": np.repeat(numbers.astype(np.int32), len(columns)),
            "role": spelt(roles, ROLES),
            "name": spelt(names, NAMES),
            "side": spelt(sides, SIDES),
            "rank": np.tile(np.array(ranks, np.int16), len(numbers)),
            "id": ids.reshape(-1),
            "score": values.reshape(-1),
        },
        schema=SCHEMA,
    )


class Projections:
    """``vocabulary.parquet``, read as it is asked for.

    Attributes:
        tokens: how many there are at either end of a list.
        missing: site -> role -> why it has no lists.
    """

    def __init__(self, path: Path, about: Any, units: int) -> None:
        self.path = path
        self.tokens, self.missing = _checked(path, about)
        self._file = open_parquet(path, SCHEMA, ROW_BYTES)
        groups = self._file.metadata
        parts = [groups.row_group(i) for i in range(groups.num_row_groups)]
        spans = [part.column(0).statistics for part in parts]
        if not all(s is not None and isinstance(s.min, int) for s in spans):
            raise StorageError(f"{path} does not say which units its row groups hold")
        starts = np.array([span.min for span in spans], dtype=np.int64)
        ends = np.array([span.max for span in spans], dtype=np.int64)
        most = GROUP * len(NAMES) * len(SIDES) * self.tokens
        if (
            ((ends < starts) | (ends >= starts + GROUP) | (starts < 0) | (ends >= units)).any()
            or (starts[1:] <= ends[:-1]).any()
            or any(part.num_rows > most for part in parts)
        ):
            raise StorageError(
                f"{path} is damaged: its row groups are not of up to {GROUP} units each, in order"
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
            raise InputError(self._reason([site], ROLES))
        self._require_lists(frame)
        return frame

    def _require_lists(self, frame: pd.DataFrame) -> None:
        """Each list has both ends, with ranks from 0."""
        columns = (frame[name].tolist() for name in ("role", "name", "side", "rank"))
        ranks: dict[tuple[str, str, str], list[int]] = {}
        for *key, rank in zip(*columns, strict=True):
            ranks.setdefault(tuple(key), []).append(rank)
        whole_lists = all(
            side in SIDES
            and name in NAMES
            and role == ROLES[name != "out"]
            and found == list(range(min(len(found), self.tokens)))
            and found == ranks.get((role, name, SIDES[1 - SIDES.index(side)]))
            for (role, name, side), found in ranks.items()
        )
        if not whole_lists or frame["id"].min() < 0:
            raise StorageError(
                f"{self.path} is damaged: the lists of unit {frame['unit'].iloc[0]} are not whole"
            )

    def naming(self, tokens: list[int], role: str, sites: Sequence[str]) -> pd.DataFrame:
        """The rows of one role with one of ``tokens``: best ranks first, then largest scores.

        Raises:
            InputError: no unit of ``sites``, which are all there are, has such lists; says why.
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
    return frame.astype(dict.fromkeys(("role", "name", "side"), object))


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
