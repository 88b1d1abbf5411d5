"""The zoo: a tiny random model of every architecture that TransformerLens registers.

Models are built from their own configuration classes: :data:`SIZES` makes any of them tiny, and
:data:`CHANGES` holds what single architectures need besides. What each does is measured by
``python -m tests.conformance.zoo``, which writes ``docs/architectures.md``; the tests hold every
row of that table to what it says.
"""

from __future__ import annotations

import logging
import re
import resource
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers as hf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.utilities.attn_implementation import force_eager_attention

import lenslrp
from lenslrp import media
from lenslrp.targets import Activation
from tests.conformance.families import VOCABULARY, randomise, tokens

LAYERS = 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim"), 24),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 48),
    **dict.fromkeys(("head_dim", "d_kv", "num_key_value_heads"), 8),
    "num_key_value_heads": 2,
    "rotary_dim": 4,
    "sliding_window": 8,
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 12),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "first_k_dense_replace": 0,
    **dict.fromkeys(("mamba_d_head", "mamba_d_state", "state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "attention_heads", "attention_window"), 4),
    **dict.fromkeys(("max_encoder_position_embeddings", "max_decoder_position_embeddings"), 48),
    # Towers for images and audio, and what joins them to the text.
    **dict.fromkeys(("depth", "num_heads"), 2),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "projector_hidden_size"), 16),
    **dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 16),
    **dict.fromkeys(("image_size", "num_mel_bins", "max_source_positions"), 8),
    **dict.fromkeys(("patch_size", "num_position_embeddings", "mm_posemb_size"), 4),
    **dict.fromkeys(("vocab_size_per_layer_input",), VOCABULARY),
    **dict.fromkeys(("hidden_size_per_layer_input", "mm_embed_dim", "output_proj_dims"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    "position_embedding_size": 16,
}
"""Applied wherever a configuration has the name."""

ALWAYS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
DROP = object()
"""In :data:`CHANGES`: leave the default."""

IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 4}
SPEECH: dict[str, Any] = {
    "conv_dim": (6, 8, 8),
    "conv_kernel": (6, 3, 2),
    "conv_stride": (3, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
SOUND = {"patch_size": 4, "frequency_stride": 3, "time_stride": 3, "max_length": 12}

HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}

CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("ViTForImageClassification", "ViTModel"), IMAGE),
    **dict.fromkeys(("DeiTForImageClassification", "DeiTModel"), IMAGE),
    "ASTForAudioClassification": {**SOUND, "num_mel_bins": 8},
    **dict.fromkeys(("HubertForCTC", "HubertModel"), SPEECH),
    # The norms of the larger checkpoints: one in every convolution, and before each block.
    "Wav2Vec2ForCTC": {**SPEECH, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
    "Wav2Vec2ForPreTraining": {**SPEECH, "conv_bias": True},
    "Wav2Vec2Model": {**SPEECH, "conv_bias": True},
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "DeepseekV2ForCausalLM": {
        "head_dim": DROP,
        "qk_rope_head_dim": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "DeepseekV3ForCausalLM": {"head_dim": DROP, "qk_rope_head_dim": 4},
    "Emu3ForConditionalGeneration": {
        "vocabulary_map": {"<|extra_200|>": 3, "<image>": 4},
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "codebook_size": 32},
    },
    "FalconForCausalLM": {"head_dim": DROP},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 32},
    "Florence2ForConditionalGeneration": {
        "vision_config": {
            "depths": [1, 1],
            "embed_dim": [8, 16],
            "num_groups": [2, 2],
            "num_heads": [2, 2],
            "patch_padding": [1, 1],
            "patch_prenorm": [False, True],
            "patch_size": [3, 3],
            "patch_stride": [2, 2],
            "window_size": 2,
        }
    },
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "Gemma4ForCausalLM": {"global_head_dim": 16},
    "Gemma4ForConditionalGeneration": {"text_config": {"global_head_dim": 16}},
    "Gemma4UnifiedForConditionalGeneration": {"text_config": {"global_head_dim": 16}},
    "Glm4vForConditionalGeneration": {"text_config": MROPE},
    "GraniteMoeHybridForCausalLM": {**HYBRID, "position_embedding_type": "rope"},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 8},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Mamba2ForCausalLM": {"num_heads": 4, "n_groups": 1},
    "NemotronForCausalLM": {"num_key_value_heads": 2, "head_dim": 8},
    "Qwen2_5_VLForConditionalGeneration": {"text_config": MROPE},
    "Qwen3NextForCausalLM": HYBRID,
    "Qwen3_5ForCausalLM": HYBRID,
    "Qwen3_5ForConditionalGeneration": {"text_config": HYBRID},
    "Qwen3_5MoeForCausalLM": HYBRID,
    "Qwen3_5MoeForConditionalGeneration": {"text_config": HYBRID},
    "RecurrentGemmaForCausalLM": {"block_types": ["recurrent", "attention"]},
    "SwitchTransformersForConditionalGeneration": {
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
    "YoutuForCausalLM": {"head_dim": DROP, "qk_rope_head_dim": 4},
    "Zamba2ForCausalLM": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "n_mamba_heads": 2,
        "mamba_headdim": 16,
    },
}

LOADED_AS = {"BloomModel": "BloomForCausalLM", "Wav2Vec2ForPreTraining": "Wav2Vec2Model"}
"""Names that checkpoints carry and TransformerLens loads as another class."""

FLOAT32 = frozenset(
    {
        "ASTForAudioClassification",
        "AfmoeForCausalLM",
        "CodeGenForCausalLM",
        "Cohere2ForCausalLM",
        "CohereForCausalLM",
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "DeiTForImageClassification",
        "DeiTModel",
        "Ernie4_5ForCausalLM",
        "Ernie4_5_MoeForCausalLM",
        "FlexOlmoForCausalLM",
        "GPTJForCausalLM",
        "GPTNeoForCausalLM",
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
        "JetMoeForCausalLM",
        "LEDForConditionalGeneration",
        "LagunaForCausalLM",
        "Llama4ForCausalLM",
        "Llama4ForConditionalGeneration",
        "LongT5ForConditionalGeneration",
        "MiniMaxM2ForCausalLM",
        "MixtralForCausalLM",
        "ModernBertDecoderForCausalLM",
        "MuseGlimmerForConditionalGeneration",
        "NanoChatForCausalLM",
        "OPTForCausalLM",
        "OlmoeForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3MoeForCausalLM",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
        "SwitchTransformersForConditionalGeneration",
        "T5Gemma2ForConditionalGeneration",
        "T5GemmaForConditionalGeneration",
        "ViTForImageClassification",
        "ViTModel",
    }
)
"""Softmax, router or rotary tables in float32 whatever the model's type: 1e-6 where the rest close
to 1e-9. With every float32 replaced by float64 (:class:`Widened`) they close to 1e-12."""


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

CONSTANTS = ("bias", "_init")
"""How parameters that are added end, besides ``bias`` itself (experts, HRM's initial state)."""


def registered() -> list[str]:
    """The architecture names that TransformerLens registers and transformers has."""
    return sorted(name for name in SUPPORTED_ARCHITECTURES if hasattr(hf, name))


def config(name: str) -> Any:
    """The configuration of a tiny model."""
    cls = getattr(hf, name).config_class
    return tiny(cls(), cls, CHANGES.get(name, {}))


def tiny(plain: Any, cls: Any, changes: dict[str, Any]) -> Any:
    """A configuration made tiny, with those of its towers (text, images, audio) inside it."""
    plain.allow_global_per_layer_attribute_access = True
    wanted = {
        key: value
        for key, value in SIZES.items()
        if key in ALWAYS or isinstance(getattr(plain, key, None), int)
    }
    for key, kind in getattr(cls, "sub_configs", {}).items():
        inner = getattr(plain, key)
        made = kind() if inner is None else inner
        wanted[key] = tiny(made, type(made), changes.get(key, {}))
    changed = {**wanted, **{k: v for k, v in changes.items() if k not in wanted or k in SIZES}}
    return cls(**{key: value for key, value in changed.items() if value is not DROP})


def build(name: str, dtype: torch.dtype = torch.float64, *, bias: bool = True) -> Any:
    """A bridge around a new tiny model, the same at every call.

    Libraries that an adapter asks for serve its image processor, which reads files; none is needed.
    """
    torch.manual_seed(0)
    model = getattr(hf, LOADED_AS.get(name, name))(config(name))
    randomise(model, bias=bias)
    for path, weight in model.named_parameters():
        if not bias and path.endswith(CONSTANTS):
            weight.data.zero_()
    for part in model.modules():  # torch's grouped product has no float64
        settings = getattr(part, "config", None)
        if hasattr(settings, "_experts_implementation"):
            settings._experts_implementation = "eager"
    model = model.to(dtype).eval()
    with mock.patch.object(ArchitectureAdapter, "_check_required_libraries"):
        if name in LOADED_AS:
            force_eager_attention(model)
            return build_bridge_from_module(
                model, name, hf_config=model.config, device="cpu"
            ).eval()
        return lenslrp.load(model)


@contextmanager
def default_type(model: Any) -> Iterator[None]:
    """XGLM floors its scores with a constant of torch's default type, which must be its own."""
    before = torch.get_default_dtype()
    if type(model.original_model).__name__ == "XGLMForCausalLM":
        torch.set_default_dtype(next(model.parameters()).dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def two_stacks(model: Any) -> bool:
    return bool(getattr(model.original_model.config, "is_encoder_decoder", False))


def explain(model: Any, composite: Any, names_filter: Any = None) -> tuple[Tensor, Any]:
    """The relevance of token 5 at the last position of a batch of two.

    For an image or a sound: of a class, or of a unit of the last residual where there is no head.
    """
    if media.reads_no_text(model):
        target = 1 if media.head_of(model) else Activation(last_residual(model), 5)
        seen: tuple[Tensor, Any] = lenslrp.run_with_relevance(
            model, None, target, composite, names_filter, **media.example(model, batch=2)
        )
        return seen
    extra = {"decoder_input": tokens(2, 4, seed=8)} if two_stacks(model) else {}
    with default_type(model):
        result: tuple[Tensor, Any] = lenslrp.run_with_relevance(
            model, tokens(), 5, composite, names_filter, **extra
        )
    return result


def last_residual(model: Any) -> str:
    return f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"


def plain_logits(model: Any) -> Tensor:
    """The model's own logits, without any rule."""
    extra = {"decoder_input_ids": tokens(2, 4, seed=8)} if two_stacks(model) else {}
    if media.reads_no_text(model):
        with torch.no_grad():
            outputs: Tensor = model(None, **media.example(model, batch=2))
        return outputs
    with torch.no_grad(), default_type(model):
        logits: Tensor = model(tokens(), use_cache=False, **extra)
    return logits


def tolerance(name: str) -> float:
    return 1e-6 if name in FLOAT32 else 1e-9


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
    """One architecture in ``docs/architectures.md``."""

    name: str
    attention: str
    norm: str
    mlp: str
    result: str  #: covered, refused, or untested
    detail: str  #: the ledger's worst relative error, or the reason


def measure(name: str) -> Row:
    """What one architecture does now."""
    try:
        model = build(name)
    # A measuring tool: whatever a constructor raises is the finding.
    except Exception as error:  # noqa: BLE001
        return Row(name, "", "", "", "untested", f"not built: {_first_line(error)}")
    kinds = parts(model)
    try:
        worst = 0.0
        for composite in (lenslrp.AttnLRP(), lenslrp.CPLRP()):
            _, cache = explain(model, composite, [])
            worst = max(worst, abs(cache.ledger().error))
    except lenslrp.CoverageError as error:
        reason = str(error).split(". ")[0].removeprefix(f"{name}: ")
        return Row(name, *kinds, "refused", reason.split("; ")[0].split(" (and ")[0])
    except Exception as error:  # noqa: BLE001
        return Row(name, *kinds, "untested", f"not run: {_first_line(error)}")
    if worst > tolerance(name):
        return Row(name, *kinds, "WRONG", f"the books miss {worst:.1e}")
    inside = ", float32 inside" if name in FLOAT32 else ""
    apart = "; logits equal with frozen weights" if name in ROUNDS else ""
    return Row(name, *kinds, "covered", f"{worst:.0e}{inside}{apart}")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    if "can't allocate memory" in text[0] or isinstance(error, MemoryError):
        return "its towers have sizes of their own (images, audio)"
    return f"{type(error).__name__}: {text[0][:120]}"


DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"

HEAD = """# Architectures

What LensLRP does with each of the {total} architecture names that TransformerLens registers and the
tested transformers has: a tiny random model of each, in float64. Written by
`python -m tests.conformance.zoo`; `tests/conformance/test_zoo.py` holds every row to it.

- **covered** ({covered}): under AttnLRP and CP-LRP every operation on the path has its rule and the
  ledger closes; the number is its worst relative error (at most 1e-9; "float32 inside": softmax,
  router or rotary tables are computed in float32 whatever the type, 1e-6). The tests add: logits
  equal to the bit, CP-LRP conserving at every residual hook without biases, every live hook
  readable, all undone.
- **refused** ({refused}): a `CoverageError` names the operation and the component; the first of
  them is shown. No relevance is returned.
- **untested** ({untested}): no model of it was built or run here (images, audio, sizes that its
  configuration derives). Nothing is claimed; the same checks run when you load one, and
  `lenslrp doctor` shows them.

| architecture | attention | norm | MLP | result | error or reason |
|---|---|---|---|---|---|
"""


def write(rows: list[Row]) -> str:
    counts = Counter(row.result for row in rows)
    head = HEAD.format(
        total=len(rows),
        covered=counts["covered"],
        refused=counts["refused"],
        untested=counts["untested"],
    )
    lines = [
        f"| {r.name} | {r.attention} | {r.norm} | {r.mlp} | {r.result} | {r.detail} |" for r in rows
    ]
    return head + "\n".join(lines) + "\n"


def read() -> list[Row]:
    """The committed table."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("| ")][1:]
    return [Row(*(cell.strip() for cell in row)) for row in rows]


def main() -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    limit = 6 << 30  # a tower that nobody made small would take all memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    rows = [measure(name) for name in tqdm(registered(), disable=None)]
    DOCUMENT.write_text(write(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
