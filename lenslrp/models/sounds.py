"""Adapters for speech encoders that TransformerLens has none for.

They are wav2vec 2.0's in all but names: convolutions over a waveform, a projection to frames,
positions by a convolution, and blocks of attention and MLP (Baevski et al. 2020, arXiv:2006.11477).
"""

from __future__ import annotations

from functools import wraps
from inspect import signature
from types import MethodType
from typing import Any

import torch
import transformers
from torch import Tensor
from transformer_lens.model_bridge.generalized_components import BlockBridge, UnembeddingBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers import PreTrainedModel

from lenslrp.hooks.components import LAYER_WEIGHTS
from lenslrp.hooks.leaf_modules import FRAME_COMPONENT, FRAME_NORM, WAVE_COMPONENT

SAME_AS = {
    "UniSpeechForCTC": "Wav2Vec2ForCTC",
    "UniSpeechSatForCTC": "Wav2Vec2ForCTC",
    "Data2VecAudioForCTC": "Wav2Vec2ForCTC",
    "SEWForCTC": "Wav2Vec2ForCTC",
    "WavLMForCTC": "Wav2Vec2ForCTC",
}
"""Families whose modules have the names of another's."""


def sounds(adapters: dict[str, Any]) -> dict[str, Any]:
    """Adapters for the recognisers of these families, from which those of other heads derive."""
    made = {name: _adapter(name, adapters[other]) for name, other in SAME_AS.items()}
    pegasus = adapters["PegasusForConditionalGeneration"]
    return {
        **made,
        "MoonshineForConditionalGeneration": _moonshine(pegasus),
        "WhisperForConditionalGeneration": _whisper(pegasus),
    }


def _adapter(name: str, base: Any) -> Any:
    def prepare_model(self: Any, hf_model: Any) -> None:
        family = getattr(transformers, name).base_model_prefix
        inner = getattr(hf_model, family, hf_model)
        place = f"{family}." if inner is not hf_model else ""
        made = self.component_mapping = self._build_component_mapping(prefix=place)
        if hasattr(hf_model, "lm_head"):
            made["unembed"] = UnembeddingBridge(name="lm_head")
        if hasattr(
            inner, "layer_norm"
        ):  # SEW's projection has no norm of its own, or there is none
            projects = hasattr(inner, "feature_projection")
            key = FRAME_NORM if projects else FRAME_COMPONENT
            made[key] = GeneralizedComponent(name=f"{place}layer_norm")
        for module in hf_model.modules():
            if hasattr(module, "torch_multi_head_self_attention"):
                module.torch_multi_head_self_attention = MethodType(_attend, module)

    return type(f"{name}Adapter", (base,), {"prepare_model": prepare_model})


def _attend(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None, gated_position_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """WavLM's attention by its projections, past which torch's function goes: hook points fire."""
    batch, length, _ = hidden_states.shape
    q, k, v = (
        project(hidden_states).view(batch, length, self.num_heads, -1).transpose(1, 2)
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    scores = torch.matmul(q * self.scaling, k.transpose(2, 3))
    scores = scores + gated_position_bias.view(scores.shape)
    if attention_mask is not None:
        scores = scores.masked_fill(attention_mask.ne(1)[:, None, None], float("-inf"))
    pattern = torch.softmax(scores, dim=-1)
    z = torch.matmul(pattern, v).transpose(1, 2).reshape(batch, length, -1)
    return self.out_proj(z), pattern


def sum_at_hook_points(bridge: Any) -> None:
    """Let a head that sums the hidden states of all layers read them at the blocks' hook points.

    transformers takes them from the layers inside the blocks, past what is edited, or read, there.
    """
    from transformers.utils import output_capturing

    def record(x: Any) -> None:
        collected = output_capturing._active_collector.get()
        if collected is not None and "hidden_states" in collected:
            collected["hidden_states"].append(x[0] if isinstance(x, tuple) else x)

    if not hasattr(bridge.original_model, LAYER_WEIGHTS):
        return
    blocks = [part for part in bridge.modules() if isinstance(part, BlockBridge)]
    layers: list[Any] = [block.original_component for block in blocks]
    for block, layer in zip(blocks, layers, strict=True):
        hooks = layer._forward_hooks
        for key in [k for k, hook in hooks.items() if hook.__module__ == output_capturing.__name__]:
            del hooks[key]
        block.register_forward_hook(lambda _, args, out: record(out))
    layers[0].register_forward_pre_hook(lambda _, args: record(args))
    for part in bridge.original_model.modules():
        if isinstance(part, PreTrainedModel):
            vars(part)["_output_capturing_hooks_installed"] = True
        if type(part).__name__.endswith("EncoderStableLayerNorm"):
            bridge.adapter.unread = {"embed_ln"}  # what is summed is what its blocks return


UNLIKE = {
    "require_symmetric_layers": False,
    "n_layers_from": "decoder",
    "supports_generation": False,  # of a text; the model's own generate reads sounds
}
"""What sets a recogniser with a decoder apart from the family of BART."""


def _moonshine(pegasus: Any) -> Any:
    """Moonshine has rotary positions, Llama's names for the parts of a block, and gates."""

    def init(self: Any, cfg: Any) -> None:
        pegasus.__init__(self, cfg)
        self.cfg.is_audio_model = True
        made = self.component_mapping
        for key in ("embed", "pos_embed", "decoder_pos_embed"):
            del made[key]
        made["unembed"].name = "proj_out"
        made["decoder_ln_final"].name = "model.decoder.norm"
        norms = {
            "encoder_blocks": ("input_layernorm", "post_attention_layernorm"),
            "decoder_blocks": ("input_layernorm", "post_attention_layernorm", "final_layernorm"),
        }
        for stack, names in norms.items():
            parts = made[stack].submodules
            for index, name in enumerate(names):
                parts[f"ln{index + 1}"].name = name
            parts["mlp"].name = "mlp"
            for key in parts.keys() & {"attn", "self_attn", "cross_attn"}:
                parts[key].submodules["o"].name = "o_proj"
        front = {
            WAVE_COMPONENT: "conv1",
            FRAME_NORM: "groupnorm",
            f"{WAVE_COMPONENT}_2": "conv2",
            FRAME_COMPONENT: "conv3",
        }
        self.component_mapping = {
            **{
                key: GeneralizedComponent(name=f"model.encoder.{path}")
                for key, path in front.items()
            },
            **made,
        }

    return type(
        "MoonshineForConditionalGenerationAdapter", (pegasus,), {"__init__": init, **UNLIKE}
    )


def _whisper(pegasus: Any) -> Any:
    """Whisper is Pegasus with two convolutions in the place of its encoder's embedding."""

    def init(self: Any, cfg: Any) -> None:
        pegasus.__init__(self, cfg)
        self.cfg.is_audio_model = True
        made = self.component_mapping
        del made["embed"]
        made["unembed"].name = "proj_out"
        self.component_mapping = {
            WAVE_COMPONENT: GeneralizedComponent(name="model.encoder.conv1"),
            FRAME_COMPONENT: GeneralizedComponent(name="model.encoder.conv2"),
            **made,
        }

    def setup_hook_compatibility(self: Any, bridge: Any) -> None:
        pegasus.setup_hook_compatibility(self, bridge)
        model = bridge.original_model
        forward = type(model).forward
        takes_text = "decoder_input_ids" in signature(forward).parameters
        model.config.is_encoder_decoder = takes_text

        @wraps(forward)
        def named(self: Any, *args: Any, input_values: Any = None, **kwargs: Any) -> Any:
            if input_values is not None:
                kwargs["input_features"] = input_values
            return forward(self, *args, **kwargs)

        model.forward = MethodType(named, model)

    return type(
        "WhisperForConditionalGenerationAdapter",
        (pegasus,),
        {
            "__init__": init,
            "setup_hook_compatibility": setup_hook_compatibility,
            **UNLIKE,
        },
    )
