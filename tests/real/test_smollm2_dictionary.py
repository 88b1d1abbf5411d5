"""A small dictionary of the embedded model: what is stored is what the model does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from lenslrp.analysis import Head, NeuronDictionary

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

pytestmark = pytest.mark.real

TEXTS = [
    "The Eiffel Tower is located in the city of Paris, the capital of France.",
    "Water boils at one hundred degrees Celsius at sea level.",
    "She opened the window because the room was too hot.",
    "The Super Bowl is the final game of the American football season.",
    "Berlin is the capital of Germany, and Madrid is the capital of Spain.",
    "The teacher asked the students to read the next chapter by Monday.",
]


@pytest.fixture(scope="module")
def built(
    smollm2: TransformerBridge, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NeuronDictionary]:
    d = NeuronDictionary.build(
        smollm2, TEXTS, tmp_path_factory.mktemp("smollm2") / "d", progress=False, k=3, context=32,
        batch_size=2, sites=["blocks.5.mlp.hook_post", "blocks.20.attn.hook_z"],
    )  # fmt: skip
    yield d
    d.close()


def test_scores_are_the_models_own(built: NeuronDictionary, smollm2: TransformerBridge) -> None:
    assert len(built) == 1536 + 9
    names = ["blocks.5.mlp.hook_post", "blocks.20.attn.hook_z"]
    best = []
    for text in TEXTS:
        _, cache = smollm2.run_with_cache(smollm2.to_tokens(text, prepend_bos=False))
        best.append(cache[names[0]][0, 1:].amax(dim=0))
    by_model = torch.stack(best).amax(dim=0)
    frame = built.to_dataframe("actmax")
    scores = frame[(frame["hook"] == names[0]) & (frame["rank"] == 0)]["score"]
    torch.testing.assert_close(torch.tensor(scores.to_numpy()), by_model, rtol=1e-4, atol=1e-4)


def test_texts_come_back_and_are_found(built: NeuronDictionary) -> None:
    row = built[Head(20, 3)].examples("relmax").iloc[0]
    assert "".join(row.tokens) in TEXTS[row.source]
    found = built.search_text("Super Bowl")
    assert len(found)
    assert all("Super Bowl" in window for window in found["window"])


def test_tokens_explain_an_activation(built: NeuronDictionary, smollm2: TransformerBridge) -> None:
    frame = built[5, 17].attributed(smollm2, "actmax", 2)
    for row in frame.itertuples():
        after = row.attributions[row.position - row.start + 1 :]
        assert not after.any()  # what comes later cannot have made it fire
        assert row.attributions.any()
