"""Train transcoders for some MLPs of SmolLM2-135M, on text that the model writes itself.

    python tutorials/train_transcoders.py FOLDER

The texts begin with countries, so the features are those of such texts. Activations are kept while
the model writes. The coders are BatchTopK transcoders (Bussmann et al. 2024): of a batch the
largest activations are kept, so many that a position has 32 on average; what divides them from the
rest, a running mean, is the threshold of the JumpReLU that is saved. Two to three minutes on one
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

LAYERS = (2, 8, 22, 29)

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


@torch.no_grad()
def written(
    model: TransformerBridge, layers: Sequence[int], tokens: int = 48
) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
    """Texts about countries, and what the MLPs read and write while the model samples them.

    Returns:
        Tokens [text, pos], padded on the left, and of each layer the MLP's inputs and outputs [text, pos,
        d_model], one position less.
    """
    tokenizer = model.tokenizer
    openings = [text.format(country) for country in COUNTRIES for text in OPENINGS]
    given = tokenizer(openings, return_tensors="pt", padding=True, padding_side="left")
    kept: dict[str, list[Tensor]] = {}

    def keep(x: Tensor, hook: Any) -> None:
        kept.setdefault(hook.name, []).append(x)

    hooks = [(f"blocks.{layer}.mlp.hook_{end}", keep) for layer in layers for end in ("in", "out")]
    torch.manual_seed(0)
    with model.hooks(fwd_hooks=hooks):
        text = model.original_model.generate(
            **given, do_sample=True, top_k=0, min_new_tokens=tokens, max_new_tokens=tokens
        )
    at = {name: torch.cat(parts, dim=1) for name, parts in kept.items()}
    return text, {n: (at[f"blocks.{n}.mlp.hook_in"], at[f"blocks.{n}.mlp.hook_out"]) for n in layers}


def train(
    layer: int,
    x: Tensor,
    y: Tensor,
    *,
    features: int = 1536,
    active: int = 32,
    passes: int = 16,
    batch: int = 512,
    rate: float = 2e-3,
) -> SparseCoder:
    """A transcoder of an MLP from its inputs ``x`` and outputs ``y``, both [n, d_model].

    Each feature begins with one of the n positions: it reads that input and writes that output.

    Args:
        features: how many.
        active: how many of them at a position, on average.
        passes: over the positions.
    """
    draw = torch.Generator().manual_seed(layer)
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
        f"blocks.{layer}.mlp.hook_in",
        W_enc=W_enc * (scale_y / scale_x),
        b_enc=(b_enc - mean_x @ W_enc / scale_x) * scale_y,
        W_dec=W_dec,
        b_dec=b_dec * scale_y + mean_y,
        threshold=torch.full((features,), threshold) * scale_y,
        hook_out=f"blocks.{layer}.hook_mlp_out",
    )


@torch.no_grad()
def explained(coder: SparseCoder, x: Tensor, y: Tensor) -> float:
    """The share of the variance of ``y`` that the coder explains."""
    left = (y - coder.reconstruct(x)).square().sum()
    return float(1 - left / (y - y.mean(dim=0)).square().sum())
