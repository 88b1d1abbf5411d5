"""Tiny random models of every family, for conformance tests: one table, one entry a family.

Weights are drawn so that nothing is nearly linear: attention is far from uniform, activations are
far from their linear part, soft-caps bend, and norms have gains of their own. ``bias=True`` gives
every bias that the family has a value; ``bias=False`` builds the model without them, or with zeros
where the family cannot leave them out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

import lenslrp

VOCABULARY, WIDTH, LAYERS = 53, 16, 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
}
GROUPED = {**SIZES, "num_key_value_heads": 1}
GEMMA = {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}


@dataclass(frozen=True)
class Family:
    """How to build one family.

    Attributes:
        build: makes the model, with biases where True is given and the family can have them.
        biased: whether the family has any bias.
        parallel: attention and MLP read the same residual, so that there is no ``hook_resid_mid``.
        float32_norm: Hugging Face computes its norms in float32 whatever the model's type.
        fused: why the fused attention refuses it ("" where it does not).
        constants: it adds constants that are no biases, so CP-LRP never conserves.
    """

    build: Callable[[bool], Any]
    biased: bool = False
    parallel: bool = False
    float32_norm: bool = False
    fused: str = ""
    constants: bool = False


def _native(**changes: Any) -> TransformerBridge:
    sizes: dict[str, Any] = {
        "n_layers": LAYERS,
        "d_model": WIDTH,
        "n_ctx": 48,
        "d_head": 8,
        "n_heads": 2,
        "d_vocab": VOCABULARY,
        "d_mlp": 24,
        "act_fn": "gelu",
        "normalization_type": "LN",
    }
    return TransformerBridge.boot_native(TransformerBridgeConfig(**{**sizes, **changes}))


def _llama(bias: bool) -> Any:
    config = hf.LlamaConfig(**GROUPED, attention_bias=bias, mlp_bias=bias)
    return hf.LlamaForCausalLM(config)


def _smollm(bias: bool) -> Any:
    """SmolLM2 is a Llama whose embedding is its unembedding."""
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, tie_word_embeddings=True))


def _gemma2(bias: bool) -> Any:
    config = hf.Gemma2Config(
        **GEMMA, attention_bias=bias, attn_logit_softcapping=5.0, final_logit_softcapping=6.0
    )
    return hf.Gemma2ForCausalLM(config)


def _gemma3(bias: bool) -> Any:
    layers = ["sliding_attention", "full_attention"]
    config = hf.Gemma3TextConfig(**GEMMA, attention_bias=bias, layer_types=layers)
    return hf.Gemma3ForCausalLM(config)


def _gpt2(bias: bool) -> Any:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=48, n_inner=24
    )
    return hf.GPT2LMHeadModel(config)


def _neox(parallel: bool) -> Callable[[bool], Any]:
    def build(bias: bool) -> Any:
        config = hf.GPTNeoXConfig(**SIZES, use_parallel_residual=parallel, rotary_pct=0.5)
        return hf.GPTNeoXForCausalLM(config)

    return build


def _qwen3(bias: bool) -> Any:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8, attention_bias=bias))


def _gpt_oss(bias: bool) -> Any:
    """Experts, sinks, and a router whose softmax keeps the type."""
    model = hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4
        )
    )
    model.set_experts_implementation("eager")  # torch's grouped product has no float64
    return model


def _phi3(bias: bool) -> Any:
    return hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED, pad_token_id=0))


NATIVE = "no Hugging Face attention"
CAPPED = "soft-cap"
SINKS = "attention sinks"

FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, biased=True, float32_norm=True),
    "smollm": Family(_smollm, float32_norm=True),
    "mistral": Family(
        lambda _: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=4)),
        float32_norm=True,
    ),
    "qwen2": Family(
        lambda _: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)), biased=True, float32_norm=True
    ),
    "qwen3": Family(_qwen3, biased=True, float32_norm=True),
    "gemma2": Family(_gemma2, biased=True, float32_norm=True, fused=CAPPED),
    "gemma3": Family(_gemma3, biased=True, float32_norm=True),
    "gpt2": Family(_gpt2, biased=True),
    "gpt_oss": Family(_gpt_oss, biased=True, float32_norm=True, fused=SINKS, constants=True),
    "phi": Family(lambda _: hf.PhiForCausalLM(hf.PhiConfig(**SIZES)), biased=True, parallel=True),
    "phi3": Family(_phi3, float32_norm=True),
    "neox": Family(_neox(True), biased=True, parallel=True),
    "neox_sequential": Family(_neox(False), biased=True),
    "native": Family(lambda _: _native(), biased=True, fused=NATIVE),
    "native_gated": Family(
        lambda _: _native(
            normalization_type="RMS",
            gated_mlp=True,
            act_fn="silu",
            positional_embedding_type="rotary",
            rotary_dim=8,
            n_key_value_heads=1,
        ),
        biased=True,
        fused=NATIVE,
    ),
    "native_capped": Family(
        lambda _: _native(attn_scores_soft_cap=4.0, output_logits_soft_cap=5.0, act_fn="relu"),
        biased=True,
        fused=CAPPED,
    ),
    "native_attention_only": Family(
        lambda _: _native(attn_only=True, normalization_type="LNPre"), biased=True, fused=NATIVE
    ),
    "native_rms_pre": Family(
        lambda _: _native(normalization_type="RMSPre", act_fn="gelu_new"), biased=True, fused=NATIVE
    ),
}

COMPOSITES: dict[str, Callable[[], lenslrp.Composite]] = {
    "AttnLRP": lambda: lenslrp.AttnLRP(),
    "CPLRP": lambda: lenslrp.CPLRP(),
    "CPLRP-up": lambda: lenslrp.CPLRP(gate="up"),
    "GradientTimesInput": lambda: lenslrp.GradientTimesInput(),
    "RelP": lambda: lenslrp.RelP(),
    "GIM": lambda: lenslrp.GIM(),
}

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def make(name: str, dtype: torch.dtype = torch.float64, *, bias: bool = True) -> TransformerBridge:
    """A bridge around a new tiny model, the same at every call."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    model = family.build(bias)
    randomise(model, bias=bias)
    if isinstance(model, TransformerBridge):
        model.original_model.to(dtype)
        bridge = model
    else:
        bridge = lenslrp.load(model.to(dtype))
    bridge.eval()
    bridge.cfg.dtype = dtype
    return bridge


def randomise(model: nn.Module, *, bias: bool) -> None:
    """Weights of a unit's order, gains around the family's own, biases or none."""
    generator = torch.Generator().manual_seed(1)
    for path, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        own = path.rsplit(".", 1)[-1]
        if own in ("bias", "b") or own.startswith("b_") or own.endswith("_bias"):
            parameter.data = 0.3 * noise if bias else torch.zeros_like(noise)
        elif parameter.ndim == 1:
            parameter.data = parameter.data + 0.2 * noise
        elif "embed" in path or "wte" in path or "wpe" in path:
            parameter.data = 0.8 * noise
        else:
            parameter.data = 1.6 * noise / WIDTH**0.5


def tokens(batch: int = 2, length: int = 7, seed: int = 3) -> Tensor:
    """Random token ids [batch, pos]; 0, which some families pad with, is left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)
