"""What the zoo's models that read images or sound beside text are given: one small one a row.

Token :data:`PLACE` stands where an image's (a sound's) features go; how many a family makes of a
picture of two by two patches is measured by its own code, so it stands in the table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tests.conformance.families import VOCABULARY, tokens
from tests.conformance.zoo_configs import family

PLACE = VOCABULARY  #: the first of the ids that no text has
ROWS = 2

Given = dict[str, Any]


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)


def _picture(**more: Any) -> Given:
    return {"pixel_values": _noise(ROWS, 3, 8, 8), **more}


def _tiles(count: int, **more: Any) -> Given:
    return {"pixel_values": _noise(ROWS, count, 3, 8, 8), **more}


def _sizes() -> Given:
    return {"image_sizes": torch.tensor([[8, 8]] * ROWS)}


def _patches(**more: Any) -> Given:
    """Patches of two frames, flattened, in one row for all pictures (Qwen-VL)."""
    grid = torch.tensor([[1, 2, 2]] * ROWS)
    return {"pixel_values": _noise(ROWS * 4, 3 * 2 * 4 * 4), "image_grid_thw": grid, **more}


def _placed(side: int, values: int) -> Given:
    """A square of patches, flattened, with the place of each (Gemma 4)."""
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    return {
        "pixel_values": _noise(ROWS, side * side, values).sigmoid(),
        "image_position_ids": places.expand(ROWS, -1, -1),
    }


def _sound(frames: int, mask: str) -> Given:
    masks = {mask: torch.ones(ROWS, frames, dtype=torch.long)}
    return {"input_features": _noise(ROWS, 8, frames), **masks}


MEDIA: dict[str, tuple[int, Callable[[], Given]]] = {
    "Florence2ForConditionalGeneration": (5, _picture),
    "Gemma3ForConditionalGeneration": (1, _picture),
    "Idefics3ForConditionalGeneration": (1, lambda: _tiles(1)),
    "Llama4ForConditionalGeneration": (1, _picture),
    "LlavaForConditionalGeneration": (4, _picture),
    "LlavaNextForConditionalGeneration": (10, lambda: _tiles(2, **_sizes())),
    "LlavaOnevisionForConditionalGeneration": (10, lambda: _tiles(2, **_sizes())),
    "Gemma4ForConditionalGeneration": (1, lambda: _placed(3, 3 * 4 * 4)),
    "Gemma4UnifiedForConditionalGeneration": (1, lambda: _placed(1, 3 * 12 * 12)),
    "Mistral3ForConditionalGeneration": (1, lambda: _picture(**_sizes())),
    "Glm4vForConditionalGeneration": (1, _patches),
    "MuseGlimmerForConditionalGeneration": (1, _patches),
    "Qwen2_5_VLForConditionalGeneration": (1, _patches),
    "Qwen3VLForConditionalGeneration": (1, _patches),
    "Qwen3VLMoeForConditionalGeneration": (1, _patches),
    "Qwen3_5ForConditionalGeneration": (1, _patches),
    "Qwen3_5MoeForConditionalGeneration": (1, _patches),
    "Qwen2AudioForConditionalGeneration": (4, lambda: _sound(16, "feature_attention_mask")),
    "AudioFlamingo3ForConditionalGeneration": (4, lambda: _sound(16, "input_features_mask")),
    "MusicFlamingoForConditionalGeneration": (4, lambda: _sound(16, "input_features_mask")),
    "GlmAsrForConditionalGeneration": (2, lambda: _sound(16, "input_features_mask")),
}
"""Family -> how many tokens the picture or sound is worth, and what makes it."""

TEXT_ONLY = {
    "Emu3ForConditionalGeneration": "; an image is tokens, made by a codebook",
    "Gemma3nForConditionalGeneration": "; with text alone: TransformerLens refuses its images",
}
"""What stands in the table for the others."""

KEYWORDS = ("pixel_values", "input_values", "input_features")


def takes_media(name: str) -> bool:
    """Whether a class's forward pass takes what this module makes."""
    return bool({*KEYWORDS} & {*inspect.signature(getattr(hf, name).forward).parameters})


def reads(name: str) -> bool:
    """Whether there is a picture or a sound for a class."""
    return family(name) in MEDIA and takes_media(name)


def example(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Given, Given]:
    """Tokens with places for the features, the floats, and what else the forward pass takes."""
    places, make = MEDIA[family(name)]
    text = tokens(ROWS, 7)
    row = torch.cat([text[:, :2], torch.full((ROWS, places), PLACE), text[:, 2:]], dim=1)
    given = make()
    if "image_grid_thw" in given and not name.startswith("Muse"):
        given["mm_token_type_ids"] = (row == PLACE).long()
    floats = {key: value.to(dtype) for key, value in given.items() if key in KEYWORDS}
    return row, floats, {key: value for key, value in given.items() if key not in KEYWORDS}
