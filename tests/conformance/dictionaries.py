"""A tiny corpus and the options with which tests build dictionaries."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
from tests.unit.tiny import WORDS, tiny, word_tokenizer

OPTIONS: dict[str, Any] = {
    "sites": ["mlp.hook_post", "attn.hook_z"],
    "k": 4,
    "context": 12,
    "batch_size": 4,
    "sample": 20,
    "window": (3, 2),
}


def texts(n: int = 40, seed: int = 0) -> list[str]:
    """Texts of random words; the last ten repeat the first ten, so that there are ties."""
    draw = random.Random(seed)
    made = [" ".join(draw.choices(WORDS[2:], k=draw.randint(3, 25))) for _ in range(n - 10)]
    return [*made, *made[:10]]


def model(family: str = "llama", **changes: Any) -> Any:
    return tiny(family, tokenizer=word_tokenizer(), **changes)


def build(path: Path, corpus: Any = None, **options: Any) -> NeuronDictionary:
    merged = {**OPTIONS, "progress": False, **options}
    family = merged.pop("family", "llama")
    given: Any = texts() if corpus is None else corpus
    if family == "native":  # has no tokenizer
        given = word_tokenizer()(given, add_special_tokens=False)["input_ids"]
    return NeuronDictionary.build(model(family), given, path, **merged)


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a dictionary, byte for byte."""
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.is_file()}
