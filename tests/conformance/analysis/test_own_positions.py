"""A latent unit's position is that of its own sequence: encoder, decoder, queries, keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lenslrp
from lenslrp.hooks import Product
from lenslrp.targets import Activation
from tests.conformance import zoo, zoo_media
from tests.conformance.families import COMPOSITES, FAMILIES, make, tokens

READ = tokens(1, 6)
STACKS = (
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "T5GemmaForConditionalGeneration",
)
UNITS: dict[str, Any] = {
    "encoder_blocks.0.mlp.hook_pre": 2,
    "encoder_blocks.1.mlp.hook_post": 2,
    "encoder_blocks.1.hook_resid_post": 3,
    "decoder_blocks.0.mlp.hook_post": 2,
    "decoder_blocks.1.cross_attn.hook_k": (1, 3),
    "decoder_blocks.1.cross_attn.hook_v": (1, 3),
    "decoder_blocks.1.cross_attn.hook_q": (1, 3),
    "decoder_blocks.1.hook_resid_post": 3,
}


def written(length: int) -> Tensor:
    return torch.tensor([[2, 4, 9]])[:, :length]


def explain(model: Any, target: Any, length: int, **options: Any) -> lenslrp.RelevanceCache:
    options = {"names_filter": [], "decoder_input": written(length), **options}
    return lenslrp.run_with_relevance(model, READ, target, **options)[1]


def places(model: Any, hook: str, length: int) -> Tensor:
    _, seen = model.run_with_cache(READ, decoder_input_ids=written(length))
    found: Tensor = seen[hook]
    return found


@pytest.mark.parametrize("name", STACKS)
def test_positions_of_either_stack(name: str) -> None:
    """Three lengths of the decoder, one of them half of the encoder's, and both ends."""
    model = zoo.build(name)
    for hook, unit in UNITS.items():
        if hook not in model.hook_dict:
            continue
        pick = unit if isinstance(unit, tuple) else (unit,)
        for length in (1, 3):
            x = places(model, hook, length)
            for position in {0, -1, x.shape[1] - 1, 2 - x.shape[1] if x.shape[1] > 2 else 0}:
                found = explain(model, Activation(hook, unit, position), length)
                torch.testing.assert_close(
                    found.target.value[0], x[(0, position, *pick)], rtol=1e-5, atol=1e-7
                )
                assert abs(found.ledger().error) < 1e-6
        outside = Activation(hook, unit, x.shape[1])
        with pytest.raises(lenslrp.InputError, match=f"position {x.shape[1]} is out of range"):
            explain(model, outside, length)


def test_padded_rows_of_either_stack() -> None:
    """A shorter row on the left: its first token is its first, and its last its last."""
    model = zoo.build("T5ForConditionalGeneration", torch.float32)
    ids, mask = torch.full((2, 6), 0), torch.ones(2, 6, dtype=torch.long)
    ids[0], ids[1, 2:], mask[1, :2] = READ[0], READ[0, :4], 0
    for hook, unit in UNITS.items():
        for position in (1, -1):
            target = Activation(hook, unit, position)
            batch = lenslrp.run_with_relevance(
                model, ids, target, names_filter=[], attention_mask=mask,
                decoder_input=torch.tensor([[2, 4, 9]] * 2),
            )[1]  # fmt: skip
            alone = lenslrp.run_with_relevance(
                model, READ[:, :4], target, names_filter=[], decoder_input=written(3)
            )[1]
            torch.testing.assert_close(batch.target.value[1], alone.target.value[0])
            torch.testing.assert_close(batch.tokens[1, 2:], alone.tokens[0], rtol=1e-4, atol=1e-5)


def test_a_towers_positions_are_its_own() -> None:
    """A patch is no token of the text; where a tower has rows of its own, it is refused."""
    model = zoo.build("LlavaForConditionalGeneration")
    row, floats, others = zoo_media.example("LlavaForConditionalGeneration", torch.float64)
    hook = next(n for n in model.hook_dict if "vision" in n and n.endswith("0.hook_out"))
    _, found = lenslrp.run_with_relevance(
        model, row, Activation(hook, 2, 1), names_filter=[], model_kwargs=others, **floats
    )
    seen: list[Tensor] = []
    handle = model.hook_dict[hook].register_forward_hook(lambda _, a, out: seen.append(out))
    lenslrp.run_with_relevance(model, row, 5, names_filter=[], model_kwargs=others, **floats)
    handle.remove()
    torch.testing.assert_close(found.target.value, seen[0][:, 1, 2].detach())


# ------------------------------------------------------------------ entries of patterns and scores

LIVE = ("llama", "gpt2", "gemma2", "native", "native_capped", "qwen3")
CONSTANT = ("CPLRP", "CPLRP-up")


@pytest.mark.parametrize("rules", list(COMPOSITES))
@pytest.mark.parametrize("name", LIVE)
def test_an_entry_is_head_query_key(name: str, rules: str) -> None:
    model = make(name)
    for hook in ("blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"):
        target = Activation(hook, (1, 2), -2)
        if rules in CONSTANT:
            with pytest.raises(lenslrp.InputError, match="patterns are constants"):
                lenslrp.run_with_relevance(model, tokens(), target, COMPOSITES[rules]())
            continue
        seen: list[Tensor] = []
        model.hook_dict[hook].register_forward_hook(lambda _, a, x, s=seen: s.append(x.detach()))
        _, found = lenslrp.run_with_relevance(model, tokens(), target, COMPOSITES[rules]())
        torch.testing.assert_close(found.target.value, seen[0][:, 1, -2, 2])
        only = torch.zeros_like(found[hook])
        only[:, 1, -2, 2] = found.target.value
        torch.testing.assert_close(found[hook], only)
        assert found.coverage.ok
        assert abs(found.ledger().error) < 1e-9
        assert found.tokens[:, :-1].any()
        assert not found.tokens[:, -1].any()  # behind the query


def test_what_queries_and_keys_get_of_a_score() -> None:
    """Half each: a score is a product of the two."""
    model = make("llama", bias=False)
    hook = "blocks.0.attn.hook_attn_scores"
    _, found = lenslrp.run_with_relevance(model, tokens(), Activation(hook, (1, 2), 4))
    half = found.target.value / 2
    for name in ("hook_rot_q", "hook_rot_k"):
        total = found[f"blocks.0.attn.{name}"].flatten(1).sum(dim=1)
        torch.testing.assert_close(total, half, rtol=1e-9, atol=1e-12)


def test_a_pattern_is_no_target_where_shares_differ() -> None:
    """Its gradient holds a share of the product with values, which is none of a pattern alone."""
    model = make("llama")
    rules = {"attention_av": Product(0.25, 0.75, "quarter")}
    score = Activation("blocks.1.attn.hook_attn_scores", (1, 2))
    _, quarter = lenslrp.run_with_relevance(model, tokens(), score, rules)
    assert abs(quarter.ledger().error) < 1e-9
    pattern = Activation("blocks.1.attn.hook_pattern", (1, 2))
    with pytest.raises(lenslrp.InputError, match=r"get 0\.25 of their product .* shares evenly"):
        lenslrp.run_with_relevance(model, tokens(), pattern, rules)


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "OPTForCausalLM"])
def test_delegated_attention_too(name: str) -> None:
    model = zoo.build(name)
    extra = zoo.decoder(model, "decoder_input")
    for hook in (n for n in model.hook_dict if n.endswith(("hook_pattern", "hook_attn_scores"))):
        target = Activation(hook, (1, 1), -1)
        _, found = lenslrp.run_with_relevance(model, tokens(), target, names_filter=[hook], **extra)
        torch.testing.assert_close(found[hook][:, 1, -1, 1], found.target.value)
        assert abs(found.ledger().error) < 1e-6


@pytest.mark.parametrize(
    ("unit", "position", "message"),
    [
        (3, -1, r"\[batch, head, query, key\]: unit is \(head, key\)"),
        ((1, 2, 3), -1, r"unit is \(head, key\)"),
        ((2, 1), -1, "has 2 heads"),
        ((0, 7), -1, "position 7 is out of range"),
        ((0, 1), 7, "position 7 is out of range"),
        ((0, 1.5), -1, "unit is an index or a tuple"),
        ("a", -1, "unit is an index or a tuple"),
    ],
)
def test_what_is_no_entry(unit: Any, position: int, message: str) -> None:
    model = make("llama")
    target = Activation("blocks.1.attn.hook_pattern", unit, position)
    with pytest.raises(lenslrp.InputError, match=message):
        lenslrp.run_with_relevance(model, tokens(), target)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_keys_of_a_padded_row_count_its_tokens(name: str) -> None:
    model = make(name, torch.float32)
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    target = Activation("blocks.0.attn.hook_pattern", (1, 1), 2)
    _, batch = lenslrp.run_with_relevance(model, ids, target, attention_mask=mask, names_filter=[])
    _, alone = lenslrp.run_with_relevance(model, ids[1:, 2:], target, names_filter=[])
    torch.testing.assert_close(batch.target.value[1], alone.target.value[0], rtol=1e-4, atol=1e-6)
