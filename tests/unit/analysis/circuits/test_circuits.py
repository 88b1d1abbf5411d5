"""Node scores: exact patching against a loop, estimates against exact where the model is linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslrp import AttnLRP, InputError, session
from lenslrp.analysis.circuits.nodes import COMPONENTS, Node, as_units, place_components
from lenslrp.analysis.circuits.pairs import Pairs
from lenslrp.analysis.circuits.scores import NODE_METHODS, score_nodes
from lenslrp.analysis.circuits.segments import coefficients
from lenslrp.analysis.units.kinds import Head, Neuron
from lenslrp.hooks import CPLRP, GradientTimesInput
from tests.unit.tiny import HEADS, changes, snapshot, tiny

OTHERS = ("tokens", "recurrent", "channels")  # integrated starts at tokens; no scans are here
NAMES = tuple(name for name in COMPONENTS if name not in OTHERS)
CLEAN = torch.tensor([[3, 17, 5, 17, 8, 11], [2, 9, 2, 21, 9, 0], [4, 4, 6, 7, 0, 0]])
CORRUPT = torch.tensor([[3, 17, 6, 17, 8, 11], [2, 8, 2, 21, 9, 0], [4, 4, 6, 9, 0, 0]])
LENGTHS = torch.tensor([6, 5, 4])


def some_pairs() -> Pairs:
    """Three pairs of different lengths; the padding is on the right."""
    mask = torch.arange(6)[None] < LENGTHS[:, None]
    return Pairs(CLEAN, CORRUPT, mask, torch.tensor([5, 7, 9]), torch.tensor([6, 2, 3]))


def gap(model: TransformerBridge, pairs: Pairs, row: int, tokens: Tensor) -> Tensor:
    """Of one row, without padding and without anything of the library's."""
    length = int(LENGTHS[row])
    with torch.no_grad():
        logits = model(tokens[row : row + 1, :length])[0, -1]
    return logits[pairs.answers[row]] - logits[pairs.rivals[row]]


def loop(
    model: TransformerBridge, pairs: Pairs, row: int, hook: str, node: Callable[[Tensor], Any]
) -> float:
    """Denoising effect of one node: ``node`` gives the part of a hook's tensor that it is."""
    length = int(LENGTHS[row])
    _, cache = model.run_with_cache(pairs.clean[row : row + 1, :length])

    def patch(x: Tensor, hook: Any) -> Tensor:
        patched = x.clone()
        node(patched)[...] = node(cache[hook.name])
        return patched

    with torch.no_grad():
        before = gap(model, pairs, row, pairs.corrupt)
        with model.hooks(fwd_hooks=[(hook, patch)]):
            return float(gap(model, pairs, row, pairs.corrupt) - before)


PARTS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "whole": lambda x, position, unit: x[:, position],
    "head": lambda x, position, unit: x[:, position, unit],
    "entry": lambda x, position, unit: x[:, position, unit : unit + 1],
}


SIZE = {"llama": 24, "gpt2": 64}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_exact_effects_are_those_of_a_loop(family: str) -> None:
    model, pairs = tiny(family), some_pairs()
    units = {"whole": 1, "head": HEADS, "entry": SIZE[family]}
    places = place_components(model, NAMES)
    last = {
        hook: 0 if name in ("k", "v") and family == "llama" else units[COMPONENTS[name].kind] - 1
        for hook, name in places.items()
    }
    nodes = [Node(hook, last[hook], position) for hook in places for position in range(6)]
    scores = score_nodes(
        model, pairs, method="exact", components=NAMES, by_position=True, chunk=2, only=nodes
    )
    for hook, component in places.items():
        part, unit = PARTS[COMPONENTS[component].kind], last[hook]
        for row in range(3):
            for position in (1, int(LENGTHS[row]) - 1):
                node = partial(part, position=position, unit=unit)
                expected = loop(model, pairs, row, hook, node)
                found = float(scores.values[hook][row, position, unit])
                assert found == pytest.approx(expected, abs=1e-9), (hook, row, position)
    for row in range(3):
        for side, tokens in (("clean", pairs.clean), ("corrupt", pairs.corrupt)):
            expected = float(gap(model, pairs, row, tokens))
            assert float(getattr(scores, side)[row]) == pytest.approx(expected, abs=1e-9)


def test_without_positions_a_node_is_patched_at_all_of_them() -> None:
    model, pairs = tiny("llama"), some_pairs()
    scores = score_nodes(model, pairs, method="exact", components=["heads"])
    hook = "blocks.1.attn.hook_z"
    for row in range(3):
        expected = loop(model, pairs, row, hook, lambda x: x[:, :, 1])
        assert float(scores.values[hook][row, 1]) == pytest.approx(expected, abs=1e-9)


def linear_model() -> TransformerBridge:
    """Linear in its residual stream: no norms, patterns without queries and keys, ReLUs that are
    all on."""
    model = tiny("native", normalization_type=None, act_fn="relu", d_mlp=4)
    with torch.no_grad():
        for block in model.blocks:
            for projection in (block.attn.q, block.attn.k):
                projection.weight.zero_()
            getattr(block.mlp, "in").bias.add_(1e4)
    return model


ESTIMATES: list[dict[str, Any]] = [
    {"method": "relevance"},
    {"method": "relevance", "composite": CPLRP()},
    {"method": "attribution"},
    {"method": "integrated", "steps": 2},
    {"method": "integrated", "steps": 1, "composite": CPLRP()},
]


@pytest.mark.parametrize(
    ("by_position", "direction"), [(True, "denoising"), (False, "denoising"), (True, "noising")]
)
def test_on_a_linear_model_every_estimate_is_exact(by_position: bool, direction: str) -> None:
    model, pairs = linear_model(), some_pairs()
    names = NAMES if by_position else tuple(n for n in NAMES if n != "residual")
    shared: dict[str, Any] = {
        "components": names, "by_position": by_position, "direction": direction, "chunk": 2,
    }  # fmt: skip
    exact = score_nodes(model, pairs, method="exact", **shared)
    assert max(effects.abs().max() for effects in exact.values.values()) > 1
    for method in ESTIMATES:
        estimate = score_nodes(model, pairs, **method, **shared)
        assert torch.allclose(estimate.clean, exact.clean, atol=1e-9)
        assert torch.allclose(estimate.corrupt, exact.corrupt, atol=1e-9)
        for hook, effects in exact.values.items():
            assert torch.allclose(estimate.values[hook], effects, atol=1e-9), (method, hook)


@contextmanager
def frozen(model: TransformerBridge, tokens: Tensor, mask: Tensor) -> Iterator[None]:
    """Norms, patterns and gates of a Llama constant: as they are for ``tokens``.

    Without gradients only, so that coefficients are those of the model as it is; for ``tokens`` the
    two are the same.
    """
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, attention_mask=mask.long(), return_type="logits")
    came: dict[str, Tensor] = {}
    hooks: list[tuple[str, Any]] = []

    def constant_ratio(below: str, above: str) -> None:
        ratio = cache[above] / cache[below]

        def keep(x: Tensor, hook: Any) -> None:
            came[below] = x

        def scale(x: Tensor, hook: Any) -> Tensor | None:
            return None if torch.is_grad_enabled() else came[below] * ratio

        hooks.extend([(below, keep), (above, scale)])

    def constant(x: Tensor, hook: Any) -> Tensor | None:
        return None if torch.is_grad_enabled() else cache[hook.name]

    for layer in range(2):
        block = f"blocks.{layer}"
        for norm in ("ln1", "ln2"):
            constant_ratio(f"{block}.{norm}.hook_in", f"{block}.{norm}.hook_out")
        constant_ratio(f"{block}.mlp.in.hook_out", f"{block}.mlp.out.hook_in")
        hooks.append((f"{block}.attn.hook_pattern", constant))
    constant_ratio("ln_final.hook_in", "ln_final.hook_out")
    with model.hooks(fwd_hooks=hooks):
        yield


LINEAR = CPLRP(gate="up")
"""Whose coefficients are the derivatives of the frozen model."""


def test_coefficients_predict_the_model_with_norms_patterns_and_gates_frozen() -> None:
    model, pairs = tiny("llama", intermediate_size=5), some_pairs()
    with frozen(model, pairs.corrupt, pairs.mask):
        exact, found = (
            score_nodes(model, pairs, components=NAMES, by_position=True, **method)
            for method in ({"method": "exact"}, {"composite": LINEAR})
        )
    for hook, effects in exact.values.items():
        assert torch.allclose(found.values[hook], effects, atol=1e-9), hook
    assert exact.of("neurons").nan_to_num().abs().max() > 0.1


def test_composites_give_scores_of_their_own() -> None:
    model, pairs = tiny("llama"), some_pairs()
    plain = score_nodes(model, pairs, method="attribution").values
    same = score_nodes(model, pairs, composite=GradientTimesInput()).values
    relp, attn = (
        score_nodes(model, pairs).values,
        score_nodes(model, pairs, composite=AttnLRP()).values,
    )
    hook = "blocks.0.mlp.hook_post"
    assert torch.equal(plain[hook], same[hook])
    assert not torch.allclose(plain[hook], relp[hook])
    assert not torch.allclose(relp[hook], attn[hook])


def test_integrated_gradients_go_along_the_straight_line() -> None:
    """Added up at the embeddings, they are the difference of the two runs."""
    model, pairs = tiny("llama"), some_pairs()
    scores = score_nodes(
        model, pairs, method="integrated", components=["residual"], by_position=True, steps=200
    )
    total = scores.values["blocks.0.hook_resid_pre"].sum(dim=(1, 2))
    assert torch.allclose(total, scores.clean - scores.corrupt, rtol=2e-2)


def test_one_step_takes_the_coefficient_halfway_between_the_embeddings() -> None:
    model, pairs = tiny("llama"), some_pairs()[:1]
    hooks = place_components(model, ["heads", "neurons"])
    _, caches = zip(
        *(model.run_with_cache(side) for side in (pairs.corrupt, pairs.clean)), strict=True
    )
    halfway = (caches[0]["hook_embed"] + caches[1]["hook_embed"]) / 2
    with session(model, ledger=False) as own:
        _, there = coefficients(own, hooks, inputs_embeds=halfway, target=pairs)
        _, here = coefficients(own, hooks, input=pairs.corrupt, target=pairs)
    found = score_nodes(model, pairs, method="integrated", steps=1, composite=AttnLRP())
    for hook, component in hooks.items():
        delta = as_units(COMPONENTS[component].kind, caches[1][hook] - caches[0][hook], hook)
        expected, at_end = ((delta * g).sum(dim=(1, 3)) for _, g in (there[hook], here[hook]))
        assert torch.allclose(found.values[hook], expected, rtol=0, atol=1e-12), hook
        assert not torch.allclose(found.values[hook], at_end, rtol=0, atol=1e-6), hook


@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [({}, 2, 1), ({"method": "attribution"}, 2, 1),
     ({"method": "integrated", "steps": 4}, 6, 4)],
)  # fmt: skip
@pytest.mark.parametrize("components", [["heads"], ["heads", "neurons", "mlp", "attention", "q"]])
def test_the_number_of_passes_does_not_depend_on_the_number_of_nodes(
    components: list[str], options: dict[str, Any], forward: int, backward: int
) -> None:
    model, pairs = tiny("llama"), some_pairs()
    place_components(model, components)  # which looks once, by a pass of its own, what is used
    calls: list[int] = []  # positions that were unembedded
    head = model.unembed.original_component
    unembed = head.forward

    def counted(x: Tensor) -> Tensor:  # a hook there would have all positions unembedded
        calls.append(x.shape[1])
        return unembed(x)

    head.forward = counted
    scores = score_nodes(model, pairs, components=components, **options)
    assert (scores.passes.forward, scores.passes.backward) == (forward * 3, backward * 3)
    assert calls == [1] * forward


def test_exact_patching_runs_only_what_is_asked_for_and_what_differs() -> None:
    model, pairs = tiny("llama"), some_pairs()
    wanted = [Node("blocks.1.attn.hook_z", 0)]
    scores = score_nodes(model, pairs, method="exact", components=["heads"], only=wanted)
    assert scores.passes.forward == 3 * len(pairs)
    assert scores.to_dataframe()["hook"].tolist() == ["blocks.1.attn.hook_z"]
    by_position = score_nodes(model, pairs, method="exact", components=["heads"], by_position=True)
    for hook in by_position.components:  # before the changed word nothing differs
        assert (by_position.values[hook][:, 0] == 0).all()


def test_results_as_a_table() -> None:
    model, pairs = tiny("llama"), some_pairs()
    scores = score_nodes(model, pairs, components=["heads", "mlp"], by_position=True)
    frame = scores.to_dataframe()
    assert len(frame) == 2 * 6 * (HEADS + 1)
    row = frame[(frame["hook"] == "blocks.1.attn.hook_z") & (frame["position"] == 3)].iloc[1]
    expected = scores.values["blocks.1.attn.hook_z"][:, 3, 1]
    assert (row["layer"], row["unit"], row["component"]) == (1, 1, "heads")
    assert row["score"] == pytest.approx(float(expected.mean()))
    assert row["std"] == pytest.approx(float(expected.std(correction=0)))
    top = scores.top(3, component="mlp")
    assert set(top["component"]) == {"mlp"}
    assert top["score"].abs().is_monotonic_decreasing
    assert scores.of("mlp").isnan().sum() == 2 * (0 + 1 + 2)  # padding of two layers


def test_a_chunk_changes_nothing_and_nothing_is_left_behind() -> None:
    model, pairs = tiny("llama"), some_pairs()
    before = snapshot(model)
    for method in NODE_METHODS:
        options: dict[str, Any] = {"method": method, "components": ["heads"], "by_position": True}
        at_once, in_parts = (score_nodes(model, pairs, **options, chunk=c) for c in (3, 1))
        for hook, value in at_once.values.items():
            assert torch.allclose(value, in_parts.values[hook], atol=1e-9)
    assert changes(before, model) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "method must be one of relevance, attribution, integrated, exact"),
        ({"direction": "up"}, "direction must be one of denoising, noising, not 'up'"),
        ({"components": ["head"]}, "components are some of tokens, residual"),
        ({"components": []}, "components are some of tokens, residual"),
        ({"components": "heads"}, r"a list of names, not one name: \['heads'\]"),
        ({"components": ["residual"]}, "give by_position=True"),
        ({"method": "exact", "composite": AttnLRP()}, "a composite is for .relevance. and"),
        ({"only": [Node("x", 0)]}, "only is for method='exact'"),
        ({"method": "integrated", "components": ["tokens"]}, "leave 'tokens' out"),
        ({"chunk": 0}, "chunk and steps must be at least 1"),
    ],
)
def test_choices_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_nodes(tiny("llama"), some_pairs(), **options)


def test_a_node_is_a_unit_where_it_is_one() -> None:
    assert Node("blocks.1.attn.hook_z", 1, -1).as_unit() == Head(1, 1)
    assert Node("blocks.0.mlp.hook_post", 17).as_unit() == Neuron(0, 17)
    for hook in ("blocks.1.hook_resid_pre", "blocks.1.attn.hook_q"):
        with pytest.raises(InputError, match=rf"'{hook}\[0\]' is no neuron or head"):
            Node(hook, 0, 2).as_unit()
