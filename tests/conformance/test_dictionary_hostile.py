"""A dictionary from a stranger: nothing in it runs, leads elsewhere, or is believed unchecked."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lenslrp.analysis.dictionary import NeuronDictionary
from lenslrp.analysis.publish import FILES
from lenslrp.analysis.storage import canonical, file_record
from lenslrp.errors import StorageError
from tests.conformance.dictionaries import OPTIONS, build, texts
from tests.unit.test_storage import Payload
from tests.unit.tiny import WORDS, tiny


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "d"
    build(path).close()
    return path


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(good, tmp_path / "d"))


def manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def resign(folder: Path, name: str) -> None:
    """What a stranger does who spoils a file: the manifest has its new checksum."""
    manifest(folder, lambda m: m["files"].update({name: file_record(folder / name)}))


def read_all(folder: Path, verify: bool = True) -> None:
    d = NeuronDictionary.open(folder, verify=verify)
    try:
        for place in d.plan.places:
            for criterion in d.plan.criteria:
                d.page(place, 1).examples(criterion)
            assert len(d.page(place, 1).vocabulary())
        d.search_text("a")
        for by in ("hits", "writes", "reads"):
            d.search_tokens("a", by=by)
        d.similar((0, 0))
        d.to_dataframe()
        assert len(d.units) == len(d)
    finally:
        d.close()


def test_an_unspoilt_copy_is_read(folder: Path) -> None:
    read_all(folder)


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_a_flipped_bit_is_found_and_the_file_named(folder: Path, name: str, where: float) -> None:
    path = folder / name
    spoilt = bytearray(path.read_bytes())
    spoilt[int(len(spoilt) * where)] ^= 16
    path.write_bytes(bytes(spoilt))
    with pytest.raises(StorageError, match=name.replace(".", r"\.")):
        NeuronDictionary.open(folder)


@pytest.mark.parametrize("name", [*sorted(FILES), "manifest.json"])
def test_a_truncated_or_missing_file_is_named(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(StorageError, match=name.replace(".", r"\.")):
        NeuronDictionary.open(folder, verify=False)
    path.unlink()
    with pytest.raises(StorageError, match=name.replace(".", r"\.")):
        NeuronDictionary.open(folder, verify=False)


@pytest.mark.parametrize("name", ["units.parquet", "examples.parquet", "vocabulary.parquet"])
def test_pages_are_checked_as_they_are_read(folder: Path, name: str) -> None:
    """Without comparing whole files, and with a manifest that agrees."""
    path = folder / name
    spoilt = bytearray(path.read_bytes())
    spoilt[len(spoilt) // 3] ^= 1
    path.write_bytes(bytes(spoilt))
    resign(folder, name)
    with pytest.raises(StorageError, match=name.replace(".", r"\.")):
        read_all(folder)


def test_a_vocabulary_of_other_columns_is_not_opened(folder: Path) -> None:
    shutil.copy(folder / "units.parquet", folder / "vocabulary.parquet")
    resign(folder, "vocabulary.parquet")
    with pytest.raises(StorageError, match=r"vocabulary\.parquet does not have the columns"):
        read_all(folder)


def test_row_groups_without_their_units_are_not_opened(folder: Path) -> None:
    path = folder / "vocabulary.parquet"
    pq.write_table(pq.read_table(path), path, write_statistics=False)
    resign(folder, path.name)
    with pytest.raises(StorageError, match=r"vocabulary\.parquet does not say which units"):
        read_all(folder)


@pytest.mark.parametrize(
    "name", ["../../secret", "/etc/passwd", "units.parquet/../../secret", "secret\x00", ""]
)
def test_a_manifest_leads_nowhere_else(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("x")
    manifest(folder, lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0"}}))
    with pytest.raises(StorageError, match="lists the files"):
        NeuronDictionary.open(folder)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_link_is_not_followed(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")
    with pytest.raises(StorageError, match="is a symbolic link"):
        NeuronDictionary.open(folder)


@pytest.mark.parametrize("name", [*sorted(FILES), "manifest.json"])
def test_a_pickle_in_a_files_place_is_never_loaded(folder: Path, name: str) -> None:
    bait = folder.parent / "ran"
    (folder / name).write_bytes(pickle.dumps(Payload(bait)))
    if name != "manifest.json":
        resign(folder, name)
    with pytest.raises(StorageError, match=name.replace(".", r"\.")):
        read_all(folder)
    assert not bait.exists()


@pytest.mark.parametrize("name", ["citations.safetensors", "samples.safetensors"])
def test_an_oversized_header_is_not_read(folder: Path, name: str) -> None:
    (folder / name).write_bytes(struct.pack("<Q", 2**50) + b"{}" * 50)
    resign(folder, name)
    with pytest.raises(StorageError, match="claims a header of"):
        read_all(folder)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE VIEW extra AS SELECT 1",
        "CREATE TRIGGER extra AFTER INSERT ON documents BEGIN SELECT 1; END",
        "CREATE TABLE extra (x)",
        "CREATE VIRTUAL TABLE extra USING fts5(x)",
    ],
)
def test_a_database_brings_no_schema_of_its_own(folder: Path, statement: str) -> None:
    database = sqlite3.connect(folder / "texts.sqlite")
    database.execute(statement)
    database.commit()
    database.close()
    resign(folder, "texts.sqlite")
    with pytest.raises(StorageError, match="tables that are not a dictionary's"):
        NeuronDictionary.open(folder)


@pytest.mark.parametrize(
    "change",
    [
        "spans = x'00'",
        "spans = NULL",
        "spans = zeroblob(8)",
        "spans = replace(hex(spans), '0', '1')",
        "spans = randomblob(length(spans))",
        "tokens = 'abcd'",
        "tokens = x'010203'",
        "text = NULL",
        "text = 5",
    ],
)
def test_documents_whose_tokens_do_not_fit_their_text_are_not_shown(
    folder: Path, change: str
) -> None:
    database = sqlite3.connect(folder / "texts.sqlite")
    database.execute(f"UPDATE documents SET {change}")
    database.commit()
    database.close()
    resign(folder, "texts.sqlite")
    with pytest.raises(StorageError, match=r"texts\.sqlite is damaged: "):
        read_all(folder)


def forged(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    """A plan changed together with its checksum."""

    def both(value: dict[str, Any]) -> None:
        change(value["plan"])
        value["plan_sha256"] = hashlib.sha256(canonical(value["plan"]).encode()).hexdigest()

    return both


CHANGES: list[Callable[[dict[str, Any]], Any]] = [
    lambda m: m.update(schema=99),
    lambda m: m.update(schema="<script>alert(1)</script>"),
    lambda m: m.update(files=[]),
    lambda m: m.update(files=None),
    lambda m: m["files"].update({"units.parquet": 3}),
    lambda m: m.pop("plan"),
    lambda m: m.update(plan=[]),
    lambda m: m["plan"].update(k=7),
    lambda m: m.update(slots=[["actmax", 0]]),
    lambda m: m.update(slots=3),
    lambda m: m.pop("vocabulary"),
    lambda m: m.update(vocabulary=[]),
    lambda m: m.update(vocabulary={"tokens": 10}),
    lambda m: m["vocabulary"].update(missing={"mlp.hook_post": ["<script>"]}),
    lambda m: m["vocabulary"].update(missing={"mlp.hook_post": {"writes": 1}}),
    forged(lambda p: p.update(extra=1)),
    forged(lambda p: p.update(places=[])),
    forged(lambda p: p["places"][0].update(size=10**12)),
    forged(lambda p: p["places"][0].update(size="1")),
    forged(lambda p: p.update(criteria=["no such"])),
    forged(lambda p: p.update(window=["a", "b"])),
    forged(lambda p: p.update(window=[10**9])),
    forged(lambda p: p.update(corpus={})),
    forged(lambda p: p.update(k="4")),
]


@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
def test_a_manifest_is_checked_before_it_is_believed(
    folder: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    manifest(folder, change)
    with pytest.raises(StorageError, match=r"\.json|schema|plan|vocabulary|\.parquet|damaged"):
        read_all(folder)


def test_texts_and_tokens_are_given_as_they_are(tmp_path: Path) -> None:
    """Escaping is for whatever shows them; here they are data, and stay what they were."""
    evil = "<script>alert(1)</script>"
    words = {word: i for i, word in enumerate([*WORDS[:2], evil, *WORDS[3:]])}
    core = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", pad_token="</s>")
    given = [text.replace("a", evil) for text in texts()]
    options = {**OPTIONS, "progress": False}
    d = NeuronDictionary.build(tiny(tokenizer=tokenizer), given, tmp_path / "d", **options)
    shown = [t for tokens in d[0, 0].examples("random")["tokens"] for t in tokens]
    assert evil in shown
    assert evil in d.search_text("script")["window"].iloc[0]
    assert "<script" not in repr(d) + repr(d[0, 0])
    d.close()
