"""What a model still says when a part of its input, or of itself, is taken away.

A perturbation test asks one question many times: the target's value when *these* features are gone.
So all that can be perturbed is one kind of thing here, :class:`Features`: tokens whose embeddings
are replaced, heads and neurons that are switched off, patches of an image that are painted over.
The metrics of :mod:`lenslrp.analysis.faithfulness` know nothing else.

Tokens go as in Achtibat et al. 2024: their whole embedding is set to zero, through a hook at the
embedding (learned positions stay). Every question is a row of a batch; rows of several prompts share
a forward pass, and only the target's position is unembedded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lenslrp import media, targets
from lenslrp.analysis.block_pass import unembedding_at
from lenslrp.errors import InputError
from lenslrp.hooks.attach import Attached
from lenslrp.hooks.components import components
from lenslrp.hooks.embeddings import embeddings
from lenslrp.names import token_id
from lenslrp.targets import Outputs, Target, as_target

Masks = NDArray[np.bool_]
Numbers = NDArray[np.float64]

TOKENS_PER_PASS = 4096
"""Tokens of all rows of one forward pass, padding included."""


@dataclass(frozen=True, eq=False)
class Values:
    """The target in each row: its value (logits), and its probability.

    The probability of a logit is its token's; of a span, the product over its tokens; of a logit
    difference, that of the first of the two alone; NaN for targets that have none.
    """

    value: Numbers
    probability: Numbers


@dataclass(frozen=True, eq=False)
class Features:
    """What can be taken away from one input.

    Attributes:
        index: [size], which entry of the relevance vector each feature is.
        without: from masks [row, size], True where a feature is gone, to the target's values.
    """

    index: NDArray[np.int64]
    without: Callable[[Masks], Values]

    @property
    def size(self) -> int:
        return len(self.index)

    def of(self, relevance: Any) -> Numbers:
        """The features' part of a relevance vector (tensor or array), in float64."""
        if isinstance(relevance, Tensor):
            relevance = relevance.detach().double().cpu().numpy()
        values: Numbers = np.asarray(relevance, dtype=np.float64).ravel()[self.index]
        return values


@dataclass(frozen=True, eq=False)
class Prompt:
    """One input and what is explained of it; see :func:`as_prompt`.

    Attributes:
        tokens: [pos] what the model (the encoder of an encoder-decoder) reads, the span of a
            ``Sequence`` target after it. Empty for an image.
        length: how many of them are the prompt.
        target: a target at the last of ``positions``' logits.
        positions: where logits are read.
        decoder: [pos] what the decoder reads, if there is one.
        pixels: [channel, height, width] of an image.
    """

    tokens: Tensor
    length: int
    target: Target
    positions: tuple[int, ...]
    decoder: Tensor | None = None
    pixels: Tensor | None = None

    @property
    def given(self) -> Tensor:
        """[1, pos] the prompt alone, as ``run_with_relevance`` takes it."""
        return self.tokens[None, : self.length]


def as_prompt(
    model: Any,
    input: Any = None,
    target: Any = None,
    *,
    prepend_bos: bool | None = None,
    pixel_values: Tensor | None = None,
) -> Prompt:
    """One input of ``model``, and a target that stays the same whatever is taken away.

    Args:
        input: a string, or token ids [pos] or [1, pos].
        target: as in :func:`lenslrp.run_with_relevance`; ``None`` is the logit of the token (or
            class) that is the top one for the whole input.
        pixel_values: [1, channel, height, width] instead of ``input``.

    Raises:
        InputError: more than one input, or a target that has no value by itself in a row.
    """
    wanted = as_target(target, model.tokenizer, 1, media.labels_of(model))
    if isinstance(wanted, targets.Activation | targets.PerRow):
        raise InputError(f"perturbation follows an output of the model, not {wanted}")
    span = wanted.ids(model.tokenizer) if isinstance(wanted, targets.Sequence) else []
    prepared = media.prepare(
        model,
        input,
        {} if pixel_values is None else {"pixel_values": pixel_values},
        append=span,
        prepend_bos=prepend_bos,
        attention_mask=None,
        inputs_embeds=None,
        decoder_input=None,
    )
    if pixel_values is not None:
        (pixels,) = prepared.media["pixel_values"]
        empty = torch.empty(0, dtype=torch.long)
        prompt = Prompt(empty, 0, wanted, (), pixels=pixels)
    else:
        if len(prepared.tokens) != 1:
            raise InputError(f"give one input at a time, not {len(prepared.tokens)}")
        writer = prepared.decoder or prepared
        start = writer.prompt_lengths[0]
        positions = tuple(range(start - 1, start - 1 + max(len(span), 1)))
        place = getattr(wanted, "position", -1)
        if place != -1:
            positions = (range(start)[place],)
            wanted = replace(wanted, position=-1)  # type: ignore[type-var]
        decoder = prepared.decoder.tokens[0] if prepared.decoder else None
        length = prepared.prompt_lengths[0]
        prompt = Prompt(prepared.tokens[0], length, wanted, positions, decoder)
    if isinstance(wanted, targets.Top):
        return replace(prompt, target=targets.Logit(_top(model, prompt)))
    return prompt


def tokens_of(
    model: Any, prompt: Prompt, *, baseline: str = "zero", keep: Sequence[int] = ()
) -> Features:
    """The tokens of a prompt as features.

    Args:
        baseline: what stands in place of a token: ``"zero"``, the ``"mean"`` embedding of the
            vocabulary, or a token, as ``"token:</s>"`` (``"eos"`` and ``"pad"`` are the
            tokenizer's).
        keep: positions that are never taken away; negative from the end of the prompt. ``[0]``
            keeps the first token, at which many models park attention that is meant for nothing.

    Raises:
        InputError: an unknown baseline, or a position outside the prompt.
    """
    for position in keep:
        if not -prompt.length <= position < prompt.length:
            raise InputError(
                f"keep has position {position}, outside the prompt's {prompt.length} tokens"
            )
    kept = {position % prompt.length for position in keep}
    index = np.array([i for i in range(prompt.length) if i not in kept], dtype=np.int64)
    _fill(model, baseline)  # an unknown one is refused here, not later

    def without(removed: Masks) -> Values:
        whole = np.zeros((len(removed), prompt.length), dtype=bool)
        whole[:, index] = removed
        return token_values(model, [prompt], [whole], baseline=baseline)[0]

    return Features(index, without)


@torch.no_grad()
def token_values(
    model: Any,
    prompts: Sequence[Prompt],
    removed: Sequence[Masks],
    *,
    baseline: str = "zero",
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> list[Values]:
    """The targets of several prompts, each with several sets of its tokens taken away.

    Rows of all prompts share forward passes of up to ``tokens_per_pass`` tokens.

    Args:
        removed: for each prompt, masks [row, pos] over its tokens.
        baseline: as in :func:`tokens_of`.

    Returns:
        One :class:`Values` a prompt, a value for each of its rows.
    """
    found = [np.full((2, len(masks)), np.nan) for masks in removed]
    rows = [(p, row) for p, masks in enumerate(removed) for row in range(len(masks))]
    rows.sort(key=lambda place: len(prompts[place[0]].tokens))
    fill = _fill(model, baseline)
    for chunk in _chunks(rows, [len(prompts[p].tokens) for p, _ in rows], tokens_per_pass):
        own = [prompts[p] for p, _ in chunk]
        gone = [torch.from_numpy(removed[p][row]) for p, row in chunk]
        logits = _logits(model, own, gone, fill)
        for p in dict.fromkeys(p for p, _ in chunk):
            where = [i for i, (q, _) in enumerate(chunk) if q == p]
            found[p][:, [chunk[i][1] for i in where]] = read(model, prompts[p], logits[where])
    return [Values(*pair) for pair in found]


def read(model: Any, prompt: Prompt, logits: Tensor) -> Numbers:
    """Value and probability [2, row] of the prompt's target.

    Args:
        logits: [row, n, vocab] at the prompt's positions and, after them, what other prompts have
            there; or a classifier's [row, class].
    """
    if logits.ndim == 3:
        logits = logits[:, : len(prompt.positions)]
    mask = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    labels = media.labels_of(model)
    outputs = Outputs(
        logits.float(), mask, model.tokenizer, _no_activation, [1] * len(logits), labels
    )
    values = prompt.target.values(outputs)
    probability = _probability(prompt.target, outputs, values)
    return torch.stack([values, probability]).double().cpu().numpy()


def _no_activation(hook: str) -> Tensor:
    raise InputError(f"perturbation follows an output of the model, not {hook}")


def _probability(target: Target, outputs: Outputs, values: Tensor) -> Tensor:
    if isinstance(target, targets.Sequence):
        return targets.Sequence(target.tokens, of="log_prob").values(outputs).exp()
    if isinstance(target, targets.LogitDiff):
        return values.sigmoid()
    if isinstance(target, targets.Logit | targets.LogProb | targets.Contrastive):
        return targets.LogProb(target.token).values(outputs).exp()
    return torch.full_like(values, torch.nan)


def _top(model: Any, prompt: Prompt) -> int:
    with torch.no_grad():
        if prompt.pixels is not None:
            return int(model(prompt.pixels[None], return_type="logits")[0].argmax())
        nothing = torch.zeros(prompt.length, dtype=torch.bool)
        return int(_logits(model, [prompt], [nothing], None)[0, 0].argmax())


def _chunks(
    rows: list[tuple[int, int]], lengths: list[int], limit: int
) -> Iterator[list[tuple[int, int]]]:
    """Rows in order of length, as many at once as fit, at least one."""
    start = 0
    for stop in range(1, len(rows) + 1):
        if stop == len(rows) or (stop + 1 - start) * lengths[stop] > limit:
            yield rows[start:stop]
            start = stop


def _logits(
    model: Any, prompts: list[Prompt], gone: list[Tensor], fill: Callable[..., Any] | None
) -> Tensor:
    """Logits [row, n, vocab] at each row's positions, padded with the last; or [row, class]."""
    device = next(model.parameters()).device
    tokens = _padded([prompt.tokens for prompt in prompts]).to(device)
    removed = _padded(gone, tokens.shape[1]).to(device)
    most = max(len(prompt.positions) for prompt in prompts)
    positions = torch.tensor(
        [[*p.positions, *[p.positions[-1]] * (most - len(p.positions))] for p in prompts]
    ).to(device)
    kwargs: dict[str, Any] = {}
    lengths = torch.tensor([len(prompt.tokens) for prompt in prompts])
    if bool((lengths < tokens.shape[1]).any()):
        mask = torch.arange(tokens.shape[1])[None] < lengths[:, None]
        kwargs["attention_mask"] = mask.long().to(device)
    decoders = [prompt.decoder for prompt in prompts if prompt.decoder is not None]
    if decoders:
        kwargs["decoder_input_ids"] = _padded(decoders).to(device)  # causal: needs no mask
    with ExitStack() as stack:
        stack.enter_context(unembedding_at(model, positions))
        if fill is not None:
            stack.enter_context(_replacing(model, removed, fill))
        logits: Tensor = model(tokens, return_type="logits", use_cache=False, **kwargs)
    if logits.ndim == 3 and logits.shape[1] != most:  # a head of another kind: all positions
        logits = logits[torch.arange(len(logits), device=device)[:, None], positions]
    return logits


def _padded(rows: list[Tensor], width: int = 0) -> Tensor:
    """Rows of different lengths on the left of one tensor, zeros (False) after them."""
    width = max([width, *(len(row) for row in rows)])
    return torch.stack([nn.functional.pad(row, (0, width - len(row))) for row in rows])


@contextmanager
def _replacing(model: Any, removed: Tensor, fill: Callable[..., Any]) -> Iterator[None]:
    """Replace the embeddings of removed tokens in one forward pass: the first stack's."""
    at, done = Attached(), []

    def replaced(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        if done or out.shape[:2] != removed.shape:
            return out
        done.append(True)
        return torch.where(removed[..., None], fill(module), out)

    for module, position in embeddings(components(model)):
        if not position:
            at.hook(module, replaced)
    try:
        yield
    finally:
        at.restore()
    if not done:
        raise InputError("no known token embedding ran in the forward pass: nothing was replaced")


def _fill(model: Any, baseline: str) -> Callable[..., Any]:
    """A function from an embedding module to the vector that stands for a token that is gone."""
    if baseline == "zero":
        return _zero
    if baseline == "mean":
        return _mean
    name = {
        "eos": getattr(model.tokenizer, "eos_token", None),
        "pad": getattr(model.tokenizer, "pad_token", None),
    }.get(baseline, baseline.removeprefix("token:") if baseline.startswith("token:") else None)
    if name is None:
        raise InputError(
            f"baseline is 'zero', 'mean', 'eos', 'pad' or 'token:TOKEN', not {baseline!r}"
            + (", which this tokenizer does not have" if baseline in ("eos", "pad") else "")
        )
    return partial(_embedding_of, token_id(model.tokenizer, name, int(model.cfg.d_vocab)))


def _zero(module: nn.Module) -> float:
    return 0.0


def _embedding_of(token: int, module: Any) -> Tensor:
    ids = torch.tensor([[token]], device=module.weight.device)
    vector: Tensor = module.forward(ids)[0, 0]  # past the hooks
    return vector


def _mean(module: Any) -> Tensor:
    parts = torch.arange(module.weight.shape[0], device=module.weight.device).split(1 << 14)
    total = sum(module.forward(ids[None])[0].double().sum(dim=0) for ids in parts)
    return (total / module.weight.shape[0]).to(module.weight.dtype)  # type: ignore[union-attr]
