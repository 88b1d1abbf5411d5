"""The forward pass is untouched: logits equal to the last bit, with rules, readers and ledger.

Every family in four types. The reference is the same bridge with no rules; nothing is tolerated.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lenslrp
from tests.conformance.families import COMPOSITES, DTYPES, FAMILIES, make, tokens

CASES = [
    pytest.param((name, dtype), id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name in FAMILIES
    for dtype in DTYPES
]


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> tuple[Any, torch.Tensor]:
    """A bridge and its logits without any rule."""
    name, dtype = request.param
    model = make(name, dtype)
    with torch.no_grad():
        logits = model(tokens())
    assert logits.dtype == dtype
    assert torch.isfinite(logits).all()
    return model, logits


def _make_leaf(_: Any, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
    """The user's own leaf: weights are frozen inside ``relevance_rules``."""
    return out.detach().requires_grad_()


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_logits_are_equal_under_every_composite(case: tuple[Any, torch.Tensor]) -> None:
    model, reference = case
    for name, composite in COMPOSITES.items():
        with lenslrp.relevance_rules(model, composite()) as rules:
            leaf = model.hook_dict["embed.hook_out"].register_forward_hook(_make_leaf)
            logits = model(tokens())
            leaf.remove()
        assert all(site.forward or site.optional for site in rules.sites), name
        assert logits.requires_grad, name
        assert torch.equal(logits, reference), name


@pytest.mark.parametrize("case", CASES, indirect=True)
@pytest.mark.parametrize("composite", ["AttnLRP", "GIM"])
def test_logits_are_equal_with_all_readers_and_the_ledger(
    case: tuple[Any, torch.Tensor], composite: str
) -> None:
    model, reference = case
    logits, cache = lenslrp.run_with_relevance(model, tokens(), 5, COMPOSITES[composite]())
    assert torch.equal(logits, reference)
    assert not logits.requires_grad
    assert len(cache.keys()) > 40
    assert torch.isfinite(cache.tokens).all()
    with torch.no_grad():
        assert torch.equal(model(tokens()), reference), "something was left behind"
