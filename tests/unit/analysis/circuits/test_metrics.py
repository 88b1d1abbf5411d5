"""Metrics of circuits: values by hand, effects by loops, the gradient where relevance starts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from lenslrp import InputError
from lenslrp.analysis.circuits.edges import score_edges
from lenslrp.analysis.circuits.measured_pairs import MeasuredPairs
from lenslrp.analysis.circuits.metrics import METRICS, Metric, logit_difference
from lenslrp.analysis.circuits.nodes import TARGET, Node
from lenslrp.analysis.circuits.pairs import Pairs
from lenslrp.analysis.circuits.pruning import prune, verify
from lenslrp.analysis.circuits.scores import score_nodes
from lenslrp.analysis.circuits.solved import TaskWarning
from tests.unit.analysis.circuits.test_circuits import (
    CLEAN,
    CORRUPT,
    LENGTHS,
    linear_model,
    some_pairs,
)
from tests.unit.tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore:the model does not do the task:UserWarning")

Z, POST = "blocks.0.attn.hook_z", "blocks.1.mlp.hook_post"
LONG = torch.tensor([[5, 8, 3], [7, -1, -1], [9, 2, -1]])
LONG_RIVALS = torch.tensor([[6, 4, -1], [2, 3, 11], [3, -1, -1]])


def long_pairs() -> Pairs:
    """The three pairs with answers of one to three tokens."""
    return replace(some_pairs(), answers=LONG, rivals=LONG_RIVALS)


def logits_of(model: TransformerBridge, prompt: Tensor, answer: list[int]) -> Tensor:
    """[token, vocab], the logits before each token of an answer, without padding."""
    tokens = torch.cat([prompt, torch.tensor(answer[:-1], dtype=torch.long)])[None]
    with torch.no_grad():
        return model(tokens)[0, len(prompt) - 1 :]


def summed(logits: Tensor, answer: list[int]) -> Tensor:
    """The log-probability of a sequence, token by token."""
    total = torch.zeros((), dtype=torch.float64)
    for row, token in zip(logits, answer, strict=True):
        total = total + row[token] - row.exp().sum().log()
    return total


def divergence(clean: Tensor, logits: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for before, after in zip(clean, logits, strict=True):
        p, q = before.softmax(0), after.softmax(0)
        total = total + sum(a * (a / b).log() for a, b in zip(p, q, strict=True))
    return total


def least_margin(logits: Tensor, answer: list[int]) -> Tensor:
    margins = [
        row[token] - max(x for i, x in enumerate(row) if i != token)
        for row, token in zip(logits, answer, strict=True)
    ]
    return torch.stack(margins).min()


def by_hand(
    model: TransformerBridge, pairs: Pairs, row: int, tokens: Tensor, name: str, **hooks: Any
) -> float:
    """A metric of one row, from plain runs of the model; ``hooks`` as ``run_with_hooks`` takes."""
    length = int(LENGTHS[row])
    answer, rival = (
        [int(i) for i in side[row].reshape(-1) if i >= 0] for side in (pairs.answers, pairs.rivals)
    )
    clean = logits_of(model, pairs.clean[row, :length], answer)
    made = partial(logits_of, model, tokens[row, :length])
    if not hooks:
        logits, other = made(answer), made(rival)
    else:
        with model.hooks(fwd_hooks=hooks["answer"]):
            logits = made(answer)
        with model.hooks(fwd_hooks=hooks["rival"]):
            other = made(rival)
    if name == "logit_difference" and pairs.answers.ndim == 1:
        return float(logits[0, answer[0]] - logits[0, rival[0]])
    values = {
        "logit_difference": lambda: summed(logits, answer) - summed(other, rival),
        "log_prob": lambda: summed(logits, answer),
        "kl": lambda: -divergence(clean, logits),
        "margin": lambda: least_margin(logits, answer),
    }
    return float(values[name]())


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("name", list(METRICS))
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_metrics_are_what_they_are_by_hand(family: str, name: str, long: bool) -> None:
    model, pairs = tiny(family), long_pairs() if long else some_pairs()
    for side, tokens in (("clean", pairs.clean), ("corrupt", pairs.corrupt)):
        expected = [by_hand(model, pairs, row, tokens, name) for row in range(3)]
        found = pairs.measured(model, name, side=side, chunk=2)
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(expected, abs=1e-9), side
    if name == "kl":
        assert pairs.measured(model, name).tolist() == pytest.approx([0] * 3, abs=1e-12)


def test_a_sequence_of_one_token_has_its_logit_difference() -> None:
    model, pairs = tiny("llama"), some_pairs()
    short = replace(pairs, answers=pairs.answers[:, None], rivals=pairs.rivals[:, None])
    assert torch.allclose(short.measured(model), pairs.measured(model), rtol=0, atol=1e-12)


def whole_unit(cache: Any, unit: int) -> Any:
    def put(x: Tensor, hook: Any) -> Tensor:
        y = x.clone()
        y[:, :, unit] = cache[hook.name][:, :, unit]
        return y

    return put


@pytest.mark.parametrize("name", list(METRICS))
def test_exact_effects_on_long_answers_are_those_of_a_loop(name: str) -> None:
    """Of every metric, both tokens of the prompt and teacher-forced ones patched."""
    model, pairs = tiny("llama"), long_pairs()
    nodes = [Node(Z, 1), Node(POST, 3)]
    scores = score_nodes(
        model, pairs, method="exact", metric=name, only=nodes, chunk=2,
        components=["heads", "neurons"],
    )  # fmt: skip
    assert scores.metric == name
    for row, length in enumerate(LENGTHS.tolist()):
        for node in nodes:
            hooks = {}
            for key, side in (("answer", pairs.answers), ("rival", pairs.rivals)):
                end = side[row][side[row] >= 0][:-1]
                _, cache = model.run_with_cache(torch.cat([pairs.clean[row, :length], end])[None])
                hooks[key] = [(node.hook, whole_unit(cache, node.unit))]
            before = by_hand(model, pairs, row, pairs.corrupt, name)
            after = by_hand(model, pairs, row, pairs.corrupt, name, **hooks)
            found = float(scores.values[node.hook][row, node.unit])
            assert found == pytest.approx(after - before, abs=1e-9), (row, node)


def weighted(logits: Tensor, pairs: Any, clean: Tensor | None) -> Tensor:
    """Linear in the logits, and of the clean run's a constant."""
    assert clean is not None
    return logits[:, 0, 3] - 2 * logits[:, 0, 7] + clean[:, 0, 4]


@pytest.mark.parametrize("by_position", [True, False])
def test_a_function_that_is_linear_on_a_linear_model_is_estimated_exactly(
    by_position: bool,
) -> None:
    model, pairs = linear_model(), some_pairs()
    shared: dict[str, Any] = {"metric": weighted, "by_position": by_position, "chunk": 2}
    exact = score_nodes(model, pairs, method="exact", **shared)
    assert exact.metric == "weighted"
    assert max(effects.abs().max() for effects in exact.values.values()) > 1
    for options in (
        {"method": "relevance"}, {"method": "attribution"}, {"method": "integrated", "steps": 2},
    ):  # fmt: skip
        found = score_nodes(model, pairs, **options, **shared)
        for hook, effects in exact.values.items():
            assert torch.allclose(found.values[hook], effects, atol=1e-9), (options, hook)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("name", ["log_prob", "kl", "margin"])
def test_relevance_starts_with_the_gradient_of_the_metric_at_the_logits(
    name: str, long: bool
) -> None:
    """On a linear model a score is the effect on every logit times the metric's slope there."""
    model, pairs = linear_model(), long_pairs() if long else some_pairs()
    found = score_nodes(model, pairs, metric=name)
    measured = MeasuredPairs.of(pairs, name).beside_clean(model)
    at: list[Tensor] = []

    def kept(logits: Tensor, rows: Any, clean: Tensor | None) -> Tensor:
        at.append(logits)
        return logits[:, 0, 0]

    pairs.measured(model, kept, side="corrupt")
    logits = at[0].detach().requires_grad_()
    values = METRICS[name].of(logits, measured, measured.clean_logits)
    (slope,) = torch.autograd.grad(values.sum(), logits)
    total = {hook: torch.zeros_like(value) for hook, value in found.values.items()}
    for token in range(logits.shape[1]):
        for entry in slope[:, token].abs().amax(dim=0).nonzero()[:, 0].tolist():
            one = score_nodes(model, pairs, metric=lambda x, rows, _, t=token, e=entry: x[:, t, e])
            for hook, effects in one.values.items():
                total[hook] += effects * slope[:, token, entry][:, None]
    for hook, value in found.values.items():
        assert torch.allclose(value, total[hook], rtol=0, atol=1e-9), hook


@pytest.mark.parametrize("name", list(METRICS))
def test_what_leaves_a_node_along_its_edges_is_its_score(name: str) -> None:
    model, pairs = tiny("llama"), long_pairs()
    names = ("tokens", "heads", "mlp")
    edges = score_edges(model, pairs, metric=name, rows=7)
    nodes = score_nodes(model, pairs, metric=name, components=names, chunk=2)
    for hook, sums in edges.outgoing().items():
        assert torch.allclose(sums, nodes.values[hook], rtol=0, atol=1e-7), hook
    assert edges.metric == nodes.metric == name
    assert torch.allclose(edges.clean, nodes.clean) and torch.equal(edges.correct, nodes.correct)
    up = Node("blocks.1.hook_mlp_out", 0)  # nothing lies between it and the metric
    exact = score_edges(model, pairs, metric=name, method="exact", only=[(up, TARGET)])
    whole = score_nodes(model, pairs, metric=name, method="exact", components=["mlp"], only=[up])
    assert torch.allclose(exact.score(up, TARGET), whole.values[up.hook][:, 0], atol=1e-9)


def test_positions_behind_the_prompt_are_those_of_both_answers() -> None:
    model, pairs = tiny("llama"), long_pairs()
    shared: dict[str, Any] = {"components": ["mlp"], "by_position": True, "method": "exact"}
    both = score_nodes(model, pairs, **shared)
    swapped = replace(pairs, answers=pairs.rivals, rivals=pairs.answers)
    answer, rival = (score_nodes(model, p, metric="log_prob", **shared) for p in (pairs, swapped))
    for hook, value in both.values.items():
        less = torch.zeros_like(value)
        less[:, : answer.values[hook].shape[1]] += answer.values[hook]
        less[:, : rival.values[hook].shape[1]] -= rival.values[hook]
        assert torch.allclose(value, less, rtol=0, atol=1e-9)
    longest = [max(len(a[a >= 0]), len(b[b >= 0])) for a, b in zip(LONG, LONG_RIVALS, strict=True)]
    lengths = [int(n) + more - 1 for n, more in zip(LENGTHS, longest, strict=True)]
    assert both.mask.sum(dim=1).tolist() == lengths


def test_a_metric_of_all_positions() -> None:
    model, pairs = tiny("llama"), some_pairs()

    def likely(logits: Tensor, rows: Any, clean: Tensor | None) -> Tensor:
        assert clean is None
        tops = logits.log_softmax(dim=-1).amax(dim=-1)
        return torch.where(rows.mask, tops, 0).sum(dim=1)

    found = pairs.measured(model, Metric("likely", likely, everywhere=True), side="corrupt")
    with torch.no_grad():
        for row, length in enumerate(LENGTHS.tolist()):
            logits = model(CORRUPT[row : row + 1, :length])[0]
            expected = sum(float(x.log_softmax(0).max()) for x in logits)
            assert float(found[row]) == pytest.approx(expected, abs=1e-9)
    scores = score_nodes(model, pairs, metric=Metric("likely", likely, everywhere=True))
    assert scores.clean.tolist() == pytest.approx(
        pairs.measured(model, Metric("likely", likely, everywhere=True)).tolist()
    )


def test_what_a_nonlinear_metric_adds_is_in_the_ledger() -> None:
    """Value less the sum of logit times the metric's slope: the part that no logit is given."""
    model, pairs = tiny("llama"), some_pairs()[:1]
    measured = MeasuredPairs.of(pairs, "kl").beside_clean(model)
    _, R = lenslrp.run_with_relevance(model, pairs.corrupt, measured)
    logits = model(pairs.corrupt)[:, -1:].detach().requires_grad_()
    value = METRICS["kl"].of(logits, measured, measured.clean_logits)
    (slope,) = torch.autograd.grad(value.sum(), logits)
    expected = float((value.sum() - (logits * slope).sum()).detach())
    assert R.ledger().nonlinear_target == pytest.approx(expected, abs=1e-9)
    assert abs(expected) > 1e-4
    assert R.target.text == "kl of the answer"


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("name", list(METRICS))
def test_a_circuit_is_verified_by_any_metric(name: str, long: bool) -> None:
    model, pairs = tiny("llama"), long_pairs() if long else some_pairs()
    circuit = prune(score_nodes(model, pairs), 0.5)
    verdict = verify(model, pairs, [circuit], metric=name, chunk=2)
    for row, length in enumerate(LENGTHS.tolist()):
        hooks: dict[str, Any] = {}
        for key, side in (("answer", pairs.answers), ("rival", pairs.rivals)):
            end = side[row].reshape(-1)
            end = end[end >= 0][:-1]
            _, cache = model.run_with_cache(torch.cat([pairs.corrupt[row, :length], end])[None])

            def put(x: Tensor, hook: Any, at: str, cache: Any = cache) -> Tensor:
                keep = circuit.keep[at][:, None] if x.ndim == 4 else circuit.keep[at]
                return torch.where(keep, x, cache[at])

            hooks[key] = [(at, partial(put, at=at)) for at in circuit.keep]
        found = by_hand(model, pairs, row, pairs.clean, name, **hooks)
        assert float(verdict.gaps[0, row]) == pytest.approx(found, abs=1e-9)
        for part, tokens in ((verdict.clean, pairs.clean), (verdict.floor, pairs.corrupt)):
            assert float(part[row]) == pytest.approx(
                by_hand(model, pairs, row, tokens, name), abs=1e-9
            )
    assert verdict.metric == name
    assert torch.equal(verdict.correct, pairs.correct(model))
    whole = verify(model, pairs, [prune(score_nodes(model, pairs), 1.0)], metric=name,
                   ablation="mean")  # fmt: skip
    assert whole.faithfulness[0] == pytest.approx(1)


def test_which_pairs_the_model_gets_right() -> None:
    model, pairs = tiny("llama"), long_pairs()
    gaps = [by_hand(model, pairs, row, pairs.clean, "logit_difference") for row in range(3)]
    other = [by_hand(model, pairs, row, pairs.corrupt, "logit_difference") for row in range(3)]
    assert 0 < sum(gap > 0 for gap in gaps) < 3
    assert pairs.correct(model).tolist() == [gap > 0 for gap in gaps]
    both = [gap > 0 and end < 0 for gap, end in zip(gaps, other, strict=True)]
    assert pairs.correct(model, both=True).tolist() == both
    kept = pairs[pairs.correct(model)]
    assert len(kept) == sum(gap > 0 for gap in gaps)
    assert kept.correct(model).all()
    for name in ("logit_difference", "kl"):
        scores = score_nodes(model, pairs, metric=name)
        assert torch.equal(scores.correct, pairs.correct(model))


def test_pairs_that_fail_are_counted_in_a_warning() -> None:
    model, pairs = tiny("llama"), some_pairs()[:1]
    with torch.no_grad():
        clean, corrupt = (model(side)[0, -1] for side in (pairs.clean, pairs.corrupt))
    gaps, floors = (x[:, None] - x[None] for x in (clean, corrupt))
    best = int(torch.minimum(gaps, gaps - floors).argmax())
    ids = torch.tensor([divmod(best, len(clean))] * 40)  # answer, rival
    ids[7] = ids[7].flip(0)
    many = replace(pairs[torch.zeros(40, dtype=torch.long)], answers=ids[:, 0], rivals=ids[:, 1])
    said = "the model does not do the task in 1 of 40 pairs: the clean run does not prefer the"
    with pytest.warns(TaskWarning, match=said) as caught:
        circuit = prune(score_nodes(model, many), 0.5)
    assert len(caught) == 1
    with pytest.warns(TaskWarning, match=said) as caught:
        verdict = verify(model, many, [circuit], metric="log_prob")
    assert len(caught) == 1
    assert verdict.solved == 39 / 40


def test_what_is_no_metric() -> None:
    model, pairs = tiny("llama"), some_pairs()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"metric": "accuracy"},
         "metric must be one of logit_difference, log_prob, kl, margin, a Metric, or a function "
         "of logits, pairs and the clean run's logits, not 'accuracy'"),
        ({"metric": lambda x, rows, _: x}, r"must return 3 real numbers, one a row of its logits"),
        ({"metric": lambda x, rows, _: 1.0}, r"must return 3 real numbers, .* not 1\.0"),
        ({"metric": "kl", "direction": "noising"},
         "the gradient of kl is 0 at the clean run, which is the base run here"),
        ({"metric": "kl", "direction": "noising", "method": "attribution"},
         "give direction='denoising', or method='integrated' or 'exact'"),
    ]  # fmt: skip
    for options, message in cases:
        with pytest.raises(InputError, match=message):
            score_nodes(model, pairs, **options)
    with pytest.raises(InputError, match="answers of several tokens have no logits at one token"):
        long_pairs().logit_difference(torch.zeros(3, 1, 23))
    with pytest.raises(InputError, match="side must be 'clean' or 'corrupt', not 'base'"):
        pairs.measured(model, side="base")
    with pytest.raises(InputError, match="no pairs to measure"):
        pairs[:0].correct(model)
    from_end = Node(Z, 1, -1)
    with pytest.raises(InputError, match="may end at different positions: count from the begin"):
        score_nodes(model, long_pairs(), method="exact", only=[from_end], by_position=True)
    whole = Metric("whole", lambda x, rows, _: x.sum(dim=(1, 2)), everywhere=True)
    with pytest.raises(InputError, match="the metric whole reads all positions, and the prompts"):
        MeasuredPairs.of(replace(pairs, corrupt_mask=pairs.mask, counterpart=pairs.clean), whole)
    exact = score_nodes(model, pairs, metric="kl", direction="noising", method="exact",
                        components=["heads"])  # fmt: skip
    assert all((value <= 1e-12).all() for value in exact.values.values())
    named = Metric("mine", logit_difference)
    assert score_nodes(model, pairs, metric=named, components=["heads"]).metric == "mine"
    assert torch.equal(CLEAN, pairs.clean)
