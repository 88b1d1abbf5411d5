"""``lenslrp dictionary``: what it makes, what it prints, and how it says no."""

from __future__ import annotations

import json
import shutil

import pytest

from lenslrp.analysis.dictionary import job, plan
from lenslrp.analysis.dictionary.block_pass import CORPUS_TARGETS
from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
from lenslrp.analysis.dictionary.export import folders as exports
from lenslrp.analysis.dictionary.pages.page import page_html
from lenslrp.analysis.units import readability
from lenslrp.cli import commands as cli
from lenslrp.cli import dictionary as cli_dictionary
from lenslrp.models import loading
from lenslrp.text.visible_text import visible
from tests.conformance.dictionaries import contents, model, texts

OPTIONS = ["--sites", "mlp.hook_post", "attn.hook_z", "--k", "3", "--context", "12"]


@pytest.fixture(scope="module")
def bridge():
    return model()


@pytest.fixture(scope="module")
def built(tmp_path_factory, bridge):
    """A folder with a corpus and a dictionary of it, both by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    lines = [json.dumps({"body": text}) + "\n" for text in texts()]
    (folder / "corpus.jsonl").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load", lambda name, **_: bridge)
        assert cli.main(build(folder, "d")) == 0
    return folder


@pytest.fixture
def folder(built, bridge, monkeypatch):
    """The same, where every name of a model is the tiny one's."""
    monkeypatch.setattr(loading, "load", lambda name, **_: bridge)
    monkeypatch.chdir(built)
    return built


def build(folder, name, *more):
    where = [str(folder / "corpus.jsonl"), str(folder / name)]
    fixed = ["--field", "body", "--batch-size", "4", "--vocabulary", "3"]
    return ["dictionary", "build", "tiny", *where, *OPTIONS, *fixed, *more]


def test_build_makes_what_its_options_say(folder):
    d = NeuronDictionary.open(folder / "d")
    assert [name for name, _ in d.plan.sites] == ["mlp.hook_post", "attn.hook_z"]
    assert (d.plan.k, d.plan.corpus["cut"]["context"], d.plan.block) == (3, 12, 4)
    assert d.plan.corpus["cut"]["field"] == "body"
    assert (d.plan.target, d.plan.rules["name"]) == ("next", "AttnLRP")
    assert d.manifest["vocabulary"]["tokens"] == 3
    d.close()


def test_other_criteria_target_and_rules(folder, tmp_path, capsys):
    rest = ["--criteria", "relmax", "actmax", "--target", "argmax", "--composite", "CPLRP"]
    assert cli.main(build(folder, tmp_path / "d", *rest)) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'd'}: NeuronDictionary(")
    d = NeuronDictionary.open(tmp_path / "d")
    assert d.plan.criteria == ("relmax", "actmax")
    assert (d.plan.target, d.plan.rules["name"]) == ("argmax", "CP-LRP")
    d.close()


def test_shards_by_hand_merge_to_the_same_bytes(folder, tmp_path, capsys):
    path = str(tmp_path / "d")
    merge = ["dictionary", "merge", "tiny", path, "--vocabulary", "3"]
    assert cli.main(merge) == 2
    assert "no plan.json: there are no shards to merge" in capsys.readouterr().err
    assert cli.main(build(folder, path, "--shard", "1/2")) == 0
    assert capsys.readouterr().out.endswith("shard-00001-of-00002.safetensors\n")
    assert cli.main(merge) == 2
    assert "given are ranks [1] of [2]" in capsys.readouterr().err
    assert cli.main(build(folder, path, "--shard", "0/2", "--k", "4")) == 2
    assert "k differ" in capsys.readouterr().err
    assert cli.main(build(folder, path, "--shard", "0/2")) == 0
    assert cli.main(merge) == 0
    assert contents(tmp_path / "d") == contents(folder / "d")


def test_merge_refuses_another_model_and_what_was_made_in_python(
    folder, tmp_path, monkeypatch, capsys
):
    path = str(tmp_path / "d")
    assert cli.main(build(folder, path, "--shard", "0/1")) == 0
    other = model(seed=1)
    monkeypatch.setattr(loading, "load", lambda name, **_: other)
    assert cli.main(["dictionary", "merge", "tiny", path]) == 2
    assert "model differ" in capsys.readouterr().err
    file = tmp_path / "d" / "work" / "plan.json"
    value = json.loads(file.read_text())
    value["sites"] = [["blocks.0.hook_resid_post[sae]", "00"]]
    for place in value["places"]:
        place["site"] = "blocks.0.hook_resid_post[sae]"
    value["rules"]["name"] = "mine"
    file.write_text(json.dumps(value))
    assert cli.main(["dictionary", "merge", "tiny", path]) == 2
    message = capsys.readouterr().err
    assert "made in Python; merge them there: blocks.0.hook_resid_post[sae]; rules mine" in message


def test_a_launcher_shares_out_by_itself(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = []
    monkeypatch.setattr(
        "lenslrp.analysis.dictionary.launch.build_distributed",
        lambda model, corpus, path, **options: asked.append(options),
    )
    assert cli.main(build(folder, tmp_path / "d")) == 0
    assert asked[0]["vocabulary"] == 3
    assert capsys.readouterr().out == ""
    assert cli.main(build(folder, tmp_path / "d", "--shard", "0/2")) == 2
    assert "--shard is for processes started by hand" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "local", "device"),
    [([], "1", "cuda:1"), ([], "5", "cuda:1"), (["--device", "cpu"], "1", "cpu")],
)
def test_each_process_of_a_launcher_has_its_own_gpu(
    folder, tmp_path, monkeypatch, given, local, device
):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", local)):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    asked = []
    monkeypatch.setattr(loading, "load", lambda name, **options: asked.append(options["device"]))
    monkeypatch.setattr(
        "lenslrp.analysis.dictionary.launch.build_distributed", lambda *_, **__: None
    )
    assert cli.main(build(folder, tmp_path / "d", *given)) == 0
    assert asked == [device]


@pytest.mark.parametrize("unit", ["blocks.1.mlp.hook_post[17]", "1,17"])
def test_show_has_identity_vocabulary_statistics_and_sentences(folder, capsys, unit):
    assert cli.main(["dictionary", "show", "d", unit, "--k", "2"]) == 0
    printed = capsys.readouterr().out
    d = NeuronDictionary.open(folder / "d")
    page = d[1, 17]
    assert "blocks.1.mlp.hook_post[17]" in printed
    assert "neuron of LlamaForCausalLM" in printed
    vocabulary = page.vocabulary()
    for name, label in (("out", "writes"), ("in", "reads (in)"), ("gate", "reads (gate)")):
        some = vocabulary[(vocabulary["name"] == name) & (vocabulary["side"] == "top")]
        rows = printed.splitlines()
        first = next(i for i, line in enumerate(rows) if line.startswith(label + " "))
        row = " ".join(rows[first : first + 4])  # the list is as wide as the terminal lets it be
        assert visible(some["token"].iloc[0]) in row and "(no group" in row  # rows are random
    assert f"{page.statistics['relevance_kurtosis']:.4g}" in printed
    for criterion in ("actmax", "relmax"):
        assert criterion in printed
        for row in page.examples(criterion).head(2).itertuples():
            assert f"document {row.doc}" in printed
            assert f">{visible(row.tokens[row.position - row.start])} (" in printed
    assert "(logit " in printed
    assert "3. " not in printed
    d.close()


def test_show_takes_criteria(folder, capsys):
    assert cli.main(["dictionary", "show", "d", "1,3", "--criterion", "deciles", "--k", "1"]) == 0
    printed = capsys.readouterr().out
    assert "deciles" in printed
    assert "actmax" not in printed


def test_show_writes_the_page(folder, bridge, tmp_path, capsys):
    file = tmp_path / "unit.html"
    assert cli.main(["dictionary", "show", "d", "1,3", "--html", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    d = NeuronDictionary.open(folder / "d")
    assert file.read_text() == page_html(d[1, 3])
    asked = ["dictionary", "show", "d", "1,3", "--html", str(file), "--model", "tiny"]
    assert cli.main(asked) == 0
    assert file.read_text() == page_html(d[1, 3], model=bridge)
    d.close()


@pytest.mark.parametrize(
    ("arguments", "method", "options"),
    [
        (["c"], "search_text", {"limit": 20}),
        (["c", "--criterion", "relmin", "--limit", "3"], "search_text",
         {"criterion": "relmin", "limit": 3}),
        (["c", "--tokens"], "search_tokens", {"limit": 20}),
        (["c", "--by", "hits", "--criterion", "relmin"], "search_tokens",
         {"criterion": "relmin", "limit": 20}),
        (["c", "--by", "writes", "--limit", "2"], "search_tokens", {"by": "writes", "limit": 2}),
        (["c", "--by", "reads"], "search_tokens", {"by": "reads", "limit": 20}),
    ],
)  # fmt: skip
def test_search_prints_what_the_dictionary_finds(folder, capsys, arguments, method, options):
    d = NeuronDictionary.open(folder / "d")
    expected = getattr(d, method)("c", **options)
    d.close()
    assert len(expected)
    assert cli.main(["dictionary", "search", "d", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == expected.to_dict("records")
    assert cli.main(["dictionary", "search", "d", *arguments]) == 0
    printed = capsys.readouterr().out
    for row in expected.itertuples():
        assert f"{row.hook}[{row.index}]" in printed
        if method == "search_text":  # on lines of its own, as wide as the terminal
            assert "".join(row.window.split()) in "".join(printed.split())
            below = [line.strip() for line in printed.splitlines() if line.startswith("    ")]
            assert any(line and row.window.strip().startswith(line) for line in below)


def test_nothing_found_is_said_beside_the_results(folder, capsys):
    assert cli.main(["dictionary", "search", "d", "zzzz"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "nothing found\n")
    assert cli.main(["dictionary", "search", "d", "zzzz", "--json"]) == 0
    assert capsys.readouterr().out == "[]\n"


def test_tokens_reach_the_terminal_as_text(folder, tmp_path, capsys, monkeypatch):
    """Neither rich's markup nor control characters act, whatever a stranger's token is."""
    evil = "[red]\x1b[2Jx[/red]"
    monkeypatch.setattr("lenslrp.analysis.dictionary.texts.Texts.token", lambda self, token: evil)
    for command in (["show", "d", "1,3"], ["search", "d", "c", "--by", "writes"]):
        assert cli.main(["dictionary", *command]) == 0
        printed = capsys.readouterr().out
        assert "\x1b" not in printed
        assert "[red]⟨U+001B⟩[2Jx[/red]" in printed.replace("\n", "")


def test_export_as_lines_of_json(folder, tmp_path, capsys):
    out = tmp_path / "units.jsonl"
    assert cli.main(["dictionary", "export", "d", "--format", "jsonl", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    d = NeuronDictionary.open(folder / "d")
    assert len(lines) == len(d)
    line, page = lines[33], d["blocks.1.mlp.hook_post[5]"]
    assert (line["unit"], line["layer"], line["index"], line["kind"]) == (page.name, 1, 5, "neuron")
    assert line["vocabulary"] == page.vocabulary().to_dict("records")
    assert line["statistics"]["activation_mean"] == page.statistics["activation_mean"]
    best = page.examples("relmax").iloc[0]
    mine = next(entry for entry in line["examples"] if entry["criterion"] == "relmax")
    assert (mine["score"], mine["tokens"], mine["doc"]) == (best.score, best.tokens, best.doc)
    assert mine["relevances"] == pytest.approx(best.relevances.tolist(), rel=1e-4)
    some = ["--units", "1,5", "blocks.0.attn.hook_z[1]"]
    cli.main(["dictionary", "export", "d", "--format", "jsonl", "--out", str(out), *some])
    names = [json.loads(line)["unit"] for line in out.read_text().splitlines()]
    assert names == ["blocks.1.mlp.hook_post[5]", "blocks.0.attn.hook_z[1]"]
    d.close()


def test_show_lists_what_is_readable(folder, capsys, monkeypatch):
    monkeypatch.setattr(readability, "READABLE_SHARE", 0)
    assert cli.main(["dictionary", "show", "d", "1,17", "--k", "1"]) == 0
    printed = capsys.readouterr().out
    d = NeuronDictionary.open(folder / "d")
    some = d[1, 17].vocabulary().query("name == 'out' and side == 'top'")
    d.close()
    assert "  ".join(some["token"]) in printed


def test_find_takes_the_model_for_what_is_written(folder, capsys):
    asked = ["dictionary", "find", "d", "c", "--limit", "3", "--by"]
    assert cli.main([*asked, "writes", "--model", "tiny", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 3 and set(found[0]) > {"side", "score", "token", "rank"}
    assert cli.main([*asked, "writes", "--model", "tiny"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"{found[0]['hook']}[{found[0]['index']}]" in printed and f"{found[0]['side']}" in printed
    )


def test_export_as_pages_and_for_neuronpedia(folder, tmp_path):
    export = ["dictionary", "export", "d", "--out", str(tmp_path / "out"), "--format"]
    assert cli.main([*export, "html", "--units", "1,5", "blocks.0.attn.hook_z[1]"]) == 0
    d = NeuronDictionary.open(folder / "d")
    exports.export_html(d, tmp_path / "same", [(1, 5), "blocks.0.attn.hook_z[1]"])
    exports.export_neuronpedia(d, tmp_path / "same")
    d.close()
    assert cli.main([*export, "neuronpedia"]) == 0
    made, expected = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*.*") if p.is_file()}
        for root in (tmp_path / "out", tmp_path / "same")
    )
    assert made == expected
    assert len(made) > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nowhere", "1,3"], "nowhere has no manifest.json: the dictionary is not there"),
        (["show", "d", "9,3"], "no unit (9, 3) in this dictionary"),
        (["show", "d", "1,3", "--html", "."], "is a directory"),
        (["show", "d", "1,3", "--model", "tiny"], "give --html too"),
        (["search", "d", "--", '"'], "nothing to search for"),
        (["find", "d", "c", "--by", "writes"], "--by writes reads the weights: give --model"),
        (["find", "d", "c", "--model", "tiny"], "--by writes reads the weights: give --model"),
        (["export", "d", "--format", "neuronpedia", "--out", "x", "--units", "1,3"], "leave them"),
        (["export", "d", "--format", "jsonl", "--out", "no/x"], "there is no directory"),
        (["build", "tiny", "nowhere.txt", "e"], "no corpus at"),
        (["build", "tiny", "corpus.jsonl", "d"], "holds a finished dictionary already"),
    ],
)
def test_bad_input_exits_with_2_and_a_message(folder, capsys, arguments, message):
    assert cli.main(["dictionary", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("lenslrp: ")
    assert captured.out == ""


def test_a_damaged_dictionary_exits_with_2_and_names_the_file(folder, tmp_path, capsys):
    shutil.copytree(folder / "d", tmp_path / "d")
    file = tmp_path / "d" / "vocabulary.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    assert cli.main(["dictionary", "show", str(tmp_path / "d"), "1,3"]) == 2
    assert "vocabulary.parquet has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "ACTION"),
        (["show", "d"], "UNIT"),
        (["build", "m", "c", "p", "--shard", "2/2"], "'2/2' is no share: give 0/4"),
        (["build", "m", "c", "p", "--criteria", "best"], "actmax"),
        (["search", "d", "c", "--by", "both"], "writes"),
        (["export", "d", "--out", "x"], "--format"),
    ],
)
def test_usage_errors_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["dictionary", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_choices_are_those_of_the_library():
    """They are written out, since the library takes seconds to import."""
    assert job.DEFAULT_CRITERIA == cli_dictionary.CRITERIA
    assert set(cli_dictionary.CRITERIA) == {*plan.TOP_CRITERIA, *plan.SAMPLED_CRITERIA}
    assert tuple(CORPUS_TARGETS) == cli_dictionary.TARGETS
