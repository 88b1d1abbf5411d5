"""Special tokens inside texts: searched like others, or skipped on request."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.conformance.dictionaries import build, model

ROWS = [[3, 1, 5, 9, 1, 7, 4], [8, 2, 1, 6, 3, 1, 2], [1, 1, 1, 1, 1, 1, 1]]
ONLY_SPECIAL = 2


def test_special_tokens_inside_texts_are_skipped_on_request(tmp_path: Path) -> None:
    bridge = model()
    hits = {}
    for skip in (False, True):
        d = build(tmp_path / str(skip), ROWS, skip_special=skip, sample=3, k=3)
        assert d.plan.skip_special is skip
        hits[skip] = 0
        documents = d.texts.referenced(range(len(ROWS)))
        for place in d.plan.places:
            if place.kind != "neuron":
                continue
            for page in d.pages(place):
                for row in page.examples("actmax").itertuples():
                    tokens = documents[row.doc].tokens
                    x = bridge.run_with_cache(tokens[None])[1][place.hook][0, :, page.index].clone()
                    x[0] = -torch.inf
                    if row.doc != ONLY_SPECIAL:  # of which nothing would be left
                        hits[skip] += int(tokens[row.position] <= 1)
                        x[(tokens <= 1) & torch.tensor(skip)] = -torch.inf
                    assert row.position == int(x.argmax())
        d.close()
    assert hits[False] > 0
    assert hits[True] == 0
