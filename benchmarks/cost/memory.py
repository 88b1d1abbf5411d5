"""Memory of one explanation: beside the plain bridge's, and against layers and length.

    python -m benchmarks.cost.memory peaks  # SmolLM2, float32 and bfloat16, its bars
    python -m benchmarks.cost.memory peaks --model mamba2 --lengths 1024 8192 --dtypes float32
    python -m benchmarks.cost.memory count  # exact, from shapes: minutes, no memory
    python -m benchmarks.cost.memory count --model llama-3-8b --lengths 32768 --dtypes bfloat16 \
        --attention fused --checkpoint yes --logits target
    python -m benchmarks.cost.memory measure --lengths 4096 --attention bridge --read all
    python -m benchmarks.cost.memory packed  # SmolLM2 in 4 and 8 bits beside float32, 5 minutes

``peaks`` is what torch allocates in one pass of each case of ``bridge.py``, above what was
held before it (``measure.py``). ``count`` is ``lenslrp.survey``: the whole pass on tensors
without storage, every allocation counted. ``measure`` runs the pass in a process of its own and
asks the system for its high-water mark, so it contains Python, torch and the weights. Their models
are Llamas of the sizes of SmolLM2-135M, LLaMA 2 7B or Llama 3 8B, with random weights; truncated
where fewer layers are asked for. ``packed`` loads and explains the real SmolLM2, packed
and not, in a process each: bytes of the weights, what torch allocates above them in a pass, and
the high-water marks of loading and of all, less that of a process that has only imported. One
logit at the last position is explained, AttnLRP, ledger on. Tables are markdown on standard output.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

import lenslrp
from benchmarks import ROOT
from benchmarks.cost.bridge import (
    CASES,
    MODELS,
    PLAIN,
    RECURRENT,
    RECURRENT_MEMORY,
    SMOLLM,
    build_bridge,
    plain_pass,
    relevance_pass,
    vocabulary_of,
)
from benchmarks.cost.measure import SMOLLM2, TARGET, Shape, make_tokens, peak_mib, verdict
from lenslrp.models.surveying import Survey

GIB, MIB = 2**30, 2**20
SHAPES = {
    SMOLLM: SMOLLM2,
    "llama-2-7b": Shape(
        layers=32, d_model=4096, d_mlp=11008, heads=32, kv_heads=32, vocabulary=32000
    ),
    "llama-3-8b": Shape(
        layers=32, d_model=4096, d_mlp=14336, heads=32, kv_heads=8, vocabulary=128256
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
READ: dict[str, Any] = {"none": [], "resid": "hook_resid_post", "all": None}
MMAP = {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
"""glibc gives blocks above this size back to the system at once; see the README."""
OF_PLAIN = {("target-tokens", 256): 0.90, ("target-tokens", 1024): 0.90}
"""What a case of SmolLM2's at a length may hold, as a multiple of the plain pass's peak."""


def memory_bar(model: str, case: str, length: int) -> float | None:
    """What a case may hold, as a multiple of the plain pass's peak."""
    return RECURRENT_MEMORY if model in RECURRENT else OF_PLAIN.get((case, length))


def print_peaks(options: argparse.Namespace) -> None:
    """Peaks of a model's passes, beside the plain pass's and the first type's."""
    print(
        "| type | tokens | case | peak MiB | to plain | bar | met "
        f"| to {options.dtypes[0]} | bar | met |\n" + "|---" * 10 + "|"
    )
    peaks: dict[tuple[str, str, int], float] = {}
    for dtype, length in itertools.product(options.dtypes, options.lengths):
        bridge = build_bridge(DTYPES[dtype], name=options.model)
        tokens = make_tokens(vocabulary_of(options.model), length)
        for case in (PLAIN, *options.cases):
            with ExitStack() as stack:
                plain = case == PLAIN
                run = plain_pass(bridge) if plain else relevance_pass(bridge, CASES[case], stack)
                run(tokens)  # what is looked at once, in the first call, is no pass's memory
                peak = peaks[dtype, case, length] = peak_mib(run, tokens)
            ratios = (
                (peak / peaks[dtype, PLAIN, length], memory_bar(options.model, case, length)),
                (peak / peaks[options.dtypes[0], case, length], 1.00),
            )
            cells = [f"{r:.3f} | {verdict(r, bar)}" for r, bar in ratios]
            name = PLAIN if plain else CASES[case].title
            print(f"| {dtype} | {length} | {name} | {peak:.1f} | {' | '.join(cells)} |", flush=True)


def cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One dictionary a configuration, in the order of the tables."""
    keys = ("dtype", "attention", "checkpoint", "logits", "read", "layers", "length")
    values = itertools.product(
        options.dtypes,
        options.attention,
        options.checkpoint,
        options.logits,
        options.read,
        options.layers,
        options.lengths,
    )
    return [dict(zip(keys, value, strict=True)) for value in values]


def keywords(case: dict[str, Any]) -> dict[str, Any]:
    """What both ``survey`` and ``run_with_relevance`` take."""
    return {
        "attention": case["attention"],
        "checkpoint": case["checkpoint"] == "yes",
        "logits": case["logits"],
        "names_filter": READ[case["read"]],
        "reduce": "sum",
    }


def counted(shape: Shape, case: dict[str, Any]) -> Survey:
    """The pass on shapes alone."""
    config = replace(shape, layers=case["layers"]).config()
    return lenslrp.survey(
        config, length=case["length"], dtype=DTYPES[case["dtype"]], **keywords(case)
    )


def print_counts(shape: Shape, options: argparse.Namespace) -> None:
    print(
        "| type | attention | checkpoint | logits | read | layers | tokens | weights GiB "
        "| peak besides GiB | held between passes GiB | 1e12 operations |\n" + "|---" * 11 + "|"
    )
    surveys: list[tuple[dict[str, Any], Survey]] = []
    for case in cases(options):
        result = counted(shape, case)
        surveys.append((case, result))
        cells = [str(value) for value in case.values()]
        numbers = (result.weights / GIB, result.peak / GIB, result.held / GIB, result.flops / 1e12)
        cells += [f"{number:.3f}" for number in numbers]
        print("| " + " | ".join(cells) + " |", flush=True)
    print_growth(shape, options, surveys)


def print_growth(
    shape: Shape, options: argparse.Namespace, surveys: list[tuple[dict[str, Any], Survey]]
) -> None:
    """What one more layer holds, in residual streams, where several numbers of them were asked."""
    if len(options.layers) < 2:
        return
    print("\n| configuration | tokens | one more layer holds | in residual streams | exponent |")
    print("|---|---|---|---|---|")
    groups: dict[tuple[Any, ...], list[tuple[int, Survey]]] = {}
    for case, result in surveys:
        key = tuple(v for k, v in case.items() if k != "layers")
        groups.setdefault(key, []).append((case["layers"], result))
    for (dtype, attention, checkpoint, logits, read, length), rows in groups.items():
        layers = torch.tensor([float(n) for n, _ in rows], dtype=torch.float64)
        held = torch.tensor([float(r.held) for _, r in rows], dtype=torch.float64)
        slope, constant = torch.linalg.lstsq(
            torch.stack([layers, torch.ones_like(layers)], dim=1), held[:, None]
        ).solution[:, 0]
        grown = (held - constant).clamp(min=1).log()
        exponent = float((grown[-1] - grown[0]) / (layers[-1] / layers[0]).log())
        residual = length * shape.d_model * DTYPES[dtype].itemsize
        print(
            f"| {dtype}, {attention}, checkpoint {checkpoint}, {logits} logits, read {read} "
            f"| {length} | {float(slope) / MIB:.2f} MiB | {float(slope) / residual:.2f} "
            f"| {exponent:.3f} |"
        )


def measure_here(shape: Shape, case: dict[str, Any]) -> dict[str, float]:
    """High-water marks of this process: before the pass, and after it."""
    from transformers import LlamaForCausalLM

    small = replace(shape, layers=case["layers"])
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[case["dtype"]])
    model = lenslrp.load(LlamaForCausalLM(small.config()).eval())
    torch.set_default_dtype(before)
    tokens = make_tokens(small.vocabulary, case["length"])
    base = high_water()
    start = time.perf_counter()
    _, relevance = lenslrp.run_with_relevance(model, tokens, TARGET, **keywords(case))
    seconds = time.perf_counter() - start
    return {
        "base": base,
        "peak": high_water(),
        "seconds": seconds,
        "error": relevance.ledger().error,
    }


PACKED: dict[str, tuple[torch.dtype, dict[str, Any] | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "nf4, the rest float32": (torch.float32, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "nf4, the rest bfloat16": (
        torch.bfloat16, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "int8, the rest float32": (torch.float32, {"load_in_8bit": True}),
}  # fmt: skip
"""Types of the weights that are not packed, and how bitsandbytes packs those of linear layers."""


def measure_packed(kind: str, length: int) -> dict[str, float]:
    """Weights, peak of a pass and high-water marks of this process, MiB."""
    from transformers import BitsAndBytesConfig

    dtype, settings = PACKED[kind]
    config = None if settings is None else BitsAndBytesConfig(**settings)
    imported = high_water()
    model = lenslrp.load(
        "smollm2-135m", dtype=dtype, device="cpu", verify=False, quantization_config=config
    )
    loaded = high_water()
    weights = {w.data_ptr(): w.nbytes for w in model.original_model.parameters()}
    tokens = make_tokens(SMOLLM2.vocabulary, length)
    with ExitStack() as stack:
        run = relevance_pass(model, CASES["target-tokens"], stack)
        run(tokens)
        peak = peak_mib(run, tokens)
    marks = {"loading": loaded - imported, "all": high_water() - imported}
    return {
        "weights": sum(weights.values()) / MIB,
        "peak": peak,
        **{name: gib * GIB / MIB for name, gib in marks.items()},
    }


def print_packed(options: argparse.Namespace) -> None:
    print(
        "| weights | tokens | weights MiB | peak of a pass besides MiB | together | to float32 "
        "| high water of loading MiB | of all MiB |\n" + "|---" * 8 + "|"
    )
    first: dict[int, float] = {}
    for kind, length in itertools.product(PACKED, options.lengths):
        command = [*ONE, "--packed", kind, "--lengths", str(length)]
        environment = {**os.environ, **MMAP}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        found = json.loads(done.stdout.strip().splitlines()[-1])
        both = found["weights"] + found["peak"]
        ratio = both / first.setdefault(length, both)
        cells = [f"{found['weights']:.0f}", f"{found['peak']:.0f}", f"{both:.0f}", f"{ratio:.2f}"]
        cells += [f"{found[name]:.0f}" for name in ("loading", "all")]
        print(f"| {kind} | {length} | {' | '.join(cells)} |", flush=True)


def high_water() -> float:
    """GiB, as Linux counts them (in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


ONE = [sys.executable, "-W", "ignore", "-m", "benchmarks.cost.memory", "one"]


def print_measured(options: argparse.Namespace) -> None:
    print(
        "| type | attention | checkpoint | logits | read | layers | tokens | malloc "
        "| before the pass GiB | high water GiB | seconds | ledger's error |\n" + "|---" * 12 + "|"
    )
    for case, malloc in itertools.product(cases(options), options.malloc):
        command = [*ONE, "--model", options.model]
        environment = {**os.environ, **(MMAP if malloc == "mmap" else {})}
        done = subprocess.run(
            [*command, "--case", json.dumps(case)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            print(f"{case}: exit {done.returncode}: {done.stderr[-300:]}", file=sys.stderr)
            continue
        measured = json.loads(done.stdout.strip().splitlines()[-1])
        cells = [*map(str, case.values()), malloc]
        cells += [f"{measured[k]:.2f}" for k in ("base", "peak", "seconds")]
        print("| " + " | ".join([*cells, f"{measured['error']:.0e}"]) + " |", flush=True)


def main() -> None:
    """Parse the options and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("peaks", "count", "measure", "packed", "one"))
    parser.add_argument("--model", choices=[*SHAPES, *RECURRENT], default=SMOLLM)
    parser.add_argument("--layers", type=int, nargs="+", help="default: the model's")
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="default: 512 to 4096; peaks: 256 1024"
    )
    parser.add_argument(
        "--attention", nargs="+", choices=("bridge", "fused"), default=["bridge", "fused"]
    )
    parser.add_argument("--checkpoint", nargs="+", choices=("no", "yes"), default=["no", "yes"])
    parser.add_argument("--logits", nargs="+", choices=("all", "target"), default=["all"])
    parser.add_argument("--read", nargs="+", choices=READ, default=["none"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: float32; peaks: both")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="of peaks")
    parser.add_argument("--malloc", nargs="+", choices=("default", "mmap"), default=["mmap"])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--packed", choices=PACKED, help=argparse.SUPPRESS)
    options = parser.parse_args()
    peaks = options.what == "peaks"
    if options.model not in (MODELS if peaks else SHAPES):
        parser.error(f"{options.what} knows no {options.model}")
    shape = SHAPES.get(options.model, SMOLLM2)
    options.layers = options.layers or [shape.layers]
    lengths = {"peaks": [256, 1024], "packed": [256]}.get(options.what, [512, 1024, 2048, 4096])
    options.lengths = options.lengths or lengths
    options.dtypes = options.dtypes or (list(DTYPES) if peaks else ["float32"])
    if peaks:
        torch.set_num_threads(1)
        print_peaks(options)
    elif options.what == "packed":
        print_packed(options)
    elif options.packed:
        print(json.dumps(measure_packed(options.packed, options.lengths[0])))
    elif options.what == "one":
        print(json.dumps(measure_here(shape, json.loads(options.case))))
    elif options.what == "count":
        print_counts(shape, options)
    else:
        print_measured(options)


if __name__ == "__main__":
    main()
