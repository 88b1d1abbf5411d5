"""Tokens read in their row, in every kind of tokenizer: characters, special tokens, words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from lenslrp.text.spelling import Speller, Spelling, standing, str_token
from lenslrp.text.words import CONTINUED, joined, piece_at, pieces, words
from tests.unit.tiny_tokenizers import KINDS, LINES, slow_wordpiece, tokenizer

TEXTS = [*LINES, "The Eiffels isn't  in Łódź", "cafe\u0301 e\u0301", "a\nb\t\tc  d", " two "]
LOSSLESS = ["byte-level BPE", "SentencePiece BPE, byte fallback", "bytes (ByT5)"]


def found_words(kind: str, text: str) -> list[str]:
    made = tokenizer(kind)
    return [word.text for word in words(Speller(made).read(made(text)["input_ids"], text))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_row_is_what_decoding_says_and_its_pieces_join_to_it(kind: str, text: str) -> None:
    made = tokenizer(kind)
    ids = [i for i in made(text)["input_ids"] if i != made.unk_token_id or kind == "CLIP"]
    row = Speller(made).spell(ids)
    shown = pieces(row)
    assert len(shown) == len(ids) and joined(shown) == row.text
    own = joined([piece for piece, marks in zip(shown, row.special, strict=True) if not marks])
    decoded = made.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert own.strip() == decoded.strip()
    assert "\N{REPLACEMENT CHARACTER}" not in row.text
    names = [piece for piece, marks in zip(shown, row.special, strict=True) if marks]
    assert names == [made.decode([i]) for i in ids if i in Speller(made).special]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_words_are_those_of_the_text_in_every_kind(kind: str, text: str) -> None:
    made = tokenizer(kind)
    ids = made(text)["input_ids"]
    row = Speller(made).read(ids, text)
    found = words(row)
    assert "".join(word.text for word in found) == row.text
    assert sorted(i for word in found for i in word.positions) == list(range(len(ids)))
    own = [word for word in found if not any(row.special[i] for i in word.positions)]
    assert "".join(word.text for word in own) == text
    for word in found:  # a special token is a word of its own
        assert len(word.positions) == 1 or not any(row.special[i] for i in word.positions)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"WordLevel"}))
def test_sub_words_are_joined(kind: str) -> None:
    """Whatever the pieces, where the script has spaces; a token is never cut."""
    text = "The Eiffels isn't in Łódź, Ελλάδα России"
    found = [word.strip() for word in found_words(kind, text)]
    wanted = ["The", "Eiffels", "isn't", "in", "Łódź", ",", "Ελλάδα", "России"]
    assert [word for word in found if word in wanted] == wanted
    for script in (
        "हिन्दी भारत की भाषा",
        "اللغة العربية جميلة",
        "עברית היא שפה",
        "한국어는 한국의 언어이다",
    ):
        found = [word.strip() for word in found_words(kind, script)]
        assert [word for word in found if word in script.split()] == script.split()


def test_scripts_without_spaces_have_words_of_whole_characters() -> None:
    for kind in LOSSLESS:
        for text in ("東京は日本の首都です", "ประเทศไทยมีกรุงเทพ"):
            found = found_words(kind, text)
            assert (
                len(found) > 4 and "".join(found).removeprefix("<s>").removesuffix("</s>") == text
            )


def test_a_character_is_shown_by_the_first_of_its_tokens() -> None:
    made = tokenizer("byte-level BPE")
    row = Speller(made).spell(
        made("Ł👨\u200d👩\u200d👧e\u0301!", add_special_tokens=False)["input_ids"]
    )
    shown = pieces(row)
    assert [piece for piece in shown if piece != CONTINUED] == [
        "Ł",
        "👨\u200d👩\u200d👧",
        "e\u0301",
        "!",
    ]
    assert shown.count(CONTINUED) == len(shown) - 4 > 4


def test_a_token_that_ends_one_character_and_begins_another_shows_both() -> None:
    row = Spelling("aŁód", [(0, 2), (1, 4)], [False, False])
    assert pieces(row) == ["aŁ", f"{CONTINUED}ód"]
    assert words(row) == [("aŁód", [0, 1])]


def test_bytes_that_are_no_character_are_written_as_bytes() -> None:
    made = tokenizer("byte-level BPE")
    ids = made("東Ł", add_special_tokens=False)["input_ids"]
    cut = Speller(made).spell([*ids[1:], ids[0]])  # the first token of 東 is at the end
    assert "Ł" in cut.text and "\N{REPLACEMENT CHARACTER}" not in cut.text
    assert cut.text.startswith("⟨0x") and cut.text.endswith("⟩")
    assert str_token(made, ids[-1]).startswith("⟨0x")
    fallback = tokenizer("SentencePiece BPE, byte fallback")
    assert str_token(fallback, fallback.convert_tokens_to_ids("<0xE6>")) == "⟨0xE6⟩"
    assert str_token(hf.ByT5Tokenizer(), 200) == "⟨0xC5⟩"


def test_a_replacement_character_of_the_text_stays() -> None:
    for kind in LOSSLESS:
        made = tokenizer(kind)
        ids = made("a\ufffdb \ufffd", add_special_tokens=False)["input_ids"]
        assert Speller(made).spell(ids).text == "a\ufffdb \ufffd"


def test_text_that_looks_like_bytes_or_marks_is_text() -> None:
    for kind in LOSSLESS:
        made = tokenizer(kind)
        text = "<0xE6> ⟨0xE6⟩ ## </w> @@"
        ids = made(text, add_special_tokens=False)["input_ids"]
        assert Speller(made).spell(ids).text == text


def test_a_special_tokens_name_in_the_text_is_its_own_word() -> None:
    for kind in LOSSLESS[:2]:
        assert found_words(kind, "the cat</s>sat") == ["<s>", "the", " cat", "</s>", "sat"]


def test_what_is_appended_to_a_text_is_spelled() -> None:
    made = tokenizer("WordPiece, lower case")
    ids = [
        *made("The Eiffel")["input_ids"][:-1],
        *made("in Łódź", add_special_tokens=False)["input_ids"],
    ]
    row = Speller(made).read(ids, "The Eiffel")
    assert row.text == "<s>The Eiffel in łodz"
    assert [word.text for word in words(row)] == ["<s>", "The", " Eiffel", " in", " łodz"]


def test_tokenizers_without_offsets_are_decoded(tmp_path: Path) -> None:
    slow: Any = slow_wordpiece(tmp_path)
    text = "The Eiffels in Łódź हिन्दी"
    ids = slow(text)["input_ids"]
    assert not slow.is_fast and standing(slow, text, ids) == (1, len(ids) - 1, None)
    found = [word.text for word in words(Speller(slow).read(ids, text))]
    assert found == ["<s>", "The", " Eiffels", " in", " Łódź", " हिन्दी", "</s>"]


class Opaque:
    """Tells nothing but what ids decode to."""

    def __init__(self) -> None:
        self.inner = tokenizer("byte-level BPE")
        self.all_special_ids = self.inner.all_special_ids

    @property
    def added_tokens_decoder(self) -> Any:
        raise NotImplementedError

    def decode(self, ids: list[int], **options: Any) -> str:
        return str(self.inner.decode(ids, **options))


def test_a_tokenizer_that_only_decodes_is_read_character_by_character() -> None:
    made = Opaque()
    text = "Łódź 東京 👍🏽!"
    ids = made.inner(text)["input_ids"]
    row, known = Speller(made).spell(ids), Speller(made.inner).spell(ids)
    assert row.text == known.text == f"<s>{text}"
    assert words(row) == words(known)
    assert [piece for piece in pieces(row) if piece == "Ł"] == ["Ł"]


def test_where_a_token_only_goes_on_its_character_is_that_of_an_earlier_one() -> None:
    shown = ["a", "東", CONTINUED, CONTINUED, f"{CONTINUED}b"]
    assert [piece_at(shown, i) for i in range(5)] == ["a", "東", "東", "東", f"{CONTINUED}b"]


def test_pieces_that_say_that_they_go_on(tmp_path: Path) -> None:
    """CTRL's and PhoBERT's way."""
    names = ["<unk>", "he@@", "llo", "w@@", "orld"]
    vocabulary = "{" + ", ".join(f'"{name}": {i}' for i, name in enumerate(names)) + "}"
    (tmp_path / "vocab.json").write_text(vocabulary)
    (tmp_path / "merges.txt").write_text("#version\nh e@@\n")
    made = hf.CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    row = Speller(made).spell([1, 2, 3, 4])
    assert row.text == "hello world"
    assert words(row) == [("hello", [0, 1]), (" world", [2, 3])]
