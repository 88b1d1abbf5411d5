"""Parity with LXT 2.1: the same weights, the same prompt, the same AttnLRP relevance.

LXT (Achtibat et al., ICML 2024) is the reference implementation by the authors of AttnLRP. Its
results on tiny random models are stored in `tests/reference`, with the script that made them;
here each model is rebuilt from the stored weights and explained through the bridge.
"""

import json
from dataclasses import dataclass

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import lenslrp
from tests.conftest import ROOT

REFERENCE = ROOT / "tests" / "reference"
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "gpt2")
TOLERANCE = 5e-6  # of the largest entry, in float32; two implementations, two orders of operations


@dataclass(frozen=True)
class Reference:
    """One stored result: logits [pos, vocab], inputs [pos, d_model], tokens [pos]."""

    model: transformers.PreTrainedModel
    input_ids: Tensor
    target_id: int
    logits: Tensor
    inputs: Tensor
    tokens: Tensor


def rebuild(family: str) -> Reference:
    """The stored model of `family`, in memory, and what LXT found on it."""
    description = json.loads((REFERENCE / f"lxt_{family}.json").read_text(encoding="utf-8"))
    stored = load_file(REFERENCE / f"lxt_{family}.safetensors")
    config = getattr(transformers, description["config_class"])(**description["config"])
    config._attn_implementation = "eager"
    model = getattr(transformers, description["model_class"])(config).eval()
    prefix = "weights."
    weights = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    model.load_state_dict(weights, strict=True)
    return Reference(
        model,
        stored["input_ids"],
        int(stored["target_id"]),
        stored["logits"],
        stored["inputs"],
        stored["tokens"],
    )


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected entry."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_rebuilt_model_is_the_stored_one(family: str) -> None:
    reference = rebuild(family)
    with torch.no_grad():
        logits = reference.model(reference.input_ids[None]).logits[0]
    assert relative_difference(logits, reference.logits) < TOLERANCE
    assert int(logits[-1].argmax()) == reference.target_id


@pytest.mark.parametrize("family", FAMILIES)
def test_relevance_equals_lxt(family: str) -> None:
    reference = rebuild(family)
    model = lenslrp.load(reference.model)
    logits, relevance = lenslrp.run_with_relevance(
        model, reference.input_ids[None], target=reference.target_id
    )
    assert relative_difference(logits[0].detach(), reference.logits) < TOLERANCE
    tokens = relevance.tokens[0]
    assert tokens.shape == reference.tokens.shape
    cosine = torch.cosine_similarity(tokens.double(), reference.tokens.double(), dim=0)
    assert float(cosine) > 0.999999
    assert relative_difference(tokens, reference.tokens) < TOLERANCE
    inputs = relevance["hook_embed"][0]
    assert relative_difference(inputs, reference.inputs) < TOLERANCE
