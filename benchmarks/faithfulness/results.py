"""The five tasks of the evaluation, every method; ``results_page.py`` writes the pages.

    python -m benchmarks.faithfulness.results run next_word sentiment ...   # --n to stop earlier
    python -m benchmarks.faithfulness.results cost next_word sentiment ...  # on an idle machine

Runs are kept in ``benchmarks/results/evaluation`` (ignored by git), a folder each: a larger ``--n``
goes on. Models run in bfloat16, which is what makes the tasks affordable on a CPU (what that does:
``precision.py``). Occlusion and KernelSHAP, which ask for a value once or several times for every
token, and AtMan on images have runs of their own (``slow``), on the first of the same examples.
``cost`` times every method of a task, the slow ones too, on its first nine examples, always anew.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import lenslrp
from benchmarks import DATA, RESULTS
from benchmarks.faithfulness.examples import PARAGRAPHS
from lenslrp.analysis.attribution.methods import METHODS, Method, as_method
from lenslrp.analysis.attribution.perturbation import kernel_shap
from lenslrp.analysis.evaluation.harness import evaluate
from lenslrp.analysis.evaluation.results import Results
from lenslrp.analysis.evaluation.tasks import Task, image_task
from lenslrp.analysis.passes.problems import AttributionProblem

RUNS = RESULTS / "evaluation"
SEED = 0

SLOW = ("occlusion", "kernel_shap")
ABLATIONS = ("attnlrp_softmax_identity", "attnlrp_softmax_distributed")
FAST = tuple(name for name in METHODS if name not in (*SLOW, *ABLATIONS))
ONE_STACK = tuple(name for name in FAST if name != "attnlrp_positional")
"""For models whose positions PA-LRP has no rule for, or that have images for inputs."""

MANY_PASSES = ("integrated_gradients", "smoothgrad", "atman")
ONE_PASS = tuple(name for name in ONE_STACK if name not in MANY_PASSES)
"""For long prompts, of which there are many."""


@dataclass(frozen=True)
class Run:
    """One call of ``evaluate``: its task, its model, and what it is told."""

    task: str
    model: str
    n: int
    methods: tuple[str, ...]
    data: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16


SMOLLM2, FLAN_T5 = "smollm2-135m", "flan-t5-small-titles"
BOTH = ["zero", "zero+first"]
SHORT = {"steps": 8, "length": 32, "perturbations": BOTH}
TEXTS = {"steps": 6, "length": 64, "perturbations": BOTH, "half": "held-out"}
REVIEWS = {"steps": 6, "length": 96, "perturbations": ["zero"], "half": "held-out"}
QUESTIONS = {"steps": 6, "length": 192, "perturbations": ["zero"]}
ANSWERED_BY_A_DECODER = {**QUESTIONS, "length": 256}
ANY_LENGTH = {**QUESTIONS, "length": 512}
PATCHES = {"steps": 6, "perturbations": ["zero"]}
PIXELS = tuple(name for name in ONE_STACK if name != "atman")

TASKS: Mapping[str, Run] = {
    "next_word": Run("next_word", SMOLLM2, 100, FAST, PARAGRAPHS, TEXTS),
    "sentiment": Run("sentiment", SMOLLM2, 100, FAST, "movie_reviews.jsonl", REVIEWS),
    "squad": Run("squad", FLAN_T5, 100, ONE_STACK, "squad_dev.jsonl", QUESTIONS),
    "squad_all": Run("squad", FLAN_T5, 500, ONE_PASS, "squad_dev.jsonl", ANY_LENGTH),
    "squad_smollm2": Run("squad", SMOLLM2, 24, ONE_PASS, "squad_dev.jsonl", ANSWERED_BY_A_DECODER),
    "images": Run("images", "cifar", 300, PIXELS, options=PATCHES),
    "indirect_object": Run("indirect_object", SMOLLM2, 100, FAST + SLOW, options=SHORT),
    "agreement": Run("agreement", SMOLLM2, 100, FAST + SLOW, options=SHORT),
}
SLOWLY: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "next_word": (40, (*SLOW, "attnlrp")),
    "sentiment": (40, (*SLOW, "attnlrp")),
    "squad": (40, (*SLOW, "attnlrp")),
    "images": (100, ("atman", "occlusion", "attnlrp_gamma", "attnlrp")),
}
"""Methods that have runs of their own, beside what they are compared with, and on how many."""

RUNS_OF: Mapping[str, Run] = {
    **TASKS,
    **{
        f"{task}-slow": replace(TASKS[task], n=n, methods=methods)
        for task, (n, methods) in SLOWLY.items()
    },
}

TIMED = 9
"""Examples of a run that is there for its times."""


def cost_of(task: str) -> Run:
    """Every method of a task on few examples, with next to no perturbation."""
    run, (_, slow) = TASKS[task], SLOWLY.get(task, (0, ()))
    methods = tuple(dict.fromkeys((*run.methods, *slow)))
    return replace(run, n=TIMED, methods=methods, options={**run.options, "steps": 1})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("run", help="measure; goes on where it was")
    command.add_argument("names", nargs="+", choices=RUNS_OF)
    command.add_argument("--n", type=int, help="fewer examples")
    timed = commands.add_parser("cost", help="time the methods, anew")
    timed.add_argument("names", nargs="+", choices=TASKS)
    timed.set_defaults(n=None)
    for one in (command, timed):
        one.add_argument("--data", type=Path, default=DATA, help="the folder of the tasks' files")
        one.add_argument("--images", type=Path, help="CIFAR-10, see cifar.py")
    options = parser.parse_args()
    for name in options.names:
        if options.command == "cost":
            run, folder = cost_of(name), RUNS / f"{name}-cost"
            shutil.rmtree(folder, ignore_errors=True)
        else:
            run, folder = RUNS_OF[name], RUNS / name
        methods = [_method(method) for method in run.methods]
        found = measure(run, methods, folder, n=options.n, data=options.data, images=options.images)
        print(found, flush=True)


def measure(
    run: Run,
    methods: Sequence[Method],
    folder: Path,
    *,
    n: int | None = None,
    data: Path = DATA,
    images: Path | None = None,
) -> Results:
    """One run, or what is still missing of it."""
    task: str | Task = run.task
    if run.model == "cifar":
        from benchmarks.vision import cifar
        from benchmarks.vision.cifar_head import classifier

        if images is None:
            raise SystemExit("give --images: CIFAR-10, see cifar.py")
        model: Any = classifier(run.dtype)
        held_out = cifar.split(cifar.read(images), held_out=True, per_class=30)
        pixels = cifar.prepare(held_out.pixels).to(run.dtype)
        task = image_task({f"{i:03}": image for i, image in enumerate(pixels)})
    else:
        model = lenslrp.load(run.model, dtype=run.dtype, device="cpu")
    return evaluate(
        task,
        model,
        methods,
        n=min(n or run.n, run.n),
        folder=folder,
        data=None if run.data is None else data / run.data,
        seed=SEED,
        progress=False,
        **run.options,
    )


def _method(name: str) -> Method:
    """By name; KernelSHAP with half of its usual samples, for time's sake."""
    if name != "kernel_shap":
        return as_method(name)

    def function(question: AttributionProblem, *, seed: int) -> torch.Tensor:
        return kernel_shap(question, seed=seed, samples=4 * question.mask.shape[1])

    return replace(METHODS[name], function=function)


if __name__ == "__main__":
    main()
