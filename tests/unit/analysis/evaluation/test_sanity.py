"""Randomised layers and irrelevant changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lenslrp.analysis.common.statistics import spearman
from lenslrp.analysis.evaluation.sanity import randomisation, sensitivity, shuffled
from lenslrp.errors import InputError
from tests.unit.tiny import TOKENS, changes, own_relevance, snapshot, tiny


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_a_shuffle_keeps_the_values_of_each_weight_and_is_undone() -> None:
    model = tiny()
    before, old = snapshot(model), weights(model)
    block = list(model.blocks[1].parameters())
    kept = [p.detach().clone() for p in block]
    inside: list[torch.Tensor] = []

    def look() -> None:
        with shuffled([(1, model.blocks[1])], seed=0):
            inside.extend(p.detach().clone() for p in block)
            raise KeyError

    with pytest.raises(KeyError):
        look()
    for weight, value in zip(inside, kept, strict=True):
        assert not torch.equal(weight, value)
        assert torch.equal(weight.flatten().sort().values, value.flatten().sort().values)
    assert all(torch.equal(a, b) for a, b in zip(old, weights(model), strict=True))
    ours = [key for key in changes(before, model) if not key.endswith(": version")]
    assert not ours


@pytest.mark.parametrize("mode", ["cascading", "independent"])
def test_layers_are_randomised_from_the_last_one_down(mode: str) -> None:
    model = tiny("native", n_layers=3)
    original = own_relevance(model)
    blocks = list(model.blocks)
    found = randomisation(model, lambda: own_relevance(model), mode=mode, seed=4)
    assert found["layer"].tolist() == [2, 1, 0]
    for row in found.itertuples():
        gone = range(row.layer, 3) if mode == "cascading" else [row.layer]
        with shuffled([(k, blocks[k]) for k in gone], seed=4):
            now = own_relevance(model)
        a, b = original.ravel().numpy(), now.ravel().numpy()
        assert row.spearman == spearman(a, b)
        assert row.spearman_abs == spearman(np.abs(a), np.abs(b))
    assert torch.equal(own_relevance(model), original)


def test_a_cascade_randomises_the_layers_that_nobody_looks_at_too() -> None:
    model = tiny("native", n_layers=3)
    every = randomisation(model, lambda: own_relevance(model))
    some = randomisation(model, lambda: own_relevance(model), layers=[2, 0])
    assert some.to_dict("records") == every[every["layer"] != 1].to_dict("records")


def test_several_relevances_share_what_is_randomised() -> None:
    model = tiny("native", n_layers=3)
    found = randomisation(model, lambda: {"own": own_relevance(model), "input": TOKENS.double()})
    own = found[found["name"] == "own"].drop(columns="name")
    alone = randomisation(model, lambda: own_relevance(model))
    assert own.to_dict("records") == alone.to_dict("records")
    rest = found[found["name"] == "input"]
    assert rest["layer"].tolist() == [2, 1, 0]
    assert rest["spearman"].tolist() == pytest.approx([1, 1, 1])


def test_a_map_of_the_input_alone_survives_randomisation() -> None:
    model = tiny()
    found = randomisation(model, lambda: TOKENS.double(), layers=[1])
    assert found["layer"].tolist() == [1]
    assert found["spearman"].tolist() == [pytest.approx(1)]


def test_randomisation_names_bad_options() -> None:
    model = tiny()
    with pytest.raises(InputError, match="'cascading' or 'independent', not 'all'"):
        randomisation(model, lambda: 0, mode="all")
    with pytest.raises(InputError, match="layers 0 to 1"):
        randomisation(model, lambda: 0, layers=[2])


TEXTS = {
    "before": ([1, 2, 3, 4, 9], [1.0, -2.0, 5.0, 2.0, 3.0], 7.0),
    "after": ([1, 2, 8, 8, 8, 9], [1.0, -1.0, 9.0, 9.0, 9.0, 4.0], 6.5),
    "other": ([7, 7], [1.0, 1.0], 0.0),
}


def test_sensitivity_compares_the_tokens_that_both_texts_have() -> None:
    found = sensitivity(TEXTS.__getitem__, "before", "after")
    assert found.shared == 3  # 1, 2 and 9
    assert found.change == pytest.approx(2 / 6)
    assert found.inside == pytest.approx(7 / 13)
    assert found.spearman == pytest.approx(1)
    assert found.target_change == -0.5


def test_sensitivity_names_texts_that_do_not_compare() -> None:
    with pytest.raises(InputError, match="nothing was changed"):
        sensitivity(TEXTS.__getitem__, "before", "before")
    with pytest.raises(InputError, match="no token in common"):
        sensitivity(TEXTS.__getitem__, "before", "other")
