"""Train transcoders for some MLPs of SmolLM2-135M, on text that the model writes itself.

    python tutorials/train_transcoders.py FOLDER

The texts begin with countries, so the features are those of such texts. Activations are kept while
the model writes. The coders are BatchTopK transcoders (Bussmann et al. 2024): of a batch the
largest activations are kept, so many that a position has 32 on average; what divides them from the
rest, a running mean, is the threshold of the JumpReLU that is saved. Two minutes on one
core.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from lenslrp.analysis import SparseCoder

LAYERS = (0, 22, 24, 29)

COUNTRIES = (
    "Argentina", "Australia", "Austria", "Belgium", "Brazil", "Canada", "Chile", "China",
    "Colombia", "Cuba", "Denmark", "Egypt", "England", "Ethiopia", "Finland", "France", "Germany",
    "Ghana", "Greece", "Hungary", "India", "Indonesia", "Iran", "Iraq", "Ireland", "Israel",
    "Italy", "Japan", "Kenya", "Mexico", "Morocco", "Nepal", "Norway", "Pakistan", "Peru",
    "Poland", "Portugal", "Romania", "Russia", "Scotland", "Spain", "Sweden", "Switzerland",
    "Thailand", "Turkey", "Ukraine", "Venezuela", "Vietnam",
)  # fmt: skip
OPENINGS = (
    "The capital of {} is", "The people of {} speak", "{} is a country in", "{} is famous for its",
    "My journey through {} began in",
)  # fmt: skip


Activations = dict[int, tuple[Tensor, Tensor]]
"""Layer -> what its MLP reads and what it writes, [n, d_model] each."""


@torch.no_grad()
def written(
    model: TransformerBridge, layers: Sequence[int], tokens: int = 48
) -> tuple[Activations, Activations]:
    """What MLPs do while the model samples texts that begin with countries.

    First tokens are left out, whose activations are unlike all others, and so are repetitions: of
    texts that begin alike, the common part is taken once.

    Returns:
        Of nine texts in ten, to train on, and of the others.
    """
    openings = [text.format(country) for country in COUNTRIES for text in OPENINGS]
    given = model.tokenizer(openings, return_tensors="pt", padding=True, padding_side="left")
    kept: dict[str, list[Tensor]] = {}

    def keep(x: Tensor, hook: Any) -> None:
        kept.setdefault(hook.name, []).append(x)

    ends = ("in", "out")
    hooks = [(f"blocks.{layer}.mlp.hook_{end}", keep) for layer in layers for end in ends]
    torch.manual_seed(0)
    with model.hooks(fwd_hooks=hooks):
        texts = model.original_model.generate(
            **given, do_sample=True, top_k=0, min_new_tokens=tokens, max_new_tokens=tokens
        ).tolist()
    seen = set[tuple[int, ...]]()
    places: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for text, start in enumerate((given["attention_mask"] == 0).sum(dim=1).tolist()):
        for place in range(start + 1, len(texts[text]) - 1):  # the last token was not read
            context = tuple(texts[text][start : place + 1])
            if context not in seen:
                places[text % 10 == 9].append((text, place))
                seen.add(context)
    at = {name: torch.cat(parts, dim=1) for name, parts in kept.items()}

    def those(some: list[tuple[int, int]]) -> Activations:
        rows, columns = torch.tensor(some).T
        reads, writes = (
            {layer: at[f"blocks.{layer}.mlp.hook_{end}"][rows, columns] for layer in layers}
            for end in ends
        )
        return {layer: (reads[layer], writes[layer]) for layer in layers}

    return those(places[0]), those(places[1])


def train(
    hook: str,
    hook_out: str | None,
    x: Tensor,
    y: Tensor,
    *,
    features: int = 1536,
    active: int = 32,
    passes: int = 10,
    batch: int = 512,
    rate: float = 2e-3,
) -> SparseCoder:
    """A transcoder from what an MLP reads and writes, or an autoencoder where both are the same.

    Each feature begins with one of the n positions: it reads that input and writes that output.

    Args:
        hook, hook_out: of the `SparseCoder`.
        x, y: [n, d_model] each.
        features: how many.
        active: how many of them at a position, on average.
        passes: over the positions.
    """
    draw = torch.Generator().manual_seed(0)
    (mean_x, scale_x), (mean_y, scale_y) = (
        (z.mean(dim=0), z.var(dim=0, correction=0).sum().sqrt()) for z in (x, y)
    )
    x, y = (x - mean_x) / scale_x, (y - mean_y) / scale_y  # of mean square length 1
    first = torch.randperm(len(x), generator=draw)[:features]
    W_enc = (0.1 * normalize(x[first], dim=1)).T.contiguous().requires_grad_()
    W_dec = normalize(y[first], dim=1).requires_grad_()
    b_enc = torch.zeros(features, requires_grad=True)
    b_dec = torch.zeros_like(mean_y, requires_grad=True)
    optimiser = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=rate, betas=(0.9, 0.99))
    steps = passes * len(x) // batch
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: min(1.0, 2 - 2 * n / steps))
    threshold = 0.0
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,), generator=draw)
        a = torch.relu(x[rows] @ W_enc + b_enc)
        some = a.detach()[:64].flatten()  # enough to tell where the largest begin
        least = float(some.topk(64 * active).values[-1])
        threshold += 0.05 * (least - threshold)
        row, index = (a > least).nonzero(as_tuple=True)
        starts = torch.searchsorted(row, torch.arange(batch))
        sums = embedding_bag(index, W_dec, starts, mode="sum", per_sample_weights=a[row, index])
        loss = (sums + b_dec - y[rows]).square().sum(dim=1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
        with torch.no_grad():
            W_dec.copy_(normalize(W_dec, dim=1))
    W_enc, W_dec, b_enc, b_dec = (z.detach() for z in (W_enc, W_dec, b_enc, b_dec))
    return SparseCoder(
        hook,
        W_enc=W_enc * (scale_y / scale_x),
        b_enc=(b_enc - mean_x @ W_enc / scale_x) * scale_y,
        W_dec=W_dec,
        b_dec=b_dec * scale_y + mean_y,
        threshold=torch.full((features,), threshold) * scale_y,
        hook_out=hook_out,
    )


@torch.no_grad()
def explained(coder: SparseCoder, x: Tensor, y: Tensor) -> float:
    """The share of the variance of ``y`` that the coder explains."""
    left = (y - coder.reconstruct(x)).square().sum()
    return float(1 - left / (y - y.mean(dim=0)).square().sum())


def transcoders(
    model: TransformerBridge, folder: Path, layers: Sequence[int] = LAYERS
) -> list[SparseCoder]:
    """Those in the folder, or trained and kept there; prints how much they explain."""
    folders = {layer: folder / f"layer_{layer}" for layer in layers}
    report = folder / "report.txt"
    if not report.is_file():
        train_on, others = written(model, layers)
        lines = []
        for layer, path in folders.items():
            hooks = f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out"
            coder = train(*hooks, *train_on[layer])
            coder.save(path)
            shares = [explained(coder, *given[layer]) for given in (train_on, others)]
            active = float((coder.encode(others[layer][0]) > 0).sum(dim=1).float().mean())
            lines.append(
                f"layer {layer}: {shares[0]:.2f} of the variance explained, {shares[1]:.2f} on "
                f"other texts, with {active:.0f} active of {coder.W_dec.shape[0]:,}\n"
            )
        report.write_text("".join(lines), encoding="utf-8")
    print(report.read_text(encoding="utf-8"), end="")
    return [SparseCoder.load(path, name="transcoder") for path in folders.values()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    transcoders(lenslrp.load("smollm2-135m"), Path(sys.argv[1]))
