"""The bridge is the model: one short pass of both; a model is wrapped once and saved as it was."""

from __future__ import annotations

import copy
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from lenslrp.errors import LoadError
from lenslrp.models import verifying
from lenslrp.models.doctor import examine
from lenslrp.models.loading import load
from lenslrp.models.verifying import Agreement, difference, reference, short_input
from lenslrp.models.wrapped import agreement_of
from tests.conformance import zoo
from tests.unit.models.test_checkpoint_files import SIZES, llama
from tests.unit.tiny import TOKENS, word_tokenizer


def gpt2(**changes: Any) -> Any:
    sizes = {"vocab_size": 23, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **changes))
    zoo.randomise(model, bias=True)
    return model.double()


def test_a_bridge_that_computes_something_else_is_refused() -> None:
    model = gpt2(scale_attn_weights=False)
    message = "refused after a short pass: TransformerLens computes something else than the model"
    for _ in range(2):  # the model is inside the bridge now, and stays refused
        with pytest.raises(LoadError, match=message):
            load(model)
    bridge = load(model, verify=False)
    diagnosis = examine(bridge)
    assert not diagnosis.agreement.ok
    assert not diagnosis.ok
    assert diagnosis.balanced  # the ledger of another model closes
    assert "NO  the bridge computes what Hugging Face computes: apart by" in str(diagnosis)


def test_doctor_says_how_far_the_bridge_is_apart() -> None:
    bridge = load(gpt2())
    diagnosis = examine(bridge)
    found = diagnosis.agreement
    assert found.difference is not None
    assert found.difference <= found.tolerance == 1e-9
    assert diagnosis.ok
    assert "yes  the bridge computes what Hugging Face computes" in str(diagnosis)


def said(bridge: Any) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=200).print(examine(bridge).render())
    return buffer.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux")
def test_doctor_advises_large_pages_where_they_are_not_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bridge, line = load(gpt2()), "THP_MEM_ALLOC_ENABLE=1 in the environment saves page faults"
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    assert line in said(bridge)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    assert "THP_MEM" not in said(bridge)


def test_doctor_says_what_it_could_not_compare() -> None:
    assert "?  not compared with Hugging Face: it was loaded with verify=False" in said(
        load(gpt2(), verify=False)
    )
    bridge = load(gpt2())
    with torch.no_grad():
        next(bridge.parameters()).mul_(1.1)
    assert "its weights were changed after it was loaded" in said(bridge)
    model = gpt2()
    made = build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=model.config).eval()
    assert "this bridge was made without lenslrp.load" in said(made)
    assert examine(made).ok


def test_what_only_one_of_them_can_run_is_refused() -> None:
    sizes = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.FalconConfig(**sizes, num_kv_heads=2, multi_query=False)
    with pytest.raises(LoadError, match="the model itself raises for a few random tokens: Runtime"):
        load(hf.FalconForCausalLM(config))
    config = hf.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, do_layer_norm_before=False)
    with pytest.raises(LoadError, match="the bridge raises for what the model runs"):
        load(hf.OPTForCausalLM(config))


def test_large_models_and_models_without_values_are_not_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verifying, "LARGEST", 1000)
    assert agreement_of(load(gpt2())).reason == "it has more than 1e+03 weights"
    with torch.device("meta"):
        made = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=23, n_embd=16, n_layer=1, n_head=2))
    assert reference(made).reason == "its weights have no values"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_type_has_its_tolerance(dtype: torch.dtype) -> None:
    found = agreement_of(load(llama().to(dtype)))
    assert found.difference is not None
    assert found.difference <= found.tolerance
    inside = ", float32 inside" if dtype == torch.float64 else ""
    assert found.tolerance == verifying.TOLERANCE[str(dtype).removeprefix("torch.") + inside]


def test_the_pass_disturbs_nothing() -> None:
    model = llama()
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = reference(model), reference(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert first.output is not None
    assert second.output is not None
    assert torch.equal(first.output, second.output)
    assert not first.output.requires_grad


def test_ids_that_mean_something_are_left_out() -> None:
    model = zoo.plain("LlavaForConditionalGeneration")
    ids = set(short_input(model)["input_ids"].flatten().tolist())
    taken = verifying.reserved_ids(model.config.to_dict())
    assert taken >= {0, 1, 2, model.config.image_token_id}
    assert not ids & taken
    assert len(ids) == verifying.LENGTH


def test_difference_is_relative_and_sees_what_is_not_finite() -> None:
    a = torch.tensor([[[1.0, 2.0]], [[1.0, -torch.inf]], [[1.0, 2.5]]])
    b = torch.tensor([[[1.0, 2.0]], [[1.0, -torch.inf]], [[1.0, 2.0]]])
    assert difference(a, b) == 0.25
    assert difference(a, b, by_position=True) == 0.0
    assert difference(b, b) == 0.0
    for wrong in (torch.nan, torch.inf):
        apart = difference(torch.full_like(b, wrong), b)
        assert not Agreement(apart, 1e-3).ok


# --- a model is wrapped once ------------------------------------------------------------------


def test_the_same_model_twice_is_the_same_bridge() -> None:
    model = llama()
    bridge = load(model)
    assert load(model) is bridge
    assert load(bridge.original_model) is bridge
    assert bridge.tokenizer is None
    assert load(model, tokenizer=word_tokenizer(), dtype=torch.float32, device="cpu") is bridge
    assert bridge.tokenizer is not None
    with pytest.raises(LoadError, match="inside a bridge already, in torch.float32 on cpu: load it "
                       "anew for torch.float64"):  # fmt: skip
        load(model, dtype=torch.float64)
    assert load(copy.deepcopy(model)) is not bridge


def test_a_model_in_a_bridge_of_others_is_refused() -> None:
    model = llama()
    build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config)
    with pytest.raises(LoadError, match="inside a TransformerBridge already"):
        load(model)


SAVED = {
    "Llama, tied": lambda: llama(tie_word_embeddings=True),
    "GPT-2": lambda: gpt2().float(),
    **{
        name: lambda name=name: zoo.plain(name, torch.float32)
        for name in (
            "BertForMaskedLM",
            "FalconForCausalLM",
            "MixtralForCausalLM",
            "Phi3ForCausalLM",
            "T5ForConditionalGeneration",
            "ViTForImageClassification",
        )
    },
}


@pytest.mark.parametrize("name", list(SAVED))
@pytest.mark.filterwarnings("ignore")
def test_a_wrapped_model_is_saved_as_it_was(name: str, tmp_path: Path) -> None:
    model = SAVED[name]()
    model.save_pretrained(tmp_path / "before")
    bridge = load(model)
    given = short_input(model)
    bridge.original_model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / w / "model.safetensors") for w in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = load(str(tmp_path / "after"), device="cpu")
    outputs = [b(*[given.get("input_ids")], **{k: v for k, v in given.items() if k != "input_ids"})
               for b in (bridge, again)]  # fmt: skip
    assert torch.equal(*outputs)


# --- what cannot be wrapped -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*script_method")  # of torch's own compiler
def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(LoadError, match=r"give the model inside \(model._orig_mod\)"):
        load(torch.compile(llama(), backend="eager"))  # type: ignore[arg-type]
    model = llama()
    model.compile(backend="eager")
    with pytest.raises(LoadError, match="compiled in place"):
        load(model)


def test_a_head_that_is_no_matrix_is_refused() -> None:
    model = llama()
    model.lm_head = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 23))
    with pytest.raises(LoadError, match="cannot bridge this LlamaForCausalLM.*no weight"):
        load(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES, attention_bias=False)), "GPTNeoX"),
        (lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES, qk_layernorm=True)), "q_layernorm"),
        (
            lambda: hf.T5EncoderModel(
                hf.T5Config(vocab_size=23, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2)
            ),
            "no adapter for T5EncoderModel",
        ),
    ],
    ids=["NeoX without biases", "Phi with norms of q and k", "T5's encoder"],
)
def test_what_transformer_lens_has_no_place_for_is_refused(model: Any, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        load(model())


def test_experts_run_in_float64() -> None:
    """torch's grouped product, their default, has none."""
    config = hf.MixtralConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2
    )
    model = hf.MixtralForCausalLM(config)
    assert model.config._experts_implementation == "grouped_mm"
    assert load(model, dtype=torch.float64)(TOKENS).dtype == torch.float64
