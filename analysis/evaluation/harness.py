"""The harness: methods of attribution on examples of a task, measured, kept, resumed.

    results = evaluate("next_word", model, ["random", "cp_lrp", "attnlrp"],
                       data="paragraphs.jsonl", n=100, folder="results/next_word")

For each example every method gives its relevance; then all of them are perturbed together
(:mod:`lenslrp.analysis.evaluation.faithfulness`). What was measured is appended to a file when an
example is done, so a run that was killed goes on where it was, and ends with the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lenslrp.analysis.attribution.methods import Method, answer, as_method
from lenslrp.analysis.common.journal import Row, resumed
from lenslrp.analysis.common.records import HALVES, half_of, identity, in_order, read_records
from lenslrp.analysis.evaluation.faithfulness import aopc, aopc_bounds, curves, normalised_aopc
from lenslrp.analysis.evaluation.features import Features, tokens_of
from lenslrp.analysis.evaluation.image_files import read_images
from lenslrp.analysis.evaluation.model_features import patches_of
from lenslrp.analysis.evaluation.results import JOURNAL, PARQUET, Results
from lenslrp.analysis.evaluation.spans import hit, ious
from lenslrp.analysis.evaluation.tasks import IMAGES, TASKS, Example, Task, Unfit, image_task
from lenslrp.analysis.passes.problems import AttributionProblem, PassCount, resolve
from lenslrp.analysis.passes.prompts import Numbers
from lenslrp.errors import InputError, StorageError
from lenslrp.fingerprints import describe_model

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

KEEP_FIRST = "+first"


@dataclass(frozen=True)
class Perturbation:
    """How features go: what stands in their place, and whether the first token stays.

    As text: the baseline, and ``+first`` where the first token stays, such as ``"zero+first"``.
    """

    baseline: str = "zero"
    keep_first: bool = False

    @classmethod
    def parse(cls, text: str) -> Perturbation:
        return cls(text.removesuffix(KEEP_FIRST), text.endswith(KEEP_FIRST))

    def __str__(self) -> str:
        return self.baseline + (KEEP_FIRST if self.keep_first else "")

    def features(self, model: TransformerBridge, example: Example) -> Features:
        """What of an example may be taken away in this way."""
        if example.prompt.pixels is not None:
            if self.keep_first:
                raise InputError(f"an image has no first token to keep: {self.baseline!r}")
            return patches_of(model, example.prompt, baseline=self.baseline)
        keep = np.flatnonzero(~example.removable).tolist()
        if self.keep_first:
            keep = sorted({0, *keep})
        return tokens_of(model, example.prompt, baseline=self.baseline, keep=keep)


def evaluate(
    task: str | Task,
    model: TransformerBridge,
    methods: Sequence[Any],
    *,
    n: int,
    folder: str | Path,
    data: Any = None,
    seed: int = 0,
    perturbations: Sequence[str | Perturbation] = ("zero",),
    steps: int = 8,
    length: int = 64,
    half: str | None = None,
    beam: int | None = None,
    progress: bool = True,
) -> Results:
    """Measure how faithful methods are on ``n`` examples of a task.

    Args:
        task: a name in :data:`~lenslrp.analysis.evaluation.tasks.TASKS`, ``"images"``, or a task of
        your own.
        model: a ``TransformerBridge``.
        methods: names in :data:`~lenslrp.analysis.attribution.methods.METHODS`, composites of
            rules, or methods of your own.
        n: how many examples; a later run with more goes on from there.
        folder: where results are kept. A run with other options needs a folder of its own.
        data: a ``.jsonl`` file, a ``datasets`` object or a list of dicts; which fields a record
            needs is ``TASKS[task].fields``. Read whole, and taken in an order drawn by ``seed``.
            ``None`` for tasks that make their own. For ``"images"`` what
            :func:`~lenslrp.analysis.evaluation.image_files.read_images` reads, a folder of files,
        say.
        seed: of the order of examples, of methods that draw random numbers, and of the bootstrap.
        perturbations: see :class:`Perturbation`.
        steps: of a curve.
        length: tokens of an example: exactly (``next_word``), or at most.
        half: ``"development"`` or ``"held-out"``, to choose a setting on one half of the texts and
            to report it on the other.
        beam: also measure the normalised AOPC of the probability, with bounds from so wide a beam
            (slow: ``beam * length^2`` forward passes an example).
        progress: a bar on standard error.

    Raises:
        InputError: an unknown name, no data, other options than those the folder was made with, or
            no example at all.
        StorageError: a damaged results file.
    """
    chosen = [as_method(method) for method in methods]
    ways = [p if isinstance(p, Perturbation) else Perturbation.parse(p) for p in perturbations]
    if not chosen or not ways or n < 1:
        raise InputError("give at least one method, one perturbation and one example")
    if half is not None and half not in HALVES:
        raise InputError(f"half is one of {', '.join(HALVES)} or None, not {half!r}")
    names = [method.name for method in chosen]
    if len(set(names)) < len(names):
        raise InputError(f"two methods have one name: {', '.join(names)}")
    skipped: list[str] = []
    if task == IMAGES:
        task, data = image_task(read_images(model, data, skipped)), None
    task = _task(task)
    records = in_order(_records(task, data, half, skipped), seed)
    settings = {
        "task": task.name,
        "model": describe_model(model),
        "methods": names,
        "perturbations": [str(way) for way in ways],
        "steps": steps,
        "length": length,
        "seed": seed,
        "half": half,
        "beam": beam,
        "records": identity({"all": [identity(record) for record in records]}),
    }
    folder = Path(folder)
    if (folder / PARQUET).exists() and not (folder / JOURNAL).exists():
        raise StorageError(
            f"{folder / PARQUET} is in the way: no run of this folder made it, for there is no "
            f"{JOURNAL}. Move it, or give another folder"
        )
    rows: list[Row] = []
    with resumed(folder / JOURNAL, settings) as (done, append):
        known = {row["example"]: row for row in done}
        found = 0
        with tqdm(total=n, desc=task.name, unit="example", disable=not progress) as bar:
            for row in _rows(task, model, records, known, append, chosen, ways, settings):
                rows.append(row)
                if "unfit" not in row:
                    found += 1
                    bar.update()
                if found == n:
                    break
    results = Results.of(settings, rows, skipped)
    results.write(folder)
    return results


def _task(task: str | Task) -> Task:
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise InputError(f"no task {task!r}; the tasks are {', '.join((*TASKS, IMAGES))}")
    return TASKS[task]


def _records(task: Task, data: Any, half: str | None, skipped: list[str]) -> Iterator[Row]:
    if data is None and task.records is None:
        fields = ", ".join(f"{name} ({kind.__name__})" for name, kind in task.fields.items())
        raise InputError(f"{task.name} needs data: records with {fields}")
    source = data if data is not None or task.records is None else task.records()
    for record in read_records(source, task.fields, skipped):
        if half is None or half_of(str(record[task.split_by])) == half:
            yield record


def _rows(
    task: Task,
    model: TransformerBridge,
    records: list[Row],
    known: dict[str, Row],
    append: Any,
    methods: list[Method],
    ways: list[Perturbation],
    settings: Row,
) -> Iterator[Row]:
    """One row a record, from the journal where it is there, in order."""
    warm = False
    for record in records:
        name = identity(record)
        if name not in known:
            try:
                example = task.make(model, record, settings["length"])
            except Unfit as reason:
                known[name] = {"example": name, "unfit": str(reason)}
            else:
                if not warm:  # what the first pass of a process takes longer is no method's cost
                    _plain(_question(model, example))
                    warm = True
                known[name] = {"example": name} | _measured(model, example, methods, ways, settings)
            append(known[name])
        yield known[name]


def _measured(
    model: TransformerBridge,
    example: Example,
    methods: list[Method],
    ways: list[Perturbation],
    settings: Row,
) -> Row:
    """Everything about one example, as it is stored."""
    question = _question(model, example)
    plain = _plain(question)
    relevance, told = {}, {}
    for method in methods:
        own = replace(question, passes=PassCount())
        start = time.perf_counter()
        found = answer(method, own, seed=settings["seed"])
        seconds = time.perf_counter() - start
        values = found.tokens[0].detach().double().cpu().numpy()[: len(example.removable)]
        relevance[method.name] = values
        told[method.name] = {
            "seconds": seconds,
            "forward": found.passes.forward,
            "backward": found.passes.backward,
        } | _pointing(values, example)
    row: Row = {
        "target": question.explained.text,
        "value": float(question.explained.value[0]),
        "features": int(example.removable.sum()),
        "plain_seconds": plain,
        "methods": told,
        "perturbed": {},
    }
    for way in ways:
        features = way.features(model, example)
        row["perturbed"][str(way)] = _perturbed(features, relevance, settings)
    return row


def _perturbed(features: Features, relevance: dict[str, Numbers], settings: Row) -> Row:
    own = {name: features.of(values) for name, values in relevance.items()}
    bounds = None if settings["beam"] is None else aopc_bounds(features, beam=settings["beam"])
    told = {}
    for name, curve in curves(features, own, steps=settings["steps"]).items():
        told[name] = curve.scores() | {
            field: getattr(curve, field).tolist()
            for field in ("shares", "morf", "lerf", "morf_probability", "lerf_probability")
        }
        if bounds is not None:
            told[name]["naopc"] = normalised_aopc(aopc(features, own[name]), bounds)
    return told


def _pointing(values: Numbers, example: Example) -> dict[str, float]:
    """Whether relevance points at what decides, among the places that count."""
    if example.key is None:
        return {}
    some = example.removable
    values, key = values[some], example.key[some]
    told = {"hit": hit(values, key), "hit_at_3": hit(values, key, 3)}
    told["iou"] = ious(values, key)["span length"]
    if example.distractor is not None:
        other: NDArray[np.bool_] = example.distractor[some]
        told["above_distractor"] = float(values[key].max() > values[other].max())
    return told


def _question(model: TransformerBridge, example: Example) -> AttributionProblem:
    prompt = example.prompt
    if prompt.pixels is not None:
        return resolve(model, target=prompt.target, pixel_values=prompt.pixels[None])
    return resolve(model, prompt.given, prompt.target)


def _plain(question: AttributionProblem) -> float:
    """Seconds of one plain forward and backward pass: the unit in which methods' costs are told."""
    start = time.perf_counter()
    question.gradients(question.inputs[None])
    return time.perf_counter() - start
