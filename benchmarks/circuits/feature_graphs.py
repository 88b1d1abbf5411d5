"""What does a graph of features hold, and does the estimate say so beforehand?

    python -m benchmarks.circuits.feature_graphs

SmolLM2 with a transcoder for every MLP that reads random directions, keeps the k largest and writes
random vectors: its features mean nothing, but cost what those of a trained one do. The prompt is
the beginning of the texts in `wikipedia_paragraphs.jsonl`. Memory is the process's largest resident
size.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from benchmarks import DATA
from lenslrp.analysis import SparseCoder, attribution_graph, estimate_graph


def peak() -> int:
    """Bytes of the largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def random_transcoders(model: TransformerBridge, features: int, active: int) -> list[SparseCoder]:
    width = int(model.cfg.d_model)
    return [
        SparseCoder(
            f"blocks.{layer}.mlp.hook_in",
            torch.randn(width, features),
            torch.zeros(features),
            torch.randn(features, width) * 1e-3,
            torch.zeros(width),
            k=active,
            name="transcoder",
            hook_out=f"blocks.{layer}.hook_mlp_out",
        )
        for layer in range(int(model.cfg.n_layers))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--active", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=250)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--rows", type=int, help="as many as fit into 2 GB if not given")
    parser.add_argument("--max-memory", type=float)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = lenslrp.load("smollm2-135m")
    with (DATA / "wikipedia_paragraphs.jsonl").open() as lines:
        text = "\n".join(
            json.loads(line)["text"] for line, _ in zip(lines, range(20), strict=False)
        )
    prompt = model.tokenizer(text, return_tensors="pt")["input_ids"][:, : options.tokens]
    coders = random_transcoders(model, options.features, options.active)
    given = {
        "coders": coders, "k": options.k, "rows": options.rows, "max_memory": options.max_memory
    }  # fmt: skip
    before, began = peak(), time.process_time()
    estimate = estimate_graph(model, prompt, **given)
    busy = time.process_time() - began
    print(
        f"estimate: {estimate} (itself {busy:.0f} s, {(peak() - before) / 1e9:.2f} GB)", flush=True
    )
    began = time.process_time()
    graph = attribution_graph(model, prompt, node_share=1.0, **given)
    print(
        f"{graph}: error {graph.error:.1e}, {graph.passes}, {time.process_time() - began:.0f} s of "
        f"processor time, {(peak() - before) / 1e9:.2f} GB beside model and coders, "
        f"{peak() / 1e9:.2f} GB in all"
    )


if __name__ == "__main__":
    main()
