"""Windows of a unit's page are cut at words, in any script, and never lose their hit."""

from __future__ import annotations

import html
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lenslrp.analysis.dictionary.pages.sentences import sentences, stronger_first
from lenslrp.analysis.dictionary.text_search import inside_word


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("an end", [1, 4, 5]),
        ("don't", [1, 2]),
        ("東京に", []),  # written without spaces: each character can stand alone
        ("\u00e9te\u0301", [1, 2, 3]),  # an accent of its own belongs to the word
    ],
)
def test_a_place_inside_a_word(text: str, inside: list[int]) -> None:
    assert [at for at in range(1, len(text)) if inside_word(text, at)] == inside


@pytest.mark.parametrize(
    ("first", "stop", "hit", "shown"),
    [
        (1, 6, 2, " is "),  # parts of "Mother" and of "truely" go
        (1, 6, 1, "ther is "),  # the hit stays, though it is such a part
        (2, 6, 5, " is true"),  # likewise
        (0, 7, 3, "Mother is truely"),
    ],
)
def test_windows_are_cut_at_words(first: int, stop: int, hit: int, shown: str) -> None:
    pieces = ["Mo", "ther", " is", " ", "tr", "ue", "ly"]
    ends = np.cumsum([len(piece) for piece in pieces])
    spans = torch.tensor([[end - len(p), end] for p, end in zip(pieces, ends, strict=True)])
    document = SimpleNamespace(text="".join(pieces), spans=spans)
    texts = SimpleNamespace(referenced=lambda _: {0: document})
    plan = SimpleNamespace(skip_first=False, target=None, relevance=False)
    page: Any = SimpleNamespace(dictionary=SimpleNamespace(texts=texts, plan=plan))
    row = {
        "score": 1.0, "doc": 0, "position": hit, "start": first, "tokens": pieces[first:stop],
        "activations": np.ones(stop - first, np.float32), "target": None,
        "target_position": -1, "target_value": float("nan"),
    }  # fmt: skip
    tab = sentences(page, {"actmax": pd.DataFrame([row])}, {"actmax": 1})["tabs"][0]
    (line,) = tab["examples"][0]["lines"]
    text = html.unescape(re.sub(r"<[^>]*>", "", line["tokens"])).replace("·", " ")
    assert text == shown


def test_the_end_that_is_larger_in_size_comes_first() -> None:
    scores = {"actmax": [1.4, 1.3], "actmin": [-11.0, -2.0], "relmax": [2.0], "relmin": [-1.0]}
    frames = {name: pd.DataFrame({"score": values}) for name, values in scores.items()}
    assert list(stronger_first(frames)) == ["actmin", "actmax", "relmax", "relmin"]
    del frames["actmax"]
    assert list(stronger_first(frames)) == ["actmin", "relmax", "relmin"]
    frames["relmin"] = frames["relmin"].head(0)
    assert list(stronger_first(frames)) == ["actmin", "relmax", "relmin"]
