"""Bad input gets a clear error and loses nothing.

Every message is tested for what was given, what was expected and, where there is one, the nearest
valid choice. After any of these errors the model is as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from lenslrp import targets
from lenslrp.errors import InputError, LensLRPError, LoadError
from tests.unit.tiny import TOKENS, VOCABULARY, changes, snapshot, tiny, word_tokenizer

LAST = VOCABULARY - 1
BROKEN = {"nan": float("nan"), "infinity": float("inf")}


@pytest.fixture(scope="module")
def words() -> TransformerBridge:
    return tiny("llama", tokenizer=word_tokenizer())


@pytest.fixture(autouse=True)
def _nothing_lost(words: TransformerBridge) -> Iterator[None]:
    before = snapshot(words)
    yield
    assert changes(before, words) == []


def refused(model: Any, *args: Any, match: str, **options: Any) -> None:
    with pytest.raises(InputError, match=match):
        lenslrp.run_with_relevance(model, *args, **options)


def test_errors_can_be_caught_as_what_they_are() -> None:
    assert issubclass(InputError, LensLRPError)
    assert issubclass(InputError, ValueError)


# --- hook names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("blocks.0.mlp.hook_pots", "blocks.0.mlp.hook_post"),
        ("mlp.hook_pots", "mlp.hook_post"),
        ("blocks.7.mlp.hook_post", r"blocks.\d.mlp.hook_post"),
        ("hook_resid_prev", "hook_resid_pre"),
    ],
)
def test_an_unknown_hook_name(words: TransformerBridge, name: str, nearest: str) -> None:
    message = rf"no hook point '{name}' in this model; nearest: .*{nearest}"
    refused(words, TOKENS, 5, names_filter=name, match=message)
    refused(words, TOKENS, 5, names_filter=["hook_embed", name], match=message)
    refused(words, TOKENS, targets.Activation(name, 0), match=message)


def test_a_hook_that_was_not_read(words: TransformerBridge) -> None:
    _, kept = lenslrp.run_with_relevance(words, TOKENS, 5, names_filter="mlp.hook_post")
    with pytest.raises(InputError, match="nearest: blocks.0.mlp.hook_post"):
        kept["blocks.0.mlp.hook_pots"]


def test_a_hook_off_the_path(words: TransformerBridge) -> None:
    name = "blocks.0.ln1.hook_scale"
    refused(words, TOKENS, 5, names_filter=name, match=f"{name}: it is not on the path")
    _, kept = lenslrp.run_with_relevance(words, TOKENS, 5)
    with pytest.raises(InputError, match=f"{name} is not on the path in this pass"):
        kept[name]
    refused(words, TOKENS, targets.Activation(name, 0), match=name)


def test_patterns_under_fused_attention(words: TransformerBridge) -> None:
    name = "blocks.0.attn.hook_pattern"
    message = rf'{name}: attention="fused" forms no patterns .*use attention="bridge"'
    refused(words, TOKENS, 5, names_filter=name, attention="fused", match=message)
    refused(words, TOKENS, targets.Activation(name, (0, 0)), attention="fused", match="fused")


@pytest.mark.parametrize("names", [5, [5], [None], 1.5])
def test_a_filter_of_the_wrong_type(words: TransformerBridge, names: Any) -> None:
    refused(words, TOKENS, 5, names_filter=names, match="names_filter|hook")


def test_a_latent_hook_without_its_block(words: TransformerBridge) -> None:
    """``mlp.hook_post`` stands for every block in a filter; a target needs one of them."""
    target = targets.Activation("mlp.hook_post", 3)
    refused(words, TOKENS, target, match=r"mlp\.hook_post.*blocks\.")


# --- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [VOCABULARY, -1, 10_000])
def test_a_target_outside_the_vocabulary(words: TransformerBridge, token: int) -> None:
    message = f"target token {token} is outside the vocabulary: ids go from 0 to {LAST}"
    refused(words, TOKENS, token, match=message)
    refused(words, TOKENS, targets.LogitDiff(3, token), match=message)
    refused(words, TOKENS, [3, token], match=message)


def test_a_string_of_several_tokens_in_a_difference(words: TransformerBridge) -> None:
    message = r"'a b' is 2 tokens \(\['a', ' b'\]\); give one token, or .*Sequence"
    refused(words, TOKENS, targets.LogitDiff("a b", "c"), match=message)


@pytest.mark.parametrize("position", [6, -7, 99])
def test_a_position_out_of_range(words: TransformerBridge, position: int) -> None:
    message = rf"position {position} is out of range: the shortest row has 6 .* from -6 to 5"
    refused(words, TOKENS, targets.Logit(5, position), match=message)
    refused(words, TOKENS, targets.Activation("hook_embed", 0, position), match=message)


def test_a_position_in_the_padding(words: TransformerBridge) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    target = targets.Logit(5, position=4)
    refused(words, TOKENS, target, attention_mask=mask, match="4 is out of range: .*4 tokens")


@pytest.mark.parametrize("target", [1.5, True, {}, torch.zeros(2, 2).long(), nn.Identity()])
def test_a_target_of_the_wrong_type(words: TransformerBridge, target: Any) -> None:
    kind = type(target).__name__
    refused(words, TOKENS, target, match=rf"a token \(string or id\), a Target, .*got {kind}")


@pytest.mark.parametrize("given", [[3], [3, 4, 5], []])
def test_as_many_targets_as_rows(words: TransformerBridge, given: list[int]) -> None:
    refused(words, TOKENS, given, match=f"{len(given)} targets for a batch of 2: give one a row")


def test_a_custom_target_of_the_wrong_shape(words: TransformerBridge) -> None:
    target = targets.Custom(lambda logits: logits[:, -1])
    message = rf"shape \[2\], one value a batch row, not \(2, {VOCABULARY}\)"
    refused(words, TOKENS, target, match=message)


@pytest.mark.parametrize(
    "fn",
    [
        lambda logits: logits[:, -1].argmax(dim=-1).double(),
        lambda logits: logits.detach()[:, -1, 5],
        lambda logits: torch.ones(2),
    ],
    ids=["argmax", "detached", "constant"],
)
def test_a_custom_target_without_a_gradient(words: TransformerBridge, fn: Any) -> None:
    refused(words, TOKENS, targets.Custom(fn), match="gradient|differentiable|depend")


@pytest.mark.parametrize("given", [None, 5, " a", "ab"])
def test_many_targets_are_a_list(words: TransformerBridge, given: Any) -> None:
    with pytest.raises(InputError, match="targets"):
        lenslrp.relevance_for_targets(words, TOKENS, targets=given)


def test_no_targets_at_all(words: TransformerBridge) -> None:
    with pytest.raises(InputError, match="at least one target"):
        lenslrp.relevance_for_targets(words, TOKENS, targets=[])


def test_a_sequence_is_explained_alone(words: TransformerBridge) -> None:
    with pytest.raises(InputError, match="Sequence target extends the prompt"):
        lenslrp.relevance_for_targets(words, TOKENS, targets=["a b", "c"])


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [""],
        ["a b", ""],
        [],
        [[]],
        torch.tensor([]),
        torch.empty(1, 0).long(),
        torch.empty(0, 5).long(),
        torch.empty(0).long(),
    ],
)
def test_an_empty_prompt(words: TransformerBridge, prompt: Any) -> None:
    refused(words, prompt, 5, match="empty prompt|at least one")


@pytest.mark.parametrize(
    ("row", "worst"), [([3, VOCABULARY], VOCABULARY), ([-1, 3], -1), ([3, 999, -2], 999)]
)
def test_prompt_tokens_outside_the_vocabulary(
    words: TransformerBridge, row: list[int], worst: int
) -> None:
    message = rf"row 0 has token {worst}, outside the vocabulary: ids go from 0 to {LAST}"
    refused(words, [row], 5, match=message)
    refused(words, torch.tensor([row]), 5, match=message)


def test_the_row_is_named(words: TransformerBridge) -> None:
    refused(words, torch.tensor([[3, 4], [5, 77]]), 5, match="row 1 has token 77")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "not NoneType"),
        (3, "not int"),
        ({}, "not dict"),
        (b"a b", "not bytes"),
        (("a", "b"), "not tuple"),
        (np.array([[3, 4]]), "not ndarray"),
        (torch.rand(1, 3), r"integers \[batch, pos\], not torch.float32 \[1, 3\]"),
        (torch.ones(1, 3).bool(), r"integers \[batch, pos\], not torch.bool"),
        (torch.zeros(1, 2, 3).long(), r"integers \[batch, pos\], not torch.int64 \[1, 2, 3\]"),
        (torch.tensor(3), r"integers \[batch, pos\], not torch.int64 \[\]"),
        ([[3, 4], [5]], "token tensor"),
        (["a", 3], "row 1.*int"),
    ],
)
def test_a_prompt_of_the_wrong_type(words: TransformerBridge, prompt: Any, message: str) -> None:
    refused(words, prompt, 5, match=message)


def test_text_without_a_tokenizer() -> None:
    refused(tiny("llama"), "a b", 5, match="no tokenizer: give a token tensor")
    refused(tiny("llama"), TOKENS, "a", match="no tokenizer: give the target as a token id")


def test_a_prompt_longer_than_the_positions_that_were_learned() -> None:
    long = torch.zeros(1, 40).long()
    refused(tiny("gpt2"), long, 5, match="40 tokens.* 32")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 5), r"attention_mask \[2, 5\] does not fit tokens \[2, 6\]"),
        (torch.ones(6), r"attention_mask \[6\] does not fit tokens \[2, 6\]"),
        (torch.tensor([[1, 1, 0, 1, 1, 1], [1] * 6]), "has gaps: padding must be on one side"),
        (torch.tensor([[0, 1, 1, 1, 1, 0], [1] * 6]), "has gaps: padding must be on one side"),
        (torch.tensor([[0] * 6, [1] * 6]), "row 0 is an empty prompt"),
        ([[1] * 6] * 2, "attention_mask"),
    ],
)
def test_an_attention_mask_that_does_not_fit(
    words: TransformerBridge, mask: Any, message: str
) -> None:
    refused(words, TOKENS, 5, attention_mask=mask, match=message)


@pytest.mark.parametrize(
    "rows",
    [
        [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]],
        [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]],
        [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]],
    ],
    ids=["left", "right", "mixed"],
)
def test_padded_tokens_stay_in_their_columns(rows: list[list[int]]) -> None:
    model = tiny("llama").to(torch.float32)  # TransformerLens' Llama gives NaN there in float64
    mask = torch.tensor(rows)
    try:
        logits, kept = lenslrp.run_with_relevance(model, TOKENS, 5, attention_mask=mask)
    except InputError as error:
        assert "side" in str(error)  # noqa: PT017 - mixed sides may be refused
        return
    assert logits.shape[:2] == TOKENS.shape
    assert torch.equal(kept.attention_mask, mask.bool())
    assert torch.equal(kept.token_ids[mask.bool()], TOKENS[mask.bool()])


def test_an_attention_mask_beside_text(words: TransformerBridge) -> None:
    """Text brings its own mask; one that is given must not be ignored in silence."""
    refused(words, "a b c", 5, attention_mask=torch.tensor([[0, 1, 1]]), match="attention_mask")


@pytest.mark.parametrize(
    ("embeds", "message"),
    [
        (torch.zeros(2, 16).double(), r"\[batch, pos, d_model\], not \[2, 16\]"),
        (torch.zeros(1, 0, 16).double(), r"\[batch, pos, d_model\], not \[1, 0, 16\]"),
        (torch.zeros(1, 3, 15).double(), r"\[batch, pos, d_model.*16.*\[1, 3, 15\]"),
        (torch.zeros(1, 3, 16), "float32.*float64|float64.*float32"),
        (torch.full((1, 3, 16), torch.nan).double(), "NaN or infinite"),
        ([1, 2], "inputs_embeds"),
    ],
    ids=["2-d", "empty", "width", "type", "nan", "list"],
)
def test_embeddings_that_do_not_fit(words: TransformerBridge, embeds: Any, message: str) -> None:
    refused(words, None, 5, inputs_embeds=embeds, match=message)


def test_embeddings_and_their_companions(words: TransformerBridge) -> None:
    embeds = torch.randn(1, 3, 16).double()
    refused(words, TOKENS, 5, inputs_embeds=embeds, match="either an input or inputs_embeds")
    refused(words, None, "a b", inputs_embeds=embeds, match="needs token input")
    mask = torch.ones(1, 4).long()
    message = r"attention_mask \[1, 4\] does not fit"
    refused(words, None, 5, inputs_embeds=embeds, attention_mask=mask, match=message)
    gaps = torch.tensor([[1, 0, 1]])
    refused(words, None, 5, inputs_embeds=embeds, attention_mask=gaps, match="gaps")


# --- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt2", None, 3, nn.Linear(2, 2)])
def test_a_model_that_is_no_bridge(model: Any) -> None:
    message = rf"must be a TransformerBridge \(lenslrp.load .*not {type(model).__name__}"
    refused(model, TOKENS, 5, match=message)
    with (
        pytest.raises(InputError, match=message),
        lenslrp.relevance_rules(model, lenslrp.AttnLRP()),
    ):
        pass


def test_a_hugging_face_model_as_it_is(words: TransformerBridge) -> None:
    refused(words.original_model, TOKENS, 5, match="not LlamaForCausalLM")


def test_train_mode() -> None:
    model = tiny("gpt2")
    model.train()
    refused(model, TOKENS, 5, match=r"train mode, .*call model.eval\(\) first")
    with (
        pytest.raises(InputError, match="train mode"),
        lenslrp.relevance_rules(model, lenslrp.AttnLRP()),
    ):
        pass
    assert model.training


@pytest.mark.parametrize("part", ["original_model", "block"])
def test_train_mode_of_a_part(part: str) -> None:
    """Dropout counts by the mode of its own module, not by the bridge's."""
    model = tiny("gpt2", resid_pdrop=0.5)
    (model.original_model if part == "original_model" else model.blocks[0]).train()
    refused(model, TOKENS, 5, match="train mode")


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_broken_weights(family: str, broken: str) -> None:
    model = tiny(family)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "mlp" in n).view(-1)[0] = BROKEN[broken]
    refused(model, TOKENS, 5, match="target is NaN or infinite .*check the model's own logits")


def test_activations_that_overflow(words: TransformerBridge) -> None:
    hook = ("blocks.0.mlp.hook_post", lambda x, hook: x / 0.0)
    with words.hooks(fwd_hooks=[hook]):
        refused(words, TOKENS, 5, match=r"NaN or infinite .*torch.float64")


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights(kind: torch.dtype) -> None:
    model = tiny("llama")
    up = model.blocks[1].mlp.original_component.up_proj
    linear = getattr(up, "original_component", up)
    linear.weight = nn.Parameter(linear.weight.data.to(kind), requires_grad=False)
    message = rf"layers\.1\.mlp\.up_proj\.weight is quantised \({kind}\).*load the model in float32"
    refused(model, TOKENS, 5, match=message)


def test_inference_mode(words: TransformerBridge) -> None:
    """Autograd cannot be had inside it: work, or say so."""
    _, expected = lenslrp.run_with_relevance(words, TOKENS, 5)
    with torch.inference_mode():
        try:
            _, kept = lenslrp.run_with_relevance(words, TOKENS, 5)
        except InputError as error:
            assert "inference_mode" in str(error)  # noqa: PT017 - refused is as good as right
        else:
            assert torch.equal(kept.tokens, expected.tokens)


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", None, 3])
def test_an_unknown_attention(words: TransformerBridge, attention: Any) -> None:
    message = rf"attention must be one of \('bridge', 'fused'\), not {attention!r}"
    refused(words, TOKENS, 5, attention=attention, match=message)


def test_fused_attention_where_it_cannot_be_had(words: TransformerBridge) -> None:
    refused(tiny("gemma2"), TOKENS, 5, attention="fused", match=r"soft-cap.*attention=\"bridge\"")
    refused(tiny("native"), TOKENS, 5, attention="fused", match=r"no Hugging Face attention")
    gim = lenslrp.GIM()
    refused(words, TOKENS, 5, gim, attention="fused", match=r"softmax=gim.*attention=\"bridge\"")


@pytest.mark.parametrize("composite", ["AttnLRP", 3, lenslrp.AttnLRP])
def test_a_composite_of_the_wrong_type(words: TransformerBridge, composite: Any) -> None:
    refused(words, TOKENS, 5, composite, match=r"a composite is AttnLRP\(\), .*not")


@pytest.mark.parametrize("names", [None, "mlp.hook_post", []])
def test_an_unknown_reduction(words: TransformerBridge, names: Any) -> None:
    message = "reduce must be one of none, sum, sum_positions or a function: 'mean'"
    refused(words, TOKENS, 5, reduce="mean", names_filter=names, match=message)
    given = {"mlp.hook_post": "mean"}
    if names != []:
        refused(words, TOKENS, 5, reduce=given, names_filter=names, match=message)


@pytest.mark.parametrize("reduce", [5, 1.5, [sum]])
def test_a_reduction_of_the_wrong_type(words: TransformerBridge, reduce: Any) -> None:
    refused(words, TOKENS, 5, reduce=reduce, match="reduce must be one of")


def test_a_reduction_for_a_hook_that_is_not_there(words: TransformerBridge) -> None:
    refused(words, TOKENS, 5, reduce={"mlp.hook_pots": "sum"}, match="mlp.hook_pots.*mlp.hook_post")


# --- migration -----------------------------------------------------------------------------------


def test_a_hooked_transformer_is_told_how_to_migrate() -> None:
    HookedTransformer = type("HookedTransformer", (nn.Module,), {"cfg": None})
    with pytest.raises(LoadError) as caught:
        lenslrp.load(HookedTransformer())
    message = str(caught.value)
    assert "HookedTransformer was removed in TransformerLens 4" in message
    assert "lenslrp.load('gpt2')" in message
    assert "TransformerBridge.boot_transformers('gpt2')" in message
    assert "enable_compatibility_mode" in message
    refused(HookedTransformer(), TOKENS, 5, match="TransformerBridge.*not HookedTransformer")


@pytest.mark.parametrize("given", [3, None, nn.Linear(2, 2)])
def test_something_that_cannot_be_loaded(given: Any) -> None:
    with pytest.raises(LoadError, match=rf"cannot load a .*{type(given).__name__}: give a name"):
        lenslrp.load(given)
