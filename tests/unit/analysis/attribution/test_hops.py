"""Hops are the powers of the generation's matrix, each with an account that goes on in the next."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lenslrp
from lenslrp.analysis import check_hops, explain_hops
from lenslrp.analysis.attribution.hops import Hops
from lenslrp.errors import InputError
from tests.unit.core.test_generation import PROMPT, translator
from tests.unit.tiny import tiny, word_tokenizer

TEXT = [11, 2, 9, 14, 5]


def by_hand(G: lenslrp.Generation, weights: torch.Tensor, hops: int) -> torch.Tensor:
    """Hops from the rows of the matrix, with no pass of their own."""
    found = []
    for _ in range(hops):
        found.append(weights @ G.relevance)
        weights = found[-1][G.start :] / G.values
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "t5", "bart"])
@pytest.mark.parametrize("composite", [lenslrp.AttnLRP(), lenslrp.CPLRP()], ids=["attn", "cp"])
def test_a_hop_shares_out_what_is_at_written_tokens(
    kind: str, composite: lenslrp.Composite
) -> None:
    model = translator(kind) if kind in ("t5", "bart") else tiny(kind)
    options = {"text": TEXT, "composite": composite, "of": "mean"}
    H = explain_hops(model, PROMPT, (3, 5), until=0.0, **options)
    G = lenslrp.explain_generation(model, PROMPT, **options)
    assert len(H.hops) == 5  # the first token was written after the prompt alone
    weights = torch.tensor([0, 0, 0, 1, 1.0], dtype=torch.float64)
    expected = by_hand(G, weights, 5)
    scale = float(expected.abs().max())
    near = 1e-6 if kind in ("llama", "gemma2") else 1e-10  # whose norms are in float32 always
    torch.testing.assert_close(H.relevance / scale, expected / scale, rtol=0, atol=near)
    assert not H.relevance[-1, H.start :].any() and H.left == 0


def test_the_account_goes_from_hop_to_hop() -> None:
    H = explain_hops(tiny("gpt2"), PROMPT, (4, 5), text=TEXT, of="mean", until=0.0)
    table = H.table()
    parts = table[["prompt", "written", "positions", "absorbed"]].sum(axis=1)
    np.testing.assert_allclose(parts, table["started"], rtol=1e-9)
    np.testing.assert_allclose(table["started"][1:], table["written"][:-1], rtol=1e-9)
    value = table[["prompt", "positions", "absorbed"]].to_numpy().sum() + H.left
    assert value == pytest.approx(table["started"].iloc[0], rel=1e-8)
    assert (table["error"].abs() < 1e-9).all() and table["positions"].abs().min() > 0
    np.testing.assert_allclose([hop.carried.sum() for hop in H.hops], table["started"])


def test_cp_lrp_without_biases_loses_nothing_on_the_way() -> None:
    """Patterns are constants and Llama has no biases: the prompt gets all that there was."""
    options = {"text": TEXT, "of": "mean", "until": 0.0, "composite": lenslrp.CPLRP()}
    H = explain_hops(tiny(), PROMPT, (4, 5), **options)
    whole = float(H.hops[0].carried.sum())
    assert float(H.prompt.sum()) == pytest.approx(whole, rel=1e-3)  # but for stabilisers of norms


def test_heads_are_those_of_a_single_run() -> None:
    model = tiny()
    H = explain_hops(model, PROMPT, text=TEXT, max_hops=1)
    read = torch.tensor([[*PROMPT, *TEXT[:-1]]])
    _, R = lenslrp.run_with_relevance(model, read, TEXT[-1], names_filter="attn.hook_z")
    layer, head = R.heads().abs().stack().idxmax()
    best = H.heads(1).iloc[0]
    assert best["head"] == f"blocks.{layer}.attn.hook_z[{head}]" and best["hop"] == 1
    assert best["relevance"] == pytest.approx(R.heads().loc[layer, head])


def test_it_stops_where_little_is_left() -> None:
    model = tiny()
    H = explain_hops(model, PROMPT, text=TEXT, until=1e9)
    assert len(H.hops) == 1 and H.span == (4, 5) and H.left != 0
    assert len(explain_hops(model, PROMPT, text=TEXT, max_hops=2, until=0.0).hops) == 2


def traced() -> Hops:
    return explain_hops(tiny(tokenizer=word_tokenizer()), "b c a", "e", text="d b e")


def test_tables_and_pictures_say_the_same() -> None:
    H = traced()
    assert repr(H).startswith("Hops(") and "'e' to 4 tokens, AttnLRP" in repr(H).replace(
        "' e", "'e"
    )
    best = H.top(1).iloc[0]
    assert best["relevance"] == pytest.approx(float(H.prompt[best["position"]]))
    assert abs(best["relevance"]) == pytest.approx(float(H.prompt.abs().max()))
    frame = H.to_dataframe()
    assert frame["relevance"].sum() == pytest.approx(float(H.relevance.sum()))
    html = H._repr_html_()
    assert "prompt, all hops" in html and f"{float(H.prompt[1]):+.4g}" in html


def test_the_check_takes_the_traced_tokens_away() -> None:
    model = tiny(tokenizer=word_tokenizer())
    H = explain_hops(model, "b c a d e", text="d b e")
    table = check_hops(model, H, k=1, draws=4)
    assert table.index.tolist() == [
        "nothing", "traced tokens", "other tokens", "top head", "other heads"
    ]  # fmt: skip
    ids = torch.tensor([H.writing.ids])
    log_probs = model(ids)[0].detach().log_softmax(-1)
    rows = [float(log_probs[H.start - 1 + i, t]) for i, t in enumerate(H.writing.written)]
    assert table.loc["nothing", "answer"] == pytest.approx(np.exp(rows[-1]))
    assert table.loc["nothing", "written"] == pytest.approx(np.exp(sum(rows)))
    place = 1 + int(H.prompt[1:].argmax())
    hook = ("hook_embed", lambda x, hook: x.index_fill(1, torch.tensor([place]), 0.0))
    with model.hooks(fwd_hooks=[hook]):
        without = model(ids)[0].detach().log_softmax(-1)[-2, H.writing.written[-1]]
    assert table.loc["traced tokens", "answer"] == pytest.approx(float(without.exp()))
    with pytest.raises(InputError, match="k is from 1 to 2, and draws from 1"):
        check_hops(model, H, k=3)


def test_a_target_near_zero_shares_nothing_out() -> None:
    model = tiny()
    H = explain_hops(model, PROMPT, text=TEXT, max_hops=1)
    with torch.no_grad():
        embedding = model.original_model.get_output_embeddings().weight
        embedding[TEXT[0]] *= 1e-6
    assert bool(H.relevance[0, 4])
    with pytest.raises(InputError, match="too near 0 for relevance to be shared out by it"):
        explain_hops(model, PROMPT, text=TEXT, until=0.0)


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="max_hops is a number of backward passes from 1, not 0"):
        explain_hops(tiny(), PROMPT, text=TEXT, max_hops=0)
    with pytest.raises(InputError, match="^k must be at least 1, not 0$"):
        traced().top(0)
    with pytest.raises(InputError, match="^k must be at least 1, not 0$"):
        traced().heads(0)
