"""Node scores: exact patching against a loop, estimates against exact where the model is linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lenslrp.analysis.circuits import score_nodes
from lenslrp.analysis.nodes import COMPONENTS
from lenslrp.analysis.pairs import Pairs
from tests.unit.tiny import tiny

NAMES = tuple(COMPONENTS)
CLEAN = torch.tensor([[3, 17, 5, 17, 8, 11], [2, 9, 2, 21, 9, 0], [4, 4, 6, 7, 0, 0]])
CORRUPT = torch.tensor([[3, 17, 6, 17, 8, 11], [2, 8, 2, 21, 9, 0], [4, 4, 6, 9, 0, 0]])
LENGTHS = torch.tensor([6, 5, 4])


def some_pairs() -> Pairs:
    """Three pairs of different lengths; the padding is on the right."""
    mask = torch.arange(6)[None] < LENGTHS[:, None]
    return Pairs(CLEAN, CORRUPT, mask, torch.tensor([5, 7, 9]), torch.tensor([6, 2, 3]))


def gap(model: TransformerBridge, pairs: Pairs, row: int, tokens: Tensor) -> Tensor:
    """Of one row, without padding and without anything of the library's."""
    length = int(LENGTHS[row])
    with torch.no_grad():
        logits = model(tokens[row : row + 1, :length])[0, -1]
    return logits[pairs.answers[row]] - logits[pairs.rivals[row]]


def loop(
    model: TransformerBridge, pairs: Pairs, row: int, hook: str, node: Callable[[Tensor], Any]
) -> float:
    """Denoising effect of one node: ``node`` gives the part of a hook's tensor that it is."""
    length = int(LENGTHS[row])
    _, cache = model.run_with_cache(pairs.clean[row : row + 1, :length])

    def patch(x: Tensor, hook: Any) -> Tensor:
        patched = x.clone()
        node(patched)[...] = node(cache[hook.name])
        return patched

    with torch.no_grad():
        before = gap(model, pairs, row, pairs.corrupt)
        with model.hooks(fwd_hooks=[(hook, patch)]):
            return float(gap(model, pairs, row, pairs.corrupt) - before)


PARTS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "whole": lambda x, position, unit: x[:, position],
    "head": lambda x, position, unit: x[:, position, unit],
    "entry": lambda x, position, unit: x[:, position, unit : unit + 1],
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_exact_effects_are_those_of_a_loop(family: str) -> None:
    model, pairs = tiny(family), some_pairs()
    scores = score_nodes(model, pairs, method="exact", components=NAMES, by_position=True, chunk=2)
    for hook, component in scores.components.items():
        part = PARTS[COMPONENTS[component].kind]
        for row in range(3):
            for position in (1, int(LENGTHS[row]) - 1):
                unit = scores.values[hook].shape[-1] - 1
                node = lambda x: part(x, position, unit)  # noqa: B023, E731
                expected = loop(model, pairs, row, hook, node)
                found = float(scores.values[hook][row, position, unit])
                assert found == pytest.approx(expected, abs=1e-9), (hook, row, position)
    for row in range(3):
        for side, tokens in (("clean", pairs.clean), ("corrupt", pairs.corrupt)):
            expected = float(gap(model, pairs, row, tokens))
            assert float(getattr(scores, side)[row]) == pytest.approx(expected, abs=1e-9)


def test_without_positions_a_node_is_patched_at_all_of_them() -> None:
    model, pairs = tiny("llama"), some_pairs()
    scores = score_nodes(model, pairs, method="exact", components=["heads"])
    hook = "blocks.1.attn.hook_z"
    for row in range(3):
        expected = loop(model, pairs, row, hook, lambda x: x[:, :, 1])
        assert float(scores.values[hook][row, 1]) == pytest.approx(expected, abs=1e-9)
