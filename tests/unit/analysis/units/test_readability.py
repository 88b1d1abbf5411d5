"""Which lists of tokens are readable: against planted groups, and rows compared one by one."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pandas as pd
import pytest
import torch

import lenslrp
from lenslrp.analysis import Neuron, writes
from lenslrp.analysis.units import readability as module
from lenslrp.analysis.units.readability import (
    READ_TOKENS,
    TokenRelations,
    TokenRows,
    is_readable,
    readable_tokens,
    with_status,
)
from lenslrp.errors import InputError
from tests.conformance import zoo
from tests.unit.tiny import WORDS, tiny, word_tokenizer

FOUR, PAIR, OTHER_PAIR, SHORT = [3, 60, 150, 290], [20, 21], [40, 41], [7, 8]


def rows() -> torch.Tensor:
    """300 rows of 200 values: two loud directions that all share, four alike, two pairs, two short.

    The loud directions relate all rows until they are taken out.
    """
    draw = torch.Generator().manual_seed(0)
    made = torch.randn(300, 200, generator=draw)
    made += 40 * torch.randn(300, 2, generator=draw) @ torch.randn(2, 200, generator=draw)
    for group in (FOUR, PAIR, OTHER_PAIR):
        made[group] = made[group] + 3 * torch.randn(200, generator=draw)
    made[SHORT] = made.mean(dim=0) + 0.001 * torch.randn(2, 200, generator=draw)
    return made


@pytest.fixture(scope="module")
def model() -> Any:
    """Whose unembedding has those rows."""
    bridge = tiny("llama", hidden_size=200, vocab_size=300)
    bridge.original_model.lm_head.weight.data.copy_(rows())
    bridge.original_model.model.norm.weight.data.fill_(1)
    return bridge


@pytest.fixture(scope="module")
def relations(model: Any) -> TokenRelations:
    return TokenRelations.of(model, "writes")


def listed(*groups: list[int]) -> list[int]:
    """Ten tokens, those of the groups first."""
    planted = [token for group in groups for token in group]
    return [*planted, *range(200, 200 + READ_TOKENS - len(planted))]


def test_a_planted_group_is_found_and_two_pairs_are_no_meaning(relations: TokenRelations) -> None:
    lists = torch.tensor([listed(FOUR), listed(PAIR, OTHER_PAIR), listed(FOUR[:3]), listed()])
    judged = relations.judged(lists)
    assert judged.related.int().sum(dim=1).tolist() == [4, 2, 3, 0]
    assert judged.related[0].tolist() == [True] * 4 + [False] * 6
    assert judged.related[1, :2].tolist() == [True, True]  # of equal groups the better tokens'
    assert judged.readable.tolist() == [True, False, False, False]


def test_relations_are_cosines_without_mean_and_first_components(
    relations: TokenRelations,
) -> None:
    """In float64, pair by pair: all rows are in the sample, which is why they agree."""
    given = rows().double()
    centred = given - given.mean(dim=0)
    left, _, right = torch.linalg.svd(centred, full_matrices=False)
    assert len(left) == 300
    centred = centred - (centred @ right[:2].T) @ right[:2]  # 200 / 100

    def cosine(a: int, b: int) -> float:
        return float(torch.cosine_similarity(centred[a], centred[b], dim=0))

    every = sorted(cosine(a, b) for a, b in combinations(range(300), 2))
    torch.testing.assert_close(relations.cosines, torch.tensor(every).float(), rtol=0, atol=1e-4)
    limit = every[int((1 - 0.01 / 45) * len(every))]
    for tokens in (listed(FOUR), listed(PAIR, OTHER_PAIR), listed(FOUR[:3], PAIR)):
        pairs = [(a, b) for a, b in combinations(tokens, 2) if cosine(a, b) > limit]
        groups = [{a} | {b for pair in pairs if a in pair for b in pair} for a in tokens]
        largest = max(groups, key=len)
        (found,) = relations.judged(torch.tensor([tokens])).related
        assert {t for t, r in zip(tokens, found.tolist(), strict=True) if r} == largest


def test_hardly_trained_tokens_are_junk_and_related_to_nothing(relations: TokenRelations) -> None:
    assert relations.junk.nonzero()[:, 0].tolist() == SHORT
    judged = relations.judged(torch.tensor([listed(SHORT, FOUR)]))
    assert judged.status[0].tolist() == [2, 2, 0, 0, 0, 0, 1, 1, 1, 1]


def test_special_tokens_and_bytes_are_junk(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = tiny("llama", tokenizer=word_tokenizer())
    junk = TokenRelations.of(bridge).junk
    assert [WORDS[i] for i in junk.nonzero()[:, 0].tolist()] == ["<s>", "</s>"]
    monkeypatch.setattr(module.Speller, "token", lambda _, token: "⟨0xE6⟩" if token == 5 else "x")
    assert TokenRelations.of(bridge).junk.nonzero()[:, 0].tolist() == [0, 1, 5]


def test_what_a_unit_writes_is_told_where_it_is_readable(
    model: Any, relations: TokenRelations
) -> None:
    down = model.original_model.model.layers[1].mlp.down_proj.weight.data
    weights = rows()
    direction = weights[FOUR].mean(dim=0) - weights.mean(dim=0)
    shared = TokenRows.of(weights, torch.arange(300)).components
    down[:, 3] = (direction - shared @ (shared.T @ direction)).to(down)
    scores = writes(model, Neuron(1, 3))
    best = [f"[{token}]" for token in scores.scores.topk(4).indices.tolist()]
    assert sorted(best) == sorted(f"[{token}]" for token in FOUR)
    assert readable_tokens(relations, scores) == best
    assert readable_tokens(relations, scores, 2) == best[:2]
    assert lenslrp.analysis.neuron_writes(model, 1, 3, 2, relations) == best[:2]
    frame = with_status(relations, scores.top(10))
    assert list(frame["status"]) == ["related"] * 4 + ["unrelated"] * 6
    assert is_readable(frame)
    assert not is_readable(frame.iloc[1:])  # 3 of 9
    assert readable_tokens(relations, writes(model, Neuron(0, 0))) == []
    assert lenslrp.analysis.neuron_writes(model, 0, 0, relations=relations) == []


def test_small_and_odd_vocabularies_are_judged_too() -> None:
    relations = TokenRelations.of(tiny("llama"), "reads")
    assert relations.rows.components.shape[1] == 0
    judged = relations.judged(torch.tensor([[4], [5]]))
    assert judged.related.tolist() == [[False], [False]]
    assert not is_readable(pd.DataFrame({"status": ["junk", "unrelated"]}))


def test_what_has_no_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="role is writes or reads, not 'out'"):
        TokenRelations.of(tiny("llama"), "out")
    with pytest.raises(
        InputError, match="ViTForImageClassification unembeds classes: no list is to be judged"
    ):
        TokenRelations.of(zoo.build("ViTForImageClassification"))
