"""Images and sound as inputs: what is given is checked, and what became of it is named."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lenslrp.batch import Batch
from lenslrp.errors import InputError
from lenslrp.hooks.padding import require_sound_padding
from lenslrp.inputs import as_mask, is_encoder_decoder, prepare_text, with_decoder
from lenslrp.leaves import Leaves
from lenslrp.pictures import pixels_of
from lenslrp.recordings import features_of, is_recording

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

LAYOUTS: Mapping[str, str] = {
    "pixel_values": "batch, channel, height, width",
    "input_values": "batch, sample",
    "input_features": "batch, mel, frame",
}
"""The inputs that are numbers and not tokens: name -> what a tensor's axes are."""

SOUNDS = ("input_values", "input_features")
LEAVES = ("pixels", "patches")
WRITTEN = ("append", "decoder_input")
"""Keywords of `lenslrp.inputs.prepare_text` that are of a decoder."""


def main_input(model: TransformerBridge) -> str:
    """The name of what a model reads first: ``input_ids``, ``pixel_values``, ``input_values``."""
    return str(getattr(model.original_model, "main_input_name", "input_ids"))


def reads_no_text(model: TransformerBridge) -> bool:
    return main_input(model) in LAYOUTS


def floats_given(
    model: TransformerBridge, pictures: Any, *others: Tensor | None
) -> dict[str, Tensor]:
    """The float inputs that are not ``None``, by name, in the order of ``LAYOUTS``.

    Raises:
        InputError: pictures that are none, see `lenslrp.pictures.pixels_of`.
    """
    if pictures is not None and not isinstance(pictures, Tensor):
        takes = _takes(model)
        if "pixel_values" not in takes:
            raise InputError(
                f"{type(model.original_model).__name__} takes no pixel_values; it takes "
                f"{', '.join(name for name in (*LAYOUTS, 'input_ids') if name in takes)}"
            )
        pictures = pixels_of(model, pictures)
    floats = (pictures, *others)
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
        if is_recording(text) and main_input(model) in SOUNDS and not media:
            media, mask = features_of(model, main_input(model), text)
            text = None
            if mask is not None:
                tokens = {**tokens, "attention_mask": mask}
        writes = is_encoder_decoder(model)
        masked = () if masks_frames(model) else ("attention_mask",)
        for name in (*masked, "inputs_embeds", *(() if writes else WRITTEN)):
            if tokens.get(name) is not None and len(tokens[name]):
                what = "a Sequence target" if name == "append" else name
                kind = type(model.original_model).__name__
                raise InputError(f"{what} goes with tokens, and {kind} reads {main_input(model)}")
        batch = prepare_media(model, text, media, tokens.get("attention_mask"))
        if not writes:
            return batch
        return with_decoder(model, batch, tokens.get("decoder_input"), tokens.get("append") or [])
    prepared = prepare_text(model, text, **tokens)
    if is_pair(model.original_model):
        _require_pairs(model, prepared, media)
    return replace(prepared, media=check_media(model, media)) if media else prepared


def _require_pairs(model: TransformerBridge, prepared: Batch, media: Mapping[str, Tensor]) -> None:
    kind, texts = type(model.original_model).__name__, len(prepared.tokens)
    images = len(media["pixel_values"]) if "pixel_values" in media else 0
    if images != texts:
        raise InputError(
            f"{kind} compares the image and the text of each row, and there are {images} images "
            f"(pixel_values=) and {texts} texts; repeat an image for several texts, or a text"
        )


def masks_frames(model: TransformerBridge) -> bool:
    """Whether a model takes a mask of a waveform's samples, and makes one of its frames of it."""
    return hasattr(model.original_model, "_get_feature_vector_attention_mask")


def prepare_media(
    model: TransformerBridge,
    floats: Any,
    media: Mapping[str, Tensor],
    attention_mask: Tensor | None = None,
) -> Batch:
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
    if getattr(model.original_model.config, "add_adapter", False):
        raise InputError(
            f"{kind} with add_adapter=True: its adapter makes fewer outputs than there are frames, "
            "so a position would mean two things; it is not covered"
        )
    checked = check_media(model, media)
    batch = len(checked[name])
    empty = torch.zeros(batch, 0, dtype=torch.long, device=checked[name].device)
    mask = None if attention_mask is None else as_mask(attention_mask, checked[name], name)
    if mask is None or bool(mask.all()):
        return Batch(empty, empty.bool(), [0] * batch, media=checked)
    kwargs, frames = {"attention_mask": mask.long()}, _frames(model, mask)
    return Batch(empty, empty.bool(), frames, kwargs, media=checked)


def _frames(model: TransformerBridge, mask: Tensor) -> list[int]:
    """How many frames are made of each row of a batch of sounds, under its mask."""
    require_sound_padding(model, mask)
    inner: Any = model.original_model
    frames: list[int] = inner._get_feat_extract_output_lengths(mask.sum(dim=1)).tolist()
    if min(frames) < 1:
        row, kind = frames.index(min(frames)), type(inner).__name__
        raise InputError(f"row {row} is too short: {kind} makes no frame of it")
    return frames


def check_media(model: TransformerBridge, media: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float inputs on the model's device, each one that its forward takes, and finite.

    Raises:
        InputError: naming what does not fit.
    """
    takes = _takes(model)
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
    takes = _takes(model)
    kind = type(model.original_model).__name__
    for name, value in kwargs.items():
        if name not in takes:
            raise InputError(f"{kind} takes no {name}; it takes {', '.join(takes)}")
        if name in prepared.kwargs or name in LAYOUTS or name in ("input_ids", "use_cache"):
            raise InputError(f"{name} has a keyword of its own, or is set here; leave it out")
        if isinstance(value, Tensor) and value.requires_grad:
            raise InputError(f"{name} would be a leaf of its own: give it without a gradient")


def _takes(model: TransformerBridge) -> list[str]:
    """What the model's forward pass takes: its class's, which rules on an instance do not hide."""
    return list(inspect.signature(type(model.original_model).forward).parameters)[1:]


def _wanted(model: TransformerBridge, name: str) -> str:
    sizes = _asked(model, name)
    spectrogram = name == "input_values" and len(sizes) == 2
    axes = ["batch", "frame", "mel"] if spectrogram else LAYOUTS[name].split(", ")
    shown = [axes[0], *(f"{a}={s}" if s else a for a, s in zip(axes[1:], sizes, strict=True))]
    return f"{name} [{', '.join(shown)}]"


def _asked(model: TransformerBridge, name: str) -> tuple[int, ...]:
    """The sizes after the batch that a model takes no other of; 0 for any.

    Embeddings interpolate their positions for an image of another size: always (DINOv2), or if
    they are told to (ViT).
    """
    sizes = _sizes(model, name)
    kinds = {type(part) for part in model.original_model.modules()}
    embed = [kind for kind in kinds if kind.__name__.endswith("Embeddings")]
    told = any("interpolate_pos_encoding" in inspect.signature(k.forward).parameters for k in embed)
    return sizes if told or name != "pixel_values" else (*sizes[:1], 0, 0)


def _sizes(model: TransformerBridge, name: str) -> tuple[int, ...]:
    """The sizes after the batch that a configuration has; 0 where it has none."""
    config = model.original_model.config
    if name == "pixel_values":
        if main_input(model) != name and not is_pair(
            model.original_model
        ):  # a tower reads them, in a layout of its own
            return (0, 0, 0)
        config = getattr(config, "vision_config", config)
        size = getattr(config, "image_size", 0)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        return (int(getattr(config, "num_channels", 0)), int(height), int(width))
    mel = getattr(config, "num_mel_bins", None)
    if name == "input_values" and mel is not None:  # a spectrogram
        return (int(getattr(config, "max_length", 0)), int(mel))
    if name == "input_features":
        return (int(mel or 0), 2 * int(getattr(config, "max_source_positions", 0)))
    return (0,)


def _require_shape(model: TransformerBridge, name: str, value: Tensor) -> None:
    if main_input(model) != name and not is_pair(model.original_model):
        if value.numel() == 0:
            raise InputError(f"{name} is empty: {list(value.shape)}")
        return
    sizes = _asked(model, name)
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
    if any(prepared.prompt_lengths):  # under a mask
        frames = torch.tensor(prepared.prompt_lengths, device=seen.device)
        mask = torch.arange(len(names), device=seen.device) < frames[:, None]
    return replace(prepared, tokens=tokens, mask=mask, prompt_lengths=[0] * batch, names=names)


def sequence(special: list[Tensor], patches: Tensor) -> Tensor:
    """Relevance of learned tokens and of patches as one sequence: [batch, pos, d_model]."""
    rows = patches.flatten(2).transpose(1, 2) if patches.ndim == 4 else patches
    return torch.cat([*special, rows], dim=1)


def beside(tokens: Tensor, positions: Tensor | None, special: list[Tensor]) -> Tensor | None:
    """Relevance of positions as [batch, pos] of the sequence: registers have none, and get 0.

    Args:
        tokens: of the sequence, [batch, pos, d_model].
        positions: [batch, position].
        special: of the learned tokens, those without a position last.
    """
    if positions is None or positions.shape[1] == tokens.shape[1] or not special:
        return positions
    without = tokens.shape[1] - positions.shape[1]
    first = sum(part.shape[1] for part in special) - without
    none = positions.new_zeros(len(positions), without)
    return torch.cat([positions[:, :first], none, positions[:, first:]], dim=1)


def grid(patches: Tensor) -> Tensor | None:
    """Relevance of patches summed over features: [batch, row, column]; ``None`` for frames."""
    return patches.sum(dim=1) if patches.ndim == 4 else None


def head_of(model: TransformerBridge) -> bool:
    """Whether the model's output is logits, and not the hidden states of a bare encoder."""
    inner = model.original_model
    bare = type(inner).__name__.endswith(("Model", "WithProjection")) and not is_pair(inner)
    return not bare or "unembed.hook_out" in model.hook_dict


def is_pair(inner: Any) -> bool:
    """Whether a model of transformers compares an image with a text (CLIP, SigLIP)."""
    return hasattr(inner, "logit_scale") and hasattr(inner, "get_image_features")


def labels_of(model: TransformerBridge) -> dict[int, str] | None:
    """Names of the logits of a classifier, of a span's ends, or of a pair; ``None`` for others."""
    kind = type(model.original_model).__name__
    if kind.endswith("ForQuestionAnswering"):
        return {0: "start", 1: "end"}
    if is_pair(model.original_model):
        return {0: "similarity"}
    if kind.endswith("ForXVector"):
        return {}  # numbers without names
    if kind.endswith("ForNextSentencePrediction"):
        return {0: "next", 1: "random"}
    if kind.endswith("ForMultipleChoice"):
        return {0: "score"}
    if "Classification" not in kind:
        return None
    names = getattr(model.original_model.config, "id2label", None) or {}
    return {int(index): str(text) for index, text in names.items()}


def example(model: TransformerBridge, seed: int = 0, batch: int = 1) -> dict[str, Tensor]:
    """Random numbers of a shape that a model accepts which reads no text, or an image beside it."""
    name = "pixel_values" if is_pair(model.original_model) else main_input(model)
    sizes = _sizes(model, name)
    if sizes == (0,):  # a waveform: enough samples for some frames
        layers = [part for part in model.original_model.modules() if isinstance(part, nn.Conv1d)]
        sizes = (math.prod(layer.stride[0] for layer in layers) * 16,)
    weight = next(p for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, *sizes, generator=generator)
    return {name: values.to(weight.dtype).to(weight.device)}
