"""Edges: sums that close, path patching by hand, and agreement where the model is linear."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from lenslrp.analysis.circuits.edges import Edge, score_edges
from lenslrp.analysis.circuits.export import to_transformer_lens
from lenslrp.analysis.circuits.nodes import TARGET, Node, place_components
from lenslrp.analysis.circuits.pairs import Pairs
from lenslrp.analysis.circuits.scores import score_nodes
from lenslrp.analysis.circuits.segments import EMBEDDINGS, coefficients, segmented
from lenslrp.errors import InputError
from lenslrp.hooks import CPLRP, AttnLRP, Composite, GradientTimesInput, RelP
from lenslrp.inputs import prepare_text
from lenslrp.targets import Logit
from tests.unit.analysis.circuits.test_circuits import gap, linear_model, some_pairs
from tests.unit.tiny import changes, snapshot, tiny

TOKENS = torch.tensor([[3, 17, 5, 17, 8, 11]])
FAMILIES = ("llama", "gpt2", "qwen3", "gemma2", "phi", "neox")


def one_pair() -> Pairs:
    return some_pairs()[:1]


@pytest.mark.parametrize("components", [("heads", "neurons"), ("heads", "mlp", "q", "k", "v")])
@pytest.mark.parametrize("composite", [AttnLRP(), CPLRP(), RelP()], ids=lambda c: c.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_enters_a_node_is_its_relevance_less_what_was_absorbed(
    family: str, composite: Composite, components: tuple[str, ...]
) -> None:
    model = tiny(family)
    hooks = place_components(model, components)
    session = lenslrp.session(model, composite, ledger=True)
    cache, found = coefficients(session, hooks, input=TOKENS, target=Logit(5))
    prepared = prepare_text(
        model, TOKENS, append=[], prepend_bos=None, attention_mask=None, inputs_embeds=None
    )
    rows = 6
    left = {hook: torch.zeros_like(x[0].sum(-1)) for hook, (x, _) in found.items()}
    arrived = torch.zeros_like(cache.tokens[0])
    with (
        session,
        segmented(session, prepared.repeated(rows), Logit(5), hooks, accounting=True) as passed,
    ):
        starts: list[tuple[dict[str, Tensor], Tensor | None, Tensor]] = [
            ({}, torch.ones(rows), passed.values.detach())
        ]
        for hook, (x, g) in found.items():
            for unit in range(x.shape[2]):
                seed = torch.zeros(rows, *x.shape[1:], dtype=x.dtype)
                for position in range(rows):
                    seed[position, position, unit] = g[0, position, unit]
                starts.append(({hook: seed}, None, (x * g)[0, :, unit].sum(-1)))
        for seeds, target, relevance in starts:
            flows, begun = passed.conditional_gradients(seeds, target)
            entered = torch.zeros(rows, dtype=torch.float64)
            for hook, g in flows.items():
                x = passed.embedded() if hook == EMBEDDINGS else passed.at(hook)
                entered += (x * g).sum(dim=(1, 2, 3))
                part = (x * g).sum(-1)[slice(None) if target is None else slice(0, 1)].sum(0)
                if hook == EMBEDDINGS:
                    arrived += part[:, 0]
                else:
                    left[hook] += part
            absorbed = sum(passed.absorbed().values(), torch.zeros(rows, dtype=torch.float64))
            if target is not None:  # a soft-cap on the logits is no part of what is explained
                assert family == "gemma2" or torch.allclose(begun, relevance, atol=1e-12)
                relevance = begun
            assert torch.allclose(entered + absorbed, relevance, rtol=0, atol=1e-9)
    for hook, (x, g) in found.items():
        assert torch.allclose(left[hook], (x * g)[0].sum(-1), rtol=0, atol=1e-9), hook
    leaves = cache.tokens[0] if cache.positions is None else cache.tokens[0] + cache.positions[0]
    assert torch.allclose(arrived, leaves, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["relevance", "attribution"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("by_position", [False, True])
def test_what_leaves_a_node_is_its_score(family: str, method: str, by_position: bool) -> None:
    model, pairs, names = tiny(family), some_pairs(), ("tokens", "heads", "mlp")
    edges = score_edges(model, pairs, method=method, by_position=by_position, rows=7)
    nodes = score_nodes(
        model, pairs, method=method, components=names, by_position=by_position, chunk=2
    )
    for hook, sums in edges.outgoing().items():
        assert torch.allclose(sums, nodes.values[hook], rtol=0, atol=1e-7), hook
    assert torch.allclose(edges.clean, nodes.clean) and torch.allclose(edges.corrupt, nodes.corrupt)
    assert any(bool((value.abs() > 1e-4).any()) for value in edges.values.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(("steps", "composite"), [(1, RelP()), (3, None)])
def test_along_the_line_what_leaves_a_node_is_its_integrated_score(
    family: str, steps: int, composite: Composite | None
) -> None:
    model, pairs, names = tiny(family), some_pairs(), ("heads", "mlp")
    shared: dict[str, Any] = {"method": "integrated", "steps": steps, "composite": composite}
    edges = score_edges(model, pairs, rows=7, **shared)
    nodes = score_nodes(model, pairs, components=names, chunk=2, **shared)
    for hook, value in nodes.values.items():
        assert torch.allclose(edges.outgoing()[hook], value, rtol=0, atol=1e-7), hook
    placed = score_edges(model, pairs, into=[TARGET], by_position=True, **shared)
    for hook, value in placed.values.items():
        whole = edges.values[hook][:, edges.into.index(TARGET)]
        assert torch.allclose(value[:, 0].sum(dim=1), whole, rtol=0, atol=1e-9), hook
    passes = placed.passes
    assert (passes.forward, passes.backward) == (3 * (2 + 2 * steps), 3 * 2 * steps)


def test_the_tokens_of_the_line_pass_on_the_whole_difference() -> None:
    """Integrated gradients at the embeddings add up to what the two runs differ by."""
    model, pairs = tiny("llama"), some_pairs()
    edges = score_edges(model, pairs, components=("tokens", "mlp"), method="integrated", steps=25)
    total = edges.outgoing()["hook_embed"].sum(dim=1)
    assert torch.allclose(total, edges.clean - edges.corrupt, rtol=2e-2)


def test_on_a_linear_model_integrated_edges_are_those_of_path_patching() -> None:
    model, pairs = linear_model(), some_pairs()
    found = score_edges(model, pairs, method="integrated", steps=1)
    best = found.best(5)
    exact = score_edges(model, pairs, method="exact", only=best)
    for up, down in best:
        assert torch.allclose(found.score(up, down), exact.score(up, down), atol=1e-7), (up, down)


def test_edges_that_cannot_exist_are_exactly_zero() -> None:
    model, pairs = tiny("llama"), some_pairs()
    edges = score_edges(model, pairs, by_position=True)
    depth = {"hook_embed": 0, "attn.hook_z": 1, "hook_mlp_out": 2}

    def place(hook: str) -> int:
        name = hook if "blocks" not in hook else hook.split(".", 2)[2]
        return depth[name] + (3 * int(hook.split(".")[1]) if "blocks" in hook else 0)

    possible = 0
    for hook, value in edges.values.items():
        for index, down in enumerate(edges.into):
            if down == TARGET:
                continue
            found = value[:, index]
            assert down.position is not None
            if place(hook) >= place(down.hook):
                assert bool((found == 0).all()), (hook, down)
            assert bool((found[:, down.position + 1 :] == 0).all()), (hook, down)
            if "mlp" in down.hook:  # an MLP reads its own position only
                assert bool((found[:, : down.position] == 0).all()), (hook, down)
            possible += int((found != 0).sum())
    assert possible > 100
    assert (edges.to_dataframe()["score"] != 0).all()


def by_hand(model: TransformerBridge, pairs: Pairs, up: Node, down: Node) -> float:
    """Path patching from what a node writes: the stream in front of ``down`` is moved by that."""
    weights = {
        "blocks.0.attn.hook_z": model.blocks[0].attn.o.weight,
        "blocks.0.hook_mlp_out": None,
        "hook_embed": None,
    }
    _, clean = model.run_with_cache(pairs.clean)
    _, corrupt = model.run_with_cache(pairs.corrupt)
    delta = clean[up.hook] - corrupt[up.hook]
    weight = weights[up.hook]
    if weight is not None:  # one head's columns of W_O
        size = delta.shape[-1]
        columns = weight.detach()[:, up.unit * size : (up.unit + 1) * size]
        delta = torch.einsum("bpf,of->bpo", delta[:, :, up.unit], columns)
    layer = "final" if down == TARGET else down.hook.split(".")[1]
    mlp = down.hook.endswith("mlp_out")
    at = {"final": "blocks.1.hook_resid_post"}.get(layer, f"blocks.{layer}.hook_resid_pre")
    if mlp:
        at = f"blocks.{layer}.hook_resid_mid"
    kept: list[Tensor] = []

    def read(x: Tensor, hook: Any) -> None:
        kept.append(x.clone())

    def move(x: Tensor, hook: Any) -> Tensor:
        return x + delta

    def put(x: Tensor, hook: Any) -> Tensor:
        patched = x.clone()
        if mlp:
            return kept[0]
        patched[:, :, down.unit] = kept[0][:, :, down.unit]
        return patched

    with torch.no_grad():
        before = gap(model, pairs, 0, pairs.corrupt)
        if down == TARGET:
            with model.hooks(fwd_hooks=[(at, move)]):
                return float(gap(model, pairs, 0, pairs.corrupt) - before)
        with model.hooks(fwd_hooks=[(at, move), (down.hook, read)]):
            model(pairs.corrupt)
        with model.hooks(fwd_hooks=[(down.hook, put)]):
            return float(gap(model, pairs, 0, pairs.corrupt) - before)


UPS = (Node("hook_embed", 0), Node("blocks.0.attn.hook_z", 1), Node("blocks.0.hook_mlp_out", 0))
DOWNS = (
    Node("blocks.0.attn.hook_z", 0),
    Node("blocks.0.hook_mlp_out", 0),
    Node("blocks.1.attn.hook_z", 1),
    Node("blocks.1.hook_mlp_out", 0),
    TARGET,
)


def test_exact_edges_are_those_of_path_patching_by_hand() -> None:
    model, pairs = tiny("llama"), one_pair()
    only: list[Edge] = [(up, down) for up in UPS for down in DOWNS]
    scores = score_edges(model, pairs, method="exact", only=only)
    moved = 0
    for up, down in only:
        possible = DOWNS.index(down) >= UPS.index(up)
        expected = by_hand(model, pairs, up, down) if possible else 0.0
        assert float(scores.score(up, down)) == pytest.approx(expected, abs=1e-7), (up, down)
        moved += abs(expected) > 1e-4
    assert moved > 6


@contextmanager
def linearised(model: TransformerBridge, base: Tensor) -> Iterator[None]:
    """Norms, attention patterns and gates as they are for ``base``: the rest is linear."""
    ratios: dict[str, Tensor] = {}
    handles = []
    named = dict(model.original_model.named_modules())
    norms = {n: m for n, m in named.items() if type(m).__name__ == "LlamaRMSNorm"}
    gates = {n: m for n, m in named.items() if type(m).__name__ == "SiLUActivation"}
    assert len(norms) == 5 and len(gates) == 2

    def learn(name: str) -> Any:
        def hook(_: Any, args: Any, y: Tensor) -> None:
            ratios[name] = y / args[0] if name in norms else y

        return hook

    def hold(name: str) -> Any:
        def hook(_: Any, args: Any, y: Tensor) -> Tensor:
            return args[0] * ratios[name] if name in norms else ratios[name].expand_as(y)

        return hook

    patterns = {}
    try:
        handles = [m.register_forward_hook(learn(n)) for n, m in {**norms, **gates}.items()]
        with torch.no_grad():
            _, cache = model.run_with_cache(
                base, names_filter=lambda name: name.endswith("hook_pattern")
            )
        patterns = dict(cache.items())
        for handle in handles:
            handle.remove()
        handles = [m.register_forward_hook(hold(n)) for n, m in {**norms, **gates}.items()]
        holds = [(name, lambda x, hook, p=p: p.expand_as(x)) for name, p in patterns.items()]
        with model.hooks(fwd_hooks=holds):
            yield
    finally:
        for handle in handles:
            handle.remove()


def test_where_all_else_is_linear_prediction_and_patching_agree() -> None:
    """CP-LRP with the gate constant treats norms, patterns and gates as the constants they are."""
    model, pairs, names = tiny("llama"), one_pair(), ("tokens", "heads", "mlp", "neurons")
    composite, true = CPLRP(gate="up"), gap(tiny("llama"), pairs, 0, pairs.corrupt)
    with linearised(model, pairs.corrupt):
        predicted = score_edges(model, pairs, composite=composite)
        only: list[Edge] = [(up, down) for up in UPS for down in predicted.into]
        exact = score_edges(model, pairs, method="exact", only=only)
        nodes = score_nodes(model, pairs, components=names, composite=composite)
        patched = score_nodes(model, pairs, method="exact", components=names)
    assert float(predicted.corrupt) == pytest.approx(float(true), abs=1e-9)
    large = 0
    for up, down in only:
        found, expected = float(predicted.score(up, down)), float(exact.score(up, down))
        assert found == pytest.approx(expected, abs=1e-9), (up, down)
        large += abs(expected) > 1e-4
    assert large > 6
    for hook in nodes.components:
        assert torch.allclose(nodes.values[hook], patched.values[hook], rtol=0, atol=1e-9), hook


def test_relevance_under_float32_closes_to_a_millionth() -> None:
    model = tiny("llama").to(torch.float32)
    hooks = place_components(model, ("heads", "neurons"))
    session = lenslrp.session(model)
    _, found = coefficients(session, hooks, input=TOKENS, target=Logit(5))
    prepared = prepare_text(
        model, TOKENS, append=[], prepend_bos=None, attention_mask=None, inputs_embeds=None
    )
    with session, segmented(session, prepared, Logit(5), hooks, accounting=True) as passed:
        for hook, (x, g) in found.items():
            for unit in range(x.shape[2]):
                seed = torch.zeros_like(g)
                seed[:, :, unit] = g[:, :, unit]
                flows, _ = passed.conditional_gradients({hook: seed})
                entered = sum(
                    float(((passed.embedded() if h == EMBEDDINGS else passed.at(h)) * f).sum())
                    for h, f in flows.items()
                )
                entered += sum(float(v) for v in passed.absorbed().values())
                relevance = float((x * g)[:, :, unit].sum())
                assert entered == pytest.approx(relevance, abs=1e-6), (hook, unit)


def test_transformer_lens_finds_the_same_edges_where_it_can() -> None:
    """Its edges into q, k, v, MLPs and logits; its own gradients, hooks and enumeration."""
    from transformer_lens.tools.analysis.attribution_patching import (
        EdgeAttributionConfig,
        attribution_patch,
    )

    model, pairs = tiny("gpt2"), one_pair()
    names = ("tokens", "heads", "mlp", "q", "k", "v")
    ours = score_edges(model, pairs, method="attribution", components=names, by_position=True)
    theirs = attribution_patch(
        model, pairs.clean, pairs.corrupt, lambda x: pairs.gap(x)[0], EdgeAttributionConfig("edge")
    )
    found = to_transformer_lens(ours)
    expected = {edge: score for edge, score in theirs.edge_scores.items() if abs(score) > 1e-12}
    assert len(expected) > 60 and set(expected) <= set(found.edge_scores)
    for edge, score in found.edge_scores.items():
        assert score == pytest.approx(theirs.edge_scores[edge], abs=1e-9), edge
    nodes = score_nodes(model, pairs, method="attribution", components=names[:3], by_position=True)
    alone = to_transformer_lens(nodes)
    assert set(alone.node_scores) == set(theirs.node_scores)
    for node, score in theirs.node_scores.items():
        assert alone.node_scores[node] == pytest.approx(score, abs=1e-9), node
        assert found.node_scores.get(node, 0.0) == pytest.approx(score, abs=1e-9), node
    assert found.top_edges(3) == [
        (*edge, pytest.approx(score, abs=1e-9)) for *edge, score in theirs.top_edges(3)
    ]


def test_what_transformer_lens_has_no_place_for_is_refused_by_name() -> None:
    model, pairs = tiny("llama"), one_pair()
    with pytest.raises(InputError, match="by_position=True"):
        to_transformer_lens(score_nodes(model, pairs, components=["heads"]))
    with pytest.raises(InputError, match="'neurons' is no node of TransformerLens; tokens, heads"):
        to_transformer_lens(score_nodes(model, pairs, components=["neurons"], by_position=True))
    with pytest.raises(InputError, match="no edges into blocks.0.attn.hook_z"):
        to_transformer_lens(score_edges(model, pairs, by_position=True))
    grouped = score_edges(
        model, pairs, components=("tokens", "heads", "mlp", "q", "k", "v"), by_position=True
    )
    keys = [edge for edge in to_transformer_lens(grouped).edge_scores if edge[1].kind == "k_input"]
    assert keys and {down.head for _, down in keys} == {0}  # one group of two heads


def test_what_cannot_be_asked_is_refused_by_name() -> None:
    model, pairs = tiny("llama"), one_pair()

    def refuses(text: str, **given: Any) -> None:
        with pytest.raises(InputError, match=text):
            score_edges(model, pairs, **given)

    refuses("one of relevance, attribution, integrated, exact, not 'guess'", method="guess")
    refuses("one of denoising, noising, not 'both'", direction="both")
    refuses("composite is for method='relevance'", method="attribution", composite=RelP())
    refuses("only says which edges", method="exact")
    refuses("only says which edges", only=[(UPS[0], TARGET)])
    refuses("nothing gets past it", components=("residual",))
    refuses("rows must be at least 1, not 0", rows=0)
    refuses("steps must be at least 1, not 0", steps=0, method="integrated")
    refuses(
        "integrated edges need nodes behind the tokens", method="integrated", components=("tokens",)
    )
    refuses("no node of these components", into=[Node("blocks.0.mlp.hook_post", 3)])
    refuses("has 2 units and 6 positions", into=[Node("blocks.0.attn.hook_z", 2)])
    refuses("at one position with by_position=True, and only then", method="exact",
            only=[(Node("hook_embed", 0, 3), TARGET)])  # fmt: skip
    with pytest.raises(InputError, match="no pairs"):
        score_edges(model, pairs[:0])
    with pytest.raises(InputError, match="was not scored"):
        score_edges(model, pairs, into=[TARGET]).score(UPS[0], DOWNS[0])


def test_chosen_downstream_nodes_alone_and_in_any_order() -> None:
    model, pairs = tiny("llama"), some_pairs()
    whole = score_edges(model, pairs, direction="noising")
    into = [TARGET, DOWNS[3], DOWNS[0]]
    some = score_edges(model, pairs, direction="noising", into=into, rows=3)
    for hook, value in some.values.items():
        index = [whole.into.index(node) for node in into]
        assert torch.allclose(value, whole.values[hook][:, index], rtol=0, atol=1e-12)
    assert some.passes.backward == len(pairs) * (1 + len(into))
    frame = whole.top(3)
    means = [float(whole.score(*edge).mean()) for edge in whole.best(3)]
    assert means == pytest.approx(frame["score"].tolist())
    assert list(frame["score"].abs()) == sorted(frame["score"].abs(), reverse=True)
    assert frame.loc[0, "to"] in {str(node) for node in whole.into}
    gradient = score_edges(model, pairs, method="attribution", direction="noising")
    given = score_edges(model, pairs, composite=GradientTimesInput(), direction="noising")
    for hook, value in gradient.values.items():
        assert torch.equal(value, given.values[hook])
        assert not torch.allclose(value, whole.values[hook])


def test_nodes_come_in_the_order_of_the_model_whatever_order_they_are_asked_in() -> None:
    model, pairs = tiny("llama"), some_pairs()
    mine = score_edges(model, pairs, components=("mlp", "tokens", "heads"))
    usual = score_edges(model, pairs, components=("tokens", "heads", "mlp"))
    assert next(iter(mine.components)) == "hook_embed"
    assert mine.into[-1] == TARGET and set(mine.into) == set(usual.into)
    up, down = Node("hook_embed", 0), Node("blocks.1.hook_mlp_out", 0)
    assert torch.equal(mine.score(up, down), usual.score(up, down))


def test_a_cut_pass_leaves_nothing_behind_even_after_an_exception() -> None:
    model = tiny("llama")
    hooks = place_components(model, ("heads", "neurons"))
    prepared = prepare_text(
        model, TOKENS, append=[], prepend_bos=None, attention_mask=None, inputs_embeds=None
    )
    before = snapshot(model)
    with lenslrp.session(model) as session:
        _, found = coefficients(session, hooks, input=TOKENS, target=Logit(5))

    def fail() -> None:
        with lenslrp.session(model) as own, segmented(own, prepared, Logit(5), hooks) as passed:
            passed.into([TARGET], found)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert changes(before, model) == []
    with lenslrp.session(model) as own, segmented(own, prepared, Logit(5), hooks) as passed:
        first, _ = passed.into([TARGET], found)
        again, _ = passed.into([TARGET], found)
        assert all(torch.equal(first[hook], again[hook]) for hook in first)
