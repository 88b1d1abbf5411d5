"""Small tokenizers of every kind, trained here on a few lines in ten scripts and more."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import transformers as hf
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

SCRIPTS = {
    "Latin": "The Eiffel Tower isn't in Łódź, where jaźń is naïve.",
    "Greek": "Η Ελλάδα είναι χώρα της Ευρώπης",
    "Cyrillic": "Москва столица России, там ёлка",
    "Han and kana": "東京は日本の首都です。東京タワー",
    "Devanagari": "हिन्दी भारत की भाषा है क्षत्रिय",
    "Arabic": "اللغة العربية جميلة جدا",
    "Hebrew": "עברית היא שפה שמית",
    "Hangul": "한국어는 한국의 언어이다",
    "Thai": "ประเทศไทยมีกรุงเทพ",
    "emoji": "a family 👨‍👩‍👧 says 👍🏽 and ❤️ to 🇵🇱",
}
LINES = list(SCRIPTS.values())
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
NAMES = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _finished(core: Tokenizer, template: str = "<s> $A") -> hf.PreTrainedTokenizerFast:
    core.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, core.token_to_id(name)) for name in SPECIAL]
    )
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, **NAMES)


def _with(core: Tokenizer, **changes: Any) -> Tokenizer:
    """The same tokenizer with parts of its file replaced."""
    return Tokenizer.from_str(json.dumps({**json.loads(core.to_str()), **changes}))


def byte_level(prefix: bool = False, size: int = 330) -> hf.PreTrainedTokenizerFast:
    """GPT-2's, Llama 3's, SmolLM2's: few merges, so that most characters are split."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=SPECIAL,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return _finished(core)


def sentencepiece(legacy: bool = False) -> hf.PreTrainedTokenizerFast:
    """Llama 2's: BPE with byte fallback, which all scripts but Latin need here."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.train_from_iterator(
        [line for line in LINES if line.isascii()] + ["The Eiffel Tower is where a family is"],
        trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL + BYTES, show_progress=False),
    )
    strips = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    steps = [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, strips]
    added = json.loads(core.to_str())["added_tokens"]
    changes: dict[str, Any] = {
        "decoder": {"type": "Sequence", "decoders": steps},
        "added_tokens": [token for token in added if token["content"] in SPECIAL],
    }
    if legacy:
        prepend = {"type": "Prepend", "prepend": "▁"}
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        changes["pre_tokenizer"] = None
        changes["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
    return _finished(_with(core, **changes))


def unigram(fallback: bool = True) -> hf.PreTrainedTokenizerFast:
    """T5's, and Gemma's with byte fallback; text is normalised (NFKC) first."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.train_from_iterator(
        LINES[:2],
        trainers.UnigramTrainer(
            vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        ),
    )
    if fallback:
        made = json.loads(core.to_str())["model"]
        made["vocab"] += [[name, -12.0] for name in BYTES]
        strips = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        steps = [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, strips]
        core = _with(
            core,
            model={**made, "byte_fallback": True},
            decoder={"type": "Sequence", "decoders": steps},
        )
    return _finished(core, "$A </s>")


def wordpiece(lower: bool = False) -> hf.PreTrainedTokenizerFast:
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=lower)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.train_from_iterator(
        LINES,
        trainers.WordPieceTrainer(vocab_size=260, special_tokens=SPECIAL, show_progress=False),
    )
    return _finished(core, "<s> $A </s>")


def slow_wordpiece(folder: Path) -> Any:
    """Without offsets."""
    words = wordpiece().get_vocab()
    path = folder / "vocab.txt"
    path.write_text("\n".join(sorted(words, key=lambda word: words[word])), encoding="utf-8")
    names = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>"}
    return BertTokenizerLegacy(str(path), do_lower_case=False, **names)


def end_of_word() -> hf.PreTrainedTokenizerFast:
    """GPT-1's and XLM's: ``</w>`` ends a word."""
    core = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.BPEDecoder(suffix="</w>")
    core.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    return _finished(core)


def clip() -> Any:
    """Bytes and ``</w>`` together."""
    core = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    core.normalizer = normalizers.Lowercase()
    pattern = Regex(r"'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    ends = ["<|startoftext|>", "<|endoftext|>"]
    core.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=620,
            special_tokens=ends,
            end_of_word_suffix="</w>",
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    merges = json.loads(core.to_str())["model"]["merges"]
    return hf.CLIPTokenizer(vocab=core.get_vocab(), merges=[tuple(pair) for pair in merges])


def word_level() -> hf.PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.train_from_iterator(
        LINES, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    )
    return _finished(core)


def characters() -> hf.PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    core.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=10, special_tokens=SPECIAL, show_progress=False)
    )
    return _finished(core)


KINDS: dict[str, Callable[[], Any]] = {
    "byte-level BPE": byte_level,
    "byte-level BPE, space first": lambda: byte_level(prefix=True),
    "SentencePiece BPE, byte fallback": sentencepiece,
    "SentencePiece BPE, as a normaliser": lambda: sentencepiece(legacy=True),
    "unigram, byte fallback": unigram,
    "unigram": lambda: unigram(fallback=False),
    "WordPiece": wordpiece,
    "WordPiece, lower case": lambda: wordpiece(lower=True),
    "</w> BPE": end_of_word,
    "CLIP": clip,
    "WordLevel": word_level,
    "characters": characters,
    "bytes (ByT5)": hf.ByT5Tokenizer,
}


@cache
def tokenizer(kind: str) -> Any:
    return KINDS[kind]()
