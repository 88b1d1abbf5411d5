"""Recurrent and hybrid families: refused by name, with the component and its layer."""

from __future__ import annotations

import re
from typing import Any

import pytest

import lenslrp
from lenslrp.targets import Activation
from tests.conformance import zoo
from tests.conformance.families import tokens

pytestmark = pytest.mark.filterwarnings("ignore")

MIXERS = {
    "BambaForCausalLM": "blocks.0.mixer (BambaMixer)",
    "FalconH1ForCausalLM": "blocks.0.mamba (FalconH1Mixer)",
    "FalconMambaForCausalLM": "blocks.0.mixer (FalconMambaMixer)",
    "GraniteMoeHybridForCausalLM": "blocks.0.mixer (GraniteMoeHybridMambaLayer)",
    "JambaForCausalLM": "blocks.0.mixer (JambaMambaMixer)",
    "Mamba2ForCausalLM": "blocks.0.mixer (Mamba2Mixer)",
    "MambaForCausalLM": "blocks.0.mixer (MambaMixer)",
    "NemotronHForCausalLM": "blocks.0.mixer (NemotronHMamba2Mixer)",
    "OlmoHybridForCausalLM": "blocks.0.linear_attn (OlmoHybridGatedDeltaNet)",
    "Qwen3NextForCausalLM": "blocks.0.linear_attn (Qwen3NextGatedDeltaNet)",
    "Qwen3_5ForCausalLM": "blocks.0.linear_attn (Qwen3_5GatedDeltaNet)",
    "Qwen3_5ForConditionalGeneration": "blocks.0.linear_attn (Qwen3_5GatedDeltaNet)",
    "Qwen3_5MoeForCausalLM": "blocks.0.linear_attn (Qwen3_5MoeGatedDeltaNet)",
    "Qwen3_5MoeForConditionalGeneration": "blocks.0.linear_attn (Qwen3_5MoeGatedDeltaNet)",
    "RecurrentGemmaForCausalLM": "blocks.0.temporal_block (RecurrentGemmaRecurrentBlock)",
    "RwkvForCausalLM": "blocks.0.time_mix (RwkvSelfAttention)",
    "Zamba2ForCausalLM": "blocks.0.mixer (Zamba2MambaMixer)",
}
HYBRIDS = {  # a hook of the attention in their second layer
    "BambaForCausalLM": "blocks.1.attn.hook_z",
    "FalconH1ForCausalLM": "blocks.1.attn.hook_z",
    "JambaForCausalLM": "blocks.1.attn.hook_z",
    "OlmoHybridForCausalLM": "blocks.1.attn.hook_z",
    "Qwen3NextForCausalLM": "blocks.1.attn.hook_z",
    "Qwen3_5ForCausalLM": "blocks.1.attn.hook_z",
}


def explain(model: Any, target: Any = 5, names_filter: Any = (), **keywords: Any) -> Any:
    return lenslrp.run_with_relevance(
        model, tokens(), target, names_filter=list(names_filter), **keywords
    )[1]


@pytest.mark.parametrize("name", list(MIXERS))
@pytest.mark.parametrize("composite", [lenslrp.AttnLRP, lenslrp.CPLRP])
def test_a_recurrent_mixer_is_refused_by_name(name: str, composite: Any) -> None:
    with pytest.raises(lenslrp.CoverageError) as caught:
        explain(zoo.build(name), composite=composite())
    message = str(caught.value)
    assert message.startswith(f"{name}: no rule for the recurrent mixer {MIXERS[name]}")


def test_every_recurrent_family_of_the_zoo_is_here() -> None:
    refused = [
        row.name for row in zoo.read() if row.result == "refused" and "recurrent" in row.detail
    ]
    assert refused == sorted(MIXERS)


@pytest.mark.parametrize("name", list(HYBRIDS))
def test_the_attention_of_a_hybrid_is_not_given_silently(name: str) -> None:
    model = zoo.build(name)
    with pytest.raises(lenslrp.CoverageError, match="attention layers of a hybrid"):
        explain(model, names_filter=[HYBRIDS[name]])
    # Nor as a target: its relevance would pass the mixer of the layer below.
    with pytest.raises(lenslrp.CoverageError, match=re.escape(MIXERS[name])):
        explain(model, target=Activation(HYBRIDS[name], (0, 1)))


def test_plain_gradients_are_given_on_request_and_say_so() -> None:
    model = zoo.build("BambaForCausalLM")
    with pytest.warns(UserWarning, match="no rule for"):
        cache = explain(model, names_filter=[HYBRIDS["BambaForCausalLM"]], strict=False)
    assert cache.coverage.uncovered
    assert not cache.coverage.ok
