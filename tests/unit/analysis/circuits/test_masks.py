"""Learned masks: the gates' mathematics, one step against a plain loop, and a circuit that is known
by construction."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslrp import InputError
from lenslrp.analysis.circuits.ablation import ablations
from lenslrp.analysis.circuits.masks import gates, learn_masks, thresholds
from lenslrp.analysis.circuits.metrics import METRICS
from lenslrp.analysis.circuits.nodes import Node
from lenslrp.analysis.circuits.pairs import Pairs
from lenslrp.analysis.circuits.pruning import prune, verify
from lenslrp.analysis.circuits.scores import NodeScores, score_nodes
from tests.unit.analysis.circuits.test_circuits import LENGTHS, some_pairs
from tests.unit.tiny import changes, snapshot, tiny

pytestmark = pytest.mark.filterwarnings("ignore:the model does not do the task:UserWarning")

ONE_HEAD = (1, 0)
"""Layer and head of the only node that writes anything in `one_head`."""


def one_head() -> tuple[TransformerBridge, Pairs]:
    """A model in which one head alone makes logits of the tokens before the last one differ."""
    model, pairs = tiny("gpt2"), solved(some_pairs())
    layer, head = ONE_HEAD
    with torch.no_grad():
        for index, block in enumerate(model.original_model.transformer.h):
            block.mlp.c_proj.weight.zero_()
            out = block.attn.c_proj.weight  # [head * d_head, d_model]
            kept = out[8 * head : 8 * head + 8].clone()
            out.zero_()
            if index == layer:
                out[8 * head : 8 * head + 8] = kept
    return model, oriented(model, pairs)


def solved(pairs: Pairs) -> Pairs:
    """The pairs whose last tokens are the same in both prompts, so that only attention tells."""
    return pairs[torch.tensor([0, 1])]


def oriented(model: TransformerBridge, pairs: Pairs) -> Pairs:
    """Answers such that the clean run prefers them more than the corrupted one does."""
    scores = score_nodes(model, pairs, method="attribution", components=["heads"])
    swap = scores.clean < scores.corrupt
    answers = torch.where(swap, pairs.rivals, pairs.answers)
    rivals = torch.where(swap, pairs.answers, pairs.rivals)
    return Pairs(pairs.clean, pairs.corrupt, pairs.mask, answers, rivals)


def misled(model: TransformerBridge, pairs: Pairs) -> NodeScores:
    """Scores that rank the only head that matters last."""
    scores = score_nodes(model, pairs, components=["heads", "mlp"])
    layer, head = ONE_HEAD
    values = {hook: torch.ones_like(value) for hook, value in scores.values.items()}
    values[f"blocks.{layer}.attn.hook_z"][:, head] = -1.0
    return replace(scores, values=values)


@pytest.mark.parametrize(
    ("start", "objective", "metric"),
    [
        ("level", "cmd", "logit_difference"),
        ("misled", "cmd", "logit_difference"),
        ("misled", "cpr", "logit_difference"),
        ("misled", "cmd", "kl"),
    ],
)
def test_the_only_head_that_matters_is_found(start: str, objective: str, metric: str) -> None:
    model, pairs = one_head()
    init: dict[str, Any] = {"components": ["heads", "mlp"]}
    if start == "misled":
        init = {"init": misled(model, pairs)}
    options: dict[str, Any] = {"objective": objective, "metric": metric, "shares": (0.2, 0.5)}
    options["pooled"] = True
    before = snapshot(model)
    masks = learn_masks(model, pairs, **init, **options, steps=20, rate=0.5)
    assert changes(before, model) == []
    circuit = prune(masks, nodes=1)
    assert circuit.nodes() == [Node("blocks.1.attn.hook_z", 0)]
    assert verify(model, pairs, [circuit], metric=metric).faithfulness == pytest.approx([1.0])
    assert masks.metric == metric
    more = 2 if metric == "kl" else 0  # the clean logits, and which pairs are answered right
    assert masks.passes.forward == (2 + more) * 2 + 20 * 2
    assert masks.passes.backward == 20 * 2
    again = learn_masks(model, pairs, **init, **options, steps=20, rate=0.5)
    assert all(torch.equal(masks.values[hook], again.values[hook]) for hook in masks.values)


def test_a_share_of_the_gates_is_open_and_one_goes_up_for_others() -> None:
    odds = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    shares = torch.tensor([0.1, 0.5, 11 / 12], dtype=torch.float64)
    tau = thresholds(odds, shares)
    assert torch.allclose(torch.sigmoid(odds - tau[:, None]).mean(dim=1), shares, atol=1e-10)
    assert torch.autograd.gradcheck(
        partial(thresholds, shares=shares), odds.requires_grad_(), eps=1e-4, atol=1e-5
    )
    generator = torch.Generator().manual_seed(0)
    drawn = torch.full((4000,), 1)
    opened = gates(odds.detach().float(), shares.float(), drawn, generator)
    assert opened.min() == 0
    assert opened.max() == 1
    assert float((opened > 0).double().mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("ablation", ["corrupt", "mean"])
def test_a_step_follows_the_gradient_of_interpolated_runs(ablation: str) -> None:
    """Row by row, with TransformerLens' own hooks and without padding."""
    model = tiny("llama")
    pairs = oriented(model, some_pairs())
    scores = score_nodes(model, pairs, components=["heads", "neurons"])
    masks = learn_masks(
        model, pairs, init=scores, steps=1, rate=0.01, shares=(0.5,), ablation=ablation, seed=3
    )
    generator = torch.Generator().manual_seed(3)
    starts = {"heads": start(scores, "heads"), "neurons": start(scores, "neurons")}
    drawn = torch.randint(1, (3,), generator=generator)
    opened = {}
    for name, odds in starts.items():
        hooks = [hook for hook, other in scores.components.items() if other == name]
        each = gates(odds.requires_grad_(), torch.tensor([0.5]), drawn, generator)
        opened.update(zip(hooks, each.split(len(odds) // 2, dim=1), strict=True))
    kept = torch.stack([row_value(model, pairs, row, opened, ablation) for row in range(3)])
    floor, clean = masks.corrupt, masks.clean
    ((1 - (kept - floor) / (clean - floor).mean()).abs().mean()).backward()
    for name, odds in starts.items():
        stepped = odds.detach() - 0.01 * odds.grad.sign()
        assert torch.allclose(masks.of(name)[0], stepped, atol=1e-5)
        assert torch.equal(masks.of(name)[0], masks.of(name)[2])


def test_answers_of_several_tokens() -> None:
    """Both runs of a pair, of the answer and of the incorrect one, have the pair's gates."""
    model, pairs = tiny("llama"), some_pairs()
    answers, rivals = (
        torch.tensor([[5, 4], [7, -1], [9, 3]]),
        torch.tensor([[6, 2], [2, 8], [3, 9]]),
    )
    for swapped in (False, True):
        sides = (rivals, answers) if swapped else (answers, rivals)
        long = Pairs(pairs.clean, pairs.corrupt, pairs.mask, *sides)
        if float((long.measured(model) - long.measured(model, side="corrupt")).mean()) > 0:
            break
    masks = learn_masks(model, long, components=["heads"], steps=2, shares=(0.5,), chunk=2)
    assert torch.allclose(masks.clean, long.measured(model), atol=1e-9)
    assert torch.allclose(masks.corrupt, long.measured(model, side="corrupt"), atol=1e-9)
    assert masks.passes.backward == 2 * (2 + 1)
    part = next(
        ablations(model, long, masks.components, METRICS["logit_difference"], "corrupt", None, 3)
    )
    circuit = prune(masks, 0.5)
    by_pair = {hook: keep.double().expand(3, -1) for hook, keep in circuit.keep.items()}
    assert torch.allclose(part.run(by_pair), verify(model, long, [circuit]).gaps[0], atol=1e-9)


def start(scores: NodeScores, component: str) -> Tensor:
    """Log odds by rank."""
    mean = scores.of(component).mean(dim=0)
    rank = torch.empty(len(mean))
    rank[mean.argsort(descending=True, stable=True)] = torch.arange(len(mean)).float()
    return torch.logit(1 - (rank + 0.5) / len(mean))


def row_value(
    model: TransformerBridge, pairs: Pairs, row: int, opened: dict[str, Tensor], ablation: str
) -> Tensor:
    caches = [
        model.run_with_cache(side[i : i + 1, : int(LENGTHS[i])])[1]
        for side in (pairs.clean, pairs.corrupt)
        for i in range(3)
    ]

    def put(x: Tensor, hook: Any, name: str) -> Tensor:
        other = caches[3 + row][name]
        if ablation == "mean":
            other = torch.cat([cache[name][0] for cache in caches]).mean(dim=0)
        gate = opened[name][row].double()
        gate = gate[:, None] if x.ndim == 4 else gate
        return gate * x + (1 - gate) * other.detach()

    with model.hooks(fwd_hooks=[(name, partial(put, name=name)) for name in opened]):
        logits = model(pairs.clean[row : row + 1, : int(LENGTHS[row])])[0, -1]
    return logits[pairs.answers[row]] - logits[pairs.rivals[row]]


def test_what_cannot_be_trained_is_refused() -> None:
    model = tiny("llama")
    pairs = oriented(model, some_pairs())
    learn = partial(learn_masks, model, pairs, components=["heads"])
    with pytest.raises(InputError, match="^objective must be one of cmd, cpr, not 'kl'$"):
        learn(objective="kl")
    with pytest.raises(InputError, match="^steps and chunk must be at least 1, not 0 and 32$"):
        learn(steps=0)
    with pytest.raises(InputError, match="^no pairs to train on$"):
        learn_masks(model, pairs[:0])
    with pytest.raises(
        InputError, match=r"^of \[4\] nodes, the shares \[0\.1, 1\.0\] leave nothing to choose$"
    ):
        learn(shares=(0.1, 1.0))
    by_position = score_nodes(model, pairs, components=["heads"], by_position=True)
    with pytest.raises(InputError, match="score with by_position=False"):
        learn_masks(model, pairs, init=by_position)
    backwards = Pairs(pairs.corrupt, pairs.clean, pairs.mask, pairs.answers, pairs.rivals)
    with pytest.raises(
        InputError,
        match=r"^the mean logit_difference of the clean runs is .*, not above the floor's, .*: "
        r"there is nothing for masks to keep$",
    ):
        learn_masks(model, backwards, components=["heads"])
