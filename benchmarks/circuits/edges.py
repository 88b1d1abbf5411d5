"""What edges cost: a chunk's backward pass against one forward and backward pass of as many rows.

    python -m benchmarks.circuits.edges [--rows 16] [--rounds 9]

SmolLM2, one indirect-object prompt, copied `rows` times. A round takes, in an order drawn anew, a
plain forward and backward pass of the bridge (gap to all embeddings) and a pass that is cut at
tokens, heads and MLPs: its forward pass, and backward passes of one chunk (`rows` downstream nodes,
all upstream nodes at once) from MLPs and heads at three depths and from the target; then the
same with a graph's 48 chosen heads and neurons, where the others conduct. Ratios are formed within
a round. Clock and processor time, one thread. The last lines check what was timed: what leaves the
nodes along all edges into a whole set is their score.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch

import lenslrp
from lenslrp.analysis.circuits.edges import score_edges
from lenslrp.analysis.circuits.graph.candidates import find_candidates
from lenslrp.analysis.circuits.nodes import TARGET, Node, place_components
from lenslrp.analysis.circuits.pairs import template_pairs
from lenslrp.analysis.circuits.scores import score_nodes
from lenslrp.analysis.circuits.segments import coefficients, segmented
from lenslrp.inputs import prepare_text

DEPTHS = (5, 15, 29)
SEED = 0


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of clock and of processor time."""
    clock, busy = time.perf_counter(), time.process_time()
    run()
    return (time.perf_counter() - clock) * 1e3, (time.process_time() - busy) * 1e3


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = lenslrp.load("smollm2-135m")
    pair = template_pairs(model, "indirect_object", 1, seed=SEED)
    rows, tokens = options.rows, pair.clean
    one = prepare_text(
        model, tokens, append=[], prepend_bos=None, attention_mask=None, inputs_embeds=None
    )
    prepared = one.repeated(rows)
    copies = pair.repeated(rows)
    whole = place_components(model, ("tokens", "heads", "mlp"))
    some = place_components(model, ("heads", "neurons"))
    with lenslrp.session(model, ledger=False) as session:
        candidates = find_candidates(session, one, pair, some, (), input=tokens)
        nodes = {
            "whole": coefficients(session, whole, input=tokens, target=pair)[1],
            "some": candidates.nodes,
        }
    chosen = candidates.choose(48, 1.0)
    keep = candidates.masks(chosen)
    length = tokens.shape[1]
    times: dict[str, list[tuple[float, float]]] = {}

    def note(name: str, run: Callable[[], object]) -> None:
        times.setdefault(name, []).append(timed(run))

    def plain() -> None:
        embeds = model.embed(prepared.tokens).detach().requires_grad_()
        copies.gap(model(embeds, return_type="logits", use_cache=False)).sum().backward()

    def direct() -> None:
        session = lenslrp.session(model, logits="target")
        context = segmented(session, prepared, copies, whole)
        passed = []
        note("cut forward", lambda: passed.append(context.__enter__()))
        for depth in DEPTHS:
            for end in ("hook_mlp_out", "attn.hook_z"):
                hook = f"blocks.{depth}.{end}"
                downs = [Node(hook, 0, position % length) for position in range(rows)]
                note(f"{rows} nodes of {hook}", lambda d=downs: passed[0].into(d, nodes["whole"]))
        note(f"{rows} x the target", lambda: passed[0].into([TARGET] * rows, nodes["whole"]))
        context.__exit__(None, None, None)
        session.close()

    def folded() -> None:
        session = lenslrp.session(model, logits="target")
        context = segmented(session, prepared, copies, some, keep=keep)
        passed = []
        note("cut forward, 48 chosen", lambda: passed.append(context.__enter__()))
        last = chosen[-rows:]
        note("the last 16 of 48 chosen", lambda: passed[0].into(last, nodes["some"]))
        context.__exit__(None, None, None)
        session.close()

    model.requires_grad_(False)
    draw = random.Random(SEED)
    for _ in range(options.rounds):
        tasks: list[Callable[[], None]] = [lambda: note("plain", plain), direct, folded]
        draw.shuffle(tasks)
        for task in tasks:
            task()
    print(f"SmolLM2, {length} tokens x {rows} rows, {options.rounds} rounds; median (quartiles)")
    print("| pass | processor time, ms | ratio to forward + backward | by the clock |")
    print("|---|---|---|---|")
    for name, values in times.items():
        ratios = [
            [value[i] / base[i] for value, base in zip(values, times["plain"], strict=True)]
            for i in (1, 0)
        ]
        busy = statistics.median(value[1] for value in values)
        print(f"| {name} | {busy:.0f} | {quartiles(ratios[0])} | {quartiles(ratios[1])} |")
    pairs = template_pairs(model, "indirect_object", 2, seed=SEED)
    start = time.process_time()
    edges = score_edges(model, pairs)
    busy = time.process_time() - start
    scores = score_nodes(model, pairs, components=("tokens", "heads", "mlp"))
    sums = edges.outgoing()
    off = max(float((sums[h] - scores.values[h]).abs().max()) for h in sums)
    size = max(float(v.abs().max()) for v in scores.values.values())
    count = int(sum((value != 0).any(dim=0).sum() for value in edges.values.values()))
    print(
        f"\nall edges among tokens, 270 heads and 30 MLPs, 2 pairs: {count:,} edges, "
        f"{len(edges.into)} downstream nodes, passes {edges.passes}, {busy:.1f} s processor time; "
        f"sums differ from node scores by {off:.1e} at most (largest score {size:.2f})"
    )


if __name__ == "__main__":
    main()
