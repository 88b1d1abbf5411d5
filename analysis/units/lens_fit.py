"""Fitting lenses, and measuring how well they read.

Rows of J by one backward pass each would cost d_model passes a prompt. Instead each prompt gets one
backward pass, from an independent random vector v at every position. It returns, at every layer at
once, g = J^T v of that position, plus what came from later ones, which is independent of v. So
least squares of V J = G over all positions is consistent; where J is the same everywhere and
positions do not mix, it is exact as soon as there are d_model of them. Two splits of the
batches are solved apart: their mean is the lens, their distance its error (``Lens.noise``).

A ridge regression from resid_l to resid_final (a tuned lens, Belrose et al. 2023, in closed form)
has the same number of parameters and is what a linear map of states can reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from lenslrp.analysis.units.lens import Lens, blocks_of
from lenslrp.analysis.units.locations import blocks_name
from lenslrp.analysis.units.unembedding import embedding, unembed
from lenslrp.batch import Batch
from lenslrp.errors import InputError
from lenslrp.forward import forward
from lenslrp.hooks import AttnLRP, Composite, relevance_rules
from lenslrp.inputs import prepare_text
from lenslrp.progress import progress_bar

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Prompts = Sequence[str] | Tensor


@contextmanager
def _residuals(
    model: TransformerBridge, batch: Batch, *, gradients: bool = False
) -> Iterator[list[Tensor]]:
    """The residual stream before the first block and after every one, on the graph if any."""
    name = blocks_name(model)
    after = [f"{name}.{layer}.hook_resid_post" for layer in range(len(blocks_of(model)))]
    hooks = [f"{name}.0.hook_resid_pre", *after]
    with forward(model, batch, capture_at=hooks, stop_after=after[-1], gradients=gradients) as run:
        yield [run.captured[hook] for hook in hooks]


def _batches(
    model: TransformerBridge,
    prompts: Prompts,
    batch_size: int,
    skip: int,
    what: str,
    progress: bool = False,
) -> Iterator[tuple[Batch, Tensor]]:
    """Batches of the prompts, and which positions of each count."""
    embedding(model)  # raises where the model reads no tokens
    if isinstance(prompts, str) or batch_size < 1 or skip < 0:
        raise InputError("prompts are several strings or a tensor; batch_size >= 1 and skip >= 0")
    for start in progress_bar(what, range(0, len(prompts), batch_size), shown=progress or None):
        part: Any = prompts[start : start + batch_size]
        batch = prepare_text(
            model,
            part if isinstance(part, Tensor) else list(part),
            append=[], prepend_bos=None, attention_mask=None, inputs_embeds=None,
        )  # fmt: skip
        yield batch, batch.positions >= skip


class _Sums:
    """Sums over the pairs (x, y) of every layer, of which least squares of y = x M is made."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Any] = {}

    def add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + value.double()


def _lens_of(
    model: TransformerBridge,
    splits: tuple[_Sums, _Sums],
    solve: Callable[[_Sums, int], Tensor],
    **facts: Any,
) -> Lens:
    """A lens from the sums of two splits of the prompts."""
    width, last = int(model.cfg.d_model), len(blocks_of(model)) - 1
    counts = [sums.count for sums in splits]
    if min(counts) < width:
        raise InputError(
            f"{counts[0]} and {counts[1]} positions in the two halves of the batches; a lens of "
            f"d_model = {width} needs at least {width} in each, and better ten times as many"
        )
    matrices, biases, noise = {}, {}, {}
    for layer in range(last):
        both = [solve(sums, layer) for sums in splits]
        matrix = (both[0] + both[1]) / 2
        noise[layer] = float((both[0] - both[1]).norm() / (2 * matrix.norm()))
        mean, final_mean = (
            (splits[0].sums[f"h{k}"] + splits[1].sums[f"h{k}"]) / sum(counts) for k in (layer, last)
        )
        matrices[layer] = matrix.float().cpu().contiguous()
        biases[layer] = (final_mean - matrix @ mean).float().cpu()
    return Lens(
        matrices, biases, noise, model=str(model.cfg.model_name), layers=last + 1,
        positions=sum(counts), **facts,
    )  # fmt: skip


def fit_relevance_lens(
    model: TransformerBridge,
    prompts: Prompts,
    *,
    composite: Composite | None = None,
    batch_size: int = 8,
    skip: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> Lens:
    """The mean LRP Jacobian from after each block to the final residual, same position.

    One forward and one backward pass a batch serve all layers. Early layers need the most text:
    with 28 times d_model positions, ``Lens.noise`` of SmolLM2 is .04 after the last layer but one,
    .23 after layer 12 and .52 after layer 0 (``benchmarks/knowledge/lens.py``).

    Args:
        model: a ``TransformerBridge`` of one stack.
        prompts: strings, or token ids [batch, pos].
        composite: the rules; default AttnLRP.
        batch_size: prompts of one pass.
        skip: how many first tokens of a prompt do not count: the first is an attention sink, to
            which the others' relevance flows.
        seed: of the random vectors.
        progress: a bar on standard error.

    Returns:
        One matrix [d_model, d_model] and one bias [d_model] a layer but the last.

    Raises:
        InputError: fewer than 2 * d_model positions, or a model without one stack of blocks.
        CoverageError: an operation between the layers has no rule.

    Examples:
        ```python
        lens = fit_relevance_lens(model, texts)
        writes(model, Neuron(3, 40), lens=lens).top(5)  # what it raises, through the layers above
        compare_lenses(model, held_out, {"relevance": lens, "logit lens": None})
        ```
    """
    rules_of = AttnLRP() if composite is None else composite
    generator = torch.Generator().manual_seed(seed)
    splits = (_Sums(), _Sums())
    batches = _batches(model, prompts, batch_size, skip, "relevance lens", progress)
    with relevance_rules(model, rules_of) as rules:
        for index, (batch, counted) in enumerate(batches):
            with _residuals(model, batch, gradients=True) as (first, *states):
                if index == 0:
                    rules.verify(states[-1])
                probes = torch.randn(states[-1].shape, generator=generator, dtype=torch.float64)
                probes = probes.to(states[-1]) * counted[..., None].to(states[-1])
                # Back to the beginning, so that the first block's rules are seen to fire as well
                _, *pulled = torch.autograd.grad(states[-1], [first, *states[:-1]], probes)
            split, v = splits[index % 2], probes[counted]
            v = v.float() if v.dtype in (torch.float16, torch.bfloat16) else v
            split.count += len(v)
            split.add("vv", v.mT @ v)
            for layer, gradient in enumerate(pulled):
                split.add(f"vg{layer}", v.mT @ gradient[counted].to(v))
            for layer, state in enumerate(states):
                split.add(f"h{layer}", state.detach()[counted].double().sum(dim=0))

    def solve(split: _Sums, layer: int) -> Tensor:
        matrix: Tensor = torch.linalg.solve(split.sums["vv"], split.sums[f"vg{layer}"])
        return matrix

    return _lens_of(model, splits, solve, kind="relevance", composite=rules_of.name, seed=seed)


@torch.no_grad()
def fit_ridge_lens(
    model: TransformerBridge,
    prompts: Prompts,
    *,
    ridge: float = 1e-3,
    batch_size: int = 8,
    skip: int = 1,
    progress: bool = False,
) -> Lens:
    """The regression from the residual stream after each block to the final residual.

    A tuned lens (Belrose et al. 2023, arXiv:2303.08112) in closed form.

    Args:
        model: as in `fit_relevance_lens`.
        ridge: the penalty, as a share of the mean variance of the residual stream's components.
        prompts: as in `fit_relevance_lens`.
        batch_size: likewise.
        skip: likewise.
        progress: likewise.

    Raises:
        InputError: as `fit_relevance_lens`.
    """
    splits = (_Sums(), _Sums())
    batches = _batches(model, prompts, batch_size, skip, "ridge lens", progress)
    for index, (batch, counted) in enumerate(batches):
        split = splits[index % 2]
        with _residuals(model, batch) as (_, *residuals):
            states = [state[counted].double() for state in residuals]
        split.count += len(states[0])
        for layer, state in enumerate(states):
            split.add(f"h{layer}", state.sum(dim=0))
            split.add(f"hh{layer}", state.mT @ state)
            split.add(f"hr{layer}", state.mT @ states[-1])
    last = len(blocks_of(model)) - 1

    def solve(split: _Sums, layer: int) -> Tensor:
        sums, n = split.sums, split.count
        mean, final_mean = sums[f"h{layer}"] / n, sums[f"h{last}"] / n
        covariance = sums[f"hh{layer}"] / n - torch.outer(mean, mean)
        cross = sums[f"hr{layer}"] / n - torch.outer(mean, final_mean)
        covariance.diagonal().add_(ridge * covariance.diagonal().mean())
        matrix: Tensor = torch.linalg.solve(covariance, cross).mT
        return matrix

    return _lens_of(model, splits, solve, kind="ridge", composite="", seed=0)


@torch.no_grad()
def compare_lenses(
    model: TransformerBridge,
    prompts: Prompts,
    lenses: Mapping[str, Lens | None],
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 8,
    skip: int = 1,
    bias: bool = True,
) -> pd.DataFrame:
    """How near each lens' distribution comes to the model's, layer by layer, on ``prompts``.

    Args:
        model: as in `fit_relevance_lens`.
        prompts: strings, or token ids [batch, pos], that no lens was fitted on.
        lenses: by name; None is the logit lens.
        layers: after which blocks; default all but the last, where all lenses agree.
        batch_size: prompts of one pass.
        skip: how many first tokens of a prompt do not count.
        bias: whether states get the lens' bias.

    Returns:
        Columns layer, lens, ``kl`` (final || lens, nats), ``top1`` (share of positions with the
        same most likely token) and ``positions``: means over positions.

    Raises:
        InputError: a layer that a lens lacks, or no position that counts.
    """
    chosen = list(range(len(blocks_of(model)) - 1)) if layers is None else list(layers)
    totals: dict[tuple[int, str], list[float]] = {}
    positions = 0
    for batch, counted in _batches(model, prompts, batch_size, skip, "compare"):
        with _residuals(model, batch) as (_, *residuals):
            states = [state[counted] for state in residuals]
        final = unembed(model, states[-1]).log_softmax(dim=-1)
        positions += len(final)
        for layer in chosen:
            for name, lens in lenses.items():
                map_state = None if lens is None else (lens.state if bias else lens.transport)
                x = states[layer] if map_state is None else map_state(layer, states[layer])
                by_lens = unembed(model, x).log_softmax(dim=-1)
                kl = float((final.exp() * (final - by_lens)).sum())
                same = float((final.argmax(-1) == by_lens.argmax(-1)).sum())
                sums = totals.setdefault((layer, name), [0.0, 0.0])
                sums[0] += kl
                sums[1] += same
    if not positions:
        raise InputError(f"no prompt is longer than skip = {skip} tokens")
    return pd.DataFrame(
        {"layer": layer, "lens": name, "kl": kl / positions, "top1": same / positions,
         "positions": positions}
        for (layer, name), (kl, same) in totals.items()
    )  # fmt: skip
