"""What results of circuits show in a notebook, and print."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lenslrp.analysis import Circuit, Verdict
from lenslrp.analysis.circuits.faces import WIDTH, strips
from lenslrp.analysis.circuits.pairs import SHOWN_CHARACTERS, SHOWN_PAIRS, Pairs
from lenslrp.analysis.circuits.scores import score_nodes
from tests.unit.tiny import tiny, word_tokenizer


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    model = tiny("llama", tokenizer=word_tokenizer())
    return Pairs.from_texts(model, ["a b c", "d e"], ["a b d", "d f"], ["g", "h"], ["h", "g"])


def test_pairs_and_scores_are_a_line_and_a_card(pairs: Pairs) -> None:
    model = tiny("llama", tokenizer=word_tokenizer())
    scores = score_nodes(model, pairs, components=["heads", "neurons"])
    best = scores.top(1).iloc[0]
    for result in (pairs, scores):
        assert len(repr(result)) < 200 and "\n" not in repr(result)
        assert 'class="lenslrp-card"' in result._repr_html_()
    assert best["hook"] in scores._repr_html_()
    assert repr(pairs) == "Pairs(pairs 2, tokens 3 to 4, most tokens of an answer 1)"
    right = f"{float(pairs.correct(model).double().mean()):.0%}"
    assert repr(scores).endswith(f"model is right in {right})")


def test_pairs_show_their_first_texts_and_keep_them(pairs: Pairs, tmp_path: Path) -> None:
    model = tiny("llama", tokenizer=word_tokenizer())
    first = ["a b c", "a b d", "g", "h"]
    assert pairs.to_dataframe().loc[0].tolist() == first
    assert pairs[1:].texts == (("d e", "d f", "h", "g"),)
    assert pairs[torch.tensor([True, False])].repeated(2).texts == (tuple(first),) * 2
    assert Pairs.load(pairs.save(tmp_path / "pairs")).texts == pairs.texts
    assert Pairs(pairs.clean, pairs.corrupt, pairs.mask, pairs.answers, pairs.rivals).texts == ()
    ids = Pairs.from_texts(model, ["a"], ["b"], [5], [6]).to_dataframe()
    assert ids[["answer", "rival"]].values.tolist() == [["d", "e"]]

    hostile = ("<script>alert(1)</script>", "e " * 900, "a", "b")
    html = replace(pairs, texts=(hostile,) * 9)._repr_html_()
    assert "<script" not in html and html.count("&lt;script&gt;") == SHOWN_PAIRS
    assert "4 more rows: .to_dataframe()" in html and "e " * SHOWN_CHARACTERS not in html


def test_a_circuit_has_a_picture_with_a_mark_for_each_unit() -> None:
    keep = {"blocks.0.attn.hook_z": torch.tensor([True, False, True]),
            "blocks.1.<b>": torch.tensor([False, True])}  # fmt: skip
    circuit = Circuit(dict.fromkeys(keep, "heads"), keep)
    html = circuit._repr_html_()
    assert re.findall(r"<title>(.*?)</title>", html) == [
        "blocks.0.attn.hook_z[0]", "blocks.0.attn.hook_z[2]", "blocks.1.&lt;b&gt;[1]"
    ]  # fmt: skip
    assert repr(circuit) == "Circuit(heads 3 of 5)"
    x = [float(x) for x in re.findall(r'<rect x="([\d.]+)"[^>]*><title>', html)]
    width, label = map(int, (re.search(r'viewBox="0 0 (\d+)', html)[1], 190))  # type: ignore[index]
    assert all(label <= each <= width for each in x)


def test_thousands_of_neurons_are_one_path_a_line() -> None:
    kept = torch.arange(WIDTH * 3) % 2 == 0
    html = strips({"blocks.0.mlp.hook_post": kept, "blocks.1.mlp.hook_post": ~kept})
    paths = re.findall(r'<path d="([^"]*)"', html)
    assert [len(re.findall(r"M\d+ \d+v10", path)) for path in paths] == [WIDTH, WIDTH + 1]
    assert len(html) < 40 * WIDTH


def test_a_verdict_shows_each_circuit() -> None:
    verdict = Verdict(
        torch.tensor([2.0, 2.0]), torch.tensor([0.0, 0.0]), torch.tensor([[1.0, 1.0], [2.0, 2.0]]),
        torch.tensor([True, False]),
    )  # fmt: skip
    html = verdict._repr_html_()
    said = "pairs 2, whole model 2, floor 0, model is right in 50%, faithfulness 0.5, 1"
    assert repr(verdict) == f"Verdict({said})"
    assert ">0.5<" in html and html.count("<tr>") == 3
