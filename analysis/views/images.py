"""Relevance of an image drawn over it: per patch and per pixel, red for and blue against.

Patches are the relevance at the patch embeddings, pixels what their convolution passes back to
them, summed over channels; each panel has a linear scale of its own, symmetric around 0, and says
what its largest value is. Relevance of single pixels has a heavy tail: their colours end at a
quantile, and the legend says where. What learned tokens (CLS) and learned positions hold is written
below: an image alone never shows it.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from lenslrp.analysis.views.drawing import (
    LIGHT,
    Theme,
    colour_bar,
    colour_map,
    new_figure,
    require_row,
)
from lenslrp.errors import InputError
from lenslrp.views.heatmap import signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from lenslrp.cache import RelevanceCache

PANELS = ("patches", "pixels")
_PIXEL_QUANTILE = 0.995
_LETTERS = 14  # to an inch of what is written below


def image_map(
    R: RelevanceCache,
    row: int = 0,
    *,
    image: Any = None,
    of: str | tuple[str, ...] | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """Patches and pixels of one image (or spectrogram), over the image where it is given.

    Args:
        R: of an image.
        row: which row of the batch.
        image: what the model saw, cropped as it saw it: an array [height, width] or
            [height, width, channel] of numbers from 0 to 1 or bytes, a tensor
            [channel, height, width], or a PIL image, of any resolution.
        of: ``"patches"``, ``"pixels"`` or both; by default what ``R`` has.
        theme: `LIGHT` or `DARK`.

    Raises:
        InputError: ``R`` explains no image, has no such row, or ``image`` is no image.
    """
    panels = _panels(R, of)
    require_row(R, row)
    picture = None if image is None else as_picture(image)
    width = 4.1 * len(panels) + 0.4
    figure, axes = new_figure(width, 4.6, theme, len(panels))
    figure.set_layout_engine("compressed")  # legends as high as the images
    for panel_axes, (name, values) in zip(axes, panels.items(), strict=True):
        name = "values" if name == "pixels" and R.pixels is None else name
        _panel(figure, panel_axes, name, np.asarray(values[row].double().cpu()), picture, theme)
    target = str(R.target).split("; ")[0]
    figure.suptitle(target, x=0.01, ha="left", color=theme.ink, fontsize=11, parse_math=False)
    below = textwrap.fill(elsewhere(R, row), width=int(_LETTERS * width))
    figure.supxlabel(below, x=0.01, ha="left", color=theme.ink, fontsize=8.5)
    return figure


def _panels(R: RelevanceCache, of: str | tuple[str, ...] | None) -> dict[str, Any]:
    """What can be drawn: name -> relevance [batch, row, column]."""
    available: dict[str, Any] = {}
    if R.patches is not None:
        available["patches"] = R.patches
        if R.pixels is not None and R.pixels.ndim == 4:
            available["pixels"] = R.pixels.sum(dim=1)
        elif "input_values" in R.inputs:  # a spectrogram [batch, frame, mel]
            available["pixels"] = R.inputs["input_values"].transpose(1, 2)
    chosen = tuple(available) if of is None else (of,) if isinstance(of, str) else tuple(of)
    missing = [name for name in chosen if name not in available]
    if missing or not chosen:
        what = missing[0] if missing else "patches"
        known = ", ".join(available) or "none: it explains no image"
        raise InputError(
            f'R has no relevance of {what!r} to draw (it has {known}); plot("tokens") draws any '
            'sequence, and leaves="patches" forms no pixels'
        )
    return {name: available[name] for name in chosen}


def as_picture(image: Any) -> NDArray[Any]:
    """Any image as grey values [height, width] from 0 to 1.

    Raises:
        InputError: not two or three axes, or one that is no channel.
    """
    values = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    if values.ndim == 3 and values.shape[0] in (1, 3, 4) and values.shape[-1] not in (1, 3, 4):
        values = np.moveaxis(values, 0, -1)  # a tensor's channels come first
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[-1] not in (1, 3, 4)):
        raise InputError(
            "image must be [height, width], [height, width, channel] or [channel, height, width], "
            f"not {list(values.shape)}"
        )
    values = values.astype(float)
    if values.ndim == 3:
        values = values[..., :3].mean(axis=-1)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 255:  # normalised by a processor: its own range is all that is known
        return (values - low) / (high - low)
    return values / 255 if high > 1 else values


def _panel(
    figure: Figure,
    axes: Axes,
    name: str,
    values: NDArray[Any],
    picture: NDArray[Any] | None,
    theme: Theme,
) -> None:
    size = np.abs(values[np.isfinite(values)])
    largest = float(size.max()) if size.size else 0.0
    quantile = 1.0 if name == "patches" else _PIXEL_QUANTILE
    limit = (float(np.quantile(size, quantile)) if size.size else 0.0) or largest or 1.0
    rows, columns = values.shape
    extent = (0, columns, rows, 0)
    strength: Any = None
    if picture is not None:
        axes.imshow(
            picture, cmap="gray", extent=extent, vmin=-0.6, vmax=1.0, interpolation="bilinear"
        )
        strength = 0.15 + 0.75 * np.clip(np.abs(np.nan_to_num(values)) / limit, 0, 1)
    drawn = axes.imshow(
        np.ma.masked_invalid(values),
        cmap=colour_map(theme),
        vmin=-limit,
        vmax=limit,
        alpha=strength,
        extent=extent,
        interpolation="nearest",
        aspect="equal",
    )
    axes.set_xticks([])
    axes.set_yticks([])
    best = int(np.nanargmax(np.abs(values))) if size.size else 0
    peak = signed(float(values.flat[best]), largest)
    ends = f"; full colour from {signed(limit, limit)}" if limit < largest else ""
    axes.set_title(f"{name}: largest {peak}{ends}", loc="left", color=theme.ink, fontsize=9)
    colour_bar(figure, drawn, axes, theme, "relevance")


def elsewhere(R: RelevanceCache, row: int = 0) -> str:
    """What an image does not show: relevance of learned tokens and positions, in words."""
    values = R.tokens[row].double()
    total = float(values.abs().sum()) or 1.0
    parts = [f"patches {float(R.patches[row].sum()):+.3g}"] if R.patches is not None else []
    for position in range(0 if R.special is None else R.special.shape[1]):
        value = float(values[position])
        share = abs(value) / total
        parts.append(f"{R.str_tokens[row][position]} {value:+.3g} ({share:.0%} of all |relevance|)")
    if R.positions is not None:
        parts.append(f"learned positions {float(R.positions[row].sum()):+.3g}")
    return "sums: " + ", ".join(parts)
