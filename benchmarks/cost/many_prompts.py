"""What many prompts cost: ``explain_to`` against plain passes over its batches and single calls.

    python -m benchmarks.cost.many_prompts sizes  # how many tokens should share a batch?
    python -m benchmarks.cost.many_prompts cost [--prompts 1000] [--singles 1]

SmolLM2, prompts of 4 to 120 words cut from this repository's documentation, the model's own top
token explained, token relevance without a ledger, one thread, CPU time (user and system apart). The
plain pass is the bridge's forward and backward pass on frozen weights from the same logits, of all
positions, over the same batches, in a loop; it keeps nothing. ``cost`` goes in chunks of 64
prompts (``--chunk``), each of which is explained in every way, one after the other in an order
drawn anew, so ratios are formed within a chunk; the chunks lie in ``results/`` as they are made,
and an interrupted run goes on. Resident memory is printed at each chunk. A chunk is an
``explain_to`` of its own: attaching the rules is in its time, and its batches are cut from 64
prompts, not 1,024.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lenslrp
from benchmarks import RESULTS, ROOT
from lenslrp.analysis.common.journal import resumed
from lenslrp.explaining import BATCH_TOKENS, Batches, QueuedPrompt
from lenslrp.inputs import pad_rows
from lenslrp.text.tokenization import tokenize

CHUNK = 64
SIZES = (96, 192, 384, 768, 1536)


def texts() -> Iterator[str]:
    """Prompts of many lengths, the same at every run."""
    words = [
        word
        for path in sorted((ROOT / "docs").rglob("*.md"))
        for word in re.findall(r"[A-Za-z][A-Za-z',.;:-]*", path.read_text(encoding="utf-8"))
    ]
    draw = random.Random(0)
    while True:
        size = min(120, max(4, round(draw.lognormvariate(3.2, 0.7))))
        start = draw.randrange(len(words) - size)
        yield " ".join(words[start : start + size])


def batches_of(model: Any, prompts: list[str], batches: Batches) -> list[list[QueuedPrompt]]:
    """The batches that ``explain_to`` makes."""
    rows = [tokenize(model, text) for text in prompts]
    return batches.cut(QueuedPrompt(i, row, None, len(row), None) for i, row in enumerate(rows))


def plain_loop(model: Any, cut: list[list[QueuedPrompt]]) -> None:
    """Forward and backward passes from the top logits to the embeddings, and nothing else."""
    for batch in cut:
        tokens, mask = pad_rows(model, [list(prompt.given) for prompt in batch])
        last = torch.tensor([prompt.length - 1 for prompt in batch])
        kept: list[Tensor] = []

        def leaf(x: Tensor, hook: Any, kept: list[Tensor] = kept) -> Tensor:
            kept.append(x.detach().requires_grad_())
            return kept[-1]

        given = {} if mask is None else {"attention_mask": mask.long()}
        with model.hooks(fwd_hooks=[("hook_embed", leaf)]):
            logits = model(tokens, use_cache=False, **given)
            at_last = logits[torch.arange(len(batch)), last]
            torch.autograd.grad(at_last.max(dim=1).values.sum(), kept)


def cpu(call: Callable[[], Any]) -> tuple[float, float]:
    """User and system seconds of a call."""
    before = os.times()
    call()
    after = os.times()
    return after.user - before.user, after.system - before.system


def resident() -> float:
    """MiB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def build() -> Any:
    torch.set_num_threads(1)
    model = lenslrp.load("smollm2-135m")
    model.requires_grad_(False)
    return model


def sizes(options: argparse.Namespace) -> None:
    """Tokens a second of explaining one chunk, by the size of batches."""
    model = build()
    source = texts()
    prompts = [next(source) for _ in range(CHUNK)]
    total = sum(len(tokenize(model, text)) for text in prompts)
    rates: dict[int, list[float]] = {size: [] for size in SIZES}
    default = BATCH_TOKENS["cpu"]
    try:
        for _ in range(options.rounds):
            for size in random.sample(SIZES, len(SIZES)):
                BATCH_TOKENS["cpu"] = size
                with tempfile.TemporaryDirectory() as folder:
                    place = Path(folder) / "r.parquet"
                    seconds = sum(cpu(lambda p=place: lenslrp.explain_to(p, model, prompts)))
                rates[size].append(total / seconds)
                print(f"{size} tokens a batch: {rates[size][-1]:.0f} tokens/s", flush=True)
    finally:
        BATCH_TOKENS["cpu"] = default
    for size, speeds in rates.items():
        print(
            f"| {size} | {statistics.median(speeds):.0f} | {min(speeds):.0f} | {max(speeds):.0f} |"
        )


def cost(options: argparse.Namespace) -> None:
    model = build()
    batches, source = Batches.of(model, None), texts()
    place = RESULTS / f"many_prompts_{options.name}.jsonl"
    size = options.chunk
    settings = {"chunk": size, "batch": str(batches), "singles": options.singles}
    with resumed(place, settings) as (rows, append):
        for number in range(-(-options.prompts // size)):
            prompts = [next(source) for _ in range(min(size, options.prompts - number * size))]
            if number < len(rows):
                continue
            row = chunk(model, prompts, batches, singles=number % options.singles == 0)
            rows.append(row)
            append(row)
            shown = {k: round(sum(v), 1) for k, v in row.items() if isinstance(v, list)}
            print(f"{number}: {shown}, {row['resident']:.0f} MiB", flush=True)
    report(rows)


def chunk(model: Any, prompts: list[str], batches: Batches, *, singles: bool) -> dict[str, Any]:
    """CPU seconds [user, system] of every way to explain these prompts."""
    cut = batches_of(model, prompts, batches)

    def explained() -> None:
        with tempfile.TemporaryDirectory() as folder:
            lenslrp.explain_to(Path(folder) / "r.parquet", model, prompts)

    def one_by_one() -> None:
        for text in prompts:
            lenslrp.run_with_relevance(model, text, names_filter=[], ledger=False)

    ways: dict[str, Callable[[], None]] = {
        "explain_to": explained,
        "plain": lambda: plain_loop(model, cut),
    }
    if singles:
        ways["single"] = one_by_one
    padded = sum(len(batch) * max(prompt.length for prompt in batch) for batch in cut)
    row: dict[str, Any] = {
        "prompts": len(prompts),
        "tokens": sum(prompt.length for batch in cut for prompt in batch),
        "padded": padded,
        "batches": len(cut),
    }
    for name in random.sample(list(ways), len(ways)):
        row[name] = list(cpu(ways[name]))
    row["resident"] = resident()
    return row


def report(rows: list[dict[str, Any]]) -> None:
    tokens, padded = (sum(row[name] for row in rows) for name in ("tokens", "padded"))
    prompts = sum(row["prompts"] for row in rows)
    print(f"\n{prompts} prompts, {tokens} tokens, {padded / tokens - 1:.1%} padding, "
          f"{sum(row['batches'] for row in rows)} batches")  # fmt: skip
    for name in ("plain", "explain_to", "single"):
        some = [row for row in rows if name in row]
        if some:
            user, system = (sum(row[name][i] for row in some) for i in (0, 1))
            rate = sum(row["tokens"] for row in some) / (user + system)
            print(f"| {name} | {user:.1f} user | {system:.1f} system | {rate:.0f} tokens/s |")
    for name in ("plain", "single"):
        ratios = [sum(r["explain_to"]) / sum(r[name]) for r in rows if name in r]
        if len(ratios) > 1:
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(
                f"explain_to / {name}: {middle:.3f} ({low:.3f} to {high:.3f}), {len(ratios)} chunks"
            )
    first, last = rows[0]["resident"], rows[-1]["resident"]
    print(f"resident memory: {first:.0f} MiB after the first chunk, {last:.0f} after the last")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(required=True)
    sizing = actions.add_parser("sizes")
    sizing.add_argument("--rounds", type=int, default=3)
    sizing.set_defaults(run=sizes)
    costing = actions.add_parser("cost")
    costing.add_argument("--prompts", type=int, default=250)
    costing.add_argument("--chunk", type=int, default=CHUNK, help="prompts of a chunk")
    costing.add_argument("--singles", type=int, default=1, help="single calls in every nth chunk")
    costing.add_argument("--name", default="default", help="of the file of results")
    costing.set_defaults(run=cost)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
