"""Circuits cut to size: what is kept, and what ablating the rest does, against plain loops."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslrp import InputError
from lenslrp.analysis.circuits.ablation import mean_activations
from lenslrp.analysis.circuits.curves import faithfulness_curve
from lenslrp.analysis.circuits.figures import faithfulness_curves, head_scores
from lenslrp.analysis.circuits.nodes import Node
from lenslrp.analysis.circuits.pairs import Pairs
from lenslrp.analysis.circuits.pruning import (
    Circuit,
    completeness,
    minimality,
    prune,
    verify,
)
from lenslrp.analysis.circuits.scores import NodeScores, score_nodes
from tests.unit.analysis.circuits.test_circuits import LENGTHS, gap, some_pairs
from tests.unit.tiny import changes, snapshot, tiny

pytestmark = pytest.mark.filterwarnings("ignore:the model does not do the task:UserWarning")

Z, POST = "blocks.0.attn.hook_z", "blocks.1.mlp.hook_post"


def scored() -> tuple[TransformerBridge, Pairs, NodeScores]:
    model, pairs = tiny("llama"), some_pairs()
    return model, pairs, score_nodes(model, pairs)


def looped(
    model: TransformerBridge, pairs: Pairs, circuit: Circuit, means: dict[str, Tensor] | None = None
) -> list[float]:
    """Gaps of the clean prompts, row by row, with everything outside the circuit replaced."""
    found = []
    for row, length in enumerate(LENGTHS.tolist()):
        with torch.no_grad():
            _, cache = model.run_with_cache(pairs.corrupt[row : row + 1, :length])

        def put(x: Tensor, hook: Any, name: str, cache: Any = cache) -> Tensor:
            y = x.clone()
            for unit in (~circuit.keep[name]).nonzero()[:, 0].tolist():
                y[:, :, unit] = cache[name][:, :, unit] if means is None else means[name][unit]
            return y

        hooks = [(name, partial(put, name=name)) for name in circuit.keep]
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            found.append(float(gap(model, pairs, row, pairs.clean)))
    return found


def test_the_best_of_each_class_are_kept() -> None:
    _, _, scores = scored()
    circuit = prune(scores, {"heads": 0.5, "neurons": 0.25})
    assert circuit.sizes() == {"heads": (2, 4), "neurons": (12, 48)}
    mean = scores.of("neurons").mean(dim=0)
    kept = torch.cat([k for h, k in circuit.keep.items() if circuit.components[h] == "neurons"])
    assert mean[kept].min() >= mean[~kept].max()
    sized = prune(scores, 0.25, by="size")
    kept = torch.cat([k for h, k in sized.keep.items() if sized.components[h] == "neurons"])
    assert mean[kept].abs().min() >= mean[~kept].abs().max()
    drawn = prune(scores, 0.25, by="random")
    assert drawn.sizes() == sized.sizes()
    assert drawn.nodes() == prune(scores, 0.25, by="random").nodes() != sized.nodes()
    assert drawn.nodes() != prune(scores, 0.25, by="random", seed=1).nodes()
    assert len(circuit.nodes()) == 14
    assert all(circuit.keep[node.hook][node.unit] for node in circuit.nodes())


def test_a_number_of_nodes_and_components_alone() -> None:
    _, _, scores = scored()
    means = {
        (hook, unit): float(value)
        for hook in scores.components
        for unit, value in enumerate(scores.values[hook].mean(dim=0))
    }
    best = sorted(means, key=lambda node: -means[node])[:9]
    circuit = prune(scores, nodes=9)
    assert {(node.hook, node.unit) for node in circuit.nodes()} == set(best)
    largest = sorted(means, key=lambda node: -abs(means[node]))[:9]
    sized = prune(scores, nodes=9, by="size")
    assert {(node.hook, node.unit) for node in sized.nodes()} == set(largest)
    assert prune(scores, nodes={"heads": 1, "neurons": 5}).sizes() == {
        "heads": (1, 4), "neurons": (5, 48)
    }  # fmt: skip
    alone = prune(scores, nodes=3, components=["heads"])
    assert alone.sizes() == {"heads": (3, 4)}
    assert set(alone.components) == {hook for hook, n in scores.components.items() if n == "heads"}
    for hook, keep in alone.keep.items():
        assert torch.equal(keep, prune(scores, {"heads": 0.75, "neurons": 0.0}).keep[hook])
    assert len(prune(scores, nodes=7, by="random", seed=3).nodes()) == 7
    assert prune(scores, 0.25, components=["neurons"]).sizes() == {"neurons": (12, 48)}
    assert prune(scores, nodes=0).nodes() == [] and len(prune(scores, nodes=52).nodes()) == 52


def test_a_node_whose_corruption_costs_the_answer_is_good() -> None:
    """Of scores of either direction, what does most for the clean run is kept."""
    model, pairs, scores = scored()
    noising = score_nodes(model, pairs, direction="noising")
    mean = noising.of("heads").mean(dim=0)
    circuit = prune(noising, 0.25)
    kept = torch.cat([k for h, k in circuit.keep.items() if circuit.components[h] == "heads"])
    assert kept.nonzero()[:, 0].tolist() == [int(mean.argmin())]
    backwards = replace(
        scores, direction="noising", values={h: -v for h, v in scores.values.items()}
    )
    assert prune(backwards, 0.25).nodes() == prune(scores, 0.25).nodes()
    assert prune(backwards, 0.25, by="size").nodes() == prune(scores, 0.25, by="size").nodes()


def test_everything_else_is_set_to_the_corrupt_run() -> None:
    model, pairs, scores = scored()
    circuits = [prune(scores, share) for share in (0.0, 0.5, 1.0)]
    before = snapshot(model)
    verdict = verify(model, pairs, circuits, chunk=2)
    assert changes(before, model) == []
    for found, circuit in zip(verdict.gaps, circuits, strict=True):
        assert found.tolist() == pytest.approx(looped(model, pairs, circuit), abs=1e-9)
    clean = [float(gap(model, pairs, row, pairs.clean)) for row in range(3)]
    corrupt = [float(gap(model, pairs, row, pairs.corrupt)) for row in range(3)]
    assert verdict.clean.tolist() == pytest.approx(clean, abs=1e-9)
    assert verdict.floor.tolist() == pytest.approx(corrupt, abs=1e-9)
    assert verdict.faithfulness[2] == pytest.approx(1.0)
    share = (np.mean(looped(model, pairs, circuits[1])) - np.mean(corrupt)) / (
        np.mean(clean) - np.mean(corrupt)
    )
    mean, low, high = verdict.interval(1)
    assert mean == pytest.approx(share) == verdict.faithfulness[1]
    assert low <= mean <= high


def test_everything_else_is_set_to_its_mean() -> None:
    model, pairs, scores = scored()
    means = mean_activations(model, pairs, scores.components, chunk=2)
    rows = [
        model.run_with_cache(side[row : row + 1, :length])[1]
        for row, length in enumerate(LENGTHS.tolist())
        for side in (pairs.clean, pairs.corrupt)
    ]
    for hook in (Z, POST):
        expected = torch.cat([cache[hook][0] for cache in rows]).mean(dim=0)
        assert torch.allclose(means[hook].reshape(expected.shape), expected, atol=1e-12)
    half, none = prune(scores, 0.5), prune(scores, 0.0)
    verdict = verify(model, pairs, [half], ablation="mean", chunk=2)
    plain = {hook: x.squeeze(-1) if x.shape[-1] == 1 else x for hook, x in means.items()}
    assert verdict.gaps[0].tolist() == pytest.approx(looped(model, pairs, half, plain), abs=1e-9)
    assert verdict.floor.tolist() == pytest.approx(looped(model, pairs, none, plain), abs=1e-9)
    other = verify(model, pairs, [half], ablation="mean", reference=pairs[:1])
    assert not torch.allclose(other.gaps, verdict.gaps)


def test_completeness_and_minimality() -> None:
    model, pairs, scores = scored()
    circuit = prune(scores, 0.5)
    rest = verify(model, pairs, [circuit.complement()]).faithfulness[0]
    assert completeness(model, pairs, circuit) == pytest.approx(1 - rest)
    table = minimality(model, pairs, circuit)
    assert table["loss"].is_monotonic_decreasing
    assert len(table) == 2
    node = next(n for n in circuit.nodes() if str(n) == table["node"][0])
    less = verify(model, pairs, [circuit, circuit.without(node)]).faithfulness
    assert table["loss"][0] == pytest.approx(less[0] - less[1])


def test_the_curve_and_its_areas() -> None:
    model, pairs, scores = scored()
    curve = faithfulness_curve(model, pairs, scores, shares=(0.0, 0.5, 1.0))
    f = curve.table["faithfulness"]
    assert f[2] == pytest.approx(1)
    assert curve.table["nodes"].tolist() == [0, 26, 52]
    assert curve.cpr == pytest.approx((f[0] + 2 * f[1] + f[2]) / 4)
    off = (1 - f).abs()
    assert curve.cmd == pytest.approx((off[0] + 2 * off[1] + off[2]) / 4)


def test_bad_choices() -> None:
    model, pairs, scores = scored()
    placed = score_nodes(model, pairs, components=["heads"], by_position=True)
    partly = score_nodes(model, pairs, method="exact", components=["heads"], only=[Node(Z, 0)])
    cases: list[tuple[Any, str]] = [
        (lambda: prune(placed, 0.5), "a circuit is of nodes at all positions"),
        (lambda: prune(partly, 0.5), "not all heads were scored"),
        (lambda: prune(scores, 1.5), "share must be from 0 to 1 for each of heads, neurons"),
        (lambda: prune(scores, {"heads": 0.5}), "share must be from 0 to 1"),
        (lambda: prune(scores), "give a share of the nodes or a number of nodes"),
        (lambda: prune(scores, 0.5, nodes=3), "give a share of the nodes or a number of nodes"),
        (lambda: prune(scores, nodes=53), "nodes must be from 0 to 52 of all, not 53"),
        (lambda: prune(scores, nodes=-1), "nodes must be from 0 to 52 of all, not -1"),
        (
            lambda: prune(scores, nodes={"heads": 5, "neurons": 1}),
            "nodes must be from 0 to 4 of heads, 48 of neurons, not {'heads': 5, 'neurons': 1}",
        ),
        (
            lambda: prune(scores, nodes={"heads": 1}),
            "nodes must be from 0 to 4 of heads, 48 of neurons, not {'heads': 1}",
        ),
        (lambda: prune(scores, 0.5, components=["mlp"]), "no scores of 'mlp'"),
        (
            lambda: prune(scores, nodes=3, components=[]),
            "a circuit is of one component class or more; no components were given",
        ),
        (lambda: prune(scores, 0.5, by="best"), "by must be 'score', 'size' or 'random'"),
        (lambda: verify(model, pairs, []), "give one or more circuits"),
        (
            lambda: verify(model, pairs, [prune(scores, 0.5)], reference=pairs),
            "it goes with ablation='mean'",
        ),
        (
            lambda: verify(model, pairs, [prune(scores, 0.5)], ablation="zero"),
            "ablation must be 'corrupt' or 'mean'",
        ),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()


def test_figures_show_the_scores_and_the_curves() -> None:
    model, pairs = tiny("llama"), some_pairs()
    for by_position in (False, True):
        scores = score_nodes(model, pairs, components=["heads"], by_position=by_position)
        drawn = head_scores(scores).axes[0]
        shown = torch.as_tensor(drawn.images[0].get_array())
        summed = [v.sum(1) if by_position else v for v in scores.values.values()]
        assert torch.allclose(shown, torch.stack([v.mean(dim=0) for v in summed]))
        assert [text.get_text() for text in drawn.get_yticklabels()] == ["0", "1"]
    _, _, scores = scored()
    curve = faithfulness_curve(model, pairs, scores, shares=(0.0, 0.5, 1.0))
    axes = faithfulness_curves({"RelP": curve}).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [
        [share, value]
        for share, value in zip((0.5, 1.0), curve.table["faithfulness"][1:], strict=True)
    ]
    assert axes.get_legend().texts[0].get_text().startswith("RelP (CPR ")


def test_verify_says_where_there_is_no_task() -> None:
    """The rival is the answer's other way round: the model that did the task does not do it now."""
    model, pairs, scores = scored()
    circuit = prune(scores, 0.5)
    clean = verify(model, pairs, [circuit]).clean
    better = torch.where(clean > 0, pairs.answers, pairs.rivals)
    worse = torch.where(clean > 0, pairs.rivals, pairs.answers)
    solved = replace(pairs, answers=better, rivals=worse)
    failed = replace(pairs, answers=worse, rivals=better)
    with pytest.warns(UserWarning, match="the model does not do the task: .* in 0% of"):
        verdict = verify(model, failed, [circuit])
    assert verdict.solved == 0
    verdict = verify(model, solved, [circuit])
    assert verdict.solved == 1


def test_a_task_that_is_done_is_passed_over_in_silence() -> None:
    model, pairs = tiny("llama"), some_pairs()
    rows, last = torch.arange(len(pairs)), pairs.mask.sum(dim=1) - 1
    with torch.no_grad():
        clean, corrupt = (model(side)[rows, last] for side in (pairs.clean, pairs.corrupt))
    gaps, floors = (x[:, :, None] - x[:, None, :] for x in (clean, corrupt))
    best = torch.minimum(gaps, gaps - floors).flatten(1).argmax(dim=1)  # answer, rival of each pair
    answers, rivals = best // clean.shape[1], best % clean.shape[1]
    done = replace(pairs, answers=answers, rivals=rivals)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        circuit = prune(score_nodes(model, done), 0.5)
        assert verify(model, done, [circuit]).solved == 1
