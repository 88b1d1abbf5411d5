"""The model run with something else in the place of what it embeds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lenslrp.errors import InputError
from lenslrp.forward import architecture, capture, keep_unembedded, parts_of, undone
from lenslrp.hooks.attach import Attached
from lenslrp.hooks.components import components, hook_points
from lenslrp.hooks.embeddings import embeddings
from lenslrp.hooks.readers import owners
from lenslrp.hooks.turns import turn
from lenslrp.inputs import Batch
from lenslrp.leaves import Leaves, Parts, cut_leaves, cut_media
from lenslrp.targets import Activation, Target


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No weight asks for a gradient inside, so that none is kept for it."""
    with turn(model):
        thawed = [weight for weight in model.parameters() if weight.requires_grad]
        try:
            for weight in thawed:
                weight.requires_grad_(False)
            yield
        finally:
            for weight in thawed:
                weight.requires_grad_(True)


def run(
    model: Any,
    prepared: Batch,
    target: Target,
    inputs: Tensor | None,
    leaves: Leaves | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and what the target reads, with ``inputs`` in place of what was embedded.

    Without ``inputs``, what is embedded is put into ``leaves``.
    """
    parts = list(components(model))
    hooks = [part.hook for part in parts_of(target) if isinstance(part, Activation)]
    captured: dict[str, Tensor] = {}
    kwargs: dict[str, Any] = {"use_cache": False, **prepared.kwargs}
    text: Tensor | None = prepared.tokens
    met: list[nn.Module] = []
    with frozen(model), undone(Attached()) as at:
        if prepared.media:
            kwargs, text = {**prepared.media}, None
            if leaves is not None:
                kwargs = dict(cut_media(at, parts, leaves, [], kwargs, "pixels"))
            if inputs is not None:
                kwargs["pixel_values"] = inputs
        elif "inputs_embeds" in kwargs:
            embeds = kwargs.pop("inputs_embeds")
            text = embeds if inputs is None else inputs
        elif inputs is not None:
            _embed(at, parts, inputs, met)
        elif leaves is not None:
            cut_leaves(at, embeddings(parts), leaves, prepared)
        owned = owners(module for _, module in parts)
        capture(at, hook_points(model, parts), owned, hooks, captured)
        keep_unembedded(at, parts, captured)
        logits: Tensor = model(text, return_type="logits", **kwargs)
    if inputs is not None and text is prepared.tokens and not met:
        raise InputError(f"{architecture(model)} embedded no tokens of shape {list(inputs.shape)}")
    return logits, captured


def _embed(at: Attached, parts: Parts, inputs: Tensor, met: list[nn.Module]) -> None:
    """Make the first embedding of tokens return ``inputs``; an encoder embeds before a decoder."""

    def replace_it(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        if met or out.ndim != 3 or out.shape != inputs.shape:
            return None
        met.append(module)
        return inputs

    for module, position in embeddings(parts):
        if not position:
            at.hook(module, replace_it)


def repeated(prepared: Batch, copies: int) -> Batch:
    """The batch ``copies`` times, one after the other."""

    def repeat(value: Any) -> Any:
        alike = isinstance(value, Tensor) and len(value) == len(prepared.tokens)
        return value.repeat(copies, *[1] * (value.ndim - 1)) if alike else value

    return replace(
        prepared,
        tokens=repeat(prepared.tokens),
        mask=repeat(prepared.mask),
        prompt_lengths=prepared.prompt_lengths * copies,
        kwargs={name: repeat(value) for name, value in prepared.kwargs.items()},
    )
