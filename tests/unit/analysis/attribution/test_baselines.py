"""The interface of the methods of attribution: inputs, targets, options, seeds, what is left."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import lenslrp
from lenslrp.analysis.attribution.methods import METHODS, Attribution, Method, attribute
from lenslrp.analysis.passes.problems import resolve
from lenslrp.errors import InputError, MissingExtraError
from lenslrp.targets import Activation, Custom, LogitDiff, Sequence
from tests.conformance import zoo
from tests.unit.baseline_models import PAIRS, Pair, vit
from tests.unit.tiny import FAMILIES, TOKENS, changes, snapshot, tiny, word_tokenizer

FAST: dict[str, dict[str, Any]] = {
    "integrated_gradients": {"steps": 3},
    "smoothgrad": {"samples": 2},
    "kernel_shap": {"samples": 10},
}
UNSIGNED = ("attention_rollout", "gradient_x_attention_rollout")


def fast(method: str, model: Any, *args: Any, **kwargs: Any) -> Attribution:
    return attribute(method, model, *args, **FAST.get(method, {}), **kwargs)


@pytest.fixture(scope="module")
def words() -> Any:
    """A Llama in float32 with a tokenizer, where left padding works."""
    model = tiny("llama", tokenizer=word_tokenizer())
    model.original_model.float()
    model.cfg.dtype = torch.float32
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PAIRS)
def test_every_method_on_every_family_leaves_the_model_as_it_was(name: str, method: str) -> None:
    pair: Pair = PAIRS[name]()
    pair.explain("gradient_x_input")
    before = snapshot(pair.bridge)
    options = FAST.get(method, {})
    if (name, method) == ("t5", "attnlrp_positional"):
        with pytest.raises(InputError, match="T5ForConditionalGeneration has no learned positions"):
            pair.explain(method)
    else:
        found = pair.explain(method, **options)
        assert found.tokens.shape == found.mask.shape and found.tokens.isfinite().all()
        assert [len(row) for row in found.str_tokens] == [found.tokens.shape[1]] * 2
        again = pair.explain(method, **options)
        assert torch.equal(found.tokens, again.tokens)
    assert changes(before, pair.bridge) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_row_is_the_same_alone_and_padded_on_the_left(words: Any, method: str) -> None:
    words.tokenizer.padding_side = "left"
    texts = ["a b c a d", "e f g", "b a b a b a"]
    found = fast(method, words, texts, prepend_bos=False, chunk=4)
    assert torch.equal(found.mask.sum(dim=1), torch.tensor([5, 3, 6]))
    assert found.tokens[~found.mask].abs().max() == 0
    for row, text in enumerate(texts):
        alone = fast(method, words, text, prepend_bos=False).tokens[0]
        torch.testing.assert_close(
            found.tokens[row, found.mask[row]], alone, rtol=2e-3, atol=1e-5, msg=method
        )


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_matters_where_the_table_says_so(method: str) -> None:
    model = tiny("llama")
    found = [fast(method, model, TOKENS, seed=seed).tokens for seed in (0, 1, 0)]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], found[1]) == METHODS[method].deterministic


def test_random_differs_between_prompts_and_not_between_batches() -> None:
    model = tiny("llama")
    both = attribute("random", model, TOKENS).tokens
    assert not torch.allclose(both[0], both[1])
    assert torch.equal(both[1], attribute("random", model, TOKENS[1:]).tokens[0])


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("method", ["integrated_gradients", "smoothgrad", "atman", "kernel_shap"])
def test_the_chunk_changes_nothing_but_memory(method: str, chunk: int) -> None:
    model = tiny("gpt2")
    found, reference = fast(method, model, TOKENS, chunk=chunk), fast(method, model, TOKENS)
    torch.testing.assert_close(found.tokens, reference.tokens, rtol=1e-9, atol=1e-12)
    assert found.passes == reference.passes


def test_no_more_sequences_than_the_chunk_run_at_once() -> None:
    model, seen = tiny("gpt2"), []

    def record(x: Tensor, hook: Any) -> None:
        seen.append(len(x))

    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", record)]):
        for method in ("integrated_gradients", "smoothgrad", "occlusion", "atman", "kernel_shap"):
            fast(method, model, TOKENS, chunk=5)
    assert max(seen) == 4  # two copies of a batch of two


# ------------------------------------------------------------------ targets and inputs


TARGETS: dict[str, Any] = {
    "a token": 7,
    "one a row": [7, 9],
    "a difference": LogitDiff(3, 4),
    "an earlier position": lenslrp.targets.Logit(7, position=2),
    "a span": Sequence((7, 3)),
    "a neuron": Activation("blocks.1.mlp.hook_post", 5),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", METHODS)
def test_targets_are_explained_as_by_run_with_relevance(method: str, target: str) -> None:
    model = tiny("llama")
    _, cache = lenslrp.run_with_relevance(model, TOKENS, TARGETS[target], names_filter=[])
    found = fast(method, model, TOKENS, TARGETS[target])
    assert found.target.text == cache.target.text
    torch.testing.assert_close(found.target.value, cache.target.value)
    assert found.str_tokens == cache.str_tokens and torch.equal(found.mask, cache.attention_mask)
    # AtMan turns like tokens down together; few samples do not tell a unit that does nothing.
    if target == "an earlier position" and method not in ("random", "atman", "kernel_shap"):
        assert found.tokens[:, 3:].abs().max() < 1e-12


@pytest.mark.parametrize("method", ["occlusion", "atman", "integrated_gradients"])
def test_the_top_token_stays_that_of_the_whole_prompt(method: str) -> None:
    """Although without a token another may be on top."""
    model = tiny("llama")
    top = model(TOKENS)[:, -1].argmax(dim=-1).tolist()
    found, named = fast(method, model, TOKENS), fast(method, model, TOKENS, top)
    assert torch.equal(found.tokens, named.tokens)
    assert found.target.text.startswith("top logit")


def test_a_custom_target_says_no_position() -> None:
    model = tiny("llama")
    target = Custom(lambda logits: logits[:, 2].sum(dim=-1))
    assert fast("occlusion", model, TOKENS, target).tokens[:, 3:].abs().max() < 1e-12
    assert torch.isfinite(fast("atman", model, TOKENS, target).tokens).all()
    for method in UNSIGNED:
        with pytest.raises(InputError, match="Custom targets do not say which position"):
            attribute(method, model, TOKENS, target)
        found = attribute(method, model, TOKENS, target, position=2)
        assert found.tokens[:, 3:].abs().max() == 0


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_may_be_given(method: str) -> None:
    model = tiny("llama")
    embeds = model.embed(TOKENS).detach()
    found = fast(method, model, inputs_embeds=embeds, target=7)
    if METHODS[method].deterministic:
        expected = fast(method, model, TOKENS, 7).tokens
        torch.testing.assert_close(found.tokens, expected, rtol=1e-9, atol=1e-12)
    assert found.str_tokens[0] == ["0", "1", "2", "3", "4", "5"]


def test_an_images_units_are_its_patches() -> None:
    pair = vit()
    found = pair.explain("attnlrp")
    assert found.grid == (2, 3) and found.str_tokens[0] == [
        "0,0",
        "0,1",
        "0,2",
        "1,0",
        "1,1",
        "1,2",
    ]
    assert found.patches is not None and found.patches.shape == (2, 2, 3)
    rules = lenslrp.AttnLRP()  # a model of images has others by default
    _, cache = lenslrp.run_with_relevance(
        pair.bridge, target=[5, 7], composite=rules, names_filter=[], **pair.given
    )
    assert found.pixels is not None and torch.equal(found.pixels, cache.pixels)
    torch.testing.assert_close(found.patches[:, 1, 2], cache.pixels[..., 4:, 8:].sum((1, 2, 3)))
    assert pair.explain("atman").pixels is None
    positional = pair.explain("attnlrp_positional", absolute=False).tokens
    torch.testing.assert_close(positional, found.tokens + cache.positions[:, 1:])
    image = pair.given["pixel_values"]
    assert torch.equal(attribute("occlusion", pair.bridge, image, [5, 7]).tokens,
                       pair.explain("occlusion").tokens)  # fmt: skip


def test_learned_positions_are_added_to_their_tokens() -> None:
    model = tiny("gpt2")
    _, cache = lenslrp.run_with_relevance(model, TOKENS, 7, names_filter=[])
    signed = attribute("attnlrp_positional", model, TOKENS, 7, absolute=False)
    torch.testing.assert_close(signed.tokens, cache.tokens + cache.positions)
    found = attribute("attnlrp_positional", model, TOKENS, 7)
    torch.testing.assert_close(found.tokens, cache.tokens + cache.positions.abs())


def test_an_image_without_a_cls_token_is_read_at_the_mean_of_its_patches() -> None:
    """Made so by taking CLS's row and column out of what is carried."""
    from lenslrp.analysis.attribution.attention import _rows

    question = resolve(vit().bridge, target=[5, 7], **vit().given)
    rows = _rows(question, torch.zeros(2, 6, 6), None)
    torch.testing.assert_close(rows, torch.full((2, 6), 1 / 6))
    assert torch.equal(_rows(question, torch.zeros(2, 7, 7), None), torch.eye(7)[[0, 0]])
    neuron = resolve(vit().bridge, target=Activation("blocks.1.mlp.hook_post", 3, 4), **vit().given)
    assert torch.equal(_rows(neuron, torch.zeros(2, 7, 7), None), torch.eye(7)[[4, 4]])


# ------------------------------------------------------------------ the table, and bad input


def test_the_table_names_each_method_as_itself() -> None:
    assert all(METHODS[name].name == name for name in METHODS)
    assert METHODS["kernel_shap"].options == ("samples", "baseline")
    assert METHODS["attnlrp"].options == ()


def test_a_method_is_a_callable_and_a_composite_a_method() -> None:
    model = tiny("llama")
    expected = attribute("attnlrp", model, TOKENS, 7).tokens
    assert torch.equal(METHODS["attnlrp"](model, TOKENS, 7), expected)
    assert torch.equal(attribute(lenslrp.AttnLRP(), model, TOKENS, 7).tokens, expected)
    ones = Method("ones", lambda question, *, seed: question.mask.double(), "none")
    assert attribute(ones, model, TOKENS).tokens.sum() == TOKENS.numel()


def test_an_unknown_method_or_option_names_the_known_ones() -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match="no method 'lime'; the methods are random, gradient_x"):
        attribute("lime", model, TOKENS)
    with pytest.raises(InputError, match="no option 'samples'; its options: steps, baseline"):
        attribute("integrated_gradients", model, TOKENS, samples=3)
    with pytest.raises(InputError, match="attnlrp has no option 'steps'; its options: none"):
        attribute("attnlrp", model, TOKENS, steps=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "occlusion", "baseline": "noise"}, "baseline must be 'zero', 'mean' or a"),
        ({"method": "occlusion", "baseline": torch.ones(3)}, r"must broadcast to the inputs \[2"),
        ({"method": "kernel_shap", "samples": 1}, "samples must be at least 2, not 1"),
        ({"method": "random", "chunk": 0}, "chunk must be at least 1, not 0"),
        ({"method": "random", "decoder_input": "a"}, "decoder_input is for encoder-decoders"),
        ({"method": "random", "target": 99}, "99"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attribute(model=tiny("llama"), input=TOKENS, **options)


def test_sound_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="HubertForCTC reads input_values"):
        attribute("attnlrp", zoo.build("HubertForCTC"))


def test_without_captum_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lenslrp\[evaluate\]'"):
        attribute("integrated_gradients", tiny("llama"), TOKENS)
    assert attribute("smoothgrad", tiny("llama"), TOKENS).passes.backward == 20


def test_a_model_without_attention_patterns_is_refused() -> None:
    model = zoo.build("MambaForCausalLM")
    for method in ("attention_rollout", "atman"):
        with pytest.raises(InputError, match="MambaForCausalLM has no attention patterns"):
            attribute(method, model, TOKENS)


def test_a_block_without_attention_is_no_gap_to_pass_over() -> None:
    model = zoo.build("Qwen3NextForCausalLM")
    for method in ("attention_rollout", "atman"):
        with pytest.raises(InputError, match=r"has no attention patterns in blocks\.0"):
            attribute(method, model, TOKENS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GPTNeoXForCausalLM", "GPTNeoXForCausalLM has no learned positions, and no rotary"),
        ("CohereForCausalLM", r"blocks\.0\.attn rotates neighbouring features"),
        ("DeepseekV2ForCausalLM", r"blocks\.0\.attn rotates neighbouring features"),
    ],
)
def test_rotary_positions_that_cannot_be_read_are_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attribute("attnlrp_positional", zoo.build(name), TOKENS)


def test_keys_that_are_not_all_tokens_are_refused() -> None:
    model = zoo.build("LEDForConditionalGeneration")
    with pytest.raises(InputError, match="rollout needs all tokens in every layer"):
        attribute("attention_rollout", model, TOKENS)
    with pytest.raises(InputError, match=r"attention to \d+ keys, where there are 6 tokens"):
        attribute("atman", model, TOKENS)


def test_tokens_that_are_embedded_twice_are_refused() -> None:
    model = zoo.build("Gemma4ForCausalLM")
    with pytest.raises(InputError, match="embeds its tokens in 2 places"):
        attribute("occlusion", model, TOKENS)


@pytest.mark.parametrize("method", METHODS)
def test_half_types_are_answered_in_float32(method: str) -> None:
    model = tiny("llama")
    model.original_model.bfloat16()
    model.cfg.dtype = torch.bfloat16
    found = fast(method, model, TOKENS, 7)
    assert found.tokens.dtype == torch.float32 and found.tokens.isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_an_exception_leaves_nothing_behind(name: str) -> None:
    model = tiny(name)
    before = snapshot(model)
    for method in ("atman", "attention_rollout", "occlusion", "attnlrp_softmax_identity"):
        with pytest.raises(ZeroDivisionError):
            fast(method, model, TOKENS, Custom(fails_at_the_second_call()))
    assert changes(before, model) == []


def fails_at_the_second_call() -> Any:
    """The first is that of the unchanged input."""
    calls: list[int] = []

    def fn(logits: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise ZeroDivisionError
        return logits[:, -1, 0]

    return fn
