"""Exports read back: Neuronpedia's layout by its own field names, and a folder of pages."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
from lenslrp.analysis.dictionary.export import folders as exports
from lenslrp.analysis.dictionary.export.folders import export_html, export_neuronpedia
from lenslrp.analysis.dictionary.export.index_page import index_html
from lenslrp.analysis.units.kinds import Head
from lenslrp.errors import InputError, StorageError
from lenslrp.files import slug
from lenslrp.text.visible_text import running
from tests.conformance.dictionaries import build, contents, model
from tests.conformance.dictionary.test_dictionary_hostile import forged, manifest
from tests.conformance.dictionary.test_unit_page import Parsed

# Columns of apps/webapp/prisma/schema.prisma in github.com/hijohnnylin/neuronpedia: those that have
# no default there and must be given, and all others that may be.
COLUMNS: dict[str, tuple[set[str], set[str]]] = {
    "model": (
        {"id", "creatorId", "layers", "neuronsPerLayer", "owner"},
        {"displayNameShort", "displayName", "tlensId", "dimension", "visibility", "instruct",
         "inferenceEnabled", "website"},
    ),
    "release": (
        {"name", "description", "creatorName", "creatorId", "urls"},
        {"visibility", "descriptionShort", "creatorNameShort", "featured"},
    ),
    "sourceset": (
        {"modelId", "name", "description", "creatorName", "creatorId", "urls"},
        {"visibility", "type", "releaseName", "hasDashboards", "showDfa"},
    ),
    "source": (
        {"id", "modelId", "setName", "creatorId"},
        {"visibility", "num_prompts", "num_tokens_in_prompt", "dataset", "notes"},
    ),
    "features": (
        {"modelId", "layer", "index"},
        {"sourceSetName", "creatorId", "maxActApprox", "hasVector", "vector", "hookName",
         "neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero",
         "freq_hist_data_bar_heights", "freq_hist_data_bar_values"},
    ),
    "activations": (
        {"id", "tokens", "index", "layer", "modelId", "maxValue", "maxValueTokenIndex", "minValue",
         "values", "creatorId"},
        {"dataIndex", "dataSource", "binMin", "binMax", "binContains", "qualifyingTokenIndex"},
    ),
}  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.decode().splitlines()]


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    """All batches of one table, by number."""
    paths = sorted(
        (folder / name).glob("batch-*.jsonl.gz"), key=lambda p: int(re.findall(r"\d+", p.name)[0])
    )
    return [line for path in paths for line in lines(path)]


def test_every_source_has_neuronpedias_files_and_fields(
    built: NeuronDictionary, tmp_path: Path
) -> None:
    folders = export_neuronpedia(built, tmp_path, model_id="Tiny-Llama")
    names = {f.relative_to(tmp_path).as_posix() for f in folders}
    assert names == {
        f"tiny-llama/{layer}-lenslrp-{site}{end}"
        for layer in (0, 1)
        for site in ("mlp-hook_post", "attn-hook_z")
        for end in ("", "-relevance")
    }
    for folder in folders:
        source = lines(folder / "source.jsonl")[0]
        assert source["id"] == folder.name
        assert lines(folder / "sourceset.jsonl")[0]["name"] == source["setName"]
        assert lines(folder / "sourceset.jsonl")[0]["releaseName"] == "lenslrp"
        assert lines(folder / "release.jsonl")[0]["name"] == "lenslrp"
        assert lines(folder / "model.jsonl")[0]["id"] == source["modelId"] == "tiny-llama"
        for name, (needed, optional) in COLUMNS.items():
            found = (
                table(folder, name)
                if name in ("features", "activations")
                else lines(folder / f"{name}.jsonl")
            )
            for line in found:
                assert needed <= set(line) <= needed | optional
                assert line["creatorId"] == exports.CREATOR
        for line in [*table(folder, "features"), *table(folder, "activations")]:
            assert line["layer"] == source["id"]
            assert isinstance(line["index"], str)


@pytest.mark.parametrize("kind", ["activation", "relevance"])
def test_numbers_are_those_of_the_dictionary(
    kind: str, built: NeuronDictionary, tmp_path: Path
) -> None:
    end = "" if kind == "activation" else "-relevance"
    export_neuronpedia(built, tmp_path)
    folder = tmp_path / "llamaforcausallm" / f"1-lenslrp-mlp-hook_post{end}"
    features, shown = table(folder, "features"), table(folder, "activations")
    assert [f["index"] for f in features] == [str(i) for i in range(24)]
    assert len({line["id"] for line in shown}) == len(shown)
    criterion = {"activation": "actmax", "relevance": "relmax"}[kind]
    for unit in (0, 17):
        page = built[1, unit]
        feature = features[unit]
        best = page.examples(criterion)
        assert feature["maxActApprox"] == pytest.approx(best["score"].max(), rel=1e-4)
        assert feature["frac_nonzero"] == pytest.approx(
            page.statistics[f"{kind}_density"], rel=1e-4
        )
        heights, values = (feature[f"freq_hist_data_bar_{n}"] for n in ("heights", "values"))
        assert heights == page.histogram(kind).counts.tolist()
        assert len(values) == len(heights)  # parallel: the webapp indexes one by the other
        assert values == sorted(values)
        written = page.vocabulary().query("role == 'writes'")
        assert feature["pos_str"] == list(written[written["side"] == "top"]["token"])
        assert feature["neg_str"] == list(written[written["side"] == "bottom"]["token"])
        mine = [line for line in shown if line["index"] == str(unit)]
        assert len(mine) == 4 + (10 if kind == "activation" else 0)
        top = [line for line in mine if line["binContains"] == -1]
        for line, row in zip(top, best.itertuples(), strict=True):
            assert line["tokens"] == row.tokens
            assert line["values"] == pytest.approx(list(getattr(row, f"{kind}s")), rel=1e-4)
            assert line["maxValueTokenIndex"] == row.position - row.start
            assert line["maxValue"] == pytest.approx(row.score, rel=1e-3)
            assert line["binMin"] == -1
        deciles = [line for line in mine if line["binContains"] == 0.1]
        for line, following in pairwise(deciles):
            assert line["binMax"] == following["binMin"]


def test_batches_are_bounded_and_bytes_are_repeatable(
    built: NeuronDictionary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export_neuronpedia(built, tmp_path / "whole")[2]
    monkeypatch.setattr(exports, "UNITS_IN_FILE", 10)
    cut = export_neuronpedia(built, tmp_path / "cut")[2]
    assert len(list((cut / "features").iterdir())) == 3
    assert [len(lines(cut / "features" / f"batch-{i}.jsonl.gz")) for i in range(3)] == [10, 10, 4]
    for name in ("features", "activations"):
        assert table(cut, name) == table(whole, name)
    again = export_neuronpedia(built, tmp_path / "again")[2]
    for name in ("features", "activations"):
        assert contents(cut / name) == contents(again / name)


def test_a_dictionary_without_relevance_or_vocabulary_is_exported_too(tmp_path: Path) -> None:
    d = build(tmp_path / "d", criteria=("actmax",), vocabulary=0)
    folders = export_neuronpedia(d, tmp_path / "np")
    assert len(folders) == 4
    feature = table(folders[0], "features")[0]
    assert feature["pos_str"] == []
    assert len(table(folders[0], "activations")) == 4 * len(table(folders[0], "features"))
    assert export_html(d, tmp_path / "pages", [(0, 1)]).exists()
    d.close()


def test_pages_are_linked_and_listed(built: NeuronDictionary, tmp_path: Path) -> None:
    keys = [(0, 3), "blocks.1.mlp.hook_post[5]", Head(0, 1), (0, 3)]
    index = export_html(built, tmp_path / "site", keys, model=model(), examples=2, attributed=2)
    seen = Parsed(index.read_text(encoding="utf-8"))
    pages = {p.name for p in index.parent.iterdir()} - {"index.html"}
    assert set(seen.addresses) == pages
    assert len(pages) == 3
    for name in (
        "blocks.0.mlp.hook_post[3]",
        "blocks.1.mlp.hook_post[5]",
        "blocks.0.attn.hook_z[1]",
    ):
        assert name in seen.text
    hit = built[0, 3].examples("actmax").iloc[0]
    assert hit.tokens[hit.position - hit.start] in seen.text
    for page in pages:
        text = (index.parent / page).read_text(encoding="utf-8")
        assert set(Parsed(text).addresses) <= pages | {"index.html"}
        assert "index.html" in Parsed(text).addresses
        assert "Mean change: off" in text
    with pytest.raises(InputError, match="no units to export"):
        export_html(built, tmp_path / "none", [])
    with pytest.raises(InputError, match="no unit"):
        export_html(built, tmp_path / "none", [(7, 0)])


def test_an_index_holds_what_its_search_reads_and_runs_nothing_else(
    built: NeuronDictionary, tmp_path: Path
) -> None:
    keys = [(0, 3), (1, 5)]
    page = export_html(built, tmp_path / "site", keys).read_text(encoding="utf-8")
    policy = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    scripts = re.findall(r"<script( [^>]*)?>(.*?)</script>", page, flags=re.DOTALL)
    assert [attributes for attributes, _ in scripts] == [
        ' type="application/json" id="sentences"', ""
    ]  # fmt: skip
    digest = base64.b64encode(hashlib.sha256(scripts[1][1].encode()).digest()).decode()
    assert policy == [
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        f"script-src 'sha256-{digest}'"
    ]
    for read, key in zip(json.loads(scripts[0][1]), keys, strict=True):
        rows = [
            "".join(map(running, tokens)).strip()
            for criterion in ("actmax", "relmax")
            for tokens in built[key].examples(criterion)["tokens"]
        ]
        assert read[:-2] == list(dict.fromkeys(rows))
        lists = built[key].vocabulary().query("role == 'writes'")
        for line, side in zip(read[-2:], ("top", "bottom"), strict=True):
            tokens = [running(token).strip() for token in lists.query("side == @side")["token"]]
            assert line == f"writes ({side}): {' '.join(tokens)}"
    for word in ("innerHTML", "fetch(", "eval("):
        assert word not in scripts[1][1]


def test_texts_cannot_end_the_data_of_an_index() -> None:
    evil = "</script><script>alert(1)</script><!--"
    row = {"href": "x.html", "density": "", "largest": "", "relmax": [], "writes": []}
    page = index_html(evil, evil, [{"name": evil, "actmax": [evil], **row}], [[evil]])
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, flags=re.DOTALL)
    assert len(scripts) == 2 and page.count("<script") == 2
    assert json.loads(scripts[0]) == [[evil]]
    assert "matters most at" not in page and "most active at" in page


def test_without_units_all_are_exported(tmp_path: Path) -> None:
    d = build(tmp_path / "d", sites="mlp.hook_post", criteria=("actmax",))
    index = export_html(d, tmp_path / "site", examples=1)
    assert len(list(index.parent.iterdir())) == len(d) + 1
    page = (index.parent / "blocks.0.mlp.hook_post_3-3.html").read_text(encoding="utf-8")
    for name in d.similar((0, 3), 8)["unit"].map(d.name):  # related units are links
        assert re.search(rf'<a href="[^"]*"><code>{re.escape(name)}</code>', page)
    d.close()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("blocks.0.mlp.hook_post[17]", "blocks.0.mlp.hook_post_17"),
        ("../../etc/passwd", "etc_passwd"),
        ("..", "unnamed"),
        ("", "unnamed"),
        ("a\x00b/c\\d:e", "a_b_c_d_e"),
        (".hidden", "hidden"),
        ("x" * 500, "x" * 100),
    ],
)
def test_names_cannot_be_paths(text: str, name: str) -> None:
    assert slug(text) == name


def test_a_strangers_names_stay_inside_the_folder(tmp_path: Path) -> None:
    build(tmp_path / "d", vocabulary=0).close()
    evil = "../../<script>alert(1)</script>"

    def rename(plan: dict[str, Any]) -> None:
        plan["model"]["name"] = evil

    def move(plan: dict[str, Any]) -> None:
        for place in plan["places"]:
            place["hook"] = place["site"] = f"{evil}/{place['hook']}"
        plan["sites"] = [[place["site"], "00"] for place in plan["places"]]

    shutil.copytree(tmp_path / "d", tmp_path / "moved")
    manifest(tmp_path / "moved", forged(move))
    with pytest.raises(StorageError, match="its site are not those of the plan"):
        export_neuronpedia(NeuronDictionary.open(tmp_path / "moved"), tmp_path / "not made")
    shutil.rmtree(tmp_path / "moved")
    shutil.rmtree(tmp_path / "not made", ignore_errors=True)
    manifest(tmp_path / "d", forged(rename))
    d = NeuronDictionary.open(tmp_path / "d")
    before = set(tmp_path.iterdir())
    inside = tmp_path / "out" / "deep"
    export_neuronpedia(d, inside)
    index = export_html(d, inside, [d.name(0), d.name(1)])
    assert set(tmp_path.iterdir()) == before | {tmp_path / "out"}
    assert list((tmp_path / "out").iterdir()) == [inside]
    text = index.read_text(encoding="utf-8")
    assert text.count("<script") == 2  # of its search, whose policy names it by its digest
    assert "&lt;script&gt;alert(1)" in text
    d.close()


@pytest.mark.parametrize("field", ["layer", "hook"])
def test_a_layer_is_a_number_and_a_hook_is_a_name(field: str, tmp_path: Path) -> None:
    build(tmp_path / "d", vocabulary=0).close()
    wrong: Any = {"layer": "../..", "hook": 3}[field]
    manifest(tmp_path / "d", forged(lambda plan: plan["places"][0].update({field: wrong})))
    with pytest.raises(StorageError, match="not the plan of a dictionary"):
        NeuronDictionary.open(tmp_path / "d")
