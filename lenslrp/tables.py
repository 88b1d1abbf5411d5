"""Tables of a relevance cache: of tokens and words, heads, experts, layers and single units."""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lenslrp.batch import Batch, in_windows
from lenslrp.errors import InputError
from lenslrp.hooks.structure import layer_of

if TYPE_CHECKING:
    from lenslrp.cache import RelevanceCache


def token_table(cache: RelevanceCache) -> pd.DataFrame:
    """See `RelevanceCache.to_dataframe`."""
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
    text: Batch, pieces: list[list[str]], ids: Tensor, relevance: Tensor, positions: Tensor | None
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


def head_table(cache: RelevanceCache, row: int) -> pd.DataFrame:
    """See `RelevanceCache.heads`."""
    rows: dict[int | str, list[float]] = {}
    batch, blocks = len(cache.tokens), _scans(cache)
    if not blocks or any(name.endswith("attn.hook_z") for name in cache):
        blocks = [*_blocks(cache, "attn.hook_z"), *blocks]
    stacks = list(dict.fromkeys(block.stack for block in blocks))
    for block in sorted(blocks, key=lambda block: (stacks.index(block.stack), block.layer)):
        z = block.value
        if cache.reduced.get(block.name) == "sum_positions":
            z = z.unsqueeze(1)
        if z.ndim == 4:  # batch pos head d_head
            z = z.sum(dim=-1)
        each = len(z) // batch if in_windows(block.name) else 1
        if z.ndim != 3 or len(z) != each * batch:
            name = block.name.rpartition(".")[2]
            raise InputError(f"{name} was reduced to {list(z.shape)}: no heads are left in it")
        rows[block.label] = z[row * each : (row + 1) * each].sum(dim=(0, 1)).tolist()
    return _frame(rows, "head")


def mixer_label(hook: str) -> str:
    """What the row of a recurrent mixer is called, by one of its hook points: ``"3.mixer"``."""
    return hook.partition("blocks.")[2].rpartition(".")[0]


def _scans(cache: RelevanceCache) -> list[_Block]:
    """The outputs of the scans of recurrent mixers; one without heads has a single one."""
    blocks = []
    for name, value in cache.values.items():
        if name.endswith(".hook_scan_out"):
            axes = {None: 3, "sum": 2, "sum_positions": 2}.get(cache.reduced.get(name))
            value = value.to_dense() if value.is_sparse else value
            if value.ndim == axes:  # without heads: the only one stands before the channels
                value = value.unsqueeze(1 if cache.reduced.get(name) == "sum_positions" else 2)
            layer = layer_of(name) or 0
            blocks.append(_Block(layer, name.split(".")[0], name, value, mixer_label(name)))
    return blocks


def expert_table(cache: RelevanceCache, row: int) -> pd.DataFrame:
    """See `RelevanceCache.experts`."""
    rows: dict[int | str, list[float]] = {}
    for block in _blocks(cache, "mlp.hook_expert_post"):
        value = block.value
        if value.ndim != 4:
            raise InputError(f"hook_expert_post was reduced to {list(value.shape)}")
        chosen = _chosen(cache, block)[row]
        sums = value.new_zeros(cache.n_experts)
        rows[block.label] = sums.index_add(
            0, chosen.flatten(), value[row].sum(-1).flatten()
        ).tolist()
    return _frame(rows, "expert")


def residual_table(cache: RelevanceCache, row: int) -> pd.DataFrame:
    """See `RelevanceCache.residual`."""
    rows: dict[int | str, list[float]] = {}
    pre, post = _blocks(cache, "hook_resid_pre"), _blocks(cache, "hook_resid_post")
    last = {block.stack: block for block in post}
    if len(last) == 1:
        ends = [last[post[-1].stack]._replace(label="final")]
    else:
        ends = [block._replace(label=f"{stack}.final") for stack, block in last.items()]
    for block in [*pre, *ends]:
        x = block.value
        sums = x.sum(dim=-1) if x.ndim == 3 else x
        real = cache.batch.of(block.name, sums).mask[row].to(x.device)
        rows[block.label] = sums[row, real].tolist()
    return _frame(rows, "position")


def top_table(
    cache: RelevanceCache, hook: str, k: int, row: int, position: int | None
) -> pd.DataFrame:
    """See `RelevanceCache.top`."""
    if k < 1:
        raise InputError(f"k must be at least 1, not {k}")
    activations = cache.activations
    records: list[dict[str, Any]] = []
    blocks = _blocks(cache, hook)
    several = len({block.stack for block in blocks}) > 1
    for block in blocks:
        name, value = block.name, block.value
        text, tokens = _text_at(cache, name, value)
        positions = text.positions[row].tolist()
        experts = value.ndim == 4 and hook.endswith("hook_expert_post")
        if (value.ndim != 3 and not experts) or name in cache.position_axes:
            of_heads = hook.endswith(("hook_z", "hook_scan_out"))
            heads = ": R.heads() has the relevance of heads" * of_heads
            raise InputError(
                f"{hook} has shape {list(value.shape)}; top() needs [batch, pos, features]{heads}"
            )
        first, shown = 0, value[row]
        if position is not None:
            first = text.column(position, row)
            shown = shown[first : first + 1]
        flat = shown.flatten()
        best = flat.abs().topk(min(k, flat.numel())).indices
        for index in torch.stack(torch.unravel_index(best.cpu(), shown.shape), dim=1).tolist():
            index[0] += first
            if positions[index[0]] < 0:
                continue
            record = {
                **({"stack": block.stack} if several else {}),
                "layer": block.layer,
                "position": positions[index[0]],
                "token": tokens[row][index[0]],
                "neuron": index[-1],
                "relevance": float(value[(row, *index)]),
                "activation": float(activations[name][(row, *index)])
                if name in activations
                else float("nan"),
            }
            if experts:
                record["expert"] = int(_chosen(cache, block)[row, index[0], index[1]])
            records.append(record)
    records.sort(key=lambda record: -abs(record["relevance"]))
    return pd.DataFrame(records[:k])


def word_table(cache: RelevanceCache, row: int, *, decoder: bool) -> pd.DataFrame:
    """See `RelevanceCache.words`."""
    words, relevance = cache.words_, cache.tokens
    if decoder:
        if cache.decoder_tokens is None:
            raise InputError("decoder=True is for encoder-decoders; this model has one text")
        words, relevance = cache.decoder_words_, cache.decoder_tokens
    if not words:
        raise InputError("this relevance was saved without its words; explain the text again")
    values = relevance[row].tolist()
    places = (cache.batch.written if decoder else cache.batch).positions[row].tolist()
    return pd.DataFrame(
        [
            (
                word.text,
                math.fsum(values[i] for i in word.positions),
                [places[i] for i in word.positions],
            )
            for word in words[row]
        ],
        columns=["word", "relevance", "positions"],
    )


def _text_at(cache: RelevanceCache, name: str, x: Tensor) -> tuple[Batch, list[list[str]]]:
    """The text whose tokens a hook point's ``x`` holds: where they are, and what they are."""
    text = cache.batch.of(name, x)
    if text is cache.batch:
        return text, cache.str_tokens
    if text is cache.batch.decoder and cache.decoder_str_tokens is not None:
        return text, cache.decoder_str_tokens
    return text, [[str(place) for place in range(x.shape[1])]] * len(x)


def _frame(rows: dict[int | str, list[float]], columns: str) -> pd.DataFrame:
    """A row for each layer; a shorter one (of another stack) ends with NaN."""
    frame = pd.DataFrame([pd.Series(values) for values in rows.values()], index=list(rows))
    return frame.rename_axis(index="layer", columns=columns)


class _Block(NamedTuple):
    """What was read in one block."""

    layer: int
    stack: str  #: ``blocks``, ``vision_blocks``
    name: str
    value: Tensor
    label: int | str  #: the layer, with its stack where there are several


def _blocks(cache: RelevanceCache, hook: str) -> list[_Block]:
    """The values at a hook of every block, a stack after the other."""
    blocks = []
    for name, value in cache.values.items():
        layer = layer_of(name)
        if layer is not None and name.split(f".{layer}.", 1)[-1] == hook:
            whole = value.to_dense() if value.is_sparse else value
            blocks.append(_Block(layer, name.split(f".{layer}.", 1)[0], name, whole, layer))
    if not blocks:
        raise InputError(f"{hook!r} was not read in any block{_read(cache, hook)}")
    stacks = list(dict.fromkeys(block.stack for block in reversed(blocks)))  # read backwards
    if len(stacks) > 1:
        blocks = [block._replace(label=f"{block.stack}.{block.layer}") for block in blocks]
    return sorted(blocks, key=lambda block: (stacks.index(block.stack), block.layer))


def _read(cache: RelevanceCache, hook: str) -> str:
    """What to do about a hook that no block has: the nearest that were read, or to read it."""
    read = {n.split(f".{layer_of(n)}.", 1)[-1] for n in cache.values if layer_of(n) is not None}
    near = difflib.get_close_matches(hook, sorted(read), n=3)
    nearest = f"; nearest of what was read: {', '.join(near)}" if near else ""
    return f"{nearest}; ask for a hook point in names_filter, such as 'mlp.hook_post'"


def _chosen(cache: RelevanceCache, block: _Block) -> Tensor:
    place = f"{block.stack}.{block.layer}."
    return next(chosen for path, chosen in cache.routing.items() if path.startswith(place))
