"""A Mixtral made of a dense model's own weights: its MLPs copied, or cut in halves, as experts.

No natively trained mixture comes as a package file. Copies of one MLP compute what the dense model
computes, whatever the router says, because the router's weights add up to one (how sparse upcycling
starts: Komatsuzaki et al. 2023); two halves with equal weights do so as well. So it is known what
relevance must be. It is not a natively trained mixture: what its router chooses means nothing.

    model = mixtral(lenslrp.load("smollm2-135m"))
"""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import lenslrp


def dense(bridge: TransformerBridge) -> LlamaForCausalLM:
    """The Llama inside a bridge, as a Hugging Face model of its own."""
    model = LlamaForCausalLM(bridge.original_model.config)
    weights = {
        name.replace("._original_component", ""): tensor
        for name, tensor in bridge.original_model.state_dict().items()
    }
    model.load_state_dict({name: weights[name] for name in model.state_dict() if name in weights})
    return model.eval()


def upcycled(
    llama: LlamaForCausalLM, experts: int = 4, *, halves: bool = False
) -> MixtralForCausalLM:
    """The same model with every MLP as ``experts`` copies, or two halves; a token gets two."""
    config: Any = llama.config
    experts, width = (
        (2, config.intermediate_size // 2)
        if halves
        else (
            experts,
            config.intermediate_size,
        )
    )
    kept = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
        "tie_word_embeddings",
    )  # fmt: skip
    model = MixtralForCausalLM(
        MixtralConfig(
            **{name: getattr(config, name) for name in kept},
            intermediate_size=width,
            num_local_experts=experts,
            num_experts_per_tok=2,
            sliding_window=None,
        )
    )
    shared = {name: tensor for name, tensor in llama.state_dict().items() if ".mlp." not in name}
    missing, unexpected = model.load_state_dict(shared, strict=False)
    if unexpected or any(".mlp." not in name for name in missing):
        raise RuntimeError(f"not the same model: {missing} missing, {unexpected} unexpected")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for old, new in zip(llama.model.layers, model.model.layers, strict=True):
            mlp: Any = old.mlp
            for e in range(experts):
                part = slice(e * width, (e + 1) * width) if halves else slice(None)
                new.mlp.experts.gate_up_proj[e] = torch.cat(
                    [mlp.gate_proj.weight[part], mlp.up_proj.weight[part]]
                )
                new.mlp.experts.down_proj[e] = mlp.down_proj.weight[:, part] * (2 if halves else 1)
            router = 0.02 * torch.randn(new.mlp.gate.weight.shape, generator=generator)
            new.mlp.gate.weight.copy_(torch.zeros_like(router) if halves else router)
    return model.eval()


def mixtral(
    bridge: TransformerBridge, experts: int = 4, *, halves: bool = False
) -> TransformerBridge:
    """A bridge around :func:`upcycled`, with the dense model's tokenizer and settings."""
    model = upcycled(dense(bridge), experts, halves=halves)
    return lenslrp.load(
        model, tokenizer=bridge.tokenizer, prepend_bos=bool(bridge.cfg.default_prepend_bos)
    )
