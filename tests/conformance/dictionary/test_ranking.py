"""Units by what they write, against the whole vocabulary, and by the meaning of their examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lenslrp.analysis import Head, parse_unit, writes
from lenslrp.analysis.dictionary import ranking as module
from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
from lenslrp.errors import InputError
from tests.conformance.dictionaries import build, model
from tests.unit.tiny import WORDS


@pytest.fixture(scope="module")
def bridge() -> Any:
    return model()


def test_scores_are_those_of_each_units_whole_projection(
    built: NeuronDictionary, bridge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNITS_AT_ONCE", 7)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 5)
    found = built.find("c", "f", by="writes", model=bridge, limit=1000)
    assert list(found.units) == ["unit", "hook", "index", "side", "score", "token", "rank"]
    assert len(found) == len(built) and found.missing == {}
    wanted = [WORDS.index("c"), WORDS.index("f")]
    for row in found.units.itertuples():
        scores = writes(bridge, parse_unit(f"{row.hook}[{row.index}]")).scores.double()
        each = (scores[wanted] - scores.mean()) / scores.std(correction=0)
        assert row.score == pytest.approx(float(each.mean()), abs=1e-4)
        assert row.side == ("top" if each.mean() > 0 else "bottom")
        signed = scores * each.mean().sign()
        best = max(wanted, key=lambda token: float(signed[token]))
        assert row.token == WORDS[best]
        assert row.rank == int((signed > signed[best]).sum())
        assert built.name(row.unit) == f"{row.hook}[{row.index}]"
    assert found.units["score"].abs().is_monotonic_decreasing
    assert built.find("c", "f", by="writes", model=bridge, limit=3).top(9).equals(found.top(3))
    assert repr(found).startswith("RankedUnits('c', 'f', by writes: 52 units; best blocks.")
    assert "Units by c, f" in found._repr_html_()


def test_hook_points_that_write_no_tokens_are_named(tmp_path: Path, bridge: Any) -> None:
    d = build(tmp_path / "d", sites=["attn.hook_z", "mlp.in.hook_out"], criteria=("actmax",))
    found = d.find("c", by="writes", model=bridge)
    assert set(found.missing) == {"blocks.0.mlp.in.hook_out", "blocks.1.mlp.in.hook_out"}
    assert str(Head(0, 1)) in {f"{r.hook}[{r.index}]" for r in found.units.itertuples()}
    assert "blocks.0.mlp.in.hook_out is left out: " in found._repr_html_()
    d.close()
    d = build(tmp_path / "e", sites="mlp.in.hook_out", criteria=("actmax",))
    with pytest.raises(InputError, match="no unit writes tokens: 'blocks.0.mlp.in.hook_out"):
        d.find("c", by="writes", model=bridge)
    d.close()


def test_examples_are_weighed_by_how_near_their_documents_are(
    built: NeuronDictionary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against sums over all examples; the encoder is a bag of words."""

    def bag(_: Any, texts: Any) -> torch.Tensor:
        counts = torch.tensor([[float(t.split().count(w)) for w in WORDS] for t in texts])
        return torch.nn.functional.normalize(counts, dim=1)

    monkeypatch.setattr(module, "_vectors", bag)
    found = built.find("c d", "e", by="meaning", encoder=object(), criterion="relmax", limit=500)
    query = torch.nn.functional.normalize(bag(None, ["c d", "e"]).mean(dim=0), dim=0)
    expected = {}
    for place in built.plan.places:
        for page in built.pages(place):
            frame = page.examples("relmax")
            texts = [built.texts.referenced([doc])[doc].text for doc in frame["doc"]]
            near, sizes = bag(None, texts) @ query, torch.tensor(frame["score"].abs().tolist())
            expected[page.name] = float((near * sizes).sum() / sizes.sum())
    mean = sum(expected.values()) / len(expected)
    assert len(found) == len(built)
    for row in found.units.itertuples():
        assert row.score == pytest.approx(expected[built.name(row.unit)] - mean, abs=1e-5)
    assert found.units["score"].is_monotonic_decreasing
    best = found.units.to_dict("records")[0]
    text = built.texts.referenced([best["doc"]])[best["doc"]].text
    assert best["sentence"] in text
    assert found.to_dataframe() is found.units


def test_what_is_missing_or_too_much_is_said(built: NeuronDictionary, bridge: Any) -> None:
    with pytest.raises(InputError, match=r"find takes words, such as .*, not \(\)"):
        built.find(by="writes", model=bridge)
    for options, said in (
        ({"by": "writes"}, "by='writes', model=None, encoder=None"),
        ({"by": "reads"}, "by='reads', model=None, encoder=None"),
        ({"model": bridge}, "by='examples', model=a model, encoder=None"),
        ({"by": "meaning", "model": bridge}, "by='meaning', model=a model, encoder=None"),
    ):
        with pytest.raises(InputError, match=f"find goes by='examples', .* given is {said}"):
            built.find("c", **options)
    with pytest.raises(InputError, match=r"'c d' is 2 tokens \(\['c', 'd'\]\); give words of one"):
        built.find("c d", by="writes", model=bridge)
    with pytest.raises(InputError, match="with other weights"):
        built.find("c", by="writes", model=model("gpt2"))
    with pytest.raises(InputError, match="criterion 'best' was not searched"):
        built.find("c", by="meaning", criterion="best")
