"""The report's predictions and interventions, beside hooks put on by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lenslrp
from lenslrp import targets
from lenslrp.analysis.views import checks
from lenslrp.analysis.views.checks import checked
from lenslrp.analysis.views.report import report_html
from lenslrp.errors import InputError
from tests.unit.tiny import tiny, word_tokenizer

PROMPT = "a b c d e f"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", tokenizer=word_tokenizer())


@pytest.mark.parametrize("position", [-1, 3])
@pytest.mark.parametrize("row", [0, 1])
def test_every_number_is_what_hooks_by_hand_give(
    model: Any, row: int, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "REPLACEMENTS", ("a", "t"))  # "a" is in the prompt
    prompts = ["g h", PROMPT] if row else [PROMPT, "g h"]
    both = [targets.Top(), targets.Logit("h", position)]
    target = both if row else both[::-1]
    _, R = lenslrp.run_with_relevance(model, prompts, target)
    found = checked(model, R, row)
    token = model.tokenizer.encode("h", add_special_tokens=False)[0]
    tokens = R.token_ids[row : row + 1, R.attention_mask[row]]

    def probability(ids: Any = tokens, hooks: Any = ()) -> float:
        with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
            return float(model(ids)[0, position].softmax(-1)[token])

    plain = model(tokens).detach()[0, position].softmax(-1)
    assert found.probability == pytest.approx(float(plain[token]), rel=1e-5)
    assert found.rank == int((plain > plain[token]).sum()) + 1
    assert [p for _, p in found.predictions] == pytest.approx(plain.topk(5).values.tolist())
    head, word = found.trials
    for what, after in ((head.what, head.after), (head.control, head.control_after)):
        layer, index = map(int, what.split()[1].split("."))

        def off(x: Any, hook: Any, index: int = index) -> Any:
            x = x.clone()
            x[:, :, index] = 0
            return x

        name = f"blocks.{layer}.attn.hook_z"
        assert probability(hooks=[(name, off)]) == pytest.approx(after, rel=1e-4)
    layer, index = map(int, head.what.split()[1].split("."))
    heads = R.heads(row)
    assert float(heads.loc[layer, index]) == pytest.approx(float(heads.max().max()))
    free = {
        text: float(value)
        for p, (text, value) in enumerate(zip(PROMPT.split(), R[row].tokens[0, 1:], strict=True), 1)
        if p != position % 7
    }
    assert word.what.split("'")[1].strip() == max(free, key=free.__getitem__)
    for what, after in ((word.what, word.after), (word.control, word.control_after)):
        old, new = (
            model.tokenizer.encode(text.strip(), add_special_tokens=False)[0]
            for text in (what.split("'")[1], what.split("'")[3])
        )
        assert probability(torch.where(tokens == old, new, tokens)) == pytest.approx(
            after, rel=1e-4
        )
    for shown in found.heads:
        assert sum(share for _, share in shown.attends) <= 1 + 1e-5


def test_what_cannot_be_checked_is_said(model: Any) -> None:
    _, R = lenslrp.run_with_relevance(model, PROMPT, targets.Sequence("g h"))
    with pytest.raises(InputError, match="the target is about no single token"):
        checked(model, R)
    assert "the target is about no single token" in report_html(R, model=model)
    _, R = lenslrp.run_with_relevance(model, PROMPT, "g")
    assert "it takes the model; give model= to write_report." in report_html(R)


def test_without_heads_or_free_tokens_there_is_less_to_try(model: Any) -> None:
    _, R = lenslrp.run_with_relevance(model, "a b", "g", names_filter=[])
    found = checked(model, R)
    assert found.trials == () and found.heads == ()
    assert found.rank >= 1


def test_the_report_shows_them_escaped(model: Any) -> None:
    _, R = lenslrp.run_with_relevance(model, PROMPT, "g")
    page = report_html(R, model=model)
    assert "Is it so?" in page and "attends to" in page
    assert R.ledger().sentence in page
