"""Text becomes the ids that Hugging Face's tokenizer gives, unless ``prepend_bos`` is chosen."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

import lenslrp
from lenslrp.errors import InputError, LoadError
from lenslrp.text.tokenization import beginning, give_tokenizer, prepends, tokenize
from tests.conformance.zoo import tokenizers
from tests.unit.models.test_checkpoint_files import llama

PLAIN, BOS, CLS, GMASK, EOS = range(5)
TEXT = "the cat sat"
BARE = [7, 8, 9]


def bridge(kind: int, **options: Any) -> Any:
    return lenslrp.load(llama(), tokenizer=tokenizers()[kind], **options)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (PLAIN, BARE),
        (BOS, [1, *BARE]),
        (CLS, [3, *BARE, 4]),
        (GMASK, [5, 6, *BARE]),
        (EOS, [*BARE, 2]),
    ],
)
def test_ids_are_the_tokenizers_own_wherever_text_goes_in(kind: int, expected: list[int]) -> None:
    model = bridge(kind)
    assert tokenizers()[kind](TEXT)["input_ids"] == expected
    assert tokenize(model, TEXT) == expected
    assert model.to_tokens(TEXT).tolist() == [expected]
    _, R = lenslrp.run_with_relevance(model, TEXT, target=5)
    assert R.token_ids.tolist() == [expected]
    _, cache = model.run_with_cache(TEXT)
    assert cache["hook_embed"].shape[1] == len(expected)


@pytest.mark.parametrize(
    ("kind", "with_bos", "without"),
    [
        (PLAIN, [1, *BARE], BARE),
        (BOS, [1, *BARE], BARE),
        (CLS, [3, *BARE, 4], [*BARE, 4]),
        (EOS, [1, *BARE, 2], [*BARE, 2]),
    ],
)
def test_prepend_bos_is_a_choice(kind: int, with_bos: list[int], without: list[int]) -> None:
    model = bridge(kind)
    assert tokenize(model, TEXT, True) == with_bos
    assert tokenize(model, TEXT, False) == without
    assert tokenize(bridge(kind, prepend_bos=True), TEXT) == with_bos
    assert tokenize(bridge(kind, prepend_bos=False), TEXT) == without
    _, R = lenslrp.run_with_relevance(model, TEXT, target=5, prepend_bos=True)
    assert R.token_ids.tolist() == [with_bos]


CHARACTERS = [*"abcdehtsn ", "\u2581", "\u0120", "##a", "##t"]


def words(*special: str) -> dict[str, int]:
    return {word: index for index, word in enumerate([*special, *CHARACTERS])}


def pieces(*special: str) -> list[tuple[str, float]]:
    return [(word, 0.0) for word in words(*special)]


LLAMA = ("<unk>", "<s>", "</s>")
FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")
CLASSES: dict[str, Any] = {
    "Llama": lambda: hf.LlamaTokenizer(vocab=words(*LLAMA), merges=[]),
    "Llama with BOS and EOS": lambda: hf.LlamaTokenizer(
        vocab=words(*LLAMA), merges=[], add_bos_token=True, add_eos_token=True
    ),
    "Llama without": lambda: hf.LlamaTokenizer(vocab=words(*LLAMA), merges=[], add_bos_token=False),
    "Gemma": lambda: hf.GemmaTokenizer(
        vocab=words("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"), merges=[]
    ),
    "GPT-2": lambda: hf.GPT2Tokenizer(vocab=words("<|endoftext|>"), merges=[]),
    "GPT-2 with BOS": lambda: hf.GPT2Tokenizer(
        vocab=words("<|endoftext|>"), merges=[], add_bos_token=True
    ),
    "Qwen 2": lambda: hf.Qwen2Tokenizer(vocab=words("<|endoftext|>"), merges=[]),
    "NeoX": lambda: hf.GPTNeoXTokenizer(vocab=words("<|endoftext|>", "<|padding|>"), merges=[]),
    "BERT": lambda: hf.BertTokenizer(vocab=words("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")),
    "RoBERTa": lambda: hf.RobertaTokenizer(vocab=words(*FAIRSEQ, "<mask>"), merges=[]),
    "T5": lambda: hf.T5Tokenizer(vocab=pieces("<pad>", "</s>", "<unk>")),
    "MBart, with a language tag": lambda: hf.MBartTokenizer(vocab=pieces(*FAIRSEQ)),
    "NLLB, with a language tag": lambda: hf.NllbTokenizer(vocab=words(*FAIRSEQ), merges=[]),
}
ADDED = {"Llama with BOS and EOS": 2, "GPT-2 with BOS": 1, "BERT": 2, "RoBERTa": 2, "T5": 1,
         "MBart, with a language tag": 2, "NLLB, with a language tag": 2}  # fmt: skip


@pytest.mark.parametrize("name", list(CLASSES))
def test_every_class_of_tokenizers_keeps_its_ids(name: str, tmp_path: Path) -> None:
    """From memory and by directory, in ``tokenize`` and in ``to_tokens``."""
    tokenizer = CLASSES[name]()
    expected = tokenizer("the cat")["input_ids"]
    bare = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    assert len(expected) - len(bare) == ADDED.get(name, 0)
    plain = llama(vocab_size=len(tokenizer))
    plain.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for model in (lenslrp.load(plain, tokenizer=tokenizer), lenslrp.load(tmp_path, device="cpu")):
        assert tokenize(model, "the cat") == expected
        assert model.to_tokens("the cat").tolist() == [expected]


def without_bos() -> hf.PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate("abcd")}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=core)


def test_a_bos_that_the_tokenizer_does_not_have_is_refused() -> None:
    with pytest.raises(LoadError, match="no beginning-of-sequence token"):
        lenslrp.load(llama(), tokenizer=without_bos(), prepend_bos=True)
    model = lenslrp.load(llama(), tokenizer=without_bos())
    with pytest.raises(InputError, match="no beginning-of-sequence token"):
        lenslrp.run_with_relevance(model, "b c", target=1, prepend_bos=True)


def test_a_batch_needs_no_padding_token() -> None:
    """Neither pad nor EOS: what stands under the mask is any id, and rows are as if alone."""
    model = lenslrp.load(llama(), tokenizer=without_bos())
    assert len(model.tokenizer) == 4
    _, R = lenslrp.run_with_relevance(model, ["b c d", "c d"], target=1)
    _, alone = lenslrp.run_with_relevance(model, "c d", target=1)
    row = R.tokens[1][R.attention_mask[1]]
    assert row.tolist() == pytest.approx(alone.tokens[0].tolist(), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("kind", "bos"), [(BOS, None), (PLAIN, True)])
def test_a_second_bos_is_warned_about(kind: int, bos: bool | None) -> None:
    model = bridge(kind)
    with pytest.warns(UserWarning, match="begins with '<s>' and gets another one before it"):
        ids = tokenize(model, "<s> the cat", bos)
    assert ids == [1, 1, 7, 8]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenize(model, "<s> the cat", False) == [1, 7, 8]
        assert tokenize(bridge(PLAIN), "<s> the cat") == [1, 7, 8]


def test_another_tokenizer_replaces_the_first_one() -> None:
    model = bridge(BOS)
    give_tokenizer(model, tokenizers()[PLAIN])
    assert tokenize(model, TEXT) == BARE
    assert model.cfg.d_vocab == 23


def test_what_stands_before_a_text() -> None:
    assert [beginning(t) for t in tokenizers()] == [1, 1, 3, 1, 1]
    assert [prepends(t) for t in tokenizers()] == [False, True, True, False, False]
    assert beginning(without_bos()) is None
    assert not prepends(without_bos())
