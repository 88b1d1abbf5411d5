"""From a finished scan and its replay to the files that are a dictionary.

`units.parquet`, `examples.parquet` and `vocabulary.parquet` (zstd, small row groups in the
order of the units, a checksum on every page), `texts.sqlite`, `citations.safetensors` (which
examples reference a document), `samples.safetensors` (what the units did at the sampled tokens)
and, last, `manifest.json` with the SHA-256 of all of them: a dictionary without it is unfinished.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from lenslrp.analysis.common.storage import file_record, save_json, save_tensors
from lenslrp.analysis.dictionary.plan import DICTIONARY_SCHEMA, Place, Plan, describe_libraries
from lenslrp.analysis.dictionary.replay import Entries, replay, require_part
from lenslrp.analysis.dictionary.scan import Job, ScanState, merge_shards
from lenslrp.analysis.dictionary.schemas import (
    EXAMPLE_GROUP,
    HISTOGRAM_BINS,
    UNIT_GROUP,
    kinds,
    sampled_tokens,
)
from lenslrp.analysis.dictionary.texts import Document, write_texts
from lenslrp.analysis.dictionary.vocabulary_file import LISTED_TOKENS, write_vocabulary
from lenslrp.analysis.dictionary.vocabulary_lists import project_places
from lenslrp.analysis.dictionary.work_folder import FILES, MANIFEST, clear_work
from lenslrp.files import parquet_writer, whole
from lenslrp.text.spelling import Speller

PREPARED = UNIT_GROUP * 4
"""Units whose statistics and windows are in memory at a time."""

MANTISSA = 13
"""Bits of a float32 that windows do without: 10 remain, as in float16, and the rest compresses."""


def finish(
    job: Job,
    files: Iterable[str | Path],
    *,
    parts: list[Path] | None = None,
    checkpoint_every: float = 60.0,
    progress: bool = True,
    keep_work: bool = False,
    vocabulary: int = LISTED_TOKENS,
) -> None:
    """From the shards of a scan to a finished dictionary; see `NeuronDictionary.merge`."""
    state = merge_shards(job, files)
    entries = Entries.of(state, job.plan)
    if parts is None:
        parts = replay(job, entries, checkpoint_every=checkpoint_every, progress=progress)
    else:
        for path in parts:
            require_part(path, job.plan, entries)
    projected = project_places(job, tokens=vocabulary, progress=progress)
    publish(job, state, entries, parts, projected)
    if not keep_work:
        clear_work(job.work)


def publish(
    job: Job, state: ScanState, entries: Entries, parts: list[Path], projected: list[Path]
) -> None:
    """Write all files, the manifest last.

    Args:
        job, state, entries: what was searched and found.
        parts: the files of the replay.
        projected: those of `lenslrp.analysis.dictionary.vocabulary_lists.project_places`.

    Raises:
        StorageError: the disk is full; nothing that was there before is lost.
    """
    plan, folder = job.plan, job.folder
    sample = _sample(plan, parts)
    _write_units(folder / "units.parquet", plan, sample)
    _write_examples(folder / "examples.parquet", plan, entries, parts)
    about, shown = write_vocabulary(folder / "vocabulary.parquet", plan, projected)
    _write_texts(folder / "texts.sqlite", job, entries, parts, shown)
    save_tensors(folder / "citations.safetensors", _citations(entries, job), {}, fresh=True)
    samples = {
        kind: torch.cat([_standardised(some) for some in values.split(PREPARED)])
        for kind, values in sample.items()
    }
    save_tensors(folder / "samples.safetensors", samples, {}, fresh=True)
    manifest = {
        "schema": DICTIONARY_SCHEMA,
        "plan": plan.to_json(),
        "plan_sha256": plan.fingerprint(),
        "slots": [list(slot) for slot in entries.slots],
        "tokens_seen": state.tokens,
        "vocabulary": about,
        "libraries": describe_libraries(),
        "files": {name: file_record(folder / name) for name in sorted(FILES)},
    }
    save_json(folder / MANIFEST, manifest, fresh=True)


def _sample(plan: Plan, parts: list[Path]) -> dict[str, Tensor]:
    """What each unit did at the sampled tokens: kind -> [unit, column]."""
    columns = sampled_tokens(plan)
    sample = {kind: torch.zeros(plan.units, columns) for kind in kinds(plan)}
    for path in parts:
        with safe_open(path, framework="pt") as file:
            indices = file.get_tensor("column")
            for kind, whole in sample.items():
                whole[:, indices] = file.get_tensor(f"sample/{kind}").T
    return sample


def _some_units(plan: Plan) -> Iterator[tuple[Place, range]]:
    """All units, some of one place after the other."""
    for place in plan.places:
        for first in range(place.first, place.end, PREPARED):
            yield place, range(first, min(first + PREPARED, place.end))


def _standardised(values: Tensor) -> Tensor:
    """Mean 0 and length 1 over the sampled tokens, as int8 of the largest entry: [unit, column]."""
    centred = values - values.mean(dim=1, keepdim=True)
    scale = centred.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (centred / scale * 127).round().to(torch.int8)


def _moments(values: Tensor, kind: str) -> dict[str, NDArray[Any]]:
    """Statistics of each row, and its histogram from smallest to largest."""
    v = values.double()
    mean, low, high = v.mean(dim=1), v.amin(dim=1), v.amax(dim=1)
    centred = v - mean[:, None]
    spread = centred.square().mean(dim=1).sqrt()
    unit = centred / spread.clamp_min(1e-30)[:, None]
    width = (high - low).clamp_min(1e-30)
    bins = (
        ((v - low[:, None]) / width[:, None] * HISTOGRAM_BINS).long().clamp(0, HISTOGRAM_BINS - 1)
    )
    counts = torch.zeros(len(v), HISTOGRAM_BINS, dtype=torch.int64).scatter_add(
        1, bins, torch.ones_like(bins)
    )
    share = (v > 0 if kind == "activation" else v != 0).double().mean(dim=1)
    named = {
        "mean": mean,
        "std": spread,
        "skew": unit.pow(3).mean(dim=1),
        "kurtosis": unit.pow(4).mean(dim=1),
        "min": low,
        "max": high,
        "density": share,
    }
    columns = {f"{kind}_{name}": value.float().numpy() for name, value in named.items()}
    return {**columns, f"{kind}_histogram": counts.int().numpy()}


def _write_units(path: Path, plan: Plan, sample: dict[str, Tensor]) -> None:
    with whole(path, fresh=True) as temporary:
        writer = None
        try:
            for place, units in _some_units(plan):
                count = len(units)
                rows: dict[str, Any] = {
                    "unit": pa.array(units, pa.int32()),
                    "site": pa.array([place.site] * count),
                    "kind": pa.array([place.kind] * count),
                    "hook": pa.array([place.hook] * count),
                    "layer": pa.array([place.layer] * count, pa.int32()),
                    "index": pa.array([unit - place.first for unit in units], pa.int32()),
                }
                for kind, values in sample.items():
                    for name, column in _moments(values[units.start : units.stop], kind).items():
                        rows[name] = _column(column)
                table = pa.table(rows)
                writer = writer or parquet_writer(temporary, table.schema)
                writer.write_table(table, row_group_size=UNIT_GROUP)
        finally:
            if writer is not None:
                writer.close()


def _column(values: NDArray[Any]) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, values.reshape(-1))


def _write_examples(path: Path, plan: Plan, entries: Entries, parts: list[Path]) -> None:
    ids = []
    for part in parts:
        with safe_open(part, framework="pt") as file:
            ids.append(file.get_tensor("entry"))
    with whole(path, fresh=True) as temporary:
        writer = None
        try:
            for _, units in _some_units(plan):
                windows = _windows(plan, units, len(entries.slots), parts, ids)
                for first in range(0, len(units), EXAMPLE_GROUP):
                    last = min(first + EXAMPLE_GROUP, len(units))
                    some = slice(units.start + first, units.start + last)
                    cut = {k: w[first:last] for k, w in windows.items()}
                    table = _examples(plan, entries, some, cut)
                    writer = writer or parquet_writer(temporary, table.schema)
                    writer.write_table(table, row_group_size=len(table))
        finally:
            if writer is not None:
                writer.close()


def _windows(
    plan: Plan, units: range, slots: int, parts: list[Path], ids: list[Tensor]
) -> dict[str, Tensor]:
    """All windows of some units: kind -> [unit, slot, window]."""
    width = sum(plan.window) + 1
    made = {k: torch.full((len(units) * slots, width), float("nan")) for k in kinds(plan)}
    bounds = torch.tensor([units.start, units.stop]) * slots
    for path, entry in zip(parts, ids, strict=True):
        a, b = torch.searchsorted(entry, bounds).tolist()
        with safe_open(path, framework="pt") as file:
            for kind, whole in made.items():
                whole[entry[a:b] - units.start * slots] = file.get_slice(kind)[a:b]
    return {kind: whole.view(len(units), slots, width) for kind, whole in made.items()}


def _examples(plan: Plan, entries: Entries, units: slice, windows: dict[str, Tensor]) -> pa.Table:
    """The rows of some units, every slot of each."""
    n, slots = units.stop - units.start, len(entries.slots)
    names = list(plan.criteria)
    criterion = np.tile([names.index(c) for c, _ in entries.slots], n).astype(np.int8)
    position = entries.positions[units].reshape(-1)
    rows: dict[str, Any] = {
        "unit": np.repeat(np.arange(units.start, units.stop, dtype=np.int32), slots),
        "criterion": pa.DictionaryArray.from_arrays(pa.array(criterion), pa.array(names)),
        "rank": np.tile([r for _, r in entries.slots], n).astype(np.int16),
        "score": entries.scores[units].reshape(-1).numpy(),
        "document": entries.documents[units].reshape(-1).numpy(),
        "position": position.numpy(),
        "start": (position.long() - plan.window[0]).clamp_min(0).short().numpy(),
    }
    inside = ~windows["activation"].isnan().flatten(0, 1)
    offsets = np.concatenate([[0], inside.sum(dim=1).cumsum(0).numpy()]).astype(np.int32)
    for kind, values in windows.items():
        kept = _rounded(values.flatten(0, 1)[inside])
        rows[f"{kind}s"] = pa.ListArray.from_arrays(offsets, kept)
    return pa.table(rows)


def _rounded(values: Tensor) -> NDArray[np.float32]:
    """To 11 significant bits, half away from zero."""
    bits = values.numpy().view(np.uint32) + np.uint32(1 << (MANTISSA - 1))
    return (bits & ~np.uint32((1 << MANTISSA) - 1)).view(np.float32)


def _write_texts(
    path: Path, job: Job, entries: Entries, parts: list[Path], shown: set[int]
) -> None:
    """The referenced documents, and the text of their tokens and of `shown`."""
    tokenizer = job.run.model.tokenizer
    speller = None if tokenizer is None else Speller(tokenizer)
    aims: dict[int, tuple[int, int, float]] = {}
    for part in parts:
        with safe_open(part, framework="pt") as file:
            if "aim/value" in file.keys():  # noqa: SIM118 - safetensors' own
                columns = [
                    file.get_tensor(f"aim/{n}").tolist() for n in ("position", "token", "value")
                ]
                aims.update(
                    zip(
                        file.get_tensor("document").tolist(),
                        zip(*columns, strict=True),
                        strict=True,
                    )
                )
    used = set(shown)
    without = 0 if job.corpus.cut.bos is None else 1

    def documents() -> Iterator[Document]:
        for doc in torch.unique(entries.documents).tolist():
            part = job.corpus.part_of(doc)
            tokens = part.document(doc)
            used.update(tokens.tolist())
            aim = aims.get(doc, (-1, -1, 0.0))
            used.update([aim[1]] if aim[1] >= 0 else [])
            at = doc - part.first
            text, spans = "", torch.zeros(len(tokens), 2, dtype=torch.int64)
            if speller is not None:
                row = speller.spell(tokens[without:].tolist())
                text, spans[without:] = row.text, torch.tensor(row.spans)
            source, start = int(part.sources[at]), int(part.starts[at])
            yield Document(doc, source, start, tokens, *aim, text, spans)

    def names() -> Iterator[tuple[int, str]]:
        if speller is not None:
            yield from ((token, speller.token(token)) for token in sorted(used))

    write_texts(path, documents(), names())


def _citations(entries: Entries, job: Job) -> dict[str, Tensor]:
    """Which examples reference a document: `entries[offsets[i]:offsets[i + 1]]` reference
    `documents[i]`, with a hit at `positions`, where `tokens` are. An example's number is its
    row in `examples.parquet`. Examples with score 0 are left out: of many features, most are."""
    flat, scores = entries.documents.reshape(-1), entries.scores.reshape(-1)
    active = scores.nonzero()[:, 0]
    documents, counts = torch.unique(flat[active], return_counts=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    order = active[flat[active].argsort(stable=True)]
    positions = entries.positions.reshape(-1)[order]
    tokens = torch.empty(len(order), dtype=torch.int32)
    for doc, a, b in zip(
        documents.tolist(), offsets[:-1].tolist(), offsets[1:].tolist(), strict=True
    ):
        tokens[a:b] = job.corpus.part_of(doc).document(doc)[positions[a:b].long()].int()
    small = len(flat) < 2**31
    return {
        "documents": documents,
        "offsets": offsets,
        "entries": order.int() if small else order,
        "positions": positions,
        "tokens": tokens,
        "scores": scores[order],
    }
