"""Images and sound as inputs: what is given is checked, and what became of it is named."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lenslrp.batch import Batch
from lenslrp.errors import InputError
from lenslrp.inputs import prepare_text
from lenslrp.leaves import Leaves

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

LAYOUTS: Mapping[str, str] = {
    "pixel_values": "batch, channel, height, width",
    "input_values": "batch, sample",
    "input_features": "batch, mel, frame",
}
"""The inputs that are numbers and not tokens: name -> what a tensor's axes are."""

LEAVES = ("pixels", "patches")


def main_input(model: TransformerBridge) -> str:
    """The name of what a model reads first: ``input_ids``, ``pixel_values``, ``input_values``."""
    return str(getattr(model.original_model, "main_input_name", "input_ids"))


def reads_no_text(model: TransformerBridge) -> bool:
    return main_input(model) in LAYOUTS


def floats_given(*floats: Tensor | None) -> dict[str, Tensor]:
    """The float inputs that are not ``None``, by name, in the order of ``LAYOUTS``."""
    return {name: x for name, x in zip(LAYOUTS, floats, strict=True) if x is not None}


def prepare_batch(
    model: TransformerBridge, text: Any, media: Mapping[str, Tensor], **tokens: Any
) -> Batch:
    """Everything that was given, ready for the forward pass.

    ``tokens`` are the keywords of `lenslrp.inputs.prepare`.

    Raises:
        InputError: see there, `prepare_media` and `check_media`.
    """
    if reads_no_text(model):
        for name in ("append", "attention_mask", "inputs_embeds", "decoder_input"):
            if tokens.get(name) is not None and len(tokens[name]):
                what = "a Sequence target" if name == "append" else name
                kind = type(model.original_model).__name__
                raise InputError(f"{what} goes with tokens, and {kind} reads {main_input(model)}")
        return prepare_media(model, text, media)
    prepared = prepare_text(model, text, **tokens)
    return replace(prepared, media=check_media(model, media)) if media else prepared


def prepare_media(model: TransformerBridge, floats: Any, media: Mapping[str, Tensor]) -> Batch:
    """The batch of a model that reads an image or a sound and no text.

    Raises:
        InputError: text or tokens, nothing at all, or a tensor that does not fit.
    """
    name, kind = main_input(model), type(model.original_model).__name__
    if isinstance(floats, Tensor) and floats.is_floating_point():
        if name in media:
            raise InputError(f"give {name} once: as input or by its name, not both")
        media = {name: floats, **media}
    elif floats is not None:
        got = "text" if isinstance(floats, str | list) else type(floats).__name__
        got = f"{floats.dtype} {list(floats.shape)}" if isinstance(floats, Tensor) else got
        raise InputError(f"{kind} reads {_wanted(model, name)}, not {got}: give {name}=")
    if name not in media:
        raise InputError(f"{kind} reads {_wanted(model, name)}: give {name}=")
    checked = check_media(model, media)
    batch = len(checked[name])
    empty = torch.zeros(batch, 0, dtype=torch.long, device=checked[name].device)
    return Batch(empty, empty.bool(), [0] * batch, media=checked)


def check_media(model: TransformerBridge, media: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float inputs on the model's device, each one that its forward takes, and finite.

    Raises:
        InputError: naming what does not fit.
    """
    takes = inspect.signature(model.original_model.forward).parameters
    kind = type(model.original_model).__name__
    weight = next(p for p in model.parameters() if p.is_floating_point())
    checked = {}
    for name, value in media.items():
        if name not in takes:
            known = [n for n in (*LAYOUTS, "input_ids") if n in takes]
            raise InputError(f"{kind} takes no {name}; it takes {', '.join(known)}")
        if not isinstance(value, Tensor):
            raise InputError(f"{name} must be a tensor, not {type(value).__name__}")
        if not value.is_floating_point():
            raise InputError(
                f"{name} are {value.dtype}: give what the model's own processor makes of an image "
                f"or a sound, numbers of type {weight.dtype}"
            )
        _require_shape(model, name, value)
        if value.dtype != weight.dtype:
            raise InputError(f"{name} are {value.dtype}, the model is {weight.dtype}")
        wrong = int((~torch.isfinite(value)).sum())
        if wrong:
            raise InputError(f"{name} has {wrong} values that are NaN or infinite")
        checked[name] = value.detach().to(weight.device)
    return checked


def check_kwargs(model: TransformerBridge, kwargs: Mapping[str, Any], prepared: Batch) -> None:
    """What else a forward pass is given must be what it takes, and no leaf.

    Raises:
        InputError: naming what it does not take, or what has a keyword of its own here.
    """
    if not kwargs:
        return
    takes = inspect.signature(model.original_model.forward).parameters
    kind = type(model.original_model).__name__
    for name, value in kwargs.items():
        if name not in takes:
            raise InputError(f"{kind} takes no {name}; it takes {', '.join(takes)}")
        if name in prepared.kwargs or name in LAYOUTS or name in ("input_ids", "use_cache"):
            raise InputError(f"{name} has a keyword of its own, or is set here; leave it out")
        if isinstance(value, Tensor) and value.requires_grad:
            raise InputError(f"{name} would be a leaf of its own: give it without a gradient")


def _wanted(model: TransformerBridge, name: str) -> str:
    sizes = _sizes(model, name)
    axes = LAYOUTS[name].split(", ") if len(sizes) != 2 else ["batch", "frame", "mel"]
    shown = [axes[0], *(f"{a}={s}" if s else a for a, s in zip(axes[1:], sizes, strict=True))]
    return f"{name} [{', '.join(shown)}]"


def _sizes(model: TransformerBridge, name: str) -> tuple[int, ...]:
    """The sizes after the batch that a configuration asks for; 0 for any."""
    config = model.original_model.config
    if name == "pixel_values":
        if main_input(model) != name:  # a tower reads them, in a layout of its own
            return (0, 0, 0)
        size = getattr(config, "image_size", 0)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        return (int(getattr(config, "num_channels", 0)), int(height), int(width))
    mel = getattr(config, "num_mel_bins", None)
    if name == "input_values" and mel is not None:  # a spectrogram
        return (int(getattr(config, "max_length", 0)), int(mel))
    return (0, 0) if name == "input_features" else (0,)


def _require_shape(model: TransformerBridge, name: str, value: Tensor) -> None:
    if main_input(model) != name:
        if value.numel() == 0:
            raise InputError(f"{name} is empty: {list(value.shape)}")
        return
    sizes = _sizes(model, name)
    fits = value.ndim == len(sizes) + 1 and value.numel() > 0
    if fits and all(size in (0, got) for size, got in zip(sizes, value.shape[1:], strict=True)):
        return
    raise InputError(
        f"{name} must be [{_wanted(model, name)[len(name) + 2 :]}, not {list(value.shape)}"
    )


def batch_size(text: Any, inputs_embeds: Tensor | None, floats: dict[str, Tensor]) -> int:
    """How many rows were given."""
    if inputs_embeds is not None:
        return len(inputs_embeds)
    if text is None and floats:
        return len(next(iter(floats.values())))
    if isinstance(text, Tensor) and text.is_floating_point():
        return len(text)
    if isinstance(text, str):
        return 1
    if isinstance(text, Tensor):
        return 1 if text.ndim < 2 else len(text)
    if isinstance(text, list) and text and isinstance(text[0], int):
        return 1
    return len(text) if isinstance(text, list) else 1


def with_sequence(prepared: Batch, leaves: Leaves) -> Batch:
    """After the forward pass: how many tokens an image or a sound became, and their names."""
    seen = (leaves.patches or leaves.seen)[0]
    batch = len(seen)
    places = seen.shape[2:] if seen.ndim == 4 else seen.shape[1:2]
    names = [*leaves.special_names]
    if len(places) == 2:
        names += [f"{row},{column}" for row in range(places[0]) for column in range(places[1])]
    else:
        names += [str(frame) for frame in range(places[0])]
    tokens = torch.arange(len(names), device=seen.device).expand(batch, -1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return replace(prepared, tokens=tokens, mask=mask, prompt_lengths=[0] * batch, names=names)


def sequence(special: list[Tensor], patches: Tensor) -> Tensor:
    """Relevance of learned tokens and of patches as one sequence: [batch, pos, d_model]."""
    rows = patches.flatten(2).transpose(1, 2) if patches.ndim == 4 else patches
    return torch.cat([*special, rows], dim=1)


def grid(patches: Tensor) -> Tensor | None:
    """Relevance of patches summed over features: [batch, row, column]; ``None`` for frames."""
    return patches.sum(dim=1) if patches.ndim == 4 else None


def head_of(model: TransformerBridge) -> bool:
    """Whether the model's output is logits, and not the hidden states of a bare encoder."""
    bare = type(model.original_model).__name__.endswith("Model")
    return not bare or "unembed.hook_out" in model.hook_dict


def labels_of(model: TransformerBridge) -> dict[int, str] | None:
    """Names of a classifier's classes and of a span's ends, ``None`` for other models."""
    kind = type(model.original_model).__name__
    if kind.endswith("ForQuestionAnswering"):
        return {0: "start", 1: "end"}
    if kind.endswith("ForNextSentencePrediction"):
        return {0: "next", 1: "random"}
    if kind.endswith("ForMultipleChoice"):
        return {0: "score"}
    if "Classification" not in kind:
        return None
    names = getattr(model.original_model.config, "id2label", None) or {}
    return {int(index): str(text) for index, text in names.items()}


def example(model: TransformerBridge, seed: int = 0, batch: int = 1) -> dict[str, Tensor]:
    """Random numbers of a shape that a model which reads no text accepts."""
    name = main_input(model)
    sizes = _sizes(model, name)
    if sizes == (0,):  # a waveform: enough samples for some frames
        steps = [int(step) for step in getattr(model.original_model.config, "conv_stride", [1])]
        sizes = (math.prod(steps) * 16,)
    weight = next(p for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, *sizes, generator=generator)
    return {name: values.to(weight.dtype).to(weight.device)}
