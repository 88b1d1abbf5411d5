"""What several benchmarks share: next-word prompts, relevance of many at once, tables in JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lenslrp
from lenslrp.analysis.attribution.methods import Method, attribute
from lenslrp.analysis.common.records import in_order, read_records
from lenslrp.analysis.common.statistics import bootstrap
from lenslrp.analysis.evaluation.tasks import TASKS, Example, Unfit
from lenslrp.analysis.passes.prompts import ExplainedPrompt
from lenslrp.targets import PerRow

PARAGRAPHS = "wikipedia_paragraphs.jsonl"
TOKENS_PER_PASS = 640
METHODS: dict[str, Callable[[], lenslrp.Composite]] = {
    "AttnLRP": lenslrp.AttnLRP,
    "CP-LRP": lenslrp.CPLRP,
    "Gradient x Input": lenslrp.GradientTimesInput,
}
RANDOM = "random"

Numbers = np.ndarray[Any, np.dtype[np.float64]]


def examples(
    task: str,
    model: Any,
    n: int,
    *,
    data: Path | None = None,
    seed: int = 0,
    length: int = 64,
    fits: Callable[[Example], bool] = lambda example: True,
) -> list[Example]:
    """The first ``n`` examples of a task, in the order of ``lenslrp evaluate --seed``.

    Args:
        fits: which of them count.
    """
    kind = TASKS[task]
    source = data if kind.records is None else kind.records()

    def made() -> Any:
        for record in in_order(read_records(source, kind.fields, []), seed):
            try:
                example = kind.make(model, record, length)
            except Unfit:
                continue
            if fits(example):
                yield example

    return list(islice(made(), n))


def relevance(
    method: str | Method, model: Any, prompts: Sequence[ExplainedPrompt], seed: int = 0
) -> list[Numbers]:
    """Token relevance [pos] of each prompt; those of one length run together."""
    found: dict[int, Numbers] = {}
    for batch, rows, target in batches(prompts):
        tokens = attribute(method, model, rows, target, seed=seed).tokens
        found |= zip(batch, tokens.double().cpu().numpy(), strict=True)
    return [found[i] for i in range(len(prompts))]


def batches(
    prompts: Sequence[ExplainedPrompt],
) -> Iterator[tuple[list[int], torch.Tensor, PerRow]]:
    """Prompts of one length: which they are, their tokens [row, pos], their targets."""
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].length)
    while order:
        length = prompts[order[0]].length
        most = max(1, TOKENS_PER_PASS // length)
        batch = [i for i in order[:most] if prompts[i].length == length]
        order = order[len(batch) :]
        target = PerRow(tuple(prompts[i].target for i in batch))
        yield batch, torch.cat([prompts[i].given for i in batch]), target


def spread(values: Sequence[float] | Numbers, seed: int = 0, prefix: str = "") -> dict[str, float]:
    """Columns ``mean, low, high``: the mean and its 95% bootstrap interval."""
    triple = bootstrap(np.asarray(values, dtype=np.float64), seed)
    return {prefix + key: x for key, x in zip(("mean", "low", "high"), triple, strict=True)}


def keep(
    path: Path, name: str, rows: Sequence[Mapping[str, Any]], command: str, **about: Any
) -> None:
    """Print a table, and put it into a results file beside those that are there already.

    Args:
        path: a JSON file: table name -> what is said ``about`` it, ``command``, ``rows``.
        command: what measures it again.
        rows: plain columns; floats are written with four significant digits.
    """
    tables = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rounded = [{key: _short(value) for key, value in row.items()} for row in rows]
    tables[name] = {
        "command": f"python -m benchmarks.faithfulness.{command}",
        **about,
        "rows": rounded,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    print(f"{name}: {about}")
    for row in rounded:
        print("  " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
