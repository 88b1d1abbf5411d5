"""The harness: methods of attribution on examples of a task, measured, kept, resumed.

    results = evaluate("next_word", model, ["random", "cp_lrp", "attnlrp"],
                       data="paragraphs.jsonl", n=100, folder="results/next_word")

1. Records are read, and taken in an order drawn by the seed.
2. The task makes an example of a record: a prompt, a target, what may be taken away.
3. Every method gives its relevance of the example; where a right answer is known, it is compared
   with it.
4. Features are taken away in the order of each relevance.
5. The example's row is appended to a file, so a run that was killed goes on where it was, and ends
   with the same numbers.
6. The rows become one table, `Results`.

A metric of curves is a property of `PerturbationCurve` and its name in `CURVE_SCORES`
(`lenslrp.analysis.evaluation.faithfulness`); a metric of known answers is an entry of
`pointing_scores` (`lenslrp.analysis.evaluation.spans`). Tables and files have it then.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lenslrp.analysis.attribution.methods import Method, as_method, run_method
from lenslrp.analysis.common.journal import Row, resumed
from lenslrp.analysis.common.records import SPLITS, in_order, read_records, record_id, split_of
from lenslrp.analysis.common.statistics import Numbers
from lenslrp.analysis.evaluation.faithfulness import aopc, aopc_bounds, curves, normalised_aopc
from lenslrp.analysis.evaluation.features import Features, tokens_of
from lenslrp.analysis.evaluation.image_files import read_images
from lenslrp.analysis.evaluation.model_features import patches_of
from lenslrp.analysis.evaluation.results import CURVES, JOURNAL, PARQUET, Results
from lenslrp.analysis.evaluation.spans import pointing_scores
from lenslrp.analysis.evaluation.tasks import IMAGES, TASKS, Example, Task, Unfit, image_task
from lenslrp.analysis.passes.problems import AttributionProblem, PassCount, resolve
from lenslrp.errors import InputError, StorageError
from lenslrp.fingerprints import describe_model
from lenslrp.progress import progress_bar

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

KEEP_FIRST = "+first"


@dataclass(frozen=True)
class Perturbation:
    """How features are taken away: what replaces them, and whether the first token stays.

    As text: the baseline, and ``+first`` where the first token stays, such as ``"zero+first"``.

    Attributes:
        baseline: what replaces a feature: see ``baseline`` of `tokens_of`; for an image
            ``"zero"`` (the mean colour of the processor's statistics) or ``"mean"`` (its own).
        keep_first: never take the first token away, at which many models park attention that is
            meant for nothing.

    Examples:
        >>> Perturbation.parse("mean+first")
        Perturbation(baseline='mean', keep_first=True)
    """

    baseline: str = "zero"
    keep_first: bool = False

    @classmethod
    def parse(cls, text: str) -> Perturbation:
        """The inverse of ``str``."""
        return cls(text.removesuffix(KEEP_FIRST), text.endswith(KEEP_FIRST))

    def __str__(self) -> str:
        return self.baseline + (KEEP_FIRST if self.keep_first else "")

    def features(self, model: TransformerBridge, example: Example) -> Features:
        """What of an example may be taken away in this way.

        Raises:
            InputError: an unknown baseline, or ``keep_first`` for an image.
        """
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
        task: a name in `TASKS`, ``"images"``, or a task of your own.
        model: a ``TransformerBridge``.
        methods: names in `METHODS`, composites of rules, or methods of your own (`Method`).
        n: how many examples; a later run with more goes on from there.
        folder: where results are kept. A run with other options needs a folder of its own.
        data: a ``.jsonl`` file, a ``datasets`` object or a list of dicts; which fields a record
            needs is ``TASKS[task].fields``. Read whole, and taken in an order drawn by ``seed``.
            ``None`` for tasks that make their own. For ``"images"`` a folder of image files, an
            ``.npz`` file with ``images`` [n, height, width, 3] of bytes, or dicts with an
            ``image``.
        seed: of the order of examples, of methods that draw random numbers, and of the bootstrap.
        perturbations: see `Perturbation`.
        steps: of a curve.
        length: tokens of an example: exactly (``next_word``), or at most.
        half: ``"development"`` or ``"held-out"``, to choose a setting on one half of the texts and
            to report it on the other.
        beam: also measure the normalised AOPC of the probability, with bounds from so wide a beam
            (slow: ``beam * length^2`` forward passes an example).
        progress: a bar on standard error.

    Returns:
        Every number of every example; ``results.table("area")`` is the mean of a metric with its
        95% bootstrap interval, for each method.

    Raises:
        InputError: an unknown name, no data, other options than those the folder was made with, or
            no example at all.
        StorageError: a damaged results file.

    Examples:
        ```python
        results = evaluate("indirect_object", model, ["random", "attnlrp"], n=50, folder="io")
        results.table("area")[["method", "mean", "low", "high"]]  # logits; chance is 0
        ```
    """
    chosen = [as_method(method) for method in methods]
    parsed = [p if isinstance(p, Perturbation) else Perturbation.parse(p) for p in perturbations]
    if not chosen or not parsed or n < 1:
        raise InputError("give at least one method, one perturbation and one example")
    if half is not None and half not in SPLITS:
        raise InputError(f"half is one of {', '.join(SPLITS)} or None, not {half!r}")
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
        "perturbations": [str(perturbation) for perturbation in parsed],
        "steps": steps,
        "length": length,
        "seed": seed,
        "half": half,
        "beam": beam,
        "records": record_id({"all": [record_id(record) for record in records]}),
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
        measured = 0
        with progress_bar(task.name, total=n, shown=progress, unit="example") as bar:
            for row in _rows(task, model, records, known, append, chosen, parsed, settings):
                rows.append(row)
                if "unfit" not in row:
                    measured += 1
                    bar.update()
                if measured == n:
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
        if half is None or split_of(str(record[task.split_by])) == half:
            yield record


def _rows(
    task: Task,
    model: TransformerBridge,
    records: list[Row],
    known: dict[str, Row],
    append: Any,
    methods: list[Method],
    perturbations: list[Perturbation],
    settings: Row,
) -> Iterator[Row]:
    """One row a record, from the journal where it is there, in order."""
    warm = False
    for record in records:
        name = record_id(record)
        if name not in known:
            row: Row = {"example": name}
            try:
                example = task.make(model, record, settings["length"])
            except Unfit as reason:
                row["unfit"] = str(reason)
            else:
                if not warm:  # what the first pass of a process takes longer is no method's cost
                    _plain_seconds(_problem(model, example))
                    warm = True
                row |= _measured(model, example, methods, perturbations, settings)
            known[name] = row
            append(row)
        yield known[name]


def _measured(
    model: TransformerBridge,
    example: Example,
    methods: list[Method],
    perturbations: list[Perturbation],
    settings: Row,
) -> Row:
    """Everything about one example, as it is stored."""
    problem = _problem(model, example)
    plain_seconds = _plain_seconds(problem)
    relevance, measures = {}, {}
    for method in methods:
        counted = replace(problem, passes=PassCount())
        start = time.perf_counter()
        found = run_method(method, counted, seed=settings["seed"])
        seconds = time.perf_counter() - start
        values = found.tokens[0].detach().double().cpu().numpy()[: len(example.removable)]
        relevance[method.name] = values
        measures[method.name] = {
            "seconds": seconds,
            "forward": found.passes.forward,
            "backward": found.passes.backward,
        } | _pointing(values, example)
    return {
        "target": problem.explained.text,
        "value": float(problem.explained.value[0]),
        "features": int(example.removable.sum()),
        "plain_seconds": plain_seconds,
        "methods": measures,
        "perturbed": {
            str(perturbation): _perturbed(
                perturbation.features(model, example), relevance, settings
            )
            for perturbation in perturbations
        },
    }


def _perturbed(features: Features, relevance: dict[str, Numbers], settings: Row) -> Row:
    """For each method, the scores of its perturbation curve, and the curve."""
    by_feature = {name: features.of(values) for name, values in relevance.items()}
    bounds = None if settings["beam"] is None else aopc_bounds(features, beam=settings["beam"])
    measures = {}
    for name, curve in curves(features, by_feature, steps=settings["steps"]).items():
        measures[name] = curve.scores() | {
            field: getattr(curve, field).tolist() for field in ("shares", *CURVES)
        }
        if bounds is not None:
            measures[name]["naopc"] = normalised_aopc(aopc(features, by_feature[name]), bounds)
    return measures


def _pointing(values: Numbers, example: Example) -> dict[str, float]:
    """Whether relevance points at what decides, among the tokens that may be taken away."""
    if example.key is None:
        return {}
    some, distractor = example.removable, example.distractor
    return pointing_scores(
        values[some], example.key[some], None if distractor is None else distractor[some]
    )


def _problem(model: TransformerBridge, example: Example) -> AttributionProblem:
    prompt = example.prompt
    if prompt.pixels is not None:
        return resolve(model, target=prompt.target, pixel_values=prompt.pixels[None])
    return resolve(model, prompt.given, prompt.target)


def _plain_seconds(problem: AttributionProblem) -> float:
    """Of one plain forward and backward pass: the unit in which methods' costs are given."""
    start = time.perf_counter()
    problem.gradients(problem.inputs[None])
    return time.perf_counter() - start
