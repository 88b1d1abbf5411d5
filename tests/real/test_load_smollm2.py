"""The embedded model as users get it: what it says, and that it needs no hub."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

import lenslrp
from lenslrp.models.embedded import ensure_cached
from lenslrp.models.wrapped import agreement_of
from lenslrp.text.tokenization import tokenize

pytestmark = pytest.mark.real

PROMPT = "The Eiffel Tower is located in the city of"


def test_says_paris(smollm2):
    """MODELS: .70 without a beginning-of-sequence token, .30 with one."""
    with torch.no_grad():
        logits = smollm2(smollm2.to_tokens(PROMPT))
    probabilities = logits[0, -1].softmax(-1)
    assert probabilities.argmax() == smollm2.to_single_token(" Paris")
    assert probabilities.max().item() == pytest.approx(0.70, abs=0.01)


def test_state_after_loading(smollm2):
    assert not smollm2.training
    assert not smollm2.original_model.training
    assert smollm2.cfg.default_prepend_bos is False
    assert smollm2.to_str_tokens(PROMPT)[:4] == ["The", " E", "iffel", " Tower"]
    assert smollm2.cfg.model_name == "smollm2-135m"
    assert smollm2.original_model.config._attn_implementation == "eager"
    assert {p.dtype for p in smollm2.original_model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["smollm2-135m", "flan-t5-small-titles"])
def test_ids_and_outputs_are_those_of_hugging_face(name):
    folder = ensure_cached(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = lenslrp.load(name, device="cpu")
    assert tokenize(model, PROMPT) == tokenizer(PROMPT)["input_ids"]
    found = agreement_of(model)
    assert found.difference is not None
    assert found.difference <= 1e-6


def test_loads_from_the_cache_without_network(smollm2, no_network):
    model = lenslrp.load("smollm2-135m", dtype=torch.bfloat16, device="cpu", prepend_bos=True)
    assert model.cfg.default_prepend_bos is True
    assert {p.dtype for p in model.original_model.parameters()} == {torch.bfloat16}


def test_chat_uses_the_models_own_template(smollm2):
    tokens = lenslrp.chat(smollm2, "What is the capital of France?")
    text = smollm2.tokenizer.decode(tokens[0])
    assert tokens.shape[0] == 1
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (tokens == 1).sum() == 3, "each <|im_start|> is one token"
    with torch.no_grad():
        assert torch.isfinite(smollm2(tokens)).all()


def test_chat_keeps_roles(smollm2):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye."},
    ]
    tokens = lenslrp.chat(smollm2, turns, add_generation_prompt=False)
    text = smollm2.tokenizer.decode(tokens[0])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert text.rstrip().endswith("<|im_start|>user\nBye.<|im_end|>")
