"""Greedy selection: against a plain search by `verify`, and a circuit known by construction."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from lenslrp import InputError
from lenslrp.analysis.circuits.greedy import greedy_circuit
from lenslrp.analysis.circuits.masks import OBJECTIVES, learn_masks
from lenslrp.analysis.circuits.nodes import Node
from lenslrp.analysis.circuits.pairs import Pairs
from lenslrp.analysis.circuits.pruning import Circuit, prune, verify
from lenslrp.analysis.circuits.scores import score_nodes
from tests.unit.analysis.circuits.test_circuits import some_pairs
from tests.unit.analysis.circuits.test_masks import ONE_HEAD, misled, one_head
from tests.unit.tiny import changes, snapshot, tiny

pytestmark = pytest.mark.filterwarnings("ignore:the model does not do the task:UserWarning")


def raised(model: TransformerBridge) -> Pairs:
    """Pairs whose answers are what the clean prompt raises most, by any metric."""
    pairs = some_pairs()
    rows, last = torch.arange(len(pairs)), pairs.mask.sum(dim=1) - 1
    clean, corrupt = (
        model(tokens, attention_mask=pairs.mask.long())[rows, last].log_softmax(dim=-1)
        for tokens in (pairs.clean, pairs.corrupt)
    )
    more = (clean - corrupt).detach()
    return replace(pairs, answers=more.argmax(dim=-1), rivals=more.argmin(dim=-1))


@pytest.mark.parametrize(("start", "steps"), [(0, 1), (6, 5), (None, 1)])
def test_the_only_head_that_matters_is_found(start: int | None, steps: int) -> None:
    model, pairs = one_head()
    before = snapshot(model)
    found = greedy_circuit(model, pairs, misled(model, pairs), 1, start=start, pool=6)
    layer, head = ONE_HEAD
    alone = [str(node) for node in found.circuit.nodes()] == [f"blocks.{layer}.attn.hook_z[{head}]"]
    assert alone == (start is not None)  # the two that are ranked best do not have it
    if alone:
        assert found.table["faithfulness"].iloc[-1] == pytest.approx(1.0)
    assert len(found.table) == steps + 1 and found.table["node"].iloc[0] == ""
    assert not changes(before, model)


@pytest.mark.parametrize("objective", ["cmd", "cpr"])
@pytest.mark.parametrize(
    ("start", "ablation"), [(0, "corrupt"), (7, "corrupt"), (2, "mean"), (7, "mean")]
)
def test_each_step_is_the_best_of_those_tried(start: int, ablation: str, objective: str) -> None:
    """A plain loop: every candidate by a run of all blocks."""
    model = tiny("gpt2")
    pairs = raised(model)
    metric = "log_prob"
    if ablation == "mean":  # means leave more than the prompt does: the other way round
        metric, pairs = (
            "logit_difference",
            replace(pairs, answers=pairs.rivals, rivals=pairs.answers),
        )
    scores = score_nodes(model, pairs, components=["heads", "mlp"], metric=metric)
    options: dict[str, Any] = {"ablation": ablation, "metric": metric}
    found = greedy_circuit(
        model, pairs, scores, 4, start=min(start, 6), pool=3, objective=objective,
        ablation=ablation, chunk=2,
    )  # fmt: skip
    flat = scores.to_dataframe().sort_values("score", ascending=False, kind="stable")
    ranked = [Node(row.hook, row.unit) for row in flat.itertuples()]
    circuit = prune(scores, nodes=min(start, 6))
    for row in found.table.iloc[1:].itertuples():
        goes = start > 4
        inside = [node for node in ranked if bool(circuit.keep[node.hook][node.unit]) == goes]
        tried = inside[::-1][:3] if goes else inside[:3]
        others: list[Circuit] = []
        for node in tried:
            keep = {hook: mask.clone() for hook, mask in circuit.keep.items()}
            keep[node.hook][node.unit] = not goes
            others.append(replace(circuit, keep=keep))
        verdict = verify(model, pairs, others, **options)
        total = (verdict.clean - verdict.floor).mean()
        kept = (verdict.gaps - verdict.floor) / total
        losses = [float(OBJECTIVES[objective](each)) for each in kept]
        best = losses.index(min(losses))
        assert row.node == str(tried[best])
        assert row.loss == pytest.approx(losses[best], abs=1e-9)
        assert row.faithfulness == pytest.approx(verdict.faithfulness[best], abs=1e-9)
        circuit = others[best]
    assert all(torch.equal(found.circuit.keep[hook], circuit.keep[hook]) for hook in circuit.keep)
    steps = len(found.table) - 1
    assert steps == abs(min(start, 6) - 4)
    assert found.passes.forward == len(pairs) * (steps * (3 + 1) + 1)
    assert "forward passes of a pair" in found._repr_html_()


def test_what_is_measured_is_what_scores_were_found_by() -> None:
    model = tiny("gpt2")
    pairs = raised(model)
    scores = score_nodes(model, pairs, components=["heads"], metric="log_prob")
    half = prune(scores, 0.5)
    assert half.metric == half.complement().metric == half.without(half.nodes()[0]).metric
    assert half.metric == "log_prob" == verify(model, pairs, [half]).metric
    assert verify(model, pairs, [half], metric="margin").metric == "margin"
    assert learn_masks(model, pairs, init=scores, steps=1, shares=(0.5,)).metric == "log_prob"
    assert greedy_circuit(model, pairs, scores, 2).circuit.metric == "log_prob"
    other = replace(half, metric="logit_difference")
    with pytest.raises(InputError, match="found by log_prob and logit_difference: say which"):
        verify(model, pairs, [half, other])
    own = replace(scores, metric="own")
    with pytest.raises(InputError, match="found by own: say which metric to measure, metric="):
        greedy_circuit(model, pairs, own, 2)


def test_what_does_not_go_is_refused() -> None:
    model = tiny("gpt2")
    pairs = raised(model)
    scores = score_nodes(model, pairs, components=["heads"])
    search = partial(greedy_circuit, model, pairs, scores)
    for given, message in (
        ({"nodes": 5}, "nodes must be from 0 to 4, not 5"),
        ({"nodes": 2, "start": 9}, "start must be from 0 to 4, not 9"),
        ({"nodes": 2, "pool": 0}, "pool and chunk must be at least 1, not 0"),
        ({"nodes": 2, "objective": "best"}, "objective must be one of cmd, cpr, not 'best'"),
        ({"nodes": 1, "start": 4, "max_passes": 20},
         "from 4 nodes to 1 with 8 candidates a step takes 28 forward passes of each pair, more "
         "than max_passes, 20: start nearer to 1"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            search(**given)
    swapped = replace(pairs, clean=pairs.corrupt, corrupt=pairs.clean)
    with pytest.raises(InputError, match="there is nothing for masks to keep"):
        greedy_circuit(model, swapped, scores, 2)
