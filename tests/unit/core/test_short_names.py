"""Relevance is indexed as TransformerLens' ``ActivationCache`` is, and says what it has not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformer_lens.utilities.components_utils import get_act_name

import lenslrp
from lenslrp.errors import InputError
from tests.unit.tiny import tiny, word_tokenizer

KEYS: list[Any] = [
    ("post", 1), "post1", ("mlp_post", 0), ("z", 0), ("q", 1, "attn"), ("pattern", 1), ("attn", 1),
    ("resid_post", 1), ("attn_out", 0), "embed", ("normalized", 1, "ln2"), "blocks.0.mlp.hook_post",
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", tokenizer=word_tokenizer())


@pytest.fixture(scope="module")
def R(model: Any) -> lenslrp.RelevanceCache:
    return lenslrp.run_with_relevance(model, ["a b c d", "b c"], ["e", "f"])[1]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_short_names_are_those_of_an_activation_cache(model: Any, R: Any, key: Any) -> None:
    _, cache = model.run_with_cache("a b c d")
    (name,) = [name for name, x in cache.items() if x is cache[key]][:1]
    whole = get_act_name(key) if isinstance(key, str) else get_act_name(*key)
    assert cache[whole] is cache[name]
    if whole in R.coverage.off_path:
        with pytest.raises(InputError, match=f"{whole} is not on the path in this pass"):
            R[key]
        return
    assert R[key] is R.values[whole]
    assert key in R and whole in R


def test_a_cache_is_read_like_a_dict(R: lenslrp.RelevanceCache) -> None:
    assert dict(R.items()) == R.values and [*R] == R.keys() == [name for name, _ in R.items()]
    assert dict(R).keys() == R.values.keys()
    assert "post9" not in R and ("post", 9) not in R and "post" not in R


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("key", "message"),
    [
        (("post", 9), "no relevance was read at 'blocks.9.mlp.hook_post'; nearest: blocks.1.mlp"),
        (("post", -1), r"\('post', -1\): give the layer as a number from 0"),
        (("post", "1"), r"\('post', '1'\): give the layer as a number from 0"),
        (("post",), r"\('post',\) is no key: index with a hook name, with one in short such as"),
        (slice(0, 1), r"slice\(0, 1, None\) is no key: .*; R.rows takes slices"),
    ],
)
def test_what_is_no_name_is_refused(R: Any, key: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        R[key]


@pytest.mark.parametrize("row", [0, 1])
def test_top_at_a_position_is_the_part_of_top_there(R: lenslrp.RelevanceCache, row: int) -> None:
    everything = R.top(k=10_000, row=row)
    length = R.batch.lengths[row]
    assert length == [5, 3][row]
    for position in range(-length, length):
        there = R.top(k=10_000, row=row, position=position)
        expected = everything[everything["position"] == position % length]
        assert there.shape == expected.shape
        assert {*there.itertuples(index=False)} == {*expected.itertuples(index=False)}
        best = R.top(k=3, row=row, position=position)
        assert best.to_dict("list") == expected.head(3).to_dict("list")
    value = R["post", 1][row, R.batch.column(-1, row)]
    one = R.top(k=10_000, row=row, position=-1)
    of_layer = one[one["layer"] == 1].sort_values("neuron")["relevance"]
    assert torch.equal(torch.tensor(of_layer.to_numpy()), value)
    with pytest.raises(InputError, match=f"position {length} is out of range"):
        R.top(row=row, position=length)


def test_heads_have_a_table_of_their_own(R: lenslrp.RelevanceCache) -> None:
    with pytest.raises(InputError, match=r"features\]: R.heads\(\) has the relevance of heads"):
        R.top("attn.hook_z")
