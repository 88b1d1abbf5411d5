"""Adapters for speech encoders that TransformerLens has none for.

They are wav2vec 2.0's in all but names: convolutions over a waveform, a projection to frames,
positions by a convolution, and blocks of attention and MLP (Baevski et al. 2020, arXiv:2006.11477).
"""

from __future__ import annotations

from functools import wraps
from inspect import signature
from types import MethodType
from typing import Any

from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

SAME_AS = {
    "UniSpeechForCTC": "Wav2Vec2ForCTC",
    "UniSpeechSatForCTC": "Wav2Vec2ForCTC",
    "Data2VecAudioForCTC": "Wav2Vec2ForCTC",
    "SEWForCTC": "Wav2Vec2ForCTC",
}
"""Families whose modules have the names of another's."""


def sounds(adapters: dict[str, Any]) -> dict[str, Any]:
    """Adapters for the recognisers of these families, from which those of other heads derive."""
    made = {name: _adapter(name, adapters[other]) for name, other in SAME_AS.items()}
    return {**made, "WhisperForConditionalGeneration": _whisper(adapters)}


def _whisper(adapters: dict[str, Any]) -> Any:
    """Whisper is Pegasus with two convolutions in the place of its encoder's embedding."""
    pegasus = adapters["PegasusForConditionalGeneration"]

    def init(self: Any, cfg: Any) -> None:
        pegasus.__init__(self, cfg)
        self.cfg.is_audio_model = True
        made = self.component_mapping
        del made["embed"]
        made["unembed"].name = "proj_out"
        self.component_mapping = {
            "audio_feature_extractor": GeneralizedComponent(name="model.encoder.conv1"),
            "feat_proj": GeneralizedComponent(name="model.encoder.conv2"),
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
            "require_symmetric_layers": False,
            "n_layers_from": "decoder",
        },
    )


def _adapter(name: str, base: Any) -> Any:
    def prepare_model(self: Any, hf_model: Any) -> None:
        import transformers

        family = getattr(transformers, name).base_model_prefix
        other = "wav2vec2"
        base.prepare_model(self, _Renamed(hf_model, family, other))
        for component in self.component_mapping.values():
            component.name = str(component.name).replace(f"{other}.", f"{family}.")

    return type(f"{name}Adapter", (base,), {"prepare_model": prepare_model})


class _Renamed:
    def __init__(self, model: Any, family: str, other: str) -> None:
        self._model = model
        if hasattr(model, family):
            setattr(self, other, getattr(model, family))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
