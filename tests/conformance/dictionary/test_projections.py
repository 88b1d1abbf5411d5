"""What all units write and read, at once, against each unit by itself; what has no such lists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lenslrp.analysis import Direction, Feature, Head, Neuron, SparseCoder, Unit, reads, writes
from lenslrp.analysis.dictionary import vocabulary_lists as module
from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
from lenslrp.analysis.dictionary.job import prepare
from lenslrp.analysis.dictionary.launch import build_distributed
from lenslrp.analysis.dictionary.vocabulary_lists import ends_of_lists, project_places
from lenslrp.errors import InputError, StorageError
from tests.conformance import zoo
from tests.conformance.dictionaries import OPTIONS, build, contents, model, texts

FAMILIES = (
    "LlamaForCausalLM",  # gated
    "GPT2LMHeadModel",  # ungated, centring norms
    "Gemma2ForCausalLM",  # norms behind the branches, grouped queries
    "Olmo2ForCausalLM",  # norms behind the branches only
    "PhiForCausalLM",  # attention and MLP side by side
    "BloomForCausalLM",
    "OPTForCausalLM",
    "CohereForCausalLM",
)
RESIDUAL = f"blocks.{zoo.LAYERS - 1}.hook_resid_post"


def some_units(bridge: Any) -> dict[str, list[Unit]]:
    """Units of each kind, a hook point at a time."""
    torch.manual_seed(0)
    weights = (torch.randn(*shape) for shape in ((16, 5), (5,), (5, 16), (16,)))  # in float32
    coder, layer = SparseCoder(RESIDUAL, *weights), zoo.LAYERS - 1
    return {
        "first": [Neuron(0, i) for i in range(24)],
        "neurons": [Neuron(layer, i) for i in range(24)],
        "heads": [Head(layer, i) for i in range(bridge.cfg.n_heads)],
        "directions": [Direction(RESIDUAL, v) for v in torch.randn(3, 16)],
        "features": [Feature(coder, i) for i in range(5)],
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_all_at_once_equal_each_by_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = zoo.build(name)
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 53 * 7)  # several pieces, the last one smaller
    for units in some_units(bridge).values():
        found = ends_of_lists(bridge, units, tokens=4)
        assert found.missing == {}
        for row, unit in enumerate(units):
            alone = {("writes", "out"): writes(bridge, unit)}
            alone |= {("reads", part): some for part, some in reads(bridge, unit).items()}
            expected = [
                (role, part, side, rank, entry.id, entry.score)
                for (role, part), given in alone.items()
                for side, table in (("top", given.top(4)), ("bottom", given.bottom(4)))
                for rank, entry in enumerate(table.itertuples())
            ]
            assert found.columns == [entry[:4] for entry in expected]
            assert found.ids[row].tolist() == [entry[4] for entry in expected]
            scores = torch.tensor([entry[5] for entry in expected])
            torch.testing.assert_close(found.scores[row], scores, rtol=1e-5, atol=1e-6)


def test_native_models_have_lists() -> None:
    """Its weights as they are: no configuration of Hugging Face's, a LayerNorm that centres."""
    bridge, unit = model("native"), Neuron(1, 3)
    out = bridge.blocks[1].mlp.W_out[3] - bridge.blocks[1].mlp.W_out[3].mean()
    expected = (out * bridge.ln_final.weight) @ bridge.unembed.W_U
    found = ends_of_lists(bridge, [unit], tokens=5)
    assert found.ids[0, :5].tolist() == expected.topk(5).indices.tolist()
    assert found.missing == {}


def test_units_may_be_of_another_type_than_the_norms() -> None:
    """A LayerNorm in bfloat16 takes nothing else; what is written is raised to float32."""
    bridge = zoo.build("GPT2LMHeadModel", torch.bfloat16)
    for units in some_units(bridge).values():
        assert ends_of_lists(bridge, units, tokens=2).missing == {}


@pytest.mark.parametrize(
    ("name", "units", "missing"),
    [
        ("BertForMaskedLM", [Neuron(0, 1)], {"writes": "a head of its own .mlm_head."}),
        (
            "ViTForImageClassification",
            [Neuron(0, 1)],
            {"writes": "unembeds classes, not tokens", "reads": "embeds no tokens"},
        ),
        (
            "MixtralForCausalLM",
            [Neuron(0, 1)],
            dict.fromkeys(("writes", "reads"), "mixture of experts; give expert="),
        ),
        (
            "DeepseekV3ForCausalLM",
            [Head(0, 0)],
            dict.fromkeys(("writes", "reads"), "latent attention"),
        ),
        (
            "LlamaForCausalLM",
            [Direction("blocks.0.mlp.hook_post", torch.ones(24))],
            dict.fromkeys(("writes", "reads"), "24 components; the residual stream has 16"),
        ),
    ],
)
def test_what_has_no_reading_says_why(
    name: str, units: list[Unit], missing: dict[str, str]
) -> None:
    found = ends_of_lists(zoo.build(name), units)
    assert set(found.missing) == set(missing)
    for role, reason in missing.items():
        with pytest.raises(InputError, match=reason):
            raise InputError(found.missing[role])
    assert {role for role, *_ in found.columns} == {"writes", "reads"} - set(missing)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NeuronDictionary]:
    d = build(tmp_path_factory.mktemp("built") / "d", vocabulary=3)
    yield d
    d.close()


def test_a_page_has_its_lists(built: NeuronDictionary) -> None:
    bridge = model()
    for key in (Neuron(1, 17), Neuron(0, 0), Neuron(1, 23), Head(0, 1), Head(1, 1)):
        frame = built[key].vocabulary()
        assert list(frame) == ["role", "name", "side", "rank", "id", "token", "score", "status"]
        out = writes(bridge, key).top(3)
        mine = frame[(frame["role"] == "writes") & (frame["side"] == "top")]
        assert mine[["id", "token"]].to_numpy().tolist() == out[["id", "token"]].values.tolist()
        for name, given in reads(bridge, key).items():
            mine = frame[(frame["name"] == name) & (frame["side"] == "bottom")]
            assert mine["rank"].tolist() == [0, 1, 2]
            assert mine["token"].tolist() == given.bottom(3)["token"].tolist()
            assert mine["score"].tolist() == pytest.approx(given.bottom(3)["score"].tolist())
    assert built.manifest["vocabulary"] == {"tokens": 3, "missing": {}}


@pytest.mark.parametrize("role", ["writes", "reads"])
def test_units_are_found_by_what_they_write_or_read(built: NeuronDictionary, role: str) -> None:
    expected = [
        (row.rank, -abs(row.score), place.first + index, row.name, row.side)
        for place in built.plan.places
        for index in range(place.size)
        for row in built.page(place, index).vocabulary().itertuples()
        if (row.role, row.token) == (role, "c")
    ]
    found = built.search_tokens(" c ", by=role, limit=1000)
    columns = ["unit", "hook", "index", "name", "side", "rank", "token", "score"]
    assert list(found) == columns
    given = [(r.rank, -abs(r.score), r.unit, r.name, r.side) for r in found.itertuples()]
    assert given == sorted(expected)
    assert len(given) > 3
    page = built[f"{found.hook[0]}[{found['index'][0]}]"]
    assert page.place.first + page.index == found.unit[0]
    assert len(built.search_tokens("c", by=role, limit=2)) == 2
    assert built.search_tokens("zzzz", by=role).empty
    with pytest.raises(InputError, match="by is one of hits, writes, reads, not 'both'"):
        built.search_tokens("c", by="both")


def test_directions_are_read_and_other_hook_points_say_why_not(tmp_path: Path) -> None:
    vector = torch.randn(16)
    sites = [Direction("blocks.1.hook_resid_post", vector), "mlp.in.hook_out"]
    d = build(tmp_path / "d", sites=sites)
    mine = d["blocks.1.hook_resid_post[directions 0]"].vocabulary()
    out = writes(model(), Direction("blocks.1.hook_resid_post", vector.double())).top(10)
    assert mine[(mine["role"] == "writes") & (mine["side"] == "top")]["id"].tolist() == list(out.id)
    assert set(d.manifest["vocabulary"]["missing"]) == {"mlp.in.hook_out"}
    with pytest.raises(InputError, match=r"no projection .*mlp.in.hook_out\[0\]' is no neuron"):
        d["mlp.in.hook_out", 1, 0].vocabulary()
    assert len(d.search_tokens("c", by="writes"))
    d.close()


def test_without_lists_the_file_is_there_and_says_why(tmp_path: Path) -> None:
    d = build(tmp_path / "d", vocabulary=0, sites="mlp.hook_post")
    with pytest.raises(InputError, match="built with vocabulary=0"):
        d[0, 1].vocabulary()
    for role in ("writes", "reads"):
        with pytest.raises(InputError, match="built with vocabulary=0"):
            d.search_tokens("c", by=role)
    assert len(d.search_tokens("c"))
    d.close()
    with pytest.raises(InputError, match="vocabulary is 0 to 1000 tokens at either end, not -1"):
        build(tmp_path / "e", vocabulary=-1)


def test_places_that_are_done_are_not_done_again(
    built: NeuronDictionary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(model(), texts(), tmp_path / "d", **OPTIONS)
    mine = project_places(job, 1, 3, tokens=3, progress=False)
    assert [path.name for path in mine] == ["vocabulary-00001.safetensors"]
    asked: list[str] = []
    real = module.ends_of_lists

    def remember(bridge: Any, units: Any, *rest: Any) -> Any:
        asked.append(str(units[0]))
        return real(bridge, units, *rest)

    monkeypatch.setattr(module, "ends_of_lists", remember)
    build(tmp_path / "d", vocabulary=3).close()
    assert len(asked) == 3
    assert contents(tmp_path / "d") == contents(built.path)
    again = prepare(model(), texts(), tmp_path / "e", **OPTIONS)
    paths = project_places(again, tokens=2, progress=False)
    asked.clear()
    project_places(again, tokens=3, progress=False)  # other lists: made anew
    assert len(asked) == 4
    spoilt = bytearray(paths[2].read_bytes())
    spoilt[-3] ^= 1
    paths[2].write_bytes(bytes(spoilt))
    with pytest.raises(StorageError, match=r"vocabulary-00002\.safetensors is damaged"):
        project_places(again, tokens=3, progress=False)


def test_ranks_share_the_places_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: NeuronDictionary
) -> None:
    options = {**OPTIONS, "progress": False, "timeout": 0.0, "vocabulary": 3}
    bridge = model()
    for rank in ("0", "1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        try:
            d = build_distributed(bridge, texts(), tmp_path / "d", **options)
        except StorageError:
            continue  # waited for the other one
    assert d is not None
    d.close()
    assert contents(tmp_path / "d") == contents(built.path)
