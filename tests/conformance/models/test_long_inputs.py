"""Texts longer than a model has positions for: a clear error for every family, and no shorter one.

How long a text may be is found by asking transformers' own model, which fails with errors of torch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import lenslrp
from tests.conformance import zoo_configs
from tests.conformance.models.test_heads import ENCODERS, encoder, made

LONG = 60
UNLIMITED = ("Deberta", "M2M100", "ModernBert", "T5")
"""Rotations, relative positions, sines that are made as needed."""

HEADS = ("ForMaskedLM", "ForTokenClassification", "Model")
DECODERS = ("GPT2LMHeadModel", "GPTNeoForCausalLM", "OPTForCausalLM", "OpenAIGPTLMHeadModel")
TWO_STACKS = (
    "BartForConditionalGeneration", "BlenderbotForConditionalGeneration",
    "LEDForConditionalGeneration", "M2M100ForConditionalGeneration",
    "MBartForConditionalGeneration", "MarianMTModel", "PegasusForConditionalGeneration",
    "T5ForConditionalGeneration",
)  # fmt: skip


def of_zoo(name: str) -> Any:
    return made(name, zoo_configs.config(name))


def bert_like(name: str, **changes: Any) -> Any:
    cls = getattr(hf, name)
    sizes = {
        "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 32, **changes,
    }  # fmt: skip
    return made(name, cls.config_class(**sizes))


MODELS: dict[str, Any] = {
    **{f"{family}{head}": partial(encoder, family, head) for family in ENCODERS for head in HEADS},
    **{name: partial(of_zoo, name) for name in (*DECODERS, *TWO_STACKS)},
    **{
        name: partial(bert_like, name)
        for name in ("BertForSequenceClassification", "RobertaForSequenceClassification")
    },
    "DebertaV2 with absolute positions": partial(bert_like, "DebertaV2ForSequenceClassification"),
}  # fmt: skip


def text(length: int) -> Tensor:
    return torch.full((1, length), 5)


def runs(model: Any, **inputs: Tensor) -> bool:
    try:
        with torch.no_grad():
            model(**inputs)
    except (IndexError, RuntimeError):
        return False
    return True


def longest(model: Any, side: str) -> int:
    """How many tokens transformers' model takes; `LONG` if it takes as many as that."""
    short = {"input_ids": text(3)}
    if model.config.is_encoder_decoder:
        short["decoder_input_ids"] = text(3)
    lengths = [n for n in (LONG, *range(LONG, 1, -1)) if runs(model, **{**short, side: text(n)})]
    return lengths[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_text_may_be_as_long_as_there_are_positions(name: str) -> None:
    model = MODELS[name]()
    two_stacks = model.config.is_encoder_decoder
    sides = ("input_ids", "decoder_input_ids") if two_stacks else ("input_ids",)
    limits = {side: longest(model, side) for side in sides}
    bridge = lenslrp.load(model)
    target: Any = (
        None
        if "unembed" in dict(bridge.named_children())
        else lenslrp.targets.Activation("blocks.0.hook_out", 0, 0)
    )

    def explain(side: str, length: int) -> None:
        read = text(length if side == "input_ids" else 3)
        written = {"decoder_input": text(length if side != "input_ids" else 3)}
        lenslrp.run_with_relevance(
            bridge, read, target, names_filter=[], **(written if two_stacks else {})
        )

    for side, limit in limits.items():
        explain(side, limit)
        unlimited = name.startswith(UNLIMITED) and "absolute" not in name
        assert (limit == LONG) == unlimited
        if limit < LONG:
            of = " of the decoder" if side != "input_ids" else ""
            message = f"{limit + 1} tokens{of}, but the model has positions for {limit}$"
            with pytest.raises(lenslrp.InputError, match=message):
                explain(side, limit + 1)
