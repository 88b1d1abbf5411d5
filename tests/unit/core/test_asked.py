"""Which token a target asked for; a forgotten space is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lenslrp
from lenslrp import targets
from lenslrp.cache import RelevanceCache
from tests.unit.tiny import tiny, word_tokenizer


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", tokenizer=word_tokenizer())


def test_what_was_asked_is_known_in_each_row(model: Any, tmp_path: Path) -> None:
    g, h = (model.tokenizer.encode(t, add_special_tokens=False)[0] for t in "gh")
    for target, expected in (
        ("g", ((-1, g),) * 2),
        (targets.LogitDiff("h", "g", position=1), ((1, h),) * 2),
        (targets.LogProb("h"), ((-1, h),) * 2),
        (targets.Contrastive("g", top_k=2), ((-1, g),) * 2),
        (["g", targets.Logit("h", 0)], ((-1, g), (0, h))),
        (targets.Sequence("g h"), ()),
        (targets.Activation("blocks.0.hook_resid_post", 1), ()),
    ):
        _, R = lenslrp.run_with_relevance(model, ["a b c", "d e f"], target)
        assert R.target.asked == expected
        if expected:
            assert R[1].target.asked == expected[1:]
    assert RelevanceCache.load(R.save(tmp_path / "R.safetensors")).target.asked == R.target.asked
    logits, R = lenslrp.run_with_relevance(model, ["a b c", "d e f"])
    assert R.target.asked == tuple((-1, i) for i in logits[:, -1].argmax(-1).tolist())
    assert (R - R).target.asked == ()


@pytest.mark.parametrize("several", [False, True])
def test_a_forgotten_space_is_said(several: bool) -> None:
    model = lenslrp.load("smollm2-135m")
    prompt = "The capital of France is"
    said = (
        r"the token 'Paris' has rank [\d,]+ there, and ' Paris', with a space before it, rank 1: "
        r"did you mean ' Paris'\?"
    )
    prompts, target = ([prompt] * 2, [" Paris", "Paris"]) if several else (prompt, "Paris")
    with pytest.warns(UserWarning, match=said):
        lenslrp.run_with_relevance(model, prompts, target, names_filter=[])


@pytest.mark.parametrize("target", [" Paris", "!", "Oxford", targets.Logit(" Rome")])
def test_nothing_is_said_of_tokens_with_a_space_or_of_unlikely_ones(target: Any) -> None:
    model = lenslrp.load("smollm2-135m")
    lenslrp.run_with_relevance(model, "The capital of France is", target, names_filter=[])
