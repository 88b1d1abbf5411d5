"""What all units of a dictionary write to the vocabulary and read from it: from weights alone.

The highest and lowest tokens of `lenslrp.analysis.units.projection.writes` and `reads` (of a head:
the largest component of OV and of QK), for the units of a hook point together: their vectors are
stacked and multiplied with the vocabulary in pieces of bounded size, and each end of a list is
judged for whether it is readable (`lenslrp.analysis.units.readability`). Each hook point leaves
a file of its own in the work folder, so that a kill costs one of them, and processes can share them
out.
`lenslrp.analysis.dictionary.vocabulary_file` joins these files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Float32, Int8, Int32
from torch import Tensor

from lenslrp.analysis.common.storage import load_tensors, save_tensors
from lenslrp.analysis.dictionary.plan import Place
from lenslrp.analysis.dictionary.vocabulary_file import LIMIT, LIST_ENDS, LIST_ROLES, LISTED_TOKENS
from lenslrp.analysis.units.kinds import Direction, Feature, Head, Unit
from lenslrp.analysis.units.parsing import parse_unit
from lenslrp.analysis.units.projection import project
from lenslrp.analysis.units.readability import TokenRelations
from lenslrp.analysis.units.readers import DirectionReader, FeatureReader, SearchedHook
from lenslrp.analysis.units.residual import (
    as_read,
    as_written,
    head_reads,
    head_writes,
    require_decoder,
)
from lenslrp.analysis.units.unembedding import dot_products, embedding
from lenslrp.errors import InputError
from lenslrp.progress import progress_bar

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lenslrp.analysis.dictionary.scan import Job

SCORES_AT_ONCE = 1 << 24
"""64 MiB in float32."""


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
    by_unit = [unit.reads(model) for unit in units]
    stacked = {name: torch.cat([vectors[name] for vectors in by_unit]) for name in by_unit[0]}
    return {name: as_read(model, units[0], name, vectors) for name, vectors in stacked.items()}


def _dots(model: TransformerBridge, vectors: Tensor) -> Float[Tensor, "n d_vocab"]:
    return dot_products(embedding(model), vectors)


PROJECTIONS = {"writes": (written_vectors, project), "reads": (read_vectors, _dots)}
"""Of each role: the vectors, and their product with the vocabulary."""


@dataclass(frozen=True, eq=False)
class Ends:
    """Both ends of the lists of some units.

    Attributes:
        columns: role, name, side and rank of each token of a unit.
        ids: tokens, [unit, column].
        scores: [unit, column].
        statuses: [unit, column], of `lenslrp.analysis.units.readability.STATUSES`.
        missing: for each role that cannot be read in the vocabulary, why not.
    """

    columns: list[tuple[str, str, str, int]]
    ids: Int32[Tensor, "unit column"]
    scores: Float32[Tensor, "unit column"]
    statuses: Int8[Tensor, "unit column"]
    missing: dict[str, str]


@torch.no_grad()
def ends_of_lists(
    model: TransformerBridge,
    units: Sequence[Unit],
    tokens: int = LISTED_TOKENS,
    relations: dict[str, TokenRelations] | None = None,
) -> Ends:
    """Both ends of what units of one hook point write and read.

    Args:
        model: the bridge.
        units: neurons, heads, directions or features.
        tokens: how many at either end; at most the vocabulary.
        relations: of the model's tokens, by role; those that are missing are made, and kept in it.
    """
    known = {} if relations is None else relations
    columns: list[tuple[str, str, str, int]] = []
    none = torch.zeros(len(units), 0)
    ids, values_of, statuses = [none.int()], [none], [none.to(torch.int8)]
    missing: dict[str, str] = {}
    step = max(1, SCORES_AT_ONCE // max(1, int(model.cfg.d_vocab)))
    for role, (vectors_of, product) in PROJECTIONS.items():
        try:
            vectors = vectors_of(model, units)
        except InputError as error:
            missing[role] = str(error)
            continue
        if role not in known:
            known[role] = TokenRelations.of(model, role)
        for name, rows in vectors.items():
            pieces = [_both_ends(product(model, some), tokens) for some in rows.split(step)]
            best, values = (torch.cat(parts) for parts in zip(*pieces, strict=True))
            ids.append(best.int().cpu())
            values_of.append(values.float().cpu())
            k = best.shape[1] // 2
            judged = (known[role].judged(end) for end in best.split(k, dim=1))
            statuses += [end.status.to(torch.int8) for end in judged]
            columns += [(role, name, side, rank) for side in LIST_ENDS for rank in range(k)]
    found, scores, status = (torch.cat(parts, dim=1) for parts in (ids, values_of, statuses))
    return Ends(columns, found, scores, status, missing)


def _both_ends(rows: Float[Tensor, "n d_vocab"], tokens: int) -> tuple[Tensor, Tensor]:
    """Ids and scores of the highest, highest first, then of the lowest, lowest first."""
    k = min(tokens, rows.shape[1])
    high, low = rows.topk(k), rows.topk(k, largest=False)
    return torch.cat([high.indices, low.indices], 1), torch.cat([high.values, low.values], 1)


def project_places(
    job: Job, rank: int = 0, world: int = 1, *, tokens: int = LISTED_TOKENS, progress: bool = True
) -> list[Path]:
    """Project the units of places `rank, rank + world, ...`, and leave a file of each place.

    What lies there already is not done again.

    Args:
        job: see `lenslrp.analysis.dictionary.job.prepare`.
        rank: which share, from 0.
        world: how many there are.
        tokens: how many at either end of a list; 0 for none.
        progress: show a bar.

    Returns:
        The files, in the order of the places.

    Raises:
        InputError: `tokens` is negative, or more than a list may have.
        StorageError: a damaged file, or a full disk.
    """
    if not 0 <= tokens <= LIMIT:
        raise InputError(f"vocabulary is 0 to {LIMIT} tokens at either end, not {tokens}")
    sites = {site.name: site for site in job.run.sites}
    mine = range(rank, len(job.plan.places), world)
    paths = [job.work / f"vocabulary-{number:05d}.safetensors" for number in mine]
    stamp = {"plan": job.plan.fingerprint(), "tokens": str(tokens)}
    relations: dict[str, TokenRelations] = {}
    for number, path in zip(progress_bar("vocabulary", mine, shown=progress), paths, strict=True):
        if path.exists() and load_tensors(path)[1].items() >= stamp.items():
            continue
        place = job.plan.places[number]
        ends = _project(job.run.model, place, sites[place.site], tokens, relations)
        about = {"columns": json.dumps(ends.columns), "missing": json.dumps(ends.missing)}
        tensors = {"ids": ends.ids, "scores": ends.scores, "statuses": ends.statuses}
        save_tensors(path, tensors, {**stamp, **about})
    return paths


def _project(
    model: TransformerBridge,
    place: Place,
    site: SearchedHook,
    tokens: int,
    relations: dict[str, TokenRelations],
) -> Ends:
    try:
        if not tokens:
            raise InputError("not asked for: the dictionary was built with vocabulary=0")
        units = [_unit(place, index, site) for index in range(place.size)]
    except InputError as error:
        none = torch.zeros(place.size, 0)
        missing = dict.fromkeys(LIST_ROLES, str(error))
        return Ends([], none.int(), none, none.to(torch.int8), missing)
    return ends_of_lists(model, units, tokens, relations)


def _unit(place: Place, index: int, site: SearchedHook) -> Unit:
    if isinstance(site.reader, DirectionReader):
        return Direction(place.hook, site.reader.vectors[index])
    if isinstance(site.reader, FeatureReader):
        return Feature(site.reader.coder, index)
    return parse_unit(f"{place.hook}[{index}]")
