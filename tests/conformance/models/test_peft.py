"""Adapters of PEFT: as if they were merged, and what they add, at a hook point of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import lenslrp
from lenslrp import InputError, LoadError
from lenslrp.analysis import Neuron
from lenslrp.hooks import Gamma
from lenslrp.hooks.components import hook_points
from lenslrp.hooks.structure import components
from tests.unit.tiny import FAMILIES, SIZES, TOKENS, changes, snapshot

peft = pytest.importorskip("peft", reason='needs PEFT: pip install "lenslrp[peft]"')

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing"),  # PEFT asks transformers for it
    pytest.mark.filterwarnings("ignore:.*tied weights"),
]

GROUPED = {**SIZES, "num_key_value_heads": 1}
COMPOSITES: list[Any] = [
    lenslrp.AttnLRP(),
    lenslrp.CPLRP(),
    {"linear": Gamma(0.1), "projection": Gamma(0.2)},
    {"linear": Gamma(0.1)},
]


def _bert() -> Any:
    return hf.BertForSequenceClassification(hf.BertConfig(**SIZES, num_labels=3))


def _llama_classifier() -> Any:
    return hf.LlamaForSequenceClassification(hf.LlamaConfig(**GROUPED, num_labels=3))


def _mixtral() -> Any:
    config = hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    model = hf.MixtralForCausalLM(config)
    model.set_experts_implementation("eager")
    return model


def _llama_with_biases() -> Any:
    return FAMILIES["llama"](attention_bias=True, mlp_bias=True)


HEAD: dict[str, Any] = {"task_type": "SEQ_CLS"}
CASES: dict[str, tuple[Callable[..., Any], list[str], dict[str, Any]]] = {
    "llama": (FAMILIES["llama"], ["q_proj", "o_proj", "gate_proj", "down_proj"], {}),
    "llama with biases": (_llama_with_biases, ["q_proj", "v_proj", "down_proj"], {}),
    "qwen3": (FAMILIES["qwen3"], ["q_proj", "up_proj"], {}),
    "gpt2": (FAMILIES["gpt2"], ["c_attn", "c_proj", "c_fc"], {"fan_in_fan_out": True}),
    "neox": (FAMILIES["neox"], ["query_key_value", "dense"], {}),
    "phi3": (
        lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**SIZES)),
        ["qkv_proj", "gate_up_proj"],
        {},
    ),
    "embeddings": (FAMILIES["llama"], ["embed_tokens", "q_proj", "lm_head"], {}),
    "bert": (_bert, ["query", "dense"], {**HEAD, "modules_to_save": ["classifier"]}),
    "classifier": (_llama_classifier, ["v_proj"], {**HEAD, "modules_to_save": ["score"]}),
    "mixtral": (_mixtral, ["q_proj", "o_proj"], {}),
    "experts": (_mixtral, ["q_proj"], {"target_parameters": ["experts.down_proj"]}),
}


def base_model(build: Callable[..., Any]) -> Any:
    """A tiny model in float64 whose weights are large enough to matter."""
    torch.manual_seed(0)
    model = build().double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(10 if "emb" in name or "wte" in name else 6)
            else:
                weight.add_(0.2 * torch.randn_like(weight))
    return model


def adapted(build: Callable[..., Any], settings: Any) -> Any:
    """A model with an adapter that adds about as much as its weights do."""
    model = peft.get_peft_model(base_model(build), settings).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator).double())
    return model


def lora(name: str, **changed: Any) -> Any:
    build, targets, more = CASES[name]
    options = {"r": 3, "lora_dropout": 0.1, "init_lora_weights": False, **more, **changed}
    if "target_parameters" in more:
        options["lora_dropout"] = 0.0
    return adapted(build, peft.LoraConfig(target_modules=targets, **options))


def require_equal(model: Any, tolerance: float = 1e-9) -> Any:
    """Relevance at every hook point is that of the merged model, and the ledger closes."""
    merged = lenslrp.load(copy.deepcopy(model).merge_and_unload())
    bridge = lenslrp.load(model)
    first = None
    for composite in COMPOSITES:
        logits, found = lenslrp.run_with_relevance(bridge, TOKENS, 1, composite)
        reference, expected = lenslrp.run_with_relevance(merged, TOKENS, 1, composite)
        first = found if first is None else first
        torch.testing.assert_close(logits, reference, rtol=1e-11, atol=1e-11)
        assert set(expected) <= set(found)
        for hook in expected:
            scale = float(expected[hook].abs().max().clamp_min(1e-9))
            assert float((found[hook] - expected[hook]).abs().max()) / scale < 1e-9, hook
        assert abs(found.ledger().error) < tolerance
        biases = expected.ledger().biases
        assert found.ledger().biases == pytest.approx(biases, rel=1e-9, abs=1e-9)
    return first


@pytest.mark.parametrize("name", CASES)
def test_lora_is_what_merging_makes_of_it(name: str) -> None:
    float32 = CASES[name][0] is _mixtral  # its router's softmax
    found = require_equal(lora(name), 1e-6 if float32 else 1e-9)
    assert any(hook.endswith("hook_adapter") for hook in found)


TARGETS = ["q_proj", "o_proj", "down_proj"]
KINDS: dict[str, Callable[[], Any]] = {
    "DoRA": lambda: peft.LoraConfig(
        r=3, target_modules=TARGETS, use_dora=True, init_lora_weights=False
    ),
    "rsLoRA": lambda: peft.LoraConfig(
        r=3, target_modules=TARGETS, use_rslora=True, init_lora_weights=False
    ),
    "LoRA with biases": lambda: peft.LoraConfig(
        r=3, target_modules=TARGETS, lora_bias=True, init_lora_weights=False
    ),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        target_modules=TARGETS, total_step=10, init_lora_weights=False
    ),
    "IA3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "LoHa": lambda: peft.LoHaConfig(r=3, target_modules=TARGETS, init_weights=False),
    "LoKr": lambda: peft.LoKrConfig(r=3, target_modules=TARGETS, init_weights=False),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, target_modules=TARGETS),
    "VeRA": lambda: peft.VeraConfig(r=3, target_modules=["q_proj", "o_proj"], init_weights=False),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=TARGETS, init_weights=False),
}


@pytest.mark.filterwarnings("ignore:.*lora_bias")
@pytest.mark.parametrize("kind", KINDS)
def test_other_adapters_are_what_merging_makes_of_them(kind: str) -> None:
    require_equal(adapted(_llama_with_biases, KINDS[kind]()))


# --- what the fine-tuning added -----------------------------------------------------------------


def explicit(merged: Any, weights: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """``sum (dW x + db) g`` at layers of the merged model, from inputs and gradients seen there."""
    sums: dict[str, float] = {}
    seen: dict[str, Any] = {}

    def watch(name: str, layer: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            seen[name] = args[0].detach()

            def gradient(g: Tensor) -> None:
                weight, bias = weights[name]
                sums[name] = float(((seen[name] @ weight.T + bias) * g).sum())

            y.register_hook(gradient)

        return layer.register_forward_hook(hook)

    with lenslrp.relevance_rules(merged, lenslrp.AttnLRP()):
        handles = [watch(name, module_at(merged, name)) for name in weights]
        merged(TOKENS)[:, -1, 1].sum().backward()
        for handle in handles:
            handle.remove()
    return sums


def module_at(bridge: Any, path: str) -> Any:
    return bridge.get_submodule(path).original_component


@pytest.mark.parametrize("kind", ["LoRA", *KINDS])
@pytest.mark.filterwarnings("ignore:.*lora_bias")
def test_relevance_of_what_an_adapter_adds(kind: str) -> None:
    """It is what merging added at that layer: to the weight, and to the bias."""
    settings = (
        peft.LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False)
        if kind == "LoRA"
        else KINDS[kind]()
    )
    model = adapted(_llama_with_biases, settings)
    merged, base = (
        lenslrp.load(m)
        for m in (copy.deepcopy(model).merge_and_unload(), base_model(_llama_with_biases))
    )
    bridge = lenslrp.load(model)
    _, R = lenslrp.run_with_relevance(bridge, TOKENS, 1)
    names = [hook.removesuffix(".hook_adapter") for hook in R if hook.endswith("hook_adapter")]
    assert len(names) == 2 * (2 if kind == "VeRA" else 3)
    weights = {
        name: (
            module_at(merged, name).weight - module_at(base, name).weight,
            module_at(merged, name).bias - module_at(base, name).bias,
        )
        for name in names
    }
    expected = explicit(merged, weights)
    for name in names:
        assert R[f"{name}.hook_adapter"].shape[:2] == TOKENS.shape
        total = float(R[f"{name}.hook_adapter"].sum())
        assert total == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name
    assert max(map(abs, expected.values())) > 1e-3


def test_relevance_of_what_an_adapter_adds_to_a_joint_projection() -> None:
    model = lora("gpt2")
    merged, base = (
        lenslrp.load(m)
        for m in (copy.deepcopy(model).merge_and_unload(), base_model(FAMILIES["gpt2"]))
    )
    _, R = lenslrp.run_with_relevance(lenslrp.load(model), TOKENS, 1)
    parts = [f"blocks.1.attn.{part}" for part in "qkv"]
    none = torch.zeros(16, dtype=torch.float64)
    weights = {
        name: (module_at(merged, name).weight - module_at(base, name).weight, none)
        for name in parts
    }
    total = sum(explicit(merged, weights).values())
    assert float(R["blocks.1.attn.qkv.hook_adapter"].sum()) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_without_what_it_adds_the_model_is_its_base(name: str) -> None:
    """An edit at the hook point changes the output; relevance is then that of the base model."""
    bridge, base = lenslrp.load(lora(name)), lenslrp.load(base_model(CASES[name][0]))
    handles = [
        point.register_forward_hook(lambda _, args, added: torch.zeros_like(added))
        for name, point in hook_points(bridge, components(bridge)).items()
        if name.endswith("hook_adapter")
    ]
    logits, found = lenslrp.run_with_relevance(bridge, TOKENS, 1, names_filter=[])
    reference, expected = lenslrp.run_with_relevance(base, TOKENS, 1, names_filter=[])
    torch.testing.assert_close(logits, reference, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-9, atol=1e-9)
    assert abs(found.ledger().error) < 1e-9
    with pytest.raises(InputError, match=r"hook_adapter can be read under a rule that reads"):
        lenslrp.run_with_relevance(bridge, TOKENS, 1, {"linear": Gamma(0.1)})
    for handle in handles:
        handle.remove()


def test_the_forward_pass_is_untouched_and_all_is_undone() -> None:
    bridge = lenslrp.load(lora("llama"))
    with torch.no_grad():
        expected = bridge(TOKENS)
    before = snapshot(bridge)
    logits, _ = lenslrp.run_with_relevance(bridge, TOKENS, 1)
    assert torch.equal(logits, expected)
    assert changes(before, bridge) == []


# --- several adapters ---------------------------------------------------------------------------


def test_the_active_adapters_are_explained() -> None:
    model = lora("llama")
    settings = peft.LoraConfig(r=2, target_modules=["v_proj", "q_proj"], init_lora_weights=False)
    torch.manual_seed(2)
    model.add_adapter("second", settings)
    model = model.double().eval()
    bridge = lenslrp.load(copy.deepcopy(model))
    for active in ("default", "second", ["default", "second"], "default"):
        for each in (model, bridge.original_model):
            for layer in each.modules():
                if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
                    layer.set_adapter(active)
        merged = copy.deepcopy(model).merge_and_unload(
            adapter_names=[active] if isinstance(active, str) else active
        )
        _, expected = lenslrp.run_with_relevance(lenslrp.load(merged), TOKENS, 1)
        _, found = lenslrp.run_with_relevance(bridge, TOKENS, 1)
        torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-9, atol=1e-9)
        added = float(found["blocks.0.attn.v.hook_adapter"].abs().sum())
        assert (added > 0) == (active != "default")


def test_merged_adapters_add_nothing_that_could_be_told_apart() -> None:
    model = lora("llama")
    model.merge_adapter()
    bridge = lenslrp.load(model)
    _, R = lenslrp.run_with_relevance(bridge, TOKENS, 1)
    assert not any(hook.endswith("hook_adapter") for hook in R)


# --- directories --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_an_adapters_directory(name: str, tmp_path: Path) -> None:
    model = lora(name)
    _, expected = lenslrp.run_with_relevance(lenslrp.load(copy.deepcopy(model)), TOKENS, 1)
    base_model(CASES[name][0]).save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    for merges in (True, False):
        bridge = lenslrp.load(
            tmp_path / "adapter", dtype=torch.float64, device="cpu", merge_adapter=merges
        )
        _, found = lenslrp.run_with_relevance(bridge, TOKENS, 1)
        cosine = cosine_similarity(found.tokens.flatten(), expected.tokens.flatten(), dim=0)
        assert cosine > 1 - 1e-9
        torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-9, atol=1e-9)
        assert any(hook.endswith("hook_adapter") for hook in found) == (not merges)


# --- refused by name ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "tokens"),
        (lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "tokens"),
        (lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "tokens"),
        (lambda: peft.LNTuningConfig(target_modules=["norm"]), "replaces norms"),
        (
            lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1),
            "adds learned keys and values",
        ),
    ],
    ids=["prefix", "prompt", "p-tuning", "norms", "adaption prompt"],
)
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_what_no_bridge_has_is_refused_by_name(settings: Any, message: str) -> None:
    model = peft.get_peft_model(base_model(FAMILIES["llama"]), settings())
    kind = type(model.peft_config["default"]).__name__
    with pytest.raises(LoadError, match=rf"'default' \({kind}\) .*{message}.*no bridge has"):
        lenslrp.load(model)


def test_units_are_not_read_off_a_weight_that_an_adapter_adds_to() -> None:
    bridge = lenslrp.load(lora("llama"))
    with pytest.raises(InputError, match=r"weights, and those of a Linear .* adapters merged"):
        Neuron(0, 3).writes(bridge)
    merged = lenslrp.load(lora("llama").merge_and_unload())
    assert Neuron(0, 3).writes(merged)["out"].shape[-1] == 16
