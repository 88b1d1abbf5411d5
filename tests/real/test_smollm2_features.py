"""Sparse coders on real weights: the parts of relevance add up, and say what an intervention does.

The coders are fitted in closed form: random encoders, and the decoders that reconstruct one text
best, so that features write something real and an error is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import lenslrp
from lenslrp.analysis import Feature, Scale, SparseCoder, feature_relevance, steer
from lenslrp.errors import InputError
from lenslrp.hooks import GradientTimesInput

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

pytestmark = pytest.mark.real

TEXT = (
    "The Eiffel Tower stands in Paris, and the Colosseum in Rome. People who live in France speak "
    "French; those who live in Italy speak Italian. Bread is baked from flour, water and salt."
)
PROMPT = "The capital of France is"
STREAM, Z, MLP_IN, MLP_OUT = (
    f"blocks.12.{name}"
    for name in ("hook_resid_post", "attn.hook_z", "mlp.hook_in", "hook_mlp_out")
)


@pytest.fixture(scope="module")
def model() -> TransformerBridge:
    return lenslrp.load("smollm2-135m", dtype=torch.float64, device="cpu")


def fitted(cache: Any, hook: str, features: int = 24, **more: Any) -> SparseCoder:
    """A coder at a hook point of the text that `cache` holds; of a transcoder, with its skip."""
    x, out = cache[hook][0], cache[more.get("hook_out", hook)][0]
    heads = more.get("heads")
    if heads is not None:
        x = out = x.flatten(-2) if heads == "all" else x[:, heads]
    width, d_out = x.shape[-1], out.shape[-1]
    draw = torch.Generator().manual_seed(1)
    coder = SparseCoder(
        hook, torch.randn(width, features, generator=draw).double() / width**0.5,
        torch.zeros(features).double(), torch.zeros(features, d_out).double(),
        out.mean(dim=0), name=f"sae {len(more)}", **more,
    )  # fmt: skip
    a = coder.encode(cache[hook])[0]
    if coder.rescales:
        mean, scale = coder.denormalizer(x)
        out = (out - mean) / scale
    columns = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
    rows = torch.linalg.lstsq(columns, out).solution
    object.__setattr__(coder, "W_dec", rows[:-1])
    object.__setattr__(coder, "b_dec", rows[-1])
    return coder


@pytest.fixture(scope="module")
def coders(model: TransformerBridge) -> list[SparseCoder]:
    with torch.no_grad():
        _, cache = model.run_with_cache(TEXT)
    skip = torch.randn(576, 576, generator=torch.Generator().manual_seed(2)).double() / 576
    return [
        fitted(cache, STREAM),
        fitted(cache, STREAM, normalization="layer_norm"),
        fitted(cache, STREAM, normalization="constant_norm_rescale", k=5),
        fitted(cache, MLP_IN, hook_out=MLP_OUT, W_skip=skip),
        fitted(cache, MLP_IN, hook_out=MLP_OUT, normalization="layer_norm"),
        fitted(cache, Z, heads="all"),
        fitted(cache, Z, heads=4),
    ]


def test_features_error_bias_and_skip_add_up(
    model: TransformerBridge, coders: list[SparseCoder]
) -> None:
    found = feature_relevance(model, PROMPT, " Paris", coders)
    _, R = lenslrp.run_with_relevance(model, PROMPT, " Paris", names_filter=[STREAM, Z, MLP_OUT])
    _, cache = model.run_with_cache(PROMPT)
    for coder, one in zip(coders, found, strict=True):
        hook = coder.hook_out or coder.hook
        at, y = R[hook], cache[hook]
        if coder.heads is not None:
            at, y = (t.flatten(-2) if coder.heads == "all" else t[:, :, 4] for t in (at, y))
        torch.testing.assert_close(one.total, at.sum(dim=-1), rtol=1e-6, atol=1e-6)
        # each part, written out: its vector times the coefficient
        x = cache[coder.hook]
        g, a = at / y, coder.encode(x)
        written = explicit_parts(coder, x, a)
        for name, vector in {**written, "error": y - sum(written.values())}.items():
            expected = (vector * g).sum(dim=-1)
            actual = one.features.sum(dim=-1) if name == "features" else getattr(one, name)
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)
        assert one.error.abs().max() > 1e-3 and one.features.abs().max() > 1e-3
        table = one.to_dataframe()
        parts = table[["features", "bias", "skip", "error"]].sum(axis=1)
        assert (parts - table["total"]).abs().max() < 1e-9 and len(table) == 5
        best = one.top(1).iloc[0]
        assert best["relevance"] == one.features[0, best["position"], best["feature"]]


def explicit_parts(coder: SparseCoder, x: Tensor, a: Tensor) -> dict[str, Tensor]:
    """What features, constant and skip write, one feature at a time."""
    flat = x.flatten(2) if coder.heads == "all" else x if coder.heads is None else x[:, :, 4]
    mean, scale = torch.zeros(1).double(), torch.ones(1).double()
    if coder.hook_out is None and coder.normalization == "layer_norm":
        mean, scale = flat.mean(-1, keepdim=True), flat.var(-1, keepdim=True).sqrt()
    elif coder.hook_out is None and coder.normalization == "constant_norm_rescale":
        scale = flat.square().mean(-1, keepdim=True).sqrt()
    summed = torch.zeros(())
    for feature in range(a.shape[-1]):
        summed = summed + scale * a[..., feature, None] * coder.W_dec[feature]
    parts = {"features": summed, "bias": (scale * coder.b_dec + mean).expand_as(summed)}
    return parts if coder.W_skip is None else {**parts, "skip": flat @ coder.W_skip}


def test_relevance_under_the_plain_gradient_is_what_steering_does(
    model: TransformerBridge, coders: list[SparseCoder]
) -> None:
    """d logit / d factor at 1 of `Scale(feature, factor)`: its relevance, the error kept."""
    token = model.to_single_token(" Paris")
    with torch.no_grad():
        plain = float(model(PROMPT)[0, -1, token])
    chosen = [coder for coder in coders if coder.hook_out is None]
    found = feature_relevance(model, PROMPT, " Paris", chosen, GradientTimesInput())
    for coder, one in zip(chosen, found, strict=True):
        index = int(one.top(1)["feature"].iloc[0])
        expected = float(one.features[0, :, index].sum())
        logits = {}
        for factor in (0.999, 1.0, 1.001):
            with torch.no_grad(), steer(model, [Scale(Feature(coder, index), factor)]):
                logits[factor] = float(model(PROMPT)[0, -1, token])
        slope = (logits[1.001] - logits[0.999]) / 0.002
        assert slope == pytest.approx(expected, rel=1e-3)  # RMSNorms compute in float32
        assert logits[1.0] == plain


def test_rows_of_a_padded_batch_are_as_alone(
    model: TransformerBridge, coders: list[SparseCoder]
) -> None:
    prompts = [PROMPT, "Bread is baked from flour, water and"]
    batch = feature_relevance(model, prompts, [" Paris", " salt"], coders[1])[0]
    for row, (prompt, target) in enumerate(zip(prompts, [" Paris", " salt"], strict=True)):
        alone = feature_relevance(model, prompt, target, coders[1])[0]
        found, expected = batch.to_dataframe(row), alone.to_dataframe()
        assert list(found["token"]) == list(expected["token"])
        assert (found["position"] == expected["position"]).all()
        for part in ("features", "bias", "error", "total"):
            assert found[part].to_numpy() == pytest.approx(expected[part].to_numpy(), abs=1e-4)
        assert batch.top(3, row)["token"].tolist() == alone.top(3)["token"].tolist()


def test_what_has_no_features_is_refused(
    model: TransformerBridge, coders: list[SparseCoder]
) -> None:
    with pytest.raises(InputError, match="give a coder, or several"):
        feature_relevance(model, PROMPT, " Paris")
    wide = SparseCoder("blocks.12.hook_resid_post", torch.ones(4, 2), torch.ones(2),
                       torch.ones(2, 4), torch.ones(4))  # fmt: skip
    with pytest.raises(InputError, match="sae writes 4 values a position, .* has 576"):
        feature_relevance(model, PROMPT, " Paris", wide)
    after = lenslrp.targets.Logit(" Paris", -2)
    assert torch.equal(
        feature_relevance(model, PROMPT, after, coders[0])[0].total[0, -1], torch.zeros(()).double()
    )
