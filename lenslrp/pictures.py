"""Pictures as a caller has them, made into what a model reads by the model's own processor."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lenslrp.errors import InputError, first_line
from lenslrp.extras import require

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def image_processor(model: TransformerBridge) -> Any:
    """What makes numbers of an image for a model: of its checkpoint, or ``model.processor``.

    Raises:
        InputError: there is none.
    """
    from transformers import AutoImageProcessor

    own = getattr(model, "processor", None)
    if own is not None:
        return getattr(own, "image_processor", own)
    source = str(getattr(model.original_model.config, "_name_or_path", ""))
    try:
        return AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no image processor at {source!r}: load the model by name, set model.processor, or "
            "give tensors that a processor has made"
        ) from error


def pixels_of(model: TransformerBridge, pictures: Any) -> Tensor:
    """[batch, channel, height, width], in the type of the model's weights.

    Args:
        model: a ``TransformerBridge`` with a processor, see `image_processor`.
        pictures: a PIL image, the path of an image file, or a list of them.

    Raises:
        InputError: something else, a file that is no image, no processor, or one that makes more of
            an image than ``pixel_values``.
        MissingExtraError: Pillow is not installed.
    """
    several = isinstance(pictures, list | tuple)
    images = [_opened(picture) for picture in (pictures if several else [pictures])]
    if not images:
        raise InputError("pixel_values is an empty list: give at least one picture")
    kind = type(model.original_model).__name__
    made = image_processor(model)(images=images, return_tensors="pt")
    more = sorted(set(made) - {"pixel_values"})
    if more or not isinstance(made["pixel_values"], Tensor):
        raise InputError(
            f"the processor of {kind} makes {', '.join(['pixel_values', *more])} of a picture: "
            "run it yourself, and give what it makes as pixel_values and model_kwargs"
        )
    weight = next(p for p in model.parameters() if p.is_floating_point())
    return torch.as_tensor(made["pixel_values"]).to(weight.dtype)


def _opened(picture: Any) -> Any:
    require("PIL", "reading pictures", "images")
    from PIL import Image, ImageOps

    if isinstance(picture, str | PathLike):
        path = Path(picture)
        try:
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file).convert("RGB")
        except OSError as error:
            raise InputError(f"{path} cannot be read as an image: {first_line(error)}") from error
    if not isinstance(picture, Image.Image):
        raise InputError(
            "pixel_values is a tensor, a PIL image, the path of an image file or a list of these, "
            f"not {type(picture).__name__}"
        )
    return picture.convert("RGB")
