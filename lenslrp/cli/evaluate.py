"""``lenslrp evaluate``: how faithful methods are on a task."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lenslrp.cli.options import DEFAULT_MODEL, OK, add_model_options, load_model

TASKS = (
    "next_word",
    "sentiment",
    "classification",
    "squad",
    "indirect_object",
    "agreement",
    "images",
)
DEFAULT_METHODS = "random,gradient_x_input,cp_lrp,attnlrp"


def add_evaluate(commands: Any) -> None:
    """Add the command to the others (what ``add_subparsers`` returned)."""
    command = commands.add_parser(
        "evaluate",
        help="measure how faithful methods of attribution are",
        description="Explain examples of TASK with several methods, take tokens away in the order "
        "of their relevance, and print the area between the curves with 95% intervals. A run that "
        "was interrupted goes on in the same folder.",
    )
    command.add_argument("task", metavar="TASK", choices=TASKS, help=", ".join(TASKS))
    command.add_argument(
        "--data",
        metavar="FILE",
        type=Path,
        help="jsonl, one record a line; next_word needs 'text', sentiment and classification "
        "'text' and 'label', squad 'context', 'question' and 'answers'; images takes a folder of "
        "files or an .npz with 'images'; the others need none",
    )
    command.add_argument(
        "--methods",
        metavar="A,B,...",
        nargs="+",
        default=[DEFAULT_METHODS],
        help="see docs/reference/baselines.md; spaces part them as well "
        f"(default: {DEFAULT_METHODS})",
    )
    command.add_argument("--n", type=int, default=20, help="examples (default: %(default)s)")
    command.add_argument(
        "--folder", type=Path, required=True, help="where results are kept and resumed from"
    )
    command.add_argument(
        "--perturb",
        metavar="A,B,...",
        nargs="+",
        default=["zero"],
        help="what stands for a token that is gone: zero, mean, eos, pad or token:TOKEN; with "
        "+first the first token stays (default: zero)",
    )
    command.add_argument("--steps", type=int, default=8, help="of a curve (default: %(default)s)")
    command.add_argument(
        "--length", type=int, default=64, help="tokens of an example (default: %(default)s)"
    )
    command.add_argument("--half", choices=("development", "held-out"), help="of the texts")
    command.add_argument("--beam", type=int, help="also measure the normalised AOPC (slow)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--json", action="store_true", help="print one JSON object, not tables")
    add_model_options(command, "--model", rules=False, default=DEFAULT_MODEL)
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from lenslrp.analysis.attribution.methods import as_method
    from lenslrp.analysis.evaluation.harness import Perturbation, evaluate
    from lenslrp.analysis.evaluation.results import PARQUET

    methods = [as_method(name) for name in _parted(options.methods)]
    perturbations = [Perturbation.parse(text) for text in _parted(options.perturb)]
    results = evaluate(
        options.task,
        load_model(options),
        methods,
        n=options.n,
        folder=options.folder,
        data=options.data,
        seed=options.seed,
        perturbations=perturbations,
        steps=options.steps,
        length=options.length,
        half=options.half,
        beam=options.beam,
    )
    path = (options.folder / PARQUET).absolute()
    if not options.json:
        print(results)
        print(f"every number (Results.read): {path}")
        return OK
    tables = {m: json.loads(results.table(m).to_json(orient="records")) for m in results.metrics()}
    summary = {
        "n": results.n,
        "settings": results.settings,
        "skipped": list(results.skipped),
        "unfit": results.unfit,
        "tables": tables,
        "results": str(path),
    }
    print(json.dumps(summary))
    return OK


def _parted(value: list[str]) -> list[str]:
    """What was parted by spaces, by commas, or both."""
    return [name for text in value for name in text.split(",")]
