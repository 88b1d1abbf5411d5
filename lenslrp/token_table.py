"""Token relevance as a table, a row a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lenslrp.batch import Batch

if TYPE_CHECKING:
    from lenslrp.cache import RelevanceCache


def token_table(cache: RelevanceCache) -> pd.DataFrame:
    """Relevance at the leaves, a row a token; padding is left out.

    Returns:
        ``row`` (which prompt of the batch), ``prompt``, ``position`` (0 is the row's first token
        that is not padding), ``token``, ``token_id``, ``relevance``, ``target`` (what was explained
        in this row) and ``value`` (its value; relevance is in its unit). Where a model has them:
        ``side`` (``encoder`` or ``decoder``; ``text`` or ``image`` where it reads both),
        ``positional`` (relevance of the learned position) and ``patch_row``, ``patch_column``.
    """
    grid, written = cache.grid, cache.decoder_tokens
    text = _tokens(cache.batch, cache.str_tokens, cache.token_ids, cache.tokens, cache.positions)
    sides = {"encoder" if written is not None else "text": text}
    if grid is not None:
        rows, columns = grid
        _place(text, columns, text["position"] - (cache.tokens.shape[1] - rows * columns))
    elif cache.patches is not None and len(cache.patches) == len(cache.tokens):
        sides["image"] = _image(cache.patches)
    if written is not None and cache.decoder_str_tokens is not None:
        ids = cache.decoder_token_ids
        sides["decoder"] = _tokens(
            cache.batch.written,
            cache.decoder_str_tokens,
            torch.full_like(written, -1).long() if ids is None else ids,
            written,
            cache.decoder_positions,
        )
    frame = text
    if len(sides) > 1:
        frame = pd.concat([part.assign(side=side) for side, part in sides.items()])
        frame = frame.sort_values("row", kind="stable", ignore_index=True)
        frame.insert(1, "side", frame.pop("side"))
    row = frame["row"].to_numpy()
    prompts = cache.prompts or ["".join(pieces) for pieces in cache.str_tokens]
    frame.insert(1, "prompt", [prompts[i] for i in row])
    targets = [cache.target.of(i) for i in range(len(prompts))]
    return frame.assign(target=[targets[i] for i in row], value=_numpy(cache.target.value)[row])


def _tokens(
    text: Batch,
    pieces: list[list[str]],
    ids: Tensor,
    relevance: Tensor,
    positions: Tensor | None,
) -> pd.DataFrame:
    """The real tokens of one sequence in every row."""
    at = row, column = _numpy(text.mask).nonzero()
    frame = pd.DataFrame(
        {
            "row": row,
            "position": _numpy(text.positions)[at],
            "token": [pieces[i][j] for i, j in zip(row, column, strict=True)],
            "token_id": _numpy(ids)[at],
            "relevance": _numpy(relevance)[at],
        }
    )
    if positions is not None and positions.shape == relevance.shape:
        frame["positional"] = _numpy(positions)[at]
    return frame


def _image(patches: Tensor) -> pd.DataFrame:
    """The patches of an image that stands beside text, row by row."""
    images, rows, columns = patches.shape
    place = np.tile(np.arange(rows * columns), images)
    frame = pd.DataFrame(
        {
            "row": np.repeat(np.arange(images), rows * columns),
            "position": place,
            "token": [f"{i // columns},{i % columns}" for i in place],
            "token_id": -1,
            "relevance": _numpy(patches).ravel(),
        }
    )
    _place(frame, columns, frame["position"])
    return frame


def _place(frame: pd.DataFrame, columns: int, place: pd.Series) -> None:
    """Where in the grid a token is, by its number among the patches; nowhere if negative."""
    inside = place >= 0
    frame["patch_row"] = (place // columns).where(inside).astype("Int64")
    frame["patch_column"] = (place % columns).where(inside).astype("Int64")


def _numpy(x: Tensor) -> Any:
    x = x.detach().cpu()
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()
