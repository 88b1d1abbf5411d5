"""``run_with_relevance``: one forward and one backward pass, relevance at every hook.

Sessions of one call; see `lenslrp.sessions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lenslrp.cache import RelevanceCache
from lenslrp.hooks.composites import Composite
from lenslrp.hooks.readers import NamesFilter
from lenslrp.hooks.rule_types import Rule
from lenslrp.reductions import Reduce
from lenslrp.sessions import Session

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def relevance_for_targets(
    model: TransformerBridge,
    input: Any = None,
    targets: list[Any] | tuple[Any, ...] = (None,),
    composite: Composite | Mapping[str, Rule] | None = None,
    names_filter: NamesFilter = None,
    *,
    prepend_bos: bool | None = None,
    reduce: Reduce = None,
    attention: str = "bridge",
    checkpoint: bool = False,
    strict: bool = True,
    ledger: bool = True,
    logits: str = "all",
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    decoder_input: Any = None,
    pixel_values: Any = None,
    input_values: Tensor | None = None,
    input_features: Tensor | None = None,
    leaves: str = "pixels",
    model_kwargs: Mapping[str, Any] | None = None,
) -> list[RelevanceCache]:
    """Explain k targets of one input from one forward pass: one cache a target.

    The forward pass is made once and a backward pass for each target, so that k targets cost less
    than k calls of `run_with_relevance`.

    Args:
        model: a ``TransformerBridge``, in eval mode.
        input: a string, strings, or a token tensor [batch, pos].
        targets: a list of targets, each as for `run_with_relevance`, for the whole batch. Targets
            of several tokens (``Sequence``) extend the prompt, so at most one of them can be given,
            alone.
        composite: this and what follows: as for `run_with_relevance`.
        names_filter: likewise.
        prepend_bos: likewise.
        reduce: likewise.
        attention: likewise.
        checkpoint: likewise.
        strict: likewise.
        ledger: likewise.
        logits: likewise.
        attention_mask: likewise.
        inputs_embeds: likewise.
        decoder_input: likewise.
        pixel_values: likewise.
        input_values: likewise.
        input_features: likewise.
        leaves: likewise.
        model_kwargs: likewise.

    Returns:
        One cache a target, in the order given.

    Raises:
        InputError: something given cannot be explained; the message says what would be valid.
        CoverageError: an operation on the path has no rule, or a rule did not fire.

    Examples:
        >>> paris, rome = lenslrp.relevance_for_targets(
        ...     model, "The capital of France is", [" Paris", " Rome"]
        ... )
        >>> paris.target.text
        "logit of ' Paris' at position -1"
    """
    with Session(
        model, composite, attention=attention, checkpoint=checkpoint, ledger=ledger, strict=strict,
        logits=logits, stays=False,
    ) as session:  # fmt: skip
        return session.relevance_for_targets(
            input, targets, names_filter, prepend_bos=prepend_bos, reduce=reduce,
            attention_mask=attention_mask, inputs_embeds=inputs_embeds, decoder_input=decoder_input,
            pixel_values=pixel_values, input_values=input_values, input_features=input_features,
            leaves=leaves, model_kwargs=model_kwargs,
        )  # fmt: skip


def run_with_relevance(
    model: TransformerBridge,
    input: Any = None,
    target: Any = None,
    composite: Composite | Mapping[str, Rule] | None = None,
    names_filter: NamesFilter = None,
    *,
    prepend_bos: bool | None = None,
    reduce: Reduce = None,
    attention: str = "bridge",
    checkpoint: bool = False,
    strict: bool = True,
    ledger: bool = True,
    logits: str = "all",
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    decoder_input: Any = None,
    pixel_values: Any = None,
    input_values: Tensor | None = None,
    input_features: Tensor | None = None,
    leaves: str = "pixels",
    model_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Tensor, RelevanceCache]:
    """Logits, and the relevance of every hook point for a target; mirrors ``run_with_cache``.

    Layer-wise relevance propagation (Bach et al., PLOS ONE 2015) through a transformer: AttnLRP
    (Achtibat et al., ICML 2024) if no other composite is given, with its gamma rules for images.
    Rules act in the backward pass; the forward pass is the model's own.

    Args:
        model: a ``TransformerBridge``, in eval mode.
        input: a string, strings, or a token tensor [batch, pos]. For a model that reads sounds, a
            recording or a list of them: samples [sample], or the path of a wav file, of which its
            ``processor`` makes numbers.
        target: a token (string or id), a `lenslrp.targets` object, a list of one per row, or
            ``None`` for the top logit at the last position. A string of several tokens is
            teacher-forced as a ``Sequence``.
        composite: the rules. If not given, `lenslrp.recommended` of the model: ``AttnLRPViT()``
            where it reads images and no text, else ``AttnLRP()``. ``R.composite`` says which.
        names_filter: as in ``run_with_cache``: ``None`` for all on the path, a name, names, or a
            predicate. ``"mlp.hook_post"`` stands for that hook in every block; ``[]`` for none.
        prepend_bos: for strings; ``None`` is the model's own default.
        reduce: what to keep of each hook: everything, ``"sum"`` over features, ``TopK(k)``, any
            function of the relevance tensor, or a dict from hook name to one of these.
        attention: ``"bridge"``, or ``"fused"`` for torch's fused kernel (no patterns, no scores).
        checkpoint: recompute each block in the backward pass, for long inputs.
        strict: raise on an operation without a rule; otherwise warn, and say so in ``R.coverage``.
        ledger: account for the whole target; ``False`` saves a few per cent.
        logits: ``"all"``, or ``"target"`` to compute logits at the target's positions alone, which
            are returned as [batch, n, vocab] and equal the others to rounding. Where a target, a
            hook at the unembedding or a name under ``unembed`` in ``names_filter`` needs them all,
            they are computed.
        attention_mask: [batch, pos], for token tensors with padding on one side; [batch, sample]
            for waveforms.
        inputs_embeds: [batch, pos, d_model] instead of ``input``; they are then the leaves.
        decoder_input: what the decoder of an encoder-decoder has written so far: a string or
            strings (its start token is put before them), or a token tensor [batch, pos] as it is;
            the start token alone by default. Targets are then positions of the decoder.
        pixel_values: [batch, channel, height, width], an image as the model's own processor makes
            it; or a PIL image, the path of a file, or a list of these, which it is run on. Beside
            ``input`` where the model reads both.
        input_values: [batch, sample] of a waveform, or [batch, frame, mel] of a spectrogram.
        input_features: likewise, for models that call them so.
        leaves: ``"pixels"``: relevance ends at what was given (pixels, samples) and patches are
            read on the way; ``"patches"``: it ends at the patch embeddings.
        model_kwargs: what else the model's own forward pass takes beside an image or a sound, such
            as ``image_sizes``, ``image_grid_thw`` or ``input_features_mask``.

    Returns:
        The logits [batch, pos, vocab] (a classifier's: [batch, class]), detached and equal to the
        model's own, and the relevance in units of the target (logits).

    Raises:
        InputError: something given cannot be explained; the message says what would be valid.
        CoverageError: an operation on the path has no rule, or a rule did not fire.
        OutOfMemoryError: the passes do not fit; the message says what would need less.

    Examples:
        >>> logits, R = lenslrp.run_with_relevance(model, "The capital of France is", " Paris")
        >>> R.str_tokens[0]
        ['The', ' capital', ' of', ' France', ' is']
        >>> R.tokens.shape, R["blocks.5.hook_resid_pre"].shape
        (torch.Size([1, 5]), torch.Size([1, 5, 576]))
        >>> R.target
        Explained(text="logit of ' Paris' at position -1")
    """
    with Session(
        model, composite, attention=attention, checkpoint=checkpoint, ledger=ledger, strict=strict,
        logits=logits, stays=False,
    ) as session:  # fmt: skip
        return session.run_with_relevance(
            input, target, names_filter, prepend_bos=prepend_bos, reduce=reduce,
            attention_mask=attention_mask, inputs_embeds=inputs_embeds, decoder_input=decoder_input,
            pixel_values=pixel_values, input_values=input_values, input_features=input_features,
            leaves=leaves, model_kwargs=model_kwargs,
        )  # fmt: skip
