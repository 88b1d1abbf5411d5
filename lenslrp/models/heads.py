"""Adapters for the heads that transformers puts on a family, derived from the family's own adapter.

TransformerLens has an adapter for a family's language model. A classifier of that family, a tagger,
a question answerer and the bare model have the same blocks under another name, and other modules
around them. So their adapters are made, not written: entries of the family's component mapping that
lie in the base model keep their meaning; linear layers and norms outside it become components, the
one that gives the logits ``unembed``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn

from lenslrp.models.encoders import encoders
from lenslrp.models.images import image_models
from lenslrp.models.outputs import give_logits, score_rows, without_cache
from lenslrp.models.sounds import sounds, sum_at_hook_points

if TYPE_CHECKING:
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

LANGUAGE_MODELS = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
)
HEADS = (
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_XVECTOR_MAPPING_NAMES",
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)
"""The tables of transformers that say which class a family has with which head."""

CHOICE = "ForMultipleChoice"
LABELLED = (
    "Classification",
    "ForQuestionAnswering",
    "ForXVector",
    "ForNextSentencePrediction",
    CHOICE,
)


@cache
def offered() -> Mapping[str, type[ArchitectureAdapter]]:
    """Adapters by class name, beside those that TransformerLens has.

    They are those of encoders and image models that it has none for, and of every head of every
    family with an adapter. ``pyproject.toml`` lists them as entry points, by which
    TransformerLens finds them.
    """
    import transformers
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    native = dict(SUPPORTED_ARCHITECTURES)
    own = {**encoders(native), **image_models(native), **sounds(native)}
    added = {name: made for name, made in own.items() if name not in native}
    adapters = {**native, **added}
    known = set(dir(transformers))  # looking a class up would import its family
    for kind, language_model in families(adapters):
        for name in class_names(HEADS, kind):
            if name not in adapters and name in known:
                added.setdefault(name, _derive(name, language_model, adapters[language_model]))
    return added


def __getattr__(name: str) -> Any:
    """What an entry point names."""
    if not name.startswith("_") and name in offered():
        return offered()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def families(adapters: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Model types, each with its language model that has an adapter."""
    from transformers.models.auto import modeling_auto as auto

    kinds = dict.fromkeys(kind for table in LANGUAGE_MODELS for kind in getattr(auto, table))
    for kind in kinds:
        known = [name for name in class_names(LANGUAGE_MODELS, kind) if name in adapters]
        if known:
            yield kind, known[0]


def class_names(tables: tuple[str, ...], kind: str) -> Iterator[str]:
    from transformers.models.auto import modeling_auto as auto

    for table in tables:
        named = getattr(auto, table).get(kind, ())
        yield from (named,) if isinstance(named, str) else named


def _derive(name: str, language_model: str, base: Any) -> Any:
    def prepare_model(self: Any, hf_model: Any) -> None:
        import transformers

        prefix = getattr(transformers, language_model).base_model_prefix
        roots = {str(part.name).split(".")[0] for part in self.component_mapping.values()}
        family = "model" if prefix not in roots and "model" in roots else prefix
        base.prepare_model(self, _AsFamily(hf_model, family))
        bare = not name.endswith(LABELLED)
        self.component_mapping = mapping(self.component_mapping, hf_model, family, self.cfg, bare)
        self.cfg.output_logits_soft_cap = None  # a language model's
        if name.endswith("ForQuestionAnswering"):
            give_logits(hf_model)
        if name.endswith(CHOICE):
            score_rows(hf_model)
        takes = inspect.signature(type(hf_model).forward).parameters
        if hf_model.config.is_encoder_decoder and "use_cache" not in takes:
            without_cache(hf_model)

    def setup_hook_compatibility(self: Any, bridge: Any) -> None:
        if hasattr(base, "setup_hook_compatibility"):
            base.setup_hook_compatibility(self, bridge)
        sum_at_hook_points(bridge)

    return type(
        f"{name}Adapter",
        (base,),
        {
            "__doc__": f"{name}, derived from the adapter of {language_model}.",
            "language_model": language_model,
            "prepare_model": prepare_model,
            "setup_hook_compatibility": setup_hook_compatibility,
            "supports_generation": False,
            "supports_causal_loss": False,
        },
    )


class _AsFamily:
    """A model in which the base model is found under the family's name for it."""

    def __init__(self, model: nn.Module, family: str) -> None:
        self._model = model
        if not hasattr(model, family):
            setattr(self, family, _base(model)[1])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _base(model: Any) -> tuple[str, nn.Module]:
    """Where the base model is, with a dot at the end, and the base model: itself of a bare one."""
    prefix = model.base_model_prefix
    inner = getattr(model, prefix, None)
    return (f"{prefix}.", inner) if isinstance(inner, nn.Module) else ("", model)


def mapping(
    components: Mapping[str, Any], model: nn.Module, family: str, config: Any, bare: bool
) -> dict[str, Any]:
    """The component mapping of a model with a head.

    Args:
        components: of the family's language model.
        model: the model, of any head or none.
        family: the name under which the language model has its base model.
        config: the bridge's.
        bare: whether it has no head.
    """
    from transformer_lens.model_bridge.generalized_components import (
        LinearBridge,
        NormalizationBridge,
        UnembeddingBridge,
    )

    place, base = _base(model)
    inside = dict(model.named_modules())
    made = {}
    for key, component in components.items():
        path = str(component.name)
        nested = path.removeprefix(f"{family}.")
        if nested == path and not hasattr(base, path.split(".")[0]):
            continue  # the language model's head
        if f"{place}{nested}" in inside:
            component = copy.copy(component)
            component.name = f"{place}{nested}"
            made[key] = component
    if bare:
        return made
    trunk = {component.name.split(".")[0] for component in made.values()}
    outside = {path: module for path, module in inside.items() if path.split(".")[0] not in trunk}
    linear = [path for path, module in outside.items() if isinstance(module, nn.Linear)]
    for path in linear:
        if path == linear[-1]:
            made["unembed"] = UnembeddingBridge(name=path)
        else:
            made[path.replace(".", "_")] = LinearBridge(name=path)
    for path, module in outside.items():
        if isinstance(module, nn.LayerNorm):
            made[path.replace(".", "_")] = NormalizationBridge(name=path, config=config)
    return made
