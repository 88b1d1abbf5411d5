"""Random programs in tiny models: relevance is right, or refused.

``python -m tests.property.programs --count 20000 --seed 0 --jobs 2 --resume FILE`` judges the
programs of 20,000 seeds and prints how many were right, refused (and why) and wrong. With
``--resume`` each verdict is a line of a file, and a run that was interrupted goes on from there.
``--show SEED`` prints one program and its verdict; ``--shrink SEED`` the smallest part of it with
the same verdict.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tests.property.generate import generate
from tests.property.judge import judge
from tests.property.operations import OPS
from tests.property.program import Program
from tests.property.shrink import shrink
from tests.property.writer import FLAVOURS


def features(program: Program) -> list[str]:
    """What a program has in it, for the counts."""
    found = {f"host {program.host}", f"flavour {program.flavour}", program.dtype}
    found.update(program.options)
    found.add(program.composite)
    if program.latent:
        found.add("latent target")
    if program.batch > 1:
        found.add("batch")
    for part in program.parts:
        found.add(f"{part.kind} {part.place}" if part.kind == "module" else f"hook: {part.kind}")
        found.add("declared " + (part.declared or "nothing") if part.kind == "module" else "hook")
        if len(part.layers) > 1:
            found.add("shared module")
        for node in part.code:
            if node.op in OPS:
                found.update(OPS[node.op].tags)
            inplace = node.args and str(node.args[-1]) in ("mul_", "add_", "inplace", "clone")
            if inplace or "written" in node.args:
                found.add("inplace")
    if found & {"inplace", "view"}:
        found.add("inplace or view")
    return sorted(found)


def judge_seed(flavour: str, task: tuple[int, str]) -> dict[str, Any]:
    """One line of the journal."""
    seed, dtype = task
    program = generate(seed, dtype, flavour)
    verdict = judge(program)
    return {
        "seed": seed,
        "dtype": dtype,
        "kind": verdict.kind,
        "reason": verdict.reason,
        "expected": verdict.expected,
        "detail": verdict.detail[:300] if verdict.kind != "refused" else "",
        "features": features(program),
    }


def _worker() -> None:
    torch.set_num_threads(1)


def run(tasks: Iterable[tuple[int, str]], jobs: int, flavour: str) -> Iterator[dict[str, Any]]:
    one = partial(judge_seed, flavour)
    if jobs == 1:
        _worker()
        yield from map(one, tasks)
        return
    with get_context("spawn").Pool(jobs, _worker, maxtasksperchild=2000) as pool:
        yield from pool.imap_unordered(one, tasks, chunksize=20)


def report(lines: list[dict[str, Any]]) -> str:
    """The counts: verdicts, reasons, and verdicts by feature."""
    kinds = Counter(line["kind"] for line in lines)
    text = [f"{len(lines)} programs: " + ", ".join(f"{n} {k}" for k, n in kinds.most_common())]
    for kind in ("refused", "wrong", "invalid"):
        reasons = Counter(line["reason"] for line in lines if line["kind"] == kind)
        text += [f"\n{kind}:", *(f"  {n:6d}  {reason}" for reason, n in reasons.most_common(40))]
    over = [li for li in lines if li["kind"] == "refused" and li["expected"] == "sure"]
    reasons = Counter(line["reason"] for line in over)
    sure = sum(line["expected"] == "sure" for line in lines)
    text.append(f"\nrefused although every rule is known: {len(over)} of {sure}")
    text += [f"  {n:6d}  {reason}" for reason, n in reasons.most_common(20)]
    text.append(f"\n{'feature':32} {'all':>6} {'right':>6} {'refused':>8} {'wrong':>6}")
    for name in sorted({f for line in lines for f in line["features"]}):
        own = Counter(line["kind"] for line in lines if name in line["features"])
        text.append(
            f"{name:32} {sum(own.values()):6d} {own['right']:6d} {own['refused']:8d} "
            f"{own['wrong']:6d}"
        )
    return "\n".join(text)


def show(seed: int, dtype: str, flavour: str, smaller: bool) -> None:
    program = generate(seed, dtype, flavour)
    verdict = judge(program)
    print(program, verdict, sep="\n")
    if smaller:
        small, verdict = shrink(program, verdict)
        print("\nthe smallest that does the same:\n", small, verdict, small.to_json(), sep="\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--dtype", default="float64", choices=["float64", "bfloat16"])
    parser.add_argument("--flavour", default="", choices=FLAVOURS, help="of every program")
    parser.add_argument("--resume", type=Path, help="a journal to go on from")
    parser.add_argument("--show", type=int, help="print the program of one seed")
    parser.add_argument("--shrink", type=int, help="print the smallest part of it that does it too")
    parser.add_argument("--program", help="judge a program that was printed as JSON")
    given = parser.parse_args(arguments)
    if given.program is not None:
        program = Program.from_json(given.program)
        print(program, judge(program), sep="\n")
        return 0
    if given.show is not None or given.shrink is not None:
        seed = given.shrink if given.show is None else given.show
        show(seed, given.dtype, given.flavour, given.shrink is not None)
        return 0
    done: dict[tuple[int, str], dict[str, Any]] = {}
    if given.resume is not None and given.resume.exists():
        for line in map(json.loads, given.resume.read_text().splitlines()):
            done[line["seed"], line["dtype"]] = line
    lines = list(done.values())
    seeds = range(given.seed, given.seed + given.count)
    tasks = [(seed, given.dtype) for seed in seeds if (seed, given.dtype) not in done]
    start = time.monotonic()
    for number, line in enumerate(run(tasks, given.jobs, given.flavour), 1):
        lines.append(line)
        if given.resume is not None:
            with given.resume.open("a") as journal:
                print(json.dumps(line), file=journal)
        if line["kind"] == "wrong":
            print(f"seed {line['seed']} {line['dtype']}: {line['reason']}; {line['detail']}")
        if number % 500 == 0:
            rate = number / (time.monotonic() - start)
            print(f"{number} of {len(tasks)}, {rate:.1f} a second", file=sys.stderr)
    print(report(lines))
    return int(any(line["kind"] == "wrong" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
