"""What neurons write against an explicit product of Hugging Face's weights; bad input.

tests/conformance/analysis/test_vocabulary.py compares all kinds of units with gradients.
"""

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel

from lenslrp.analysis import Head, Neuron, reads, sign_cases, writes
from lenslrp.analysis.units import unembedding
from lenslrp.analysis.units.projection import neuron_writes
from lenslrp.errors import InputError
from tests.conformance import zoo

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

    def decode(self, ids, **_):
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
    return (
        hf,
        row - row.mean(),
        hf.transformer.ln_f.weight,
        hf.lm_head.weight,
    )  # a LayerNorm centres


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


def test_top_and_bottom_are_tables_of_tokens():
    found = writes(bridge(gpt2()[0]), Neuron(1, 3))
    best = found.scores.argsort(descending=True).tolist()
    assert list(found.top(3)["id"]) == best[:3]
    assert list(found.bottom(2)["id"]) == best[:-3:-1]
    assert list(found.top(1)["token"]) == [chr(65 + best[0])]
    assert (found.unit, found.role, found.name) == ("blocks.1.mlp.hook_post[3]", "writes", "out")


def test_the_vocabulary_is_read_in_chunks(monkeypatch):
    model = bridge(gemma()[0])
    whole = writes(model, Neuron(1, 3)).scores
    monkeypatch.setattr(unembedding, "VOCABULARY_CHUNK", 7)
    torch.testing.assert_close(writes(model, Neuron(1, 3)).scores, whole)


def test_four_sign_cases_of_a_gated_neuron():
    model, neuron = bridge(gemma()[0]), Neuron(1, 3)
    table = sign_cases(model, neuron, k=2)
    assert list(table["activation"]) == ["+", "-", "-", "+"]
    written = writes(model, neuron)
    up, down = list(written.top(2)["token"]), list(written.bottom(2)["token"])
    assert list(table["writes"]) == [up, down, down, up]
    assert table["reads in"][0] == list(reads(model, neuron)["in"].top(2)["token"])
    assert table["reads gate"][2] == list(reads(model, neuron)["gate"].bottom(2)["token"])


def test_a_neuron_without_a_gate_has_no_sign_cases():
    with pytest.raises(InputError, match=r"blocks.0.mlp.hook_post\[1\] has no gate"):
        sign_cases(bridge(gpt2()[0]), Neuron(0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": 41}, "token is 41, expected 0 to 39"),
        ({"source": torch.zeros(3)}, "source has 3 values, expected 16"),
        ({"component": 8}, "component is 8, but the head has 0 to 7"),
    ],
)
def test_what_a_head_cannot_be_asked(options, message):
    with pytest.raises(InputError, match=message):
        writes(bridge(gpt2()[0]), Head(0, 1), **options)


def test_sources_are_for_heads():
    with pytest.raises(InputError, match="source is for heads"):
        writes(bridge(gpt2()[0]), Neuron(0, 1), source=3)


def test_a_masked_language_head_is_no_reading_of_a_direction():
    with pytest.raises(InputError, match=r"head of its own \(mlm_head\)"):
        writes(zoo.build("BertForMaskedLM"), Neuron(1, 3))
    assert set(reads(zoo.build("BertForMaskedLM"), Neuron(1, 3))) == {"in"}


@pytest.mark.parametrize("name", ["ViTModel", "DeiTModel"])
def test_a_headless_model_says_so(name):
    with pytest.raises(InputError, match=f"{name} has no unembedding"):
        writes(zoo.build(name), Neuron(1, 3))


def test_latent_attention_has_no_matrices_of_one_head():
    with pytest.raises(InputError, match="has no W_Q of a single head"):
        writes(zoo.build("DeepseekV3ForCausalLM"), Head(1, 1))


def test_classes_are_the_vocabulary_of_an_image_classifier():
    model = zoo.build("ViTForImageClassification")
    assert set(writes(model, Neuron(1, 3)).top(2)["token"]) == {"LABEL_0", "LABEL_1"}
    with pytest.raises(InputError, match="embeds no tokens"):
        reads(model, Neuron(1, 3))


def test_an_encoder_writes_to_no_vocabulary():
    model = zoo.build("T5ForConditionalGeneration")
    with pytest.raises(InputError, match="an encoder writes to cross-attention"):
        writes(model, Neuron(1, 3, side="encoder"))
    assert set(reads(model, Neuron(1, 3, side="encoder"))) == {"in"}
