"""A dictionary as lines of JSON: one unit a line, with all that its page says."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lenslrp.analysis.dictionary.unit import Page
from lenslrp.errors import InputError
from lenslrp.files import whole

if TYPE_CHECKING:
    from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary


JSONL = b'{"unit": '
"""How every such file begins."""


def export_jsonl(
    dictionary: NeuronDictionary, path: str | Path, units: Iterable[Any] | None = None
) -> Path:
    """Write one JSON object a unit: `unit, kind, hook, layer, index`, `statistics`,
    `vocabulary` (records of `Page.vocabulary`; empty where it has none) and `examples`
    (records of `Page.examples`, with their `criterion`). NaN and infinities become null.

    Args:
        dictionary: an open one.
        path: the file.
        units: keys, as for `dictionary[key]`; None for all.

    Raises:
        InputError: no such unit.
        StorageError: the disk is full.
    """
    path, places = Path(path), dictionary.plan.places
    pages = (
        itertools.chain.from_iterable(map(dictionary.pages, places))
        if units is None
        else map(dictionary.__getitem__, units)
    )
    with whole(path, ours=JSONL) as part, part.open("w", encoding="utf-8") as file:
        for page in pages:
            file.write(json.dumps(_described(page), allow_nan=False) + "\n")
    return path


def _described(page: Page) -> dict[str, Any]:
    try:
        vocabulary = records(page.vocabulary())
    except InputError:
        vocabulary = []
    place = page.place
    return {
        "unit": page.name,
        "kind": place.kind,
        "hook": place.hook,
        "layer": place.layer,
        "index": page.index,
        "statistics": {
            name: jsonable(value)
            for name, value in page.statistics.items()
            if name.startswith(("activation_", "relevance_"))
        },
        "vocabulary": vocabulary,
        "examples": [
            {"criterion": criterion, **record}
            for criterion in page.criteria
            for record in records(page.examples(criterion))
        ],
    }


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table, as JSON can hold them."""
    return [{str(k): jsonable(v) for k, v in row.items()} for row in frame.to_dict("records")]


def jsonable(value: Any) -> Any:
    """Numbers and lists of Python's own; None for what JSON has no number for.

    Lists are rounded to five digits: what a window holds has 11 significant bits.
    """
    if isinstance(value, np.ndarray):
        return [jsonable(float(f"{entry:.5g}")) for entry in value.tolist()]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
