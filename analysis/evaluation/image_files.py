"""Images of a folder, a file or a ``datasets`` object, as a model's own processor makes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lenslrp.errors import InputError
from lenslrp.extras import require
from lenslrp.pictures import image_processor

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def read_images(model: TransformerBridge, source: Any, skipped: list[str]) -> dict[str, Tensor]:
    """Every image by its name: [channel, height, width], in the model's own type.

    All are kept, 0.6 MB each for a model that reads 224 pixels in float32.

    Args:
        model: a ``TransformerBridge`` that was loaded by name, so that its processor is found.
        source: a folder of image files; an ``.npz`` file with ``images`` [n, height, width, 3] of
            bytes; or dicts with an ``image`` (a PIL image or such an array), as a ``datasets``
            object gives them.
        skipped: gets the name of every image that cannot be read, and why.

    Raises:
        InputError: no such source, or the model has no processor of its own.
        MissingExtraError: Pillow is not installed.
    """
    require("PIL", "reading images")  # which transformers' processors need too
    process = image_processor(model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    pixels: dict[str, Tensor] = {}
    for name, image in _images(source):
        if isinstance(image, ValueError):
            skipped.append(f"{name}: {image}")
        else:
            pixels[name] = process(images=[image], return_tensors="pt")["pixel_values"][0].to(dtype)
    return pixels


def _images(source: Any) -> Iterator[tuple[str, Any]]:
    """Names, and images [height, width, 3] of bytes, or why there is none."""
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_dir():
            yield from _folder(path)
        elif path.is_file() and path.suffix == ".npz":
            yield from _arrays(path)
        else:
            raise InputError(f"images are a folder or an .npz file; none at {str(path)[:200]!r}")
    elif isinstance(source, Iterable):
        for number, entry in enumerate(source):
            image = entry.get("image") if isinstance(entry, dict) else None
            yield f"record {number}", _bytes(image)
    else:
        raise InputError(
            "images come from a folder, an .npz file or dicts with an 'image', not "
            f"{type(source).__name__}"
        )


def _folder(path: Path) -> Iterator[tuple[str, Any]]:
    from PIL import Image

    files = [p for p in sorted(path.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES]
    for file in files:
        try:
            with Image.open(file) as image:
                pixels = _bytes(image)
        except (OSError, Image.DecompressionBombError) as error:
            pixels = ValueError(f"no image: {error}"[:200])
        yield file.name, pixels


def _arrays(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["images"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path.name} has no array of images: {error}") from error
    for number, image in enumerate(images):
        yield f"{path.name} {number}", _bytes(image)


def _bytes(image: Any) -> Any:
    """[height, width, 3] of bytes, or the reason why not."""
    if hasattr(image, "convert"):  # a PIL image
        image = np.asarray(image.convert("RGB"))
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[-1] != 3:
        shape = list(getattr(image, "shape", ()))
        return ValueError(f"no image, or not [height, width, 3]: {type(image).__name__} {shape}")
    if image.dtype != np.uint8:
        return ValueError(f"its numbers are {image.dtype}, not bytes")
    return image
