"""A pass that does not fit says what it needs and what is not lowered yet, and leaves no trace."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import lenslrp
from lenslrp.errors import is_out_of_memory
from lenslrp.hooks import checks
from tests.unit.hooks.test_undo import explain
from tests.unit.tiny import TOKENS, changes, snapshot, tiny

AT = "blocks.1.mlp.hook_post"
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"
MPS = "MPS backend out of memory (MPS allocated: 5.88 GB, other allocations: 12.27 GB)"


def on_cuda() -> None:
    raise torch.OutOfMemoryError(CUDA)


def on_mps() -> None:
    raise RuntimeError(MPS)


def on_cpu() -> None:
    torch.empty(10**15)


def in_python() -> None:
    raise MemoryError


def failing(fail: Callable[[], None], *, backward: bool = False) -> Callable[..., None]:
    """A hook that runs out of memory, in the forward pass or in the backward pass."""

    def hook(x: Tensor, hook: Any) -> None:
        if backward:
            x.register_hook(lambda g: fail())
        else:
            fail()

    return hook


def said_by(model: TransformerBridge, **options: Any) -> str:
    with pytest.raises(lenslrp.OutOfMemoryError) as caught:
        explain(model, **options)
    return str(caught.value)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("fail", "words"),
    [(on_cuda, CUDA), (on_mps, MPS), (on_cpu, "DefaultCPUAllocator"), (in_python, "MemoryError")],
)
def test_each_backends_error_is_explained(
    fail: Callable[[], None], words: str, backward: bool
) -> None:
    model = tiny("llama")
    model.add_hook(AT, failing(fail, backward=backward))
    before = snapshot(model)
    with pytest.raises(lenslrp.OutOfMemoryError) as caught:
        explain(model)
    assert changes(before, model) == []
    said = str(caught.value)
    assert words in said
    assert said.startswith(
        "out of memory while explaining 2 x 6 tokens (batch x length) with LlamaForCausalLM in "
        "float64. It needs "
    )
    assert isinstance(caught.value, RuntimeError) and isinstance(caught.value, MemoryError)
    cause = caught.value.__cause__
    assert cause is not None and is_out_of_memory(cause)
    assert not isinstance(cause, lenslrp.LensLRPError)


def test_other_errors_stay_as_they_are() -> None:
    def wrong_shapes() -> None:
        torch.ones(2) + torch.ones(3)

    model = tiny("llama")
    model.add_hook(AT, failing(wrong_shapes))
    with pytest.raises(RuntimeError, match="must match the size") as caught:
        explain(model)
    assert not isinstance(caught.value, lenslrp.LensLRPError)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (
            {},
            'the batch (2 rows at once), checkpoint=True, attention="fused", '
            'reduce="sum" (or fewer hooks, names_filter=[...]), logits="target".',
        ),
        (
            {"checkpoint": True, "names_filter": [AT]},
            'the batch (2 rows at once), attention="fused", '
            'reduce="sum" (or fewer hooks, names_filter=[...]), logits="target".',
        ),
        (
            {"attention": "fused", "reduce": "sum", "logits": "target"},
            "the batch (2 rows at once), checkpoint=True.",
        ),
    ],
)
def test_what_is_not_lowered_yet(options: dict[str, Any], left: str) -> None:
    """With what survey says of this pass, and of the pass with all of them lowered."""
    model = tiny("llama")
    model.add_hook(AT, failing(on_cuda))
    said = said_by(model, **options)
    assert f"Not lowered yet: {left} With all of these lowered it needs " in said
    config = copy.deepcopy(model.original_model.config)
    pass_: dict[str, Any] = {"names_filter": None, "reduce": None, **options}
    found = lenslrp.survey(
        config, architecture="LlamaForCausalLM", batch=2, length=6, dtype=torch.float64, **pass_
    )
    assert f"It needs {found.peak / 2**20:,.1f} MiB besides" in said


def test_nothing_left_to_lower() -> None:
    model = tiny("llama")
    model.add_hook(AT, failing(on_cuda))
    lowest = {"checkpoint": True, "attention": "fused", "logits": "target", "names_filter": []}
    with pytest.raises(lenslrp.OutOfMemoryError, match="as low as they go: give a shorter input"):
        lenslrp.run_with_relevance(model, TOKENS[:1], 5, **lowest)


def test_what_the_model_cannot_have_is_not_advised() -> None:
    """The fused kernel has no soft-cap."""
    model = tiny("gemma2")
    model.add_hook(AT, failing(on_cuda))
    said = said_by(model)
    assert "It needs" in said and "With all of these" in said
    assert "fused" not in said


def test_a_model_that_nobody_can_survey() -> None:
    model = tiny("llama")
    model.add_hook(AT, failing(on_cuda))
    kind = type(model.original_model)
    model.original_model.__class__ = type("Mine", (kind,), {})
    said = said_by(model)
    assert "with Mine in float64. Not lowered yet: the batch" in said
    assert "It needs" not in said


def test_a_session_goes_on_afterwards() -> None:
    model = tiny("llama")
    expected = explain(model).tokens
    with lenslrp.session(model) as session:
        model.add_hook(AT, failing(on_cuda))
        with pytest.raises(lenslrp.OutOfMemoryError):
            session.run_with_relevance(TOKENS, 5)
        model.reset_hooks()
        assert torch.equal(session.run_with_relevance(TOKENS, 5)[1].tokens, expected)


def test_it_is_not_taken_for_a_module_of_another_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm is run on more rows to see what it computes."""
    monkeypatch.setattr(checks, "_noise", lambda x: on_cuda())
    monkeypatch.setattr(checks, "_proven", weakref.WeakKeyDictionary())
    assert CUDA in said_by(tiny("llama"))
