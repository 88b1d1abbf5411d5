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
from lenslrp.analysis import Neuron, writes
from lenslrp.hooks import Composite, Gamma
from lenslrp.models import heads
from lenslrp.models.checkpoints import supported_architectures
from lenslrp.models.wrapped import agreement_of
from lenslrp.targets import Activation, Contrastive, Logit, LogitDiff, PerRow, Sequence, Sum
from tests.conformance import zoo, zoo_configs
from tests.conformance.models.test_zoo import COVERED
from tests.conftest import ROOT

SIZE = 16
ENCODERS: dict[str, dict[str, Any]] = {
    "Albert": {"embedding_size": 12},
    "Camembert": {},
    "Deberta": {
        "type_vocab_size": 0, "relative_attention": True, "position_biased_input": False,
        "pos_att_type": ["p2c", "c2p"], "talking_head": True,
    },
    "DebertaV2": {
        "type_vocab_size": 0, "relative_attention": True, "position_biased_input": False,
        "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_buckets": 4,
        "norm_rel_ebd": "layer_norm",
    },
    "DistilBert": {"dim": SIZE, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
    "Electra": {"embedding_size": 12},
    "MPNet": {},
    "ModernBert": {},
    "XLMRoberta": {},
}  # fmt: skip
NAMES = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
HEADS = (*NAMES, "ForQuestionAnswering", "Model")
ONE_LENGTH = {"T5GemmaForSequenceClassification", "T5Gemma2ForSequenceClassification"}
"""Heads that transformers has read one token more of a row with padding behind it."""


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


def encoder(family: str, head: str, **changes: Any) -> Any:
    cls = getattr(hf, f"{family}{head}")
    sizes = {
        "vocab_size": 60, "hidden_size": SIZE, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 32, "type_vocab_size": 2,
        **dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id"), 0),
    }  # fmt: skip
    return made(cls.__name__, cls.config_class(**{**sizes, **ENCODERS.get(family, {}), **changes}))


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
    bridge = zoo.wrap(type(model).__name__, model)
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


def check_alone(model: Any) -> None:
    """A classifier's row without padding."""
    tokens, _ = rows(model.config)
    with torch.no_grad():
        expected = model(input_ids=tokens[:1]).logits
    bridge = lenslrp.load(model)
    logits, R = lenslrp.run_with_relevance(bridge, tokens[:1], Logit(1))
    tolerance = agreement_of(bridge).tolerance
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
    assert abs(R.ledger().error) < tolerance
    assert min(R.tokens.abs().max(), R.decoder_tokens.abs().max()) > 1e-9


@pytest.mark.parametrize("name", sorted(families()))
def test_a_head_is_transformers(name: str) -> None:
    language_model = families()[name]
    model = made(name, zoo_configs.config(language_model))
    if name in ONE_LENGTH:
        with pytest.raises(lenslrp.InputError, match="reads one token more of a row with padding"):
            check(model)
        check_alone(made(name, zoo_configs.config(language_model)))
        return
    check(model)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_is_transformers(family: str, head: str) -> None:
    check(encoder(family, head), 1e-9)


OF_PAIRS = sorted(name for name in heads.offered() if name.endswith(heads.CHOICE))


@pytest.mark.parametrize("name", OF_PAIRS)
def test_a_choice_is_a_row(name: str) -> None:
    """Choices do not see each other: a row's score, and its relevance, are those among others."""
    model = encoder(name.removesuffix(heads.CHOICE), heads.CHOICE)
    tokens, mask = rows(model.config)
    with torch.no_grad():
        expected = model(input_ids=tokens[None], attention_mask=mask[None]).logits
    bridge = lenslrp.load(model)
    logits, R = lenslrp.run_with_relevance(bridge, tokens, "score", attention_mask=mask)
    torch.testing.assert_close(logits, expected.T, rtol=0, atol=1e-6)
    with torch.no_grad():
        among = bridge(tokens[None], attention_mask=mask[None], return_type="logits")
    torch.testing.assert_close(among, expected, rtol=0, atol=1e-6)
    assert str(R.target).startswith("logit of 'score' = ")
    assert abs(R.ledger().error) < agreement_of(bridge).tolerance
    _, alone = lenslrp.run_with_relevance(bridge, tokens[1:, :4], None)
    torch.testing.assert_close(R.tokens[1, :4], alone.tokens[0], rtol=0, atol=1e-6)
    assert R.tokens.abs().max() > 1e-6


def test_the_next_sentence() -> None:
    model = encoder("Bert", "ForNextSentencePrediction")
    tokens, mask = rows(model.config)
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask).logits
    bridge = lenslrp.load(model)
    wanted = LogitDiff("next", "random")
    logits, R = lenslrp.run_with_relevance(bridge, tokens, wanted, attention_mask=mask)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(R.target.value, expected[:, 0] - expected[:, 1])
    assert abs(R.ledger().error) < 1e-9


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


def test_a_span_is_the_sum_of_its_ends() -> None:
    """Relevance of the sum is the sum of both ends' relevance, of a padded row too."""
    model = encoder("Electra", "ForQuestionAnswering")
    tokens, mask = rows(model.config)
    output = model(input_ids=tokens, attention_mask=mask)
    bridge = lenslrp.load(model)
    ends = Logit("start", 1), Logit("end", 3)
    caches = lenslrp.relevance_for_targets(
        bridge, tokens, [Sum(ends), *ends], attention_mask=mask, logits="target"
    )
    span, start, end = caches
    expected = output.start_logits[:, 1] + output.end_logits[:, 3]
    torch.testing.assert_close(span.target.value, expected.detach())
    torch.testing.assert_close(span.tokens, start.tokens + end.tokens, rtol=0, atol=1e-12)
    assert abs(span.ledger().error) < 1e-9
    assert str(span.target).startswith("logit of 'start' at position 1 + logit of 'end' at ")


@pytest.mark.parametrize("family", ["Deberta", "ModernBert"])
def test_a_joint_projection_has_the_rule_of_projections(family: str) -> None:
    """Where the module is called, and not the parts that TransformerLens splits others into."""
    model = encoder(family, "ForSequenceClassification", attention_bias=True)
    bridge = lenslrp.load(model)
    tokens, mask = rows(model.config)
    gamma = Composite("gamma", {**lenslrp.AttnLRP().rules, "projection": Gamma(0.5)})
    for composite in (lenslrp.AttnLRP(), gamma):
        _, R = lenslrp.run_with_relevance(
            bridge, tokens, Logit(1), composite=composite, attention_mask=mask
        )
        assert abs(R.ledger().error) < 1e-9
    sites = R.coverage.sites
    ruled = sites[(sites.role == "projection") & (sites.rule == "gamma") & sites.fired].hook
    assert {f"blocks.{layer}.attn.{key}" for layer in (0, 1) for key in ("qkv", "o")} <= set(ruled)


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


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_and_padding_on_the_left(family: str) -> None:
    """A tagger's row is what it is alone; a head that reads the first column refuses it."""
    tagger = lenslrp.load(encoder(family, "ForTokenClassification"))
    tokens, mask = torch.randint(5, 18, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    tokens[1, :2], mask[1, :2] = 0, 0
    wanted = Logit(1, position=2)
    _, R = lenslrp.run_with_relevance(tagger, tokens, wanted, attention_mask=mask)
    _, alone = lenslrp.run_with_relevance(tagger, tokens[1:, 2:], wanted)
    torch.testing.assert_close(R.tokens[1, 2:], alone.tokens[0], rtol=0, atol=1e-9)
    classifier = lenslrp.load(encoder(family, "ForSequenceClassification"))
    with pytest.raises(lenslrp.InputError, match="reads the first column of its text"):
        lenslrp.run_with_relevance(classifier, tokens, Logit(1), attention_mask=mask)


def test_a_decoders_classifier_and_padded_embeddings() -> None:
    """It finds a row's end by ids: without them it reads the last column."""
    bridge = lenslrp.load(
        made("LlamaForSequenceClassification", zoo_configs.config("LlamaForCausalLM"))
    )
    embeds, mask = torch.randn(2, 6, 16, dtype=torch.float64), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    with pytest.raises(lenslrp.InputError, match="put the padding on the left, or give tokens"):
        lenslrp.run_with_relevance(
            bridge, None, Logit(1), inputs_embeds=embeds, attention_mask=mask
        )


def decoders_classifier(**settings: Any) -> Any:
    config = zoo_configs.config("LlamaForCausalLM")
    model = made("LlamaForSequenceClassification", config)
    for name, value in settings.items():
        setattr(model.config, name, value)
    return lenslrp.load(model)


def test_a_row_ends_where_its_mask_does() -> None:
    """Whatever token is under the mask: transformers finds the end by its own padding token."""
    bridge = decoders_classifier()
    tokens, mask = rows(bridge.original_model.config)
    logits, R = lenslrp.run_with_relevance(bridge, tokens, Logit(1), attention_mask=mask)
    tokens[1, 4:] = 9
    other, S = lenslrp.run_with_relevance(bridge, tokens, Logit(1), attention_mask=mask)
    alone, A = lenslrp.run_with_relevance(bridge, tokens[1:, :4], Logit(1))
    torch.testing.assert_close(other, logits, rtol=0, atol=0)
    torch.testing.assert_close(other[1:], alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(S.tokens[1:, :4], A.tokens, rtol=0, atol=1e-6)
    torch.testing.assert_close(S.tokens, R.tokens, rtol=0, atol=0)


def test_a_decoders_classifier_without_a_padding_token() -> None:
    bridge = decoders_classifier(pad_token_id=None)
    tokens, mask = rows(bridge.original_model.config)
    with pytest.raises(lenslrp.InputError, match="has no padding token, by which it finds the end"):
        lenslrp.run_with_relevance(bridge, tokens, Logit(1))
    with pytest.raises(lenslrp.InputError, match="or where it has no padding token"):
        lenslrp.run_with_relevance(bridge, tokens[1:], Logit(1), attention_mask=mask[1:])
    with lenslrp.session(bridge) as session:  # refuses the batch, and takes each row by itself
        found = list(session.explain([tokens[0].tolist(), tokens[1, :4].tolist()], Logit(1)))
        _, A = session.run_with_relevance(tokens[1:, :4], Logit(1))
    torch.testing.assert_close(found[1].tokens, A.tokens, rtol=0, atol=1e-9)


def test_the_end_token_of_an_encoder_decoders_classifier() -> None:
    """It is read at the end token, by the column that it has in the encoder's text."""
    bridge = lenslrp.load(
        made("T5ForSequenceClassification", zoo_configs.config("T5ForConditionalGeneration"))
    )
    config = bridge.original_model.config
    tokens, mask = rows(config)
    end = config.eos_token_id
    _, A = lenslrp.run_with_relevance(bridge, tokens[1:, :4], Logit(1))
    tokens[1, 4:] = end  # padding, and no end
    _, R = lenslrp.run_with_relevance(bridge, tokens, Logit(1), attention_mask=mask)
    torch.testing.assert_close(R.tokens[1:, :4], A.tokens, rtol=0, atol=1e-6)
    with pytest.raises(lenslrp.InputError, match=r"one at least; these have \[1, 0\]"):
        lenslrp.run_with_relevance(bridge, torch.tensor([[7, end], [7, 9]]), Logit(1))
    tokens[1], mask[1] = tokens[1].roll(2), mask[1].roll(2)
    with pytest.raises(lenslrp.InputError, match="put the padding on the right"):
        lenslrp.run_with_relevance(bridge, tokens, Logit(1), attention_mask=mask)


def test_a_head_that_fills_a_cache_is_recomputed() -> None:
    """GPT-J's question answerer takes no use_cache."""
    bridge = lenslrp.load(made("GPTJForQuestionAnswering", zoo_configs.config("GPTJForCausalLM")))
    tokens, _ = rows(bridge.original_model.config)
    wanted = Logit("start", position=2)
    _, R = lenslrp.run_with_relevance(bridge, tokens[:1], wanted)
    _, C = lenslrp.run_with_relevance(bridge, tokens[:1], wanted, checkpoint=True)
    torch.testing.assert_close(C.tokens, R.tokens, rtol=0, atol=1e-12)
    assert bridge.original_model.config.use_cache


def test_targets_that_a_classifier_does_not_have() -> None:
    model = encoder("Electra", "ForSequenceClassification")
    model.config.id2label = {0: "crane", 1: "crane", 2: "maillot, tank suit"}
    tokens, _ = rows(model.config)
    bridge = lenslrp.load(model)
    for wanted, message in (
        ("crane", "classes 0, 1 are all called 'crane'"),
        (Sequence([1, 2]), "a Sequence is of tokens that follow a text"),
        (PerRow((Logit(0),)), "1 targets for a batch of 2"),
    ):
        with pytest.raises(lenslrp.InputError, match=message):
            lenslrp.run_with_relevance(bridge, tokens, wanted)
    _, R = lenslrp.run_with_relevance(bridge, tokens, "tank suit")
    torch.testing.assert_close(R.target.value, bridge(tokens, return_type="logits")[:, 2].detach())
    tagger = lenslrp.load(encoder("Electra", "ForTokenClassification"))
    with pytest.raises(lenslrp.InputError, match="a Sequence is of tokens that follow a text"):
        lenslrp.run_with_relevance(tagger, tokens, Sequence([1, 2]))


def test_a_single_logit_has_no_others() -> None:
    config = encoder("Electra", "ForSequenceClassification").config
    config.num_labels = 1
    bridge = lenslrp.load(hf.ElectraForSequenceClassification(config).eval())
    with pytest.raises(lenslrp.InputError, match="has one logit, and no others"):
        lenslrp.run_with_relevance(bridge, rows(config)[0], Contrastive(0))


def test_what_units_write_in_a_classifier() -> None:
    """Rows of its unembedding are classes; a head that makes one vector of a text is refused."""
    tagger = encoder("Bert", "ForTokenClassification")
    tagger.config.id2label = {0: "O", 1: "PER", 2: "LOC"}
    scores = writes(lenslrp.load(tagger), Neuron(1, 3))
    assert set(scores.top(3)["token"]) == {"O", "PER", "LOC"}
    for family in ("Bert", "Electra"):
        bridge = lenslrp.load(encoder(family, "ForSequenceClassification"))
        with pytest.raises(lenslrp.InputError, match="what makes one vector of a text"):
            writes(bridge, Neuron(1, 3))
    with pytest.raises(lenslrp.InputError, match=r"a head of its own \(head_"):
        writes(lenslrp.load(encoder("ModernBert", "ForTokenClassification")), Neuron(1, 3))


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
