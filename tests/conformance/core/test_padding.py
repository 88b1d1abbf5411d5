"""A padded row is what it is alone: tokens and embeddings, either side, whatever stands in the pad.

Where that cannot be had (positions counted by columns, windows over columns, heads that read the
first column), padding is refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lenslrp
from lenslrp.hooks.leaf_modules import embeddings
from lenslrp.hooks.structure import components
from lenslrp.inputs import is_encoder_decoder
from tests.conformance import zoo
from tests.conformance.families import FAMILIES, make, tokens

LENGTH, PADDED = 5, 3
MORE = (
    "BertForMaskedLM",
    "RobertaForMaskedLM",
    "XGLMForCausalLM",
    "OPTForCausalLM",
    "GPTNeoForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "M2M100ForConditionalGeneration",
    "T5ForConditionalGeneration",
    "BloomForCausalLM",
)
BY_COLUMNS = (
    "BartForConditionalGeneration",
    "PegasusForConditionalGeneration",
    "MarianMTModel",
    "LEDForConditionalGeneration",
    "Lfm2ForCausalLM",
)


def build(name: str) -> Any:
    """In float32: Hugging Face's masks overflow in float64 on some."""
    return make(name, torch.float32) if name in FAMILIES else zoo.build(name, torch.float32)


def padded(side: str, filler: int) -> tuple[Tensor, Tensor]:
    """A full row, and a shorter one: ids and mask, [2, pos]."""
    ids = torch.cat([tokens(1, LENGTH + PADDED, seed=9), torch.full((1, LENGTH + PADDED), filler)])
    mask = torch.ones_like(ids)
    real = span(side)
    ids[1, real] = tokens(1, LENGTH)[0]
    mask[1] = 0
    mask[1, real] = 1
    return ids, mask


def span(side: str) -> slice:
    return slice(PADDED, None) if side == "left" else slice(0, LENGTH)


def written(model: Any, rows: int) -> dict[str, Tensor]:
    return {"decoder_input": torch.tensor([[0, 4, 6]] * rows)} if is_encoder_decoder(model) else {}


def explain(model: Any, rows: int, *given: Any, **options: Any) -> lenslrp.RelevanceCache:
    return lenslrp.run_with_relevance(
        model, *given, target=5, names_filter=[], **written(model, rows), **options
    )[1]


def embedded(model: Any, ids: Tensor) -> Tensor:
    """What the tokens are embedded as, with noise where padding is."""
    kept: list[Tensor] = []
    inner = next(inner for inner, position in embeddings(components(model)) if not position)
    handle = inner.register_forward_hook(lambda _, args, out: kept.append(out.detach()))
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    return kept[0].clone()


def assert_alike(model: Any, batch: lenslrp.RelevanceCache, side: str) -> None:
    alone = explain(model, 1, tokens(1, LENGTH))
    torch.testing.assert_close(batch.target.value[1], alone.target.value[0], rtol=1e-4, atol=1e-5)
    error = (batch.tokens[1, span(side)] - alone.tokens[0]).norm() / alone.tokens.norm()
    assert error < 1e-4
    outside = torch.ones(LENGTH + PADDED, dtype=torch.bool)
    outside[span(side)] = False
    assert not batch.tokens[1, outside].any()
    assert abs(batch.ledger().error) < 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_tokens(name: str, side: str) -> None:
    """With the padding token of some family, and with an id that is a word."""
    model = build(name)
    for filler in (0, 1, 7):
        ids, mask = padded(side, filler)
        assert_alike(model, explain(model, 2, ids, attention_mask=mask), side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*FAMILIES, *(name for name in MORE if "Conditional" not in name)])
def test_embeddings(name: str, side: str) -> None:
    model = build(name)
    ids, mask = padded(side, 7)
    embeds = embedded(model, ids)
    embeds[1, ~mask[1].bool()] = 0.7
    assert_alike(model, explain(model, 2, inputs_embeds=embeds, attention_mask=mask), side)


@pytest.mark.parametrize("name", BY_COLUMNS)
def test_what_counts_by_columns_is_padded_on_the_right(name: str) -> None:
    model = build(name)
    ids, mask = padded("right", 1)
    assert_alike(model, explain(model, 2, ids, attention_mask=mask), "right")
    ids, mask = padded("left", 1)
    with pytest.raises(lenslrp.InputError, match=f"{name} goes by columns.*on the right"):
        explain(model, 2, ids, attention_mask=mask)


def test_a_mask_that_the_bridge_takes_otherwise_is_left_out() -> None:
    """OpenAI GPT's, on the right, where no token sees it; on the left it is refused."""
    model = build("OpenAIGPTLMHeadModel")
    ids, mask = padded("right", 1)
    assert_alike(model, explain(model, 2, ids, attention_mask=mask), "right")
    embeds = embedded(model, ids)
    given = {"inputs_embeds": embeds, "attention_mask": mask}
    assert_alike(model, explain(model, 2, **given), "right")
    ids, mask = padded("left", 1)
    with pytest.raises(lenslrp.InputError, match="padding mask otherwise than Hugging Face"):
        explain(model, 2, ids, attention_mask=mask)


@pytest.mark.parametrize("name", ["gpt2", "BertForMaskedLM", "BartForConditionalGeneration"])
def test_given_embeddings_have_positions_that_are_leaves(name: str) -> None:
    model = make(name) if name in FAMILIES else zoo.build(name)
    by_token = explain(model, 2, tokens())
    found = explain(model, 2, inputs_embeds=embedded(model, tokens()))
    torch.testing.assert_close(found.tokens, by_token.tokens)
    torch.testing.assert_close(found.positions, by_token.positions)
    assert abs(found.ledger().error) < 1e-9
