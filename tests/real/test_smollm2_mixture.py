"""A mixture of experts with real weights: SmolLM2's own, copied or split into a Mixtral.

No natively trained mixture comes as a package file. Copies of one MLP as experts compute what the
dense model computes, whatever the router says, because the router's weights add up to one; halves
of it do so with equal weights. So under a constant router relevance must be the dense model's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import lenslrp

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]
PROMPTS = [
    "The Eiffel Tower is located in the city of",
    "The opposite of hot is",
    "When Mary and John went to the store, John gave a drink to",
]
LAYERS = 30


def dense(model: TransformerBridge) -> Any:
    """SmolLM2 as a Hugging Face model of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**model.original_model.config.to_dict(), "num_hidden_layers": LAYERS})
    small = LlamaForCausalLM(config)
    small.load_state_dict(weights(model, small.state_dict()))
    return small


def weights(model: TransformerBridge, wanted: Any) -> dict[str, torch.Tensor]:
    """SmolLM2's parameters under Hugging Face's names, those that are wanted."""
    known = {
        name.replace("._original_component", ""): tensor
        for name, tensor in model.original_model.state_dict().items()
    }
    return {name: known[name] for name in wanted if name in known}


def mixture(llama: Any, *, split: bool) -> Any:
    """The same model with its MLPs as experts: four copies, or two halves."""
    experts = 2 if split else 4
    config = llama.config
    width = config.intermediate_size // (2 if split else 1)
    mixed = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=width,
            num_hidden_layers=LAYERS,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=config.rope_parameters,
            tie_word_embeddings=True,
            num_local_experts=experts,
            num_experts_per_tok=2,
            sliding_window=None,
        )
    )
    own = {k: v for k, v in llama.state_dict().items() if ".mlp." not in k}
    missing, unexpected = mixed.load_state_dict(own, strict=False)
    assert not unexpected
    assert all(".mlp." in name for name in missing)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer, other in zip(llama.model.layers, mixed.model.layers, strict=True):
            gate, up = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
            down = layer.mlp.down_proj.weight
            for e in range(experts):
                part = slice(e * width, (e + 1) * width) if split else slice(None)
                other.mlp.experts.gate_up_proj[e] = torch.cat([gate[part], up[part]])
                other.mlp.experts.down_proj[e] = down[:, part] * (2 if split else 1)
            router = 0.02 * torch.randn(other.mlp.gate.weight.shape, generator=generator)
            other.mlp.gate.weight.copy_(torch.zeros_like(router) if split else router)
    return mixed


@pytest.mark.parametrize("split", [False, True], ids=["copies", "halves"])
def test_a_constant_router_gives_the_dense_relevance(
    smollm2: TransformerBridge, split: bool
) -> None:
    llama = dense(smollm2)
    mixed = lenslrp.load(mixture(llama, split=split).eval(), tokenizer=smollm2.tokenizer)
    plain = lenslrp.load(llama.eval(), tokenizer=smollm2.tokenizer)
    for prompt in PROMPTS:
        options: dict[str, Any] = {"prepend_bos": False, "names_filter": "mlp.hook_expert_post"}
        a, R = lenslrp.run_with_relevance(
            mixed, prompt, composite=lenslrp.AttnLRP(router="constant"), **options
        )
        options["names_filter"] = "mlp.hook_post"
        b, D = lenslrp.run_with_relevance(plain, prompt, composite=lenslrp.AttnLRP(), **options)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
        size = float(D.tokens.abs().max())
        assert float((R.tokens - D.tokens).abs().max()) <= 1e-4 * size
        assert abs(R.ledger().error) < 1e-4
        # Neuron by neuron too: an expert's copies share the dense neuron's relevance.
        chosen = R["blocks.3.mlp.hook_expert_post"]
        whole = chosen.flatten(2) if split else chosen.sum(dim=2)
        if split:  # slots are in the order in which the router chose them
            order = R.routing["blocks.3.mlp"].argsort(dim=-1)
            whole = chosen.gather(2, order[..., None].expand_as(chosen)).flatten(2)
        torch.testing.assert_close(whole, D["blocks.3.mlp.hook_post"], rtol=1e-3, atol=1e-4 * size)


def test_a_uniform_router_takes_half_of_the_mixture(smollm2: TransformerBridge) -> None:
    mixed = lenslrp.load(mixture(dense(smollm2), split=False).eval(), tokenizer=smollm2.tokenizer)
    R = lenslrp.run_with_relevance(mixed, PROMPTS[0], prepend_bos=False)[1]
    out, weight = R["blocks.3.mlp.hook_out"], R["blocks.3.mlp.gate.hook_expert_weights"]
    assert float(weight.sum()) == pytest.approx(float(out.sum()) / 2, rel=1e-3)
    assert R.experts().shape == (LAYERS, 4)
    assert abs(R.ledger().error) < 1e-4
