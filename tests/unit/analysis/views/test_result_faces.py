"""What results of an analysis show in a notebook, and print."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

import lenslrp
from lenslrp.analysis import Add, Direction, Results, TokenPairs, attribute
from lenslrp.text.words import Word
from tests.unit.tiny import tiny, word_tokenizer


def test_an_attribution_draws_its_rows_under_its_methods_name() -> None:
    found = attribute(
        "gradient_x_input", tiny("llama", tokenizer=word_tokenizer()), ["a b c", "d e"], ["g", "h"]
    )
    html = found._repr_html_()
    assert html.count('class="lenslrp-heatmap"') == 2
    for row in (0, 1):
        assert f"= {float(found.target.value[row]):.4g}" in html
    assert html.count("gradient_x_input: ") == 2
    assert repr(found).startswith("Attribution(gradient_x_input, ") and len(repr(found)) < 300
    assert repr(found).endswith(f", batch 2, {found.tokens.shape[1]} units)")


def test_pairs_of_tokens_are_a_matrix_with_the_sum_of_each_row() -> None:
    matrix = torch.tensor([[1.0, -0.5, 0.0], [0.25, 0.0, 0.5]])
    words = [Word("x", [0]), Word("y", [1]), Word("z", [2])]
    pairs = TokenPairs(matrix, ["<a>", "b"], list("xyz"), 1.25, "cosine", words[:2], words)
    html = pairs._repr_html_()
    assert repr(pairs) == "TokenPairs(cosine = 1.250, 2 by 3)"
    assert html.count("<td style") == 6 and "+0.50<" in html and "+0.75<" in html
    assert "&lt;a&gt;" in html and "<a>" not in html


def test_a_direction_prints_where_it_is_and_its_name() -> None:
    direction = Direction("blocks.0.hook_resid_post", torch.randn(512), "happy")
    assert repr(direction) == "Direction(at='blocks.0.hook_resid_post', name='happy')"
    assert repr(Add(direction, 2.0)).count("\n") == 0 and len(repr(Add(direction, 2.0))) < 300


def test_a_diagnosis_is_a_card_of_its_verdicts_and_a_report_in_print() -> None:
    diagnosis = lenslrp.examine(tiny("llama", tokenizer=word_tokenizer()))
    face = diagnosis.face()
    assert face.title == f"Diagnosis: this model can{'' if diagnosis.ok else 'not'} be explained"
    assert face.facts["every operation has its rule"] and face.facts["forward pass untouched"]
    assert face.facts["ledger misses, of its largest entry"] == diagnosis.ledger.imbalance
    assert repr(diagnosis) == str(diagnosis) and repr(diagnosis).count("\n") > 5


def test_results_show_every_measure_in_one_table() -> None:
    rows = [
        {"example": e, "target": "t", "value": 1.0, "features": 3, "perturbation": p, "method": m,
         "area": area + e + (p == "mean"), "hit": hit, "cost": 1.0, "forward": 1.0, "backward": 1.0}
        for m, area, hit in (("attnlrp", 4.0, 1.0), ("random", 1.0, 0.0))
        for p in ("zero", "mean")
        for e in range(3)
    ]  # fmt: skip
    settings = {"task": "agreement", "methods": ["attnlrp", "random"], "seed": 0,
                "perturbations": ["zero", "mean"]}  # fmt: skip
    results = Results(settings, pd.DataFrame(rows), (), {})
    frame = results.face().frame
    assert frame is not None
    assert list(frame) == ["perturbation", "method", "area", "Δ area", "hit",
                           "Δ hit", "cost"]  # fmt: skip
    random = frame[frame["method"] == "random"]
    assert random["Δ area"].tolist() == pytest.approx([-3.0, -3.0])
    assert random["Δ hit"].tolist() == pytest.approx([-1.0, -1.0])
    assert frame["Δ area"][frame["method"] == "attnlrp"].tolist() == [0.0, 0.0]
    assert "Δ: less attnlrp" in results._repr_html_()
    assert [cell.split()[0] for cell in frame["area"]] == ["5", "2", "6", "3"]
    assert repr(results) == "Results(task agreement, examples 3, methods 2)"
    assert "Share of examples whose most relevant feature is the key." in results._repr_html_()
