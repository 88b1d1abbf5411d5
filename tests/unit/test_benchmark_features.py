"""Transcoders that a tutorial trains, and the choice of features that a benchmark switches off."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from benchmarks.faithfulness.feature_ablation import SWITCHED_OFF, chosen
from tutorials.train_transcoders import explained, train


def test_training_finds_the_directions_that_the_outputs_are_sums_of() -> None:
    torch.manual_seed(0)
    true, width, active = 24, 32, 2
    reads, writes = torch.linalg.qr(torch.randn(2, width, width)).Q[:, :true]
    at = torch.rand(4000, true).topk(active, dim=1).indices
    amounts = torch.zeros(4000, true).scatter(1, at, 1 + torch.rand(4000, active))
    x, y = 3 * amounts @ reads + 5, 7 * amounts @ writes - 2
    coder = train("in", "out", x[:3600], y[:3600], features=48, active=active, passes=100)
    assert explained(coder, x[3600:], y[3600:]) > 0.9
    assert (coder.hook, coder.hook_out, coder.k) == ("in", "out", None)
    torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(48))
    used = (coder.encode(x[3600:]) > 0).any(dim=0)
    alike = (coder.W_dec[used] @ writes.T).max(dim=0).values
    assert float(alike.min()) > 0.9


def test_explained_is_0_for_the_mean_and_1_for_what_is_exact() -> None:
    x = torch.randn(50, 4, dtype=torch.float64)
    mean = SimpleNamespace(reconstruct=lambda x: x.mean(dim=0).expand_as(x))
    exact = SimpleNamespace(reconstruct=lambda x: x)
    assert explained(cast(Any, mean), x, x) == pytest.approx(0.0)
    assert explained(cast(Any, exact), x, x) == 1.0


def test_places_are_the_largest_scores_of_active_features_behind_the_first_position() -> None:
    torch.manual_seed(0)
    activations = [torch.relu(torch.randn(1, 5, 30)) for _ in range(3)]
    scores = [torch.randn(5, 30) for _ in range(3)]
    found = [SimpleNamespace(activations=each) for each in activations]
    coders = [0, 2]
    expected = sorted(
        (-float(scores[i][position, feature]), i, position, feature)
        for i in coders
        for position in range(1, 5)
        for feature in range(30)
        if activations[i][0, position, feature] > 0
    )[:SWITCHED_OFF]
    assert chosen(cast(Any, found), coders, scores) == [(i, p, f) for _, i, p, f in expected]
