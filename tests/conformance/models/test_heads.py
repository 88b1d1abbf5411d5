"""Heads that transformers puts on a family, and encoders: all by derived adapters.

Each on tiny random weights in float64: the logits of transformers, a ledger that closes, padded
rows as they are alone. Pooling of every kind is compared with an explicit pass.
"""

from __future__ import annotations

import tomllib
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

import lenslrp
from lenslrp.models import heads
from lenslrp.models.checkpoints import supported_architectures
from lenslrp.models.wrapped import agreement_of
from lenslrp.targets import Activation, Logit, LogitDiff
from tests.conformance import zoo_configs
from tests.conformance.models.test_zoo import COVERED
from tests.conftest import ROOT

SIZE = 16
ENCODERS: dict[str, dict[str, Any]] = {
    "Albert": {"embedding_size": 12},
    "Camembert": {},
    "DistilBert": {"dim": SIZE, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
    "Electra": {"embedding_size": 12},
    "MPNet": {},
    "ModernBert": {},
    "XLMRoberta": {},
}
NAMES = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
HEADS = (*NAMES, "ForQuestionAnswering", "Model")
REFUSED = {
    "OpenAIGPTForSequenceClassification": "takes a padding mask otherwise",
    "T5GemmaForSequenceClassification": "refused after a short pass",
    "T5GemmaForTokenClassification": "refused after a short pass",
    "T5Gemma2ForSequenceClassification": "refused after a short pass",
    "T5Gemma2ForTokenClassification": "refused after a short pass",
    "MBartForSequenceClassification": "outputs are apart",
    "MBartForQuestionAnswering": "outputs are apart",
}
"""What is refused, and a part of the reason."""


@cache
def families() -> dict[str, str]:
    """Every derived head of a covered family that reads text, and its language model."""
    found: dict[str, str] = {}
    native = dict(SUPPORTED_ARCHITECTURES)
    for kind, language_model in heads.families(native):
        if language_model in COVERED:
            for name in heads.class_names(heads.HEADS, kind):
                known = name not in native and name.endswith(HEADS[1:4]) and hasattr(hf, name)
                if known and getattr(hf, name).main_input_name == "input_ids":
                    found.setdefault(name, language_model)
    return found


def labelled(config: Any, name: str) -> Any:
    config.num_labels = 2 if name.endswith("ForQuestionAnswering") else 3
    config.pad_token_id = 0
    config._experts_implementation = "eager"
    return config


def made(name: str, config: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(hf, name)(labelled(config, name)).double().eval()
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data.normal_(0.5, 0.1)
    return model


def encoder(family: str, head: str) -> Any:
    cls = getattr(hf, f"{family}{head}")
    sizes = {
        "vocab_size": 60, "hidden_size": SIZE, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 32, "type_vocab_size": 2,
        **dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id"), 0),
    }  # fmt: skip
    return made(cls.__name__, cls.config_class(**{**sizes, **ENCODERS[family]}))


def rows(config: Any) -> tuple[Tensor, Tensor]:
    """Two rows, the second padded on the right; both end with EOS, where there is one."""
    torch.manual_seed(1)
    end = config.eos_token_id if isinstance(config.eos_token_id, int) else 2
    end = min(end, 18)
    tokens, mask = torch.randint(5, 18, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    tokens[tokens == end] = 7
    tokens[0, 5] = tokens[1, 3] = end
    tokens[1, 4:], mask[1, 4:] = 0, 0
    return tokens, mask


def logits_of(output: Any) -> Tensor:
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    found: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return found


def check(model: Any, tolerance: float | None = None) -> None:
    """``tolerance``: as the comparison before wrapping has it, which sees what is in float32."""
    tokens, mask = rows(model.config)
    with torch.no_grad():
        expected = logits_of(model(input_ids=tokens, attention_mask=mask))
    bridge = lenslrp.load(model)
    tolerance = tolerance or agreement_of(bridge).tolerance
    bare = "unembed" not in dict(bridge.named_children())

    def explain(tokens: Tensor, mask: Tensor) -> Any:
        label = min(7, expected.shape[-1] - 1)
        wanted = Logit(label, position=3) if expected.ndim == 3 else Logit(label)
        if bare:
            wanted = Activation("blocks.1.hook_out", 3, 2)
        return lenslrp.run_with_relevance(bridge, tokens, wanted, attention_mask=mask)

    logits, R = explain(tokens, mask)
    if not bare:
        real = mask[:, :, None] if expected.ndim == 3 else 1
        torch.testing.assert_close(logits * real, expected * real, rtol=0, atol=tolerance)
    assert abs(R.ledger().error) < tolerance
    _, alone = explain(tokens[1:, :4], mask[1:, :4])
    torch.testing.assert_close(
        R.tokens[1:, :4], alone.tokens, rtol=0, atol=tolerance * float(R.tokens.abs().max() + 1)
    )
    assert R.tokens[1, 4:].abs().max() < 1e-12
    assert R.tokens.abs().max() > 1e-9


@pytest.mark.parametrize("name", sorted(families()))
def test_a_head_is_transformers(name: str) -> None:
    language_model = families()[name]
    model = made(name, zoo_configs.config(language_model))
    if name in REFUSED:
        with pytest.raises(lenslrp.LensLRPError, match=REFUSED[name]):
            check(model)
        return
    check(model)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_is_transformers(family: str, head: str) -> None:
    check(encoder(family, head), 1e-9)


def test_classes_are_named() -> None:
    model = encoder("Electra", "ForTokenClassification")
    model.config.id2label = {0: "O", 1: "PER", 2: "LOC"}
    tokens, _ = rows(model.config)
    bridge = lenslrp.load(model)
    logits, R = lenslrp.run_with_relevance(bridge, tokens[:1], LogitDiff("PER", "LOC", position=3))
    assert str(R.target).startswith("logit difference 'PER' - 'LOC' at position 3")
    torch.testing.assert_close(R.target.value[0], logits[0, 3, 1] - logits[0, 3, 2])
    with pytest.raises(lenslrp.InputError, match="nearest: PER"):
        lenslrp.run_with_relevance(bridge, tokens[:1], Logit("PERSON", position=3))


def test_the_ends_of_a_span_are_named() -> None:
    model = encoder("Electra", "ForQuestionAnswering")
    tokens, _ = rows(model.config)
    output = model(input_ids=tokens[:1])
    bridge = lenslrp.load(model)
    for name, expected in (("start", output.start_logits), ("end", output.end_logits)):
        _, R = lenslrp.run_with_relevance(bridge, tokens[:1], Logit(name, position=3))
        torch.testing.assert_close(R.target.value[0], expected[0, 3].detach())


def test_a_regression_head() -> None:
    cls = hf.ElectraForSequenceClassification
    config = encoder("Electra", "ForSequenceClassification").config
    config.num_labels = 1
    bridge = lenslrp.load(cls(config).double().eval())
    logits, R = lenslrp.run_with_relevance(bridge, rows(config)[0][:1], None)
    assert logits.shape == (1, 1)
    torch.testing.assert_close(R.target.value, logits[:, 0])


def test_padding_on_either_side_of_a_decoder() -> None:
    """A classifier of a decoder reads the last token that is no padding."""
    config = zoo_configs.config("LlamaForCausalLM")
    bridge = lenslrp.load(made("LlamaForSequenceClassification", config).float())
    tokens, mask = rows(config)
    _, right = lenslrp.run_with_relevance(bridge, tokens, Logit(1), attention_mask=mask)
    tokens[1], mask[1] = tokens[1].roll(2), mask[1].roll(2)
    _, left = lenslrp.run_with_relevance(bridge, tokens, Logit(1), attention_mask=mask)
    torch.testing.assert_close(left.tokens[1, 2:], right.tokens[1, :4], rtol=1e-4, atol=1e-6)


def test_albert_runs_in_layers_of_their_own() -> None:
    """Weights stay shared; what is read is of each layer."""
    model = encoder("Albert", "ForSequenceClassification")
    layer = model.albert.encoder.albert_layer_groups[0].albert_layers[0]
    tokens, _ = rows(model.config)
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, args, out: seen.append(out.detach()))
    model(input_ids=tokens)
    handle.remove()
    bridge = lenslrp.load(model)
    _, cache = bridge.run_with_cache(tokens)
    for index, expected in enumerate(seen):
        torch.testing.assert_close(cache[f"blocks.{index}.hook_out"], expected)
    first, second = (block.ffn.weight for block in model.albert.encoder.albert_layer_groups)
    assert first is second


def test_entry_points_are_the_table() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = project["entry-points"]["transformer_lens.architectures"]
    assert listed == {name: f"lenslrp.models.heads:{name}" for name in sorted(heads.offered())}
    assert heads.LlamaForSequenceClassification is heads.offered()["LlamaForSequenceClassification"]


def test_plain_transformer_lens_takes_them() -> None:
    model = encoder("Electra", "ForSequenceClassification").float()
    tokens, _ = rows(model.config)
    with torch.no_grad():
        expected = model(tokens).logits
    supported_architectures()  # as the entry points do in an installed environment
    name = "ElectraForSequenceClassification"
    bridge = build_bridge_from_module(model, name, hf_config=model.config)
    with torch.no_grad():
        torch.testing.assert_close(bridge(tokens, return_type="logits"), expected)
