"""How long an input may be, and where its padding may stand: said before the model fails."""

from __future__ import annotations

import pytest
import torch

import lenslrp
from lenslrp.errors import InputError
from tests.conformance import zoo
from tests.conformance.families import tokens

pytestmark = pytest.mark.filterwarnings("ignore")

# Learned positions, tables of sines (GPT-J, CodeGen), ALiBi made for so many (MPT); two stacks.
ENDING = ("GPT2LMHeadModel", "OPTForCausalLM", "GPTJForCausalLM", "CodeGenForCausalLM",
          "MptForCausalLM", "BartForConditionalGeneration",
          "LEDForConditionalGeneration")  # fmt: skip


@pytest.mark.parametrize("name", ENDING)
def test_positions_end(name: str) -> None:
    model = zoo.build(name, torch.float32)
    extra = zoo.decoder(model, "decoder_input")
    extra = {key: value[:1] for key, value in extra.items()}
    _, R = lenslrp.run_with_relevance(model, tokens(1, 48), 5, names_filter=[], **extra)
    assert R.tokens.shape == (1, 48)
    with pytest.raises(InputError, match="49 tokens, but the model has positions for 48"):
        lenslrp.run_with_relevance(model, tokens(1, 49), 5, names_filter=[], **extra)


@pytest.mark.parametrize("name", [name for name in ENDING if "Conditional" in name])
def test_a_decoders_positions_end_too(name: str) -> None:
    model = zoo.build(name, torch.float32)
    with pytest.raises(
        InputError, match="49 tokens of the decoder, but the model has positions for 48"
    ):
        lenslrp.run_with_relevance(model, tokens(1, 7), 5, decoder_input=tokens(1, 49))


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "BloomForCausalLM", "T5ForConditionalGeneration"]
)
def test_positions_that_do_not_end(name: str) -> None:
    model = zoo.build(name, torch.float32)
    extra = zoo.decoder(model, "decoder_input")
    extra = {key: value[:1] for key, value in extra.items()}
    _, R = lenslrp.run_with_relevance(model, tokens(1, 70), 5, names_filter=[], **extra)
    assert R.tokens.shape == (1, 70)


def test_left_padding_in_float64_says_why_there_is_nothing() -> None:
    rows = tokens(2, 7)
    mask = torch.ones_like(rows)
    mask[1, :3] = 0
    model = zoo.build("LlamaForCausalLM")
    with pytest.raises(InputError, match="softmax is NaN where .* padding, so pad on the right"):
        lenslrp.run_with_relevance(model, rows, 5, attention_mask=mask)
    right = mask.flip(1)
    _, R = lenslrp.run_with_relevance(model, rows, 5, attention_mask=right)
    assert torch.isfinite(R.tokens).all()
