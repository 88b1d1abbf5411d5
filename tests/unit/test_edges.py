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
from lenslrp.analysis.circuits import score_nodes
from lenslrp.analysis.cut_pass import EMBEDDINGS, coefficients, cut
from lenslrp.analysis.edges import Edge, EdgeScores, score_edges
from lenslrp.analysis.nodes import GAP, Node, place_components
from lenslrp.analysis.pairs import Pairs
from lenslrp.analysis.replaced import repeated
from lenslrp.errors import InputError
from lenslrp.hooks import CPLRP, AttnLRP, Composite, GradientTimesInput, RelP
from lenslrp.inputs import prepare
from lenslrp.targets import Logit
from tests.unit.test_circuits import gap, some_pairs
from tests.unit.tiny import tiny

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
    cache, found = coefficients(
        model, hooks, input=TOKENS, target=Logit(5), composite=composite, strict=True
    )
    prepared = prepare(
        model, TOKENS, append=[], prepend_bos=None, attention_mask=None, inputs_embeds=None
    )
    rows = 6
    left = {hook: torch.zeros_like(x[0].sum(-1)) for hook, (x, _) in found.items()}
    arrived = torch.zeros_like(cache.tokens[0])
    with cut(model, repeated(prepared, rows), Logit(5), hooks, composite, books=True) as passed:
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
            flows, begun = passed.flows(seeds, target)
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
            if down == GAP:
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
    layer = "final" if down == GAP else down.hook.split(".")[1]
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
        if down == GAP:
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
    GAP,
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
