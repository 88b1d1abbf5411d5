"""Every way that we could think of to damage or forge a dictionary, and a use of all of one.

``python -m tests.conformance.dictionary_damage [N]`` tries each of them, then N random ones (bits
flipped, bytes cut, values replaced), and prints how they end.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import sqlite3
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file

from lenslrp.analysis import export_html, export_neuronpedia, page_html
from lenslrp.analysis.common.storage import contents_sha256, file_record
from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
from lenslrp.analysis.dictionary.export.jsonl import export_jsonl
from lenslrp.analysis.dictionary.pages.terminal import render_unit
from lenslrp.analysis.dictionary.work_folder import FILES
from lenslrp.errors import InputError, LensLRPError
from lenslrp.fingerprints import canonical
from tests.conformance.dictionaries import OPTIONS, texts
from tests.unit.tiny import tiny, word_tokenizer

Damage = Callable[[Path], object]

NAMES = (*sorted(FILES), "manifest.json")
PARQUETS = ("units.parquet", "examples.parquet", "vocabulary.parquet")


class Payload:
    """Would make a file if it were ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT)


def make(path: Path) -> None:
    """A dictionary of five units, which is used in no time."""
    sizes = {"intermediate_size": 3, "num_hidden_layers": 1}
    model = tiny("llama", tokenizer=word_tokenizer(), **sizes)
    options: dict[str, Any] = {**OPTIONS, "k": 2, "sample": 3, "vocabulary": 3, "progress": False}
    NeuronDictionary.build(model, texts(20), path, **options).close()


def use(folder: Path, out: Path, verify: bool = True) -> None:
    """Open a dictionary and use all that is public in it."""
    d = NeuronDictionary.open(folder, verify=verify)
    try:
        len(d), repr(d), d.plan.to_json(), d.slots
        for place in d.plan.places:
            page = d.page(place, place.size - 1)
            repr(page), page.provenance, page.name, page.unit, page.criteria
            for criterion in d.plan.criteria:
                page.examples(criterion)
            for kind in ("activation", *(["relevance"] if d.plan.relevance else [])):
                page.histogram(kind)
        first = d[0, 0]
        _or_refused(first.vocabulary)
        page_html(first)
        render_unit(first, d.plan.criteria, 2)
        _or_refused(lambda: d.search_text("a"))
        d.search_text('b "c d"', criterion=d.plan.criteria[0])
        for by in ("hits", "writes", "reads"):
            _or_refused(lambda by=by: d.search_tokens("a", by=by, criterion=d.plan.criteria[0]))
        d.similar((0, 0))
        d.to_dataframe()
        d.to_dataframe(d.plan.criteria[-1])
        assert len(d.units) == len(d)
        export_html(d, out / "pages", [(0, 0), (0, 1)])
        export_jsonl(d, out / "units.jsonl", [(0, 0), (0, 1)])
        export_neuronpedia(d, out / "neuronpedia")
    finally:
        d.close()


def _or_refused(call: Callable[[], object]) -> None:
    """Lists that a dictionary does not have are refused with a reason: that is an answer."""
    try:
        call()
    except InputError:
        return


def resign_all(folder: Path) -> None:
    """What a stranger does who spoils a file: the manifest has its new checksum."""
    path = folder / "manifest.json"
    if not path.is_file():
        return
    try:
        value = json.loads(path.read_text())
        for name in FILES:
            if (folder / name).is_file() and not (folder / name).is_symlink():
                value["files"][name] = file_record(folder / name)
        path.write_text(json.dumps(value))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # the manifest itself was the target


def damages() -> Iterator[tuple[str, Damage]]:
    """All of them, by name. What they do to a file is signed in the manifest afterwards."""
    yield from _of_files()
    yield from _of_the_manifest()
    yield from _of_parquet()
    yield from _of_texts()
    yield from _of_tensors()


# whole files


def _of_files() -> Iterator[tuple[str, Damage]]:
    for n, name in enumerate(NAMES):
        other = NAMES[(n + 1) % len(NAMES)]

        def change(to: Callable[[bytes], bytes], name: str = name) -> Damage:
            return lambda f: (f / name).write_bytes(to((f / name).read_bytes()))

        yield f"{name} missing", lambda f, name=name: (f / name).unlink()
        yield f"{name} empty", change(lambda b: b"")
        for at in (1, 7, 8, 100, 0.25, 0.5, 0.75, -1, -8):
            yield (
                f"{name} cut at {at}",
                change(lambda b, at=at: b[: int(at * len(b)) if 0 < at < 1 else int(at)]),
            )
        yield f"{name} noise", change(lambda b: random.Random(0).randbytes(len(b)))
        yield f"{name} zeros", change(lambda b: bytes(len(b)))
        yield f"{name} twice", change(lambda b: b + b)
        yield f"{name} text", change(lambda b: b"{}")
        yield f"{name} longer", change(lambda b: b + b"\0" * 64)
        yield f"{name} is {other}", lambda f, a=name, b=other: shutil.copy(f / b, f / a)
        yield f"{name} a folder", lambda f, name=name: ((f / name).unlink(), (f / name).mkdir())
        yield f"{name} a pipe", lambda f, name=name: ((f / name).unlink(), os.mkfifo(f / name))
        yield f"{name} a device", lambda f, name=name: _link(f / name, Path("/dev/zero"))
        yield f"{name} a link out", lambda f, name=name: _link_out(f, name)
        yield f"{name} a circle", lambda f, name=name: _link(f / name, f / name)
        yield (
            f"{name} a pickle",
            lambda f, name=name: (f / name).write_bytes(pickle.dumps(Payload(f.parent / "ran"))),
        )
        for at in range(1, 12, 2):
            yield f"{name} bit at {at}/12", change(lambda b, at=at: flipped(b, len(b) * at // 12))


def flipped(content: bytes, at: int, bit: int = 4) -> bytes:
    made = bytearray(content)
    made[at] ^= 1 << bit
    return bytes(made)


def _link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def _link_out(folder: Path, name: str) -> None:
    shutil.copy(folder / name, folder.parent / "elsewhere")
    _link(folder / name, folder.parent / "elsewhere")


# the manifest and its plan

WRONG: dict[str, Any] = {
    "null": None,
    "number": 3,
    "negative": -1,
    "huge": 10**30,
    "fraction": 1.5,
    "nan": float("nan"),
    "infinity": float("inf"),
    "text": "<script>",
    "list": [],
    "object": {},
    "lists": [[[[]]]],
    "true": True,
}


def manifest(change: Callable[[dict[str, Any]], object], forged: bool = False) -> Damage:
    """A change of ``manifest.json``; ``forged`` signs the plan again."""

    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        value = json.loads(path.read_text())
        change(value)
        if forged:
            value["plan_sha256"] = hashlib.sha256(canonical(value["plan"]).encode()).hexdigest()
        path.write_text(json.dumps(value))

    return damage


def _of_the_manifest() -> Iterator[tuple[str, Damage]]:
    keys = ("schema", "plan", "plan_sha256", "slots", "tokens_seen", "vocabulary", "libraries",
            "files")  # fmt: skip
    for key in keys:
        yield f"manifest without {key}", manifest(lambda m, key=key: m.pop(key))
        for kind, value in WRONG.items():
            yield (
                f"manifest {key} {kind}",
                manifest(lambda m, key=key, value=value: m.update({key: value})),
            )
    plan = ("schema", "model", "tokenizer", "corpus", "places", "sites", "criteria", "k", "sample",
            "window", "skip_first", "target", "rules", "attention", "through", "seed")  # fmt: skip
    for key in plan:
        yield f"plan without {key}", manifest(lambda m, key=key: m["plan"].pop(key), True)
        for kind, value in WRONG.items():
            yield (
                f"plan {key} {kind}",
                manifest(lambda m, key=key, value=value: m["plan"].update({key: value}), True),
            )
    inside = {
        "model": ("name", "architecture", "dtype", "weights"),
        "corpus": ("cut", "documents", "tokens", "name", "digest"),
        "rules": ("name",),
    }
    for part, names in inside.items():
        for key in names:
            yield (
                f"plan {part} without {key}",
                manifest(lambda m, a=part, b=key: m["plan"][a].pop(b), True),
            )
            for kind in ("null", "negative", "huge", "nan", "lists", "text"):
                yield (
                    f"plan {part} {key} {kind}",
                    manifest(
                        lambda m, a=part, b=key, v=WRONG[kind]: m["plan"][a].update({b: v}), True
                    ),
                )
    for key in ("hook", "site", "kind", "layer", "first", "size"):
        for kind in ("null", "negative", "huge", "lists", "text", "number"):
            yield (
                f"plan place {key} {kind}",
                manifest(
                    lambda m, k=key, v=WRONG[kind]: m["plan"]["places"][1].update({k: v}), True
                ),
            )
    for key in ("context", "block", "bos", "field"):
        for kind in ("null", "negative", "huge", "lists"):
            yield (
                f"plan cut {key} {kind}",
                manifest(
                    lambda m, k=key, v=WRONG[kind]: m["plan"]["corpus"]["cut"].update({k: v}), True
                ),
            )
    more: dict[str, Callable[[dict[str, Any]], object]] = {
        "extra key": lambda m: m["plan"].update(extra=1),
        "places reversed": lambda m: m["plan"]["places"].reverse(),
        "places twice": lambda m: m["plan"].update(places=m["plan"]["places"] * 2),
        "a place less": lambda m: m["plan"]["places"].pop(),
        "a large place": lambda m: m["plan"]["places"][-1].update(size=10**8),
        "criteria twice": lambda m: m["plan"].update(criteria=["actmax", "actmax"]),
        "another order of criteria": lambda m: m["plan"]["criteria"].reverse(),
        "unknown criterion": lambda m: m["plan"].update(criteria=["../../x"]),
        "no relevance": lambda m: m["plan"].update(criteria=["actmax"]),
        "another window": lambda m: m["plan"].update(window=[9, 9]),
        "a wide window": lambda m: m["plan"].update(window=[10**9, 10**9]),
        "a window of texts": lambda m: m["plan"].update(window=["a", "b"]),
        "fewer documents": lambda m: m["plan"]["corpus"].update(documents=5),
        "no sites": lambda m: m["plan"].update(sites=[]),
        "sites of numbers": lambda m: m["plan"].update(sites=[1, 2]),
        "a hook that is a path": lambda m: m["plan"]["places"][0].update(hook="../../../x"),
        "a hook that is markup": lambda m: m["plan"]["places"][0].update(hook="<script>x</script>"),
        "a name that is a path": lambda m: m["plan"]["model"].update(name="/../../../tmp/x"),
        "through markup": lambda m: m["plan"].update(through=["<b>"]),
        "another layer": lambda m: m["plan"]["places"][0].update(layer=10**6),
    }
    for name, change in more.items():
        yield f"plan: {name}", manifest(change, True)
    slots: dict[str, Any] = {
        "one": [["actmax", 0]],
        "reversed": None,
        "negative": [["actmax", -1]],
        "unknown": [["none", 0]],
        "numbers": [[0, 0]],
        "long": [["actmax", n] for n in range(10**5)],
        "triples": [["actmax", 0, 0]],
    }
    for name, value in slots.items():
        yield (
            f"slots {name}",
            manifest(lambda m, v=value: m.update(slots=m["slots"][::-1] if v is None else v)),
        )
    vocabulary: dict[str, Any] = {
        "tokens huge": {"tokens": 10**9, "missing": {}},
        "tokens negative": {"tokens": -1, "missing": {}},
        "tokens none": {"tokens": 0, "missing": {}},
        "missing list": {"tokens": 10, "missing": []},
        "missing lists": {"tokens": 10, "missing": {"mlp.hook_post": []}},
        "missing numbers": {"tokens": 10, "missing": {"mlp.hook_post": {"writes": 1}}},
    }
    for name, value in vocabulary.items():
        yield f"vocabulary {name}", manifest(lambda m, v=value: m.update(vocabulary=v))
    for name in ("../../secret", "/etc/passwd", "a/../../b", "secret\0", "", ".", "units.parquet/"):
        yield (
            f"files names {name!r}",
            manifest(lambda m, n=name: m["files"].update({n: {"bytes": 1, "sha256": "0"}})),
        )
        yield (
            f"files renamed {name!r}",
            manifest(lambda m, n=name: m["files"].update({n: m["files"].pop("units.parquet")})),
        )
    for kind, value in WRONG.items():
        yield (
            f"record {kind}",
            manifest(lambda m, v=value: m["files"].update({"texts.sqlite": v})),
        )
    texts: dict[str, Callable[[str], bytes]] = {
        "not UTF-8": lambda t: t.replace("mlp", "\xff").encode("latin-1"),
        "UTF-16": lambda t: t.encode("utf-16"),
        "with a mark": lambda t: b"\xef\xbb\xbf" + t.encode(),
        "nested": lambda t: b'{"schema": 1, "plan": ' + b"[" * 200_000,
        "nested and closed": lambda t: b'{"a":' * 5000 + b"1" + b"}" * 5000,
        "nested inside": lambda t: t.replace(
            '"libraries": {', '"libraries": {"a": ' + "[" * 900 + "]" * 900 + ", ", 1
        ).encode(),
        "a list": lambda t: b"[" + t.encode() + b"]",
        "a number": lambda t: b"1",
        "keys twice": lambda t: b'{"schema": 99, ' + t.lstrip()[1:].encode(),
        "a long number": lambda t: t.replace('"schema": 1', '"schema": ' + "9" * 10_000).encode(),
        "surrogates": lambda t: t.replace("mlp.hook_post", "\\ud800").encode(),
        "17 MB": lambda t: t.encode() + b" " * (17 << 20),
        "half": lambda t: t.encode()[: len(t) // 2] + b'"}',
    }
    for name, change in texts.items():
        yield (
            f"manifest {name}",
            lambda f, c=change: (f / "manifest.json").write_bytes(
                c((f / "manifest.json").read_text())
            ),
        )


# parquet


def parquet(name: str, change: Callable[[pa.Table], pa.Table], **options: Any) -> Damage:
    """A change of a file's table, in row groups of their old sizes."""

    def damage(folder: Path) -> None:
        path = folder / name
        with pq.ParquetFile(path) as file:
            table = file.read()
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        made = change(table)
        options.setdefault("compression", "zstd")
        with pq.ParquetWriter(path, made.schema, **options) as writer:
            start = 0
            for n, size in enumerate(sizes):
                last = n == len(sizes) - 1
                some = made.slice(start) if last else made.slice(start, size)
                if some.num_rows:
                    writer.write_table(some, row_group_size=max(1, some.num_rows))
                start += size

    return damage


def column(name: str, values: Callable[[pa.ChunkedArray], Any]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        at = table.column_names.index(name)
        return table.set_column(at, name, values(table[name]))

    return change


def _of_parquet() -> Iterator[tuple[str, Damage]]:
    columns = {
        "units.parquet": ("unit", "site", "layer", "index", "activation_mean", "activation_density",
                          "activation_max", "activation_histogram", "relevance_histogram"),
        "examples.parquet": ("unit", "criterion", "rank", "score", "document", "position", "start",
                             "activations", "relevances"),
        "vocabulary.parquet": ("unit", "role", "name", "side", "rank", "id", "score"),
    }  # fmt: skip
    for name, own in columns.items():
        for each in own:
            cases: dict[str, Callable[[pa.Table], pa.Table]] = {
                "gone": lambda t, c=each: t.drop_columns([c]),
                "renamed": lambda t, c=each: t.rename_columns(
                    ["other" if n == c else n for n in t.column_names]
                ),
                "text": column(each, lambda v: pa.array(["x"] * len(v))),
                "nulls": column(each, lambda v: pa.nulls(len(v), v.type)),
                "one null": column(each, lambda v: pa.array([None, *v.to_pylist()[1:]], v.type)),
                "reversed": column(each, lambda v: v.take(pa.array(range(len(v))[::-1]))),
                "all the first": column(each, lambda v: v.take(pa.array([0] * len(v)))),
            }
            for case, change in cases.items():
                yield f"{name} {each} {case}", parquet(name, change)
            for number in (-1, 2**15 - 1, 127):
                yield (
                    f"{name} {each} {number}",
                    parquet(name, column(each, lambda v, n=number: _filled(v, n))),
                )
            for number in (float("nan"), float("inf"), -float("inf"), 3e38):
                yield (
                    f"{name} {each} {number}",
                    parquet(name, column(each, lambda v, n=number: _filled(v, n))),
                )
        tables: dict[str, Callable[[pa.Table], pa.Table]] = {
            "no rows": lambda t: t.slice(0, 0),
            "one row": lambda t: t.slice(0, 1),
            "a row less": lambda t: t.slice(0, len(t) - 1),
            "a row more": lambda t: pa.concat_tables([t, t.slice(0, 1)]),
            "rows twice": lambda t: pa.concat_tables([t, t]),
            "the same row": lambda t: t.take(pa.array([0] * len(t))),
            "rows reversed": lambda t: t.take(pa.array(range(len(t))[::-1])),
            "a column more": lambda t: t.append_column("extra", pa.nulls(len(t))),
            "columns reversed": lambda t: t.select(t.column_names[::-1]),
        }
        for case, change in tables.items():
            yield f"{name} {case}", parquet(name, change)
        for packed in ("none", "snappy", "gzip"):
            yield f"{name} packed by {packed}", parquet(name, lambda t: t, compression=packed)
        yield f"{name} without statistics", parquet(name, lambda t: t, write_statistics=False)
        yield f"{name} not packed by words", parquet(name, lambda t: t, use_dictionary=False)
        yield f"{name} in one group", lambda f, n=name: pq.write_table(pq.read_table(f / n), f / n)
    of_lists = (
        ("examples.parquet", "activations"),
        ("examples.parquet", "relevances"),
        ("units.parquet", "activation_histogram"),
    )
    for name, each in of_lists:
        lists: dict[str, Callable[[list[Any]], list[Any]]] = {
            "empty": lambda rows: [[]] * len(rows),
            "short": lambda rows: [row[:-1] for row in rows],
            "long": lambda rows: [[*row, row[0]] for row in rows],
            "with nulls": lambda rows: [[None, *row[1:]] for row in rows],
            "a bomb": lambda rows: [[0] * 3_000_000, *rows[1:]],
        }
        for case, make in lists.items():
            yield (
                f"{name} {each} {case}",
                parquet(name, column(each, lambda v, m=make: pa.array(m(v.to_pylist()), v.type))),
            )
    of_words = (
        ("units.parquet", "site"),
        ("units.parquet", "hook"),
        ("examples.parquet", "criterion"),
        ("vocabulary.parquet", "role"),
    )
    for name, each in of_words:
        yield f"{name} {each} not UTF-8", parquet(name, column(each, _not_utf8))
        yield (
            f"{name} {each} a bomb",
            parquet(name, column(each, lambda v: _dictionary(v, ["x" * 50_000_000] * 1)),
                    use_dictionary=True),
        )  # fmt: skip


def _filled(values: pa.ChunkedArray, number: float) -> pa.Array:
    """A column of one number, or of lists of it, as far as its type can hold it."""
    lists = pa.types.is_list(values.type)
    inner = values.type.value_type if lists else values.type
    if not (pa.types.is_floating(inner) or pa.types.is_integer(inner)):
        return pa.array(["x"] * len(values)).cast(values.type)
    if pa.types.is_integer(inner):
        number = int(number) if np.isfinite(number) and abs(number) < 1e9 else -(2**7)
        number = max(-(2**7), min(number, 2**7 - 1)) if inner == pa.int8() else number
    rows = [[number] * len(row) for row in values.to_pylist()] if lists else [number] * len(values)
    return pa.array(rows, values.type)


def _not_utf8(values: pa.ChunkedArray) -> pa.Array:
    made = pa.array([b"\xff\xfe"] * len(values), pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(made), made.buffers())
    if pa.types.is_dictionary(values.type):
        codes = pa.array([0] * len(values), pa.int8())
        return pa.DictionaryArray.from_arrays(codes, text.slice(0, 1))
    return text


def _dictionary(values: pa.ChunkedArray, words: list[str]) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        codes = pa.array([0] * len(values), pa.int8())
        return pa.DictionaryArray.from_arrays(codes, pa.array(words))
    return pa.array([words[0], *["x"] * (len(values) - 1)])


# texts


def sql(*statements: str) -> Damage:
    def damage(folder: Path) -> None:
        with closing(sqlite3.connect(folder / "texts.sqlite")) as database:
            for statement in statements:
                database.execute(statement)
            database.commit()

    return damage


def _of_texts() -> Iterator[tuple[str, Damage]]:
    values = {
        "null": "NULL", "text": "'x'", "blob": "x'ff00ff'", "negative": "-1", "fraction": "1.5",
        "huge": str(2**62), "not UTF-8": "CAST(x'fffe' AS TEXT)", "empty": "''",
        "infinity": "9e999", "long": "zeroblob(2000000)",
    }  # fmt: skip
    for each in ("source", "start", "tokens", "aim_position", "aim_token", "aim_value", "text"):
        for case, value in values.items():
            yield f"documents {each} {case}", sql(f"UPDATE documents SET {each} = {value}")
    for case in ("null", "blob", "not UTF-8", "fraction", "long"):
        yield f"tokens {case}", sql(f"UPDATE tokens SET text = {values[case]}")
    statements = {
        "no documents": "DELETE FROM documents",
        "a document less": "DELETE FROM documents WHERE id = (SELECT max(id) FROM documents)",
        "other ids": "UPDATE documents SET id = id + 1000000",
        "no tokens": "DELETE FROM tokens",
        "negative tokens": "UPDATE documents SET tokens = x'ffffffff' || tokens",
        "short documents": "UPDATE documents SET tokens = x'01000000'",
        "tokens of no size": "UPDATE documents SET tokens = x'0102030405'",
        "no index": "DELETE FROM search_data",
        "an index of zeros": "UPDATE search_data SET block = zeroblob(length(block))",
        "an index of noise": "UPDATE search_data SET block = randomblob(length(block))",
        "an index of texts": "UPDATE search_data SET block = 'x'",
        "an index of nulls": "UPDATE search_data SET block = NULL",
        "a large index": "UPDATE search_data SET block = zeroblob(1000000)",
        "no sizes": "DELETE FROM search_docsize",
        "sizes of texts": "UPDATE search_docsize SET sz = 'x'",
        "no configuration": "DELETE FROM search_config",
        "another version": "UPDATE search_config SET v = 99",
        "another configuration": "INSERT INTO search_config VALUES ('rank', 'load_extension(1)')",
        "no segments": "DELETE FROM search_idx",
        "a view": "CREATE VIEW extra AS SELECT 1",
        "a trigger": "CREATE TRIGGER extra AFTER INSERT ON documents BEGIN SELECT 1; END",
        "a table": "CREATE TABLE extra (x)",
        "a virtual table": "CREATE VIRTUAL TABLE extra USING fts5(x)",
        "an index on documents": "CREATE INDEX extra ON documents (text)",
        "a column more": "ALTER TABLE documents ADD COLUMN extra",
        "no search": "DROP TABLE search",
        "no table of tokens": "DROP TABLE tokens",
    }
    for case, statement in statements.items():
        yield f"texts: {case}", sql(statement)
    yield (
        "texts: documents that are a view",
        sql("ALTER TABLE documents RENAME TO d", "CREATE VIEW documents AS SELECT * FROM d"),
    )
    yield (
        "texts: a schema of its own",
        sql(
            "PRAGMA writable_schema = ON",
            "UPDATE sqlite_schema SET sql = 'CREATE VIRTUAL TABLE search USING "
            "fts5(text, content=''sqlite_schema'')' WHERE name = 'search'",
        ),
    )
    yield (
        "texts: a schema that is not UTF-8",
        sql(
            "PRAGMA writable_schema = ON",
            "UPDATE sqlite_schema SET sql = CAST(x'c195fffe' AS TEXT), name = CAST(x'c195' AS TEXT)"
            " WHERE name = 'documents'",
        ),
    )
    for at, byte in ((16, 0), (18, 9), (19, 9), (20, 255), (21, 1), (44, 99), (56, 2), (56, 9)):
        yield (
            f"texts: header byte {at} {byte}",
            lambda f, a=at, b=byte: _poke(f / "texts.sqlite", a, bytes([b])),
        )
    for name in ("-journal", "-wal", "-shm"):
        yield (
            f"texts: with {name}",
            lambda f, n=name: (f / f"texts.sqlite{n}").write_bytes(
                (f / "texts.sqlite").read_bytes()
            ),
        )


def _poke(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


# safetensors


def tensors(name: str, change: Callable[[dict[str, Any]], object], signed: bool = True) -> Damage:
    """A change of the tensors in a file, its own checksum made right unless ``signed`` is false."""

    def damage(folder: Path) -> None:
        import torch

        found = {key: value.copy() for key, value in load_file(folder / name).items()}
        change(found)
        found = {key: np.ascontiguousarray(value) for key, value in found.items()}
        about = {"sha256": contents_sha256({k: torch.tensor(v) for k, v in found.items()}, {})}
        save_file(found, folder / name, metadata=about if signed else None)

    return damage


def _of_tensors() -> Iterator[tuple[str, Damage]]:
    own = {
        "citations.safetensors": (
            "documents",
            "offsets",
            "entries",
            "positions",
            "tokens",
            "scores",
        ),
        "samples.safetensors": ("activation", "relevance"),
    }
    for name, keys in own.items():
        yield f"{name} without a checksum", tensors(name, lambda t: None, signed=False)
        yield f"{name} with another", tensors(name, lambda t: t.update(extra=np.zeros(3)))
        yield f"{name} with a path", tensors(name, lambda t: t.update({"../../x": np.zeros(3)}))
        for key in keys:
            cases: dict[str, Callable[[Any], Any]] = {
                "floats": lambda v: v.astype(np.float64),
                "bytes": lambda v: v.astype(np.uint8),
                "booleans": lambda v: v.astype(bool),
                "empty": lambda v: v[:0],
                "shorter": lambda v: v[:-1],
                "twice": lambda v: np.concatenate([v, v]),
                "flat": lambda v: v.reshape(-1),
                "a number": lambda v: v.reshape(-1)[0].reshape(()),
                "deep": lambda v: v[None, ..., None],
                "zeros": lambda v: np.zeros_like(v),
                "negative": lambda v: np.full_like(v, -1),
                "largest": lambda v: np.full_like(
                    v, np.inf if v.dtype.kind == "f" else np.iinfo(v.dtype).max
                ),
                "smallest": lambda v: np.full_like(
                    v, np.nan if v.dtype.kind == "f" else np.iinfo(v.dtype).min
                ),
                "reversed": lambda v: v[::-1],
            }
            yield f"{name} without {key}", tensors(name, lambda t, k=key: t.pop(k))
            for case, make in cases.items():
                yield (
                    f"{name} {key} {case}",
                    tensors(name, lambda t, k=key, m=make: t.update({k: m(t[k])})),
                )
        headers: dict[str, bytes] = {
            "huge": struct.pack("<Q", 2**50) + b"{}" * 50,
            "largest": struct.pack("<Q", 2**64 - 1) + b"{}" * 50,
            "nested": _header(b'{"a":' * 100_000),
            "not UTF-8": _header(b'{"\xff\xfe": 1}'),
            "a list": _header(b"[]"),
            "empty": _header(b"{}"),
            "offsets outside": _header(
                b'{"documents":{"dtype":"I64","shape":[9],"data_offsets":[0,72]}}'
            ),
            "offsets backwards": _header(
                b'{"documents":{"dtype":"I64","shape":[1],"data_offsets":[8,0]}}'
            ),
            "huge shape": _header(
                b'{"documents":{"dtype":"I64","shape":[4611686018427387904,4],'
                b'"data_offsets":[0,8]}}' + b" " * 8
            ),
            "unknown type": _header(
                b'{"documents":{"dtype":"X9","shape":[1],"data_offsets":[0,8]}}'
            ),
            "numbers as metadata": _header(b'{"__metadata__":{"sha256":1}}'),
        }
        for case, content in headers.items():
            yield f"{name} header {case}", lambda f, n=name, c=content: (f / n).write_bytes(c)


def _header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + b"\0" * 8


def randomly(draw: random.Random) -> tuple[str, Damage]:
    """Bits flipped, bytes cut, moved or doubled, or a value of the manifest replaced, at random."""
    name = draw.choice(NAMES)
    seed = draw.randrange(2**32)

    def damage(folder: Path) -> None:
        own, path = random.Random(seed), folder / name
        content = bytearray(path.read_bytes())
        for _ in range(own.choice((1, 1, 2, 8, 64))):
            at = own.randrange(len(content))
            kind = own.randrange(5)
            if kind < 2:
                content[at] ^= 1 << own.randrange(8)
            elif kind == 2:
                content[at] = own.choice((0, 1, 127, 128, 255))
            elif kind == 3:
                end = min(len(content), at + own.randrange(1, 40))
                content[at:end] = own.randbytes(end - at)
            elif len(content) > 100:
                del content[at : at + own.randrange(1, 20)]
        path.write_bytes(bytes(content))

    return f"{name} at random {seed}", damage


def main(count: int) -> None:
    """Try all, and ``count`` random ones, signed; print outcomes by kind."""
    outcomes: Counter[str] = Counter()
    worst: list[tuple[float, str]] = []
    draw = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    with tempfile.TemporaryDirectory() as place:
        good = Path(place) / "good"
        make(good)
        tried = [*damages(), *(randomly(draw) for _ in range(count))]
        for name, damage in tried:
            for signed, verify in ((True, True), (False, False)):
                folder = Path(shutil.copytree(good, Path(place) / "d"))
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                damage(folder)
                made = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                if signed:
                    resign_all(folder)
                start = time.perf_counter()
                try:
                    use(folder, Path(place) / "out", verify)
                    outcome = "opened"
                except LensLRPError as error:
                    outcome = type(error).__name__
                except Exception as error:  # noqa: BLE001 - what is looked for
                    outcome = f"RAW {type(error).__name__}"
                    print(f"{name} (signed {signed}, verify {verify}):")
                    traceback.print_exc(limit=-4)
                worst.append((time.perf_counter() - start, name))
                grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - max(peak, made)
                if grown > 200_000:
                    print(f"{name}: {grown // 1000} MB more", flush=True)
                outcomes[f"{'signed' if signed else 'unsigned'}, verify={verify}: {outcome}"] += 1
                shutil.rmtree(folder)
                shutil.rmtree(Path(place) / "out", ignore_errors=True)
        if (Path(place) / "ran").exists():
            print("CODE RAN")
    print(f"{len(tried)} damages")
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:6d}  {outcome}")
    print("slowest:", *(f"{seconds:.1f} s {name}" for seconds, name in sorted(worst)[-3:]))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
