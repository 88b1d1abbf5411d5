"""What relevance costs: LensLRP against the plain bridge, Hugging Face, and LXT.

    python benchmarks/overhead.py [--lxt-python PATH] [--sizes t256 t1024] [--repeats 15]

Every configuration runs the same pass on the same weights and tokens (`cost_measure.py`). Rounds
are interleaved: in each round every configuration runs once, in an order drawn anew, one at a time,
across processes too. Ratios are formed within a round and then summarised. LXT needs an older
transformers, so with `--lxt-python` (the interpreter of an environment with `lxt` and the same
torch) it runs in worker processes; Hugging Face runs in that environment as well, which shows how
much of a difference is the environment's. Tables are markdown on standard output; nothing here
fails because of a timing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from cost_bridge import all_hooks_pass, build_bridge, plain_pass, rules_pass
from cost_measure import (
    SMOLLM2,
    Pass,
    Shape,
    Summary,
    build_llama,
    hugging_face_pass,
    interleave,
    make_tokens,
    paired_ratio,
    peak_mib,
    save_weights,
    shape_to_json,
    wall_ms,
)
from torch import Tensor

from lenslrp.embedded import ensure_cached

TARGET = 7
SMALL = Shape(layers=4, d_model=512, d_mlp=1376, heads=8, kv_heads=8, vocabulary=1024)
SIZES: dict[str, tuple[Shape, int, int]] = {  # name -> shape, batch, length
    "t256": (SMALL, 2, 256),
    "t1024": (SMALL, 1, 1024),
    "smollm2-t256": (SMOLLM2, 1, 256),
    "smollm2-t1024": (SMOLLM2, 1, 1024),
}

HF_EAGER, HF_SDPA = "Hugging Face, eager", "Hugging Face, sdpa"
PLAIN, RULES, ALL = "bridge, plain", "bridge + rules", "bridge + rules + all hooks read"
FUSED = 'bridge + rules, attention="fused"'
LXT_HF, LXT = "Hugging Face, sdpa (LXT's environment)", "LXT, sdpa"
CASES = {
    "hf-eager": HF_EAGER,
    "hf-sdpa": HF_SDPA,
    "bridge": PLAIN,
    "rules": RULES,
    "all-hooks": ALL,
    "fused": FUSED,
    "lxt-hf": LXT_HF,
    "lxt": LXT,
}
ATTNLRP = (RULES, ALL, FUSED, LXT)
"""Configurations that must agree about token relevance."""


@dataclass(frozen=True)
class Limit:
    """One promised bound: `case` costs at most `bound` times `reference`."""

    case: str
    reference: str
    quantity: str
    bound: float


LIMITS = (
    Limit(RULES, PLAIN, "time", 1.10),
    Limit(RULES, PLAIN, "memory", 1.00),
    Limit(ALL, PLAIN, "time", 1.25),
    Limit(FUSED, LXT, "time", 1.05),
)


@dataclass(frozen=True)
class Probe:
    """One configuration with its input bound: how to time it, and what it needs and returns."""

    time: Callable[[], float]
    peak: Callable[[], float]
    relevance: Callable[[], Tensor]


def local_probe(run: Pass, tokens: Tensor) -> Probe:
    """A configuration of this process."""
    return Probe(
        lambda: wall_ms(run, tokens, TARGET),
        lambda: peak_mib(run, tokens, TARGET),
        lambda: run(tokens, TARGET),
    )


class Worker:
    """A `cost_worker.py` process in another environment; one request at a time."""

    def __init__(self, python: str) -> None:
        """Start the process with the interpreter `python`."""
        script = Path(__file__).with_name("cost_worker.py")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [python, "-W", "ignore", str(script)],
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

    def probe(self) -> Probe:
        """A configuration of that process, once it has a model and an input."""
        return Probe(
            lambda: float(self.ask("time")["ms"]),
            lambda: float(self.ask("peak")["mib"]),
            lambda: torch.tensor(self.ask("relevance")["relevance"]),
        )


def start_worker(
    python: str, rules: str, shape: Shape, weights: Path, tokens: Tensor
) -> tuple[Worker, dict[str, str]]:
    """A worker with model and input, and the versions of its environment.

    SystemExit if its torch differs: then a ratio would compare two torches.
    """
    worker = Worker(python)
    answer = worker.ask(
        "load",
        shape=shape_to_json(shape),
        weights=str(weights),
        attention="sdpa",
        rules=rules,
        threads=torch.get_num_threads(),
    )
    if answer["versions"]["torch"] != version("torch"):
        raise SystemExit(
            f"torch {answer['versions']['torch']} in LXT's environment, {version('torch')} here; "
            "install the same one in both"
        )
    worker.ask("input", tokens=tokens.tolist(), target=TARGET)
    return worker, answer["versions"]


def weights_of(shape: Shape, folder: Path) -> Path:
    """The file of weights that every side loads: SmolLM2's own, or random ones in `folder`."""
    if shape == SMOLLM2:
        return ensure_cached("smollm2-135m") / "model.safetensors"
    path = folder / "model.safetensors"
    save_weights(build_llama(shape, "eager"), path)
    return path


def probes_of(
    names: list[str], shape: Shape, tokens: Tensor, lxt_python: str | None, stack: ExitStack
) -> dict[str, Probe]:
    """The configurations asked for, by their title, on the same weights and tokens."""
    weights = weights_of(shape, Path(stack.enter_context(tempfile.TemporaryDirectory())))
    probes: dict[str, Probe] = {}
    for name, attention in (("hf-eager", "eager"), ("hf-sdpa", "sdpa")):
        if name in names:
            model = build_llama(shape, attention, weights)
            probes[CASES[name]] = local_probe(hugging_face_pass(model), tokens)
    if lxt_python is not None:
        for name, rules in (("lxt-hf", "none"), ("lxt", "lxt")):
            if name in names:
                worker, versions = start_worker(lxt_python, rules, shape, weights, tokens)
                stack.enter_context(worker)
                probes[CASES[name]] = worker.probe()
                print(f"{CASES[name]}: {versions}", file=sys.stderr)
    bridge = build_bridge(build_llama(shape, "eager", weights))
    passes = {
        "bridge": lambda: plain_pass(bridge),
        "rules": lambda: rules_pass(bridge),
        "all-hooks": lambda: all_hooks_pass(bridge),
        "fused": lambda: rules_pass(bridge, attention="fused"),
    }
    for name, make in passes.items():
        if name in names:
            probes[CASES[name]] = local_probe(make(), tokens)
    return {title: probes[title] for title in CASES.values() if title in probes}


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two relevance tensors, in float64."""
    return torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def print_agreement(relevance: dict[str, Tensor]) -> None:
    """Whether the configurations compared compute the same thing."""
    titles = [title for title in ATTNLRP if title in relevance]
    for title in titles[:-1]:
        print(
            f"- token relevance, {title} against {titles[-1]}: "
            f"cosine {cosine(relevance[title], relevance[titles[-1]]):.9f}"
        )
    if PLAIN in relevance and HF_EAGER in relevance:
        print(
            f"- Gradient x Input, {PLAIN} against {HF_EAGER}: "
            f"cosine {cosine(relevance[PLAIN], relevance[HF_EAGER]):.9f}"
        )


def print_costs(times: dict[str, list[float]], peaks: dict[str, float]) -> None:
    """The table of one size. Ratios are to the plain bridge, or else to the first row."""
    reference = PLAIN if PLAIN in times else next(iter(times))
    print(
        "| configuration | median ms | min ms | quartiles ms | time ratio (quartiles) "
        "| peak MiB | memory ratio |\n|---|---|---|---|---|---|---|"
    )
    for title, values in times.items():
        summary, ratio = Summary.of(values), paired_ratio(values, times[reference])
        print(
            f"| {title} | {summary.median:.0f} | {summary.minimum:.0f} "
            f"| {summary.low:.0f} to {summary.high:.0f} "
            f"| {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) "
            f"| {peaks[title]:.1f} | {peaks[title] / peaks[reference]:.3f} |"
        )
    print(f"\nRatios are to: {reference}.\n")


def print_limits(times: dict[str, list[float]], peaks: dict[str, float], length: int) -> None:
    """The promised bounds that this run can judge (LXT's holds for long sequences only)."""
    rows = []
    for limit in LIMITS:
        known = limit.case in times and limit.reference in times
        if not known or (limit.reference == LXT and length < 1024):
            continue
        if limit.quantity == "time":
            measured = paired_ratio(times[limit.case], times[limit.reference]).median
        else:
            measured = peaks[limit.case] / peaks[limit.reference]
        rows.append(
            f"| {limit.quantity}: {limit.case} / {limit.reference} | <= {limit.bound:.2f} "
            f"| {measured:.3f} | {'yes' if measured <= limit.bound else 'no'} |"
        )
    if rows:
        print("| bound | promised | measured | met |\n|---|---|---|---|")
        print("\n".join(rows) + "\n")


def measure(size: str, names: list[str], lxt_python: str | None, repeats: int, warm: int) -> None:
    """Measure one size and print its tables."""
    shape, batch, length = SIZES[size]
    tokens = make_tokens(shape, batch, length)
    print(f"### {size}: {shape.layers} layers, d_model {shape.d_model}, T={length}, B={batch}\n")
    with ExitStack() as stack:
        probes = probes_of(names, shape, tokens, lxt_python, stack)
        relevance = {title: probe.relevance() for title, probe in probes.items()}
        interleave({title: probe.time for title, probe in probes.items()}, warm)
        times = interleave({title: probe.time for title, probe in probes.items()}, repeats)
        peaks = {title: probe.peak() for title, probe in probes.items()}
    print_costs(times, peaks)
    print_limits(times, peaks, length)
    print_agreement(relevance)
    print(flush=True)


def main() -> None:
    """Parse the options, state the conditions, and measure the sizes asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["t256", "t1024"])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--warm", type=int, default=2, help="untimed rounds (default 2)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument("--lxt-python", help="python of an environment with lxt and this torch")
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error(f"--repeats must be at least 2, not {options.repeats}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "transformer-lens"))
    print(
        f"{packages}; Python {platform.python_version()}; {torch.get_num_threads()} threads on "
        f"{os.cpu_count()} processors; {options.repeats} interleaved rounds after {options.warm}\n"
    )
    for size in options.sizes:
        measure(size, options.only, options.lxt_python, options.repeats, options.warm)


if __name__ == "__main__":
    main()
