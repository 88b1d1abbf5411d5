"""What a checkpoint of sentence-transformers says of how a text becomes one vector.

``modules.json`` lists what runs one after the other: the model, a pooling, a normalisation. Each
has a folder with its settings. What is not explained (another module, a prompt that is put before
every text) is kept as a reason to refuse the checkpoint's own embedding; the model is loaded all
the same.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils.hub import cached_file

from lenslrp.errors import LoadError, first_line
from lenslrp.sentences import ACTIVATIONS, DenseLayer, Measure, SentenceEmbedding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODULES = "modules.json"
PREFIX = "pooling_mode_"

POOLING_NAMES = {
    "cls_token": "cls", "cls": "cls", "mean_tokens": "mean", "mean": "mean", "max_tokens": "max",
    "max": "max", "lasttoken": "last", "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean_tokens": "weighted_mean", "weightedmean": "weighted_mean",
}  # fmt: skip
"""sentence-transformers' names, in the order in which it puts several poolings after each other:
what follows ``pooling_mode_`` in its settings, or what ``pooling_mode`` says."""


def copy_sentence_model(files: list[Path], folder: Path) -> None:
    """The files of such a checkpoint as they are; the first lies at its top."""
    top = files[0].parent
    for file in files:
        place = folder / file.relative_to(top)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)


def is_sentence_model(name: str, revision: str | None) -> bool:
    """Whether ``modules.json`` has a directory or hub id run as a model without its head."""
    modules = _modules(name, revision)
    if not modules or _kind(name, modules[0]) != "Transformer":
        return False
    task = (_settings(name, revision, "sentence_bert_config.json") or {}).get("transformer_task")
    return task in (None, "feature-extraction")


def read_sentence_embedding(
    name: str, revision: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> SentenceEmbedding | None:
    """The embedding of a directory or hub id, ``None`` where it has no ``modules.json``.

    Raises:
        LoadError: settings that cannot be read.
    """
    modules = _modules(name, revision)
    if modules is None:
        return None
    text = _settings(name, revision, "sentence_bert_config.json") or {}
    general = _settings(name, revision, "config_sentence_transformers.json") or {}
    pooling: tuple[str, ...] = ()
    normalise, reasons = False, list[str]()
    dense = list[DenseLayer]()
    for place, module in enumerate(modules):
        kind = _kind(name, module)
        if kind == "Pooling" and place == 1:
            file = f"{module.get('path')}/config.json"
            pooling = _poolings(_settings(name, revision, file) or {})
            if not pooling:
                reasons.append(f"{file} names no pooling that is explained")
        elif kind == "Dense" and pooling and not normalise:
            layer = _dense(name, revision, str(module.get("path")))
            reasons += [layer] if isinstance(layer, str) else []
            dense += [layer] if isinstance(layer, DenseLayer) else []
        elif kind == "Normalize" and pooling:
            normalise = True
        elif (kind, place) != ("Transformer", 0):
            reasons.append(f"it has a module {kind}")
    if len(modules) < 2:
        reasons.append("it has no module Pooling")
    prompt = general.get("default_prompt_name")
    if prompt is not None:
        reasons.append(f"the prompt {prompt!r} is put before every text")
    if text.get("do_lower_case") and not _lowers(tokenizer):
        reasons.append("texts are put in lower case first")
    compared = general.get("similarity_fn_name") or "cosine"
    measure: Measure = "dot" if compared == "dot" else "cosine"
    if compared != measure:
        reasons.append(f"vectors are compared by {compared!r}")
    why = f"{name!r} does what is not explained: {'; '.join(reasons)}" if reasons else ""
    return SentenceEmbedding(
        pooling or "mean", normalise, measure, tuple(dense), text.get("max_seq_length"), why
    )


def _modules(name: str, revision: str | None) -> list[dict[str, Any]] | None:
    modules = _settings(name, revision, MODULES)
    if modules is None or (
        isinstance(modules, list) and all(isinstance(module, dict) for module in modules)
    ):
        return modules
    raise LoadError(f"{MODULES} of {name!r} is no list of modules")


def _kind(name: str, module: dict[str, Any]) -> str:
    if not isinstance(module.get("type"), str):
        raise LoadError(f"{MODULES} of {name!r} has a module without a type: {module}")
    return str(module["type"]).rpartition(".")[2]


def _lowers(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether a tokenizer puts text in lower case itself."""
    normaliser = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return normaliser is not None and normaliser.normalize_str("ÀB").islower()


def _poolings(settings: dict[str, Any]) -> tuple[str, ...]:
    """The poolings that a Pooling module's settings name; none where one of them is unknown."""
    mode = settings.get("pooling_mode")
    if mode is None:
        on = {key.removeprefix(PREFIX) for key, value in settings.items()
              if key.startswith(PREFIX) and value}  # fmt: skip
        mode = [each for each in POOLING_NAMES if each in on]
        mode += on.difference(mode)
    modes = [mode] if isinstance(mode, str) else list(mode)
    if not all(each in POOLING_NAMES for each in modes):
        return ()
    return tuple(POOLING_NAMES[each] for each in modes)


def _dense(name: str, revision: str | None, folder: str) -> DenseLayer | str:
    """A module Dense, or why it is not explained."""
    settings = _settings(name, revision, f"{folder}/config.json") or {}
    activation = str(settings.get("activation_function", "Tanh")).rpartition(".")[2]
    if activation not in ACTIVATIONS:
        return f"its module Dense has the activation {activation}"
    ends = {settings.get(f"module_{end}_name") for end in ("input", "output")}
    if settings.get("use_residual") or ends - {None, "sentence_embedding"}:
        return "its module Dense is more than a layer behind the pooling"
    path = _path(name, revision, f"{folder}/model.safetensors")
    if path is None:
        return f"{folder} has no model.safetensors: weights are read from safetensors only"
    try:
        weights = load_file(path)
        return DenseLayer(weights["linear.weight"], weights.get("linear.bias"), activation)
    except (OSError, SafetensorError, KeyError) as error:
        raise LoadError(f"the weights of {name}/{folder} cannot be read: {error!r}") from error


def _settings(name: str, revision: str | None, file: str) -> Any:
    """What a JSON file of a checkpoint holds, ``None`` where it has none.

    Raises:
        LoadError: it is no JSON.
    """
    path = _path(name, revision, file)
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{file} of {name!r} cannot be read: {first_line(error)}") from error


def _path(name: str, revision: str | None, file: str) -> Path | None:
    """A file of a checkpoint, ``None`` where it has none."""
    path = cached_file(
        name, file, revision=revision or "main",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )  # fmt: skip
    return None if path is None else Path(path)
