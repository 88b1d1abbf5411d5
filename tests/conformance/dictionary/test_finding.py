"""Units by the words of a concept: counted here unit by unit, from what the pages show."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from lenslrp.analysis.dictionary.dictionaries import NeuronDictionary
from lenslrp.analysis.dictionary.finding import require_words
from lenslrp.analysis.dictionary.text_search import occurrences
from lenslrp.cli.commands import main
from lenslrp.errors import InputError
from tests.conformance import dictionaries


def wanted(d: NeuronDictionary, criterion: str) -> tuple[str, str]:
    """A word, and a phrase of two words that an example shows."""
    tokens = d["blocks.0.mlp.hook_post[0]"].examples(criterion)["tokens"].iloc[0]
    return "d", "".join(tokens[1:3]).strip()


@pytest.mark.parametrize(
    ("text", "phrase", "places"),
    [
        ("The Church, the church-yard", "church", ["Church", "church"]),
        ("Churches of the church", "church", ["church"]),
        ("New York is new; york", "new york", ["New York", "new; york"]),
        ("so\u00adft hyphens are soft", "soft", ["so\u00adft", "soft"]),
        ("e\u0301t\u00e9, \u00c9T\u00c9", "\u00e9t\u00e9", ["e\u0301t\u00e9", "\u00c9T\u00c9"]),
        ("\u6771\u4eac\u306b\u884c\u304f", "\u4eac\u306b", ["\u4eac\u306b"]),
        ("nothing", "...", []),
    ],
)
def test_occurrences_are_whole_words_wherever_they_stand(
    text: str, phrase: str, places: list[str]
) -> None:
    (found,) = occurrences(text, [phrase])
    assert [text[start:stop] for start, stop in found] == places


def counted(
    d: NeuronDictionary, words: tuple[str, ...], criterion: str
) -> dict[int, tuple[int, int, float]]:
    """Of each unit: its matches, its examples, its score; from the tokens of its page."""
    shown: dict[int, list[tuple[float, list[bool]]]] = {}
    for place in d.plan.places:
        for page in d.pages(place):
            rows = []
            for row in page.examples(criterion).itertuples():
                window = f" {' '.join(''.join(row.tokens).replace('<s>', '').split())} "
                rows.append((abs(row.score), [f" {word} " in window for word in words]))
            shown[place.first + page.index] = rows
    everything = [held for rows in shown.values() for _, held in rows]
    bits = [
        -math.log2(sum(held[i] for held in everything) / len(everything)) for i in range(len(words))
    ]
    return {
        unit: (
            sum(any(held) for _, held in rows),
            len(rows),
            sum(size * max(b * h for b, h in zip(bits, held, strict=True)) for size, held in rows)
            / sum(size for size, _ in rows),
        )
        for unit, rows in shown.items()
        if rows
    }


@pytest.mark.parametrize("criterion", ["actmax", "relmin"])
def test_every_unit_is_scored_as_its_page_shows_it(built: Any, criterion: str) -> None:
    words = wanted(built, criterion)
    found = built.find(*words, criterion=criterion, limit=10_000)
    expected = {u: m for u, m in counted(built, words, criterion).items() if m[0]}
    assert len(found) == len(expected) > 5
    for row in found.units.itertuples():
        matched, of, score = expected[row.unit]
        assert (row.matched, row.of) == (matched, of)
        assert row.score == pytest.approx(score, rel=1e-5)
        assert row.lift == pytest.approx(row.share / row.expected)
    assert found.units["score"].is_monotonic_decreasing
    examples = found.to_dataframe()
    assert len(examples) == found.units["matched"].sum()
    assert all(any(occurrences(text, words)) for text in examples["window"])


def test_what_a_notebook_shows_marks_the_words(built: Any) -> None:
    found = built.find("d", limit=3)
    html = found._repr_html_()
    assert "<mark>d</mark>" in html
    assert found.top(1)["hook"].iloc[0] in repr(found)
    assert len(repr(found)) < 200


def test_units_shown_with_the_same_places_are_one_group(built: Any) -> None:
    found = built.find("d", "e", limit=10_000)
    places = [{(m.document, m.position) for m in found.matches[u]} for u in found.units["unit"]]
    groups = found.units["group"].tolist()
    for i, group in enumerate(groups):
        shared = [len(places[i] & p) / len(places[i] | p) >= 0.5 for p in places[:i]]
        assert group == (groups[shared.index(True)] if any(shared) else i)


def test_what_cannot_be_found_is_said(built: Any) -> None:
    assert len(built.find("zebra")) == 0
    assert repr(built.find("zebra")) == "Found('zebra': 0 units; best -)"
    with pytest.raises(InputError, match=r"find takes words, such as find\('church', 'bishop'\)"):
        built.find()
    with pytest.raises(InputError, match="find takes words"):
        built.find("d", "...")
    with pytest.raises(InputError, match=r"find takes words, .*, not \['d', 'e'\]$"):
        require_words((["d", "e"],))
    with pytest.raises(InputError, match="criterion 'best' was not searched"):
        built.find("d", criterion="best")


def test_the_command(built: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dictionary", "find", str(built.path), "d", "e n", "--limit", "2"]) == 0
    shown = capsys.readouterr().out
    assert "times chance" in shown
    assert main(["dictionary", "find", str(built.path), "d", "--json", "--limit", "2"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert len(records) == 2
    assert records[0]["matched"] <= records[0]["of"]
    assert main(["dictionary", "find", str(built.path), "zebra"]) == 0
    assert capsys.readouterr() == ("", "nothing found\n")


def test_a_layer_and_an_index_are_enough_where_sites_are_named_in_full(tmp_path: Any) -> None:
    sites = ["blocks.1.mlp.hook_post", "blocks.0.mlp.hook_post", "blocks.0.attn.hook_z"]
    d = dictionaries.build(tmp_path / "d", sites=sites, criteria=("random",))
    assert d[1, 3].name == "blocks.1.mlp.hook_post[3]"
    assert d["blocks.0.attn.hook_z", 0, 1].name == "blocks.0.attn.hook_z[1]"
    with pytest.raises(
        InputError,
        match=r"\(0, 3\) may be in blocks.0.attn.hook_z, blocks.0.mlp.hook_post; give \(site,",
    ):
        d[0, 3]
    with pytest.raises(InputError, match=r"no unit \(2, 3\)"):
        d[2, 3]
    d.close()
