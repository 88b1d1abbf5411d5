"""The command line: ``lenslrp explain``, ``doctor``, ``dictionary`` and ``evaluate``.

Exit codes: 0 the question was answered, 1 the model is not covered or not loadable or an extra is
not installed, 2 bad usage or bad input. Results go to standard output, progress and messages to
standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenslrp.cli_dictionary import add_dictionary
from lenslrp.cli_evaluate import add_evaluate
from lenslrp.cli_options import (
    BAD_INPUT,
    DEFAULT_MODEL,
    NOT_COVERED,
    OK,
    add_model_options,
    check_writable,
    composite,
    console,
    load_model,
    require_utf8,
    write_keeping,
)

if TYPE_CHECKING:
    from lenslrp.cache import RelevanceCache

DEFAULT_REPORT = "lenslrp-report.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    # torch takes seconds to import: not before the command line is known to be right
    from lenslrp.errors import (
        CoverageError,
        InputError,
        LoadError,
        MissingExtraError,
        StorageError,
    )

    try:
        require_utf8(given)
        return int(options.run(options))
    except (InputError, StorageError) as error:
        return _complain(error, BAD_INPUT)
    except (CoverageError, LoadError, MissingExtraError) as error:
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
        epilog="exit codes: 0 answered, 1 model not covered or not loadable or an extra missing, 2 "
        "bad usage or input",
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
        help=f"HTML report; an earlier one is kept beside it (default: {DEFAULT_REPORT}, where the "
        "extra 'report' is installed)",
    )
    explain.add_argument(
        "--json", action="store_true", help="print one JSON object instead of text"
    )
    explain.set_defaults(run=_explain)
    add_model_options(explain, "--model", default=DEFAULT_MODEL)

    doctor = commands.add_parser(
        "doctor",
        help="check that every operation of a model has a rule",
        description="Which rule sits where, what has none, and whether the books balance on a "
        "random prompt. Exit code 1 if anything is uncovered or does not balance.",
    )
    doctor.set_defaults(run=_doctor)
    add_model_options(doctor, "model")
    add_dictionary(commands)
    add_evaluate(commands)
    return parser


def _version() -> str:
    try:
        return f"lenslrp {version('lenslrp')}"
    except PackageNotFoundError:
        return "lenslrp (not installed)"


def _target(text: str | None) -> str | int | None:
    """A target that is all digits is a token id; quote a space before it to mean the text."""
    return int(text) if text is not None and text.isdecimal() else text


def _explain(options: argparse.Namespace) -> int:
    from lenslrp.analysis.report import write_report
    from lenslrp.run import run_with_relevance

    report, why_not = _report_path(options.report)
    model = load_model(options)
    _, relevance = run_with_relevance(
        model,
        options.prompt,
        target=_target(options.target),
        composite=composite(options.composite),
    )
    if report is not None:
        write_keeping(report, lambda: write_report(relevance, report, model=model))
    if options.json:
        print(json.dumps(_summary(relevance, report)))
    else:
        _show(relevance, report)
    if why_not is not None:
        print(f"lenslrp: no report is written: {why_not}", file=sys.stderr)
    return OK


def _report_path(given: Path | None) -> tuple[Path | None, Exception | None]:
    """Where the report goes, or why it is not written: its extra is missing.

    Raises:
        InputError: no file can be written there.
        MissingExtraError: it was asked for.
    """
    from lenslrp.analysis.report import require_report
    from lenslrp.errors import MissingExtraError
    from lenslrp.files import HTML

    path = given or Path(DEFAULT_REPORT)
    check_writable("--report", path, HTML)
    try:
        require_report()
    except MissingExtraError as error:
        if given is not None:
            raise
        return None, error
    return path, None


def _show(relevance: RelevanceCache, report: Path | None) -> None:
    from rich.text import Text

    from lenslrp.terminal import render

    screen = console()
    screen.print(render(relevance))
    for term, value in _ledger(relevance).items():
        screen.print(Text(f"  {term:<18} {value:>+14.6g}"))
    if report is not None:
        screen.print(Text(f"report: {report.absolute()}"), soft_wrap=True)


def _ledger(relevance: RelevanceCache) -> dict[str, float]:
    ledger = relevance.ledger()
    terms = ("leaves", "biases", "softmax", "positional", "stabiliser", "plain")
    names = ("target", *terms, "nonlinear_target", "error")
    return {name: float(getattr(ledger, name)) for name in names}


def _summary(relevance: RelevanceCache, report: Path | None) -> dict[str, Any]:
    return {
        "model": relevance.model_name,
        "composite": relevance.composite.name,
        "target": relevance.target.text,
        "value": float(relevance.target.value[0]),
        "tokens": relevance.str_tokens[0],
        "relevance": relevance.tokens[0].tolist(),
        "ledger": _ledger(relevance),
        "uncovered": [str(site) for site in relevance.coverage.uncovered],
        "report": None if report is None else str(report.absolute()),
    }


def _doctor(options: argparse.Namespace) -> int:
    from lenslrp.doctor import examine

    diagnosis = examine(load_model(options), composite(options.composite))
    console().print(diagnosis.render())
    return OK if diagnosis.ok else NOT_COVERED


if __name__ == "__main__":
    sys.exit(main())
