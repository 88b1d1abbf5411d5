"""Adapters for speech encoders that TransformerLens has none for.

They are wav2vec 2.0's in all but names: convolutions over a waveform, a projection to frames,
positions by a convolution, and blocks of attention and MLP (Baevski et al. 2020, arXiv:2006.11477).
"""

from __future__ import annotations

from typing import Any

SAME_AS = {
    "UniSpeechForCTC": "Wav2Vec2ForCTC",
    "UniSpeechSatForCTC": "Wav2Vec2ForCTC",
    "Data2VecAudioForCTC": "Wav2Vec2ForCTC",
    "SEWForCTC": "Wav2Vec2ForCTC",
}
"""Families whose modules have the names of another's."""


def sounds(adapters: dict[str, Any]) -> dict[str, Any]:
    """Adapters for the recognisers of these families, from which those of other heads derive."""
    return {name: _adapter(name, adapters[other]) for name, other in SAME_AS.items()}


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
