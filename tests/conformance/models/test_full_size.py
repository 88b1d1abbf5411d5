"""The structure of full-size models, from their configurations alone: no weights, no memory.

One row a model: sizes as published, the number of sites of each role, and the number of weights.
The whole engine runs on fake tensors (``lenslrp.survey``): rules attached, forward pass, walk over
the graph, backward pass through every site.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as hf
from torch.profiler import ProfilerActivity, profile

import lenslrp
from lenslrp.models.surveying import Held
from tests.conformance.families import tokens


@dataclass(frozen=True)
class Size:
    """A published model.

    Attributes:
        config: its configuration.
        weights: how many, in billions, to the digits given.
        sites: role -> how many components have its rule.
        options: for :func:`lenslrp.survey`.
    """

    config: Any
    weights: float
    sites: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)


def decoder(layers: int, norms: int, *, gated: bool) -> dict[str, int]:
    each = ("activation", "attention_av", "attention_qk", "softmax", *(("gate",) if gated else ()))
    return {"norm": norms, **dict.fromkeys(each, layers)}


LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}


def experts(config: Any) -> Any:
    """Batched experts: which token goes where is not asked of the values."""
    config._experts_implementation = "batched_mm"
    return config


def vision(kind: Any, weights: float, layers: int, **changes: Any) -> Size:
    """A classifier of 1,000 kinds of image, 224 pixels a side."""
    config = kind(num_labels=1000, num_hidden_layers=layers, **changes)
    name = kind.__name__.removesuffix("Config") + "ForImageClassification"
    options = {"architecture": name, "inputs": {"pixel_values": (1, 3, 224, 224)}}
    return Size(config, weights, decoder(layers, 2 * layers + 1, gated=False), options)


TABLE: dict[str, Size] = {
    "LLaMA 2 7B": Size(hf.LlamaConfig(), 6.738, decoder(32, 65, gated=True)),
    "Phi-1.5": Size(hf.PhiConfig(), 1.418, decoder(24, 25, gated=False)),
    "GPT-2 XL": Size(
        hf.GPT2Config(n_embd=1600, n_layer=48, n_head=25), 1.558, decoder(48, 97, gated=False)
    ),
    "Mixtral 8x7b": Size(
        experts(hf.MixtralConfig()),
        46.703,
        {**decoder(32, 65, gated=True), "softmax": 64, "router": 32},
    ),
    "ViT-B/16": vision(hf.ViTConfig, 0.0866, 12),
    "ViT-B/32": vision(hf.ViTConfig, 0.0882, 12, patch_size=32),
    "ViT-L/16": vision(hf.ViTConfig, 0.304, 24, **LARGE),
    "ViT-L/32": vision(hf.ViTConfig, 0.3065, 24, patch_size=32, **LARGE),
    "DeiT-B": vision(hf.DeiTConfig, 0.0866, 12),
    "Flan-T5-XL": Size(
        hf.T5Config(
            d_model=2048,
            d_ff=5120,
            num_layers=24,
            num_heads=32,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            vocab_size=32128,
        ),
        2.784,
        {
            "norm": 24 * 2 + 24 * 3 + 2,
            "activation": 48,
            "gate": 48,
            **dict.fromkeys(("attention_av", "attention_qk", "softmax"), 72),
        },
        {"architecture": "T5ForConditionalGeneration"},
    ),
    "BERT large": Size(
        hf.BertConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
        ),
        0.335,
        {**decoder(24, 50, gated=False), "activation": 25},
        {"architecture": "BertForMaskedLM"},
    ),
}


@pytest.mark.parametrize("name", list(TABLE))
def test_structure(name: str) -> None:
    size = TABLE[name]
    found = lenslrp.survey(size.config, lenslrp.AttnLRP(), **size.options)
    counts = found.coverage.sites.groupby("role").size().to_dict()
    assert counts == size.sites
    assert found.coverage.ok
    assert bool((found.coverage.sites["forward"] >= 1).all())
    assert found.parameters / 1e9 == pytest.approx(size.weights, rel=0.02), found.parameters
    assert found.weights == 4 * found.parameters


@pytest.mark.parametrize("shape", [hf.LlamaConfig, hf.PhiConfig])
def test_options_need_less(shape: Any) -> None:
    """Checkpointing, the fused kernel and half a type each hold less, at full width."""
    config, options = shape(num_hidden_layers=8), {"length": 512}
    plain = lenslrp.survey(config, **options)
    frugal = lenslrp.survey(config, **options, checkpoint=True)
    fused = lenslrp.survey(config, **options, attention="fused")
    half = lenslrp.survey(config, **options, dtype=torch.bfloat16)
    assert frugal.held < plain.held / 5
    assert fused.held < plain.held
    assert half.weights == plain.weights / 2
    assert half.held < 0.8 * plain.held  # softmax and norms compute in float32 all the same
    # The forward pass of the blocks once more, but for the last linear layer of each.
    assert frugal.flops > 1.2 * plain.flops


@pytest.mark.slow
def test_logits_at_the_target_fit_a_long_context() -> None:
    """Llama 3 8B, 32,768 tokens, every sum of relevance accounted for: on one device of 40 GiB."""
    config = hf.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072,
    )  # fmt: skip
    options: dict[str, Any] = {"attention": "fused", "checkpoint": True, "dtype": torch.bfloat16}
    found = lenslrp.survey(config, **options, length=32768, logits="target")
    assert found.coverage.ok
    assert found.peak <= 24 * 2**30
    every = lenslrp.survey(config, **options, length=2048)
    short = lenslrp.survey(config, **options, length=2048, logits="target")
    logits = 2047 * 128256 * 2  # of the other positions, in bfloat16
    assert every.held - short.held == pytest.approx(logits, rel=0.05)
    with pytest.raises(lenslrp.InputError, match="logits must be one of"):
        lenslrp.survey(config, logits="some")


def test_reading_streams() -> None:
    """Every hook point of LLaMA 2 7B read and summed: what is held does not grow with their number.

    Under checkpointing, one block's activations are all that readers can add.
    """
    options: dict[str, Any] = {"length": 256, "checkpoint": True}
    residual = 256 * 4096 * 4
    extra = {}
    for layers in (3, 6):
        config = hf.LlamaConfig(num_hidden_layers=layers)
        none = lenslrp.survey(config, **options)
        every = lenslrp.survey(config, **options, names_filter=None)
        # hook_resid_mid is inside a block: its reading holds that residual, and no more, a layer;
        # and what the final norm is given, of which its rule keeps the scale alone.
        assert every.held - none.held <= (layers + 1) * residual * 1.05
        extra[layers] = every.peak - none.peak
    assert extra[6] - extra[3] <= 3 * residual * 1.1


def test_checkpointing_holds_one_residual_a_layer() -> None:
    sizes = {
        layers: lenslrp.survey(
            hf.LlamaConfig(num_hidden_layers=layers), length=256, checkpoint=True
        ).held
        for layers in (2, 4, 8)
    }
    residual = 256 * 4096 * 4
    assert sizes[4] - sizes[2] == pytest.approx(2 * residual, rel=0.01)
    assert sizes[8] - sizes[4] == pytest.approx(4 * residual, rel=0.01)


def test_the_count_is_what_torch_allocates() -> None:
    """A real pass, by the profiler's record of allocations, against the count from shapes."""
    config = hf.LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    counted = lenslrp.survey(config, length=256, ledger=False)
    torch.manual_seed(0)
    model = lenslrp.load(hf.LlamaForCausalLM(config))
    ids = tokens(1, 256)
    lenslrp.run_with_relevance(model, ids, 5, names_filter=[], ledger=False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        lenslrp.run_with_relevance(model, ids, 5, names_filter=[], ledger=False)
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    level = peak = 0
    for _, size in changes:
        level += size
        peak = max(peak, level)
    assert counted.peak == pytest.approx(peak, rel=0.05)


def test_held_counts_what_is_alive() -> None:
    model = torch.nn.Linear(4, 4)
    with Held(model) as held:
        a = torch.zeros(100)
        b = a + 1
        c = a.view(10, 10)
        assert held.now == 800
        del a, c
        assert held.now == 400
        del b
    assert (held.now, held.peak) == (0, 800)


def test_gaps_are_found_without_weights() -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(1.5 * x)

    class OddLlama(hf.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp.act_fn = Odd()

    hf.OddLlama = OddLlama
    try:
        with pytest.raises(lenslrp.CoverageError, match="no rule for Mul"):
            lenslrp.survey(hf.LlamaConfig(num_hidden_layers=2), architecture="OddLlama")
    finally:
        del hf.OddLlama


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (hf.LlamaConfig(), {"architecture": "NoSuchModel"}, "no model class 'NoSuchModel'"),
        (hf.ViTConfig(), {}, "ViTConfig names no architecture: give architecture="),
        (hf.LlamaConfig(), {"dtype": torch.int8}, "dtype must be one of .*not torch.int8"),
        (
            hf.MixtralConfig(num_hidden_layers=1, experts_implementation="eager"),
            {},
            "MixtralForCausalLM decides by values .*_experts_implementation",
        ),
    ],
)
def test_refused(config: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(lenslrp.InputError, match=message):
        lenslrp.survey(config, **options)
