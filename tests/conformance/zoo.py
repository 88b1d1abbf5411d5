"""The zoo: a tiny random model of every architecture that TransformerLens registers.

What each does is measured by ``python -m tests.conformance.zoo``, which writes
``docs/reference/architectures.md`` (with names, only their rows are measured again); the tests hold
every row of that table to what it says.
"""

from __future__ import annotations

import logging
import re
import resource
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.utilities.attn_implementation import force_eager_attention

import lenslrp
from lenslrp import media
from lenslrp.hooks.leaf_modules import embeddings
from lenslrp.hooks.sites import LEDGER_TERMS
from lenslrp.hooks.structure import components
from lenslrp.inputs import decoder_reads_the_text, prepare_text, text_of_decoder
from lenslrp.models import heads
from lenslrp.models.images import image_models
from lenslrp.models.verifying import difference, output_of, short_input
from lenslrp.running import run_model
from lenslrp.targets import Activation
from lenslrp.text.tokenization import give_tokenizer
from tests.conformance import zoo_media
from tests.conformance.families import randomise, tokens
from tests.conformance.zoo_configs import (
    CHANGES,
    IMAGE,
    LAYERS,
    LOADED_AS,
    SIZES,
    STAND_INS,
    config,
    family,
)

SOFTMAX_FLOAT32 = ("Beit", "CLIP", "IJepa", "MetaClip2", "Siglip", "Swin", "ViTMSN")

FLOAT32 = frozenset(
    {
        "ASTForAudioClassification",
        "AfmoeForCausalLM",
        *(name for name in image_models({}) if name.startswith(SOFTMAX_FLOAT32)),
        "BambaForCausalLM",
        "CodeGenForCausalLM",
        "Cohere2ForCausalLM",
        "CohereForCausalLM",
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "DeepseekV4ForCausalLM",
        "DeiTForImageClassification",
        "DeiTModel",
        "Ernie4_5ForCausalLM",
        "Ernie4_5_MoeForCausalLM",
        "FalconH1ForCausalLM",
        "FalconMambaForCausalLM",
        "FlexOlmoForCausalLM",
        "GPTJForCausalLM",
        "GPTNeoForCausalLM",
        "Gemma3nForConditionalGeneration",
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForConditionalGeneration",
        "Glm4ForCausalLM",
        "Glm4MoeForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "Glm4vForConditionalGeneration",
        "GlmForCausalLM",
        "GlmMoeDsaForCausalLM",
        "GraniteMoeForCausalLM",
        "GraniteMoeHybridForCausalLM",
        "JambaForCausalLM",
        "JetMoeForCausalLM",
        "LEDForConditionalGeneration",
        "LagunaForCausalLM",
        "Llama4ForCausalLM",
        "Llama4ForConditionalGeneration",
        "LongT5ForConditionalGeneration",
        "Mamba2ForCausalLM",
        "MambaForCausalLM",
        "MiniMaxM2ForCausalLM",
        "MixtralForCausalLM",
        "ModernBertForMaskedLM",
        "ModernBertDecoderForCausalLM",
        "MoonshineForConditionalGeneration",
        "MuseGlimmerForConditionalGeneration",
        "NanoChatForCausalLM",
        "NemotronHForCausalLM",
        "OPTForCausalLM",
        "OlmoHybridForCausalLM",
        "OlmoeForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3_5ForCausalLM",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeForConditionalGeneration",
        "RecurrentGemmaForCausalLM",
        "SwitchTransformersForConditionalGeneration",
        "T5Gemma2ForConditionalGeneration",
        "T5GemmaForConditionalGeneration",
        "ViTForImageClassification",
        "ViTModel",
        "Zamba2ForCausalLM",
    }
)
"""Softmax, router, scan or rotary tables in float32 whatever the model's type: 1e-6 where the rest
close to 1e-9. With every float32 replaced by float64 (:class:`Widened`) they close to 1e-12."""


class Widened(TorchFunctionMode):
    """Casts to float32 inside a model go to float64, to tell its own rounding from an error."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        named = {key: _widened(value) for key, value in (kwargs or {}).items()}
        return func(*(_widened(value) for value in args), **named)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


ROUNDS = frozenset({"LEDForConditionalGeneration", "LongT5ForConditionalGeneration"})
"""Logits under rules that are equal to the bit to those of a model whose weights need no gradient,
and to rounding to others: torch multiplies a tensor that is not contiguous (theirs before ``o``) in
another way by a weight that needs none. Rules freeze the weights."""

GATED = "WavLM"
"""How families begin whose position gates are constants: Gradient x Input refuses them by name."""

CONSTANTS = ("bias", "_init")
"""How parameters that are added end, besides ``bias`` itself (experts, HRM's initial state)."""


def registered() -> list[str]:
    """The architecture names that TransformerLens registers and transformers has."""
    return sorted(name for name in SUPPORTED_ARCHITECTURES if hasattr(hf, name))


def offered() -> list[str]:
    """Those that LensLRP adds: heads, encoders, and other models of a known layout."""
    return sorted(heads.offered())


def remote() -> list[str]:
    """The names that transformers does not have: their code comes with the checkpoint."""
    return sorted(name for name in SUPPORTED_ARCHITECTURES if not hasattr(hf, name))


def plain(
    name: str, dtype: torch.dtype = torch.float64, *, bias: bool = True, changes: Any = ()
) -> Any:
    """A new tiny Hugging Face model, the same at every call."""
    torch.manual_seed(0)
    model = getattr(hf, LOADED_AS.get(name, name))(config(name, dict(changes)))
    randomise(model, bias=bias)
    for path, weight in model.named_parameters():
        if not bias and path.endswith(CONSTANTS):
            weight.data.zero_()
    for part in model.modules():
        if hasattr(part, "tid2eid"):  # experts by token, which only a checkpoint has
            part.tid2eid += torch.arange(part.tid2eid.numel()).view_as(part.tid2eid) % 4
    for part in model.modules():  # torch's grouped product has no float64
        settings = getattr(part, "config", None)
        if hasattr(settings, "_experts_implementation"):
            settings._experts_implementation = "eager"
    model = model.to(dtype).eval()
    force_eager_attention(model)
    return model


def wrap(name: str, model: Any) -> Any:
    """The bridge around it.

    Libraries that an adapter asks for serve its image processor, which reads files; none is needed.
    """
    with mock.patch.object(ArchitectureAdapter, "_check_required_libraries"), default_type(model):
        if name in LOADED_AS:
            bridge = build_bridge_from_module(model, name, hf_config=model.config, device="cpu")
            return bridge.eval()
        return lenslrp.load(model)


def build(name: str, dtype: torch.dtype = torch.float64, *, bias: bool = True) -> Any:
    """A bridge around a new tiny model, the same at every call."""
    return wrap(name, plain(name, dtype, bias=bias))


@contextmanager
def default_type(model: Any) -> Iterator[None]:
    """XGLM floors its scores with a constant of torch's default type, which must be its own."""
    before = torch.get_default_dtype()
    if type(getattr(model, "original_model", model)).__name__.startswith("XGLM"):
        torch.set_default_dtype(next(model.parameters()).dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def two_stacks(model: Any) -> bool:
    return bool(getattr(model.original_model.config, "is_encoder_decoder", False))


def decoder(model: Any, key: str) -> dict[str, Tensor]:
    """What the decoder has written so far, for a model that has one, under the name it takes."""
    if not two_stacks(model):
        return {}
    if decoder_reads_the_text(model.original_model):
        return {key: shifted(model.original_model, prompt(model))} if key.endswith("_ids") else {}
    return {key: tokens(2, 4, seed=8)}


def shifted(model: Any, ids: Tensor) -> Tensor:
    """What a decoder that reads the text is given of it."""
    return torch.tensor([text_of_decoder(model, row) for row in ids.tolist()])


def prompt(model: Any) -> Tensor:
    """[2, 7]: ids; they end with EOS where a classifier reads its answer there."""
    ids = tokens()
    if decoder_reads_the_text(model.original_model):
        end = model.original_model.config.eos_token_id
        ids[ids == end] += 1
        ids[:, -1] = end
    return ids


def target_of(model: Any) -> Any:
    """Token 5 at the last position, the class of the largest logit, or a unit without a head."""
    if not media.head_of(model):
        return Activation(last_residual(model), 7 if two_stacks(model) else 5)
    if type(model.original_model).__name__ not in offered():
        return 1 if media.reads_no_text(model) else 5
    logits = plain_logits(model).reshape(-1, plain_logits(model).shape[-1])
    return 5 if not media.labels_of(model) else int(logits[-1].abs().argmax())


def explain(model: Any, composite: Any, names_filter: Any = None) -> tuple[Tensor, Any]:
    """The relevance of token 5 at the last position of a batch of two.

    For an image or a sound: of a class, or of a unit of the last residual where there is no head.
    """
    target = target_of(model)
    if media.reads_no_text(model):
        seen: tuple[Tensor, Any] = lenslrp.run_with_relevance(
            model, None, target, composite, names_filter, **media.example(model, batch=2)
        )
        return seen
    extra = {**decoder(model, "decoder_input"), **image_beside(model)}
    with default_type(model):
        result: tuple[Tensor, Any] = lenslrp.run_with_relevance(
            model, prompt(model), target, composite, names_filter, **extra
        )
    return result


def image_beside(model: Any) -> dict[str, Tensor]:
    """The images that are compared with a text, where a model does that."""
    return media.example(model, batch=2) if media.is_pair(model.original_model) else {}


def explain_media(model: Any, name: str, composite: Any, names_filter: Any = ()) -> Any:
    """The same, of text with a picture or a sound in it: logits and relevance."""
    row, floats, others = zoo_media.example(name, next(model.parameters()).dtype)
    given = {**floats, **decoder(model, "decoder_input"), "model_kwargs": others}
    target = target_of(model)
    return lenslrp.run_with_relevance(model, row, target, composite, names_filter, **given)


def last_residual(model: Any) -> str:
    single = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    if media.reads_no_text(model) and single in model.hook_dict:
        return single
    kind = type(model.original_model).__name__
    if kind in ("DeepseekV4Model", "Gemma3nModel"):  # whose residual streams are many
        return "ln_final.hook_out"
    if kind == "OpenAIGPTModel":  # whose blocks return lists
        return "blocks.1.ln2.hook_out"
    blocks = re.compile(r"\w*blocks\.\d+\.hook_out")
    return [name for name in model.hook_dict if blocks.fullmatch(name)][-1]


def plain_logits(model: Any) -> Tensor:
    """The model's own logits, without any rule."""
    extra = {**decoder(model, "decoder_input_ids"), **image_beside(model)}
    if media.reads_no_text(model):
        batch = media.prepare_batch(model, None, media.example(model, batch=2))
        with torch.no_grad():
            outputs: Tensor = run_model(model, batch, None, batch.media)
        return outputs
    with torch.no_grad(), default_type(model):
        logits: Tensor = model(prompt(model), **extra)
    return logits


def capped(model: Any) -> bool:
    """Whether relevance starts before a final soft-cap."""
    return float(getattr(model.cfg, "output_logits_soft_cap", 0) or 0) > 0


def plain_leaves(model: Any) -> tuple[list[Tensor], Tensor]:
    """What every embedding gave in a pass without rules, as leaves, and the logits before a cap."""
    leaves: list[Tensor] = []
    kept: list[Tensor] = []

    def cut(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        leaves.append(out.detach().clone().requires_grad_())
        return leaves[-1]

    extra = {**decoder(model, "decoder_input_ids"), **image_beside(model)}
    handles = [inner.register_forward_hook(cut) for inner, _ in embeddings(components(model))]
    if capped(model):
        point = model.unembed.hook_out
        handles.append(point.register_forward_hook(lambda _, args, x: kept.append(x)))
    with default_type(model):
        logits: Tensor = model(prompt(model), **extra)
    for handle in handles:
        handle.remove()
    return leaves, kept[0] if kept else logits


def apart(name: str) -> dict[str, float]:
    """How far the bridge's outputs are from those of the model before it is wrapped.

    Relative to the largest: for a few tokens (an image, a sound), and for a text with an image or a
    sound in it where the family reads one.
    """
    model = plain(name)
    given = {"": short_input(model)}
    if zoo_media.reads(name):
        row, floats, others = zoo_media.example(name)
        extra = (
            {"decoder_input_ids": tokens(2, 4, seed=8)} if "decoder_input_ids" in given[""] else {}
        )
        given[media_kind(name)] = {"input_ids": row, **floats, **others, **extra}
    rows = given[""]
    if name.endswith(heads.CHOICE):  # each row among several, [batch, choice, pos]
        rows = {**rows, "input_ids": rows["input_ids"][:, None]}
    with torch.no_grad(), default_type(model):
        outputs = {kind: model(**inputs) for kind, inputs in {**given, "": rows}.items()}
        expected = {kind: output_of(output) for kind, output in outputs.items()}
    bridge = wrap(name, model)
    found = {}
    for kind, inputs in given.items():
        if decoder_reads_the_text(bridge.original_model):
            inputs["decoder_input_ids"] = shifted(bridge.original_model, inputs["input_ids"])
        with torch.no_grad(), default_type(model):
            read = "input_ids" if "input_ids" in inputs else "input_features"
            first = inputs.pop(read, None)
            output = bridge(first, return_type="logits", **inputs)
        found[kind] = difference(output, expected[kind])
    return found


def media_kind(name: str) -> str:
    return "a sound" if "input_features" in zoo_media.example(name)[1] else "an image"


def tokenizers() -> list[hf.PreTrainedTokenizerFast]:
    """Without tokens of its own, with BOS, with BERT's and GLM's templates, with EOS."""
    words = ["<unk>", "<s>", "</s>", "[CLS]", "[SEP]", "[gMASK]", "<sop>", "the", "cat", "sat"]
    made = []
    for template in ("$A", "<s> $A", "[CLS] $A [SEP]", "[gMASK] <sop> $A", "$A </s>"):
        core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = [(word, words.index(word)) for word in template.split() if word != "$A"]
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
        ends = {"bos_token": "<s>", "eos_token": "</s>"}
        if "[CLS]" in template:
            ends = {"cls_token": "[CLS]", "sep_token": "[SEP]"}
        made.append(hf.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **ends))
    return made


def same_ids(model: Any) -> bool:
    """Whether text becomes the ids that Hugging Face's tokenizer gives, with every kind of one.

    The text says its own end: classifiers of encoder-decoders read there, and refuse texts without.
    """
    text = "the cat sat </s>"
    for tokenizer in tokenizers():
        expected = [tokenizer(text)["input_ids"]]
        give_tokenizer(model, tokenizer)
        read = prepare_text(
            model, text, append=[], prepend_bos=None, attention_mask=None, inputs_embeds=None
        )
        if not read.tokens.tolist() == model.to_tokens(text).tolist() == expected:
            return False
    return True


def against_hugging_face(name: str) -> str:
    """What the table says of the bridge beside the model that it is around."""
    found = apart(name)
    said = f"{found.pop(''):.0e}"
    said += ", float32 inside" if family(name) in FORWARD_FLOAT32 else ""
    said += "".join(f"; with {kind} {value:.0e}" for kind, value in found.items())
    model = build(name)
    if not media.reads_no_text(model):
        said += "; same ids" if same_ids(model) else "; OTHER IDS"
    return said + (f"; as {LOADED_AS[name]}" if name in LOADED_AS else "")


def tolerance(name: str) -> float:
    return 1e-6 if family(name) in FLOAT32 else 1e-9


DIFFERING = {
    "Falcon with grouped queries and `multi_query=False`": ("FalconForCausalLM", {
        "new_decoder_architecture": True, "multi_query": False, "num_attention_heads": 4,
        "num_kv_heads": 2}),
    "Falcon with `alibi=True`": ("FalconForCausalLM", {"alibi": True, "multi_query": False}),
    "GPT-2 with `scale_attn_weights=False`": ("GPT2LMHeadModel", {"scale_attn_weights": False}),
    "GPTBigCode with `multi_query=False`": ("GPTBigCodeForCausalLM", {"multi_query": False}),
    "GPT-NeoX with `attention_bias=False`": ("GPTNeoXForCausalLM", {"attention_bias": False}),
    "Phi with `qk_layernorm=True`": ("PhiForCausalLM", {"qk_layernorm": True}),
    "OPT with `do_layer_norm_before=False`": ("OPTForCausalLM", {"do_layer_norm_before": False}),
}  # fmt: skip
"""Settings that TransformerLens computes in another way than Hugging Face, or not at all."""

NOT_IN_16_BITS = dict.fromkeys(
    ("FlexOlmoForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoForCausalLM"),
    "the bridge raises for what the model runs: RuntimeError: expected scalar type Float",
)
"""Families whose bridge multiplies tensors of two types in bfloat16 and float16."""

IN_16_BITS = "OLMo, OLMo 2, OLMo 3 and FlexOLMo in bfloat16 and float16"

FORWARD_FLOAT32 = frozenset(
    {
        "CodeGenForCausalLM",
        "Cohere2ForCausalLM",
        "CohereForCausalLM",
        "GPTBigCodeForCausalLM",
        "GPTNeoXForCausalLM",
        "Glm4ForCausalLM",
        "GlmForCausalLM",
        "GptOssForCausalLM",
        "Phi3ForCausalLM",
    }
)
"""Rotary tables, norms or sinks that Hugging Face computes in float32 and the bridge in the model's
type: outputs apart by 1e-6 at most, and by 1e-12 with float64 in the place of float32."""

KINDS = (
    r"(?<!Self)Attention\d?$",
    r"Norm(1P)?$",
    r"(MLP|MoE|Moe|SparseMoeBlock|FeedForward|Dense)$",
)
"""Class names of attention, norm and MLP in transformers, where no component of the bridge says."""


def parts(model: nn.Module) -> tuple[str, str, str]:
    """Class names of the first attention, norm and MLP in the blocks, for the table."""
    from transformer_lens.model_bridge import generalized_components as gc
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    bridged = (gc.AttentionBridge, gc.NormalizationBridge, (gc.MLPBridge, gc.MoEBridge))
    inside = sorted(model.named_modules(), key=lambda item: "blocks." not in item[0].split("_")[0])
    return tuple(  # type: ignore[return-value]
        next(
            (
                type(inner).__name__
                for _, module in inside
                for inner in [getattr(module, "original_component", None) or module]
                if isinstance(module, kinds) or re.search(named, type(inner).__name__)
                if not isinstance(inner, GeneralizedComponent)
            ),
            "none",
        )
        for kinds, named in zip(bridged, KINDS, strict=True)
    )


@dataclass(frozen=True)
class Row:
    """One architecture in ``docs/reference/architectures.md``."""

    name: str
    attention: str
    norm: str
    mlp: str
    bridge: str  #: how far it is from Hugging Face's model, and whether it reads the same ids
    result: str  #: covered, refused, or untested
    detail: str  #: the ledger's worst relative error, or the reason


def measure(name: str) -> Row:
    """What one architecture does now."""
    try:
        model = build(name)
    except lenslrp.LoadError as error:
        return Row(name, "", "", "", "", "refused", _first_line(error))
    # A measuring tool: whatever a constructor raises is the finding.
    except Exception as error:  # noqa: BLE001
        return Row(name, "", "", "", "", "untested", f"not built: {_first_line(error)}")
    kinds = (*parts(model), against_hugging_face(name))
    try:
        worst = 0.0
        for composite in (lenslrp.AttnLRP(), lenslrp.CPLRP()):
            _, cache = explain(model, composite, [])
            worst = max(worst, abs(cache.ledger().error))
    except lenslrp.CoverageError as error:
        reason = str(error).split(". ")[0].removeprefix(f"{name}: ")
        first = reason.split("; ")[0].split(" (and ")[0]
        return Row(name, *kinds, "refused", first)
    except Exception as error:  # noqa: BLE001
        return Row(name, *kinds, "untested", f"not run: {_first_line(error)}")
    if worst > tolerance(name):
        return Row(name, *kinds, "WRONG", f"the ledger misses {worst:.1e}")
    inside = ", float32 inside" if family(name) in FLOAT32 else ""
    inside += _with_media(model, name)
    inside += "; built with another tower than timm's" if name in STAND_INS else ""
    apart = "; logits equal with frozen weights" if name in ROUNDS else ""
    return Row(name, *kinds, "covered", f"{worst:.0e}{inside}{apart}")


def _with_media(model: Any, name: str) -> str:
    """What is added to the detail of a family that reads pictures or sounds beside text."""
    if not zoo_media.reads(name):
        return zoo_media.TEXT_ONLY.get(family(name), "")
    kind = media_kind(name)
    composites = (lenslrp.AttnLRP(), lenslrp.CPLRP())
    ledgers = [explain_media(model, name, composite)[1].ledger() for composite in composites]
    return f"; with {kind} {max(miss(ledger) for ledger in ledgers):.0e}"


def miss(ledger: Any) -> float:
    """What a ledger misses, relative to its largest entry."""
    terms = (getattr(ledger, term) for term in ("target", "leaves", *LEDGER_TERMS))
    return float(abs(ledger.target - ledger.accounted) / max(abs(term) for term in terms))


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    if "can't allocate memory" in text[0] or isinstance(error, MemoryError):
        return "its towers have sizes of their own (images, audio)"
    if isinstance(error, lenslrp.LoadError):
        return text[0].split(": ", 1)[-1][:160]
    return f"{type(error).__name__}: {text[0][:120]}"


DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reference" / "architectures.md"

HEAD = """# Architectures

What LensLRP does with each of the {total} architecture names that TransformerLens registers and the
tested transformers has, and with the {added} that LensLRP adds ([below](#added-by-lenslrp)): a tiny
random model of each, in float64. Written by `python -m tests.conformance.zoo`;
`tests/conformance/models/test_zoo.py` holds every row to it.

- **covered** ({covered}): under AttnLRP and CP-LRP every operation on the path has its rule and the
  ledger closes; the number is its worst relative error (at most 1e-9; "float32 inside": softmax,
  router, scan or rotary tables are computed in float32 whatever the type, 1e-6). The tests add:
  logits equal to the bit, CP-LRP conserving at every residual hook without biases, every live hook
  readable, all undone; for "with an image" (a sound), the same number where the text has one in it
  and relevance ends at its values as well, relative to the ledger's largest entry.
- **refused** ({refused}): no relevance is returned. A `CoverageError` names the operation and the
  component, of which the first is shown; a `LoadError` says what TransformerLens computes in
  another way.
- **untested** ({untested}): no model of it can be built here. Nothing is claimed; the same checks
  run when you load one, and `lenslrp doctor` shows them.

"Apart from Hugging Face": how far the bridge's outputs are from those of the model before it is
wrapped, relative to the largest, in float64 (at most 1e-9; "float32 inside": Hugging Face computes
rotary tables, norms or sinks in float32, 1e-6), for a few tokens, an image or a sound; and whether
a text becomes the ids that Hugging Face's tokenizer gives, for tokenizers with BOS, with EOS, with
a template such as `[CLS] $A [SEP]` or `[gMASK]<sop> $A`, and without any. `lenslrp.load` makes the
same comparison with every model that it loads ([loading](../how-to/loading.md)), and refuses what
TransformerLens computes in another way or not at all:
{differing}.

Not counted: the {remote} names whose code is not part of transformers but comes with a checkpoint:
{names}.

"""

COLUMNS = (
    "architecture",
    "attention",
    "norm",
    "MLP",
    "apart from Hugging Face",
    "result",
    "error or reason",
)

ADDED = """
## Added by LensLRP

{covered} covered, {refused} refused: the heads and the bare model of every family that transformers
has them for, derived from the family's adapter, and families that TransformerLens has no adapter
for ([classifiers](../how-to/classifiers.md)). A class is explained, or a unit of the last residual
stream where there is no head.

"""


def write(rows: list[Row]) -> str:
    native = [row for row in rows if row.name in SUPPORTED_ARCHITECTURES]
    added = [row for row in rows if row not in native]
    counts, more = (Counter(row.result for row in some) for some in (native, added))
    head = HEAD.format(
        total=len(native),
        added=len(added),
        covered=counts["covered"],
        refused=counts["refused"],
        untested=counts["untested"],
        remote=len(remote()),
        differing="\n".join(textwrap.wrap("; ".join((*DIFFERING, IN_16_BITS)), 98)),
        names="\n".join(textwrap.wrap(", ".join(remote()), 98)),
    )
    middle = ADDED.format(covered=more["covered"], refused=more["refused"])
    return head + _table(native) + middle + _table(added)


def _table(rows: list[Row]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in [COLUMNS, *map(astuple, rows)]]
    return "\n".join([lines[0], "|" + "---|" * len(COLUMNS), *lines[1:]]) + "\n"


def read() -> list[Row]:
    """The committed table."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("| ")]
    cells = [[cell.strip() for cell in row] for row in rows]
    return [Row(*row) for row in cells if row[0] != "architecture"]


def main() -> None:
    """Write the table anew, or the rows of the names that are given."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    limit = 6 << 30  # a tower that nobody made small would take all memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    names = [*registered(), *offered()]
    again = sys.argv[1:] or names
    kept = {row.name: row for row in read() if row.name not in again}
    rows = [kept.get(name) or measure(name) for name in tqdm(names, disable=None)]
    DOCUMENT.write_text(write(rows), encoding="utf-8")


__all__ = ["CHANGES", "IMAGE", "LAYERS", "SIZES", "config"]

if __name__ == "__main__":
    main()
