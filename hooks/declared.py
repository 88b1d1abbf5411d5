"""Which modules of transformers multiply or activate in their own code, and what has a rule there.

The rules are attached by :mod:`lenslrp.hooks.operations`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lenslrp.hooks.rule_types import Operations

ATTENTION_GATE_SPEC = Operations("attention_gate", leaks=("sigmoid", "softplus"), attention=False)
ROUTER_SPEC = Operations(
    "router", leaks=("softmax", "sigmoid", "softplus", "sqrt", "div"), attention=False
)
GATED_MLP_SPEC = Operations(gated=True, leaks=(), attention=False)
FUNCTIONAL_SPEC = Operations(leaks=(), attention=False)
STREAMS_SPEC = Operations(leaks=("softmax", "sigmoid", "div"), attention=False, streams=-2)
"""What mixes several residual streams by weights that it computes from them."""
POOLING_SPEC = Operations("attention_av", leaks=("softmax",), attention=False)
"""A sum over positions, weighted by a softmax: a pattern for each feature."""
ATTENTION_SPEC = Operations(leaks=("softmax",))
"""Attention that the bridge has no component for, in the towers that read images and sounds."""

OPERATIONS_BY_CLASS: Mapping[str, Operations] = {
    "AfmoeAttention": ATTENTION_GATE_SPEC,
    **dict.fromkeys(("Lfm2MLP", "Lfm2MoeMLP", "Zamba2MLP"), GATED_MLP_SPEC),
    "MoonshineDecoderMLP": GATED_MLP_SPEC,
    **dict.fromkeys(("ModernBertDecoderMLP", "ModernBertMLP"), GATED_MLP_SPEC),
    **dict.fromkeys(
        ("DeepseekV4DecoderLayer", "DeepseekV4HyperConnection", "DeepseekV4HyperHead"), STREAMS_SPEC
    ),
    **dict.fromkeys(("DeepseekV4CSACompressor", "DeepseekV4HCACompressor"), POOLING_SPEC),
    "DeepseekV4MLP": GATED_MLP_SPEC,  # which clips both factors
    "Gemma3nTextDecoderLayer": replace(
        STREAMS_SPEC, gated=True, streams=0
    ),  # and gates an embedding
    "Gemma3nTextMLP": GATED_MLP_SPEC,  # a threshold before its activation
    "BitNetMLP": GATED_MLP_SPEC,  # a norm between the product and the last projection
    "Gemma4TextDecoderLayer": GATED_MLP_SPEC,  # gates an embedding of its own for each layer
    "JetMoeAttention": Operations("router", leaks=(), attention=False),  # experts for its heads
    "JetMoeTopKGating": ROUTER_SPEC,
    **dict.fromkeys(("LagunaAttention", "MuseGlimmerTextAttention"), ATTENTION_GATE_SPEC),
    "RecurrentGemmaRecurrentBlock": Operations("recurrence_gate", leaks=(), attention=False),
    "RwkvFeedForward": ATTENTION_GATE_SPEC,  # receptance, a sigmoid on the output
    **dict.fromkeys(("Lfm2ShortConv", "Lfm2MoeShortConv"), FUNCTIONAL_SPEC),  # two gates
    # Towers that activate what their convolutions give, or add learned positions or tokens.
    **dict.fromkeys(
        ("ConvLayer", "MoonshineEncoder", "TDNNLayer", "WhisperEncoder"), FUNCTIONAL_SPEC
    ),
    **dict.fromkeys(
        (
            *("AudioFlamingo3Encoder", "GlmAsrEncoder", "Qwen2AudioEncoder"),
            *("DistilBertForMultipleChoice", "DistilBertForSequenceClassification"),
            "Florence2MultiModalProjector",
            "Gemma4UnifiedVisionEmbedder",
            "Gemma4VisionPatchEmbedder",
            "Glm4vVisionEmbeddings",
            "HrmTextModel",  # a learned initial state
            "Llama4VisionModel",
            *("LlavaNextModel", "LlavaOnevisionModel"),
            "MuseGlimmerVisionPatchEmbedder",
            "Qwen3VLMoeVisionModel",
            "Qwen3VLVisionModel",
            *("Qwen3_5VisionModel", "Qwen3_5MoeVisionModel"),
        ),
        FUNCTIONAL_SPEC,
    ),
}
"""Classes of transformers whose own code multiplies or activates."""

HEAD_SUFFIXES = ("ClassificationHead", "LMHead", "Pooler")
"""How classes of transformers are called that activate what a head of a few linear layers reads."""

GATED_MLP_CHILDREN = {"gate_proj", "up_proj", "down_proj"}
"""The sub-modules by which a gated MLP is known, whatever its class."""


def has_declared_class(module: nn.Module) -> bool:
    """Whether a module's class is in :data:`OPERATIONS_BY_CLASS`."""
    return type(module).__name__ in OPERATIONS_BY_CLASS


def declared_operations(module: nn.Module) -> Operations | None:
    """Which raw operations of a module have rules, by its class or its sub-modules."""
    kind = type(module)
    known = OPERATIONS_BY_CLASS.get(kind.__name__)
    if known is None and kind.__module__.startswith("transformers."):
        if kind.__name__.endswith("Attention"):
            return ATTENTION_SPEC
        if kind.__name__.endswith(HEAD_SUFFIXES):
            return FUNCTIONAL_SPEC
    if known is None and module._modules.keys() >= GATED_MLP_CHILDREN:
        return GATED_MLP_SPEC
    return known
