"""``lenslrp explain``: one prompt in the terminal, or a file of them into a table."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenslrp.cli.options import (
    BAD_INPUT,
    DEFAULT_MODEL,
    OK,
    add_model_options,
    check_writable,
    composite,
    console,
    load_model,
    own_device,
    write_keeping,
)

if TYPE_CHECKING:
    from lenslrp.analysis.views.checks import Checks
    from lenslrp.cache import RelevanceCache

DEFAULT_REPORT = "lenslrp-report.html"

SOURCES_SHOWN = 3
"""Tokens that are named beside each token that was written."""

REASONS_SHOWN = 20
"""Lines that could not be explained and are named; the others are counted."""


def add_explain(commands: Any) -> None:
    """Add the command to the others (what ``add_subparsers`` returned)."""
    explain = commands.add_parser(
        "explain",
        help="explain one output of a model, or those of a file of prompts",
        description="Explain why a model gives a token after PROMPT: token heatmap and ledger in "
        "the terminal, everything else in an HTML report. With --data and --out instead: token "
        "relevance of every prompt of a file, as a table with a row a token. A run that was "
        "interrupted goes on where it was; under torchrun or Slurm, all processes share the work. "
        "Exit code 2 if lines of the file could not be explained; the others are in the table.",
    )
    explain.add_argument("prompt", metavar="PROMPT", nargs="?", help="the text the model reads")
    explain.add_argument(
        "--target",
        metavar="T",
        help="what to explain: text (mind the leading space) or a token id (default: the model's "
        "own top token)",
    )
    explain.add_argument(
        "--generate",
        metavar="N",
        type=int,
        help="let the model write up to N tokens, and explain each of them by all before it",
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
    explain.add_argument(
        "--data",
        metavar="FILE",
        type=Path,
        help="many prompts: .jsonl, objects with 'prompt' or 'messages' and, if given, 'target'; "
        ".txt, a line each; - for standard input",
    )
    explain.add_argument(
        "--out", metavar="FILE", type=Path, help="the table of --data: .parquet or .jsonl"
    )
    explain.add_argument(
        "--batch-size", metavar="N", type=int, help="prompts at once (default: by their tokens)"
    )
    explain.set_defaults(run=lambda options: _run(explain, options))
    add_model_options(explain, "--model", default=DEFAULT_MODEL)


def _run(command: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if (options.prompt is None) == (options.data is None):
        command.error("give either PROMPT or --data FILE")
    if (options.out is None) != (options.data is None):
        command.error("--data and --out go together")
    if options.data is None:
        if options.batch_size is not None:
            command.error("--batch-size is for --data")
        if options.generate is None:
            return _explain(options)
        if options.target is not None:
            command.error("--generate explains what the model writes: leave --target out")
        return _generate(options)
    if options.report is not None or options.json or options.generate is not None:
        command.error(
            "--report, --json and --generate are for PROMPT; --out is the result of --data"
        )
    return _explain_file(options)


def _target(text: str | None) -> str | int | None:
    """A target that is all digits is a token id; quote a space before it to mean the text."""
    return int(text) if text is not None and text.isdecimal() else text


def _explain_file(options: argparse.Namespace) -> int:
    from lenslrp.analysis.dictionary.launch import rank_and_world
    from lenslrp.errors import InputError
    from lenslrp.explaining_file import explain_to, require_place
    from lenslrp.prompt_file import STDIN, lines_of, prompts_of

    share = rank_and_world()
    if options.data == STDIN and share[1] > 1:
        raise InputError("several processes cannot share standard input: give a file")
    require_place(options.out)
    total = None
    if options.data != STDIN:
        total = sum(1 for line in lines_of(options.data) if line.strip())
    if share[1] > 1 and options.device is None:
        options.device = own_device()
    counted, others = itertools.tee(prompts_of(options.data, _target(options.target)))
    result = explain_to(
        options.out,
        load_model(options),
        (prompt for prompt, _ in counted),
        (target for _, target in others),
        composite=composite(options.composite),
        batch_size=options.batch_size,
        shard=share,
        progress=share[0] == 0,
        total=total,
    )
    for index, why in result.skipped[:REASONS_SHOWN]:
        print(f"lenslrp: line {index + 1}: {why}", file=sys.stderr)
    if len(result.skipped) > REASONS_SHOWN:
        print(f"lenslrp: and {len(result.skipped) - REASONS_SHOWN} more lines", file=sys.stderr)
    print(result)
    return BAD_INPUT if result.skipped else OK


def _explain(options: argparse.Namespace) -> int:
    from lenslrp.analysis.views.checks import checked
    from lenslrp.analysis.views.report import write_report
    from lenslrp.errors import InputError
    from lenslrp.sessions import Session

    report, why_not = _report_path(options.report)
    model = load_model(options)
    with Session(model, composite(options.composite)) as session:
        _, relevance = session.run_with_relevance(options.prompt, _target(options.target))
    if report is not None:
        write_keeping(report, lambda: write_report(relevance, report, model=model))
    try:
        checks = checked(model, relevance)
    except InputError:  # no text of a decoder: the report says why
        checks = None
    if options.json:
        print(json.dumps(_summary(relevance, checks, report)))
    else:
        _show(relevance, checks, report)
    if why_not is not None:
        print(f"lenslrp: no report is written: {why_not}", file=sys.stderr)
    return OK


def _generate(options: argparse.Namespace) -> int:
    from rich.text import Text

    from lenslrp.analysis.views.report import write_report
    from lenslrp.files import HTML
    from lenslrp.generation import explain_generation
    from lenslrp.text.visible_text import visible

    report = options.report or Path(DEFAULT_REPORT)
    check_writable("--report", report, HTML)
    written = explain_generation(
        load_model(options), options.prompt, max_new_tokens=options.generate,
        composite=composite(options.composite),
    )  # fmt: skip
    write_keeping(report, lambda: write_report(written, report))
    table = written.to_dataframe()
    if options.json:
        rows = table.groupby("row")["relevance"].apply(list).tolist()
        print(
            json.dumps(
                {
                    "model": written.model_name,
                    "composite": written.composite,
                    "tokens": written.str_tokens,
                    "start": written.start,
                    "log_probs": written.log_probs.tolist(),
                    "relevance": rows,
                    "ledgers": [ledger.to_dict() for ledger in written.ledgers],
                    "report": str(report.absolute()),
                }
            )
        )
        return OK
    screen = console()
    screen.print(Text(visible("".join(written.written))))
    for row, of_row in table.groupby("row"):
        best = of_row.sort_values("relevance", key=abs, ascending=False)[:SOURCES_SHOWN]
        sources = ", ".join(
            f"{visible(token)!r} ({position}) {relevance:+.3g}"
            for token, position, relevance in zip(
                best["token"], best["position"], best["relevance"], strict=True
            )
        )
        token, value = visible(written.written[int(str(row))]), of_row["value"].iloc[0]
        screen.print(Text(f"  {token!r:<16} {value:>+8.3f}  from {sources}"), soft_wrap=True)
    screen.print(Text(f"report: {report.absolute()}"), soft_wrap=True)
    return OK


def _report_path(requested: Path | None) -> tuple[Path | None, Exception | None]:
    """Where the report goes, or why it is not written: its extra is missing.

    Raises:
        InputError: no file can be written there.
        MissingExtraError: it was asked for.
    """
    from lenslrp.analysis.views.report import require_report
    from lenslrp.errors import MissingExtraError
    from lenslrp.files import HTML

    path = requested or Path(DEFAULT_REPORT)
    check_writable("--report", path, HTML)
    try:
        require_report()
    except MissingExtraError as error:
        if requested is not None:
            raise
        return None, error
    return path, None


def _show(relevance: RelevanceCache, checks: Checks | None, report: Path | None) -> None:
    from rich.text import Text

    from lenslrp.views.terminal import render

    screen = console()
    screen.print(render(relevance))
    for term, value in _ledger(relevance).items():
        screen.print(Text(f"  {term:<18} {value:>+14.6g}"))
    if checks is not None:
        screen.print(Text(str(checks)), soft_wrap=True)
    if report is not None:
        screen.print(Text(f"report: {report.absolute()}"), soft_wrap=True)


def _ledger(relevance: RelevanceCache) -> dict[str, float]:
    ledger = relevance.ledger()
    terms = ("leaves", "biases", "softmax", "recurrence", "positional", "stabiliser", "plain")
    names = ("target", *terms, "nonlinear_target", "error")
    return {name: float(getattr(ledger, name)) for name in names}


def _summary(
    relevance: RelevanceCache, checks: Checks | None, report: Path | None
) -> dict[str, Any]:
    return {
        "model": relevance.model_name,
        "composite": relevance.composite.name,
        "target": relevance.target.text,
        "value": float(relevance.target.value[0]),
        "tokens": relevance.str_tokens[0],
        "relevance": relevance.tokens[0].tolist(),
        "ledger": _ledger(relevance),
        "uncovered": [str(site) for site in relevance.coverage.uncovered],
        "checks": checks
        and {
            **asdict(checks),
            "trials": [{**asdict(trial), "agrees": trial.agrees} for trial in checks.trials],
        },
        "report": None if report is None else str(report.absolute()),
    }
