"""Clean and corrupt prompts: from texts, from templates, and what cannot be a pair."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from lenslrp import InputError
from lenslrp.analysis.circuits.pairs import TEMPLATES, Pairs, template_pairs
from tests.unit.tiny import tiny, word_tokenizer


def bridge() -> Any:
    return tiny("llama", tokenizer=word_tokenizer())


def speaker(*missing: str) -> Any:
    """As much of a model as pairs need, with every word of the templates a token but ``missing``,
    which is two."""
    texts = [r[k] for make, _ in TEMPLATES.values() for r in make() for k in ("text", "answer")]
    words = sorted({word for text in texts for word in text.split()} - set(missing))
    core = Tokenizer(models.WordPiece({w: i for i, w in enumerate([*words, "M", "##ary", "?"])},
                                      unk_token="?"))  # fmt: skip
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")

    cfg = SimpleNamespace(
        d_vocab=len(tokenizer), default_prepend_bos=False, tokenizer_prepends_bos=False
    )
    return SimpleNamespace(tokenizer=tokenizer, cfg=cfg, original_model=None)


def test_pairs_from_texts() -> None:
    pairs = Pairs.from_texts(
        bridge(), ["a b c", "b d"], ["a a c", "c d"], [" d", "a"], ["e", 5], prepend_bos=False
    )
    assert pairs.clean.tolist() == [[2, 3, 4], [3, 5, 0]]
    assert pairs.corrupt.tolist() == [[2, 2, 4], [4, 5, 0]]
    assert pairs.mask.tolist() == [[True] * 3, [True, True, False]]
    assert (pairs.answers.tolist(), pairs.rivals.tolist()) == ([5, 2], [6, 5])
    assert len(pairs) == 2
    assert pairs[1:].clean.tolist() == [[3, 5]]


def test_the_gap_is_read_at_the_last_token_of_each_row() -> None:
    pairs = Pairs.from_texts(
        bridge(), ["a b c", "b d"], ["a a c", "c d"], ["d", "a"], ["e", "d"], prepend_bos=False
    )
    logits = torch.randn(2, 3, 23)
    expected = torch.stack([logits[0, 2, 5] - logits[0, 2, 6], logits[1, 1, 2] - logits[1, 1, 5]])
    assert torch.equal(pairs.gap(logits), expected)
    last = torch.stack([logits[0, 2], logits[1, 1]])[:, None]
    assert torch.equal(pairs.gap(last), expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((["a b"], ["a"], ["d"], ["e"]), r"pair 0: the prompts have 2 and 1 tokens"),
        ((["a b"], ["a b"], ["d"], ["e"]), r"pair 0: the two prompts are the same: 'a b'"),
        ((["a b"], ["a c"], ["d e"], ["e"]), r"'d e' is 2 tokens"),
        ((["a b"], ["a c"], ["d"], []), r"got \[1, 1, 1, 0\] prompts, answers and rivals"),
        (("a b", "a c", "d", "e"), r"are lists, not one text: \['a b'\]"),
        (([], [], [], []), r"got \[0, 0, 0, 0\]"),
    ],
)
def test_what_is_no_pair(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Pairs.from_texts(bridge(), *given, prepend_bos=False)


@pytest.mark.parametrize("task", list(TEMPLATES))
def test_templates_make_pairs_that_differ_in_one_word(task: str) -> None:
    pairs = template_pairs(speaker(), task, 40)
    assert ((pairs.clean != pairs.corrupt).sum(dim=1) == 1).all()
    again = template_pairs(speaker(), task, 40)
    assert torch.equal(pairs.clean, again.clean)
    assert not torch.equal(pairs.answers, template_pairs(speaker(), task, 40, seed=1).answers)


def test_an_indirect_object_calls_for_the_other_name_when_the_repeated_one_changes() -> None:
    model = speaker()
    pairs = template_pairs(model, "indirect_object", 1)
    words = [model.tokenizer.decode(row).split() for row in (pairs.clean[0], pairs.corrupt[0])]
    answer, rival = (model.tokenizer.decode([int(i)]) for i in (pairs.answers[0], pairs.rivals[0]))
    at = next(i for i, (a, b) in enumerate(zip(*words, strict=True)) if a != b)
    assert (words[0][at], words[1][at]) == (rival, answer)


def test_only_words_of_one_token_are_used() -> None:
    whole = template_pairs(speaker(), "indirect_object", 20, seed=3)
    names = speaker("Mary").tokenizer.get_vocab()
    pairs = template_pairs(speaker("Mary"), "indirect_object", 200, seed=3)
    assert len(whole) == 20
    assert names["M"] not in pairs.clean
    with pytest.raises(InputError, match=r"indirect_object has \d+ pairs of single-token"):
        template_pairs(speaker(), "indirect_object", 9999)
    with pytest.raises(InputError, match="task must be one of indirect_object, agreement"):
        template_pairs(speaker(), "greater_than", 1)


def test_an_encoder_decoder_has_no_pairs() -> None:
    config = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=True))
    with pytest.raises(InputError, match="pairs are for decoders"):
        Pairs.from_texts(SimpleNamespace(original_model=config), ["a"], ["b"], ["c"], ["d"])


def test_an_answer_that_is_the_rival() -> None:
    given = (["a b", "a d"], ["a c", "a e"], ["d", "e"], ["b", "e"])
    with pytest.raises(InputError, match="pair 1: 'e' is both the answer and the incorrect one"):
        Pairs.from_texts(bridge(), *given, prepend_bos=False)
