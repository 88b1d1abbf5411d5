"""A batch of relevance in a notebook: a heatmap of each row's tokens."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from lenslrp.views.heatmap import token_heatmap

if TYPE_CHECKING:
    from lenslrp.cache import RelevanceCache

SHOWN_ROWS = 8
"""Rows of a batch that a notebook shows."""


def batch_html(R: RelevanceCache) -> str:
    """The first rows of a batch, each in a scale of its own, and what no rule covered."""
    rows = []
    several = len(R.str_tokens) > 1
    for row, tokens in enumerate(R.str_tokens[:SHOWN_ROWS]):
        value = f"{R.target.of(row)} = {float(R.target.value[row]):.4g}"
        where = f"{R.composite.name}{f', row {row}, its own scale' * several}: "
        mask = R.attention_mask[row].tolist()
        rows.append(
            token_heatmap(
                tokens, R.tokens[row].tolist(), title=where + value, attention_mask=mask,
                grid=R.grid,
            )
        )  # fmt: skip
        if R.decoder_tokens is not None and R.decoder_str_tokens is not None:
            written, title = R.decoder_tokens[row].tolist(), f"decoder of {where}{value}"
            rows.append(token_heatmap(R.decoder_str_tokens[row], written, title=title))
    if len(R.str_tokens) > SHOWN_ROWS:
        rows.append(f"<p>{len(R.str_tokens) - SHOWN_ROWS} more rows: R[row] shows one.</p>")
    if R.coverage.uncovered:
        rows.append(f"<p>No rule for: {html.escape('; '.join(R.coverage.uncovered))}</p>")
    return "".join(rows)
