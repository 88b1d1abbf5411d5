"""Tiny configurations of every architecture in the zoo, made from their own classes.

:data:`SIZES` makes any configuration tiny, and those of its towers inside it; :data:`CHANGES` holds
what single architectures need besides.
"""

from __future__ import annotations

from typing import Any

import transformers as hf

from lenslrp.models import heads
from tests.conformance.families import VOCABULARY

LAYERS, LABELS = 2, 6
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("image_token_id", "image_token_index"), VOCABULARY),
    **dict.fromkeys(("audio_token_id", "audio_token_index"), VOCABULARY),
    **dict.fromkeys(("video_token_id", "video_token_index"), VOCABULARY + 1),
    **dict.fromkeys(("vision_start_token_id", "image_start_token_id"), VOCABULARY + 2),
    **dict.fromkeys(("vision_end_token_id", "image_end_token_id"), VOCABULARY + 3),
    "mm_tokens_per_image": 1,
    "image_seq_length": 4,
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
    "vocab_size_per_layer_input": VOCABULARY,
    **dict.fromkeys(("mm_embed_dim", "output_proj_dims"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    "position_embedding_size": 16,
    "hidden_size_per_layer_input": 6,
}
"""Applied wherever a configuration has the name."""

WORDS = ("vocab_size", "vocab_size_per_layer_input")
"""With a few ids more, that no text has, where images or sounds need them."""
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
    "tdnn_dim": (6, 6),
    "tdnn_kernel": (3, 2),
    "tdnn_dilation": (1, 2),
    "xvector_output_dim": 8,
}
SOUND = {"patch_size": 4, "frequency_stride": 3, "time_stride": 3, "max_length": 12}

CHUNKS = {"chunk_size": 4, "mamba_chunk_size": 4}  # more than one for a prompt of seven tokens
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
DEEP = {"text_config": MROPE, "vision_config": {"deepstack_visual_indexes": [0]}}

STAGES: dict[str, Any] = {
    "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4],
    "window_size": 4,
}  # fmt: skip
DISENTANGLED = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
}

CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("SwinForImageClassification", "SwinModel"), STAGES),
    "Data2VecVisionForImageClassification": {"attn_implementation": "eager"},
    "Data2VecVisionModel": {"attn_implementation": "eager"},
    "AlbertForMaskedLM": {"embedding_size": 12},
    "ElectraForMaskedLM": {"embedding_size": 12},
    "DebertaForMaskedLM": DISENTANGLED,
    "DebertaV2ForMaskedLM": {**DISENTANGLED, "share_att_key": True, "conv_kernel_size": 3},
    "DistilBertForMaskedLM": {"dim": 16, "hidden_dim": 24},
    **dict.fromkeys(("ViTForImageClassification", "ViTModel"), IMAGE),
    **dict.fromkeys(("DeiTForImageClassification", "DeiTModel"), IMAGE),
    "ASTForAudioClassification": {**SOUND, "num_mel_bins": 8},
    **dict.fromkeys(("HubertForCTC", "HubertModel"), SPEECH),
    # The norms of the larger checkpoints: one in every convolution, and before each block.
    "Wav2Vec2ForCTC": {**SPEECH, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
    "Wav2Vec2ForPreTraining": {**SPEECH, "conv_bias": True},
    "Wav2Vec2Model": {**SPEECH, "conv_bias": True},
    **dict.fromkeys(("UniSpeechForCTC", "UniSpeechSatForCTC", "SEWForCTC"), SPEECH),
    **dict.fromkeys(("Data2VecAudioForCTC", "WavLMForCTC"), SPEECH),
    "MoonshineForConditionalGeneration": {
        **dict.fromkeys(("encoder_num_hidden_layers", "decoder_num_hidden_layers"), LAYERS),
        **dict.fromkeys(("encoder_num_attention_heads", "decoder_num_attention_heads"), 2),
    },
    "BambaForCausalLM": {"attn_layer_indices": [1], **CHUNKS},
    "CodeGenForCausalLM": {"num_attention_heads": 4},  # its weights are laid out for four devices
    "DeepseekV2ForCausalLM": {
        "head_dim": DROP,
        "qk_rope_head_dim": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "DeepseekV3ForCausalLM": {"head_dim": DROP, "qk_rope_head_dim": 4},
    "DeepseekV4ForCausalLM": {
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 3},
        "mlp_layer_types": ["hash_moe", "moe"],
        **dict.fromkeys(("index_n_heads", "index_topk", "o_groups"), 2),
        **dict.fromkeys(("index_head_dim", "o_lora_rank"), 8),
        **dict.fromkeys(("hc_mult", "hc_sinkhorn_iters"), 3),
        "partial_rotary_factor": 0.5,
        "qk_rope_head_dim": DROP,
    },
    "Emu3ForConditionalGeneration": {
        "vocabulary_map": {"<|extra_200|>": 3, "<image>": 4},
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "codebook_size": 32},
    },
    "FalconForCausalLM": {"head_dim": DROP},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 32, **CHUNKS},
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
    "Gemma3nForConditionalGeneration": {
        "text_config": {
            "activation_sparsity_pattern": [0.5, 0.0],
            "intermediate_size": [24, 24],
            "laurel_rank": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
        },
        "audio_config": {
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "input_feat_size": 8,
            "sscp_conv_channel_size": [4, 4],
        },
    },
    "Glm4vForConditionalGeneration": {"text_config": MROPE},
    "GraniteMoeHybridForCausalLM": {**HYBRID, "position_embedding_type": "rope", **CHUNKS},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 8},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"], "conv_bias": True},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Mamba2ForCausalLM": {"num_heads": 4, "n_groups": 1, **CHUNKS},
    "GlmAsrForConditionalGeneration": {"audio_config": {"intermediate_size": 64}},
    "MuseGlimmerForConditionalGeneration": {"out_hidden_size": 64},
    "Llama4ForConditionalGeneration": {"vision_config": {"intermediate_size": 64}},
    "LlavaNextForConditionalGeneration": {"image_grid_pinpoints": [[8, 8]]},
    "LlavaOnevisionForConditionalGeneration": {"image_grid_pinpoints": [[8, 8]]},
    "NemotronHForCausalLM": CHUNKS,
    "NemotronForCausalLM": {"num_key_value_heads": 2, "head_dim": 8},
    "Qwen2_5_VLForConditionalGeneration": {"text_config": MROPE},
    "Qwen3VLForConditionalGeneration": DEEP,
    "Qwen3VLMoeForConditionalGeneration": DEEP,
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

STAND_INS: dict[str, dict[str, Any]] = {
    "Gemma3nForConditionalGeneration": {
        **{key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")},
        **{key: SIZES[key] for key in ("num_attention_heads", "image_size", "patch_size")},
        "rms_norm_eps": 1e-6,
        "vocab_offset": VOCABULARY,
        "vocab_size": 1,
    }
}
"""A SigLIP tower where the model's own comes from a library that is not installed (timm); a text
does not run it."""

LOADED_AS = {"BloomModel": "BloomForCausalLM", "Wav2Vec2ForPreTraining": "Wav2Vec2Model"}
"""Names that checkpoints carry and TransformerLens loads as another class."""


def family(name: str) -> str:
    """The language model from whose adapter that of a head is derived; else the name itself."""
    return str(getattr(heads.offered().get(name), "language_model", name))


def config(name: str, changes: dict[str, Any] | None = None) -> Any:
    """The configuration of a tiny model, with changes of its own."""
    made = _config(name, {**CHANGES.get(family(name), {}), **(changes or {})})
    if name in heads.offered():
        made.num_labels = 2 if name.endswith("ForQuestionAnswering") else LABELS
    return made


def _config(name: str, changes: dict[str, Any]) -> Any:
    cls = getattr(hf, name).config_class
    towers = {"vision_config", "audio_config"} & set(getattr(cls, "sub_configs", ()))
    made = tiny(cls(), cls, changes, VOCABULARY + 7 if towers else VOCABULARY)
    if family(name) in STAND_INS:  # past the configuration's own check of its type
        made.__dict__["vision_config"] = hf.SiglipVisionConfig(**STAND_INS[family(name)])
    return made


def tiny(plain: Any, cls: Any, changes: dict[str, Any], vocabulary: int) -> Any:
    """A configuration made tiny, with those of its towers (text, images, audio) inside it."""
    plain.allow_global_per_layer_attribute_access = True
    sizes = {**SIZES, **dict.fromkeys(WORDS, vocabulary)}
    wanted = {
        key: value
        for key, value in sizes.items()
        if key in ALWAYS or isinstance(getattr(plain, key, None), int)
    }
    for key, kind in getattr(cls, "sub_configs", {}).items():
        inner = getattr(plain, key)
        made = kind() if inner is None else inner
        wanted[key] = tiny(made, type(made), changes.get(key, {}), vocabulary)
    changed = {**wanted, **{k: v for k, v in changes.items() if k not in wanted or k in SIZES}}
    return cls(**{key: value for key, value in changed.items() if value is not DROP})
