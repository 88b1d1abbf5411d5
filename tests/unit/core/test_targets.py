"""What is explained: every target's value, position, gradient and text, on logits made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lenslrp
from lenslrp import targets
from lenslrp.batch import Batch
from lenslrp.errors import InputError
from lenslrp.logits import Outputs
from lenslrp.targets import (
    Activation,
    Contrastive,
    Custom,
    Logit,
    LogitDiff,
    LogProb,
    PerRow,
    Sequence,
    Sum,
    Top,
    as_target,
)
from tests.unit.tiny import TOKENS, VOCABULARY, tiny, word_tokenizer

BATCH, LENGTH = 3, 5
# Row 0 has no padding, row 1 is padded on the left, row 2 on the right.
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
FIRST, LAST = [0, 2, 0], [4, 4, 3]


def outputs(prompt_lengths: list[int] | None = None, **changes: Any) -> Outputs:
    generator = torch.Generator().manual_seed(7)
    size = (BATCH, LENGTH, VOCABULARY)
    logits = torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
    z = torch.randn(BATCH, LENGTH, 2, 4, generator=generator, dtype=torch.float64)
    given: dict[str, Any] = {
        "logits": logits,
        "batch": Batch.of_mask(MASK, prompt_lengths),
        "tokenizer": word_tokenizer(),
        "activation": {"z": z, "post": z.flatten(2)}.__getitem__,
    }
    return Outputs(**{**given, **changes})


def rows(out: Outputs, columns: list[int]) -> Tensor:
    return torch.stack([out.logits[row, column] for row, column in enumerate(columns)])


@pytest.mark.parametrize(
    ("position", "columns"),
    [(-1, [4, 4, 3]), (0, [0, 2, 0]), (2, [2, 4, 2]), (-3, [2, 2, 1])],
)
def test_positions_count_the_real_tokens_of_each_row(position: int, columns: list[int]) -> None:
    out = outputs()
    assert out.at(position).tolist() == columns
    assert torch.equal(Logit(5, position).values(out), rows(out, columns)[:, 5])


@pytest.mark.parametrize("position", [3, -4, 99])
def test_a_position_outside_the_shortest_row(position: int) -> None:
    message = rf"position {position} is out of range: the shortest row has 3 tokens.* -3 to 2"
    with pytest.raises(InputError, match=message):
        Logit(5, position).values(outputs())


@pytest.mark.parametrize("token", [5, "d"])
def test_logit(token: Any) -> None:
    out = outputs()
    values = Logit(token).values(out)
    assert torch.equal(values, rows(out, LAST)[:, 5])
    (gradient,) = torch.autograd.grad(values.sum(), out.logits)
    assert gradient.sum() == BATCH
    assert all(gradient[row, column, 5] == 1 for row, column in enumerate(LAST))
    assert Logit(token).text(out) == "logit of 'd' at position -1"


def test_top_and_its_text() -> None:
    out = outputs()
    best = rows(out, LAST).max(dim=1)
    assert torch.equal(Top().values(out), best.values)
    for token in best.indices.tolist():
        assert repr(out.tokenizer.decode([token])) in Top().text(out)


def test_logit_difference() -> None:
    out = outputs()
    last = rows(out, LAST)
    assert torch.equal(LogitDiff("d", 7).values(out), last[:, 5] - last[:, 7])
    assert LogitDiff("d", 7).text(out) == "logit difference 'd' - 'f' at position -1"


def test_contrastive_against_the_mean_of_the_rest() -> None:
    out = outputs()
    last = rows(out, LAST)
    others = torch.cat([last[:, :5], last[:, 6:]], dim=1)
    assert torch.allclose(Contrastive(5).values(out), last[:, 5] - others.mean(dim=1))
    assert Contrastive("d").text(out) == "logit of 'd' against the rest at position -1"


@pytest.mark.parametrize("k", [1, 4, VOCABULARY - 1])
def test_contrastive_against_the_best_others(k: int) -> None:
    out = outputs()
    last = rows(out, LAST)
    others = torch.cat([last[:, :5], last[:, 6:]], dim=1).sort(dim=1, descending=True).values
    expected = last[:, 5] - others[:, :k].mean(dim=1)
    assert torch.allclose(Contrastive(5, top_k=k).values(out), expected)
    assert f"the top {k} others" in Contrastive(5, top_k=k).text(out)


@pytest.mark.parametrize("k", [0, -1, VOCABULARY])
def test_contrastive_with_too_many_or_too_few_others(k: int) -> None:
    with pytest.raises(InputError, match=rf"top_k must be from 1 to {VOCABULARY - 1}, not {k}"):
        Contrastive(5, top_k=k).values(outputs())


def test_log_probability() -> None:
    out = outputs()
    expected = rows(out, LAST).log_softmax(dim=1)[:, 5]
    assert torch.allclose(LogProb("d").values(out), expected)
    assert LogProb("d").text(out) == "log-probability of 'd' at position -1"


@pytest.mark.parametrize("tokens", ["d e", [5, 6], (5, 6)])
def test_a_sequence_is_the_sum_over_its_tokens(tokens: Any) -> None:
    """The prompt's last token predicts the first of the span."""
    out = outputs(prompt_lengths=[4, 2, 3])
    starts = [3, 3, 2]
    logits = sum(out.logits[r, s, 5] + out.logits[r, s + 1, 6] for r, s in enumerate(starts))
    assert torch.allclose(Sequence(tokens).values(out).sum(), torch.as_tensor(logits))
    scores = out.logits.log_softmax(dim=-1)
    expected = [scores[r, s, 5] + scores[r, s + 1, 6] for r, s in enumerate(starts)]
    values = Sequence(tokens, of="log_prob").values(out)
    assert torch.allclose(values, torch.stack(expected))
    assert Sequence(tokens).text(out) == "sum of logits of the span 'd e'"
    assert "log-probabilities" in Sequence(tokens, of="log_prob").text(out)


def test_a_sequence_of_nothing_or_of_something_else() -> None:
    with pytest.raises(InputError, match="at least one token"):
        Sequence([])
    with pytest.raises(InputError, match="at least one token"):
        Sequence("")
    with pytest.raises(InputError, match="of must be 'logit' or 'log_prob', not 'prob'"):
        Sequence("d e", of="prob")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"token 99 is outside.* 0 to {VOCABULARY - 1}"):
        Sequence([3, 99]).values(outputs(prompt_lengths=[4, 2, 3]))


def test_an_activation() -> None:
    out = outputs()
    post, z = out.activation("post"), out.activation("z")
    expected = torch.stack([post[row, column, 6] for row, column in enumerate(LAST)])
    assert torch.equal(Activation("post", 6).values(out), expected)
    assert torch.equal(Activation("z", (1, 2)).values(out), expected)
    first = torch.stack([z[row, column, 0, -1] for row, column in enumerate(FIRST)])
    assert torch.equal(Activation("z", (0, -1), position=0).values(out), first)
    assert Activation("z", (1, 2)).text(out) == "activation of z[(1, 2)] at position -1"


@pytest.mark.parametrize(
    ("hook", "unit", "message"),
    [
        ("post", 8, r"unit 8 is outside post, \(8,\)"),
        ("post", (1, 2), r"post has features of shape \(8,\); unit \(1, 2\) does not pick one"),
        ("z", 3, r"z has features of shape \(2, 4\); unit 3 does not pick one"),
        ("z", (2, 0), r"unit \(2, 0\) is outside z, \(2, 4\)"),
    ],
)
def test_an_activation_unit_that_is_not_there(hook: str, unit: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Activation(hook, unit).values(outputs())


def test_a_custom_function() -> None:
    out = outputs()
    assert torch.equal(Custom(lambda x: x[:, 0, 3]).values(out), out.logits[:, 0, 3])
    total = Custom(lambda x: x.sum(), name="everything")
    assert torch.allclose(total.values(out).sum(), out.logits.sum())
    assert total.text(out) == "everything function of the logits"


@pytest.mark.parametrize(
    ("fn", "got"),
    [
        (lambda x: x[:, -1], rf"not \({BATCH}, {VOCABULARY}\)"),
        (lambda x: x[:2, 0, 0], r"not \(2,\)"),
        (lambda x: 3.0, "not float"),
        (lambda x: None, "not NoneType"),
    ],
)
def test_a_custom_function_that_returns_something_else(fn: Any, got: str) -> None:
    with pytest.raises(InputError, match=rf"shape \[{BATCH}\], one value a batch row, {got}"):
        Custom(fn).values(outputs())


def test_one_target_a_row() -> None:
    out = outputs()
    last = rows(out, LAST)
    made = as_target([5, "e", LogitDiff(3, 4)], out.tokenizer, BATCH)
    assert isinstance(made, PerRow)
    expected = torch.stack([last[0, 5], last[1, 6], last[2, 3] - last[2, 4]])
    assert torch.equal(made.values(out), expected)
    assert made.text(out).count(";") == 2
    tensor = as_target(torch.tensor([5, 6, 7]), out.tokenizer, BATCH)
    assert torch.equal(tensor.values(out), last[torch.arange(3), torch.tensor([5, 6, 7])])


def test_what_a_caller_may_give() -> None:
    tokenizer = word_tokenizer()
    assert as_target(None, tokenizer, 1) == Top()
    assert as_target(5, tokenizer, 1) == Logit(5)
    assert as_target("d", tokenizer, 1) == Logit("d")
    assert as_target("d e", tokenizer, 1) == Sequence("d e")
    assert as_target(LogProb(3), tokenizer, 1) == LogProb(3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (1.5, "target must be a token .* got float"),
        (True, "target must be a token .* got bool"),
        ({}, "target must be a token .* got dict"),
        (torch.zeros(2, 2).long(), "target must be a token .* got Tensor"),
        ("", "empty string; give at least one token"),
        ([3, 4], "2 targets for a batch of 3: give one a row"),
        ([], "0 targets for a batch of 3"),
        ([3, "d e", 4], "several tokens cannot be mixed"),
        ([[3], [4], [5]], "target"),
        (Logit, "target"),
    ],
    ids=str,
)
def test_what_a_caller_may_not_give(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_target(given, word_tokenizer(), BATCH)


def test_text_without_a_tokenizer() -> None:
    out = outputs(tokenizer=None)
    assert Logit(5).text(out) == "logit of 5 at position -1"
    with pytest.raises(InputError, match="no tokenizer: give the target as a token id"):
        Logit("d").values(out)


@pytest.mark.parametrize("token", [VOCABULARY, -1, 10_000])
@pytest.mark.parametrize("make", [Logit, LogProb, Contrastive, lambda t: LogitDiff(3, t)])
def test_a_token_outside_the_vocabulary(make: Any, token: int) -> None:
    with pytest.raises(InputError, match=rf"token {token} is outside .* 0 to {VOCABULARY - 1}"):
        make(token).values(outputs())


@pytest.mark.parametrize("make", [Logit, LogProb, Contrastive, lambda t: LogitDiff(3, t)])
def test_a_string_of_several_tokens_where_one_is_meant(make: Any) -> None:
    with pytest.raises(InputError, match=r"'d e' is 2 tokens \(\['d', ' e'\]\).*targets\.Sequence"):
        make("d e").values(outputs())


@pytest.mark.parametrize("token", [1.5, None, True])
def test_a_token_that_is_none(token: Any) -> None:
    with pytest.raises(InputError, match="token"):
        Logit(token).values(outputs())


@pytest.mark.parametrize("position", ["last", None, 1.5])
def test_a_position_that_is_no_number(position: Any) -> None:
    with pytest.raises(InputError, match="position"):
        Logit(5, position).values(outputs())


# --- on a model ----------------------------------------------------------------------------------


def explain(target: Any, **options: Any) -> lenslrp.RelevanceCache:
    model = tiny("llama", tokenizer=word_tokenizer())
    return lenslrp.run_with_relevance(model, TOKENS, target, **options)[1]


@pytest.mark.parametrize(
    "target",
    [
        Logit(5),
        Logit(5, position=2),
        LogitDiff(5, 6),
        Contrastive(5),
        Contrastive(5, top_k=3),
        LogProb(5),
        Sequence([5, 6]),
        Sequence("d e", of="log_prob"),
        Activation("blocks.1.mlp.hook_post", 3),
        Activation("blocks.1.attn.hook_z", (1, 2), position=3),
        Activation("blocks.1.hook_resid_post", 4),
        Custom(lambda logits: logits[:, -1, :3].sum(dim=-1)),
    ],
    ids=lambda target: type(target).__name__,
)
def test_the_ledger_balances_for_every_target(target: targets.Target) -> None:
    kept = explain(target)
    assert abs(kept.ledger().error) < 1e-9
    assert kept.ledger().target == pytest.approx(float(kept.target.value.sum()), rel=1e-12)


def test_a_later_position_has_no_relevance() -> None:
    kept = explain(Logit(5, position=2))
    assert kept.tokens[:, :3].abs().min() > 0
    assert not kept.tokens[:, 3:].any()


@pytest.mark.parametrize(
    ("hook", "unit"), [("blocks.1.mlp.hook_post", 3), ("blocks.0.attn.hook_z", (1, 2))]
)
def test_a_latent_unit_is_all_of_the_relevance_at_its_own_hook(hook: str, unit: Any) -> None:
    kept = explain(Activation(hook, unit))
    where = (slice(None), -1, *(unit if isinstance(unit, tuple) else (unit,)))
    assert torch.allclose(kept[hook][where], kept.target.value)
    assert torch.allclose(kept[hook].flatten(1).sum(dim=1), kept.target.value)


def test_one_latent_unit_a_row() -> None:
    hook = "blocks.0.mlp.hook_post"
    mixed = explain([Activation(hook, 3), Activation(hook, 4, position=2)])
    alone = [explain(Activation(hook, 3)), explain(Activation(hook, 4, position=2))]
    for row in range(2):
        assert torch.allclose(mixed.tokens[row], alone[row].tokens[row], rtol=1e-12)
    assert abs(mixed.ledger().error) < 1e-9


def test_latent_units_and_logits_do_not_mix() -> None:
    with pytest.raises(InputError, match="cannot mix Activation targets with"):
        explain([Activation("blocks.0.mlp.hook_post", 3), Logit(5)])


def test_a_row_may_be_explained_beyond_the_end_of_the_shortest() -> None:
    out = outputs()
    each = PerRow((Logit(5, 4), Logit(6, 2), Activation("post", 3, 3)))
    z = out.activation("post")
    assert torch.equal(
        each.values(out), torch.stack([out.logits[0, 4, 5], out.logits[1, 4, 6], z[2, 3, 3]])
    )
    with pytest.raises(InputError, match="the shortest row has 3 tokens"):
        PerRow((Logit(5), Logit(6, 3), Logit(7))).values(out)


@pytest.mark.parametrize("top_k", [True, 2.0, "3"])
def test_a_number_of_rivals_that_is_none(top_k: Any) -> None:
    with pytest.raises(InputError, match="top_k is a number of other tokens or None"):
        Contrastive(5, top_k=top_k).values(outputs())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (7, "a Sequence target is a string or token ids, not 7"),
        (None, "a Sequence target is a string or token ids, not None"),
        ([-1, 3], "token ids are integers from 0, not -1"),
        ([3, True], "token ids are integers from 0, not True"),
        ([3, 1.5], r"token ids are integers from 0, not 1\.5"),
        (["a", 3], "token ids are integers from 0, not 'a'"),
    ],
)
def test_a_span_that_is_none(tokens: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sequence(tokens)


@pytest.mark.parametrize("span", [[VOCABULARY], [3, VOCABULARY, 4]])
def test_a_span_outside_the_vocabulary(span: list[int]) -> None:
    with pytest.raises(InputError, match=f"token {VOCABULARY}, outside the vocabulary"):
        explain(Sequence(span))


def test_a_tensor_is_a_span() -> None:
    assert Sequence(torch.tensor([3, 4])).tokens == (3, 4)  # type: ignore[arg-type]


def test_complex_values_are_no_target() -> None:
    with pytest.raises(InputError, match=r"must return real numbers, not torch\.complex128"):
        Custom(lambda x: x[:, -1, 0] * 1j).values(outputs())


def test_the_label_of_a_batch_has_one_name_a_row() -> None:
    out = outputs()
    top = Top().text(out).removeprefix("top logit ").removesuffix(" at position -1")
    assert len(top.split(", ")) == BATCH
    same = as_target([5, 6, 5], out.tokenizer, BATCH).text(out).split("; ")
    assert len(same) == BATCH
    assert same[0] == same[2] != same[1]
    twice = lenslrp.run_with_relevance(tiny("llama"), TOKENS[:1].repeat(2, 1))[1].target
    names, values = str(twice).split(" at position -1 = ")
    assert len(names.split(", ")) == len(values.split(", ")) == 2


def test_a_sum_of_targets() -> None:
    out = outputs()
    total = Sum((Logit("d", 1), LogitDiff(3, 4), LogProb(2, 0)))
    values = total.values(out)
    expected = rows(out, [1, 3, 1])[:, 5]
    expected = expected + rows(out, LAST)[:, 3] - rows(out, LAST)[:, 4]
    expected = expected + rows(out, FIRST).log_softmax(dim=-1)[:, 2]
    torch.testing.assert_close(values, expected)
    assert total.columns(out).tolist() == [[1, 4, 0], [3, 4, 2], [1, 3, 0]]
    assert total.text(out).startswith("logit of 'd' at position 1 + logit difference ")
    mixed = PerRow((total, Logit(5), Sum((Logit(1, 0), Logit(1, 1)))))
    columns = mixed.columns(out)
    assert columns is not None
    assert columns.tolist() == [[1, 4, 0], [4, 4, 4], [0, 1, 1]]
    torch.testing.assert_close(mixed.values(out)[0], values[0])


@pytest.mark.parametrize(
    "wrong", [Activation("z", 0), Custom(len), Sequence([1, 2]), PerRow((Logit(1),)), 7, Logit]
)
def test_a_sum_is_of_logits_at_positions(wrong: Any) -> None:
    with pytest.raises(InputError, match="a Sum is of targets on logits at a position, not "):
        Sum((Logit(1), wrong))
    with pytest.raises(InputError, match="a Sum is of two targets or more, not "):
        Sum((Logit(1),))


def test_a_sum_can_be_weighted() -> None:
    out = outputs()
    parts = (Logit("d", 1), LogitDiff(3, 4))
    first, second = (part.values(out) for part in parts)
    torch.testing.assert_close(Sum(parts, (2.0, -0.5)).values(out), 2 * first - second / 2)
    torch.testing.assert_close(Sum(parts[:1], (3.0,)).values(out), 3 * first)
    text = Sum((Logit(1), Logit(2)), [2, -0.5]).text(outputs(tokenizer=None))
    assert text == "2 x logit of 1 at position -1 + -0.5 x logit of 2 at position -1"
    for wrong in ((1.0,), (1.0, float("nan"))):
        with pytest.raises(InputError, match="one finite number for each of its 2 targets, not"):
            Sum(parts, wrong)
