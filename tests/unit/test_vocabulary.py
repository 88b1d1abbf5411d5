"""Neurons' write directions against an explicit product in float64."""

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel

from lenslrp.analysis.vocabulary import neuron_writes
from lenslrp.errors import InputError

TINY_GPT2 = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=8)
TINY_GEMMA = GemmaConfig(
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    hidden_size=16,
    intermediate_size=24,
    vocab_size=40,
)


class Letters:
    """A tokenizer of one character a token, enough for the bridge and for decode."""

    padding_side = "right"
    bos_token_id = 0
    bos_token = eos_token = pad_token = "<s>"

    def decode(self, ids):
        return "".join(chr(65 + index) for index in ids)


def bridge(hf):
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model: TransformerBridge = build_bridge_from_module(
        hf, architecture=type(hf).__name__, hf_config=hf.config, device="cpu"
    )
    model.tokenizer = Letters()
    return model


def gpt2():
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(TINY_GPT2)
    torch.nn.init.normal_(hf.transformer.ln_f.weight)
    row = hf.transformer.h[1].mlp.c_proj.weight[3]
    return hf, row, hf.transformer.ln_f.weight, hf.lm_head.weight


def gemma():
    torch.manual_seed(0)
    hf = GemmaForCausalLM(TINY_GEMMA)
    torch.nn.init.normal_(hf.model.norm.weight)
    row = hf.model.layers[1].mlp.down_proj.weight[:, 3]
    return hf, row, 1 + hf.model.norm.weight, hf.lm_head.weight


@pytest.mark.parametrize("family", [gpt2, gemma])
def test_top_tokens_equal_the_explicit_product(family):
    hf, row, gain, unembedding = family()
    scores = unembedding.double() @ (gain.double() * row.double())
    expected = [chr(65 + index) for index in scores.topk(4).indices.tolist()]
    assert neuron_writes(bridge(hf), 1, 3, k=4) == expected


def test_without_a_tokenizer_ids_are_shown():
    model = bridge(gpt2()[0])
    model.tokenizer = None
    assert all(text.startswith("[") for text in neuron_writes(model, 0, 0, k=2))


@pytest.mark.parametrize(
    ("layer", "neuron", "k", "message"),
    [
        (2, 0, 1, "layer is 2, but the model has layers 0 to 1"),
        (0, 64, 1, "neuron is 64, but layer 0 has neurons 0 to 63"),
        (0, 0, 41, "k is 41, expected 1 to 40"),
    ],
)
def test_out_of_range_names_the_range(layer, neuron, k, message):
    with pytest.raises(InputError, match=message):
        neuron_writes(bridge(gpt2()[0]), layer, neuron, k=k)


def test_no_unembedding_is_an_input_error():
    class Headless:
        blocks = ()

    with pytest.raises(InputError, match="no unembedding"):
        neuron_writes(Headless(), 0, 0)
