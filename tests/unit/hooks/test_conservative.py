"""Where the checks give way, and where they must not: each condition of theirs taken by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lenslrp
from lenslrp.hooks.leaf_modules import embeddings
from lenslrp.hooks.rule_types import Identity
from lenslrp.hooks.sites import Site
from lenslrp.hooks.structure import components
from lenslrp.leaves import Leaves
from lenslrp.passes import Pass
from lenslrp.reductions import OverFeatures
from lenslrp.views.heatmap import token_heatmap
from tests.conformance import zoo
from tests.unit.tiny import TOKENS, tiny, word_tokenizer


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
        batch=SimpleNamespace(media={"pixel_values": 1} if media else {}),  # type: ignore[arg-type]
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


def test_a_table_of_embeddings_is_known_by_its_weights() -> None:
    model = tiny("gpt2")
    weight = model.embed.original_component.weight
    stranger, copied = nn.Embedding(*weight.shape), nn.Embedding(*weight.shape)
    copied.weight = nn.Parameter(weight.detach().clone())
    parts = [*components(model), ("stranger", stranger), ("copied", copied)]
    leaves = [module for module, _ in embeddings(parts)]
    assert copied in leaves
    assert stranger not in leaves


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_are_padded_on_their_tokenizers_side(side: str) -> None:
    model = tiny("llama", tokenizer=word_tokenizer()).float()
    model.tokenizer.padding_side = side
    _, R = lenslrp.run_with_relevance(model, ["a b c", "d"], 5, names_filter=[])
    padded = (~R.attention_mask[1]).nonzero().flatten().tolist()
    assert padded == ([0, 1] if side == "left" else [2, 3])


def test_a_decoder_is_given_all_of_a_span_but_its_last_token() -> None:
    model = zoo.build("T5ForConditionalGeneration")
    span = lenslrp.targets.Sequence([3, 4, 6])
    _, R = lenslrp.run_with_relevance(model, torch.tensor([[5, 7, 9]]), span, names_filter=[])
    assert R.decoder_tokens is not None
    assert R.decoder_tokens.shape == (1, 3)


def test_a_sum_is_over_the_features() -> None:
    relevance = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(OverFeatures()(relevance), relevance.sum(dim=2))


def test_a_heatmap_without_a_title_has_no_heading() -> None:
    assert "font-weight:600" not in token_heatmap(["a"], [1.0])
    assert "font-weight:600" in token_heatmap(["a"], [1.0], title="t")
