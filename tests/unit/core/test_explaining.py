"""Many prompts: order, batches, windows and errors of ``explain``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

import lenslrp
from lenslrp.explaining import Batches, QueuedPrompt, explain, input_windows
from lenslrp.targets import Activation, Custom, LogitDiff, LogProb, Sequence
from tests.conformance import zoo
from tests.unit.tiny import tiny, word_tokenizer

CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}
LETTERS = "abcdefghijklmnopqrstu"


def texts(n: int, seed: int = 0) -> list[str]:
    """Prompts of 1 to 12 words, in no order of length."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 13, (n,), generator=generator).tolist()
    words = torch.randint(0, len(LETTERS), (n, 12), generator=generator).tolist()
    return [
        " ".join(LETTERS[i] for i in row[:size]) for row, size in zip(words, sizes, strict=True)
    ]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", tokenizer=word_tokenizer())


@pytest.fixture
def session(model: Any) -> Iterator[lenslrp.Session]:
    with lenslrp.session(model, ledger=False) as opened:
        yield opened


class Spy:
    """Hands batches on and remembers what was in them."""

    def __init__(self, session: lenslrp.Session) -> None:
        self.session = session
        self.batches: list[list[str]] = []

    def __call__(self, given: Any, target: Any, mask: Any) -> lenslrp.RelevanceCache:
        self.batches.append(given if isinstance(given, list) else given.tolist())
        return self.session.run_with_relevance(given, target, [], attention_mask=mask)[1]


def alike(found: list[lenslrp.RelevanceCache], model: Any, prompts: Any, targets: Any) -> None:
    """Every cache is that of a call of its own."""
    assert len(found) == len(prompts)
    for R, prompt, target in zip(found, prompts, targets, strict=True):
        given = torch.tensor([prompt]) if isinstance(prompt, list) else prompt
        _, alone = lenslrp.run_with_relevance(model, given, target, names_filter=[])
        assert R.str_tokens == alone.str_tokens
        assert R.prompts == alone.prompts
        assert R.target.text == alone.target.text
        torch.testing.assert_close(R.target.value, alone.target.value, **CLOSE)
        torch.testing.assert_close(R.tokens, alone.tokens, **CLOSE)


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_every_prompt_is_what_it_is_alone(session: Any, model: Any, batch_size: Any) -> None:
    prompts = texts(11)
    found = list(session.explain(prompts, batch_size=batch_size))
    alike(found, model, prompts, [None] * 11)
    assert all(R.tokens.shape == (1, len(R.str_tokens[0])) for R in found)


def test_padding_on_the_left() -> None:
    model = tiny("gpt2", tokenizer=word_tokenizer()).float()
    model.tokenizer.padding_side = "left"
    prompts = texts(7)
    with lenslrp.session(model) as session:
        for R, prompt in zip(session.explain(prompts, 5, batch_size=4), prompts, strict=True):
            _, alone = lenslrp.run_with_relevance(model, prompt, 5, names_filter=[])
            torch.testing.assert_close(R.tokens, alone.tokens, rtol=2e-4, atol=2e-4)
            torch.testing.assert_close(R.positions, alone.positions, rtol=2e-4, atol=2e-4)


def test_targets_one_for_each(session: Any, model: Any) -> None:
    prompts = texts(9)
    hook = "blocks.0.mlp.hook_post"
    wanted = [
        5, "b", LogitDiff(3, 4), Sequence("a b"), None, Activation(hook, 2), "a b c",
        Custom(lambda logits: logits[:, -1, :3].sum(1), "three"), LogProb(6),
    ]  # fmt: skip
    alike(list(session.explain(prompts, iter(wanted))), model, prompts, wanted)


def test_prompts_with_one_span_share_a_batch(session: Any, model: Any) -> None:
    spy = Spy(session)
    prompts = ["a", "b", "c", "d"]
    wanted = ["e f", 5, "e f", "g h"]
    alike(list(explain(spy, model, prompts, wanted)), model, prompts, wanted)
    assert spy.batches == [["a", "c"], ["b"], ["d"]]


def test_a_function_of_the_logits_sees_no_padding(session: Any, model: Any) -> None:
    spy = Spy(session)
    last = Custom(lambda logits: logits[:, -1, 5], "last")
    prompts = ["a b", "c", "d e", "f"]
    alike(list(explain(spy, model, prompts, last)), model, prompts, [last] * 4)
    assert spy.batches == [["a b", "d e"], ["c", "f"]]


def test_ids_and_texts_and_conversations(model: Any) -> None:
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} z{% endfor %}"
    prompts = ["a b", [3, 4, 5, 6], torch.tensor([7, 8]), [{"role": "user", "content": "c d"}]]
    with lenslrp.session(model) as session:
        found = list(session.explain(prompts, 5))
    model.tokenizer.chat_template = None
    ids = [R.token_ids[0].tolist() for R in found]
    assert ids == [[0, 2, 3], [3, 4, 5, 6], [7, 8], [4, 5, 0]]
    alike(found, model, ["a b", *ids[1:]], [5] * 4)


def test_an_encoder_decoder() -> None:
    model = zoo.build("T5ForConditionalGeneration")
    prompts = [[5, 7, 9, 4], [6, 8], [4, 4, 3]]
    with lenslrp.session(model) as session:
        found = list(session.explain(prompts, [3, 4, 5]))
    for R, prompt, target in zip(found, prompts, (3, 4, 5), strict=True):
        _, alone = lenslrp.run_with_relevance(
            model, torch.tensor([prompt]), target, names_filter=[]
        )
        torch.testing.assert_close(R.tokens, alone.tokens, **CLOSE)
        torch.testing.assert_close(R.decoder_tokens, alone.decoder_tokens, **CLOSE)


def test_hook_points_are_read_where_they_are_asked_for(session: Any, model: Any) -> None:
    prompts = texts(5)
    hooks = ["hook_resid_mid", "attn.hook_pattern"]
    for R, prompt in zip(session.explain(prompts, 5, names_filter=hooks), prompts, strict=True):
        _, alone = lenslrp.run_with_relevance(model, prompt, 5, names_filter=hooks)
        assert R.keys() == alone.keys()
        for name in R:
            torch.testing.assert_close(R[name], alone[name], **CLOSE)


def test_batches_are_of_like_length_and_the_first_prompt_is_in_the_first(
    session: Any, model: Any
) -> None:
    spy = Spy(session)
    prompts = texts(12)
    found = list(explain(spy, model, prompts, batch_size=4))
    assert [R.prompts[0] for R in found] == prompts
    lengths = sorted(len(prompt.split()) for prompt in prompts)
    cut = [lengths[i : i + 4] for i in range(0, 12, 4)]
    assert sorted(sorted(len(p.split()) for p in batch) for batch in spy.batches) == cut
    first = [min(prompts.index(prompt) for prompt in batch) for batch in spy.batches]
    assert first[0] == 0 and first == sorted(first)


def prompt(index: int, length: int, together: Any = None) -> QueuedPrompt:
    return QueuedPrompt(index, [2] * length, None, length, together)


def cut(batches: Batches, *lengths: int) -> list[list[int]]:
    prompts = [prompt(i, length) for i, length in enumerate(lengths)]
    return [[p.length for p in batch] for batch in batches.cut(prompts)]


def test_batches_go_by_tokens_with_their_padding() -> None:
    assert cut(Batches(None, 12), 6, 3, 3, 5, 7, 20) == [[5, 6], [3, 3], [7], [20]]
    assert cut(Batches(None, 12), 4, 4, 4, 4) == [[4, 4, 4], [4]]
    assert cut(Batches(2, 12), 20, 3, 30) == [[3, 20], [30]]


def test_inputs_are_read_as_they_are_needed(session: Any) -> None:
    read = []

    def endless() -> Iterator[str]:
        for text in iter(partial(texts, 1), None):
            read.append(text)
            yield text[0]

    found = session.explain(endless(), 5, window=6)
    assert not read
    next(found)
    assert len(read) == 6
    for _ in range(6):
        next(found)
    assert len(read) == 12


def test_windows_do_not_depend_on_each_other(session: Any, model: Any) -> None:
    """What shares a batch is decided inside a window: its caches are equal to the bit."""
    prompts = texts(16)
    whole = list(session.explain(prompts, 5, window=8))
    second = list(session.explain(prompts[8:], 5, window=8))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(whole[8:], second, strict=True))


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (["a", "", "b"], None, "input 1: it is an empty prompt"),
        (["a", [3, 99]], None, "input 1: it has token 99, outside the vocabulary"),
        (["a", 7], None, "input 1: a prompt is a string or token ids, not int"),
        (["a", [[3], [4]]], None, r"input 1: one prompt is one row of token ids, not \[2, 1\]"),
        (["a", "b"], [5, 99], "input 1: .*99"),
        (["a", "b c", "d e"], [LogitDiff(3, 4, 2)] * 3, "input 0: position 2 is out of range"),
        (["a", "b"], [5, {}], "input 1: target must be a token"),
        (["a", "b", "c"], [5, 6], "more inputs than targets: only 2"),
        (["a"], [5, 6], "more targets than inputs: only 1"),
        ("a b c", None, "inputs are many prompts, such as a list; got str"),
        (3, None, "inputs are many prompts, such as a list; got int"),
    ],
)
def test_what_cannot_be_explained_is_named(
    session: Any, inputs: Any, targets: Any, message: str
) -> None:
    with pytest.raises(lenslrp.InputError, match=message):
        list(session.explain(inputs, targets))


def test_a_prompt_that_is_too_long_is_named_and_the_others_of_its_batch_are_given() -> None:
    model = tiny("gpt2", tokenizer=word_tokenizer())
    with lenslrp.session(model) as session:
        found = session.explain(["a b", "b " * 40, "c"], batch_size=3)
        assert next(found).prompts == ["a b"]
        message = "input 1: 41 tokens, but the model has positions for 32"
        with pytest.raises(lenslrp.InputError, match=message):
            next(found)


def test_prompts_before_a_bad_one_are_given_first(session: Any) -> None:
    found = session.explain(["a b", "c", ""], 5)
    assert [next(found).prompts, next(found).prompts] == [["a b"], ["c"]]
    with pytest.raises(lenslrp.InputError, match="input 2"):
        next(found)


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_a_batch_size_that_is_none(session: Any, size: Any) -> None:
    with pytest.raises(
        lenslrp.InputError, match="batch_size is a number of prompts from 1 or None"
    ):
        list(session.explain(["a"], batch_size=size))


def test_numbers_go_on_across_windows() -> None:
    assert list(input_windows(iter("abc"), [1, 2, 3], 2)) == [
        [(0, "a", 1), (1, "b", 2)], [(2, "c", 3)]
    ]  # fmt: skip
