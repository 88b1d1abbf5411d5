"""Where the checks give way, and where they must not: each condition of theirs taken by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lenslrp
from lenslrp.hooks.rules import Identity
from lenslrp.hooks.sites import Site
from lenslrp.leaves import Leaves
from lenslrp.passes import Pass
from tests.unit.tiny import TOKENS, tiny


class Floored(nn.Module):
    """A maximum of two branches that both depend on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, x - 1)


def test_a_maximum_of_two_branches_is_no_floor() -> None:
    """Masked scores are kept from falling below a constant; that alone is linear."""
    model = tiny("llama")
    model.blocks[1].mlp.original_component.act_fn = Floored()
    with pytest.raises(lenslrp.CoverageError, match="Maximum"):
        lenslrp.run_with_relevance(model, TOKENS, 5)
    named = lenslrp.AttnLRP().extended({Floored: Identity()})
    _, R = lenslrp.run_with_relevance(model, TOKENS, 5, named)
    assert abs(R.ledger().error) < 1e-9


TOWER = "vision_encoder.encoder_layers"


def above(*, media: bool = True, text: bool = True, tower: str = TOWER, order: int = 9) -> bool:
    """Whether a site that ran as the ``order``-th is above the features that are taken, at 5."""
    sites = [
        Site(f"{tower}.{n}.hook", "Linear", "linear", Identity(), n, order=at)
        for n, at in enumerate((5, order))
    ]
    run: Any = Pass(
        model=None,
        rules=SimpleNamespace(sites=sites),  # type: ignore[arg-type]
        readers=None,  # type: ignore[arg-type]
        leaves=Leaves(tokens=[torch.ones(1)] if text else []),
        prepared=SimpleNamespace(media={"pixel_values": 1} if media else {}),  # type: ignore[arg-type]
        books=None,
        strict=True,
    )
    return bool(run._above_features(sites[1], {id(sites[0])}))


def test_only_a_tower_beside_a_text_may_end_above_its_features() -> None:
    assert above()
    assert not above(order=4)  # cut: it ran before something that is on the path
    assert not above(media=False)
    assert not above(text=False)
    assert not above(tower="blocks")
    assert not above(media=False, text=False)
    assert not above(tower="decoder_blocks", media=False)
