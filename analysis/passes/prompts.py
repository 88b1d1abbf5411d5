"""One input and one target, evaluated many times: prompts as rows of batches.

Rows of several prompts share a forward pass, and only the targets' positions are unembedded. What
is done to the rows meanwhile is up to the caller (`lenslrp.analysis.evaluation.features`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lenslrp import media, targets
from lenslrp.analysis.common.statistics import Numbers
from lenslrp.batch import Batch
from lenslrp.errors import InputError
from lenslrp.forward import forward
from lenslrp.hooks.padding import masked_ids, require_ends, require_padding
from lenslrp.logits import Outputs, Target
from lenslrp.targets import as_target

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False)
class Values:
    """The target in each row: its value (logits), and its probability.

    The probability of a logit is its token's; of a span, the product over its tokens; of a logit
    difference, that of the first of the two alone; NaN for targets that have none.
    """

    value: Numbers
    probability: Numbers


@dataclass(frozen=True, eq=False)
class ExplainedPrompt:
    """One input and what is explained of it; see `as_prompt`.

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
    model: TransformerBridge,
    input: Any = None,
    target: Any = None,
    *,
    prepend_bos: bool | None = None,
    pixel_values: Any = None,
) -> ExplainedPrompt:
    """One input of ``model``, and a target that stays the same whatever is taken away.

    Args:
        model: a ``TransformerBridge``.
        input: a string, or token ids [pos] or [1, pos].
        target: as in `lenslrp.run_with_relevance`; ``None`` is the logit of the token (or
            class) that is the top one for the whole input.
        prepend_bos: as in `lenslrp.run_with_relevance`.
        pixel_values: an image instead of ``input``: [1, channel, height, width], a picture or file.

    Returns:
        Token ids, target and positions, as `tokens_of` and `heads_of` take them.

    Raises:
        InputError: more than one input, or a target that has no value by itself in a row.

    Examples:
        ```python
        prompt = as_prompt(model, "The capital of France is", " Paris")
        prompt.length  # 5 tokens
        ```
    """
    parsed = as_target(target, model.tokenizer, 1, media.labels_of(model))
    if isinstance(parsed, targets.Activation | targets.PerRow):
        raise InputError(f"perturbation follows an output of the model, not {parsed}")
    span = parsed.ids(model.tokenizer) if isinstance(parsed, targets.Sequence) else []
    prepared = media.prepare_batch(
        model,
        input,
        media.floats_given(model, pixel_values, None, None),
        append=span,
        prepend_bos=prepend_bos,
    )
    if pixel_values is not None:
        (pixels,) = prepared.media["pixel_values"]
        empty = torch.empty(0, dtype=torch.long)
        prompt = ExplainedPrompt(empty, 0, parsed, (), pixels=pixels)
    else:
        if len(prepared.tokens) != 1:
            raise InputError(f"give one input at a time, not {len(prepared.tokens)}")
        writer = prepared.written
        positions = tuple(writer.span(max(len(span), 1))[0].tolist())
        position = getattr(parsed, "position", -1)
        if position != -1:
            positions = (writer.column(position),)
            parsed = replace(parsed, position=-1)  # type: ignore[type-var]
        decoder = prepared.decoder.tokens[0] if prepared.decoder else None
        length = prepared.prompt_lengths[0]
        prompt = ExplainedPrompt(prepared.tokens[0], length, parsed, positions, decoder)
    if isinstance(parsed, targets.Top):
        return replace(prompt, target=targets.Logit(_top(model, prompt)))
    return prompt


def target_values(model: TransformerBridge, prompt: ExplainedPrompt, logits: Tensor) -> Numbers:
    """Value and probability [2, row] of the prompt's target.

    Args:
        logits: [row, n, vocab] at the prompt's positions and, after them, what other prompts have
            there; or a classifier's [row, class].
    """
    if logits.ndim == 3:
        logits = logits[:, : len(prompt.positions)]
    if logits.dtype != torch.float64:
        logits = logits.float()
    mask = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    rows = Batch.of_mask(mask, [1] * len(logits))
    labels = media.labels_of(model)
    outputs = Outputs(logits, rows, model.tokenizer, _no_activation, labels)
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


def _top(model: TransformerBridge, prompt: ExplainedPrompt) -> int:
    return int(prompt_logits(model, prompt)[0].ravel().argmax())


def prompt_logits(
    model: TransformerBridge, prompt: ExplainedPrompt, rows: int = 1, **how: Any
) -> Tensor:
    """Logits [row, n, vocab] of copies of a prompt, at its positions; a classifier's
    [row, class]."""
    return batch_logits(model, [prompt] * rows, **how)


def image_logits(model: TransformerBridge, pixels: Tensor) -> Tensor:
    """[row, class] of images [row, channel, height, width]."""
    empty = torch.empty(len(pixels), 0, dtype=torch.long, device=pixels.device)
    batch = Batch(empty, empty.bool(), [0] * len(pixels), media={"pixel_values": pixels})
    with forward(model, batch) as run:
        assert run.logits is not None
        return run.logits


def batch_logits(
    model: TransformerBridge, prompts: Sequence[ExplainedPrompt], **how: Any
) -> Tensor:
    """Logits [row, n, vocab] of a prompt a row, at its positions, repeating the last where others
    have more; a classifier's [row, class].

    Args:
        how: what else is done in the pass, as for `lenslrp.forward.forward`.
    """
    if prompts[0].pixels is not None:
        return image_logits(model, torch.stack([p.pixels for p in prompts if p.pixels is not None]))
    device = next(model.parameters()).device
    batch = Batch.of_rows([prompt.tokens for prompt in prompts])
    require_padding(model, batch.mask)
    require_ends(model, batch.mask, batch.tokens)
    tokens = masked_ids(model, batch.tokens, batch.mask).to(device)
    mask = batch.mask.to(device)
    kwargs = {} if bool(mask.all()) else {"attention_mask": mask.long()}
    batch = replace(batch, tokens=tokens, mask=mask, kwargs=kwargs)
    written = [prompt.decoder for prompt in prompts if prompt.decoder is not None]
    if written:  # causal: needs no mask
        decoder = Batch.of_rows(written)
        kwargs["decoder_input_ids"] = decoder.tokens.to(device)
        batch = replace(batch, decoder=decoder)
    most = max(len(prompt.positions) for prompt in prompts)
    positions = [[*p.positions, *[p.positions[-1]] * (most - len(p.positions))] for p in prompts]
    with forward(model, batch, columns=torch.tensor(positions, device=device), **how) as run:
        assert run.logits is not None
        return run.logits
