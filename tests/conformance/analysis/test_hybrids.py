"""Recurrent and hybrid models in analysis: the state, heads and channels as units and nodes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.recurrent_gemma import modeling_recurrent_gemma

import lenslrp
from lenslrp import InputError, targets
from lenslrp.analysis import (
    TARGET,
    Ablate,
    Add,
    Channel,
    Head,
    NeuronDictionary,
    Pairs,
    RecurrentHead,
    as_prompt,
    attention_relevance,
    attribution_graph,
    head_scores,
    heads_of,
    parse_unit,
    prune,
    reads,
    score_edges,
    score_nodes,
    steer,
    to_transformer_lens,
    unit_relevance,
    verify,
    writes,
)
from lenslrp.analysis.circuits.nodes import place_components
from lenslrp.edits import Edit, edit_units
from lenslrp.forward import forward
from lenslrp.hooks.scans import mixers
from lenslrp.hooks.structure import components
from lenslrp.inputs import prepare_text
from lenslrp.text.tokenization import give_tokenizer
from tests.conformance import zoo
from tests.conformance.families import tokens

pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = (
    "MambaForCausalLM",
    "Mamba2ForCausalLM",
    "Qwen3NextForCausalLM",
    "RecurrentGemmaForCausalLM",
)
SCANS = (*FAMILIES, "FalconH1ForCausalLM", "OlmoHybridForCausalLM", "RwkvForCausalLM")
CLEAN = torch.tensor([[3, 17, 5, 17, 8, 11], [2, 9, 2, 21, 9, 0], [4, 4, 6, 7, 0, 0]])
CORRUPT = torch.tensor([[3, 17, 6, 17, 8, 11], [2, 8, 2, 21, 9, 0], [4, 4, 6, 9, 0, 0]])
MASK = torch.arange(6)[None] < torch.tensor([6, 5, 4])[:, None]


def some_pairs() -> Pairs:
    return Pairs(CLEAN, CORRUPT, MASK, torch.tensor([5, 7, 9]), torch.tensor([6, 2, 3]))


def first_mixer(model: Any) -> str:
    return mixers(components(model))[0][0]


def first_units(model: Any) -> tuple[RecurrentHead, Channel]:
    """The second head of the first mixer, or all of it, and one of its channels."""
    hook = f"{first_mixer(model)}.hook_scan_out"
    _, R = lenslrp.run_with_relevance(model, tokens(), 5, names_filter=[hook])
    head = 1 if R[hook].ndim == 4 else None
    return RecurrentHead(0, head), Channel(0, 3, head)


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scans that cast to float32 compute in float64, in backward passes too."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def read_state(model: Any, composite: Any) -> tuple[Tensor, Tensor, lenslrp.RelevanceCache]:
    mixer = first_mixer(model)
    names = [f"{mixer}.hook_scan_{end}" for end in ("map", "state", "out", "in")]
    _, R = zoo.explain(model, composite, names)
    return R[names[0]], R[names[1]], R


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("choice", ["constant", "uniform"])
def test_the_state_carries_what_the_map_says(name: str, choice: Any, float64: None) -> None:
    """Relevance over a step in time: of all entries from later queries to this and earlier keys."""
    model = zoo.build(name)
    logits = model(tokens(), use_cache=False)
    the_map, state, _ = read_state(model, lenslrp.AttnLRP(recurrence=choice))
    length = the_map.shape[-1]
    across = [the_map[:, :, t + 1 :, : t + 1].sum(dim=(2, 3)) for t in range(length)]
    # The others cast to float32 by other means, which a backward pass cannot be kept from.
    double = name in ("MambaForCausalLM", "Mamba2ForCausalLM", "RwkvForCausalLM")
    near = 1e-9 if double else 1e-6
    torch.testing.assert_close(state, torch.stack(across, dim=1), rtol=near, atol=near)
    assert float(state.abs().max()) > 1e-2
    assert float(state[:, -1].abs().max()) < near  # nothing comes after the last token
    assert torch.equal(model(tokens(), use_cache=False), logits)
    assert "hook_scan_state" not in str(zoo.explain(model, lenslrp.AttnLRP())[1].keys())


def test_the_states_relevance_is_state_times_gradient_of_later_outputs(float64: None) -> None:
    """Mamba's recurrence, written out: h_t = exp(A dt_t) h_(t-1) + dt_t B_t v_t, y_t = C_t h_t."""
    model = zoo.build("MambaForCausalLM")
    mixer = model.original_model.backbone.layers[0].mixer
    path = first_mixer(model)
    read: dict[str, Tensor] = {}
    reads_at = {f"{path}.hook_scan_in": "v", f"{path}.hook_scan_out": "y",
                f"{path}.x_proj.hook_out": "x"}  # fmt: skip
    with (
        torch.no_grad(),
        forward(
            model,
            prepare_text(model, tokens()),
            read={hook: lambda x, n=n: read.__setitem__(n, x) for hook, n in reads_at.items()},
        ),
    ):
        pass
    _, state, R = read_state(model, lenslrp.CPLRP())
    g = R[f"{path}.hook_scan_out"] / read["y"]
    rank, width = mixer.time_step_rank, mixer.ssm_state_size
    step, b, c = read["x"].split([rank, width, width], dim=-1)
    dt = functional.softplus(mixer.dt_proj(step))  # [batch, pos, channel]
    a = -mixer.A_log.exp()
    h, states = torch.zeros(*dt.shape[::2], width, dtype=torch.float64), []
    for t in range(dt.shape[1]):
        taken = (dt[:, t] * read["v"][:, t])[..., None] * b[:, t, None]
        h = (a * dt[:, t, :, None]).exp() * h + taken
        states.append(h.detach())
        torch.testing.assert_close(
            (h @ c[:, t, :, None])[..., 0] + mixer.D * read["v"][:, t], read["y"][:, t]
        )
    for t, kept in enumerate(states[:-1]):
        start = later = kept.clone().requires_grad_()
        total = torch.zeros(())
        for s in range(t + 1, len(states)):
            taken = (dt[:, s] * read["v"][:, s])[..., None] * b[:, s, None]
            later = (a * dt[:, s, :, None]).exp() * later + taken
            total = total + ((later @ c[:, s, :, None])[..., 0] * g[:, s]).sum()
        (gradient,) = torch.autograd.grad(total, start)
        expected = (kept * gradient).sum(dim=(1, 2))
        torch.testing.assert_close(state[:, t, 0], expected, rtol=1e-9, atol=1e-9)


def test_the_state_is_of_backward_passes_alone() -> None:
    model = zoo.build("MambaForCausalLM")
    for end in ("map", "state"):
        name = f"blocks.0.mixer.hook_scan_{end}"
        message = f"{name} is made of relevance in the backward pass: it can be read with"
        with (
            pytest.raises(InputError, match=message),
            edit_units(model, [Edit(name, function=torch.clone)]),
        ):
            pass
        with pytest.raises(InputError, match="no relevance starts there"):
            lenslrp.run_with_relevance(model, tokens(), targets.Activation(name, 0))


def _with_function(
    module: Any, name: str, zero: Callable[[Tensor], None]
) -> Callable[[pytest.MonkeyPatch], None]:
    """The model's own scan with something zeroed in its output, in the first layer alone."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        scan, calls = getattr(module, name), count()

        def zeroed(*args: Any, **kwargs: Any) -> Any:
            out = scan(*args, **kwargs)
            y, rest = (out[0].clone(), out[1:]) if isinstance(out, tuple) else (out.clone(), None)
            if next(calls) == 0:
                zero(y)
            return y if rest is None else (y, *rest)

        monkeypatch.setattr(module, name, zeroed)

    return patch


def _second_head(y: Tensor) -> None:
    y[:, :, 1] = 0


def _rg_lru(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = modeling_recurrent_gemma.RecurrentGemmaRglru
    run = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, *args: torch.zeros_like(run(self, *args)))


ZEROED = {
    "MambaForCausalLM": _with_function(modeling_mamba, "mamba_selective_scan", Tensor.zero_),
    "Mamba2ForCausalLM": _with_function(modeling_mamba2, "mamba2_chunk_scan", _second_head),
    "Qwen3NextForCausalLM": _with_function(
        modeling_qwen3_next, "torch_chunk_gated_delta_rule", _second_head
    ),
    "RecurrentGemmaForCausalLM": _rg_lru,
}
"""Without anything of the library's."""


@pytest.mark.parametrize("name", FAMILIES)
def test_an_ablated_head_is_one_whose_output_is_zero(name: str, float64: None) -> None:
    model = zoo.build(name)
    unit, _ = first_units(model)
    plain = model(tokens(), use_cache=False)
    with steer(model, [Ablate(unit)]):
        ablated = model(tokens(), use_cache=False)
        under_rules, R = lenslrp.run_with_relevance(model, tokens(), 5, names_filter=[])
    with pytest.MonkeyPatch.context() as monkeypatch:
        ZEROED[name](monkeypatch)
        expected = model(tokens(), use_cache=False)
    assert ablated.dtype == torch.float64
    torch.testing.assert_close(ablated, expected, rtol=0, atol=1e-12)
    assert torch.equal(under_rules, ablated)
    assert abs(R.ledger().error) < 1e-6
    assert float((ablated - plain).abs().max()) > 1e-2
    assert torch.equal(model(tokens(), use_cache=False), plain)


@pytest.mark.parametrize("name", SCANS)
def test_a_channel_is_the_same_in_values_and_output(name: str) -> None:
    """Scans leave channels apart; RG-LRU makes its gates of the values too."""
    model = zoo.build(name)
    _, channel = first_units(model)
    assert parse_unit(str(channel)) == channel
    assert parse_unit(str(first_units(model)[0])) == first_units(model)[0]

    def without(x: Tensor) -> Tensor:
        x = x.clone()
        channel.activation(x).zero_()
        return x

    with steer(model, [Ablate(channel)]):
        of_values = model(tokens(), use_cache=False)
    out = channel.hook(model).replace("hook_scan_in", "hook_scan_out")
    with edit_units(model, [Edit(out, function=without)]):
        of_output = model(tokens(), use_cache=False)
    same = float((of_values - of_output).abs().max()) < 1e-5
    assert same == (name != "RecurrentGemmaForCausalLM")
    assert channel.writes(model)["out"].shape == (1, 16)


@pytest.mark.parametrize("name", SCANS)
def test_an_edited_scan_has_its_rules_and_its_account(name: str) -> None:
    model = zoo.build(name)
    unit, channel = first_units(model)
    operations = [Ablate(unit, 2.0), Add(channel, 1.5)]
    with steer(model, operations):
        plain = model(tokens(), use_cache=False)
        logits, R = lenslrp.run_with_relevance(model, tokens(), 5, names_filter=[])
    assert torch.equal(logits, plain)
    assert abs(R.ledger().error) < 1e-5
    with lenslrp.session(model) as s:  # rules first, edits inside
        s.run_with_relevance(tokens(), 5, names_filter=[])
        with steer(model, operations):
            again, inside = s.run_with_relevance(tokens(), 5, names_filter=[])
    assert torch.equal(again, plain)
    torch.testing.assert_close(inside.tokens, R.tokens)


@pytest.mark.parametrize("name", ["MambaForCausalLM", "Mamba2ForCausalLM", "Qwen3NextForCausalLM"])
def test_generated_tokens_are_steered_from_a_cached_state_too(name: str) -> None:
    model = zoo.build(name)
    give_tokenizer(model, zoo.tokenizers()[1])
    unit, _ = first_units(model)
    prompt = text = tokens()[:1]
    length = prompt.shape[1]

    def ablate(x: Tensor) -> Tensor:
        x = x.clone()
        late = x[:, length:] if unit.index is None else x[:, length:, unit.index]
        late.zero_()
        return x

    for _ in range(4):
        with edit_units(model, [Edit(unit.hook(model), function=ablate)]):
            logits = model(text, use_cache=False)
        text = torch.cat([text, logits[:, -1:].argmax(dim=-1)], dim=1)
    options = {"max_new_tokens": 4, "do_sample": False, "verbose": False,
               "return_type": "tokens", "stop_at_eos": False}  # fmt: skip
    with steer(model, [Ablate(unit)], prompt="none"):
        assert torch.equal(model.generate(prompt, **options), text)
    assert not torch.equal(model.generate(prompt, **options), text)


def test_a_state_from_elsewhere_does_not_say_its_length() -> None:
    model = zoo.build("MambaForCausalLM")
    with torch.no_grad():
        cache = model.original_model(tokens(), use_cache=True).cache_params
        with (
            steer(model, [Ablate(RecurrentHead(0))]),
            pytest.raises(
                InputError, match="does not say how many tokens it has read: begin with the prompt"
            ),
        ):
            model.original_model(tokens()[:, :1], cache_params=cache, use_cache=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_estimates_are_exact_to_first_order(name: str) -> None:
    """Two words that are nearly the same: the model is linear between the runs."""
    model, pairs = zoo.build(name), some_pairs()
    if name == "RecurrentGemmaForCausalLM":  # coefficients are taken before the final soft-cap
        model.original_model.config.logits_soft_cap = 1e6
    embedding = model.embed.weight.data
    noise = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for clean, corrupt in ((5, 6), (7, 9), (9, 8)):
        embedding[corrupt] = embedding[clean] + 1e-5 * noise
    shared: dict[str, Any] = {"components": ["recurrent"], "by_position": True}
    with zoo.Widened():
        exact = score_nodes(model, pairs, method="exact", **shared)
        estimate = score_nodes(model, pairs, method="attribution", **shared)
    largest = max(float(value.abs().max()) for value in exact.values.values())
    assert 1e-8 < largest < 1e-3
    for hook, value in exact.values.items():
        torch.testing.assert_close(estimate.values[hook], value, rtol=0, atol=1e-3 * largest)


@pytest.mark.parametrize("name", FAMILIES)
def test_circuits_end_to_end(name: str) -> None:
    model, pairs = zoo.build(name), some_pairs()
    scores = score_nodes(model, pairs, components=["recurrent"])
    whole, half, none = (prune(scores, share) for share in (1.0, 0.5, 0.0))
    verdict = verify(model, pairs, [whole, half, none])
    assert verdict.faithfulness[0] == pytest.approx(1.0, abs=1e-9)
    assert len(half.nodes()) == len(whole.nodes()) // 2
    edges = score_edges(model, pairs, components=["tokens", "recurrent"])
    nodes = score_nodes(model, pairs, components=["tokens", "recurrent"])
    for hook, sums in edges.outgoing().items():
        torch.testing.assert_close(sums, nodes.values[hook], rtol=1e-4, atol=1e-5)
    into = score_edges(model, pairs, components=["tokens", "recurrent"], into=[TARGET])
    best = into.best(1)
    measured = score_edges(
        model, pairs, components=["tokens", "recurrent"], method="exact", only=best
    )
    assert bool(measured.score(*best[0]).isfinite().all())
    graph = attribution_graph(
        model,
        CLEAN[:1],
        targets.Logit(5),
        components=["recurrent", "channels"],
        k=12,
        node_share=1.0,
        edge_share=1.0,
    )
    assert graph.error < 1e-5
    assert {"recurrent head", "channel"} & set(graph.nodes["kind"])
    place = {node: index for index, node in enumerate(graph.nodes["id"])}
    assert all(place[e.source] < place[e.target] for e in graph.edges.itertuples())
    assert graph.to_html()


def test_heads_of_a_hybrid_are_those_of_all_layers() -> None:
    model, pairs = zoo.build("Qwen3NextForCausalLM"), some_pairs()
    linear, z = "blocks.0.linear_attn.hook_scan_out", "blocks.1.attn.hook_z"
    assert list(place_components(model, ["heads"])) == [linear, z]
    both = place_components(model, ["heads", "recurrent"])
    assert both == {linear: "recurrent", z: "heads"}
    scores = score_nodes(model, pairs, components=["heads"])
    assert scores.of("heads").shape == (3, 4)
    assert head_scores(scores)
    by_position = score_nodes(model, pairs, components=["heads"], by_position=True)
    with pytest.raises(InputError, match=f"{linear} is of a recurrent mixer, no node of Transf"):
        to_transformer_lens(by_position)
    _, R = lenslrp.run_with_relevance(model, tokens(), 5)
    table = R.heads(1)
    assert list(table.index) == ["0.linear_attn", 1]
    assert table.loc["0.linear_attn", 1] == pytest.approx(float(R[linear][1, :, 1].sum()))
    assert table.loc[1, 0] == pytest.approx(float(R[z][1, :, 0].sum()))
    for reduce in ("sum", "sum_positions"):
        _, part = lenslrp.run_with_relevance(model, tokens(), 5, reduce=reduce)
        np.testing.assert_allclose(part.heads(1), table, rtol=1e-6)
    assert R.plot("heads")
    row = torch.tensor(CLEAN[:1])
    features = heads_of(model, as_prompt(model, row, 5))
    _, one = lenslrp.run_with_relevance(model, row, 5)
    assert features.size == len(unit_relevance(one, "attn.hook_z")) == 4


def test_a_mixer_without_heads_is_one_row_and_one_node() -> None:
    model = zoo.build("MambaForCausalLM")
    _, R = lenslrp.run_with_relevance(model, tokens(), 5)
    table = R.heads()
    assert table.shape == (2, 1)
    assert list(table.index) == ["0.mixer", "1.mixer"]
    whole = float(R["blocks.1.mixer.hook_scan_out"][0].sum())
    assert table.loc["1.mixer", 0] == pytest.approx(whole)
    for reduce in ("sum", "sum_positions"):
        _, part = lenslrp.run_with_relevance(model, tokens(), 5, reduce=reduce)
        np.testing.assert_allclose(part.heads(), table, rtol=1e-6)
    assert score_nodes(model, some_pairs(), components=["heads"]).of("heads").shape == (3, 2)


def test_maps_are_where_patterns_are() -> None:
    model = zoo.build("FalconH1ForCausalLM")  # a mixer beside attention in every layer
    names = ["attn.hook_pattern", "hook_scan_map"]
    _, R = lenslrp.run_with_relevance(model, tokens(), 5, names_filter=names)
    view = attention_relevance(R, 1, row=1)
    heads = [name.partition(":")[0] for name in view.props["attentionHeadNames"]]
    assert heads == ["1.0", "1.1", *(f"1.mamba.{head}" for head in range(4))]
    shown = torch.tensor(view.props["attention"], dtype=torch.float64)
    torch.testing.assert_close(shown[2:], R["blocks.1.mamba.hook_scan_map"][1].double())
    _, alone = lenslrp.run_with_relevance(model, tokens(), 5, names_filter="hook_scan_map")
    assert len(attention_relevance(alone, 0).props["attention"]) == 4


REFUSED: list[tuple[str, Callable[[Any], Any], str]] = [
    (
        "RecurrentGemmaForCausalLM",
        lambda model: score_nodes(model, some_pairs(), components=["heads"]),
        r"the attention at blocks\.1\.temporal_block has no hook_z here, so that the heads of this "
        r"model are not all to be had; those of its mixers are at hook_scan_out \(components=\['rec"
        r"urrent'\] in circuits\)",
    ),
    (
        "RecurrentGemmaForCausalLM",
        lambda model: heads_of(model, as_prompt(model, CLEAN[:1], 5)),
        r"the attention at blocks\.1\.temporal_block has no hook_z",
    ),
    (
        "MambaForCausalLM",
        lambda model: score_nodes(model, some_pairs()),
        r"no hook point 'mlp\.hook_post' in this model, which has no 'neurons': choose from tokens,"
        r" residual, heads, recurrent, channels",
    ),
    (
        "Qwen3NextForCausalLM",
        lambda model: score_nodes(model, some_pairs()),
        r"blocks\.0\.mlp\.hook_post is another name of blocks\.0\.mlp\.hook_out here",
    ),
    (
        "Mamba2ForCausalLM",
        lambda model: RecurrentHead(0).hook(model),
        r"blocks\.0\.hook_scan_out: layer 0 has recurrent heads 0 to 3",
    ),
    (
        "Mamba2ForCausalLM",
        lambda model: Channel(0, 8, head=1).hook(model),
        "channel is 8, but layer 0 has channels 0 to 7 in a head",
    ),
    (
        "MambaForCausalLM",
        lambda model: RecurrentHead(0, 0).hook(model),
        r"blocks\.0\.hook_scan_out\[0\]: the mixer of layer 0 has no heads: RecurrentHead\(0\)",
    ),
    (
        "Qwen3NextForCausalLM",
        lambda model: RecurrentHead(1, 0).hook(model),
        r"blocks\.1\.hook_scan_out\[0\]: this block has no recurrent mixer",
    ),
    (
        "Qwen3NextForCausalLM",
        lambda model: Head(0, 0).hook(model),
        "this block has no attention heads",
    ),
    (
        "Mamba2ForCausalLM",
        lambda model: writes(model, RecurrentHead(0, 0)),
        "writes no fixed vectors: its channels are scaled one by one",
    ),
    (
        "MambaForCausalLM",
        lambda model: reads(model, Channel(0, 0)),
        "no single vector is what it reads",
    ),
]


@pytest.mark.parametrize(("name", "call", "message"), REFUSED)
def test_what_cannot_be_had_is_refused_by_name(
    name: str, call: Callable[[Any], Any], message: str
) -> None:
    model = zoo.build(name)
    with pytest.raises(InputError, match=message):
        call(model)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("MambaForCausalLM", "hook_scan_in"),
        ("Mamba2ForCausalLM", "hook_scan_out"),
        ("Qwen3NextForCausalLM", "hook_scan_out"),
        ("RecurrentGemmaForCausalLM", "hook_scan_in"),
    ],
)
def test_a_dictionary_of_recurrent_units(name: str, site: str, tmp_path: Path) -> None:
    model = zoo.build(name)
    give_tokenizer(model, zoo.tokenizers()[1])
    words = ["the", "cat", "sat"]
    texts = [" ".join(words[(i * j + i) % 3] for j in range(6 + i % 4)) for i in range(8)]
    d = NeuronDictionary.build(
        model, texts, tmp_path / "d", sites=[site], k=3, sample=4, context=16, batch_size=4,
        progress=False,
    )  # fmt: skip
    (place, *_) = d.plan.places
    assert place.kind == ("head" if site == "hook_scan_out" else "channel")
    page = d[place.name(1)]
    assert page.unit.hook(model) == place.hook
    assert page._repr_html_()
    row = page.examples("relmax").iloc[0]
    ids = model.to_tokens(texts[int(row.source)])
    target = targets.Logit(int(ids[0, row.target_position + 1]), int(row.target_position))
    _, R = lenslrp.run_with_relevance(model, ids, target, names_filter=[place.hook])
    found = R[place.hook][0, int(row.position)]
    relevance = found[1].sum() if found.ndim == 2 else found[1]
    assert row.score == pytest.approx(float(relevance), rel=1e-4)
    assert len(set(page.examples("relmax")["doc"])) == 3  # no document twice
    d.close()
    wrong = {"hook_scan_in": "hook_scan_out", "hook_scan_out": "hook_scan_in"}[site]
    with pytest.raises(InputError, match=rf"{wrong} has (no )?heads; search"):
        NeuronDictionary.build(model, texts, tmp_path / "e", sites=[wrong], progress=False)
