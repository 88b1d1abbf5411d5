"""Adapters of PEFT: read with the model that they are for, or taken off one in memory.

An adapter in a directory is merged into the weights of its base model, which nobody else has,
unless they are packed: what is merged would be rounded to what they can hold. In memory the model
that is adapted is wrapped with the adapters in place, so that nothing of the user's is merged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
from lenslrp.models.quantised import is_quantised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


IN_PLACE: Mapping[str, str] = {
    "ADAPTION_PROMPT": "adds learned keys and values to attention",
    "LN_TUNING": "replaces norms (merge it: merge_and_unload)",
    "POLY": "mixes adapters by a task that each input names",
    "XLORA": "mixes adapters by a forward pass of its own",
}
"""Kinds of adapter that cannot stay in place, and what they do that no bridge has."""


def read_model(
    name: str, *, merge_adapter: bool = True, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """What a directory or hub id holds, a model or an adapter of one.

    Args:
        name: the directory or id.
        merge_adapter: merge an adapter into weights that are not packed.
        options: those of `lenslrp.models.checkpoints.read_checkpoint`.

    Raises:
        LoadError: see there; or an adapter that cannot be put on its model.
    """
    settings = _adapter_settings(name, options["revision"])
    if settings is None:
        return read_checkpoint(name, **options)
    return _with_adapter(name, settings, merge_adapter, **options)


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
    name: str, settings: dict[str, Any], merge: bool, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The base model with the adapter merged into its weights, or in place."""
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
    merges = merge and not is_quantised(base)
    model = adapted.merge_and_unload() if merges else inside_adapter(adapted.eval())
    return model, adapter_tokenizer or tokenizer


def inside_adapter(model: Any) -> Any:
    """The model that a PeftModel adapts, its adapters in place; any other model as it is.

    Raises:
        LoadError: what is adapted is the input and not the weights.
    """
    if not any(cls.__name__ == "PeftModel" for cls in type(model).__mro__):
        return model
    for name, settings in model.peft_config.items():
        kind = str(getattr(getattr(settings, "peft_type", None), "value", ""))
        does = IN_PLACE.get(kind)
        if getattr(settings, "is_prompt_learning", False):
            does = "puts learned tokens before the input"
        if does is not None:
            raise LoadError(
                f"the adapter {name!r} ({type(settings).__name__}) {does}, which no bridge has; "
                "give the model that it adapts"
            )
    return model.get_base_model()
