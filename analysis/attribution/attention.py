"""Attributions from attention: rollout, gradient x attention rollout, and AtMan.

Rollout (Abnar & Zuidema 2020) and its gradient form (Chefer et al. 2021) propagate a matrix
of relevance through the attention patterns, layer by layer, and read the row of the position that
is explained; AtMan (Deb et al. 2023) turns the scores of one token down in every head and looks at
the loss. Attention that TransformerLens delegates is made hookable meanwhile, and undone after.

Of an encoder-decoder the encoder's tokens are rated: rollout treats cross-attention as one more
layer with a residual around it, Chefer et al. have a rule for it (their Eq. 10).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lenslrp import media
from lenslrp.analysis.passes.problems import AttributionProblem
from lenslrp.edits import Edit
from lenslrp.errors import InputError
from lenslrp.hooks.components import hook_points
from lenslrp.hooks.composites import GradientTimesInput
from lenslrp.hooks.install import relevance_rules
from lenslrp.hooks.structure import components
from lenslrp.logits import Outputs, Target
from lenslrp.running import architecture
from lenslrp.targets import Activation, Logit, LogProb, PerRow, Sequence

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

BLOCK_NAME = re.compile(r"^\w*blocks\.\d+", re.MULTILINE)

Patterns = list[tuple[str, Tensor]]
"""[batch, query, key] by hook name, in the order in which they were formed, heads averaged."""


@torch.no_grad()
def attention_rollout(
    problem: AttributionProblem, *, seed: int, position: int | None = None
) -> Float[Tensor, "batch units"]:
    """The product of ``A / 2 + I / 2`` over all layers, A the mean pattern of a layer's heads.

    A share of one, whatever the target; the target says only which position is read.

    Args:
        position: whose row to read, where the target (a ``Custom`` one) does not say it.
    """
    patterns: Patterns = []

    def keep(name: str, pattern: Tensor) -> None:
        # A query that sees no key (padding) has NaN for a pattern.
        patterns.append((name, pattern.mean(dim=1).nan_to_num(0.0).to(problem.inputs)))

    names = _names(problem.model, "hook_pattern")
    with _hookable(problem):
        problem.values(problem.inputs[None], read={name: partial(keep, name) for name in names})

    def layer(pattern: Tensor, relevance: Tensor) -> Tensor:
        return (pattern @ relevance + relevance) / 2

    def cross(pattern: Tensor, to_self: Tensor, to_encoder: Tensor, encoder: Tensor) -> Tensor:
        return (pattern @ encoder + to_encoder) / 2

    return _rollout(problem, patterns, layer, cross, position)


def gradient_x_attention_rollout(
    problem: AttributionProblem, *, seed: int, position: int | None = None
) -> Float[Tensor, "batch units"]:
    """``R += A R`` over all layers, from ``R = I``, with A the mean over heads of what is positive
    in pattern times gradient (Chefer et al. 2021, Eqs. 5 to 10).

    Args:
        position: as for `attention_rollout`.
    """
    names = _names(problem.model, "hook_pattern")
    cache = problem.relevance(GradientTimesInput(), lambda name: name in names)
    patterns = [
        (name, cache[name].clamp(min=0).mean(dim=1).to(problem.inputs))
        for name in names
        if name in cache
    ]

    def layer(pattern: Tensor, relevance: Tensor) -> Tensor:
        return relevance + pattern @ relevance

    def cross(pattern: Tensor, to_self: Tensor, to_encoder: Tensor, encoder: Tensor) -> Tensor:
        return to_encoder + _normalised(to_self).transpose(1, 2) @ pattern @ _normalised(encoder)

    return _rollout(problem, patterns, layer, cross, position)


@torch.no_grad()
def atman(
    problem: AttributionProblem,
    *,
    seed: int,
    factor: float = 0.1,
    threshold: float | None = 0.6,
    minimum: bool = True,
) -> Float[Tensor, "batch units"]:
    """The rise of the loss when the scores of one token are multiplied by ``factor`` everywhere.

    In nats where the target is a token or several (the cross-entropy, as in the paper), else what
    the target's value loses.

    Args:
        factor: what scores of the token become, relative; the paper's 1 - f.
        threshold: tokens whose embeddings have at least this cosine c with it are turned down with
            it, by ``factor + (1 - factor)(1 - c)``; ``None`` for the token alone.
        minimum: take each query's smallest score away first, so that a factor below 1 always turns
            down, as the authors' code does (there over all keys, here over those that the query
            sees); ``False`` for the formula of the paper.
    """
    batch, units = problem.mask.shape
    factors = _factors(problem, factor, threshold)  # one token after the other turned down
    plain = torch.ones(1, batch, units).to(factors)
    log_problem = replace(problem, target=_log_probability(problem.target))
    part_factors: list[Tensor] = []  # of the sequences that run now

    def turn_down(scores: Tensor) -> Tensor:
        before = _before(problem, scores.shape[-1])
        share = torch.nn.functional.pad(part_factors[0], (before, 0), value=1.0)
        share = share.view(len(scores), *[1] * (scores.ndim - 2), -1).to(scores)
        unmasked = _unmasked(scores)
        low = (
            scores.masked_fill(~unmasked, torch.inf).amin(dim=-1, keepdim=True) if minimum else 0.0
        )
        return torch.where(unmasked, (scores - low) * share, scores)

    names = [n for n in _names(problem.model, "hook_attn_scores") if not _of_decoder(n)]
    edits, values = [Edit(name, function=turn_down) for name in names], []
    with _hookable(problem):
        for part in torch.cat([plain, factors]).split(problem.step):
            part_factors[:] = [part.flatten(0, 1)]
            inputs = problem.inputs.expand(len(part), *problem.inputs.shape)
            values.append(log_problem.values(inputs, edits=edits))
    log_probabilities = torch.cat(values)
    return (log_probabilities[:1] - log_probabilities[1:]).T


def _factors(
    problem: AttributionProblem, factor: float, threshold: float | None
) -> Float[Tensor, "tokens batch units"]:
    """What each key's scores are multiplied by when each token in turn is turned down."""
    batch, units = problem.mask.shape
    itself = torch.eye(units, device=problem.inputs.device, dtype=torch.bool)[:, None]
    if threshold is None:
        alike = torch.zeros(units, batch, units, device=itself.device)
    else:
        unit = torch.nn.functional.normalize(problem.vectors.float(), dim=-1)
        cosines = (unit @ unit.transpose(1, 2)).clamp(-1, 1).transpose(0, 1)
        alike = cosines.where(cosines >= threshold, 0.0)
    shares = factor + (1 - factor) * (1 - alike.clamp(min=0))
    return shares.masked_fill(itself, factor)


def _unmasked(scores: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Which scores are not masked."""
    return scores > max(torch.finfo(scores.dtype).min / 2, -1e8)


def _log_probability(target: Target) -> Target:
    """The same tokens by their log-probability; other targets as they are."""
    if isinstance(target, PerRow):
        return PerRow(tuple(_log_probability(part) for part in target.targets))
    if isinstance(target, Logit):
        return LogProb(target.token, target.position)
    return replace(target, of="log_prob") if isinstance(target, Sequence) else target


def _hookable(problem: AttributionProblem) -> Any:
    """Scores and patterns that are formed where their hooks are, whoever computes them."""
    return relevance_rules(problem.model, GradientTimesInput(), strict=False)


def _names(model: TransformerBridge, hook: str) -> list[str]:
    """One name of every hook point of a kind, in the model's order.

    Raises:
        InputError: the model has none, or a block of it: what passes there would not be seen.
    """
    points = hook_points(model, list(components(model)))
    names = {id(point): name for name, point in points.items() if name.endswith("." + hook)}
    blocks = dict.fromkeys(BLOCK_NAME.findall("\n".join(points)))
    without = [b for b in blocks if not any(n.startswith(f"{b}.") for n in names.values())]
    if without or not names:
        where = f" in {', '.join(without[:4])}" if names else ""
        raise InputError(f"{architecture(model)} has no attention patterns{where}")
    return list(names.values())


def _of_decoder(name: str) -> bool:
    """Whether attention is a decoder's to what it wrote itself, beside an encoder."""
    return name.startswith("decoder_blocks.") and not _crosses(name)


def _crosses(name: str) -> bool:
    return ".cross_attn." in name


def _normalised(relevance: Float[Tensor, "batch row unit"]) -> Tensor:
    """``R - I`` with each row scaled to sum 1, plus I (Chefer et al., Eqs. 8 and 9)."""
    eye = torch.eye(relevance.shape[1]).to(relevance)
    added = relevance - eye
    total = added.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, added / total, 0.0) + eye


def _rollout(
    problem: AttributionProblem,
    patterns: Patterns,
    layer: Callable[[Tensor, Tensor], Tensor],
    cross: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    position: int | None,
) -> Float[Tensor, "batch units"]:
    """Relevance propagated from layer to layer; the row of what is explained.

    Raises:
        InputError: patterns of another shape than the layers before.
    """
    encoder = _identity(patterns[0][1])
    to_self = to_encoder = encoder[:, :0]  # of a decoder's tokens: to themselves, the encoder's
    for name, pattern in patterns:
        decodes = name.startswith("decoder_blocks.")
        if decodes and not to_self.shape[1]:
            to_self = _identity(pattern)
            to_encoder = encoder.new_zeros(len(to_self), to_self.shape[1], encoder.shape[1])
        expected = to_encoder if _crosses(name) else to_self if decodes else encoder
        if pattern.shape != expected.shape:
            raise InputError(
                f"{name} is a pattern of {list(pattern.shape[1:])}, where a layer before it was "
                f"one of {list(expected.shape[1:])}: rollout needs all tokens in every layer"
            )
        if _crosses(name):
            to_encoder = cross(pattern, to_self, to_encoder, encoder)
        elif decodes:
            to_self, to_encoder = layer(pattern, to_self), layer(pattern, to_encoder)
        else:
            encoder = layer(pattern, encoder)
    last = to_encoder if to_self.shape[1] else encoder
    weights = _rows(problem, last, position)
    return torch.einsum("bq,bqk->bk", weights, last)[:, _before(problem, last.shape[-1]) :]


def _before(problem: AttributionProblem, keys: int) -> int:
    """How many tokens (CLS and its like) stand before an image's patches.

    Raises:
        InputError: there are other keys than the tokens of a text, or fewer than patches.
    """
    before = keys - problem.mask.shape[1]
    if before < 0 or (before and problem.grid is None):
        raise InputError(f"attention to {keys} keys, where there are {keys - before} tokens")
    return before


def _identity(pattern: Float[Tensor, "batch query key"]) -> Float[Tensor, "batch query query"]:
    eye = torch.eye(pattern.shape[1]).to(pattern)
    return eye.expand(len(pattern), -1, -1)


def _rows(
    problem: AttributionProblem, last: Float[Tensor, "batch row unit"], position: int | None
) -> Float[Tensor, "batch row"]:
    """Which row of the relevance matrix is read, as weights that sum to 1.

    The target's own position, or the mean over those of a span. The logits of an image's classes
    have none: the first token (CLS) is read, or the mean over the patches where there is none.

    Raises:
        InputError: a target that does not say its position, without ``position``.
    """
    weights = torch.zeros(last.shape[:2]).to(last)
    no_activations = dict[str, Tensor]().__getitem__
    outputs = Outputs(last, problem.prepared.written, None, no_activations)
    classifies = media.labels_of(problem.model) is not None
    for row, target in enumerate(_each(problem.target, len(weights))):
        one = outputs.row(row)
        where = getattr(target, "position", None) if position is None else position
        if position is None and classifies and not isinstance(target, Activation):
            before = _before(problem, last.shape[-1])
            weights[row] += 1 / weights.shape[1] if not before else 0.0
            where = 0 if before else None
        elif position is None and isinstance(target, Sequence):
            ids = target.ids(problem.model.tokenizer)
            weights[row, outputs.span(len(ids))[row]] = 1 / len(ids)
        elif where is None:
            raise InputError(
                f"{type(target).__name__} targets do not say which position they read: give "
                "position="
            )
        if where is not None:
            weights[row, one.at(where)] = 1
    return weights


def _each(target: Target, batch: int) -> tuple[Target, ...]:
    """The target of every row."""
    return target.targets if isinstance(target, PerRow) else (target,) * batch
