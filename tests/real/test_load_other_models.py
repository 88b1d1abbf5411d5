"""The encoder-decoder and the vision backbone as users get them.

``tests/reference/check_onnx_models.py`` compares both with onnxruntime on the same files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import lenslrp
from lenslrp import targets

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

pytestmark = pytest.mark.real

CONTEXT = (
    "Marta Olsen has kept the lighthouse on Gull Rock since 1988. A ferry leaves for it at nine."
)
PROMPT = (
    f"Please answer a question about the following article:\n\n{CONTEXT}\n\nWho keeps the light?"
)


@pytest.fixture(scope="module")
def flan_t5() -> TransformerBridge:
    return lenslrp.load("flan-t5-small-titles", dtype=torch.float32, device="cpu")


def answer(model: TransformerBridge, text: str) -> list[int]:
    encoded = model.tokenizer(text, return_tensors="pt")
    written = model.original_model.generate(
        encoded.input_ids, attention_mask=encoded.attention_mask, max_new_tokens=16, do_sample=False
    )
    return [int(i) for i in written[0, 1:] if i != model.tokenizer.eos_token_id]


def test_flan_t5_answers_from_a_paragraph(flan_t5: TransformerBridge) -> None:
    assert flan_t5.tokenizer.decode(answer(flan_t5, PROMPT)) == "Marta Olsen"


def test_the_answers_span_is_the_most_relevant(flan_t5: TransformerBridge) -> None:
    _, relevance = lenslrp.run_with_relevance(
        flan_t5, PROMPT, target=targets.Sequence(answer(flan_t5, PROMPT)), names_filter=[]
    )
    assert abs(relevance.ledger().error) < 1e-4
    words = relevance.words()
    best = words.loc[words["relevance"].idxmax(), "word"]
    assert best.strip() in ("Marta", "Olsen")


def test_flan_t5_is_untied_unscaled_and_reads_long_texts(flan_t5: TransformerBridge) -> None:
    model = flan_t5.original_model
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    assert model.config.scale_decoder_outputs is False
    assert len(flan_t5.tokenizer("word" + " word" * 99).input_ids) == 101


def test_vision_backbone_state_after_loading(no_network: None) -> None:
    model = lenslrp.load("vit-s14-saliency", device="cpu")
    config = model.original_model.config
    assert (config.image_size, config.patch_size, config.hidden_size) == (224, 14, 384)
    assert not model.training
    assert config._attn_implementation == "eager"
    hidden = model.original_model(pixel_values=torch.zeros(1, 3, 224, 224)).last_hidden_state
    assert hidden.shape == (1, 257, 384)
    assert torch.isfinite(hidden).all()


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are two devices")
def test_a_vision_model_needs_the_devices_that_are_asked_for() -> None:
    with pytest.raises(lenslrp.LoadError, match="n_devices=2.*CUDA"):
        lenslrp.load("vit-s14-saliency", n_devices=2)
