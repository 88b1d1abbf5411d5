"""Taking tokens, heads, neurons and patches away, against one plain forward pass a question."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lenslrp
from lenslrp import targets
from lenslrp.analysis.evaluation.faithfulness import curves, token_curves
from lenslrp.analysis.evaluation.features import token_values, tokens_of
from lenslrp.analysis.evaluation.model_features import (
    heads_of,
    neurons_of,
    patches_of,
    unit_relevance,
)
from lenslrp.analysis.passes.prompts import as_prompt
from lenslrp.errors import InputError
from tests.conformance import zoo
from tests.unit.tiny import changes, snapshot, tiny, word_tokenizer

IDS = torch.tensor([3, 17, 5, 17, 8, 11])
FAMILIES = ("llama", "gemma2", "gpt2")


def masks(size: int, rows: int = 6, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).random((rows, size)) < 0.4
    found[0] = False
    found[1] = True
    return found


def plain(model: Any, ids: Tensor, gone: np.ndarray, vector: Any = 0.0) -> Tensor:
    """Logits [pos, vocab] of one row whose removed embeddings are replaced, the slow way."""
    where = torch.from_numpy(gone)

    def replace(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[0, : len(where)][where] = vector
        return x

    with torch.no_grad(), model.hooks(fwd_hooks=[("hook_embed", replace)]):
        logits: Tensor = model(ids[None])[0]
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_removed_tokens_have_no_embedding(family: str) -> None:
    model = tiny(family)
    prompt = as_prompt(model, IDS, 5)
    before = snapshot(model)
    asked = masks(6)
    found = token_values(model, [prompt], [asked], tokens_per_pass=13)[0]
    assert not changes(before, model)
    for row, gone in enumerate(asked):
        logits = plain(model, IDS, gone)[-1]
        assert found.value[row] == pytest.approx(float(logits[5]), rel=1e-10)
        expected = float(torch.softmax(logits, 0)[5])
        assert found.probability[row] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("baseline", "token"), [("eos", 1), ("pad", 1), ("token:c", 4), ("mean", None)]
)
def test_what_stands_in_place_of_a_token(baseline: str, token: int | None) -> None:
    model = tiny(tokenizer=word_tokenizer())
    weight = model.original_model.model.embed_tokens.weight
    vector = (weight.mean(dim=0) if token is None else weight[token]).detach()
    asked = masks(6)
    found = tokens_of(model, as_prompt(model, IDS, 5), baseline=baseline).without(asked)
    for row, gone in enumerate(asked):
        expected = float(plain(model, IDS, gone, vector)[-1, 5])
        assert found.value[row] == pytest.approx(expected, rel=1e-10)


def test_kept_positions_are_no_features() -> None:
    model = tiny()
    features = tokens_of(model, as_prompt(model, IDS, 5), keep=[0, -2])
    assert features.index.tolist() == [1, 2, 3, 5]
    assert features.of(torch.arange(6.0)).tolist() == [1, 2, 3, 5]
    gone = np.array([False, True, True, True, False, True])
    found = features.without(np.ones((1, 4), dtype=bool)).value[0]
    assert found == pytest.approx(float(plain(model, IDS, gone)[-1, 5]), rel=1e-10)


def test_targets_and_their_probabilities() -> None:
    model = tiny(tokenizer=word_tokenizer())
    gone = masks(6)[2]
    logits = plain(model, IDS, gone)
    last, third = logits[-1], logits[2]
    for target, value, probability in (
        (targets.Logit(5, position=2), third[5], third.softmax(0)[5]),
        (targets.LogitDiff(5, 7), last[5] - last[7], torch.sigmoid(last[5] - last[7])),
        (targets.LogProb(5), last.log_softmax(0)[5], last.softmax(0)[5]),
        (targets.Contrastive(5), last[5] - (last.sum() - last[5]) / 22, last.softmax(0)[5]),
        (targets.Custom(lambda x: x[:, -1, 3]), last[3], torch.tensor(np.nan)),
    ):
        (found,) = token_values(model, [as_prompt(model, IDS, target)], [gone[None]])
        assert found.value[0] == pytest.approx(float(value), rel=1e-10)
        assert found.probability[0] == pytest.approx(float(probability), rel=1e-10, nan_ok=True)


def test_the_top_token_of_the_whole_prompt_stays_the_target() -> None:
    model = tiny()
    prompt = as_prompt(model, IDS)
    top = int(plain(model, IDS, np.zeros(6, bool))[-1].argmax())
    assert prompt.target == targets.Logit(top)


def test_a_span_is_taught_and_never_taken_away() -> None:
    model = tiny()
    prompt = as_prompt(model, IDS, targets.Sequence([4, 9, 2]))
    assert prompt.length == 6
    assert prompt.given.tolist() == [IDS.tolist()]
    gone = masks(6)[3]
    logits = plain(model, torch.cat([IDS, torch.tensor([4, 9])]), gone)[5:]
    found = tokens_of(model, prompt).without(gone[None])
    assert found.value[0] == pytest.approx(float(logits[[0, 1, 2], [4, 9, 2]].sum()), rel=1e-10)
    chance = logits.log_softmax(1)[[0, 1, 2], [4, 9, 2]].sum().exp()
    assert found.probability[0] == pytest.approx(float(chance), rel=1e-10)


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_of_an_encoder_decoder_the_encoder_loses_tokens(name: str) -> None:
    model = zoo.build(name)
    ids = [torch.tensor([3, 9, 4, 6, 1]), torch.tensor([5, 2, 7])]
    prompts = [as_prompt(model, row, targets.Sequence([4, 8])) for row in ids]
    asked = [masks(5), masks(3, seed=1)]
    table = model.original_model.get_encoder().embed_tokens.weight.detach()
    found = token_values(model, prompts, asked)
    for row, masked, values in zip(ids, asked, found, strict=True):
        for k, gone in enumerate(masked):
            start = model.original_model.config.decoder_start_token_id

            def cut(
                module: Any, args: Any, out: Tensor, gone: np.ndarray = gone, row: Tensor = row
            ) -> Tensor:
                if out.shape[1] != len(row):
                    return out
                return out.masked_fill(torch.from_numpy(gone)[None, :, None], 0)

            handle = model.original_model.get_encoder().embed_tokens.register_forward_hook(cut)
            with torch.no_grad():
                logits = model.original_model(
                    input_ids=row[None], decoder_input_ids=torch.tensor([[start, 4]])
                ).logits[0]
            handle.remove()
            expected = float(logits[0, 4] + logits[1, 8])
            assert values.value[k] == pytest.approx(expected, rel=1e-6), table.shape


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_several_lengths_share_passes(family: str) -> None:
    model = tiny(family)
    prompts = [
        as_prompt(model, IDS, 5),
        as_prompt(model, IDS[:3], targets.Sequence([4, 9])),
        as_prompt(model, IDS[1:], targets.LogitDiff(2, 3)),
    ]
    asked = [masks(6), masks(3, seed=1), masks(5, seed=2)]
    apart = [token_values(model, [p], [m])[0] for p, m in zip(prompts, asked, strict=True)]
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    together = token_values(model, prompts, asked)
    assert len(calls) == 1
    calls.clear()
    few = token_values(model, prompts, asked, tokens_per_pass=30)
    handle.remove()
    assert 3 < len(calls) < 10
    for one, two, three in zip(apart, together, few, strict=True):
        np.testing.assert_allclose(two.value, one.value, rtol=1e-10)
        np.testing.assert_allclose(three.probability, one.probability, rtol=1e-10)


def test_curves_of_several_prompts_equal_those_of_each() -> None:
    model = tiny()
    prompts = [as_prompt(model, IDS, 5), as_prompt(model, IDS[:4], 7)]
    rng = np.random.default_rng(0)
    relevance = [{"a": rng.normal(size=6), "b": rng.normal(size=6)}, {"a": rng.normal(size=4)}]
    found = token_curves(model, prompts, relevance, steps=3, baseline="mean", keep=[0])
    for prompt, own, told in zip(prompts, relevance, found, strict=True):
        features = tokens_of(model, prompt, baseline="mean", keep=[0])
        expected = curves(features, {k: features.of(v) for k, v in own.items()}, steps=3)
        assert list(told) == list(own)
        for name, curve in expected.items():
            np.testing.assert_allclose(told[name].morf, curve.morf, rtol=1e-10)
            np.testing.assert_allclose(
                told[name].lerf_probability, curve.lerf_probability, rtol=1e-10
            )


@pytest.mark.parametrize("hooked", [False, True])
def test_only_the_targets_position_is_unembedded(
    hooked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless somebody's hook sees the logits, which then are all there."""
    model = tiny()
    seen: list[tuple[int, ...]] = []
    inner = model.unembed.original_component
    run = inner.forward

    def unembed(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        made: Tensor = run(x)
        return made

    features = tokens_of(model, as_prompt(model, IDS, 5))
    plain = features.without(masks(6)).value
    monkeypatch.setattr(inner, "forward", unembed)
    if hooked:
        model.unembed.register_forward_hook(lambda m, a, out: out * 2)
    found = features.without(masks(6)).value
    assert seen == [(6, 6 if hooked else 1, 16)]
    np.testing.assert_allclose(found, plain * (2 if hooked else 1), rtol=1e-10)


def test_hooks_are_gone_after_an_exception() -> None:
    model = tiny()
    prompt = as_prompt(model, IDS, targets.Custom(lambda logits: 1 / 0, "broken"))
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        tokens_of(model, prompt).without(masks(6))
    with pytest.raises(ZeroDivisionError):
        heads_of(model, prompt).without(masks(4))
    assert not changes(before, model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_units_are_switched_off(family: str, kind: str) -> None:
    model = tiny(family)
    prompt = as_prompt(model, IDS, 5)
    before = snapshot(model)
    features = (heads_of if kind == "heads" else neurons_of)(model, prompt)
    assert features.size == {"heads": 4, "neurons": 48 if family != "gpt2" else 128}[kind]
    asked = masks(features.size)
    found = features.without(asked)
    assert not changes(before, model)
    suffix = "attn.hook_z" if kind == "heads" else "mlp.hook_post"
    half = features.size // 2
    for row, gone in enumerate(asked):

        def off(x: Tensor, hook: Any, part: np.ndarray) -> Tensor:
            x = x.clone()
            x[:, :, torch.from_numpy(part)] = 0
            return x

        hooks = [
            (
                f"blocks.{layer}.{suffix}",
                lambda x, hook, part=gone[layer * half : (layer + 1) * half]: off(x, hook, part),
            )
            for layer in (0, 1)
        ]
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            expected = float(model(IDS[None])[0, -1, 5])
        assert found.value[row] == pytest.approx(expected, rel=1e-10)


def test_relevance_of_units_is_laid_out_as_the_units_are() -> None:
    model = tiny()
    names = ["attn.hook_z", "mlp.hook_post"]
    _, cache = lenslrp.run_with_relevance(model, IDS[None], 5, names_filter=names)
    heads = unit_relevance(cache, "attn.hook_z")
    neurons = unit_relevance(cache, "mlp.hook_post")
    second = cache["blocks.1.attn.hook_z"][0, :, 1].sum()
    assert heads.shape == (4,)
    assert heads[3] == pytest.approx(float(second))
    assert neurons.shape == (48,)
    assert neurons[24 + 7] == pytest.approx(float(cache["blocks.1.mlp.hook_post"][0, :, 7].sum()))
    found = curves(heads_of(model, as_prompt(model, IDS, 5)), {"a": heads}, steps=4)["a"]
    assert found.morf[0] == pytest.approx(float(model(IDS[None])[0, -1, 5].detach()))


def test_patches_are_painted_over() -> None:
    model = zoo.build("ViTForImageClassification")
    torch.manual_seed(1)
    pixels = lenslrp.media.example(model)["pixel_values"]
    prompt = as_prompt(model, target=None, pixel_values=pixels)
    top = int(model(None, pixel_values=pixels)[0].argmax())
    assert prompt.target == targets.Logit(top)
    _, cache = lenslrp.run_with_relevance(model, pixel_values=pixels, names_filter=[])
    rows, columns = cache.patches.shape[1:]
    for baseline, colour in (
        ("zero", torch.zeros_like(pixels)),
        ("mean", pixels.mean(dim=(2, 3), keepdim=True).expand_as(pixels)),
    ):
        features = patches_of(model, prompt, baseline=baseline)
        assert features.size == rows * columns
        asked = masks(features.size)
        found = features.without(asked)
        height, width = pixels.shape[2] // rows, pixels.shape[3] // columns
        for k, gone in enumerate(asked):
            image = pixels.clone()
            for patch in np.flatnonzero(gone):
                r, c = divmod(int(patch), columns)
                area = (slice(None), slice(None), slice(r * height, (r + 1) * height),
                        slice(c * width, (c + 1) * width))  # fmt: skip
                image[area] = colour[area]
            with torch.no_grad():
                logits = model(None, pixel_values=image)[0]
            assert found.value[k] == pytest.approx(float(logits[top]), rel=1e-6)
            assert found.probability[k] == pytest.approx(float(logits.softmax(0)[top]), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "blank"}, "'zero', 'mean', 'eos', 'pad' or 'token:TOKEN', not 'blank'"),
        ({"baseline": "token:a b"}, "is 2 tokens"),
        ({"keep": [6]}, "keep: position 6 is out of range: .* has 6 tokens, .* from -6 to 5"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    model = tiny(tokenizer=word_tokenizer())
    with pytest.raises(InputError, match=message):
        tokens_of(model, as_prompt(model, IDS, 5), **options)


def test_bad_prompts_are_named() -> None:
    model = tiny()
    with pytest.raises(InputError, match="one input at a time, not 2"):
        as_prompt(model, IDS.expand(2, -1), 5)
    with pytest.raises(InputError, match="follows an output of the model"):
        as_prompt(model, IDS, targets.Activation("blocks.0.mlp.hook_post", 3))
    with pytest.raises(InputError, match="models of one stack"):
        heads_of(zoo.build("T5ForConditionalGeneration"), as_prompt(model, IDS, 5))
    with pytest.raises(InputError, match="has no image"):
        patches_of(model, as_prompt(model, IDS, 5))
    with pytest.raises(InputError, match="no tokenizer|does not have"):
        tokens_of(model, as_prompt(model, IDS, 5), baseline="pad")
