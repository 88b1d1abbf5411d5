"""The command line: ``lenslrp explain``, ``doctor``, ``dictionary`` and ``evaluate``.

Exit codes: 0 the question was answered, 1 the model is not covered or not loadable or an extra is
not installed, 2 bad usage or bad input. Results go to standard output, progress and messages to
standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lenslrp.cli.dictionary import add_dictionary
from lenslrp.cli.evaluate import add_evaluate
from lenslrp.cli.explain import add_explain
from lenslrp.cli.options import (
    BAD_INPUT,
    NOT_COVERED,
    OK,
    add_model_options,
    composite,
    console,
    load_model,
    require_utf8,
)
from lenslrp.version import VERSION


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments_given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments_given)
    # torch takes seconds to import: not before the command line is known to be right
    from lenslrp.errors import CoverageError, InputError, LoadError, MissingExtraError, StorageError

    try:
        require_utf8(arguments_given)
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
    parser.add_argument("--version", action="version", version=f"lenslrp {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    add_explain(commands)
    doctor = commands.add_parser(
        "doctor",
        help="check that every operation of a model has a rule",
        description="Which rule sits where, what has none, and whether the ledger balances on a "
        "random prompt. Exit code 1 if anything is uncovered or does not balance.",
    )
    doctor.set_defaults(run=_doctor)
    add_model_options(doctor, "model")
    add_dictionary(commands)
    add_evaluate(commands)
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from lenslrp.models.doctor import examine

    diagnosis = examine(load_model(options), composite(options.composite))
    console().print(diagnosis.render())
    return OK if diagnosis.ok else NOT_COVERED
