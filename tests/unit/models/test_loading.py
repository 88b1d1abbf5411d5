"""``load``: every way in and every refusal. No network."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    BertConfig,
    BertForPreTraining,
    BloomConfig,
    BloomModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lenslrp.errors import InputError, LoadError
from lenslrp.models.loading import load
from lenslrp.text.conversation import chat

WORDS = ["<s>", "</s>", "the", "cat", "sat", "user", "assistant", ":"]


def tiny_llama(**changes):
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=1,
        **changes,
    )
    return LlamaForCausalLM(config)


def word_tokenizer():
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<s>"
    )


# --- models in memory -------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [None, word_tokenizer()], ids=["no tokenizer", "tokenizer"])
def test_model_in_memory_gives_its_own_logits(tokenizer, no_network):
    hf = tiny_llama().train()
    hf.set_attn_implementation("eager")
    tokens = torch.tensor([[2, 3, 4]])
    expected = hf(tokens).logits
    bridge = load(hf, tokenizer=tokenizer)
    assert isinstance(bridge, TransformerBridge)
    assert torch.equal(bridge(tokens), expected)
    assert not bridge.training
    assert not hf.training


def test_model_in_memory_without_tokenizer_has_live_patterns(no_network):
    hf = tiny_llama(attn_implementation="sdpa")
    bridge = load(hf)
    _, cache = bridge.run_with_cache(torch.tensor([[2, 3, 4]]))
    assert hf.config._attn_implementation == "eager"
    assert torch.allclose(cache["blocks.0.attn.hook_pattern"].sum(-1), torch.ones(1, 2, 3))


def test_model_in_memory_reads_text_with_its_tokenizer(no_network):
    bridge = load(tiny_llama(), tokenizer=word_tokenizer(), prepend_bos=False)
    assert bridge.to_tokens("the cat sat").tolist() == [[2, 3, 4]]
    bridge = load(tiny_llama(), tokenizer=word_tokenizer(), prepend_bos=True)
    assert bridge.to_tokens("the cat sat").tolist() == [[0, 2, 3, 4]]


@pytest.mark.parametrize("tokenizer", [None, word_tokenizer()], ids=["no tokenizer", "tokenizer"])
def test_dtype_is_applied_and_recorded(tokenizer, no_network):
    bridge = load(tiny_llama(), tokenizer=tokenizer, dtype=torch.float64, device="cpu")
    assert bridge.cfg.dtype == torch.float64
    assert bridge(torch.tensor([[2, 3]])).dtype == torch.float64


@pytest.mark.parametrize("tokenizer", [None, word_tokenizer()], ids=["no tokenizer", "tokenizer"])
def test_class_decides_the_architecture_not_the_family_default(tokenizer, no_network):
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
    )
    message = "no adapter for BertForPreTraining; nearest: .*Bert"
    with pytest.raises(LoadError, match=message):
        load(BertForPreTraining(config), tokenizer=tokenizer)


def test_tokens_added_in_memory_are_kept_and_the_users_tokenizer_is_not_touched(no_network):
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    bridge = load(tiny_llama(), tokenizer=tokenizer)
    assert bridge.tokenizer.pad_token == "</s>"
    assert tokenizer.pad_token is None
    tokenizer.add_tokens(["dog"])
    bridge = load(tiny_llama(), tokenizer=tokenizer)
    assert bridge.to_tokens("the dog", prepend_bos=False).tolist() == [[2, 8]]


def test_bridge_is_returned_as_it_is():
    bridge = load(tiny_llama())
    bridge.train()
    assert load(bridge) is bridge
    assert bridge.training


def test_bridge_takes_no_further_arguments():
    bridge = load(tiny_llama())
    with pytest.raises(LoadError, match="dtype, device cannot be given here: a bridge is returned"):
        load(bridge, dtype=torch.float64, device="cpu")


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("gpt2", {"tokenizer": word_tokenizer()}, "a named model brings its own tokenizer"),
        ("smollm2-135m", {"revision": "main"}, "one pinned version"),
        (tiny_llama(), {"revision": "main"}, "revision cannot be given here: the model is in mem"),
        (tiny_llama(), {"n_devices": 2, "device": "cpu"}, "n_devices chooses the devices"),
    ],
    ids=["tokenizer", "revision", "revision in memory", "device"],
)
def test_arguments_that_would_be_ignored_are_refused(model, arguments, message):
    with pytest.raises(LoadError, match=message):
        load(model, **arguments)


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are two devices")
def test_more_devices_than_there_are():
    with pytest.raises(LoadError, match="n_devices=2.*CUDA"):
        load(tiny_llama(), n_devices=2)


def test_a_model_in_memory_is_spread(monkeypatch):
    """As far as that goes with one device: its layers are placed, and it computes what it did."""
    from transformer_lens.utilities import multi_gpu

    room = {"cpu": 10**12}
    monkeypatch.setattr(multi_gpu, "resolve_device_map", lambda *_: ("balanced", room))
    model = tiny_llama()
    tokens = torch.tensor([[2, 3, 4]])
    expected = model(tokens).logits
    bridge = load(model, n_devices=2)
    assert bridge.original_model.hf_device_map == {"": "cpu"}
    torch.testing.assert_close(bridge(tokens, return_type="logits"), expected)
    with pytest.raises(LoadError, match="n_devices cannot be given here: the model is inside"):
        load(model, n_devices=2)


# --- names and wrong types --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm2-135", "SmolLM2-135M", "smolm2-135m"])
def test_misspelt_short_name_gets_the_nearest(name, no_network):
    with pytest.raises(LoadError, match=f"{name}.*did you mean 'smollm2-135m'"):
        load(name)


def test_unknown_id_says_what_was_tried(no_network):
    with pytest.raises(LoadError, match="'distilgpt3' is not an embedded model.*'distilgpt2'"):
        load("distilgpt3")


def test_hooked_transformer_gets_the_way_over():
    class HookedTransformer(torch.nn.Module):
        cfg = type("Config", (), {"model_name": "EleutherAI/pythia-70m"})()

    class Mine(HookedTransformer):
        pass

    with pytest.raises(LoadError, match="removed in TransformerLens 4") as raised:
        load(Mine())
    assert "lenslrp.load('EleutherAI/pythia-70m')" in str(raised.value)
    assert "boot_transformers('EleutherAI/pythia-70m')" in str(raised.value)


def test_other_objects_are_named():
    with pytest.raises(LoadError, match="cannot load a torch.nn.modules.linear.Linear"):
        load(torch.nn.Linear(2, 2))


# --- chat -------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"


def test_chat_applies_the_template(no_network):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE + "{% if add_generation_prompt %}assistant :{% endif %}"
    tokens = chat(load(tiny_llama(), tokenizer=tokenizer), "the cat")
    assert tokens.tolist() == [[5, 7, 2, 3, 6, 7]]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        ([{"role": "user"}], "message 0 needs 'role' and 'content', it has \\['role'\\]"),
        ("cat", "refuses these messages: only dogs"),
    ],
)
def test_chat_refuses_bad_messages(messages, message, no_network):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only dogs') }}"
    with pytest.raises(InputError, match=message):
        chat(load(tiny_llama(), tokenizer=tokenizer), messages)


def test_chat_needs_a_template_and_a_tokenizer(no_network):
    with pytest.raises(InputError, match="no chat template"):
        chat(load(tiny_llama(), tokenizer=word_tokenizer()), "the cat")
    with pytest.raises(InputError, match="no tokenizer"):
        chat(load(tiny_llama()), "the cat")


def test_a_bare_stack_that_the_bridge_cannot_wrap_is_refused() -> None:
    """TransformerLens loads checkpoints named so with their head; in memory it finds none."""
    sizes = {"vocab_size": 11, "hidden_size": 8, "n_head": 2, "n_layer": 1}
    with pytest.raises(LoadError, match="cannot bridge this BloomModel"):
        load(BloomModel(BloomConfig(**sizes)))
