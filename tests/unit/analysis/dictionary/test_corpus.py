"""A corpus of any kind becomes the same blocks; odd records are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lenslrp.analysis.dictionary import corpus as module
from lenslrp.analysis.dictionary.corpus import Corpus, Cut, tokenise
from lenslrp.analysis.dictionary.sources import describe_corpus, texts_of
from lenslrp.errors import InputError, StorageError
from tests.unit.tiny import word_tokenizer

TEXTS = ["a b c d e f g", "h i j", "k l m n", "o p q r s t u a b c d", "e", "f g h"]


def as_text(folder: Path) -> Any:
    (folder / "c.txt").write_text("\n\n".join(TEXTS) + "\n")
    return folder / "c.txt"


def as_folder(folder: Path) -> Any:
    (folder / "c").mkdir()
    for n, text in enumerate(TEXTS):
        (folder / "c" / f"{n}.txt").write_text(text)
    (folder / "c" / "notes.md").write_text("not this")
    return str(folder / "c")


def as_jsonl(folder: Path) -> Any:
    lines = [json.dumps({"doc": n, "text": text}) for n, text in enumerate(TEXTS)]
    (folder / "c.jsonl").write_text("\n".join(lines))
    return folder / "c.jsonl"


def as_parquet(folder: Path) -> Any:
    pq.write_table(pa.table({"text": TEXTS}), folder / "c.parquet")
    return folder / "c.parquet"


def as_dataset(folder: Path) -> Any:
    return datasets.Dataset.from_dict({"text": TEXTS})


def as_stream(folder: Path) -> Any:
    return datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()


def as_ids(folder: Path) -> Any:
    return word_tokenizer()(TEXTS, add_special_tokens=False)["input_ids"]


KINDS = [as_text, as_folder, as_jsonl, as_parquet, as_dataset, as_stream, as_ids]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_corpus_gives_the_same_blocks(
    kind: Callable[[Path], Any], tmp_path: Path
) -> None:
    cut = Cut(context=5, block=2)
    expected = tokenise(list(TEXTS), word_tokenizer(), tmp_path / "1", cut)
    given = tokenise(kind(tmp_path), word_tokenizer(), tmp_path / "2", cut)
    assert given.about == expected.about
    for index in range(given.blocks):
        one, two = given.block(index), expected.block(index)
        assert torch.equal(one.tokens, two.tokens)
        assert torch.equal(one.docs, two.docs)


def test_documents_are_cut_numbered_and_found_again(tmp_path: Path) -> None:
    corpus = tokenise(TEXTS, word_tokenizer(), tmp_path, Cut(context=5, block=2, bos=0))
    part = corpus.part(0)
    documents = [part.document(n).tolist() for n in range(corpus.documents)]
    # "a b c d | e f g": four words beside <s>; "e" and the rest "a b" of no block are too short.
    assert documents[:3] == [[0, 2, 3, 4, 5], [0, 6, 7, 8], [0, 9, 10, 11]]
    assert part.sources.tolist() == [0, 0, 1, 2, 3, 3, 3, 5]
    assert part.starts.tolist() == [0, 4, 0, 0, 0, 4, 8, 0]
    assert corpus.about["short"] == 1
    seen = []
    for index in range(corpus.blocks):
        block = corpus.block(index)
        assert torch.equal(corpus.block_of(block.docs), torch.full_like(block.docs, index))
        assert block.docs.tolist() == sorted(block.docs.tolist())
        for row, doc in enumerate(block.docs.tolist()):
            assert block.tokens[row][block.mask[row]].tolist() == documents[doc]
        seen += block.docs.tolist()
    assert sorted(seen) == list(range(corpus.documents))


def test_blocks_stay_within_their_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 8)
    rows = [[2 + i % 20] * (3 + i % 7) for i in range(29)]
    corpus = tokenise(rows, None, tmp_path, Cut(context=16, block=4))
    assert len(corpus.about["parts"]) == 4
    docs = [corpus.block(i).docs for i in range(corpus.blocks)]
    assert sorted(torch.cat(docs).tolist()) == list(range(29))
    assert all(len(set((d // 8).tolist())) == 1 for d in docs)
    for doc in range(29):
        assert corpus.part_of(doc).document(doc).tolist() == rows[doc]
    assert torch.equal(corpus.block_of(docs[5]), torch.full_like(docs[5], 5))


def test_a_damaged_record_is_skipped_counted_and_named(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a b c"}\n{"text": \n{"words": 1}\n\n{"text": "d e f"}\n')
    with pytest.warns(
        UserWarning, match=r"2 records .*c\.jsonl line 2: no JSON object with a text"
    ):
        corpus = tokenise(path, word_tokenizer(), tmp_path / "out", Cut(context=5, block=2))
    assert corpus.about["skipped"] == 2
    assert corpus.documents == 2


def test_what_is_no_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("a")
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"words": TEXTS}), tmp_path / "c.parquet")
    for given, message in (
        ("no such file", "no corpus at 'no such file'"),
        (tmp_path / "c.csv", "one of .txt, .jsonl, .parquet"),
        (tmp_path / "empty", "has no .txt, .jsonl, .parquet file"),
        (tmp_path / "c.parquet", "no column 'text'; it has words"),
        (3, "a corpus is a path"),
        ([{"words": "a"}], "record 0 of the corpus has no text under 'text'; it has words"),
        ([3.5], "item 0 of the corpus is a float"),
        ("a text " * 100, r"no corpus at 'a text .*' \(a string is a path; give texts as a list\)"),
    ):
        with pytest.raises(InputError, match=message):
            list(texts_of(given))
    with pytest.raises(InputError, match=r"no document of 3 or more tokens \(2 texts were read"):
        tokenise(["a", "b"], word_tokenizer(), tmp_path / "out", Cut())
    with pytest.raises(InputError, match="no tokenizer: give the corpus as rows of token ids"):
        tokenise(["a b c"], None, tmp_path / "out", Cut())


@pytest.mark.parametrize("wrong", [{"context": 3}, {"context": 2**15}, {"block": 3}, {"block": 0}])
def test_cuts_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"context must be|batch_size must be"):
        Cut(**wrong)


def test_a_replaced_part_is_noticed(tmp_path: Path) -> None:
    cut = Cut(context=5, block=2)
    tokenise(TEXTS, word_tokenizer(), tmp_path / "1", cut)
    tokenise(TEXTS[::-1], word_tokenizer(), tmp_path / "2", cut)
    name = "part-000000.safetensors"
    (tmp_path / "1" / name).write_bytes((tmp_path / "2" / name).read_bytes())
    with pytest.raises(StorageError, match="it was replaced"):
        Corpus.open(tmp_path / "1").block(0)


def test_identity_tells_corpora_apart_without_reading_them(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path)
    first = describe_corpus(path)
    assert first == describe_corpus(path)
    path.write_text(path.read_text() + "\n")
    assert describe_corpus(path) != first
    assert describe_corpus(TEXTS) != describe_corpus(TEXTS[1:])
    assert describe_corpus(TEXTS) != describe_corpus(TEXTS, "another cut")
    assert describe_corpus(iter(TEXTS)) is None


@pytest.mark.parametrize("kind", ["jsonl", "records", "strings"])
def test_half_a_surrogate_pair_is_a_damaged_record(tmp_path: Path, kind: str) -> None:
    """JSON can spell half a character; a tokenizer cannot read it, nor a database keep it."""
    bad = "a b \ud83d c"
    corpora: dict[str, Any] = {
        "records": [{"text": TEXTS[0]}, {"text": bad}, {"text": TEXTS[1]}],
        "strings": [TEXTS[0], bad, TEXTS[1]],
        "jsonl": tmp_path / "c.jsonl",
    }
    lines = [json.dumps({"text": text}) for text in (TEXTS[0], bad, TEXTS[1])]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    name = {"jsonl": "c.jsonl line 2"}.get(kind, "record 1")
    with pytest.warns(UserWarning, match=f"1 records .* skipped: {name}: half of a surrogate pair"):
        corpus = tokenise(corpora[kind], word_tokenizer(), tmp_path / "out", Cut(context=8))
    assert (corpus.about["skipped"], corpus.about["texts"]) == (1, 2)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(StorageError, match=r"c\.parquet is damaged"):
        list(texts_of(tmp_path / "c.parquet"))
