"""Features in a dictionary: found some rows at a time and where they are active, as if all at once.

The reference encodes whole documents and forms relevance of every feature at every position
(`feature_relevance`), one document after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lenslrp
from lenslrp.analysis import Ablate, Feature, SparseCoder, feature_relevance, steer
from lenslrp.analysis.dictionary import publish, schemas, topk
from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
from lenslrp.analysis.dictionary.pages.page import fragment, page_html
from lenslrp.errors import InputError
from tests.conformance.dictionaries import OPTIONS, contents, model, texts

STREAM, Z, MLP_IN, MLP_OUT = (
    f"blocks.0.{name}" for name in ("hook_resid_post", "attn.hook_z", "mlp.hook_in", "hook_mlp_out")
)
FEATURES = 40

CODERS: dict[str, dict[str, Any]] = {
    "autoencoder": {"hook": STREAM},
    "k": {"hook": STREAM, "k": 3},
    "layer_norm": {"hook": STREAM, "normalization": "layer_norm"},
    "heads": {"hook": Z, "heads": "all"},
    "transcoder": {"hook": MLP_IN, "hook_out": MLP_OUT},
    "skip": {"hook": MLP_IN, "hook_out": MLP_OUT, "k": 5, "W_skip": torch.eye(16)},
}


def coder(name: str, features: int = FEATURES) -> SparseCoder:
    draw = torch.Generator().manual_seed(3)
    weights = {
        "W_enc": torch.randn(16, features, generator=draw),
        "b_enc": torch.randn(features, generator=draw) - 1,
        "W_dec": torch.randn(features, 16, generator=draw),
        "b_dec": torch.zeros(16),
    }
    return SparseCoder(name=name, **weights, **CODERS[name])


def built(path: Path, sites: Any, **options: Any) -> NeuronDictionary:
    merged = {**OPTIONS, "sites": sites, "progress": False, **options}
    return NeuronDictionary.build(model(), texts(), path, **merged)


@pytest.mark.parametrize("name", list(CODERS))
def test_the_best_documents_are_those_of_all_features_at_all_positions(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk, "PART", 2 * 12 * FEATURES)  # two rows at a time
    bridge, one = model(), coder(name)
    d = built(tmp_path / "d", one, k=100, criteria=("actmax", "actmin", "relmax", "relmin"))
    documents = d.texts.documents(range(d.plan.corpus["documents"]))
    found = d.to_dataframe()
    d.close()
    values: dict[str, list[np.ndarray]] = {"act": [], "rel": []}
    for document in documents.values():
        goal = lenslrp.targets.Logit(document.aim_token, document.aim_position)
        [explicit] = feature_relevance(bridge, document.tokens[None], goal, one)
        values["act"].append(explicit.activations[0, 1:].numpy())
        values["rel"].append(explicit.features[0, 1 : document.aim_position + 1].numpy())
    for what, rows in values.items():
        for kind, extreme in (("max", np.max), ("min", np.min)):
            frame = found[found["criterion"] == what + kind]
            assert len(frame) == len(documents) * FEATURES
            ids = list(documents)
            scores = frame.pivot(index="doc", columns="index", values="score").loc[ids]
            expected = np.stack([extreme(row, axis=0) for row in rows])
            np.testing.assert_allclose(scores.to_numpy(), expected, rtol=1e-4, atol=1e-6)
            if kind == "max":
                assert (expected > 0).mean() > 0.1


def test_files_are_the_same_however_many_rows_are_taken_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = [coder("autoencoder"), coder("skip"), "mlp.hook_post", "attn.hook_z"]
    built(tmp_path / "whole", sites).close()
    monkeypatch.setattr(topk, "PART", 1)  # one row at a time
    built(tmp_path / "rows", sites).close()
    assert contents(tmp_path / "rows") == contents(tmp_path / "whole")


def test_files_are_the_same_however_many_units_are_prepared_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (schemas, publish):
        monkeypatch.setattr(module, "UNIT_GROUP", 64)
    for prepared in (64, 256):
        monkeypatch.setattr(publish, "PREPARED", prepared)
        d = built(tmp_path / f"{prepared}", [coder("skip", features=130), "attn.hook_z"])
        assert len(d.units) == 130 + 2 * 2
        d.close()
    assert contents(tmp_path / "64") == contents(tmp_path / "256")


def test_a_block_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 0

    def counted(self: SparseCoder, x: torch.Tensor) -> torch.Tensor:
        nonlocal rows
        rows += len(x)
        return encode(self, x)

    encode = SparseCoder.encode
    monkeypatch.setattr(SparseCoder, "encode", counted)
    d = built(tmp_path / "d", coder("transcoder"))
    documents = d.plan.corpus["documents"]
    d.close()
    assert rows == 1 + 2 * documents  # to learn the size; the scan; the replay


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NeuronDictionary]:
    sites = [coder("transcoder"), coder("autoencoder")]
    d = built(tmp_path_factory.mktemp("features") / "d", sites)
    yield d
    d.close()


@pytest.mark.parametrize("name", ["transcoder", "autoencoder"])
def test_a_feature_has_a_page_and_is_found(name: str, features: NeuronDictionary) -> None:
    one = coder(name)
    unit = Feature(one, 7)
    page = features[unit]
    assert page.name == str(unit) == f"{one.hook}[{name} 7]"
    best = page.examples("actmax").iloc[0]
    document = features.texts.documents([int(best.doc)])[int(best.doc)]
    _, cache = model().run_with_cache(document.tokens[None])
    activations = one.encode(cache[one.hook])[0, :, 7].numpy()
    shown = activations[best.start : best.start + len(best.tokens)]
    np.testing.assert_allclose(best.activations, shown, rtol=1e-3, atol=1e-5)
    assert best.score == pytest.approx(float(activations[1:].max()), rel=1e-4)
    for html in (fragment(page), page_html(page, model=model(), examples=2, attributed=1)):
        assert page.name in html
    word = best.tokens[best.position - best.start].strip()
    assert unit_number(features, unit) in set(features.find(word).to_dataframe()["unit"])
    hits = features.search_tokens(word, limit=1000)
    assert unit_number(features, unit) in set(hits["unit"])
    assert unit_number(features, unit) in set(features.search_text(word, limit=10**6)["unit"])
    assert len(features.similar(unit, 3)) == 3
    with pytest.raises(InputError, match="is no neuron or head"):
        _ = page.unit


def test_a_feature_is_not_found_by_documents_in_which_it_is_not_active(tmp_path: Path) -> None:
    rare = replace(coder("autoencoder"), b_enc=torch.full((FEATURES,), -4.0))
    d = built(tmp_path / "d", rare)
    frame = d.to_dataframe("actmax")
    silent = set(frame.groupby("unit")["score"].max().loc[lambda best: best == 0].index)
    firing = set(frame["unit"]) - silent
    assert silent and firing
    shown = d.page(d.plan.places[0], min(silent)).examples("actmax").iloc[0]
    word = shown.tokens[shown.position - shown.start].strip()
    texts_found = d.search_text(word, limit=10**6)
    assert not set(texts_found["unit"]) & silent and set(texts_found["score"]) - {0.0}
    assert (texts_found["score"] != 0).all()
    assert not set(d.search_tokens(word, limit=10**6)["unit"]) & silent
    found = d.find(word, limit=10**6)
    active = frame[frame["score"] > 0].groupby("unit").size()
    assert not set(found.units["unit"]) & silent and len(found.units)
    for row in found.units.itertuples():
        assert row.of == active[row.unit]
    d.close()


def unit_number(d: NeuronDictionary, unit: Feature) -> int:
    place, index = d.unit_number(unit)
    return place.first + index


@pytest.mark.parametrize("name", ["transcoder", "autoencoder"])
def test_a_feature_that_was_found_is_steered_with_its_coder(
    name: str, features: NeuronDictionary
) -> None:
    unit, bridge = Feature(coder(name), 7), model()
    best = features[unit].examples("actmax").iloc[0]
    tokens = features.texts.documents([int(best.doc)])[int(best.doc)].tokens[None]
    plain = bridge(tokens)
    with steer(bridge, [Ablate(unit)]):
        without = bridge(tokens)
    _, cache = bridge.run_with_cache(tokens)
    moved = (without - plain)[0].abs().amax(dim=-1) > 0
    active = unit.activation(cache[unit.coder.hook])[0] > 0
    assert active[best.position] and moved[best.position]
    assert not moved[: int(active.nonzero()[0])].any()


def test_coders_that_do_not_fit_where_they_write_are_refused(tmp_path: Path) -> None:
    one = coder("transcoder")
    across = replace(one, later={MLP_OUT.replace("0", "1"): one.W_dec})
    with pytest.raises(InputError, match="relevance in a dictionary is of one hook point, and"):
        built(tmp_path / "d", across)
    for changes, message in (
        ({"hook_out": "blocks.0.mlp.hook_pots"}, "no hook point 'blocks.0.mlp.hook_pots'"),
        ({"hook_out": "blocks.0.mlp.hook_post"}, "transcoder writes 16 values a position, blocks"),
    ):
        with pytest.raises(InputError, match=message):
            built(tmp_path / "d", replace(one, **changes))
