"""Models that bitsandbytes and torchao quantise: right as with their weights unpacked.

The reference is the same model with the weight of each packed layer replaced by what the layer
gives for an identity matrix. A layer that also rounds its input computes something else than that;
the second reference gives its values and has the gradient of the unpacked weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.pytorch_utils import Conv1D

import lenslrp
from lenslrp import InputError, LoadError
from lenslrp.analysis import Neuron
from lenslrp.hooks import ZPLUS, Gamma, packed
from lenslrp.models import quantised

bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason='needs bitsandbytes: pip install "lenslrp[quantised]"'
)
ao = pytest.importorskip(
    "torchao.quantization", reason='needs torchao: pip install "lenslrp[quantised]"'
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing"),  # PEFT asks transformers for it
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
]

TOKENS = torch.tensor([[3, 17, 5, 17, 8, 11, 2, 40], [2, 9, 2, 21, 9, 14, 33, 5]])
SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
    "pad_token_id": 1,
}
GROUPED = {**SIZES, "num_key_value_heads": 1}


def _llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True))


def _gpt2() -> Any:
    config = hf.GPT2Config(vocab_size=53, n_embd=64, n_layer=2, n_head=2, n_positions=48)
    return hf.GPT2LMHeadModel(config)


def _mixtral() -> Any:
    config = hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    return hf.MixtralForCausalLM(config)


def _bert() -> Any:
    return hf.BertForSequenceClassification(hf.BertConfig(**SIZES, num_labels=3))


def _phi3() -> Any:
    return hf.Phi3ForCausalLM(hf.Phi3Config(**SIZES))


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "mixtral": _mixtral,
    "bert": _bert,
    "phi3": _phi3,
}

WEIGHTS_ONLY: dict[str, Callable[[], Any]] = {
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "nf4, scales quantised": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "torchao int8": lambda: TorchAoConfig(ao.Int8WeightOnlyConfig()),
    "torchao int4": lambda: TorchAoConfig(
        ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32))
    ),
    "torchao float8": lambda: TorchAoConfig(ao.Float8WeightOnlyConfig()),
}
ROUNDING: dict[str, Callable[[], Any]] = {
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "int8, no outliers": lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    "torchao int8 inputs": lambda: TorchAoConfig(ao.Int8DynamicActivationInt8WeightConfig()),
    "nf4 in bfloat16": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "nf4 in float16": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16
    ),
}
COMPOSITES: list[Any] = [
    lenslrp.AttnLRP(),
    lenslrp.CPLRP(),
    {"linear": Gamma(0.1), "projection": Gamma(0.2)},
    {"linear": ZPLUS, "attention_av": lenslrp.hooks.CONSTANT},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models, whose weights are large enough to matter, as checkpoints."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, build in FAMILIES.items():
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(5) if weight.ndim > 1 else weight.add_(0.2 * torch.randn_like(weight))
        model.save_pretrained(root / name)
    return {name: root / name for name in FAMILIES}


class StraightThrough(nn.Linear):
    """The values of a packed layer, and the gradient of its unpacked weight."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + (self.__dict__["layer"](x) - y).detach()


def packed_layers(model: Any) -> dict[str, Any]:
    return {
        name.replace("._original_component", ""): layer
        for name, layer in model.named_modules()
        if packed.is_packed_linear(layer)
    }


def unpacked(layer: Any) -> Any:
    """A plain layer with the weight that a packed one computes with."""
    transposed = getattr(layer, "source_cls", None) is Conv1D
    plain: Any = (
        Conv1D(layer.out_features, layer.in_features)
        if transposed
        else nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    )
    with torch.no_grad():
        units = torch.eye(layer.in_features)
        columns = layer(units) - layer(torch.zeros_like(units[:1]))
        plain.weight.copy_(columns if transposed else columns.T)
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
    return plain


def quantised_model(folder: Path, config: Any) -> Any:
    kind = getattr(hf, hf.AutoConfig.from_pretrained(folder).architectures[0])
    return kind.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def references(folder: Path, config: Any) -> tuple[Any, Any]:
    """The same model with its weights unpacked: all plain, and with the packed layers' values."""
    made = []
    for through in (False, True):
        model = quantised_model(folder, config)
        quantised.keep_unpackable(model)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        for name, layer in packed_layers(model).items():
            owner, _, key = name.rpartition(".")
            plain = unpacked(layer)
            if through:
                plain.__class__ = StraightThrough
                plain.__dict__["layer"] = layer
            setattr(model.get_submodule(owner), key, plain)
        made.append(model)
    return made[0], made[1]


def cosine(a: Any, b: Any) -> float:
    return float(cosine_similarity(a.tokens.double().flatten(), b.tokens.double().flatten(), dim=0))


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("llama", kind) for kind in WEIGHTS_ONLY),
        *((family, "nf4") for family in FAMILIES if family != "llama"),
        *((family, "torchao int8") for family in ("mixtral", "bert", "phi3")),  # no Conv1D
    ],
)
def test_packed_weights(family: str, kind: str, folders: dict[str, Path]) -> None:
    config = WEIGHTS_ONLY[kind]
    bridge = lenslrp.load(folders[family], device="cpu", quantization_config=config())
    count = len(packed_layers(bridge.original_model))
    assert count >= (8 if family in ("phi3", "gpt2", "mixtral") else 12)
    assert lenslrp.examine(bridge).agreement.difference < 1e-4
    plain = lenslrp.load(references(folders[family], config())[0])
    if family == "mixtral":  # gamma needs experts one by one
        for model in (bridge, plain):
            model.original_model.set_experts_implementation("eager")
    for composite in COMPOSITES:
        _, found = lenslrp.run_with_relevance(bridge, TOKENS, 1, composite)
        _, expected = lenslrp.run_with_relevance(plain, TOKENS, 1, composite)
        assert cosine(found, expected) > 0.9999
        assert set(found) == set(expected)
        assert abs(found.ledger().error) < 2e-5
        assert found.ledger().biases == pytest.approx(expected.ledger().biases, rel=1e-2, abs=1e-3)
    assert len(packed_layers(bridge.original_model)) == count


@pytest.mark.parametrize("kind", ROUNDING)
def test_layers_that_round_their_input(kind: str, folders: dict[str, Path]) -> None:
    """What they round away is in the ledger, which closes to the type of the rest."""
    config = ROUNDING[kind]
    bridge = lenslrp.load(folders["llama"], device="cpu", quantization_config=config())
    plain, through = references(folders["llama"], config())
    plain, through = lenslrp.load(plain), through.eval()
    layers = packed_layers(bridge.original_model)
    for composite in COMPOSITES[:2]:
        _, found = lenslrp.run_with_relevance(bridge, TOKENS, 1, composite)
        _, expected = lenslrp.run_with_relevance(plain, TOKENS, 1, composite)
        assert cosine(found, expected) > 0.999
        assert abs(found.ledger().error) < 2e-5
        assert found.ledger().stabiliser != 0
    assert len(packed_layers(bridge.original_model)) == len(layers)
    exact = lenslrp.load(through, verify=False)
    _, found = lenslrp.run_with_relevance(bridge, TOKENS, 1)
    with pytest.warns(match="does not balance"):  # its rounding is nobody's
        _, expected = lenslrp.run_with_relevance(exact, TOKENS, 1, strict=False)
    assert cosine(found, expected) > 0.9999


def test_one_weight_is_unpacked_at_a_time(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = lenslrp.load(folders["llama"], device="cpu", quantization_config=WEIGHTS_ONLY["nf4"]())
    known = packed._unpacked
    alive: list[Any] = []

    def watched(*args: Any) -> Any:
        assert sum(each() is not None for each in alive) <= 1  # the last layer's, at most
        weight = known(*args)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(packed, "_unpacked", watched)
    for composite in COMPOSITES:
        lenslrp.run_with_relevance(bridge, TOKENS, 1, composite)
    assert len(alive) > 4 * len(packed_layers(bridge.original_model))
    assert all(each() is None for each in alive)


def test_a_model_in_memory(folders: dict[str, Path]) -> None:
    """Not one whose weights bitsandbytes has packed anew for inference, as it does on some CPUs."""
    config = WEIGHTS_ONLY["nf4"]
    folder = folders["llama"].parent / "wide"  # that kernel takes multiples of 64
    torch.manual_seed(0)
    sizes = {**GROUPED, "intermediate_size": 128}
    hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).save_pretrained(folder)
    _, expected = lenslrp.run_with_relevance(
        lenslrp.load(references(folder, config())[0]), TOKENS, 1
    )
    _, found = lenslrp.run_with_relevance(
        lenslrp.load(quantised_model(folder, config())), TOKENS, 1
    )
    assert cosine(found, expected) > 0.9999
    with pytest.raises(LoadError, match=r"is quantised, .*float32: load it from its files"):
        lenslrp.load(quantised_model(folder, config()), dtype=torch.bfloat16)
    if not bitsandbytes.functional.has_avx512bf16():
        pytest.skip("bitsandbytes packs weights anew only on CPUs with AVX512-BF16")
    ran = quantised_model(folder, config())
    with torch.no_grad():
        ran(TOKENS)
    with pytest.raises(LoadError, match=r"q_proj has run without gradients .* before it runs"):
        lenslrp.load(ran)
    bridge = build_bridge_from_module(
        ran, "LlamaForCausalLM", hf_config=ran.config, device="cpu", model_name="wide"
    )
    _, found = lenslrp.run_with_relevance(bridge.eval(), TOKENS, 1)
    assert cosine(found, expected) > 0.999
    assert abs(found.ledger().error) < 2e-5


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_checkpoint_that_was_saved_packed(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = {**WEIGHTS_ONLY, **ROUNDING}[kind]
    quantised_model(folders["llama"], config()).save_pretrained(tmp_path)
    saved = lenslrp.load(tmp_path, device="cpu")
    made = lenslrp.load(folders["llama"], device="cpu", quantization_config=config())
    assert packed_layers(saved.original_model)
    pair = [lenslrp.run_with_relevance(bridge, TOKENS, 1)[1] for bridge in (saved, made)]
    assert cosine(*pair) > 0.9999


def test_in_half_types(folders: dict[str, Path]) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        config = WEIGHTS_ONLY["nf4"]()
        bridge = lenslrp.load(
            folders["llama"], dtype=dtype, device="cpu", quantization_config=config
        )
        wide = lenslrp.load(
            folders["llama"], device="cpu", quantization_config=WEIGHTS_ONLY["nf4"]()
        )
        _, found = lenslrp.run_with_relevance(bridge, TOKENS, 1)
        _, expected = lenslrp.run_with_relevance(wide, TOKENS, 1)
        assert cosine(found, expected) > 0.99
        assert found.ledger().imbalance < lenslrp.ledger.BALANCED[dtype]


def test_an_adapter_on_packed_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    """QLoRA: the base layer unpacked, the adapter in place, what it adds at its hook point."""
    peft = pytest.importorskip("peft", reason='needs PEFT: pip install "lenslrp[peft]"')
    config = WEIGHTS_ONLY["nf4"]
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(quantised_model(folders["llama"], config()), settings).eval()
    plain = peft.get_peft_model(references(folders["llama"], config())[0], settings).eval()
    plain.load_state_dict(
        {name: w for name, w in model.state_dict().items() if "lora_" in name}, strict=False
    )
    model.peft_config["default"].base_model_name_or_path = str(folders["llama"])
    model.save_pretrained(tmp_path)
    read = lenslrp.load(tmp_path, device="cpu", quantization_config=config())
    bridges = (lenslrp.load(model), read)
    reference = lenslrp.load(plain)
    for composite in COMPOSITES:
        _, expected = lenslrp.run_with_relevance(reference, TOKENS, 1, composite)
        for bridge in bridges:
            _, found = lenslrp.run_with_relevance(bridge, TOKENS, 1, composite)
            assert cosine(found, expected) > 0.9999
            assert abs(found.ledger().error) < 2e-5
            for layer in ("blocks.0.attn.q", "blocks.1.mlp.out"):
                a, b = (R[f"{layer}.hook_adapter"].double().flatten() for R in (found, expected))
                assert float((a - b).abs().max()) < 1e-3 * float(b.abs().max()) + 1e-7


def test_what_is_refused_says_so(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = WEIGHTS_ONLY["nf4"]()
    bridge = lenslrp.load(folders["llama"], device="cpu", quantization_config=config)
    with pytest.raises(InputError, match=r"those of a Linear4bit are packed.* quantization_config"):
        Neuron(0, 3).writes(bridge)
    with pytest.raises(LoadError, match=r"quantization_config cannot be given here: the model is"):
        lenslrp.load(_llama(), quantization_config=config)
    kept = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.float16)
    with pytest.raises(LoadError, match=r"TransformerLens computes something else"):
        lenslrp.load(folders["llama"], device="cpu", quantization_config=kept)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(LoadError, match=r"bitsandbytes.*lenslrp\[quantised\]"):
        lenslrp.load(folders["llama"], quantization_config=config)


@pytest.mark.real
@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int4"])
def test_smollm2(kind: str) -> None:
    config = {**WEIGHTS_ONLY, **ROUNDING}[kind]
    bridge = lenslrp.load("smollm2-135m", device="cpu", quantization_config=config())
    plain = lenslrp.load("smollm2-135m", device="cpu")
    layers = dict(plain.original_model.named_modules())
    for name, layer in bridge.original_model.named_modules():
        if packed.is_packed_linear(layer):
            layers[name].weight.data.copy_(unpacked(layer).weight)
    found, expected = (
        lenslrp.run_with_relevance(
            model, "The Eiffel Tower is located in the city of", " Paris", names_filter=[]
        )[1]
        for model in (bridge, plain)
    )
    assert abs(found.ledger().error) < 2e-5
    # int8 rounds inputs: the model itself is another one (its logit is 12.6, not 13.1).
    assert cosine(found, expected) > (0.998 if kind == "int8" else 0.9999)
