"""TransformerLens' modes: how each is switched on, and what it does to relevance.

``python -m tests.conformance.modes`` measures every mode on every family and writes the table of
``docs/reference/modes.md``; ``test_modes.py`` holds the table to what it says.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lenslrp
from lenslrp.targets import Logit, LogitDiff
from tests.conformance import zoo
from tests.conformance.families import FAMILIES, make, tokens

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reference" / "modes.md"
START, END = "<!-- measured: python -m tests.conformance.modes -->", "<!-- end -->"

FOLD_ONLY = {
    "fold_ln": True,
    "center_writing_weights": False,
    "center_unembed": False,
    "fold_value_biases": False,
}
MODES: Mapping[str, Callable[[Any], None]] = {
    "set_use_split_qkv_input(True)": lambda m: m.set_use_split_qkv_input(True),
    "set_use_attn_in(True)": lambda m: m.set_use_attn_in(True),
    "set_use_attn_result(True)": lambda m: m.set_use_attn_result(True),
    "set_use_hook_mlp_in(True)": lambda m: m.set_use_hook_mlp_in(True),
    "enable_compatibility_mode(no_processing=True)": lambda m: m.enable_compatibility_mode(
        no_processing=True
    ),
    "enable_compatibility_mode(), only fold_ln": lambda m: m.enable_compatibility_mode(**FOLD_ONLY),
    "enable_compatibility_mode()": lambda m: m.enable_compatibility_mode(),
}
HOOKS: Mapping[str, tuple[str, ...]] = {
    "set_use_split_qkv_input(True)": ("hook_q_input", "hook_k_input", "hook_v_input"),
    "set_use_attn_in(True)": ("hook_attn_in",),
    "set_use_attn_result(True)": ("hook_result",),
    "set_use_hook_mlp_in(True)": ("hook_mlp_in",),
}
"""The hook points that a mode brings to life."""

BUILDS: Mapping[str, Callable[..., Any]] = {
    **{name: lambda name=name, **k: make(name, **k) for name in FAMILIES},
    "bloom": lambda **k: zoo.build("BloomForCausalLM", **k),
    "mpt": lambda **k: zoo.build("MptForCausalLM", **k),
    "opt": lambda **k: zoo.build("OPTForCausalLM", **k),
    "t5": lambda **k: zoo.build("T5ForConditionalGeneration", **k),
}
SHOWN = ("llama", "qwen3", "gemma2", "phi", "phi3", "gpt2", "bloom", "opt", "t5")
"""The families in the table; the tests run on these."""

TARGETS = (Logit(5), LogitDiff(5, 7))


def arguments(family: str) -> dict[str, Any]:
    """What an input consists of besides its tokens."""
    return {"decoder_input": torch.tensor([[0, 4], [0, 6]])} if family == "t5" else {}


def switched(family: str, mode: str, **options: Any) -> Any:
    """A new bridge of the family in the mode.

    Raises:
        NotImplementedError: from TransformerLens, where the family does not have the mode.
    """
    model = BUILDS[family](**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            MODES[mode](model)
        finally:
            logging.disable(logging.NOTSET)
    return model.eval()


def relevance(model: Any, family: str, target: Any) -> Tensor:
    """Token relevance, of the encoder for an encoder-decoder."""
    _, cache = lenslrp.run_with_relevance(
        model, tokens(), target, names_filter=[], **arguments(family)
    )
    found: Tensor = cache.tokens
    return found


@dataclass(frozen=True)
class Effect:
    """What a mode does to token relevance, against the same model without it.

    Attributes:
        cosine: of the relevance of a logit.
        logit, difference: relative difference, in norm, of the relevance of a logit and of a
            difference of two logits.
    """

    cosine: float
    logit: float
    difference: float


def effect(family: str, mode: str) -> Effect | None:
    """Measured on the tiny model; ``None`` where TransformerLens itself refuses the mode."""
    plain = BUILDS[family]()
    try:
        model = switched(family, mode)
    except NotImplementedError:
        return None
    (a, b), (c, d) = (
        tuple(relevance(m, family, target).double().flatten() for m in (model, plain))
        for target in TARGETS
    )
    cosine = float(torch.cosine_similarity(a, b, dim=0))
    return Effect(cosine, float((a - b).norm() / b.norm()), float((c - d).norm() / d.norm()))


def shown(found: Effect | None) -> str:
    """A cell of the table: equal, or the relative difference (and cosine) of a logit's relevance.

    Below 1e-6 it is the float32 in which weights are folded and norms computed.
    """
    if found is None:
        return "refused by TransformerLens"
    if found.logit < 1e-6:
        return "the same"
    return f"{found.logit:.2f} ({found.cosine:.3f})"


def table() -> str:
    rows = ["| mode | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for mode in MODES:
        cells = [shown(effect(family, mode)) for family in SHOWN]
        rows.append(f"| `{mode}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def read() -> dict[tuple[str, str], str]:
    """(mode, family) -> the cell of the table in the document."""
    text = DOCUMENT.read_text(encoding="utf-8").split(START)[1].split(END)[0]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {
        (row[0].strip("`"), family): cell
        for row in cells
        for family, cell in zip(SHOWN, row[1:], strict=True)
    }


def main() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    found = table()
    inside = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    written = inside.sub(lambda _: f"{START}\n\n{found}\n\n{END}", text)
    DOCUMENT.write_text(written, encoding="utf-8")
    print(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
