"""Names for units: the split is disjoint, the scores are right, providers are judged alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

import lenslrp
from lenslrp.analysis.dictionary.naming.names import (
    NamingExample,
    Provider,
    area_under_roc,
    name_unit,
)
from lenslrp.analysis.dictionary.naming.providers import LanguageModel, TokenRule
from tests.unit.tiny import tiny, word_tokenizer


def fruit(i: int) -> NamingExample:
    word = [" apple", " pear", " plum"][i % 3]
    return NamingExample(("I", " ate", f" {i}", word, "s"), (0.0, 0.1, 0.0, 2.0 + i, 0.2))


def plain(i: int) -> NamingExample:
    return NamingExample(("The", " train", f" {i}", " is", " late"), (0.0,) * 5)


FRUITS, OTHERS = [fruit(i) for i in range(12)], [plain(i) for i in range(9)]


@dataclass
class Oracle:
    """Knows the answer, and remembers what it was shown."""

    name: str = "oracle"
    seen: list[str] = field(default_factory=list)
    judged: list[str] = field(default_factory=list)

    def explain(self, examples: Sequence[NamingExample], writes: Sequence[str]) -> str:
        self.seen = [e.text for e in examples]
        return "fruit"

    def detect(self, explanation: str, texts: Sequence[str]) -> list[float]:
        self.judged = list(texts)
        return [float("I ate" in text) for text in texts]

    def fuzz(self, explanation: str, marked: Sequence[str]) -> list[float]:
        return [float(any(f"<< {f}>>" in t for f in ("apple", "pear", "plum"))) for t in marked]


def test_examples_for_scoring_were_not_shown() -> None:
    provider = Oracle()
    assert isinstance(provider, Provider)
    name = name_unit(provider, FRUITS, OTHERS)
    assert len(provider.seen) == 6
    assert not set(provider.seen) & set(provider.judged)
    assert name.detection.area == name.fuzzing.area == 1.0
    assert (name.detection.n, name.fuzzing.n) == (6 + 9, 12)
    assert name.explanation == "fruit"


def test_a_provider_that_guesses_is_at_chance() -> None:
    class Constant(Oracle):
        def detect(self, explanation: str, texts: Sequence[str]) -> list[float]:
            return [0.5] * len(texts)

        def fuzz(self, explanation: str, marked: Sequence[str]) -> list[float]:
            return [0.5] * len(marked)

    name = name_unit(Constant(), FRUITS, OTHERS)
    assert name.detection.area == name.fuzzing.area == 0.5
    assert name.detection.low <= 0.5 <= name.detection.high


def test_the_token_rule_finds_the_words() -> None:
    name = name_unit(TokenRule(), FRUITS, OTHERS, seed=3)
    assert {"apple", "pear", "plum"} & set(name.explanation.removeprefix("fires on: ").split("; "))
    assert name.detection.area > 0.9
    assert name.fuzzing.area > 0.9
    assert "(" in str(name.detection)
    again = name_unit(TokenRule(), FRUITS, OTHERS, seed=3)
    assert again == name


def test_area_under_roc() -> None:
    assert area_under_roc([3, 2, 1], [True, True, False]) == 1
    assert area_under_roc([1, 2], [True, False]) == 0
    assert area_under_roc([1, 1, 1, 0], [True, False, True, False]) == 0.75


def test_marks_and_peaks() -> None:
    example = fruit(0)
    assert example.peaks() == [3]
    assert example.marked([3]) == "I ate 0<< apple>>s"
    assert NamingExample(("a", "b"), (-3.0, 1.0)).peaks() == [0]  # a unit that fires negatively
    assert NamingExample(("a",), (0.0,)).peaks() == []


def test_bad_input_is_named() -> None:
    with pytest.raises(lenslrp.InputError, match="one activation a token: 2 tokens, 1"):
        NamingExample(("a", "b"), (1.0,))
    with pytest.raises(lenslrp.InputError, match="at least 2 examples and 2 others, got 1 and 9"):
        name_unit(TokenRule(), FRUITS[:1], OTHERS)
    with pytest.raises(lenslrp.InputError, match="share between 0 and 1, not 1.0"):
        name_unit(TokenRule(), FRUITS, OTHERS, held_out=1.0)

    class Lazy(Oracle):
        def detect(self, explanation: str, texts: Sequence[str]) -> list[float]:
            return []

    with pytest.raises(lenslrp.InputError, match="judged 0 of 15 texts"):
        name_unit(Lazy(), FRUITS, OTHERS)


def test_a_language_model_is_asked_how_likely_each_text_becomes() -> None:
    words = word_tokenizer()
    model = tiny(tokenizer=words)
    provider = LanguageModel(model, batch_size=2, answer=3)
    assert isinstance(provider, Provider)

    def one_by_one(topic: str, pieces: list[tuple[str, bool]]) -> float:
        ids, counted = model.to_tokens(f"Topic: {topic}\nText:")[0].tolist(), []
        for text, on in pieces:
            new = words.encode(text, add_special_tokens=False)
            counted += [len(ids) + i for i in range(len(new))] if on else []
            ids += new
        with torch.no_grad():
            logits = model(torch.tensor([ids])).log_softmax(dim=-1)[0]
        return sum(float(logits[i - 1, ids[i]]) for i in counted)

    vocabulary = sorted(w for w in words.get_vocab() if w.isalpha())[:12]
    texts = [" ".join(vocabulary[i : i + 3 + i]) for i in range(5)]  # of several lengths
    found = provider.detect(vocabulary[0], texts)
    expected = [
        one_by_one(vocabulary[0], [(t, True)]) - one_by_one("anything", [(t, True)]) for t in texts
    ]
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(map(abs, found)) > 1e-3
    a, b, c = vocabulary[:3]
    pieces = [(a, False), (b, True), (c, False)]
    expected_fuzz = one_by_one(a, pieces) - one_by_one("anything", pieces)
    assert provider.fuzz(a, [f"{a}<<{b}>>{c}"]) == pytest.approx([expected_fuzz], abs=1e-5)


def test_a_language_model_chooses_the_candidate_that_fits_better() -> None:
    class Judged(LanguageModel):
        def _topic(self, texts: Sequence[str]) -> str:
            return "of its own"

        def detect(self, explanation: str, texts: Sequence[str]) -> list[float]:
            return [{"apple, pear": 2.0, "of its own": 1.0}[explanation]] * len(texts)

    provider = Judged(None)
    assert provider.explain(FRUITS, [" apple", " pear"]) == "apple, pear"
    assert provider.explain(FRUITS, []) == "of its own"
