"""Steering: the same text with the cache on and off, alone and padded; undone; neutral is nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from lenslrp.analysis.coders import SparseCoder
from lenslrp.analysis.steering import (
    Ablate,
    Add,
    Clamp,
    Operation,
    ProjectOut,
    Scale,
    Steering,
    steer,
)
from lenslrp.analysis.units import Direction, Feature, Head, Neuron
from lenslrp.errors import InputError
from tests.unit.tiny import TOKENS, changes, snapshot, tiny, word_tokenizer

STREAM = "blocks.0.hook_resid_post"
POST = "blocks.1.mlp.hook_post"


class Boom(Exception):
    """Raised inside a context."""


def vector(seed: int = 1) -> Tensor:
    return torch.randn(16, generator=torch.Generator().manual_seed(seed)) * 3


def direction(seed: int = 1, at: str = STREAM) -> Direction:
    return Direction(at, vector(seed))


def coder() -> SparseCoder:
    draw = torch.Generator().manual_seed(5)
    encode, decode = (torch.randn(16, 40, generator=draw) for _ in range(2))
    return SparseCoder(STREAM, encode, torch.zeros(40), decode.T.contiguous(), torch.zeros(16))


OPERATIONS: dict[str, Callable[..., Operation]] = {
    "scale a neuron": lambda **at: Scale(Neuron(1, 3), -20.0, **at),
    "scale a head": lambda **at: Scale(Head(0, 1), -4.0, **at),
    "scale a direction": lambda **at: Scale(direction(), -3.0, **at),
    "add to a neuron": lambda **at: Add(Neuron(0, 3), 9.0, **at),
    "add to a head": lambda **at: Add(Head(1, 0), 9.0, **at),
    "add a direction": lambda **at: Add(direction(), 2.0, **at),
    "add by the stream's size": lambda **at: Add(direction(2), 6.0, units="resid_rms", **at),
    "add a feature": lambda **at: Add(Feature(coder(), 7), 3.0, **at),
    "ablate a head": lambda **at: Ablate(Head(0, 0), **at),
    "ablate to a value": lambda **at: Ablate(Neuron(0, 5), 7.0, **at),
    "clamp a neuron": lambda **at: Clamp(Neuron(1, 2), 4.0, 5.0, **at),
    "clamp a direction": lambda **at: Clamp(direction(), high=-30.0, **at),
    "project out": lambda **at: ProjectOut((direction(), direction(2), direction(3)), **at),
}
PLACES: tuple[tuple[Any, Any], ...] = (
    ("all", "all"),
    ([-1], "all"),
    ([0, -2], "none"),
    ("none", "all"),
    ("none", [0, 2]),
    ("all", "none"),
)
FAMILIES = ("llama", "gpt2", "neox")


def generated(model: TransformerBridge, tokens: Tensor = TOKENS, **options: Any) -> Any:
    return model.generate(
        tokens,
        max_new_tokens=6,
        do_sample=False,
        stop_at_eos=False,
        verbose=False,
        output_logits=True,
        **options,
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_cache_changes_nothing(family: str, name: str) -> None:
    model = tiny(family)
    plain = generated(model)
    differ = 0
    for prompt, generation in PLACES:
        with steer(model, [OPERATIONS[name]()], prompt=prompt, generation=generation):
            on = generated(model, use_past_kv_cache=True)
            off = generated(model, use_past_kv_cache=False)
            again = generated(model, use_past_kv_cache=True)
            hugging = model.hf_generate(TOKENS, max_new_tokens=6, do_sample=False, stop_at_eos=False)
        assert torch.equal(on.sequences, off.sequences), (prompt, generation)
        assert torch.equal(on.sequences, again.sequences)
        assert torch.equal(on.sequences, hugging)
        for a, b in zip(on.logits, off.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        differ += not torch.allclose(torch.stack(on.logits), torch.stack(plain.logits))
    assert differ == len(PLACES)  # nor is it because nothing was done
