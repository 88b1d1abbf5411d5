"""A ``RelevanceCache`` as one safetensors file: tensors, and what is said about them as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lenslrp.difference import AT_LEAVES
from lenslrp.errors import InputError
from lenslrp.files import whole
from lenslrp.hooks.composites import Composite
from lenslrp.hooks.coverage import Coverage
from lenslrp.ledger import Ledger
from lenslrp.targets import Explained
from lenslrp.text.words import Word

if TYPE_CHECKING:
    from lenslrp.cache import RelevanceCache

TENSORS = (
    *AT_LEAVES, "tokens", "token_ids", "attention_mask", "decoder_token_ids",
    "decoder_attention_mask",
)  # fmt: skip
GROUPS = {
    "values": "relevance/", "activations": "activation/", "routing": "routing/", "inputs": "input/"
}  # fmt: skip
"""Where the tensors of each dict of the cache are in the file."""


def save_cache(cache: RelevanceCache, path: Path) -> Path:
    """Write everything to one file; see `RelevanceCache.save`."""
    tensors = {
        prefix + name: value.to_dense() if value.is_sparse else value
        for group, prefix in GROUPS.items()
        for name, value in getattr(cache, group).items()
    }
    tensors |= {n: getattr(cache, n) for n in TENSORS if getattr(cache, n) is not None}
    tensors["target"] = cache.target.value
    coverage, ledger = cache.coverage, cache.ledger_
    meta = {
        "format": "lenslrp.relevance/1",
        "str_tokens": cache.str_tokens,
        "decoder_str_tokens": cache.decoder_str_tokens,
        "prompts": cache.prompts,
        "words": cache.words_,
        "decoder_words": cache.decoder_words_,
        "target": cache.target.text,
        "targets": cache.target.texts,
        "asked": cache.target.asked,
        "composite": cache.composite.name,
        "rules": {role: rule.name for role, rule in cache.composite.rules.items()},
        "n_experts": cache.n_experts,
        "model_name": cache.model_name,
        "dtype": cache.dtype,
        "reduced": cache.reduced,
        "position_axes": cache.position_axes,
        "sites": _as_json(coverage.sites),
        "uncovered": coverage.uncovered,
        "off_path": coverage.off_path,
        "notes": coverage.notes,
        "cuts": coverage.cuts,
        "balanced": coverage.balanced,
        "ledger": ledger.to_dict() if ledger else None,
        "ledger_table": _as_json(ledger.table) if ledger else None,
    }
    # Names that share one hook point share one tensor, which safetensors asks to be separate.
    cpu = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with whole(path, ours=b'"lenslrp"') as part:
        save_file(cpu, part, metadata={"lenslrp": json.dumps(meta)})
    return path


def load_parts(path: Path) -> dict[str, Any]:
    """The arguments of the ``RelevanceCache`` that `save_cache` wrote.

    Raises:
        InputError: a file that is something else.
    """
    with safe_open(str(path), framework="pt") as file:
        meta = (file.metadata() or {}).get("lenslrp")
        if meta is None:
            raise InputError(f"{path} holds no saved relevance")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    info = json.loads(meta)
    ledger = None
    if info["ledger"] is not None:
        numbers = {k: v for k, v in info["ledger"].items() if k != "error"}
        ledger = Ledger(**numbers, table=_frame(info["ledger_table"]).rename_axis(index="layer"))

    def part(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}

    def words(rows: list[Any]) -> list[list[Word]]:
        return [[Word(*word) for word in row] for row in rows]

    return {
        **{group: part(prefix) for group, prefix in GROUPS.items()},
        **{name: tensors.get(name) for name in TENSORS},
        "str_tokens": info["str_tokens"],
        "decoder_str_tokens": info.get("decoder_str_tokens"),
        "prompts": info.get("prompts") or ["".join(row) for row in info["str_tokens"]],
        "words_": words(info.get("words", [])),
        "decoder_words_": words(info.get("decoder_words", [])),
        "target": Explained(
            info["target"],
            tensors["target"],
            tuple(info.get("targets", ())),
            tuple(map(tuple, info.get("asked", ()))),
        ),
        "composite": Composite(info["composite"], {}),
        "coverage": Coverage(
            _frame(info["sites"]).astype({"layer": "Int64"}),
            info["uncovered"],
            info["off_path"],
            info["notes"],
            info.get("cuts", []),
            info.get("balanced", True),
        ),
        "ledger_": ledger,
        "model_name": info["model_name"],
        "dtype": info["dtype"],
        "n_experts": info.get("n_experts", 0),
        "reduced": info.get("reduced", {}),
        "position_axes": info.get("position_axes", {}),
    }


def _as_json(frame: pd.DataFrame) -> Any:
    return json.loads(frame.to_json(orient="split", double_precision=15))


def _frame(split: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(split["data"], columns=split["columns"], index=split["index"])
