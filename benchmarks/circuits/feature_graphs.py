"""What does a graph of features cost, and does the estimate say so beforehand?

    python -m benchmarks.circuits.feature_graphs fit    # transcoders, once
    python -m benchmarks.circuits.feature_graphs graph  # in a process of its own, for its memory

SmolLM2 with a transcoder for every MLP, made in a minute: random directions to read, the k largest
kept, and what is written fitted by ridge regression to the MLP's output. Its features mean nothing;
their number and how many are active are what counts here. The prompt is the beginning of the texts
in `wikipedia_paragraphs.jsonl`. Memory is the process's largest resident size.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from benchmarks import DATA, RESULTS
from lenslrp.analysis import SparseCoder, attribution_graph, estimate_graph
from lenslrp.analysis.units.coders import REQUIRED

BATCH, RIDGE = 512, 1e-2


def peak() -> int:
    """Bytes of the largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def fitted(
    model: TransformerBridge, tokens: Tensor, features: int, active: int
) -> tuple[list[SparseCoder], float]:
    """A transcoder for each MLP, and the share of the outputs' variance that they explain."""
    layers = range(int(model.cfg.n_layers))
    ends = [(f"blocks.{i}.mlp.hook_in", f"blocks.{i}.hook_mlp_out") for i in layers]
    names = [name for pair in ends for name in pair]
    read: dict[str, list[Tensor]] = {name: [] for name in names}
    for part in tokens[: len(tokens) // BATCH * BATCH].view(-1, BATCH):
        _, cache = model.run_with_cache(part[None], names_filter=names)
        for name in names:
            read[name].append(cache[name][0])
    coders, shares = [], []
    for hook, out in ends:
        x, y = torch.cat(read.pop(hook)), torch.cat(read.pop(out))
        weight = torch.randn(x.shape[1], features) / x.std(dim=0).clamp(min=1e-6)[:, None]
        empty = torch.zeros(features, y.shape[1])
        raw = SparseCoder(
            hook, weight, -x.mean(dim=0) @ weight, empty, y.mean(dim=0), k=active,
            name="transcoder", hook_out=out,
        )  # fmt: skip
        a = raw.encode(x)
        ridge = RIDGE * (a * a).sum() / features * torch.eye(features)
        decoder = torch.linalg.solve(a.T @ a + ridge, a.T @ (y - raw.b_dec))
        coders.append(
            SparseCoder(
                hook,
                weight,
                raw.b_enc,
                decoder,
                raw.b_dec,
                k=active,
                name="transcoder",
                hook_out=out,
            )
        )
        left = (y - coders[-1].reconstruct(x)).pow(2).sum() / (y - raw.b_dec).pow(2).sum()
        shares.append(1 - float(left))
    return coders, sum(shares) / len(shares)


def ids_of(model: TransformerBridge, first: int, count: int) -> Tensor:
    with (DATA / "wikipedia_paragraphs.jsonl").open() as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(400), strict=False)]
    ids: Tensor = model.tokenizer("\n".join(texts), return_tensors="pt")["input_ids"][0]
    return ids[first : first + count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["fit", "graph"])
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--active", type=int, default=32)
    parser.add_argument("--fit", type=int, default=4096, help="tokens to fit on")
    parser.add_argument("--tokens", type=int, default=250)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--max-memory", type=float, default=2.5e9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = lenslrp.load("smollm2-135m")
    path = RESULTS / "feature_graphs.safetensors"
    if options.what == "fit":
        tokens = ids_of(model, options.tokens, options.fit)
        coders, share = fitted(model, tokens, options.features, options.active)
        path.parent.mkdir(exist_ok=True)
        save_file(
            {f"{i}.{name}": getattr(c, name) for i, c in enumerate(coders) for name in REQUIRED},
            path,
        )
        print(f"{options.features} features, {options.active} active, explain {share:.0%}")
        return
    tensors = load_file(path)
    coders = [
        SparseCoder(
            f"blocks.{i}.mlp.hook_in", **{name: tensors[f"{i}.{name}"] for name in REQUIRED},
            k=options.active, name="transcoder", hook_out=f"blocks.{i}.hook_mlp_out",
        )
        for i in range(int(model.cfg.n_layers))
    ]  # fmt: skip
    prompt = ids_of(model, 0, options.tokens)[None]
    given = {"coders": coders, "k": options.k, "rows": options.rows}
    before, began = peak(), time.process_time()
    estimate = estimate_graph(model, prompt, **given)
    busy = time.process_time() - began
    print(f"estimate: {estimate} (itself {busy:.0f} s, {(peak() - before) / 1e9:.2f} GB)")
    print(f"within {options.max_memory / 1e9:.1f} GB: {estimate.within(options.max_memory)}")
    began = time.process_time()
    graph = attribution_graph(model, prompt, max_memory=options.max_memory, **given)
    print(
        f"{graph}: error {graph.error:.1e}, {graph.passes}, {time.process_time() - began:.0f} s of "
        f"processor time, {(peak() - before) / 1e9:.2f} GB beside model and coders, "
        f"{peak() / 1e9:.2f} GB in all"
    )


if __name__ == "__main__":
    main()
