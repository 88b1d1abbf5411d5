"""Every method against its paper's formula, written out slowly on the plain Hugging Face model."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lenslrp.analysis.attribution.methods import attribute
from lenslrp.analysis.attribution.perturbation import coalitions, least_squares
from tests.unit.baseline_models import PAIRS, TARGETS, WRITTEN, Pair, language, t5
from tests.unit.tiny import TOKENS

NEAR = {"rtol": 1e-6, "atol": 1e-9}  # Hugging Face has float32 inside norms, rotations, softmax
PATCHES = [(row, column) for row in range(2) for column in range(3)]


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return PAIRS[request.param]()


def units(pair: Pair) -> int:
    return len(PATCHES) if pair.inputs.ndim == 4 else pair.inputs.shape[1]


def place(pair: Pair, unit: int) -> Any:
    """Where one unit is in the inputs."""
    if pair.inputs.ndim == 3:
        return (slice(None), unit)
    row, column = PATCHES[unit]
    return (..., slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))


def sums(pair: Pair, relevance: Tensor) -> Tensor:
    """Over each unit: [batch, units]."""
    parts = [relevance[place(pair, unit)].flatten(1).sum(dim=1) for unit in range(units(pair))]
    return torch.stack(parts, dim=1)


def gradient(pair: Pair, inputs: Tensor) -> Tensor:
    leaf = inputs.clone().requires_grad_()
    return torch.autograd.grad(pair.values(leaf).sum(), leaf)[0]


@torch.no_grad()
def without(pair: Pair, gone: Any, baseline: Tensor | None = None) -> Tensor:
    """The value with some units at the baseline."""
    changed = pair.inputs.clone()
    for unit in gone:
        changed[place(pair, unit)] = 0 if baseline is None else baseline[place(pair, unit)]
    return pair.values(changed)


def test_the_value_is_that_of_the_plain_model(pair: Pair) -> None:
    found = pair.explain("random")
    torch.testing.assert_close(found.target.value, pair.values(pair.inputs).detach(), **NEAR)


def test_gradient_times_input_is_autograds(pair: Pair) -> None:
    expected = sums(pair, pair.inputs * gradient(pair, pair.inputs))
    torch.testing.assert_close(pair.explain("gradient_x_input").tokens, expected, **NEAR)


@pytest.mark.parametrize("kind", ["zero", "mean"])
@pytest.mark.parametrize("name", PAIRS)
def test_integrated_gradients_is_the_integral_and_complete(name: str, kind: str) -> None:
    # An RMS norm forgets the scale of its input down to the root of its epsilon, so that from zero
    # all of the integral lies in the line's first thousandth; with a large epsilon it does not.
    pair = {
        "llama": lambda: language("llama", rms_norm_eps=0.1),
        "t5": lambda: t5(layer_norm_epsilon=0.1),
    }.get(name, PAIRS[name])()
    baseline = torch.zeros_like(pair.inputs)
    if kind == "mean":
        axes = (2, 3) if pair.inputs.ndim == 4 else (1,)
        baseline = pair.inputs.mean(dim=axes, keepdim=True).expand_as(pair.inputs)
    steps = 400
    found = pair.explain("integrated_gradients", steps=steps, baseline=kind, chunk=64)
    with torch.no_grad():
        gap = pair.values(pair.inputs) - pair.values(baseline)
    torch.testing.assert_close(found.tokens.sum(dim=1), gap, rtol=1e-4, atol=1e-5)
    assert (found.passes.forward, found.passes.backward) == (steps, steps)
    few = pair.explain("integrated_gradients", steps=2, baseline=kind, chunk=3).tokens
    points = [0.5 - 0.5 / math.sqrt(3), 0.5 + 0.5 / math.sqrt(3)]  # Gauss-Legendre's two
    line = pair.inputs - baseline
    mean = torch.stack([gradient(pair, baseline + p * line) for p in points]).mean(dim=0)
    torch.testing.assert_close(few, sums(pair, line * mean), **NEAR)


@pytest.mark.parametrize("times_input", [True, False])
def test_smoothgrad_is_the_mean_gradient_over_noise_of_that_size(
    pair: Pair, times_input: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the very noise that was drawn, which has the size asked for."""
    drawn: list[Tensor] = []
    randn = torch.randn

    def record(*shape: Any, **options: Any) -> Tensor:
        drawn.append(randn(*shape, **options))
        return drawn[-1]

    monkeypatch.setattr(torch, "randn", record)
    options = {"samples": 5, "noise": 0.2, "times_input": times_input}
    found = pair.explain("smoothgrad", seed=3, **options).tokens
    noise = torch.stack(drawn, dim=1).double()  # [samples, batch, ...]
    width = torch.stack([row.max() - row.min() for row in pair.inputs])
    width = width.view(-1, *[1] * (pair.inputs.ndim - 1))
    noisy = [pair.inputs + 0.2 * width * noise[sample] for sample in range(5)]
    mean = torch.stack([gradient(pair, inputs) for inputs in noisy]).mean(dim=0)
    expected = sums(pair, pair.inputs * mean if times_input else mean)
    torch.testing.assert_close(found, expected, **NEAR)
    if times_input:
        assert not torch.allclose(found, pair.explain("smoothgrad", seed=4, **options).tokens)


def test_the_plain_gradient_says_nothing_through_a_centring_norm() -> None:
    """LayerNorm takes the mean away, so the gradient's entries sum to 0: why it is multiplied."""
    found = language("gpt2").explain("smoothgrad", times_input=False).tokens
    assert found.abs().max() < 1e-12


def test_occlusion_is_what_each_unit_takes_along(pair: Pair) -> None:
    full = pair.values(pair.inputs).detach()
    expected = torch.stack([full - without(pair, [u]) for u in range(units(pair))], dim=1)
    found = pair.explain("occlusion", chunk=5)
    torch.testing.assert_close(found.tokens, expected, **NEAR)
    assert (found.passes.forward, found.passes.backward) == (units(pair) + 1, 0)
    mean = torch.full_like(pair.inputs, 0.3)
    expected = torch.stack([full - without(pair, [u], mean) for u in range(units(pair))], dim=1)
    torch.testing.assert_close(pair.explain("occlusion", baseline=mean).tokens, expected, **NEAR)


def test_occlusion_is_captums_feature_ablation(pair: Pair) -> None:
    from captum.attr import FeatureAblation

    mask = torch.zeros_like(pair.inputs[:1], dtype=torch.long)
    for unit in range(units(pair)):
        mask[place(pair, unit)] = unit
    with torch.no_grad():
        theirs = FeatureAblation(pair.values).attribute(pair.inputs, feature_mask=mask)
    each = math.prod(pair.inputs[:1][place(pair, 0)].shape)
    found = pair.explain("occlusion").tokens
    torch.testing.assert_close(found, sums(pair, theirs) / each, **NEAR)


def shapley(pair: Pair) -> Tensor:
    """The definition: the mean over all orders of what a unit adds, [batch, units]."""
    n = units(pair)
    values = {
        kept: without(pair, set(range(n)) - set(kept))
        for size in range(n + 1)
        for kept in itertools.combinations(range(n), size)
    }
    total = torch.zeros(2, n, dtype=torch.float64)
    for order in itertools.permutations(range(n)):
        for place_, unit in enumerate(order):
            before = tuple(sorted(order[:place_]))
            after = tuple(sorted(order[: place_ + 1]))
            total[:, unit] += values[after] - values[before]
    return total / math.factorial(n)


def test_kernel_shap_with_all_coalitions_is_shapleys_value(pair: Pair) -> None:
    expected = shapley(pair)
    found = pair.explain("kernel_shap", samples=2 ** units(pair) - 2, chunk=32)
    torch.testing.assert_close(found.tokens, expected, **NEAR)
    assert found.passes.forward == 2 ** units(pair)


def test_sampled_kernel_shap_sums_to_the_gap_and_comes_near(pair: Pair) -> None:
    expected, full = shapley(pair), pair.values(pair.inputs).detach()
    gap = full - without(pair, range(units(pair)))
    # 60 are two fewer than all: the same coalitions, drawn
    runs = [pair.explain("kernel_shap", samples=60, seed=seed, chunk=64).tokens for seed in (0, 1)]
    for found in runs:
        torch.testing.assert_close(found.sum(dim=1), gap, **NEAR)
        assert (found - expected).norm() < 0.35 * expected.norm()
    assert not torch.allclose(*runs)


def test_coalitions_follow_the_kernel() -> None:
    plan, weights = coalitions(4, 14, torch.Generator())
    assert len(plan) == 14 and len(plan.unique(dim=0)) == 14
    by_size = {int(row.sum()): float(weight) for row, weight in zip(plan, weights, strict=True)}
    assert by_size == pytest.approx({1: 3 / 12, 2: 3 / 24, 3: 3 / 12})
    plan, weights = coalitions(20, 20_000, torch.Generator().manual_seed(0))
    assert torch.equal(plan[:10_000], ~plan[10_000:]) and set(weights.tolist()) == {1.0}
    chance = torch.tensor([1 / (s * (20 - s)) for s in range(1, 20)])
    share = plan.sum(dim=1).bincount(minlength=20)[1:] / len(plan)
    torch.testing.assert_close(share, chance / chance.sum(), rtol=0, atol=0.02)
    torch.testing.assert_close(plan.float().mean(dim=0), torch.full((20,), 0.5), rtol=0, atol=0.02)


def test_a_linear_function_has_its_terms_for_shapley_values() -> None:
    terms = torch.tensor([3.0, -1.0, 0.5, 2.0, -4.0], dtype=torch.float64)
    plan, weights = coalitions(5, 16, torch.Generator().manual_seed(0))
    found = least_squares(plan.double(), weights, plan.double() @ terms, terms.sum())
    torch.testing.assert_close(found, terms)


# ------------------------------------------------------------------ attention


def patterns(out: Any) -> dict[str, tuple[Tensor, ...]]:
    """What Hugging Face hands out, by stack."""
    if "encoder_attentions" in out:
        return {
            "encoder": out.encoder_attentions,
            "decoder": out.decoder_attentions,
            "cross": out.cross_attentions,
        }
    return {"encoder": out.attentions}


def read(pair: Pair, carried: Tensor) -> Tensor:
    """The row that is read: CLS, without itself, or the last position."""
    return carried[:, 0, 1:] if pair.inputs.ndim == 4 else carried[:, -1]


def test_attention_rollout_is_the_product_over_the_layers(pair: Pair) -> None:
    with torch.no_grad():
        found = patterns(pair.run(pair.inputs))
    expected = []
    for row in range(2):
        layers = [a[row].mean(dim=0) for a in found["encoder"]]
        carried = torch.eye(layers[0].shape[-1], dtype=torch.float64)
        for a in layers:
            carried = (0.5 * a + 0.5 * torch.eye(len(a))) @ carried
        if "cross" in found:
            memory = carried
            carried = torch.zeros(WRITTEN.shape[1], len(memory), dtype=torch.float64)
            for own, cross in zip(found["decoder"], found["cross"], strict=True):
                carried = 0.5 * own[row].mean(dim=0) @ carried + 0.5 * carried
                carried = 0.5 * cross[row].mean(dim=0) @ memory + 0.5 * carried
        expected.append(carried)
    tokens = pair.explain("attention_rollout").tokens
    torch.testing.assert_close(tokens, read(pair, torch.stack(expected)), **NEAR)


def test_gradient_rollout_is_chefers(pair: Pair) -> None:
    out = pair.run(pair.inputs.clone().requires_grad_())
    found = patterns(out)
    flat = [a for group in found.values() for a in group]
    value = pair.reads(out.logits)[torch.arange(2), TARGETS].sum()
    grads = iter(torch.autograd.grad(value, flat))
    bars = {
        name: [(a * next(grads)).clamp(min=0).mean(dim=1).detach() for a in group]
        for name, group in found.items()
    }

    def normalised(carried: Tensor) -> Tensor:
        eye = torch.eye(len(carried), dtype=carried.dtype)
        added = carried - eye
        total = added.sum(dim=-1, keepdim=True)
        return torch.where(total > 0, added / total, 0) + eye

    expected = []
    for row in range(2):
        carried = torch.eye(bars["encoder"][0].shape[-1], dtype=torch.float64)
        for a in bars["encoder"]:
            carried = carried + a[row] @ carried  # Eq. 6
        if "cross" in bars:
            memory, own = carried, torch.eye(WRITTEN.shape[1], dtype=torch.float64)
            carried = torch.zeros(len(own), len(memory), dtype=torch.float64)
            for a, cross in zip(bars["decoder"], bars["cross"], strict=True):
                own, carried = own + a[row] @ own, carried + a[row] @ carried  # Eqs. 6, 7
                carried = carried + normalised(own).T @ cross[row] @ normalised(memory)  # Eq. 10
        expected.append(carried)
    tokens = pair.explain("gradient_x_attention_rollout").tokens
    torch.testing.assert_close(tokens, read(pair, torch.stack(expected)), **NEAR)


@pytest.mark.parametrize(
    "options",
    [{}, {"threshold": None}, {"factor": 0.5, "threshold": 0.2}, {"minimum": False}],
    ids=lambda options: str(options),
)
def test_atman_is_the_rise_of_the_loss(
    pair: Pair, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token at a time, by changing what the plain model gives to its softmax."""
    chosen = {"factor": 0.1, "threshold": 0.6, "minimum": True, **options}
    softmax = torch.nn.functional.softmax
    n, special = units(pair), 1 if pair.inputs.ndim == 4 else 0
    shares = torch.ones(2, n, dtype=torch.float64)

    def changed(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if scores.ndim == 4 and scores.shape[-1] == n + special:
            for row, head, query in itertools.product(*map(range, scores.shape[:3])):
                seen = scores[row, head, query] > -1e8
                line = scores[row, head, query][seen]
                line = line - line.min() if chosen["minimum"] else line
                own = torch.cat([torch.ones(special, dtype=torch.float64), shares[row]])
                scores = scores.clone()
                scores[row, head, query, seen] = line * own[seen]
        return softmax(scores, *args, **kwargs)

    def loss() -> Tensor:
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "softmax", changed)
            logits = pair.reads(pair.run(pair.inputs).logits)
        return torch.nn.functional.cross_entropy(logits, TARGETS, reduction="none")

    embeds = pair.inputs
    if special:
        projection = pair.plain.vit.embeddings.patch_embeddings.projection
        embeds = projection(pair.inputs).detach().flatten(2).transpose(1, 2)
    plain, expected = loss() if chosen["minimum"] else None, []
    if plain is None:
        logits = pair.reads(pair.run(pair.inputs).logits).detach()
        plain = torch.nn.functional.cross_entropy(logits, TARGETS, reduction="none")
    for token in range(n):
        for row in range(2):
            for other in range(n):
                a, b = embeds[row, token], embeds[row, other]
                c = float(a @ b / (a.norm() * b.norm()))
                alike = chosen["threshold"] is not None and c >= chosen["threshold"]
                f = chosen["factor"]
                shares[row, other] = (1 - f) * (1 - c) + f if alike else 1.0
            shares[row, token] = chosen["factor"]
        expected.append(loss() - plain)
    found = pair.explain("atman", chunk=7, **options)
    torch.testing.assert_close(found.tokens, torch.stack(expected, dim=1), rtol=1e-5, atol=1e-6)
    assert (found.passes.forward, found.passes.backward) == (n + 1, 0)


def test_soft_capped_logits_are_integrated_behind_the_cap() -> None:
    pair = language("gemma2", rms_norm_eps=1e-2)
    found = pair.explain("occlusion").tokens
    full = pair.values(pair.inputs).detach()
    expected = torch.stack([full - without(pair, [u]) for u in range(TOKENS.shape[1])], dim=1)
    torch.testing.assert_close(found, expected, **NEAR)
    assert attribute("occlusion", pair.bridge, TOKENS).target.value.abs().max() <= 3.0
