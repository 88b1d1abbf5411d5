"""The command line: ``lenslrp explain``, ``lenslrp doctor`` and ``lenslrp evaluate``.

Exit codes: 0 the question was answered, 1 the model is not covered or not loadable, 2 bad usage or
bad input. Results go to standard output, progress and messages to standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenslrp.cli_evaluate import add_evaluate

if TYPE_CHECKING:
    from rich.console import Console
    from transformer_lens.model_bridge import TransformerBridge

    from lenslrp.cache import RelevanceCache

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_REPORT = "lenslrp-report.html"
COMPOSITES = ("AttnLRP", "CPLRP", "GradientTimesInput", "RelP", "GIM")
DTYPES = ("float16", "bfloat16", "float32", "float64")
OK, NOT_COVERED, BAD_INPUT = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    # torch takes seconds to import: not before the command line is known to be right
    from lenslrp.errors import CoverageError, InputError, LoadError

    try:
        return int(options.run(options))
    except InputError as error:
        return _complain(error, BAD_INPUT)
    except (CoverageError, LoadError) as error:
        return _complain(error, NOT_COVERED)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)


def _complain(error: object, code: int) -> int:
    print(f"lenslrp: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lenslrp",
        description="Which parts of a transformer produced its output: relevance (AttnLRP) at "
        "every TransformerLens hook point.",
        epilog="exit codes: 0 answered, 1 model not covered or not loadable, 2 bad usage or input",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    explain = commands.add_parser(
        "explain",
        help="explain one output of a model",
        description="Explain why a model gives a token after PROMPT: token heatmap and ledger in "
        "the terminal, everything else in an HTML report.",
    )
    explain.add_argument("prompt", metavar="PROMPT", help="the text the model reads")
    explain.add_argument(
        "--target",
        metavar="T",
        help="what to explain: text (mind the leading space) or a token id (default: the model's "
        "own top token)",
    )
    explain.add_argument(
        "--report",
        metavar="FILE",
        type=Path,
        default=Path(DEFAULT_REPORT),
        help="HTML report (default: %(default)s)",
    )
    explain.add_argument(
        "--json", action="store_true", help="print one JSON object instead of text"
    )
    explain.set_defaults(run=_explain)
    _add_model_options(explain, "--model", default=DEFAULT_MODEL)
    _add_composite(explain)

    doctor = commands.add_parser(
        "doctor",
        help="check that every operation of a model has a rule",
        description="Which rule sits where, what has none, and whether the books balance on a "
        "random prompt. Exit code 1 if anything is uncovered or does not balance.",
    )
    doctor.set_defaults(run=_doctor)
    _add_model_options(doctor, "model")
    _add_composite(doctor)

    add_evaluate(
        commands, partial(_add_model_options, name="--model", default=DEFAULT_MODEL), _load
    )
    return parser


def _add_composite(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--composite", choices=COMPOSITES, default="AttnLRP", help="rules (default: %(default)s)"
    )


def _add_model_options(command: argparse.ArgumentParser, name: str, **settings: Any) -> None:
    default = f" (default: {settings['default']})" if settings else ""
    command.add_argument(
        name,
        metavar="MODEL",
        help=f"embedded model ({DEFAULT_MODEL}), Hugging Face id or directory{default}",
        **settings,
    )
    command.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)"
    )
    command.add_argument("--device", help="such as cpu or cuda (default: an accelerator if any)")
    command.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")


def _version() -> str:
    try:
        return f"lenslrp {version('lenslrp')}"
    except PackageNotFoundError:
        return "lenslrp (not installed)"


def _load(options: argparse.Namespace) -> TransformerBridge:
    import torch

    from lenslrp.errors import InputError
    from lenslrp.loading import load

    device = options.device
    if device is not None:
        try:
            torch.device(device)
        except RuntimeError as error:
            raise InputError(f"no such device: {device!r}") from error
    dtype = getattr(torch, options.dtype)
    return load(options.model, dtype=dtype, device=device, revision=options.revision)


def _composite(name: str) -> Any:
    import lenslrp

    return getattr(lenslrp, name)()


def _target(text: str | None) -> str | int | None:
    """A target that is all digits is a token id; quote a space before it to mean the text."""
    return int(text) if text is not None and text.isdecimal() else text


def _explain(options: argparse.Namespace) -> int:
    from lenslrp.analysis.report import write_report
    from lenslrp.run import run_with_relevance

    _check_writable(options.report)
    model = _load(options)
    _, relevance = run_with_relevance(
        model,
        options.prompt,
        target=_target(options.target),
        composite=_composite(options.composite),
    )
    write_report(relevance, options.report, model=model)
    if options.json:
        print(json.dumps(_summary(relevance, options.report)))
        return OK
    _show(relevance, options.report)
    return OK


def _check_writable(report: Path) -> None:
    """Before the work, not after it."""
    from lenslrp.errors import InputError

    if report.is_dir():
        raise InputError(f"--report {report} is a directory, give a file")
    if not report.absolute().parent.is_dir():
        raise InputError(f"--report {report}: there is no directory {report.absolute().parent}")


def _show(relevance: RelevanceCache, report: Path) -> None:
    from rich.text import Text

    from lenslrp.terminal import render

    console = _console()
    console.print(render(relevance))
    for term, value in _ledger(relevance).items():
        console.print(Text(f"  {term:<18} {value:>+14.6g}"))
    console.print(Text(f"report: {report.absolute()}"), soft_wrap=True)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _ledger(relevance: RelevanceCache) -> dict[str, float]:
    ledger = relevance.ledger()
    terms = ("leaves", "biases", "softmax", "positional", "stabiliser", "plain")
    names = ("target", *terms, "nonlinear_target", "error")
    return {name: float(getattr(ledger, name)) for name in names}


def _summary(relevance: RelevanceCache, report: Path) -> dict[str, Any]:
    return {
        "model": relevance.model_name,
        "composite": relevance.composite.name,
        "target": relevance.target.text,
        "value": float(relevance.target.value[0]),
        "tokens": relevance.str_tokens[0],
        "relevance": relevance.tokens[0].tolist(),
        "ledger": _ledger(relevance),
        "uncovered": [str(site) for site in relevance.coverage.uncovered],
        "report": str(report.absolute()),
    }


def _doctor(options: argparse.Namespace) -> int:
    from lenslrp.doctor import examine

    diagnosis = examine(_load(options), _composite(options.composite))
    _console().print(diagnosis.render())
    return OK if diagnosis.ok else NOT_COVERED


if __name__ == "__main__":
    sys.exit(main())
