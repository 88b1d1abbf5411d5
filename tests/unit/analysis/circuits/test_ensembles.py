"""Ensembles of scores, written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lenslrp import InputError
from lenslrp.analysis.circuits.edges import score_edges
from lenslrp.analysis.circuits.ensembles import ensemble
from lenslrp.analysis.circuits.scores import score_nodes
from tests.unit.analysis.circuits.test_circuits import some_pairs
from tests.unit.tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore:the model does not do the task:UserWarning")


@pytest.mark.parametrize("by_position", [False, True])
def test_each_score_counts_by_its_size_over_nodes(by_position: bool) -> None:
    model, pairs = tiny("gpt2"), some_pairs()
    two = [
        score_nodes(model, pairs, method=method, components=["heads", "mlp"],
                    by_position=by_position)
        for method in ("relevance", "exact")
    ]  # fmt: skip
    made = ensemble([two[0], replace(two[1], values={k: 7 * v for k, v in two[1].values.items()})])
    tables = [each.to_dataframe()["score"].to_numpy() for each in two]
    expected = sum(table / (table**2).mean() ** 0.5 for table in tables) / 2
    torch.testing.assert_close(
        torch.tensor(made.to_dataframe()["score"].to_numpy()), torch.tensor(expected)
    )
    assert made.method == "ensemble of relevance, exact"
    assert made.passes.forward == sum(each.passes.forward for each in two)


def test_edges_have_ensembles_too() -> None:
    model, pairs = tiny("llama"), some_pairs()
    two = [score_edges(model, pairs, method=method, components=["heads"])
           for method in ("relevance", "attribution")]  # fmt: skip
    made = ensemble(two)
    sizes = [
        torch.cat([v.mean(dim=0).flatten() for v in each.values.values()]).square().mean().sqrt()
        for each in two
    ]
    for hook, value in made.values.items():
        written = sum(e.values[hook] / s for e, s in zip(two, sizes, strict=True)) / 2
        torch.testing.assert_close(value, written)
    assert len(made.top(3)) == 3


def test_what_is_not_of_the_same_things_is_refused() -> None:
    model, pairs = tiny("gpt2"), some_pairs()
    heads = score_nodes(model, pairs, components=["heads"])
    others = {
        "direction": score_nodes(model, pairs, components=["heads"], direction="noising"),
        "metric": score_nodes(model, pairs, components=["heads"], metric="log_prob"),
        "pairs": score_nodes(model, pairs[:2], components=["heads"]),
        "nodes": score_nodes(model, pairs, components=["heads", "mlp"]),
        "kind": score_edges(model, pairs, components=["heads"]),
    }
    for what, other in others.items():
        with pytest.raises(InputError, match=f"scores of the same {what}$"):
            ensemble([heads, other])
    with pytest.raises(InputError, match="of two or more scores, not 1"):
        ensemble([heads])
    nothing = replace(heads, values={k: torch.zeros_like(v) for k, v in heads.values.items()})
    with pytest.raises(InputError, match="all scores of 'relevance' are 0"):
        ensemble([heads, nothing])
