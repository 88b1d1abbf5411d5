"""Adapters of PEFT: read with the model that they are for, or taken off one in memory.

An adapter in a directory is merged into the weights of its base model, which nobody else has. In
memory the model that is adapted is wrapped with the adapters in place, so that nothing of the
user's is merged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from lenslrp.errors import LoadError, MissingExtraError, first_line
from lenslrp.extras import require
from lenslrp.models.checkpoints import (
    UNREADABLE,
    read_checkpoint,
    read_tokenizer,
    require_same,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase


def read_model(name: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """What a directory or hub id holds, a model or an adapter of one.

    ``options`` are those of `lenslrp.models.checkpoints.read_checkpoint`.

    Raises:
        LoadError: see there; or an adapter that cannot be put on its model.
    """
    settings = _adapter_settings(name, options["revision"])
    if settings is None:
        return read_checkpoint(name, **options)
    return _with_adapter(name, settings, **options)


def _adapter_settings(name: str, revision: str | None) -> dict[str, Any] | None:
    """What ``adapter_config.json`` says, None where there is none."""
    path = Path(name, "adapter_config.json")
    if not Path(name).is_dir():
        try:
            settings_path = find_adapter_config_file(name, revision=revision)
        except (OSError, ValueError):
            return None  # neither is there anything else; the configuration's error says more
        if settings_path is None:
            return None
        path = Path(settings_path)
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        base = settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{path} names no base model: {first_line(error)}") from error
    if not base:
        raise LoadError(f"{path} names no base model: load the base, put the adapter on, and give "
                        "lenslrp.load the PeftModel")  # fmt: skip
    return dict(settings)


def _with_adapter(
    name: str, settings: dict[str, Any], **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The base model with the adapter merged into its weights."""
    base_name = str(settings["base_model_name_or_path"])
    try:
        require("peft", f"{name!r}, an adapter of {base_name!r},")
    except MissingExtraError as error:
        raise LoadError(str(error)) from error
    import peft

    folder = Path(name)
    if folder.is_dir() and not (folder / "adapter_model.safetensors").is_file():
        raise LoadError(
            f"{name!r} has no adapter_model.safetensors: weights are read from safetensors only"
        )
    adapter_tokenizer = read_tokenizer(name, options["revision"]) if folder.is_dir() else None
    base, tokenizer = read_checkpoint(base_name, **{**options, "revision": None})
    try:
        adapted = peft.PeftModel.from_pretrained(base, name, revision=options["revision"])
    except UNREADABLE as error:
        raise LoadError(
            f"the adapter {name!r} does not go onto {base_name!r}: {first_line(error)}"
        ) from error
    if not hasattr(adapted, "merge_and_unload"):
        raise LoadError(
            f"the adapter {name!r} changes the input, not the weights: it has no bridge"
        )
    if folder.is_dir():
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            keys = set(file.keys())
        require_same(name, "an adapter", set(peft.get_peft_model_state_dict(adapted)), keys)
    return adapted.merge_and_unload(), adapter_tokenizer or tokenizer


def inside_adapter(model: TransformerBridge) -> Any:
    """The model that a PeftModel adapts, its adapters in place; any other model as it is.

    Raises:
        LoadError: what is adapted is the input and not the weights.
    """
    if not any(cls.__name__ == "PeftModel" for cls in type(model).__mro__):
        return model
    for name, settings in model.peft_config.items():
        if getattr(settings, "is_prompt_learning", False):
            raise LoadError(
                f"the adapter {name!r} ({type(settings).__name__}) puts learned tokens before the "
                "input, which no bridge has; give the model that it adapts"
            )
    return model.get_base_model()
