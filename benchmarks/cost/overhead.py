"""What relevance costs in CPU time: a model in LensLRP, the plain bridge, and LXT.

    python -m benchmarks.cost.overhead time [--lengths 12 64 256 1024] [--resume results/time.jsonl]
    python -m benchmarks.cost.overhead time --model qwen3-next --lengths 256 1024
    python -m benchmarks.cost.overhead lxt --lxt-python PATH [--resume results/lxt.jsonl]

`time` sets the cases of `bridge.py` beside the plain bridge's forward and backward pass (all
logits, frozen weights, its hook entered at each call), `lxt` a session with `attention="fused"`
beside LXT on Hugging Face sdpa, which runs in a process and an environment of its own, with the
same torch; `memory.py peaks` is about memory. SmolLM2-135M, or for `time` also a recurrent model of
random weights. Float32, one thread, random tokens, one logit at the
last position.

Rounds are interleaved: in each round every case runs once, in an order drawn anew, one at a time,
across processes too. Each case has a model of its own, so that its session is opened once, before
the first round, and no case changes another's hooks; the models share the memory of their weights.
Two untimed rounds come before. CPU time is `getrusage`'s of the process that works, user and system
apart; ratios, of their sum and of user time alone, are formed within a round and then summarised.
With `--resume` the rounds are kept in a file as they are made, and another run goes on after them.
Tables are markdown on standard output. Nothing here fails because of a timing; where cases that
should agree about relevance do not, it ends with an error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import ROOT
from benchmarks.cost.bridge import (
    CASES,
    MODELS,
    PLAIN,
    SMOLLM,
    Case,
    build_bridge,
    plain_pass,
    relevance_pass,
    time_bar,
    vocabulary_of,
)
from benchmarks.cost.measure import (
    SMOLLM2,
    Times,
    cpu_seconds,
    make_tokens,
    peak_mib,
    quartiles,
    verdict,
)
from lenslrp.analysis.common.journal import Row, resumed
from lenslrp.models.embedded import ensure_cached

WARM = 2
THP = "THP_MEM_ALLOC_ENABLE"
"""torch's own switch for large pages; it changes system time."""
AGREE = 1e-4
"""The largest difference between two cases' relevance, as a share of the largest value."""


class Line(NamedTuple):
    """One row of a table: a case, what it is compared with, and the ratio that is allowed."""

    case: str
    title: str
    reference: str
    bar: float | None


class Worker:
    """A `benchmarks.cost.worker` process in another environment; one request at a time."""

    def __init__(self, python: str) -> None:
        """Start the process with the interpreter `python`."""
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [python, "-W", "ignore", "-m", "benchmarks.cost.worker"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Worker:
        """The worker itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """The answer to one request; RuntimeError when the process has ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"op": op, **fields}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker process ended at {op!r}; its message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def kept(path: Path | None, settings: Row) -> Iterator[tuple[list[Row], Callable[[Row], None]]]:
    """What an earlier run has left in the file, and what adds to it; without a file, nothing."""
    if path is None:
        yield [], lambda row: None
    else:
        with resumed(path, settings) as done:
            yield done


def interleaved(
    timers: Mapping[str, Callable[[], Times]],
    length: int,
    rounds: int,
    rows: list[Row],
    append: Callable[[Row], None],
) -> list[dict[str, Times]]:
    """CPU seconds of each case in each round: those of ``rows``, and then new ones."""
    done: list[dict[str, Times]] = [
        row["seconds"] for row in rows if row["length"] == length and "seconds" in row
    ]
    if len(done) < rounds:
        for timer in [*timers.values()] * WARM:
            timer()
    for number in range(len(done), rounds):
        names = list(timers)
        random.Random(f"{length} tokens, round {number}").shuffle(names)
        done.append({name: timers[name]() for name in names})
        append({"length": length, "seconds": done[-1]})
        print(f"{length} tokens: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return done


def print_times(done: list[dict[str, Times]], lines: list[Line]) -> None:
    """Milliseconds of each case, and its ratio to its reference within a round."""
    print(
        "| case | user ms | system ms | CPU time to | ratio (quartiles) | user time alone | bar "
        "| met |\n" + "|---" * 8 + "|"
    )
    for line in lines:
        times, baseline = ([row[name] for row in done] for name in (line.case, line.reference))
        user, system = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        pairs = list(zip(times, baseline, strict=True))
        low, ratio, high = quartiles(sum(a) / sum(b) for a, b in pairs)
        alone = statistics.median(a[0] / b[0] for a, b in pairs)
        print(
            f"| {line.title} | {user:.0f} | {system:.0f} | {line.reference} "
            f"| {ratio:.3f} ({low:.3f} to {high:.3f}) | {alone:.3f} | {verdict(ratio, line.bar)} |"
        )
    print(f"\n{len(done)} rounds.", flush=True)


def difference(first: Tensor, second: Tensor) -> float:
    """The largest difference, as a share of the largest value of the second."""
    return ((first - second).abs().max() / second.abs().max()).item()


def require_agreement(length: int, relevance: Mapping[str, Tensor]) -> None:
    """Print how far the cases' relevance is from the last one's.

    SystemExit if two of them explain something else.
    """
    *names, last = relevance
    differences = {name: difference(relevance[name], relevance[last]) for name in names}
    if differences:
        said = ", ".join(f"{name} {value:.0e}" for name, value in differences.items())
        print(f"Relevance differs from {last}'s by (of its largest): {said}.")
    if any(not value <= AGREE for value in differences.values()):
        raise SystemExit(f"{length} tokens: the cases do not explain the same thing")


def time(options: argparse.Namespace) -> None:
    """The cases of ``bridge.py`` against the plain bridge."""
    cases = {name: CASES[name] for name in options.cases}
    with ExitStack() as stack:
        settings = {**conditions(), "model": options.model, "cases": list(cases)}
        rows, append = stack.enter_context(kept(options.resume, settings))
        bridge = build_bridge(name=options.model)
        runs = {
            name: relevance_pass(build_bridge(weights=bridge, name=options.model), case, stack)
            for name, case in cases.items()
        }
        for length in options.lengths:
            print(f"\n### {length} tokens\n", flush=True)
            tokens = make_tokens(vocabulary_of(options.model), length)
            require_agreement(length, {name: run(tokens) for name, run in runs.items()})
            timers = {
                name: partial(cpu_seconds, run, tokens)
                for name, run in {PLAIN: plain_pass(bridge), **runs}.items()
            }
            done = interleaved(timers, length, options.rounds, rows, append)
            lines = [Line(PLAIN, "plain bridge, all logits", PLAIN, None)]
            lines += [
                Line(n, c.title, PLAIN, time_bar(options.model, n, length))
                for n, c in cases.items()
            ]
            print_times(done, lines)


def lxt(options: argparse.Namespace) -> None:
    """A session with fused attention against LXT, time and memory."""
    lines = [
        Line("target", "LensLRP, target's logits", "LXT target", 1.0),
        Line("all", "LensLRP, all logits", "LXT all", None),
        Line("LXT target", "LXT, target's logits", "LXT target", None),
        Line("LXT all", "LXT, all logits", "LXT all", None),
    ]
    with ExitStack() as stack:
        worker = stack.enter_context(Worker(options.lxt_python))
        weights = ensure_cached("smollm2-135m") / "model.safetensors"
        theirs = worker.ask("load", weights=str(weights))["versions"]
        if theirs["torch"] != version("torch"):  # a ratio would compare two torches
            raise SystemExit(
                f"torch {theirs['torch']} in LXT's environment, {version('torch')} here; "
                "install the same one in both"
            )
        print(f"LXT's environment: {theirs}\n")
        settings = {**conditions(), "lxt": theirs}
        rows, append = stack.enter_context(kept(options.resume, settings))
        bridge = build_bridge()
        passes = {
            logits: relevance_pass(
                build_bridge(weights=bridge), Case("", True, logits, False, {}), stack, "fused"
            )
            for logits in ("target", "all")
        }
        for length in options.lengths:
            print(f"\n### {length} tokens\n", flush=True)
            tokens = make_tokens(SMOLLM2.vocabulary, length)
            worker.ask("input", tokens=tokens.tolist())

            def answer(op: str, logits: str, key: str) -> Any:
                return worker.ask(op, logits=logits)[key]

            relevance = {name: run(tokens) for name, run in passes.items()}
            timers = {name: partial(cpu_seconds, run, tokens) for name, run in passes.items()}
            for logits in passes:
                relevance[f"LXT {logits}"] = torch.tensor(answer("relevance", logits, "relevance"))
                timers[f"LXT {logits}"] = partial(answer, "time", logits, "seconds")
            require_agreement(length, relevance)
            print_times(interleaved(timers, length, options.rounds, rows, append), lines)
            print("\n| case | peak MiB | to LXT's | bar | met |\n" + "|---" * 5 + "|")
            for line in lines[:2]:
                mine, other = peak_mib(passes[line.case], tokens), answer("peak", line.case, "mib")
                said = f"{mine:.1f}; LXT {other:.1f} | {mine / other:.3f}"
                print(f"| {line.title} | {said} | {verdict(mine / other, line.bar)} |", flush=True)


def conditions() -> Row:
    """What decides about the figures and is no option."""
    packages = ("torch", "transformers", "transformer-lens")
    versions: Row = {name: version(name) for name in packages}
    return {**versions, THP: os.environ.get(THP)}


def main() -> None:
    """Parse the options, state the conditions, and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    actions = parser.add_subparsers(required=True)
    timing, comparing = actions.add_parser("time"), actions.add_parser("lxt")
    timing.add_argument("--model", choices=MODELS, default=SMOLLM)
    timing.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    comparing.add_argument("--lxt-python", required=True, help="of an environment with lxt")
    for action, run, lengths in (
        (timing, time, [12, 64, 256, 1024]),
        (comparing, lxt, [64, 256, 1024]),
    ):
        action.add_argument("--lengths", type=int, nargs="+", default=lengths)
        action.add_argument("--rounds", type=int, default=9, help="timed rounds (default 9)")
        action.add_argument("--resume", type=Path, help="where rounds are kept")
        action.set_defaults(run=run)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, not {options.rounds}")
    torch.set_num_threads(1)
    print(f"{conditions()}, Python {platform.python_version()}, {os.cpu_count()} processors")
    options.run(options)


if __name__ == "__main__":
    main()
