"""What a directory holds is loaded whole, or refused by what is wrong with it. No network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from lenslrp.cli.commands import main
from lenslrp.errors import LoadError
from lenslrp.models.checkpoints import require_device
from lenslrp.models.loading import load
from tests.conformance.families import randomise
from tests.conformance.zoo import plain, tokenizers
from tests.unit.tiny import TOKENS

SIZES: dict[str, Any] = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def llama(**changes: Any) -> hf.LlamaForCausalLM:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, **changes}))
    model.set_attn_implementation("eager")
    randomise(model, bias=True)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path, no_network: None) -> Path:
    """A saved Llama of two layers."""
    llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("as_path", [str, Path], ids=["str", "Path"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_by_directory_and_from_memory_are_one(
    as_path: Any, tied: bool, tmp_path: Path, no_network: None
) -> None:
    model = llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    expected = model(TOKENS).logits
    bridge = load(as_path(tmp_path), device="cpu")
    assert type(bridge.original_model) is hf.LlamaForCausalLM
    assert bridge.tokenizer is None
    assert bridge.cfg.dtype == torch.float32
    assert torch.equal(bridge(TOKENS), expected)
    assert torch.equal(load(model)(TOKENS), expected)


@pytest.mark.parametrize(
    ("family", "name"),
    [("MptForCausalLM", "MPTForCausalLM"), ("T5ForConditionalGeneration", "T5WithLMHeadModel")],
)
def test_a_class_may_have_had_another_name(family: str, name: str, tmp_path: Path) -> None:
    plain(family, torch.float32).save_pretrained(tmp_path)
    edit(tmp_path, architectures=[name])
    assert type(load(str(tmp_path), device="cpu").original_model).__name__ == family


# --- weights ----------------------------------------------------------------------------------


def test_layers_that_the_files_lack_are_named(folder: Path) -> None:
    edit(folder, num_hidden_layers=4)
    with pytest.raises(LoadError, match=r"model\.layers\.2\.input_layernorm\.weight.* and 14 more "
                       "missing from the files"):  # fmt: skip
        load(str(folder))


def test_layers_that_the_configuration_lacks_are_named(folder: Path) -> None:
    edit(folder, num_hidden_layers=1)
    with pytest.raises(LoadError, match=r"model\.layers\.1.* in the files and not in the model"):
        load(str(folder))


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_one_missing_weight_is_named(name: str, folder: Path) -> None:
    rewrite(folder, lambda weights: weights.pop(name))
    with pytest.raises(LoadError, match=f"{name} missing from the files"):
        load(str(folder))


def test_a_bias_that_the_configuration_denies_is_named(folder: Path) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    rewrite(folder, lambda weights: weights.update({bias: torch.ones(16)}))
    with pytest.raises(LoadError, match=f"{bias} in the files and not in the model"):
        load(str(folder))


def test_weights_of_other_shapes_are_refused(folder: Path, capfd: Any) -> None:
    edit(folder, intermediate_size=32)
    with pytest.raises(LoadError, match="other shapes than a LlamaForCausalLM"):
        load(str(folder))


def test_heads_of_pretraining_may_be_left_over(tmp_path: Path, no_network: None) -> None:
    """Published masked language models carry BERT's pooler and its next-sentence head."""
    config = hf.BertConfig(**SIZES)
    hf.BertForPreTraining(config).save_pretrained(tmp_path)
    edit(tmp_path, architectures=["BertForMaskedLM"])
    assert type(load(str(tmp_path)).original_model) is hf.BertForMaskedLM


@pytest.mark.parametrize("pooler", [True, False], ids=["pooler", "no pooler"])
def test_a_backbone_has_the_pooler_that_it_was_saved_with(
    pooler: bool, tmp_path: Path, no_network: None
) -> None:
    config = hf.ViTConfig(**{**SIZES, "image_size": 8, "patch_size": 4})
    hf.ViTModel(config, add_pooling_layer=pooler).save_pretrained(tmp_path)
    assert (load(str(tmp_path)).original_model.pooler is not None) == pooler


# --- what is no checkpoint --------------------------------------------------------------------


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{nope")


def no_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()


def unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "nosuch"}')


def wrong_type(folder: Path) -> None:
    edit(folder, hidden_size="wide")


def no_class(folder: Path) -> None:
    edit(folder, architectures=None)


def code_of_its_own(folder: Path) -> None:
    edit(folder, architectures=["QWenLMHeadModel"])


def configuration_of_its_own(folder: Path) -> None:
    edit(folder, model_type="nosuch", auto_map={"AutoConfig": "code.Config"})
    (folder / "code.py").write_text("raise SystemExit('this was run')")


def tokenizer_of_its_own(folder: Path) -> None:
    settings = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "tokenizer_class": "No"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "code.py").write_text("raise SystemExit('this was run')")


def pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"garbage, garbage")


def tokenizer_not_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{nope")


def adapter_without_base(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": null}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (not_json, "config.json of .* cannot be read as a configuration: .*not a valid JSON"),
        (no_configuration, r"has no config.json \(it holds .*model.safetensors\)"),
        (unknown_type, "cannot be read as a configuration: .*nosuch"),
        (wrong_type, "cannot be read as a configuration: .*hidden_size"),
        (no_class, 'names no class under "architectures"'),
        (code_of_its_own, "is a QWenLMHeadModel, which transformers .* does not have"),
        (configuration_of_its_own, "configuration of its own. Its code .* is not run here"),
        (tokenizer_of_its_own, "the tokenizer of .* cannot be read: .*custom code"),
        (pickle, "pytorch_model.bin, a pickle.*convert it once.*LlamaForCausalLM"),
        (nothing, "cannot read its weights as a LlamaForCausalLM: .*model.safetensors"),
        (cut, "a safetensors file of it is damaged"),
        (garbage, "a safetensors file of it is damaged"),
        (tokenizer_not_json, "tokenizer.json is not JSON"),
        (adapter_without_base, "names no base model"),
    ],
)
def test_what_is_no_checkpoint_is_refused(damage: Any, message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(LoadError, match=message):
        load(str(folder))


def test_a_file_is_no_directory(folder: Path) -> None:
    with pytest.raises(LoadError, match="is a file: give the directory"):
        load(str(folder / "model.safetensors"))


def test_a_device_that_is_not_there(folder: Path, capsys: Any) -> None:
    message = "no device 'cuda:99' here; torch sees cpu"
    with pytest.raises(LoadError, match=message):
        load(str(folder), device="cuda:99")
    with pytest.raises(LoadError, match=message):
        load(llama(), device="cuda:99")
    assert main(["doctor", str(folder), "--device", "cuda:99"]) == 1
    assert message in capsys.readouterr().err
    assert require_device("cpu") == torch.device("cpu")


# --- adapters ---------------------------------------------------------------------------------


class PeftModel(torch.nn.Module):
    """Stands for PEFT's, which is told by its name."""

    def __init__(self, inner: Any, prompt: bool) -> None:
        super().__init__()
        self.inner = inner
        kind = type("PromptTuningConfig", (), {"is_prompt_learning": prompt})
        self.peft_config = {"default": kind()}

    def get_base_model(self) -> Any:
        return self.inner

    def forward(self, **given: Any) -> Any:
        return self.inner(**given)

    def save_pretrained(self, folder: Path) -> None:
        raise AssertionError("nothing is saved")


def test_the_model_inside_a_peft_model_is_wrapped(tmp_path: Path) -> None:
    adapted = PeftModel(llama(), prompt=False)
    bridge = load(adapted)  # type: ignore[arg-type]
    assert bridge.original_model is adapted.inner
    assert load(adapted) is bridge  # type: ignore[arg-type]
    with pytest.raises(LoadError, match="save the adapter before"):
        adapted.save_pretrained(tmp_path)


def test_learned_prompts_have_no_bridge() -> None:
    with pytest.raises(LoadError, match="'default' .* puts learned tokens before the input"):
        load(PeftModel(llama(), prompt=True))  # type: ignore[arg-type]


def test_an_adapters_directory_needs_peft(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    lora = folder.parent / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    with pytest.raises(LoadError, match=r"needs peft.*lenslrp\[peft\]"):
        load(str(lora))


@pytest.fixture
def lora(folder: Path) -> Any:
    """An adapter saved beside the model that it is for, and that model with it."""
    peft = pytest.importorskip("peft")
    base = hf.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(base, settings).eval()
    adapted.save_pretrained(folder.parent / "lora")
    return adapted


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")  # PEFT asks transformers for it
def test_adapters_merged_and_in_place_compute_what_peft_does(folder: Path, lora: Any) -> None:
    expected = lora(TOKENS).logits
    merged = load(str(folder.parent / "lora"), device="cpu")
    assert torch.allclose(merged(TOKENS), expected, atol=1e-5)
    assert torch.allclose(load(lora)(TOKENS), expected, atol=1e-5)
    assert not torch.allclose(load(str(folder), device="cpu")(TOKENS), expected, atol=1e-2)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "down_proj", "v_proj"], "v_proj.lora_A.* missing from the files"),
        (["q_proj"], "down_proj.lora_A.* in the files and not in the model"),
    ],
)
def test_an_adapter_is_loaded_whole(folder: Path, lora: Any, targets: Any, message: str) -> None:
    path = folder.parent / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": targets}))
    with pytest.raises(LoadError, match=message):
        load(str(path.parent))


# --- tokenizers -------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(5), ids=["plain", "bos", "cls", "gmask", "eos"])
def test_a_directorys_tokenizer_keeps_its_template(index: int, folder: Path) -> None:
    tokenizer = tokenizers()[index]
    tokenizer.save_pretrained(folder)
    again = hf.AutoTokenizer.from_pretrained(folder)
    expected = again("the cat sat")["input_ids"]
    assert expected == tokenizer("the cat sat")["input_ids"]
    assert load(str(folder), device="cpu").to_tokens("the cat sat").tolist() == [expected]
