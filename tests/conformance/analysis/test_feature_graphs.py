"""Graphs of features: the local replacement model, written out from the weights, agrees with them.

With patterns, norms and the choice of active features constant, the replacement model is linear, so
what an intervention does to it is what the graph says, to the last digits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from lenslrp.analysis import (
    CrossLayerCoder,
    Feature,
    SparseCoder,
    attribution_graph,
    feature_relevance,
)
from lenslrp.analysis.circuits.graph.result import AttributionGraph
from lenslrp.analysis.circuits.nodes import Node, place_components
from lenslrp.analysis.circuits.segments import EMBEDDINGS, coefficients, segmented
from lenslrp.errors import InputError
from lenslrp.hooks import CPLRP, AttnLRP, Composite, RelP
from lenslrp.inputs import prepare_text
from lenslrp.targets import Activation, Logit, LogitDiff, LogProb
from tests.unit.tiny import tiny

TOKENS = torch.tensor([[3, 17, 5, 17, 8, 11]])
TOKEN, LAYERS, WIDTH, FEATURES = 5, 2, 16, 40
WHOLE = {"node_share": 1.0, "edge_share": 1.0}


def coder(hook: str, out: str | None = None, *, seed: int = 0, **changes: Any) -> SparseCoder:
    made = torch.Generator().manual_seed(seed)

    def random(*shape: int, by: float) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64) * by

    weights = {
        "W_enc": random(WIDTH, FEATURES, by=0.5),
        "b_enc": random(FEATURES, by=0.3) - 0.3,
        "W_dec": random(FEATURES, WIDTH, by=0.3),
        "b_dec": random(WIDTH, by=0.2),
    }
    if changes.pop("skip", False):
        changes["W_skip"] = random(WIDTH, WIDTH, by=0.2)
    return SparseCoder(hook, hook_out=out, **{**weights, **changes})


def transcoders(**changes: Any) -> list[SparseCoder]:
    return [
        coder(f"blocks.{i}.mlp.hook_in", f"blocks.{i}.hook_mlp_out", seed=i, name="tc", **changes)
        for i in range(LAYERS)
    ]


def cross_layer(layers: int = 3) -> list[SparseCoder]:
    """A transcoder of all layers, whose features write their own layer and those behind it."""
    made = torch.Generator().manual_seed(11)
    outs = [f"blocks.{i}.hook_mlp_out" for i in range(layers)]
    coders = [coder(f"blocks.{i}.mlp.hook_in", out, seed=i, skip=i == 1, name=f"clt {i}")
              for i, out in enumerate(outs)]  # fmt: skip

    def rows() -> Tensor:
        return torch.randn(FEATURES, WIDTH, generator=made, dtype=torch.float64) * 0.2

    given = [
        replace(one, later={out: rows() for out in outs[i + 1 :]}) for i, one in enumerate(coders)
    ]
    return list(CrossLayerCoder(tuple(given)).layers)


CODERS: dict[str, list[SparseCoder]] = {
    "transcoders": transcoders(),
    "skip transcoders": transcoders(skip=True),
    "the 5 largest": transcoders(k=5),
    "jumprelu": transcoders(threshold=torch.full((FEATURES,), 0.6, dtype=torch.float64)),
    "layer norm": transcoders(normalization="layer_norm"),
    "cross-layer": cross_layer(),
    "one head's": [
        *transcoders(),
        replace(
            coder("x", seed=9),
            hook="blocks.0.attn.hook_z",
            heads=1,
            W_enc=coder("x").W_enc[:8],
            W_dec=coder("x").W_dec[:, :8],
            b_dec=coder("x").b_dec[:8],
        ),
    ],
    "autoencoders too": [
        *transcoders(normalization="constant_norm_rescale"),
        coder("blocks.0.hook_resid_post", seed=5, subtract_b_dec=True),
        coder("blocks.1.hook_resid_pre", seed=6, normalization="layer_norm"),
        coder("blocks.1.hook_attn_out", seed=7),
        coder("blocks.0.attn.hook_z", seed=8, heads="all", subtract_b_dec=True),
    ],
}


def llama(coders: list[SparseCoder]) -> TransformerBridge:
    layers = max(LAYERS, *(1 + int(c.hook.split(".")[1]) for c in coders))
    return tiny("llama", num_hidden_layers=layers)


def weight(part: Any) -> Tensor:
    found: Tensor = part.original_component.weight
    return found.detach()


class Replaced:
    """A Llama with coders in the place of what they reconstruct and all else that is not linear
    constant, from its weights: `run` computes it after `change` has changed what it likes."""

    def __init__(self, model: TransformerBridge, coders: list[SparseCoder]) -> None:
        self.model, self.coders = model, {c.hook_out or c.hook: c for c in coders}
        _, self.cache = model.run_with_cache(TOKENS)
        self.base: dict[str, Tensor] = {}
        self.run(lambda key, x: self.base.setdefault(key, x))

    def run(self, change: Callable[[str, Tensor], Tensor]) -> float:
        model = self.model
        x = change("tokens", weight(model.embed)[TOKENS[0]])
        self.now: dict[str, list[Tensor]] = {}  # hook point -> what earlier layers write there
        for layer in range(model.cfg.n_layers):
            name = f"blocks.{layer}"
            x = self._stand_in(f"{name}.hook_resid_pre", x, x, change)
            read = x * self._norm(f"{name}.ln1")
            v = read @ weight(model.blocks[layer].attn.v).T
            pattern = self.cache[f"{name}.attn.hook_pattern"][0]
            z = torch.einsum("hqk,kd->qhd", pattern, v)  # one group of keys and values
            z = change(f"{name}.attn.hook_z", z)
            z = self._stand_in(f"{name}.attn.hook_z", z, z, change)
            out = z.flatten(1) @ weight(model.blocks[layer].attn.o).T
            x = x + self._stand_in(f"{name}.hook_attn_out", out, out, change)
            mlp = self.cache[f"{name}.hook_mlp_out"][0]
            x = x + self._stand_in(
                f"{name}.hook_mlp_out", x * self._norm(f"{name}.ln2"), mlp, change
            )
            x = self._stand_in(f"{name}.hook_resid_post", x, x, change)
        last = (x * self._norm("ln_final"))[-1]
        return float(last @ weight(model.unembed)[TOKEN])

    def _norm(self, name: str) -> Tensor:
        return self.cache[f"{name}.hook_out"][0] / self.cache[f"{name}.hook_in"][0]

    def _stand_in(
        self, hook: str, x: Tensor, y: Tensor, change: Callable[[str, Tensor], Tensor]
    ) -> Tensor:
        if hook not in self.coders:
            return y
        c = self.coders[hook]
        if isinstance(c.heads, int):
            kept = y.clone()
            kept[:, c.heads] = self._flat(c, x[:, c.heads], y[:, c.heads], change)
            return kept
        return self._flat(c, x.flatten(1), y.flatten(1), change).reshape(y.shape)

    def _flat(
        self, c: SparseCoder, x: Tensor, y: Tensor, change: Callable[[str, Tensor], Tensor]
    ) -> Tensor:
        of = f"{c.hook}[{c.name}"
        if f"{of} x" not in self.base:  # the unchanged run: what is constant from here on
            mean, scale = torch.zeros(len(x), 1), torch.ones(len(x), 1)
            if c.normalization == "layer_norm":
                mean, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True)
            elif c.normalization == "constant_norm_rescale":
                scale = x.pow(2).mean(1, keepdim=True).sqrt()
            self.base[f"{of} x"], self.base[f"{of} mean"] = x, mean
            self.base[f"{of} scale"] = scale
        mean, scale = self.base[f"{of} mean"], self.base[f"{of} scale"]
        shift = c.b_dec if c.subtract_b_dec else 0.0
        eps = 1e-5 if c.normalization == "layer_norm" else 0.0
        pre = ((x - mean) / (scale + eps) - shift) @ c.W_enc + c.b_enc
        if f"{of} gate" not in self.base:
            gate = pre > (0.0 if c.threshold is None else c.threshold)
            if c.k is not None:
                least = pre.topk(c.k, dim=1).values[:, -1:]
                gate &= pre >= least
            self.base[f"{of} gate"] = gate
        a = change(f"{of}]", pre * self.base[f"{of} gate"])
        skip = 0.0 if c.W_skip is None else x @ c.W_skip
        known = a @ c.W_dec + c.b_dec + skip + sum(self.now.get(c.hook_out or "", []))
        for hook, rows in c.later.items():
            self.now.setdefault(hook, []).append(a @ rows)
        if c.hook_out is None:  # an autoencoder undoes its normalization
            known = known * scale + mean
        error = self.base.setdefault(f"{of} error]", y - known)
        return known + change(f"{of} error]", error)


def place(node: dict[str, Any]) -> tuple[str, tuple[int, ...]]:
    """What a node is in `Replaced`, and where."""
    if node["kind"] == "token":
        return "tokens", (node["position"],)
    if node["kind"] == "error":
        return node["hook"], (node["position"],)
    return node["hook"], (node["position"], node["unit"])


def frozen(model: TransformerBridge, coders: list[SparseCoder], **given: Any) -> AttributionGraph:
    return attribution_graph(
        model, TOKENS, Logit(TOKEN), coders=coders, components=["heads"], attention="frozen",
        **{"k": 400, "rows": 40, **WHOLE, **given},
    )  # fmt: skip


@pytest.mark.parametrize("coders", CODERS.values(), ids=CODERS)
def test_a_node_switched_off_takes_its_relevance_away(coders: list[SparseCoder]) -> None:
    model = llama(coders)
    graph, written_out = frozen(model, coders), Replaced(model, coders)
    plain = written_out.run(lambda key, x: x)
    assert plain == pytest.approx(float(model(TOKENS)[0, -1, TOKEN].detach()), abs=1e-9)
    assert graph.error < 1e-9
    left = graph.edges.groupby("source")["relevance"].sum()
    nodes = [node for node in graph.nodes.to_dict("records") if node["kind"] != "target"]
    for node in nodes:
        key, at = place(node)

        def without(name: str, x: Tensor, key: str = key, at: Any = at) -> Tensor:
            if name != key:
                return x
            x = x.clone()
            x[at] = 0
            return x

        lost = plain - written_out.run(without)
        assert lost == pytest.approx(node["relevance"], abs=1e-9), node["id"]
        assert left.get(node["id"], 0.0) == pytest.approx(lost, abs=1e-9), node["id"]
    kinds = {node["kind"] for node in nodes}
    assert kinds == {"token", "head", "feature", "error"} and len(nodes) > 60


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("name", ["skip transcoders", "autoencoders too", "cross-layer"])
def test_an_edge_is_what_one_node_does_to_another_alone(name: str, direct: bool) -> None:
    """All other chosen nodes (`direct`: all others) are held where they are."""
    coders, model = CODERS[name], llama(CODERS[name])
    graph, written_out = (
        frozen(model, coders, k=600 if direct else 30, direct=direct),
        Replaced(model, coders),
    )
    nodes = {node["id"]: node for node in graph.nodes.to_dict("records")}
    inner = [place(n) for n in nodes.values() if n["kind"] in ("head", "feature")]
    edges = graph.edges[graph.edges["target"].map(lambda t: nodes[t]["kind"] != "head")]
    edges = edges.iloc[:: max(1, len(edges) // 60)]
    for edge in edges.to_dict("records"):
        up, down = place(nodes[edge["source"]]), edge["target"]
        end = None if down == "target" else place(nodes[down])
        seen: dict[str, float] = {}

        def hold(key: str, x: Tensor, up: Any = up, end: Any = end, seen: Any = seen) -> Tensor:
            y = x.clone()
            held = slice(None) if direct and "error" not in key and key != "tokens" else None
            for there, at in [(key, held)] if held else inner:
                if there == key:
                    y[at] = written_out.base[key][at]
            if end is not None and end[0] == key:
                seen["value"] = float(x[end[1]])
            if up[0] == key:
                y[up[1]] = 0
            return y

        value = written_out.run(hold)
        if end is None:
            change = float(graph.explained.value[0]) - value
        else:
            node = nodes[down]
            was = float(written_out.base[end[0]][end[1]])
            assert was == pytest.approx(node["activation"], abs=1e-9)
            change = (was - seen["value"]) * node["relevance"] / was
        assert change == pytest.approx(edge["relevance"], abs=1e-9), (edge["source"], down)
    assert len(edges) > 30


@pytest.mark.parametrize("attention", ["composite", "frozen", "qkv"])
@pytest.mark.parametrize("composite", [AttnLRP(), CPLRP(), RelP()], ids=lambda c: c.name)
@pytest.mark.parametrize(
    ("family", "across"),
    [*((f, False) for f in ("llama", "gpt2", "gemma2", "phi", "qwen3")), ("llama", True)],
)
def test_sums_close_with_coders(
    family: str, composite: Composite, attention: str, across: bool
) -> None:
    model = tiny(family)
    coders = [*(cross_layer(2) if across else transcoders())]
    coders.append(coder("blocks.1.hook_resid_pre", seed=6))
    given = {"coders": coders, "composite": composite, "attention": attention, "rows": 20}
    whole = attribution_graph(model, TOKENS, Logit(TOKEN), k=25, **given, **WHOLE)
    near = 1e-6 if family == "gemma2" else 1e-9  # its softmax is float32's
    assert whole.error < near and (whole.nodes["rest"].abs() < near).all()
    out = whole.edges.groupby("source")["relevance"].sum()
    inner = whole.nodes[whole.nodes["kind"].isin(["head", "neuron", "feature"])]
    for node in inner.to_dict("records"):
        assert out.get(node["id"], 0.0) == pytest.approx(node["relevance"], abs=near)
    pruned = attribution_graph(
        model, TOKENS, Logit(TOKEN), k=25, node_share=0.7, edge_share=0.8, **given
    )
    assert pruned.error < near and len(pruned.edges) < len(whole.edges)
    assert (pruned.nodes["reconstruction"].abs() > 1e-6).any()
    assert set(whole.edges["via"]) <= ({"", "q", "k", "v"} if attention == "qkv" else {""})


@pytest.mark.parametrize("coders", CODERS.values(), ids=CODERS)
def test_the_forward_pass_stays_what_it_is(coders: list[SparseCoder]) -> None:
    model = llama(coders)
    one, plain = prepare_text(model, TOKENS), model(TOKENS)
    with (
        lenslrp.session(model) as session,
        segmented(session, one, Logit(TOKEN), {}, coders=coders) as segments,
    ):
        assert segments.run.logits is not None and torch.equal(segments.run.logits, plain)


def test_an_encoder_passes_relevance_on_by_the_gradient_of_its_open_gates() -> None:
    """What the graph takes for linear is what autograd makes of `SparseCoder.encode`."""
    from lenslrp.analysis.circuits.replacement import ActiveFeatures, Encode
    from lenslrp.hooks.linear_rules import Epsilon
    from lenslrp.hooks.sites import Accounts, Site

    x = torch.randn(3, 4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x[:1].expand(3, -1, -1).clone().requires_grad_()
    for c in [*(c for group in CODERS.values() for c in group)]:
        accounts = Accounts(rows=3)
        site = Site("x", "SparseCoder", "linear", Epsilon(), 0, accounts=accounts)
        shown = x if c.heads is None else x.unflatten(-1, (2, -1))
        active = ActiveFeatures.of(c, shown)
        at = (slice(None), active.positions, active.features)
        expected = c.encode(shown)
        found = Encode.apply(c.flat(shown), active, site)
        assert torch.allclose(found, expected[at], atol=1e-12) and found.shape[1] > 4
        g = torch.randn_like(found)
        (ours,) = torch.autograd.grad(found, x, g)
        (theirs,) = torch.autograd.grad(expected[at], x, g)
        assert torch.allclose(ours, theirs, atol=1e-12)
        biases = accounts.terms["biases", 0, "linear"]
        kept = (found * g).sum(1) - (x * ours).sum((1, 2))
        assert torch.allclose(biases, kept.detach(), atol=1e-10) and (biases.abs() > 1e-3).any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_edges_into_a_head_are_told_apart_by_query_key_and_value(family: str) -> None:
    """In two steps: from the head to its query, key and value, and from each of them on."""
    model = tiny(family)
    given = {"k": 2000, "rows": 60, "direct": True, "components": ["heads", "neurons"], **WHOLE}
    split = attribution_graph(model, TOKENS, Logit(TOKEN), attention="qkv", **given)
    plain = attribution_graph(model, TOKENS, Logit(TOKEN), **given)
    both = split.totals.merge(plain.edges, on=["source", "target"], how="outer").fillna(0.0)
    assert np.allclose(both["relevance_x"], both["relevance_y"], rtol=0, atol=1e-10)
    heads = place_components(model, ("heads", "neurons"))
    ways = place_components(model, ("q", "k", "v"))
    one = prepare_text(model, TOKENS)
    name, position, head = "blocks.1.attn.hook_z", 5, 1
    down = str(Node(name, head, position))
    with lenslrp.session(model) as session:
        _, nodes = coefficients(session, heads, input=TOKENS, target=Logit(TOKEN))
        with segmented(session, one, Logit(TOKEN), {**heads, **ways}) as segments:
            arrived, _ = segments.into([Node(name, head, position)], nodes)
            for hook, via in ways.items():
                if not hook.startswith("blocks.1."):
                    continue
                found, _ = segments.conditional_gradients({hook: arrived[hook]})
                edges = split.edges[(split.edges["target"] == down) & (split.edges["via"] == via)]
                known = edges.set_index("source")["relevance"]
                expected = {}
                for key, g in found.items():
                    x = segments.embedded() if key == EMBEDDINGS else segments.at(key)
                    for (pos, unit), value in np.ndenumerate((x * g)[0].sum(-1).numpy()):
                        token = key == EMBEDDINGS
                        expected[f"token@{pos}" if token else str(Node(key, unit, pos))] = value
                for source, value in expected.items():
                    assert known.get(source, 0.0) == pytest.approx(value, abs=1e-9), source
                assert set(known.index) <= set(expected) and known.abs().max() > 1e-6
                if via == "q":
                    assert {i.rpartition("@")[2] for i in known.index} == {str(position)}


def test_a_cross_layer_transcoder_is_all_of_its_layers() -> None:
    layers, model = cross_layer(), tiny("llama", num_hidden_layers=3)
    both = "clt 0 writes at blocks.2.hook_mlp_out, too, and no transcoder of that layer is there"
    with pytest.raises(InputError, match=both):
        attribution_graph(model, TOKENS, Logit(TOKEN), coders=layers[:2])
    one_hook = "is of one hook point, and features of clt 0 write at 3: attribution_graph"
    with pytest.raises(InputError, match=f"feature_relevance {one_hook}"):
        feature_relevance(model, TOKENS, Logit(TOKEN), layers[0])
    with pytest.raises(InputError, match="layer 1 writes at blocks.1.hook_mlp_out, expected"):
        CrossLayerCoder((layers[0], replace(layers[1], later={}), layers[2]))
    with pytest.raises(InputError, match="later is of transcoders: give hook_out"):
        replace(layers[0], hook_out=None)
    rows = {"blocks.2.hook_mlp_out": torch.zeros(3, WIDTH)}
    with pytest.raises(InputError, match="at blocks.2.hook_mlp_out are written 3 vectors, exp"):
        replace(layers[0], later=rows)
    total = sum(rows[7] for rows in layers[0].decoders.values())
    assert torch.equal(Feature(layers[0], 7).writes(model)["out"][0], total)


def test_any_target_is_explained_with_coders() -> None:
    model = tiny("gpt2")
    for target in (LogitDiff(5, 6), LogProb(5), Activation("blocks.1.attn.hook_z", (1, 3)), None):
        graph = attribution_graph(model, TOKENS, target, coders=transcoders(), k=20, **WHOLE)
        assert graph.error < 1e-9 and "feature" in set(graph.nodes["kind"])
